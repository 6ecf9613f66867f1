"""llama.cpp's own converter, with what a file for embeddings needs beside.

    python gguf_converter.py LLAMA_CPP FOLDER OUT.gguf TYPE POOLING BOS EOS N_TOKENS

LLAMA_CPP     folder that holds convert_hf_to_gguf.py
FOLDER        a causal language model as transformers writes it
TYPE          of the weights: f32, f16, bf16 or q8_0
POOLING       mean or last
BOS, EOS      1: llama.cpp puts the token around a plain text
N_TOKENS      of the longest sequence
Runs in an environment that has what the converter imports. Says in one line why it cannot convert, and exits with 1.
"""

import sys
from collections.abc import Callable


def with_older_names(load: Callable) -> Callable:
    """The converter reads a name that transformers 5 has moved into `rope_parameters`."""

    def load_hparams(*args, **kwargs) -> dict:
        config = load(*args, **kwargs)
        rope = config.get("rope_parameters") or {}
        if "partial_rotary_factor" in rope:
            config.setdefault("rotary_pct", rope["partial_rotary_factor"])
        return config

    return load_hparams


def or_default(find: Callable) -> Callable:
    """The converter knows the tokenizers of published models; of another one plain text may come out otherwise."""

    def get_vocab_base_pre(model: object, tokenizer: object) -> str:
        try:
            return find(model, tokenizer)
        except NotImplementedError:
            return "default"

    return get_vocab_base_pre


def for_embeddings(prepare: Callable, pooling: int, bos: bool, eos: bool, n_tokens: int) -> Callable:
    """Adds pooling and the tokens around a text to the metadata; exits where a sliding window would be left out."""

    def prepare_metadata(model, *args, **kwargs) -> None:
        prepare(model, *args, **kwargs)
        writer, config = model.gguf_writer, model.hparams
        window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
        written = any(key.endswith(".attention.sliding_window") for data in writer.kv_data for key in data)
        if window and window < n_tokens and not written:
            sys.exit(f"llama.cpp leaves out the sliding window of {window} tokens that this class has, and {n_tokens} have to be read")
        writer.add_pooling_type(pooling)
        writer.add_add_bos_token(bos)
        writer.add_add_eos_token(eos)

    return prepare_metadata


def main(llama_cpp: str, folder: str, out: str, kind: str, pooling: str, bos: str, eos: str, n_tokens: str) -> None:
    sys.path.insert(0, llama_cpp)
    import convert_hf_to_gguf
    import gguf
    from conversion.base import ModelBase, TextModel

    ModelBase.load_hparams = staticmethod(with_older_names(ModelBase.load_hparams))
    TextModel.get_vocab_base_pre = or_default(TextModel.get_vocab_base_pre)
    pooling_type = gguf.PoolingType[pooling.upper()]
    TextModel.prepare_metadata = for_embeddings(TextModel.prepare_metadata, pooling_type, bos == "1", eos == "1", int(n_tokens))
    sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", out, "--outtype", kind]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
