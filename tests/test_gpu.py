"""What only a GPU can show: flash attention, half precision, memory that really runs out, kernels at their full size.

    python -m pytest -m gpu tests/test_gpu.py                                  # on a GPU; `make gpu` runs each test by itself
    EMBEDDING_DRY_RUN=1 python -m pytest -m gpu tests/test_gpu.py              # on a CPU, small, to see that the tests work

The most telling tests come first. Each prints the numbers that it judges as a line of JSON, which bench/gpu.py collects.
"""

import contextlib
import gc
import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TEXTS, randomize_adapter

from encoder import Encoder, EncodingReport, PoolingConfig
from encoder.contract import POOLINGS, SCOPES
from encoder.lora import keep_input_dtype
from encoder.packing import PackedAttention, collate, select_tokens
from encoder.tokenization import TokenizedTexts
from pooling_kernels import attention_pool, last_pool, mean_pool, query_pool
from training import gradients
from training.checkpoint import TrainingState, gather_random_states, load_checkpoint, save_checkpoint
from training.gradients import attention_kernel, batch_gradients, chunked_backward, embed
from training.losses import LossSettings, batch_loss
from training.pair_data import Pair, tokenize_pairs

ON_GPU, DRY_RUN = torch.cuda.is_available(), os.environ.get("EMBEDDING_DRY_RUN") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU and not DRY_RUN, reason="needs a CUDA device, or EMBEDDING_DRY_RUN=1")]
gpu_only = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device: nothing on a CPU stands for it")

# longer than the sliding windows of the small models in conftest.py, which are of 12 tokens
PROMPT = "The cat sat on the mat and the bank raised its fees again this month: {text}, that is the question"
SETTINGS = {"prompt": PROMPT, "scope": "all", "max_tokens": 40, "device": DEVICE}
MANY = [f"{text} {i}" if text else "" for i in range(20 if ON_GPU else 2) for text in TEXTS]
KINDS = ("mean", "weighted mean", "attention", "query", "last")


def report(**numbers: float) -> None:
    print("\n" + json.dumps(numbers))


def plain(encoder: Encoder) -> Encoder:
    """Every execution option off."""
    encoder.share_prefix = encoder.trim_last_layer = False
    encoder.attention_implementation = "stacked"
    return encoder


def lowest_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum(1).min())


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


@pytest.fixture
def varlen_types(monkeypatch) -> list[torch.dtype]:
    """The types in which flash attention was called, a call after the other."""
    types, varlen = [], PackedAttention.varlen
    monkeypatch.setattr(PackedAttention, "varlen", lambda self, query, *rest: types.append(query.dtype) or varlen(self, query, *rest))
    return types


@contextlib.contextmanager
def memory_cap(n_bytes: float):
    """PyTorch may reserve this many bytes of the GPU and no more."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(n_bytes / torch.cuda.mem_get_info()[1])
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


class Training:
    """The bundled model, an adapter that is not zero, and steps on one batch, from the parts that train.py is made of."""

    def __init__(self, n_pairs: int, dtype: str, dropout: float = 0.0, seed: int = 0):
        torch.manual_seed(seed)
        self.encoder = Encoder.load("tiny", prompt="cluster", dtype=dtype, device=DEVICE)
        self.encoder.add_adapter(4, dropout=dropout)
        self.encoder.share_prefix = not dropout
        randomize_adapter(self.encoder, 0.02)
        if dtype == "bfloat16":
            keep_input_dtype(self.encoder.decoder)
        self.encoder.decoder.train()
        self.trained = self.encoder.trainable()
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-3)
        self.state = TrainingState(n_pairs, 0)
        pairs = [
            Pair(f"Bank {i} raised its fees.", f"It has become dearer for the {i}th time to keep money there.") for i in range(n_pairs)
        ]
        self.batch = tokenize_pairs(self.encoder, pairs)
        self.allocated = 0  # bytes on the GPU before the last step

    def steps(self, n: int) -> list[float]:
        """Take n steps -> their losses."""
        losses = []
        for _ in range(n):
            self.optimizer.zero_grad(set_to_none=True)
            self.allocated = torch.cuda.memory_allocated() if ON_GPU else 0
            loss_of = batch_loss(self.batch, self.encoder.device, LossSettings())
            with attention_kernel(self.encoder):
                losses.append(batch_gradients(self.encoder, self.batch, self.state, loss_of, self.optimizer).loss.item())
            self.optimizer.step()
        return losses


# ------------------------------------------------------------------------------------- the fast path against the plain one


def adapter_gradients(encoder: Encoder, batches: list[list[int]]) -> dict[str, torch.Tensor]:
    """Gradients of a fixed weighting of the vectors of MANY, whose rows are run in these batches."""
    encoder.add_adapter(4)
    torch.manual_seed(0)
    randomize_adapter(encoder, 0.05)
    if encoder.dtype == torch.bfloat16:
        keep_input_dtype(encoder.decoder)
    tokenized = encoder.tokenize(MANY)
    weights = torch.randn(len(MANY), encoder.width, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for rows in batches:
        with attention_kernel(encoder):
            (embed(encoder, tokenized, rows) * weights[rows]).sum().backward()
    return {name: parameter.grad.double() for name, parameter in encoder.trainable().items()}


@pytest.mark.parametrize("pooling", ["last", "position-mean", "attention"])
def test_gradients_in_bfloat16_behind_a_shared_prefix_are_those_in_float32(request, model, pooling, varlen_types):
    """A cosine over 0.999 for every matrix. Models with weights this large may lose more by bfloat16 itself, without any option:
    there, at most twice as much."""
    rows = list(range(len(MANY)))
    exact = adapter_gradients(plain(Encoder.load(model, pooling=pooling, dtype="float32", **SETTINGS)), [[row] for row in rows])
    rounded = adapter_gradients(plain(Encoder.load(model, pooling=pooling, dtype="bfloat16", **SETTINGS)), [rows])
    assert not varlen_types
    fast = adapter_gradients(Encoder.load(model, pooling=pooling, dtype="bfloat16", **SETTINGS), [rows])
    assert set(varlen_types) == ({torch.bfloat16} if ON_GPU else set())
    lost, lost_by_type = ({name: 1 - cosine(g[name], exact[name]) for name in exact} for g in (fast, rounded))
    allowed = {name: max(1e-3, 2 * lost_by_type[name]) for name in exact}
    worst = max(exact, key=lambda name: lost[name] / allowed[name])
    report(**{request.node.callspec.id: 1 - lost[worst], f"{request.node.callspec.id}, plain": 1 - lost_by_type[worst]})
    assert all(gradient.isfinite().all() for gradient in fast.values())
    assert lost[worst] < allowed[worst] and max(lost.values()) < 0.01, worst


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_vectors_are_those_of_one_text_at_a_time_in_float32(request, model, attention, varlen_types):
    """Past the sliding windows, and of empty texts as well."""
    poolings = [PoolingConfig("mean", "text"), PoolingConfig("attention", "all"), PoolingConfig("last", "all")]
    exact = plain(Encoder.load(model, attention=attention, dtype="float32", **SETTINGS))
    one_by_one = [np.concatenate(vectors) for vectors in zip(*(exact.encode([text], poolings=poolings) for text in MANY), strict=True)]
    fast, cosines = Encoder.load(model, attention=attention, dtype="bfloat16", **SETTINGS), []
    for chosen in (slice(0, 3), slice(2, 3)):  # the last token alone: the last layer is trimmed
        results = fast.encode(MANY, poolings=poolings[chosen])
        cosines += [lowest_cosine(a, b) for a, b in zip(results, one_by_one[chosen], strict=True)]
    report(**{request.node.callspec.id: min(cosines)})
    assert set(varlen_types) == ({torch.bfloat16} if ON_GPU else set())
    assert min(cosines) > 0.999, cosines


def test_in_float32_a_text_has_the_same_vector_alone_and_in_a_batch(request, model):
    worst = 0.0
    for pooling in ("mean", "last", "attention"):
        encoder = Encoder.load(model, pooling=pooling, dtype="float32", **SETTINGS)
        alone = np.concatenate([encoder.encode([text]) for text in MANY])
        worst = max(worst, float(np.abs(encoder.encode(MANY) - alone).max()))
    report(**{request.node.callspec.id: worst})
    assert worst < 1e-5


# ---------------------------------------------------------------------------------------------------- memory and waiting


@gpu_only
def test_training_that_runs_out_of_memory_ends_near_the_run_that_does_not(monkeypatch):
    n_pairs = 512
    free = Training(n_pairs, "bfloat16")
    free.steps(1)  # the optimizer's moments and the libraries' workspaces
    torch.cuda.reset_peak_memory_stats()
    expected = free.steps(3)
    needed, vectors = torch.cuda.max_memory_allocated() - free.allocated, free.encoder.encode(TEXTS)
    del free
    gc.collect()

    capped, after_failures = Training(n_pairs, "bfloat16"), []
    capped.steps(1)
    fall_back = gradients.fall_back_after_out_of_memory

    def watched(*args):
        after_failures.append(torch.cuda.memory_allocated() / capped.allocated)
        fall_back(*args)

    monkeypatch.setattr(gradients, "fall_back_after_out_of_memory", watched)
    torch.cuda.empty_cache()
    with memory_cap(torch.cuda.memory_reserved() + 0.25 * needed):
        losses = capped.steps(3)
    capped.optimizer.zero_grad(set_to_none=True)
    closeness = lowest_cosine(capped.encoder.encode(TEXTS), vectors)
    report(failures=len(after_failures), memory_after_failure=max(after_failures, default=0), loss=losses[-1], uncapped_loss=expected[-1])
    assert after_failures and max(after_failures) < 1.01
    assert losses == pytest.approx(expected, rel=0.02) and closeness > 0.999


@gpu_only
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_forward_and_pooling_never_wait_for_the_gpu(dtype):
    encoder = Encoder.load("tiny", prompt="cluster", dtype=dtype, device=DEVICE)
    poolings, tokenized = [PoolingConfig(p, s) for p in POOLINGS for s in SCOPES], encoder.tokenize(TEXTS)

    @torch.no_grad()
    def run():
        for chosen in (poolings, [PoolingConfig("last")]):
            encoder.embed(encoder.collate(tokenized, list(range(len(TEXTS)))), chosen)

    run()  # kernels are compiled, libraries set up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -------------------------------------------------------------------------------------------------------------- gradients


def test_gradients_of_the_prefix_of_1000_texts_are_those_in_float64():
    n, prefix = 1000, 30
    ids = [list(range(prefix + 1 + i % 20)) for i in range(n)]
    tokenized = TokenizedTexts(ids, [(prefix, len(row)) for row in ids], prefix, 0, 0)
    batch = collate(tokenized, list(range(n)), prefix, True, torch.device(DEVICE))
    tokens = batch.locate(np.zeros_like(batch.lengths), batch.lengths)
    # above 0 on average: only a sum that grows shows what adding one after the other in bfloat16 loses
    weights = (1 + torch.randn(len(tokens[0]), 64, generator=torch.Generator().manual_seed(0))).to(DEVICE, torch.bfloat16)

    def gradient() -> torch.Tensor:
        values = torch.ones(len(batch.ids), 64, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        (select_tokens(values, prefix, *tokens) * weights).sum().backward()
        return values.grad

    first = gradient()
    exact = torch.zeros(len(batch.ids), 64, dtype=torch.float64).index_add_(0, torch.from_numpy(tokens[0]), weights.double().cpu())
    error = ((first.double().cpu() - exact)[:prefix].norm() / exact[:prefix].norm()).item()
    report(relative_error=error)
    assert error < 5e-3 and torch.equal(first, gradient())


def test_chunks_with_dropout_give_the_gradient_of_the_whole_batch():
    """Each chunk is run again with the random numbers that it drew at first."""
    training = Training(8, "float32", dropout=0.3)
    encoder, batch = training.encoder, training.batch
    chunks = [[(batch.anchors, rows), (batch.positives, rows), (batch.negatives, [])] for rows in ([0, 1, 2], [3, 4, 5], [6, 7])]
    loss_of = batch_loss(batch, encoder.device, LossSettings())
    gradients = []
    for in_chunks in (False, True):
        torch.manual_seed(5)
        training.optimizer.zero_grad(set_to_none=True)
        with attention_kernel(encoder):
            if in_chunks:
                chunked_backward(encoder, chunks, [[8], [8], [0]], loss_of)
            else:
                vectors = zip(*([embed(encoder, *texts) for texts in chunk] for chunk in chunks), strict=True)
                loss_of(*map(torch.cat, vectors)).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in training.trained.values()]))
    error = ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item()
    report(relative_error=error)
    assert error < 1e-4


# --------------------------------------------------------------------------------------------------------- pooling kernels


def pool_with_gradient(kind: str, values, scores, weights, query, coefficients, cu_seqlens, backend: str) -> list[torch.Tensor]:
    """The pooled rows (B, D), and the gradient (T, D) of their sum weighted by `coefficients`."""
    values = values.detach().requires_grad_()
    keywords = {"cu_seqlens": cu_seqlens, "backend": backend}
    if kind == "attention":
        pooled = attention_pool(values, scores, **keywords)[0][:, 0]
    elif kind == "query":
        pooled = query_pool(values, query, **keywords)[0][:, 0]
    elif kind == "last":
        pooled = last_pool(values, **keywords)
    else:
        pooled = mean_pool(values, weights=weights if kind == "weighted mean" else None, **keywords)
    (pooled * coefficients).sum().backward()
    return [pooled.detach(), values.grad]


def assert_pooling_equals_float64(kind: str, inputs: list[torch.Tensor], lengths: list[int]) -> None:
    """values (T, D) and scores, weights, query and coefficients, of which the last rows count that `lengths` add up to."""
    n, (values, scores, weights, query, coefficients) = sum(lengths), inputs
    ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    before = len(values) - n  # a row of its own where there is something before
    with_before = torch.cat([ends[:1], ends + before]) if before else ends
    all_coefficients = torch.cat([torch.zeros_like(coefficients[:1]), coefficients]) if before else coefficients
    pooled, gradient = pool_with_gradient(kind, values, scores, weights, query, all_coefficients, with_before, "triton")
    doubles = [x.double() for x in (values[before:], scores[before:], weights[before:], query, coefficients)]
    expected, expected_gradient = pool_with_gradient(kind, *doubles, ends, "torch")
    torch.testing.assert_close(pooled[-len(lengths) :].double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient[before:].double(), expected_gradient, rtol=2e-2, atol=1e-4)
    assert not before or gradient[:before].count_nonzero() == 0


def random_inputs(n: int, width: int, rows: int) -> list[torch.Tensor]:
    g = torch.Generator(device=DEVICE).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, device=DEVICE)  # noqa: E731
    return [draw(n, width).bfloat16(), draw(n, 1), draw(n).abs(), draw(1, width), draw(rows, width)]


@pytest.mark.parametrize("kind", KINDS)
def test_pooling_kernels_equal_float64(kind):
    for lengths, width in (([300, 0, 1, 511, 17], 4096), ([100_000], 1024), ([3, 700], 1000)) if ON_GPU else (([3, 0, 1, 20], 24),):
        assert_pooling_equals_float64(kind, random_inputs(sum(lengths), width, len(lengths)), lengths)


@gpu_only
@pytest.mark.parametrize("kind", KINDS)
def test_pooling_kernels_reach_beyond_element_2_to_the_31(kind):
    """Three tokens behind 600,000 others."""
    _, scores, weights, query, coefficients = random_inputs(600_000, 1, 1)
    values = torch.zeros(600_000, 4096, dtype=torch.bfloat16, device=DEVICE)
    few, _, _, query, coefficients = random_inputs(3, 4096, 1)
    values[-3:] = few
    assert_pooling_equals_float64(kind, [values, scores, weights, query, coefficients], [3])


# -------------------------------------------------------------------------------------------- from a checkpoint to vectors


def test_a_run_that_is_resumed_with_dropout_ends_where_it_would_have_ended(tmp_path):
    straight, stopped, resumed = (Training(8, "float32", dropout=0.3, seed=seed) for seed in (0, 0, 1))
    torch.manual_seed(7)
    straight.steps(4)
    torch.manual_seed(7)
    stopped.steps(2)
    states = gather_random_states(stopped.encoder.device)
    save_checkpoint(tmp_path, stopped.encoder, stopped.trained, stopped.optimizer, stopped.state, {}, states)
    torch.manual_seed(8)
    resumed.state, _ = load_checkpoint(tmp_path, resumed.encoder, resumed.trained, resumed.optimizer)
    resumed.steps(2)
    worst = max((resumed.trained[name] - weight).abs().max().item() for name, weight in straight.trained.items())
    report(largest_difference=worst)
    assert worst < 1e-5


def test_encoding_that_runs_out_of_memory_goes_on_with_smaller_batches(monkeypatch):
    encoder = Encoder.load("tiny", prompt="cluster", device=DEVICE)
    texts, seen = [f"{text} {i}" for i in range(400 if ON_GPU else 4) for text in TEXTS], EncodingReport()
    with contextlib.ExitStack() as stack:
        if ON_GPU:
            encoder.encode(TEXTS)  # libraries set up
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            expected = encoder.encode(texts)
            needed = torch.cuda.max_memory_allocated() - before
            torch.cuda.empty_cache()
            stack.enter_context(memory_cap(torch.cuda.memory_reserved() + 0.4 * needed))
        else:
            expected, forward = encoder.encode(texts), Encoder.forward

            def small_only(self, batch, *rest):
                if len(batch.ids) > 60:
                    raise torch.OutOfMemoryError("out of memory")
                return forward(self, batch, *rest)

            monkeypatch.setattr(Encoder, "forward", small_only)
        vectors = encoder.encode(texts, report=seen)
    closeness = lowest_cosine(vectors, expected)
    report(halvings=len(seen.notes), cosine=closeness)
    assert seen.notes and "batches were halved" in seen.notes[0]
    assert closeness > (0.999 if ON_GPU else 0.999999)  # bfloat16 on a GPU


def test_compiled_layers_agree_and_are_not_compiled_again_after_the_third_length():
    eager, compiled = (Encoder.load("tiny", prompt="cluster", pooling="mean", device=DEVICE) for _ in range(2))
    if ON_GPU:
        compiled.compile()
    else:
        for block in compiled.blocks:  # the same graphs without a compiler behind them
            block.compile(dynamic=True, backend="eager")
    cosines = []
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), contextlib.ExitStack() as stack:
        for i in range(10):
            if i == 3:
                stack.enter_context(torch._dynamo.config.patch(error_on_recompile=True))
            texts = [f"{text} {n}" for n in range(1 + i * (5 if ON_GPU else 1)) for text in TEXTS]
            cosines.append(lowest_cosine(compiled.encode(texts), eager.encode(texts)))
    report(cosine=min(cosines))
    assert min(cosines) > (0.999 if ON_GPU else 0.99999)


def test_loaded_merged_and_training_time_vectors_are_the_same(tmp_path):
    training = Training(32, "bfloat16")
    training.steps(5 if ON_GPU else 1)
    with torch.no_grad(), attention_kernel(training.encoder):
        while_training = embed(training.encoder, training.encoder.tokenize(TEXTS), list(range(len(TEXTS)))).float().cpu().numpy()
    training.encoder.save(tmp_path)
    loaded = Encoder.load(str(tmp_path), dtype="bfloat16", device=DEVICE)
    vectors = loaded.encode(TEXTS)
    loaded.merge()
    cosines = {"loaded": lowest_cosine(while_training, vectors), "merged": lowest_cosine(while_training, loaded.encode(TEXTS))}
    report(**cosines)
    assert min(cosines.values()) > 0.9995 and loaded.merged
