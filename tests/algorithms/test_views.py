"""Views: each a function of its image and its counted numbers alone, with the meaning it says."""

import colorsys
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from gossamer.algorithms.contrastive import crops, recipes, views
from gossamer.algorithms.contrastive.draws import Draws
from gossamer.algorithms.contrastive.recipes import STL10, Digits, ImageNet100, SimCLR
from gossamer.algorithms.contrastive.views import ImageViews
from gossamer.algorithms.tasks.arrays import TensorDataset
from gossamer.runtime.component import validate
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.random import Random

kornia = pytest.importorskip("kornia", reason="needs the extra: gossamer[contrastive]")

RECIPES = [Digits(), SimCLR(), STL10(size=20), ImageNet100(size=9)]


def photographs(count=6, channels=3, height=16, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, height, width, generator=generator)


def draws(ids, step=0, draw=0):
    return Draws(Random(3), "test", list(ids), step, draw)


def image_views(images, mode="infinite", recipe=None, seed=3, **fields):
    dataset = TensorDataset((images,))
    return ImageViews(mode, recipe or Digits(), dataset, Random(seed), **fields)


# --- each image alone -------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_view_does_not_depend_on_the_images_beside_it(recipe, channels):
    images = photographs(40, channels)
    together = recipe.augment(images, draws(range(40)))
    assert together.shape[2:] == recipe.view_size(16, 12)
    some = [31, 2, 17]
    assert torch.equal(recipe.augment(images[some], draws(some)), together[some])
    for k in range(0, 40, 7):
        assert torch.equal(recipe.augment(images[k : k + 1], draws([k]))[0], together[k])


@pytest.mark.parametrize("mode", ["infinite", "finite"])
def test_views_are_counted_by_image_view_step_and_draw_as_the_mode_says(mode):
    images, ids = photographs(), torch.arange(6)
    made = image_views(images, mode)

    def view(view=0, seed=9, step=0, draw=0):
        return made.view((images,), ids, view, Random(seed), step, draw)[0]

    assert torch.equal(view(), view())
    assert not torch.equal(view(), view(view=1))
    changes = [view(step=1), view(draw=1), view(seed=8)]
    assert all(torch.equal(changed, view()) == (mode == "finite") for changed in changes)
    same = image_views(images, mode, seed=4).view((images,), ids, 0, Random(9), 0, 0)[0]
    assert torch.equal(same, view()) == (mode == "infinite")


def test_fixed_views_are_the_same_kept_or_made_anew(monkeypatch):
    images, ids = photographs(), torch.tensor([4, 1])
    kept = image_views(images, "finite")
    found = [kept.held((images[ids],), ids, view)[0] for view in (0, 1)]
    assert set(kept._kept) == {0, 1}
    monkeypatch.setattr(views, "_KEPT_BYTES", 0)
    anew = image_views(images, "finite")
    for view in (0, 1):
        assert torch.equal(anew.held((images[ids],), ids, view)[0], found[view])
        visited = anew.view((images[ids],), ids, view, Random(0), 5, 1)[0]
        assert torch.equal(visited, found[view])
        assert torch.equal(anew.evaluated((images[ids],), ids, view)[0], found[view])
    assert not anew._kept


def test_what_is_held_of_fresh_views_is_the_image_without_augmentation():
    images, ids = photographs(), torch.arange(6)
    made = image_views(images)
    assert torch.equal(made.held((images,), ids, 1)[0], images)
    seen = [made.evaluated((images,), ids, view)[0] for view in (0, 1)]
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], made.view((images,), ids, 0, Random(3), 0, 0)[0])
    small = image_views(images, recipe=SimCLR(size=8)).held((images,), ids, 0)[0]
    assert small.shape == (6, 3, 8, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_are_the_same_images_as_numbers_in_the_tasks_dtype(dtype):
    stored = (photographs() * 255).to(torch.uint8)
    ids = torch.arange(6)
    for images in (stored, stored.float() / 255):
        made = image_views(images, dtype=dtype)
        found = made.view((images,), ids, 0, Random(0), 2, 0)[0]
        expected = Digits().augment(
            stored.float() / 255, Draws(Random(0), "contrastive/view-0", range(6), 2)
        )
        assert found.dtype == dtype
        assert torch.equal(found, expected.to(dtype))


# --- the recipe of digits ---------------------------------------------------------------------


def test_digits_are_shifted_into_black_and_scaled_by_the_stated_amounts():
    image = photographs(1, 1, 5, 5)
    images = image.expand(400, 1, 5, 5)
    found = Digits(noise=0).augment(images, draws(range(400)))
    padded = torch.nn.functional.pad(image[0, 0], (1, 1, 1, 1))
    seen, gains = set(), []
    for view in found[:, 0]:
        moves = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
        candidates = {(y, x): padded[1 - y : 6 - y, 1 - x : 6 - x] for y, x in moves}
        fits = {}
        for move, moved in candidates.items():
            gain = float((view * moved).sum() / moved.square().sum())
            if torch.allclose(view, gain * moved, atol=1e-6):
                fits[move] = gain
        ((move, gain),) = fits.items()
        seen.add(move)
        gains.append(gain)
    assert len(seen) == 9
    assert 0.7 <= min(gains) < 0.72
    assert 1.28 < max(gains) <= 1.3


def test_noise_has_the_stated_deviation():
    images = torch.zeros(50, 1, 20, 20)
    found = Digits().augment(images, draws(range(50)))
    # 20,000 normals: the sample's deviation is within 3 % of 0.1 beyond doubt.
    assert found.std().item() == pytest.approx(0.1, rel=0.03)


# --- crops ------------------------------------------------------------------------------------


def test_crops_have_the_areas_and_ratios_asked_for_and_lie_inside():
    numbers = draws(range(3000)).uniforms(crops.NUMBERS)
    boxes = crops.sample_boxes(numbers, 96, 96, (0.08, 1.0), (3 / 4, 4 / 3)).double()
    top, left, tall, wide = boxes.unbind(1)
    assert (boxes[:, :2] >= 0).all()
    assert (top + tall <= 96).all()
    assert (left + wide <= 96).all()
    share, ratio = tall * wide / 96**2, wide / tall
    # Sides are whole pixels, half a pixel from what was drawn.
    assert share.min() > 0.07
    assert share.max() <= 1
    assert 0.72 < ratio.min() < 0.77
    assert 1.3 < ratio.max() < 1.38
    assert (top == 0).any()
    assert (top + tall == 96).any()
    # Areas are uniform; the largest of extreme ratio do not fit and are drawn again.
    assert share.mean().item() == pytest.approx(0.5, abs=0.04)
    assert ratio.log().mean().item() == pytest.approx(0, abs=0.02)


def test_where_no_crop_fits_the_largest_central_one_is_taken():
    numbers = draws(range(4)).uniforms(crops.NUMBERS)
    boxes = crops.sample_boxes(numbers, 100, 10, (1.0, 1.0), (3 / 4, 4 / 3))
    assert boxes.tolist() == [[43, 0, 13, 10]] * 4
    boxes = crops.sample_boxes(numbers, 10, 100, (1.0, 1.0), (3 / 4, 4 / 3))
    assert boxes.tolist() == [[0, 43, 10, 13]] * 4


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_resized_crop_is_that_of_pillow(mirrored):
    images = photographs(3, 1, 20, 24)
    boxes = torch.tensor([[0, 0, 20, 24], [3, 5, 10, 7], [19, 23, 1, 1]])
    size = (30, 32)  # Pillow filters where it shrinks, so that enlarging alone can be compared
    found = crops.resized_crops(images, boxes, size, torch.tensor([mirrored] * 3))
    for image, view, (top, left, tall, wide) in zip(images, found, boxes.tolist(), strict=True):
        whole = Image.fromarray(image[0].numpy())
        part = whole.crop((left, top, left + wide, top + tall)).resize((32, 30), Image.BILINEAR)
        expected = torch.from_numpy(np.array(part))
        expected = expected.flip(1) if mirrored else expected
        # Positions pass through -1..1 in float32: an error of 1e-5 pixels.
        torch.testing.assert_close(view[0], expected, rtol=0, atol=2e-5)


def test_a_crop_of_everything_is_the_image():
    images = photographs(2)
    boxes = torch.tensor([[0, 0, 16, 12]] * 2)
    same = crops.resized_crops(images, boxes, (16, 12), torch.tensor([False, True]))
    torch.testing.assert_close(same[0], images[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(same[1], images[1].flip(2), rtol=0, atol=1e-5)


# --- colors -----------------------------------------------------------------------------------

PLAIN = {"scale": (1, 1), "ratio": (1, 1), "mirror": 0, "gray": 0, "blur_probability": 0}


def of_pillow(image, enhancer, factor):
    picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    return torch.from_numpy(np.array(enhancer(picture).enhance(factor))).permute(2, 0, 1) / 255


@pytest.mark.parametrize(
    ("k", "enhancer"),
    [(0, ImageEnhance.Brightness), (1, ImageEnhance.Contrast), (2, ImageEnhance.Color)],
)
def test_changes_of_color_are_pillows_with_factors_from_one_less_to_one_more(k, enhancer):
    strength = [0.0] * 4
    strength[k] = 0.8
    recipe = SimCLR(jitter=strength, jitter_probability=1, **PLAIN)
    images = (photographs(30, 3, 12, 12) * 255).round() / 255
    found = recipe.augment(images, draws(range(30)))
    numbers = draws(range(30)).uniforms(crops.NUMBERS + 6)[:, crops.NUMBERS + 2 :]
    factors = 0.2 + 1.6 * numbers[:, k]
    for image, view, factor in zip(images, found, factors.tolist(), strict=True):
        # Pillow rounds to bytes: the mean of the grays, the grays, and the result.
        torch.testing.assert_close(view, of_pillow(image, enhancer, factor), rtol=0, atol=0.012)


def test_hue_turns_on_the_color_circle():
    recipe = SimCLR(jitter=(0, 0, 0, 0.2), jitter_probability=1, **PLAIN)
    images = photographs(8, 3, 4, 4)
    found = recipe.augment(images, draws(range(8)))
    turns = 0.4 * draws(range(8)).uniforms(crops.NUMBERS + 6)[:, -1] - 0.2
    for image, view, turn in zip(images, found, turns.tolist(), strict=True):
        for y in range(4):
            h, s, v = colorsys.rgb_to_hsv(*image[:, y, 0].tolist())
            expected = torch.tensor(colorsys.hsv_to_rgb((h + turn) % 1, s, v))
            torch.testing.assert_close(view[:, y, 0], expected, rtol=0, atol=1e-4)


def test_the_order_of_changes_is_drawn_for_each_image(monkeypatch):
    enhance = kornia.enhance
    names = [
        "adjust_brightness_accumulative",
        "adjust_contrast_with_mean_subtraction",
        "adjust_saturation_with_gray_subtraction",
        "adjust_hue",
    ]
    calls = []
    for k, name in enumerate(names):
        marked = lambda images, amounts, k=k: calls.append((k, len(images))) or images * 4 + k  # noqa: E731
        monkeypatch.setattr(enhance, name, marked)
    images = torch.zeros(600, 3, 8, 8)
    found = SimCLR(**PLAIN | {"jitter_probability": 0.5}).augment(images, draws(range(600)))
    codes = found[:, 0, 0, 0].long().tolist()
    orders = [tuple((code // 4**k) % 4 for k in (3, 2, 1, 0)) for code in codes if code]
    assert {tuple(sorted(order)) for order in orders} == {(0, 1, 2, 3)}
    assert len(set(orders)) == 24
    assert len(orders) / 600 == pytest.approx(0.5, abs=0.07)


def test_gray_has_the_usual_weights_and_comes_with_its_probability():
    images = photographs(500, 3, 4, 4)
    recipe = SimCLR(**PLAIN | {"gray": 0.2, "jitter_probability": 0})
    found = recipe.augment(images, draws(range(500)))
    is_gray = (found == found[:, :1]).flatten(1).all(dim=1)
    assert is_gray.double().mean().item() == pytest.approx(0.2, abs=0.06)
    weights = torch.tensor([0.299, 0.587, 0.114])
    expected = torch.einsum("bchw,c->bhw", images[is_gray], weights)
    torch.testing.assert_close(found[is_gray][:, 2], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(found[~is_gray], images[~is_gray], rtol=0, atol=1e-4)


def test_blur_is_gaussian_with_the_drawn_deviation():
    impulse = torch.zeros(40, 1, 41, 41)
    impulse[:, :, 20, 20] = 1
    recipe = SimCLR(**PLAIN | {"blur_probability": 1, "jitter_probability": 0, "blur": (0.5, 2)})
    found = recipe.augment(impulse, draws(range(40)))[:, 0]
    deviations = 0.5 + 1.5 * draws(range(40)).uniforms(crops.NUMBERS + 13)[:, -1]
    distance = torch.arange(41) - 20.0
    for view, deviation in zip(found, deviations, strict=True):
        weights = (-0.5 * (distance / deviation).square()).exp()
        weights[distance.abs() > 6] = 0  # three deviations of the widest
        weights = weights / weights.sum()
        torch.testing.assert_close(view, weights[:, None] * weights, rtol=0, atol=2e-5)


def test_the_papers_recipes_are_these():
    assert (STL10().size, STL10().jitter, STL10().blur_probability) == (96, (0.8, 0.8, 0.8, 0.2), 1)
    other = ImageNet100()
    assert (other.size, other.jitter, other.scale) == (224, (0.4, 0.4, 0.2, 0.1), (0.08, 1.0))
    for recipe in (STL10(), other):
        assert (recipe.jitter_probability, recipe.gray, recipe.blur) == (0.8, 0.2, (0.1, 2.0))
        assert recipe.mirror == 0.5


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": [0.5, 0.2]}, r"recipe\.scale: must be the least and the greatest value"),
        ({"scale": [0.5, 2]}, r"recipe\.scale\.1: must be less than or equal to 1, got 2"),
        ({"jitter": [0.8, 0.8, 0.8, 0.6]}, r"recipe\.jitter\.3: must be less than or equal to 0.5"),
        ({"blur": [0, 2]}, r"recipe\.blur\.0: must be greater than 0"),
        ({"size": -1}, r"recipe\.size: must be greater than or equal to 0, got -1"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        validate(SimCLR, {"name": "simclr", **fields}, "recipe")


def test_images_of_two_channels_are_refused():
    with pytest.raises(ConfigError, match=r"task\.views\.recipe: takes images of 1 or 3 channels"):
        SimCLR().require(2, 8, 8)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "kornia", None)
    with pytest.raises(ConfigError, match=r"'kornia' .*pip install 'gossamer\[contrastive\]'"):
        SimCLR().require(3, 8, 8)
    Digits().require(1, 8, 8)
    assert math.isfinite(Digits().augment(photographs(1), draws([0])).sum())
    assert recipes.Digits is Digits
