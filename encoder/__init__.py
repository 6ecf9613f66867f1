"""The one way from a text to its vector. Training, evaluation and export go through here and cannot disagree.

    str     -> Prompt   -> ids     [BOS | prefix | text, truncated | suffix | EOS]
    ids     -> batch    -> one row without padding, the shared prefix in it once; positions; where each text starts
    batch   -> forward  -> hidden states (T, D) of the layers that the contract names
    states  -> pool     -> (B, D), in float32
    vectors -> finish   -> cut to `dims`, normalized if the contract says so, in the order of the input

What decides a vector is written down in a `Contract`; a training run keeps it as `embedding.json` beside its adapter.
dtype, device, batch size and compilation are facts of the machine and no part of it.

    from encoder import Encoder
    encoder = Encoder.load("tiny", prompt="cluster", pooling="last")     # a preset, a folder, a hub id
    encoder = Encoder.load("runs/tiny")                                  # a training run, with its contract
    vectors = encoder.encode(["a text", "another"])                      # float32 (2, D)
    numbers, cosines = encoder.nearest(["a question"], texts, k=5)       # (1, 5) each

contract.py          what decides a vector, its file and its fingerprint
names.py             presets, folders, hub ids, runs: what a user may type (no torch)
base_models.py       fetching and loading a base model
processes.py         what torchrun starts (torch only where there are several)
runtime.py           device, dtype, memory
tokenization.py      texts to token ids, prompt included
packing.py           token ids to batches; attention of packed rows
embed_filter.py      directions of the unembedding matrix taken out of a vector
mean_direction.py    the direction of a mean taken out of vectors
attention_masks.py   tokens hidden from the last one, to see what its vector loses
token_attention.py   what the last token of a text attends to
token_prepending.py  states that tokens before the text take from the last one
checks.py            what shows only when a model runs
lora.py              the adapter: add, load, save, a fused layer
streaming.py         any number of texts in memory that does not grow
nearest.py           the nearest of any number of vectors
encoder.py           all of it together: load, tokenize, forward, pool, encode
"""

import os

# The rows of batches differ in length: without this PyTorch's allocator keeps a block for every length it has seen. It reads the
# variable at the first allocation on a GPU.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

_EXPORTS = {
    "Encoder": "encoder",
    "EncodingReport": "streaming",
    "TokenAttention": "token_attention",
    "Contract": "contract",
    "PoolingConfig": "contract",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str):
    """Import on first use: `encoder.contract` alone costs neither torch nor transformers."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
