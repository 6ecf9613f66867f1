"""The one way from a text to its vector. Training, evaluation and export go through here and cannot disagree.

    str     -> Prompt   -> ids     [BOS | prefix | text, cut to fit | suffix | EOS]
    ids     -> batch    -> one row without padding, [BOS | prefix] in it once; positions; where each text starts
    batch   -> model    -> states (T, D) of the layers that the contract names
    states  -> pool     -> (B, D), in float32
    vectors -> finish   -> cut to `dims`, normalised if the contract says so, in the order of the input

What decides a vector is written down in a `Contract`; a training run keeps it as `embedding.json` beside its adapter.
dtype, device, batch size, compilation are facts of the machine and no part of it.

    from encoder import Encoder
    encoder = Encoder.load("tiny", prompt="cluster", pooling="last")     # a preset, a folder, a hub id
    encoder = Encoder.load("runs/tiny")                                  # a training run, with its own contract
    vectors = encoder.encode(["a text", "another"])                      # float32 (2, D)

Under torchrun every process calls `encode` with the same texts, does its share and gets all the vectors.

Legend: N texts, B sequences of a batch, T tokens of its row, L longest rest of a sequence, H heads, K of keys and values,
D hidden size.
"""

import contextlib
import copy
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from pooling_kernels import attention_pool, last_pool, mean_pool, query_pool
from prompts import ROLES, InputError, get_prompt

HERE = Path(__file__).resolve().parent
CONTRACT_FILE, ADAPTER_FILE, ADAPTER_CONFIG = "embedding.json", "adapter_model.safetensors", "adapter_config.json"
QUERY_FILE = "pooling.safetensors"  # what pooling `query` has learned
# what turns text into ids and ids into states
MODEL_FILES = (
    "model*.safetensors",
    "config.json",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.py",
)
PACKED_TYPES = ("llama", "mistral", "qwen3", "gemma3_text", "gpt_neox")  # tested: see tests/conftest.py; others are padded
POOLINGS = ("mean", "last", "position-mean", "attention", "query")
QUANTIZATIONS = ("nf4", "int8")
SCOPES = ("all", "text")
WINDOW, WINDOW_CHARACTERS = 16384, 2**25  # texts that are sorted by length, tokenised ahead and held in memory at a time
MIN_HEAD = 4  # tokens that must be shared before sharing them pays
DEFAULT_MAX_TOKENS = 512  # as in the paper's evaluation; three quarters of the positions where a model has fewer than 683
PROBES = ["A cat sleeps.", "Interest rates rose again this month.", "def add(a, b): return a + b", "Où est la gare ?", "42"]
transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class Preset:
    """A base model by a short name, and training defaults chosen to fit one 24 GB GPU (`tiny`: two CPU cores)."""

    base: str
    batch_size: int
    lr: float
    lora_rank: int = 64
    gradient_checkpointing: int = 0


PRESETS = {
    "tiny": Preset(str(HERE / "models" / "tiny"), 96, 2e-3),
    "smollm2-135m": Preset("HuggingFaceTB/SmolLM2-135M", 120, 2e-4),
    "pythia-160m": Preset("EleutherAI/pythia-160m", 120, 2e-4),
    "qwen3-0.6b": Preset("Qwen/Qwen3-0.6B", 120, 1e-4),
    "gemma-3-1b": Preset("google/gemma-3-1b-pt", 120, 1e-4, gradient_checkpointing=1),
    "llama-3.2-1b": Preset("meta-llama/Llama-3.2-1B", 120, 1e-4, gradient_checkpointing=1),
    "qwen3-4b": Preset("Qwen/Qwen3-4B", 120, 5e-5, gradient_checkpointing=1),
    "mistral-7b": Preset("mistralai/Mistral-7B-v0.1", 120, 5e-5, lora_rank=16, gradient_checkpointing=1),
}


# ---------------------------------------------------------------------------------------------------- the contract


@dataclass(frozen=True)
class Contract:
    """Everything that decides a vector besides the weights.

    base, revision       name of the base model; the hub's commit, or "sha256:..." of the files of a local folder
    prompts              {"query" | "document": {"prefix", "suffix"}}
    bos, eos             whether the id is put before the prefix / after the suffix
    max_tokens           a text is cut to this many tokens; the prompt never is
    pooling, scope       see POOLINGS; "text" = the text's own tokens, "all" = prompt and EOS too. "query" is attention of a
                         query that is learned with the adapter; an untuned base has none, and its mean is taken
    keep_bos             with scope "all", let BOS take part in mean and attention poolings (it swallows most attention)
    layers               -1 is the state after the final norm; 0 is the embedding layer's output, k that of block k, and
                         -2 that of the block before the last: raw residual states. Several layers are averaged.
    attention            "causal" or "bidirectional"
    normalize, dims      L2 norm 1; keep the first `dims` numbers only (before normalising)
    quantize             how the base's weights are held: None as they are, "nf4" in 4 bits, "int8"
    data                 {"name", "sha256"} of the training pairs, None for an untuned base
    """

    base: str
    revision: str
    prompts: dict
    bos: bool
    eos: bool
    max_tokens: int
    pooling: str
    scope: str
    keep_bos: bool = False
    layers: tuple[int, ...] = (-1,)
    attention: str = "causal"
    normalize: bool = True
    dims: int | None = None
    data: dict | None = None
    quantize: str | None = None
    version: int = 1

    def __post_init__(self):
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))

        def number(x, least=1):
            return isinstance(x, int) and not isinstance(x, bool) and x >= least

        def texts(x, names):
            return isinstance(x, dict) and set(x) == set(names) and all(isinstance(v, str) for v in x.values())

        prompts = self.prompts
        rules = (
            ("version", self.version == 1, "1 (written by a newer version of this project?)"),
            ("base", isinstance(self.base, str), "a name"),
            ("revision", isinstance(self.revision, str), "a commit or hash"),
            ("pooling", self.pooling in POOLINGS, f"one of {', '.join(POOLINGS)}"),
            ("scope", self.scope in SCOPES, f"one of {', '.join(SCOPES)}"),
            ("attention", self.attention in ("causal", "bidirectional"), "causal or bidirectional"),
            ("max_tokens", number(self.max_tokens), "a number of tokens above 0"),
            ("dims", self.dims is None or number(self.dims), "a number above 0, or nothing"),
            ("quantize", self.quantize is None or self.quantize in QUANTIZATIONS, f"one of {', '.join(QUANTIZATIONS)}, or nothing"),
            ("layers", isinstance(self.layers, tuple) and self.layers and all(number(i, -(10**6)) for i in self.layers), "layer numbers"),
            *((name, isinstance(getattr(self, name), bool), "true or false") for name in ("bos", "eos", "keep_bos", "normalize")),
            ("keep_bos", not self.keep_bos or (self.bos and self.scope == "all"), "left out unless BOS is added and the scope is all"),
            ("data", self.data is None or texts(self.data, ("name", "sha256")), "name and sha256 of the training pairs, or nothing"),
            (
                "prompts",
                isinstance(prompts, dict) and set(prompts) == set(ROLES) and all(texts(p, ("prefix", "suffix")) for p in prompts.values()),
                "a prefix and a suffix for query and for document",
            ),
        )
        for name, holds, wanted in rules:
            if not holds:
                raise InputError(f"{name} must be {wanted}: got {getattr(self, name)!r}")

    def view(self) -> "View":
        return View(self.pooling, self.scope, self.layers, self.keep_bos)

    def bare(self) -> bool:
        """Whether nothing but the text itself, and perhaps BOS, is given to the model."""
        return not self.eos and not any(part for prompt in self.prompts.values() for part in prompt.values())

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = CONTRACT_FILE) -> "Contract":
        """Raises InputError for unknown or missing fields: a contract half understood is not kept."""
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{where} is not valid JSON ({error}): restore it from the run that wrote it") from None
        known = {f.name for f in fields(cls)}
        if isinstance(found, dict):
            found.setdefault("quantize", None)  # runs of before it could be chosen
        if not isinstance(found, dict) or set(found) != known:
            names = set(found) if isinstance(found, dict) else set()
            raise InputError(f"{where}: unknown fields {sorted(names - known)}, missing fields {sorted(known - names)}")
        return cls(**found)

    @classmethod
    def read(cls, run: str | Path) -> "Contract":
        """The contract of a run's folder."""
        path = Path(run) / CONTRACT_FILE
        try:
            return cls.from_json(path.read_text(encoding="utf-8"), str(path))
        except UnicodeDecodeError:
            raise InputError(f"{path} is damaged (not UTF-8): restore it from the run that wrote it") from None

    def override(self, changes: dict, *, force: bool = False) -> "Contract":
        """The contract under flags that were given. A contradiction raises InputError with both values, unless `force`."""
        changes = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
        differing = {k: v for k, v in changes.items() if getattr(self, k) != v}
        if differing and not force:
            told = "; ".join(f"{k} is {getattr(self, k)!r} in the run, {v!r} was asked for" for k, v in differing.items())
            raise InputError(f"{told}. Leave the flag out, or add --override-contract")
        return replace(self, **changes)


def _file_hash(path: Path) -> str:
    """sha256 of a file. The hub's cache names large files by just that hash, so those are not read again."""
    blob = path.resolve().name
    if path.is_symlink() and len(blob) == 64 and not set(blob) - set("0123456789abcdef"):
        return blob
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _adapter_hash(run: Path) -> str:
    """Hash of the adapter's weights and of what its config says about how they are applied."""
    config = json.loads((run / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    names = ("r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "rank_pattern", "alpha_pattern")
    applied = {k: sorted(v) if isinstance(v := config.get(k), list) else v for k in names}
    query = _file_hash(run / QUERY_FILE) if (run / QUERY_FILE).is_file() else ""
    return hashlib.sha256((_file_hash(run / ADAPTER_FILE) + json.dumps(applied, sort_keys=True) + query).encode()).hexdigest()


def _folder_hash(folder: Path) -> str:
    """Hash of what turns ids into states and text into ids: weights, config, tokenizer."""
    files = sorted({f for pattern in MODEL_FILES for f in folder.glob(pattern) if f.is_file()})
    return hashlib.sha256("".join(f"{f.name} {_file_hash(f)}\n" for f in files).encode()).hexdigest()


# ------------------------------------------------------------------------------------------- tokens, batches, states


class Tokens(NamedTuple):
    """Texts as ids. `text` holds where each text's own tokens start and end; the first `head` ids are the same in all."""

    ids: list[list[int]]
    text: list[tuple[int, int]]
    head: int
    n_empty: int
    n_cut: int


class View(NamedTuple):
    """One reading of a forward pass; several can be had for the price of one."""

    pooling: str
    scope: str = "all"
    layers: tuple[int, ...] = (-1,)
    keep_bos: bool = False


class Batch(NamedTuple):
    """Sequences in one row without padding: [the head they share | the rest of the first | the rest of the second | ...]."""

    ids: Tensor  # (T,)
    positions: Tensor  # (T,) of each token in its sequence, the head included
    head: int  # tokens that all share and that stand in the row once; 0 where nothing is shared
    starts: np.ndarray  # (B+1,) where in the row each sequence's rest starts, and T
    spans: np.ndarray  # (B, 2) where in a sequence its text starts and ends
    bos: int  # 1 where sequences begin with BOS

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence (B,), the head included."""
        return self.head + np.diff(self.starts)

    def scope(self, view: View) -> tuple[np.ndarray, np.ndarray]:
        """First and one past the last token of each sequence that takes part in pooling: (B,), (B,).

        An empty text falls back to its prompt, and a sequence without a prompt to BOS.
        """
        end = self.lengths
        first = np.full_like(end, 0 if view.keep_bos else self.bos)
        if view.scope == "text":
            start, stop = self.spans.T
            first, end = np.where(start < stop, start, first), np.where(start < stop, stop, end)
        return np.where(first < end, first, 0), end

    def locate(self, first: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens [first, end) of every sequence -> places in the row (M,), positions (M,), the sequence of each (M,)."""
        size = end - first
        sequence = np.repeat(np.arange(len(size)), size)
        positions = np.arange(len(sequence)) + (first - np.cumsum(size) + size)[sequence]
        rest = positions - self.head + self.starts[sequence]
        return np.where(positions < self.head, positions, rest), positions, sequence


class States(NamedTuple):
    layers: dict[int, Tensor]  # layer number -> (T, D), a state for each token of the row
    attention: "_Attention"  # what the last layer's attention left behind
    last_only: bool = False  # the states are those of each sequence's last token alone, (B, D)


# -------------------------------------------------------------------------------------- the attention of packed rows

try:
    from torch.nn.attention.varlen import varlen_attn

    _VARLEN = inspect.signature(varlen_attn).parameters  # grew from release to release
except ImportError:
    _VARLEN = {}


def _flash_takes(query: Tensor) -> bool:
    """Half precision on a GPU of Ampere or later, torch 2.11 or later, heads of at most 256 numbers."""
    if not query.is_cuda or "window_size" not in _VARLEN or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    return (
        query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and (torch.version.hip or torch.cuda.get_device_capability(query.device) >= (8, 0))
    )


class _KeysReady(Exception):
    """The layer's keys and values are known; nothing more of this pass is wanted."""


class _Attention:
    """Attention in a packed row: a sequence sees the shared head and itself. One travels with every forward pass.

    On a GPU in half precision it is one call of flash attention for sequences of any length. Elsewhere sequences of like
    length, which sorting brings together, are laid under each other for PyTorch's SDPA.

    read   the layer whose keys, and whose queries of each sequence's last token, are kept for `scores`
    trim   the layer of which only each sequence's last token is wanted, see `Encoder._trimmed`
    """

    def __init__(self, batch: Batch, causal: bool, read: int | None = None, trim: int | None = None):
        self.batch, self.causal, self.read, self.trim = batch, causal, read, trim
        self.head, self.device = batch.head, batch.ids.device
        rests = np.diff(batch.starts)
        self.shape = len(rests), int(rests.max(initial=0))
        self.equal = bool((rests == self.shape[1]).all())
        self.keys: tuple[Tensor, Tensor] | None = None  # of the trimmed layer
        self.seen: tuple[Tensor, Tensor, float, int | None] | None = None  # of the layer that is read
        self._masks: dict[tuple, Tensor] = {}

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, dropout: float) -> Tensor:
        """query (T, H, d), key and value (T, K, d) -> (T, H, d); all of them B, not T, when a layer is trimmed."""
        if layer == self.read:
            self.seen = query[self.last], key, scale, window
        if layer == self.trim:
            if self.keys is None:
                self.keys = key, value
                raise _KeysReady
            key, value = self.keys
        attend = self.flash if _flash_takes(query) and not dropout else self.stacked
        return attend(query, key, value, scale, window, dropout, layer == self.trim)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    @functools.cached_property
    def last(self) -> Tensor:
        """Place in the row of each sequence's last token (B,)."""
        n = self.batch.lengths
        return self._tensor(self.batch.locate(n - 1, n)[0])

    def scores(self, places: np.ndarray, positions: np.ndarray, sequence: np.ndarray) -> Tensor:
        """What each sequence's last token gives to some tokens, as `Batch.locate` names them, before the softmax: (M, H)."""
        query, key, scale, window = self.seen
        query = query.unflatten(1, (key.shape[1], -1))  # (B, K, H/K, d)
        far = 0 if window is None else self.batch.lengths[sequence] - 1 - positions - window + self.causal  # above 0: out of reach
        at, of = self._tensor(places).split(8192), self._tensor(sequence).split(8192)  # (M, H, d) is large
        with torch.autocast(self.device.type, enabled=False):
            parts = [(query[b].float() * key[t].float()[:, :, None]).sum(-1).flatten(1) * scale for t, b in zip(at, of, strict=True)]
        return torch.cat(parts).masked_fill(self._tensor(np.broadcast_to(far, places.shape) > 0)[:, None], -torch.inf)

    # all sequences in one call

    @functools.cached_property
    def _spread(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """The head as a sequence of its own, then every whole sequence: places in the row, cu_seqlens of queries, of keys, longest."""
        n = self.batch.lengths
        places = self.batch.locate(np.zeros_like(n), n)[0]
        whole = np.cumsum([0, self.head, *n]) if self.head else np.cumsum([0, *n])
        own = [0, *self.batch.starts] if self.head else self.batch.starts
        cu = (self._tensor(np.asarray(x, np.int32)) for x in (own, whole))
        return self._tensor(np.concatenate([np.arange(self.head), places])), *cu, int(n.max())

    def flash(self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, _: float, trimmed: bool) -> Tensor:
        places, cu_query, cu_key, longest = self._spread
        if trimmed and self.head:
            places, cu_key = places[self.head :], cu_key[1:] - self.head
        if self.head:
            key, value = key.index_select(0, places), value.index_select(0, places)
        longest_query = 1 if trimmed else longest
        if trimmed:
            cu_query = torch.arange(len(query) + 1, dtype=torch.int32, device=self.device)
        if "enable_gqa" not in _VARLEN:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        extra = {"enable_gqa": True} if "enable_gqa" in _VARLEN else {}
        back = -1 if window is None else window - 1 if self.causal else window
        reach = (back, 0 if self.causal else back)  # the last query meets the last key, however many keys there are
        return varlen_attn(
            query, key, value, cu_query, cu_key, longest_query, longest, scale=scale, window_size=reach, **extra
        )  # fmt: skip

    # sequences under each other

    @functools.cached_property
    def _lines(self) -> tuple[Tensor, Tensor]:
        """Of the rests: which token lies at each place of (B, L), flat; at which place each token lies."""
        inside = np.arange(self.shape[1]) < np.diff(self.batch.starts)[:, None]
        token = np.where(inside, self.batch.starts[:-1, None] + np.arange(self.shape[1]), self.head)
        return self._tensor(token.ravel()), self._tensor(np.flatnonzero(inside))

    def _visible(self, window: int | None, trimmed: bool) -> Tensor | None:
        """Which keys (head + L) a query of each sequence sees: bool (B or 1, 1, L or 1, head + L); None: plainly causal, or all."""
        n, width = self.head, self.shape[1]
        if not trimmed and (self.equal or self.causal) and not n and (window is None or window >= width):
            return None
        if (window, trimmed) not in self._masks:
            lengths = self._tensor(self.batch.lengths)[:, None, None]
            key = torch.arange(n + width, device=self.device)
            distance = (lengths - 1 if trimmed else n + torch.arange(width, device=self.device)[None, :, None]) - key  # (B or 1, L, S)
            if self.causal:
                seen = (distance >= 0) & (distance < (n + width if window is None else window))
            else:
                seen = (key < lengths) & (distance.abs() <= (n + width if window is None else window))
                seen = seen | (distance + key >= lengths)  # a query behind its sequence's end must see something, or it is NaN
            self._masks[window, trimmed] = seen[:, None]
        return self._masks[window, trimmed]

    def stacked(self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, dropout: float, trimmed: bool) -> Tensor:
        n, (rows, width) = self.head, self.shape

        def lay(x):  # (T, H, d) -> (B, L, H, d)
            x = x[n:] if self.equal else x.flatten(1).index_select(0, self._lines[0]).unflatten(1, x.shape[1:])
            return x.unflatten(0, (rows, width))

        def with_head(x):  # (T, K, d) -> (B, head + L, K, d)
            return torch.cat([x[:n].expand(rows, *x[:n].shape), lay(x)], 1) if n else lay(x)

        def attend(q, k, v, visible, causal):  # (B, L, H, d) and (B, S, K, d) -> (B, L, H, d)
            settings = {"attn_mask": visible, "is_causal": causal, "scale": scale, "dropout_p": dropout}
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, **settings, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

        visible = self._visible(window, trimmed)
        if trimmed:
            return attend(query[:, None], with_head(key), with_head(value), visible, False)[:, 0]
        out = attend(lay(query), with_head(key), with_head(value), visible, self.causal and visible is None).flatten(0, 1)
        out = out if self.equal else out.index_select(0, self._lines[1])
        if not n:
            return out
        place = torch.arange(n, device=self.device)
        near = (place[:, None] - place < window).tril() if window is not None and window < n else None
        return torch.cat([attend(query[None, :n], key[None, :n], value[None, :n], near, near is None)[0], out])


@torch.compiler.disable  # also where hooks on layers, which compiled code does not see change, take effect
def _attention(module, query, key, value, attention_mask, packed: _Attention, scaling=None, dropout=0.0, sliding_window=None, **_):
    """What the model's layers call: query (1, H, T, d), key and value (1, K, T, d) -> (1, T, H, d)."""
    width, n = query.shape[2], len(packed.batch.ids)  # the row may have been filled up
    query, key, value = (x[0].transpose(0, 1)[:n] for x in (query, key, value))
    out = packed(module.layer_idx, query, key, value, scaling, sliding_window, dropout)
    return F.pad(out, (0, 0, 0, 0, 0, width - len(out)))[None], None


# There is no mask function of the same name, and so transformers makes no mask: who sees whom is known to `packed`.
AttentionInterface.register("packed", _attention)


def pick_device(device: str | None = None) -> torch.device:
    if device is None:
        number = int(os.environ.get("LOCAL_RANK", 0))  # of torchrun
        device = f"cuda:{number}" if torch.cuda.is_available() else "cpu"
    elif device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device {device!r} was asked for, but this PyTorch sees no CUDA device: leave it out or take cpu")
    try:
        return torch.device(device)
    except RuntimeError:
        raise InputError(f"unknown device {device!r}: take cpu, cuda or cuda:N") from None


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """None: float32 on a CPU, bfloat16 elsewhere. "auto": bfloat16 on CPUs that compute in it as well."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype == "auto":
        has_bf16 = device.type != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
        return torch.bfloat16 if has_bf16 else torch.float32
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in names:
        raise InputError(f"unknown dtype {dtype!r}: take auto, {', '.join(names)}")
    return names[dtype]


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on the device, None where that cannot be told."""
    if device.type == "cuda":  # what PyTorch holds and does not use is free as well
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as f:
            return next(1024 * int(line.split()[1]) for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@functools.cache
def processes() -> tuple[int, int, object]:
    """Rank and number of the processes that torchrun started, and their group for tensors on the CPU; (0, 1, None) for one alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1, None
    distributed, patience = torch.distributed, timedelta(days=7)  # one may be busy with its own work for long
    if not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=patience)
    return distributed.get_rank(), distributed.get_world_size(), distributed.new_group(backend="gloo", timeout=patience)


def agree(number: float, how: str) -> float:
    """The "min", "max" or "sum" of the numbers that all processes have."""
    _, world, group = processes()
    if world > 1:
        found = torch.tensor(number, dtype=torch.float64)
        torch.distributed.all_reduce(found, getattr(torch.distributed.ReduceOp, how.upper()), group=group)
        return type(number)(found)
    return number


def _texts(texts: Iterable[str]) -> Iterable[str]:
    if isinstance(texts, str):
        raise InputError("texts must be a list of strings: put a single text in brackets")
    return texts


# --------------------------------------------------------------------------------------------------------- loading


@functools.cache
def hub_answers(seconds: float = 3.0) -> bool:
    """Whether the model and data hub can be reached: decided once, within `seconds` whatever the network does."""
    if any(os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")):
        return False
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    address = urlsplit(getproxies().get(urlsplit(hub).scheme) or hub)
    answers = []

    def knock():
        try:
            socket.create_connection((address.hostname, address.port or 443), timeout=seconds).close()
            answers.append(True)
        except OSError:
            pass

    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(agree(len(answers), "min"))


def is_run(spec: str) -> bool:
    """A preset's name is that preset, whatever folder of the same name is around."""
    return spec not in PRESETS and (Path(spec) / CONTRACT_FILE).is_file()


def find_base(spec: str) -> tuple[str, str, str | None]:
    """A preset, folder or hub id (`org/name` or `org/name@revision`) -> name in the contract, source, revision."""
    if spec in PRESETS and not Path(PRESETS[spec].base).is_absolute():
        return PRESETS[spec].base, PRESETS[spec].base, None
    path = Path(PRESETS[spec].base if spec in PRESETS else spec).expanduser()
    if path.is_dir():
        bundled = [name for name, p in PRESETS.items() if Path(p.base) == path.resolve()]
        if not (path / "config.json").is_file():
            raise InputError(f"{spec}: a folder with neither {CONTRACT_FILE} (a run) nor config.json (a model)")
        return (bundled or [path.resolve().name])[0], str(path), None
    name, _, revision = spec.partition("@")
    if spec.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"no model {spec!r}: give a folder that exists, a hub id like org/name, or one of {', '.join(PRESETS)}")
    return name, name, revision or None


def _fetch(source: str, revision: str | None, trust_remote_code: bool) -> Path:
    """The folder of a hub model in the local cache, downloaded where it can be. Its name is the commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # of the client that the hub package uses

    wanted = [f for f in MODEL_FILES if trust_remote_code or f != "*.py"]
    online = hub_answers()  # without this, every file is asked for with retries, half a minute long
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=wanted, local_files_only=not online))
    except (HTTPError, OSError, ValueError) as error:
        where = "the hub has none that may be read" if online else "it is not on this machine, and the hub does not answer"
        raise InputError(f"cannot load {source!r}: {where} ({' '.join(str(error).split()).split('. ')[0][:200]})") from None


def _quantization(kind: str, dtype: torch.dtype):
    """What transformers is told to quantise the linear layers with; nf4 as QLoRA has it (Dettmers et al. 2023, arXiv 2305.14314)."""
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"quantize {kind} needs the package bitsandbytes: pip install bitsandbytes, or leave it out")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(load_in_4bit=True, **four)


def _load_pretrained(folder: Path, trust_remote_code: bool, dtype: torch.dtype, device: torch.device, attention: str, quantize: str | None):
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # unused weights of the language-model head are expected
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        known = config.model_type in PACKED_TYPES
        if not known and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise InputError(f"{folder} is a model of type {config.model_type!r}, no decoder: take one of {', '.join(PACKED_TYPES)}")
        if getattr(config, "use_bidirectional_attention", False):
            raise InputError(f"{folder} was trained to read in both directions (use_bidirectional_attention): it is no decoder")
        if not known and attention == "bidirectional":
            raise InputError(f"{folder}: bidirectional attention is not tested with models of type {config.model_type!r}")
        if attention == "bidirectional":
            config.is_causal = False
        settings = {"config": config, "dtype": dtype, "use_safetensors": True, "trust_remote_code": trust_remote_code}
        if quantize:
            settings |= {"quantization_config": _quantization(quantize, dtype), "device_map": {"": device}}
        model, report = AutoModel.from_pretrained(folder, output_loading_info=True, **settings)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, ImportError, SafetensorError, StrictDataclassError) as error:
        raise InputError(f"{folder} does not hold a whole model: {' '.join(str(error).split())[:300]}") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    if report["missing_keys"]:  # transformers fills them with random numbers
        raise InputError(f"{folder} does not hold a whole model: no weights for {sorted(report['missing_keys'])[:3]}")
    if not isinstance(getattr(model, "layers", None), nn.ModuleList):
        raise InputError(f"{folder} is a {type(model).__name__}, whose layers cannot be found: take one of {', '.join(PACKED_TYPES)}")
    if not tokenizer.is_fast:
        raise InputError(f"{folder}: its tokenizer has no fast version, which this project needs")
    return model, tokenizer


def _check_layer(index: int, n_layers: int) -> int:
    """Layer number of a contract -> 0..n_layers for raw residual states, -1 for the state after the final norm."""
    resolved = index if index >= -1 else n_layers + 1 + index
    if (index < -1 and resolved < 0) or resolved > n_layers:
        raise InputError(f"layer {index} does not exist: this model has blocks 1 to {n_layers}, 0 (embeddings) and -1 (final norm)")
    return resolved


class Encoder:
    """A decoder-only language model, a contract, and the way from texts to vectors. Make one with `Encoder.load`."""

    def __init__(self, model, tokenizer, contract, *, source, base_hash, device, dtype):
        self.decoder, self.tokenizer, self.contract = model, tokenizer, contract
        self.source, self.base_hash, self.adapter_hash = source, base_hash, None
        self.device, self.dtype = device, dtype
        self.peft, self.adapter_on = None, True  # the adapter's handle; its layers sit inside `decoder`
        width = model.config.hidden_size
        self.query = nn.Parameter(torch.zeros(1, width, device=device), requires_grad=False)  # of pooling `query`: zero makes it the mean
        self.sharded = False  # every process must run as many batches as the others
        self.blocks = model.layers
        # how a batch is run, never what comes out: no padding, the shared head once, of the last layer what is read
        self.pack, self.share_head, self.trim = model.config.model_type in PACKED_TYPES, True, True
        self.held = sys.maxsize  # tokens of a batch that memory has been seen to hold
        self.notes = [] if self.pack else [f"{model.config.model_type} models are not packed: texts are padded, which is slower"]
        self.n_empty = self.n_cut = 0  # texts since the last `warnings(clear=True)` that were empty, or too long
        model.set_attn_implementation("packed" if self.pack else "sdpa")
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        self._prepare()

    def _prepare(self) -> None:
        """Tokenise the prompts once, and refuse a contract that the model cannot hold."""
        c = self.contract
        for index in c.layers:
            _check_layer(index, len(self.blocks))
        if c.dims is not None and c.dims > self.decoder.config.hidden_size:
            raise InputError(f"dims {c.dims} is more than the {self.decoder.config.hidden_size} numbers of this model's vectors")
        self._prompt_ids = {role: tuple(self._plain_ids([p["prefix"], p["suffix"]])) for role, p in c.prompts.items()}
        around = max(len(a) + len(b) for a, b in self._prompt_ids.values()) + c.bos + c.eos
        positions = getattr(self.decoder.config, "max_position_embeddings", None)
        if positions and around + c.max_tokens > positions:
            room = f"take at most {positions - around}" if positions > around else "take a shorter prompt"
            raise InputError(f"max_tokens {c.max_tokens} + {around} tokens of prompt do not fit the model's {positions} positions: {room}")

    def reread(self, **changes) -> "Encoder":
        """The same weights in memory under a changed contract, for side-by-side readings of an untuned base."""
        other = copy.copy(self)
        other.contract, other.notes = replace(self.contract, **changes), list(self.notes)
        other._prepare()
        return other

    @classmethod
    def load(
        cls,
        spec: str = "tiny",
        *,
        dtype: str | torch.dtype | None = None,
        device: str | None = None,
        override_contract: bool = False,
        trust_remote_code: bool = False,
        shard: bool = False,
        **overrides,
    ) -> "Encoder":
        """Load a preset, a folder, a hub id or a training run.

        dtype       None: float32 on CPU, bfloat16 on CUDA; "auto", "float32", "bfloat16", "float16"
        shard       leave the weights on the CPU until `shard` deals them out
        overrides   contract fields: prompt (preset name or template), pooling, scope, layers, max_tokens, bos, eos,
                    keep_bos, attention, normalize, dims, quantize. None counts as not given. On a run, a value that contradicts
                    its contract raises InputError unless `override_contract`.
        """
        overrides = {k: v for k, v in overrides.items() if v is not None}
        settable = {f.name for f in fields(Contract)} - {"base", "revision", "version"} | {"prompt"}
        if set(overrides) - settable:
            raise InputError(f"unknown settings {sorted(set(overrides) - settable)}: there are {', '.join(sorted(settable))}")
        if "prompt" in overrides:
            overrides["prompts"] = get_prompt(overrides.pop("prompt")).roles()
        device = pick_device(device)
        dtype = pick_dtype(dtype, device)
        run, contract = None, None
        if is_run(spec):
            run = Path(spec)
            contract = Contract.read(run).override(overrides, force=override_contract)
            spec = _base_of_run(run, contract)
        name, source, revision = find_base(spec)
        if contract and not Path(source).is_dir():
            revision = contract.revision
        attention = contract.attention if contract else overrides.get("attention", "causal")
        local = Path(source).is_dir()
        folder = Path(source) if local else _fetch(source, revision, trust_remote_code)
        quantize = contract.quantize if contract else overrides.get("quantize")
        model, tokenizer = _load_pretrained(folder, trust_remote_code, dtype, device, attention, quantize)
        base_hash = _folder_hash(folder)
        revision = f"sha256:{base_hash[:16]}" if local else folder.name
        if contract and contract.revision != revision:
            raise InputError(
                f"{run}: trained on {contract.base} {contract.revision}, but {source} now holds {revision}: bring the old weights back"
            )
        if contract is None:
            contract = _default_contract(name, revision, overrides, model.config, tokenizer)
        model.requires_grad_(False).eval()
        if not quantize and not shard:
            model.to(device)
        encoder = cls(model, tokenizer, contract, source=source, base_hash=base_hash, device=device, dtype=dtype)
        if run:
            encoder._load_adapter(run)
        return encoder

    def compile(self) -> None:
        """torch.compile the layers, once for all lengths: worth it for many texts. On a CPU it needs a C++ compiler."""
        if self.device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
            raise InputError("compiling for a CPU needs a C++ compiler, g++ or clang++: install one, or do not compile")
        for block in self.blocks:
            block.compile(dynamic=True)

    # ------------------------------------------------------------------------------------------------ identity

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the contract and the base's and the adapter's files: equal vectors or a different name."""
        settings = {k: v for k, v in asdict(self.contract).items() if k != "base"}  # a folder's name changes no vector
        if settings["quantize"] is None:
            del settings["quantize"]  # fingerprints of before it could be chosen
        parts = (json.dumps(settings, sort_keys=True), self.base_hash, self.adapter_hash or "")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    # ------------------------------------------------------------------------------------------------- adapter

    def add_adapter(self, rank: int, alpha: int | None = None, dropout: float = 0.0, **options) -> int:
        """LoRA on every linear layer of every block, weights in float32. Returns the number of trainable parameters.

        options     peft's own, such as use_rslora and use_dora
        """
        from peft import LoraConfig

        targets = sorted({n.split(".")[-1] for n, m in self.blocks.named_modules() if isinstance(m, nn.Linear)})
        config = LoraConfig(r=rank, lora_alpha=alpha or rank, lora_dropout=dropout, target_modules=targets, bias="none", **options)
        self.peft = _wrap(self.decoder, config)
        self.query.requires_grad_(self.contract.pooling == "query")
        return sum(p.numel() for p in self.trainable().values())

    def trainable(self) -> dict[str, nn.Parameter]:
        """What is trained by name: the adapter, and the query of pooling `query`."""
        return {n: p for n, p in (*self.peft.named_parameters(), ("query", self.query)) if p.requires_grad}

    def shard(self) -> None:
        """Deal the base's weights out to torchrun's processes, a block at a time (FSDP2); the adapter stays whole in each.

        From then on all processes have to run equally many batches: `encode` sees to it, and so does training.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        whole = {p for p in self.decoder.parameters() if p.requires_grad}
        for parameter in whole:
            parameter.data = parameter.data.to(self.device)
        mesh = init_device_mesh(self.device.type, (processes()[1],))
        for module in (*self.blocks, self.decoder):
            fully_shard(module, mesh=mesh, ignored_params=whole)
        self.sharded = True

    def save(self, folder: Path) -> None:
        """Write adapter, its config and the contract, each complete or not at all."""
        from peft import get_peft_model_state_dict

        folder.mkdir(parents=True, exist_ok=True)
        weights = {k: v.detach().cpu().contiguous() for k, v in get_peft_model_state_dict(self.peft).items()}
        write_atomic(folder / ADAPTER_FILE, lambda path: save_file(weights, path, metadata={"format": "pt"}))
        if self.contract.pooling == "query":
            query = {"query": self.query.detach().cpu()}
            write_atomic(folder / QUERY_FILE, lambda path: save_file(query, path, metadata={"format": "pt"}))
        with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".tmp") as scratch:
            config = self.peft.peft_config["default"]
            config.base_model_name_or_path = self.source if not Path(self.source).is_dir() else str(Path(self.source).resolve())
            config.save_pretrained(scratch)
            os.replace(Path(scratch) / ADAPTER_CONFIG, folder / ADAPTER_CONFIG)
        write_atomic(folder / CONTRACT_FILE, lambda path: Path(path).write_text(self.contract.to_json(), encoding="utf-8"))
        self.adapter_hash = _adapter_hash(folder)

    def _load_adapter(self, run: Path) -> None:
        from peft import LoraConfig, set_peft_model_state_dict

        if not (run / ADAPTER_FILE).is_file():
            raise InputError(f"{run} has a contract but no {ADAPTER_FILE}: its training was stopped before the first checkpoint")
        try:
            self.peft = _wrap(self.decoder, LoraConfig.from_pretrained(run))
            found = set_peft_model_state_dict(self.peft, load_file(run / ADAPTER_FILE))
        except (SafetensorError, json.JSONDecodeError, RuntimeError, ValueError, TypeError) as error:
            raise InputError(f"the adapter in {run} is damaged or does not fit its base: {' '.join(str(error).split())[:200]}") from None
        lost = [k for k in found.missing_keys if "lora_" in k]
        if found.unexpected_keys or lost:
            raise InputError(f"{run / ADAPTER_FILE} does not fit its base: missing {lost[:3]}, unexpected {found.unexpected_keys[:3]}")
        self.peft.requires_grad_(False).eval()
        if self.contract.pooling == "query":
            try:
                self.query.data.copy_(load_file(run / QUERY_FILE)["query"])
            except (OSError, SafetensorError, KeyError, RuntimeError) as error:
                raise InputError(f"{run / QUERY_FILE} is missing or damaged ({' '.join(str(error).split())[:100]})") from None
        self.adapter_hash = _adapter_hash(run)

    @property
    def merged(self) -> bool:
        """Whether the adapter is folded into the base's weights, which all readings of this model share."""
        return any(layer.merged for layer in itertools.islice((m for m in self.decoder.modules() if hasattr(m, "merged")), 1))

    def untuned(self) -> "Encoder":
        """The base model alone under the same contract, from the same weights in memory."""
        if self.merged:
            raise InputError("the adapter is merged into the base: load the run again to read the base alone")
        other = self.reread(data=None)
        other.adapter_on, other.adapter_hash = False, None
        other.query = nn.Parameter(torch.zeros_like(self.query), requires_grad=False)
        return other

    @torch.no_grad()
    def merge(self) -> float:
        """Fold the adapter into the base's weights, so that it costs nothing a token; the base alone is gone from memory.

        Returns the drift: the largest 1 - cosine between vectors before and after, over a few texts. In bfloat16 the sum
        is rounded like any weight; a quantised base is left as it is, for the sum would be quantised too.
        """
        if self.peft is None or self.merged or self.contract.quantize:
            return 0.0
        counts = self.n_empty, self.n_cut
        before = torch.from_numpy(self.encode(PROBES)).double()
        self.peft.merge_adapter()
        after = torch.from_numpy(self.encode(PROBES)).double()
        self.n_empty, self.n_cut = counts
        return max(0.0, 1 - F.cosine_similarity(before, after).min().item())

    # ---------------------------------------------------------------------------------- tokenise, run, pool, finish

    def _plain_ids(self, texts: list[str]) -> list[list[int]]:
        backend = self.tokenizer.backend_tokenizer  # the Python wrapper around it takes as long again
        return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)] if texts else []

    def tokenise(self, texts: Iterable[str], role: str = "document", *, number: int = 0) -> Tokens:
        """Prefix, text and suffix are tokenised separately; the text is cut to `max_tokens`, the prompt never is.

        number      of the first text, in error messages
        """
        tokens = self._tokenise(texts, role, number)
        self.n_empty += tokens.n_empty
        self.n_cut += tokens.n_cut
        return tokens

    def _tokenise(self, texts: Iterable[str], role: str, number: int) -> Tokens:
        if role not in ROLES:
            raise InputError(f"unknown role {role!r}: take one of {', '.join(ROLES)}")
        texts = list(_texts(texts))
        for i, text in enumerate(texts, number):
            if not isinstance(text, str):
                raise InputError(f"text {i} is {type(text).__name__} {text!r}, not a string")
        prefix, suffix = self._prompt_ids[role]
        c = self.contract
        head = ([self.tokenizer.bos_token_id] if c.bos else []) + prefix
        tail = suffix + ([self.tokenizer.eos_token_id] if c.eos else [])
        ids, spans, n_empty, n_cut = [], [], 0, 0
        for at in range(0, len(texts), 512):  # what the tokenizer makes of a text is many times its size
            part = texts[at : at + 512]
            try:
                found = self._plain_ids(part)
            except TypeError:  # half of a surrogate pair, as JSON may carry it, is no character
                broken, text = next((i, t) for i, t in enumerate(part, number + at) if t.encode("utf-8", "replace").decode() != t)
                raise InputError(f"text {broken} holds half a surrogate pair and cannot be written as UTF-8: {text[:60]!a}") from None
            for own in found:
                n_empty += not own
                n_cut += len(own) > c.max_tokens
                own = own[: c.max_tokens]
                ids.append(head + own + tail)
                spans.append((len(head), len(head) + len(own)))
        return Tokens(ids, spans, len(head), n_empty, n_cut)

    def _shared(self, tokens: Tokens) -> int:
        """How many tokens stand in a batch once, before all its texts. They see nothing of a text only if attention is causal."""
        worth = self.pack and self.share_head and self.contract.attention == "causal" and tokens.head >= MIN_HEAD
        return tokens.head if worth else 0

    def collate(self, tokens: Tokens, rows: list[int]) -> Batch:
        """The chosen rows as one packed batch on the device."""
        head = self._shared(tokens) if len(rows) > 1 else 0
        rests = [tokens.ids[i][head:] for i in rows]
        sizes = np.array([len(r) for r in rests])
        starts = head + np.concatenate([[0], np.cumsum(sizes)])
        ids = np.fromiter(itertools.chain(tokens.ids[rows[0]][:head], *rests), np.int64, starts[-1])
        positions = np.arange(len(ids))
        positions[head:] += head - np.repeat(starts[:-1], sizes)
        on_device = (torch.from_numpy(x).to(self.device) for x in (ids, positions))
        return Batch(*on_device, head, starts, np.array([tokens.text[i] for i in rows]), int(self.contract.bos))

    def batches(self, tokens: Tokens, rows: list[int], batch_tokens: int | None = None) -> Iterator[tuple[list[int], Batch]]:
        """`rows` sorted by length, in batches of `batch_tokens` tokens (default: 2,048 on a CPU, else 32,768)."""
        for chosen in self._plan(tokens, rows, batch_tokens or self._usual_budget()):
            yield chosen, self.collate(tokens, chosen)

    def _plan(self, tokens: Tokens, rows: list[int], budget: int) -> list[list[int]]:
        """Sequences of like length together, longest first; where they are padded, padding counts."""
        cost = {i: self._cost(tokens, i) for i in rows}
        order = sorted(rows, key=lambda i: -cost[i])
        total, plan, room = sum(cost[i] for i in order), [], 0
        even = total / max(1, -(-total // budget))  # as many batches as it takes, of about the same size
        for i in order:
            size = cost[i if self.pack or not plan else plan[-1][0]]
            if not plan or size > room or budget - room >= even:
                plan.append([])
                size, room = cost[i], budget
            plan[-1].append(i)
            room -= size
        return plan

    def _cost(self, tokens: Tokens, row: int) -> int:
        """Tokens that a sequence adds to a batch; its keys and values are laid beside those of a shared head, if there is one."""
        shared = self._shared(tokens)
        return len(tokens.ids[row]) - shared + shared // 8

    def _usual_budget(self) -> int:
        """Tokens of a batch: on a CPU larger ones are slower, on a GPU smaller ones."""
        return 2048 if self.device.type == "cpu" else 32768

    def _memory_budget(self) -> int:
        """The usual budget, or less where memory is short; in all processes the same."""
        config = self.decoder.config
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        # what a layer holds of a token at a time, with the norms' float32 copies: an estimate, and half of the rest is left
        token = torch.empty(0, dtype=self.dtype).element_size() * (16 * config.hidden_size + 4 * inner)
        free = free_memory(self.device)
        usual = self._usual_budget()
        return agree(usual if free is None else max(256, min(usual, int(0.5 * free / token))), "min")

    def run(self, batch: Batch, views: list[View] | None = None) -> States:
        """One forward pass -> the states that `views` read (default: the contract's)."""
        views = views or [self.contract.view()]
        last_block = len(self.blocks) - 1
        numbers = {index: _check_layer(index, len(self.blocks)) for view in views for index in view.layers}
        scores = any(v.pooling == "attention" for v in views)
        if scores and not self.pack:
            raise InputError(f"{type(self.decoder).__name__} does not let its attention be read: take another pooling")
        at_end = all(v.pooling == "last" and (batch.scope(v)[1] == batch.lengths).all() for v in views)
        trim = self.trim and self.pack and at_end and set(numbers.values()) == {-1} and len(batch.ids) > len(batch.spans)
        again = self.decoder.training and getattr(self.blocks[-1], "gradient_checkpointing", False)  # without the hook
        trim = trim and not again and batch.lengths.min() > 0
        causal = self.contract.attention == "causal"
        packed = _Attention(batch, causal, last_block if scores else None, last_block if trim else None)
        if not len(batch.ids):  # sequences without a token
            return States({index: torch.zeros(0, self.decoder.config.hidden_size, device=self.device) for index in numbers}, packed)
        seen, hooks = {}, []

        def keep(number):
            def hook(_, args, kwargs, output=None):
                state = output if output is not None else args[0] if args else kwargs["hidden_states"]
                seen[number] = state[0] if isinstance(state, tuple) else state

            return hook

        for number in set(numbers.values()) - {-1}:
            block = self.blocks[max(number - 1, 0)]
            register = block.register_forward_hook if number else block.register_forward_pre_hook
            hooks.append(register(keep(number), with_kwargs=True))
        if trim:
            hooks.append(self.blocks[-1].register_forward_pre_hook(self._trimmed(packed), with_kwargs=True))
        try:
            if not self.adapter_on and self.merged:
                raise InputError("the adapter was merged into the base meanwhile: load the run again to read the base alone")
            with self.peft.disable_adapter() if self.peft and not self.adapter_on else contextlib.nullcontext():
                if self.pack:  # filled up: matrix products prepare themselves for every new length, and keep that in memory
                    fill = (0, -len(batch.ids) % (64 if len(batch.ids) > 512 else 8))
                    ids, positions = (F.pad(x, fill)[None] for x in (batch.ids, batch.positions))
                    inputs = {"input_ids": ids, "position_ids": positions, "packed": packed}
                else:
                    inputs, places = self._padded(batch)
                seen[-1] = self.decoder(**inputs, use_cache=False).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        flat = {number: state[0, : len(batch.ids)] if self.pack else state[places] for number, state in seen.items()}
        return States({index: flat[number] for index, number in numbers.items()}, packed, trim)

    @staticmethod
    def _trimmed(packed: _Attention):
        """A hook before the last layer that leaves each sequence's last token alone, once all keys and values are known."""

        def hook(block, args, kwargs):
            with contextlib.suppress(_KeysReady):
                block.forward(*args, **kwargs)
            kwargs |= {"position_embeddings": tuple(x[:, packed.last] for x in kwargs["position_embeddings"])}
            return (args[0][:, packed.last], *args[1:]), kwargs

        return hook

    def _padded(self, batch: Batch) -> tuple[dict, tuple[Tensor, Tensor]]:
        """For a model that cannot be packed: its inputs, and where each of the row's tokens went."""
        n = batch.lengths
        _, positions, sequence = batch.locate(np.zeros_like(n), n)
        places = tuple(torch.from_numpy(x).to(self.device) for x in (sequence, positions))
        ids, mask = (torch.zeros(len(n), int(n.max()), dtype=torch.long, device=self.device) for _ in range(2))
        ids[places], mask[places] = batch.ids, 1
        return {"input_ids": ids, "attention_mask": mask}, places

    def pool(self, states: States, batch: Batch, view: View | None = None) -> Tensor:
        """States -> (B, D) float32, as `view` says (default: the contract), then finished: cut to dims, normalised."""
        c = self.contract
        view = view or c.view()
        first, end = batch.scope(view)
        if states.last_only and view.pooling != "last":
            raise ValueError(f"these states are those of last tokens: give {view} to `run` as well")
        if view.pooling == "last":
            first = np.maximum(end - 1, 0)
        places, positions, sequence = found = batch.locate(first, end)
        at = (torch.from_numpy(x).to(self.device) for x in (places, np.concatenate([[0], np.cumsum(end - first)])))
        where, cu_seqlens = at
        whole = states.last_only or (len(places) == len(batch.ids) and not batch.head)  # nothing is left out
        layers = [states.layers[i] if whole else states.layers[i].index_select(0, where) for i in view.layers]
        values = layers[0] if len(layers) == 1 else torch.stack([x.float() for x in layers]).mean(0)
        if view.pooling == "mean":
            vectors = mean_pool(values, cu_seqlens=cu_seqlens)
        elif view.pooling == "position-mean":  # weight i for the scope's i-th token: SGPT, Muennighoff 2022, arXiv 2202.08904
            weights = torch.from_numpy((positions - first[sequence] + 1).astype(np.float32)).to(self.device)
            vectors = mean_pool(values, cu_seqlens=cu_seqlens, weights=weights)
        elif view.pooling == "last":
            vectors = last_pool(values, cu_seqlens=cu_seqlens)
        elif view.pooling == "attention":
            vectors = attention_pool(values, states.attention.scores(*found), cu_seqlens=cu_seqlens)[0].mean(1)
        elif view.pooling == "query":
            vectors = query_pool(values, self.query, cu_seqlens=cu_seqlens)[0][:, 0]
        else:
            raise InputError(f"unknown pooling {view.pooling!r}: take one of {', '.join(POOLINGS)}")
        if c.dims is not None:
            vectors = vectors[:, : c.dims]
        return F.normalize(vectors, dim=-1) if c.normalize else vectors

    @torch.no_grad()
    def _attempt(self, tokens: Tokens, rows: list[int], views: list[View]) -> list[Tensor] | None:
        """The vectors of one batch for each view, on the device; None if memory does not hold it."""
        try:
            batch = self.collate(tokens, rows)
            states = self.run(batch, views)
            return [self.pool(states, batch, view).float() for view in views]
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return None

    def _vectors(self, tokens: Tokens, rows: list[int], views: list[View]) -> Iterator[tuple[list[int], list[Tensor]]]:
        """`rows` with their vectors. What does not fit into memory is halved, and so are the batches that follow."""
        size = sum(self._cost(tokens, i) for i in rows)
        if len(rows) == 1 or size <= self.held:
            if found := self._attempt(tokens, rows, views):
                yield rows, found
                return
            if len(rows) == 1:
                long = len(tokens.ids[rows[0]])
                raise InputError(
                    f"a text of {long} tokens, with its prompt, does not fit into memory: lower max_tokens or take another dtype"
                )
            if self.sharded:
                raise InputError(f"{size} tokens do not fit into memory: lower batch_tokens")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.held = max(1, size // 2)
            self.notes.append(f"out of memory at {size} tokens: batches were halved to {self.held}")
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            yield from self._vectors(tokens, half, views)

    def stream(
        self,
        texts: Iterable[str],
        role: str = "document",
        *,
        views: list[View] | None = None,
        batch_tokens: int | None = None,
        done: Callable[[int], object] = lambda n: None,
    ) -> Iterator[list[np.ndarray]]:
        """Texts -> float32 (n, D) for each view, at most `WINDOW` texts at a time, in order, in memory that does not grow.

        The next texts are read and tokenised, in a thread, while the model runs on these. A sequence without a single token
        (no BOS, no prompt, empty text) is a vector of zeros. Under torchrun every process takes every n-th batch, and all
        get all vectors. `done` is told the number of texts after every batch.
        """
        views = views or [self.contract.view()]
        width = self.contract.dims or self.decoder.config.hidden_size
        rank, world, group = processes()
        budget = batch_tokens or self._memory_budget()
        self.decoder.eval()
        source, number, closed = iter(_texts(texts)), 0, False

        def ahead() -> Tokens:
            nonlocal number
            chunk, characters = [], 0
            for text in source:
                chunk.append(text)
                characters += len(text) if isinstance(text, str) else 0
                if closed or len(chunk) == WINDOW or characters > WINDOW_CHARACTERS:
                    break
            number += len(chunk)
            return self._tokenise(chunk, role, number - len(chunk))

        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(ahead)
            try:
                while (tokens := coming.result()).ids:
                    coming = pool.submit(ahead)
                    self.n_empty += tokens.n_empty
                    self.n_cut += tokens.n_cut
                    plan = self._plan(tokens, [i for i, ids in enumerate(tokens.ids) if ids], budget)
                    found = []  # stays on the device until all is under way: a GPU need not wait
                    for rows in plan[rank::world]:
                        found += self._vectors(tokens, rows, views)
                        done(len(rows))
                    if self.sharded and rank >= (len(plan) % world or world):
                        self._attempt(tokens, plan[0], views)  # keep step with the processes that have one more
                    out = [np.zeros((len(tokens.ids), width), dtype=np.float32) for _ in views]
                    for rows, vectors in found:
                        for array, part in zip(out, vectors, strict=True):
                            array[rows] = part.cpu().numpy()
                    if world > 1:
                        for array in out:
                            torch.distributed.all_reduce(torch.from_numpy(array), group=group)  # zeros wherever another process wrote
                    done(len(tokens.ids) - sum(map(len, plan[rank::world])))
                    yield out
            finally:
                closed = True

    def encode(
        self,
        texts: Iterable[str],
        role: str = "document",
        *,
        views: list[View] | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> np.ndarray | list[np.ndarray]:
        """Texts -> float32 (N, D) in the order given; with `views`, one such array for each, from the same forward passes."""
        from tqdm import tqdm

        texts = list(_texts(texts))
        width = self.contract.dims or self.decoder.config.hidden_size
        out = [np.empty((len(texts), width), dtype=np.float32) for _ in views or [None]]
        at = 0
        with tqdm(total=len(texts), desc="encoding", unit="text", disable=not progress, leave=False, file=sys.stderr) as bar:
            for found in self.stream(texts, role, views=views, batch_tokens=batch_tokens, done=bar.update):
                for array, part in zip(out, found, strict=True):
                    array[at : at + len(part)] = part
                at += len(found[0])
        return out if views else out[0]

    def warnings(self, *, clear: bool = False) -> list[str]:
        """What happened to texts that their owner should know, one line each."""
        told = list(self.notes)
        if self.n_empty:
            told.append(f"{self.n_empty} empty texts were embedded as the prompt alone")
        if self.n_cut:
            told.append(f"{self.n_cut} texts were cut to {self.contract.max_tokens} tokens")
        if clear:
            self.n_empty = self.n_cut = 0
            self.notes = []
        return told


def _wrap(model, config):
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers 5.23 by a name that it is about to drop
        warnings.simplefilter("ignore", UserWarning)  # a hub model is loaded from its snapshot; `save` writes its id
        return get_peft_model(model, config)


def write_atomic(path: Path, write) -> None:
    """Call `write(temporary_path)` in the target's folder, then rename: the file is complete or absent."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _base_of_run(run: Path, contract: Contract) -> str:
    """Where a run's base is: the folder its adapter names, the bundled model, or the hub."""
    try:
        recorded = json.loads((run / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{run / ADAPTER_CONFIG} is missing or damaged: the run cannot be loaded without it") from None
    if Path(recorded).is_dir():
        return recorded
    if not contract.revision.startswith("sha256:"):
        return contract.base
    if contract.base in PRESETS and Path(PRESETS[contract.base].base).is_dir():
        return contract.base
    raise InputError(f"{run}: its base {contract.base} was at {recorded} and is not there any more: bring it back or mend {ADAPTER_CONFIG}")


def default_scope(pooling: str) -> str:
    """The last token is that of the whole sequence, where the prompt's answer stands; means are over the text itself."""
    return "all" if pooling == "last" else "text"


def _default_contract(name: str, revision: str, overrides: dict, config, tokenizer) -> Contract:
    """An untuned base's contract: BOS and EOS as its own tokenizer adds them, the rest by what a prompt is good for.

    A prompt with a suffix puts the answer in the last token, hence pooling `last`; without one, the mean of the text.
    """
    prompts = overrides.get("prompts") or get_prompt("none").roles()
    added = tokenizer("a")["input_ids"]
    bos_id, eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    pooling = overrides.get("pooling") or ("last" if prompts["document"]["suffix"] else "mean")
    settings = {
        "prompts": prompts,
        "bos": bos_id is not None and added[:1] == [bos_id],
        "eos": eos_id is not None and len(added) > 1 and added[-1] == eos_id,
        "pooling": pooling,
        "scope": default_scope(pooling),
    } | {k: v for k, v in overrides.items() if k != "prompts"}
    for special, token_id in (("bos", bos_id), ("eos", eos_id)):
        if settings[special] and token_id is None:
            raise InputError(f"{special} was asked for, but the tokenizer of {name} has no such token")
    if "max_tokens" not in settings:
        positions = getattr(config, "max_position_embeddings", None) or 10**9
        settings["max_tokens"] = min(DEFAULT_MAX_TOKENS, positions * 3 // 4)
    return Contract(base=name, revision=revision, **settings)
