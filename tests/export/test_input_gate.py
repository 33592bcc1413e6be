"""The input gate: what it warns of in drawn films and what was done to them, and what it lets pass."""

import io
import re
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

from helpers.export import FilmWarning, check_film, check_films, input_gate, measure_color
from helpers.export.input_gate import CODES, KINDS, film_features
from helpers.packing import FilmError
from helpers.runtime.settings import ROOT
from helpers.study.synthetic import draw_film, plan_phantom_study

sys.path.append(str(ROOT / "scripts"))
import drawn_pictures
from fit_input_gate import vary


@pytest.fixture(scope="module")
def films():
    """48 drawn films with all findings, 96 pixels; other patients than those that the model learned from."""
    drawn = [
        draw_film((99, film["patient"]), film["findings"], film["view"], film["sex"], film["age"], 96, film["visit"])[0]
        for film in plan_phantom_study(48, seed=99)
    ]
    return np.array(drawn)


def codes_of(films):
    return [tuple(warning.code for warning in found) for found in check_films(np.ascontiguousarray(films))]


def fit(picture, side):
    return cv2.resize(np.ascontiguousarray(picture), (side, side), interpolation=cv2.INTER_AREA)


def letterbox(film, width):
    """Squeezes a film to a width and pads it with black to its own."""
    side = len(film)
    left = (side - width) // 2
    padded = np.zeros_like(film)
    padded[:, left : left + width] = cv2.resize(film, (width, side), interpolation=cv2.INTER_AREA)
    return padded


def encode(pixels, kind="PNG", mode=None, **options):
    image = Image.fromarray(pixels)
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


def test_ordinary_films_give_no_warning(films):
    assert codes_of(films).count(()) >= len(films) - 1


@pytest.mark.parametrize("side", [64, 100, 128, 224, 512])
def test_the_size_of_a_film_does_not_matter(films, side):
    resized = np.array([fit(film, side) for film in films[:16]])
    assert codes_of(resized) == codes_of(films[:16]) == [()] * 16
    turned = np.rot90(resized, 2, (1, 2))
    assert codes_of(turned) == [("rotated",)] * 16


def test_mirrored_tilted_and_dimmed_films_pass(films):
    """A mirrored film cannot be told: the heart may lie on either side."""
    matrix = cv2.getRotationMatrix2D((47.5, 47.5), 10, 1)
    tilted = np.array([cv2.warpAffine(film, matrix, (96, 96)) for film in films])
    for changed in (films[:, :, ::-1], tilted, films // 2, films // 2 + 100):
        assert codes_of(changed).count(()) >= len(films) - 2


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("inverted", [False, True])
def test_turned_films_are_told_with_the_way_back(films, turns, inverted):
    turned = np.rot90(255 - films if inverted else films, turns, (1, 2))
    found = check_films(np.ascontiguousarray(turned))
    wanted = ["inverted", "rotated"] if inverted else ["rotated"]
    right = [warnings for warnings in found if [warning.code for warning in warnings] == wanted]
    assert len(right) >= len(films) - 2
    back = {1: "turn it back 90° clockwise.", 2: "turn it back by 180°.", 3: "turn it back 90° counterclockwise."}
    assert all(warnings[-1].reason.endswith(back[turns]) for warnings in right)


def test_inverted_films_are_told(films):
    assert codes_of(255 - films).count(("inverted",)) >= len(films) - 1


@pytest.mark.parametrize("width", [56, 72, 88])
def test_black_padding_does_not_disturb(films, width):
    """Also where the film itself is inverted, and its padding is not."""
    assert codes_of([letterbox(film, width) for film in films]).count(()) >= len(films) - 2
    assert codes_of([letterbox(255 - film, width) for film in films]).count(("inverted",)) >= len(films) - 2
    across = [letterbox(film, width).T for film in films]
    assert sum("rotated" in found for found in codes_of(across)) >= len(films) - 2


def test_empty_films_are_told_and_nothing_else_is_said_of_them(films):
    letter = np.full((96, 96), 3, "uint8")
    letter[10:16, 80:84] = 255
    blank = [np.full((96, 96), level, "uint8") for level in (0, 7, 128, 255)]
    assert codes_of([*blank, letter, films[0] // 10]) == [("empty",)] * 6


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
def test_other_drawn_pictures_are_told(draw, wanted, share):
    rng = np.random.default_rng(77)
    found = codes_of([getattr(drawn_pictures, draw)(rng, 96) for _ in range(40)])
    assert np.mean([bool(wanted & set(codes)) for codes in found]) >= share
    assert np.mean([bool(codes) for codes in found]) >= 0.85


def test_reasons_are_sentences_with_the_measured_value_and_the_limit(films):
    page = drawn_pictures.draw_page(np.random.default_rng(1), 128)
    lateral = drawn_pictures.draw_lateral(np.random.default_rng(1), 128)
    noise = drawn_pictures.draw_noise(np.random.default_rng(3), 128)
    turned = np.ascontiguousarray(255 - films[0].T)
    found = [check_film(page), check_film(lateral), check_film(noise), check_film(turned), check_film(0 * page, 40.0)]
    warnings = [warning for each in found for warning in each]
    assert {warning.code for warning in warnings} == set(CODES)
    for warning in warnings:
        assert isinstance(warning, FilmWarning)
        assert re.match(r"(The .*\d|\d+ %).*(limit|expected).*\.$", warning.reason), warning.reason
        assert "{" not in warning.reason


def test_one_film_and_many_in_batches_get_the_same(films):
    mixed = np.concatenate([films, 255 - films, np.rot90(films, 1, (1, 2)), films // 12])
    together = check_films(mixed)
    assert len(together) == len(mixed) > input_gate._BATCH
    assert together == [check_film(film) for film in mixed] == check_films(mixed[..., None])
    assert check_films(np.zeros((0, 96, 96), "uint8")) == []


def test_films_are_not_changed(films):
    before = films.copy()
    check_films(films)
    np.testing.assert_array_equal(films, before)
    films.flags.writeable = False
    check_films(films)
    films.flags.writeable = True


@pytest.mark.parametrize(
    ("films", "message"),
    [
        (np.zeros((2, 96, 96)), "float64 of shape"),
        (np.zeros((2, 96, 96), "uint16"), "uint16 of shape"),
        (np.zeros((2, 96, 80), "uint8"), r"\(2, 96, 80\)"),
        (np.zeros((2, 96, 96, 3), "uint8"), r"\(2, 96, 96, 3\)"),
        (np.zeros(9, "uint8"), r"\(9,\)"),
        (np.zeros((2, 31, 31), "uint8"), "31 pixels; expected 32 or more"),
    ],
)
def test_other_types_and_shapes_are_errors(films, message):
    with pytest.raises(ValueError, match=message):
        check_films(films)
    with pytest.raises(ValueError, match=message):
        film_features(films)


def test_colors_go_with_their_films(films):
    colors = np.zeros(4 * len(films))
    colors[input_gate._BATCH + 3] = 80  # in the second batch
    found = check_films(np.tile(films, (4, 1, 1)), colors)
    assert [place for place, warnings in enumerate(found) if "color" in [w.code for w in warnings]] == [131]
    found = check_films(films[:3], [0.0, 80.0, np.nan])
    assert [[warning.code for warning in warnings] for warnings in found] == [[], ["color"], []]
    assert check_film(films[0], 80.0) == found[1]
    with pytest.raises(ValueError, match="one for each of the 3 films"):
        check_films(films[:3], [1.0, 2.0])


def test_gray_has_no_color_however_it_is_stored(films):
    film, rgb = films[0], np.stack([films[0]] * 3, -1)
    opaque = np.concatenate([rgb, np.full((96, 96, 1), 255, "uint8")], -1)
    stored = [film, film.astype("uint16") * 257, rgb, opaque]
    assert [measure_color(encode(pixels)) for pixels in stored] == [0.0] * 4
    assert measure_color(encode(film, mode="P")) == measure_color(encode(film, mode="LA")) == 0.0
    assert measure_color(encode(rgb, "JPEG", quality=60)) < 1
    assert measure_color(encode(film, "JPEG")) == 0.0


def test_color_is_measured_in_gray_levels(films):
    tinted = np.stack([films[0] // 2 + 40, films[0] // 2 + 20, films[0] // 2], -1)
    for kind in ("PNG", "JPEG"):
        assert measure_color(encode(tinted, kind)) == pytest.approx(40, abs=3)
    assert measure_color(encode(tinted, mode="P")) > 20
    large = cv2.resize(tinted, (1000, 700))
    assert measure_color(encode(large, "JPEG")) == pytest.approx(40, abs=3)


def test_files_that_cannot_be_read_are_film_errors(films):
    data = encode(np.stack([films[0]] * 3, -1))
    for broken in (b"", b"nonsense", data[:20], data[: len(data) // 2]):
        with pytest.raises(FilmError):
            measure_color(broken)


def test_features_ignore_brightness_and_contrast(films):
    dark, bright = film_features(films // 2), film_features(films // 2 + 100)
    assert dark.shape == (len(films), 384) and dark.dtype == np.float32
    assert np.abs(dark - bright).mean() < 0.02


def test_the_model_is_the_one_that_is_documented():
    weights = input_gate._load_model()
    assert weights.shape == (len(KINDS), 385)
    assert np.isfinite(weights).all()
    # Softmax's classes are symmetric: what one gains the others lose, and the penalty keeps the sum at 0.
    assert np.abs(weights.sum(axis=0)).max() < 0.02


def test_varied_films_stay_films(films):
    rng = np.random.default_rng(5)
    varied = np.array([vary(film, rng) for film in films])
    assert varied.dtype == np.uint8 and varied.shape == films.shape
    assert codes_of(varied).count(()) >= 0.8 * len(films)


def test_real_films_pass_and_are_told_when_turned_or_inverted(shared_data):
    paths = sorted((shared_data / "nih_sample" / "images").glob("*.png"))[:60]
    paths += sorted((shared_data / "jsrt" / "images").glob("*.png"))[:60]
    if not paths:
        pytest.skip("needs the films of nih_sample and jsrt")
    real = np.array([fit(np.asarray(Image.open(path)), 128) for path in paths])
    assert codes_of(real).count(()) >= 0.95 * len(real)
    assert sum("inverted" in codes for codes in codes_of(255 - real)) >= 0.95 * len(real)
    for turns in (1, 2, 3):
        assert sum("rotated" in codes for codes in codes_of(np.rot90(real, turns, (1, 2)))) >= 0.95 * len(real)


@pytest.mark.parametrize("side", [40, 48])
def test_small_films_are_judged_too(side):
    """Short runs pack films below the gate's own 64 pixels."""
    films = np.stack([draw_film(seed, size=side)[0] for seed in range(8)])
    assert not any(check_films(films))
    turned = check_films(np.rot90(films, axes=(1, 2)))
    assert sum("rotated" in [warning.code for warning in found] for found in turned) >= 7
