"""Runs that are interrupted, resumed, killed, or shared by several processes: the adapter is that of an undisturbed run.

What needs processes of its own is marked slow.
"""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from launch import torchrun
from safetensors.torch import load_file
from short_runs import (
    ADAPTER,
    ROOT,
    ShortRuns,
    assert_same_adapter,
    metrics,
    numbered_rows,
    run,
    summary,
    word_rows,
    write_labelled,
    write_rows,
)

import train
from encoder import Encoder
from encoder.names import kept_adapters
from files.console import InputError
from files.writing import errors_of_writing
from training.run_record import CHECKPOINT, LOCK, PREVIOUS_CHECKPOINT, reserve


@pytest.fixture
def small(llama, tmp_path) -> ShortRuns:
    return ShortRuns(llama, tmp_path)


# ---------------------------------------------------------------------------------------------------------------- resuming


def test_resuming_changes_nothing(small, tmp_path, monkeypatch):
    """Stopped by a signal at step 3 and resumed: the adapter is the uninterrupted one to the bit, dropout included."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = ("--lora-dropout", "0.2", "--steps", 5)
    run(*small("whole", *flags))
    rate, handler = train.learning_rate, signal.getsignal(signal.SIGTERM)

    def interrupt(step, *rest):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(step, *rest)

    monkeypatch.setattr(train, "learning_rate", interrupt)
    with pytest.raises(SystemExit) as stopped:
        run(*small("parts", *flags))
    assert stopped.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) == handler
    assert len(metrics(parts)) == 3 and not (parts / "summary.json").exists()
    Encoder.load(str(parts))  # usable as it is
    monkeypatch.setattr(train, "learning_rate", rate)
    with pytest.raises(InputError, match=r"arguments differ from the saved run: seed was 0, is 5"):
        run("--out", parts, "--resume", "--seed", 5)
    with open(parts / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "lo')  # as a kill may leave it
    run("--out", parts, "--resume")  # everything else is taken from the run
    assert_same_adapter(whole, parts)
    assert [row["loss"] for row in metrics(whole)] == [row["loss"] for row in metrics(parts)]
    assert summary(whole)["fingerprint"] == summary(parts)["fingerprint"] == Encoder.load(str(parts)).fingerprint


def test_a_run_killed_before_its_summary_is_finished_by_resuming(small, tmp_path):
    run(*small("run", "--steps", 2))
    fingerprint = summary(tmp_path / "run")["fingerprint"]
    (tmp_path / "run" / "summary.json").unlink()
    run("--out", tmp_path / "run", "--resume")
    assert summary(tmp_path / "run")["fingerprint"] == fingerprint == Encoder.load(str(tmp_path / "run")).fingerprint
    assert len(metrics(tmp_path / "run")) == 2


def test_resuming_from_the_checkpoint_before_a_damaged_one_changes_nothing(small, tmp_path, capsys):
    out = tmp_path / "run"
    run(*small("run", "--checkpoint-every", 2))
    shutil.copytree(out, tmp_path / "whole")
    (out / "summary.json").unlink()
    (out / CHECKPOINT).write_bytes((out / CHECKPOINT).read_bytes()[:-5])
    run("--out", out, "--resume")
    assert "checkpoint.safetensors is damaged and deleted: going on from checkpoint.previous.safetensors, step 2" in capsys.readouterr().err
    assert_same_adapter(tmp_path / "whole", out)
    assert [row["step"] for row in metrics(out)] == [1, 2, 3]


def test_adapters_that_are_kept_on_the_way(small, tmp_path, monkeypatch):
    """They change nothing; an interrupted run has kept the same ones when it ends, also those that it writes again."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = ("--steps", 6, "--hold-out", 0)
    run(*small("plain", *flags))
    run(*small("whole", *flags, "--keep-adapters", 3))
    assert_same_adapter(tmp_path / "plain", whole)
    kept = kept_adapters(whole)
    assert list(kept) == [2, 4] and not kept_adapters(tmp_path / "plain") and not list(whole.glob(".*.tmp"))
    encoders = {step: Encoder.load(str(folder)) for step, folder in kept.items()}
    for encoder in encoders.values():
        assert encoder.contract == Encoder.load(str(whole)).contract and not encoder.notes
    assert len({e.fingerprint for e in (*encoders.values(), Encoder.load(str(whole)))}) == 3

    rate = train.learning_rate

    def stop(step, *rest):
        if step == 5:
            raise KeyboardInterrupt  # as a kill would: step 4 was kept, and the last checkpoint is that of step 3
        return rate(step, *rest)

    monkeypatch.setattr(train, "learning_rate", stop)
    with pytest.raises(KeyboardInterrupt):
        run(*small("parts", *flags, "--keep-adapters", 3, "--checkpoint-every", 3))
    assert list(kept_adapters(parts)) == [2, 4]
    (kept_adapters(parts)[4] / ADAPTER).write_bytes(b"of another trajectory")
    monkeypatch.setattr(train, "learning_rate", rate)
    run("--out", parts, "--resume")
    assert_same_adapter(whole, parts)
    assert {step: Encoder.load(str(folder)).fingerprint for step, folder in kept_adapters(parts).items()} == {
        step: encoder.fingerprint for step, encoder in encoders.items()
    }


def test_a_run_that_ended_before_its_first_checkpoint_forgets_what_it_kept(small, tmp_path, monkeypatch):
    def stop(step, *_):
        if step == 2:
            raise KeyboardInterrupt
        return 1e-3

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "learning_rate", stop)
        run(*small("run", "--keep-adapters", 3))
    assert list(kept_adapters(tmp_path / "run")) == [1, 2]
    run(*small("run", "--keep-adapters", 2))
    assert list(kept_adapters(tmp_path / "run")) == [2]


def test_resume_never_trains_over_what_is_there(small, tmp_path):
    run(*small("run", "--steps", 1))
    (tmp_path / "run" / CHECKPOINT).unlink()
    assert not (tmp_path / "run" / PREVIOUS_CHECKPOINT).exists()
    before = (tmp_path / "run" / ADAPTER).read_bytes()
    with pytest.raises(InputError, match=r"no checkpoint\.safetensors: it cannot be resumed"):
        run(*small("run", "--steps", 1, "--resume"))
    assert (tmp_path / "run" / ADAPTER).read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for more in ((), ("--resume",)):
        with pytest.raises(InputError, match=r"mine (already holds files|holds thesis\.txt)"):
            run(*small("mine", *more))
    with pytest.raises(InputError, match="is a file"):
        run(*small("mine/thesis.txt", "--resume"))


def test_a_run_with_damaged_arguments_is_not_resumed(small, tmp_path):
    run(*small("run", "--steps", 1))
    (tmp_path / "run" / "arguments.json").write_text("{")
    with pytest.raises(InputError, match="is missing or damaged"):
        run("--out", tmp_path / "run", "--resume")


def test_resume_needs_the_base_and_the_validation_texts_of_the_run(small, llama, tmp_path):
    base, labelled = shutil.copytree(llama, tmp_path / "base"), write_labelled(tmp_path / "labelled.jsonl")
    run(*small("run", "--steps", 1, "--model", base, "--validation", labelled))
    (tmp_path / "run" / "summary.json").unlink()
    content = labelled.read_text()
    labelled.write_text(content + '{"text": "a dog", "label": "a third"}\n')
    with pytest.raises(InputError, match="the file of --validation was changed since: bring the old one back"):
        run("--out", tmp_path / "run", "--resume")
    labelled.write_text(content)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(InputError, match="base was"):
        run("--out", tmp_path / "run", "--resume")


def test_resume_clears_what_a_kill_left_in_the_middle_of_writing(small, tmp_path):
    """Before the first checkpoint was whole: the run begins again."""
    run(*small("run", "--steps", 1))
    for path in (tmp_path / "run").iterdir():
        if path.name not in ("arguments.json", "metrics.jsonl"):
            path.unlink()
    (tmp_path / "run" / ".checkpoint.safetensors.tmp").write_bytes(b"half")
    (tmp_path / "run" / ".adapter.tmp").mkdir()
    run(*small("run", "--steps", 1, "--resume"))
    assert summary(tmp_path / "run")["steps"] == 1
    assert not list((tmp_path / "run").glob(".*"))


def test_resume_begins_a_run_only_where_the_command_names_pairs(small, tmp_path, monkeypatch, capsys):
    """A mistyped --out must not become a training on docstrings."""
    monkeypatch.setattr(train, "main", None)
    with pytest.raises(InputError, match=r"--resume: .*typo holds no run\. Correct --out"):
        run("--out", tmp_path / "typo", "--resume")
    assert not (tmp_path / "typo").exists()
    monkeypatch.undo()
    run(*small("a new", "--steps", 1, "--resume"))
    assert (tmp_path / "a new" / "summary.json").is_file()
    printed = capsys.readouterr().out
    assert "a new holds no run: beginning one" in printed and "a new' " in printed  # quoted in the next command


def test_a_run_that_ended_before_its_first_checkpoint_begins_again(small, tmp_path, monkeypatch, capsys):
    """Here its loss is not finite, and the same folder is taken with other flags."""
    with pytest.raises(InputError, match="lower --lr"):
        run(*small("run", "--lr", "1e30", "--steps", 6))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"arguments.json", "metrics.jsonl"}
    capsys.readouterr()
    run(*small("run"))
    assert "ended before its first checkpoint, nothing to keep: it begins again" in capsys.readouterr().out
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3]
    (tmp_path / "logs" / "tensorboard").mkdir(parents=True)  # of somebody else
    with pytest.raises(InputError, match="logs already holds files"):
        run(*small("logs"))


def test_a_folder_is_taken_by_one_run_at_a_time(small, tmp_path, monkeypatch):
    """And before anything is loaded; the file that a killed process left behind is no lock."""
    run(*small("run", "--steps", 1))
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / LOCK).touch()
    monkeypatch.setattr("training.plan.prepare_data", None)
    for name, more in (("new", ()), ("run", ("--steps", 1, "--resume"))):
        before = {path.name for path in (tmp_path / name).glob("*")} - {LOCK}
        with reserve(tmp_path / name):
            with pytest.raises(InputError, match=r"another training is at work in .*: wait until it has ended, or choose another --out"):
                run(*small(name, *more))
            assert (tmp_path / name / LOCK).is_file()
        assert {path.name for path in (tmp_path / name).glob("*")} - {LOCK} == before
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    run(*small("run", "--steps", 1, "--resume"))
    assert summary(tmp_path / "run")["steps"] == 1 and not (tmp_path / "run" / LOCK).exists()


def test_a_folder_that_cannot_be_made_is_said_at_once(tmp_path, monkeypatch):
    """/proc answers as if the folder had just been removed, as another process may do."""
    made = []
    monkeypatch.setattr("pathlib.Path.mkdir", lambda path, **_: made.append(path))
    with pytest.raises(InputError, match="cannot be made: No such file or directory; choose another --out"), reserve(tmp_path / "new"):
        pass
    assert len(made) == 100


def test_a_lock_in_a_file_that_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """The run before ends between the moments when this one opens the file and locks it."""
    flock, locked = fcntl.flock, []

    def late(file, how):
        if not locked:
            (tmp_path / LOCK).unlink()
        locked.append(file.fileno())
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with reserve(tmp_path):
        assert len(locked) == 2
        with pytest.raises(InputError, match="at work"), reserve(tmp_path):
            pass


def test_a_full_disk_is_one_line_that_tells_what_is_left(small, tmp_path, monkeypatch):
    """Before the first checkpoint and after it."""
    write_line, lines = train.append_line, []

    def disk_is_full_at_step_4(path, line):
        lines.append(line)
        if len(lines) == 4:
            with errors_of_writing(path):
                raise OSError(28, "No space left on device", ".metrics.jsonl.7.tmp")
        write_line(path, line)

    monkeypatch.setattr(train, "append_line", disk_is_full_at_step_4)
    for name, every, advice in (
        ("none", 50, "there was no checkpoint yet, start it again"),
        ("some", 2, "its last checkpoint stays, go on"),
    ):
        lines.clear()
        with pytest.raises(InputError, match=rf"{name}/metrics\.jsonl cannot be written: No space left on device; {advice}"):
            run(*small(name, "--steps", 5, "--checkpoint-every", every))
        run(*small(name, "--steps", 5, "--checkpoint-every", every, *(("--resume",) if name == "some" else ())))
        assert [row["step"] for row in metrics(tmp_path / name)] == [1, 2, 3, 4, 5]


def test_every_step_is_tracked_also_when_resumed(small, tmp_path, monkeypatch):
    """With a stand-in for wandb, whose package is optional. A resumed run goes on under the same id."""
    tracked, settings = [], []

    class WandbRun:
        def log(self, row, step):
            tracked.append((step, row["loss"]))

    wandb = types.SimpleNamespace(init=lambda **kwargs: settings.append(kwargs) or WandbRun(), __spec__=1)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    out = tmp_path / "run"
    run(*small("run", "--track", "wandb", "--checkpoint-every", 2))
    assert tracked == [(row["step"], row["loss"]) for row in metrics(out)]
    os.replace(out / PREVIOUS_CHECKPOINT, out / CHECKPOINT)
    (out / "summary.json").unlink()
    run("--out", out, "--resume")
    assert [step for step, _ in tracked] == [1, 2, 3, 3]
    assert settings[0]["id"] == settings[1]["id"] and settings[0]["config"]["batch_size"] == 4


# -------------------------------------------------------------------------------------------------- processes of their own


@pytest.mark.slow
@pytest.mark.parametrize(("pooling", "more"), [("query", ()), ("query", ("--fsdp", "--gradient-checkpointing", 2)), ("last", ("--fsdp",))])
def test_two_processes_train_as_one(small, tmp_path, pooling, more):
    """Hard negatives that only some pairs have, chunks; the base whole in each process, or divided, also with a trimmed last layer."""
    rows = [row | {"negatives": ["A river."] * (i % 3)} for i, row in enumerate(word_rows())]
    write_rows(small.pairs, rows + numbered_rows(20))
    flags = ("--steps", 5, "--learn-temperature", "--chunk-size", 2, "--pooling", pooling, "--hold-out", 0, "--batch-size", 8)
    flags += ("--validation", write_labelled(tmp_path / "labelled.jsonl"), "--validate-every", 5)
    run(*small("one", *flags))
    done = torchrun("train.py", *small("two", *flags, *more))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained parameters") == 1  # the first process alone prints
    for name in (ADAPTER, "pooling.safetensors")[: 1 + (pooling == "query")]:
        one, two = (load_file(tmp_path / n / name) for n in ("one", "two"))
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)  # of steps of 1e-2
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 5
    assert summary(tmp_path / "two")["processes"] == 2


@pytest.mark.slow
def test_two_processes_resume_to_the_bit(small, tmp_path):
    """Dropout draws other masks in each process: both random generators come back."""
    out = tmp_path / "run"
    done = torchrun("train.py", *small("run", "--lora-dropout", 0.3, "--checkpoint-every", 2))
    assert done.returncode == 0, done.stderr
    shutil.copytree(out, tmp_path / "whole")
    os.replace(out / PREVIOUS_CHECKPOINT, out / CHECKPOINT)
    (out / "summary.json").unlink()
    done = torchrun("train.py", "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_adapter(tmp_path / "whole", out)


@pytest.mark.slow
def test_processes_end_before_python_finalizes(small, tmp_path):
    """A thread of gloo that let go of a tensor while Python ends aborted the process, though all had gone well."""
    script = tmp_path / "end.py"
    script.write_text(
        "import atexit, sys, train\n"
        "atexit.register(print, 'exit functions ran')\n"
        "train.run_script(lambda: train.main(train.parse()))\n"
        "sys.exit(3)\n"
    )
    done = torchrun(script, *small("run"))
    assert done.returncode == 0 and done.stdout.count("exit functions ran") == 2, done.stderr


@pytest.mark.slow
def test_the_traceback_of_any_process_is_shown(small, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(
        "import os, train, training.plan\n"
        "def broken(*_): raise RuntimeError('broken in process ' + os.environ['RANK'])\n"
        "if os.environ['RANK'] == '1': training.plan.set_up = broken\n"
        "train.run_script(lambda: train.main(train.parse()))\n"
    )
    done = torchrun(script, *small("run"))
    assert done.returncode and "RuntimeError: broken in process 1" in done.stderr and "broken.py" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_in_hand(small, tmp_path, number):
    """It comes once some steps are written: a usable adapter, no traceback."""
    flags = small("run", "--steps", 4000, "--checkpoint-every", 5)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    path = tmp_path / "run" / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < 12:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(number)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + number
    assert "Traceback" not in error and not list((tmp_path / "run").glob(".*tmp*"))
    Encoder.load(str(tmp_path / "run"))


KILLED = """
import os, runpy, signal, sys
left = int(sys.argv.pop(1))
def hook(event, arguments):  # every file that the run opens, renames or removes is a moment
    global left
    if event in ("open", "os.rename", "os.remove") and RUN in str(arguments[0]):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
RUN = sys.argv[sys.argv.index("--out") + 1]
sys.addaudithook(hook)
sys.argv[0] = "train.py"
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_if_nothing_had_happened(small, tmp_path):
    """kill -9 at random moments, of which many lie within the writing of a checkpoint, with dropout and a learned temperature."""
    flags = ("--steps", 12, "--checkpoint-every", 2, "--lora-dropout", 0.2, "--learn-temperature")
    kills = 0
    for moment in [*random.Random(0).sample(range(1, 26), 9), 10**9]:
        command = [sys.executable, "-c", KILLED, str(moment), str(ROOT / "train.py"), *small("run", *flags), "--resume"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        kills += done.returncode != 0
    assert kills >= 5
    run(*small("whole", *flags))
    assert_same_adapter(tmp_path / "whole", tmp_path / "run")
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, 13))
