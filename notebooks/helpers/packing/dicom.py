"""From a DICOM file to an 8-bit gray image, as a radiograph is meant to be shown: bone bright, windowed.

MONOCHROME1, the tag of files in which 0 is white, is obeyed in `_invert`, the last step of `decode_dicom`.

Only the elements in `_ELEMENTS` are read from a file, none of which names a patient; notes and errors quote a value of
a file only if the standard lists it, for a name may be typed into any field. pydicom is imported on use: without DICOM
files it is not needed. Section numbers are those of the standard, https://dicom.nema.org/medical/dicom/current.
"""

import contextlib
import io
import logging
import os
import struct
import threading
import warnings
import zlib

import numpy as np
from PIL import Image

from .image_files import MAX_BYTES, ImageError, assert_image_size, inspect_image, looks_inverted, read_image_bytes

_ELEMENTS = (
    "Modality PresentationIntentType BodyPartExamined ViewPosition BurnedInAnnotation SamplesPerPixel "
    "PhotometricInterpretation NumberOfFrames Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation "
    "PixelPaddingValue PixelPaddingRangeLimit RescaleSlope RescaleIntercept ModalityLUTSequence WindowCenter "
    "WindowWidth VOILUTFunction VOILUTSequence PresentationLUTShape PixelData"
)
_RADIOGRAPHY = ("CR", "DX", "DR", "RG")  # Modality, PS3.3 C.7.3.1.1.1; DR is not in it, but is written
_UNCLEAR = ("OT", "SC", "")  # other, secondary capture, missing: it may or may not be a radiograph
_OTHER = "CT MR US NM PT MG XA RF PX IO DXA BMD OCT OP OPT ES GM SM XC RTIMAGE RTDOSE SEG SR PR KO DOC ECG BI IVUS VL"
_CHEST = ("CHEST", "THORAX", "LUNG", "RIB", "STERNUM", "MEDIASTINUM", "HEART")  # or beginning so
_BODY_PARTS = (  # of the terms of PS3.16 annex L those that are radiographed
    "ABDOMEN ABDOMENPELVIS ANKLE ARM CALCANEUS CLAVICLE COCCYX CSPINE ELBOW EXTREMITY FEMUR FINGER FOOT FOREARM HAND "
    "HEAD HIP HUMERUS JAW KNEE LEG LSPINE NECK PELVIS SCAPULA SHOULDER SKULL SPINE TIBIA TOE TSPINE WRIST ZYGOMA"
)
_LATERALS = ("LL", "RL", "LLO", "RLO", "LATERAL", "LAT")  # ViewPosition, PS3.3 C.8.11.5; also what is written
_MUCH_CUT_OFF = 0.5  # of the image at one end of the window; air around a body is rarely more than a third of an image
_TAILS = 0.001  # share of pixels beyond each end of a window that is measured: a few dead pixels must not set it
_DEFLATED, _EXTENDED, _HIGH_THROUGHPUT = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.20"
_RUN_LENGTHS = "1.2.840.10008.1.2.5"  # RLE: its header has neither size nor end
_QUIET = threading.Lock()  # filters of warnings belong to the process: one thread at a time may change them


def load_image(source):
    """Turns a PNG, JPEG or DICOM file into what the exported model and `decode_image` take.

    A DICOM file is recognized by its content ("DICM" at byte 128, PS3.10 section 7.1), or else by the ending .dcm.

    Args:
        source: path of a file, also `gs://`, or its bytes.

    Returns:
        (data, notes): bytes of a PNG or JPEG, and a list of sentences from `decode_dicom`. PNG and JPEG are
        passed on unchanged, without notes; a DICOM file becomes an 8-bit gray PNG that holds nothing but pixels.

    Raises:
        ImageError: the file is not an image that can be read, see `inspect_image` and `decode_dicom`.
        OSError: the file cannot be read.
    """
    data = read_image_bytes(source)
    named = not isinstance(source, bytes) and os.fspath(source).lower().endswith((".dcm", ".dicom"))
    if data[128:132] != b"DICM" and (not named or data.startswith((b"\x89PNG", b"\xff\xd8"))):
        inspect_image(data)
        return data, []
    image, notes = decode_dicom(data)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue(), notes


def decode_dicom(data):
    """Decodes a radiograph from a DICOM file, ready to be shown.

    In the order of the standard (PS3.3 C.11): modality table or rescale slope, then the first VOI table or, without
    one, the first window (linear, linear exact or sigmoid), then 8 bits, then inversion, see `_invert`. Without a
    usable window, 8 bits are taken as they are; of more bits often only a part is used, so there the window spans the
    levels of the image without the outermost `_TAILS` at each end. Padding becomes black and takes no part in that.

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
    dataset, notes = _read_header(data)
    notes += _check_kind(dataset)
    is_frontal = not any(note.startswith("not a frontal chest radiograph") for note in notes)
    stored = _decode_pixels(dataset)
    low, high = int(stored.min()), int(stored.max())
    stored -= low
    levels = np.arange(low, high + 1)  # all that follows depends on the level alone: at most 65,536 of them
    padding = _find_padding(levels, dataset)
    counts = np.bincount(stored.ravel(), minlength=len(levels)) * ~padding
    if not counts.any():
        raise ImageError("all pixels are padding")
    shown, failure = _call_quietly(_apply_tables, levels, counts, dataset)
    if failure:
        raise ImageError(f"the table or the window for the gray levels is damaged ({failure})")
    shown, more = shown
    shown, inversion = _invert(shown, stored, counts, dataset, is_frontal)
    shown[padding] = 0
    return shown[stored], notes + more + inversion


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
    tag = "MONOCHROME1" if _text(dataset, "PhotometricInterpretation") == "MONOCHROME1" else "INVERSE"
    is_asked = tag == "MONOCHROME1" or _text(dataset, "PresentationLUTShape") == "INVERSE"
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


def _check_kind(dataset):
    """Refuses what is not one gray radiograph; returns notes on what may be none of the chest."""
    modality, intent = _text(dataset, "Modality"), _text(dataset, "PresentationIntentType")
    if modality not in _RADIOGRAPHY + _UNCLEAR:
        named = modality if modality in _OTHER.split() else "unknown"
        raise ImageError(f"modality {named}: not a plain radiograph ({', '.join(_RADIOGRAPHY)})")
    if "PixelData" not in dataset:
        raise ImageError("no pixel data in whole numbers: the file holds only a header, or is cut short")
    if (frames := _number(dataset, "NumberOfFrames", 1)) != 1:
        raise ImageError(f"{frames} frames: not one image. Export the frame that is meant as a file of its own")
    photometric = _text(dataset, "PhotometricInterpretation")
    if photometric not in ("MONOCHROME1", "MONOCHROME2") or _number(dataset, "SamplesPerPixel", 1) != 1:
        raise ImageError("not gray (neither MONOCHROME1 nor MONOCHROME2): a radiograph has no colors")
    assert_image_size(_number(dataset, "Columns"), _number(dataset, "Rows"))
    bits, container = _number(dataset, "BitsStored"), _number(dataset, "BitsAllocated")
    if container not in (8, 16) or not 8 <= bits <= container:
        raise ImageError(f"{bits} bits stored in {container}: only 8 to 16 bits are read")
    if _text(dataset, "BurnedInAnnotation") == "YES":
        raise ImageError("the file says that text is burned into the pixels that may name the patient: remove it first")

    notes = []
    if modality in _UNCLEAR:
        notes.append(f"the modality is {modality or 'missing'}: it may be no radiograph")
    if intent == "FOR PROCESSING":
        notes.append("raw data of a detector (FOR PROCESSING), not what a radiologist is shown")
    part = _text(dataset, "BodyPartExamined").replace(" ", "")
    if part and not part.startswith(_CHEST):
        notes.append(
            f"not a frontal chest radiograph: the body part is {part if part in _BODY_PARTS.split() else 'another'}"
        )
    if (view := _text(dataset, "ViewPosition")) in _LATERALS:
        notes.append(f"not a frontal chest radiograph: the view is {view}, lateral or oblique")
    return notes


def _find_padding(levels, dataset):
    """Returns which stored levels are padding: bool array (levels,), PS3.3 C.7.5.1.1.2."""
    if dataset.get("PixelPaddingValue") in (None, ""):
        return np.zeros(len(levels), bool)
    bits = 2 ** _number(dataset, "BitsAllocated") if _number(dataset, "PixelRepresentation", 0) else np.inf
    ends = [_number(dataset, "PixelPaddingValue")]
    ends.append(_number(dataset, "PixelPaddingRangeLimit", ends[0]))
    low, high = sorted(end - bits if end >= bits / 2 else end for end in ends)  # if written unsigned by mistake
    return (levels >= low) & (levels <= high)


def _apply_tables(levels, counts, dataset):
    """Applies modality and VOI tables.

    Args:
        levels: int array (levels,), ascending, of stored levels.
        counts: int array (levels,), pixels of each, 0 for padding.
        dataset: pydicom Dataset; its window is replaced if it is of no use.

    Returns:
        uint8 array (levels,) before any inversion, and notes.
    """
    from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing

    notes = []
    values = np.asarray(apply_modality_lut(levels, dataset), np.float64)
    if dataset.get("VOILUTSequence"):
        table = dataset.VOILUTSequence[0]
        entries, first, bits = table.LUTDescriptor
        # pydicom makes indexes of the type of the entries, in which 4,096 of 8 bits do not fit: hence 16.
        table.LUTDescriptor = [entries, first, 16]
        shown = apply_voi(np.rint(values).astype(np.int64), dataset) / (2**bits - 1)
    else:
        if not _has_window(dataset):
            ends = levels[[0, -1]]
            if _number(dataset, "BitsStored") == 8:
                signed = _number(dataset, "PixelRepresentation", 0)
                ends = np.array([-128, 127] if signed else [0, 255])
            else:
                share = np.cumsum(counts) / counts.sum()
                ends = levels[np.searchsorted(share, [_TAILS, 1 - _TAILS])]
                notes.append("no usable window: gray levels run from the darkest to the brightest pixels")
            low, high = np.sort(np.asarray(apply_modality_lut(ends, dataset), np.float64))
            dataset.WindowCenter, dataset.WindowWidth = float((low + high) / 2), float(max(high - low, 1e-6))
            dataset.VOILUTFunction = "LINEAR_EXACT"
        with np.errstate(over="ignore"):  # of a sigmoid far out
            black, white = apply_windowing(np.array([-1e30, 1e30]), dataset)  # what lies below and above the window
            shown = (apply_windowing(values, dataset) - black) / (white - black)
    if not np.isfinite(shown).all():
        raise ValueError
    shown = np.rint(255 * np.clip(shown, 0, 1)).astype(np.uint8)
    for end, name in ((0, "black"), (255, "white")):
        if (share := counts[shown == end].sum() / counts.sum()) > _MUCH_CUT_OFF:
            notes.append(f"{share:.0%} of the image is plain {name}: the window may be wrong")
    return shown, notes


def _has_window(dataset):
    """Whether the first window is one that can be applied, PS3.3 C.11.2.1.2 and C.11.2.1.3."""
    function = _text(dataset, "VOILUTFunction") or "LINEAR"
    try:
        center, width = (float(np.ravel(dataset[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
    except (KeyError, IndexError, TypeError, ValueError):
        return False
    smallest = 1 if function == "LINEAR" else np.nextafter(0, 1)
    return function in ("LINEAR", "LINEAR_EXACT", "SIGMOID") and np.isfinite(center) and smallest <= width < np.inf


def _read_header(data):
    """Returns a Dataset with no more than `_ELEMENTS`, all of them parsed, and notes."""
    if data[128:132] != b"DICM":
        raise ImageError(
            "not a DICOM file: no DICM at byte 128. If it is a bare data set without a header, the encoding of which "
            "could only be guessed, give it one with `dcmconv` of DCMTK"
        )
    pydicom = _import_pydicom()
    if _DEFLATED.encode() in data[132:1024]:
        _check_deflated(data)

    def read():
        dataset, unread = pydicom.dcmread(io.BytesIO(data), specific_tags=_ELEMENTS.split()), []
        for tag in list(dataset.keys()):
            try:
                dataset[tag]  # is parsed now
            except Exception:
                unread.append(pydicom.datadict.keyword_for_tag(tag))
                del dataset[tag]
        return dataset, [f"{name} is damaged and was skipped" for name in unread if name in _ELEMENTS.split()]

    result, failure = _call_quietly(read)
    if failure:
        raise ImageError(f"damaged DICOM file: its header cannot be read ({failure})")
    return result


def _check_deflated(data):
    """Refuses what would inflate without bounds; pydicom inflates all at once."""
    start = 144 + int.from_bytes(data[140:144], "little")  # (0002,0000) holds the length of the header, PS3.10 7.1
    try:
        inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[start:], MAX_BYTES + 1)
    except zlib.error:
        raise ImageError("damaged DICOM file: it cannot be inflated") from None
    if len(inflated) > MAX_BYTES:
        raise ImageError(f"inflates to more than the {MAX_BYTES:,} bytes allowed")


def _decode_pixels(dataset):
    """Returns an int32 array (height, width) of the stored levels."""
    pydicom = _import_pydicom()
    from pydicom.encaps import get_frame

    def find_decoder():
        return dataset.file_meta.TransferSyntaxUID, pydicom.pixels.get_decoder(dataset.file_meta.TransferSyntaxUID)

    found, failure = _call_quietly(find_decoder)
    if failure:
        raise ImageError("this transfer syntax is not for single images: write the file anew with `gdcmconv --raw`")
    syntax, decoder = found
    plugins = "python-gdcm"
    if syntax == _EXTENDED:
        plugins = "pylibjpeg pylibjpeg-libjpeg"  # GDCM reads its 8 bits, not its 12
    elif syntax.startswith(_HIGH_THROUGHPUT):
        plugins = "pylibjpeg pylibjpeg-openjpeg"
    if not decoder.is_available:
        raise ImageError(f"pixels compressed as {syntax.name}: pip install {plugins}")
    rows, columns, bits = (_number(dataset, name) for name in ("Rows", "Columns", "BitsStored"))
    if not syntax.is_encapsulated and _number(dataset, "HighBit", bits - 1) != bits - 1:
        raise ImageError("the bits of a pixel do not begin at the lowest: such files are not read")
    if syntax.is_encapsulated and syntax != _RUN_LENGTHS:
        size, failure = _call_quietly(lambda: _coded_size(get_frame(dataset.PixelData, 0, number_of_frames=1)))
        if failure or size != (columns, rows):
            raise ImageError("damaged DICOM file: its compressed pixels are cut short or of another size than declared")
    stored, failure = _call_quietly(pydicom.pixels.pixel_array, dataset)
    if failure:
        hint = f"; 12 bits need pip install {plugins}" if syntax == _EXTENDED else ""
        raise ImageError(f"the pixels are damaged, cut short or cannot be decoded ({failure}){hint}")
    if stored.shape != (rows, columns):
        raise ImageError("damaged DICOM file: its pixels are of another shape than declared")
    return stored.astype(np.int32)


def _coded_size(frame):
    """Reads (width, height) out of a JPEG, JPEG-LS or JPEG 2000 stream.

    A decoder makes room for what the stream declares, whatever the header of the DICOM file declared.

    Raises:
        ValueError, IndexError or struct.error: it is none of these, or has no end.
    """
    if frame.startswith(b"\xff\xd8"):
        at = 2
        while (marker := frame[at + 1]) not in {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}:  # ISO 10918-1 B.2.2
            at += 1 if marker == 0xFF else 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
        size = struct.unpack_from(">HH", frame, at + 5)[::-1]
    elif (start := frame.find(b"\xff\x4f\xff\x51", 0, 1024)) >= 0:  # ISO 15444-1 A.5.1: size, offset of the image
        right, bottom, left, top = struct.unpack_from(">4I", frame, start + 8)
        size = right - left, bottom - top
    else:
        raise ValueError
    if not frame.rstrip(b"\0").endswith(b"\xff\xd9"):  # end of image; libjpeg fills up what is missing
        raise ValueError
    return size


def _text(dataset, name):
    """Returns a value of the header as text in capitals, empty if it is missing."""
    value = dataset.get(name)
    return "" if value is None else str(value).strip().upper()


def _number(dataset, name, default=None):
    """Returns a whole number of the header, ImageError if it is missing (and has no default) or no single number."""
    value = dataset.get(name)
    if value in (None, ""):
        value = default
    try:
        return int(value)
    except (TypeError, ValueError):
        pass
    raise ImageError(f"damaged DICOM file: {name} is missing or no number")


def _import_pydicom():
    try:
        import pydicom
        import pydicom.pixels
    except ImportError:
        raise ImageError("a DICOM file needs pydicom: pip install 'pydicom>=3.0' python-gdcm") from None
    return pydicom


def _call_quietly(function, *arguments):
    """Calls a function of pydicom so that nothing of a file can leak: its warnings and errors quote what they read.

    Returns:
        (result, ""), or (None, name of the type of the exception); the exception itself is gone, so that none that
        is raised next has it as its context.
    """
    logger = logging.getLogger("pydicom")
    with _QUIET, warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        stack.callback(setattr, logger, "disabled", logger.disabled)
        logger.disabled = True
        try:
            return function(*arguments), ""
        except Exception as error:
            return None, type(error).__name__
