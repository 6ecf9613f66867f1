"""Gradients of a loss over the vectors of a batch of any size: what does not fit into memory is run in chunks (GradCache)."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from encoder import Encoder
from encoder.processes import all_reduce_number, distributed
from encoder.runtime import empty_cache, is_out_of_memory, random_state, set_random_state, to_device
from encoder.tokenization import TokenizedTexts
from files.console import InputError, say
from training.losses import LossOfVectors, LossResult
from training.pair_data import PairBatch

if TYPE_CHECKING:
    from training.checkpoint import TrainingState

CPU_BATCH_TOKENS = 4096  # of a forward pass in training; measured in bench/README.md

Chunk = list[tuple[TokenizedTexts, list[int]]]  # anchors, positives and hard negatives of some pairs: token ids, and which rows


# ------------------------------------------------------------------------------------------------ vectors with gradients


def autocast(encoder: Encoder) -> torch.autocast:
    return torch.autocast(encoder.device.type, torch.bfloat16, enabled=encoder.dtype == torch.bfloat16)


@contextlib.contextmanager
def attention_kernel(encoder: Encoder) -> Iterator[None]:
    """On a CPU, compute attention by plain matrix products: for short texts they are faster than the fused kernel's backward.

    In bfloat16 they stay in bfloat16, where PyTorch would otherwise compute them in float32. Forward and backward both belong
    inside: gradient checkpointing computes a layer again, and must do it the same way.
    """
    if encoder.device.type != "cpu":
        yield
        return
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # holds for the CPU too, whatever its name says
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def embed(encoder: Encoder, tokenized: TokenizedTexts, rows: list[int]) -> Tensor:
    """Vectors (len(rows), D) with gradients, by the same forward passes and pooling as `Encoder.encode`."""
    batches = list(encoder.batches(tokenized, rows, CPU_BATCH_TOKENS if encoder.device.type == "cpu" else None))
    # under FSDP all ranks need equally many forward passes; the outputs of extra ones are discarded
    extra = all_reduce_number(len(batches), "max") - len(batches) if encoder.sharded else 0
    with autocast(encoder):
        vectors = [encoder.embed(packed)[0] for _, packed in batches]
        vectors += [encoder.embed(encoder.collate(tokenized, [0]))[0][:0] for _ in range(extra)]
    if not vectors:
        return torch.zeros(0, encoder.width, device=encoder.device)
    position = {row: i for i, row in enumerate(itertools.chain(*(chosen for chosen, _ in batches)))}
    return torch.cat(vectors)[to_device(np.array([position[row] for row in rows], np.int64), encoder.device)]


def gather(vectors: Tensor, sizes: list[int]) -> Tensor:
    """The vectors of all processes, one process after another, without a graph. sizes: number of vectors of each process."""
    if len(sizes) == 1:
        return vectors
    padded = F.pad(vectors, (0, 0, 0, max(sizes) - len(vectors))).contiguous()
    gathered = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(gathered, padded)
    return torch.cat([others[:size] for others, size in zip(gathered, sizes, strict=True)])


# ----------------------------------------------------------------------------------------------------------- gradients


def chunked_backward(encoder: Encoder, chunks: list[Chunk], sizes: list[list[int]], loss_of: LossOfVectors) -> LossResult:
    """Gradients of a loss over the vectors of all chunks and all processes, in the memory of one chunk.

    A single chunk is run once, with its graph. Several are first run without a graph; the loss over all vectors then gives
    each vector its gradient; and each chunk is run again, with the same random numbers, to backpropagate the gradients of its
    vectors to the adapter (GradCache: Gao et al. 2021, arXiv 2101.06983). Under torchrun the vectors are gathered and every
    process computes the whole loss, but backpropagates only the gradients of its own vectors: the sum over the processes is
    the gradient itself, without a factor.

    chunks    anchors, positives and hard negatives of some of this process's pairs each
    sizes     for anchors, positives and hard negatives: how many vectors each process has
    """
    states, vectors = [], []
    for chunk in chunks:
        states.append(random_state(encoder.device))
        with contextlib.nullcontext() if len(chunks) == 1 else torch.no_grad():
            vectors.append([embed(encoder, *texts) for texts in chunk])
    kinds = [torch.cat(kind) for kind in zip(*vectors, strict=True)]  # anchors, positives, hard negatives
    leaves = [gather(kind.detach(), size).requires_grad_() for kind, size in zip(kinds, sizes, strict=True)]
    result = loss_of(*leaves)
    result.loss.backward()
    rank = distributed().rank
    gradients = [leaf.grad[sum(size[:rank]) :][: size[rank]] for leaf, size in zip(leaves, sizes, strict=True)]
    if len(chunks) == 1:
        backward_from_gradients(kinds, gradients)
        return result
    starts = [0, 0, 0]
    for chunk, state in zip(chunks, states, strict=True):
        set_random_state(state, encoder.device)
        again = [embed(encoder, *texts) for texts in chunk]
        ends = [start + len(v) for start, v in zip(starts, again, strict=True)]
        backward_from_gradients(again, [g[start:end] for g, start, end in zip(gradients, starts, ends, strict=True)])
        starts = ends
    return result


def backward_from_gradients(vectors: list[Tensor], gradients: list[Tensor]) -> None:
    """Backpropagate from vectors whose gradients are known. Those without a graph are skipped (a chunk without hard negatives)."""
    pairs = [(v, g) for v, g in zip(vectors, gradients, strict=True) if v.requires_grad]
    torch.autograd.backward([v for v, _ in pairs], [g for _, g in pairs])


def fall_back_after_out_of_memory(encoder: Encoder, state: "TrainingState", n_pairs: int) -> None:
    """Choose the next slower way that needs less memory, and say so.

    First every second layer is computed again in the backward pass, then every layer; then chunks are halved.
    Raises InputError where a chunk is a single pair already.
    """
    if state.gradient_checkpointing != 1 and encoder.decoder.supports_gradient_checkpointing:
        state.gradient_checkpointing = 1 if state.gradient_checkpointing else 2
        encoder.set_gradient_checkpointing(state.gradient_checkpointing)
        setting = f"--gradient-checkpointing {state.gradient_checkpointing}"
    elif state.chunk_size == 1:
        raise InputError("a single pair does not fit into memory: lower --max-tokens")
    else:
        state.chunk_size = min(state.chunk_size, n_pairs) // 2
        setting = f"--chunk-size {state.chunk_size}"
    say(f"out of memory: going on with {setting}", error=True)


def batch_gradients(
    encoder: Encoder, batch: PairBatch, state: "TrainingState", loss_of: LossOfVectors, optimizer: torch.optim.Optimizer
) -> LossResult:
    """Gradients of one batch, of which this process runs its share, state.chunk_size pairs at a time.

    Where memory runs out, a single process falls back on a slower way and begins the batch again with the same random numbers.
    Several processes cannot, for the others wait in the middle of the step: they end with an InputError.
    """
    rank, world_size, _ = distributed()
    n = batch.n_pairs
    shares = [range(n * r // world_size, n * (r + 1) // world_size) for r in range(world_size)]
    n_pairs, n_hard = [len(share) for share in shares], [sum(len(batch.negative_rows[i]) for i in share) for share in shares]
    state_before = random_state(encoder.device)
    while True:
        chunks = []
        for start in range(0, len(shares[rank]), state.chunk_size):
            rows = list(shares[rank][start : start + state.chunk_size])
            hard = [j for i in rows for j in batch.negative_rows[i]]
            chunks.append([(batch.anchors, rows), (batch.positives, rows), (batch.negatives, hard)])
        try:
            return chunked_backward(encoder, chunks, [n_pairs, n_pairs, n_hard], loss_of)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if world_size > 1:
            raise InputError("out of memory: add --chunk-size, or --gradient-checkpointing 2 or 1")
        optimizer.zero_grad(set_to_none=True)
        empty_cache(encoder.device)
        set_random_state(state_before, encoder.device)
        fall_back_after_out_of_memory(encoder, state, n)


def all_reduce_gradients(parameters: list[Tensor]) -> None:
    """Replace gradients by their sum over all processes, in one message."""
    if distributed().world_size == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    torch.distributed.all_reduce(flat)
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(gradient.view_as(parameter))
