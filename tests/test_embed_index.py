"""`embed.py index`: the nearest of many vectors by FAISS, as exact search has them, and what it does when the folder has grown.

Needs the packages of requirements-extras.txt: make test-extras.
"""

import sys

import numpy as np
import pytest
from short_runs import write_rows

import embed
from encoder.nearest import nearest, unit
from files.console import InputError
from serving import index
from serving.index import INDEX_FILE, build_index, open_index
from serving.vectors import STORES, Part, VectorFolder

WIDTH, PER_PART = 24, 700


def run(*arguments) -> None:
    embed.main([str(argument) for argument in arguments])


def job(**changes) -> dict:
    known = {"fingerprint": "f", "width": WIDTH, "model": "m", "store": "float32", "format": "parquet", "keep_text": False}
    return known | changes


def add_part(folder: VectorFolder, number: int) -> None:
    """Vectors in groups, of any length, as those of a contract without normalization."""
    chance = np.random.default_rng(number)
    centres = np.random.default_rng(99).normal(size=(20, WIDTH))
    vectors = centres[chance.integers(20, size=PER_PART)] + 0.3 * chance.normal(size=(PER_PART, WIDTH))
    vectors *= chance.uniform(0.1, 9, (PER_PART, 1))
    ids = list(range(number * PER_PART, (number + 1) * PER_PART))
    folder.write(Part(number, ids, ids, [""] * PER_PART, []), vectors.astype(np.float32))


def exact(folder: VectorFolder, queries: np.ndarray, k: int):
    return nearest(queries, (folder.read(number).vectors for number in folder.numbers()), k)


def test_without_faiss_it_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    folder = VectorFolder.begin(tmp_path / "v", job())
    add_part(folder, 0)
    with pytest.raises(InputError, match=r"an index needs FAISS: pip install -r requirements-extras\.txt"):
        run("index", tmp_path / "v")
    assert open_index(folder) is None


class TestWithFaiss:
    @pytest.fixture(autouse=True)
    def faiss(self):
        return pytest.importorskip("faiss", reason="requirements-extras.txt is not installed")

    @pytest.mark.parametrize("store", STORES)
    def test_it_finds_what_exact_search_finds(self, tmp_path, store):
        folder = VectorFolder.begin(tmp_path / "v", job(store=store, format="npy" if store == "int8" else "parquet"))
        for number in (0, 1, 3):  # part 2 is not there yet
            add_part(folder, number)
        said = build_index(folder)
        assert "2,100 vectors in 32 lists" in said
        queries = folder.read(1).vectors[::10] + 0.1
        near, far = exact(folder, queries, 10), open_index(folder).nearest(queries, 10)
        rounding = 2e-2 if store in ("int8", "binary") else 1e-3
        assert (far.cosines >= near.cosines[:, -1:] - rounding).mean() > 0.95
        vectors = unit(np.concatenate([folder.read(number).vectors for number in (0, 1, 3)]))
        np.testing.assert_allclose(far.cosines, np.einsum("qkd,qd->qk", vectors[far.numbers], unit(queries)), atol=rounding)
        assert build_index(folder).endswith("covers all 2,100 vectors already")

    def test_more_than_the_lists_hold_and_more_than_there_are(self, tmp_path):
        folder = VectorFolder.begin(tmp_path / "v", job())
        add_part(folder, 0)
        build_index(folder)
        query = folder.read(0).vectors[:2]
        found = open_index(folder).nearest(query, 9999)
        assert [sorted(numbers) for numbers in found.numbers.tolist()] == [list(range(PER_PART))] * 2
        np.testing.assert_allclose(found.cosines, exact(folder, query, 9999).cosines, atol=1e-3)

    def test_an_index_that_is_stale_or_damaged_is_left_out(self, tmp_path, capsys):
        folder = VectorFolder.begin(tmp_path / "v", job())
        add_part(folder, 0)
        build_index(folder)
        add_part(folder, 1)
        assert open_index(folder) is None
        assert "index.faiss does not cover the parts that are here now" in capsys.readouterr().err
        assert "1,400 vectors" in build_index(folder) and len(open_index(folder).nearest(np.ones((1, WIDTH)), 2).numbers[0]) == 2
        path = tmp_path / "v" / INDEX_FILE
        path.write_bytes(path.read_bytes()[:100])
        assert open_index(folder) is None and "index.faiss cannot be read" in capsys.readouterr().err
        assert not list((tmp_path / "v").glob(".*"))

    def test_a_folder_without_vectors(self, tmp_path):
        VectorFolder.begin(tmp_path / "v", job())
        with pytest.raises(InputError, match="holds no vector yet"):
            run("index", tmp_path / "v")

    def test_enough_lists_are_read(self, tmp_path, faiss):
        """Vectors without groups: few lists are not enough."""
        vectors = np.random.default_rng(0).normal(size=(2000, WIDTH)).astype(np.float32)
        made = faiss.index_factory(WIDTH, "IVF40,Flat", faiss.METRIC_INNER_PRODUCT)
        made.train(vectors)
        made.add(vectors)
        recall = index.set_probes(made, vectors[::20])
        assert recall >= 0.99 and 4 < made.nprobe <= 40

    def test_the_script_searches_by_the_index_unless_told_otherwise(self, llama, tmp_path, capsys, monkeypatch):
        rows = [{"id": f"r{i}", "text": f"The cat number {i} sat {'on the mat ' * (i % 5)}"} for i in range(200)]
        run(llama, write_rows(tmp_path / "t.jsonl", rows), "--out", tmp_path / "v", "--rows-per-part", 64, "--keep-text")
        run("index", tmp_path / "v")
        asked = []
        search = index.Index.nearest
        monkeypatch.setattr(index.Index, "nearest", lambda *a: asked.append(1) or search(*a))
        capsys.readouterr()
        shown = []
        for flags in ((), ("--exact",)):
            run("search", tmp_path / "v", "The cat number 77 sat on the mat on the mat", *flags)
            shown.append([line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]])
        assert asked == [1] and len(shown[0]) == 5 and sorted(map(str, shown[0])) == sorted(map(str, shown[1]))
