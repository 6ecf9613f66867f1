"""Base models: the way from a name to a loaded decoder with its tokenizer.

Hub models come from the local cache, or are downloaded to it where the hub answers.
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

from encoder.contract import MODEL_FILES
from encoder.names import PACKED_TYPES, PRESETS, find_base
from encoder.processes import all_reduce_number
from encoder.runtime import is_out_of_memory
from files.console import InputError

# what the classes of transformers raise where a config is not for them
RUNNING_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, ImportError, AssertionError)
transformers_logging.disable_progress_bar()

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


def fetch(source: str, revision: str | None, trust_remote_code: bool, files: tuple[str, ...] = MODEL_FILES) -> Path:
    """The folder of a hub model in the local cache, downloaded where the hub answers. The folder's name is the commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # of the client that the hub package uses

    patterns = [f for f in files if trust_remote_code or f != "*.py"]
    online = hub_answers()  # else every file would be asked for with retries, for half a minute
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns, local_files_only=not online))
    except (HTTPError, OSError, ValueError) as error:
        raise InputError(f"cannot load {source!r}: {why_not_loaded(source, error)}") from None


def why_not_loaded(source: str, error: Exception) -> str:
    """Why a folder or hub model cannot be loaded: of the hub, the libraries' messages speak of settings that are not ours."""
    message = " ".join(str(error).split())
    if Path(source).is_dir():
        return message[:200]
    no_folder = "" if source in (preset.base for preset in PRESETS.values()) else "there is no such folder here, and "
    if not hub_answers():
        return f"{no_folder}it is not in this machine's cache, and the hub does not answer"
    return f"{no_folder}the hub has no such model that may be read ({message.split('. ')[0][:200]})"


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
