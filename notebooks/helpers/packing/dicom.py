"""From a DICOM file to an 8-bit gray image, as a radiograph is meant to be shown: bone bright, windowed.

MONOCHROME1, the tag of files in which 0 is white, is obeyed in `_invert`. Section numbers are those of the standard,
https://dicom.nema.org/medical/dicom/current; `dicom_files` reads the file and keeps names out of notes and errors.
"""

import io
import os

import numpy as np
from PIL import ExifTags, Image, ImageOps

from .dicom_files import call_quietly, check_kind, decode_pixels, get_number, get_text, read_header
from .image_files import ImageError, count_held_bits, inspect_image, looks_inverted, read_image_bytes

_MUCH_CUT_OFF = (
    0.5  # of the image at both ends of the window; air around a body is rarely more than a third of an image
)
_TAILS = 0.001  # share of pixels beyond each end of a range that is measured: a few dead pixels must not set it
_LEAST_RANGE = 0.5  # of the gray levels; every one of 551 real radiographs spans more, see docs/input_gate.md
_SAME_ASPECT = 0.01  # up to which a pixel is square


def load_image(source):
    """Turns a PNG, JPEG or DICOM file into what the exported model and `decode_image` take.

    A DICOM file is recognized by its content ("DICM" at byte 128, PS3.10 section 7.1), or else by the ending .dcm.

    Args:
        source: path of a file, also `gs://`, or its bytes.

    Returns:
        (data, notes): bytes of a PNG or JPEG, and a list of sentences on what was done and on what looks wrong. PNG
        and JPEG are passed on unchanged, with a note only where `decode_gray` scales fewer than 16 bits of a 16-bit
        PNG; a JPEG that is to be turned, as phones write, becomes an upright PNG. A DICOM file becomes an 8-bit gray
        PNG that holds nothing but pixels.

    Raises:
        ImageError: the file is not an image that can be read, see `inspect_image` and `decode_dicom`.
        OSError: the file cannot be read.
    """
    data = read_image_bytes(source)
    named = not isinstance(source, bytes) and os.fspath(source).lower().endswith((".dcm", ".dicom"))
    if data[128:132] != b"DICM" and (not named or data.startswith((b"\x89PNG", b"\xff\xd8"))):
        if inspect_image(data)["format"] == "JPEG":
            return _turn_upright(data)
        bits = count_held_bits(data)
        return data, [f"of the 16 bits of a pixel only {bits} are used: scaled by these"] if bits < 16 else []
    image, notes = decode_dicom(data)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue(), notes


def _turn_upright(data):
    """Returns a JPEG as its EXIF orientation says, which TensorFlow does not read, and notes."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            if image.getexif().get(ExifTags.Base.Orientation) not in range(2, 9):
                return data, []
            upright = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError):
        return data, []  # what decodes it says what is wrong
    file = io.BytesIO()
    upright.save(file, "PNG")
    return file.getvalue(), ["turned as its EXIF orientation says"]


def decode_dicom(data):
    """Decodes a radiograph from a DICOM file, ready to be shown.

    In the order of the standard (PS3.3 C.11): modality table or rescale slope, then the first VOI table or, without
    one, the first window (linear, linear exact or sigmoid), then 8 bits, then inversion, see `_invert`; pixels that are
    not square are made so. Without a usable window, 8 bits are taken as they are; of more bits often only a part is
    used, so there the window spans the levels of the image without the outermost `_TAILS` at each end. Padding becomes
    black and takes no part in that. A table or window that leaves more than half of the gray levels unused was made for
    other pixels: its result is spread over all of them, and that is noted.

    Args:
        data: bytes of the file.

    Returns:
        (image, notes): uint8 array (height, width), 0 to 255; list of sentences on what was done and on what looks
        wrong. No sentence, and no error below, holds anything that could name a patient.

    Raises:
        ImageError: the file is not a DICOM file, is damaged, shows something else than one gray radiograph of 8 to 16
            bits, says that a patient's name may be burned in, or is too large (`MAX_BYTES`, `MAX_PIXELS`); or
            what would decode it is not installed, and then the message says what to install.
    """
    dataset, notes = read_header(data)
    notes += check_kind(dataset)
    is_frontal = not any(note.startswith("not a frontal chest radiograph") for note in notes)
    stored = decode_pixels(dataset)
    low, high = int(stored.min()), int(stored.max())
    stored -= low
    levels = np.arange(low, high + 1)  # all that follows depends on the level alone: at most 65,536 of them
    padding = _find_padding(levels, dataset)
    counts = np.bincount(stored.ravel(), minlength=len(levels)) * ~padding
    if not counts.any():
        raise ImageError("all pixels are padding; remove PixelPaddingValue from the file")
    shown, failure = call_quietly(_apply_tables, levels, counts, dataset)
    if failure:
        raise ImageError(
            f"the slope, the table or the window for the gray levels is damaged ({failure}); remove it from the file, "
            "or export the image as PNG"
        )
    shown, more = shown
    shown, inversion = _invert(shown, stored, counts, dataset, is_frontal)
    shown[padding] = 0
    image, shape = _make_square(shown[stored], dataset)
    return image, notes + more + inversion + shape


def _invert(shown, stored, counts, dataset, is_frontal):
    """Inverts gray levels where MONOCHROME1 or the presentation shape INVERSE asks for it, unless the pixels say no.

    Both tags at once mean one inversion (PS3.3 C.8.11.3). A file that asks for an inversion of pixels that need none
    is not obeyed if `looks_inverted` is sure and the file does not say that it is no frontal chest radiograph. A
    negative without a tag is only noted: how rare it is is unknown, so mistakes might outnumber it, and the PNG of
    such an image is left as it is, too.

    Args:
        shown: uint8 array (levels,), the gray level of each stored level.
        stored: int array (height, width), indexes into `shown`.
        counts: int array (levels,), pixels of each level, 0 for padding.
        dataset: pydicom Dataset.
        is_frontal: whether the file may be a frontal chest radiograph.

    Returns:
        uint8 array (levels,), and notes.
    """
    tag = "MONOCHROME1" if get_text(dataset, "PhotometricInterpretation") == "MONOCHROME1" else "INVERSE"
    is_asked = tag == "MONOCHROME1" or get_text(dataset, "PresentationLUTShape") == "INVERSE"
    result = 255 - shown if is_asked else shown
    judged = np.where(counts > 0, result, np.average(result, weights=counts)).astype(np.uint8)  # padding says nothing
    is_inverted = looks_inverted(judged[stored])
    if is_asked and is_inverted and is_frontal:
        return shown, [f"the tag says {tag}, but the pixels are not inverted: the tag was ignored"]
    if is_asked:
        unsure = "" if is_inverted is False else "; whether that is right cannot be seen from the pixels"
        return result, [f"inverted, as the tag {tag} asks for{unsure}"]
    if is_inverted and is_frontal:
        return shown, ["the pixels look inverted (bone dark), but no tag says so: left as they are"]
    return shown, []


def _find_padding(levels, dataset):
    """Returns which stored levels are padding: bool array (levels,), PS3.3 C.7.5.1.1.2."""
    if "PixelPaddingValue" not in dataset:
        return np.zeros(len(levels), bool)
    bits = 2 ** get_number(dataset, "BitsAllocated") if get_number(dataset, "PixelRepresentation") else np.inf
    ends = [get_number(dataset, "PixelPaddingValue")]
    ends.append(get_number(dataset, "PixelPaddingRangeLimit", ends[0]))
    low, high = sorted(end - bits if end >= bits / 2 else end for end in ends)  # if written unsigned by mistake
    return (levels >= low) & (levels <= high)


def _apply_tables(levels, counts, dataset):
    """Applies modality and VOI tables.

    Args:
        levels: int array (levels,), ascending, of stored levels.
        counts: int array (levels,), pixels of each, 0 for padding.
        dataset: pydicom Dataset.

    Returns:
        uint8 array (levels,) before any inversion, and notes.
    """
    values, notes, shown, source = _rescale(levels, dataset), [], None, "window"
    if np.ptp(values) == 0 < np.ptp(levels):  # a slope of 0
        raise ValueError
    if "VOILUTSequence" in dataset:
        source, table = "table", dataset.VOILUTSequence[0]
        shown, bits = _look_up(values, table, dataset)
        shown /= 2**bits - 1
        if bits != table.LUTDescriptor[2]:
            notes.append(f"the table for the gray levels holds {bits} bits, not those declared: scaled by these")
    elif _has_window(dataset):
        shown = _apply_window(values, dataset)
    if shown is not None:
        if not np.isfinite(shown).all():
            raise ValueError
        low, high = _find_ends(shown, counts)
        if low == high and np.ptp(_find_ends(values, counts)):
            notes.append(f"the {source} makes one gray level of all and was not applied")
            shown = None
        elif 0 < high - low < _LEAST_RANGE:
            notes.append(f"the {source} leaves {1 - high + low:.0%} of the gray levels unused: spread over all of them")
            shown = (shown - low) / (high - low)
    if shown is None:
        if get_number(dataset, "BitsStored") == 8:
            ends = _rescale(np.array([-128, 127] if get_number(dataset, "PixelRepresentation") else [0, 255]), dataset)
        else:
            ends = _find_ends(values, counts)
            notes.append("no usable window: gray levels run from the darkest to the brightest pixels")
        shown = (values - min(ends)) / max(np.ptp(ends), 1e-6)
    if not np.isfinite(shown).all():
        raise ValueError
    shown = np.rint(255 * np.clip(shown, 0, 1)).astype(np.uint8)
    if (share := counts[(shown == 0) | (shown == 255)].sum() / counts.sum()) > _MUCH_CUT_OFF:
        notes.append(f"{share:.0%} of the image is plain black or white: the window may be wrong")
    return shown, notes


def _rescale(levels, dataset):
    """Returns what stored levels stand for: float64 array (levels,), PS3.3 C.11.1."""
    from pydicom.pixels import apply_modality_lut

    if "ModalityLUTSequence" in dataset:
        return _look_up(levels, dataset.ModalityLUTSequence[0], dataset)[0]
    if {"RescaleSlope", "RescaleIntercept"} & set(dataset.dir()):  # pydicom wants both
        dataset.setdefault("RescaleSlope", 1)
        dataset.setdefault("RescaleIntercept", 0)
    return np.asarray(apply_modality_lut(levels, dataset), np.float64)


def _look_up(values, table, dataset):
    """Looks values up in a table, PS3.3 C.11.1.1 and C.11.2.1.1.

    pydicom knows no tables of 12 bits for the modality, nor of 8 bits in words of 16, and trusts the declared bits.

    Args:
        values: array (levels,).
        table: pydicom Dataset, an item of a sequence.
        dataset: the Dataset that it is in.

    Returns:
        float64 array (levels,), and the bits of the largest entry, 8 or more.

    Raises:
        ValueError: the table is shorter than declared.
    """
    n_entries, first, _ = table.LUTDescriptor
    n_entries, entries = n_entries % 2**16 or 2**16, table.LUTData
    if isinstance(entries, bytes):
        entries = np.frombuffer(entries, "<u2" if dataset.original_encoding[1] else ">u2")
    entries = np.atleast_1d(entries).astype("<u2")
    if 2 * len(entries) - n_entries in (0, 1):  # two of 8 bits in a word, the first one low
        entries = entries.view("u1")
    if len(entries) < n_entries:
        raise ValueError
    entries = entries[:n_entries].astype(np.float64)
    places = np.clip(np.rint(values).astype(np.int64) - first, 0, n_entries - 1)
    return entries[places], max(8, int(entries.max()).bit_length())


def _apply_window(values, dataset):
    """Returns where values lie between black, 0, and white, 1, in the window: float64 array (levels,)."""
    from pydicom.pixels import apply_windowing

    with np.errstate(over="ignore"):  # of a sigmoid far out
        black, white = apply_windowing(np.array([-1e30, 1e30]), dataset)  # what lies below and above the window
        return (apply_windowing(values, dataset) - black) / (white - black)


def _has_window(dataset):
    """Whether the first window is one that can be applied, PS3.3 C.11.2.1.2 and C.11.2.1.3."""
    function = get_text(dataset, "VOILUTFunction") or "LINEAR"
    try:
        center, width = (float(np.ravel(dataset[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
    except (KeyError, IndexError, TypeError, ValueError):
        return False
    smallest = 1 if function == "LINEAR" else np.nextafter(0, 1)
    return function in ("LINEAR", "LINEAR_EXACT", "SIGMOID") and np.isfinite(center) and smallest <= width < np.inf


def _find_ends(values, counts):
    """Returns the lowest and the highest of values (levels,) of pixels, without the outermost `_TAILS` at each end."""
    order = np.argsort(values, kind="stable")
    share = np.cumsum(counts[order]) / counts.sum()
    return values[order][np.searchsorted(share, [_TAILS, 1 - _TAILS])]


def _make_square(image, dataset):
    """Shrinks the longer side of pixels that are not square, PS3.3 C.7.6.3.1.7; returns the image and notes."""
    for name in ("PixelAspectRatio", "ImagerPixelSpacing", "PixelSpacing"):  # each down, then across
        try:
            down, across = map(float, dataset[name].value)
            ratio = down / across
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            continue
        if abs(ratio - 1) <= _SAME_ASPECT:
            return image, []
        if not 0.25 <= ratio <= 4:
            return image, [f"{name} is not plausible and was ignored"]
        height, width = image.shape
        size = (round(width / ratio), height) if ratio > 1 else (width, round(height * ratio))
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
        return image, [f"pixels are {ratio:.2f} times as high as they are wide ({name}): made square"]
    return image, []
