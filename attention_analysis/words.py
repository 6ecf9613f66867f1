"""Tokens to the words that people read: pictures and the page shade words, whose weight is the sum of their tokens' weights."""

import unicodedata
from typing import NamedTuple

LONGEST = 40  # characters; longer words, as of base64 or of scripts without spaces, are shaded in pieces
UNSPACED = {"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"}  # scripts whose words no space divides: token by token
JOINER = "\N{ZERO WIDTH JOINER}"
TONES = range(0x1F3FB, 0x1F400)  # skin tones, which follow an emoji
FLAGS = range(0x1F1E6, 0x1F200)  # letters that make a flag in pairs


class Word(NamedTuple):
    start: int  # its first token
    stop: int  # the token behind its last
    gap: str  # white space before it
    category: str  # that of its first token with a letter or sign
    text: str  # without white space around; "⏎" and "␣" for white space that is a token of its own, "·" for a part of a character


def words_of(tokens: list[dict]) -> list[Word]:
    """The words of a text's tokens, in order and without gaps: each token belongs to one.

    tokens      of attention.json: "piece" with the white space before it, "part" and "category"; a piece is empty where the character
                before it goes on
    """
    starts = []
    for i, token in enumerate(tokens):
        so_far = "".join(t["piece"] for t in tokens[starts[-1] : i]) if starts else ""
        if not starts or not _goes_on(so_far, tokens[i - 1], token):
            starts.append(i)
    words, space = [], ""
    for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
        piece = "".join(token["piece"] for token in tokens[start:stop])
        text = piece.strip()
        lead = piece[: len(piece) - len(piece.lstrip())] if text else ""
        seen = next((token for token in tokens[start:stop] if token["piece"].strip()), tokens[start])
        words.append(Word(start, stop, space + lead, seen["category"], text or _sign(piece)))
        space = piece[len(piece.rstrip()) :] if text else piece * ("\n" in piece)
    return words


def _goes_on(word: str, last: dict, token: dict) -> bool:
    """Whether a token belongs to the word that ends with the token before it."""
    piece = token["piece"]
    if token["part"] != last["part"]:
        return False
    if not piece:
        return True
    if not word.strip():
        return bool(word) and "\n" not in word and not piece[0].isspace()  # a space that is a token belongs to what it precedes
    if last["category"] != token["category"] and last["piece"].strip():
        return False
    return _joined(word[-1], piece) and (len(word) + len(piece) <= LONGEST or not _is_letter(piece[0]))


def _joined(before: str, piece: str) -> bool:
    """Whether a piece that follows the character `before` goes on with its word."""
    first = piece[0]
    if JOINER in (before, first) or unicodedata.category(first).startswith("M") or ord(first) in TONES:
        return True
    if ord(before) in FLAGS and ord(first) in FLAGS:
        return True
    if first in "'’":
        return before.isalpha() and piece[1:2].isalpha()
    return _is_letter(before) and _is_letter(first)


def _is_letter(character: str) -> bool:
    """Whether a character can stand inside a word of a script that has spaces between words."""
    if not (character.isalnum() or character == "_" or unicodedata.category(character).startswith("M")):
        return False
    return unicodedata.name(character, "").partition(" ")[0].partition("-")[0] not in UNSPACED


def _sign(piece: str) -> str:
    """What stands for a token that is white space alone."""
    return "·" if not piece else "⏎" if "\n" in piece else "␣"
