"""Heatmaps: exact class activation maps where the architecture has them, Grad-CAM elsewhere.

A network that ends in global average pooling and one dense layer needs no gradient to be explained: the dense layer
applied to every cell of the last map, before averaging, gives a map whose mean is the logit (Zhou et al., CVPR 2016;
here the bias is part of every cell). A cell is the logit that an image of nothing but such cells would have: positive
cells are evidence for the finding, negative cells against it.
"""

import functools

import numpy as np
from scipy.ndimage import map_coordinates

from .saliency import compile_gradient


def build_activation_model(model):
    """Builds the model that returns class activation maps beside the logits, on the same weights.

    Args:
        model: a functional keras.Model whose last layer is a Dense of no activation on a GlobalAveragePooling2D.

    Returns:
        A keras.Model from the same images to float32 maps (batch, height, width, classes) and logits (batch, classes),
        where `maps.mean((1, 2))` is the logits.

    Raises:
        ValueError: if the model ends otherwise; `grad_cam` explains such models.
    """
    import keras

    head = model.layers[-1]
    pooling = _find_pooling(model)
    if pooling is None:
        raise ValueError(
            f"{model.name} does not end in global average pooling and one linear dense layer, so its logits have no "
            "exact map; use grad_cam"
        )
    cells = keras.layers.Dense(head.units, dtype="float32", name="maps")
    activation_model = keras.Model(model.input, [cells(pooling.input), model.output], name="activation")
    cells.set_weights(head.get_weights())  # copies; `assign` would share memory on JAX, which `predict` then refuses
    return activation_model


def _find_pooling(model):
    """Returns the global average pooling whose averages a last, linear dense layer reads; None if there is none."""
    import keras

    head = model.layers[-1]
    linear = isinstance(head, keras.layers.Dense) and head.activation is keras.activations.linear
    pooling = head.input._keras_history.operation if linear else None
    return pooling if isinstance(pooling, keras.layers.GlobalAveragePooling2D) else None


def grad_cam(model, images, layer, classes):
    """Computes Grad-CAM heatmaps (Selvaraju et al., ICCV 2017) of any functional model.

    Args:
        model: a functional keras.Model from images to (batch, classes) logits.
        images: float array (batch, height, width, channels).
        layer: name of the convolutional layer whose map is weighted; all paths of the model must lead through it. Empty
            for the map that global average pooling reads, where the model ends in that and a dense layer.
        classes: indices of the classes to explain.

    Returns:
        float32 array (batch, h, w, len(classes)), 0 or more.

    Raises:
        ValueError: if there is no such layer, or it must be named.
    """
    import keras

    to_features, differentiate = _split_at(model, layer)
    cells = to_features(keras.ops.convert_to_tensor(images), training=False)
    maps = []
    for number in classes:
        weights = keras.ops.mean(differentiate(cells, number), axis=(1, 2), keepdims=True)
        maps.append(keras.ops.relu(keras.ops.sum(weights * cells, axis=-1)))
    return keras.ops.convert_to_numpy(keras.ops.stack(maps, axis=-1)).astype("float32")


@functools.lru_cache(maxsize=1)  # images come in many batches, and compiling takes longer than one
def _split_at(model, layer):
    """Returns the model up to a layer, and the compiled gradient of what follows by that layer's map."""
    import keras

    pooling = None if layer else _find_pooling(model)
    if not (layer or pooling):
        raise ValueError(f"{model.name} does not end in global average pooling and a dense layer; name the layer")
    features = pooling.input if pooling else model.get_layer(layer).output
    return keras.Model(model.inputs, features), compile_gradient(keras.Model(features, model.output))


def resize_maps(maps, side, shift=(0, 0)):
    """Interpolates maps to the pixels of their image; each cell's value is at the cell's center.

    DenseNet halves an image repeatedly and drops what is left over at the right and at the bottom, so a cell's side is
    the power of two nearest to side / h. Beyond the outermost centers the map stays constant.

    Args:
        maps: float array (n, h, w).
        side: int, pixels of the square image.
        shift: pixels down and to the right by which the image was moved before; the maps are moved back.

    Returns:
        float32 array (n, side, side).
    """
    maps = np.asarray(maps, dtype="float32")
    at = []
    for cells, moved in zip(maps.shape[1:], shift, strict=True):
        at.append((np.arange(side) + moved + 0.5) / _find_stride(cells, side) - 0.5)
    grid = np.meshgrid(*at, indexing="ij")
    resized = np.empty((len(maps), side, side), dtype="float32")
    for one, target in zip(maps, resized, strict=True):
        map_coordinates(one, grid, output=target, order=1, mode="nearest")
    return resized


def _find_stride(cells, side):
    return 2 ** round(np.log2(side / cells))


def list_centers(cells, side, shifts):
    """Lists where the centers of a map's cells lie in the image, over all views that are averaged.

    Args:
        cells: int, cells along a side of a view's map.
        side: int, pixels of the square image.
        shifts: those given to `compute_views`; their grid is square, so both sides have the same centers.

    Returns:
        float64 array in increasing order, shares of the side, 0 to 1.
    """
    middles = (np.arange(cells) + 0.5) * _find_stride(cells, side)
    centers = np.unique([middles - moved for moved, _ in shifts]) / side
    return centers[(centers >= 0) & (centers <= 1)]


def compute_views(compute_maps, images, *, reference=None, shifts=((0, 0),), batch_size=32):
    """Computes the maps of shifted views of images: where an image differs from others in the evidence for each class.

    Two things that are no evidence blur a map. What is at the same place on every image, such as the trace that padding
    leaves along the edges, is removed by subtracting the mean map of reference images. And a map of a few cells says
    little about the places between their centers; shifting the image by less than a cell samples them, and
    `join_views` moves the maps of such views back and averages them.

    Args:
        compute_maps: function from a float32 array (batch_size, side, side, 1), 0 to 255, to maps (batch_size, h, w,
            classes), such as those of `build_activation_model` and of `grad_cam`.
        images: float32 array (images, side, side, 1), 0 to 255.
        reference: float32 array (m, side, side, 1) of images whose mean map is subtracted, or None for nothing.
        shifts: tuples of pixels down and to the right.
        batch_size: images at once; the last batch is filled up, so that there is one shape to compile.

    Returns:
        float32 array (shifts, images, h, w, classes). Of exact maps, the cells of the unmoved view average to the logit
        less the reference images' mean logit; negative cells are evidence against the class.
    """
    import tensorflow as tf

    from ..pipeline import shift_images

    def compute_all(images, shift):
        maps = []
        for start in range(0, len(images), batch_size):
            batch = images[np.minimum(np.arange(start, start + batch_size), len(images) - 1)]
            views = shift_images(tf.convert_to_tensor(batch), shift)
            maps.append(np.asarray(compute_maps(views.numpy()))[: len(images) - start])
        return np.concatenate(maps)

    views = []
    for shift in shifts if len(images) else ():
        maps = compute_all(images, shift)
        if reference is not None and len(reference):
            maps = maps - compute_all(reference, shift).mean(axis=0)
        views.append(maps)
    return np.array(views, dtype="float32")


def join_views(views, pairs, side, shifts=((0, 0),)):
    """Joins the maps of shifted views to heatmaps at the image's resolution.

    Args:
        views: float32 array (shifts, images, h, w, classes) of `compute_views`.
        pairs: (n, 2) integers: for each heatmap the number of its image and the index of its class.
        side: int, pixels of the square image.
        shifts: those given to `compute_views`.

    Returns:
        float32 array (n, side, side).
    """
    numbers, classes = np.asarray(pairs, dtype="int64").reshape(-1, 2).T
    heatmaps = np.zeros((len(numbers), side, side), dtype="float32")
    for maps, shift in zip(views, shifts, strict=True) if len(numbers) else ():
        heatmaps += resize_maps(maps[numbers, :, :, classes], side, shift) / len(shifts)
    return heatmaps


def make_shifts(n_views, step):
    """Lists the shifts of a square grid of views around the image as it is.

    Args:
        n_views: 1, 9, 25, ...: the square of an odd number.
        step: pixels between neighboring views.

    Returns:
        List of (down, right) in pixels, the unmoved view first.
    """
    reach = round(n_views**0.5) // 2
    grid = [(step * i, step * j) for i in range(-reach, reach + 1) for j in range(-reach, reach + 1)]
    return sorted(grid, key=lambda shift: (abs(shift[0]) + abs(shift[1]), shift))
