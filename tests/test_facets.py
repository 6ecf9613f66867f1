"""Prompts that name facets: scored by evaluate.py --facets, and learned from pairs that carry prompts of their own."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_run, randomize_adapter
from launch import torchrun
from short_evaluations import (
    offline,  # noqa: F401, a fixture that every test uses
    parse,
    run,
    write_csv,
)
from short_runs import ADAPTER, ShortRuns, assert_same_adapter, metrics, word_rows, write_rows
from short_runs import run as train
from sklearn.metrics import v_measure_score

from encoder import Encoder
from encoder.names import check_prompts
from evaluation import evidence, facets
from evaluation.facets import Labelled, against_zero, cells_of, combined, nested, statistics
from files.console import InputError
from prompts import get_prompt
from training.checkpoint import TrainingState
from training.gradients import batch_gradients, embed
from training.losses import LossSettings, batch_loss
from training.pair_data import Pair, PairDataset, tokenize_pairs, validate_pair
from training.validation import Validation

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import bench_facets

TOPIC, TONE = 'The topic of "{text}" is:', 'Tone: "{text}"'
FACETS = ("--facets", f"topic={TOPIC}", f"tone={TONE}")


# ---------------------------------------------------------------------------------------------------------------- evaluation


@pytest.fixture(autouse=True)
def few_seeds(monkeypatch):
    monkeypatch.setattr(evidence, "SEEDS", 3)
    monkeypatch.setattr(evidence, "SPLITS", 2)


def planted(n: int = 240) -> Labelled:
    """Two facets that cross: four topics and three tones."""
    rng = np.random.default_rng(0)
    return Labelled("planted", [str(i) for i in range(n)], {"topic": rng.integers(4, size=n), "tone": rng.integers(3, size=n)})


def cells_under(vectors_of: dict[str, np.ndarray], data: Labelled) -> facets.Cells:
    rows = {name: SimpleNamespace(encode=lambda _, vectors=vectors: vectors) for name, vectors in vectors_of.items()}
    return {(name, facet): cell for name, row in rows.items() for facet, cell in cells_of(row, data)}


def around(labels: np.ndarray, noise: float = 0.05) -> np.ndarray:
    return np.eye(8)[labels] + np.random.default_rng(1).normal(0, noise, (len(labels), 8))


def test_vectors_that_follow_the_prompt_are_selective():
    data = planted()
    topic, tone = (around(labels) for labels in data.labels.values())
    neutral = np.concatenate([topic, tone], 1)
    cells = cells_under({"topic": topic, "tone": tone, "neutral": neutral}, data)
    found = statistics(cells, ["topic", "tone"])
    diagonal, selectivity, gain = (against_zero(found["mean"][name]) for name in facets.STATISTICS)
    assert diagonal.value == pytest.approx(1) and diagonal.high == pytest.approx(1)  # no redraw of rows makes it less
    v = {at: cell.scores[0].mean() for at, cell in cells.items()}
    rest = (v["topic", "tone"] + v["tone", "topic"]) / 2
    assert selectivity.value == pytest.approx(1 - rest) and rest < 0.1 and selectivity.verdict == "better"
    assert gain.value == pytest.approx(1 - (v["neutral", "topic"] + v["neutral", "tone"]) / 2) and gain.verdict == "better"
    of_topic = against_zero(found["topic"]["selectivity"])
    assert of_topic.value == pytest.approx(v["topic", "topic"] - v["tone", "topic"])
    swapped = statistics(cells_under({"topic": tone, "tone": topic, "neutral": neutral}, data), ["topic", "tone"])
    assert against_zero(swapped["mean"]["selectivity"]).verdict == "worse"


def test_vectors_that_no_prompt_changes_have_no_selectivity_and_no_interval():
    """Rows, splits and k-means seeds are the same in all cells, so that nothing is left of either uncertainty."""
    data = planted()
    same = np.concatenate([around(labels, 0.6) for labels in data.labels.values()], 1)
    found = statistics(cells_under(dict.fromkeys(("topic", "tone", "neutral"), same), data), ["topic", "tone"])
    for name in ("selectivity", "over neutral"):
        d = against_zero(found["mean"][name])
        assert d[:3] == (0, 0, 0) and d.verdict == "cannot tell"
    assert against_zero(found["mean"]["diagonal"]).low < against_zero(found["mean"]["diagonal"]).value


def test_a_combination_of_cells_is_the_weighted_sum_of_each_number():
    data = planted()
    cells = cells_under({"topic": around(data.labels["topic"], 0.5), "tone": around(data.labels["tone"], 0.5)}, data)
    one, other = cells["topic", "topic"], cells["tone", "topic"]
    sums = combined(cells, {("topic", "topic"): 1, ("tone", "topic"): -0.5})
    for name in ("scores", "redrawn", "halves"):
        np.testing.assert_allclose(getattr(sums, name), getattr(one, name) - 0.5 * getattr(other, name))


def test_labels_that_decide_others_are_noticed():
    labels = {"fine": np.array([0, 1, 2, 2]), "coarse": np.array([0, 0, 1, 1]), "cross": np.array([0, 1, 0, 1])}
    assert nested(labels) == [("fine", "coarse")]


def test_the_facets_of_the_benchmark_cross_and_its_pairs_share_what_their_prompt_names():
    for of, other in ((0, 1), (1, 0)):
        across = {
            cell[of]: {c[other] for c in bench_facets.CROSSED.values() if c[of] == cell[of]} for cell in bench_facets.CROSSED.values()
        }
        assert all(len(others) > 1 for others in across.values()) and len(across) > 8
    texts = ["set an alarm", "delete the alarm", "delete this list", "set a list", "set my alarm", "hello"]
    guessed, pairs = bench_facets.guesses(texts), bench_facets.facet_pairs(texts)
    assert guessed["action"] == ["set", "remove", "remove", "set", "set", None] and guessed["intent"][3:] == [
        "set lists",
        "set alarm",
        None,
    ]
    facet_of = {prompt: facet for facet, prompt in bench_facets.PROMPTS.items()}
    shared = {
        pair["prompt"]: [guessed[facet_of[pair["prompt"]]][texts.index(pair[side])] for side in ("anchor", "positive")] for pair in pairs
    }
    assert len(shared) == 3 and all(one == other is not None for one, other in shared.values())
    assert all(pair["anchor"] != pair["positive"] for pair in pairs)


def requests(path, n: int = 60):
    rows = [(f"{word} {topic} {i}", topic, word) for i in range(n // 6) for topic in ("cats", "banks", "roads") for word in ("nice", "bad")]
    return write_csv(path, "text,topic,tone", rows)


def test_a_call_scores_each_prompt_from_one_forward_pass(llama, tmp_path, monkeypatch, capsys):
    path, out, passes, stream = requests(tmp_path / "mine.csv"), tmp_path / "out.json", [], Encoder.stream

    def counted(self, texts, *args, **options):
        passes.append(self.contract.prompts)
        return stream(self, texts, *args, **options)

    monkeypatch.setattr(Encoder, "stream", counted)
    run("--model", llama, "--data", path, "--pooling", "mean", "last", "--scope", "all", "--prompt", "none", *FACETS, "--out", out)
    assert passes == [get_prompt(prompt).roles() for prompt in (TOPIC, TONE, "none")]
    printed, results = capsys.readouterr().out, json.loads(out.read_text())
    assert [row["model"] for row in results["models"]] == ["llama, mean, all", "llama, last, all"] and results["texts"] == 60
    assert "less llama, mean, all" in printed and "tone 2 labels" in printed and "decides" not in printed
    rows = [line.split(",") for line in path.read_text().splitlines()[1:]]
    vectors = Encoder.load(llama, prompt=TONE, pooling="last", scope="all").encode([row[0] for row in rows])
    topics = np.unique([row[1] for row in rows], return_inverse=True)[1]
    clusters = [evidence.cluster(vectors, topics, seed) for seed in range(evidence.SEEDS)]
    cell = next(c for c in results["models"][1]["matrix"] if (c["prompt"], c["facet"]) == ("tone", "topic"))
    assert cell["v_measure"] == pytest.approx(np.mean([v_measure_score(topics, c) for c in clusters]), abs=1e-6)
    assert len(results["models"][1]["matrix"]) == 6 and len(set(results["models"][1]["fingerprint"].values())) == 3


@pytest.mark.parametrize("tone, pooling", [("Tone: {text}", "mean"), (TONE, "last")])
def test_prompts_of_one_row_share_the_pooling(llama, tmp_path, tone, pooling):
    """The default goes by the prompt: a difference of two poolings would seem to be one of the prompts."""
    path, out = requests(tmp_path / "mine.csv"), tmp_path / "out.json"
    run("--model", llama, "--data", path, "--facets", "topic=Topic: {text}", f"tone={tone}", "--prompt", "none", "--out", out)
    (row,) = json.loads(out.read_text())["models"]
    assert [contract["pooling"] for contract in row["contract"].values()] == [pooling] * 3 and f", {pooling}" in row["model"]


def test_a_run_is_scored_under_prompts_that_it_was_trained_for(llama, tmp_path, capsys):
    path, folder = requests(tmp_path / "mine.csv"), tmp_path / "run"
    model = make_run(llama, folder, prompt="cluster", pooling="mean")
    with pytest.raises(InputError, match=r"prompt is .cluster. in the run, .The topic of.* or add --override-contract"):
        run("--model", model, "--data", path, *FACETS)
    (folder / "arguments.json").write_text(json.dumps({"pair_prompts": [get_prompt(TOPIC).roles(), get_prompt(TONE).roles()]}))
    (folder / "summary.json").write_text("{}")
    run("--model", model, "--data", path, *FACETS)
    assert "neutral" in capsys.readouterr().out
    check_prompts(model, TOPIC, None, override_contract=False)  # what search.py and attention.py ask before they load anything
    with pytest.raises(InputError, match=r"in the run \(which was trained for The topic.*as well\), 'none' was asked for"):
        run("--model", model, "--data", path, *FACETS, "--prompt", "none")
    run("--model", model, "--data", path, *FACETS, "--prompt", "none", "--override-contract")


@pytest.mark.parametrize(
    "rows, message",
    [
        (["text,topic", "a,b", "c,d"], "has no column 'tone': it has text, topic"),
        (["label,topic,tone", "a,b,c", "d,e,f"], "has no column 'text'"),
        (["text,topic,tone", "a,b,c", "d,b,e"], r"column topic holds one label only \('b'\)"),
        (["text,topic,tone", "a,b,x", "c,d,x", "e,d,y"], None),
        (["text,topic,tone", "a,b,x", "c,d,x", "e,f,y"], "column topic has a label of its own for each of 3 texts"),
        (["text,topic,tone", "a,b,", "c,d,x", "e,d,y"], "line 2: tone is empty"),
    ],
)
def test_data_that_holds_no_facets_is_one_line(tmp_path, rows, message):
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(rows) + "\n")
    args = parse("--data", path, *FACETS)
    if message is None:
        labels = facets.read_labelled(args).labels
        assert (labels["topic"].tolist(), labels["tone"].tolist()) == ([0, 1, 1], [0, 0, 1])
        return
    with pytest.raises(InputError, match=message):
        facets.read_labelled(args)


def test_flags_that_do_not_go_together_are_one_line(llama, tmp_path):
    path = requests(tmp_path / "mine.csv")
    for flags, message in (
        ((*FACETS,), "--facets needs one file of --data"),
        (("--data", tmp_path, *FACETS), "--facets needs one file of --data"),
        (("--data", path, path, *FACETS), "--facets needs one file of --data"),
        (("--data", tmp_path / "no.csv", *FACETS), "no file .*no.csv"),
        (("--data", path, "--facets", f"topic={TOPIC}"), "takes two columns or more, .*: got topic"),
        (("--data", path, "--facets", f"topic={TOPIC}", f"topic={TONE}"), "each once.*: got topic, topic"),
        (("--data", path, "--facets", f"text={TOPIC}", f"tone={TONE}"), "not text or neutral"),
        (("--data", path, "--facets", "topic=clutser", f"tone={TONE}"), "unknown prompt 'clutser'"),
        (("--data", path, "--facets", f"topic={TOPIC}", f"tone={TOPIC}"), "topic and tone have the same prompt"),
        (("--data", path, "--facets", f"topic={TOPIC}", "tone=cluster"), "tone and neutral have the same prompt"),
        (("--data", path, *FACETS, "--prompt", "none", "cluster"), "takes one --prompt, the neutral one"),
        (("--data", path, *FACETS, "--sweep", "prompt=none,cluster"), "takes one --prompt, the neutral one"),
        (("--data", path, *FACETS, "--baselines", "tfidf"), "leave --baselines out"),
        (("--data", path, *FACETS, "--task", "sts"), "leave --task out"),
        (("--data", path, *FACETS, "--model", llama, "typo"), "no model 'typo'"),
        (("--data", path, *FACETS, "--model", llama, "st:org/name"), "--facets scores models under prompts, and st:org/name keeps its own"),
    ):
        with pytest.raises(InputError, match=message):
            run(*(flags if "--model" in flags else ("--model", llama, *flags)))
    with pytest.raises(InputError, match="'topic' is no FACET=PROMPT"):
        parse("--facets", "topic")


# ------------------------------------------------------------------------------------------------- pairs with their prompts


PAIRS = [
    Pair("The cat sat.", "A dog stood.", ("Rates rose.",), prompt=TOPIC),
    Pair("Rates rose.", "The bank raised its fees."),
    Pair("A road.", "The cat sat.", prompt=TONE),
    Pair("", "A long road by the river.", ("fees", "A cat"), prompt=TOPIC),
    Pair("The bank raised its fees.", "A dog.", prompt=TONE),
]


def prompted(encoder: Encoder, prompt: str | None) -> Encoder:
    return encoder.with_contract(prompts=get_prompt(prompt).roles()) if prompt else encoder


def trained_encoder(model: str, **contract) -> Encoder:
    encoder = Encoder.load(model, dtype="float32", **{"prompt": "cluster", "pooling": "mean", "scope": "all"} | contract)
    torch.manual_seed(0)
    encoder.add_adapter(4)
    randomize_adapter(encoder)
    return encoder


def test_a_row_of_pairs_may_have_a_prompt(tmp_path):
    row = {"anchor": "a", "positive": "b"}
    assert validate_pair(row | {"prompt": "cluster"}, "") == Pair("a", "b", prompt="cluster")
    assert validate_pair(row | {"prompt": None}, "") == Pair("a", "b")
    for prompt, message in (
        ("clutser", "unknown prompt"),
        ("", "unknown prompt ''"),
        (3, "not 3"),
        ("{text}" * 3, "3 times"),
        ("\ud800{text}", "half a"),
    ):
        with pytest.raises(InputError, match=f"line 3: .*{message}"):
            validate_pair(row | {"prompt": prompt}, "line 3")
    path = tmp_path / "pairs.csv"
    path.write_text('anchor,positive,prompt\na,b,cluster\nc,d,\n"e","f","say {text}"\n')
    pairs = PairDataset([path])
    assert pairs[[0, 1, 2]] == [Pair("a", "b", prompt="cluster"), Pair("c", "d"), Pair("e", "f", prompt="say {text}")]
    assert pairs.prompts == ["cluster", "say {text}"]


def test_each_text_of_a_batch_stands_under_the_prompt_of_its_pair(model):
    """The same ids, and the same vectors, as those of the text alone under that prompt."""
    encoder = trained_encoder(model)
    batch = tokenize_pairs(encoder, PAIRS)
    kinds = (
        (batch.anchors, [(pair.anchor, pair.prompt) for pair in PAIRS], "query"),
        (batch.positives, [(pair.positive, pair.prompt) for pair in PAIRS], "document"),
        (batch.negatives, [(text, pair.prompt) for pair in PAIRS for text in pair.negatives], "document"),
    )
    for tokenized, texts, role in kinds:
        alone = [prompted(encoder, prompt).tokenize([text], role) for text, prompt in texts]
        assert tokenized.ids == [one.ids[0] for one in alone] and tokenized.spans == [one.spans[0] for one in alone]
        with torch.no_grad():
            vectors = embed(encoder, tokenized, list(range(len(texts)))).numpy()
        expected = np.concatenate([prompted(encoder, prompt).encode([text], role) for text, prompt in texts])
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert batch.anchors.n_empty == 1


def test_the_shared_prefix_is_what_all_prompts_begin_with(llama):
    encoder = trained_encoder(llama)
    one, other = 'This sentence: "{text}" is about', 'This sentence: "{text}" has the tone'
    same = tokenize_pairs(encoder, [Pair("a cat", "a dog", prompt=one), Pair("a road", "rates", prompt=other), Pair("a", "b")]).anchors
    assert same.prefix_length == encoder.tokenize(["a"]).prefix_length > 4  # that of the contract's `cluster` as well
    mixed = tokenize_pairs(encoder, [Pair("a cat", "a dog", prompt=one), Pair("a road", "rates", prompt=TONE)]).anchors
    assert 1 <= mixed.prefix_length < 4 and len({tuple(ids[: mixed.prefix_length]) for ids in mixed.ids}) == 1


def test_only_pairs_of_one_prompt_are_each_others_negatives(llama):
    """The loss of a mixed batch is the mean over pairs of the losses of its prompts, and so are accuracy and negatives."""
    encoder, settings = trained_encoder(llama), LossSettings(matryoshka=(8,))
    mixed = tokenize_pairs(encoder, PAIRS)
    vectors = [embed(encoder, texts, list(range(len(texts.ids)))).detach().requires_grad_() for texts in mixed.texts]
    result = batch_loss(mixed, encoder.device, settings)(*vectors)
    losses, negatives = [], []
    for prompt, rows in ((TOPIC, [0, 3]), (None, [1]), (TONE, [2, 4])):
        part = tokenize_pairs(encoder, [PAIRS[i]._replace(prompt=None) for i in rows])
        hard = [j for i in rows for j in mixed.negative_rows[i]]
        one = batch_loss(part, encoder.device, settings)(vectors[0][rows], vectors[1][rows], vectors[2][hard])
        losses.append(one.loss * len(rows)), negatives.append(one.n_negatives * len(rows))
        assert prompt == PAIRS[rows[0]].prompt
    assert result.loss.item() == pytest.approx(sum(losses).item() / 5, rel=1e-5) and result.loss > 0.1
    assert result.n_negatives == pytest.approx(sum(negatives) / 5) == (2 * 3 + 0 + 2 * 1 + 2) / 5
    (gradient,) = torch.autograd.grad(batch_loss(mixed, encoder.device, LossSettings())(*vectors).loss, vectors[1])
    assert gradient[1].abs().max() == 0 and gradient[0].abs().max() > 0  # the only pair under its prompt has no negatives


@pytest.mark.parametrize("chunk_size", [2, 3])
def test_chunks_of_mixed_prompts_give_the_gradient_of_the_whole_batch(llama, chunk_size):
    encoder = trained_encoder(llama)
    batch, gradients, optimizer = tokenize_pairs(encoder, PAIRS), [], torch.optim.SGD(encoder.trainable().values())
    for size in (5, chunk_size):
        optimizer.zero_grad()
        batch_gradients(encoder, batch, TrainingState(size, 0), batch_loss(batch, encoder.device, LossSettings()), optimizer)
        gradients.append({name: parameter.grad.clone() for name, parameter in encoder.trainable().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-6)
    assert max(gradient.abs().max() for gradient in gradients[0].values()) > 1e-3


def test_held_out_pairs_are_scored_under_their_prompts(llama, monkeypatch):
    encoder, used, encode = trained_encoder(llama), [], Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, *args: used.append(self.contract.prompts) or encode(self, *args))
    texts = ["cats purr", "banks lend money", "roads are long"]
    same = [Pair(text, text, prompt=prompt) for prompt in (TOPIC, TONE) for text in texts]
    assert Validation(same, None)(encoder) == 1
    assert used == [get_prompt(prompt).roles() for prompt in (TOPIC, TOPIC, TONE, TONE)]
    wrong = [Pair(a, b, prompt=TONE) for a, b in zip(texts, texts[1:] + texts[:1], strict=True)]
    assert Validation([*same[:3], *wrong], None)(encoder) == 0.5


def mixed_rows() -> list[dict]:
    return [row | {"prompt": (TOPIC, TONE, None)[i % 3]} for i, row in enumerate(word_rows())]


def test_a_run_records_its_prompts_and_takes_them(llama, tmp_path, capsys):
    small, pairs = ShortRuns(llama, tmp_path), write_rows(tmp_path / "mixed.jsonl", mixed_rows())
    train(*small("run", "--pairs", pairs, "--checkpoint-every", 2))
    assert f"2 prompts of the pairs themselves: {TOPIC}, {TONE}" in capsys.readouterr().out
    folder = tmp_path / "run"
    record = json.loads((folder / "arguments.json").read_text())
    assert record["pair_prompts"] == [get_prompt(prompt).roles() for prompt in (TOPIC, TONE)]
    assert Encoder.load(str(folder)).contract.prompts == get_prompt("cluster").roles()
    assert Encoder.load(str(folder), prompt=TOPIC).contract.prompts == get_prompt(TOPIC).roles()
    with pytest.raises(InputError, match="was trained for"):
        Encoder.load(str(folder), prompt="none")
    train(*small("plain"))
    assert "pair_prompts" not in json.loads((tmp_path / "plain" / "arguments.json").read_text())
    with pytest.raises(InputError, match="do not fit the model's"):
        train(
            *small(
                "long", "--pairs", write_rows(tmp_path / "long.jsonl", [row | {"prompt": "word " * 900 + "{text}"} for row in word_rows()])
            )
        )


def test_a_run_with_prompts_of_pairs_resumes_to_the_bit(llama, tmp_path):
    small, pairs = ShortRuns(llama, tmp_path), write_rows(tmp_path / "mixed.jsonl", mixed_rows())
    train(*small("run", "--pairs", pairs, "--checkpoint-every", 2))
    out = tmp_path / "run"
    shutil.copytree(out, tmp_path / "whole")
    (out / "checkpoint.previous.safetensors").replace(out / "checkpoint.safetensors")
    (out / "summary.json").unlink()
    train("--out", out, "--resume")
    assert_same_adapter(tmp_path / "whole", out)
    assert [row["loss"] for row in metrics(out)] == [row["loss"] for row in metrics(tmp_path / "whole")]


@pytest.mark.slow
def test_two_processes_train_mixed_prompts_as_one(llama, tmp_path):
    from safetensors.torch import load_file

    small, pairs = ShortRuns(llama, tmp_path), write_rows(tmp_path / "mixed.jsonl", mixed_rows())
    flags = ("--pairs", pairs, "--chunk-size", 2, "--batch-size", 8)
    train(*small("one", *flags))
    done = torchrun("train.py", *small("two", *flags))
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / ADAPTER) for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)
    assert [row["loss"] for row in metrics(tmp_path / "one")] == pytest.approx([row["loss"] for row in metrics(tmp_path / "two")], rel=1e-5)
