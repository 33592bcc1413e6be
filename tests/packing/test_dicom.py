"""DICOM: the same pixels as the PNG of an image, every encoding, false tags, what is refused, and nobody's name."""

import copy
import importlib.util
import io
import json
import logging
import re
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from made_dicom import make_dataset, make_dicom, save
from made_images import encode
from PIL import Image

from helpers.packing import ImageError, dicom_files, image_files, load_image
from helpers.packing.dicom import decode_dicom
from helpers.packing.image_files import looks_inverted
from helpers.study.synthetic_findings import draw_image

pydicom = pytest.importorskip("pydicom", minversion="3.0", reason="needs pydicom, see requirements/dev.txt")
from pydicom import uid  # noqa: E402
from pydicom.dataset import Dataset  # noqa: E402
from pydicom.encaps import encapsulate, get_frame  # noqa: E402
from pydicom.pixels import get_decoder  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
IMAGE = draw_image(3, size=96)[0][:, 4:]  # not square, so that rows are not taken for columns
IGNORED = "was ignored"
NAMES = {  # whatever may name a patient, and where such values are typed by mistake
    "PatientName": "Zebulon^Quagmire",
    "PatientID": "PID-7741903",
    "PatientBirthDate": "19510417",
    "AccessionNumber": "ACC5550187",
    "InstitutionName": "Saint Ambrose Infirmary",
    "ReferringPhysicianName": "Thistlewood^Ada",
    "StudyInstanceUID": "1.2.826.0.1.3680043.8.498.7741903",
    "StudyDescription": "Quagmire followup",
    "PatientComments": "Zebulon lives at 7 Elm Row",
}
SECRETS = ["Zebulon", "Quagmire", "7741903", "19510417", "5550187", "Ambrose", "Thistlewood", "Elm Row"]


def stretch(image, low, step):
    """Returns uint16 levels `low + step * image`, and the window (center, width) that undoes it, C.11.2.1.2.1."""
    return (low + step * image.astype(np.uint16)), low + step * 127.5 + 0.5, step * 255 + 1


def lut(table, first, bits):
    item = Dataset()
    item.LUTDescriptor = [len(table), first, bits]
    item.LUTData = [int(entry) for entry in table]
    item["LUTDescriptor"].VR = item["LUTData"].VR = "US"
    return [item]


STORED, CENTER, WIDTH = stretch(IMAGE, 1000, 8)
WINDOW = {"WindowCenter": CENTER, "WindowWidth": WIDTH}
EXACT = {"WindowCenter": CENTER - 0.5, "WindowWidth": WIDTH - 1, "VOILUTFunction": "LINEAR_EXACT"}
RAMP = np.clip((np.arange(4096) - 1000) / 2040, 0, 1)  # what the window does to 12 bits
SAME = {
    "8 bits": make_dicom(IMAGE),
    "8 bits, MONOCHROME1": make_dicom(255 - IMAGE, PhotometricInterpretation="MONOCHROME1"),
    "8 bits, INVERSE": make_dicom(255 - IMAGE, PresentationLUTShape="INVERSE"),
    "8 bits, MONOCHROME1 and INVERSE": make_dicom(
        255 - IMAGE, PhotometricInterpretation="MONOCHROME1", PresentationLUTShape="INVERSE"
    ),
    "8 bits in 16": make_dicom(IMAGE, BitsAllocated=8, WindowCenter=128, WindowWidth=256),
    "8 bits, empty window": make_dicom(IMAGE, WindowCenter=None, WindowWidth=""),
    "8 bits, signed": make_dicom((IMAGE.astype(int) - 128).astype(np.int8)),
    "8 bits, rescaled": make_dicom(IMAGE, RescaleSlope=3, RescaleIntercept=-7),
    "12 bits": make_dicom(STORED, 12, **WINDOW),
    "12 bits, first of two windows": make_dicom(STORED, 12, WindowCenter=[CENTER, 40], WindowWidth=[WIDTH, 400]),
    "12 bits, exact window": make_dicom(STORED, 12, **EXACT),
    "12 bits, MONOCHROME1": make_dicom(
        4095 - STORED,
        12,
        PhotometricInterpretation="MONOCHROME1",
        WindowCenter=4096 - CENTER,
        WindowWidth=WIDTH,
    ),
    "12 bits, something in the other 4": make_dicom(STORED | 0xA000, 12, **WINDOW),
    "16 bits, rescaled": make_dicom(
        (STORED * 10).astype(np.uint16),
        16,
        RescaleSlope=0.5,
        RescaleIntercept=-900,
        WindowCenter=(CENTER - 0.5) * 5 - 900 + 0.5,
        WindowWidth=(WIDTH - 1) * 5 + 1,
    ),
    "16 bits, signed": make_dicom(
        (STORED.astype(int) - 3000).astype(np.int16), 16, WindowCenter=CENTER - 3000, WindowWidth=WIDTH
    ),
    "16 bits, falling slope": make_dicom(
        (60000 - 10 * STORED).astype(np.uint16),
        16,
        RescaleSlope=-0.1,
        RescaleIntercept=6000,
        **EXACT,
    ),
    "12 bits, table of 12": make_dicom(STORED, 12, VOILUTSequence=lut(np.rint(RAMP * 4095), 0, 12)),
    "12 bits, table of 8": make_dicom(STORED, 12, VOILUTSequence=lut(np.rint(RAMP * 255), 0, 8)),
    "12 bits, table that starts late": make_dicom(
        STORED, 12, VOILUTSequence=lut(np.rint(RAMP * 255)[1000:3100], 1000, 8)
    ),
    "modality table": make_dicom(255 - IMAGE, ModalityLUTSequence=lut(np.arange(255, -1, -1) * 257, 0, 16)),
}


@pytest.mark.parametrize("kind", SAME)
def test_the_model_is_given_the_pixels_of_the_png_of_the_image(kind):
    data, _ = load_image(SAME[kind])
    assert data.startswith(b"\x89PNG")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), IMAGE)


def test_a_sigmoid_window_is_the_curve_of_the_standard():
    image, _ = decode_dicom(make_dicom(STORED, 12, WindowCenter=2000, WindowWidth=900, VOILUTFunction="SIGMOID"))
    curve = 1 / (1 + np.exp(-4 * (STORED - 2000.0) / 900))  # PS3.3 C.11.2.1.3.1
    np.testing.assert_array_equal(image, np.rint(255 * curve).astype(np.uint8))


def test_a_table_goes_before_a_window_and_may_invert():
    data = make_dicom(IMAGE, VOILUTSequence=lut(np.arange(255, -1, -1), 0, 8), WindowCenter=0, WindowWidth=1)
    image, notes = decode_dicom(data)
    np.testing.assert_array_equal(image, 255 - IMAGE)
    assert notes == ["the pixels look inverted (bone dark), but no tag says so: left as they are"]


@pytest.mark.parametrize(
    "window",
    [
        {},
        {"WindowCenter": 2000},
        {"WindowCenter": 2000, "WindowWidth": 0},
        {"WindowCenter": 2000, "WindowWidth": -5, "VOILUTFunction": "SIGMOID"},
        {"WindowCenter": 2000, "WindowWidth": 900, "VOILUTFunction": "CUBIC"},
    ],
)
def test_without_a_usable_window_the_image_spans_the_gray_levels(window):
    stored = STORED.copy()
    stored[0, :3] = 0, 0, 4095  # dead pixels set no window
    image, notes = decode_dicom(make_dicom(stored, 12, **window))
    assert any("no usable window" in note for note in notes)
    ends = np.percentile(IMAGE, [0.1, 99.9])
    assert np.abs(image[1:] - np.interp(IMAGE[1:], ends, [0, 255])).max() <= 2


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize("limit", [None, 4090])
def test_padding_is_black_and_widens_no_window(photometric, limit):
    stored = 4000 - STORED if photometric == "MONOCHROME1" else STORED
    plain, _ = decode_dicom(make_dicom(stored, 12, PhotometricInterpretation=photometric))
    padded = np.pad(stored, ((0, 0), (20, 10)), constant_values=4095)
    padded[5, 5] = 4095 if limit is None else 4092
    elements = {"PixelPaddingValue": 4095, "PixelPaddingRangeLimit": limit}
    dataset = make_dataset(padded, 12, PhotometricInterpretation=photometric)
    for name, value in elements.items():
        if value is not None:
            dataset.add_new(pydicom.datadict.tag_for_keyword(name), "US", value)
    image, _ = decode_dicom(save(dataset))
    np.testing.assert_array_equal(image[:, 20:-10], plain)
    assert (image[:, :20] == 0).all() and (image[:, -10:] == 0).all()


@pytest.mark.parametrize("value", [-3000, 62536])  # the second is the first, typed without its sign
def test_padding_may_be_negative(value):
    stored = np.pad(4095 - STORED.astype(np.int16), 9, constant_values=-3000)  # white, were it not padding
    dataset = make_dataset(
        stored, 16, PhotometricInterpretation="MONOCHROME1", WindowCenter=4096 - CENTER, WindowWidth=WIDTH
    )
    dataset.add_new("PixelPaddingValue", "SS" if value < 0 else "US", value)
    image, _ = decode_dicom(save(dataset))
    np.testing.assert_array_equal(image, np.pad(IMAGE, 9))


def test_nothing_but_padding_is_no_image():
    dataset = make_dataset(np.full((32, 32), 7, np.uint8))
    dataset.add_new("PixelPaddingValue", "US", 7)
    with pytest.raises(ImageError, match="padding"):
        decode_dicom(save(dataset))


def test_a_flat_image_is_no_error():
    for bits, level in ((8, np.uint8(9)), (12, np.uint16(99))):
        image, _ = decode_dicom(make_dicom(np.full((32, 40), level), bits))
        assert image.shape == (32, 40) and np.ptp(image) == 0


@pytest.mark.parametrize("window", [{"WindowCenter": 50, "WindowWidth": 80}, {"WindowCenter": 0, "WindowWidth": 1}])
def test_a_window_beside_the_image_is_not_applied(window):
    image, notes = decode_dicom(make_dicom(STORED, 12, **window))
    assert notes[0] == "the window makes one gray level of all and was not applied"
    np.testing.assert_array_equal(image, decode_dicom(make_dicom(STORED, 12))[0])
    _, notes = decode_dicom(make_dicom(STORED, 12, WindowCenter=1800, WindowWidth=1))
    assert notes == ["100% of the image is plain black or white: the window may be wrong"]


# --- headers that do not fit the pixels ---


def pack_table(entries, first, declared, order="<u2"):
    """Returns a VOI or modality table whose entries are bytes, PS3.3 C.11.1.1: OW."""
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(entries), first, declared])
    item.add_new("LUTData", "OW", np.asarray(entries).astype("u1" if declared == 8 else order).tobytes())
    return [item]


TWELVE = IMAGE.astype(np.uint16) * 16  # the whole range of 12 bits
FULL = {"WindowCenter": 2048, "WindowWidth": 4096}
RAMP_12 = np.arange(4096)
EMPTY_TABLE = Dataset()
EMPTY_TABLE.add_new("LUTDescriptor", "SS", None)
EMPTY_TABLE.add_new("LUTData", "OW", None)
ODD_HEADERS = {  # each with what its only note says, or ""
    "table of 12 bits that declares 16": ({"VOILUTSequence": lut(RAMP_12, 0, 16)}, "holds 12 bits, not those declared"),
    "table of 10 bits that declares 16": ({"VOILUTSequence": lut(RAMP_12 // 4, 0, 16)}, "holds 10 bits"),
    "table of 12 bits that declares 8": ({"VOILUTSequence": lut(RAMP_12, 0, 8)}, "holds 12 bits"),
    "the same beside a window": ({"VOILUTSequence": lut(RAMP_12, 0, 16), **FULL}, "holds 12 bits"),
    "table of 8 bits, two in a word": ({"VOILUTSequence": pack_table(RAMP_12 // 16, 0, 8)}, ""),
    "table of 12 bits in bytes": ({"VOILUTSequence": pack_table(RAMP_12, 0, 12)}, ""),
    "modality table of 12 bits": ({"ModalityLUTSequence": lut(RAMP_12, 0, 12), **FULL}, ""),
    "modality table of 12 bits in bytes": ({"ModalityLUTSequence": pack_table(RAMP_12, 0, 12), **FULL}, ""),
    "window 16 times too wide": ({"WindowCenter": 32768, "WindowWidth": 65536}, "the window leaves 95% of the gray"),
    "the same of 16 bits": (
        {"BitsStored": 16, "HighBit": 15, "WindowCenter": 32768, "WindowWidth": 65536},
        "the window leaves 95%",
    ),
    "window 3 times too wide": ({"WindowCenter": 6144, "WindowWidth": 12288}, "the window leaves 75%"),
    "empty slope beside a window": ({"RescaleSlope": "", "RescaleIntercept": "", **FULL}, ""),
    "empty slope and an intercept": ({"RescaleSlope": "", "RescaleIntercept": 0, **FULL}, ""),
    "slope without an intercept": ({"RescaleSlope": 1, **FULL}, ""),
    "table without values": ({"VOILUTSequence": [EMPTY_TABLE], **FULL}, ""),
    "table sequence without items": ({"VOILUTSequence": [], "ModalityLUTSequence": [], **FULL}, ""),
    "no frames": ({"NumberOfFrames": 0, **FULL}, ""),
    "high bit of 15": ({"HighBit": 15, **FULL}, ""),
}


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian])
@pytest.mark.parametrize("kind", ODD_HEADERS)
@pytest.mark.filterwarnings("ignore:Invalid value")
def test_gray_levels_are_scaled_by_what_is_held(kind, syntax):
    elements, said = copy.deepcopy(ODD_HEADERS[kind])
    stored = TWELVE << 4 | 5 if elements.get("HighBit") == 15 and "BitsStored" not in elements else TWELVE
    image, notes = decode_dicom(save(make_dataset(stored, 12, syntax=syntax, **elements)))
    assert len(notes) == bool(said) and said in "".join(notes)
    if "window" in said:  # from the darkest to the brightest pixels
        ends = np.percentile(IMAGE, [0.1, 99.9])
        assert np.abs(image - np.interp(IMAGE, ends, [0, 255])).max() <= 2
    else:
        assert np.abs(image.astype(int) - IMAGE).max() <= 1


@pytest.mark.parametrize("declared", [8, 12])
def test_a_table_in_bytes_takes_the_order_of_its_file(declared):
    table = pack_table(RAMP_12 // 16 if declared == 8 else RAMP_12, 0, declared)
    table[0].LUTData = np.frombuffer(table[0].LUTData, "<u2").astype(">u2").tobytes()
    image, notes = decode_dicom(save(make_dataset(TWELVE, 12, syntax=uid.ExplicitVRBigEndian, VOILUTSequence=table)))
    assert notes == [] and np.abs(image.astype(int) - IMAGE).max() <= 1


def test_pixels_that_are_not_square_are_made_so():
    narrow = IMAGE[::2]  # each pixel is twice as high as it is wide
    for elements in (
        {"PixelAspectRatio": [2, 1]},
        {"ImagerPixelSpacing": [0.2, 0.1]},
        {"PixelAspectRatio": "", "PixelSpacing": [0.4, 0.2]},
    ):
        image, notes = decode_dicom(make_dicom(narrow, **elements))
        assert image.shape == (48, 46) and notes[0].startswith("pixels are 2.00 times as high as they are wide")
        assert np.abs(image.astype(int) - narrow.reshape(48, 46, 2).mean(2)).max() <= 1
    image, _ = decode_dicom(make_dicom(IMAGE[:, ::2], PixelSpacing=[0.1, 0.2]))
    assert image.shape == (48, 46)
    for elements in ({"PixelSpacing": [0.1, 0.1]}, {"PixelSpacing": [0, 0]}, {"PixelAspectRatio": [1, 1]}):
        image, notes = decode_dicom(make_dicom(IMAGE, **elements))
        assert image.shape == IMAGE.shape and notes == []
    assert "not plausible" in decode_dicom(make_dicom(IMAGE, PixelAspectRatio=[90, 1]))[1][0]


@pytest.mark.filterwarnings("ignore:Invalid value")
def test_another_orientation_than_that_of_frontal_images_is_noted():
    for value in (["L", "F"], ["LP", "FR"], "", ["Zebulon", "Quagmire"]):
        assert decode_dicom(make_dicom(IMAGE, PatientOrientation=value))[1] == []
    for value, said in ((["R", "F"], "right and columns to the feet"), (["A", "F"], "front"), (["F", "L"], "feet")):
        image, (note,) = decode_dicom(make_dicom(IMAGE, PatientOrientation=value))
        np.testing.assert_array_equal(image, IMAGE)
        assert said in note and "may be mirrored" in note


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian])
def test_a_file_without_its_transfer_syntax_is_read(syntax):
    data = save(make_dataset(STORED, 12, syntax=syntax, **WINDOW))
    at = data.index(b"\x02\x00\x10\x00UI")
    element = 8 + int.from_bytes(data[at + 6 : at + 8], "little")
    length = int.from_bytes(data[140:144], "little") - element
    data = data[:140] + length.to_bytes(4, "little") + data[144:at] + data[at + element :]
    image, notes = decode_dicom(data)
    np.testing.assert_array_equal(image, IMAGE)
    assert notes == []


# --- encodings ---


@pytest.mark.parametrize(
    "syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian, uid.DeflatedExplicitVRLittleEndian]
)
def test_every_plain_encoding_is_read(syntax):
    stored = np.pad(STORED.astype(np.int16), 9, constant_values=-5)
    dataset = make_dataset(stored, 16, syntax=syntax, **WINDOW)
    dataset.add_new("PixelPaddingValue", "SS", -5)
    image, _ = decode_dicom(save(dataset))
    np.testing.assert_array_equal(image, np.pad(IMAGE, 9))


def compress(stored, bits, syntax, **elements):
    dataset = make_dataset(stored, bits, **elements)
    try:
        dataset.compress(syntax, generate_instance_uid=False)
    except RuntimeError as error:
        pytest.skip(f"cannot be written here: {error}")
    return dataset


@pytest.mark.parametrize("syntax", [uid.RLELossless, uid.JPEGLSLossless, uid.JPEG2000Lossless])
@pytest.mark.parametrize("bits", [8, 12])
def test_every_lossless_compression_gives_the_image_back(syntax, bits):
    dataset = compress(IMAGE, 8, syntax) if bits == 8 else compress(STORED, 12, syntax, **WINDOW)
    image, notes = decode_dicom(save(dataset))
    np.testing.assert_array_equal(image, IMAGE)
    assert notes == []


def code_jpeg_lossless(stored, precision=12):
    """Writes what pydicom cannot: JPEG Lossless, predicting from the pixel to the left, ISO 10918-1 annex H."""

    def segment(marker, content):
        return b"\xff" + bytes([marker]) + (len(content) + 2).to_bytes(2, "big") + content

    height, width = stored.shape
    values = stored.astype(int)
    predicted = np.empty_like(values)
    predicted[:, 1:] = values[:, :-1]
    predicted[1:, 0] = values[:-1, 0]
    predicted[0, 0] = 2 ** (precision - 1)
    bits = []
    for difference in (values - predicted).ravel().tolist():
        size = abs(difference).bit_length()
        bits.append(f"{size:05b}")  # 17 codes of 5 bits: every category is as long as every other
        if size:
            bits.append(f"{difference if difference > 0 else difference + 2**size - 1:0{size}b}")
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    scan = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\x00")
    counts = bytes([0, 0, 0, 0, 17] + [0] * 11)
    return b"".join(
        [
            b"\xff\xd8",
            segment(0xC3, bytes([precision]) + height.to_bytes(2, "big") + width.to_bytes(2, "big") + b"\1\1\x11\0"),
            segment(0xC4, b"\0" + counts + bytes(range(17))),
            segment(0xDA, b"\1\1\0\1\0\0"),
            scan,
            b"\xff\xd9",
        ]
    )


@pytest.mark.parametrize("syntax", [uid.JPEGLossless, uid.JPEGLosslessSV1])
def test_jpeg_lossless_gives_the_image_back(syntax):
    dataset = make_dataset(STORED, 12, syntax=syntax, **WINDOW)
    dataset.PixelData = encapsulate([code_jpeg_lossless(STORED)])
    image, _ = decode_dicom(save(dataset))
    np.testing.assert_array_equal(image, IMAGE)


def jpeg_dataset(image, **elements):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)
    dataset = make_dataset(image, syntax=uid.JPEGBaseline8Bit, **elements)
    dataset.PixelData = encapsulate([file.getvalue()])
    return dataset, file.getvalue()


def test_a_jpeg_inside_is_decoded_as_that_jpeg_alone():
    dataset, jpeg = jpeg_dataset(IMAGE)
    image, _ = decode_dicom(save(dataset))
    alone = np.asarray(Image.open(io.BytesIO(jpeg))).astype(int)
    assert np.abs(image - alone).max() <= 1  # two decoders may round differently
    dataset.PixelData = encapsulate([jpeg], fragments_per_frame=3)
    np.testing.assert_array_equal(decode_dicom(save(dataset))[0], image)


def test_what_is_missing_is_named_with_what_installs_it(monkeypatch):
    kinds = {
        uid.JPEGLosslessSV1: "pip install python-gdcm$",
        uid.JPEGExtended12Bit: "pip install pylibjpeg pylibjpeg-libjpeg$",
        uid.HTJ2KLossless: "pip install pylibjpeg pylibjpeg-openjpeg$",
    }
    for syntax, remedy in kinds.items():
        monkeypatch.setattr(get_decoder(syntax), "_available", {})
        dataset = make_dataset(IMAGE, syntax=syntax)
        dataset.PixelData = encapsulate([b"\xff\xd8"])
        with pytest.raises(ImageError, match=remedy):
            decode_dicom(save(dataset))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    spec = importlib.util.spec_from_file_location("helpers.packing.fresh", dicom_files.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))  # can be imported
    with pytest.raises(ImageError, match=r"pip install 'pydicom>=3.0' python-gdcm"):
        decode_dicom(SAME["8 bits"])
    assert load_image(encode(IMAGE)) == (encode(IMAGE), [])  # needs no pydicom


# --- tags that are false ---


@pytest.mark.parametrize("tag", [{"PhotometricInterpretation": "MONOCHROME1"}, {"PresentationLUTShape": "INVERSE"}])
def test_a_false_tag_is_ignored_and_a_true_one_obeyed(tag):
    image, notes = decode_dicom(make_dicom(IMAGE, **tag))
    np.testing.assert_array_equal(image, IMAGE)
    assert notes == [f"the tag says {next(iter(tag.values()))}, but the pixels are not inverted: the tag was ignored"]
    image, notes = decode_dicom(make_dicom(255 - IMAGE, **tag))
    np.testing.assert_array_equal(image, IMAGE)
    assert notes == [f"inverted, as the tag {next(iter(tag.values()))} asks for"]


@pytest.mark.parametrize("elements", [{"BodyPartExamined": "HAND"}, {"ViewPosition": "LL"}])
def test_a_tag_is_obeyed_on_what_the_measure_was_not_made_for(elements):
    image, notes = decode_dicom(make_dicom(IMAGE, PhotometricInterpretation="MONOCHROME1", **elements))
    np.testing.assert_array_equal(image, 255 - IMAGE)
    assert not any(IGNORED in note for note in notes)


def frame(image, share, sides):
    """Returns an image with white borders, a share of its length, on some sides: above, below, left, right."""
    edge = [round(share * length) for length in image.shape]
    edges = (edge[0] * sides[0], edge[0] * sides[1]), (edge[1] * sides[2], edge[1] * sides[3])
    return np.pad(image, edges, constant_values=255)


@pytest.mark.parametrize("share", [0.05, 0.12, 0.2])
@pytest.mark.parametrize("sides", [(1, 1, 1, 1), (0, 0, 1, 1), (1, 0, 0, 0), (1, 1, 0, 1)])
def test_white_borders_of_a_collimator_do_not_speak_against_a_tag(share, sides):
    framed = frame(IMAGE, share, sides)
    for stored, said in ((255 - framed, "inverted, as the tag"), (framed, IGNORED))[: 2 if share < 0.2 else 1]:
        image, notes = decode_dicom(make_dicom(stored, PhotometricInterpretation="MONOCHROME1"))
        np.testing.assert_array_equal(image, framed)
        assert said in notes[-1]


def test_a_tag_is_obeyed_where_the_pixels_do_not_tell():
    flat = np.full((64, 64), 100, np.uint8)
    image, notes = decode_dicom(make_dicom(flat, PhotometricInterpretation="MONOCHROME1"))
    assert (image == 155).all()
    assert "cannot be seen" in notes[0]


def test_a_negative_without_a_tag_is_noted_and_left():
    image, notes = decode_dicom(make_dicom(255 - IMAGE))
    np.testing.assert_array_equal(image, 255 - IMAGE)
    assert notes == ["the pixels look inverted (bone dark), but no tag says so: left as they are"]


def test_padding_speaks_neither_for_nor_against_a_tag():
    dataset = make_dataset(np.pad(255 - IMAGE, 16), PhotometricInterpretation="MONOCHROME1")
    dataset.add_new("PixelPaddingValue", "US", 0)
    image, notes = decode_dicom(save(dataset))
    assert notes == ["inverted, as the tag MONOCHROME1 asks for"]
    assert (image[:16] == 0).all()


@pytest.mark.parametrize("view", ["PA", "AP"])
def test_looks_inverted_is_right_on_synthetic_images(view):
    for seed in range(6):
        image = draw_image(seed, ["Effusion", "Cardiomegaly"][: seed % 3], view=view, size=128)[0]
        assert looks_inverted(image) is not True
        assert looks_inverted(255 - image) is not False
        assert (looks_inverted(image) is None) == (looks_inverted(255 - image) is None)
    assert looks_inverted(np.zeros((20, 30), np.uint8)) is None


@pytest.mark.slow
def test_looks_inverted_is_never_wrong_on_real_images_with_and_without_borders(shared_data):
    """Some of what benchmarks/looks_inverted.py counts."""
    paths = sorted((shared_data / "nih_sample" / "images").glob("*.png"))[::5]
    if not paths:
        pytest.skip("needs the sample of ChestX-ray14")
    answers = []
    for number, path in enumerate(paths):
        with Image.open(path) as image:
            gray = np.asarray(image.convert("L"))
        sides = [number >> side & 1 for side in range(4)]  # others each time
        for share in (0.0, 0.08, 0.12, 0.2):
            framed = frame(gray, share, sides)
            answers.append((looks_inverted(framed), looks_inverted(255 - framed)))
    assert set(answers) <= {(False, True), (None, None)}
    assert answers.count((None, None)) <= 0.04 * len(answers)


def test_the_benchmark_of_looks_inverted_counts_hardly_a_mistake():
    rows = json.loads((ROOT / "benchmarks" / "results" / "looks_inverted.json").read_text())["without borders"]
    counts = [(row["n"], row[way]) for row in rows for way in ("as they are", "inverted")]
    assert sum(count["wrong"] for _, count in counts) < 1e-5 * sum(n for n, _ in counts)
    assert max(count["no answer"] / n for n, count in counts) < 0.05


# --- what is refused ---


def replaced(data, old, new):
    assert data.count(old) == 1
    return data.replace(old, new)


SHORT_TABLE = lut(np.arange(200), 0, 8)
SHORT_TABLE[0].LUTDescriptor = [256, 0, 8]
REFUSED = {
    "CT": (make_dicom(IMAGE, Modality="CT"), r"modality CT: not a plain radiograph"),
    "MR": (make_dicom(IMAGE, Modality="MR"), r"modality MR"),
    "mammogram": (make_dicom(IMAGE, Modality="MG"), r"modality MG"),
    "unheard-of modality": (make_dicom(IMAGE, Modality="QUAGMIRE"), r"modality unknown"),
    "multi-frame": (
        make_dicom(np.stack([IMAGE] * 3).reshape(-1, IMAGE.shape[1]), Rows=96, NumberOfFrames=3),
        "3 frames",
    ),
    "no pixels": (make_dicom(IMAGE)[: -IMAGE.size - 12], "no pixel data"),
    "RGB": (make_dicom(IMAGE, PhotometricInterpretation="RGB", SamplesPerPixel=3), "not gray"),
    "palette": (make_dicom(IMAGE, PhotometricInterpretation="PALETTE COLOR"), "not gray"),
    "no photometric interpretation": (make_dicom(IMAGE, PhotometricInterpretation=None), "not gray"),
    "1 bit": (make_dicom(IMAGE, BitsAllocated=1, BitsStored=1), "1 bits stored in 1: only 8 to 16"),
    "32 bits": (make_dicom(IMAGE, BitsAllocated=32, BitsStored=32), "32 bits stored in 32: only 8 to 16"),
    "more stored than allocated": (make_dicom(IMAGE, BitsStored=12), "12 bits stored in 8"),
    "high bits": (make_dicom(STORED, 12, HighBit=9), "HighBit does not fit BitsStored"),
    "no rows": (make_dicom(IMAGE, Rows=None), "Rows is missing"),
    "rows of nothing": (make_dicom(IMAGE, Rows=0), "a side is below 16"),
    "thumbnail": (make_dicom(IMAGE[:12]), "92 x 12 pixels: a side is below 16"),
    "bomb": (make_dicom(IMAGE, Rows=60000, Columns=60000), "60000 x 60000 pixels, more than the 33,554,432"),
    "burned in": (make_dicom(IMAGE, BurnedInAnnotation="YES"), "burned into the pixels"),
    "cut short": (make_dicom(IMAGE)[:-2000], "cut short"),
    "fewer pixels than declared": (make_dicom(IMAGE, Rows=97), "cut short"),
    "video": (save(make_dataset(IMAGE, syntax=uid.MPEG2MPML)), "transfer syntax is not for single images"),
    "private syntax": (
        replaced(make_dicom(IMAGE), b"1.2.840.10008.1.2.1\0", b"1.2.3.4.7741903.999\0"),
        "transfer syntax",
    ),
    "bare data set": (make_dicom(IMAGE)[132:], "no DICM at byte 128"),
    "bare data set with its own header": (b"\0" * 300, "no DICM at byte 128"),
    "nothing behind the mark": (b"\0" * 128 + b"DICM", "."),
    "noise behind the mark": (b"\0" * 128 + b"DICM" + bytes(range(256)) * 9, "."),
    "PNG": (encode(IMAGE), "no DICM at byte 128"),
    "slope of zero": (make_dicom(STORED, 12, RescaleSlope=0, RescaleIntercept=1), "gray levels"),
    "table too short": (
        make_dicom(IMAGE, VOILUTSequence=SHORT_TABLE),
        "table or the window for the gray levels is damaged",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_files_are_refused_and_the_message_says_why(kind):
    data, reason = REFUSED[kind]
    with pytest.raises(ImageError, match=reason) as caught:
        decode_dicom(data)
    assert caught.value.__context__ is None or isinstance(caught.value.__context__, zlib.error)
    assert re.search(r"; \w|`dcmconv|pip install", str(caught.value)), "it names no remedy"


@pytest.mark.filterwarnings("ignore:Invalid value")  # of pydicom, on writing
def test_an_image_of_unclear_origin_is_read_and_noted():
    noted = {
        ("Modality", "OT"): "modality is OT",
        ("Modality", None): "modality is missing",
        ("BodyPartExamined", "KNEE"): "the body part is KNEE",
        ("BodyPartExamined", "QUAGMIRE"): "the body part is another",
        ("ViewPosition", "LATERAL"): "the view is LATERAL",
        ("PresentationIntentType", "FOR PROCESSING"): "raw data of a detector",
    }
    for (name, value), sentence in noted.items():
        image, notes = decode_dicom(make_dicom(IMAGE, **{name: value}))
        np.testing.assert_array_equal(image, IMAGE)
        assert len(notes) == 1 and sentence in notes[0]
    for name, value in (("BodyPartExamined", "Chest PA"), ("BodyPartExamined", ""), ("ViewPosition", "PA")):
        assert decode_dicom(make_dicom(IMAGE, **{name: value}))[1] == []


@pytest.mark.parametrize("syntax", [uid.JPEGLSLossless, uid.JPEG2000Lossless, uid.JPEGBaseline8Bit, uid.JPEGLossless])
def test_compressed_pixels_of_another_size_or_cut_short_are_refused_undecoded(syntax, monkeypatch):
    if syntax == uid.JPEGBaseline8Bit:
        dataset = jpeg_dataset(IMAGE)[0]
    elif syntax == uid.JPEGLossless:
        dataset = make_dataset(STORED, 12, syntax=syntax)
        dataset.PixelData = encapsulate([code_jpeg_lossless(STORED)])
    else:
        dataset = compress(IMAGE, 8, syntax)
    decode_dicom(save(dataset))

    decoded = []
    monkeypatch.setattr(pydicom.pixels, "pixel_array", decoded.append)
    other = copy.deepcopy(dataset)
    other.Rows += 1
    with pytest.raises(ImageError, match="another size than declared"):
        decode_dicom(save(other))
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    for share in (0.0, 0.01, 0.4, 0.9):
        dataset.PixelData = encapsulate([frame[: max(2, int(share * len(frame)))]])
        with pytest.raises(ImageError, match="cut short"):
            decode_dicom(save(dataset))
    assert decoded == []


def test_a_deflated_bomb_is_refused(monkeypatch):
    data = save(make_dataset(np.zeros((3000, 3000), np.uint8), syntax=uid.DeflatedExplicitVRLittleEndian))
    assert len(data) < 100_000
    monkeypatch.setattr(dicom_files, "MAX_BYTES", 1_000_000)
    with pytest.raises(ImageError, match="inflates to more"):
        decode_dicom(data)
    with pytest.raises(ImageError, match=r"cannot be (inflated|read)"):
        decode_dicom(data[:400] + b"\xff" * 300)


def test_a_file_beyond_the_limit_is_not_read_wholly(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "MAX_BYTES", 10_000)
    path = tmp_path / "large.dcm"
    path.write_bytes(SAME["12 bits"])
    for source in (path, str(path), SAME["12 bits"]):
        with pytest.raises(ImageError, match="larger than the 10,000 bytes allowed"):
            load_image(source)
    with pytest.raises(ImageError, match="larger than"):
        load_image("/dev/zero")


def test_no_damage_to_a_file_raises_anything_but_the_errors_of_images():
    rng = np.random.default_rng(7)
    compressed = save(jpeg_dataset(IMAGE)[0])
    for data in (SAME["12 bits"], SAME["12 bits, table of 8"], compressed):
        for _ in range(80):
            broken = bytearray(data[: rng.integers(133, len(data) + 1)] if rng.random() < 0.3 else data)
            for place in rng.integers(132, min(len(broken), 700), 3):
                broken[place] = rng.integers(256)
            try:
                image, _ = decode_dicom(bytes(broken))
            except ImageError as error:
                assert str(error)
            else:
                assert image.dtype == np.uint8 and image.ndim == 2


# --- load_image ---


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_jpeg_of_a_phone_is_turned_as_it_says(orientation):
    turns = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(IMAGE).transpose(turns[orientation]).save(file := io.BytesIO(), "JPEG", quality=95, exif=exif)
    data, notes = load_image(file.getvalue())
    assert notes == ["turned as its EXIF orientation says"]
    upright = np.asarray(Image.open(io.BytesIO(data)))
    assert upright.shape == IMAGE.shape and np.abs(upright.astype(int) - IMAGE).mean() < 3
    assert b"Exif" not in data
    assert load_image(file.getvalue()[:-100])[1] == []  # cut: what decodes it says so


def test_png_and_jpeg_pass_unchanged_and_nothing_else_passes(tmp_path):
    file = io.BytesIO()
    Image.fromarray(IMAGE).save(file, "JPEG")
    for data in (encode(IMAGE), file.getvalue()):
        for name in ("image.png", "image.dcm"):  # the content counts
            (tmp_path / name).write_bytes(data)
            assert load_image(tmp_path / name) == (data, [])
        assert load_image(data) == (data, [])
    with pytest.raises(ImageError, match="neither PNG nor JPEG"):
        load_image(b"<!DOCTYPE html>" * 20)
    with pytest.raises(ImageError, match="empty"):
        load_image(b"")
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "none.dcm")


def test_a_dicom_is_known_by_its_content_or_by_its_ending(tmp_path):
    for name in ("image.dcm", "image", "image.png", "IM0001.DCM"):
        (tmp_path / name).write_bytes(SAME["12 bits"])
        data, notes = load_image(str(tmp_path / name))
        assert notes == [] and data == load_image(SAME["12 bits"])[0]
    (tmp_path / "bare.dcm").write_bytes(SAME["12 bits"][132:])
    with pytest.raises(ImageError, match="no DICM at byte 128"):
        load_image(tmp_path / "bare.dcm")


# --- nobody's name ---


def assert_secret(*texts):
    for text in texts:
        for secret in SECRETS:
            assert secret.lower() not in text.lower(), f"{secret} in {text[:300]}"


@pytest.mark.parametrize("kind", ["good", "typed into other fields", "damaged values", "wrong values"])
def test_no_name_reaches_a_note_an_error_a_log_or_the_picture(kind, capfd, caplog, recwarn, tmp_path):
    caplog.set_level(logging.DEBUG)
    warnings.simplefilter("always")
    variants = [{}]
    if kind == "typed into other fields":
        typed = ("Modality", "BodyPartExamined", "ViewPosition", "PresentationLUTShape", "VOILUTFunction")
        variants = [{name: "QUAGMIRE"} for name in (*typed, "PhotometricInterpretation", "SpecificCharacterSet")]
    files = [make_dicom(STORED, 12, **(NAMES | WINDOW | variant)) for variant in variants]
    if kind == "damaged values":
        rng = np.random.default_rng(1)
        for _ in range(150):
            broken = bytearray(files[0])
            for place in rng.integers(132, 1100, 2):
                broken[place] = rng.integers(256)
            files.append(bytes(broken[: rng.integers(600, len(broken))]))
    if kind == "wrong values":
        for name in ("PatientBirthDate", "WindowCenter", "RescaleSlope", "Rows", "BitsStored", "NumberOfFrames"):
            dataset = make_dataset(STORED, 12, **(NAMES | WINDOW | {"RescaleSlope": 1, "RescaleIntercept": 0}))
            tag = pydicom.tag.Tag(name)
            vr = "IS" if name in ("Rows", "BitsStored") else pydicom.datadict.dictionary_VR(tag)
            dataset[tag] = pydicom.dataelem.RawDataElement(tag, vr, 8, b"Zebulon ", 0, False, True)
            files.append(save(dataset))
    assert all(any(secret.encode() in data for secret in SECRETS) for data in files[:1])
    caplog.clear()  # of what writing them said
    recwarn.clear()
    capfd.readouterr()
    texts = [try_to_load(data, tmp_path) for data in files]
    streams = capfd.readouterr()
    assert_secret(*texts, streams.out, streams.err, caplog.text, *(str(warning.message) for warning in recwarn))


def try_to_load(data, folder):
    """Returns all that comes out of a file: notes and bytes, or errors with all their contexts."""
    path = folder / "image.dcm"
    path.write_bytes(data)
    try:
        image, notes = load_image(path)
    except ImageError as error:
        texts = []
        while error is not None:
            texts.append(repr(error))
            error = error.__context__
        return "\n".join(texts)
    chunks = [
        image[at : at + 4] for at in range(len(image)) if image[at : at + 4] in (b"tEXt", b"iTXt", b"zTXt", b"eXIf")
    ]
    assert chunks == []
    return "\n".join([*notes, image.decode("latin1")])


def test_no_name_is_taken_out_of_a_file():
    dataset, _ = dicom_files.read_header(make_dicom(STORED, 12, **(NAMES | WINDOW)))
    taken = {pydicom.datadict.keyword_for_tag(element.tag) for element in dataset}
    assert "WindowWidth" in taken and taken <= {*dicom_files._ELEMENTS.split(), "SpecificCharacterSet"}


def test_quiet_reading_leaves_warnings_and_logs_as_they_were():
    logger = logging.getLogger("pydicom")
    before = list(warnings.filters), logger.disabled
    threads = [threading.Thread(target=decode_dicom, args=(SAME["12 bits"],)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.raises(ImageError):
        decode_dicom(REFUSED["cut short"][0])
    assert (list(warnings.filters), logger.disabled) == before


# --- real files ---


@pytest.fixture
def real(shared_data):
    folder = shared_data / "dicom"
    if not folder.is_dir():
        pytest.skip(f"needs the DICOM files in {folder}, which are not part of the repository")
    return folder


@pytest.mark.slow
def test_the_real_chest_images_are_read_right(real):
    plain, notes = decode_dicom(next(real.glob("1.2.276.*.dcm")).read_bytes())
    assert notes == [] and plain.shape == (1024, 1024) and looks_inverted(plain) is False
    false, notes = decode_dicom((real / "Fake_MONOHR1.dcm").read_bytes())
    np.testing.assert_array_equal(false, plain)
    assert len(notes) == 1 and IGNORED in notes[0]
    negative, notes = decode_dicom((real / "RG1_J2KI.dcm").read_bytes())
    assert notes == ["inverted, as the tag MONOCHROME1 asks for"]
    assert negative.shape == (1955, 1841) and looks_inverted(negative) is False
    stored = pydicom.dcmread(real / "RG1_J2KI.dcm").pixel_array
    expected = 255 - np.clip((stored - 14999.5) / 29999 + 0.5, 0, 1) * 255  # C.11.2.1.2.1, by hand
    assert np.abs(negative - expected).max() <= 0.5 + 1e-6


def test_the_real_extremity_opens_and_is_said_to_be_none_of_the_chest(real):
    image, notes = decode_dicom((real / "RG3_J2KR.dcm").read_bytes())
    assert image.shape == (1760, 1760)
    assert notes[0] == "not a frontal chest radiograph: the body part is EXTREMITY"
    assert image[880, 500] < 60 < 120 < image[400, 850]  # air beside the leg is dark, bone is bright
