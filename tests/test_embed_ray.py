"""`embed.py --engine ray`: workers of a Ray cluster write what the plain job writes, to the byte, and each goes on with the other's.

Needs the packages of requirements-extras.txt: make test-extras.
"""

import os
import sys

import pytest
from embed_jobs import numbered_texts, rows_of, run_job, run_with_kills, start_job
from short_runs import write_rows

import embed
from files.console import InputError
from files.reading import read_rows
from serving.embedding import Model, Source
from serving.ray_engine import PartWorker, Work

KILLS = int(os.environ.get("KILLS", 2))
RAY = ("--engine", "ray", "--workers", 2)


def run(*arguments) -> None:
    embed.main([str(argument) for argument in arguments])


def files(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_without_ray_it_is_one_line(llama, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.data", None)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"needs Ray: pip install -r requirements-extras\.txt"):
        run(llama, numbered_texts(tmp_path / "t.jsonl", 3), "--out", tmp_path / "v", "--engine", "ray")
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_worker_writes_the_parts_it_is_given_in_any_order(llama, tmp_path, monkeypatch, kind):
    """In this process, without Ray: a file that cannot be entered in the middle is read on where it can be."""
    path = numbered_texts(tmp_path / "t.jsonl", 23)
    if kind == "parquet":
        import pyarrow as pa
        from pyarrow.parquet import write_table

        rows = [cells for _, cells in read_rows(path)]
        path = tmp_path / "t.parquet"
        write_table(pa.table({name: [row[name] for row in rows] for name in ("id", "text")}), path, row_group_size=5)
    run(llama, path, "--out", tmp_path / "whole", "--rows-per-part", 4)
    run(llama, path, "--out", tmp_path / "v", "--rows-per-part", 4, "--shard", "1/9")
    opened = []
    parts = Source.parts
    monkeypatch.setattr(Source, "parts", lambda self, first=0: opened.append(first) or parts(self, first))
    worker = PartWorker(Work(Model(llama, None, None, False), Source(path, "text", "id", 4), "document", tmp_path / "v"))
    for number in (1, 3, 5, 4, 2, 2):
        worker({"number": [number]})
    assert opened == ([1, 4, 2, 2] if kind == "jsonl" else [1, 3, 5, 4, 2, 2])
    assert files(tmp_path / "v") == files(tmp_path / "whole")


@pytest.mark.slow
class TestOnACluster:
    @pytest.fixture(autouse=True)
    def ray(self):
        return pytest.importorskip("ray.data", reason="requirements-extras.txt is not installed")

    def test_plain_and_ray_jobs_write_the_same_and_go_on_with_each_other(self, llama, tmp_path):
        rows = [{"id": f"r{i}", "text": f"number {i}" if i % 9 else " "} for i in range(100)]
        path = write_rows(tmp_path / "t.jsonl", rows)
        flags = (llama, path, "--rows-per-part", 7, "--out")
        run(*flags, tmp_path / "whole")
        run_job(*flags, tmp_path / "v", *RAY)
        assert files(tmp_path / "v") == files(tmp_path / "whole")
        for number in (0, 3, 14):
            (tmp_path / "v" / f"part-{number:05d}.parquet").unlink()
        times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "v").iterdir()}
        run_job(*flags, tmp_path / "v", *RAY, "--shard", "1/2")  # part 3 is of the other shard
        run(*flags, tmp_path / "v")
        assert files(tmp_path / "v") == files(tmp_path / "whole")
        assert all((tmp_path / "v" / name).stat().st_mtime_ns == time for name, time in times.items() if name.endswith("parquet"))

    def test_what_a_worker_or_the_cluster_refuses_is_one_line(self, llama, tmp_path):
        path = numbered_texts(tmp_path / "t.jsonl", 9)
        run_job(llama, path, "--out", tmp_path / "v", "--role", "query")
        for flags, message in (
            ((*RAY, "--role", "document"), "was begun with role query, not document"),
            (("--engine", "ray", "--workers", 9999), "each worker needs one"),
            ((*RAY, "--device", "cuda"), "cuda"),
        ):
            job = start_job(llama, path, "--out", tmp_path / "v", *flags)
            _, errors = job.communicate()
            assert job.returncode == 2 and message in errors.splitlines()[-1] and len(errors.splitlines()) == 1, errors

    def test_kills_at_random_moments_lose_and_double_no_row(self, llama, tmp_path):
        path = numbered_texts(tmp_path / "t.jsonl", 12000)
        run_with_kills(tmp_path / "v", KILLS, 0.5, llama, path, "--rows-per-part", 50, *RAY)
        run(llama, path, "--rows-per-part", 50, "--out", tmp_path / "whole")
        rows, whole = rows_of(tmp_path / "v"), rows_of(tmp_path / "whole")
        assert list(rows) == list(whole) == [str(i) for i in range(12000)]
        assert all((rows[name] == whole[name]).all() for name in whole)
