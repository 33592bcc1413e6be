"""From the bytes of a PNG or JPEG to a square gray image, the same way in packing and inside the exported model.

The functions run eagerly, inside `Dataset.map` and inside a SavedModel, so an image is read with the same operations
everywhere.
"""

import tensorflow as tf

from .image_files import MAX_PIXELS, MIN_SIDE


def decode_gray(data):
    """Decodes PNG or JPEG bytes to gray levels. Runs in a graph.

    16-bit PNGs are scaled linearly to 8 bits, by the bits that their brightest pixel needs, 8 to 16: the PNG standard
    has one range, but many programs write the 12 bits of a detector as they are. Colors become luminance and an alpha
    channel is ignored (the RGBA files of ChestX-ray14 are opaque).

    Args:
        data: scalar string tensor.

    Returns:
        uint8 tensor (height, width, 1), 0 to 255.

    Raises:
        tf.errors.InvalidArgumentError: the bytes are no complete PNG or JPEG.
    """
    header = tf.strings.join([tf.strings.substr(data, 0, 25), 25 * b"\0"])  # padded: `substr` fails beyond the end
    is_png = tf.strings.substr(header, 0, 4) == b"\x89PNG"
    is_deep = is_png & (tf.strings.substr(header, 24, 1) == b"\x10")  # byte 24 of a PNG is its bit depth

    def deep():
        wide = tf.cast(tf.io.decode_png(data, channels=1, dtype=tf.uint16), tf.int32)
        whites = tf.constant([2**bits - 1 for bits in range(8, 17)])
        white = tf.reduce_min(tf.where(whites >= tf.reduce_max(wide), whites, whites[-1]))
        return tf.cast((255 * wide + white // 2) // white, tf.uint8)

    def plain():
        return tf.io.decode_image(data, channels=1, expand_animations=False)

    return tf.ensure_shape(tf.cond(is_deep, deep, plain), (None, None, 1))


def resize_image(image, side):
    """Fits a gray image into a square and pads the shorter side with black, so that no anatomy is cut or squeezed.

    Shrinking averages areas (no aliasing), enlarging is bilinear. Runs in a graph.

    Args:
        image: uint8 tensor (height, width, 1).
        side: int, pixels.

    Returns:
        uint8 tensor (side, side, 1).
    """
    if image.shape[:2].is_fully_defined():  # the way that does not fit could not even be built
        shrink = _average_fours if image.shape[:2] == (4 * side, 4 * side) else _fit_and_pad
        return tf.ensure_shape(shrink(image, side), (side, side, 1))
    is_four_times = tf.reduce_all(tf.shape(image)[:2] == 4 * side)
    resized = tf.cond(is_four_times, lambda: _average_fours(image, side), lambda: _fit_and_pad(image, side))
    return tf.ensure_shape(resized, (side, side, 1))


def _average_fours(image, side):
    """Averages 4 x 4 pixels, as `_fit_and_pad` would, in a third of the time: NIH's 1024 pixels become 256 this way.

    Four pixels of a row are one number, and two sums of 16 bits are added at once.
    """
    fours = tf.bitcast(tf.reshape(image, (4 * side, side, 4)), tf.uint32)
    pairs = tf.bitwise.bitwise_and(fours, 0x00FF00FF)
    pairs += tf.bitwise.bitwise_and(tf.bitwise.right_shift(fours, 8), 0x00FF00FF)
    pairs = tf.reshape(pairs, (side, 4, side))
    pairs = pairs[:, 0] + pairs[:, 1] + pairs[:, 2] + pairs[:, 3]
    sums = tf.bitwise.bitwise_and(pairs, 0xFFFF) + tf.bitwise.right_shift(pairs, 16)
    return tf.cast(tf.round(tf.cast(sums, tf.float32) / 16), tf.uint8)[..., None]


def _fit_and_pad(image, side):
    shape = tf.shape(image)[:2]
    longest = tf.reduce_max(shape)
    size = tf.maximum(1, tf.cast(tf.round(tf.cast(shape, tf.float32) * side / tf.cast(longest, tf.float32)), tf.int32))
    resized = tf.cond(
        longest > side,
        lambda: tf.image.resize(image, size, method="area"),
        lambda: tf.image.resize(image, size, method="bilinear"),
    )
    resized = tf.cast(tf.round(resized), tf.uint8)
    before = (side - size) // 2
    return tf.pad(resized, [[before[0], side - size[0] - before[0]], [before[1], side - size[1] - before[1]], [0, 0]])


def fit_images(images, side):
    """Fits gray images into squares as `resize_image` does, with matrix products alone, which ONNX and LiteRT have too.

    Images of the right size come out as they went in. Of others a gray level may differ by one here and there:
    TensorFlow's averages are off by up to 0.002, and where one lies at a half it may be rounded to either side.

    Args:
        images: float32 tensor (n, height, width, 1), 0 to 255.
        side: int, pixels.

    Returns:
        float32 tensor (n, side, side, 1), whole numbers.
    """
    shape = tf.cast(tf.shape(images)[1:3], tf.float32)
    longest = tf.reduce_max(shape)
    size = tf.maximum(1.0, tf.round(shape * side / longest))
    before = tf.floor((side - size) / 2)

    def weigh(n, size, before):
        """Returns the (side, n) weights of the pixels of one axis."""
        to = tf.range(side, dtype=tf.float32)[:, None] - before
        at = tf.cast(tf.range(tf.cast(n, tf.int32)), tf.float32)[None]
        overlap = tf.minimum((to + 1) * n, (at + 1) * size) - tf.maximum(to * n, at * size)
        center = tf.clip_by_value((to + 0.5) * n / size - 0.5, 0.0, n - 1)
        weights = tf.where(longest > side, overlap / n, 1 - tf.abs(center - at))
        return tf.where((to >= 0) & (to < size), tf.maximum(weights, 0.0), 0.0)

    rows, columns = (weigh(shape[k], size[k], before[k]) for k in (0, 1))
    resized = tf.matmul(tf.matmul(rows, images[..., 0]), columns, transpose_b=True)
    return tf.ensure_shape(tf.floor(resized + 0.5)[..., None], (None, side, side, 1))


def are_gray_levels(pixels):
    """Returns whether pixels (n, height, width, 1) are 0 to 255, and not shares of it from 0 to 1: bool scalar tensor.

    The network would answer anything else with confidence: even a NaN vanishes in a ReLU.
    """
    is_in_range = tf.reduce_all((pixels >= 0) & (pixels <= 255))  # NaN is neither
    is_shares = (tf.reduce_max(pixels) <= 1) & tf.reduce_any((pixels > 0) & (pixels < 1))
    return is_in_range & ~is_shares


def refuse_pixels(pixels):
    """Returns the op that fails unless pixels (n, height, width, 1) pass `are_gray_levels`, with `MIN_SIDE` a side."""
    is_image = tf.reduce_all(tf.shape(pixels)[1:3] >= MIN_SIDE)
    message = f"pixels: expected gray levels from 0 to 255, not from 0 to 1, and sides of {MIN_SIDE} pixels or more"
    return tf.debugging.Assert(are_gray_levels(pixels) & is_image, [message])


def decode_image(data, side):
    """Decodes one encoded image and fits it into a square: `decode_gray`, then `resize_image`. Runs in a graph.

    Args:
        data: scalar string tensor, PNG or JPEG.
        side: int, pixels.

    Returns:
        uint8 tensor (side, side, 1).
    """
    return resize_image(decode_gray(data), side)


def decode_images(data, side):
    """Decodes a batch of encoded images of any sizes, several at a time. Runs in a graph, that of a served model too.

    Headers are read before any pixel, so that a small file that declares a huge image is refused, not decoded. One
    bad item fails the batch with an error that names it and every other bad one.

    Args:
        data: string tensor (n,), PNG or JPEG files.
        side: int, pixels.

    Returns:
        uint8 tensor (n, side, side, 1).

    Raises:
        tf.errors.InvalidArgumentError: items are no complete PNG or JPEG, or declare more than `MAX_PIXELS` pixels or
            a side below `MIN_SIDE`; with their numbers, from 0.
    """
    data = tf.convert_to_tensor(data)
    n = tf.size(data, out_type=tf.int64)

    def read(number, item):
        with tf.control_dependencies([read_header(item)]):
            return number, decode_image(tf.identity(item), side)

    images = tf.data.Dataset.from_tensor_slices(data).enumerate().map(read, num_parallel_calls=tf.data.AUTOTUNE)
    nothing = tf.data.Dataset.from_tensors((tf.constant(-1, tf.int64), tf.zeros((side, side, 1), tf.uint8)))
    numbers, images = images.ignore_errors().concatenate(nothing).batch(n + 1).get_single_element()
    is_read = tf.scatter_nd(numbers[:-1, None], tf.ones_like(numbers[:-1]), n[None]) > 0
    bad = tf.boolean_mask(tf.range(n), ~is_read)
    listed = tf.strings.reduce_join(tf.strings.as_string(bad), separator=", ")
    wanted = f" (from 0): no complete PNG or JPEG of {MIN_SIDE} pixels a side to {MAX_PIXELS:,} pixels"
    refusal = tf.strings.join(["image_bytes, item ", listed, wanted])
    with tf.control_dependencies([tf.debugging.Assert(tf.equal(tf.size(bad), 0), [refusal])]):
        return tf.ensure_shape(images[:-1], (None, side, side, 1))


def read_header(data):
    """Reads what the header of an encoded image says, without decoding any pixel. Runs in a graph.

    Args:
        data: scalar string tensor, PNG or JPEG.

    Returns:
        int64 tensor (4,): width and height in pixels, bits a channel, and PNG's number of the kind of colors (0 gray,
        2 RGB, 3 palette, 4 gray with alpha, 6 RGBA; a JPEG is 0 or 2, and -1 in CMYK).

    Raises:
        tf.errors.InvalidArgumentError: the bytes begin neither like a PNG nor like a JPEG, or declare more than
            `MAX_PIXELS` pixels or a side below `MIN_SIDE`.
    """
    beginning = tf.strings.substr(tf.strings.join([data, 26 * b"\0"]), 0, 26)
    is_png = tf.strings.substr(beginning, 0, 4) == b"\x89PNG"
    is_jpeg = tf.strings.substr(beginning, 0, 2) == b"\xff\xd8"

    def of_png():  # width and height are the 8 bytes from byte 16, the highest first
        size = tf.io.decode_raw(tf.strings.substr(beginning, 16, 8), tf.int32, little_endian=False)
        kind = tf.io.decode_raw(tf.strings.substr(beginning, 24, 2), tf.uint8)
        return tf.concat([size, tf.cast(kind, tf.int32)], axis=0)

    def of_jpeg():
        height, width, channels = tf.unstack(tf.image.extract_jpeg_shape(data))
        return tf.stack([width, height, 8, tf.where(channels == 1, 0, tf.where(channels == 3, 2, -1))])

    header = tf.cond(is_png, of_png, lambda: tf.cond(is_jpeg, of_jpeg, lambda: tf.zeros(4, tf.int32)))
    header = tf.cast(header, tf.int64)
    size = header[:2]
    is_fit = tf.reduce_all(size >= MIN_SIDE) & (tf.reduce_prod(size) <= MAX_PIXELS)
    with tf.control_dependencies([tf.debugging.Assert((is_png | is_jpeg) & is_fit, [size])]):
        return tf.ensure_shape(header, (4,))
