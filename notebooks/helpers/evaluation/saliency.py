"""Saliency maps, for any architecture: gradients, gradients of noisy copies, and patches painted over (occlusion).

Each method takes a functional keras.Model in inference mode from float32 images (n, side, side, 1), 0 to 255, to logits
(n, columns), with all preprocessing inside, and gives one float32 map (n, side, side) for one column.
`localization.score_maps` scores the maps against boxes, after `smooth_maps`.
"""

import functools
import zlib

import numpy as np
from scipy.ndimage import gaussian_filter


def gradient_map(model, images, *, column=0, batch_size=8):
    """Computes how strongly a logit reacts to each pixel: the gradient's size (Simonyan et al., ICLR workshop 2014).

    The sign is dropped: an edge of a finding has both. The map says where a small change would matter most, which is
    not the same as what the logit is made of; `occlusion_map` measures that.

    Args:
        model: a functional keras.Model, see the module.
        images: (n, side, side, 1) array of finite numbers, 0 to 255.
        column: which logit.
        batch_size: images at once; the last batch is filled up, so that there is one shape to compile. Memory grows
            with it and not with the number of images.

    Returns:
        float32 array (n, side, side), logits a gray level, 0 or more.
    """
    import keras

    images = np.asarray(images, dtype="float32")
    gradient = _compiled_gradient(model)
    maps = np.empty(images.shape[:3], dtype="float32")
    numbers = range(len(images))
    for which, batch in _fill_batches(((number, images[number]) for number in numbers), images.shape[1:], batch_size):
        values = keras.ops.convert_to_numpy(gradient(batch, column))[: len(which), ..., 0]
        maps[which] = np.abs(values)
    return maps


def smooth_grad(model, images, *, n_samples=32, noise=0.1, seed=0, column=0, batch_size=8):
    """Averages the gradient over noisy copies of each image (SmoothGrad, Smilkov et al., 2017).

    The average is the root of the mean square. Squares rank pixels as SmoothGrad-Squared does, which Hooker et al.
    (NeurIPS 2019) found to name the pixels that a network needs, where the mean of signed gradients did no better than
    a single one: signs cancel at a finding's edges. The root keeps the unit of `gradient_map`, whose map this is
    without noise.

    Args:
        model: a functional keras.Model, see the module.
        images: (n, side, side, 1) array of finite numbers, 0 to 255.
        n_samples: int, noisy copies of each image.
        noise: standard deviation of the Gaussian noise, as a share of each image's range of gray levels; Smilkov et al.
            found 0.1 to 0.2 best. Nothing is clipped, or dark and white areas would get less of it.
        seed: of the noise, int, 0 or more. It is drawn from the seed and the image's pixels, so that an image's map
            does not depend on the images beside it.
        column: which logit.
        batch_size: copies at once, as in `gradient_map`.

    Returns:
        float32 array (n, side, side), logits a gray level, 0 or more.
    """
    import keras

    images = np.asarray(images, dtype="float32")
    gradient = _compiled_gradient(model)

    def make_copies():
        for number, image in enumerate(images):
            rng = np.random.default_rng([seed, zlib.crc32(image.tobytes())])
            for _ in range(n_samples):
                yield number, image + noise * np.ptp(image) * rng.standard_normal(image.shape, dtype="float32")

    squares = np.zeros(images.shape[:3], dtype="float64")
    for which, batch in _fill_batches(make_copies(), images.shape[1:], batch_size):
        values = keras.ops.convert_to_numpy(gradient(batch, column))[: len(which), ..., 0]
        np.add.at(squares, which, np.square(values, dtype="float64"))
    return np.sqrt(squares / n_samples).astype("float32")


def occlusion_map(model, images, patch, stride, *, column=0, batch_size=32):
    """Computes the drop of a logit when the patches around a pixel are painted over (Zeiler and Fergus, ECCV 2014).

    A patch is filled from its surroundings: each of its pixels with the Gaussian average, of standard deviation patch /
    2, of the image outside the patch. The image's mean gray would not do: in a dark lung, a gray square looks like a
    nodule. A finding larger than the patch stays partly visible, so the patch should be larger.

    Args:
        model: a functional keras.Model, see the module.
        images: (n, side, side, 1) array of finite numbers, 0 to 255.
        patch: int, pixels a side of the square patch, below the image's side.
        stride: int, pixels from patch to patch, at most `patch`; the last one is moved to the image's edge, so that all
            pixels are covered. The number of predictions is about (side / stride) ** 2 for each image.
        column: which logit.
        batch_size: painted images at once, as in `gradient_map`.

    Returns:
        float32 array (n, side, side): mean drop of the logit over the patches that cover a pixel; positive where the
        image is evidence for the class, negative where it is evidence against it.
    """
    images = np.asarray(images, dtype="float32")
    side = images.shape[1]
    starts = np.unique(np.append(np.arange(0, side - patch, stride), side - patch))
    squares = [(slice(top, top + patch), slice(left, left + patch)) for top in starts for left in starts]

    def make_painted():
        for number, image in enumerate(images):
            yield (number, None), image
            for square, content in zip(squares, _fill_patches(image[..., 0], squares, patch), strict=True):
                painted = image.copy()
                painted[square] = content[..., None]
                yield (number, square), painted

    drops = np.zeros(images.shape[:3], dtype="float64")
    whole = np.empty(len(images))
    for which, batch in _fill_batches(make_painted(), images.shape[1:], batch_size):
        logits = np.asarray(model.predict_on_batch(batch), dtype="float64")[:, column]
        for (number, square), logit in zip(which, logits[: len(which)], strict=True):
            if square is None:
                whole[number] = logit
            else:
                drops[number][square] += whole[number] - logit
    covers = ((starts[:, None] <= np.arange(side)) & (np.arange(side) < starts[:, None] + patch)).sum(axis=0)
    return (drops / np.outer(covers, covers)).astype("float32")


def smooth_maps(maps, sigma):
    """Smooths maps with a Gaussian.

    Gradients flicker from pixel to pixel, so a map's single largest pixel means little. Maps that are compared must be
    smoothed alike.

    Args:
        maps: float array (n, side, side).
        sigma: standard deviation as a share of the side; 0 leaves the maps as they are.

    Returns:
        float32 array (n, side, side); beyond its edges a map is mirrored, which keeps its sum.
    """
    maps = np.asarray(maps, dtype="float32")
    return gaussian_filter(maps, sigma * maps.shape[1], axes=(1, 2))


def compile_gradient(model):
    """Compiles the gradient of one output by a batch of inputs, with dropout and batch norm as at inference.

    Inputs of one shape are compiled once, whatever the column; the weights are those that the model has at the call.

    Args:
        model: a keras.Model from one input (batch, ...) to outputs (batch, columns).

    Returns:
        A function of inputs (batch, ...) and a column's number that returns the gradient of that column's sum by the
        inputs, a tensor of their shape. No example depends on another, so it holds the gradient of each.
    """
    import keras

    compiled = (_compile_jax if keras.backend.backend() == "jax" else _compile_tensorflow)(model)
    return lambda inputs, column: compiled(keras.ops.convert_to_tensor(inputs), column)


def _compile_tensorflow(model):
    import tensorflow as tf

    @tf.function
    def differentiate(inputs, column):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            chosen = tf.gather(model(inputs, training=False), column, axis=1)
        return tape.gradient(chosen, inputs)

    return lambda inputs, column: differentiate(inputs, tf.constant(column))  # a bare number would be traced anew


def _compile_jax(model):
    import jax

    @jax.jit
    def differentiate(inputs, column, *variables):
        def choose(inputs):
            return model.stateless_call(*variables, inputs, training=False)[0][:, column].sum()

        return jax.grad(choose)(inputs)

    def call(inputs, column):
        variables = [[v.value for v in some] for some in (model.trainable_variables, model.non_trainable_variables)]
        return differentiate(inputs, column, *variables)

    return call


# The gradients of one model are asked for by two methods and for several sets of images.
_compiled_gradient = functools.lru_cache(maxsize=1)(compile_gradient)


def _fill_batches(items, shape, batch_size):
    """Gathers (key, image) pairs to batches of one shape.

    Yields:
        Tuple of the list of keys and the float32 array (batch_size, *shape), whose rows beyond the keys are to be
        skipped.
    """
    keys, batch = [], np.zeros((batch_size, *shape), dtype="float32")
    for key, image in items:
        batch[len(keys)] = image
        keys.append(key)
        if len(keys) == batch_size:
            yield keys, batch.copy()  # a backend may still read what it was given
            keys = []
    if keys:
        yield keys, batch


def _fill_patches(image, squares, patch):
    """Yields each square's content as its surroundings suggest it: a Gaussian average of what lies outside."""
    at = np.arange(len(image))
    weights = np.exp(-2.0 * ((at[:, None] - at) / patch) ** 2)  # standard deviation patch / 2
    image = image.astype("float64")
    inside = weights[:patch, :patch]
    n_inside = np.outer(inside.sum(axis=0), inside.sum(axis=0))
    blurred, n_all = weights @ image @ weights, np.outer(weights.sum(axis=0), weights.sum(axis=0))
    for square in squares:
        yield (blurred[square] - inside @ image[square] @ inside) / (n_all[square] - n_inside)
