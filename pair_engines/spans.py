"""Pairs from a row alone: two spans of its text, the text and its damaged copy, the text twice, or two of its columns."""

import argparse
import itertools
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator

from files.console import InputError, say
from files.reading import Table, TextStream, left_out
from pair_engines.inputs import in_shard

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


# what a way to make spans gets: text, its words, and what joins them, see `split_words`. It returns anchor and positive, or a reason
# to leave the text out. It is called for every text, so that the random numbers of one do not depend on the shard.
MakeSpans = Callable[[str, list[str], str], tuple[str, str] | str]


def span_pairs(args: argparse.Namespace, make: MakeSpans) -> Iterator[dict]:
    """The pairs of the texts of --input, each cut to at most `MAX_WORDS` words; texts are read one at a time.

    At the end prints how many texts there were, how many were cut, and how many were left out for which reason.
    Raises InputError where all were left out, but for a shard, of which merge needs a file.
    """
    texts, reasons = TextStream(args.input, args.column), Counter()
    n_cut = n_pairs = n_texts = 0
    for number, (source, text) in enumerate(texts):
        words, space = split_words(text)
        is_cut = len(words) > MAX_WORDS
        if is_cut:
            words = words[:MAX_WORDS]
            text = space.join(words)
        made = make(text, words, space)
        mine = in_shard(args.shard, number)
        n_cut, n_texts = n_cut + (is_cut and mine), n_texts + mine
        if isinstance(made, str):
            reasons[made] += mine
            continue
        n_pairs += 1  # of all shards, as --limit counts them
        if mine:
            yield {"anchor": made[0], "positive": made[1], "engine": args.engine, "source": source}
        if n_pairs == args.limit:
            break
    say(texts.summary())
    if n_cut:
        say(f"{n_cut} of {n_texts} texts cut to their first {MAX_WORDS:,} words")
    reasons = +reasons
    if n_texts and reasons.total() == n_texts and not args.shard:
        raise InputError(f"{texts.name}: no pairs were made, {left_out('text', reasons)}")
    if reasons:
        say(left_out("text", reasons))


def crop_pairs(args: argparse.Namespace) -> Iterator[dict]:
    """Two random spans of each document, each of 30 to 70 % of its words (Contriever, Izacard et al. 2022, arXiv 2112.09118)."""
    rng = random.Random(args.seed)

    def crop(text: str, words: list[str], space: str) -> tuple[str, str] | str:
        if len(words) < args.min_words:
            return f"of fewer than {args.min_words} words (--min-words)"
        spans = []
        for _ in range(2):
            length = max(1, round(len(words) * rng.uniform(0.3, 0.7)))
            start = rng.randint(0, len(words) - length)
            spans.append(space.join(words[start : start + length]).strip())
        return (spans[0], spans[1]) if spans[0] != spans[1] else "whose two spans are equal"

    return span_pairs(args, crop)


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


def noise_pairs(args: argparse.Namespace) -> Iterator[dict]:
    """Each text and its damaged copy; texts that no damage has changed are left out."""
    rng = random.Random(args.seed)

    def add_noise(text: str, words: list[str], space: str) -> tuple[str, str] | str:
        damaged = damage(text, rng, args.delete, args.swap, args.chars)
        return (text, damaged) if damaged != space.join(words) else "that the damage did not change"

    return span_pairs(args, add_noise)


def same_pairs(args: argparse.Namespace) -> Iterator[dict]:
    """Each text twice: dropout makes its two vectors differ (SimCSE, Gao et al. 2021, arXiv 2104.08821)."""
    yield from span_pairs(args, lambda text, words, space: (text, text))
    say("two copies of a text differ by dropout alone: train with --lora-dropout 0.1")


def column_pairs(args: argparse.Namespace) -> Iterator[dict]:
    """Two columns of each row, such as a title and its text, or a question and its answer; rows are read one at a time."""
    table = Table(args.input)
    for column in args.columns:
        table.check_column(column, "two with --columns")
    if args.columns[0] == args.columns[1]:
        raise InputError(f"--columns names {args.columns[0]} twice: a pair needs two columns")
    rows = itertools.islice(table.texts(args.columns), args.limit)  # which counts the pairs of all shards
    for number, (source, (anchor, positive)) in enumerate(rows):
        if in_shard(args.shard, number):
            yield {"anchor": anchor, "positive": positive, "engine": args.engine, "source": source}
    say(table.summary(f"rows with {' and '.join(args.columns)}"))
