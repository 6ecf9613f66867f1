"""From text files to packed tokens: documents by domain, some of them held out, a tokenizer, and one file of ids.

The file is a gzipped safetensors file: `ids` (N,) uint16; the tokenizer, the held-out text and the counts are its metadata.
"""

import argparse
import gzip
import itertools
import json
import random
import re
import zlib
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from files.console import InputError, say
from files.docstrings import bundled_task_files, contains_excluded, library_modules, read_allowed_docstrings, read_excluded
from files.reading import read_documents
from files.writing import write_atomic

BOS, EOS = "<s>", "</s>"
TOKENIZER_CHARACTERS = 60_000_000  # of training text that the tokenizer is learned from
TOKENS_FILE = "tokens.safetensors.gz"
PIECE_CHARACTERS = 600  # held-out text is scored in pieces of at most this length, each without context


def read_file(path: Path, keys: set[str]) -> list[str]:
    """The documents of one text file, without those that contain a text with one of the keys."""
    return [d for d in read_documents(path) if not contains_excluded(d, keys)]


def read_domains(folder: Path | None, docstrings: bool, exclude: list[Path]) -> dict[str, list[str]]:
    """Domain -> its distinct documents, in the order of the files; what the files `exclude` name is left out.

    Raises InputError for files that cannot be read and for a domain with fewer than two documents.
    """
    excluded = read_excluded(exclude)
    domains: dict[str, list[str]] = {}
    with ProcessPoolExecutor() as pool:
        if folder is not None:
            files = sorted(f for f in folder.iterdir() if f.name.endswith((".txt", ".txt.gz"))) if folder.is_dir() else []
            if not files:
                raise InputError(f"{folder} holds no .txt.gz or .txt file")
            for file, documents in zip(files, pool.map(partial(read_file, keys=excluded.keys), files), strict=True):
                domains.setdefault(re.sub(r"_\d+$", "", file.name.split(".txt")[0]), []).extend(documents)
        if docstrings:
            of_modules = pool.map(partial(read_allowed_docstrings, excluded=excluded), library_modules(), chunksize=64)
            domains["docstrings"] = list(itertools.chain.from_iterable(of_modules))
    domains = {name: list(dict.fromkeys(documents)) for name, documents in domains.items()}
    for name, documents in domains.items():
        if len(documents) < 2:
            raise InputError(f"domain {name} has {len(documents)} documents, needs two: one is held out (blank lines separate documents)")
    return domains


def cut_pieces(text: str, size: int) -> list[str]:
    """The text in pieces of at most `size` characters, cut before a space where there is one."""
    pieces = []
    while len(text) > size:
        at = text.rfind(" ", 1, size) if " " in text[1:size] else size
        pieces.append(text[:at])
        text = text[at:]
    return [*pieces, text]


def hold_out(documents: list[str], characters: int) -> tuple[list[str], list[str]]:
    """(held-out pieces, training documents): about `characters` characters are held out, at least one document, at most a tenth."""
    lengths = itertools.accumulate(len(d) for d in documents)
    n = next((i for i, length in enumerate(lengths, 1) if length > characters), len(documents))
    n = min(n, max(1, len(documents) // 10))
    pieces = [piece for document in documents[:n] for piece in cut_pieces(document, PIECE_CHARACTERS)]
    return pieces[: max(1, characters // PIECE_CHARACTERS)], documents[n:]


def train_tokenizer(documents: list[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE (Radford et al. 2019), each digit a token; BOS and EOS have the first two ids. It can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False)
    lengths = itertools.accumulate(len(d) for d in documents)
    tokenizer.train_from_iterator((d for d, n in zip(documents, lengths, strict=True) if n < TOKENIZER_CHARACTERS), trainer)
    return tokenizer


def pack(args: argparse.Namespace, path: Path) -> None:
    """Write the text to one file: `ids` (N,) uint16, BOS document EOS BOS document EOS ..., documents of all domains shuffled."""
    rng = random.Random(args.seed)
    domains = read_domains(args.texts, not args.no_docstrings, [*bundled_task_files(), *args.exclude])
    held_out, counts, documents = {}, {}, []
    for name, of_domain in domains.items():
        rng.shuffle(of_domain)
        held_out[name], trained = hold_out(of_domain, args.hold_out)
        counts[name] = {"documents": len(trained), "bytes": sum(len(d.encode()) for d in trained)}
        documents += trained
    rng.shuffle(documents)
    total = sum(c["bytes"] for c in counts.values())
    say(f"{len(documents):,} documents, {total / 1e6:.1f} MB: " + ", ".join(f"{k} {c['bytes'] / 1e6:.1f}" for k, c in counts.items()))
    if args.init:
        tokenizer = load_tokenizer(args.init)
    else:
        tokenizer = hub_tokenizer(train_tokenizer(documents, args.vocabulary).to_str(), args.positions)
    begin, end = ([] if i is None else [i] for i in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    packed = []
    for start in range(0, len(documents), 4096):
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(documents[start : start + 4096], add_special_tokens=False):
            packed.append(np.array([*begin, *encoding.ids, *end], np.uint16))
    ids = np.concatenate(packed)
    say(f"{len(ids):,} tokens, {total / len(ids):.2f} bytes each")
    metadata = {"tokenizer": tokenizer.backend_tokenizer.to_str(), "held_out": json.dumps(held_out), "counts": json.dumps(counts)}
    content = gzip.compress(save_arrays({"ids": ids}, metadata=metadata), compresslevel=6, mtime=0)
    write_atomic(path, lambda temporary: temporary.write_bytes(content))


class PackedText(NamedTuple):
    ids: Tensor  # (N,) int32
    tokenizer: str  # as JSON
    held_out: dict[str, list[str]]  # domain -> pieces of text
    counts: dict[str, dict[str, int]]  # domain -> its "documents" and "bytes" of training text


def read_packed(path: Path) -> PackedText:
    """What `pack` wrote. Raises InputError where the file is missing or another one."""
    try:
        with gzip.open(path) as f:
            content = f.read()
        ids = load_arrays(content)["ids"]
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        held_out, counts = (json.loads(metadata[name]) for name in ("held_out", "counts"))
        return PackedText(torch.from_numpy(ids.astype(np.int32)), metadata["tokenizer"], held_out, counts)
    except FileNotFoundError:
        raise InputError(f"no file {path}: make one with --pack-only") from None
    except (OSError, EOFError, zlib.error, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a packed file of this script ({error}): make one with --pack-only") from None


def hub_tokenizer(text: str, positions: int) -> PreTrainedTokenizerFast:
    """The tokenizer for AutoTokenizer. It puts BOS before a text, because every document began with BOS in training."""
    tokenizer = Tokenizer.from_str(text)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS, model_max_length=positions)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model in a folder. Raises InputError where packed ids could not hold its vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if len(tokenizer) > 65536:
        raise InputError(f"{folder} has {len(tokenizer):,} tokens: packed ids take 16 bits, 65,536 at most")
    return tokenizer
