"""Self-supervised learning: losses against their formulas, views, masks, schedules, what is trained."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import (
    BeitConfig,
    BeitModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

from files.console import InputError
from pathology import crops, dino

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 40, "patch_size": 8}


def small(kind: str, seed: int = 0):
    torch.manual_seed(seed)
    if kind == "vit":
        return ViTModel(ViTConfig(**SIZES, intermediate_size=32), add_pooling_layer=False).eval()
    if kind == "dinov2":
        return Dinov2Model(Dinov2Config(**SIZES)).eval()
    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3)).eval()


# -------------------------------------------------------------------------------------------------------------- losses


def test_sinkhorn_gives_rows_that_sum_to_one_and_prototypes_an_equal_share():
    cosines = torch.rand(64, 8) * 0.2
    cosines[:, 0] += 0.3  # without centring all rows would choose the first
    assert (cosines.argmax(1) == 0).float().mean() > 0.9
    shares = dino.sinkhorn(cosines, 0.07, iterations=50)
    torch.testing.assert_close(shares.sum(1), torch.ones(64))
    torch.testing.assert_close(shares.sum(0), torch.full((8,), 8.0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(dino.sinkhorn(cosines, 0.07).sum(1), torch.ones(64))
    assert dino.sinkhorn(cosines[:0], 0.07).shape == (0, 8)


def test_dino_loss_pairs_every_view_with_the_teachers_other_views():
    torch.manual_seed(0)
    targets, large, small_views = torch.rand(2, 3, 5).softmax(-1), torch.randn(2, 3, 5), torch.randn(2, 3, 5)

    def entropy(target, cosines):
        return -(target * torch.log_softmax(cosines / 0.1, -1)).sum(-1).mean()

    pairs = [(0, large[1]), (1, large[0]), *((t, view) for view in small_views for t in (0, 1))]
    expected = sum(entropy(targets[t], view) for t, view in pairs) / 6
    torch.testing.assert_close(dino.dino_loss(targets, large, small_views), expected)


def test_ibot_loss_weighs_views_alike_whatever_their_masks():
    targets, cosines = torch.eye(4)[[0, 1, 2]], torch.randn(3, 4)
    each = dino.cross_entropy(targets, cosines)
    loss = dino.ibot_loss(targets, cosines, torch.tensor([0, 2, 2]), n_views=4)
    torch.testing.assert_close(loss, (each[0] + (each[1] + each[2]) / 2) / 4)
    assert dino.ibot_loss(targets[:0], cosines[:0], torch.tensor([], dtype=torch.long), 4) == 0


def test_koleo_is_lower_where_vectors_keep_apart():
    apart = torch.eye(4)
    assert dino.koleo_loss(apart).item() == pytest.approx(-math.log(math.sqrt(2)), abs=1e-4)
    near = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0]])
    nearest = math.log(2 - 2 * math.cos(math.atan(0.01))) / 2
    expected = -(2 * nearest + math.log(2 - 2 * math.sin(math.atan(0.01))) / 2) / 3
    assert dino.koleo_loss(near).item() == pytest.approx(expected, abs=1e-3)
    assert dino.koleo_loss(near[:1]) == 0


def test_variance_is_that_of_directions():
    assert dino.variance(torch.ones(5, 3)) == pytest.approx(0, abs=1e-6)
    assert dino.variance(torch.tensor([[2.0, 0], [-1.0, 0]])) == pytest.approx(1)


# ------------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "vit"])
def test_a_resized_grid_gives_the_states_that_interpolation_gives(kind):
    model, views = small(kind), torch.randn(2, 3, 24, 24)
    new = dino.resized(model, 24).eval()
    assert new.config.image_size == 24 and model.config.image_size == 40
    more = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    torch.testing.assert_close(new(views).last_hidden_state, model(views, **more).last_hidden_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "vit"])
def test_tokens_are_class_and_patches_and_a_mask_hides_pixels(kind):
    model, views = dino.resized(small(kind), 24).eval(), torch.randn(2, 3, 24, 24)
    first, patches = dino.tokens(model, views)
    assert first.shape == (2, 16) and patches.shape == (2, 9, 16)
    masks = torch.zeros(2, 9, dtype=torch.bool)
    masks[:, 4] = True
    hidden = dino.tokens(model, views, masks)[0]
    views[:, :, 8:16, 8:16] = 7  # the token in the middle
    torch.testing.assert_close(dino.tokens(model, views, masks)[0], hidden)
    assert not torch.allclose(dino.tokens(model, views)[0], first)


def test_models_that_cannot_be_trained_and_sizes_that_do_not_fit_are_refused():
    beit = BeitModel(BeitConfig(**SIZES, intermediate_size=32))
    with pytest.raises(InputError, match="of type beit cannot be trained here: take one of type dinov2"):
        dino.check_backbone(beit, (40,))
    with pytest.raises(InputError, match="a view of 20 pixels is no whole number of patches of 8: take 16 or 24"):
        dino.check_backbone(small("dinov2"), (40, 20))


def networks(kind: str = "dinov2") -> tuple[dino.Network, dino.Network]:
    torch.manual_seed(1)
    student, teacher = (dino.Network(dino.resized(small(kind), 24), 32) for _ in range(2))
    teacher.load_state_dict(student.state_dict())
    return student, teacher.requires_grad_(False)


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "vit"])
def test_gradients_reach_every_trained_weight_of_the_student_and_none_of_the_teacher(kind):
    student, teacher = networks(kind)
    pixels = torch.randint(0, 255, (6, 32, 32, 3), dtype=torch.uint8)
    views = crops.make_views(pixels, 24, 16, 2, torch.zeros(3), torch.ones(3), torch.Generator().manual_seed(0))
    masks = crops.draw_masks(12, 3, np.random.default_rng(0))
    losses = dino.compute_losses(student, teacher, views, masks, 0.04, 0.1)
    torch.testing.assert_close(losses.total, losses.dino + losses.ibot + 0.1 * losses.koleo)
    losses.total.backward()
    assert [name for name, p in dino.trained_parameters(student) if p.grad is None] == []
    assert all(p.grad is None for p in teacher.parameters())


def test_the_teacher_is_a_moving_average():
    student, teacher = networks()
    before = [p.clone() for p in teacher.parameters()]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    dino.update_teacher(teacher, student, 0.9)
    for old, new in zip(before, teacher.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.1)


def test_learning_rates_fall_with_depth_and_prototypes_stand_still_at_first():
    student, _ = networks()
    optimizer = torch.optim.AdamW(dino.parameter_groups(student, 0.5), lr=0.0)
    dino.set_rates(optimizer, 1.0, 0.04, frozen_prototypes=True)
    rates, decays = ({id(p): g[key] for g in optimizer.param_groups for p in g["params"]} for key in ("lr", "weight_decay"))
    by_name = {name: id(p) for name, p in student.named_parameters()}
    assert rates[by_name["backbone.layernorm.weight"]] == 1 and decays[by_name["backbone.layernorm.weight"]] == 0
    layers = [next(i for n, i in by_name.items() if n.startswith("backbone.") and f".{layer}." in n) for layer in range(3)]
    assert [rates[i] for i in layers] == [0.5**3, 0.5**2, 0.5]
    assert rates[by_name["backbone.embeddings.position_embeddings"]] == 0.5**4
    assert rates[by_name["backbone.embeddings.patch_embeddings.projection.weight"]] == pytest.approx(0.2 * 0.5**4)
    assert decays[by_name["backbone.embeddings.patch_embeddings.projection.weight"]] == 0.04
    assert decays[by_name["backbone.embeddings.cls_token"]] == 0
    assert rates[by_name["dino_head.prototypes"]] == 0 and rates[by_name["dino_head.mlp.0.weight"]] == 1
    dino.set_rates(optimizer, 1.0, 0.04, frozen_prototypes=False)
    assert {g["lr"] for g in optimizer.param_groups if g["prototypes"]} == {1.0}


def test_schedules_begin_and_end_where_they_should():
    assert dino.cosine(0, 100, 0.992, 1) == 0.992 and dino.cosine(100, 100, 0.992, 1) == 1
    assert [dino.teacher_temperature(step, 100) for step in (0, 30, 99)] == pytest.approx([0.04, 0.07, 0.07])


# ------------------------------------------------------------------------------------------------------ views and masks


def test_views_have_their_sizes_repeat_with_their_seed_and_differ_otherwise():
    pixels = torch.randint(0, 255, (4, 50, 50, 3), dtype=torch.uint8)

    def views(seed):
        return crops.make_views(pixels, 40, 20, 3, torch.zeros(3), torch.ones(3), torch.Generator().manual_seed(seed))

    one, again, other = views(0), views(0), views(1)
    assert one.large.shape == (8, 3, 40, 40) and one.small.shape == (12, 3, 20, 20)
    assert torch.equal(one.large, again.large) and torch.equal(one.small, again.small) and not torch.equal(one.large, other.large)
    assert one.large.min() >= 0 and one.large.max() <= 1
    assert not torch.allclose(one.large[:4], one.large[4:])


def test_a_crop_shows_a_part_of_the_picture_of_the_size_asked_for_in_all_four_flips():
    ramp = torch.linspace(0, 1, 64)
    pictures = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64)])[None].expand(200, -1, -1, -1)
    views = crops.crop_and_flip(pictures, 32, (0.25, 0.25), torch.Generator().manual_seed(0))
    across, down = (views[:, 0, :, -1] - views[:, 0, :, 0]).mean(1), (views[:, 1, -1] - views[:, 1, 0]).mean(1)
    area = (across * down).abs() * (32 / 31) ** 2 * (63 / 64) ** 2
    torch.testing.assert_close(area, torch.full((200,), 0.25), rtol=0.06, atol=0)
    assert {(a > 0, d > 0) for a, d in zip(across.tolist(), down.tolist(), strict=True)} == {(x, y) for x in (0, 1) for y in (0, 1)}


def test_hue_keeps_grey_and_brightness_and_a_full_turn_is_nothing():
    matrices = crops.hue_matrices(torch.tensor([0.0, 1.0, 2 * math.pi]))
    torch.testing.assert_close(matrices[0], torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(matrices[2], torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(matrices[1] @ torch.ones(3), torch.ones(3), atol=1e-4, rtol=0)
    grey = torch.tensor(crops.GREY)
    torch.testing.assert_close(grey @ matrices[1], grey, atol=1e-4, rtol=0)


def test_jitter_changes_most_views_and_makes_some_grey():
    views = torch.rand(400, 3, 4, 4)
    changed = crops.jitter(views, torch.Generator().manual_seed(0))
    is_grey = torch.isclose(changed[:, :1], changed, atol=1e-6).all(1).all(-1).all(-1)
    same = (changed == views).flatten(1).all(1)
    assert 0.14 < is_grey.float().mean() < 0.26 and 0.1 < same.float().mean() < 0.22
    assert changed.min() >= 0 and changed.max() <= 1


def test_blur_is_the_gaussian_and_keeps_even_areas():
    views = torch.rand(5, 3, 224, 224)
    blurred = crops.blur(views, 1.0, torch.Generator().manual_seed(0))
    sigma = torch.rand((5, 1), generator=torch.Generator().manual_seed(0)) * 1.9 + 0.1
    taps = torch.exp(-0.5 * ((torch.arange(9) - 4) / sigma[2]) ** 2)
    kernel = (taps / taps.sum())[:, None] * (taps / taps.sum())
    expected = functional.conv2d(views[2][:, None], kernel[None, None])[:, 0]
    torch.testing.assert_close(blurred[2][:, 4:-4, 4:-4], expected, rtol=1e-4, atol=1e-5)
    even = torch.full((2, 3, 20, 20), 0.3)
    torch.testing.assert_close(crops.blur(even, 1.0, torch.Generator()), even)
    torch.testing.assert_close(crops.blur(views, 0.0, torch.Generator()), views)


def test_masks_hide_a_tenth_to_a_half_of_half_of_the_views():
    masks = crops.draw_masks(200, 14, np.random.default_rng(0))
    shares = masks.float().mean(1)
    assert masks.shape == (200, 196) and (shares > 0).sum() == 100
    assert 0.08 < shares[shares > 0].min() < 0.15 and 0.45 < shares.max() <= 0.505
    assert crops.draw_masks(3, 2, np.random.default_rng(0)).any(1).sum() == 2
    mask = crops.block_mask(14, 40, np.random.default_rng(0))
    alone = mask[1:-1, 1:-1] & ~(mask[:-2, 1:-1] | mask[2:, 1:-1] | mask[1:-1, :-2] | mask[1:-1, 2:])
    assert mask.sum() <= 40 and alone.sum() <= 2  # rectangles, not single tokens
