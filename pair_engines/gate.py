"""The quality gate: which pairs are worth training on, and why the others are not.

Every engine's line in the table of `make_pairs.py` names the checks that make sense for it. A pair that fails is left out for the
first check that it fails, in the order of `REASONS`. Texts of the pair are compared as they stand.
"""

import collections
import functools
import itertools
import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from pair_engines.spans import split_words

if TYPE_CHECKING:
    from encoder import Encoder

# check -> the reason that is counted and printed
REASONS = {
    "empty": "empty",
    "copy": "copy of its anchor",
    "length": "too short or too long beside its anchor",
    "script": "in another script",
    "language": "in another language",
    "leak": "with words about the task",
    "refusal": "refused by the model",
    "loop": "that repeats itself",
    "close": "too close for the judge",
    "far": "too far for the judge",
    "duplicate": "near-duplicate of an earlier pair",
}
ALL_CHECKS = ("empty", "copy", "length", "script", "language", "leak", "refusal", "loop", "duplicate")
COPY = 0.95  # edit similarity from which a positive is a copy: one letter in twenty is a typo, one word in ten is not
# A positive may be this many times as long as its anchor or as short: "with more detail" doubles or triples a text. An anchor counts as
# SHORT characters at least, and a positive of ENOUGH may stand for a text of any length, as a metaphor or a question does.
LENGTH_RATIO, SHORT, ENOUGH = 6.0, 40, 25
OWN_SCRIPT = 0.5  # of a positive's letters that must be of its anchor's main script: names and terms may be of another
# Probability from which a text is held to be in a language. Of 30,000 short English texts four were then taken for another language, and
# from two in five to four in five, as they were longer, for English; of any other nothing is said.
SURE = 0.8
# A text of LOOP_WORDS words or more loops where fewer of its runs of three words are different: in prose 0.9 or more are
LOOP_WORDS, LOOP = 20, 0.5
# Near-duplicate: as sets of three words in a row the pairs share this part. One word changed among thirty is near, among ten is not.
NEAR, SHINGLE, PERMUTATIONS = 0.8, 3, 64
WINDOW = 50_000  # latest pairs among which near-duplicates are sought, so that memory stays constant: some 130 MB
AT_ONCE = 1024  # pairs that the judge reads at once

# What a chat model says around its answer. A positive is held to these only where its anchor does not say the same.
LEAKS = re.compile(
    r"^\W*(sure|certainly|of course|absolutely|okay|ok)\b[,!.: ]*(here|i can|i'd be|let me|the )"
    r"|^\W*(here|below)('s|’s| is| are)\b.{0,60}\b(re-?writ|version|paraphras|simpl|explanation|metaphor|question|summary|text)"
    r"|^\W*(re-?written|new|simplified|detailed|paraphrased|revised) (text|version)\W*(:|$)"
    r"|^\W*(explanation|metaphor|question|answer|assistant|rewrite)\s*:"
    r"|answer with the \w+ only|<\|?(im_start|im_end|assistant|user|system|think|endoftext)\b|\[/?INST\]"
    r"|\b(this|the) (rewritten|simplified|paraphrased) (text|version)\b",
    re.IGNORECASE,
)
REFUSALS = re.compile(
    r"^\W*(i['’]?m|i am|we['’]?re)? ?(very |so )?sorry\b.{0,60}\b(can['’]?t|cannot|can not|unable|not able|won['’]?t)\b"
    r"|\bas an? (ai|artificial intelligence|(large )?language model)\b"
    r"|^\W*(unfortunately,? )?i (can['’]?t|cannot|can not|won['’]?t|am unable to|am not able to|['’]m unable to) "
    r"(help|assist|fulfil|comply|provide|do that|answer|rewrite|generate|create|process|with)",
    re.IGNORECASE,
)


class Verdict(NamedTuple):
    """What the gate found about a pair."""

    pair: dict
    reason: str | None  # None: the pair is kept
    measures: dict[str, float]  # by name, of those that were taken


class Gate:
    """Takes pairs in their order and says which are kept. The same pairs, in batches of any size, have the same verdicts.

    checks     of `ALL_CHECKS`; the empty texts are always left out
    judge      keeps only pairs whose cosine under this model is in the window
    window     lowest and highest cosine
    """

    def __init__(self, checks: Iterable[str], judge: "Encoder | None" = None, window: tuple[float, float] = (-1, 1)):
        self.checks, self.judge, self.window = {"empty", *checks}, judge, window
        self.seen = NearDuplicates() if "duplicate" in self.checks else None

    def sort(self, pairs: Iterable[dict]) -> Iterator[Verdict]:
        """A verdict for each pair, in their order."""
        pairs = iter(pairs)
        while batch := list(itertools.islice(pairs, AT_ONCE)):
            verdicts = [self._by_itself(pair) for pair in batch]
            if self.judge is not None:
                self._judge(verdicts)
            for verdict in verdicts:
                if not verdict.reason and self.seen is not None and self.seen.find_or_add(verdict.pair):
                    verdict = verdict._replace(reason="duplicate")
                yield verdict

    def _by_itself(self, pair: dict) -> Verdict:
        anchor, positive = pair["anchor"], pair["positive"]
        measures = {"edit similarity": edit_similarity(anchor, positive), "length ratio": length_ratio(anchor, positive)}
        failed = {
            "empty": lambda: not (has_content(anchor) and has_content(positive)),
            "copy": lambda: measures["edit similarity"] >= COPY,
            "length": lambda: measures["length ratio"] > LENGTH_RATIO or len(positive) < min(ENOUGH, len(anchor) / LENGTH_RATIO),
            "script": lambda: in_other_script(anchor, positive),
            "language": lambda: in_other_language(anchor, positive),
            "leak": lambda: bool(LEAKS.search(positive) and not LEAKS.search(anchor)),
            "refusal": lambda: bool(REFUSALS.search(positive) and not REFUSALS.search(anchor)),
            "loop": lambda: repeats_itself(positive) and not repeats_itself(anchor),
        }
        reason = next((name for name, fails in failed.items() if name in self.checks and fails()), None)
        return Verdict(pair, reason, measures)

    def _judge(self, verdicts: list[Verdict]) -> None:
        """Write the cosines of the pairs that are kept so far, and reject those outside the window."""
        numbers = [i for i, verdict in enumerate(verdicts) if not verdict.reason]
        if not numbers:
            return
        pairs = [verdicts[i].pair for i in numbers]
        anchors = unit_vectors(self.judge.encode([pair["anchor"] for pair in pairs], "query"))  # (N, D)
        positives = unit_vectors(self.judge.encode([pair["positive"] for pair in pairs], "document"))
        low, high = self.window
        for i, cosine in zip(numbers, (anchors * positives).sum(1).tolist(), strict=True):
            reason = "far" if cosine < low else "close" if cosine > high else None
            verdicts[i] = Verdict(verdicts[i].pair, reason, verdicts[i].measures | {"cosine": cosine})


class NearDuplicates:
    """The latest WINDOW pairs, as MinHash signatures."""

    def __init__(self):
        from datasketch import MinHashLSH

        self.index, self.latest, self.number = MinHashLSH(threshold=NEAR, num_perm=PERMUTATIONS), collections.deque(), 0
        self.signatures = {}

    def find_or_add(self, pair: dict) -> bool:
        """Whether an earlier pair is nearly this one; where none is, the pair is remembered."""
        from datasketch import MinHash

        signature = MinHash(num_perm=PERMUTATIONS, seed=0, hashfunc=zlib.crc32)
        signature.update_batch(shingles(pair["anchor"], b"a") | shingles(pair["positive"], b"p"))
        if any(self.signatures[number].jaccard(signature) >= NEAR for number in self.index.query(signature)):
            return True
        self.index.insert(self.number, signature)
        self.signatures[self.number] = signature
        self.latest.append(self.number)
        self.number += 1
        if len(self.latest) > WINDOW:
            oldest = self.latest.popleft()
            self.index.remove(oldest)
            del self.signatures[oldest]
        return False


def shingles(text: str, side: bytes) -> set[bytes]:
    """Every run of SHINGLE words of a text (all of it where it is shorter), marked with the side of the pair that it stands on."""
    words = [word.strip().casefold() for word in split_words(text)[0]]
    return {side + " ".join(words[i : i + SHINGLE]).encode() for i in range(max(1, len(words) - SHINGLE + 1))}


def has_content(text: str) -> bool:
    """Whether there is a letter, a digit or a symbol such as an emoji."""
    return any(unicodedata.category(c)[0] in "LNS" for c in text)


def edit_similarity(anchor: str, positive: str) -> float:
    """1 for texts that differ in case and white space at most, 0 for texts that have nothing in common (Levenshtein, normalized)."""
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_similarity(*(" ".join(text.casefold().split()) for text in (anchor, positive)))


def length_ratio(anchor: str, positive: str) -> float:
    """Characters of the positive for each of the anchor, which counts as SHORT at least."""
    return len(positive) / max(len(anchor), SHORT)


def script(c: str) -> str:
    """The script of a letter by its Unicode name, such as LATIN; what is written together in Japanese and Korean is one."""
    name = unicodedata.name(c, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ").partition(" ")[0]
    return "CJK" if name in ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO") else name


def in_other_script(anchor: str, positive: str) -> bool:
    """Whether most letters of the positive are of another script than most of the anchor's."""
    scripts = [collections.Counter(script(c) for c in text if c.isalpha()) for text in (anchor, positive)]
    if not scripts[0] or not scripts[1]:
        return False
    (main, _), *_ = scripts[0].most_common(1)
    return scripts[1][main] < OWN_SCRIPT * scripts[1].total()


@functools.cache
def language_identifier():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def in_other_language(anchor: str, positive: str) -> bool:
    """Whether both texts are surely of a language, and not of the same."""
    (one, sure), (other, as_sure) = (language_identifier().classify(text) for text in (anchor, positive))
    return one != other and min(sure, as_sure) >= SURE


def repeats_itself(text: str) -> bool:
    """Whether the text says the same words again and again, as a model does that has lost its way."""
    words = split_words(text)[0]
    runs = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return len(words) >= LOOP_WORDS and len(set(runs)) < LOOP * len(runs)


def unit_vectors(vectors):
    import numpy as np

    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
