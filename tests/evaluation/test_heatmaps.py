"""Tests of evaluation.heatmaps: maps average to the logit, point at what the network responds to, and are in place."""

import ast
from pathlib import Path

import keras
import numpy as np
import pytest

from helpers import evaluation
from helpers.evaluation import (
    build_activation_model,
    compute_views,
    grad_cam,
    join_views,
    list_centers,
    make_shifts,
    resize_maps,
)
from helpers.study import PATHOLOGIES
from helpers.training import build_classifier


@pytest.fixture(scope="module")
def toy():
    """One filter that answers to bright blobs of 8 pixels, and two classes, for and against it."""
    inputs = keras.Input((64, 64, 1))
    cells = keras.layers.Conv2D(1, 8, strides=8, activation="relu", use_bias=False, name="cells")(inputs)
    outputs = keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(cells))
    model = keras.Model(inputs, outputs)
    model.set_weights([np.full((8, 8, 1, 1), 1 / 64), np.array([[1.0, -2.0]]), np.array([0.5, -0.25])])
    return model


@pytest.fixture(scope="module")
def blobs():
    """Three black images with a white blob in cells (5, 2), (0, 7) and (7, 0)."""
    images = np.zeros((3, 64, 64, 1), np.float32)
    for image, (row, column) in zip(images, [(5, 2), (0, 7), (7, 0)], strict=True):
        image[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 64
    return images


def test_maps_point_at_the_blob_and_average_to_the_logit(toy, blobs):
    maps, logits = build_activation_model(toy).predict_on_batch(blobs)
    assert maps.shape == (3, 8, 8, 2)
    np.testing.assert_allclose(maps.mean(axis=(1, 2)), logits, atol=1e-6)
    np.testing.assert_allclose(logits, toy.predict_on_batch(blobs), atol=1e-6)
    assert [np.unravel_index(one[..., 0].argmax(), (8, 8)) for one in maps] == [(5, 2), (0, 7), (7, 0)]
    assert [np.unravel_index(one[..., 1].argmin(), (8, 8)) for one in maps] == [(5, 2), (0, 7), (7, 0)]
    assert maps[0, 5, 2].tolist() == [64.5, -128.25] and maps[0, 0, 0].tolist() == [0.5, -0.25]


def test_other_weights_in_the_last_layer_give_another_map(toy, blobs):
    before = build_activation_model(toy).predict_on_batch(blobs)[0]
    other = keras.models.clone_model(toy)
    other.set_weights([*toy.get_weights()[:1], np.array([[-3.0, 1.0]]), np.zeros(2)])
    after = build_activation_model(other).predict_on_batch(blobs)[0]
    assert before[0, ..., 0].argmax() == after[0, ..., 0].argmin()


@pytest.mark.slow
@pytest.mark.parametrize("output_stride", [16, 32])
def test_maps_of_densenet_are_exact(output_stride):
    keras.utils.set_random_seed(0)
    model = build_classifier(output_stride=output_stride, blocks=(2, 2, 2, 2))
    images = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 1)).astype(np.float32)
    maps, logits = build_activation_model(model).predict_on_batch(images)
    assert maps.shape == (2, 96 // output_stride, 96 // output_stride, len(PATHOLOGIES))
    np.testing.assert_allclose(maps.mean(axis=(1, 2)), logits, atol=1e-4)
    np.testing.assert_allclose(logits, model.predict_on_batch(images), atol=1e-4)
    # Grad-CAM of such a network is the positive part of the exact map, but for the bias and the number of cells.
    gradient = grad_cam(model, images, "relu", [3, 8])
    exact = (maps - model.get_layer("logits").bias.numpy())[..., [3, 8]] / np.prod(maps.shape[1:3])
    np.testing.assert_allclose(gradient, np.maximum(exact, 0), atol=1e-5)


@pytest.mark.slow
def test_other_architectures_are_refused_or_explained_by_gradient(blobs):
    inputs = keras.Input((64, 64, 1))
    cells = keras.layers.Conv2D(2, 8, strides=8, activation="relu", use_bias=False, name="cells")(inputs)
    hidden = keras.layers.Dense(3, activation="relu")(keras.layers.Flatten()(cells))
    model = keras.Model(inputs, keras.layers.Dense(2)(hidden))
    with pytest.raises(ValueError, match="use grad_cam"):
        build_activation_model(model)
    with pytest.raises(ValueError, match="use grad_cam"):
        outputs = keras.layers.Dense(2, activation="sigmoid")(keras.layers.GlobalAveragePooling2D()(cells))
        build_activation_model(keras.Model(inputs, outputs))
    model.set_weights([np.ones_like(w) / w.size if w.ndim > 1 else w for w in model.get_weights()])
    maps = grad_cam(model, blobs, "cells", [1])
    assert maps.shape == (3, 8, 8, 1)
    assert [np.unravel_index(one[..., 0].argmax(), (8, 8)) for one in maps] == [(5, 2), (0, 7), (7, 0)]


def test_resized_maps_stand_at_their_cells():
    maps = np.zeros((1, 4, 4), np.float32)
    maps[0, 1, 2] = 1
    fine = resize_maps(maps, 64)[0]
    rows, columns = np.nonzero(fine == fine.max())
    assert (rows.mean(), columns.mean()) == (1 * 16 + 7.5, 2 * 16 + 7.5)
    # 72 pixels leave half a cell over, at the right and the bottom: the cells stay where they are.
    np.testing.assert_array_equal(resize_maps(maps, 72)[0, :56, :56], fine[:56, :56])
    moved = resize_maps(maps, 64, shift=(5, -3))[0]
    np.testing.assert_array_equal(moved[:50, 10:], fine[5:55, 7:61])


def test_heatmaps_are_moved_back_and_batches_do_not_matter(toy, blobs):
    activation_model = build_activation_model(toy)

    def compute(views):
        assert len(views) == 2  # One shape, or every batch would be compiled anew.
        return activation_model.predict_on_batch(views)[0]

    pairs = [(0, 0), (2, 0), (1, 0), (0, 1)]
    plain = join_views(compute_views(compute, blobs, batch_size=2), pairs, 64)
    assert plain.shape == (4, 64, 64)
    cells = activation_model.predict_on_batch(blobs)[0]
    for heatmap, (image, c) in zip(plain, pairs, strict=True):
        np.testing.assert_allclose(heatmap, resize_maps(cells[image : image + 1, ..., c], 64)[0])
    shifts = make_shifts(9, 4)
    views = compute_views(compute, blobs, shifts=shifts, batch_size=2)
    assert views.shape == (9, *cells.shape)
    for heatmap, center in zip(
        join_views(views, pairs[:3], 64, shifts), [(43.5, 19.5), (59.5, 3.5), (3.5, 59.5)], strict=True
    ):
        hot = np.argwhere(heatmap > 0.9 * heatmap.max()).mean(axis=0)
        assert np.abs(hot - center).max() < 3
    assert join_views(compute_views(compute, blobs[:0], batch_size=2), [], 64).shape == (0, 64, 64)


def test_what_reference_images_show_too_cancels(toy, blobs):
    """A marker that is on every image is no evidence; the blob that is on one only is."""
    activation_model = build_activation_model(toy)
    blobs = blobs.copy()
    blobs[:, :8, :8] = 255
    maps, logits = activation_model.predict_on_batch(blobs)
    assert maps[0, ..., 0].argmax() == 0
    views = compute_views(lambda views: activation_model.predict_on_batch(views)[0], blobs, reference=blobs[1:])
    heatmaps = join_views(views, [(0, 0)], 64)
    assert np.argwhere(heatmaps[0] > 50).mean(axis=0) == pytest.approx((43.5, 19.5))
    cells = heatmaps[0, 4::8, 4::8] / 2 + heatmaps[0, 3::8, 3::8] / 2  # around the cells' centers
    assert cells.mean() == pytest.approx(logits[0, 0] - logits[1:, 0].mean(), abs=0.05)


@pytest.mark.parametrize("n_views", [1, 9])
def test_averaged_views_have_their_maximum_at_a_center(n_views):
    """Maps of random cells, 4 a side on 72 pixels: wherever the maximum is, a listed center is within a pixel."""
    shifts, rng = make_shifts(n_views, 5), np.random.default_rng(0)
    centers = list_centers(4, 72, shifts) * 72
    assert len(centers) == 4 * len({down for down, _ in shifts}) and (np.diff(centers) > 0).all()
    for _ in range(30):
        views = [resize_maps(rng.normal(size=(1, 4, 4)), 72, shift)[0] for shift in shifts]
        place = np.array(np.unravel_index(np.mean(views, axis=0).argmax(), (72, 72))) + 0.5
        # Beyond the outermost centers a map is constant: the first of equal pixels is found.
        place = np.clip(place, centers[0], centers[-1])
        assert np.abs(place[:, None] - centers).min(axis=1).max() <= 1


def test_shifts_form_a_grid():
    assert make_shifts(1, 4) == [(0, 0)]
    assert make_shifts(9, 4)[0] == (0, 0) and set(make_shifts(9, 4)) == {(i, j) for i in (-4, 0, 4) for j in (-4, 0, 4)}


def test_the_package_loads_neither_tensorflow_nor_scikit_learn_on_import():
    """Scripts and servers that only need a table or a map's size start in a second."""
    for path in Path(evaluation.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in getattr(node, "names", [])] + [getattr(node, "module", None) or ""]
            assert not {name.split(".")[0] for name in names} & {"keras", "tensorflow", "jax", "sklearn", "pipeline"}, (
                path
            )
