"""`--sweep pooling=mean,last layers=-1,80%,-2..-5 prompt=none,cluster`: the grid of an untuned base, each axis with its values.

Values are separated by commas, so that templates are given by --prompt. A layer is one by itself; A..B are all from A to B, except for
token-prepending, where they are one range of layers.
"""

import argparse

from encoder.contract import POOLING_PRESETS, POOLINGS, SCOPES, Layer
from files.arguments import layer, layer_range
from files.console import InputError
from prompts import PROMPTS

UNTUNED = [*(p for p in POOLINGS if p != "query"), *POOLING_PRESETS]  # "query" is learned: an untuned base has none
AXES = {"prompt": tuple(PROMPTS), "pooling": UNTUNED, "scope": SCOPES, "layers": None, "token-prepending": None}


def axis(text: str) -> tuple[str, list]:
    """The name of an axis and its values. Raises argparse.ArgumentTypeError."""
    name, _, values = text.partition("=")
    if name not in AXES or not values:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(f'{axis}=VALUES' for axis in AXES)}")
    values = values.split(",")
    if name == "layers":
        return name, [number for value in values for number in layers(value)]
    if name == "token-prepending":
        return name, [layer_range(value) for value in values]
    if unknown := [value for value in values if value not in AXES[name]]:
        raise argparse.ArgumentTypeError(f"{name} {unknown[0]!r}: take of {', '.join(AXES[name])}")
    return name, values


def layers(text: str) -> list[Layer]:
    """'80%' -> ["80%"], '-2..-4' -> [-2, -3, -4]. Raises argparse.ArgumentTypeError."""
    first, _, last = text.partition("..")
    try:
        if not last:
            return [layer(first)]
        step = 1 if int(last) >= int(first) else -1
        return list(range(int(first), int(last) + step, step))
    except ValueError:
        raise argparse.ArgumentTypeError(f"layers {text!r}: take numbers, shares such as 80%, or A..B") from None


def spread(args: argparse.Namespace) -> None:
    """Set the flags that make the grid from --sweep; `layer_sets` are the values of the axis of layers.

    Raises InputError for an axis that is given twice, or beside the flag of its name.
    """
    args.layer_sets = [None]
    for name, values in args.sweep or []:
        flag = name.replace("-", "_")
        given = args.layers is not None or args.layer_sets != [None] if name == "layers" else getattr(args, flag) is not None
        if given:
            raise InputError(f"--sweep {name} is given twice, or beside --{name}: leave one of them out")
        if name == "layers":
            args.layer_sets = [(value,) for value in values]
        else:
            setattr(args, flag, values)
    for name in ("model", "task", "prompt", "token_prepending"):  # what is given twice is scored once
        setattr(args, name, getattr(args, name) and list(dict.fromkeys(getattr(args, name))))
