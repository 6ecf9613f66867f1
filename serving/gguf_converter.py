"""llama.cpp's own converter, with what a file for embeddings needs beside.

    python gguf_converter.py LLAMA_CPP FOLDER OUT.gguf TYPE POOLING BOS EOS

LLAMA_CPP     folder that holds convert_hf_to_gguf.py
FOLDER        a causal language model as transformers writes it
TYPE          of the weights: f32, f16, bf16 or q8_0
POOLING       mean or last
BOS, EOS      1: llama.cpp puts the token around a plain text
Runs in an environment that has what the converter imports.
"""

import sys


def main(llama_cpp: str, folder: str, out: str, kind: str, pooling: str, bos: str, eos: str) -> None:
    sys.path.insert(0, llama_cpp)
    import convert_hf_to_gguf
    import gguf
    from conversion.base import TextModel

    known_pre, prepare = TextModel.get_vocab_base_pre, TextModel.prepare_metadata

    def pre_or_default(model: TextModel, tokenizer: object) -> str:
        """The converter knows the tokenizers of published models; of another one plain text may come out otherwise."""
        try:
            return known_pre(model, tokenizer)
        except NotImplementedError:
            return "default"

    def prepare_for_embeddings(model: TextModel, *args, **kwargs) -> None:
        prepare(model, *args, **kwargs)
        model.gguf_writer.add_pooling_type(gguf.PoolingType[pooling.upper()])
        model.gguf_writer.add_add_bos_token(bos == "1")
        model.gguf_writer.add_add_eos_token(eos == "1")

    TextModel.get_vocab_base_pre, TextModel.prepare_metadata = pre_or_default, prepare_for_embeddings
    sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", out, "--outtype", kind]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
