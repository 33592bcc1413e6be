"""What is read of a DICOM file, and its stored pixels: the room in which pydicom is called, and kept quiet.

Only the elements that are listed here are taken out of a file, none of which names a patient. pydicom is imported on
use: who has no DICOM files needs none of it. `dicom` says what becomes of the pixels.
"""

import contextlib
import io
import logging
import struct
import threading
import warnings
import zlib

import numpy as np

from .image_files import MAX_BYTES, ImageError

ELEMENTS = (
    "Modality PresentationIntentType BodyPartExamined ViewPosition BurnedInAnnotation SamplesPerPixel "
    "PhotometricInterpretation NumberOfFrames Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation "
    "PixelPaddingValue PixelPaddingRangeLimit RescaleSlope RescaleIntercept ModalityLUTSequence WindowCenter "
    "WindowWidth VOILUTFunction VOILUTSequence PresentationLUTShape PixelData"
)
_DEFLATED, _EXTENDED, _HIGH_THROUGHPUT = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.20"
_RUN_LENGTHS = "1.2.840.10008.1.2.5"  # RLE: its header has neither size nor end
_SILENCE = threading.Lock()  # for filters of warnings belong to the process: one thread at a time may change them


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
    with _SILENCE, warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        stack.callback(setattr, logger, "disabled", logger.disabled)
        logger.disabled = True
        try:
            return function(*arguments), ""
        except Exception as error:
            return None, type(error).__name__


def read_header(data):
    """Returns a Dataset with no more than `ELEMENTS`, all of them parsed, and notes."""
    if data[128:132] != b"DICM":
        raise ImageError(
            "not a DICOM file: no DICM at byte 128. If it is a bare data set without a header, the encoding of which "
            "could only be guessed, give it one with `dcmconv` of DCMTK"
        )
    pydicom = _import_pydicom()
    if _DEFLATED.encode() in data[132:1024]:
        _check_deflated(data)

    def read():
        dataset, unread = pydicom.dcmread(io.BytesIO(data), specific_tags=ELEMENTS.split()), []
        for tag in list(dataset.keys()):
            try:
                dataset[tag]  # is parsed now
            except Exception:
                unread.append(pydicom.datadict.keyword_for_tag(tag))
                del dataset[tag]
        return dataset, [f"{name} is damaged and was skipped" for name in unread if name in ELEMENTS.split()]

    result, failure = call_quietly(read)
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


def header_text(dataset, name):
    """Returns a value of the header as text in capitals, empty if it is missing."""
    value = dataset.get(name)
    return "" if value is None else str(value).strip().upper()


def header_number(dataset, name, default=None):
    """Returns a whole number of the header, ImageError if it is missing (and has no default) or no single number."""
    value = dataset.get(name)
    if value in (None, ""):
        value = default
    try:
        return int(value)
    except (TypeError, ValueError):
        pass
    raise ImageError(f"damaged DICOM file: {name} is missing or no number")


def decode_pixels(dataset):
    """Returns an int32 array (height, width) of the stored levels."""
    pydicom = _import_pydicom()
    from pydicom.encaps import get_frame

    def find_decoder():
        return dataset.file_meta.TransferSyntaxUID, pydicom.pixels.get_decoder(dataset.file_meta.TransferSyntaxUID)

    found, failure = call_quietly(find_decoder)
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
    rows, columns, bits = (header_number(dataset, name) for name in ("Rows", "Columns", "BitsStored"))
    if not syntax.is_encapsulated and header_number(dataset, "HighBit", bits - 1) != bits - 1:
        raise ImageError("the bits of a pixel do not begin at the lowest: such files are not read")
    if syntax.is_encapsulated and syntax != _RUN_LENGTHS:
        size, failure = call_quietly(lambda: _coded_size(get_frame(dataset.PixelData, 0, number_of_frames=1)))
        if failure or size != (columns, rows):
            raise ImageError("damaged DICOM file: its compressed pixels are cut short or of another size than declared")
    stored, failure = call_quietly(pydicom.pixels.pixel_array, dataset)
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
