"""Warns of unusual input: color, screenshots, empty files, inverted or turned images, laterals, other body parts.

A chest radiograph model returns probabilities for any picture. The gate measures a few statistics, and a linear model,
fitted to synthetic pictures only, decides which of ten kinds of picture an image resembles most. It gives warnings with
reasons and never rejects an image. docs/input_gate.md has its error rates and its limits.
"""

import io
import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..packing.image_files import ImageError, inspect_image
from ..study.audit import LEAST_LEVELS, measure_levels

# Kinds of picture that the linear model distinguishes: chests turned counterclockwise, the same inverted, and two more.
KINDS = (
    *("upright", "turned 90", "turned 180", "turned 270"),
    *("inverted", "inverted 90", "inverted 180", "inverted 270"),
    *("lateral", "not_chest"),
)
CODES = ("color", "empty", "narrow", "screenshot", "inverted", "rotated", "lateral", "not_chest")

# Limits lie between the values of real radiographs and those of unusual input; docs/input_gate.md has both. Only that
# of the evidence was chosen by counting: on half of the real patients, see benchmarks/input_gate.py.
MAX_COLOR = 3.0  # gray levels; JPEG of gray stored as RGB stays below 1
MIN_CONTRAST = 40.0  # gray levels; 551 real radiographs have 130 or more; below `LEAST_LEVELS` much is unused
MAX_FLAT = 0.25  # share of the picture; real radiographs have 0.12 at most, synthetic ones 0.20
MAX_EVIDENCE = 1.0  # difference of log-odds

_MIDDLE, _SMALL = 64, 32  # pixels a side: borders are found on the first, the linear model gets the second
_BLACK, _WHITE = 12, 243  # gray levels: rows and columns at the edge that are darker or brighter are border
_MIN_BOX = _MIDDLE // 4  # a picture narrower than this keeps its border
_BATCH = 128  # images at once: 34 MB at 512 pixels


class ImageWarning(NamedTuple):
    """Why an image may not be what the model was trained on.

    Attributes:
        code: one of `CODES`.
        reason: a sentence or two with what was measured, its limit, and what to do.
    """

    code: str
    reason: str


def check_image(image, color=None):
    """Returns a list of `ImageWarning` for one image, uint8 (side, side) or (side, side, 1); see `check_images`."""
    return check_images(np.asarray(image)[None], None if color is None else [color])[0]


def check_images(images, colors=None):
    """Checks whether images are what the model was trained on, thousands of images a second.

    - color: the mean color of the file, if measured.
    - empty: 98 % of the pixels have nearly the same gray level. Nothing else is checked then.
    - narrow: 98 % of the pixels lie within half of the gray levels, as where 12 bits were saved as 16.
    - screenshot: much of the picture is flat gray, without the noise of a detector.
    - inverted, rotated, lateral, not_chest: the linear model gives another kind more evidence than the upright chest.

    Args:
        images: uint8 array (n, side, side) or (n, side, side, 1), as from `decode_image`, with sides of 32 pixels or
            more. Sides below 64, on which no error rates were measured, are enlarged. Black or white borders are cut
            off first.
        colors: n floats of `measure_color`, NaN where it was not measured, or None.

    Returns:
        List of n lists of `ImageWarning`; empty lists for ordinary images.

    Raises:
        ValueError: if images have another type or shape, a side below 32 pixels, or another number than colors.
    """
    images = np.asarray(images)
    colors = np.full(len(images), np.nan) if colors is None else np.asarray(colors, "float64")
    if colors.shape != images.shape[:1]:
        raise ValueError(f"colors have shape {colors.shape}; expected one for each of the {len(images)} images")
    _check(images)
    if images.shape[1] < _MIDDLE:
        size, how = (_MIDDLE, _MIDDLE), Image.Resampling.BILINEAR
        larger = [np.asarray(Image.fromarray(image.squeeze()).resize(size, how)) for image in images]
        images = np.array(larger, "uint8").reshape(-1, *size)
    weights = _load_model()
    warnings = []
    for start in range(0, len(images), _BATCH):
        small, flat = _shrink(images[start : start + _BATCH])
        contrast = measure_levels(small)
        evidence = _find_features(small) @ weights[:, :-1].T + weights[:, -1]
        measured = zip(colors[start:], contrast, flat, evidence, strict=False)
        warnings += [_judge(*numbers) for numbers in measured]
    return warnings


def measure_color(data):
    """Measures how colorful a file is: the mean difference between the largest and the smallest of R, G and B.

    Gray stored as RGB, RGBA or palette gives 0, or below 1 after JPEG. Files that are gray by their header are not
    decoded.

    Args:
        data: bytes of a PNG or JPEG.

    Returns:
        float, 0 to 255.

    Raises:
        ImageError: the file cannot be read.
    """
    header = inspect_image(data)
    if header["mode"] not in ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr"):
        return 0.0
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", (64, 64))
            pixels = image.convert("RGB")
            pixels.thumbnail((64, 64), Image.Resampling.BOX)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError for a broken PNG chunk
        raise ImageError(f"cannot be decoded: {error}; export or copy it again") from None
    return float(np.ptp(np.asarray(pixels), axis=-1).mean())


def image_features(images):
    """Computes the features of the linear model: gray levels, and the strength of edges across and down.

    The image without its borders is resized to 32 x 32 pixels and scaled to zero mean and unit deviation. The features
    are 16 x 16 means of it, and 2 x 8 x 8 means of the root of the differences between neighbors. Brightness and
    contrast do not change them, apart from clipping.

    Args:
        images: uint8 array as for `check_images`.

    Returns:
        float32 (n, 384).
    """
    images = np.asarray(images)
    _check(images)
    batches = [_find_features(_shrink(images[i : i + _BATCH])[0]) for i in range(0, len(images), _BATCH)]
    return np.concatenate([np.empty((0, 384), "float32"), *batches])


def _check(images):
    side = images.shape[1] if images.ndim > 1 else 0
    if images.dtype != np.uint8 or images.shape not in [(len(images), side, side), (len(images), side, side, 1)]:
        raise ValueError(f"images are {images.dtype} of shape {images.shape}; expected uint8 (n, side, side)")
    if side < _SMALL:
        raise ValueError(f"images have sides of {side} pixels; expected {_SMALL} or more")


@lru_cache(maxsize=4096)
def _average(n, n_out, start, stop):
    """Returns float32 (n_out, n): weights that average the cells from start to stop into n_out cells."""
    edges = np.linspace(start, stop, n_out + 1)
    cells = np.arange(n)
    weights = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    weights = np.clip(weights, 0, None)
    return (weights / weights.sum(axis=1, keepdims=True)).astype("float32")


def _shrink(images):
    """Returns images without borders, float32 (n, 32, 32), 0 to 255, and their flat share, float (n,)."""
    n, side = images.shape[:2]
    images = images.reshape(n, side, side)
    step = side // _MIDDLE
    if side == _MIDDLE * step and step < 257:  # sums of integers are faster, and fit into 16 bits
        rows = images.reshape(n, _MIDDLE, step, side).sum(axis=2, dtype="uint16").astype("float32") / step
    else:
        rows = _average(side, _MIDDLE, 0, side) @ images.astype("float32")
    middle = rows @ _average(side, _MIDDLE, 0, side).T
    down, across = (_find_box(middle, axis) for axis in (2, 1))
    cut_down = np.stack([_average(_MIDDLE, _SMALL, *ends) for ends in down.tolist()])
    cut_across = np.stack([_average(_MIDDLE, _SMALL, *ends) for ends in across.tolist()])
    small = cut_down @ middle @ cut_across.transpose(0, 2, 1)

    same = np.abs(np.diff(middle, axis=1))[:, :, :-1] < 0.5
    same &= np.abs(np.diff(middle, axis=2))[:, :-1] < 0.5
    place = np.arange(_MIDDLE - 1)
    inside_down, inside_across = (
        ((place >= box[:, :1]) & (place < box[:, 1:] - 1)).astype("float32") for box in (down, across)
    )
    count = np.matmul(inside_down[:, None], np.matmul(same.astype("float32"), inside_across[:, :, None]))[:, 0, 0]
    return small, count / (inside_down.sum(axis=1) * inside_across.sum(axis=1))


def _find_box(middle, axis):
    """Returns int (n, 2): the first row (axis 2) or column (axis 1) that is not border, and the last plus one."""
    filled = (middle.max(axis=axis) >= _BLACK) & (middle.min(axis=axis) <= _WHITE)
    ends = np.stack([filled.argmax(axis=1), _MIDDLE - filled[:, ::-1].argmax(axis=1)], axis=1)
    ends[(np.ptp(ends, axis=1) < _MIN_BOX) | ~filled.any(axis=1)] = 0, _MIDDLE
    return ends


def _find_features(small):
    n = len(small)
    small = small - small.mean(axis=(1, 2), keepdims=True)
    small /= np.maximum(small.std(axis=(1, 2), keepdims=True), 2)  # a blank image stays blank
    edges = [np.zeros_like(small), np.zeros_like(small)]
    edges[0][:, :, :-1], edges[1][:, :-1] = np.abs(np.diff(small, axis=2)), np.abs(np.diff(small, axis=1))
    edges = [3 * np.sqrt(edge + 0.01) for edge in edges]  # 3: about the scale of the gray levels
    parts = ((small, 16), (edges[0], 8), (edges[1], 8))
    pooled = [_average(_SMALL, side, 0, _SMALL) @ part @ _average(_SMALL, side, 0, _SMALL).T for part, side in parts]
    return np.concatenate([part.reshape(n, -1) for part in pooled], axis=1)


@lru_cache(maxsize=1)
def _load_model():
    """Returns float32 (10, 385): the weights of each of `KINDS` and its intercept."""
    model = json.loads(Path(__file__).with_suffix(".json").read_text())
    return np.array([model["weights"][kind] for kind in KINDS], "float32")


def _judge(color, contrast, flat, evidence):
    found = []
    if color > MAX_COLOR:
        found.append(ImageWarning("color", _REASONS["color"].format(color, MAX_COLOR)))
    if contrast < MIN_CONTRAST:
        return [*found, ImageWarning("empty", _REASONS["empty"].format(contrast, MIN_CONTRAST))]
    if contrast < LEAST_LEVELS:
        found.append(ImageWarning("narrow", _REASONS["narrow"].format(contrast, LEAST_LEVELS)))
    if flat > MAX_FLAT:
        found.append(ImageWarning("screenshot", _REASONS["screenshot"].format(100 * flat, 100 * MAX_FLAT)))
    kind, excess = int(evidence.argmax()), float(evidence.max() - evidence[0])
    if excess <= MAX_EVIDENCE:
        return found
    numbers = f"(evidence {excess:.1f} above that for an upright chest, limit {MAX_EVIDENCE:.1f})"
    if 4 <= kind < 8:
        found.append(ImageWarning("inverted", _REASONS["inverted"].format(numbers)))
    if kind < 8 and kind % 4:
        turns = "90° counterclockwise", "by 180°", "90° clockwise"
        reason = _REASONS["rotated"].format(turns[kind % 4 - 1], numbers, turns[3 - kind % 4])
        found.append(ImageWarning("rotated", reason))
    if kind >= 8:
        found.append(ImageWarning(KINDS[kind], _REASONS[KINDS[kind]].format(numbers)))
    return found


_REASONS = {
    "color": "The file is in color: R, G and B differ by {:.1f} gray levels on average (limit {:.1f}). Radiographs are "
    "gray. Use the exported image, not a photograph or a colored picture of it.",
    "empty": "The image is almost empty: 98 % of its pixels lie within {:.0f} gray levels (at least {:.0f} expected). "
    "Check the exposure, and that 16-bit pixels were scaled to the full range.",
    "narrow": "The image leaves gray levels unused: 98 % of its pixels lie within {:.0f} (at least {:.0f} expected). "
    "It may have been saved with fewer bits than its file has, or with too wide a window: export it again.",
    "screenshot": "{:.0f} % of the picture is flat gray without noise (limit {:.0f} %), as in screenshots, text and "
    "drawings. Use the exported image itself.",
    "inverted": "The image looks inverted, bone dark and air bright {}. If it is a chest at all, invert its gray "
    "levels; in DICOM such images are marked MONOCHROME1.",
    "rotated": "The image looks turned {} {}. If it is a chest at all, turn it back {}.",
    "lateral": "The image looks like a lateral view {}. The model was trained on frontal images only.",
    "not_chest": "The picture does not look like a frontal chest radiograph {}. Look at it before you trust any score.",
}
