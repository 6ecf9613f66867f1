"""What a user may type: presets, folders, hub ids, runs, names of dtypes. No torch here, so that a wrong name is refused at once.

A base is a preset, a local folder or a hub id (`org/name` or `org/name@revision`).
"""

import json
from dataclasses import dataclass
from pathlib import Path

from encoder.contract import ADAPTER_CONFIG, CONTRACT_FILE, Contract, trained_for
from files.console import InputError
from prompts import get_prompt

ROOT = Path(__file__).resolve().parent.parent
# Run without padding, tested on the configs of tests/conftest.py and tests/test_classes.py; other decoders are padded. Such a class
# tells its attention all that it depends on: Qwen2-MoE keeps a sliding window in the mask alone, Gemma 2 caps scores.
PACKED_TYPES = (
    *("llama", "mistral", "qwen3", "gemma3_text", "gpt_neox"),
    *("cohere", "cohere2", "exaone4", "gemma", "glm", "glm4", "granite", "ministral", "mixtral", "olmo", "olmo2", "olmo3", "phi", "phi3"),
    *("qwen2", "qwen3_moe", "seed_oss", "smollm3", "starcoder2"),
)
DTYPES = ("float32", "bfloat16", "float16")
KEPT_FOLDER = "adapters"  # in a run's folder: the adapters that `train.py --keep-adapters` kept on the way, each a run by itself


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


def check_dtype(name: str | None) -> None:
    """Raise InputError for what is no dtype; None is the default."""
    if name not in (None, "auto", *DTYPES):
        raise InputError(f"unknown dtype {name!r}: take auto, {', '.join(DTYPES)}")


def check_prompts(spec: str, prompt: str | None, query_prompt: str | None, *, override_contract: bool) -> None:
    """Raise InputError for what is no prompt, for a query prompt by itself, and for prompts that contradict the contract of a run."""
    if query_prompt and not prompt:
        raise InputError("--query-prompt stands beside the prompt of the documents: give --prompt as well, none if there is none")
    if prompt:
        roles = get_prompt(prompt, query_prompt).roles()
        if is_run(spec):
            Contract.read(spec).override({"prompts": roles}, force=override_contract, trained_for=trained_for(spec))


def is_run(spec: str) -> bool:
    """Whether `spec` is the folder of a training run. The name of a preset is that preset, whatever folder has the same name."""
    return spec not in PRESETS and (Path(spec) / CONTRACT_FILE).is_file()


def newest_run(folder: Path) -> Path | None:
    """The run in `folder` whose contract was written last."""
    runs = [path.parent for path in folder.glob(f"*/{CONTRACT_FILE}")]
    return max(runs, key=lambda run: (run / CONTRACT_FILE).stat().st_mtime) if runs else None


def kept_adapters(run: str | Path) -> dict[int, Path]:
    """The adapters that a run has kept on the way, by their step, in order; each folder can be loaded as a run."""
    folders = Path(run, KEPT_FOLDER).glob(f"step-*/{CONTRACT_FILE}")
    numbers = {path.parent.name.removeprefix("step-"): path.parent for path in folders}
    return {int(number): numbers[number] for number in sorted(numbers) if number.isdecimal()}


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


def base_of_run(run: Path, contract: Contract) -> str:
    """Where a run's base is: the folder that its adapter's config names, the bundled model, or the hub."""
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
    raise InputError(f"{run}: its base {contract.base} was at {recorded} and is no longer there: bring it back or correct {ADAPTER_CONFIG}")


def base_of(spec: str) -> str:
    """The base of a run; a base is its own."""
    return base_of_run(Path(spec), Contract.read(spec)) if is_run(spec) else spec


def read_lora_settings(run: Path) -> dict:
    """How the adapter of a run was made, by the names of train.py's flags. Raises InputError where its config is damaged."""
    names = {"lora_rank": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "rslora": "use_rslora", "dora": "use_dora"}
    try:
        config = json.loads((run / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return {flag: config[name] for flag, name in (names | {"lora_targets": "target_modules"}).items()}
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{run / ADAPTER_CONFIG} is missing or damaged: the adapter cannot be trained on without it") from None
