"""Whatever evaluate.py is given, it answers in one line: the cases of bad_inputs.py, and their table in bench/README.md."""

import re
from pathlib import Path

import pytest
from bad_inputs import CASES, answer, make_files
from short_evaluations import offline  # noqa: F401, a fixture that every test uses

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("bad")
    make_files(made)
    return made


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_one_clear_line_and_the_exit_status(case, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    flags, message, *status = case
    before = sorted(folder.rglob("*"))
    ended, said = answer(flags)
    assert ended == (status or [2])[0] and message in said, said
    assert status or (said.startswith("evaluate.py: ") and said.count("\n") == 1 and "Traceback" not in said)
    assert sorted(folder.rglob("*")) == before  # nothing is left


def test_the_table_in_the_readme_has_every_case():
    text = (ROOT / "bench" / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(.+?)` \| (\d) \|", text[text.index("## Bad input") :], re.MULTILINE))
    assert rows == {flags: str((status or [2])[0]) for flags, _, *status in CASES}
