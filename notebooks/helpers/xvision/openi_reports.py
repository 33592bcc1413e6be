"""Reads the reports of the Indiana chest radiographs of Open-i: which images they name, and how indexers coded them.

The 3,955 reports lie in one archive, NLMCXR_reports.tgz, as XML. They are read with the standard library: what hostile
files could do (entities that grow, files read from elsewhere) needs a document type, and one with it is refused.
"""

import re
import tarfile
import zlib
from xml.etree import ElementTree

import pandas as pd

from ..runtime.files import as_path

_MAX_REPORT = 2**18  # bytes; the largest has 8,967
_NAME = re.compile(r"CXR[0-9]+_[A-Za-z0-9_-]+[.]png")
_STUDY = re.compile(r"CXR[0-9]+")


def read_openi_reports(source):
    """Reads the reports, from the archive without unpacking it, or from a folder of XML files.

    Args:
        source: path of NLMCXR_reports.tgz or of a folder with its files, at any depth.

    Returns:
        DataFrame, one row an image, sorted by name: `image` (str, such as CXR1_1_IM-0001-3001.png), `study` (str, such as
        CXR1), `position` (int64, of the image in its report, from 1), `major` (tuple of str, the indexers' terms),
        `automatic` (tuple of str, those of a program) and `caption` (str). `attrs["n_reports"]` counts the reports,
        with images or without.

    Raises:
        FileNotFoundError: there is no such file, or no report in it.
        ValueError: the archive is damaged, a report is no XML, has a document type (which is how XML bombs are built),
            is larger than 256 KiB or lacks what is read, or two reports name the same image; says which.
    """
    source = as_path(source)
    rows, n_reports = [], 0
    for name, data in _open_reports(source):
        rows += _parse_report(f"{source}: {name}", data)
        n_reports += 1
    if not n_reports:
        raise FileNotFoundError(
            f"{source} holds no report (*.xml); expected NLMCXR_reports.tgz or its ecgen-radiology/"
        )
    return frame_of_images(rows, n_reports, source)


def frame_of_images(rows, n_reports, source):
    """Makes the frame of `read_openi_reports` of its rows, tuples in the order of its columns; checks the names."""
    frame = pd.DataFrame(rows, columns=["image", "study", "position", "major", "automatic", "caption"])
    for image, study in zip(frame["image"], frame["study"], strict=True):
        if not _NAME.fullmatch(image) or not _STUDY.fullmatch(study):
            raise ValueError(f"{source}: {image!r} of study {study!r} is not an image's name as in CXR1_1_IM-0001-3001")
    twice = frame["image"][frame["image"].duplicated()]
    if len(twice):
        raise ValueError(f"{source}: {twice.iloc[0]} is named twice; keep one edition of the reports")
    frame = frame.astype({"position": "int64"}).sort_values("image", ignore_index=True)
    frame.attrs = {"n_reports": n_reports}
    return frame


def _open_reports(source):
    if source.is_dir():
        for path in sorted(source.rglob("*.xml")):
            yield path.name, path.read_bytes()[: _MAX_REPORT + 1] if path.stat().st_size <= _MAX_REPORT else b""
        return
    if not source.is_file():
        raise FileNotFoundError(f"there are no reports at {source}; fetch_openi downloads NLMCXR_reports.tgz")
    try:
        with tarfile.open(source) as tar:
            for member in tar:
                if member.isreg() and member.name.endswith(".xml"):
                    yield member.name, tar.extractfile(member).read() if member.size <= _MAX_REPORT else b""
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{source}: damaged or cut short ({error}); remove it and download it again") from error


class _NoDocumentType(ElementTree.TreeBuilder):
    """Entities, by which a small file becomes a huge one or reads another, can only be declared in a document type."""

    def doctype(self, name, pubid, system):
        raise ValueError("has a document type, which no report of the collection has")


def _parse_report(where, data):
    if not data:
        raise ValueError(f"{where} is empty or larger than the {_MAX_REPORT:,} bytes that a report may have")
    try:
        root = ElementTree.fromstring(data, parser=ElementTree.XMLParser(target=_NoDocumentType()))
        study = root.find("uId").attrib["id"]
        terms = [tuple(node.text or "" for node in root.iterfind(f"MeSH/{kind}")) for kind in ("major", "automatic")]
        images = [(node.attrib["id"], node.findtext("caption") or "") for node in root.iterfind("parentImage")]
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{where}: {error}; remove the file and download it again") from None
    except (AttributeError, KeyError):
        raise ValueError(f"{where} lacks the identity of the report or of an image; is it one of Open-i?") from None
    return [
        (f"{image}.png", study, position, *terms, caption.strip())
        for position, (image, caption) in enumerate(images, 1)
    ]
