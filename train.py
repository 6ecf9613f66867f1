"""Train a LoRA adapter that turns a language model into a text-embedding model, by contrastive learning on positive pairs.

    python train.py                                              # the bundled model on docstring pairs, minutes on a CPU
    python train.py --pairs pairs/mine --out runs/mine           # on your own texts (make_pairs.py auto)
    python train.py --pairs pairs/mine.jsonl --out runs/mine     # on your own pairs (its other engines)
    python train.py --model mistral-7b --pairs pairs/mine.jsonl  # one 24 GB GPU
    python train.py --pairs a.jsonl b.jsonl --weights 2 1        # two sources, two thirds of each batch from the first
    python train.py --out runs/mine --resume                     # go on after an interruption
    python train.py --model runs/mine --pairs more.jsonl --out runs/more    # train the adapter of a run on
    torchrun --nproc-per-node 8 train.py --batch-size 4096       # several GPUs share every batch

The loss is symmetric InfoNCE over the batch: each anchor must find its positive among all positives and hard negatives of the
batch, and each positive its anchor; copies of either text do not count as negatives. Only the adapter is trained. A batch that
does not fit into memory is run in chunks, with the same gradient (GradCache). Pairs stay on disk, in files of any size: JSONL, csv, tsv
or parquet with columns anchor, positive and perhaps negative, and `prompt` where pairs have prompts of their own (a preset or a string
with {text}; the others are given --prompt). --validation takes the same kinds, with columns text and label.

Leaves behind, in --out (default runs/MODEL):

    adapter_model.safetensors, adapter_config.json    the adapter, as peft writes it; pooling.safetensors with pooling `query`
    embedding.json                                    the embedding contract (encoder/contract.py)
    arguments.json                                    all arguments, versions, commit
    metrics.jsonl, loss.png                           the numbers of every step, one line each; their curve
    adapters/step-000020/ ...                         with --keep-adapters, the adapter of that step, which every script takes as a run
    checkpoint.safetensors, checkpoint.previous...    the last two checkpoints: adapter, optimizer, random generators
    summary.json                                      steps, the best of them, pairs, tokens, cost; written at the very end
    .lock                                             while a run is at work in the folder; one that a kill left behind does no harm

Texts with a teacher (make_pairs.py auto) are learned by distillation beside InfoNCE, see training/losses.py, and the last step is kept.
Of pairs alone some are held out, unless there are fewer than 80. Every so often validation counts how many of their anchors find their
positives (or, with --validation, how well labelled texts cluster). The adapter that stays in --out is the best that validation has
seen, or the latest of those within one standard error of it.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import math
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from encoder.contract import ARGUMENTS_FILE, POOLING_PRESETS, POOLINGS, QUANTIZATIONS, SCOPES, SUMMARY_FILE, Contract, check_trainable
from encoder.names import PRESETS, Preset, base_of, check_dtype, check_prompts, find_base, is_run, read_lora_settings
from encoder.processes import all_reduce_number, distributed, end_distributed, wait_for_all
from files.arguments import layer, share
from files.console import InputError, Progress, run_script, say, short_path, warn
from files.reading import file_kind
from files.writing import WriteError, append_line, write_json
from prompts import PROMPTS, get_prompt, prompt_label
from serving.folder import runtimes_for, serving_note
from training.monitoring import EnergyMeter, catch_signals, collapse, draw_curve, make_tracker
from training.optimization import MIN_TEMPERATURE, TEMPERATURE, learning_rate, n_warmup_steps
from training.own_texts import is_own_texts, read_recipe
from training.pair_data import check_pair_files, prefetch
from training.run_record import (
    METRICS,
    after_a_failed_write,
    check_out,
    check_record,
    has_checkpoint,
    keep_adapter,
    kept_steps,
    make_record,
    plain_arguments,
    read_record,
    reserve,
    summarize,
)

if TYPE_CHECKING:  # slow to import, so that errors of the flags come first
    from torch import Tensor

    from training.losses import LossResult
    from training.pair_data import PairBatch
    from training.plan import Run

ROOT = Path(__file__).resolve().parent
DEFAULT_PAIRS = ROOT / "pairs" / "docstrings.jsonl"
OTHER_MODELS = Preset("", batch_size=120, lr=1e-4)  # the training defaults of models that are no preset
# Poolings that learn long texts from their beginnings. A last token has to see texts as long as it will read (bench/README.md).
READ_FROM_BEGINNINGS = ("mean", "position-mean")
MAX_UNLABELLED = 1000  # texts that a finished run is compared with its base on: seconds
MAX_SKIPPED_IN_A_ROW = 2  # steps that were not finite; one more ends the run


# ------------------------------------------------------------------------------------------------------- the command line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_data_arguments(parser.add_argument_group("model and data").add_argument)
    add_contract_arguments(parser.add_argument_group("embedding contract").add_argument)
    add_loss_arguments(parser.add_argument_group("loss").add_argument)
    add_optimization_arguments(parser.add_argument_group("optimization").add_argument)
    add_run_arguments(parser.add_argument_group("validation, checkpoints, machine").add_argument)
    return parser


def add_data_arguments(add) -> None:
    add("--model", default="tiny", help=f"{', '.join(PRESETS)}, a folder, a hub id, or a run to train on (default tiny)")
    add("--pairs", type=Path, nargs="+", help="files of make_pairs.py, or of your own (default pairs/docstrings.jsonl, made if missing)")
    add(
        "--weights",
        type=float,
        nargs="+",
        help="share of each file of --pairs in training (default: in proportion to their pairs, or equal with a folder of auto)",
    )
    add(
        "--characters",
        type=int,
        help="of a longer text of make_pairs.py auto, train on the first so many and up to a tenth more "
        "(default: as auto advises with pooling mean or position-mean, else whole texts; 0: whole texts)",
    )
    add("--same-source-batches", action="store_true", help="draw every batch from a single file of --pairs: harder in-batch negatives")
    add(
        "--hold-out",
        type=int,
        default=256,
        help="pairs kept for validation, a twentieth of all at most, of fewer than 320 a tenth (default 256; 0: none)",
    )
    add("--validation", type=Path, help="file with columns text,label: validate by the V-measure of these texts, and hold no pairs out")
    add("--out", type=Path, help="folder of the run (default runs/MODEL beside train.py, with -on behind it where MODEL is a run)")


def add_contract_arguments(add) -> None:
    add("--prompt", help=f"{', '.join(PROMPTS)}, or a string with {{text}}; 'A || B' averages both (default cluster, or the run's own)")
    add("--query-prompt", metavar="PROMPT", help="of anchors, beside --prompt for positives (default: that of --prompt)")
    add(
        "--pooling",
        choices=(*POOLINGS, *POOLING_PRESETS),
        help="default: what a folder of make_pairs.py auto names, else last if the prompt goes on after the text, else mean",
    )
    add(
        "--scope",
        choices=SCOPES,
        help="which tokens are pooled: all, or those of the text alone (default: all for last and with a folder of auto, else text)",
    )
    add(
        "--keep-bos",
        action=argparse.BooleanOptionalAction,
        help="pool the BOS token too, with --scope all (default: leave it out, except from the mean that a folder of auto names)",
    )
    add("--layers", nargs="+", type=layer, metavar="LAYER", help="layers to average: -1 (after the final norm), 9, 80%% (default -1)")
    add("--embed-filter", type=share, metavar="SHARE", help="drop this share of the unembedding matrix's directions (default: none)")
    add("--attention-layer", type=layer, metavar="LAYER", help="of --pooling attention: whose attention weighs the tokens (default -1)")
    add("--max-tokens", type=int, help="truncate texts to this many tokens (default 512, or less for a model with fewer positions)")
    add("--attention", choices=("causal", "bidirectional"), help="default causal")
    add("--quantize", choices=QUANTIZATIONS, help="store the base's weights in 4 or 8 bits; needs bitsandbytes (default: as they are)")
    add("--override-contract", action="store_true", help="train a run on under another contract than its own (default: an error)")


def add_loss_arguments(add) -> None:
    add("--temperature", type=float, default=0.05, help="temperature of InfoNCE (default 0.05)")
    add("--learn-temperature", action="store_true", help="train the temperature too, starting from --temperature (default: keep it fixed)")
    add("--margin", type=float, default=0.0, help="subtract this from the cosine of each pair (default 0)")
    add("--mask-above", type=float, help="leave out negatives whose cosine to the positive is above this (default: keep all)")
    add(
        "--matryoshka",
        type=int,
        nargs="+",
        metavar="DIMS",
        help="also train the first DIMS numbers of each vector as a vector (default: whole vectors only)",
    )


def add_optimization_arguments(add) -> None:
    add("--batch-size", type=int, help="pairs per step (default: the preset's, 120 for other models; of few pairs an eighth)")
    add("--steps", type=int, help="length of the training (default: what a folder of make_pairs.py auto names, else see --epochs)")
    add("--epochs", type=float, help="passes over the pairs, unless --steps is given (default 1; up to 3 where that is under 20 steps)")
    add("--lr", type=float, help="peak learning rate (default: the preset's, 1e-4 for other models)")
    add("--warmup-ratio", type=float, default=0.1, help="share of the steps in which the learning rate rises (default 0.1)")
    add("--max-grad-norm", type=float, default=1.0, help="clip gradients to this norm (default 1.0)")
    add("--weight-decay", type=float, default=0.0, help="weight decay of AdamW (default 0)")
    add("--lora-rank", type=int, help="rank of the adapter (default: the preset's, 64 for other models)")
    add("--lora-alpha", type=int, help="scale of the adapter, divided by its rank (default: the rank)")
    add("--lora-targets", nargs="+", metavar="LAYER", help="names of the linear layers adapted, such as q_proj v_proj (default: all)")
    add("--lora-dropout", type=float, help="dropout on the adapter's inputs (default 0)")
    add(
        "--rslora",
        action="store_true",
        default=None,
        help="divide --lora-alpha by the square root of the rank (Kalajdzievski 2023, arXiv 2312.03732)",
    )
    add(
        "--dora",
        action="store_true",
        default=None,
        help="train magnitude and direction of the weights separately (Liu et al. 2024, arXiv 2402.09353)",
    )
    add("--chunk-size", type=int, help="pairs in memory at a time (default: the whole batch; halved when memory runs out)")
    add(
        "--gradient-checkpointing",
        type=int,
        nargs="?",
        const=1,
        metavar="N",
        help="compute every N-th layer again in the backward pass, to save memory; 1: all layers, 0: none "
        "(default: the preset's; more layers when memory runs out)",
    )
    add("--fsdp", action="store_true", help="under torchrun, divide the base's weights among the processes (FSDP2)")
    add("--seed", type=int, default=0, help="seed of the adapter's initial weights, the order of the pairs and dropout (default 0)")


def add_run_arguments(add) -> None:
    add("--validate-every", type=int, help="steps between validations (default 50; below 320 pairs a fifth of all steps, 50 at most)")
    add("--patience", type=int, help="end after this many validations without a better score (default: train all steps)")
    add("--checkpoint-every", type=int, default=50, help="steps between checkpoints (default 50)")
    add(
        "--keep-adapters",
        type=int,
        metavar="N",
        help="keep the adapters of N evenly spaced steps, the last being the run's (default: none)",
    )
    add("--track", choices=("tensorboard", "wandb"), help="write the numbers of every step there as well (default: metrics.jsonl only)")
    add(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in --out; with --pairs, begin where there is none (default: begin)",
    )
    add("--dtype", default="auto", help="auto, float32 or bfloat16, of the base and of autocast (default auto: bfloat16 where it is fast)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is a GPU, else cpu)")
    add("--trust-remote-code", action="store_true", help="run code that comes with a hub model (default: do not)")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. With --resume, arguments that are not given are those of the saved run.

    Raises InputError where there is no such run, unless the command names pairs and so says all that a new one needs.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    record = default_out(args) / ARGUMENTS_FILE
    if args.resume and record.is_file():
        parser.set_defaults(**{k: v for k, v in read_record(record)["arguments"].items() if k not in ("resume", "out", "device")})
        args = parser.parse_args(argv)
    elif args.resume and args.pairs:
        say(f"{record.parent} holds no run: beginning one")
    elif args.resume:
        raise InputError(f"--resume: {record.parent} holds no run. Correct --out, or begin a run there without --resume")
    return args


def default_out(args: argparse.Namespace) -> Path:
    return args.out or ROOT / "runs" / (Path(args.model).name + "-on" * is_run(args.model))


def preset_of(model: str) -> Preset:
    """The training defaults of a base, or of a run's base."""
    if not is_run(model):
        return PRESETS.get(model, OTHER_MODELS)
    base = Contract.read(model).base
    return next((preset for name, preset in PRESETS.items() if base in (name, preset.base)), OTHER_MODELS)


# ----------------------------------------------------------------------------------------- checks before anything is loaded


def complete_arguments(args: argparse.Namespace) -> None:
    """Fill in what the preset decides, or the run that is trained on. `prepare_data` decides batch size and epochs."""
    preset = preset_of(args.model)
    defaults = {"lr": preset.lr, "lora_rank": preset.lora_rank, "gradient_checkpointing": preset.gradient_checkpointing}
    defaults |= {"lora_dropout": 0.0, "rslora": False, "dora": False, "prompt": "cluster"}
    args.out = default_out(args)
    if is_run(args.model):
        args.model = str(Path(args.model).resolve())
        defaults |= read_lora_settings(Path(args.model)) | {"prompt": None}
        for name in ("lora_rank", "lora_alpha", "rslora", "dora", "lora_targets"):
            given, saved = getattr(args, name), defaults[name]
            if given is not None and (sorted(given) != sorted(saved) if name == "lora_targets" else given != saved):
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} {given}: the adapter of {args.model} was made with {saved}. Leave the flag out")
    args.pairs = [Path(path) for path in args.pairs or [DEFAULT_PAIRS]]
    defaults |= named_by_folders(args)
    if args.epochs:
        defaults.pop("steps", None)
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.lora_alpha = args.lora_rank if args.lora_alpha is None else args.lora_alpha


def named_by_folders(args: argparse.Namespace) -> dict:
    """Arguments that folders of make_pairs.py auto name, where no flag does.

    The steps of several folders add up. A run that is trained on keeps its pooling, and with --pooling of another kind than a mean
    no scope is named. Texts are cut if every folder says so, and only where the pooling is a mean.
    """
    recipes = [read_recipe(path)["train"] for path in args.pairs if is_own_texts(path)]
    if not recipes:
        return {}
    named = {"steps": sum(recipe.get("steps", 0) for recipe in recipes) or None}
    if is_run(args.model):
        pooling = Contract.read(args.model).pooling
    else:
        pooled = {name: recipes[-1][name] for name in ("pooling", "scope", "keep_bos") if name in recipes[-1]}
        pooling = args.pooling or pooled.get("pooling")
        if pooling != pooled.get("pooling"):
            pooled = {"scope": pooled["scope"]} if pooling in READ_FROM_BEGINNINGS and "scope" in pooled else {}
        if args.scope == "text":
            pooled.pop("keep_bos", None)
        named |= pooled
        pooling = POOLING_PRESETS.get(pooling, {}).get("pooling", pooling)
    if pooling in READ_FROM_BEGINNINGS and all("characters" in recipe for recipe in recipes):
        named["characters"] = max(recipe["characters"] for recipe in recipes)
    return named


def check_ranges(args: argparse.Namespace) -> None:
    """Raise InputError for a number that its flag does not allow. NaN fails every comparison."""
    rules = (
        (("lr", "temperature", "epochs", "max_grad_norm"), lambda x: 0 < x < math.inf, "above 0"),
        (("weight_decay",), lambda x: 0 <= x < math.inf, "0 or more"),
        (("margin", "warmup_ratio", "lora_dropout"), lambda x: 0 <= x < 1, "0 or more and below 1"),
        (("mask_above",), lambda x: -1 < x < 1, "a cosine between -1 and 1"),
        (("characters", "hold_out", "gradient_checkpointing"), lambda n: n >= 0, "0 or more"),
        (
            ("lora_rank", "lora_alpha", "chunk_size", "checkpoint_every", "validate_every", "patience", "max_tokens"),
            lambda n: n >= 1,
            "1 or more",
        ),
        (("steps",), lambda n: 1 <= n <= 10**7, "between 1 and 10 million"),
        (("batch_size",), lambda n: n >= 2, "2 or more, as a pair's negatives are the others of its batch"),
        (("keep_adapters",), lambda n: n >= 2, "2 or more, as the last is the run's"),
        (("seed",), lambda n: 0 <= n < 2**32, f"0 or more and below {2**32}"),
        (("matryoshka",), lambda numbers: min(numbers) >= 1, "numbers above 0"),
    )
    for names, is_allowed, allowed in rules:
        for name in names:
            value = getattr(args, name)
            if value is not None and not is_allowed(value):
                raise InputError(f"--{name.replace('_', '-')} must be {allowed}, not {value}")


def check_arguments(args: argparse.Namespace) -> None:
    """Raise InputError for what cannot work."""
    check_ranges(args)
    world_size, n_files = distributed().world_size, len(args.pairs)
    if args.learn_temperature and args.temperature < MIN_TEMPERATURE:
        raise InputError(f"--learn-temperature must start at {MIN_TEMPERATURE} or above, --temperature is {args.temperature}")
    if args.weights and (len(args.weights) != n_files or not all(0 < weight < math.inf for weight in args.weights)):
        raise InputError(f"--weights takes a number above 0 for each of the {n_files} files of --pairs, not {args.weights}")
    if args.characters and not any(map(is_own_texts, args.pairs)):
        raise InputError("--characters cuts the texts of a folder of make_pairs.py auto, and --pairs names none: leave it out")
    if args.same_source_batches and n_files < 2:
        raise InputError("--same-source-batches needs several files of --pairs, one for each source")
    if args.validation is not None:
        file_kind(args.validation)  # not found out only after the base was loaded
    if args.fsdp and (world_size == 1 or args.quantize):
        raise InputError("--fsdp divides a base among several processes: start them with torchrun, and leave --quantize out")
    if args.track and importlib.util.find_spec(args.track) is None:
        raise InputError(f"--track {args.track} needs the package {args.track}: pip install {args.track}")
    if args.batch_size and args.batch_size % world_size:
        raise InputError(f"--batch-size {args.batch_size} must be a multiple of the {world_size} processes")
    find_base(base_of(args.model))
    if is_run(args.model):
        check_trainable(Contract.read(args.model))
    check_prompts(args.model, args.prompt, args.query_prompt, override_contract=args.override_contract)
    if args.dtype == "float16":
        raise InputError("--dtype float16 cannot train (its gradients underflow): take bfloat16 or float32")
    check_dtype(args.dtype)
    check_pair_files([path for path in args.pairs if path != DEFAULT_PAIRS])


def prepare_files(args: argparse.Namespace) -> None:
    """Check the folder and the base, delete what a kill in the middle of writing left, and make the default pairs.

    The first process does so, the others wait.
    """
    if distributed().rank == 0:
        check_out(args.out, args.resume)
        from encoder.base_models import check_base  # slow to import, so that all other errors come first

        check_base(base_of(args.model), args.trust_remote_code)
        for path in args.out.glob(".*.tmp") if args.resume or (args.out / ARGUMENTS_FILE).is_file() else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if args.pairs == [DEFAULT_PAIRS] and not DEFAULT_PAIRS.exists():
            say(f"{DEFAULT_PAIRS} does not exist yet: making it from the docstrings of the installed packages")
            done = subprocess.run([sys.executable, str(ROOT / "make_pairs.py"), "docstrings", "--out", str(DEFAULT_PAIRS)], check=False)
            if done.returncode:
                sys.exit(done.returncode)  # make_pairs.py has said why
    wait_for_all()


# --------------------------------------------------------------------------------------------------------------- the loop


def announce(run: "Run", base_fingerprint: str) -> None:
    args, encoder, done = run.args, run.encoder, run.state.step
    contract, n_trained = encoder.contract, sum(p.numel() for p in run.trained.values())
    files = ", ".join(map(str, args.pairs))
    say(f"model {args.model}, {n_trained:,} trained parameters, {encoder.dtype}, {encoder.device}; untuned fingerprint {base_fingerprint}")
    if run.started_from:
        say(f"going on from the adapter of {args.model}, fingerprint {run.started_from['fingerprint']}")
    pooled = f"prompt {prompt_label(contract.prompts)}, pooling {contract.pooling}, scope {contract.scope}"
    say(f"{pooled}: {serving_note(contract)}")
    resumed = f", going on after step {done}" if done else ""
    epochs = f", {run.data.steps * args.batch_size / run.data.n_pairs:.3g} epochs" * (not run.data.pairs.taught)
    what = run.data.pairs.summary or f"{run.data.n_pairs:,} pairs"
    of_pairs = [prompt_label(get_prompt(prompt).roles()) for prompt in run.data.pairs.prompts]
    if of_pairs:
        say(f"{len(of_pairs)} prompts of the pairs themselves: {', '.join(of_pairs[:6])}{', ...' * (len(of_pairs) > 6)}")
    cut = f", longer texts cut to {args.characters:,} characters" if args.characters else ""
    say(f"{what} from {files}{cut}, {run.data.steps} steps of {args.batch_size}{epochs}{resumed}")
    for note in encoder.notes:
        warn(note)


def train(run: "Run") -> int | None:
    """The loop; each step is batch, forward and backward, update, validate, log, save.

    Returns None after the last step or when patience has run out, otherwise the number of the signal that interrupted it.
    """
    from torch.nn.utils import clip_grad_norm_

    from training.gradients import all_reduce_gradients, attention_kernel, batch_gradients
    from training.losses import LossSettings, batch_loss

    args, data, encoder, state, optimizer = run.args, run.data, run.encoder, run.state, run.optimizer
    is_first_process = distributed().rank == 0
    adapter = [p for name, p in run.trained.items() if name != TEMPERATURE]
    settings = LossSettings(args.temperature, args.margin, args.mask_above, tuple(args.matryoshka or ()))
    track = make_tracker(args.track if is_first_process else None, args.out, state.run_id, state.step + 1, plain_arguments(args))
    energy, seconds_before, began = EnergyMeter(encoder.device, state.joules), state.seconds, time.perf_counter()
    # where patience ran out already, the run was killed before it could finish
    steps = range(data.steps if is_out_of_patience(run) else state.step, data.steps)
    interrupted, is_last, to_keep = False, True, kept_steps(data.steps, args.keep_adapters)
    encoder.decoder.train()
    with (
        Progress(data.steps, "training", "step", initial=state.step) as progress,
        catch_signals() as signals,
    ):
        for step, batch in zip(steps, prefetch(encoder, data.pairs, data.sampler, steps), strict=True):
            # forward and backward
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, data.steps, args.lr, args.warmup_ratio)
            optimizer.zero_grad(set_to_none=True)
            loss_of = batch_loss(batch, encoder.device, settings, run.trained.get(TEMPERATURE))
            with attention_kernel(encoder):
                result = batch_gradients(encoder, batch, state, loss_of, optimizer)
            all_reduce_gradients(adapter)  # the temperature's gradient is whole in every process
            grad_norm = clip_grad_norm_(run.trained.values(), args.max_grad_norm)
            row = step_metrics(run, step, batch, result, grad_norm, started)

            # update
            update(run, row)
            state.step = step + 1
            is_last = state.step == data.steps

            # validate
            if data.validation and (is_last or state.step % args.validate_every == 0):
                row["validation"] = validate(run)
                is_last = is_last or is_out_of_patience(run)

            # log
            run.rows.append(row)
            if is_first_process:
                append_line(args.out / METRICS, json.dumps(row))
            track(row)
            if not run.has_warned and (problem := collapse(run.rows, n_warmup_steps(data.steps, args.warmup_ratio))):
                warn(f"step {state.step}: {problem}")
                run.has_warned = True
            speed = f"{row['pairs_per_second']:.1f} pairs/s, {result.n_negatives:.0f} negatives"
            progress.update(1, f"loss {result.loss.item():.3f}, accuracy {result.accuracy:.2f}, {speed}")

            # save
            interrupted = all_reduce_number(len(signals), "max") > 0
            if is_first_process and state.step in to_keep:
                keep_adapter(args.out, encoder, state.step)
            if interrupted or is_last or state.step % args.checkpoint_every == 0:
                state.seconds, state.joules = seconds_before + time.perf_counter() - began, energy.read()
                save(run)
            if interrupted or is_last:
                break
    return (signals or [signal.SIGTERM])[0] if interrupted and not is_last else None


def step_metrics(run: "Run", step: int, batch: "PairBatch", result: "LossResult", grad_norm: "Tensor", started: float) -> dict:
    """The numbers of a step for metrics.jsonl, before its update. Empty and truncated texts are counted for the summary."""
    run.state.n_empty += sum(texts.n_empty for texts in batch.texts)
    run.state.n_truncated += sum(texts.n_truncated for texts in batch.texts)
    row = {"step": step + 1, "loss": result.loss.item(), "accuracy": result.accuracy, "lr": run.optimizer.param_groups[0]["lr"]}
    row |= {"grad_norm": grad_norm.item(), "negatives": result.n_negatives, "spread": result.spread}
    row["pairs_per_second"] = run.args.batch_size / (time.perf_counter() - started)
    row["tokens"] = sum(len(ids) for texts in batch.texts for prompt in (texts, *texts.more) for ids in prompt.ids)
    if result.divergence is not None:
        row["divergence"] = result.divergence
    if TEMPERATURE in run.trained:
        row["temperature"] = run.trained[TEMPERATURE].exp().item()
    return row


def update(run: "Run", row: dict) -> None:
    """Take the optimizer's step, unless loss or gradient are not finite: then the step is skipped, and the row says so.

    Raises InputError when too many steps in a row are skipped.
    """
    if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]):
        run.optimizer.step()
        if TEMPERATURE in run.trained:
            run.trained[TEMPERATURE].data.clamp_(min=math.log(MIN_TEMPERATURE))
        run.skipped_in_a_row = 0
        return
    run.skipped_in_a_row += 1
    run.state.skipped_steps += 1
    message = f"step {row['step']}: the loss is {row['loss']}, the norm of the gradient {row['grad_norm']}"
    if run.skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
        raise InputError(f"{message}, for the third time in a row: lower --lr")
    warn(f"{message}: the step is skipped")
    row |= {"loss": None, "grad_norm": None, "spread": None}


def validate(run: "Run") -> float:
    """Score the adapter, and keep its weights if the score is the best so far, or within one standard error of it."""
    state, validation = run.state, run.data.validation
    score = validation(run.encoder)
    if state.best_score is None or score > state.best_score:
        state.best_score, state.validations_without_improvement = score, 0
    else:
        state.validations_without_improvement += 1
    if score >= state.best_score - validation.standard_error(state.best_score):
        state.kept_score, state.kept_step = score, state.step
        run.best = {name: p.detach().cpu().clone() for name, p in run.trained.items()}
    return score


def is_out_of_patience(run: "Run") -> bool:
    return run.args.patience is not None and run.state.validations_without_improvement >= run.args.patience


def save(run: "Run") -> None:
    from training.checkpoint import gather_random_states, save_checkpoint

    random_states = gather_random_states(run.encoder.device)
    if distributed().rank == 0:
        save_checkpoint(run.args.out, run.encoder, run.trained, run.optimizer, run.state, run.best, random_states)


# ---------------------------------------------------------------------------------------------------------------- the end


def finish(run: "Run", interrupted_by: int | None) -> None:
    """Draw the curve; of a complete run leave the best weights and the summary. An interrupted one exits as after its signal."""
    from encoder import EncodingReport
    from tasks.unlabelled import ADVICE
    from training.validation import compare_with_start

    out, state, encoder = run.args.out, run.state, run.encoder
    joules = all_reduce_number(math.nan if state.joules is None else state.joules, "sum")  # NaN if one process does not know
    is_first_process = distributed().rank == 0
    if is_first_process:
        draw_curve(run.rows, out / "loss.png", run.data.validation.name)
    if interrupted_by is not None:
        if is_first_process:
            say(f"stopped after step {state.step} of {run.data.steps}: {out} holds a usable adapter; go on with --resume", error=True)
            sys.exit(128 + interrupted_by)
        return
    if run.best:
        for name, parameter in run.trained.items():
            parameter.data.copy_(run.best[name])
        if is_first_process:
            encoder.save(out)
    comparison = compare_with_start(encoder, run.before, run.data.pairs.some_texts(MAX_UNLABELLED))  # the processes encode together
    if not is_first_process:
        return
    for line in EncodingReport(state.n_empty, state.n_truncated, encoder.contract.max_tokens).warnings():
        warn(line)
    problem = collapse(run.rows, n_warmup_steps(run.data.steps, run.args.warmup_ratio), least=1)
    start = run.started_from["run"] if run.started_from else "its base"
    unlabelled = comparison and {"against": start} | comparison._asdict() | {"verdict": comparison.verdict}
    write_json(out / SUMMARY_FILE, summarize(run, joules) | {"collapse": problem, "without_labels": unlabelled})
    kept = ""
    if validation := run.data.validation:
        kept = f", kept step {state.kept_step} ({validation.name} {state.kept_score:.3f}, the best was {state.best_score:.3f})"
    say(f"{out}: {state.step} steps{kept}, in {state.seconds:.0f} s, fingerprint {encoder.fingerprint}")
    if problem:
        warn(f"this run has learned little or nothing. At its end {problem}")
    if comparison:
        interval = f"ratio {comparison.ratio:.2f}, 95 % interval {comparison.low:.2f} to {comparison.high:.2f}"
        line = f"{comparison.verdict}, as seen without labels ({interval}; {ADVICE})"
        (warn if comparison.verdict == "worse" else say)(f"this run beside {short_path(start)}: {line}")
    evaluate = f"python evaluate.py --model {shlex.quote(short_path(out))} {shlex.quote(run.args.model)}"
    say(f"next: {evaluate} --data labelled.csv     # columns text,label")
    say(f"  or: {evaluate} --texts texts.csv       # without labels")
    if runtimes_for(encoder.contract):
        say(f"then: python export.py {shlex.quote(short_path(out))} --out exported       # for sentence-transformers")


def make_run(args: argparse.Namespace) -> None:
    complete_arguments(args)
    check_arguments(args)
    with contextlib.nullcontext() if distributed().rank else reserve(args.out):
        prepare_files(args)
        from encoder.runtime import pick_device
        from training.plan import prepare_data, set_up

        pick_device(args.device)  # raises before the pairs are read, which takes minutes of large files
        data = prepare_data(args, preset_of(args.model).batch_size)
        labelled_sha256 = hashlib.sha256(args.validation.read_bytes()).hexdigest() if args.validation else None
        record = make_record(args, pairs_sha256=data.pairs.sha256, validation_sha256=labelled_sha256)
        resuming = args.resume and has_checkpoint(args.out)
        if resuming:
            check_record(args.out / ARGUMENTS_FILE, record)
            if (args.out / SUMMARY_FILE).is_file():
                say(f"{args.out} is finished: nothing to do")
                return
        try:
            run = set_up(args, data, record, resuming)
            announce(run, record["base"])
            interrupted_by = train(run)
            finish(run, interrupted_by)
        except WriteError as error:
            raise InputError(f"{error}; {after_a_failed_write(args.out)}") from None


def main(args: argparse.Namespace) -> None:
    make_run(args)
    end_distributed()


if __name__ == "__main__":
    run_script(lambda: main(parse()))
