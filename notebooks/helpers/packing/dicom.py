"""From a DICOM file to a gray image of 8 bits, as a radiograph is meant to be shown: bone bright, windowed.

Section numbers are those of the DICOM standard, https://dicom.nema.org/medical/dicom/current. Notes and errors quote a
value of a file only if the standard lists it, for a name may be typed into any field.
"""

import io
import os

import numpy as np
from PIL import Image

from .dicom_files import call_quietly, decode_pixels, header_number, header_text, read_header
from .image_files import ImageError, assert_image_size, inspect_image, looks_inverted, read_image_bytes

RADIOGRAPHY = ("CR", "DX", "DR", "RG")  # Modality, PS3.3 C.7.3.1.1.1; DR is not in it, but is written
UNCLEAR = ("OT", "SC", "")  # other, secondary capture: no reason to refuse an image, but none to believe in one either
OTHERS = "CT MR US NM PT MG XA RF PX IO DXA BMD OCT OP OPT ES GM SM XC RTIMAGE RTDOSE SEG SR PR KO DOC ECG BI IVUS VL"
CHEST = ("CHEST", "THORAX", "LUNG", "RIB", "STERNUM", "MEDIASTINUM", "HEART")  # or beginning so
BODY_PARTS = (  # of the terms of PS3.16 annex L those that are radiographed
    "ABDOMEN ABDOMENPELVIS ANKLE ARM CALCANEUS CLAVICLE COCCYX CSPINE ELBOW EXTREMITY FEMUR FINGER FOOT FOREARM HAND "
    "HEAD HIP HUMERUS JAW KNEE LEG LSPINE NECK PELVIS SCAPULA SHOULDER SKULL SPINE TIBIA TOE TSPINE WRIST ZYGOMA"
)
LATERALS = ("LL", "RL", "LLO", "RLO", "LATERAL", "LAT")  # ViewPosition, PS3.3 C.8.11.5; also what is written
MUCH_CUT_OFF = 0.5  # of the image at one end of the window; air around a body is rarely more than a third of an image
TAILS = 0.001  # share of pixels beyond each end of a window that is measured: a few dead pixels must not set it


def load_image(source):
    """Makes of a PNG, JPEG or DICOM file what the exported model and `decode_image` take.

    A DICOM is known by its content ("DICM" at byte 128, DICOM PS3.10 section 7.1), or else by the ending .dcm.

    Args:
        source: path of a file, also `gs://`, or its bytes.

    Returns:
        (data, notes): bytes of a PNG or JPEG, and a list of sentences from `decode_dicom`. PNG and JPEG are
        passed on unchanged, without notes; a DICOM becomes an 8-bit gray PNG that holds pixels and nothing else.

    Raises:
        ImageError: the file is no image that can be read, see `inspect_image` and `decode_dicom`.
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


def decode_dicom(source):
    """Decodes a radiograph from a DICOM file, ready to be shown.

    In the order of the standard (PS3.3 C.11): modality table or rescale slope, then the first VOI table or, without
    one, the first window (linear, linear exact or sigmoid), then 8 bits, then the inversion that MONOCHROME1 or the
    presentation shape INVERSE asks for (both at once mean one inversion, PS3.3 C.8.11.3). Without a usable
    window, 8 bits are taken as they are; of more bits often only a part is used, so there the window spans what the
    image has but `TAILS` at each end. Padding becomes black and takes no part in that.

    A file that asks for an inversion of pixels that need none is not obeyed if `looks_inverted` is sure and the file
    does not say that it is no frontal chest radiograph. The other way round it is only noted: how rare negatives without the
    tag are is not known, so that the mistakes might outnumber them, and the PNG of such an image is left as it is, too.

    Args:
        source: path of a file, also `gs://`, or its bytes.

    Returns:
        (image, notes): uint8 array (height, width), 0 to 255; list of sentences on what was done and on what looks
        wrong. No sentence, and no error below, holds anything that could name a patient.

    Raises:
        ImageError: the file is no DICOM file, is damaged, shows something else than one gray radiograph of 8 to 16
            bits, says that a patient's name may be burned in, or is too large (`MAX_BYTES`, `MAX_PIXELS`); or
            what would decode it is not installed, and then the message says what to install.
        OSError: the file cannot be read.
    """
    data = read_image_bytes(source)
    dataset, notes = read_header(data)
    notes += _check_kind(dataset)
    frontal = not any(note.startswith("not a frontal chest radiograph") for note in notes)
    stored = decode_pixels(dataset)
    low, high = int(stored.min()), int(stored.max())
    stored -= low
    levels = np.arange(low, high + 1)  # all that follows depends on the level alone: at most 65,536 of them
    padding = _find_padding(levels, dataset)
    counts = np.bincount(stored.ravel(), minlength=len(levels)) * ~padding
    if not counts.any():
        raise ImageError("all pixels are padding")
    shown, failure = call_quietly(_apply_tables, levels, counts, dataset)
    if failure:
        raise ImageError(f"the gray levels cannot be made out: the table or the window is damaged ({failure})")
    shown, more = shown
    notes += more

    tag = "MONOCHROME1" if header_text(dataset, "PhotometricInterpretation") == "MONOCHROME1" else "INVERSE"
    asked = tag == "MONOCHROME1" or header_text(dataset, "PresentationLUTShape") == "INVERSE"
    judged = 255 - shown if asked else shown.copy()
    judged[padding] = np.average(judged, weights=counts)  # padding must not speak for either
    inverted = looks_inverted(judged[stored])
    if asked and inverted and frontal:
        notes.append(f"the tag says {tag}, but the pixels are not inverted: the tag was ignored")
    elif asked:
        shown = 255 - shown
        unsure = "" if inverted is False else "; whether that is right cannot be told from the pixels"
        notes.append(f"inverted, as the tag {tag} asks for{unsure}")
    elif inverted and frontal:
        notes.append("the pixels look inverted (bone dark), but no tag says so: left as they are")
    shown[padding] = 0
    return shown[stored], notes


def _check_kind(dataset):
    """Refuses what is not one gray radiograph; returns notes on what may be none of the chest."""
    modality, intent = header_text(dataset, "Modality"), header_text(dataset, "PresentationIntentType")
    if modality not in RADIOGRAPHY + UNCLEAR:
        named = modality if modality in OTHERS.split() else "unknown"
        raise ImageError(f"modality {named}: not a plain radiograph ({', '.join(RADIOGRAPHY)})")
    if "PixelData" not in dataset:
        raise ImageError("no pixel data in whole numbers: the file holds only a header, or is cut short")
    if (frames := header_number(dataset, "NumberOfFrames", 1)) != 1:
        raise ImageError(f"{frames} frames: not one image. Export the frame that is meant as a file of its own")
    photometric = header_text(dataset, "PhotometricInterpretation")
    if photometric not in ("MONOCHROME1", "MONOCHROME2") or header_number(dataset, "SamplesPerPixel", 1) != 1:
        raise ImageError("not gray (neither MONOCHROME1 nor MONOCHROME2): a radiograph has no colors")
    assert_image_size(header_number(dataset, "Columns"), header_number(dataset, "Rows"))
    bits, container = header_number(dataset, "BitsStored"), header_number(dataset, "BitsAllocated")
    if container not in (8, 16) or not 8 <= bits <= container:
        raise ImageError(f"{bits} bits stored in {container}: only 8 to 16 bits are read")
    if header_text(dataset, "BurnedInAnnotation") == "YES":
        raise ImageError("the file says that text is burned into the pixels that may name the patient: remove it first")

    notes = []
    if modality in UNCLEAR:
        notes.append(f"the modality is {modality or 'missing'}: it may be no radiograph")
    if intent == "FOR PROCESSING":
        notes.append("raw data of a detector (FOR PROCESSING), not what a radiologist is shown")
    part = header_text(dataset, "BodyPartExamined").replace(" ", "")
    if part and not part.startswith(CHEST):
        notes.append(
            f"not a frontal chest radiograph: the body part is {part if part in BODY_PARTS.split() else 'another'}"
        )
    if (view := header_text(dataset, "ViewPosition")) in LATERALS:
        notes.append(f"not a frontal chest radiograph: the view is {view}, lateral or oblique")
    return notes


def _find_padding(levels, dataset):
    """Returns which stored levels are padding: bool array (levels,), PS3.3 C.7.5.1.1.2."""
    if dataset.get("PixelPaddingValue") in (None, ""):
        return np.zeros(len(levels), bool)
    bits = 2 ** header_number(dataset, "BitsAllocated") if header_number(dataset, "PixelRepresentation", 0) else np.inf
    ends = [header_number(dataset, "PixelPaddingValue")]
    ends.append(header_number(dataset, "PixelPaddingRangeLimit", ends[0]))
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
            if header_number(dataset, "BitsStored") == 8:
                signed = header_number(dataset, "PixelRepresentation", 0)
                ends = np.array([-128, 127] if signed else [0, 255])
            else:
                share = np.cumsum(counts) / counts.sum()
                ends = levels[np.searchsorted(share, [TAILS, 1 - TAILS])]
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
        if (share := counts[shown == end].sum() / counts.sum()) > MUCH_CUT_OFF:
            notes.append(f"{share:.0%} of the image is plain {name}: the window may be wrong")
    return shown, notes


def _has_window(dataset):
    """Whether the first window is one that can be applied, PS3.3 C.11.2.1.2 and C.11.2.1.3."""
    function = header_text(dataset, "VOILUTFunction") or "LINEAR"
    try:
        center, width = (float(np.ravel(dataset[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
    except (KeyError, IndexError, TypeError, ValueError):
        return False
    smallest = 1 if function == "LINEAR" else np.nextafter(0, 1)
    return function in ("LINEAR", "LINEAR_EXACT", "SIGMOID") and np.isfinite(center) and smallest <= width < np.inf
