"""Which tokens of a text carry meaning: content words, function words, punctuation.

A word is a run of letters, digits and the marks on them, with an apostrophe inside ("don't"). A token belongs to the word in which most
of its characters lie, by the offsets that the tokenizer gives; bytes of one character lie in that character. Scripts without spaces
have no words to see: there each token is one. A token without a letter, a digit or a pictogram is punctuation, and so is space.

Function words are told from content words for a corpus as a whole,

    "english"      by scikit-learn's list of English stop words, less the nouns, verbs and adjectives that got into it, with "does" and
                   "did", and contractions of what is on it ("what's", "couldn't")
    "frequency"    in other languages: the words that are more than FUNCTION_SHARE of all words. Of seven English sets (requests, questions,
                   titles, abstracts) 69 to 100 % of the words that this rule takes are on the list, and it takes 61 to 87 % of those on it

and in fewer than MIN_TEXTS texts of another language not at all.
"""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from attention_analysis.stored import CATEGORIES
from files.console import InputError

WAYS = ("english", "frequency")
ENGLISH_SHARE = 0.2  # of all words that are on the list; in English texts 26 to 56 %, in other languages below 10 %
FUNCTION_SHARE = 0.004
MIN_TEXTS = 100  # in which the frequency of a word means something
# Nothman, Qin & Yurchak 2018, "Stop Word Lists in Free Open-source Software Packages", name some of these
NO_FUNCTION_WORDS = frozenset(
    (
        *("amount", "bill", "bottom", "call", "con", "cry", "de", "describe", "detail", "empty", "fill", "find", "fire", "found", "front"),
        *("full", "interest", "mill", "move", "name", "part", "serious", "show", "side", "sincere", "system", "thick", "thin", "top", "un"),
    )
)
# Thai to Myanmar, Khmer, CJK and kana, more Myanmar, fullwidth forms; symbols and pictograms, which are words by themselves as well
UNSPACED = (
    "\u0e00-\u109f\u1780-\u17ff\u2600-\u27bf\u2e80-\u2fdf\u3005-\u3007\u3021-\u312f\u31a0-\u9fff\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff"
    "\uff66-\uff9f\U0001f000-\U0001faff\U00020000-\U0003ffff"
)
CONTENT, FUNCTION, PUNCTUATION = (CATEGORIES.index(name) for name in ("content", "function", "punctuation"))


class Words(NamedTuple):
    """The words of texts, numbered by how they are written."""

    names: list[str]  # each word once, in lower case
    counts: np.ndarray  # (len(names),) how often it occurs
    of_tokens: list[np.ndarray]  # for each text the number of the word that each of its tokens belongs to, -1 for punctuation


class Categories(NamedTuple):
    """The category of every token of every text, prompt excluded, as a number in CATEGORIES."""

    of_tokens: list[np.ndarray]
    how: str  # how content words and function words were told apart, in words

    def of_sequence(self, number: int, parts: list[str]) -> np.ndarray:
        """Categories (n,) of a text in its prompt. parts: of each token, see `encoder.tokenization.PARTS`; the text may be cut short."""
        text = iter(self.of_tokens[number].tolist())
        return np.array([next(text) if part == "text" else CATEGORIES.index(part) for part in parts], np.int64)


@functools.cache
def word_pattern() -> re.Pattern:
    """A word of a script with spaces, or (group "unspaced") one character of another script."""
    # Python's \w has no combining marks, without which the words of Indian scripts fall apart
    marks = "".join(c for c in map(chr, range(0x300, 0x1F000)) if unicodedata.category(c)[0] == "M" and not "\ud800" <= c <= "\udfff")
    letter = rf"(?:(?![{UNSPACED}])(?:[^\W_]|[{re.escape(marks)}]))"
    return re.compile(rf"(?P<unspaced>[{UNSPACED}])|{letter}(?:{letter}|[\u200c\u200d])*(?:['’]{letter}+)*")


def find_words(text: str) -> tuple[np.ndarray, list[str | None]]:
    """For every character the number of its word, -1 where it is in none; the words in lower case, None for a character without spaces."""
    of_characters, words = np.full(len(text), -1), []
    for match in word_pattern().finditer(text):
        of_characters[match.start() : match.end()] = len(words)
        words.append(None if match["unspaced"] else match[0].lower().replace("’", "'"))
    return of_characters, words


def words_of_tokens(text: str, offsets: list[tuple[int, int]]) -> Iterator[tuple[int, str]]:
    """For each token the number of its word in the text (-1: none) and the word."""
    of_characters, words = find_words(text)
    for start, end in offsets:
        inside = of_characters[start : max(end, start + 1)]
        inside = inside[inside >= 0]
        if not len(inside):
            yield -1, ""
            continue
        number = int(inside[0]) if inside[0] == inside[-1] else int(np.bincount(inside).argmax())
        word = words[number]
        yield number, text[start : max(end, start + 1)].strip().lower() if word is None else word


def read_words(tokenizer, texts: list[str], chunk: int = 512) -> Words:
    """The words that the tokens of texts belong to. tokenizer: the backend of a fast one, whose offsets are used."""
    numbers, counts, of_tokens = {}, Counter(), []
    for first in range(0, len(texts), chunk):
        some = texts[first : first + chunk]
        for text, encoding in zip(some, tokenizer.encode_batch(some, add_special_tokens=False), strict=True):
            before, row = -1, []
            for in_text, word in words_of_tokens(text, encoding.offsets):
                row.append(numbers.setdefault(word, len(numbers)) if in_text >= 0 else -1)
                if in_text >= 0 and in_text != before:
                    counts[row[-1]] += 1
                before = in_text
            of_tokens.append(np.array(row, np.int32))
    return Words(list(numbers), np.array([counts[i] for i in range(len(numbers))], np.int64), of_tokens)


def categorize(tokenizer, texts: list[str], way: str | None = None) -> Categories:
    """The category of every token of texts.

    way    one of WAYS; None: "english" where more than ENGLISH_SHARE of the words are on the list, else "frequency"
    Raises InputError where the frequency of words is asked for in fewer than MIN_TEXTS texts.
    """
    words = read_words(tokenizer, texts)
    total = max(1, int(words.counts.sum()))
    on_list = np.array([is_english_function_word(word) for word in words.names], bool)
    share = words.counts[on_list].sum() / total
    asked = way is not None
    way = way or ("english" if share > ENGLISH_SHARE else "frequency")
    if way == "frequency" and len(texts) < MIN_TEXTS:
        if asked:
            raise InputError(
                f"--function-words frequency needs {MIN_TEXTS} texts or more, there are {len(texts)}: give more, or leave it out"
            )
        how = f"not told apart, all count as content: too few texts for frequencies, and {100 * share:.0f} % English stop words"
        return _numbered(words, np.zeros(len(words.names), bool), how)
    reason = "as asked" if asked else f"{100 * share:.0f} % of all words are on its list" if way == "english" else "not English"
    if way == "english":
        return _numbered(words, on_list, f"function words by scikit-learn's English stop words ({reason})")
    frequent = words.counts > FUNCTION_SHARE * total
    how = f"function words by frequency ({reason}): the {frequent.sum()} words that are more than {100 * FUNCTION_SHARE:g} % of all"
    return _numbered(words, frequent, how)


def _numbered(words: Words, is_function: np.ndarray, how: str) -> Categories:
    of_words = np.append(np.where(is_function, FUNCTION, CONTENT), PUNCTUATION)  # -1 is the last
    return Categories([of_words[numbers] for numbers in words.of_tokens], how)


def is_english_function_word(word: str) -> bool:
    """word: in lower case, with a straight apostrophe."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    def is_on_list(word: str) -> bool:
        return word in ENGLISH_STOP_WORDS and word not in NO_FUNCTION_WORDS

    stem, apostrophe, ending = word.partition("'")
    contracted = apostrophe and (word.endswith("n't") or (ending in ("s", "m", "re", "ve", "ll", "d") and is_on_list(stem)))
    return bool(contracted) or is_on_list(word) or word in ("does", "did")
