"""Ways to augment a batch: what training uses, and those that were tried beside it, all with the same draws.

A way takes images, uint8 (batch, side, side, 1), draws (batch, N_DRAWS) and a size; it returns float32 images of it.
All change the exposure, crop, stretch and shift; those in `TURNING` also rotate by up to 7 degrees.
"""

import cv2
import numpy as np
import tensorflow as tf

from helpers import augmentation
from helpers.augmentation import Augmentation, augment

UPRIGHT, TURNED = Augmentation(), Augmentation(rotation=7)


def _make_maps(draws, side, size, strength):
    area, stretch, x, y, angle = tf.unstack(draws[:, :5], axis=1)
    crops = augmentation._place_crops(area, stretch, x, y, side, strength)
    angle = np.deg2rad(strength.rotation) * (2 * angle - 1)
    return augmentation._make_maps(*crops, angle, tf.zeros_like(area, tf.bool), size)[:, :6]


def _expose(images, draws):
    gain = (1 + UPRIGHT.contrast * (2 * draws[:, 6] - 1))[:, None, None, None]
    offset = 127.5 * (1 - gain) + 255 * UPRIGHT.brightness * (2 * draws[:, 7] - 1)[:, None, None, None]
    return tf.raw_ops.ClipByValue(t=images * gain + offset, clip_value_min=0.0, clip_value_max=255.0)


def _find_places(maps, size):
    """Returns x and y in the image of every pixel of the results, each float32 (batch, size, size)."""
    pixels = tf.range(size, dtype=tf.float32)
    a, b, c, d, e, f = tf.unstack(maps[:, :, None, None], axis=1)
    return a * pixels + (b * pixels[:, None] + c), d * pixels + (e * pixels[:, None] + f)


def call_opencv_for_each(images, draws, size):
    """OpenCV, two calls an image, each of which gives Python's lock away and waits for it again."""

    def transform(images, draws, maps):
        gain = 1 + UPRIGHT.contrast * (2 * draws[:, 6:7] - 1)
        offset = 127.5 * (1 - gain) + 255 * UPRIGHT.brightness * (2 * draws[:, 7:8] - 1)
        tables = np.clip(np.rint(gain * np.arange(256) + offset), 0, 255).astype(np.uint8)
        results = np.empty((len(images), size, size, 1), np.uint8)
        for image, table, matrix, result in zip(images, tables, maps.reshape(-1, 2, 3), results, strict=True):
            flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            cv2.warpAffine(cv2.LUT(image, table), matrix, (size, size), dst=result, flags=flags)
        return results

    maps = _make_maps(draws, images.shape[1], size, TURNED)
    results = tf.numpy_function(transform, [images, draws, maps], tf.uint8, stateful=False)
    return tf.cast(tf.ensure_shape(results, (len(images), size, size, 1)), tf.float32)


def call_opencv_once(images, draws, size):
    """OpenCV, one call for as many images as fit below each other in 32,766 rows."""
    side = images.shape[1]
    n_together = min(32766 // (side + 2), 32766 // size)

    def transform(images, x, y):
        parts = [slice(start, start + n_together) for start in range(0, len(images), n_together)]
        joined = [part.reshape(-1, part.shape[2]) for n in parts for part in (images[n], x[n], y[n])]
        calls = zip(*[iter(joined)] * 3, strict=True)
        return np.concatenate([cv2.remap(*call, cv2.INTER_LINEAR) for call in calls]).reshape(-1, size, size, 1)

    x, y = _find_places(_make_maps(draws, side, size, TURNED), size)
    rows = tf.cast(tf.range(len(images)) % n_together * (side + 2) + 1, tf.float32)
    y = tf.clip_by_value(y, -1, side) + rows[:, None, None]
    padded = tf.pad(images, [[0, 0], [1, 1], [0, 0], [0, 0]])  # black between an image and the next
    results = tf.numpy_function(transform, [padded, x, y], tf.uint8, stateful=False)
    return _expose(tf.cast(tf.ensure_shape(results, (len(images), size, size, 1)), tf.float32), draws)


@tf.function(jit_compile=True)
def gather_pixels(images, draws, size):
    """Bilinear sampling by four gathers of single pixels; without XLA it takes four times as long."""
    side = images.shape[1] + 2
    x, y = _find_places(_make_maps(draws, side - 2, size, TURNED), size)
    x, y = (tf.clip_by_value(place + 1, 0, side - 1.001) for place in (x, y))
    column, row = tf.cast(x, tf.int32), tf.cast(y, tf.int32)
    x, y = x - tf.cast(column, tf.float32), y - tf.cast(row, tf.float32)
    flat = tf.reshape(tf.pad(images, [[0, 0], [1, 1], [1, 1], [0, 0]]), [-1])
    first = tf.range(len(images))[:, None, None] * side**2 + row * side + column
    corners = [tf.cast(tf.gather(flat, first + step), tf.float32) for step in (0, 1, side, side + 1)]
    upper, lower = corners[0] + x * (corners[1] - corners[0]), corners[2] + x * (corners[3] - corners[2])
    return _expose((upper + y * (lower - upper))[..., None], draws)


def crop_and_resize(images, draws, size):
    """TensorFlow's operation for boxes of any fraction of a pixel; no rotation."""
    side = images.shape[1]
    area, stretch, x, y = tf.unstack(draws[:, :4], axis=1)
    left, top, width, height = augmentation._place_crops(area, stretch, x, y, side, UPRIGHT)
    inset_x, inset_y = 0.5 * width / size - 0.5, 0.5 * height / size - 0.5
    boxes = [top + inset_y, left + inset_x, top + height - 1 - inset_y, left + width - 1 - inset_x]
    boxes = tf.stack(boxes, axis=1) / (side - 1)
    return _expose(tf.image.crop_and_resize(images, boxes, tf.range(len(images)), (size, size)), draws)


def multiply_matrices(images, draws, size):
    """Crops as two products with matrices of weights; no rotation."""
    side = images.shape[1]
    maps = _make_maps(draws, side, size, UPRIGHT)
    to, at = tf.range(size, dtype=tf.float32)[:, None], tf.range(side, dtype=tf.float32)
    weights = [
        tf.nn.relu(1 - tf.abs(maps[:, scale, None, None] * to + maps[:, start, None, None] - at))
        for scale, start in ((4, 5), (0, 2))
    ]
    images = tf.cast(images[..., 0], tf.float32)
    return _expose((weights[0] @ images @ tf.transpose(weights[1], [0, 2, 1]))[..., None], draws)


TURNING = {
    "OpenCV, two calls an image": call_opencv_for_each,
    "OpenCV, one call a batch": call_opencv_once,
    "TensorFlow's affine map (ours, rotation on)": lambda *batch: augment(*batch, TURNED),
    "gathers of pixels, compiled by XLA": gather_pixels,
}
WAYS = TURNING | {
    "crops resized (ours)": lambda *batch: augment(*batch, UPRIGHT),
    "crop_and_resize": crop_and_resize,
    "matrix products": multiply_matrices,
}
