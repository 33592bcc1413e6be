"""Tests of evaluation.saliency with networks whose maps are known, by finite differences, and by painting by hand."""

import os
import subprocess
import sys
import zlib

import keras
import numpy as np
import pandas as pd
import pytest

from helpers.evaluation import (
    boxed_findings,
    center_prior,
    grad_cam,
    gradient_map,
    localization_table,
    occlusion_map,
    score_maps,
    smooth_grad,
    smooth_maps,
)
from helpers.study import BOX_FRAME

pytestmark = pytest.mark.slow
L = keras.layers
SIDE = 64
METHODS = {
    "gradient": gradient_map,
    "smooth": lambda model, images, **options: smooth_grad(model, images, n_samples=8, noise=0.05, **options),
    "occlusion": lambda model, images, **options: occlusion_map(model, images, 12, 6, **options),
}


class Witness(L.Layer):
    """Passes its input on and notes the shape of whatever is compiled."""

    def __init__(self, seen):
        super().__init__()
        self.note = seen.append  # Keras would copy a list

    def call(self, inputs):
        if not isinstance(inputs, keras.KerasTensor) and all(isinstance(size, int) for size in inputs.shape):
            self.note(tuple(inputs.shape))
        return inputs


def build_detector(crop=((0, 0), (0, 0)), sign=1.0):
    """Answers to round bright spots of some 6 pixels: a spot less its surroundings, beyond 8 gray levels."""
    at = np.arange(13) - 6
    spot = np.exp(-(at[:, None] ** 2 + at**2) / (2 * 2.5**2))
    kernel = spot / spot.sum() - 1 / spot.size
    inputs = keras.Input((SIDE, SIDE, 1))
    found = L.Conv2D(1, 13, activation="relu")(L.Cropping2D(crop)(inputs))
    model = keras.Model(inputs, L.Dense(1)(L.GlobalAveragePooling2D()(found)))
    weights = kernel[..., None, None], np.array([-8.0]), np.array([[sign]]), np.array([0.3])
    model.set_weights([np.asarray(values, "float32") for values in weights])
    return model


def build_wavy(side=20, columns=2, seed=0, seen=None):
    """A smooth network of no meaning with all that must stand still: batch norm with a history, and dropout."""
    inputs = keras.Input((side, side, 1))
    x = L.Rescaling(1 / 64, -2.0)(inputs if seen is None else Witness(seen)(inputs))
    x = L.BatchNormalization()(L.Conv2D(3, 5, strides=2, activation="tanh")(x))
    x = L.BatchNormalization()(L.Dense(6, activation="tanh")(L.Flatten()(x)))
    model = keras.Model(inputs, L.Dense(columns)(L.Dropout(0.5)(x)))
    rng = np.random.default_rng(seed)
    # Variances among them, hence nothing below 0.
    model.set_weights([rng.uniform(0.1, 0.6, w.shape) * np.where(w.ndim > 1, rng.choice([-1, 1], w.shape), 1)
                       for w in model.get_weights() if w.dtype == "float32"])  # fmt: skip
    return model


def draw_images(n=3, side=20, seed=1, low=0, high=255):
    return np.random.default_rng(seed).uniform(low, high, (n, side, side, 1)).astype("float32")


@pytest.fixture(scope="module")
def planted():
    """Six images of soft shadows and noise with a nodule each, and the boxes around these."""
    rng = np.random.default_rng(4)
    y, x = np.mgrid[:SIDE, :SIDE]
    images, boxes = [], []
    for number, (row, column) in enumerate([(12, 14), (50, 13), (30, 52), (11, 40), (48, 46), (24, 20)]):
        image = 90 + 50 * np.sin(x / 17 + number) * np.cos(y / 23) + rng.normal(0, 3, (SIDE, SIDE))
        images.append(image + 55 * np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * 2.5**2)))
        pixel = BOX_FRAME / SIDE
        boxes.append((f"{number}.png", "Nodule", (column - 5) * pixel, (row - 5) * pixel, 11 * pixel, 11 * pixel))
    boxes = pd.DataFrame(boxes, columns=["image", "pathology", "x", "y", "width", "height"])
    rows = pd.DataFrame({"image": boxes["image"], "patient_id": range(6)})
    return np.asarray(images, "float32")[..., None], boxes, boxed_findings(boxes, rows)


@pytest.mark.parametrize("name", METHODS)
def test_a_planted_nodule_is_found(planted, name):
    images, boxes, findings = planted
    maps = METHODS[name](build_detector(), images)
    assert maps.shape == (6, SIDE, SIDE) and maps.dtype == "float32"
    scores = score_maps(smooth_maps(maps, 0.03), findings, boxes)
    assert scores["pointing"].tolist() == [1] * 6
    assert (scores["energy"] > 5 * scores["area"]).all()
    control = score_maps(np.repeat(center_prior((SIDE, SIDE))[None], 6, axis=0), findings, boxes)
    table = localization_table(scores, {"center": control}, n_resamples=50)
    assert table.set_index("pathology").loc["Nodule", "pointing_minus_center"] == 1


@pytest.mark.parametrize("name", METHODS)
def test_what_the_network_ignores_is_zero(planted, name):
    """The left half is cut off inside the network, with the nodules of images 0, 1 and 5."""
    images, _, _ = planted
    maps = METHODS[name](build_detector(crop=((0, 0), (SIDE // 2, 0))), images)
    blind = SIDE // 2 - (11 if name == "occlusion" else 0)  # there, patches reach across
    np.testing.assert_allclose(maps[:, :, :blind], 0, atol=1e-6)
    assert (np.abs(maps).max(axis=(1, 2)) > 1e-4).tolist() == [False, False, True, True, True, False]


def test_linear_network_gives_its_weights_and_follows_them():
    inputs = keras.Input((8, 8, 1))
    model = keras.Model(inputs, L.Dense(2)(L.Flatten()(inputs)))
    images, weights = draw_images(3, 8), np.random.default_rng(0).normal(size=(64, 2)).astype("float32")
    for factor in (1, 3):  # the second time nothing is compiled
        model.set_weights([factor * weights, np.zeros(2, "float32")])
        for column in (0, 1):
            expected = np.repeat(factor * np.abs(weights[:, column]).reshape(1, 8, 8), 3, axis=0)
            for method in (gradient_map, smooth_grad):
                maps = method(model, images, column=column, batch_size=2)
                np.testing.assert_allclose(maps, expected, rtol=1e-5, err_msg=f"{method.__name__} {column}")


def test_gradient_equals_finite_differences():
    model, image = build_wavy(), draw_images(1)
    changed = np.repeat(image, 2 * 400, axis=0).reshape(2, 400, 400)
    for sign, of_sign in zip((1, -1), changed, strict=True):
        of_sign[np.arange(400), np.arange(400)] += 2 * sign  # gray levels
    logits = np.asarray(model.predict_on_batch(changed.reshape(-1, 20, 20, 1)), "float64").reshape(2, 20, 20, 2)
    for column in (0, 1):
        (found,) = gradient_map(model, image, column=column, batch_size=1)
        differences = np.abs(logits[0, ..., column] - logits[1, ..., column]) / 4
        np.testing.assert_allclose(found, differences, atol=0.01 * found.max())
        assert found.max() > 1e-3


def test_smooth_gradient_is_the_root_mean_square_over_noisy_copies():
    model, images = build_wavy(), draw_images(3, low=100, high=150)
    maps = smooth_grad(model, images, n_samples=5, noise=0.2, seed=7)
    for image, found in zip(images, maps, strict=True):
        rng = np.random.default_rng([7, zlib.crc32(image.tobytes())])
        noise = rng.standard_normal((5, 20, 20, 1), dtype="float32")
        gradients = gradient_map(model, image + 0.2 * (image.max() - image.min()) * noise)
        np.testing.assert_allclose(found, np.sqrt((gradients.astype("float64") ** 2).mean(axis=0)), rtol=1e-4)
    # The seed alone decides, not the batches, nor the images beside it.
    again = smooth_grad(model, images[[2, 0]], n_samples=5, noise=0.2, seed=7, batch_size=3)
    np.testing.assert_allclose(again, maps[[2, 0]], rtol=1e-4)
    assert not np.allclose(smooth_grad(model, images, n_samples=5, noise=0.2, seed=8), maps, rtol=1e-2)
    plain = smooth_grad(model, images, n_samples=2, noise=0)
    np.testing.assert_allclose(plain, gradient_map(model, images), rtol=1e-4)


def test_occlusion_equals_painting_by_hand():
    """Patches of 6 every 4 pixels, the last moved to the edge; each painted from all that is outside it."""
    model, images = build_wavy(), draw_images(2)
    drops, covers = np.zeros((2, 20, 20)), np.zeros((20, 20))
    before = np.asarray(model.predict_on_batch(images), "float64")[:, 1]
    rows, columns = np.mgrid[:20, :20]
    for top in (0, 4, 8, 12, 14):
        for left in (0, 4, 8, 12, 14):
            inside = (rows >= top) & (rows < top + 6) & (columns >= left) & (columns < left + 6)
            painted = images.copy()
            for row, column in np.argwhere(inside):
                weights = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * 3**2)) * ~inside
                painted[:, row, column, 0] = (images[..., 0] * weights).sum(axis=(1, 2)) / weights.sum()
            after = np.asarray(model.predict_on_batch(painted), "float64")[:, 1]
            drops[:, inside] += (before - after)[:, None]
            covers += inside
    expected = drops / covers
    for batch_size in (7, 64):
        maps = occlusion_map(model, images, 6, 4, column=1, batch_size=batch_size)
        np.testing.assert_allclose(maps, expected, atol=2e-6)
    assert expected.min() < -0.01 and expected.max() > 0.01


def test_occlusion_has_a_sign_and_an_even_image_has_nothing_to_hide(planted):
    images = planted[0][:2]
    maps = occlusion_map(build_detector(), images, 12, 6)
    np.testing.assert_allclose(occlusion_map(build_detector(sign=-1.0), images, 12, 6), -maps, atol=1e-6)
    assert maps.max() > 1e-3
    for level in (0, 255):
        even = np.full((1, 20, 20, 1), level, "float32")
        np.testing.assert_allclose(occlusion_map(build_wavy(), even, 5, 5), 0, atol=2e-6)


def test_batches_have_one_shape_and_are_compiled_once():
    seen = []
    model = build_wavy(seen=seen)
    for n, column in ((3, 0), (5, 1), (1, 0)):
        assert gradient_map(model, draw_images(n), column=column, batch_size=4).shape == (n, 20, 20)
        smooth_grad(model, draw_images(n), n_samples=3, column=column, batch_size=4)
    assert seen == [(4, 20, 20, 1)]
    for n in (1, 2):
        occlusion_map(model, draw_images(n), 10, 5, batch_size=4)
    assert set(seen) == {(4, 20, 20, 1)} and len(seen) <= 4  # Keras may look at a model more than once, not at images
    assert gradient_map(model, draw_images(0)).shape == (0, 20, 20)
    assert occlusion_map(model, draw_images(0), 5, 5).shape == (0, 20, 20)


def test_grad_cam_is_compiled_once_for_all_batches_and_classes():
    seen = []
    inputs = keras.Input((16, 16, 1))
    ones = {"kernel_initializer": "ones"}  # random weights may leave nothing above zero
    cells = L.Conv2D(2, 4, strides=4, activation="relu", name="cells", **ones)(inputs)
    model = keras.Model(inputs, L.Dense(3, **ones)(L.Flatten()(Witness(seen)(cells))))
    maps = [grad_cam(model, images, "cells", range(3)) for images in (draw_images(2, 16), draw_images(2, 16, seed=9))]
    assert seen == [(2, 4, 4, 2)]
    assert not np.allclose(*maps)


def test_smoothing_keeps_the_sum_and_scales_with_the_side():
    maps = np.zeros((2, 40, 40), "float32")
    maps[0, 20, 20], maps[1, 0, 39] = 1, -1
    smooth = smooth_maps(maps, 0.05)
    assert smooth.dtype == "float32"
    np.testing.assert_allclose(smooth.sum(axis=(1, 2)), [1, -1], rtol=1e-4)
    distance = np.arange(40) - 20
    spread = (smooth[0].sum(axis=0) * distance**2).sum()
    assert spread == pytest.approx((0.05 * 40) ** 2, rel=0.02)
    np.testing.assert_array_equal(smooth_maps(maps, 0), maps)


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="runs the others on JAX")
def test_gradients_and_activation_maps_are_the_same_on_jax():
    """Known gradients, noisy copies, what is compiled how often, and maps; occlusion needs no gradient."""
    pytest.importorskip("jax")
    chosen = "linear or differences or square or once or blob_and_average"
    kept = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")}
    heatmaps = __file__.replace("saliency", "heatmaps")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", chosen, __file__, heatmaps]
    done = subprocess.run(
        command, env=kept | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "6 passed" in done.stdout, done.stdout + done.stderr
