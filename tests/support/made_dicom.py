"""DICOM files for the tests."""

import io
import warnings

from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate


def make_dataset(stored, bits=8, syntax=uid.ExplicitVRLittleEndian, **elements):
    """Returns a radiograph of stored levels as a Dataset; an element that is None is left out."""
    wide = bits > 8
    signed = stored.dtype.kind == "i"
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    defaults = {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.1",
        "SOPInstanceUID": "1.2.3.4",
        "Modality": "DX",
        "BodyPartExamined": "CHEST",
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": stored.shape[0],
        "Columns": stored.shape[1],
        "BitsAllocated": 16 if wide else 8,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(signed),
    }
    for name, value in (defaults | elements).items():
        if value is not None:
            setattr(dataset, name, value)
    order = ">" if syntax == uid.ExplicitVRBigEndian else "<"
    kind = "i" if signed else "u"
    dataset.PixelData = stored.astype(f"{order}{kind}2" if wide else f"{kind}1").tobytes()
    dataset["PixelData"].VR = "OW" if wide else "OB"
    if syntax.is_encapsulated:
        dataset.PixelData = encapsulate([dataset.PixelData])
    return dataset


def save(dataset):
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def make_dicom(stored, bits=8, **elements):
    return save(make_dataset(stored, bits, **elements))
