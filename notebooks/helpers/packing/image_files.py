"""Image files before they are decoded, without TensorFlow: what their header says, and whether they may be read."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..runtime.files import as_path

MAX_PIXELS = 2**25  # 33.5 megapixels: the largest chest detectors give about 18; a decompression bomb has hundreds
MAX_BYTES = 2**27  # 134 MB, of a file: twice what an image of MAX_PIXELS takes at 16 bits and without compression
MIN_SIDE = 16  # pixels; anything smaller is a tracking pixel or a broken thumbnail
_FLAT = 16  # gray levels that a row of border spans, with the noise of a detector

# Pillow's name of each pixel format of PNG, by bits a channel and PNG's number of the kind of colors. It knows no
# colors of 16 bits, nor gray of 2 and 4.
PNG_MODES = {
    **{(1, 0): "1", (2, 0): "L", (4, 0): "L", (8, 0): "L", (16, 0): "I;16"},
    **{(8, 2): "RGB", (16, 2): "RGB", (8, 4): "LA", (16, 4): "RGBA", (8, 6): "RGBA", (16, 6): "RGBA"},
    **{(1, 3): "P", (2, 3): "P", (4, 3): "P", (8, 3): "P"},
}

_AS_PNG, _UNPACK, _AGAIN = "save it as PNG", "unpack it", "export or copy it again"
_KINDS = {  # by how they begin: what they are, and what to do
    **{b"GIF8": ("a GIF", _AS_PNG), b"BM": ("a BMP", _AS_PNG), b"II*\0": ("a TIFF", _AS_PNG)},
    **{b"MM\0*": ("a TIFF", _AS_PNG), b"RIFF": ("a WebP", _AS_PNG), b"\0\0\0\x0cjP": ("a JPEG 2000", _AS_PNG)},
    **{
        b"PK": ("a zip archive", _UNPACK),
        b"\x1f\x8b": ("a gzip archive", _UNPACK),
        b"7z\xbc": ("a 7z archive", _UNPACK),
    },
    **{b"Rar!": ("a RAR archive", _UNPACK), b"%PDF": ("a PDF", "export the image in it as PNG")},
    **{b"<!": ("a web page", "download the image again"), b"<html": ("a web page", "download the image again")},
    b"version https://git-lfs": ("a pointer of Git LFS, whose content was not fetched", "run `git lfs pull`"),
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
        raise ImageError(f"empty file; {_AGAIN}")
    try:
        with Image.open(file, formats=("PNG", "JPEG")) as image:
            header = {"format": image.format, "width": image.width, "height": image.height, "mode": image.mode}
    except UnidentifiedImageError:
        if beginning.startswith((b"\x89PNG", b"\xff\xd8")):
            raise ImageError(f"broken header: begins like a PNG or JPEG, but is damaged; {_AGAIN}") from None
        found = [f", but {kind}; {remedy}" for sign, (kind, remedy) in _KINDS.items() if beginning.startswith(sign)]
        kind = found[0] if found else f"; if it is an image, {_AS_PNG}"
        raise ImageError(f"neither PNG nor JPEG{kind}") from None  # without quoting it: that may be a name
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"declares more than the {MAX_PIXELS:,} pixels allowed; save it smaller") from None
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError for a broken PNG chunk
        raise ImageError(f"broken header: {error}; {_AGAIN}") from None
    if header["mode"] == "I":  # Pillow's older name
        header["mode"] = "I;16"
    if header["mode"] == "CMYK":
        raise ImageError("a JPEG in CMYK, the colors of printing, which no radiograph has; save it in gray")
    assert_image_size(header["width"], header["height"])
    return header


def assert_image_size(width, height):
    """Raises ImageError if a declared size, in pixels, is above `MAX_PIXELS` or a side of it below `MIN_SIDE`."""
    if width * height > MAX_PIXELS:
        raise ImageError(f"declares {width} x {height} pixels, more than the {MAX_PIXELS:,} allowed; save it smaller")
    if min(width, height) < MIN_SIDE:
        raise ImageError(
            f"{width} x {height} pixels: a side is below {MIN_SIDE}; give the image itself, not a thumbnail"
        )


def assert_image_decodes(data):
    """Decodes the bytes of a PNG or JPEG to their end; ImageError if they are damaged or cut short."""
    inspect_image(data)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError for a broken PNG chunk
        raise ImageError(f"damaged or cut short: {error}; {_AGAIN}") from None


def count_held_bits(data):
    """Counts the bits that the brightest pixel of a 16-bit PNG needs, by which `decode_gray` scales it.

    Args:
        data: bytes of a PNG or JPEG.

    Returns:
        int, 8 to 16; 16 for files of other depths, and for damaged ones, which decoding will refuse.
    """
    if not data.startswith(b"\x89PNG") or data[24:25] != b"\x10":
        return 16
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            ends = image.getextrema()
    except (OSError, SyntaxError, ValueError):
        return 16
    brightest = ends[1] if np.ndim(ends) == 1 else 257 * max(end[1] for end in ends[:3])  # of colors it keeps 8 bits
    return max(8, int(brightest).bit_length())


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
        raise ImageError(f"empty file; {_AGAIN}")
    if len(data) > MAX_BYTES:
        raise ImageError(f"larger than the {MAX_BYTES:,} bytes allowed; save it smaller")
    return data


def looks_inverted(image):
    """Judges from the pixels alone whether a frontal chest radiograph is a negative of what it should be (bone bright).

    On an image with bone bright, the column of spine and heart is brighter than the lungs beside it, and the upper
    corners, which show air over the shoulders, are darker than the image as a whole. Both differences are measured in
    standard deviations of the image without its borders, shrunk to 32 x 32, and added; inverting the image changes the
    sign of the sum and nothing else. Between -1 and +1 there is no answer.

    It was validated on real radiographs of ChestX-ray14 and JSRT, in both polarities, with borders of 0 to 20 % on one
    to four sides that are white, white with markers, black, or light gray with noise: see
    benchmarks/results/looks_inverted.json. Lateral images and other parts of the body were not measured.

    Args:
        image: uint8 array (height, width), 0 to 255.

    Returns:
        True, False, or None where the pixels give no clear answer.
    """
    small = _cut_borders(np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BOX)))
    small = np.asarray(Image.fromarray(small).resize((32, 32), Image.Resampling.BOX), np.float32)
    spread = small.std()
    if spread < 1:  # gray level: the image is blank
        return None
    middle = slice(8, 20)  # rows, from the clavicles to the diaphragm
    lungs = (small[middle, 6:11].mean() + small[middle, 21:26].mean()) / 2
    column = small[middle, 14:18].mean()
    corners = (small[:4, :4].mean() + small[:4, -4:].mean()) / 2
    score = ((column - lungs) + (small.mean() - corners)) / spread
    return bool(score < 0) if abs(score) > 1 else None


def _cut_borders(small):
    """Returns an image, uint8 (64, 64), without the rows and columns at its edges that are flat but for a marker."""
    inner = []
    for axis in (1, 0):
        ordered = np.sort(small, axis=axis)
        spans = np.ptp(np.take(ordered, [13, 50], axis=axis), axis=axis)  # of the middle three fifths
        filled = np.flatnonzero(spans >= _FLAT)
        first, last = (filled[0], filled[-1]) if len(filled) else (0, 63)
        inner.append(slice(first + (first > 0), last + (last == 63)))  # a row beside a border holds a part of it
    cut = small[inner[0], inner[1]]
    return cut if min(cut.shape) >= 24 else small
