"""The one way from a text to its vector. Training, evaluation and export go through here and cannot disagree.

    str     -> Prompt   -> ids     [BOS | prefix | text, cut to fit | suffix | EOS]
    ids     -> batch    -> padded ids, attention mask, which tokens are whose
    batch   -> model    -> states (B, L, D) of the layers that the contract names
    states  -> pool     -> (B, D), in float32
    vectors -> finish   -> cut to `dims`, normalised if the contract says so, in the order of the input

What decides a vector is written down in a `Contract`; a training run keeps it as `embedding.json` beside its adapter.
dtype, device, batch size and padding side are facts of the machine and no part of it.

    from encoder import Encoder
    encoder = Encoder.load("tiny", prompt="cluster", pooling="last")     # a preset, a folder, a hub id
    encoder = Encoder.load("runs/tiny")                                  # a training run, with its own contract
    vectors = encoder.encode(["a text", "another"])                      # float32 (2, D)

Legend: N texts, B rows of a batch, L padded length, H heads, D hidden size.
"""

import contextlib
import copy
import functools
import hashlib
import json
import os
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
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
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModel, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging as transformers_logging

from pooling_kernels import attention_pool, last_pool, mean_pool
from prompts import ROLES, InputError, get_prompt

HERE = Path(__file__).resolve().parent
CONTRACT_FILE, ADAPTER_FILE, ADAPTER_CONFIG = "embedding.json", "adapter_model.safetensors", "adapter_config.json"
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
MODEL_TYPES = ("llama", "mistral", "qwen3", "gemma3_text", "gpt_neox")  # tested: see tests/conftest.py
POOLINGS = ("mean", "last", "position-mean", "attention")
SCOPES = ("all", "text")
DEFAULT_MAX_TOKENS = 512  # as in the paper's evaluation; three quarters of the positions where a model has fewer than 683
transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class Preset:
    """A base model by a short name, and training defaults chosen to fit one 24 GB GPU (`tiny`: two CPU cores)."""

    base: str
    batch_size: int
    lr: float
    lora_rank: int = 64
    gradient_checkpointing: bool = False


PRESETS = {
    "tiny": Preset(str(HERE / "models" / "tiny"), 96, 2e-3),
    "smollm2-135m": Preset("HuggingFaceTB/SmolLM2-135M", 120, 2e-4),
    "pythia-160m": Preset("EleutherAI/pythia-160m", 120, 2e-4),
    "qwen3-0.6b": Preset("Qwen/Qwen3-0.6B", 120, 1e-4),
    "gemma-3-1b": Preset("google/gemma-3-1b-pt", 120, 1e-4, gradient_checkpointing=True),
    "llama-3.2-1b": Preset("meta-llama/Llama-3.2-1B", 120, 1e-4, gradient_checkpointing=True),
    "qwen3-4b": Preset("Qwen/Qwen3-4B", 120, 5e-5, gradient_checkpointing=True),
    "mistral-7b": Preset("mistralai/Mistral-7B-v0.1", 64, 5e-5, lora_rank=16, gradient_checkpointing=True),
}


# ---------------------------------------------------------------------------------------------------- the contract


@dataclass(frozen=True)
class Contract:
    """Everything that decides a vector besides the weights.

    base, revision       name of the base model; the hub's commit, or "sha256:..." of the files of a local folder
    prompts              {"query" | "document": {"prefix", "suffix"}}
    bos, eos             whether the id is put before the prefix / after the suffix
    max_tokens           a text is cut to this many tokens; the prompt never is
    pooling, scope       see POOLINGS; "text" = the text's own tokens, "all" = prompt and EOS too
    keep_bos             with scope "all", let BOS take part in mean and attention poolings (it swallows most attention)
    layers               -1 is the state after the final norm; 0 is the embedding layer's output, k that of block k, and
                         -2 that of the block before the last: raw residual states. Several layers are averaged.
    attention            "causal" or "bidirectional"
    normalize, dims      L2 norm 1; keep the first `dims` numbers only (before normalising)
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
    return hashlib.sha256((_file_hash(run / ADAPTER_FILE) + json.dumps(applied, sort_keys=True)).encode()).hexdigest()


def _folder_hash(folder: Path) -> str:
    """Hash of what turns ids into states and text into ids: weights, config, tokenizer."""
    files = sorted({f for pattern in MODEL_FILES for f in folder.glob(pattern) if f.is_file()})
    return hashlib.sha256("".join(f"{f.name} {_file_hash(f)}\n" for f in files).encode()).hexdigest()


# ------------------------------------------------------------------------------------------- tokens, batches, states


class Tokens(NamedTuple):
    """Texts as ids. `text` holds where each text's own tokens start and end."""

    ids: list[list[int]]
    text: list[tuple[int, int]]
    n_empty: int
    n_cut: int


class Batch(NamedTuple):
    input_ids: Tensor  # (B, L)
    mask: Tensor  # (B, L) bool: not padding
    is_text: Tensor  # (B, L) bool: the text's own tokens
    is_bos: Tensor  # (B, L) bool

    def scope(self, scope: str, keep_bos: bool = False) -> Tensor:
        """Which tokens take part in pooling (B, L). A text without tokens falls back to its prompt, a row without to BOS."""
        content = self.mask & ~self.is_bos
        chosen = self.is_text if scope == "text" else self.mask if keep_bos else content
        for wider in (content, self.mask):
            chosen = torch.where(chosen.any(1, keepdim=True), chosen, wider)
        return chosen

    def last(self) -> Tensor:
        """Index of each row's last token (B,), whichever side the padding is on."""
        return (torch.arange(1, self.mask.shape[1] + 1, device=self.mask.device) * self.mask).argmax(1)


class States(NamedTuple):
    layers: dict[int, Tensor]  # layer number -> (B, L, D)
    scores: Tensor | None  # (B, L, H): the last token's attention scores in the last layer, before the softmax


class View(NamedTuple):
    """One reading of a forward pass; several can be had for the price of one."""

    pooling: str
    scope: str = "all"
    layers: tuple[int, ...] = (-1,)
    keep_bos: bool = False


class _Recorder:
    """Travels with a forward call and keeps what `_attention` sees of the last token in the last layer."""

    def __init__(self, layer: int, last: Tensor):
        self.layer, self.last, self.scores = layer, last, None


def _attention(module, query, key, value, attention_mask, recorder=None, **kwargs):
    """PyTorch's SDPA, which also notes the last token's scores when a recorder comes along. query (B, H, L, d)."""
    if recorder is not None and module.layer_idx == recorder.layer:
        row = torch.arange(len(query), device=query.device)
        q = query[row, :, recorder.last].float()  # (B, H, d)
        k = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).float()  # (B, H, L, d)
        with torch.autocast(query.device.type, enabled=False):
            scores = torch.einsum("bhd,bhld->blh", q, k) * kwargs["scaling"]
        if attention_mask is not None:  # (B or 1, 1, L, L) bool
            seen = attention_mask.expand(len(query), *attention_mask.shape[1:])[row, 0, recorder.last]
            scores = scores.masked_fill(~seen[:, :, None], -torch.inf)
        recorder.scores = scores
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


# Without a mask function of the same name, a registered attention gets no mask at all and left padding is ignored silently.
AttentionInterface.register("sdpa_recorded", _attention)
AttentionMaskInterface.register("sdpa_recorded", sdpa_mask)


def pick_device(device: str | None = None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
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
    return bool(answers)


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


def _load_pretrained(folder: Path, trust_remote_code: bool, dtype: torch.dtype, attention: str):
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # unused weights of the language-model head are expected
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if config.model_type not in MODEL_TYPES:
            raise InputError(f"{folder} is a model of type {config.model_type!r}: supported are {', '.join(MODEL_TYPES)}")
        if attention == "bidirectional":
            config.is_causal = False
        settings = {"config": config, "dtype": dtype, "use_safetensors": True, "trust_remote_code": trust_remote_code}
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

    def __init__(self, model, tokenizer, contract, *, source, base_hash, device, dtype, padding_side):
        self.decoder, self.tokenizer, self.contract = model, tokenizer, contract
        self.source, self.base_hash, self.adapter_hash = source, base_hash, None
        self.device, self.dtype, self.padding_side = device, dtype, padding_side or "right"
        self.peft, self.adapter_on = None, True  # the adapter's handle; its layers sit inside `decoder`
        self.blocks = model.layers
        self.n_empty = self.n_cut = 0  # texts since the last `warnings(clear=True)` that were empty, or too long
        model.set_attn_implementation("sdpa_recorded")
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
        other.contract = replace(self.contract, **changes)
        other._prepare()
        return other

    @classmethod
    def load(
        cls,
        spec: str = "tiny",
        *,
        dtype: str | torch.dtype | None = None,
        device: str | None = None,
        padding_side: str | None = None,
        override_contract: bool = False,
        trust_remote_code: bool = False,
        **overrides,
    ) -> "Encoder":
        """Load a preset, a folder, a hub id or a training run.

        dtype       None: float32 on CPU, bfloat16 on CUDA; "auto", "float32", "bfloat16", "float16"
        overrides   contract fields: prompt (preset name or template), pooling, scope, layers, max_tokens, bos, eos,
                    keep_bos, attention, normalize, dims. None counts as not given. On a run, a value that contradicts
                    its contract raises InputError unless `override_contract`.
        """
        overrides = {k: v for k, v in overrides.items() if v is not None}
        settable = {f.name for f in fields(Contract)} - {"base", "revision", "version"} | {"prompt"}
        if set(overrides) - settable:
            raise InputError(f"unknown settings {sorted(set(overrides) - settable)}: there are {', '.join(sorted(settable))}")
        if padding_side not in (None, "left", "right"):
            raise InputError(f"padding_side is left or right, not {padding_side!r}")
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
        model, tokenizer = _load_pretrained(folder, trust_remote_code, dtype, attention)
        base_hash = _folder_hash(folder)
        revision = f"sha256:{base_hash[:16]}" if local else folder.name
        if contract and contract.revision != revision:
            raise InputError(
                f"{run}: trained on {contract.base} {contract.revision}, but {source} now holds {revision}: bring the old weights back"
            )
        if contract is None:
            contract = _default_contract(name, revision, overrides, model.config, tokenizer)
        model.requires_grad_(False).eval().to(device)
        encoder = cls(model, tokenizer, contract, source=source, base_hash=base_hash, device=device, dtype=dtype, padding_side=padding_side)
        if run:
            encoder._load_adapter(run)
        return encoder

    # ------------------------------------------------------------------------------------------------ identity

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the contract and the base's and the adapter's files: equal vectors or a different name."""
        settings = {k: v for k, v in asdict(self.contract).items() if k != "base"}  # a folder's name changes no vector
        parts = (json.dumps(settings, sort_keys=True), self.base_hash, self.adapter_hash or "")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    # ------------------------------------------------------------------------------------------------- adapter

    def add_adapter(self, rank: int, alpha: int | None = None, dropout: float = 0.0):
        """LoRA on every linear layer of every block, weights in float32. Returns the number of trainable parameters."""
        from peft import LoraConfig

        targets = sorted({n.split(".")[-1] for n, m in self.blocks.named_modules() if isinstance(m, nn.Linear)})
        config = LoraConfig(r=rank, lora_alpha=alpha or rank, lora_dropout=dropout, target_modules=targets, bias="none")
        self.peft = _wrap(self.decoder, config)
        return sum(p.numel() for p in self.trainable().values())

    def trainable(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.peft.named_parameters() if p.requires_grad}

    def save(self, folder: Path) -> None:
        """Write adapter, its config and the contract, each complete or not at all."""
        from peft import get_peft_model_state_dict

        folder.mkdir(parents=True, exist_ok=True)
        weights = {k: v.detach().cpu().contiguous() for k, v in get_peft_model_state_dict(self.peft).items()}
        write_atomic(folder / ADAPTER_FILE, lambda path: save_file(weights, path, metadata={"format": "pt"}))
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
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
        self.adapter_hash = _adapter_hash(run)

    def untuned(self) -> "Encoder":
        """The base model alone under the same contract, from the same weights in memory."""
        other = self.reread(data=None)
        other.adapter_on, other.adapter_hash = False, None
        return other

    # ---------------------------------------------------------------------------------- tokenise, run, pool, finish

    def _plain_ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def tokenise(self, texts: list[str], role: str = "document") -> Tokens:
        """Prefix, text and suffix are tokenised separately; the text is cut to `max_tokens`, the prompt never is."""
        if role not in ROLES:
            raise InputError(f"unknown role {role!r}: take one of {', '.join(ROLES)}")
        if isinstance(texts, str):
            raise InputError("texts must be a list of strings: put a single text in brackets")
        texts = list(texts)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"text {i} is {type(text).__name__} {text!r}, not a string")
        prefix, suffix = self._prompt_ids[role]
        c = self.contract
        head = ([self.tokenizer.bos_token_id] if c.bos else []) + prefix
        tail = suffix + ([self.tokenizer.eos_token_id] if c.eos else [])
        ids, spans, n_empty, n_cut = [], [], 0, 0
        try:
            all_ids = self._plain_ids(texts)
        except TypeError:  # half of a surrogate pair, as JSON may carry it, is no character
            broken = next(i for i, text in enumerate(texts) if text.encode("utf-8", "replace").decode() != text)
            raise InputError(f"text {broken} holds half a surrogate pair and cannot be written as UTF-8: {texts[broken][:60]!a}") from None
        for own in all_ids:
            n_empty += not own
            n_cut += len(own) > c.max_tokens
            own = own[: c.max_tokens]
            ids.append(head + own + tail)
            spans.append((len(head), len(head) + len(own)))
        self.n_empty += n_empty
        self.n_cut += n_cut
        return Tokens(ids, spans, n_empty, n_cut)

    def collate(self, tokens: Tokens, rows: list[int]) -> Batch:
        """The chosen rows as one padded batch on the device."""
        width = max(1, max(len(tokens.ids[i]) for i in rows))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        input_ids = np.full((len(rows), width), pad, dtype=np.int64)
        mask, is_text, is_bos = (np.zeros((len(rows), width), dtype=bool) for _ in range(3))
        for b, i in enumerate(rows):
            ids, (start, end) = tokens.ids[i], tokens.text[i]
            at = 0 if self.padding_side == "right" else width - len(ids)
            input_ids[b, at : at + len(ids)] = ids
            mask[b, at : at + len(ids)] = True
            is_text[b, at + start : at + end] = True
            is_bos[b, at : at + self.contract.bos] = True
        return Batch(*(torch.from_numpy(x).to(self.device) for x in (input_ids, mask, is_text, is_bos)))

    def batches(self, tokens: Tokens, rows: list[int], batch_tokens: int | None = None) -> Iterator[tuple[list[int], Batch]]:
        """`rows` sorted by length, in batches of `batch_tokens` tokens, padding included (default: 2,048 on a CPU, else 32,768)."""
        budget = batch_tokens or (2048 if self.device.type == "cpu" else 32768)
        rows = sorted(rows, key=lambda i: -len(tokens.ids[i]))
        while rows:
            n = max(1, budget // max(1, len(tokens.ids[rows[0]])))
            chosen, rows = rows[:n], rows[n:]
            yield chosen, self.collate(tokens, chosen)

    def run(self, batch: Batch, layers: tuple[int, ...] | None = None, *, scores: bool | None = None) -> States:
        """One forward pass -> the states of `layers` (default: the contract's), and the last token's attention `scores`."""
        layers = self.contract.layers if layers is None else layers
        wants_scores = self.contract.pooling == "attention" if scores is None else scores
        numbers = {index: _check_layer(index, len(self.blocks)) for index in layers}
        recorder = _Recorder(len(self.blocks) - 1, batch.last()) if wants_scores else None
        kwargs = {"recorder": recorder} if recorder else {}
        if self.contract.attention == "bidirectional" or self.padding_side == "left":
            kwargs |= {"attention_mask": batch.mask.long(), "position_ids": (batch.mask.cumsum(1) - 1).clamp_min(0)}
        # else: causal attention never looks right, where the padding is, and needs no mask
        seen, hooks = {}, []

        def keep(number):
            def hook(_, args, output=None):
                state = args[0] if output is None else output
                seen[number] = state[0] if isinstance(state, tuple) else state

            return hook

        try:
            for number in set(numbers.values()) - {-1}:
                block = self.blocks[max(number - 1, 0)]
                hooks.append(block.register_forward_pre_hook(keep(0)) if number == 0 else block.register_forward_hook(keep(number)))
            with self.peft.disable_adapter() if self.peft and not self.adapter_on else contextlib.nullcontext():
                final = self.decoder(input_ids=batch.input_ids, use_cache=False, **kwargs).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        if recorder and recorder.scores is None:
            raise InputError(f"{type(self.decoder).__name__} does not let its attention be read: take another pooling")
        seen[-1] = final
        return States({index: seen[number] for index, number in numbers.items()}, recorder.scores if recorder else None)

    def pool(self, states: States, batch: Batch, view: View | None = None) -> Tensor:
        """States -> (B, D) float32, as `view` says (default: the contract), then finished: cut to dims, normalised."""
        c = self.contract
        view = view or c.view()
        values = states.layers[view.layers[0]]
        if len(view.layers) > 1:
            values = torch.stack([states.layers[i].float() for i in view.layers]).mean(0)
        mask = batch.scope(view.scope, view.keep_bos)
        if view.pooling == "mean":
            vectors = mean_pool(values, mask=mask)
        elif view.pooling == "position-mean":  # weight i for the scope's i-th token: SGPT, Muennighoff 2022, arXiv 2202.08904
            vectors = mean_pool(values, mask=mask, weights=mask.cumsum(1))
        elif view.pooling == "last":
            vectors = last_pool(values, mask=mask)
        elif view.pooling == "attention":
            vectors = attention_pool(values, states.scores, mask=mask)[0].mean(1)
        else:
            raise InputError(f"unknown pooling {view.pooling!r}: take one of {', '.join(POOLINGS)}")
        if c.dims is not None:
            vectors = vectors[:, : c.dims]
        return F.normalize(vectors, dim=-1) if c.normalize else vectors

    @torch.no_grad()
    def encode(
        self,
        texts: list[str],
        role: str = "document",
        *,
        views: list[View] | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> np.ndarray | list[np.ndarray]:
        """Texts -> float32 (N, D) in the order given; with `views`, one such array for each, from the same forward passes.

        A row without a single token (no BOS, no prompt, empty text) is a vector of zeros.
        """
        from tqdm import tqdm

        wanted = views or [self.contract.view()]
        layers = tuple(dict.fromkeys(i for view in wanted for i in view.layers))
        tokens = self.tokenise(texts, role)
        rows_with_tokens = [i for i, ids in enumerate(tokens.ids) if ids]
        width = self.contract.dims or self.decoder.config.hidden_size
        out = [np.zeros((len(tokens.ids), width), dtype=np.float32) for _ in wanted]
        self.decoder.eval()
        with tqdm(total=len(rows_with_tokens), desc="encoding", unit="text", disable=not progress, leave=False, file=sys.stderr) as bar:
            for rows, batch in self.batches(tokens, rows_with_tokens, batch_tokens):
                states = self.run(batch, layers, scores=any(v.pooling == "attention" for v in wanted))
                for array, view in zip(out, wanted, strict=True):
                    array[rows] = self.pool(states, batch, view).float().cpu().numpy()
                bar.update(len(rows))
        return out if views else out[0]

    def warnings(self, *, clear: bool = False) -> list[str]:
        """What happened to texts that their owner should know, one line each."""
        told = []
        if self.n_empty:
            told.append(f"{self.n_empty} empty texts were embedded as the prompt alone")
        if self.n_cut:
            told.append(f"{self.n_cut} texts were cut to {self.contract.max_tokens} tokens")
        if clear:
            self.n_empty = self.n_cut = 0
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
