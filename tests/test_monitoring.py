"""Energy, trackers and the loss curve, with stand-ins for the packages that are optional."""

import re
import sys
import types

import pytest
import torch
from matplotlib.figure import Figure

from training import monitoring
from training.monitoring import EnergyMeter, collapse, draw_curve, joules, make_tracker, peak_memory

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


class NVMLError(Exception):
    pass


def test_a_gpu_is_asked_for_its_energy(monkeypatch):
    """NVML counts in millijoules."""

    def energy(handle):
        if handle != "GPU-0a1b":
            raise NVMLError
        return 7_200_000

    nvml = types.SimpleNamespace(nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=str, NVMLError=NVMLError, __spec__=1)
    nvml.nvmlDeviceGetTotalEnergyConsumption = energy
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="0a1b"))
    assert joules(GPU) == 7200 and joules(CPU) is None
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="other"))
    assert joules(GPU) is None


@pytest.mark.parametrize(
    "before, answers, readings",
    [
        (0.0, [100.0, 100.0, 350.0], [0.0, 250.0]),
        (50.0, [100.0, 110.0, 350.0], [60.0, 300.0]),  # of a resumed run
        (0.0, [100.0, None, 350.0], [None, 250.0]),  # NVML does not answer for a while
        (0.0, [None, 100.0, 350.0], [None, None]),  # what was used before its first answer is not known
        (None, [100.0, 110.0, 350.0], [None, None]),
    ],
)
def test_energy_is_a_difference_and_none_where_it_is_not_known(monkeypatch, before, answers, readings):
    answer = iter(answers)
    monkeypatch.setattr(monitoring, "joules", lambda device: next(answer))
    meter = EnergyMeter(GPU, before)
    assert [meter.read(), meter.read()] == readings


def test_peak_memory_is_in_gib():
    assert 0.05 < peak_memory(CPU) < 64


ROWS = [{"step": 3, "loss": 1.5, "accuracy": 0.25}, {"step": 4, "loss": None, "accuracy": 0.5, "validation": 0.75}]


def test_no_tracker_takes_the_numbers_nowhere(tmp_path):
    make_tracker(None, tmp_path, "id", 1, {})(ROWS[0])
    assert not list(tmp_path.iterdir())


def test_tensorboard_gets_every_number_of_a_step(tmp_path, monkeypatch):
    scalars, writers = [], []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            writers.append((folder, purge_step))

        def add_scalar(self, *scalar):
            scalars.append(scalar)

        def flush(self):
            scalars.append("flush")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    track = make_tracker("tensorboard", tmp_path, "id", 3, {})
    assert writers == [(str(tmp_path / "tensorboard"), 3)]
    track(ROWS[0])
    track(ROWS[1])
    assert set(scalars) == {("loss", 1.5, 3), ("accuracy", 0.25, 3), ("accuracy", 0.5, 4), ("validation", 0.75, 4), "flush"}


def test_the_curve_is_a_picture_of_losses_and_scores(tmp_path):
    draw_curve(ROWS[:1], tmp_path / "one.png")
    draw_curve(ROWS, tmp_path / "two.png")
    pictures = [(tmp_path / name).read_bytes() for name in ("one.png", "two.png")]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures) and pictures[0] != pictures[1]


def test_the_curve_names_its_axes_and_lines(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: (figures.append(figure), path.touch()))
    draw_curve(ROWS, tmp_path / "two.png", "held-out accuracy")
    (figure,) = figures
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "training loss (left)",
        "in-batch accuracy (right)",
        "held-out accuracy (right)",
    ]
    left, right = figure.axes
    assert (left.get_xlabel(), left.get_ylabel()) == ("training step", "InfoNCE loss (nats)")
    assert right.get_ylabel() == "in-batch accuracy, held-out accuracy"


def row(step: int, spread: float | None = 0.5, negatives: int = 3, loss: float | None = 1.1) -> dict:
    return {"step": step, "spread": spread, "negatives": negatives, "loss": loss}


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([], None),
        ([row(1), row(2), row(3)], None),
        ([row(1, 0), row(2, 0), row(3, 0)], None),  # the base's vectors, before the warm-up is over
        ([row(3, 0), row(4, 0)], None),
        ([row(3, 0), row(4), row(5, 0)], None),
        ([row(3, 0), row(4, 0), row(5, 0)], r"same vector, and the loss is that of chance \(1\.10\)"),
        ([row(2), row(3, 1e-4), row(4, 9e-4), row(5, 0)], "same vector"),
        ([row(3, 0), row(4, None, loss=None), row(5, 0)], None),  # a step that was skipped
        ([row(1, negatives=0), row(2, negatives=0), row(3, negatives=0)], "no text has a negative"),
        ([row(1, negatives=0), row(2, negatives=0)], None),
        ([{"step": 9, "loss": 1.0, "negatives": 3}] * 3, None),  # of a run that began with an older version
    ],
)
def test_a_collapse_is_three_steps_in_a_row(rows, problem):
    found = collapse(rows, warmup_steps=2)
    assert found is None if problem is None else re.search(problem, found)


def test_at_the_end_of_a_short_run_fewer_steps_tell():
    assert collapse([row(1, 0), row(2, 0)], 1, least=1) and not collapse([row(1, 0)], 1, least=1)
    assert collapse([row(1, negatives=0)], 1, least=1) and not collapse([], 1, least=1)
