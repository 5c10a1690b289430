"""Boxes, masks, ratios and labels of CutMix, and one seed per item."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from noisecutmix import make_mask_and_ratio
from noisecutmix.errors import InputError
from noisecutmix.plan import Item, Plan, area_ratio, draw_mask, sample_cutmix_box
from noisecutmix.preview import draw_preview

sides = st.integers(1, 600)
alphas = st.floats(1e-3, 1e3)
seeds = st.integers(0, 2**63 - 1)


@given(height=sides, width=sides, alpha=alphas, seed=seeds)
def test_box_mask_and_ratio_agree(height, width, alpha, seed):
    box = sample_cutmix_box(height, width, alpha, np.random.default_rng(seed))
    left, top, right, bottom = box
    assert 0 <= left <= right <= width and 0 <= top <= bottom <= height

    mask = draw_mask(box, height, width)
    pixels = np.asarray(mask)
    assert mask.mode == "L" and mask.size == (width, height)
    assert set(np.unique(pixels)) <= {0, 255}
    assert (pixels[top:bottom, left:right] == 255).all()
    assert area_ratio(box, height, width) == pytest.approx((pixels == 255).mean(), abs=1e-12)
    public, ratio = make_mask_and_ratio((height, width, 3), alpha, np.random.default_rng(seed))
    assert public == mask and ratio == area_ratio(box, height, width)


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf"), 1.7e308, 1e-320, 10**400])
def test_alpha_has_to_be_positive(alpha):
    with pytest.raises(InputError, match="alpha"):
        make_mask_and_ratio((8, 8, 3), alpha)
    with pytest.raises(InputError, match="alpha"):
        Plan(0, 2, alpha, 32)


@pytest.mark.parametrize("alpha", [True, "1", None, torch.tensor(1.0), np.array([1.0])])
def test_alpha_has_to_be_a_number(alpha):
    with pytest.raises(InputError, match="alpha: has to be a number from 1e-06 to 1e"):
        make_mask_and_ratio((8, 8, 3), alpha)
    with pytest.raises(InputError, match="alpha: has to be a number from 1e-06 to 1e"):
        Plan(0, 2, alpha, 32)


@pytest.mark.parametrize("size", [(8.0, 8, 3), (8, True), (0, 8), (8, -1), (torch.tensor(8), 8), ("8", "8")])
def test_size_has_to_hold_whole_numbers(size):
    with pytest.raises(InputError, match="size: has to be "):
        make_mask_and_ratio(size, 1.0)


NOT_WHOLE_NUMBERS = [True, np.True_, 1.0, np.float32(1), "1", torch.tensor(1), np.array([1]), -1]


@pytest.mark.parametrize("value", NOT_WHOLE_NUMBERS, ids=repr)
def test_counts_and_indices_have_to_be_whole_numbers(value):
    good = {"seed": 0, "num_classes": 3, "alpha": 1.0, "resolution": 32}
    for name in ("seed", "num_classes", "resolution"):
        with pytest.raises(InputError, match=f"{name}: has to be a whole number"):
            Plan(**{**good, name: value})
    for name in ("index", "target", "aug"):
        with pytest.raises(InputError, match=f"{name}: has to be a whole number"):
            Plan(**good).item(**{"index": 0, name: value})
        with pytest.raises(InputError, match=f"{name}: has to be a whole number"):
            dataclasses.replace(Plan(**good).item(0), **{name: value})


@pytest.mark.parametrize("labels", [{"target": 3}, {"aug": 3}, {"target": 10**30}])
def test_a_label_out_of_range_is_refused(labels):
    with pytest.raises(InputError, match=f"{next(iter(labels))}: has to be a whole number from 0 to 2"):
        Plan(0, 3, 1.0, 32).item(0, **labels)


@pytest.mark.parametrize("ratio", [float("nan"), -0.1, 1.1, True, "0.5"])
def test_an_items_ratio_is_a_share(ratio):
    with pytest.raises(InputError, match="ratio: has to be a number from 0 to 1"):
        dataclasses.replace(Plan(0, 3, 1.0, 32).item(0), ratio=ratio)


def test_numpy_numbers_equal_python_numbers():
    plan = Plan(np.int64(5), np.uint8(3), np.float32(1), np.int32(32))
    item = plan.item(np.int16(4), np.uint8(2), np.int64(0))
    assert item == Plan(5, 3, 1.0, 32).item(4, 2, 0)
    assert json.loads(json.dumps([dataclasses.astuple(plan), dataclasses.astuple(item)]))
    mask, ratio = make_mask_and_ratio(np.zeros((8, 6, 3)).shape, np.float64(1), np.random.default_rng(0))
    assert mask.size == (6, 8) and 0 <= ratio <= 1


def test_the_box_no_longer_changes_at_the_ends_of_alphas_range():
    """lambda ~ Beta(alpha, alpha) is 0 or 1 at the lower end and 1/2 at the upper end, within less than a pixel."""
    for index in range(300):
        left, top, right, bottom = Plan(0, 2, 1e-6, 512).item(index).box
        # the box is empty, or it is the full square, clipped
        assert (right - left, bottom - top) == (0, 0) or min(right - left, bottom - top) >= 256
    boxes = [Plan(0, 2, 1e6, 512).item(index).box for index in range(300)]
    assert max(right - left for left, _, right, _ in boxes) == pytest.approx(512 * np.sqrt(0.5), abs=3)


@given(seed=seeds, index=st.integers(0, 10**9), classes=st.integers(2, 200), alpha=alphas, resolution=sides)
def test_label_shares_follow_the_box(seed, index, classes, alpha, resolution):
    item = Plan(seed, classes, alpha, resolution).item(index)
    label = item.soft_label(classes)
    assert item.target != item.aug
    assert label.dtype == np.float32 and label.shape == (classes,)
    assert label.sum() == pytest.approx(1, abs=1e-6)  # two float32 roundings
    assert label[item.target] == pytest.approx(item.ratio, abs=1e-7)
    assert label[item.aug] == pytest.approx(1 - item.ratio, abs=1e-7)
    assert item.ratio == area_ratio(item.box, resolution, resolution)


@given(seed=seeds, index=st.integers(0, 10**6))
def test_an_item_depends_on_seed_and_index_alone(seed, index):
    plan = Plan(seed, 10, 1.0, 32)
    assert plan.item(index) == Plan(seed, 10, 1.0, 32).item(index)
    assert plan.item(index).noise_seed != plan.item(index + 1).noise_seed
    assert plan.item(index).noise_seed != Plan((seed + 1) % 2**63, 10, 1.0, 32).item(index).noise_seed


@given(seed=seeds, index=st.integers(0, 10**6), target=st.integers(0, 9), aug=st.integers(0, 9))
def test_chosen_classes_keep_box_and_noise(seed, index, target, aug):
    plan = Plan(seed, 10, 1.0, 32)
    item = plan.item(index)
    if target == aug:
        with pytest.raises(InputError, match="differ"):
            plan.item(index, target, aug)
        return
    chosen = plan.item(index, target, aug)
    assert (chosen.target, chosen.aug) == (target, aug)
    assert (chosen.box, chosen.noise_seed) == (item.box, item.noise_seed)
    assert plan.item(index, target).aug != target
    assert plan.item(index, aug=aug).target != aug


def test_boxes_of_one_pixel_can_be_previewed():
    for left in range(20):
        item = Item(0, 0, 1, (left, left, left + 1, left + 1), 0.0, 0, 10)
        draw_preview([Image.new("RGB", (512, 512))], [item], ["one", "two"])


def test_classes_are_uniform():
    items = [Plan(0, 5, 1.0, 32).item(index) for index in range(5000)]
    pairs = np.zeros((5, 5))
    for item in items:
        pairs[item.target, item.aug] += 1
    assert (np.diag(pairs) == 0).all()
    expected = 5000 / 20
    off_diagonal = pairs[~np.eye(5, dtype=bool)]
    assert abs(off_diagonal - expected).max() < 5 * np.sqrt(expected)  # five standard deviations of a count


def test_mean_area_is_that_of_cutmix():
    """With alpha 1, lambda is uniform, a box has the side s = sqrt(1 - lambda), and its centre is uniform.

    After clipping, the mean length of a side s in [0, 1] is s - s^2 / 4, so the mean area is the mean of its square.
    """
    ratios = [Plan(0, 2, 1.0, 512).item(index).ratio for index in range(20_000)]
    side = np.sqrt(np.linspace(0, 1, 100_001))
    expected = np.mean((side - side**2 / 4) ** 2)
    standard_error = np.std(ratios) / np.sqrt(len(ratios))
    pixel = 2 / 512  # sides are rounded down to whole, even pixels
    assert abs(np.mean(ratios) - expected) < 4 * standard_error + pixel


@pytest.mark.parametrize("change", [{"seed": -1}, {"num_classes": 1}, {"alpha": 0.0}, {"resolution": 0}])
def test_an_invalid_plan_is_refused(change):
    with pytest.raises(InputError, match=next(iter(change))):
        Plan(**{"seed": 0, "num_classes": 2, "alpha": 1.0, "resolution": 32, **change})


@given(seed=seeds, index=st.integers(0, 10**6), alpha=alphas)
def test_an_item_of_a_single_class_differs_in_its_box_alone(seed, index, alpha):
    mixed, single = (Plan(seed, 7, alpha, 16, single).item(index) for single in (False, True))
    assert dataclasses.replace(mixed, box=(0, 0, 16, 16), ratio=1.0) == single
    assert single.soft_label(7).tolist() == np.eye(7)[mixed.target].tolist()
    assert single.mask().getextrema() == (255, 255)
