"""Types of command-line arguments, with what is said of a value that does not fit."""

import argparse
import math
import re


def probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def positive_int(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def layer(text: str) -> int | str:
    """A layer's number, which the model checks, or a share of the depth."""
    if not text.endswith("%"):
        return int(text)
    if not re.fullmatch(r"(100|[1-9]\d?)%", text):
        raise argparse.ArgumentTypeError(f"{text} is no share of the depth: take 1% to 100%")
    return text


def layer_range(text: str) -> tuple[int | str, int | str] | None:
    """'1..20%' -> (1, "20%"), 'none' -> None: the contract checks the layers."""
    if text == "none":
        return None
    first, dots, last = text.partition("..")
    try:
        return layer(first), layer(last if dots else first)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: take layers such as 1..20%, or none") from None


def share(text: str) -> float:
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


def count(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return int(text)


def seed(text: str) -> int:
    """A seed that PyTorch, NumPy and scikit-learn all take."""
    if not 0 <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and {2**32 - 1}")
    return int(text)


def seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def shard(text: str) -> tuple[int, int]:
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise argparse.ArgumentTypeError(f"{text} is not I/N, such as 1/4 for the first of four")
    return int(i), int(n)
