"""The embedding contract: everything that decides a vector besides the weights, its file, and the fingerprint of both.

A training run keeps its contract as `embedding.json` beside the adapter. No torch here: whoever serves vectors can read it.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

from files.console import InputError
from prompts import ROLES, contrast, each_prompt

CONTRACT_FILE, ADAPTER_FILE, ADAPTER_CONFIG = "embedding.json", "adapter_model.safetensors", "adapter_config.json"
QUERY_FILE = "pooling.safetensors"  # the learned query of pooling `query`
MEAN_FILE = "mean.safetensors"  # the direction of the mean that is removed
ARGUMENTS_FILE, SUMMARY_FILE = "arguments.json", "summary.json"  # what train.py was asked for; what it left at the very end
PAIR_PROMPTS = "pair_prompts"  # of arguments.json: the prompts that the pairs themselves had
# the files of a model folder that decide its hidden states and its token ids
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
POOLINGS = ("mean", "last", "position-mean", "max", "last+mean", "attention", "query")
# names that people use for a pooling with other fields of the contract
POOLING_PRESETS = {
    "eos": {"pooling": "last", "scope": "all", "eos": True},
    "first-last": {"pooling": "mean", "layers": (1, -1)},  # SimCSE, arXiv 2104.08821
}
SCOPES = ("all", "text")
QUANTIZATIONS = ("nf4", "int8")
# fields that came later, with what runs saved before have; at these values they leave fingerprints as they were
LATER_FIELDS = {"quantize": None, "attention_layer": -1, "embed_filter": None, "token_prepending": None, "mean_removed": None}
DEFAULT_MAX_TOKENS = 512  # as in the paper's evaluation; three quarters of the positions where a model has fewer than 683


Layer = int | str  # its number, or a share of the depth such as "80%"


class PoolingConfig(NamedTuple):
    """How a vector is read from the hidden states. One forward pass can be pooled in several ways."""

    pooling: str
    scope: str = "all"
    layers: tuple[Layer, ...] = (-1,)
    keep_bos: bool = False
    attention_layer: Layer = -1
    mean_removed: str | None = None  # hash of the texts whose mean it is


@dataclass(frozen=True)
class Contract:
    """Everything that decides a vector besides the weights.

    base, revision       name of the base model; the hub's commit, or "sha256:..." of the files of a local folder
    prompts              {"query" | "document": {"prefix", "suffix"}}; with "middle" the text is given twice, that string between,
                         and the second is the one that is read. A role may have a list of prompts: its vector is the mean of
                         theirs, before it is normalized
    bos, eos             whether the token is put before the prefix / after the suffix
    max_tokens           a text is truncated to this many tokens; the prompt never is
    pooling, scope       see POOLINGS; "text" = the tokens of the text, "all" = prompt and EOS too. "query" is attention with a
                         query that is learned with the adapter; an untuned base has none, and the mean is taken. "last+mean" are
                         both, one after the other, each of norm 1
    keep_bos             with scope "all", BOS takes part in mean and attention poolings (it draws most of the attention)
    layers               -1 is the state after the final norm; 0 is the embedding layer's output, k that of block k, and
                         -2 that of the block before the last: raw residual states; "80%" that of the block at this share of the
                         depth. Several layers are averaged.
    attention_layer      with pooling "attention", the layer whose last token's attention weighs the tokens
    attention            "causal" or "bidirectional"
    token_prepending     (first, last): from which to which layer a placeholder before the text is given the state of the last token
                         (encoder/token_prepending.py)
    embed_filter         drop this share of the unembedding matrix's directions from a vector (encoder/embed_filter.py), then
    normalize, dims      L2 norm 1; keep the first `dims` numbers only (before normalizing)
    mean_removed         {"name", "sha256"} of the texts off the direction of whose mean vector every vector is projected, after it was
                         cut and before it is normalized (encoder/mean_direction.py)
    quantize             how the base's weights are stored in memory: None as they are, "nf4" in 4 bits, "int8" in 8
    data                 {"name", "sha256"} of the training pairs, None for an untuned base

    Raises InputError for a value that is not possible.
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
    layers: tuple[Layer, ...] = (-1,)
    attention: str = "causal"
    normalize: bool = True
    dims: int | None = None
    data: dict | None = None
    quantize: str | None = None
    attention_layer: Layer = -1
    embed_filter: float | None = None
    token_prepending: tuple[Layer, Layer] | None = None
    mean_removed: dict | None = None
    version: int = 1

    def __post_init__(self):
        for name in ("layers", "token_prepending"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        for name, is_valid, expected in _rules(self):
            if not is_valid:
                raise InputError(f"{name} must be {expected}: got {getattr(self, name)!r}")

    def pooling_config(self) -> PoolingConfig:
        mean_removed = self.mean_removed and self.mean_removed["sha256"]
        return PoolingConfig(self.pooling, self.scope, self.layers, self.keep_bos, self.attention_layer, mean_removed)

    def is_bare(self) -> bool:
        """Whether the model is given nothing but the text and perhaps BOS."""
        return not self.eos and not any(part for role in ROLES for prompt in self.prompts_of(role) for part in prompt.values())

    def prompts_of(self, role: str) -> list[dict[str, str]]:
        """The prompts of a role; several where its vectors are the mean of several."""
        return each_prompt(self.prompts[role])

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = CONTRACT_FILE) -> "Contract":
        """Raises InputError for unknown or missing fields: a contract that is only half understood is not used."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{where} is not valid JSON ({error}): restore it from the run that wrote it") from None
        known = {f.name for f in fields(cls)}
        if isinstance(values, dict):
            values = LATER_FIELDS | values
        if not isinstance(values, dict) or set(values) != known:
            names = set(values) if isinstance(values, dict) else set()
            lists = (("unknown", names - known), ("missing", known - names))
            fields_of = "; ".join(f"{what} fields {', '.join(sorted(some))}" for what, some in lists if some)
            raise InputError(f"{where}: {fields_of or 'is no object'}: restore it from the run that wrote it")
        try:
            return cls(**values)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

    @classmethod
    def read(cls, run: str | Path) -> "Contract":
        """The contract in the folder of a run."""
        path = Path(run) / CONTRACT_FILE
        try:
            return cls.from_json(path.read_text(encoding="utf-8"), str(path))
        except UnicodeDecodeError:
            raise InputError(f"{path} is damaged (not UTF-8): restore it from the run that wrote it") from None

    def override(self, changes: dict, *, force: bool = False, trained_for: dict[str, tuple] | None = None) -> "Contract":
        """The contract with some fields replaced. A contradiction raises InputError with both values, unless `force`.

        trained_for    values of a field that are no contradiction: what `trained_for` of this module returns for the run
        """
        changes, also = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}, trained_for or {}
        differing = {k: v for k, v in changes.items() if getattr(self, k) != v and v not in also.get(k, ())}
        if differing and not force:
            both = "; ".join(self._contradiction(name, value, also.get(name, ())) for name, value in differing.items())
            raise InputError(f"{both}. Leave the flag out, or add --override-contract")
        return replace(self, **changes)

    def _contradiction(self, name: str, asked: object, also: tuple) -> str:
        value, shown = getattr(self, name), [str(other) for other in also]
        if name == "prompts":
            shown = [contrast(other, asked)[0] for other in also]
            name, (value, asked) = "prompt", contrast(value, asked)
        more = f" (which was trained for {', '.join(shown)} as well)" if also else ""
        return f"{name} is {value!r} in the run{more}, {asked!r} was asked for"


def _rules(c: Contract) -> tuple[tuple[str, bool, str], ...]:
    """(field, whether its value is possible, what it must be) for every field."""

    def is_number(value, least=1):
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    def is_layer(value):
        return is_number(value, -(10**6)) or (isinstance(value, str) and re.fullmatch(r"(100|[1-9]\d?)%", value) is not None)

    def is_range(value):
        return isinstance(value, tuple) and len(value) == 2 and all(map(is_layer, value))

    def is_texts(value, names):
        return isinstance(value, dict) and set(value) == set(names) and all(isinstance(text, str) for text in value.values())

    def is_prompt(value):
        return is_texts(value, ("prefix", "suffix")) or is_texts(value, ("prefix", "suffix", "middle"))

    def are_prompts(value):
        return all(map(is_prompt, value)) and len(value) > 1 if isinstance(value, list) else is_prompt(value)

    return (
        ("version", c.version == 1, "1 (written by a newer version of this project?)"),
        ("base", isinstance(c.base, str), "a name"),
        ("revision", isinstance(c.revision, str), "a commit or hash"),
        ("pooling", c.pooling in POOLINGS, f"one of {', '.join(POOLINGS)}"),
        ("scope", c.scope in SCOPES, f"one of {', '.join(SCOPES)}"),
        ("attention", c.attention in ("causal", "bidirectional"), "causal or bidirectional"),
        ("max_tokens", is_number(c.max_tokens), "a number of tokens above 0"),
        ("dims", c.dims is None or is_number(c.dims), "a number above 0, or nothing"),
        (
            "embed_filter",
            c.embed_filter is None or (isinstance(c.embed_filter, float) and 0 < c.embed_filter < 1),
            "between 0 and 1, or nothing",
        ),
        ("quantize", c.quantize is None or c.quantize in QUANTIZATIONS, f"one of {', '.join(QUANTIZATIONS)}, or nothing"),
        ("layers", isinstance(c.layers, tuple) and bool(c.layers) and all(map(is_layer, c.layers)), LAYERS),
        ("attention_layer", is_layer(c.attention_layer) and (c.attention_layer == -1 or c.pooling == "attention"), ATTENTION_LAYER),
        *((name, isinstance(getattr(c, name), bool), "true or false") for name in ("bos", "eos", "keep_bos", "normalize")),
        ("keep_bos", not c.keep_bos or (c.bos and c.scope == "all"), "left out unless BOS is added and the scope is all"),
        ("data", c.data is None or is_texts(c.data, ("name", "sha256")), "name and sha256 of the training pairs, or nothing"),
        ("mean_removed", c.mean_removed is None or is_texts(c.mean_removed, ("name", "sha256")), "name and sha256 of texts, or nothing"),
        ("token_prepending", c.token_prepending is None or is_range(c.token_prepending), PREPENDING),
        ("token_prepending", c.token_prepending is None or c.attention == "causal", "left out where attention is bidirectional anyway"),
        (
            "prompts",
            isinstance(c.prompts, dict) and set(c.prompts) == set(ROLES) and all(map(are_prompts, c.prompts.values())),
            "a prefix, a suffix and perhaps a middle, or a list of several of these, for query and for document",
        ),
    )


LAYERS = 'layer numbers, or shares of the depth such as "80%"'
PREPENDING = 'two layers, the first and the last, such as 1 and "20%", or nothing'
ATTENTION_LAYER = "left out unless the pooling is attention, and then a layer number or a share of the depth"


def expand_pooling(fields: dict) -> dict:
    """Contract fields with a name of POOLING_PRESETS replaced by what it stands for. Raises InputError where another field contradicts."""
    name = fields.get("pooling")
    preset = POOLING_PRESETS.get(name, {})
    for field, value in preset.items():
        if field != "pooling" and fields.get(field, value) not in (value, list(value) if isinstance(value, tuple) else value):
            raise InputError(f"pooling {name} means {field} {value!r}, not {fields[field]!r}: leave one of them out")
    return fields | preset


def default_scope(pooling: str) -> str:
    """`last` reads the end of the whole sequence, where the prompt is answered; means are taken over the text itself."""
    return "all" if pooling in ("last", "last+mean") else "text"


def check_trainable(contract: Contract) -> None:
    """Raise InputError for a contract whose vectors are made of finished models only."""
    if contract.token_prepending is not None:
        raise InputError("token_prepending is a way to read a model as it is and cannot be trained with: leave it out")
    if contract.mean_removed is not None:
        raise InputError("mean_removed belongs to a finished run: train on the run that it was made from, and remove its mean after that")


# ------------------------------------------------------------------------------- what else a run knows of its vectors


def _read_object(path: Path) -> dict:
    """A JSON object; an empty one where there is no such file, or it is damaged: whatever needs it says so elsewhere."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def trained_for(run: str | Path) -> dict[str, tuple]:
    """Values of the contract's fields that a run was trained for beside its contract, by its arguments.json.

    "dims": lengths to cut vectors to (`train.py --matryoshka`); "prompts": those of its pairs, each as `Prompt.roles` has them.
    """
    record = _read_object(Path(run) / ARGUMENTS_FILE)
    arguments = record.get("arguments")
    dims = arguments.get("matryoshka") if isinstance(arguments, dict) else None
    prompts = record.get(PAIR_PROMPTS)
    return {
        "dims": tuple(n for n in dims if isinstance(n, int)) if isinstance(dims, list) else (),
        "prompts": tuple(prompts) if isinstance(prompts, list) else (),
    }


def recorded_fingerprint(run: str | Path) -> str | None:
    """The fingerprint that a run had at the end of its training, by its summary.json; None for a run that is not finished."""
    return _read_object(Path(run) / SUMMARY_FILE).get("fingerprint")


# ------------------------------------------------------------------------------------------------ hashes and identity


def file_hash(path: Path) -> str:
    """sha256 of a file. The hub's cache names large files by that very hash, so those are not read again."""
    blob = path.resolve().name
    if path.is_symlink() and len(blob) == 64 and not set(blob) - set("0123456789abcdef"):
        return blob
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def adapter_hash(run: Path) -> str:
    """Hash of the adapter's weights and of those settings in its config that say how they are applied."""
    config = json.loads((run / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    names = ("r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "rank_pattern", "alpha_pattern")
    applied = {k: sorted(v) if isinstance(v := config.get(k), list) else v for k in names}
    beside = "".join(file_hash(run / name) for name in (QUERY_FILE, MEAN_FILE) if (run / name).is_file())
    return hashlib.sha256((file_hash(run / ADAPTER_FILE) + json.dumps(applied, sort_keys=True) + beside).encode()).hexdigest()


def folder_hash(folder: Path) -> str:
    """Hash of a model folder's weights, config and tokenizer."""
    files = sorted({f for pattern in MODEL_FILES for f in folder.glob(pattern) if f.is_file()})
    return hashlib.sha256("".join(f"{f.name} {file_hash(f)}\n" for f in files).encode()).hexdigest()


def fingerprint(contract: Contract, base_hash: str, adapter: str | None) -> str:
    """16 hex digits over the contract and the hashes of base and adapter: same vectors, or another fingerprint."""
    settings = {k: v for k, v in asdict(contract).items() if k != "base"}  # a folder's name changes no vector
    for name, value in LATER_FIELDS.items():
        if settings[name] == value:
            del settings[name]  # fingerprints written down before this field existed stay valid
    parts = (json.dumps(settings, sort_keys=True), base_hash, adapter or "")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
