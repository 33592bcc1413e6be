"""DICOM files before their gray levels: the header, what is refused, and the stored pixels.

Only the elements in `_ELEMENTS` are read from a file, none of which names a patient; notes and errors quote a value of
a file only if the standard lists it, for a name may be typed into any field. pydicom is imported on use: without DICOM
files it is not needed. Section numbers are those of the standard, https://dicom.nema.org/medical/dicom/current.
"""

import contextlib
import io
import logging
import struct
import threading
import warnings
import zlib

import numpy as np

from .image_files import MAX_BYTES, ImageError, assert_image_size

_ELEMENTS = (
    "Modality PresentationIntentType BodyPartExamined ViewPosition BurnedInAnnotation SamplesPerPixel "
    "PhotometricInterpretation NumberOfFrames Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation "
    "PixelPaddingValue PixelPaddingRangeLimit RescaleSlope RescaleIntercept ModalityLUTSequence WindowCenter "
    "WindowWidth VOILUTFunction VOILUTSequence PresentationLUTShape PatientOrientation PixelAspectRatio "
    "ImagerPixelSpacing PixelSpacing PixelData"
)
_DEFAULTS = {"SamplesPerPixel": 1, "PixelRepresentation": 0}  # of what pydicom needs and some files lack
_RADIOGRAPHY = ("CR", "DX", "DR", "RG")  # Modality, PS3.3 C.7.3.1.1.1; DR is not in it, but is written
_UNCLEAR = ("OT", "SC", "")  # other, secondary capture, missing: it may or may not be a radiograph
_OTHER = "CT MR US NM PT MG XA RF PX IO DXA BMD OCT OP OPT ES GM SM XC RTIMAGE RTDOSE SEG SR PR KO DOC ECG BI IVUS VL"
_CHEST = ("CHEST", "THORAX", "LUNG", "RIB", "STERNUM", "MEDIASTINUM", "HEART")  # or beginning so
_BODY_PARTS = (  # of the terms of PS3.16 annex L those that are radiographed
    "ABDOMEN ABDOMENPELVIS ANKLE ARM CALCANEUS CLAVICLE COCCYX CSPINE ELBOW EXTREMITY FEMUR FINGER FOOT FOREARM HAND "
    "HEAD HIP HUMERUS JAW KNEE LEG LSPINE NECK PELVIS SCAPULA SHOULDER SKULL SPINE TIBIA TOE TSPINE WRIST ZYGOMA"
)
_LATERALS = ("LL", "RL", "LLO", "RLO", "LATERAL", "LAT")  # ViewPosition, PS3.3 C.8.11.5; also what is written
_DIRECTIONS = {"L": "left", "R": "right", "A": "front", "P": "back", "H": "head", "F": "feet"}  # PS3.3 C.7.6.1.1.1
_DEFLATED, _EXTENDED, _HIGH_THROUGHPUT = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.20"
_RUN_LENGTHS = "1.2.840.10008.1.2.5"  # RLE: its header has neither size nor end
_ITEM = b"\xfe\xff\x00\xe0"  # how compressed pixels begin, PS3.5 A.4
_AGAIN = "export or copy it again"
_AS_PNG = "export it as PNG"
_QUIET = threading.Lock()  # filters of warnings belong to the process: one thread at a time may change them


def read_header(data):
    """Reads the elements that are needed.

    Args:
        data: bytes of a DICOM file.

    Returns:
        (dataset, notes): a pydicom Dataset with no more than `_ELEMENTS`, all of them parsed, and none without a value:
        what is present but empty is absent. Sentences on what is damaged.

    Raises:
        ImageError: it is no DICOM file, its header is damaged, or pydicom is missing.
    """
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
                if dataset[tag].is_empty:  # is parsed now
                    del dataset[tag]
            except Exception:
                unread.append(pydicom.datadict.keyword_for_tag(tag))
                del dataset[tag]
        for name in ("ModalityLUTSequence", "VOILUTSequence"):
            if name in dataset and any(dataset[name][0].get(part) is None for part in ("LUTDescriptor", "LUTData")):
                del dataset[name]
        if "TransferSyntaxUID" not in dataset.file_meta:
            dataset.file_meta.TransferSyntaxUID = _find_syntax(dataset, pydicom.uid)
        for name, value in _DEFAULTS.items():
            dataset.setdefault(name, value)
        return dataset, [f"{name} is damaged and was skipped" for name in unread if name in _ELEMENTS.split()]

    result, failure = call_quietly(read)
    if failure:
        raise ImageError(f"damaged DICOM file: its header cannot be read ({failure}); {_AGAIN}")
    if not result[0].file_meta.TransferSyntaxUID:
        raise ImageError(f"damaged DICOM file: its pixels are compressed, and nothing says how; {_AGAIN}")
    return result


def _find_syntax(dataset, uid):
    """Returns the transfer syntax of a file that does not say it, as pydicom parsed it; "" of compressed pixels."""
    if "PixelData" in dataset and dataset.PixelData.startswith(_ITEM):
        return ""
    is_implicit, is_little = dataset.original_encoding
    explicit = uid.ExplicitVRLittleEndian if is_little else uid.ExplicitVRBigEndian
    return uid.ImplicitVRLittleEndian if is_implicit else explicit


def _check_deflated(data):
    """Refuses what would inflate without bounds; pydicom inflates all at once."""
    start = 144 + int.from_bytes(data[140:144], "little")  # (0002,0000) holds the length of the header, PS3.10 7.1
    try:
        inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[start:], MAX_BYTES + 1)
    except zlib.error:
        raise ImageError(f"damaged DICOM file: it cannot be inflated; {_AGAIN}") from None
    if len(inflated) > MAX_BYTES:
        raise ImageError(f"inflates to more than the {MAX_BYTES:,} bytes allowed, as no radiograph does; leave it out")


def check_kind(dataset):
    """Refuses what is not one gray radiograph; returns notes on what may be none of the chest, or not upright."""
    modality, intent = get_text(dataset, "Modality"), get_text(dataset, "PresentationIntentType")
    if modality not in _RADIOGRAPHY + _UNCLEAR:
        named = modality if modality in _OTHER.split() else "unknown"
        raise ImageError(f"modality {named}: not a plain radiograph ({', '.join(_RADIOGRAPHY)}); leave it out")
    if "PixelData" not in dataset:
        raise ImageError(
            f"no pixel data in whole numbers: the file holds only a header, or is cut short; {_AGAIN}, with its pixels"
        )
    if (frames := get_number(dataset, "NumberOfFrames", 1)) not in (0, 1):
        raise ImageError(f"{frames} frames: not one image; export the frame that is meant as a PNG")
    photometric = get_text(dataset, "PhotometricInterpretation")
    if photometric not in ("MONOCHROME1", "MONOCHROME2") or get_number(dataset, "SamplesPerPixel") != 1:
        raise ImageError(
            f"not gray (neither MONOCHROME1 nor MONOCHROME2): a radiograph has no colors; if it is one, {_AS_PNG}"
        )
    assert_image_size(get_number(dataset, "Columns"), get_number(dataset, "Rows"))
    bits, container = get_number(dataset, "BitsStored"), get_number(dataset, "BitsAllocated")
    if container not in (8, 16) or not 8 <= bits <= container:
        raise ImageError(f"{bits} bits stored in {container}: only 8 to 16 bits are read; {_AS_PNG}")
    if get_text(dataset, "BurnedInAnnotation") == "YES":
        raise ImageError(
            "the file says that text is burned into the pixels that may name the patient; paint over it, and set "
            "BurnedInAnnotation to NO"
        )

    notes = []
    if modality in _UNCLEAR:
        notes.append(f"the modality is {modality or 'missing'}: it may be no radiograph")
    if intent == "FOR PROCESSING":
        notes.append("raw data of a detector (FOR PROCESSING), not what a radiologist is shown")
    part = get_text(dataset, "BodyPartExamined").replace(" ", "")
    if part and not part.startswith(_CHEST):
        notes.append(
            f"not a frontal chest radiograph: the body part is {part if part in _BODY_PARTS.split() else 'another'}"
        )
    if (view := get_text(dataset, "ViewPosition")) in _LATERALS:
        notes.append(f"not a frontal chest radiograph: the view is {view}, lateral or oblique")
    return notes + _check_orientation(dataset)


def _check_orientation(dataset):
    """Returns a note unless rows run to the patient's left and columns to the feet, as frontal radiographs are shown.

    The image is left as it is, as viewers do: the element is typed by hand in some places.
    """
    value = dataset.get("PatientOrientation", ())
    first = [_DIRECTIONS.get(str(text)[:1].upper()) for text in (value if len(value) == 2 else ())]
    if not all(first) or first in ([], ["left", "feet"]):
        return []
    return [
        f"PatientOrientation says that rows run to the {first[0]} and columns to the {first[1]} of the patient, not to "
        "left and feet: the image may be mirrored, turned or lateral, and was left as it is"
    ]


def decode_pixels(dataset):
    """Decodes the pixels.

    Args:
        dataset: of `read_header`, after `check_kind`.

    Returns:
        int32 array (height, width) of the stored levels.

    Raises:
        ImageError: they are damaged, or what decodes them is not installed.
    """
    pydicom = _import_pydicom()
    from pydicom.encaps import get_frame

    def find_decoder():
        return dataset.file_meta.TransferSyntaxUID, pydicom.pixels.get_decoder(dataset.file_meta.TransferSyntaxUID)

    found, failure = call_quietly(find_decoder)
    if failure:
        raise ImageError("this transfer syntax is not for single images; export it again, uncompressed")
    syntax, decoder = found
    plugins = "python-gdcm"
    if syntax == _EXTENDED:
        plugins = "pylibjpeg pylibjpeg-libjpeg"  # GDCM reads its 8 bits, not its 12
    elif syntax.startswith(_HIGH_THROUGHPUT):
        plugins = "pylibjpeg pylibjpeg-openjpeg"
    if not decoder.is_available:
        raise ImageError(f"pixels compressed as {syntax.name}: pip install {plugins}")
    rows, columns, bits = (get_number(dataset, name) for name in ("Rows", "Columns", "BitsStored"))
    unused = 0 if syntax.is_encapsulated else get_number(dataset, "HighBit", bits - 1) - (bits - 1)
    if not 0 <= unused <= get_number(dataset, "BitsAllocated") - bits:
        raise ImageError(f"damaged DICOM file: HighBit does not fit BitsStored; {_AGAIN}")
    if syntax.is_encapsulated and syntax != _RUN_LENGTHS:
        size, failure = call_quietly(lambda: _coded_size(get_frame(dataset.PixelData, 0, number_of_frames=1)))
        if failure or size != (columns, rows):
            raise ImageError(
                "damaged DICOM file: its compressed pixels are cut short or of another size than declared; " + _AGAIN
            )
    dataset.BitsStored = bits + unused  # below the pixel lie bits of no meaning, which are shifted out
    stored, failure = call_quietly(pydicom.pixels.pixel_array, dataset)
    dataset.BitsStored = bits
    if failure:
        hint = f"12 bits need pip install {plugins}" if syntax == _EXTENDED else _AGAIN
        raise ImageError(f"the pixels are damaged, cut short or cannot be decoded ({failure}); {hint}")
    if stored.shape != (rows, columns):
        raise ImageError(f"damaged DICOM file: its pixels are of another shape than declared; {_AGAIN}")
    return stored.astype(np.int32) >> unused


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


def get_text(dataset, name):
    """Returns a value of the header as text in capitals, empty if it is missing."""
    return str(dataset.get(name, "")).strip().upper()


def get_number(dataset, name, default=None):
    """Returns a whole number of the header, ImageError if it is missing (and has no default) or no single number."""
    try:
        return int(dataset.get(name, default))
    except (TypeError, ValueError):
        pass
    raise ImageError(f"damaged DICOM file: {name} is missing or no number; {_AGAIN}")


def _import_pydicom():
    try:
        import pydicom
        import pydicom.pixels
    except ImportError:
        raise ImageError("a DICOM file needs pydicom: pip install 'pydicom>=3.0' python-gdcm") from None
    return pydicom


def call_quietly(function, *arguments):
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
