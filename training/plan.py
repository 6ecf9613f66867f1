"""What a run is made of: which pairs it trains on and which it holds out, size and number of its batches, model and optimizer."""

import argparse
import json
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from encoder import Encoder
from encoder.contract import ARGUMENTS_FILE, PAIR_PROMPTS, Contract, fingerprint
from encoder.lora import keep_input_dtype
from encoder.names import is_run
from encoder.processes import distributed, wait_for_all
from encoder.runtime import pick_device, pick_dtype
from files.console import InputError, say, warn
from files.writing import write_json, write_text
from training.checkpoint import TrainingState, load_checkpoint
from training.optimization import TEMPERATURE, make_optimizer
from training.pair_data import MIN_HELD_OUT, SMALL_SET, PairDataset, PairSampler, hold_out, under_prompt
from training.run_record import METRICS, check_record, forget_adapters, read_metrics
from training.validation import Validation

# Defaults for fewer pairs than this differ: of 300, one pass in batches of 120 would be two steps.
FEW_PAIRS = 7680
# from one seed of the bundled model on 293 pairs, where 16 and 24 steps did better than 8, and than 60
MIN_STEPS = 20
MAX_EPOCHS = 3  # that few pairs are repeated for that
MIN_BATCH = 8  # a pair has 7 negatives


@dataclass
class TrainingData:
    pairs: PairDataset
    n_pairs: int  # that are trained on
    steps: int  # of the whole run
    sampler: PairSampler
    validation: Validation


@dataclass
class Run:
    """What the loop works on."""

    args: argparse.Namespace
    data: TrainingData
    encoder: Encoder
    trained: dict[str, nn.Parameter]  # by name: the adapter, perhaps a learned query and TEMPERATURE
    optimizer: torch.optim.Optimizer
    state: TrainingState
    best: dict[str, Tensor] = field(default_factory=dict)  # the weights that validation chose
    rows: list[dict] = field(default_factory=list)  # the lines of metrics.jsonl
    skipped_in_a_row: int = 0
    has_warned: bool = False  # of a collapse
    started_from: dict | None = None  # the run whose adapter is trained on
    before: dict[str, Tensor] = field(default_factory=dict)  # its weights


def prepare_data(args: argparse.Namespace, default_batch: int) -> TrainingData:
    """Open the pairs, hold some out, and decide the length of the run: what depends on the number of pairs is filled in where it is None.

    default_batch    pairs of a batch, where there are enough of them
    Raises InputError where there are too few.
    """
    rank = distributed().rank
    if rank:  # the first process reads the files into the cache, the others wait and take them from there
        wait_for_all()
    pairs = PairDataset(args.pairs, args.characters)
    if not rank:
        wait_for_all()
    some = pairs[list(range(0, len(pairs), max(1, len(pairs) // 256)))]
    if 2 * sum(pair.anchor == pair.positive for pair in some) > len(some) and not args.lora_dropout and not args.query_prompt:
        warn("most pairs are one text twice: without dropout they teach next to nothing, --lora-dropout 0.1 makes their vectors differ")
    held_out = hold_out(len(pairs), 0 if args.validation or pairs.taught else args.hold_out, args.batch_size or 2)
    validation = Validation(pairs[held_out.tolist()] if len(held_out) else [], args.validation)
    if not validation:
        if args.patience:
            raise InputError(f"--patience needs validation, and none of {len(pairs)} pairs are held out: give --validation FILE")
        if pairs.taught:
            say("no pairs are held out, as they say nothing about texts with a teacher: the last step's adapter is kept")
        elif args.hold_out:
            none = f"fewer than {MIN_HELD_OUT} of {len(pairs)} pairs could be held out, so none are"
            say(f"{none}: the last step's adapter is kept; --validation FILE would choose the best")
    held_out = pairs.copies(held_out) if len(held_out) else held_out
    held_out_of_each = np.diff(np.searchsorted(held_out, np.cumsum([0, *pairs.sizes])))
    n_pairs, smallest = len(pairs) - len(held_out), int(min(pairs.sizes - held_out_of_each))
    decide_length(args, len(pairs), n_pairs, smallest if args.same_source_batches else n_pairs, default_batch)
    if args.batch_size > n_pairs:
        raise InputError(f"--batch-size {args.batch_size} is more than the {n_pairs} pairs of {pairs.name}")
    if args.same_source_batches and args.batch_size > smallest:
        raise InputError(f"--batch-size {args.batch_size} is more than the {smallest} pairs of the smallest file of --pairs")
    steps = args.steps or max(1, round(args.epochs * (n_pairs // args.batch_size)))
    if args.validate_every is None:
        args.validate_every = min(50, max(1, steps // 5)) if len(pairs) < SMALL_SET else 50
    if not args.steps and steps < MIN_STEPS // 2:
        warn(f"only {steps} step{'s' * (steps > 1)}: more --epochs, a smaller --batch-size or more pairs may help")
    sampler = PairSampler(pairs.sizes, held_out, args.batch_size, steps, args.seed, pairs.weights(args.weights), args.same_source_batches)
    return TrainingData(pairs, n_pairs, steps, sampler, validation)


def decide_length(args: argparse.Namespace, size: int, n_pairs: int, n_source: int, default_batch: int) -> None:
    """Fill in --batch-size and --epochs where they are None, in few pairs so that there are enough steps, and say so.

    size        pairs in all
    n_pairs     that are trained on
    n_source    that a batch can be drawn from
    """
    processes, given = distributed().world_size, (args.batch_size, args.epochs)
    if args.batch_size is None:
        batch = default_batch if size >= FEW_PAIRS else min(default_batch, max(MIN_BATCH, n_source // MIN_BATCH), n_source)
        args.batch_size = max(processes, batch - batch % processes, 2)
    if args.epochs is None and args.steps is None:
        short = size < FEW_PAIRS and MIN_STEPS / max(1, n_pairs // args.batch_size)
        args.epochs = round(min(max(short, 1), MAX_EPOCHS), 2)
    changed = []
    if given[0] is None and args.batch_size < default_batch // processes * processes:
        changed.append(f"batches of {args.batch_size} instead of {default_batch}")
    if given[1] is None and args.epochs and args.epochs > 1:
        changed.append(f"{args.epochs:g} epochs instead of 1")
    if changed:
        say(f"{size:,} pairs are few: {' and '.join(changed)}; more pairs would help most")


CONTRACT_FLAGS = (
    "prompt",
    "query_prompt",
    "pooling",
    "scope",
    "keep_bos",
    "layers",
    "attention_layer",
    "embed_filter",
    "max_tokens",
    "attention",
    "quantize",
)


def make_encoder(args: argparse.Namespace, pairs: PairDataset) -> Encoder:
    """The base with a fresh adapter, or with that of the run in --model, set up for training."""
    encoder = Encoder.load(
        args.model,
        dtype=pick_dtype(args.dtype, pick_device(args.device), training=True),
        device=args.device,
        trust_remote_code=args.trust_remote_code,
        shard=args.fsdp,
        **{name: getattr(args, name) for name in CONTRACT_FLAGS},
        override_contract=args.override_contract,
    ).with_contract(data={"name": pairs.name, "sha256": pairs.sha256})
    if encoder.peft:
        encoder.unfreeze_adapter(args.lora_dropout)
    else:
        options = {"use_rslora": args.rslora, "use_dora": args.dora}
        encoder.add_adapter(args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets, **options)
    encoder.share_prefix = args.lora_dropout == 0  # with dropout, every text draws a mask of its own for the prompt
    if encoder.dtype == torch.bfloat16:
        keep_input_dtype(encoder.decoder)
    if args.fsdp:
        encoder.shard()
    encoder.set_gradient_checkpointing(args.gradient_checkpointing)
    return encoder


def set_up(args: argparse.Namespace, data: TrainingData, record: dict, resuming: bool) -> Run:
    """Load the model and, for a resumed run, the checkpoint; write arguments.json and the metrics so far."""
    rank = distributed().rank
    torch.manual_seed(args.seed)
    encoder = make_encoder(args, data.pairs)
    record |= {"base": encoder.untuned().fingerprint, "computed_in": str(encoder.dtype)}
    if data.pairs.prompts:
        prompted = [under_prompt(encoder, prompt) for prompt in data.pairs.prompts]  # which raises where a prompt leaves texts no room
        record[PAIR_PROMPTS] = [other.contract.prompts for other in prompted]
    if is_run(args.model):
        before = fingerprint(Contract.read(args.model), encoder.base_hash, encoder.adapter_hash)
        record["started_from"] = {"run": args.model, "fingerprint": before}
    if resuming:
        check_record(args.out / ARGUMENTS_FILE, record)
    width = encoder.width
    if max(args.matryoshka or [0]) > width:
        raise InputError(f"--matryoshka {args.matryoshka}: a vector of this model has {width} numbers")
    trained = encoder.trainable()
    if args.learn_temperature:
        trained[TEMPERATURE] = nn.Parameter(torch.tensor(math.log(args.temperature), device=encoder.device))
    state = TrainingState(chunk_size=args.chunk_size or args.batch_size, gradient_checkpointing=args.gradient_checkpointing)
    run = Run(args, data, encoder, trained, make_optimizer(trained, args), state, started_from=record.get("started_from"))
    if run.started_from:
        run.before = {name: parameter.detach().to("cpu", copy=True) for name, parameter in encoder.trainable().items()}
    torch.manual_seed(args.seed + rank)  # dropout differs between processes
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
    if resuming:
        run.state, run.best = load_checkpoint(args.out, encoder, trained, run.optimizer)
        run.rows = read_metrics(args.out / METRICS, run.state.step)
        encoder.set_gradient_checkpointing(run.state.gradient_checkpointing)
    if rank == 0:
        forget_adapters(args.out, after=run.state.step)
        write_json(args.out / ARGUMENTS_FILE, record)
        write_text(args.out / METRICS, "".join(json.dumps(row) + "\n" for row in run.rows))
    return run
