"""Augmentation: what each draw does, beside an independent reference, and that it needs no Python while it runs."""

import math

import numpy as np
import pytest
import tensorflow as tf
from scipy.ndimage import affine_transform

from helpers.augmentation import N_DRAWS, Augmentation, augment

NO_CHANGE = Augmentation(min_area=1, max_stretch=1, rotation=0, translation=0, contrast=0, brightness=0)


def draw(n=1, **named):
    """Returns draws that change nothing (0.5 everywhere), but for those named."""
    places = {"area": 0, "stretch": 1, "x": 2, "y": 3, "rotation": 4, "flip": 5, "contrast": 6, "brightness": 7}
    places |= {"erased": 8, "hole_ratio": 9, "hole_x": 10, "hole_y": 11}
    draws = np.full((n, N_DRAWS), 0.5, np.float32)
    for name, values in named.items():
        draws[:, places[name]] = values
    return tf.constant(draws)


def change(image, image_size=None, *, draws=None, **strength):
    """Augments one image (height, width) and returns one."""
    strength = Augmentation(**{name: getattr(NO_CHANGE, name) for name in vars(NO_CHANGE)} | strength)
    result = augment(image[None, ..., None], draw() if draws is None else draws, image_size or len(image), strength)
    return result.numpy()[0, ..., 0]


def find_center(image):
    """Returns x and y of the center of mass, in pixels."""
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    return (image * x).sum() / image.sum(), (image * y).sum() / image.sum()


def make_dot(side, x, y, radius=3.0):
    """Returns a smooth bright dot on black."""
    rows, columns = np.mgrid[:side, :side]
    return np.rint(200 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * radius**2))).astype(np.uint8)


def make_draws(n, seed=0):
    return tf.constant(np.random.default_rng(seed).random((n, N_DRAWS)), tf.float32)


NOISE = np.random.default_rng(2).integers(0, 256, (32, 32), dtype=np.uint8)


def test_no_strength_gives_the_image_back_whatever_is_drawn():
    images = np.repeat(NOISE[None, ..., None], 50, 0)
    np.testing.assert_allclose(augment(images, make_draws(50), 32, NO_CHANGE), images, atol=1e-3)


def test_middling_draws_of_the_default_strength_are_a_centered_crop():
    dot = make_dot(64, 31.5, 31.5, 5)
    x, y = find_center(change(dot, **vars(Augmentation())))
    assert (x, y) == pytest.approx((31.5, 31.5), abs=0.01)


def test_no_image_is_ever_upside_down():
    image = np.zeros((16, 16, 1), np.uint8)
    image[:8] = 200
    for strength in (Augmentation(), Augmentation(horizontal_flip=True, rotation=15, contrast=0.5)):
        images = augment(np.repeat(image[None], 1000, 0), make_draws(1000), 16, strength).numpy()[..., 0]
        # The middle, since a crop may leave the image at its border.
        assert (images[:, 2:6, 4:12].mean((1, 2)) > images[:, -6:-2, 4:12].mean((1, 2)) + 20).all()


def test_images_are_mirrored_only_where_asked_for_and_then_half_of_them():
    image = np.zeros((16, 16, 1), np.uint8)
    image[:, :8] = 200
    images = np.repeat(image[None], 1000, 0)
    left, right = np.s_[:, 4:12, 2:6], np.s_[:, 4:12, -6:-2]
    plain = augment(images, make_draws(1000), 16, Augmentation()).numpy()[..., 0]
    assert (plain[left].mean((1, 2)) > plain[right].mean((1, 2))).all()
    flipped = augment(images, make_draws(1000), 16, Augmentation(horizontal_flip=True)).numpy()[..., 0]
    assert 440 < (flipped[left].mean((1, 2)) < flipped[right].mean((1, 2))).sum() < 560


def test_a_mirrored_image_is_the_image_mirrored():
    mirrored = change(NOISE, draws=draw(flip=0.2), horizontal_flip=True)
    np.testing.assert_allclose(mirrored, NOISE[:, ::-1], atol=1e-3)
    np.testing.assert_allclose(change(NOISE, draws=draw(flip=0.7), horizontal_flip=True), NOISE, atol=1e-3)


@pytest.mark.parametrize(("name", "axis"), [("x", 1), ("y", 0)])
@pytest.mark.parametrize(("drawn", "pixels"), [(1.0, 4), (0.0, -4), (0.75, 2), (0.5, 0)])
def test_translation_moves_the_image_and_leaves_black(name, axis, drawn, pixels):
    """An eighth of 32 pixels is 4; the crop moves to higher places, so what is seen moves to lower ones."""
    image = np.maximum(NOISE, 1)
    moved = change(image, draws=draw(**{name: drawn}), translation=0.125)
    expected = np.roll(image, -pixels, axis).astype(float)
    if pixels:
        beyond = np.s_[-pixels:] if pixels > 0 else np.s_[:-pixels]
        expected[(slice(None),) * axis + (beyond,)] = 0
    np.testing.assert_allclose(moved, expected, atol=1e-3)


@pytest.mark.parametrize("angle", [7, -7, 30])
@pytest.mark.parametrize("flip", [False, True])
def test_rotation_turns_about_the_center(angle, flip):
    """A positive angle turns what is seen counterclockwise, with y pointing down; mirroring comes after."""
    side, middle = 129, 64.0
    sine, cosine = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    for u, v in ((40, 0), (0, -40), (-25, 30)):
        dot = make_dot(side, middle + u, middle + v)
        draws = draw(rotation=1.0 if angle > 0 else 0.0, flip=0.0)
        turned = change(dot, draws=draws, rotation=abs(angle), horizontal_flip=flip)
        x, y = cosine * u + sine * v, -sine * u + cosine * v
        expected = middle + (-x if flip else x), middle + y
        assert find_center(turned) == pytest.approx(expected, abs=0.1)
        assert turned.sum() == pytest.approx(dot.sum(), rel=1e-3)  # neither squeezed nor stretched


def test_a_crop_of_a_quarter_of_the_area_doubles_the_middle():
    dots = make_dot(64, 31.5 + 6, 31.5 - 4, 2)
    zoomed = change(dots, 64, draws=draw(area=0.0), min_area=0.25)
    assert find_center(zoomed) == pytest.approx((31.5 + 12, 31.5 - 8), abs=0.1)
    assert zoomed.sum() == pytest.approx(4 * dots.sum(), rel=1e-2)
    np.testing.assert_allclose(change(dots, 32, draws=draw(area=0.0), min_area=0.25), dots[16:48, 16:48], atol=1e-3)


def test_the_area_of_crops_is_uniform_between_its_limits():
    """Measured on a ramp, whose slope in the result is the width of the crop."""
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))[None, ..., None]
    draws = draw(400, area=np.linspace(0, 1, 400))
    images = augment(np.repeat(ramp, 400, 0), draws, 64, Augmentation(0.25, 1, 0, 0, 0, 0)).numpy()[..., 0]
    share = ((images[:, 32, 52] - images[:, 32, 12]) / 40 / (255 / 63)) ** 2
    np.testing.assert_allclose(share, np.linspace(0.25, 1, 400), atol=0.03)  # gray levels are whole numbers


def test_augmentation_is_the_same_eagerly_and_in_a_dataset():
    images = np.random.default_rng(1).integers(0, 256, (12, 24, 24, 1), dtype=np.uint8)
    draws, strength = make_draws(12), Augmentation(horizontal_flip=True)
    eager = augment(images, draws, 20, strength).numpy()
    assert eager.tobytes() == augment(images, draws, 20, strength).numpy().tobytes()
    data = tf.data.Dataset.from_tensor_slices((images, draws)).batch(4, drop_remainder=True)
    data = data.map(lambda images, draws: augment(images, draws, 20, strength))
    assert data.element_spec == tf.TensorSpec((4, 20, 20, 1), tf.float32)
    np.testing.assert_allclose(np.concatenate(list(data.as_numpy_iterator())), eager, atol=1e-3)
    # An image's result does not depend on its neighbors in the batch.
    np.testing.assert_allclose(augment(images[5:6], draws[5:6], 20, strength), eager[5:6], atol=1e-3)


# All at once, beside an independent reference


def refer(image, draws, size, strength):
    """Augments one image by scipy, in float64, from the meaning of the draws."""
    area, stretch, x, y, angle, flip, contrast, brightness = np.asarray(draws, float)[:8]
    side = len(image)
    crop = side * math.sqrt(strength.min_area + (1 - strength.min_area) * area)
    width, height = crop * strength.max_stretch ** (stretch - 0.5), crop / strength.max_stretch ** (stretch - 0.5)
    margin = side * strength.translation
    left, top = (place * (side - extent + 2 * margin) - margin for place, extent in ((x, width), (y, height)))
    if not strength.rotation:
        left, top, width, height = (round(value) for value in (left, top, width, height))
    angle = math.radians(strength.rotation) * (2 * angle - 1)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])  # of (row, column)
    mirror = -1 if strength.horizontal_flip and flip < 0.5 else 1
    matrix = turn @ np.diag([height / size, mirror * width / size])
    center = np.array([top + height / 2 - 0.5, left + width / 2 - 0.5])
    start = center - matrix @ np.full(2, (size - 1) / 2)
    warped = affine_transform(np.pad(image.astype(float), side), matrix, start + side, (size, size), order=1)
    gain = 1 + strength.contrast * (2 * contrast - 1)
    return np.clip(127.5 + gain * (warped - 127.5) + 255 * strength.brightness * (2 * brightness - 1), 0, 255)


@pytest.mark.parametrize("rotation", [0, 7, 25])
@pytest.mark.parametrize("size", [40, 56])
def test_all_draws_together_give_what_scipy_gives(rotation, size):
    """To 0.02 gray levels, of 255. Without rotation a crop's edge repeats itself, so there the edge is left out."""
    strength = Augmentation(0.5, 1.3, rotation, 0.1, 0.3, 0.2, horizontal_flip=True)
    images = np.random.default_rng(3).integers(0, 256, (30, 48, 48, 1), dtype=np.uint8)
    draws = make_draws(30, 4)
    results = augment(images, draws, size, strength).numpy()[..., 0]
    expected = [refer(image[..., 0], draw, size, strength) for image, draw in zip(images, draws, strict=True)]
    inside = np.s_[:, 1:-1, 1:-1]
    np.testing.assert_allclose(results[inside], np.array(expected)[inside], atol=0.02)
    assert results.min() == 0 and results.max() == 255


# Erasing


def test_as_many_images_are_erased_as_asked_for_in_one_gray_rectangle():
    images = np.full((400, 32, 32, 1), 10, np.uint8)
    strength = Augmentation(1, 1, 0, 0, 0, 0, erasing=0.25)
    results = augment(images, make_draws(400), 32, strength).numpy()[..., 0]
    assert set(np.unique(results)) == {10, 127.5}
    erased = [result == 127.5 for result in results if (result == 127.5).any()]
    assert 75 < len(erased) < 125
    for hole in erased:
        rows, columns = hole.any(1), hole.any(0)
        assert (hole == rows[:, None] & columns).all()
        assert np.ptp(np.flatnonzero(rows)) + 1 == rows.sum() and np.ptp(np.flatnonzero(columns)) + 1 == columns.sum()
    shares = np.array([hole.mean() for hole in erased])
    assert shares.min() < 0.05 and 0.25 < shares.max() < 0.36
    assert any(hole[0].any() for hole in erased) and any(hole[-1].any() for hole in erased)


@pytest.mark.parametrize(("x", "y", "corner"), [(0.0, 0.0, np.s_[:8, :8]), (1.0, 0.0, np.s_[:8, -8:])])
def test_the_draws_place_the_rectangle(x, y, corner):
    share = (8 * 8 / 32**2 - 0.02) / 0.31  # of the range of areas
    result = change(NOISE, draws=draw(erased=share * 0.5, hole_x=x, hole_y=y), erasing=0.5)
    expected = NOISE.astype(float)
    expected[corner] = 127.5
    np.testing.assert_allclose(result, expected, atol=1e-3)
