"""The Indiana University chest radiographs of Open-i: `NLMCXR_reports.tgz`, or its XML files, and the images.

Demner-Fushman et al., JAMIA 23(2), 2016. Trained indexers coded each of the 3,955 reports, one a visit, with terms such
as Nodule/lung/upper lobe/right. An image has a finding if a term of its report has that heading; "Other" stands for all
headings that are not listed here, so that an image without any finding is one whose only term is "normal".
docs/openi.md says how labels and views were checked.
"""

import json
import re
import tarfile
import zlib
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd

from ...runtime.files import as_path, read_text
from ..study import make_study
from ..study_folder import list_named_images

REPORTS = "NLMCXR_reports.tgz"
FILES = f"Open-i's {REPORTS}"

_UNPACKED = "ecgen-radiology"  # the folder in the archive of reports
# Headings that have a counterpart in NIH's, CheXpert's or VinDr-CXR's findings, and those that may look like a nodule.
_HEADINGS = {
    **{name: name for name in ("Airspace Disease", "Calcified Granuloma", "Calcinosis", "Cardiomegaly")},
    **{name: name for name in ("Consolidation", "Emphysema", "Granuloma", "Granulomatous Disease", "Infiltrate")},
    **{name: name for name in ("Mass", "Nodule", "Opacity", "Pleural Effusion", "Pneumonia", "Pneumothorax")},
    **{name: name for name in ("Pulmonary Atelectasis", "Pulmonary Edema", "Pulmonary Fibrosis")},
    **{"Pulmonary Emphysema": "Emphysema", "Fractures, Bone": "Fracture", "Hernia, Hiatal": "Hiatal Hernia"},
}
_FINDINGS = {heading.casefold(): name for heading, name in _HEADINGS.items()}
_OTHER = "Other"
_NAME = re.compile(r"CXR[0-9]+_[A-Za-z0-9_-]+[.]png")
_STUDY = re.compile(r"CXR[0-9]+")
_ABOUT = {
    "name": "Indiana University collection (Open-i)",
    "labels": "Terms by which trained indexers coded the radiology reports; 0: no term has the finding's heading.",
    "not_read": "Lateral images, a second frontal image of a visit, the reports' text, and terms that a program added. "
    "Reports without indexing have unknown labels. AP is not told from PA.",
    "source": "https://openi.nlm.nih.gov",
    "terms": "CC BY-NC-ND 4.0, as each report says. Cite Demner-Fushman et al., JAMIA 2016, and name Open-i, National "
    "Library of Medicine.",
}


def is_here(folder):
    """Returns whether a folder has this layout."""
    return (folder / REPORTS).is_file() or (folder / _UNPACKED).is_dir()


def load(folder, uncertain):  # labels know no -1
    """Loads the study, see `readers.load_study`; a visit counts as a patient, and has one image, see `find_frontal`."""
    path = next(path for path in (folder / REPORTS, folder / _UNPACKED) if path.exists())
    reports = read_openi_reports(path)
    reports = reports[find_frontal(reports)]
    table = reports[["image"]].assign(patient_id=reports["study"])
    table = table.join(pd.DataFrame([label_terms(terms) for terms in reports["terms"]], index=table.index))
    return make_study(folder, "openi", path, table, lister=list_named_images, about=_ABOUT)


def label_terms(terms):
    """Returns each finding's label as text, "1", "0", or "" where nobody indexed the report, from its `terms`."""
    headings = {term.split("/")[0].strip().casefold() for term in terms}
    found = {_FINDINGS.get(heading, _OTHER) for heading in headings - {"normal"}}
    is_known = not headings <= {"no indexing"}
    return {name: str(int(name in found)) if is_known else "" for name in (*_FINDINGS.values(), _OTHER)}


def find_frontal(reports):
    """Finds the one image of each visit that is taken as frontal: the first, but for 584 of 3,851 visits.

    Neither reports nor names say the view. The authors of TorchXRayVision sorted the first images by their pixels;
    where the first of two is lateral, the second is taken, and 218 visits have none. A second frontal image of a visit
    is not taken.

    Args:
        reports: frame of `read_openi_reports`.

    Returns:
        Series of bool with the index of `reports`.
    """
    number = reports["study"].str.removeprefix("CXR").astype("int64")
    views = json.loads(read_text(Path(__file__).with_name("openi_views.json")))
    second, none = (number.isin(views[key]) for key in ("second", "none"))
    return (reports["position"] == 1 + second) & ~none


def read_openi_reports(path):
    """Reads the reports from their archive, without unpacking it, or from the folder of it.

    They are parsed by the standard library, whose expat stops entities that grow, and which reads no other files.

    Args:
        path: of NLMCXR_reports.tgz, or of a folder with its XML files.

    Returns:
        DataFrame, one row an image, sorted by name: `image` (str, such as CXR1_1_IM-0001-3001.png), `study` (str, such
        as CXR1), `position` (int64, of the image in its report, from 1) and `terms` (tuple of str, those of the trained
        indexers, `major` in the XML). `attrs["n_reports"]` counts the reports, with images or without.

    Raises:
        FileNotFoundError: there are no reports.
        ValueError: the archive is damaged, a report is not XML or lacks what is read, or two reports name the same
            image; says which.
    """
    path = as_path(path)
    if not path.exists():
        raise FileNotFoundError(f"there are no reports at {path}; fetch_openi downloads {REPORTS}")
    rows, n_reports = [], 0
    for name, data in _iterate_reports(path):
        rows += _parse_report(f"{path}: {name}", data)
        n_reports += 1
    if not n_reports:
        raise FileNotFoundError(f"{path} holds no report (*.xml); expected Open-i's {REPORTS}")
    frame = pd.DataFrame(rows, columns=["image", "study", "position", "terms"])
    twice = frame["image"][frame["image"].duplicated()]
    if len(twice):
        raise ValueError(f"{path}: {twice.iloc[0]} is named twice; download the archive again")
    frame = frame.astype({"position": "int64"}).sort_values("image", ignore_index=True)
    frame.attrs = {"n_reports": n_reports}
    return frame


def _iterate_reports(path):
    """Yields name and content of each report."""
    if path.is_dir():
        yield from ((file.name, file.read_bytes()) for file in sorted(path.glob("*.xml")))
        return
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.isfile() and member.name.endswith(".xml"):
                    yield member.name, tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{path}: damaged or cut short ({error}); remove it and download it again") from error


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
