"""The input gate: its warnings for synthetic images, changed and unchanged, and for other pictures."""

import re
import sys

import cv2
import numpy as np
import pytest
from made_images import encode
from PIL import Image

from helpers.export import check_image, check_images, input_gate, measure_color
from helpers.export.input_gate import CODES, KINDS, ImageWarning, image_features
from helpers.packing import ImageError
from helpers.runtime.settings import ROOT
from helpers.study.synthetic import draw_image, plan_synthetic_study

sys.path.append(str(ROOT / "scripts"))
import drawn_pictures
from fit_input_gate import vary


@pytest.fixture(scope="module")
def images():
    """24 synthetic images with all findings, 96 pixels; other patients than those that the model was fitted to."""
    drawn = [
        draw_image(
            (99, image["patient"]), image["findings"], image["view"], image["sex"], image["age"], 96, image["visit"]
        )[0]
        for image in plan_synthetic_study(24, seed=99)
    ]
    return np.array(drawn)


def codes_of(images):
    return [tuple(warning.code for warning in found) for found in check_images(np.ascontiguousarray(images))]


def fit(picture, side):
    return cv2.resize(np.ascontiguousarray(picture), (side, side), interpolation=cv2.INTER_AREA)


def letterbox(image, width):
    """Squeezes an image to a width and pads it with black to its own."""
    side = len(image)
    left = (side - width) // 2
    padded = np.zeros_like(image)
    padded[:, left : left + width] = cv2.resize(image, (width, side), interpolation=cv2.INTER_AREA)
    return padded


def test_ordinary_images_give_no_warning(images):
    assert codes_of(images).count(()) >= len(images) - 1


@pytest.mark.parametrize("side", [64, 100, 128, 224, 512])
def test_the_size_of_an_image_does_not_matter(images, side):
    resized = np.array([fit(image, side) for image in images[:16]])
    assert codes_of(resized) == codes_of(images[:16]) == [()] * 16
    turned = np.rot90(resized, 2, (1, 2))
    assert codes_of(turned) == [("rotated",)] * 16


def stretch(images):
    """Spreads each image over all gray levels."""
    low, high = (reduce(axis=(1, 2), keepdims=True).astype(float) for reduce in (images.min, images.max))
    return ((images - low) / (high - low) * 255).astype(np.uint8)


def test_mirrored_tilted_and_dimmed_images_pass(images):
    """A mirrored image cannot be recognized: the heart may lie on either side."""
    images = stretch(images)
    matrix = cv2.getRotationMatrix2D((47.5, 47.5), 10, 1)
    tilted = np.array([cv2.warpAffine(image, matrix, (96, 96)) for image in images])
    for changed in (images[:, :, ::-1], tilted, images // 4 * 3, images // 4 * 3 + 50):
        assert codes_of(changed).count(()) >= len(images) - 2
    for dim in (images // 2, images // 2 + 100):  # the other half of the gray levels is not used
        assert codes_of(dim).count(("narrow",)) >= len(images) - 2


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("inverted", [False, True])
def test_turned_images_are_recognized_with_the_way_back(images, turns, inverted):
    turned = np.rot90(255 - images if inverted else images, turns, (1, 2))
    found = check_images(np.ascontiguousarray(turned))
    wanted = ["inverted", "rotated"] if inverted else ["rotated"]
    right = [warnings for warnings in found if [warning.code for warning in warnings] == wanted]
    assert len(right) >= len(images) - 2
    back = {1: "turn it back 90° clockwise.", 2: "turn it back by 180°.", 3: "turn it back 90° counterclockwise."}
    assert all(warnings[-1].reason.endswith(back[turns]) for warnings in right)


def test_inverted_images_are_recognized(images):
    assert codes_of(255 - images).count(("inverted",)) >= len(images) - 1


@pytest.mark.parametrize("width", [56, 72, 88])
def test_black_padding_does_not_disturb(images, width):
    """Also where the image itself is inverted, and its padding is not."""
    assert codes_of([letterbox(image, width) for image in images]).count(()) >= len(images) - 2
    assert codes_of([letterbox(255 - image, width) for image in images]).count(("inverted",)) >= len(images) - 2
    across = [letterbox(image, width).T for image in images]
    assert sum("rotated" in found for found in codes_of(across)) >= len(images) - 2


def test_empty_images_get_that_warning_only(images):
    letter = np.full((96, 96), 3, "uint8")
    letter[10:16, 80:84] = 255
    blank = [np.full((96, 96), level, "uint8") for level in (0, 7, 128, 255)]
    assert codes_of([*blank, letter, images[0] // 10]) == [("empty",)] * 6


def test_images_that_leave_half_of_the_gray_levels_unused_are_named_and_judged_all_the_same(images):
    """15 of 16 bits, of which the upper half is empty, also in an inverted image; none of them as they are."""
    assert not any("narrow" in found for found in codes_of(images))
    assert all("narrow" in found for found in codes_of(images // 2))
    assert all(set(found) >= {"narrow", "inverted"} for found in codes_of((255 - images) // 2))


@pytest.mark.parametrize(
    ("draw", "wanted", "share"),
    [
        ("draw_lateral", {"lateral"}, 0.8),
        ("draw_page", {"screenshot", "empty"}, 0.9),
        ("draw_extremity", {"not_chest"}, 0.6),
        ("draw_noise", {"not_chest", "empty"}, 0.8),
        ("draw_scene", {"not_chest"}, 0.6),
    ],
)
def test_other_synthetic_pictures_are_recognized(draw, wanted, share):
    rng = np.random.default_rng(77)
    found = codes_of([getattr(drawn_pictures, draw)(rng, 96) for _ in range(40)])
    assert np.mean([bool(wanted & set(codes)) for codes in found]) >= share
    assert np.mean([bool(codes) for codes in found]) >= 0.85


def test_reasons_are_sentences_with_the_measured_value_and_the_limit(images):
    page = drawn_pictures.draw_page(np.random.default_rng(1), 128)
    lateral = drawn_pictures.draw_lateral(np.random.default_rng(1), 128)
    noise = drawn_pictures.draw_noise(np.random.default_rng(3), 128)
    turned = np.ascontiguousarray(255 - images[0].T)
    found = [
        check_image(page),
        check_image(lateral),
        check_image(noise),
        check_image(turned),
        check_image(0 * page, 40.0),
        check_image(images[0] // 2),
    ]
    warnings = [warning for each in found for warning in each]
    assert {warning.code for warning in warnings} == set(CODES)
    for warning in warnings:
        assert isinstance(warning, ImageWarning)
        assert re.match(r"(The .*\d|\d+ %).*(limit|expected).*\.$", warning.reason), warning.reason
        assert "{" not in warning.reason


def test_one_image_and_many_in_batches_get_the_same(images):
    mixed = np.concatenate([images, 255 - images, np.rot90(images, 1, (1, 2)), images // 12] * 2)
    together = check_images(mixed)
    assert len(together) == len(mixed) > input_gate._BATCH
    assert together == [check_image(image) for image in mixed] == check_images(mixed[..., None])
    assert check_images(np.zeros((0, 96, 96), "uint8")) == []


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (np.zeros((2, 96, 96)), "float64 of shape"),
        (np.zeros((2, 96, 96), "uint16"), "uint16 of shape"),
        (np.zeros((2, 96, 80), "uint8"), r"\(2, 96, 80\)"),
        (np.zeros((2, 96, 96, 3), "uint8"), r"\(2, 96, 96, 3\)"),
        (np.zeros(9, "uint8"), r"\(9,\)"),
        (np.zeros((2, 31, 31), "uint8"), "31 pixels; expected 32 or more"),
    ],
)
def test_other_types_and_shapes_are_errors(pictures, message):
    with pytest.raises(ValueError, match=message):
        check_images(pictures)
    with pytest.raises(ValueError, match=message):
        image_features(pictures)


def test_colors_go_with_their_images(images):
    colors = np.zeros(6 * len(images))
    colors[input_gate._BATCH + 3] = 80  # in the second batch
    found = check_images(np.tile(images, (6, 1, 1)), colors)
    assert [place for place, warnings in enumerate(found) if "color" in [w.code for w in warnings]] == [131]
    found = check_images(images[:3], [0.0, 80.0, np.nan])
    assert [[warning.code for warning in warnings] for warnings in found] == [[], ["color"], []]
    assert check_image(images[0], 80.0) == found[1]
    with pytest.raises(ValueError, match="one for each of the 3 images"):
        check_images(images[:3], [1.0, 2.0])


def test_gray_has_no_color_however_it_is_stored(images):
    image, rgb = images[0], np.stack([images[0]] * 3, -1)
    opaque = np.concatenate([rgb, np.full((96, 96, 1), 255, "uint8")], -1)
    stored = [image, image.astype("uint16") * 257, rgb, opaque]
    assert [measure_color(encode(pixels)) for pixels in stored] == [0.0] * 4
    assert measure_color(encode(image, mode="P")) == measure_color(encode(image, mode="LA")) == 0.0
    assert measure_color(encode(rgb, "JPEG", quality=60)) < 1
    assert measure_color(encode(image, "JPEG")) == 0.0


def test_color_is_measured_in_gray_levels(images):
    tinted = np.stack([images[0] // 2 + 40, images[0] // 2 + 20, images[0] // 2], -1)
    for kind in ("PNG", "JPEG"):
        assert measure_color(encode(tinted, kind)) == pytest.approx(40, abs=3)
    assert measure_color(encode(tinted, mode="P")) > 20
    large = cv2.resize(tinted, (1000, 700))
    assert measure_color(encode(large, "JPEG")) == pytest.approx(40, abs=3)


def test_files_that_cannot_be_read_are_image_errors(images):
    data = encode(np.stack([images[0]] * 3, -1))
    for broken in (b"", b"nonsense", data[:20], data[: len(data) // 2]):
        with pytest.raises(ImageError):
            measure_color(broken)


def test_features_ignore_brightness_and_contrast(images):
    images = images[:, 12:-12, 12:-12]  # black borders are cut off, and gray ones are not
    dark, bright = image_features(images // 2), image_features(images // 2 + 100)
    assert dark.shape == (len(images), 384) and dark.dtype == np.float32
    assert np.abs(dark - bright).mean() < 0.02


def test_the_model_is_the_one_that_is_documented():
    weights = input_gate._load_model()
    assert weights.shape == (len(KINDS), 385)
    assert np.isfinite(weights).all()
    # Softmax's classes are symmetric: what one gains the others lose, and the penalty keeps the sum at 0.
    assert np.abs(weights.sum(axis=0)).max() < 0.02


def test_varied_images_stay_images(images):
    rng = np.random.default_rng(5)
    varied = np.array([vary(image, rng) for image in images])
    assert varied.dtype == np.uint8 and varied.shape == images.shape
    assert codes_of(varied).count(()) >= 0.8 * len(images)


@pytest.mark.slow
def test_real_images_pass_and_are_recognized_when_turned_or_inverted(shared_data):
    paths = sorted((shared_data / "nih_sample" / "images").glob("*.png"))[:20]
    paths += sorted((shared_data / "jsrt" / "images").glob("*.png"))[:20]
    if not paths:
        pytest.skip("needs the images of nih_sample and jsrt")
    real = np.array([fit(np.asarray(Image.open(path)), 128) for path in paths])
    assert codes_of(real).count(()) >= 0.95 * len(real)
    assert sum("inverted" in codes for codes in codes_of(255 - real)) >= 0.95 * len(real)
    for turns in (1, 2, 3):
        assert sum("rotated" in codes for codes in codes_of(np.rot90(real, turns, (1, 2)))) >= 0.95 * len(real)


@pytest.mark.parametrize("side", [40, 48])
def test_small_images_are_judged_too(side):
    """Short runs pack images below the gate's own 64 pixels."""
    images = np.stack([draw_image(seed, size=side)[0] for seed in range(8)])
    assert not any(check_images(images))
    turned = check_images(np.rot90(images, axes=(1, 2)))
    assert sum("rotated" in [warning.code for warning in found] for found in turned) >= 7
