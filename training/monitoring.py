"""What a run costs and how it goes: energy, peak memory, a tracker, collapse, the loss curve; and the signals that ask it to stop."""

import contextlib
import importlib.util
import math
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from files.writing import write_atomic

if TYPE_CHECKING:
    import torch

ALIKE = 1e-3  # vectors of a batch whose spread (training/losses.py) is below this are all the same, for all that the loss can see
STEPS_TO_BELIEVE = 3  # that must look collapsed in a row


def joules(device: "torch.device") -> float | None:
    """Energy that a GPU has used since its driver was loaded; None where that is not known.

    It comes from NVML through the package nvidia-ml-py. Older GPUs do not count.
    """
    if device.type != "cuda" or importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml
    import torch

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except pynvml.NVMLError:
        return None


class EnergyMeter:
    """Energy used by a device since the meter was made, on top of what was used before.

    before    joules; None: not known, and so the sum is not known either
    """

    def __init__(self, device: "torch.device", before: float | None):
        self.device, self.before, self.start = device, before, joules(device)

    def read(self) -> float | None:
        """Joules; None where the device does not tell, or no longer does."""
        now = joules(self.device)
        return None if None in (self.before, self.start, now) else self.before + now - self.start


def peak_memory(device: "torch.device") -> float | None:
    """GiB: the most that PyTorch allocated on a GPU, or that was resident on a CPU; None where the system does not tell."""
    if device.type == "cuda":
        import torch

        return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 2)


def make_tracker(kind: str | None, folder: Path, run_id: str, first_step: int, arguments: dict) -> Callable[[dict], None]:
    """A function that takes the numbers of every step besides metrics.jsonl.

    kind          None: it does nothing; "tensorboard": it writes below `folder`; "wandb": it sends them to Weights & Biases
    run_id        a resumed run goes on under the same id
    first_step    numbers of this and later steps that TensorBoard has already, from before a resumption, are hidden
    """
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

        def track(row: dict) -> None:
            for name in row.keys() - {"step"}:
                if row[name] is not None:
                    writer.add_scalar(name, row[name], row["step"])
            writer.flush()

        return track
    if kind == "wandb":
        import wandb

        run = wandb.init(name=folder.name, dir=str(folder), id=run_id, resume="allow", config=arguments)
        return lambda row: run.log(row, step=row["step"])
    return lambda row: None


def collapse(rows: list[dict], warmup_steps: int, least: int = STEPS_TO_BELIEVE) -> str | None:
    """What is wrong where the last steps learned nothing: all vectors of a batch were the same, or no text had a negative.

    rows            of metrics.jsonl
    warmup_steps    during which a base whose vectors are all alike has had no time to change: they do not count as collapsed
    least           steps that must look so
    """
    last = rows[-STEPS_TO_BELIEVE:]
    if len(last) >= least and not any(row["negatives"] for row in last):
        return "no text has a negative: the texts of a batch are copies of each other, or --mask-above leaves none of them"
    last = [row for row in last if row["step"] > warmup_steps]
    if len(last) >= least and all(row.get("spread") is not None and row["spread"] < ALIKE for row in last):
        return f"all texts have the same vector, and the loss is that of chance ({last[-1]['loss']:.2f}): lower --lr"
    return None


def draw_curve(rows: list[dict], path: Path, validation: str = "validation") -> None:
    """Draw loss, in-batch accuracy and validation scores (what they are: `validation`) of the rows of metrics.jsonl as a PNG file."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, loss_axis = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = [row["step"] for row in rows]
    losses = [math.nan if row["loss"] is None else row["loss"] for row in rows]
    lines = loss_axis.plot(steps, losses, color="tab:blue", linewidth=1, label="training loss (left)")
    loss_axis.set(xlabel="training step", ylabel="InfoNCE loss (nats)")
    loss_axis.set_title(path.parent.name, parse_math=False)
    share_axis = loss_axis.twinx()
    accuracies = [row["accuracy"] for row in rows]
    lines += share_axis.plot(steps, accuracies, color="tab:orange", linewidth=1, label="in-batch accuracy (right)")
    scores = [(row["step"], row["validation"]) for row in rows if "validation" in row]
    if scores:
        lines += share_axis.plot(*zip(*scores, strict=True), color="tab:green", marker="o", linewidth=1, label=f"{validation} (right)")
    share_axis.set(ylabel="in-batch accuracy" + (f", {validation}" if scores else ""), ylim=(0, 1.02))
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False)
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    plt.close(figure)


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, so that a step can be completed. A second signal of the same kind kills."""
    received = []

    def handle(number, _) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
