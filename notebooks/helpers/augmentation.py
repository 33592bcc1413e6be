"""What training does to an image: `Augmentation` is how much, `augment` does it.

Only TensorFlow's own operations: code that needs Python's lock gets next to nothing done beside a busy thread.
"""

import math
from dataclasses import dataclass

import tensorflow as tf

N_DRAWS = 12  # random numbers that `augment` takes for an image


@dataclass(frozen=True)
class Augmentation:
    """Strength of the augmentation. There is no vertical flip: no radiograph is taken upside down.

    Attributes:
        min_area: smallest share of the image's area that a crop keeps, 0 to 1.
        max_stretch: largest ratio of width to height of a crop, and of height to width.
        rotation: degrees to either side. It makes augmentation slow: see `augment`.
        translation: how far a crop may leave the image on each side, as a share of the image's side.
        contrast: largest relative change.
        brightness: largest change as a share of the full range.
        horizontal_flip: whether half of the images are mirrored. A mirrored chest has its heart on the wrong side;
            CheXNet (Rajpurkar et al., 2017) trained with it all the same.
        erasing: share of the images, 0 to 1, in which a rectangle becomes gray (random erasing, Zhong et al., 2020).
    """

    min_area: float = 0.75
    max_stretch: float = 1.1
    rotation: float = 0.0
    translation: float = 0.03
    contrast: float = 0.2
    brightness: float = 0.1
    horizontal_flip: bool = False
    erasing: float = 0.0


def augment(images, draws, image_size, strength):
    """Crops, stretches, rotates, shifts and mirrors images, changes their exposure, and erases rectangles.

    Runs inside `Dataset.map`, one image after the other, so that what is in work stays in the processor's cache. Each
    image is interpolated once: without rotation a crop of whole pixels is resized; with rotation an affine map reads
    it, which takes several times as long (`benchmarks/input_pipeline.py`).

    Args:
        images: uint8 tensor (batch, side, side, 1).
        draws: float32 tensor (batch, N_DRAWS), uniform in [0, 1): the only source of chance.
        image_size: int, side of the result in pixels.
        strength: an `Augmentation`.

    Returns:
        float32 tensor (batch, image_size, image_size, 1), 0 to 255. Where a crop leaves the image it is black, before
        the exposure is changed.
    """
    area, stretch, x, y, angle, flip, contrast, brightness, *erasing = tf.unstack(draws, axis=1)
    crops = _place_crops(area, stretch, x, y, images.shape[1], strength)
    is_mirrored = flip < (0.5 if strength.horizontal_flip else 0)
    black = 255 * strength.brightness * (2 * brightness - 1) - 127.5 * strength.contrast * (2 * contrast - 1)
    white = black + 255 * (1 + strength.contrast * (2 * contrast - 1))  # contrast turns about the middle of the range
    holes = _place_holes(*erasing, image_size, strength)
    if strength.rotation:
        angle = math.radians(strength.rotation) * (2 * angle - 1)
        places = _make_maps(*crops, angle, is_mirrored, image_size)
    else:
        places = tf.cast(tf.round(tf.stack(crops, axis=1)), tf.int32)

    def change(parts):
        image, place, is_mirrored, black, white, hole = parts
        if strength.rotation:
            image = _warp(_expose(image, black, white), place, image_size, black)
        else:
            image = _crop(image, place, strength)
            image = tf.cond(is_mirrored, lambda: image[:, ::-1], lambda: image)
            image = tf.image.resize(_expose(image, black, white)[None], (image_size, image_size))[0]
        image = tf.raw_ops.ClipByValue(t=image, clip_value_min=0.0, clip_value_max=255.0)
        return tf.cond(hole[0] < hole[1], lambda: _erase(image, hole), lambda: image) if strength.erasing else image

    parts = images, places, is_mirrored, black, white, holes
    changed = tf.map_fn(change, parts, fn_output_signature=tf.TensorSpec((image_size, image_size, 1), tf.float32))
    return tf.ensure_shape(changed, (draws.shape[0], image_size, image_size, 1))  # decoded images have no static batch


def _expose(image, black, white):
    """Makes a uint8 image float32, with new gray levels for 0 and 255, in one operation: as if it was quantized."""
    return tf.quantization.dequantize(tf.bitcast(image, tf.quint8), black, white, mode="MIN_COMBINED")


def _place_crops(area, stretch, x, y, side, strength):
    """Returns left, top, width and height of crops, in pixels of the image, each float32 (batch,)."""
    crop = side * tf.sqrt(strength.min_area + (1 - strength.min_area) * area)
    ratio = strength.max_stretch ** (stretch - 0.5)
    width, height = crop * ratio, crop / ratio
    margin = side * strength.translation
    left = x * (side - width + 2 * margin) - margin
    top = y * (side - height + 2 * margin) - margin
    return left, top, width, height


def _crop(image, place, strength):
    """Cuts a rectangle out of a uint8 image (side, side, 1); `place` is int32 (4,). Beyond the image it is black."""
    side = image.shape[0]
    margin, overhang = side * strength.translation, side * (strength.max_stretch**0.5 - 1)
    border = math.ceil(max(margin, overhang - margin)) + 1  # no crop reaches farther
    left, top, width, height = tf.unstack(place)
    rows, columns = tf.zeros((border, side, 1), tf.uint8), tf.zeros((side + 2 * border, border, 1), tf.uint8)
    image = tf.concat([rows, image, rows], axis=0)  # copies whole rows; `tf.pad` takes several times as long
    image = tf.concat([columns, image, columns], axis=1)
    return tf.slice(image, [top + border, left + border, 0], [height, width, 1])


def _make_maps(left, top, width, height, angle, is_mirrored, image_size):
    """Returns float32 (batch, 8): for each pixel (x, y) of the result, the place in the image where it is read.

    They are the rows of an affine map and two zeros, which a projection would have. All arguments are tensors (batch,).
    """
    facing = tf.where(is_mirrored, -1.0, 1.0)
    sine, cosine = tf.sin(angle), tf.cos(angle)
    a, b = facing * cosine * width / image_size, -sine * height / image_size
    d, e = facing * sine * width / image_size, cosine * height / image_size
    middle = 0.5 * (image_size - 1)
    c = left + 0.5 * width - 0.5 - (a + b) * middle
    f = top + 0.5 * height - 0.5 - (d + e) * middle
    return tf.stack([a, b, c, d, e, f, tf.zeros_like(a), tf.zeros_like(a)], axis=1)


def _warp(image, place, image_size, black):
    """Reads a float32 image (side, side, 1) at the places of a map (8,), and `black` beyond the image."""
    image = tf.raw_ops.ImageProjectiveTransformV3(
        images=image[None],
        transforms=place[None],
        output_shape=[image_size, image_size],
        fill_value=black,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )
    return tf.ensure_shape(image, (1, image_size, image_size, 1))[0]


def _place_holes(area, ratio, x, y, image_size, strength):
    """Returns float32 (batch, 4): top, bottom, left and right of what is erased, in pixels; mostly an empty rectangle.

    The rectangle has 2 to 33 % of the area, and sides in a ratio of 0.3 to 1 / 0.3: torchvision's `RandomErasing`.
    """
    is_erased = tf.cast(area < strength.erasing, tf.float32)
    area = 0.02 + 0.31 * area / max(strength.erasing, 1e-6)  # uniform among those erased
    ratio = 0.3 ** (2 * ratio - 1)
    height, width = (is_erased * image_size * tf.minimum(tf.sqrt(area * by), 1.0) for by in (ratio, 1 / ratio))
    top, left = y * (image_size - height), x * (image_size - width)
    return tf.stack([top, top + height, left, left + width], axis=1)


def _erase(image, hole):
    """Makes a rectangle of an image (side, side, 1) gray; `hole` is float32 (4,), see `_place_holes`."""
    pixels = tf.range(image.shape[0], dtype=tf.float32) + 0.5
    rows, columns = (pixels >= hole[0]) & (pixels < hole[1]), (pixels >= hole[2]) & (pixels < hole[3])
    return tf.where((rows[:, None] & columns)[..., None], 127.5, image)
