"""Self-supervised runs on a small model and made-up pictures: what they leave, resuming to the bit, the collapse alarm, several processes.

What needs processes of its own is marked slow.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from launch import torchrun
from PIL import Image
from safetensors.torch import load_file, save_file
from short_runs import ROOT
from transformers import AutoModel, Dinov2Config, Dinov2Model

from files.console import InputError
from pathology import dino, evaluate_patches, finetune
from pathology.models import load_model
from training.run_record import CHECKPOINT, PREVIOUS_CHECKPOINT

PATTERN = r"(?P<patient>p\d+)_.*class(?P<label>\w+)"
FLAGS = ("--global-crop", 16, "--local-crop", 8, "--local-crops", 2, "--batch", 8, "--prototypes", 16, "--dtype", "float32", "--lr", "1e-2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures of 10 patients, whose classes are stripes across and down, in any colour; and a small model."""
    folder = tmp_path_factory.mktemp("patches")
    rng = np.random.default_rng(0)
    for i in range(120):
        pixels = np.zeros((20, 20, 3))
        stripes = pixels if i % 2 else pixels.transpose(1, 0, 2)
        stripes[::4] += rng.integers(60, 200, size=3)
        pixels = np.clip(pixels + rng.integers(0, 50, size=pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"p{i // 12}_{i}_class{'down' if i % 2 else 'across'}.png")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=8, drop_path_rate=0.2)
    Dinov2Model(config).save_pretrained(folder.parent / "base")
    yield folder, folder.parent / "base"
    shutil.rmtree(folder.parent / "base")


@pytest.fixture
def flags(data, tmp_path, monkeypatch):
    monkeypatch.setattr(dino, "HEAD_HIDDEN", 32)

    def make(name: str, *more) -> list[str]:
        command = (data[0], "--pattern", PATTERN, "--init", data[1], "--out", tmp_path / name, *FLAGS, *more)
        return [str(x) for x in command]

    return make


def run(*flags) -> None:
    finetune.main(finetune.parse([str(flag) for flag in flags]))


def metrics(out) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "patches_per_second"} for row in rows]


def assert_same(one, other, name: str = "model.safetensors") -> None:
    torch.testing.assert_close(load_file(one / name), load_file(other / name), rtol=0, atol=0)


def test_a_run_leaves_the_best_teacher_which_transformers_and_extract_load(flags, tmp_path, data, capsys):
    run(*flags("run", "--steps", 6, "--validate-every", 2))
    out = tmp_path / "run"
    summary, rows = json.loads((out / "summary.json").read_text()), metrics(out)
    assert [row["step"] for row in rows] == list(range(1, 7)) and all(np.isfinite(row["loss"]) for row in rows)
    scores = {0: summary["before_training"]} | {row["step"]: row["validation"] for row in rows if "validation" in row}
    assert list(scores) == [0, 2, 4, 6]
    best = max(scores.values())
    assert summary["validation"] == best and scores[summary["kept_step"]] == best
    model, plain = load_model(str(out)), AutoModel.from_pretrained(out)
    assert (model.rule, model.input_size, model.module.config.image_size) == ("cls", 16, 16)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(model.module.state_dict()[name], weight, rtol=0, atol=0)
    with pytest.raises(InputError, match="already holds a run"):
        run(*flags("run"))
    evaluate_patches.main(
        evaluate_patches.build_parser().parse_args(
            [str(data[0]), "--pattern", PATTERN, "--model", str(out), "--out", str(tmp_path / "r.json")]
        )
    )
    result = json.loads((tmp_path / "r.json").read_text())
    assert list(result["shares"]) == ["colour histogram", "random", "frozen", "fine-tuned"]
    assert result["models"]["frozen"]["name"] == str(data[1])
    evaluate_patches.main(evaluate_patches.build_parser().parse_args(["--summary", str(tmp_path / "r.json"), str(tmp_path / "r.json")]))
    assert "2 splits, 2 test patients" in capsys.readouterr().out


def test_the_last_step_changes_the_teacher_and_the_schedule_is_the_papers(flags, tmp_path):
    """Without labels the last step is kept."""
    command = flags("run", "--steps", 4)
    at = command.index("--pattern")
    run(*command[:at], *command[at + 2 :])
    base, kept = load_file(tmp_path / "run" / CHECKPOINT), load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(base[f"teacher/backbone.{name}"], weight) for name, weight in kept.items())
    assert any(not torch.equal(base[f"teacher/backbone.{name}"], base[f"student/backbone.{name}"]) for name in kept)
    peak = 1e-2 * (8 / 1024) ** 0.5
    assert [row["lr"] for row in metrics(tmp_path / "run")] == pytest.approx([peak, peak, 0.75 * peak, 0.25 * peak])


def test_resuming_changes_nothing(flags, tmp_path, monkeypatch):
    """Stopped by a signal at step 3 of 6 and resumed: weights, moments and numbers are those of an undisturbed run, to the bit."""
    more = ("--steps", 6, "--validate-every", 2, "--checkpoint-every", 2)
    run(*flags("whole", *more))
    rate = finetune.learning_rate

    def interrupt(step, *rest):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(step, *rest)

    monkeypatch.setattr(finetune, "learning_rate", interrupt)
    with pytest.raises(SystemExit) as stopped:
        run(*flags("parts", *more))
    assert stopped.value.code == 128 + signal.SIGTERM and len(metrics(tmp_path / "parts")) == 3
    monkeypatch.setattr(finetune, "learning_rate", rate)
    with pytest.raises(InputError, match="arguments differ from the saved run: seed was 0, is 5"):
        run("--out", tmp_path / "parts", "--resume", "--seed", 5)
    run("--out", tmp_path / "parts", "--resume")
    for name in ("model.safetensors", CHECKPOINT):
        assert_same(tmp_path / "whole", tmp_path / "parts", name)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def test_checkpointing_gradients_changes_nothing(flags, tmp_path):
    for name, more in (("plain", ()), ("saving", ("--gradient-checkpointing",))):
        run(*flags(name, "--steps", 2, *more))
    one, other = (load_file(tmp_path / name / CHECKPOINT) for name in ("plain", "saving"))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_damaged_checkpoint_costs_some_steps_and_not_the_run(flags, tmp_path, capsys):
    more = ("--steps", 4, "--checkpoint-every", 2, "--validate-every", 2)
    run(*flags("whole", *more))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts" / "summary.json").unlink()
    tensors = load_file(tmp_path / "parts" / CHECKPOINT)
    tensors["teacher/backbone.layernorm.weight"] += 1
    save_file(tensors, tmp_path / "parts" / CHECKPOINT, {"state": "{}", "sha256": "0"})
    run("--out", tmp_path / "parts", "--resume")
    assert "is damaged and deleted: going on from checkpoint.previous.safetensors, step 2" in capsys.readouterr().err
    assert_same(tmp_path / "whole", tmp_path / "parts")
    before, after = (load_file(tmp_path / name / PREVIOUS_CHECKPOINT) for name in ("whole", "parts"))
    torch.testing.assert_close(before, after, rtol=0, atol=0)  # the damaged one was not moved over the good one
    for name in (CHECKPOINT, PREVIOUS_CHECKPOINT):
        (tmp_path / "parts" / name).write_bytes(b"damaged")
    (tmp_path / "parts" / "summary.json").unlink()
    with pytest.raises(InputError, match="start again in another --out"):
        run("--out", tmp_path / "parts", "--resume")


def test_training_never_reads_validation_and_test_patients(flags):
    args = finetune.parse(flags("run"))
    prepared = finetune.prepare(args)
    finetune.set_up(prepared, 100)
    split = prepared.patches.split(0)
    seen = np.concatenate([finetune.rows_of(prepared, step) for step in range(9)])
    assert set(split[seen]) == {"train"} and set(split[prepared.queries]) == {"validation"} and set(split[prepared.references]) == {"train"}
    per_pass = len(prepared.train) // 8
    assert len(set(seen[: 8 * per_pass])) == 8 * per_pass  # no patch twice in a pass


def test_the_collapse_alarm_fires_where_all_features_are_the_same(flags, tmp_path, data, capsys):
    shutil.copytree(data[1], tmp_path / "flat")
    weights = load_file(tmp_path / "flat" / "model.safetensors")
    weights["layernorm.weight"] *= 0  # every class token is the bias of the last norm
    weights["layernorm.bias"] += 1
    save_file(weights, tmp_path / "flat" / "model.safetensors", {"format": "pt"})
    run(*flags("run", "--init", tmp_path / "flat", "--steps", 5, "--lr", 0))
    assert capsys.readouterr().err.count("step 3: collapse: all patches have nearly the same features") == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["collapsed"]
    run(*flags("healthy", "--steps", 5))
    assert "collapse" not in capsys.readouterr().err


def test_collapse_is_judged_by_the_first_step_and_by_three_in_a_row():
    def rows(*variances):
        return [{"variance": variance} for variance in variances]

    assert finetune.is_collapsed(rows(0.5, 0.02, 0.02, 0.02), 0.5) and not finetune.is_collapsed(rows(0.02, 0.02, 0.03), 0.5)
    assert not finetune.is_collapsed(rows(0.02, 0.02), 0.5) and not finetune.is_collapsed(rows(0.02, 0.02, 0.02), 0.03)


def test_hours_become_steps_that_a_resumed_run_keeps(flags, tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(finetune.time, "perf_counter", lambda: next(clock))
    prepared = finetune.prepare(finetune.parse(flags("run", "--hours", 1)))
    assert 30 < finetune.steps_in(prepared, 1) <= 360


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--steps", 1, "--hours", 1), "--hours and --steps both say how long"),
        (("--labels", "none.csv"), "--labels and --pattern both name labels"),
        (("--local-crop", 24), "--local-crop 24 is larger than --global-crop 16"),
        (("--global-crop", 20), "a view of 20 pixels is no whole number of patches of 8: take 16 or 24"),
        (("--batch", 100), "72 patches of training patients, 100 are asked for a step: lower --batch"),
        (("--init", "nowhere"), "nowhere"),
        (("--resume",), "holds no run"),
    ],
)
def test_what_cannot_be_is_one_clear_line_and_leaves_nothing(flags, tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        run(*flags("run", *more))
    assert not (tmp_path / "run").exists()


def evaluate(*flags) -> None:
    evaluate_patches.main(evaluate_patches.build_parser().parse_args([str(flag) for flag in flags]))


def test_a_run_is_not_tested_on_patients_it_has_seen(flags, tmp_path, data, capsys):
    """By another division, or where it learned without labels; its last line names the division and the labels."""
    run(*flags("run", "--steps", 1, "--split-seed", 3))
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("next: ")
    *python, script = shlex.split(command)[:3]
    assert (python, script) == (["python", "-m"], "pathology.evaluate_patches")
    with pytest.raises(InputError, match="run learned by --split-seed 3, 0 would test patients it has seen: take 3"):
        evaluate(data[0], "--pattern", PATTERN, "--model", tmp_path / "run")
    evaluate(*shlex.split(command)[3:])
    record = json.loads((tmp_path / "run/arguments.json").read_text())
    record["arguments"]["pattern"] = None
    (tmp_path / "run/arguments.json").write_text(json.dumps(record))
    capsys.readouterr()
    evaluate(data[0], "--pattern", PATTERN, "--model", tmp_path / "run")
    err = capsys.readouterr().err
    assert "learned without labels from all patches" in err and "test patients: too few for intervals" in err


def test_a_model_that_is_not_finite_is_one_clear_line(flags, tmp_path, data):
    shutil.copytree(data[1], tmp_path / "nan")
    weights = tmp_path / "nan/model.safetensors"
    save_file({name: tensor * torch.nan for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(InputError, match="the weights of --init are not finite"):
        run(*flags("run", "--init", tmp_path / "nan"))
    with pytest.raises(InputError, match="gives numbers that are not finite"):
        evaluate(data[0], "--pattern", PATTERN, "--model", tmp_path / "nan")


def test_results_of_other_classes_or_patients_are_not_pooled(tmp_path):
    shares = {"row": {"clean": {"kNN": [], "logistic": []}}}
    for name in ("ab", "abc"):
        result = {"shares": shares, "test": {}, "classes": list(name), "all_patients": ["p"]}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    with pytest.raises(InputError, match="different classes: a, b and a, b, c"):
        evaluate("--summary", tmp_path / "ab.json", tmp_path / "abc.json")
    (tmp_path / "others.json").write_text((tmp_path / "ab.json").read_text().replace('"p"', '"q"'))
    with pytest.raises(InputError, match="the files are of different patients"):
        evaluate("--summary", tmp_path / "ab.json", tmp_path / "others.json")


# ------------------------------------------------------------------------------------------------------ several processes


def start(*flags) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pathology.finetune", *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_and_resumed_the_run_is_the_same_to_the_bit(flags, tmp_path):
    more = ("--steps", 12, "--checkpoint-every", 3, "--validate-every", 3)
    whole = start(*flags("whole", *more))
    assert whole.wait() == 0, whole.stderr.read()
    parts = start(*flags("parts", *more))
    while len(lines(tmp_path / "parts" / "metrics.jsonl")) < 5:
        assert parts.poll() is None
        time.sleep(0.01)  # the kill may come at any time: nothing is asked of when
    parts.kill()
    assert parts.wait() == -signal.SIGKILL and not (tmp_path / "parts" / "summary.json").exists()
    again = start("--out", tmp_path / "parts", "--resume")
    assert again.wait() == 0, again.stderr.read()
    for name in ("model.safetensors", CHECKPOINT):
        assert_same(tmp_path / "whole", tmp_path / "parts", name)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def lines(path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


@pytest.mark.slow
def test_two_processes_train_one_model(flags, tmp_path):
    done = torchrun("-m", "pathology.finetune", *flags("run", "--steps", 4, "--checkpoint-every", 2, "--validate-every", 2))
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["processes"] == 2 and summary["steps"] == 4 and len(metrics(tmp_path / "run")) == 4
    assert metrics(tmp_path / "run")[0]["lr"] == pytest.approx(1e-2 * (16 / 1024) ** 0.5)


@pytest.mark.slow
def test_sinkhorn_and_gradients_are_those_of_all_rows_together(tmp_path):
    script = tmp_path / "check.py"
    script.write_text(
        "import torch\n"
        "from encoder.processes import distributed, end_distributed\n"
        "from pathology.dino import average_gradients, sinkhorn\n"
        "rank = distributed().rank\n"
        "cosines = torch.rand(10, 6, generator=torch.Generator().manual_seed(0))\n"
        "mine = cosines[:3] if rank == 0 else cosines[3:]\n"
        "shares = sinkhorn(mine, 0.1, iterations=100)\n"
        "torch.save(shares, f'shares-{rank}.pt')\n"
        "parameter = torch.nn.Parameter(torch.zeros(2, 2))\n"
        "parameter.grad = torch.full((2, 2), float(rank))\n"
        "average_gradients([parameter])\n"
        "assert parameter.grad.eq(0.5).all()\n"
        "end_distributed()\n".replace("'shares-", f"'{tmp_path}/shares-")
    )
    done = torchrun(script)
    assert done.returncode == 0, done.stderr
    together = dino.sinkhorn(torch.rand(10, 6, generator=torch.Generator().manual_seed(0)), 0.1, iterations=100)
    torch.testing.assert_close(torch.cat([torch.load(tmp_path / f"shares-{i}.pt") for i in range(2)]), together)
