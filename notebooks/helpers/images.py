"""From the bytes of a PNG or JPEG to a square gray film, the same way in packing and inside the exported model.

The functions that take tensors run eagerly, inside `Dataset.map` and inside a SavedModel, so that a film is read
with the very same operations wherever it is met.
"""

import io

import tensorflow as tf
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 2**25  # 33.5 megapixels: the largest chest detectors give about 18; a bomb declares hundreds
MIN_SIDE = 16  # pixels; anything smaller is a tracking pixel or a broken thumbnail


class FilmError(ValueError):
    """A file that is not a film that can be read; the message says why and never holds pixel data."""


def inspect_film(source):
    """Reads the header of an encoded film, without decoding any pixel.

    Args:
        source: path of a file, of which only the beginning is read, or its bytes.

    Returns:
        A dict with `format` ("PNG" or "JPEG"), `width`, `height` (pixels) and `mode` (Pillow's name of the pixel
        format: "L", "RGBA", "P", "I;16", ...).

    Raises:
        FilmError: the file is empty, is no PNG or JPEG, or declares more than `MAX_PIXELS` pixels or a side below
            `MIN_SIDE`.
        OSError: the file cannot be opened.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        beginning = file.read(12)
        file.seek(0)
        return _read_header(file, beginning)


def _read_header(file, beginning):
    if not beginning:
        raise FilmError("empty file")
    try:
        with Image.open(file, formats=("PNG", "JPEG")) as image:
            header = {"format": image.format, "width": image.width, "height": image.height, "mode": image.mode}
    except UnidentifiedImageError:
        if beginning.startswith((b"\x89PNG", b"\xff\xd8")):
            raise FilmError("broken header: begins like a PNG or JPEG, but is damaged or cut short") from None
        raise FilmError(f"neither PNG nor JPEG: the file begins with {beginning!r}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise FilmError(f"declares more than the {MAX_PIXELS:,} pixels allowed") from None
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError for a broken PNG chunk
        raise FilmError(f"broken header: {error}") from None
    pixels = header["width"] * header["height"]
    if pixels > MAX_PIXELS:
        raise FilmError(f"declares {header['width']} x {header['height']} pixels, more than the {MAX_PIXELS:,} allowed")
    if min(header["width"], header["height"]) < MIN_SIDE:
        raise FilmError(f"{header['width']} x {header['height']} pixels: a side is below {MIN_SIDE}")
    return header


def decode_gray(data):
    """Decodes PNG or JPEG bytes to gray levels. Runs in a graph.

    16-bit PNGs are scaled linearly to 8 bits, as the PNG standard defines their range; colors become luminance and
    an alpha channel is ignored (the RGBA files of ChestX-ray14 are opaque).

    Args:
        data: scalar string tensor.

    Returns:
        uint8 tensor (height, width, 1), 0 to 255.

    Raises:
        tf.errors.InvalidArgumentError: the bytes are no complete PNG or JPEG.
    """
    header = tf.strings.join([tf.strings.substr(data, 0, 25), 25 * b"\0"])  # padded, lest `substr` run out of range
    is_png = tf.strings.substr(header, 0, 4) == b"\x89PNG"
    is_deep = is_png & (tf.strings.substr(header, 24, 1) == b"\x10")  # byte 24 of a PNG is its bit depth

    def deep():
        wide = tf.cast(tf.io.decode_png(data, channels=1, dtype=tf.uint16), tf.int32)
        return tf.cast((wide + 128) // 257, tf.uint8)

    def plain():
        return tf.io.decode_image(data, channels=1, expand_animations=False)

    return tf.ensure_shape(tf.cond(is_deep, deep, plain), (None, None, 1))


def resize_film(image, side):
    """Fits a gray image into a square and pads the shorter side with black, so that no anatomy is cut or squeezed.

    Shrinking averages areas (no aliasing), enlarging is bilinear. Runs in a graph.

    Args:
        image: uint8 tensor (height, width, 1).
        side: int, pixels.

    Returns:
        uint8 tensor (side, side, 1).
    """
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
    padded = tf.pad(resized, [[before[0], side - size[0] - before[0]], [before[1], side - size[1] - before[1]], [0, 0]])
    return tf.ensure_shape(padded, (side, side, 1))


def decode_film(data, side):
    """Decodes one encoded film and fits it into a square: `decode_gray`, then `resize_film`. Runs in a graph.

    Args:
        data: scalar string tensor, PNG or JPEG.
        side: int, pixels.

    Returns:
        uint8 tensor (side, side, 1).
    """
    return resize_film(decode_gray(data), side)
