"""What a run is made of: which pairs it trains on, which it holds out, how large its batches are and how many steps it takes."""

import argparse
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from encoder import Encoder
from encoder.runtime import distributed
from files.console import InputError, say, warn
from training.checkpoint import TrainingState
from training.pair_data import MIN_HELD_OUT, SMALL_SET, PairDataset, PairSampler, hold_out
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


def prepare_data(args: argparse.Namespace, default_batch: int) -> TrainingData:
    """Open the pairs, hold some out, and decide the length of the run: what depends on the number of pairs is filled in where it is None.

    default_batch    pairs of a batch, where there are enough of them
    Raises InputError where there are too few.
    """
    rank, world_size, _ = distributed()
    if rank:  # the first process reads the files into the cache, the others wait and take them from there
        torch.distributed.barrier()
    pairs = PairDataset(args.pairs)
    if world_size > 1 and not rank:
        torch.distributed.barrier()
    held_out = hold_out(len(pairs), 0 if args.validation else args.hold_out, args.batch_size or 2)
    validation = Validation(pairs[held_out.tolist()] if len(held_out) else [], args.validation)
    if not validation:
        if args.patience:
            raise InputError(f"--patience needs validation, and none of {len(pairs)} pairs are held out: give --validation FILE")
        if args.hold_out:
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
    sampler = PairSampler(pairs.sizes, held_out, args.batch_size, steps, args.seed, args.weights, args.same_source_batches)
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
