"""The states of a model that are looked at: the untuned base, the adapters that a run has kept on the way, and its final one.

No torch here: what is asked for is checked before a model is loaded.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from encoder.contract import ARGUMENTS_FILE, SUMMARY_FILE, Contract
from encoder.names import is_run, kept_adapters
from files.console import InputError

if TYPE_CHECKING:
    from encoder import Encoder

# two runs can be compared text by text where these fields of their contracts are the same: they decide which tokens a text becomes
SAME_IN_ALL = ("base", "revision", "prompts", "bos", "eos", "max_tokens", "attention", "token_prepending", "quantize")


class Side(NamedTuple):
    """One state: "base", "step 20" or "adapter"."""

    name: str
    model: str  # what `Encoder.load` takes; for a run's base the run
    run: str | None  # the run that it belongs to; None for a base
    step: int | None  # of training; None where the run does not say


def sides_of(model: str) -> list[Side]:
    """The base, what a run has kept in order of training, and its final adapter, which may be that of an earlier step as well."""
    base = Side("base", model, None, 0)
    if not is_run(model):
        return [base]
    on_the_way = [Side(f"step {step}", str(folder), model, step) for step, folder in kept_adapters(model).items()]
    return [base, *on_the_way, Side("adapter", model, model, recorded(model, SUMMARY_FILE, "best_step"))]


def recorded(run: str, file: str, *names: str) -> int | None:
    """A number that train.py wrote into a file of the run; None where there is none."""
    try:
        value = json.loads((Path(run) / file).read_text(encoding="utf-8"))
        for name in names:
            value = value[name]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value if isinstance(value, int) else None


def seed_of(run: str) -> int | None:
    """The seed that a run was trained with; None where it is not known."""
    return recorded(run, ARGUMENTS_FILE, "arguments", "seed")


def check_runs(models: list[str]) -> None:
    """Raise InputError unless these are runs that differ in their adapters alone, or a single model."""
    if len(models) == 1:
        return
    for i, model in enumerate(models):
        if not is_run(model):
            raise InputError(f"--model {model}: several models must be runs of one base, for instance with several seeds; this is no run")
        if Path(model).resolve() in [Path(other).resolve() for other in models[:i]]:
            raise InputError(f"--model names {model} twice: name each run once")
    first, *others = (Contract.read(model) for model in models)
    for model, contract in zip(models[1:], others, strict=True):
        for name in SAME_IN_ALL:
            values = getattr(first, name), getattr(contract, name)
            if values[0] != values[1]:
                was, is_now = (str(value)[:100] for value in values)
                raise InputError(
                    f"{models[0]} and {model} differ in {name} ({was}; {is_now}): their texts are other tokens, look at each by itself"
                )


def common_sides(models: list[str]) -> tuple[list[Side], list[str]]:
    """The base once, then of every run the sides that all of them have; and the names of those that are missing somewhere."""
    of_each = [sides_of(model) for model in models]
    names = [[side.name for side in sides] for sides in of_each]
    common = set(names[0]).intersection(*names)
    left_out = sorted({name for some in names for name in some} - common, key=lambda name: int(name.split()[1]))
    return [of_each[0][0], *(side for sides in of_each for side in sides[1:] if side.name in common)], left_out


def reads_last_token(contract: Contract) -> bool:
    """Whether a vector, or half of it, is the state of its sequence's last token."""
    return contract.pooling in ("last", "last+mean") and contract.scope == "all"


def warn_of_pooling(contract: Contract) -> list[str]:
    """A line where the last token's attention is not what vectors are made of: a reader would take one for the other."""
    if reads_last_token(contract) or contract.pooling == "attention":
        return []
    vectors = f"vectors of pooling {contract.pooling}, scope {contract.scope}"
    return [
        f"{vectors}, are not read from the sequence's last token, whose attention this is: for means see --also received, on single texts"
    ]


def load_sides(sides: list[Side], **settings) -> Iterator[tuple[Side, "Encoder"]]:
    """Each side with its encoder, loaded one at a time. settings: of `Encoder.load`."""
    from encoder import Encoder

    for side in sides:
        yield side, Encoder.load(side.model, **settings).untuned() if side.run is None else Encoder.load(side.model, **settings)
