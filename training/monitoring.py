"""What a run costs and how it goes: energy, peak memory, a tracker, the loss curve; and the signals that ask it to stop."""

import contextlib
import importlib.util
import math
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from files.writing import write_atomic


def joules(device: torch.device) -> float | None:
    """Energy that a GPU has used since its driver was loaded; None where that is not known.

    It comes from NVML through the package nvidia-ml-py. Older GPUs do not count.
    """
    if device.type != "cuda" or importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

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

    def __init__(self, device: torch.device, before: float | None):
        self.device, self.before, self.start = device, before, joules(device)

    def read(self) -> float | None:
        """Joules; None where the device does not tell, or no longer does."""
        now = joules(self.device)
        return None if None in (self.before, self.start, now) else self.before + now - self.start


def peak_memory(device: torch.device) -> float | None:
    """GiB: the most that PyTorch allocated on a GPU, or that was resident on a CPU; None where the system does not tell."""
    if device.type == "cuda":
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


def draw_curve(rows: list[dict], path: Path) -> None:
    """Draw loss, in-batch accuracy and validation scores of the rows of metrics.jsonl as a PNG file."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, loss_axis = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = [row["step"] for row in rows]
    loss_axis.plot(steps, [math.nan if row["loss"] is None else row["loss"] for row in rows], color="tab:blue", linewidth=1)
    loss_axis.set(xlabel="step", ylabel="InfoNCE loss, nats")
    loss_axis.set_title(f"{path.parent.name}: training loss and in-batch accuracy", parse_math=False)
    share_axis = loss_axis.twinx()
    share_axis.plot(steps, [row["accuracy"] for row in rows], color="tab:orange", linewidth=1)
    scores = [(row["step"], row["validation"]) for row in rows if "validation" in row]
    if scores:
        share_axis.plot(*zip(*scores, strict=True), color="tab:green", marker="o", linewidth=1, label="validation")
        share_axis.legend(loc="lower right")
    share_axis.set(ylabel="anchors whose positive comes first; validation", ylim=(0, 1))
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
