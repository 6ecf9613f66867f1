"""What `export.py` needs: the folder that a serving runtime reads, and the proof that the runtime's vectors are ours.

folder            one role of a contract as a folder of sentence-transformers, which vLLM and TEI read as well
contract_pooling  the module of sentence-transformers for poolings that it lacks; copied into the folder
onnx_folder       the same for ONNX Runtime; onnx_converter makes the model, in a process of its own
gguf_folder       the same for llama.cpp; gguf_converter runs llama.cpp's own converter, in another environment
card              README.md of the folder
runtimes          vectors of a folder by each runtime, in a fresh process: the *_worker modules
verification      32 texts through all of them, and the name of the part that differs
hub               pushing the folder
"""
