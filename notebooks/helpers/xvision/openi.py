"""The Indiana chest radiographs of Open-i: labeled Normal or Nodule, frontal images chosen, matched to files.

Each of the 3,955 reports is of one visit of one patient, with 7,470 images in all, and has the terms by which trained
indexers coded it. How labels and views were checked stands in docs/openi.md. Cite Demner-Fushman et al., Preparing a
collection of radiology examinations for distribution and retrieval, JAMIA 23(2), 2016; each report is licensed under CC
BY-NC-ND 4.0.
"""

import dataclasses
import json
from functools import lru_cache
from pathlib import Path

import pandas as pd
from PIL import Image

from ..packing.image_files import ImageError, inspect_image
from ..runtime.files import as_path, read_text
from ..study.labels import NODULE_CLASSES, match_images
from .openi_fetch import read_search_pages
from .openi_reports import read_openi_reports

OPENI_VIEWS = ("frontal", "both")


@dataclasses.dataclass(frozen=True)
class OpeniReport:
    """Counts what became of the images that the reports name.

    Attributes:
        n_reports: reports read, with images or without.
        n_listed: images that they name.
        n_unlabeled: images left out because the report is neither Normal nor Nodule.
        n_contradictory: images of reports that are coded normal and something else as well; part of `n_unlabeled`, or
            Nodule if a nodule is what is coded.
        n_other_view: labeled images left out because of `views`.
        n_missing: labeled images of the view asked for that are not in the folder.
        n_unreadable: those that are there and broken.
        n_normal: images kept of class Normal.
        n_nodule: images kept of class Nodule.
        n_patients: patients that have them.
        n_extra: PNGs in the folder that no report names.
        missing: names of the first five images that are missing.
        unreadable: the first five that are broken, each with the reason.
    """

    n_reports: int
    n_listed: int
    n_unlabeled: int
    n_contradictory: int
    n_other_view: int
    n_missing: int
    n_unreadable: int
    n_normal: int
    n_nodule: int
    n_patients: int
    n_extra: int
    missing: tuple[str, ...]
    unreadable: tuple[str, ...]


def label_openi(reports):
    """Labels images by the indexers' major terms.

    Normal: the only term is "normal". Nodule: a term has the heading Nodule, as in Nodule/lung/upper lobe/right. All
    else is left out, also what may look like a nodule and is coded otherwise: Granuloma, Calcified Granuloma, Mass, the
    enlarged "lymph nodes", and nodules that only the program's terms name.

    Args:
        reports: frame of `read_openi_reports`.

    Returns:
        Series of str, "Normal", "Nodule" or "", with the index of `reports`.
    """

    def label(terms):
        headings = [term.split("/")[0].strip().casefold() for term in terms]
        return "Normal" if headings == ["normal"] else "Nodule" if "nodule" in headings else ""

    return pd.Series([label(terms) for terms in reports["major"]], index=reports.index, dtype=str, name="label")


def find_frontal(reports):
    """Tells the one image of each study that is taken as frontal: the first of its report, but for 584 of 3,851 studies.

    Neither reports nor names tell the view. The first images were sorted by their pixels by the authors of
    TorchXRayVision; where the first of two is a lateral, the second is taken, and 218 studies have none. A second
    frontal image of a study counts as not frontal.

    Args:
        reports: frame of `read_openi_reports`.

    Returns:
        Series of bool with the index of `reports`.
    """
    number = reports["study"].str.removeprefix("CXR").astype("int64")
    second, none = (number.isin(_load_views()[key]) for key in ("second", "none"))
    return (reports["position"] == 1 + second) & ~none


def match_openi_images(reports, folder):
    """Keeps the rows whose image is in a folder, at any depth.

    Args:
        reports: frame of `read_openi_reports`, or some of its rows.
        folder: path of a folder with PNGs under the names that Open-i gave them.

    Returns:
        Tuple of the rows found, with their `path` (str), and a `StudyReport`.

    Raises:
        FileNotFoundError: the folder is missing or holds none of the images.
        ValueError: two files have the same name; names both.
    """
    folder = as_path(folder)
    paths = {}
    for path in sorted(folder.rglob("*.png")):
        if path.name in paths:
            raise ValueError(f"two images are called {path.name}: {paths[path.name]} and {path}; remove one")
        paths[path.name] = path
    if not set(paths) & set(reports["image"]):
        others = f"{len(paths)} others, for instance {min(paths)}" if paths else "no PNG at all"
        raise FileNotFoundError(
            f"{folder}: none of the {len(reports)} images that the reports name is here, but {others}; images keep the "
            "names that Open-i gave them, such as CXR1_1_IM-0001-3001.png: fetch_openi downloads them"
        )
    found, report = match_images(reports, paths)
    return found.assign(path=[str(paths[image]) for image in found["image"]]), report


def load_openi_images(folder, views="frontal"):
    """Loads Normal against Nodule: what `fetch_openi` or `search_openi` left in a folder, labeled and checked.

    An image that is missing or broken is counted and left out. Images are read to their end and compared with their
    checksums, but not decoded.

    Args:
        folder: path of a folder with NLMCXR_reports.tgz, with ecgen-radiology/ or with the pages of a search, and with
            images at any depth.
        views: "frontal", at most one image of a patient, see `find_frontal`; or "both".

    Returns:
        Tuple of a DataFrame, sorted by image, with `image` (str), `path` (str), `patient_id` (str, the study: split by
        it) and `label` (int8, 0 Normal, 1 Nodule), and a `OpeniReport`.

    Raises:
        FileNotFoundError: there are no reports or none of their images.
        ValueError: unknown `views`, or only one class is left.
    """
    if views not in OPENI_VIEWS:
        raise ValueError(f"views is {views!r}; expected one of {', '.join(OPENI_VIEWS)}")
    reports = load_reports(folder)
    reports["label"] = label_openi(reports)
    labeled = reports["label"] != ""
    chosen = labeled & (find_frontal(reports) if views == "frontal" else True)
    _, on_disk = match_openi_images(reports, folder)
    images, report = match_openi_images(reports[chosen], folder)
    reasons = {path: _find_fault(path) for path in images["path"]}
    broken = [f"{Path(path).name}: {reason}" for path, reason in reasons.items() if reason]
    images = images[[not reasons[path] for path in images["path"]]].reset_index(drop=True)
    found = images["label"].value_counts()
    contradictory = reports["major"].map(
        lambda terms: len(terms) > 1 and "normal" in [term.casefold() for term in terms]
    )
    cohort = OpeniReport(
        n_reports=reports.attrs["n_reports"],
        n_listed=len(reports),
        n_unlabeled=int((~labeled).sum()),
        n_contradictory=int(contradictory.sum()),
        n_other_view=int((labeled & ~chosen).sum()),
        n_missing=report.n_missing,
        n_unreadable=len(broken),
        n_normal=int(found.get("Normal", 0)),
        n_nodule=int(found.get("Nodule", 0)),
        n_patients=images["study"].nunique(),
        n_extra=on_disk.n_extra,
        missing=report.missing,
        unreadable=tuple(broken[:5]),
    )
    if not cohort.n_normal or not cohort.n_nodule:
        raise ValueError(
            f"{folder}: {cohort.n_normal} images are Normal and {cohort.n_nodule} Nodule, and both are needed; "
            f"{cohort.n_missing} are missing and {cohort.n_unreadable} broken: download the rest"
        )
    frame = images.rename(columns={"study": "patient_id"})[["image", "path", "patient_id"]]
    frame["label"] = images["label"].map(NODULE_CLASSES.index).astype("int8")
    frame.attrs = {}
    return frame, cohort


def load_reports(folder):
    """Reads the reports in a folder of `fetch_openi` or `search_openi`; FileNotFoundError if it has none."""
    folder = as_path(folder)
    for name in ("NLMCXR_reports.tgz", "ecgen-radiology"):
        if (folder / name).exists():
            return read_openi_reports(folder / name)
    if (folder / "search").is_dir():
        return read_search_pages(folder)
    raise FileNotFoundError(
        f"{folder} holds neither NLMCXR_reports.tgz, ecgen-radiology/ nor search/; fetch_openi downloads the collection"
    )


@lru_cache(maxsize=1)
def _load_views():
    return json.loads(read_text(Path(__file__).with_name("openi_views.json")))


def _find_fault(path):
    """Returns why an image cannot be read, or ""."""
    try:
        inspect_image(path)
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            image.verify()  # reads the chunks of a PNG to the last and checks their sums
    except (ImageError, OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError for a broken PNG chunk
        return str(error)
    return ""
