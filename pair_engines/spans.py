"""Pairs from a text alone: two of its spans, or the text and its damaged copy."""

import argparse
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator

from files.console import InputError, say
from files.reading import display_name, left_out
from pair_engines.inputs import read_input

MAX_WORDS = 2048  # of a text that crop and noise take: models cut at 512 tokens by default, and a word is seldom less than one
# Scripts written without spaces, and emoji: Thai to Myanmar, Khmer, symbols, CJK and kana, more Myanmar, fullwidth forms, pictographs
UNSPACED = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff\u2600-\u27bf\u2e80-\u312f\u31a0-\u9fff\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\uff00-\uff9f"
    "\U0001f000-\U0001faff\U00020000-\U0003ffff]"
)
INVISIBLE = re.compile("[\u200b-\u200d\ufe00-\ufe0f]")
JOINS_NEXT = "\u200d\u1039\u17d2"  # the joiner of emoji, and the signs that stack consonants
FLAG_LETTER = re.compile("[\U0001f1e6-\U0001f1ff]")  # two make a flag


def split_words(text: str) -> tuple[list[str], str]:
    """The words of a text, and what joins them again: a space.

    Where most characters belong to scripts without spaces, these characters are the words (a combining mark, and what a joiner
    connects, stay with theirs), and so is each run of other characters. A word then keeps the space before it, and "" joins them.
    """
    words = text.split()
    visible = INVISIBLE.sub("", "".join(words))
    if 2 * len(UNSPACED.sub("", visible)) >= len(visible):
        return words, " "
    units = []
    for c in " ".join(words):
        if units and c != " " and (units[-1] == " " or is_joined(units[-1], c)):
            units[-1] += c
        elif len(units) > MAX_WORDS:  # of no more use
            break
        else:
            units.append(c)
    return units, ""


def is_joined(unit: str, c: str) -> bool:
    """Whether a character belongs to the unit before it."""
    if unicodedata.category(c) in ("Mn", "Mc", "Me", "Cf") or "\U0001f3fb" <= c <= "\U0001f3ff" or unit[-1] in JOINS_NEXT:
        return True  # marks, invisible characters, skin tones
    if UNSPACED.match(c):
        return bool(FLAG_LETTER.match(c) and FLAG_LETTER.fullmatch(unit.strip()))
    return not UNSPACED.search(unit[:2])  # it may begin with a space


def read_words(args: argparse.Namespace, reasons: Counter[str]) -> Iterator[tuple[str, str, list[str], str]]:
    """Source, text, and its words with what joins them, see `split_words`, of each row with a text; at most `MAX_WORDS` words.

    At the end prints how many texts were cut, and how many the caller has left out for the reasons that it counted.
    Raises InputError where all were left out.
    """
    texts, n_cut = read_input(args.input, args.column), 0
    for source, text in texts:
        words, space = split_words(text)
        if len(words) > MAX_WORDS:
            words, n_cut = words[:MAX_WORDS], n_cut + 1
            text = space.join(words)
        yield source, text, words, space
    if n_cut:
        say(f"{n_cut} of {len(texts)} texts cut to their first {MAX_WORDS:,} words")
    if reasons.total() == len(texts):
        raise InputError(f"{display_name(args.input)}: no pairs were made, {left_out('text', reasons)}")
    if reasons:
        say(left_out("text", reasons))


def crop_pairs(args: argparse.Namespace) -> list[dict]:
    """Two random spans of each document, each of 30 to 70 % of its words (Contriever, Izacard et al. 2022, arXiv 2112.09118)."""
    rng, reasons = random.Random(args.seed), Counter()
    pairs = []
    for source, _, words, space in read_words(args, reasons):
        if len(words) < args.min_words:
            reasons[f"of fewer than {args.min_words} words (--min-words)"] += 1
            continue
        spans = []
        for _ in range(2):
            length = max(1, round(len(words) * rng.uniform(0.3, 0.7)))
            start = rng.randint(0, len(words) - length)
            spans.append(space.join(words[start : start + length]).strip())
        if spans[0] != spans[1]:
            pairs.append({"anchor": spans[0], "positive": spans[1], "engine": "crop", "source": source})
        else:
            reasons["whose two spans are equal"] += 1
    return pairs


def damage(text: str, rng: random.Random, delete: float, swap: float, chars: float) -> str:
    """The text with words deleted, neighbouring words swapped, and neighbouring letters within a word swapped.

    delete, swap, chars     probability of each, for each word
    The first and the last letter of a word stay where they are. At least one word is left.
    """
    words, space = split_words(text)
    kept = [word for word in words if rng.random() >= delete] or words[:1]
    for i in range(len(kept) - 1):
        if rng.random() < swap:
            kept[i], kept[i + 1] = kept[i + 1], kept[i]
    for i, word in enumerate(kept):
        if not space and UNSPACED.search(word):  # one character, though of several codes
            continue
        first = int(word.startswith(" "))
        if len(word) > 3 + first and rng.random() < chars:
            at = rng.randint(first + 1, len(word) - 3)
            kept[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return space.join(kept).strip()


def noise_pairs(args: argparse.Namespace) -> list[dict]:
    """Each text and its damaged copy; texts that no damage has changed are left out."""
    rng, reasons = random.Random(args.seed), Counter()
    pairs = []
    for source, text, words, space in read_words(args, reasons):
        damaged = damage(text, rng, args.delete, args.swap, args.chars)
        if damaged != space.join(words):
            pairs.append({"anchor": text, "positive": damaged, "engine": "noise", "source": source})
        else:
            reasons["that the damage did not change"] += 1
    return pairs
