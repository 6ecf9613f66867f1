"""`make_pairs.py auto` and training on its folder: the teacher, the folder, distillation, resumption and chunks."""

import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_run
from launch import torchrun
from safetensors.numpy import load_file, save_file
from short_runs import ADAPTER, ShortRuns, assert_same_adapter, metrics, run, summary, word_rows, write_rows
from sklearn.feature_extraction.text import TfidfVectorizer

import make_pairs
import train
from encoder import Contract, Encoder
from files.console import InputError
from pair_engines import teacher
from pair_engines.teacher import Corpus, Part, beginnings_tell_apart, lexical_dims, lexical_parts, look_at, side_by_side, whitened
from serving.folder import runtimes_for
from tasks import unlabelled
from training import validation
from training.gradients import chunked_backward
from training.losses import COSINE_WEIGHT, LossSettings, batch_loss, distillation
from training.own_texts import RECIPE_FILE, TEACHER_FILE, TEXTS_FILE, OwnTexts, beginning, read_recipe
from training.pair_data import Pair, PairDataset, tokenize_pairs
from training.run_record import CHECKPOINT, PREVIOUS_CHECKPOINT

TOPICS = ("saffron risotto", "brass trumpet", "knitted sweater", "mountain bicycle", "walnut table", "ceramic teapot")


def topic_texts(n: int = 8) -> list[str]:
    """n texts of each topic, which they name in other words of a sentence."""
    chance, verbs = random.Random(0), ("buy", "clean", "lend", "photograph", "describe", "wrap", "sell")
    return [f"Please {chance.choice(verbs)} the {topic}, it is for {chance.choice(verbs)}ing {i}" for topic in TOPICS for i in range(n)]


def auto(*flags) -> None:
    make_pairs.main(make_pairs.build_parser().parse_args(["auto", *map(str, flags)]))


@pytest.fixture
def texts(tmp_path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(topic_texts()))
    return path


@pytest.fixture
def folder(tmp_path, texts) -> Path:
    """Made from words alone, with 24 general pairs."""
    auto("--input", texts, "--model", "none", "--general", write_rows(tmp_path / "general.jsonl", word_rows()), "--out", tmp_path / "mine")
    return tmp_path / "mine"


@pytest.fixture
def small(llama, tmp_path) -> ShortRuns:
    """Short runs on the folder instead of a file of pairs."""
    runs = ShortRuns(llama, tmp_path)
    runs.pairs = tmp_path / "mine"
    return runs


# ----------------------------------------------------------------------------------------------------------- the teacher


def test_neighbours_share_their_topic(folder):
    tensors, lines = load_file(folder / TEACHER_FILE), (folder / TEXTS_FILE).read_text().splitlines()
    topic = [next(t for t in TOPICS if t in json.loads(line)["text"]) for line in lines]
    assert tensors["neighbours"].shape == (48, 8) and tensors["vectors"].dtype == np.float16
    assert np.mean([[topic[j] == topic[i] for j in row[:6]] for i, row in enumerate(tensors["neighbours"])]) > 0.9
    assert not any(i in row for i, row in enumerate(tensors["neighbours"]))
    assert json.loads(lines[0]) == {"text": topic_texts()[0], "source": "texts.txt:1"}


def test_parts_have_their_shares_and_move_towards_their_neighbours():
    rng = np.random.default_rng(0)
    parts = [Part("long", 100 * rng.normal(size=(20, 3)) + 7, 1), Part("short", rng.normal(size=(20, 5)), 3)]
    teacher, neighbours = side_by_side(parts)
    centred = [part.vectors - part.vectors.mean(0) for part in parts]
    units = [vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in centred]
    unit = np.hstack([units[0] * math.sqrt(1 / 4), units[1] * math.sqrt(3 / 4)])
    cosines = unit @ unit.T - 3 * np.eye(20)
    assert (np.sort(neighbours) == np.sort(np.argsort(-cosines)[:, :8])).all()
    weights = np.clip(np.take_along_axis(cosines, neighbours.astype(int), 1), 0, None)
    moved = unit + (weights[:, :, None] * unit[neighbours]).sum(1) / weights.sum(1, keepdims=True)
    np.testing.assert_allclose(teacher, moved / np.linalg.norm(moved, axis=1, keepdims=True), atol=1e-5)


def test_a_model_s_vectors_are_whitened_halfway():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2000, 3)) * (100, 9, 1) + 50
    half = whitened(vectors.astype(np.float32))
    np.testing.assert_allclose(half.std(0), (10, 3, 1), rtol=0.05)
    assert abs(np.corrcoef(half[:, 0], vectors[:, 0])[0, 1]) > 0.999
    np.testing.assert_allclose(whitened(vectors, degree=1).std(0), 1, rtol=0.01)
    assert whitened(rng.normal(size=(2000, 384))).shape == (2000, 100) and whitened(rng.normal(size=(40, 384))).shape == (40, 15)
    assert np.isfinite(whitened(np.ones((50, 4), np.float32))).all()  # a model that gives all texts the same vector


def test_words_and_letters_of_more_texts_have_more_dimensions(monkeypatch):
    assert [lexical_dims(n) for n in (40, 900, 1000, 3000, 10_000, 27_000, 10**6)] == [15, 90, 100, 100, 182, 300, 300]
    monkeypatch.setattr("pair_engines.teacher.LEXICAL_TEXTS", 15)
    words = np.random.default_rng(0).choice([f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrt"], (60, 6))
    parts = lexical_parts(Corpus([" ".join(row) for row in words], [], "other", 6))
    assert [part.vectors.shape for part in parts] == [(60, 30), (60, 30)]
    monkeypatch.setattr("pair_engines.teacher.LEXICAL_WHITENING", 0)
    plain = lexical_parts(Corpus([" ".join(row) for row in words], [], "other", 6))
    for part, without in zip(parts, plain, strict=True):
        np.testing.assert_allclose(part.vectors.std(0), without.vectors.std(0) ** 0.75, rtol=1e-3)


def test_the_same_texts_give_the_same_folder_and_a_model_is_part_of_the_teacher(tmp_path, texts, folder, llama, capsys):
    general = tmp_path / "general.jsonl"
    auto("--input", texts, "--model", "none", "--general", general, "--out", tmp_path / "again")
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    auto("--input", texts, "--model", llama, "--general", "none", "--out", tmp_path / "with model")
    recipe = json.loads((tmp_path / "with model" / RECIPE_FILE).read_text())
    assert (
        len(recipe["teacher"]) == 3
        and recipe["shares"] == [1, 2, 3]
        and recipe["fingerprints"]
        and not (tmp_path / "with model" / "general.jsonl").exists()
    )
    assert "words, sequences of 3 to 5 letters, vectors of" in capsys.readouterr().out
    run = make_run(llama, tmp_path / "run", prompt="cluster")
    auto("--input", texts, "--model", llama, run, "--general", "none", "--out", tmp_path / "with run")
    recipes = [json.loads((tmp_path / name / RECIPE_FILE).read_text()) for name in ("with model", "with run")]
    assert recipes[1]["shares"] == [1, 2, 1.5, 1.5]  # the models divide what one has alone
    assert (
        len(recipes[1]["teacher"]) == 4 and recipes[1]["fingerprints"][0] == recipes[0]["fingerprints"][0] != recipes[1]["fingerprints"][1]
    )


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("please turn the lights of the kitchen off", "English"),
        ("bitte schalte das Licht in der Küche aus", "other"),
        ("请把厨房的灯关掉", "unspaced"),
    ],
)
def test_the_language_is_looked_at(text, language):
    assert look_at([text] * 40) == (language, 8)
    assert look_at([*[text] * 800, "la " * 100_000]) == (language, 8)  # one huge text does not speak for all


def test_a_corpus_in_several_languages_is_noticed(tmp_path, monkeypatch, capsys):
    """English is known by its function words, of which such a corpus has many as well."""
    german = [f"Bitte {verb} das Licht in {room} aus, wenn du gehst" for verb in ("schalte", "mach") for room in ("der Küche", "dem Flur")]
    rows = [text.replace("Please", "Would you please") for text in topic_texts()] + 5 * [f"{text} ({i})" for i, text in enumerate(german)]
    rows = [f"{row} {i}" for i, row in enumerate(rows)]
    assert look_at(rows)[0] == "several" and look_at(rows[:48])[0] == "English"
    (tmp_path / "t.txt").write_text("\n".join(rows))
    general = write_rows(tmp_path / "general.jsonl", word_rows())
    auto("--input", tmp_path / "t.txt", "--model", "none", "--general", general, "--out", tmp_path / "out")
    out = capsys.readouterr().out
    assert "68 texts, in several languages, of" in out
    assert "languages of those texts that are surely in one: en " in out and ", de " in out
    assert "English docstrings" not in out  # --general names other pairs
    monkeypatch.setattr(teacher, "DOCSTRING_PAIRS", general)
    auto("--input", tmp_path / "t.txt", "--model", "none", "--out", tmp_path / "default")
    said = capsys.readouterr()
    assert "general pairs are English docstrings: pairs in the language of your texts are better" in said.out
    assert "warning: 68 texts are few" in said.err


def test_frequent_words_of_several_languages_do_not_count(monkeypatch):
    """Neither English stop words nor what stands in most texts."""
    taken = []

    class Vectorizer(TfidfVectorizer):
        def fit_transform(self, texts):
            counts = super().fit_transform(texts)
            taken.append(set(self.get_feature_names_out()))
            return counts

    monkeypatch.setattr("sklearn.feature_extraction.text.TfidfVectorizer", Vectorizer)
    texts = [f"the lamp und {word}" for word in ("kitchen", "küche", "garden", "garten", "door", "tür", "hall", "flur", "roof", "dach")]
    texts += ["because of a kitchen", "because of the küche"]
    for language in ("English", "several", "other"):
        lexical_parts(Corpus(texts, [], language, 4))
    english, several, other = taken[::2]
    assert {"lamp", "und"} <= english and "because" not in english and "kitchen" in english
    assert not {"lamp", "und", "the", "because"} & several and "kitchen" in several
    assert "because" in other and "lamp" not in other


def test_texts_without_spaces_are_taught_by_their_characters(tmp_path, capsys):
    dishes, verbs = ("番茄炒蛋", "红烧牛肉", "糖醋排骨", "麻婆豆腐", "宫保鸡丁", "小笼汤包"), "买卖做吃看洗切煮"
    (tmp_path / "zh.txt").write_text("\n".join(f"我想{verb}一份{dish}" for dish in dishes for verb in verbs))
    auto("--input", tmp_path / "zh.txt", "--model", "none", "--general", "none", "--out", tmp_path / "zh")
    neighbours = load_file(tmp_path / "zh" / TEACHER_FILE)["neighbours"]
    assert np.mean(neighbours // 8 == np.arange(48)[:, None] // 8) > 0.8
    assert "written without spaces, of 9 characters" in capsys.readouterr().out


def test_copies_are_counted_and_more_texts_than_wanted_are_drawn(tmp_path, texts, capsys):
    texts.write_text("\n".join([*topic_texts(), *map(str.upper, topic_texts()[:9])]))
    auto("--input", texts, "--model", "none", "--general", "none", "--limit", 40, "--out", tmp_path / "out")
    out = capsys.readouterr().out
    assert "9 texts left out: 9 that are copies of others" in out and "40 of 48 texts are drawn at random" in out


def test_what_was_chosen_is_said_with_the_reason(tmp_path, texts, capsys):
    (tmp_path / "general.jsonl").write_text('{"anchor": "a", "positive": "b"}\n' * 3)
    texts.write_text("\n".join([*topic_texts(), "long " * 1000]))
    auto("--input", texts, "--model", "none", "--general", tmp_path / "general.jsonl", "--out", tmp_path / "out")
    said = capsys.readouterr().out.splitlines()
    for line in (
        "49 texts, in English, of 10 words at the median: its stop words do not count",
        "1 of them count with their first 2,000 characters",
        "training: 80 steps, 118 passes over the texts in batches of 96",
        "pooling: the mean of all tokens, BOS too, which every runtime can serve (train.py --pooling takes others)",
        "1 texts are longer, but few, or much alike in their first 400 characters: they are trained on uncut",
        "general pairs: 3, 25% of each batch, so that the model keeps what it knows",
    ):
        assert line in said


def test_more_texts_than_the_steps_have_time_for(tmp_path, texts, monkeypatch, capsys):
    monkeypatch.setattr(teacher, "MIN_STEPS", 1)
    monkeypatch.setattr(teacher, "MAX_STEPS", 2)
    auto("--input", texts, "--model", "none", "--general", "none", "--out", tmp_path / "out")
    assert "training: 2 steps, 4 passes over the texts in batches of 96 (train.py --steps 3: 6)" in capsys.readouterr().out.splitlines()
    assert read_recipe(tmp_path / "out")["train"]["steps"] == 2


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        (["one text"] * 50, {}, r"holds 1 different texts: a teacher needs at least 32"),
        ([chr(0x1D00 + i) * 9 for i in range(40)], {}, "hardly any words or sequences of 3 to 5 letters are in some texts and not in"),
        ([f"The long text of number {i} is this" for i in range(40)], {}, "hardly any words or sequences of 3 to 5 letters are in some"),
        (topic_texts(), {"--general": ["nowhere.jsonl"]}, "nowhere.jsonl"),
        (topic_texts(), {"--model": ["nowhere"]}, "no model 'nowhere'"),
        (topic_texts(), {"--model": ["tiny", "none"]}, "--model none means that no model takes part"),
        (topic_texts(), {"--model": ["tiny", "tiny"]}, "--model names a model twice"),
        (topic_texts(), {"--limit": ["9"]}, "--limit 9: a teacher needs at least 32 texts"),
        (topic_texts(), {"--dtype": ["float8"]}, "unknown dtype 'float8'"),
        (topic_texts(), {"--out": ["mine.jsonl"]}, "auto writes a folder, name one such as mine$"),
    ],
)
def test_what_cannot_be_taught_is_refused_and_leaves_nothing(tmp_path, texts, rows, flags, message):
    texts.write_text("\n".join(rows))
    flags = {"--model": ["none"], "--general": ["none"], "--out": [tmp_path / "out"]} | flags
    with pytest.raises((InputError, FileNotFoundError), match=message):
        auto("--input", texts, *(x for flag, values in flags.items() for x in (flag, *values)))
    assert {path.name for path in tmp_path.iterdir()} <= {"texts.txt"}


def test_texts_that_share_no_words_are_taught_by_their_letters(tmp_path, capsys):
    (tmp_path / "numbers.txt").write_text("\n".join(str(n) for n in range(1000, 1100)))
    auto("--input", tmp_path / "numbers.txt", "--model", "none", "--general", "none", "--out", tmp_path / "out")
    said = capsys.readouterr()
    assert "warning: hardly any words are in some texts and not in others: these are not part of the teacher" in said.err
    assert "teacher: sequences of 3 to 5 letters\n" in said.out and "general pairs: none\n" in said.out


def test_a_seed_is_no_negative_number(texts, capsys):
    with pytest.raises(SystemExit):
        auto("--input", texts, "--model", "none", "--seed", -1, "--out", texts.parent / "out")
    assert "--seed: -1 is not between 0 and" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_named_before_the_texts_are_read(tmp_path, texts):
    for engine in (("auto", "--model", "none", "--general", "none"), ("noise",)):
        flags = [*engine, "--input", tmp_path / "none.txt", "--out", texts / "mine.jsonl"]
        with pytest.raises(InputError, match="is a file, choose another place"):
            make_pairs.main(make_pairs.build_parser().parse_args(list(map(str, flags))))


def test_what_a_killed_job_has_left_is_removed(tmp_path, texts):
    (tmp_path / ".out.123.tmp").mkdir()
    (tmp_path / ".out.123.tmp" / TEXTS_FILE).write_text("half")
    auto("--input", texts, "--model", "none", "--general", "none", "--out", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"texts.txt", "out"}


# ------------------------------------------------------------------------------------------------------------ distillation


def test_distillation_by_hand():
    """The teacher sees texts 0 and 1 alike, the student all at right angles: at temperature 0.1, and two of six cosines are 1 too low."""
    student, teacher = torch.eye(3), torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    high = math.exp(10) / (math.exp(10) + 1)
    divergence = high * math.log(high / 0.5) + (1 - high) * math.log((1 - high) / 0.5)
    result = distillation(student, teacher, torch.arange(3))
    assert result.divergence == pytest.approx(2 * divergence / 3, abs=1e-5) and result.n_negatives == 2
    assert result.loss.item() - result.divergence == pytest.approx(COSINE_WEIGHT * 2 / 6, rel=1e-5)
    same = distillation(teacher, teacher, torch.arange(3))
    assert same.loss.item() == pytest.approx(0, abs=1e-6) and same.accuracy == 1
    copies = distillation(student, teacher, torch.tensor([5, 5, 6]))  # texts 0 and 1 are the same text: nothing to learn of them
    assert copies.loss.item() == pytest.approx(0, abs=1e-5) and copies.n_negatives == pytest.approx(4 / 3)
    assert distillation(student, teacher, torch.zeros(3)).loss.item() == 0  # three copies: nothing at all


def taught_pairs(n: int) -> list[Pair]:
    teacher = F.normalize(torch.randn(n, 3, 5, generator=torch.Generator().manual_seed(0)), dim=-1).half().numpy()
    return [Pair(f"text {i}", f"neighbour {i}", (f"other {i}",), teacher[i]) for i in range(n)]


@pytest.mark.parametrize("chunk", [2, 3])
def test_chunks_of_taught_and_other_pairs_give_the_gradients_of_the_whole(llama, chunk):
    """And the loss is the sum of both losses."""
    pairs = [
        pair
        for both in zip(taught_pairs(3), [Pair(f"anchor {i}", f"positive {i}", ("no",) * i) for i in range(3)], strict=True)
        for pair in both
    ]
    encoder = Encoder.load(llama, prompt="cluster", pooling="mean", dtype="float32")
    torch.manual_seed(0)
    encoder.add_adapter(2, 2)
    for name, parameter in encoder.trainable().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = tokenize_pairs(encoder, pairs)
    gradients, losses = [], []
    for size in (len(pairs), chunk):
        chunks = []
        for start in range(0, len(pairs), size):
            rows = list(range(start, min(start + size, len(pairs))))
            chunks.append(
                [(batch.anchors, rows), (batch.positives, rows), (batch.negatives, [j for i in rows for j in batch.negative_rows[i]])]
            )
        encoder.decoder.zero_grad()
        n_hard = sum(map(len, batch.negative_rows))
        losses.append(chunked_backward(encoder, chunks, [[6], [6], [n_hard]], batch_loss(batch, encoder.device, LossSettings())))
        gradients.append({name: p.grad.clone() for name, p in encoder.trainable().items()})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    apart = []
    for some in (pairs[::2], pairs[1::2]):
        one = tokenize_pairs(encoder, some)
        rows, hard = list(range(3)), list(range(sum(map(len, one.negative_rows))))
        chunks = [[(one.anchors, rows), (one.positives, rows), (one.negatives, hard)]]
        apart.append(chunked_backward(encoder, chunks, [[3], [3], [len(hard)]], batch_loss(one, encoder.device, LossSettings())))
    assert losses[0].loss.item() == pytest.approx(sum(result.loss.item() for result in apart), rel=1e-5)
    assert losses[0].divergence == pytest.approx(apart[0].divergence, rel=1e-5) and apart[1].divergence is None


# --------------------------------------------------------------------------------------------------------------- training


def test_training_on_the_folder_comes_nearer_to_the_teacher(small, folder, tmp_path, capsys):
    run(*small("run", "--steps", 60, "--batch-size", 32, "--lr", 0.005, "--lora-rank", 8))
    rows = metrics(tmp_path / "run")
    assert np.mean([row["divergence"] for row in rows[-5:]]) < 0.8 * np.mean([row["divergence"] for row in rows[:3]])
    out = capsys.readouterr().out
    assert "48 texts with a teacher and 24 pairs from" in out and "the last step's adapter is kept" in out
    contract = Contract.read(tmp_path / "run")
    assert (contract.pooling, contract.scope, contract.keep_bos) == ("mean", "all", True) and len(runtimes_for(contract)) == 5


def test_the_recipe_decides_what_the_command_line_leaves_open(small, folder, tmp_path):
    recipe = json.loads((folder / RECIPE_FILE).read_text())
    (folder / RECIPE_FILE).write_text(json.dumps(recipe | {"train": recipe["train"] | {"steps": 2}}))
    flags = [flag for flag in small("run", "--pooling", "last") if flag != "--steps"]
    flags.remove("3")
    run(*flags)
    contract = Contract.read(tmp_path / "run")
    assert summary(tmp_path / "run")["steps"] == 2 and (contract.pooling, contract.keep_bos) == ("last", False)
    run("--model", tmp_path / "run", *flags[flags.index("--pairs") : flags.index("--pairs") + 2], "--out", tmp_path / "on")
    assert Contract.read(tmp_path / "on").pooling == "last"  # a run that is trained on keeps its contract


def test_a_resumed_run_is_the_whole_run_to_the_bit(small, folder, tmp_path):
    run(*small("whole", "--steps", 5, "--lora-dropout", 0.1))
    run(*small("run", "--steps", 5, "--lora-dropout", 0.1, "--checkpoint-every", 2))
    out = tmp_path / "run"
    (out / CHECKPOINT).unlink()
    (out / PREVIOUS_CHECKPOINT).rename(out / CHECKPOINT)
    (out / "summary.json").unlink()
    run("--out", out, "--resume")
    assert_same_adapter(tmp_path / "whole", out)


@pytest.mark.parametrize("flags", [("--lora-dropout", 0.1), ("--dora",), ()])
def test_every_adapter_is_compared_with_its_base_in_half_precision(small, folder, tmp_path, flags, monkeypatch):
    """Those that peft computes need autocast, as in training."""
    monkeypatch.setattr(unlabelled, "MIN_TEXTS", 10)
    monkeypatch.setattr(unlabelled, "MAX_SHARE", 0.5)
    run(*small("run", "--dtype", "bfloat16", *flags))
    assert summary(tmp_path / "run")["without_labels"]["verdict"]


@pytest.mark.parametrize(("interval", "warned"), [((0.8, 0.7, 0.9), True), ((0.95, 0.9, 1.1), False)])
def test_a_run_that_looks_worse_than_its_base_ends_with_a_warning(small, folder, interval, warned, monkeypatch, capsys):
    monkeypatch.setattr(validation, "compare_with_start", lambda *_: unlabelled.Comparison(*interval))
    run(*small("run", "--steps", 1))
    said = capsys.readouterr()
    assert ("warning: this run beside its base: worse, as seen without labels" in said.err) == warned
    assert ("this run beside its base: cannot tell, as seen without labels" in said.out) != warned


def test_a_run_that_was_trained_on_is_compared_with_what_it_was(small, folder, tmp_path, monkeypatch):
    """With the vectors of the run in --model, and ends with its own weights."""
    run(*small("first", "--lr", 0.01))
    encoded = []

    def hide_words(texts, n_splits):
        return [unlabelled.HiddenWords(texts[:8], None, np.arange(8))]

    monkeypatch.setattr(unlabelled, "hide_words", hide_words)
    monkeypatch.setattr(unlabelled, "scores", lambda vectors, split: encoded.append(vectors))
    monkeypatch.setattr(unlabelled, "compare", lambda *_: unlabelled.Comparison(1.0, 0.9, 1.1))
    flags = small("second", "--lr", 0.01)
    run("--model", tmp_path / "first", *flags[flags.index("--pairs") :])
    assert summary(tmp_path / "second")["without_labels"]["against"] == str(tmp_path / "first")
    for vectors, name in zip(encoded, ("first", "second"), strict=True):
        expected = Encoder.load(str(tmp_path / name), dtype="float32").encode(topic_texts()[:8])
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert np.abs(encoded[0] - encoded[1]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--fsdp",)])
def test_two_processes_train_as_one(small, folder, tmp_path, more, monkeypatch):
    few = {"MIN_TEXTS": 10, "MAX_SHARE": 0.5}  # so that these texts can be compared without labels
    script = tmp_path / "few.py"
    script.write_text(
        f"import train\nfrom tasks import unlabelled\nvars(unlabelled).update({few})\ntrain.run_script(lambda: train.main(train.parse()))\n"
    )
    for name, value in few.items():
        monkeypatch.setattr(unlabelled, name, value)
    flags = ("--steps", 4, "--batch-size", 8, "--chunk-size", 2)
    run(*small("one", *flags))
    done = torchrun(script, *small("two", *flags, *more))
    assert done.returncode == 0, done.stderr
    seen = [summary(tmp_path / name)["without_labels"]["ratio"] for name in ("one", "two")]
    assert seen[0] == pytest.approx(seen[1], rel=0.02) and (done.stdout + done.stderr).count("as seen without labels") == 1
    one, two = (load_file(tmp_path / name / ADAPTER) for name in ("one", "two"))
    for name, matrix in one.items():
        np.testing.assert_allclose(two[name], matrix, rtol=1e-4, atol=1e-4)
    losses = [[(row["loss"], row["divergence"]) for row in metrics(tmp_path / name)] for name in ("one", "two")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_folders_and_files_are_mixed_by_weight(folder, tmp_path):
    more = write_rows(tmp_path / "more.jsonl", [{"anchor": f"a {i}", "positive": f"p {i}"} for i in range(10)])
    pairs = PairDataset([folder, more])
    assert pairs.sizes == [4 * 48, 24, 10] and pairs.taught
    assert pairs.weights(None) == [0.75, 0.25, 1] and pairs.weights([2, 1]) == [1.5, 0.5, 1]
    own, general, other = pairs[[5, 192, 216]]
    texts = topic_texts()
    neighbours = load_file(folder / TEACHER_FILE)["neighbours"]
    assert own.anchor == texts[1] and [own.positive, *own.negatives] == [texts[j] for j in neighbours[1, 2:4]]
    assert own.teacher.shape[0] == 3 and general.teacher is None and (other.anchor, other.positive) == ("a 0", "p 0")
    assert pairs.copies(np.array([192, 217])).tolist() == [192, 217]


@pytest.mark.parametrize("what", ["recipe", "argument", "type", "missing", "teacher", "texts", "line"])
def test_a_damaged_folder_is_one_clear_line(small, folder, what):
    if what == "recipe":
        (folder / RECIPE_FILE).write_text("{")
    elif what in ("argument", "type"):  # one that train.py does not know, and one that it does
        recipe = json.loads((folder / RECIPE_FILE).read_text())
        recipe["train"] |= {"passes": 5} if what == "argument" else {"steps": "many"}
        (folder / RECIPE_FILE).write_text(json.dumps(recipe))
    elif what == "missing":
        (folder / TEXTS_FILE).unlink()
    elif what == "teacher":
        (folder / TEACHER_FILE).write_bytes((folder / TEACHER_FILE).read_bytes()[:-9])
    elif what == "texts":
        (folder / TEXTS_FILE).write_text((folder / TEXTS_FILE).read_text().partition("\n")[2])
    else:
        (folder / TEXTS_FILE).write_text("{}\n" + (folder / TEXTS_FILE).read_text().partition("\n")[2])
    message = r"texts\.jsonl, line 1: needs" if what == "line" else "make (it|the folder) again with make_pairs.py auto"
    with pytest.raises(InputError, match=message):
        run(*small("run"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("short " * 3, "short " * 3),
        ("a" * 22, "a" * 22),
        ("abcdef " * 9, "abcdef abcdef abcdef"),
        ("abcde " * 9, "abcde abcde abcde abcd"),
        ("a" * 22 + " b", "a" * 22),
        ("a" * 50, "a" * 22),
        ("語" * 50, "語" * 22),
    ],
)
def test_a_beginning_ends_at_a_space_where_there_is_one(text, expected):
    assert beginning(text, 20) == expected


def test_long_texts_are_cut_and_the_teacher_is_of_the_whole(tmp_path, texts):
    whole = [text + " " + " ".join(f"word{i}" for i in range(100)) for text in topic_texts()]
    texts.write_text("\n".join(whole))
    auto("--input", texts, "--model", "none", "--general", "none", "--out", tmp_path / "long")
    (cut, vectors), (uncut, same) = (OwnTexts(tmp_path / "long", characters)[[5]][0] for characters in (50, None))
    assert uncut[0] == whole[1] and np.array_equal(vectors, same)
    assert all(long.startswith(short) and len(short) <= 55 for short, long in zip(cut, uncut, strict=True))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), 400),
        (("--characters", 9), 9),
        (("--pooling", "position-mean"), 400),
        (("--pooling", "last"), None),
        (("--scope", "text"), 400),
        (("--characters", 0), 0),
        (("--pooling", "first-last"), 400),
        (("--model", "mean"), 400),
        (("--model", "last"), None),
    ],
)
def test_only_means_are_trained_on_beginnings(llama, folder, tmp_path, flags, expected):
    recipe = json.loads((folder / RECIPE_FILE).read_text())
    (folder / RECIPE_FILE).write_text(json.dumps(recipe | {"train": recipe["train"] | {"characters": 400}}))
    if "--model" in flags:
        flags = ("--model", make_run(llama, tmp_path / "run", pooling=flags[1]))
    args = train.build_parser().parse_args(["--pairs", str(folder), *map(str, flags)])
    train.complete_arguments(args)
    train.check_arguments(args)
    assert args.characters == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), ("mean", "all", True)),
        (("--pooling", "mean"), ("mean", "all", True)),
        (("--no-keep-bos",), ("mean", "all", False)),
        (("--scope", "all"), ("mean", "all", True)),
        (("--scope", "text"), ("mean", "text", None)),
        (("--pooling", "position-mean"), ("position-mean", "all", None)),
        (("--pooling", "last"), ("last", None, None)),
    ],
)
def test_a_flag_of_the_pooling_leaves_what_goes_with_it(folder, flags, expected):
    args = train.build_parser().parse_args(["--pairs", str(folder), *flags])
    train.complete_arguments(args)
    assert (args.pooling, args.scope, args.keep_bos) == expected


def test_several_folders_add_their_steps_and_cut_only_what_each_would_cut(folder, tmp_path):
    recipe = json.loads((folder / RECIPE_FILE).read_text())
    shutil.copytree(folder, tmp_path / "long")
    (tmp_path / "long" / RECIPE_FILE).write_text(json.dumps(recipe | {"train": recipe["train"] | {"characters": 400, "steps": 300}}))
    for folders, expected in (([tmp_path / "long", folder], (380, None)), ([tmp_path / "long"] * 2, (600, 400))):
        args = train.build_parser().parse_args(["--pairs", *map(str, folders)])
        train.complete_arguments(args)
        assert (args.steps, args.characters) == expected


def test_pairs_have_no_beginnings(tmp_path):
    args = train.build_parser().parse_args(["--pairs", str(write_rows(tmp_path / "pairs.jsonl", word_rows())), "--characters", "400"])
    train.complete_arguments(args)
    with pytest.raises(InputError, match="--characters cuts the texts of a folder"):
        train.check_arguments(args)


def test_a_base_without_bos_is_pooled_as_it_is(models_dir, folder, tmp_path):
    runs = ShortRuns(models_dir["qwen3"], tmp_path)
    runs.pairs = folder
    run(*runs("run"))
    contract = Contract.read(tmp_path / "run")
    assert (contract.pooling, contract.scope, contract.bos, contract.keep_bos) == ("mean", "all", False, False)
    assert len(runtimes_for(contract)) == 5


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("{topic} {rest}", "English", True),
        ("{form} {topic} {rest}", "English", False),
        ("{topic} {form} {rest}", "English", False),
        ("{topic}", "English", False),  # none is long
        ("{unspaced}", "unspaced", True),
        ("{form}{unspaced}", "unspaced", False),
    ],
)
def test_beginnings_are_trained_on_unless_they_are_alike(text, language, expected):
    chance, form, rows = random.Random(0), "Thank you for your message, which we shall answer. " * 9, []
    for topic in topic_texts():
        rest = " ".join(f"word{chance.randrange(2000)}" for _ in range(200))
        unspaced = "".join(chr(0x4E00 + chance.randrange(99)) for _ in range(1500))
        rows.append(text.format(topic=topic, rest=rest, form=form, unspaced=unspaced))
    assert beginnings_tell_apart(Corpus(rows, [], language, 100)) == expected


def test_few_long_texts_among_many_short_ones_are_not_cut():
    letters = ["Dear Sir or Madam, thank you for your letter. " * 12 + topic for topic in TOPICS]
    assert not beginnings_tell_apart(Corpus([*(f"text {i}" for i in range(5000)), *letters], [], "English", 2))


def test_alike_beginnings_are_left_whole(tmp_path, texts, capsys):
    texts.write_text("\n".join("Thank you for your message, which we shall answer. " * 9 + text for text in topic_texts()))
    auto("--input", texts, "--model", "none", "--general", "none", "--out", tmp_path / "letters")
    assert "48 texts are longer, but few, or much alike in their first 400 characters" in capsys.readouterr().out
    assert "characters" not in json.loads((tmp_path / "letters" / RECIPE_FILE).read_text())["train"]


def test_neighbours_beyond_the_texts_are_noticed(folder):
    tensors = load_file(folder / TEACHER_FILE)
    save_file(tensors | {"neighbours": tensors["neighbours"] + 10}, folder / TEACHER_FILE)
    with pytest.raises(InputError, match="damaged or of other texts"):
        OwnTexts(folder)
