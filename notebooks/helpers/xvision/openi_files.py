"""Downloads the Indiana chest radiographs of Open-i and reads their reports: which images they name, and the terms.

The collection is two archives: 7,470 PNGs, and 3,955 reports as XML. `openi` labels them.
"""

import re
import tarfile
import zlib
from xml.etree import ElementTree

import pandas as pd

from ..fetch.archives import unpack_archive
from ..fetch.downloads import download_file
from ..fetch.streaming import claim_folder
from ..runtime.files import as_path

OPENI_URL = "https://openi.nlm.nih.gov"
# Of the copy that TorchXRayVision 1.5.7 carries, too. None is published for the images.
REPORTS_SHA256 = "8fb6de7eec73d8c3665067ad4bb003ccd57f971ae316d2642e1627ac7268667a"
REPORTS = "NLMCXR_reports.tgz"

_IMAGES = "NLMCXR_png.tgz"
_NAME = re.compile(r"CXR[0-9]+_[A-Za-z0-9_-]+[.]png")
_STUDY = re.compile(r"CXR[0-9]+")


def fetch_openi(folder, base_url=OPENI_URL, reports_sha256=REPORTS_SHA256, progress=None, **options):
    """Downloads the collection, 3,955 reports and 7,470 PNGs, and unpacks the images.

    Once `images` exists, the archive of the images is not downloaded again and may be removed.

    Args:
        folder: path of the folder, on a disk of this machine; made if missing.
        base_url: address of Open-i, or of a mirror with the same layout.
        reports_sha256: SHA-256 of the archive of reports; None to record it on first use, as is done for the images'.
        progress: callable such as `tqdm`, see `download_file` and `unpack_archive`.
        **options: `retries`, `pause` and `timeout` of `download_file`.

    Returns:
        Tuple of the path of NLMCXR_reports.tgz and that of the folder `images`.

    Raises:
        DownloadError: see `download_file`.
        ArchiveError: see `unpack_archive`.
        RuntimeError: another process fetches into the folder.
    """
    folder, source = as_path(folder), f"{base_url}/imgs/collections"
    options["progress"] = progress
    images = folder / "images"
    with claim_folder(folder):
        reports = download_file(f"{source}/{REPORTS}", folder / REPORTS, sha256=reports_sha256, **options)
        if not images.exists():
            archive = download_file(f"{source}/{_IMAGES}", folder / _IMAGES, **options)
            unpack_archive(archive, images, progress=progress)
    return reports, images


def read_openi_reports(archive):
    """Reads the reports from their archive, without unpacking it.

    They are parsed by the standard library, whose expat stops entities that grow, and which reads no other files.

    Args:
        archive: path of NLMCXR_reports.tgz.

    Returns:
        DataFrame, one row an image, sorted by name: `image` (str, such as CXR1_1_IM-0001-3001.png), `study` (str, such
        as CXR1), `position` (int64, of the image in its report, from 1) and `terms` (tuple of str, those of the trained
        indexers, `major` in the XML). `attrs["n_reports"]` counts the reports, with images or without.

    Raises:
        FileNotFoundError: the archive does not exist, or has no report.
        ValueError: the archive is damaged, a report is not XML or lacks what is read, or two reports name the same
            image; says which.
    """
    archive = as_path(archive)
    if not archive.is_file():
        raise FileNotFoundError(f"there are no reports at {archive}; fetch_openi downloads {REPORTS}")
    rows, n_reports = [], 0
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and member.name.endswith(".xml"):
                    rows += _parse_report(f"{archive}: {member.name}", tar.extractfile(member).read())
                    n_reports += 1
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{archive}: damaged or cut short ({error}); remove it and download it again") from error
    if not n_reports:
        raise FileNotFoundError(f"{archive} holds no report (*.xml); expected Open-i's {REPORTS}")
    frame = pd.DataFrame(rows, columns=["image", "study", "position", "terms"])
    twice = frame["image"][frame["image"].duplicated()]
    if len(twice):
        raise ValueError(f"{archive}: {twice.iloc[0]} is named twice; download the archive again")
    frame = frame.astype({"position": "int64"}).sort_values("image", ignore_index=True)
    frame.attrs = {"n_reports": n_reports}
    return frame


def _parse_report(where, data):
    """Returns the rows of a report's images."""
    try:
        root = ElementTree.fromstring(data)
        study = root.find("uId").attrib["id"]
        terms = tuple(node.text or "" for node in root.iterfind("MeSH/major"))
        images = [node.attrib["id"] for node in root.iterfind("parentImage")]
    except ElementTree.ParseError as error:
        raise ValueError(f"{where}: {error}; download the archive again") from None
    except (AttributeError, KeyError):
        raise ValueError(f"{where} lacks the identity of the report or of an image; is it one of Open-i?") from None
    rows = [(f"{image}.png", study, position, terms) for position, image in enumerate(images, 1)]
    for image, *_ in rows:
        if not _NAME.fullmatch(image) or not _STUDY.fullmatch(study):
            raise ValueError(f"{where}: {image!r} of study {study!r} is not an image's name as in CXR1_1_IM-0001-3001")
    return rows
