"""Train a vision model on your own patches without labels, in the manner of DINOv2, and keep the step that validation likes best.

    python -m pathology.finetune tiles/ --init dinov2-small --labels labels.csv --hours 2 --out runs/mine       # one GPU
    python -m pathology.finetune patches.zip --pattern '(?P<patient>[0-9]+)_.*class(?P<label>[01])' --out runs/mine
    python -m pathology.finetune tiles/ --init runs/base --global-crop 56 --local-crop 28 --batch 16 --prototypes 512 --steps 50  # a CPU
    python -m pathology.finetune --out runs/mine --resume                                          # go on after an interruption
    torchrun --nproc-per-node 8 -m pathology.finetune tiles/ --init dinov2-giant --batch 32         # 8 GPUs, 256 patches a step

Reads tiles with pixels (tile.py --save-pixels), or a folder or zip of pictures. The loss needs no labels (pathology/dino.py). Where there
are labels, every so often a kNN probe of k = 20 asks how well the patches of validation patients find their class among those of
training patients, and the step with the best balanced accuracy is kept. More steps are not better: in the curves released with
Roth et al. (ISBI 2024) the score is highest at 2,000 steps and falls by 10,000. Training sees training patients alone; validation chooses;
test patients are not read at all. Patients are drawn by --split-seed, or come from the column split of --labels.

Leaves behind, in --out:

    config.json, model.safetensors, embedding.json    the teacher (EMA), as transformers' from_pretrained and extract.py --model load it
    arguments.json                                    all arguments, versions, commit
    metrics.jsonl                                     the numbers of every step, one line each
    checkpoint.safetensors, checkpoint.previous...    the last two checkpoints
    summary.json                                      steps, the kept one, scores, cost; written at the very end

Defaults are the paper's. The learning rate is --lr times sqrt(patches of a step / 1024).
"""

import argparse
import contextlib
import json
import math
import shlex
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from encoder.contract import ARGUMENTS_FILE, SUMMARY_FILE
from encoder.processes import distributed, end_distributed, wait_for_all
from files.arguments import count, not_negative, positive_int, probability, seconds, seed
from files.console import InputError, Progress, duration, run_script, say, warn
from files.writing import WriteError, append_line, write_atomic, write_json, write_text
from training.monitoring import catch_signals, peak_memory
from training.optimization import learning_rate
from training.run_record import (
    METRICS,
    after_a_failed_write,
    check_out,
    check_record,
    has_checkpoint,
    make_record,
    read_metrics,
    read_record,
    reserve,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

    from pathology.checkpoint import State
    from pathology.dino import Losses, Network
    from pathology.models import PatchModel
    from pathology.patches import Patches

WEIGHTS = "model.safetensors"
DEFAULT_STEPS = 2000
K, MAX_REFERENCES, MAX_QUERIES = 20, 5000, 2000  # of the probe
TRIAL_STEPS = 3  # that --hours is measured by, after a first one
COLLAPSED, COLLAPSED_SHARE, STEPS_TO_BELIEVE = 1e-4, 0.05, 3  # variance of the features, and its share of that of the first step


# ------------------------------------------------------------------------------------------------------- the command line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pathology.finetune", description=__doc__.split("\n")[0])
    add_data_arguments(parser.add_argument_group("patches and model").add_argument)
    add_training_arguments(parser.add_argument_group("training").add_argument)
    add_run_arguments(parser.add_argument_group("validation, checkpoints, machine").add_argument)
    return parser


def add_data_arguments(add) -> None:
    add("source", type=Path, nargs="?", help="tiles with pixels (tile.py --save-pixels), or a folder or zip of pictures")
    add("--init", default="dinov2-small", help="a preset, a folder, a hub id, or random:PRESET (default dinov2-small)")
    add("--revision", help="of a hub model (default: the newest)")
    add("--labels", type=Path, help="csv: slide, label, patient of tiles; file, label, patient and perhaps split of pictures")
    add("--pattern", help="regular expression with groups label and patient that fits the names of pictures, in place of --labels")
    add("--split-seed", type=seed, default=0, help="draws the patients of training, validation and test (default 0)")
    add("--out", type=Path, help="folder of the run (default runs/ and the name of --init)")


def add_training_arguments(add) -> None:
    add("--steps", type=positive_int, help="length of the training (default 2000)")
    add("--hours", type=seconds, help="take as many steps as fit into this time, by a trial, in place of --steps")
    add("--batch", type=positive_int, default=256, help="patches per step and process (default 256)")
    add("--lr", type=not_negative, default=2e-4, help="peak learning rate of 1,024 patches a step (default 2e-4)")
    add("--warmup-ratio", type=probability, default=0.1, help="share of the steps in which the learning rate rises (default 0.1)")
    add("--layer-decay", type=probability, default=0.9, help="factor of the learning rate from each layer to the one below (default 0.9)")
    add("--weight-decay", type=not_negative, nargs=2, default=[0.04, 0.4], help="at the first and last step (default 0.04 0.4)")
    add("--max-grad-norm", type=not_negative, default=3.0, help="clip gradients to this norm (default 3)")
    add("--global-crop", type=positive_int, default=224, help="pixels of the two global views (default 224)")
    add("--local-crop", type=positive_int, default=98, help="pixels of the local views (default 98)")
    add("--local-crops", type=count, default=8, help="local views of a patch (default 8)")
    add("--prototypes", type=positive_int, default=65536, help="of each head (default 65536)")
    add(
        "--momentum",
        type=probability,
        default=0.992,
        help="of the teacher at the first step, 1 at the last; less for short runs (default 0.992)",
    )
    add("--gradient-checkpointing", action="store_true", help="compute layers again in the backward pass, to save memory (default: do not)")
    add("--koleo", type=not_negative, default=0.1, help="weight of KoLeo (default 0.1)")
    add("--seed", type=seed, default=0, help="of heads, order, views and masks (default 0)")


def add_run_arguments(add) -> None:
    add("--validate-every", type=positive_int, default=100, help="steps between probes (default 100)")
    add("--checkpoint-every", type=positive_int, default=100, help="steps between checkpoints (default 100)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out (default: begin)")
    add("--dtype", default="auto", help="auto, float32 or bfloat16, of autocast (default auto: bfloat16 where it is fast)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is a GPU, else cpu)")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. With --resume, arguments that are not given are those of the saved run. Raises InputError."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / Path(args.init.removeprefix("random:")).name
    if args.resume:
        record = args.out / ARGUMENTS_FILE
        if not record.is_file():
            raise InputError(f"--resume: {args.out} holds no run. Correct --out, or begin a run there without --resume")
        saved = read_record(record)["arguments"]
        parser.set_defaults(**{name: value for name, value in saved.items() if name not in ("resume", "out", "device")})
        args = argparse.Namespace(**vars(parser.parse_args(argv)) | {"out": args.out})
        args.source, args.labels = (path and Path(path) for path in (args.source, args.labels))
    check_arguments(args)
    return args


def check_arguments(args: argparse.Namespace) -> None:
    if args.source is None:
        raise InputError("name the patches: a folder of tiles, or a folder or zip of pictures")
    if args.labels and args.pattern:
        raise InputError("--labels and --pattern both name labels: take one of them")
    if args.hours and args.steps:
        raise InputError("--hours and --steps both say how long: take one of them")
    if args.local_crops and args.local_crop > args.global_crop:
        raise InputError(f"--local-crop {args.local_crop} is larger than --global-crop {args.global_crop}")
    for flag, path in (("source", args.source), ("--labels", args.labels)):
        if path and not path.exists():
            raise InputError(f"{flag}: no file or folder {path}")


# ------------------------------------------------------------------------------------------------------------- the run


@dataclass
class Run:
    """What the loop needs. train, references, queries: numbers of patches; the last two are empty where there is no probe."""

    args: argparse.Namespace
    patches: "Patches"
    train: "np.ndarray"
    references: "np.ndarray"
    queries: "np.ndarray"
    model: "PatchModel"
    device: "torch.device"
    dtype: "torch.dtype"
    student: "Network" = None
    teacher: "Network" = None
    optimizer: "torch.optim.Optimizer" = None
    state: "State" = None
    rows: list[dict] = field(default_factory=list)
    reader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    ahead: "tuple[int, Future] | None" = None  # a step and its pixels, which are read while the step before it is computed

    @property
    def step_size(self) -> int:
        """Patches of a step, over all processes."""
        return self.args.batch * distributed().world_size


def prepare(args: argparse.Namespace) -> Run:
    """Read patches and model. Raises InputError where there are too few patches, or the model cannot be trained."""
    import numpy as np
    import torch

    from encoder.runtime import pick_device, pick_dtype
    from pathology.dino import check_backbone
    from pathology.models import load_model
    from pathology.patches import read_patches

    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device, training=True)
    model = load_model(args.init, revision=args.revision, device="cpu", dtype=torch.float32, seed=args.seed)
    check_backbone(model.module, (args.global_crop, *([args.local_crop] if args.local_crops else [])))
    patches = read_patches(args.source, args.labels, args.pattern)
    split = patches.split(args.split_seed) if args.labels or args.pattern else np.full(len(patches), "train")
    train, validation = np.flatnonzero(split == "train"), np.flatnonzero(split == "validation")
    rng = np.random.default_rng(args.split_seed)
    references, queries = (np.sort(rng.permutation(rows)[:most]) for rows, most in ((train, MAX_REFERENCES), (validation, MAX_QUERIES)))
    if not patches.labelled or len(set(patches.labels[queries])) < 2 or len(references) < K:
        warn("no probe, which needs labels and two classes among validation patients: the last step is kept, which may not be the best")
        references = queries = train[:0]
    run = Run(args, patches, train, references, queries, model, device, dtype)
    if len(train) < run.step_size:
        raise InputError(f"{args.source}: {len(train)} patches of training patients, {run.step_size} are asked for a step: lower --batch")
    return run


def set_up(run: Run, steps: int) -> None:
    """Student, teacher and optimizer as they are before the first step; the same whenever it is called."""
    import torch

    from pathology.checkpoint import State
    from pathology.dino import Network, parameter_groups, resized, trained_parameters

    torch.manual_seed(run.args.seed)
    backbone = resized(run.model.module, run.args.global_crop)
    run.student = Network(backbone, run.args.prototypes).train()
    run.teacher = Network(resized(run.model.module, run.args.global_crop), run.args.prototypes).eval()
    run.teacher.load_state_dict(run.student.state_dict())
    run.teacher.requires_grad_(False)
    if run.args.gradient_checkpointing:
        run.student.backbone.gradient_checkpointing_enable()
    trained = {name for name, _ in trained_parameters(run.student)}
    for name, parameter in run.student.named_parameters():
        parameter.requires_grad_(name in trained)
    for network in (run.student, run.teacher):
        network.to(run.device)
        if run.device.type == "cpu":  # PyTorch's fused attention makes a step 1.6 times as long there: short rows, bfloat16
            network.backbone.set_attn_implementation("eager")
    run.optimizer = torch.optim.AdamW(parameter_groups(run.student, run.args.layer_decay), lr=0.0)
    run.state = State(steps)


def write_settings(run: Run) -> None:
    """config.json and embedding.json, so that `WEIGHTS` beside them make a model."""
    from pathology.models import write_embedding

    config = run.teacher.backbone.config
    config.architectures = [type(run.teacher.backbone).__name__]
    write_text(run.args.out / "config.json", config.to_json_string())
    write_embedding(run.args.out, rule=run.model.rule, input_size=run.args.global_crop, mean=run.model.mean, std=run.model.std)


def write_weights(run: Run) -> None:
    from safetensors.torch import save_file

    tensors = {name: tensor.cpu().contiguous() for name, tensor in run.teacher.backbone.state_dict().items()}
    write_atomic(run.args.out / WEIGHTS, lambda temporary: save_file(tensors, temporary, {"format": "pt"}))


def steps_in(run: Run, hours: float) -> int:
    """How many steps fit into the time, by a trial of a few, which are forgotten; the same number in all processes."""
    from encoder.processes import all_reduce_number

    set_up(run, steps=10**6)
    take_step(run)
    began = time.perf_counter()
    for _ in range(TRIAL_STEPS):
        take_step(run)
    per_step = all_reduce_number((time.perf_counter() - began) / TRIAL_STEPS, "max")
    steps = max(1, int(hours * 3600 / per_step))
    say(f"{per_step:.2f} s a step: {steps:,} steps fit into {duration(hours * 3600)}")
    return steps


# ------------------------------------------------------------------------------------------------------------ the loop


def rows_of(run: Run, step: int) -> "np.ndarray":
    """Numbers of this process's patches of a step: passes over all training patches, each in an order of its own."""
    import numpy as np

    per_pass = len(run.train) // run.step_size
    order = np.random.default_rng([run.args.seed, step // per_pass]).permutation(run.train)
    start = step % per_pass * run.step_size + distributed().rank * run.args.batch
    return order[start : start + run.args.batch]


def pixels_of(run: Run, step: int) -> "torch.Tensor":
    """Pixels (B, S, S, 3) uint8 of a step, on the device; those of the next one are read meanwhile."""
    import torch

    def read(number: int) -> "Future":
        return run.reader.submit(lambda: torch.from_numpy(run.patches.pixels[rows_of(run, number)]))

    _, pixels = run.ahead if run.ahead and run.ahead[0] == step else (step, read(step))
    run.ahead = (step + 1, read(step + 1)) if step + 1 < run.state.steps else None
    return pixels.result().to(run.device)


def take_step(run: Run) -> dict:
    """One step -> its numbers. All random numbers follow from seed, step and process: a resumed run draws the same."""
    import numpy as np
    import torch

    from pathology.crops import draw_masks, make_views
    from pathology.dino import FROZEN_PROTOTYPES, average_gradients, compute_losses, cosine, set_rates, teacher_temperature, update_teacher

    args, state, began = run.args, run.state, time.perf_counter()
    seed = int(np.random.SeedSequence([args.seed, state.step, distributed().rank]).generate_state(1)[0])
    torch.manual_seed(seed)  # of the model's own dropout
    mean, std = (torch.tensor(x, device=run.device) for x in (run.model.mean, run.model.std))
    pixels = pixels_of(run, state.step)
    views = make_views(pixels, args.global_crop, args.local_crop, args.local_crops, mean, std, torch.Generator().manual_seed(seed))
    grid = args.global_crop // run.model.module.config.patch_size
    masks = draw_masks(2 * args.batch, grid, np.random.default_rng(seed)).to(run.device)
    with torch.autocast(run.device.type, dtype=run.dtype, enabled=run.dtype != torch.float32):
        losses = compute_losses(run.student, run.teacher, views, masks, teacher_temperature(state.step, state.steps), args.koleo)
    if not math.isfinite(losses.total.item()):
        raise InputError(f"step {state.step + 1}: the loss is {losses.total.item()}: lower --lr")
    peak = args.lr * math.sqrt(run.step_size / 1024)
    lr = learning_rate(state.step, state.steps, peak, args.warmup_ratio)
    weight_decay = cosine(state.step, state.steps, *args.weight_decay)
    set_rates(run.optimizer, lr, weight_decay, state.step < FROZEN_PROTOTYPES * state.steps)
    run.optimizer.zero_grad()
    losses.total.backward()
    parameters = [p for group in run.optimizer.param_groups for p in group["params"] if p.grad is not None]
    average_gradients(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).item()
    run.optimizer.step()
    update_teacher(run.teacher, run.student, cosine(state.step, state.steps, args.momentum, 1.0))
    state.step += 1
    return step_metrics(state.step, losses, norm, lr, run.step_size / (time.perf_counter() - began))


def step_metrics(step: int, losses: "Losses", norm: float, lr: float, speed: float) -> dict:
    numbers = {name: getattr(losses, name).item() for name in ("total", "dino", "ibot", "koleo")}
    return {"step": step, "loss": numbers.pop("total"), **numbers, "variance": losses.variance, "grad_norm": norm, "lr": lr} | {
        "patches_per_second": round(speed, 2)
    }


def is_collapsed(rows: list[dict], first_variance: float) -> bool:
    """Whether the features of the last steps are all but the same: the loss can fall all the same."""
    limit = max(COLLAPSED, COLLAPSED_SHARE * first_variance)
    last = rows[-STEPS_TO_BELIEVE:]
    return len(last) == STEPS_TO_BELIEVE and all(row["variance"] < limit for row in last)


def probe(run: Run) -> float:
    """Balanced accuracy of validation patches by the teacher, by kNN among the patches of training patients."""
    from pathology.scores import knn_balanced_accuracy

    features = {name: embed(run, rows) for name, rows in (("references", run.references), ("queries", run.queries))}
    labels = run.patches.labels
    return knn_balanced_accuracy(features["references"], labels[run.references], features["queries"], labels[run.queries], K)


def embed(run: Run, rows: "np.ndarray") -> "np.ndarray":
    """Class tokens by the teacher (n, D) float32."""
    import numpy as np
    import torch

    from pathology.dino import tokens
    from pathology.models import normalized

    parts = []
    for start in range(0, len(rows), run.args.batch):
        pixels = torch.from_numpy(np.ascontiguousarray(run.patches.pixels[rows[start : start + run.args.batch]]))
        views = normalized(pixels, run.args.global_crop, run.model.mean, run.model.std).to(run.device)
        with torch.inference_mode(), torch.autocast(run.device.type, dtype=run.dtype, enabled=run.dtype != torch.float32):
            parts.append(tokens(run.teacher.backbone, views)[0].float().cpu())
    return torch.cat(parts).numpy()


def validate(run: Run) -> float | None:
    """The probe's score; the weights stay in the folder where it is the best so far. Without a probe the newest stay."""
    if distributed().rank:
        return None
    score = probe(run) if len(run.queries) else None
    if score is None or run.state.best_score is None or score > run.state.best_score:
        run.state.best_score, run.state.best_step = score, run.state.step
        write_weights(run)
    return score


def train(run: Run) -> int | None:
    """All steps from where the state is -> the number of a signal that ended them, else None."""
    from pathology.checkpoint import save_checkpoint

    args, state = run.args, run.state
    before, began = state.seconds, time.perf_counter()
    with catch_signals() as signals, Progress(state.steps, "training", "step", initial=state.step) as progress:
        while state.step < state.steps:
            row = take_step(run)
            state.first_variance = row["variance"] if state.first_variance is None else state.first_variance
            run.rows.append(row)
            if not state.collapsed and is_collapsed(run.rows, state.first_variance):
                state.collapsed = True
                warn(f"step {state.step}: collapse: all patches have nearly the same features (variance {row['variance']:.2g}): lower --lr")
            if state.step % args.validate_every == 0 or state.step == state.steps:
                row["validation"] = validate(run)
            stop = stop_signal(signals)
            state.seconds = before + time.perf_counter() - began
            if distributed().rank == 0:
                append_line(args.out / METRICS, json.dumps(row))
                if stop or state.step == state.steps or state.step % args.checkpoint_every == 0:
                    save_checkpoint(args.out, run.student, run.teacher, run.optimizer, state)
            progress.update(1, f"loss {row['loss']:.2f}, variance {row['variance']:.2g}")
            if stop and state.step < state.steps:
                return stop
    return None


def stop_signal(signals: list[int]) -> int:
    """The signal that any of the processes was sent, 0 for none."""
    from encoder.processes import all_reduce_number

    return all_reduce_number(signals[0] if signals else 0, "max")


# ------------------------------------------------------------------------------------------------------------- the end


def begin(run: Run, resuming: bool) -> None:
    """Bring student, teacher and folder to where training goes on from; a new run is validated before its first step."""
    from pathology.checkpoint import State, load_checkpoint, save_checkpoint
    from training.checkpoint_files import read_checkpoint

    out, rank = run.args.out, distributed().rank
    if resuming:
        set_up(run, read_checkpoint(out, State)[0].steps)
        run.state = load_checkpoint(out, run.student, run.teacher, run.optimizer)
        run.rows = read_metrics(out / METRICS, run.state.step)
        say(f"going on from step {run.state.step:,} of {run.state.steps:,}")
    else:
        set_up(run, steps_in(run, run.args.hours) if run.args.hours else run.args.steps or DEFAULT_STEPS)
        if rank == 0:
            save_checkpoint(out, run.student, run.teacher, run.optimizer, run.state)
    if run.state.step == 0:
        if rank == 0:
            write_settings(run)
        run.state.first_score = validate(run)
    if rank == 0:
        write_text(out / METRICS, "".join(json.dumps(row) + "\n" for row in run.rows))
    wait_for_all()
    score = "" if run.state.best_score is None else f", probe {run.state.best_score:.3f} at step {run.state.best_step}"
    parameters = sum(p.numel() for p in run.student.backbone.parameters())
    say(
        f"{run.args.init}: {parameters / 1e6:.1f} M parameters, {len(run.train):,} patches of "
        f"{len(set(run.patches.patients[run.train]))} training patients, {run.state.steps:,} steps of {run.step_size}, "
        f"{str(run.dtype).removeprefix('torch.')} on {run.device}{score}"
    )


def summarize(run: Run) -> dict:
    """What summary.json holds."""
    state, speeds = run.state, sorted(row["patches_per_second"] for row in run.rows)
    return {
        "steps": state.steps,
        "kept_step": state.best_step,
        "validation": state.best_score,
        "before_training": state.first_score,
        "validations": {row["step"]: row["validation"] for row in run.rows if row.get("validation") is not None},
        "collapsed": state.collapsed,
        "patches_per_second": speeds[len(speeds) // 2],
        "seconds": round(state.seconds, 1),
        "processes": distributed().world_size,
        "peak_memory_gib": peak_memory(run.device),
        "damaged": len(run.patches.damaged),
    }


def finish(run: Run, interrupted_by: int | None) -> None:
    state, out = run.state, run.args.out
    if distributed().rank:
        return
    if interrupted_by is not None:
        say(f"stopped after step {state.step} of {state.steps}: go on with --resume", error=True)
        sys.exit(128 + interrupted_by)
    write_json(out / SUMMARY_FILE, summarize(run))
    kept = ""
    if state.best_score is not None:
        kept = f", kept step {state.best_step} (kNN balanced accuracy {state.best_score:.3f}, before training {state.first_score:.3f})"
    say(f"{out}: {state.steps:,} steps{kept}, in {duration(state.seconds)}")
    if kept and state.best_step == 0:
        warn("no step was better on validation patients than the model it began with: that one was kept")
    if state.collapsed:
        warn("in this run all patches had nearly the same features at some step: do not trust its last steps, and lower --lr")
    say(f"next: {next_command(run.args)}")


def next_command(args: argparse.Namespace) -> str:
    """The command that evaluates the run on the test patients of its own division."""
    where = ["--pattern", args.pattern] if args.pattern else ["--labels", str(args.labels or "FILE")]
    seed = ["--split-seed", str(args.split_seed)] if args.split_seed else []
    return shlex.join(["python", "-m", "pathology.evaluate_patches", str(args.source), *where, *seed, "--model", str(args.out)])


def make_run(args: argparse.Namespace) -> None:
    rank = distributed().rank
    with contextlib.nullcontext() if rank else reserve(args.out):
        if rank == 0:
            check_out(args.out, args.resume)
        wait_for_all()
        record, resuming = make_record(args), args.resume and has_checkpoint(args.out)
        if resuming:
            check_record(args.out / ARGUMENTS_FILE, record)
            if (args.out / SUMMARY_FILE).is_file():
                say(f"{args.out} is finished: nothing to do")
                return
        run = prepare(args)
        if rank == 0:
            write_json(args.out / ARGUMENTS_FILE, record)
        try:
            begin(run, resuming)
            finish(run, train(run))
        except WriteError as error:
            raise InputError(f"{error}; {after_a_failed_write(args.out)}") from None
        except RuntimeError as error:
            from encoder.runtime import is_out_of_memory

            if not is_out_of_memory(error):
                raise
            raise InputError(
                f"memory ran out at {args.batch} patches a step: lower --batch or --prototypes, or add --gradient-checkpointing"
            ) from None


def main(args: argparse.Namespace) -> None:
    make_run(args)
    end_distributed()


if __name__ == "__main__":
    run_script(lambda: main(parse()))
