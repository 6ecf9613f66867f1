"""The quality gate, the report beside a file of pairs, and the files that are written together."""

import functools
import gzip
import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from short_jobs import read_rows, run

import make_pairs
from files.console import InputError
from files.reading import read_lines
from pair_engines import gate
from pair_engines.gate import ALL_CHECKS, Gate
from pair_engines.report import Sample, Tally

ROOT = Path(__file__).resolve().parent.parent
PROSE = "The bank raised its interest rates again this month, and every account that is overdrawn now costs more than before."


def reasons(*pairs: tuple[str, str], checks=ALL_CHECKS, **options) -> list[str | None]:
    rows = [{"anchor": anchor, "positive": positive} for anchor, positive in pairs]
    return [verdict.reason for verdict in Gate(checks, **options).sort(rows)]


@pytest.mark.parametrize(
    ("anchor", "positive", "reason"),
    [
        (PROSE, "Because rates went up, it is now dearer to be in debt with the bank.", None),
        (PROSE, "", "empty"),
        (PROSE, " .\u200b — ", "empty"),
        ("...", PROSE, "empty"),
        ("I love it!", "👍👍👍", None),
        (PROSE, PROSE.upper() + "\n", "copy"),
        (PROSE, PROSE.replace("raised", "raisde"), "copy"),
        (PROSE, PROSE.replace("raised its interest rates", "put its rates of interest up"), None),
        (PROSE, "Dearer.", "length"),
        (PROSE * 9, "A debt is a hungry guest.", None),
        ("rate", "A word for the price of money, in a year.", None),  # ten times as long, but an anchor counts as 40 characters
        ("What is my balance?", "Tell me how much money there is in my account, please, as of today.", None),
        (PROSE, " ".join(f"word{i} of another text" for i in range(60)), "length"),
        (PROSE, "银行本月再次提高了利率，每个透支的账户现在都比以前更贵。", "script"),
        (PROSE, "Банк снова поднял процентные ставки, и долги стали дороже.", "script"),
        ("東京の銀行は金利を上げました。", "とうきょうのぎんこうはきんりをあげました", None),
        ("Банк поднял ставку ЕЦБ", "Ставка снова выросла, сообщает ECB", None),
        (PROSE, "Weil die Bank ihre Zinsen erhöht hat, werden überzogene Konten jetzt teurer als zuvor.", "language"),
        ("Die Bank erhöht die Zinsen für alle Konten.", "The bank has raised the interest rates of all accounts.", "language"),
        ("Die Bank erhöht die Zinsen für alle Konten.", "Alle Konten kosten jetzt mehr, weil die Zinsen gestiegen sind.", None),
        ("Play the song Le Renouveau", "I want to hear the French one that is called The Renewal", None),
        ("2 + 2 = 4", "Two and two make four", None),
        (PROSE, "Here is the rewritten text: rates went up and debts are dearer.", "leak"),
        (PROSE, "Sure! Here's a simpler version. Rates went up.", "leak"),
        (PROSE, "**Rewritten text:** Rates went up and debts are dearer.", "leak"),
        (PROSE, "Rates went up. <|im_end|>", "leak"),
        ("Here is the new version of the driver.", "Here is the version of the driver that came out today", None),
        ("Sure, I will come.", "Of course I shall be there with you tonight", None),
        (PROSE, "I'm sorry, but I can't help with that request.", "refusal"),
        (PROSE, "As an AI language model, I have no bank account.", "refusal"),
        (PROSE, "I am unable to assist with this text about banks.", "refusal"),
        ("I'm sorry, I cannot come to the party.", "Sorry, I am unable to be at the party tonight.", None),
        (PROSE, "rates went up " * 12, "loop"),
        ("na na na " * 12, "rates went up " * 9, None),
        (PROSE, "利率上涨" * 10, "script"),
        ("银行本月再次提高了利率，透支的账户更贵。", "利率上涨" * 10, "loop"),
    ],
)
def test_a_pair_is_left_out_for_the_first_check_that_it_fails(anchor, positive, reason):
    assert reasons((anchor, positive)) == [reason]
    if reason and reason != "empty":  # only the engines that ask for a check run it; the empty are always left out
        assert reasons((anchor, positive), checks=[name for name in ALL_CHECKS if name != reason]) != [reason]
        assert reasons((anchor, positive), checks=()) == [None]
    elif reason:
        assert reasons((anchor, positive), checks=()) == ["empty"]


def test_a_near_duplicate_of_one_of_the_latest_pairs_is_left_out(monkeypatch):
    duplicates = functools.partial(reasons, checks=("duplicate",))
    words = [f"w{i}" for i in range(60)]
    near, far = words.copy(), random.Random(0).sample(words, 60)
    near[7] = "other"
    texts = [" ".join(w) for w in (words, near, far)]
    pairs = [(text, f"About {text}") for text in texts]
    assert duplicates(*pairs) == [None, "duplicate", None]
    assert duplicates((texts[0], texts[2]), (texts[2], texts[0])) == [None, None]  # the sides are not the same
    short = [(f"The number {i} has a text, quite long, with commas.", f"A long text of number {i} and its commas.") for i in range(20)]
    assert duplicates(*short) == [None] * 20  # texts of ten words that differ in one
    monkeypatch.setattr(gate, "WINDOW", 2)
    assert duplicates(*pairs[::2], *short[:1], pairs[0]) == [None, None, None, None]  # forgotten
    assert duplicates(*pairs[::2], pairs[0]) == [None, None, "duplicate"]


def test_the_verdicts_do_not_depend_on_the_batches(monkeypatch):
    pairs = [(f"{PROSE} {i // 2} {i // 3}", PROSE if i % 5 else f"Number {i // 20}, rates went up again.") for i in range(40)]
    whole = reasons(*pairs)
    assert len(set(whole)) > 2
    monkeypatch.setattr(gate, "AT_ONCE", 7)
    assert reasons(*pairs) == whole


def test_the_judge_keeps_pairs_whose_cosine_is_in_the_window():
    class Judge:
        """Encodes "a0.6" so that its cosine to the query is 0.6."""

        def encode(self, texts, role):
            if role == "query":
                return np.array([[2.0, 0.0]] * len(texts))
            return np.array([[float(text), math.sqrt(1 - float(text) ** 2)] for text in texts])

    pairs = [(PROSE, cosine) for cosine in ("0.2", "0.5", "0.7", "0.99", "")]
    assert reasons(*pairs, checks=(), judge=Judge(), window=(0.4, 0.98)) == ["far", None, None, "close", "empty"]
    rows = [{"anchor": PROSE, "positive": "0.5"}]
    (verdict,) = Gate((), Judge(), (0.4, 0.98)).sort(rows)
    assert verdict.measures["cosine"] == pytest.approx(0.5)


# ------------------------------------------------------------------------------------------------------- through the script


def test_every_drop_is_counted_printed_and_reported(tmp_path, capsys):
    long = " ".join(f"w{i}" for i in range(40))
    (tmp_path / "t.txt").write_text("".join(f"{PROSE} Text {i}, {i * i}.\n" for i in range(30)) + f"{long}\n{long}\n{long}\n")
    flags = ("noise", "--input", tmp_path / "t.txt", "--chars", 0, "--swap", 0, "--delete", 0.02, "--seed", 2)
    run(*flags, "--out", tmp_path / "all.jsonl", "--no-gate")
    run(*flags, "--out", tmp_path / "out.jsonl", "--review", 3)
    kept, pairs = read_rows(tmp_path / "out.jsonl"), read_rows(tmp_path / "all.jsonl")
    n_out = len(pairs) - len(kept)
    assert n_out > 0 and all(pair in pairs for pair in kept)
    out = capsys.readouterr().out
    assert f"gate: {n_out} of {len(pairs)} pairs left out: {n_out} near-duplicate of an earlier pair" in out
    assert f"gate: all {len(pairs)} pairs kept" in out
    assert f"accepted: 3 of {len(kept)}" in out and f"rejected: {min(3, n_out)} of {n_out}" in out and "[near-duplicate" in out
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text())
    assert (report["made"], report["kept"]) == (len(pairs), len(kept)) and report["left_out"] == {
        "near-duplicate of an earlier pair": n_out
    }
    assert len(report["pairs"]) == min(20, len(kept)) and all(p["positive"] in {pair["positive"] for pair in kept} for p in report["pairs"])
    for counts in report["histograms"].values():
        assert (sum(counts["kept"]), sum(counts["left out"])) == (len(kept), n_out) and len(counts["edges"]) == len(counts["kept"]) + 1
    assert report["arguments"]["engine"] == "noise" and report["arguments"]["delete"] == 0.02
    assert not (tmp_path / "out.jsonl.report.png").exists()  # too few to wait for matplotlib


def test_histograms_are_drawn_of_many_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(make_pairs, "PICTURE_FROM", 5)
    (tmp_path / "t.txt").write_text("".join(f"{PROSE} Text {i}.\n" for i in range(5)))
    run("crop", "--input", tmp_path / "t.txt", "--out", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl.report.png").read_bytes().startswith(b"\x89PNG")


def test_a_judge_is_loaded_and_its_window_checked(tmp_path, llama, capsys):
    (tmp_path / "t.txt").write_text("".join(f"{PROSE} Text {i}.\n" for i in range(9)))
    flags = ("crop", "--input", tmp_path / "t.txt", "--no-gate", "--judge", llama)
    run(*flags, "--out", tmp_path / "out.jsonl", "--judge-window", -1, 1)
    assert "judge: " in capsys.readouterr().out and len(read_rows(tmp_path / "out.jsonl")) == 9
    counts = json.loads((tmp_path / "out.jsonl.report.json").read_text())["histograms"]["cosine"]
    assert sum(counts["kept"]) == 9
    with pytest.raises(InputError, match="no pairs were made: read some with --review"):
        run(*flags, "--out", tmp_path / "none.jsonl", "--judge-window", -1, -0.999)
    with pytest.raises(InputError, match=r"--judge-window 0\.9 0\.1: needs the lowest and then the highest cosine"):
        run(*flags, "--out", tmp_path / "none.jsonl", "--judge-window", 0.9, 0.1)
    assert not list(tmp_path.glob("*none*"))


def test_the_yield_of_engines_and_templates_is_counted():
    tally = Tally(seed=0, n_samples=0)
    for engine, template, reason in (("llm", "simple", None), ("llm", "detail", "copy"), ("llm", "simple", "loop"), ("crop", "", None)):
        tally.add(gate.Verdict({"anchor": "a", "positive": "b", "engine": engine, "template": template}, reason, {}))
    report = tally.as_json({})
    assert report["engines"] == {"crop": {"made": 1, "kept": 1}, "llm": {"made": 3, "kept": 1}}
    assert report["templates"] == {"detail": {"made": 1, "kept": 0}, "simple": {"made": 2, "kept": 1}}


def test_a_report_of_other_pairs_is_not_overwritten(tmp_path):
    (tmp_path / "t.txt").write_text(PROSE)
    (tmp_path / "out.jsonl.report.json").write_text("mine")
    with pytest.raises(InputError, match=r"out\.jsonl\.report\.json exists already"):
        run("crop", "--input", tmp_path / "t.txt", "--out", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl.report.json").read_text() == "mine"


def test_the_docstrings_engine_keeps_its_own_rules():
    assert make_pairs.ENGINES["docstrings"].checks is None  # the README's figures were measured on its pairs


def test_what_a_killed_job_has_left_is_written_over_and_a_running_one_is_left_alone(tmp_path):
    from pair_engines.outputs import RowFiles

    (tmp_path / "t.txt").write_text(PROSE)
    (tmp_path / ".out.jsonl.gz.tmp").write_bytes(b"half a line")
    with RowFiles(tmp_path / "out.jsonl.gz") as files:
        files.write(files.out, {"anchor": "a"})
        with pytest.raises(InputError, match="another job writes"):
            run("crop", "--input", tmp_path / "t.txt", "--out", tmp_path / "out.jsonl.gz")
    assert gzip.decompress((tmp_path / "out.jsonl.gz").read_bytes()) == b'{"anchor": "a"}\n'
    assert {path.name for path in tmp_path.iterdir()} == {"t.txt", "out.jsonl.gz"}


def test_a_sample_is_drawn_evenly():
    counts = np.zeros(10)
    for seed in range(2000):
        sample = Sample(seed, 3)
        for i in range(10):
            sample.add(i)
        counts[sample.verdicts()] += 1
    assert np.allclose(counts / 2000, 0.3, atol=0.05)


# ------------------------------------------------------------------------------------------------------- shards, any size


def make_shards(folder: Path, n: int, engine: str = "crop", *flags) -> list[Path]:
    """The files of n shards of a job on the 11 texts of t.txt, and that of the whole job."""
    (folder / "t.txt").write_text("".join(f"{PROSE} Text {i}, {i * i}.\n" for i in range(11)))
    flags = (engine, "--input", folder / "t.txt", "--limit", 10, *flags, "--out")
    for i in range(1, n + 1):
        run(*flags, folder / f"{i}.jsonl", "--shard", f"{i}/{n}")
    run(*flags, folder / "whole.jsonl")
    return [folder / f"{i}.jsonl" for i in range(1, n + 1)]


@pytest.mark.parametrize(("engine", "flags"), [("crop", ("--no-gate",)), ("noise", ("--no-gate",)), ("noise", ())])
def test_shards_together_are_the_whole(tmp_path, engine, flags):
    shards = make_shards(tmp_path, 3, engine, *flags)
    run("merge", *reversed(shards), "--out", tmp_path / "all.jsonl", *flags)
    assert (tmp_path / "all.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    if flags:
        assert [len(read_rows(path)) for path in shards] == [4, 3, 3]


@pytest.mark.parametrize("end", ["jsonl", "jsonl.gz"])
def test_a_shard_without_pairs_is_no_missing_shard(tmp_path, capsys, end):
    (tmp_path / "t.txt").write_text(f"{PROSE}\ntoo short\n{PROSE} And more.\n")  # the fourth shard is without a text
    for i in range(1, 5):
        run("crop", "--input", tmp_path / "t.txt", "--shard", f"{i}/4", "--out", tmp_path / f"{i}.{end}")
    assert "no pairs were made of this shard" in capsys.readouterr().err
    assert [len(list(read_lines(tmp_path / f"{i}.{end}"))) for i in range(1, 5)] == [1, 0, 1, 0]
    run("merge", *(tmp_path / f"{i}.{end}" for i in range(1, 5)), "--out", tmp_path / "all.jsonl")
    run("crop", "--input", tmp_path / "t.txt", "--out", tmp_path / "whole.jsonl")
    assert (tmp_path / "all.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    with pytest.raises(InputError, match="no pairs were made"):  # a whole job still needs some
        run("crop", "--input", tmp_path / "t.txt", "--min-words", 99, "--out", tmp_path / "none.jsonl")


def test_shards_that_are_missing_doubled_or_of_another_job_are_not_merged(tmp_path, capsys):
    one, two, three = make_shards(tmp_path, 3)
    whole = tmp_path / "whole.jsonl"
    run("crop", "--input", tmp_path / "t.txt", "--shard", "3/3", "--seed", 1, "--limit", 10, "--out", tmp_path / "seed.jsonl")
    run("crop", "--input", tmp_path / "t.txt", "--shard", "3/3", "--limit", 10, "--out", tmp_path / "again.jsonl")
    (tmp_path / "docs.jsonl").write_text('{"anchor": "a", "positive": "b", "source": "pkg.module"}\n')
    (tmp_path / "mixed.jsonl").write_text("".join(whole.read_text().splitlines(keepends=True)[::-1]))
    (tmp_path / "bad.jsonl").write_text(whole.read_text())
    (tmp_path / "bad.jsonl.report.json").write_text("[]")
    for files, message in (
        ((one, two), "shard 3/3 is missing"),
        ((one, two, three, tmp_path / "again.jsonl"), "shard 3/3 is given twice"),
        ((one, two, tmp_path / "seed.jsonl"), r"seed\.jsonl is no shard of the job that made .*1\.jsonl: --seed is another"),
        ((one, whole), r"whole\.jsonl is no shard of the job"),
        ((one, one), "a file is given twice"),
        ((one, tmp_path / "none.jsonl"), r"no file .*none\.jsonl"),
        ((one, tmp_path / "docs.jsonl"), r"docs\.jsonl, line 1: needs a 'source' such as texts\.csv:7, has 'pkg\.module'"),
        ((tmp_path / "mixed.jsonl",), r"mixed\.jsonl, line 2: comes after a later text"),
        ((one, tmp_path / "bad.jsonl"), r"bad\.jsonl\.report\.json is no report"),
    ):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(InputError, match=message):
            run("merge", *files, "--out", tmp_path / "all.jsonl")
        assert sorted(tmp_path.iterdir()) == before
    for path in (one, three):
        (path.parent / f"{path.name}.report.json").unlink()
    shutil.copy(one, tmp_path / "copy.jsonl")
    with pytest.raises(InputError, match=r"t\.txt:1 is in .*(1|copy)\.jsonl and in .*(1|copy)\.jsonl"):
        run("merge", one, tmp_path / "copy.jsonl", "--out", tmp_path / "all.jsonl")
    run("merge", one, three, "--out", tmp_path / "all.jsonl")
    assert "no report beside" in capsys.readouterr().out


# the size of a process before it became this program counts for ru_maxrss, not for VmHWM
PEAK = """
import re, runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["crop", "noise"])
def test_memory_does_not_grow_with_the_texts(tmp_path, engine):
    peaks = []
    for n in (5_000, 100_000):
        (tmp_path / f"{n}.txt").write_text("".join(f"{PROSE} Text {i}, {i * i}.\n" for i in range(n)))
        flags = ("--input", str(tmp_path / f"{n}.txt"), "--no-gate", "--out", str(tmp_path / f"{n}.jsonl"))
        command = [sys.executable, "-c", PEAK, str(ROOT / "make_pairs.py"), engine, *flags]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]))
    size = (tmp_path / "100000.txt").stat().st_size / 2**20
    assert size > 13 and peaks[1] - peaks[0] < 5, peaks  # MiB


@pytest.mark.slow
def test_a_deterministic_job_that_was_killed_begins_again_and_ends_the_same(tmp_path):
    (tmp_path / "t.txt").write_text("".join(f"{PROSE} Text {i}, {i * i}.\n" for i in range(20_000)))
    command = [sys.executable, str(ROOT / "make_pairs.py"), "noise", "--input", str(tmp_path / "t.txt"), "--out"]
    subprocess.run([*command, str(tmp_path / "whole.jsonl")], check=True, capture_output=True)
    kills = 0
    for delay in (0.5, 1, 1.5, 2, 2.5):
        process = subprocess.Popen([*command, str(tmp_path / "out.jsonl")], stdout=subprocess.DEVNULL)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
            process.wait()
        assert (tmp_path / "out.jsonl").exists() <= (process.returncode == 0)
    if not (tmp_path / "out.jsonl").exists():
        subprocess.run([*command, str(tmp_path / "out.jsonl")], check=True, capture_output=True)
    assert kills and (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob(".*"))
