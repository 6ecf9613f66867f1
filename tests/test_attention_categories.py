"""Which tokens are content words, function words and punctuation."""

import numpy as np
import pytest
from conftest import make_tokenizer
from tokenizers import Tokenizer, models, normalizers

from attention_analysis.categories import MIN_TEXTS, categorize, is_english_function_word, read_words, words_of_tokens
from attention_analysis.stored import CATEGORIES
from files.console import InputError


def bytes_tokenizer() -> Tokenizer:
    return make_tokenizer("bytes", bos=True).backend_tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """Letters are tokens, as is the sign for a space; all else falls apart into bytes."""
    names = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *map(chr, range(ord("a"), ord("z") + 1))]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def named(categories) -> list[list[str]]:
    return [[CATEGORIES[i] for i in of_text] for of_text in categories.of_tokens]


def test_a_token_belongs_to_the_word_that_it_lies_in():
    """'the ca|t, x': a space before a token is no part of a word, and what spans two words lies in the longer one."""
    offsets = [(0, 3), (3, 6), (6, 7), (7, 8), (8, 10), (2, 7), (7, 7), (0, 0)]
    assert list(words_of_tokens("The cat, x", offsets)) == [
        *((0, "the"), (1, "cat"), (1, "cat"), (-1, ""), (2, "x"), (1, "cat"), (-1, ""), (0, "the"))
    ]


@pytest.mark.parametrize("make", [bytes_tokenizer, byte_fallback_tokenizer])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("don’t pay 3.5 %", ["don't", "pay", "3", "5"]),
        ("मैं हिन्दी", ["मैं", "हिन्दी"]),  # combining marks do not end a word
        ("مرحبا بك", ["مرحبا", "بك"]),
        ("我的 cat。", ["我", "的", "cat"]),  # a script without spaces
        ("ok 😀!", ["ok", "😀"]),
        ("한국어 좋다", ["한국어", "좋다"]),
        ("foo_bar", ["foo", "bar"]),
        ("—", []),
    ],
)
def test_words_from_pieces_of_bytes(make, text, words):
    of_text = read_words(make(), [text])
    assert of_text.names == words and of_text.counts.tolist() == [1] * len(words)
    assert len(of_text.of_tokens[0]) == len(make().encode(text, add_special_tokens=False).ids)


def test_english_function_words():
    yes = ("the", "what's", "couldn't", "don't", "i'm", "does", "they've", "again")
    no = ("bank", "bank's", "interest", "system", "o'clock", "3", "犬", "")
    assert [word for word in (*yes, *no) if is_english_function_word(word)] == list(yes)


def test_a_list_for_english_and_frequencies_elsewhere():
    english = ["The cat sat on the mat.", "What is it?"]
    categories = categorize(bytes_tokenizer(), english)
    assert "English stop words (" in categories.how and "of all words are on its list" in categories.how
    assert {"function", "content", "punctuation"} == set(named(categories)[0])

    other = [f"der hund{i} und die katze{i}" for i in range(MIN_TEXTS)]
    categories = categorize(byte_fallback_tokenizer(), other)
    assert "function words by frequency (not English): the 3 words that are more than 0.4 % of all" in categories.how
    # of "▁der▁hund0▁und▁die▁katze0" every letter is a token, as is the space before it
    expected = ["function"] * 4 + ["punctuation"] + ["content"] * 5
    assert [name for name in named(categories)[0] if name != "punctuation"].count("function") == 4 + 3 + 3
    assert named(categories)[0][: len(expected)] == expected

    few = categorize(bytes_tokenizer(), other[:3])
    assert few.how.startswith("not told apart, all count as content") and "function" not in {name for text in named(few) for name in text}
    with pytest.raises(InputError, match="needs 100 texts or more, there are 3"):
        categorize(bytes_tokenizer(), other[:3], "frequency")
    asked = categorize(bytes_tokenizer(), other, "english")
    assert "(as asked)" in asked.how and "function" not in named(asked)[0]


def test_the_parts_around_a_text_and_a_text_cut_short():
    categories = categorize(byte_fallback_tokenizer(), ["a cat"])
    parts = ["bos", "prefix", "text", "text", "text", "suffix", "eos"]
    row = [CATEGORIES[i] for i in categories.of_sequence(0, parts)]
    assert row == ["bos", "prefix", "function", "function", "punctuation", "suffix", "eos"]
    assert categories.of_sequence(0, ["prefix"]).tolist() == [CATEGORIES.index("prefix")]
    assert categorize(byte_fallback_tokenizer(), [""]).of_tokens[0].dtype == np.int64
