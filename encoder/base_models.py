"""Base models: presets, and the way from a name to a loaded decoder with its tokenizer.

A base is a preset, a local folder or a hub id (`org/name` or `org/name@revision`). Hub models come from the local cache, or are
downloaded to it where the hub answers.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from encoder.contract import CONTRACT_FILE, MODEL_FILES
from encoder.runtime import all_reduce_number, is_out_of_memory
from files.console import InputError

ROOT = Path(__file__).resolve().parent.parent
# Run without padding, tested on the configs of tests/conftest.py and tests/test_classes.py; other decoders are padded. Such a class
# tells its attention all that it depends on: Qwen2-MoE keeps a sliding window in the mask alone, Gemma 2 caps scores.
PACKED_TYPES = (
    *("llama", "mistral", "qwen3", "gemma3_text", "gpt_neox"),
    *("cohere", "cohere2", "exaone4", "gemma", "glm", "glm4", "granite", "ministral", "mixtral", "olmo", "olmo2", "olmo3", "phi", "phi3"),
    *("qwen2", "qwen3_moe", "seed_oss", "smollm3", "starcoder2"),
)
# what the classes of transformers raise where a config is not for them
RUNNING_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, ImportError, AssertionError)
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
    "tiny": Preset(str(ROOT / "models" / "tiny"), 96, 2e-3),
    "smollm2-135m": Preset("HuggingFaceTB/SmolLM2-135M", 120, 2e-4),
    "pythia-160m": Preset("EleutherAI/pythia-160m", 120, 2e-4),
    "qwen3-0.6b": Preset("Qwen/Qwen3-0.6B", 120, 1e-4),
    "gemma-3-1b": Preset("google/gemma-3-1b-pt", 120, 1e-4, gradient_checkpointing=1),
    "llama-3.2-1b": Preset("meta-llama/Llama-3.2-1B", 120, 1e-4, gradient_checkpointing=1),
    "qwen3-4b": Preset("Qwen/Qwen3-4B", 120, 5e-5, gradient_checkpointing=1),
    "mistral-7b": Preset("mistralai/Mistral-7B-v0.1", 120, 5e-5, lora_rank=16, gradient_checkpointing=1),
}

# --------------------------------------------------------------------------------------------------------- the network


@functools.cache
def hub_answers(seconds: float = 3.0) -> bool:
    """Whether the model and data hub can be reached: decided once, within `seconds` whatever the network does."""
    if any(os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")):
        return False
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    address = urlsplit(getproxies().get(urlsplit(hub).scheme) or hub)
    connected = []

    def connect():
        try:
            socket.create_connection((address.hostname, address.port or 443), timeout=seconds).close()
            connected.append(True)
        except OSError:
            pass

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(all_reduce_number(len(connected), "min"))


def go_offline() -> None:
    """Let the hub's libraries use their caches alone from now on, in this process and in those that it starts.

    They read the environment variables when they are imported, so a library that is imported already is set as well.
    """
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    for module in ("huggingface_hub.constants", "datasets.config"):
        if module in sys.modules:
            sys.modules[module].HF_HUB_OFFLINE = True


# ------------------------------------------------------------------------------------------------- from name to folder


def is_run(spec: str) -> bool:
    """Whether `spec` is the folder of a training run. The name of a preset is that preset, whatever folder has the same name."""
    return spec not in PRESETS and (Path(spec) / CONTRACT_FILE).is_file()


def newest_run(folder: Path) -> Path | None:
    """The run in `folder` whose contract was written last."""
    runs = [path.parent for path in folder.glob(f"*/{CONTRACT_FILE}")]
    return max(runs, key=lambda run: (run / CONTRACT_FILE).stat().st_mtime) if runs else None


def find_base(spec: str) -> tuple[str, str, str | None]:
    """A preset, folder or hub id -> its name in the contract, the folder or hub id to load from, the revision asked for.

    Raises InputError for what is neither.
    """
    if spec in PRESETS and not Path(PRESETS[spec].base).is_absolute():
        return PRESETS[spec].base, PRESETS[spec].base, None
    path = Path(PRESETS[spec].base if spec in PRESETS else spec).expanduser()
    if path.is_dir():
        bundled = [name for name, preset in PRESETS.items() if Path(preset.base) == path.resolve()]
        if not (path / "config.json").is_file():
            raise InputError(f"{spec}: a folder with neither {CONTRACT_FILE} (a run) nor config.json (a model)")
        return (bundled or [path.resolve().name])[0], str(path), None
    name, _, revision = spec.partition("@")
    if spec.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"no model {spec!r}: give a folder that exists, a hub id like org/name, or one of {', '.join(PRESETS)}")
    return name, name, revision or None


def fetch(source: str, revision: str | None, trust_remote_code: bool, files: tuple[str, ...] = MODEL_FILES) -> Path:
    """The folder of a hub model in the local cache, downloaded where the hub answers. The folder's name is the commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # of the client that the hub package uses

    patterns = [f for f in files if trust_remote_code or f != "*.py"]
    online = hub_answers()  # else every file would be asked for with retries, for half a minute
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns, local_files_only=not online))
    except (HTTPError, OSError, ValueError) as error:
        where = "the hub has no such model that may be read" if online else "it is not on this machine, and the hub does not answer"
        raise InputError(f"cannot load {source!r}: {where} ({' '.join(str(error).split()).split('. ')[0][:200]})") from None


# -------------------------------------------------------------------------------------------- from folder to the model


def _quantization_config(kind: str, dtype: torch.dtype):
    """Settings of bitsandbytes for the linear layers; nf4 with double quantization as in QLoRA (Dettmers et al. 2023, arXiv 2305.14314)."""
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"quantize {kind} needs the package bitsandbytes: pip install bitsandbytes, or leave it out")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says for every product that it casts bfloat16 to float16
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )  # fmt: skip


def _check_config(config, folder: Path, attention: str) -> None:
    """Raise InputError for a model that is no decoder, or that cannot have the attention asked for."""
    tested = config.model_type in PACKED_TYPES
    encoders = MODEL_FOR_MASKED_LM_MAPPING_NAMES  # some of them have a class for generation as well
    is_decoder = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and config.model_type not in encoders
    if not tested and (not is_decoder or config.is_encoder_decoder):
        raise InputError(f"{folder} is a model of type {config.model_type!r}, no decoder: take one like {', '.join(PACKED_TYPES[:5])}")
    for name, value in (("use_bidirectional_attention", True), ("is_causal", False)):
        if getattr(config, name, not value) is value:
            raise InputError(f"{folder} was trained to read in both directions ({name}): it is no decoder")
    if not tested and attention == "bidirectional":
        raise InputError(f"{folder}: bidirectional attention is not tested with models of type {config.model_type!r}")


def find_blocks(model: nn.Module) -> nn.ModuleList | None:
    """The model's blocks, whatever their list is called: the one outermost list with a module for each hidden layer."""
    lists, modules = [], list(model.children())
    while modules:
        module = modules.pop()
        if not isinstance(module, nn.ModuleList):
            modules += module.children()
        elif len(module) == getattr(model.config, "num_hidden_layers", None):
            lists.append(module)
    return lists[0] if len(lists) == 1 else None


def _check_blocks(model: nn.Module, folder: Path) -> None:
    if find_blocks(model) is None:
        raise InputError(f"{folder} is a {type(model).__name__}, whose blocks cannot be found: take one like {', '.join(PACKED_TYPES[:5])}")


@contextlib.contextmanager
def _loading(folder: Path, out_of_memory: str = "does not fit into memory") -> Iterator[None]:
    """Raise what goes wrong inside as InputError; transformers says nothing but errors."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # weights of the language-model head are left over, as expected
    try:
        yield
    except InputError:
        raise
    except (*RUNNING_ERRORS, OSError, SafetensorError, StrictDataclassError) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise InputError(f"{folder} {out_of_memory}") from None
        raise InputError(f"{folder} does not hold a whole model: {' '.join(str(error).split())[:300]}") from None
    finally:
        transformers_logging.set_verbosity(verbosity)


def check_base(spec: str, trust_remote_code: bool) -> None:
    """Raise InputError where the config alone shows that a preset, folder or hub id cannot be loaded. No weights are read."""
    _, source, revision = find_base(spec)
    is_local = Path(source).is_dir()
    folder = Path(source) if is_local else fetch(source, revision, trust_remote_code, ("config.json", "*.py"))
    with _loading(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        _check_config(config, folder, "causal")
        with torch.device("meta"):
            model = AutoModel.from_config(config, trust_remote_code=trust_remote_code)
    _check_blocks(model, folder)
    if is_local and not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder} does not hold a whole model: it has no weights in safetensors files")


def load_pretrained(
    folder: Path, trust_remote_code: bool, dtype: torch.dtype, device: torch.device, attention: str, quantize: str | None
) -> tuple[nn.Module, object]:
    """The decoder without its language-model head, on the device, and its fast tokenizer.

    attention     "causal" or "bidirectional"
    quantize      None, "nf4" or "int8"
    Raises InputError where the folder does not hold a whole decoder that can be used here, and where it does not fit into memory.
    """
    smaller = "take a smaller model" if quantize == "nf4" else "take --quantize nf4, or a smaller model"
    with _loading(folder, f"does not fit into the memory of {device}: {smaller}"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        _check_config(config, folder, attention)
        if attention == "bidirectional":
            config.is_causal = False
        # with a device map each weight goes from the file straight to the device
        settings = {
            "config": config,
            "dtype": dtype,
            "use_safetensors": True,
            "trust_remote_code": trust_remote_code,
            "device_map": {"": device},
        }
        if quantize:
            settings["quantization_config"] = _quantization_config(quantize, dtype)
        model, report = AutoModel.from_pretrained(folder, output_loading_info=True, **settings)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if report["missing_keys"]:  # transformers initializes them at random
        raise InputError(f"{folder} does not hold a whole model: no weights for {sorted(report['missing_keys'])[:3]}")
    _check_blocks(model, folder)
    if not tokenizer.is_fast:
        raise InputError(f"{folder}: its tokenizer has no fast version, which this project needs")
    return model, tokenizer
