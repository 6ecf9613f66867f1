"""Jobs that take hours: every answer is on the disk as soon as it is there, and a killed job goes on where it stopped.

OUT.partial has a line of JSON for each thing that happened:

    {"settings": {...}}                          first: what the job was started with
    {"rows": [[number, {...}], ...]}             a finished batch: the number of each text, and its pair or error
    {"texts": 512, "digest": "..."}              all texts before number 512 are finished; the hash of their texts

A line that a kill has cut short is removed. Texts are taken in pools of POOL, within which an engine may take them in any order.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from files.console import InputError, Progress, say
from files.reading import excerpt
from files.writing import errors_of_writing
from pair_engines.outputs import lock

GIVE_UP = 20  # texts that fail, one after the other: none will do better
POOL = 512  # texts: enough to sort them by length, few enough to keep in memory


class Job(NamedTuple):
    """A text to be answered."""

    number: int  # of the text, counted from 0
    source: str  # FILE:ROW
    text: str
    template: str = ""  # name of the instruction


class Failure(NamedTuple):
    """Why there is no answer."""

    error: str


Answers = Iterable[list[tuple[Job, str | Failure]]]  # batch by batch
Answer = Callable[[list[Job]], Answers]  # jobs -> their answers, in any order


def durable_rows(path: Path, jobs: Iterable[Job], settings: dict, engine: str, load: Callable[[bool], Answer]) -> Iterator[dict]:
    """The pairs of the jobs in their order, and {"text", "source", "template", "error"} where there is no answer.

    path       of the partial file; the caller removes it when the pairs are safe elsewhere
    settings   a job that goes on must have been started with the same
    load       called when something is left to do -> what answers; its argument: whether there are answers already
    Raises InputError where the partial file is of other texts or settings, is damaged, or belongs to a running job, and where the first
    GIVE_UP texts all fail.
    """
    jobs = iter(jobs)
    first = next(jobs, None)  # what is wrong with the texts is said before anything is written
    with Journal(path, settings) as journal:
        answer, going_on = None, journal.n_done + len(journal.finished) > 0
        with Progress(None, "answered", "text", initial=journal.n_done + len(journal.finished)) as progress:
            for pool in pools(journal, itertools.chain([first] if first else [], jobs)):
                rest = [job for job in pool if not journal.has(job)]
                if rest:
                    answer = answer or load(going_on)
                    for answers in answer(rest) if going_on else with_the_first_success(answer(rest)):
                        going_on = True
                        journal.append([(job.number, as_row(job, found, engine)) for job, found in answers])
                        progress.update(len(answers))
                journal.close_pool(pool[-1].number + 1)
        yield from journal.rows()


def with_the_first_success(batches: Answers) -> Answers:
    """The batches, of which those before the first that holds an answer come together with it.

    Raises InputError where GIVE_UP texts or more fail before it: they are not kept, so that the next run tries them again.
    """
    batches, held = iter(batches), []
    for batch in batches:
        held += batch
        if not all(isinstance(found, Failure) for _, found in held):
            yield held
            yield from batches
            return
        if len(held) >= GIVE_UP:
            raise InputError(f"all of the first {len(held)} texts failed, the last with {held[-1][1].error}")
    if held:
        yield held


def as_row(job: Job, found: str | Failure, engine: str) -> dict:
    """The pair of a job, or what failed as a row that --input takes again."""
    texts = {"text": job.text} if isinstance(found, Failure) else {"anchor": job.text, "positive": found}
    row = texts | {"engine": engine, "source": job.source} | ({"template": job.template} if job.template else {})
    return row | ({"error": found.error} if isinstance(found, Failure) else {})


def in_halves(prompts: list, generate: Callable[[list], list[str]]) -> list[str | Failure]:
    """The answers to a batch. Where it fails, as when memory runs out, each half is tried, and so on down to a single prompt."""
    try:
        return generate(prompts)
    except (RuntimeError, MemoryError) as error:  # torch's errors of memory among them
        why = f"{type(error).__name__}: {excerpt(error)}"
    if len(prompts) == 1:
        return [Failure(why)]
    half = len(prompts) // 2
    return in_halves(prompts[:half], generate) + in_halves(prompts[half:], generate)


def pools(journal: "Journal", jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """The jobs that are not finished for certain, POOL at a time. Raises InputError where the finished ones had other texts."""
    pool, n_done = [], journal.n_done
    for job in jobs:
        if job.number >= n_done:
            journal.check()
        journal.digest.update(json.dumps([job.text, job.template]).encode())
        if job.number < n_done:
            continue
        pool.append(job)
        if len(pool) == POOL:
            yield pool
            pool = []
    journal.check()
    if pool:
        yield pool


class Journal:
    """The partial file of a job, locked for this process while it is open.

    n_done        texts before this number are finished
    finished      number -> row of later texts that are finished
    n_written     rows written by this process
    """

    def __init__(self, path: Path, settings: dict):
        self.path, self.n_done, self.finished, self.n_written = path, 0, {}, 0
        self.digest, self._digest, self._checked = hashlib.sha256(), hashlib.sha256().hexdigest(), False
        with errors_of_writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b")  # noqa: SIM115, closed by __exit__
        lock(self._file, path)
        self._read(settings)

    def _read(self, settings: dict) -> None:
        end = 0
        for number, value in self._values():
            if number == 0 and value != {"settings": json.loads(json.dumps(settings))}:
                raise InputError(f"{self.path} is from a job with other texts or settings: run that job again, or delete the file")
            self.finished |= dict(value.get("rows", ()))
            if "texts" in value:
                self.n_done, self._digest, self.finished = value["texts"], value["digest"], {}
            end = self._file.tell()
        self._file.truncate(end)
        self._is_new = not end
        if end:
            say(f"{self.path}: continuing, {self.n_done + len(self.finished)} texts are already answered")
        else:
            self._write({"settings": settings})

    def _values(self) -> Iterator[tuple[int, dict]]:
        """Number and value of every complete line."""
        self._file.seek(0)
        for number, line in enumerate(iter(self._file.readline, b"")):
            if not line.endswith(b"\n"):
                return
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if not isinstance(value, dict):
                raise InputError(f"{self.path}, line {number + 1}, is damaged: delete the file, and begin again")
            yield number, value

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        if self._is_new and not self.n_written:
            self.path.unlink(missing_ok=True)  # nothing was answered
        self._file.close()

    def _write(self, value: dict) -> None:
        with errors_of_writing(self.path):
            self._file.write((json.dumps(value, ensure_ascii=False) + "\n").encode())
            self._file.flush()
            os.fsync(self._file.fileno())

    def append(self, rows: list[tuple[int, dict]]) -> None:
        """Keep a finished batch."""
        self.n_written += len(rows)
        self._write({"rows": rows})

    def close_pool(self, n_texts: int) -> None:
        """All texts before this number are finished."""
        self._write({"texts": n_texts, "digest": self.digest.hexdigest()})

    def has(self, job: Job) -> bool:
        """Whether a text is finished. Raises InputError where another text had its number."""
        row = self.finished.get(job.number)
        if row is not None and (row.get("anchor", row.get("text")), row.get("template", "")) != (job.text, job.template):
            self._raise_other_texts()
        return row is not None

    def check(self) -> None:
        """Called when the finished texts have come by: raises InputError where they are not those of the job that began."""
        if not self._checked and self.digest.hexdigest() != self._digest:
            self._raise_other_texts()
        self._checked = True

    def _raise_other_texts(self) -> None:
        raise InputError(f"{self.path} is from a job with other texts or settings: run that job again, or delete the file")

    def rows(self) -> Iterator[dict]:
        """The rows of all finished texts, in the order of the texts."""
        pool = {}
        for _, value in self._values():
            pool |= dict(value.get("rows", ()))
            if "texts" in value:
                yield from (pool[number] for number in sorted(pool))
                pool = {}
