"""The table of `bench/bench_parity.py`; the steps of `bench/gpu.py`: what becomes of one that ends, fails, runs out of memory or out of
time, and of a call that is cut off.
"""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import bench_parity
from bench_parity import Cell, measure, table
from bench_pooling import QUICK_SHAPES, SHAPES
from bench_pooling import build_parser as pooling_flags
from gpu import Step, append_row, build_parser, make_steps, markdown, read_rows, run_step

import export
from files.console import InputError
from serving.runtimes import RuntimeCrashed, RuntimeFailed


def step(program: str, limit: float = 60) -> Step:
    return Step("a step", [sys.executable, "-c", program], limit)


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("""print('{"a": 1}')""", "passed"),
        ("""print('{"a": 1}'); raise ValueError('wrong')""", "failed"),
        ("import builtins; raise RuntimeError('CUDA error: out of memory')", "out of memory"),
        ("""print('plain loop: out of memory: tried to allocate'); print('{"rows": [{"side": "ours"}]}')""", "passed"),
        ("""print('ours: out of memory: tried to allocate'); print('{"rows": [{"side": "ours: out of memory"}]}')""", "out of memory"),
        ("import sys; sys.exit('ValueError: models/tiny does not fit into the memory of cuda:0')", "out of memory"),
    ],
)
def test_how_a_step_ends_is_in_its_row(program, status):
    row = run_step(step(program), 60, dry_run=False)
    assert row["status"] == status and ("a" not in row["result"] or row["result"] == {"a": 1})


def test_a_step_that_outlasts_its_limit_is_a_row_and_one_that_outlasts_the_call_is_not():
    endless = "while True: pass"
    assert run_step(step(endless, limit=0.3), 60, dry_run=False)["status"] == "timed out"
    assert run_step(step(endless, limit=60), 0.3, dry_run=False) is None


def test_every_shape_of_pooling_is_measured_once():
    """Those of --quick first, each further one in a step of its own."""
    steps = make_steps(build_parser().parse_args(["--out", "rows.jsonl"]))
    flags = [pooling_flags().parse_args(step.command[2:]) for step in steps if step.command[1].endswith("bench_pooling.py")]
    assert flags[0].quick and sorted(shape for one in flags[1:] for shape in one.shapes) == sorted(SHAPES.keys() - set(QUICK_SHAPES))
    assert len({step.name for step in steps}) == len(steps)


def test_a_line_that_was_cut_off_costs_its_own_step_alone(tmp_path):
    rows = [{"step": name, "status": "passed", "seconds": 1, "output": [], "result": {"n": i}} for i, name in enumerate("ab")]
    path = tmp_path / "rows.jsonl"
    append_row(path, rows[0])
    path.write_text(path.read_text() + json.dumps(rows[1])[:20])
    append_row(path, rows[1] | {"dry_run": True})
    append_row(path, rows[1])
    assert read_rows(path, False) == rows and [row["step"] for row in read_rows(path, True)] == ["b"]


def test_the_table_shows_a_side_that_failed_by_its_name():
    sides = [{"side": "ours: out of memory"}, {"side": "plain loop", "seconds": 2.0}]
    text = markdown([{"step": "x", "status": "passed", "seconds": 1, "output": [], "result": {"rows": sides}}])
    assert "| ours: out of memory |  |" in text and "| plain loop | 2 |" in text


def test_the_table_of_parity_shows_the_smallest_cosine_what_is_refused_and_what_fails():
    rows = {}

    def add(pooling: str, prompt: str, to: str, **found) -> None:
        cell = Cell("llama", pooling, prompt, to, "float32")
        rows[cell] = cell._asdict() | found

    both = {"our encoder": 0.5, "sentence-transformers": 0.9999996, "vLLM's server": 0.99991}
    add("last, all", "none", "vllm", cosines=both)
    add("last, all", "short", "vllm", cosines=both | {"vLLM's server": 0.99992})
    add("last, all", "long", "vllm", cosines=both)
    add("last, text", "none", "sentence-transformers", cosines={"sentence-transformers": 1 + 1e-9})
    add("last, text", "none", "vllm", cosines={"sentence-transformers": 1.0})
    add("mean, text", "none", "vllm", cosines=both)
    add("mean, text", "long", "vllm", refused="no such pooling")
    add("mean, text", "short", "vllm", failed="it does not start")
    assert table(rows).splitlines()[2:] == [
        "| llama | last, all | 1.000000 | 0.999910 |",
        "| llama | last, text | none: 1.000000 | none: not verified |",
        "| llama | mean, text | none: 1.000000 | none: 0.999910; long: refused; short: FAILED |",
    ]


@pytest.mark.parametrize(
    ("error", "outcome"), [(RuntimeFailed("no such head"), "refused"), (RuntimeCrashed("SIGSEGV"), "failed"), (InputError("no flag"), None)]
)
def test_a_cell_of_parity_is_refused_by_the_runtime_alone(llama, monkeypatch, error, outcome):
    def fail(_):
        raise error

    monkeypatch.setattr(export, "main", fail)
    cell = Cell("llama", "last, all", "none", "vllm", "float32")
    if outcome:
        assert measure(cell, llama, []) == {outcome: str(error)}
    else:
        with pytest.raises(InputError, match="no flag"):
            measure(cell, llama, [])


def test_parity_asks_for_a_runtime_that_is_missing_before_it_measures(tmp_path, monkeypatch):
    flags = ["--to", "gguf", "vllm", "--llama-cpp", str(tmp_path), "--llama-python", sys.executable]
    monkeypatch.setattr(sys, "argv", ["bench_parity.py", "--out", str(tmp_path / "parity.jsonl"), *flags])
    with pytest.raises(InputError, match=r"no convert_hf_to_gguf\.py there"):
        bench_parity.main()
    assert not (tmp_path / "parity.jsonl").exists()
