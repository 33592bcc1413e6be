"""From the bytes of a PNG or JPEG to a square gray film, the same way in packing and inside the exported model.

A DICOM becomes the bytes of a PNG first (`load_film`). The functions that take tensors run eagerly, inside
`Dataset.map` and inside a SavedModel, so that a film is read with the very same operations wherever it is met.
"""

import io
import os

import numpy as np
import tensorflow as tf
from PIL import Image, UnidentifiedImageError

from .files import as_path

MAX_PIXELS = 2**25  # 33.5 megapixels: the largest chest detectors give about 18; a bomb declares hundreds
MAX_BYTES = 2**27  # 134 MB, of a file: twice what a film of MAX_PIXELS takes at 16 bits and without compression
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
    assert_film_size(header["width"], header["height"])
    return header


def assert_film_size(width, height):
    """Raises FilmError if a declared size, in pixels, is above `MAX_PIXELS` or a side of it below `MIN_SIDE`."""
    if width * height > MAX_PIXELS:
        raise FilmError(f"declares {width} x {height} pixels, more than the {MAX_PIXELS:,} allowed")
    if min(width, height) < MIN_SIDE:
        raise FilmError(f"{width} x {height} pixels: a side is below {MIN_SIDE}")


def read_film_bytes(source):
    """Reads a file that is to be a film, but no more of it than `MAX_BYTES`.

    Args:
        source: path of a file, also `gs://`, or its bytes, which are only measured.

    Returns:
        bytes.

    Raises:
        FilmError: the file is empty or larger than `MAX_BYTES`.
        OSError: the file cannot be read.
    """
    if isinstance(source, bytes):
        data = source
    else:
        with as_path(source).open("rb") as file:
            data = file.read(MAX_BYTES + 1)  # not its size first: a pipe has none, and a file may grow in between
    if not data:
        raise FilmError("empty file")
    if len(data) > MAX_BYTES:
        raise FilmError(f"larger than the {MAX_BYTES:,} bytes allowed")
    return data


def load_film(source):
    """Makes of a PNG, JPEG or DICOM file what the exported model and `decode_film` take.

    A DICOM is known by its content ("DICM" at byte 128, DICOM PS3.10 section 7.1), or else by the ending .dcm.

    Args:
        source: path of a file, also `gs://`, or its bytes.

    Returns:
        (data, notes): bytes of a PNG or JPEG, and a list of sentences from `dicom.decode_dicom`. PNG and JPEG are
        passed on unchanged, without notes; a DICOM becomes an 8-bit gray PNG that holds pixels and nothing else.

    Raises:
        FilmError: the file is no film that can be read, see `inspect_film` and `dicom.decode_dicom`.
        OSError: the file cannot be read.
    """
    data = read_film_bytes(source)
    named = not isinstance(source, bytes) and os.fspath(source).lower().endswith((".dcm", ".dicom"))
    if data[128:132] != b"DICM" and (not named or data.startswith((b"\x89PNG", b"\xff\xd8"))):
        inspect_film(data)
        return data, []
    from .dicom import decode_dicom  # not above: that room imports this one

    image, notes = decode_dicom(data)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue(), notes


def looks_inverted(image):
    """Tells by its pixels alone whether a frontal chest film is a negative of what it should be (bone bright).

    On a film with bone bright, the column of spine and heart is brighter than the lungs beside it, and the upper
    corners, which show air over the shoulders, are darker than the film as a whole. Both differences are measured in
    standard deviations of the film, shrunk to 32 x 32, and added; inverting the film changes the sign of the sum
    and nothing else. It speaks only beyond +-1. Of 304 films of ChestX-ray14 (its public sample of PNGs) 297 were
    told right, 0 wrong and 7 not told; of the 247 films of the JSRT database 247, 0 and 0; the same numbers with
    every film inverted. With 0 wrong in 551 the true share may still be 0.5 % (upper end of 95 %, the rule of
    three). What is not told: collimators that are white in both upper corners, washed-out bedside films. Lateral
    films and other parts of the body were not measured.

    Args:
        image: uint8 array (height, width), 0 to 255.

    Returns:
        True, False, or None where the pixels do not tell.
    """
    small = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BOX), np.float32)
    spread = small.std()
    if spread < 1:  # gray level: nothing is on it
        return None
    middle = slice(8, 20)  # rows, from the clavicles to the diaphragm
    lungs = (small[middle, 6:11].mean() + small[middle, 21:26].mean()) / 2
    column = small[middle, 14:18].mean()
    corners = (small[:4, :4].mean() + small[:4, -4:].mean()) / 2
    score = ((column - lungs) + (small.mean() - corners)) / spread
    return bool(score < 0) if abs(score) > 1 else None


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


def fit_films(films, side):
    """Fits gray films into squares as `resize_film` does, with matrix products alone, which ONNX and LiteRT have too.

    Films of the right size come out as they went in. Of others a gray level may differ by one here and there:
    TensorFlow's averages are off by up to 0.002, and where one lies at a half it may be rounded to either side.

    Args:
        films: float32 tensor (n, height, width, 1), 0 to 255.
        side: int, pixels.

    Returns:
        float32 tensor (n, side, side, 1), whole numbers.
    """
    shape = tf.cast(tf.shape(films)[1:3], tf.float32)
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
    resized = tf.matmul(tf.matmul(rows, films[..., 0]), columns, transpose_b=True)
    return tf.ensure_shape(tf.floor(resized + 0.5)[..., None], (None, side, side, 1))


def decode_film(data, side):
    """Decodes one encoded film and fits it into a square: `decode_gray`, then `resize_film`. Runs in a graph.

    Args:
        data: scalar string tensor, PNG or JPEG.
        side: int, pixels.

    Returns:
        uint8 tensor (side, side, 1).
    """
    return resize_film(decode_gray(data), side)


def decode_films(data, side):
    """Decodes a batch of encoded films of any sizes, several at a time. Runs in a graph, that of a served model too.

    Headers are read before any pixel, so that a small file that declares a huge picture is refused, not decoded. One
    bad item fails the batch with an error that names it and every other bad one; nothing else is harmed.

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
        with tf.control_dependencies([_check_header(item)]):
            return number, decode_film(tf.identity(item), side)

    films = tf.data.Dataset.from_tensor_slices(data).enumerate().map(read, num_parallel_calls=tf.data.AUTOTUNE)
    nothing = tf.data.Dataset.from_tensors((tf.constant(-1, tf.int64), tf.zeros((side, side, 1), tf.uint8)))
    numbers, films = films.ignore_errors().concatenate(nothing).batch(n + 1).get_single_element()
    is_read = tf.scatter_nd(numbers[:-1, None], tf.ones_like(numbers[:-1]), n[None]) > 0
    bad = tf.boolean_mask(tf.range(n), ~is_read)
    listed = tf.strings.reduce_join(tf.strings.as_string(bad), separator=", ")
    wanted = f" (from 0): no complete PNG or JPEG of {MIN_SIDE} pixels a side to {MAX_PIXELS:,} pixels"
    refusal = tf.strings.join(["image_bytes, item ", listed, wanted])
    with tf.control_dependencies([tf.debugging.Assert(tf.equal(tf.size(bad), 0), [refusal])]):
        return tf.ensure_shape(films[:-1], (None, side, side, 1))


def _check_header(data):
    """Returns the op that fails unless encoded bytes begin like a PNG or JPEG of a size that may be decoded."""
    beginning = tf.strings.substr(tf.strings.join([data, 25 * b"\0"]), 0, 25)
    is_png = tf.strings.substr(beginning, 0, 4) == b"\x89PNG"
    is_jpeg = tf.strings.substr(beginning, 0, 2) == b"\xff\xd8"

    def png_size():  # width and height are the 8 bytes from byte 16, the highest first
        return tf.io.decode_raw(tf.strings.substr(beginning, 16, 8), tf.int32, little_endian=False)

    def jpeg_size():
        return tf.image.extract_jpeg_shape(data)[:2]

    size = tf.cast(tf.cond(is_png, png_size, jpeg_size), tf.int64)
    is_fit = tf.reduce_all(size >= MIN_SIDE) & (tf.reduce_prod(size) <= MAX_PIXELS)
    return tf.debugging.Assert((is_png | is_jpeg) & is_fit, [size])
