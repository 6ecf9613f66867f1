"""The contrastive loss against cases computed by hand; gradients of chunks against those of the whole batch."""

import math

import pytest
import torch
import torch.nn.functional as F

from encoder import Encoder
from files.console import InputError
from training import gradients
from training.checkpoint import TrainingState
from training.gradients import batch_gradients, chunked_backward, embed
from training.losses import LossSettings, TextIds, batch_loss, info_nce, spread
from training.pair_data import Pair, PairBatch, tokenize_pairs

# ------------------------------------------------------------------------------------------------------------- the loss


def text_ids(anchors, positives, negatives=()) -> TextIds:
    return TextIds(*(torch.tensor(ids, dtype=torch.long) for ids in (anchors, positives, negatives)))


def different_texts(n: int, m: int = 0) -> TextIds:
    """Texts of n pairs and m hard negatives, no two of them equal."""
    return text_ids(range(n), range(n, 2 * n), range(2 * n, 2 * n + m))


def unit_vectors(n: int, seed: int, width: int = 8) -> torch.Tensor:
    return F.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


NONE = torch.zeros(0, 2)


def test_info_nce_by_hand():
    """Two pairs, similarities 1 and 0 at temperature 1: each direction costs -log(e / (e + 1))."""
    a = torch.eye(2)
    loss, accuracy, n_negatives, *_ = info_nce(a, a, NONE, different_texts(2), 1.0)
    assert loss.item() == pytest.approx(-math.log(math.e / (math.e + 1)), abs=1e-6)
    assert (accuracy, n_negatives) == (1, 1)
    loss, accuracy, *_ = info_nce(a, a.flip(0), NONE, different_texts(2), 1.0)
    assert loss.item() == pytest.approx(-math.log(1 / (math.e + 1)), abs=1e-6)
    assert accuracy == 0


def test_a_hard_negative_competes_with_the_positives_by_hand():
    """One that equals anchor 0 costs it -log(e / (e + 1 + e)), and anchor 1 an orthogonal one more; the way back is as before."""
    a = torch.eye(2)
    loss, _, n_negatives, *_ = info_nce(a, a, a[:1], different_texts(2, 1), 1.0)
    forth = -math.log(math.e / (2 * math.e + 1)) - math.log(math.e / (math.e + 2))
    back = -2 * math.log(math.e / (math.e + 1))
    assert loss.item() == pytest.approx((forth + back) / 4, abs=1e-6) and n_negatives == 2
    with_a_copy = info_nce(a, a, a[:1], text_ids([0, 1], [2, 3], [2]), 1.0)  # the hard negative is the positive of pair 0
    assert with_a_copy.n_negatives == 1.5 and with_a_copy.loss < loss


def test_the_margin_is_subtracted_from_the_pair_by_hand():
    a = torch.eye(2)
    loss, accuracy, *_ = info_nce(a, a, NONE, different_texts(2), 0.5, margin=0.25)
    assert loss.item() == pytest.approx(-math.log(math.exp(1.5) / (math.exp(1.5) + 1)), abs=1e-6)
    assert accuracy == info_nce(a, a, NONE, different_texts(2), 0.5, margin=0.99).accuracy == 1  # accuracy knows no margin


def test_negatives_like_the_positive_are_left_out():
    """Positives 0 and 1 are near copies: with a threshold neither is the other's negative, in either direction."""
    a, p = torch.eye(3), F.normalize(torch.tensor([[1.0, 0.1, 0], [1.0, 0.0, 0], [0, 0, 1.0]]), dim=-1)
    assert info_nce(a, p, NONE.new_zeros(0, 3), different_texts(3), 1.0).n_negatives == 2
    result = info_nce(a, p, NONE.new_zeros(0, 3), different_texts(3), 1.0, threshold=0.9)
    assert result.n_negatives == pytest.approx(4 / 3)
    left = torch.tensor([p[0, 0], 0.0])  # what anchor 0 still chooses from: its positive, and that of pair 2
    forth = [torch.logsumexp(left, 0) - left[0], torch.logsumexp(torch.tensor([0.0, 0.0]), 0), math.log(math.e + 2) - 1]
    similarity = p @ a.T
    back = [torch.logsumexp(similarity[i], 0) - similarity[i, i] for i in range(3)]  # anchors differ: none is left out
    assert result.loss.item() == pytest.approx(float(sum(forth) + sum(back)) / 6, abs=1e-6)


def test_a_few_rows_at_a_time_change_neither_loss_nor_gradient():
    results = []
    for rows_at_a_time in (100, 3):
        vectors = [unit_vectors(10, 0).requires_grad_(), unit_vectors(10, 1).requires_grad_(), unit_vectors(4, 2).requires_grad_()]
        ids = text_ids([0, 0, *range(1, 9)], range(20, 30), [20, 40, 41, 8])
        temperature = torch.tensor(0.1, requires_grad=True)
        loss, *rest, _ = info_nce(*vectors, ids, temperature, margin=0.1, threshold=0.5, rows_at_a_time=rows_at_a_time)
        loss.backward()
        results.append([loss.detach(), torch.tensor(rest), temperature.grad, *(v.grad for v in vectors)])
    for whole, in_slices in zip(*results, strict=True):
        torch.testing.assert_close(in_slices, whole, rtol=1e-10, atol=1e-12)


def test_spread_is_the_distance_of_vectors_from_their_mean():
    a, same = torch.eye(2), torch.tensor([[0.6, 0.8]] * 2)
    assert spread(a, a) == pytest.approx(0.5)  # two points, each at sqrt(2) / 2 from the middle
    assert spread(a, same) == spread(same, a) == pytest.approx(0, abs=1e-12)
    assert info_nce(a, same, a[:0], different_texts(2), 1.0).spread == spread(a, same)


def test_copies_are_no_negatives():
    """Pairs 0 and 1 share an anchor, the positive of pair 2 is the anchor of pair 3, pair 4 shares nothing."""
    ids = text_ids([0, 0, 1, 2, 5], [7, 8, 2, 3, 6])
    assert info_nce(unit_vectors(5, 0), unit_vectors(5, 1), unit_vectors(0, 2), ids, 0.05).n_negatives == pytest.approx(4 - 4 / 5)
    x = unit_vectors(5, 0).requires_grad_()
    anchors, positives = x[:1].expand(2, -1), unit_vectors(5, 1)[:1].expand(2, -1)
    loss, _, n_negatives, *_ = info_nce(anchors, positives, unit_vectors(0, 2), text_ids([0, 0], [7, 8]), 0.05)
    loss.backward()
    assert n_negatives == 0 and x.grad.abs().max() < 1e-6  # a batch of copies teaches nothing


def batch_of(*ids_of_pairs: list[int]) -> PairBatch:
    """A batch of which only the ids of the texts are looked at."""
    return PairBatch(None, None, None, [[] for _ in ids_of_pairs], list(ids_of_pairs), [], None, [None] * len(ids_of_pairs))


def test_matryoshka_averages_the_losses_of_shortened_vectors():
    vectors = [5 * unit_vectors(3, 0), unit_vectors(3, 1), unit_vectors(2, 2)]  # of any length: the loss normalizes them
    batch, ids = batch_of([0, 1, 6], [2, 3], [4, 5, 7]), text_ids([0, 2, 4], [1, 3, 5], [6, 7])
    settings = LossSettings(temperature=0.1, margin=0.2, mask_above=0.8)
    cosines = {"temperature": 0.1, "margin": 0.2, "threshold": 0.8}
    whole, short = (info_nce(*(F.normalize(v.float()[:, :d], dim=-1) for v in vectors), ids, **cosines) for d in (8, 3))
    plain = batch_loss(batch, torch.device("cpu"), settings)(*vectors)
    assert plain == whole
    both = batch_loss(batch, torch.device("cpu"), LossSettings(0.1, 0.2, 0.8, matryoshka=(3,)))(*vectors)
    assert both.loss.item() == pytest.approx((whole.loss + short.loss).item() / 2) and both[1:] == whole[1:]
    learned = batch_loss(batch, torch.device("cpu"), LossSettings(9.0, 0.2, 0.8), torch.tensor(math.log(0.1)))(*vectors)
    assert learned.loss.item() == pytest.approx(whole.loss.item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------ gradients


def trained_encoder(model: str, dropout: float = 0.0, **contract) -> Encoder:
    """An adapter whose weights are random numbers; a fresh one does nothing and has gradients of zero."""
    torch.manual_seed(0)
    encoder = Encoder.load(model, prompt="cluster", **contract)
    encoder.add_adapter(2, dropout=dropout)
    with torch.no_grad():
        for parameter in encoder.trainable().values():
            parameter.normal_(std=0.1)
    encoder.share_prefix = not dropout
    encoder.decoder.train()
    return encoder


def take_gradients(encoder: Encoder) -> dict[str, torch.Tensor]:
    gradients = {name: parameter.grad.clone() for name, parameter in encoder.trainable().items()}
    encoder.decoder.zero_grad()
    return gradients


@pytest.mark.parametrize("pooling", ["last", "attention"])
def test_gradients_reach_every_adapter_and_checkpointing_changes_none(model, pooling):
    encoder = trained_encoder(model, pooling=pooling, dtype=torch.float64)  # in float32 rounding differs by more than 1e-6 on some CPUs
    encoder.decoder.double()
    texts = encoder.tokenize(["The cat sat.", "A dog stood by the road.", "Rates rose.", "The bank raised its fees again."])
    gradients = []
    for every in (0, 1):
        encoder.set_gradient_checkpointing(every)
        vectors = embed(encoder, texts, [0, 1, 2, 3])
        info_nce(vectors[::2], vectors[1::2], vectors[:0], different_texts(2), 0.05).loss.backward()
        assert not any(p.grad is not None for name, p in encoder.decoder.named_parameters() if "lora_" not in name)
        gradients.append(take_gradients(encoder))
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())
    for name in gradients[0]:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], rtol=1e-4, atol=1e-6)


PAIRS = [Pair(f"The cat {i}.", f"A dog stood by road {i}, waiting.", (f"fees {i}",) * (i % 3)) for i in range(7)]


@pytest.mark.parametrize("every", [0, 1, 2])
def test_chunks_give_the_gradient_of_the_whole_batch(model, every):
    """In float64, with dropout: each chunk must draw the masks that the whole batch drew."""
    encoder = trained_encoder(model, dropout=0.3, pooling="last", dtype=torch.float64)
    encoder.decoder.double()
    encoder.set_gradient_checkpointing(every)
    batch = tokenize_pairs(encoder, PAIRS)
    chunks = [
        [(batch.anchors, rows), (batch.positives, rows), (batch.negatives, [j for i in rows for j in batch.negative_rows[i]])]
        for rows in ([0, 1, 2], [3, 4], [5, 6])
    ]
    sizes = [[7], [7], [sum(map(len, batch.negative_rows))]]
    ids = text_ids([i[0] for i in batch.text_ids], [i[1] for i in batch.text_ids], [j for i in batch.text_ids for j in i[2:]])

    def loss_of(*vectors):
        return info_nce(*(F.normalize(v, dim=-1) for v in vectors), ids, 0.05)

    torch.manual_seed(5)
    vectors = [torch.cat(kind) for kind in zip(*([embed(encoder, *texts) for texts in chunk] for chunk in chunks), strict=True)]
    loss_of(*vectors).loss.backward()
    whole, next_number = take_gradients(encoder), torch.rand(1)
    torch.manual_seed(5)
    result = chunked_backward(encoder, chunks, sizes, loss_of)
    assert torch.equal(torch.rand(1), next_number)  # the random generator is where the whole batch left it
    for name, gradient in take_gradients(encoder).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-6, atol=1e-9)
    assert max(gradient.abs().max() for gradient in whole.values()) > 1e-3 and result.loss > 0


def test_training_and_encoding_give_the_same_vectors(model):
    encoder = trained_encoder(model)
    texts = ["The cat sat.", "", "A dog stood by the road, waiting.", "a"]
    vectors = embed(encoder, encoder.tokenize(texts), [2, 0, 3, 1]).detach().numpy()
    assert abs(vectors - encoder.encode(texts)[[2, 0, 3, 1]]).max() < 1e-6
    assert embed(encoder, encoder.tokenize([]), []).shape == (0, encoder.width)


# -------------------------------------------------------------------------------------------------- when memory runs out


class Trainer:
    """One batch with dropout and a learned temperature, and what a step makes of it."""

    def __init__(self, model: str, dropout: float = 0.3):
        self.encoder = trained_encoder(model, dropout)
        self.log_temperature = torch.nn.Parameter(torch.tensor(math.log(0.05)))
        self.optimizer = torch.optim.AdamW([*self.encoder.trainable().values(), self.log_temperature])
        self.batch = tokenize_pairs(self.encoder, PAIRS)

    def step(self, state: TrainingState) -> dict[str, torch.Tensor]:
        """The gradients of the batch, from the same random numbers each time, the one after which is returned with them."""
        self.optimizer.zero_grad()
        self.encoder.set_gradient_checkpointing(state.gradient_checkpointing)
        torch.manual_seed(7)
        loss_of = batch_loss(self.batch, self.encoder.device, LossSettings(), self.log_temperature)
        loss = batch_gradients(self.encoder, self.batch, state, loss_of, self.optimizer).loss.detach()
        gradients = {name: parameter.grad.clone() for name, parameter in self.encoder.trainable().items()}
        return gradients | {"temperature": self.log_temperature.grad.clone(), "loss": loss, "random": torch.rand(1)}


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


def assert_same_gradients(gradients: dict, expected: dict) -> None:
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-6)


def test_ever_smaller_chunks_are_tried_until_they_fit(llama, monkeypatch, capsys):
    trainer, state = Trainer(llama, dropout=0.0), TrainingState(chunk_size=100, gradient_checkpointing=0)
    expected, limit = trainer.step(TrainingState(7, 0)), 2  # texts of one kind at a time; a pair has up to two hard negatives
    monkeypatch.setattr(gradients, "embed", lambda *args: embed(*args) if len(args[2]) <= limit else out_of_memory())
    assert_same_gradients(trainer.step(state), expected)
    lines = capsys.readouterr().err.splitlines()
    settings = ["--gradient-checkpointing 2", "--gradient-checkpointing 1", "--chunk-size 3", "--chunk-size 1"]
    assert lines == [f"out of memory: going on with {setting}" for setting in settings]
    assert (state.chunk_size, state.gradient_checkpointing) == (1, 1)
    assert all(block.gradient_checkpointing for block in trainer.encoder.blocks)
    limit = 0
    with pytest.raises(InputError, match="a single pair does not fit into memory"):
        trainer.step(state)


@pytest.mark.parametrize("fails_at", ["embed", "backward_from_gradients"])
def test_a_batch_that_is_begun_again_gives_the_same_gradients(llama, monkeypatch, fails_at):
    """Memory runs out once dropout has drawn its masks, or when the temperature has its gradient already."""
    trainer, original, calls = Trainer(llama), getattr(gradients, fails_at), []
    expected = trainer.step(TrainingState(3, 0))

    def fails_once(*args):
        calls.append(original(*args))
        return out_of_memory() if len(calls) == 2 else calls[-1]

    monkeypatch.setattr(gradients, fails_at, fails_once)
    state = TrainingState(3, 0)
    assert_same_gradients(trainer.step(state), expected)
    assert state.gradient_checkpointing == 2 and len(calls) > 2


def test_other_errors_are_not_taken_for_a_lack_of_memory(llama, monkeypatch):
    def broken(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(gradients, "embed", broken)
    with pytest.raises(RuntimeError, match="broken"):
        Trainer(llama).step(TrainingState(7, 0))
