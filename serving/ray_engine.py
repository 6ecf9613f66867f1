"""`embed.py --engine ray`: the parts of one job divided among workers of a Ray cluster.

The dataset is the numbers of the parts that are missing; `map_batches` gives them to workers (actors), each of which keeps a model,
reads the part from the file itself and writes it, complete or not at all. No text and no vector travels through Ray. File, model,
folder and this checkout must therefore lie under the same paths on every machine. What a killed job has written stays, and a
plain job may go on with it, as a Ray job with a plain one's.

The cluster is that of RAY_ADDRESS, or the one `ray start` has begun on this machine, or this machine alone.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from files.console import InputError
from serving.embedding import Model, Source, describe, vectors_of
from serving.vectors import Part, VectorFolder


@dataclass(frozen=True)
class Work:
    """What a worker has to know. Paths are absolute: workers may run in another folder."""

    model: Model
    source: Source
    role: str
    out: Path


class Done(NamedTuple):
    """A part that has been written."""

    n_rows: int
    n_failed: int
    n_truncated: int
    max_tokens: int
    notes: list[str]  # such as memory that ran out


class PartWorker:
    """Keeps a model, and writes the parts whose numbers it is given."""

    def __init__(self, work: Work):
        self.work, self.encoder, self.folder = work, work.model.load(), VectorFolder.open(work.out)
        self.parts, self.next = iter(()), -1

    def read(self, number: int) -> Part:
        """Parts mostly come in order: those of a file that must be read from its beginning are read on."""
        if self.work.source.jumps or not 0 <= self.next <= number:
            self.parts, self.next = self.work.source.parts(number), number
        part = next(part for part in self.parts if part.number == number)  # those between are other workers'
        self.next = number + 1
        return part

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        """{"number": (1,)} -> one row of `Done`."""
        from encoder import EncodingReport

        report = EncodingReport()
        part, vectors = vectors_of(self.encoder, self.read(int(batch["number"][0])), self.work.role, report)
        self.folder.write(part, vectors)
        done = Done(part.size, len(part.failed), report.n_truncated, report.max_tokens or 0, report.notes)
        return {"done": [json.dumps(done)]}


class Cluster:
    """A connection to Ray, and what each of the workers gets of it.

    workers    their number (default: one for each GPU, else for each CPU)
    device     "cpu": leave GPUs alone
    Raises InputError where Ray is not installed, or the cluster is smaller.
    """

    def __init__(self, workers: int | None, device: str | None):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
        try:
            import ray.data
        except ImportError:
            raise InputError("--engine ray needs Ray: pip install -r requirements-extras.txt") from None
        self.ray = ray
        try:
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(f"no connection to Ray ({' '.join(str(error).split())[:200]}): is RAY_ADDRESS right?") from None
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors come back, and are one line
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        unit = "GPU" if device != "cpu" and any(node.get("GPU") for node in nodes) else "CPU"
        units = [int(node.get(unit, 0)) for node in nodes]
        self.workers = workers or sum(units)
        if not 0 < self.workers <= sum(units):
            raise InputError(f"--workers {self.workers}: this Ray cluster has {sum(units)} {unit}s, and each worker needs one")
        # as many CPUs for each as there are where all workers find a place; Ray makes it their number of threads
        share = next(n for n in range(max(units), 0, -1) if sum(held // n for held in units) >= self.workers)
        self.resources = {"num_gpus": 1} if unit == "GPU" else {"num_cpus": share}

    def describe(self, model: Model) -> tuple[dict, list[str]]:
        """`describe` of the model as a worker loads it, and the encoder's notes."""

        def load() -> tuple[dict, list[str]]:
            encoder = model.load()
            return describe(encoder), encoder.notes

        with self.errors():
            return self.ray.get(self.ray.remote(**self.resources)(load).remote())

    def embed(self, work: Work, numbers: list[int]) -> Iterator[Done]:
        """Write the parts of these numbers. Raises InputError with what a worker says."""
        if not numbers:
            return
        n_workers = min(self.workers, len(numbers))
        dataset = self.ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers))
        pool = self.ray.data.ActorPoolStrategy(size=n_workers, max_tasks_in_flight_per_actor=2)
        dataset = dataset.map_batches(PartWorker, fn_constructor_args=(work,), batch_size=1, compute=pool, **self.resources)
        with self.errors():
            for row in dataset.iter_rows():
                yield Done(*json.loads(row["done"]))

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turns an InputError or OSError of a worker into an InputError here."""
        try:
            yield
        except self.ray.exceptions.RayError as error:
            cause = error
            while cause is not None and not isinstance(cause, (InputError, OSError)):
                cause = getattr(cause, "cause", None) or cause.__cause__
            if cause is None:
                raise
            raise InputError(str(cause)) from None
