"""Validation: accuracy on held-out pairs, V-measure of labelled texts."""

import json

import numpy as np
import pytest

from encoder import Encoder
from files.console import InputError
from training.pair_data import Pair
from training.validation import MAX_LABELLED, Validation, read_labelled

TOPICS = ("the cat sat on the mat", "the bank raised its interest rates")


@pytest.fixture
def encoder(models_dir) -> Encoder:
    return Encoder.load(models_dir["mistral"])


def labelled_file(path, n: int = 20):
    rows = [{"text": f"{topic} {i}", "label": topic} for topic in TOPICS for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_accuracy_is_the_share_of_anchors_that_find_their_positive(encoder):
    words = [f"word {i} of {i * i}" for i in range(20)]
    same = [Pair(word, word) for word in words]
    validation = Validation(same, None)
    assert validation(encoder) == 1 and validation.name == "held-out accuracy"
    assert encoder.decoder.training  # as the loop needs it
    assert Validation([Pair(a, b) for a, b in zip(words, words[1:] + words[:1], strict=True)], None)(encoder) == 0
    half = [*same[:10], *(Pair(a, b) for a, b in zip(words[10:], words[11:] + words[10:11], strict=True))]
    assert Validation(half, None)(encoder) == 0.5
    assert Validation([Pair("a", "b"), Pair("c", "b")], None)(encoder) == 1  # two pairs with the same positive


def test_v_measure_is_1_where_clusters_are_labels(encoder, tmp_path):
    validation = Validation([Pair("a", "b")], labelled_file(tmp_path / "labelled.jsonl"))
    assert validation(encoder) > 0.9 and validation.name == "V-measure"
    shuffled = Validation([], labelled_file(tmp_path / "labelled.jsonl"))
    shuffled.labels = list(np.random.default_rng(0).permutation(shuffled.labels))
    assert shuffled(encoder) < 0.3


def test_without_pairs_and_texts_there_is_nothing_to_validate(tmp_path):
    assert not Validation([], None)
    assert Validation([Pair("a", "b")], None) and Validation([], labelled_file(tmp_path / "labelled.jsonl"))


def test_only_an_accuracy_has_a_standard_error(tmp_path):
    assert Validation([Pair("a", "b")] * 25, None).standard_error(0.5) == pytest.approx(0.1)
    assert Validation([], labelled_file(tmp_path / "labelled.jsonl")).standard_error(0.5) == 0


def test_labelled_texts_are_a_fixed_sample(tmp_path):
    path = labelled_file(tmp_path / "labelled.jsonl", 1500)
    texts, labels = read_labelled(path)
    assert len(texts) == len(labels) == MAX_LABELLED == 2048
    assert set(labels) == set(TOPICS) and all(text.startswith(label) for text, label in zip(texts, labels, strict=True))
    assert (texts, labels) == read_labelled(path)


def test_labelled_texts_come_in_every_kind_of_file_that_evaluation_takes(tmp_path):
    jsonl = labelled_file(tmp_path / "labelled.jsonl", 30)
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    (tmp_path / "labelled.csv").write_text("label;text\n" + "".join(f"{row['label']};{row['text']}\n" for row in rows))
    assert read_labelled(tmp_path / "labelled.csv") == read_labelled(jsonl)


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"text": "a"}', "needs columns text and label, has text"),
        ('{"text": "a", "label": "b"}\n{"text": 1, "label": "c"}', "line 2: text is a number, not a string"),
        ('{"text": "a", "label": null}', "line 1: label is empty"),
        ('{"text": "a", "label": ["b"]}', "line 1: label is a list, not a string"),
        ('{"text": "a", "label": 1}\n{"text": "b", "label": 1}', "at least two labels"),
        ("", "is empty"),
        ('["a", "b"]', "line 1: needs a JSON object"),
    ],
)
def test_a_file_that_is_not_labelled_is_refused(tmp_path, content, message):
    (tmp_path / "labelled.jsonl").write_text(content + "\n")
    with pytest.raises(InputError, match=message):
        Validation([], tmp_path / "labelled.jsonl")
