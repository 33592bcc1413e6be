"""Image files before they are decoded, without TensorFlow: what their header says, and whether they may be read."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..runtime.files import as_path

MAX_PIXELS = 2**25  # 33.5 megapixels: the largest chest detectors give about 18; a decompression bomb has hundreds
MAX_BYTES = 2**27  # 134 MB, of a file: twice what an image of MAX_PIXELS takes at 16 bits and without compression
MIN_SIDE = 16  # pixels; anything smaller is a tracking pixel or a broken thumbnail

# Pillow's name of each pixel format of PNG, by bits a channel and PNG's number of the kind of colors. It knows no
# colors of 16 bits, nor gray of 2 and 4.
PNG_MODES = {
    **{(1, 0): "1", (2, 0): "L", (4, 0): "L", (8, 0): "L", (16, 0): "I;16"},
    **{(8, 2): "RGB", (16, 2): "RGB", (8, 4): "LA", (16, 4): "RGBA", (8, 6): "RGBA", (16, 6): "RGBA"},
    **{(1, 3): "P", (2, 3): "P", (4, 3): "P", (8, 3): "P"},
}

_KINDS = {
    **{b"GIF8": "a GIF", b"BM": "a BMP", b"II*\0": "a TIFF", b"MM\0*": "a TIFF", b"RIFF": "a WebP"},
    **{b"%PDF": "a PDF", b"<!": "a web page", b"<html": "a web page", b"PK": "a zip archive"},
    b"version https://git-lfs": "a pointer of Git LFS, whose content was not fetched",
}


class ImageError(ValueError):
    """A file is not an image that can be read; the message says why and quotes nothing of the file."""


def inspect_image(source):
    """Reads the header of an encoded image, without decoding any pixel.

    Args:
        source: path of a file, of which only the beginning is read, or its bytes.

    Returns:
        A dict with `format` ("PNG" or "JPEG"), `width`, `height` (pixels) and `mode` (Pillow's name of the pixel
        format: "L", "RGBA", "P", "I;16", ...).

    Raises:
        ImageError: the file is empty, is no PNG or JPEG, is in CMYK, or declares more than `MAX_PIXELS` pixels or a
            side below `MIN_SIDE`.
        OSError: the file cannot be opened.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        beginning = file.read(24)
        file.seek(0)
        return _read_header(file, beginning)


def _read_header(file, beginning):
    if not beginning:
        raise ImageError("empty file")
    try:
        with Image.open(file, formats=("PNG", "JPEG")) as image:
            header = {"format": image.format, "width": image.width, "height": image.height, "mode": image.mode}
    except UnidentifiedImageError:
        if beginning.startswith((b"\x89PNG", b"\xff\xd8")):
            raise ImageError("broken header: begins like a PNG or JPEG, but is damaged or cut short") from None
        kind = next((f", but {kind}" for sign, kind in _KINDS.items() if beginning.startswith(sign)), "")
        raise ImageError(f"neither PNG nor JPEG{kind}") from None  # without quoting it: that may be a name
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"declares more than the {MAX_PIXELS:,} pixels allowed") from None
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError for a broken PNG chunk
        raise ImageError(f"broken header: {error}") from None
    if header["mode"] == "I":  # Pillow's older name
        header["mode"] = "I;16"
    if header["mode"] == "CMYK":
        raise ImageError("a JPEG in CMYK, the colors of printing, which no radiograph has: save it in gray")
    assert_image_size(header["width"], header["height"])
    return header


def assert_image_size(width, height):
    """Raises ImageError if a declared size, in pixels, is above `MAX_PIXELS` or a side of it below `MIN_SIDE`."""
    if width * height > MAX_PIXELS:
        raise ImageError(f"declares {width} x {height} pixels, more than the {MAX_PIXELS:,} allowed")
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{width} x {height} pixels: a side is below {MIN_SIDE}")


def assert_image_decodes(data):
    """Decodes the bytes of a PNG or JPEG to their end; ImageError if they are damaged or cut short."""
    inspect_image(data)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError for a broken PNG chunk
        raise ImageError(f"damaged or cut short: {error}") from None


def read_image_bytes(source):
    """Reads an image file of at most `MAX_BYTES`.

    Args:
        source: path of a file, also `gs://`, or its bytes, which are only measured.

    Returns:
        bytes.

    Raises:
        ImageError: the file is empty or larger than `MAX_BYTES`.
        OSError: the file cannot be read.
    """
    if isinstance(source, bytes):
        data = source
    else:
        with as_path(source).open("rb") as file:
            data = file.read(MAX_BYTES + 1)  # not its size first: a pipe has none, and a file may grow in between
    if not data:
        raise ImageError("empty file")
    if len(data) > MAX_BYTES:
        raise ImageError(f"larger than the {MAX_BYTES:,} bytes allowed")
    return data


def looks_inverted(image):
    """Judges from the pixels alone whether a frontal chest radiograph is a negative of what it should be (bone bright).

    On an image with bone bright, the column of spine and heart is brighter than the lungs beside it, and the upper
    corners, which show air over the shoulders, are darker than the image as a whole. Both differences are measured in
    standard deviations of the image, shrunk to 32 x 32, and added; inverting the image changes the sign of the sum
    and nothing else. Between -1 and +1 there is no answer. Of 304 images of ChestX-ray14 (its public sample of PNGs)
    297 were right, 0 wrong and 7 without an answer; of the 247 images of the JSRT database 247, 0 and 0; the same
    numbers with every image inverted. With 0 wrong in 551 the true share may still be 0.5 % (upper end of 95 %, the
    rule of three). No answer: collimators that are white in both upper corners, washed-out bedside images. Lateral
    images and other parts of the body were not measured.

    Args:
        image: uint8 array (height, width), 0 to 255.

    Returns:
        True, False, or None where the pixels give no clear answer.
    """
    small = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BOX), np.float32)
    spread = small.std()
    if spread < 1:  # gray level: the image is blank
        return None
    middle = slice(8, 20)  # rows, from the clavicles to the diaphragm
    lungs = (small[middle, 6:11].mean() + small[middle, 21:26].mean()) / 2
    column = small[middle, 14:18].mean()
    corners = (small[:4, :4].mean() + small[:4, -4:].mean()) / 2
    score = ((column - lungs) + (small.mean() - corners)) / spread
    return bool(score < 0) if abs(score) > 1 else None
