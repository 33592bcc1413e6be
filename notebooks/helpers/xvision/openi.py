"""The Indiana chest radiographs of Open-i: labeled Normal or Nodule, frontal images chosen, matched to files.

Each of the 3,955 reports is of one visit of one patient, with 7,470 images in all, and has the terms by which trained
indexers coded it. docs/openi.md says how labels and views were checked. Cite Demner-Fushman et al., Preparing a
collection of radiology examinations for distribution and retrieval, JAMIA 23(2), 2016; each report is licensed under CC
BY-NC-ND 4.0.
"""

import json
from functools import lru_cache
from pathlib import Path

import pandas as pd
from PIL import Image

from ..packing.image_files import ImageError, inspect_image
from ..runtime.files import as_path, read_text
from ..study.labels import NODULE_CLASSES
from .openi_files import REPORTS, read_openi_reports

_VIEWS = ("frontal", "both")


def label_openi(reports):
    """Labels images by the indexers' terms.

    Normal: the only term is "normal". Nodule: a term has the heading Nodule, as in Nodule/lung/upper lobe/right. All
    else is left out, also what may look like a nodule and is coded otherwise: Granuloma, Calcified Granuloma, Mass, the
    enlarged "lymph nodes", and nodules that only the automatic terms name.

    Args:
        reports: frame of `read_openi_reports`.

    Returns:
        Series of str, "Normal", "Nodule" or "", with the index of `reports`.
    """

    def label(terms):
        headings = [term.split("/")[0].strip().casefold() for term in terms]
        return "Normal" if headings == ["normal"] else "Nodule" if "nodule" in headings else ""

    return pd.Series([label(terms) for terms in reports["terms"]], index=reports.index, dtype=str, name="label")


def find_frontal(reports):
    """Finds the one image of each study that is taken as frontal: the first, but for 584 of 3,851 studies.

    Neither reports nor names say the view. The authors of TorchXRayVision sorted the first images by their pixels;
    where the first of two is lateral, the second is taken, and 218 studies have none. A second frontal image of a study
    is not taken.

    Args:
        reports: frame of `read_openi_reports`.

    Returns:
        Series of bool with the index of `reports`.
    """
    number = reports["study"].str.removeprefix("CXR").astype("int64")
    second, none = (number.isin(_load_views()[key]) for key in ("second", "none"))
    return (reports["position"] == 1 + second) & ~none


def load_openi_images(folder, views="frontal"):
    """Loads the images of classes Normal and Nodule from a folder of `fetch_openi`, labeled and checked.

    Images that are missing or broken are counted and left out. Images are read to their end and compared with their
    checksums, but not decoded.

    Args:
        folder: path of a folder with NLMCXR_reports.tgz, and with images at any depth.
        views: "frontal", at most one image of a patient, see `find_frontal`; or "both".

    Returns:
        Tuple of a DataFrame, sorted by image, with `image` (str), `path` (str), `patient_id` (str, the study: split by
        it) and `label` (int8, 0 Normal, 1 Nodule), and a dict of counts: `reports` that were read, with images or
        without; `images of other reports`, neither Normal nor Nodule; `other views`, labeled images that `views` leaves
        out; `missing images` and `broken images` of those that remain.

    Raises:
        FileNotFoundError: there are no reports or none of their images.
        ValueError: unknown `views`, two files have the same name, or only one class is left.
    """
    if views not in _VIEWS:
        raise ValueError(f"views is {views!r}; expected one of {', '.join(_VIEWS)}")
    reports = read_openi_reports(as_path(folder) / REPORTS)
    paths = _list_images(folder)
    if not set(paths) & set(reports["image"]):
        others = f"{len(paths)} others, for instance {min(paths)}" if paths else "no PNG at all"
        raise FileNotFoundError(
            f"{folder}: none of the {len(reports)} images that the reports name is here, but {others}; images keep the "
            "names that Open-i gave them, such as CXR1_1_IM-0001-3001.png: fetch_openi downloads them"
        )
    reports = reports.assign(label=label_openi(reports), path=reports["image"].map(paths))
    labeled = reports[reports["label"] != ""]
    chosen = labeled[find_frontal(labeled)] if views == "frontal" else labeled
    found = chosen[chosen["path"].notna()]
    images = found[[_is_intact(path) for path in found["path"]]]
    counts = {
        "reports": reports.attrs["n_reports"],
        "images of other reports": len(reports) - len(labeled),
        "other views": len(labeled) - len(chosen),
        "missing images": len(chosen) - len(found),
        "broken images": len(found) - len(images),
    }
    n_normal, n_nodule = (int(images["label"].eq(name).sum()) for name in NODULE_CLASSES)
    if not n_normal or not n_nodule:
        raise ValueError(
            f"{folder}: {n_normal} images are Normal and {n_nodule} Nodule, and both are needed; "
            f"{counts['missing images']} are missing and {counts['broken images']} broken: download the rest"
        )
    frame = images.rename(columns={"study": "patient_id"})[["image", "path", "patient_id", "label"]]
    frame["label"] = frame["label"].map(NODULE_CLASSES.index).astype("int8")
    frame.attrs = {}
    return frame.reset_index(drop=True), counts


def _list_images(folder):
    """Returns a dict from the name of each PNG in a folder, at any depth, to its path as text."""
    paths = {}
    for path in sorted(as_path(folder).rglob("*.png")):
        if path.name in paths:
            raise ValueError(f"two images are called {path.name}: {paths[path.name]} and {path}; remove one")
        paths[path.name] = str(path)
    return paths


@lru_cache(maxsize=1)
def _load_views():
    return json.loads(read_text(Path(__file__).with_name("openi_views.json")))


def _is_intact(path):
    """Returns whether an image can be read to its end."""
    try:
        inspect_image(path)
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            image.verify()  # reads the chunks of a PNG to the last and checks their sums
    except (ImageError, OSError, SyntaxError, ValueError):  # Pillow raises SyntaxError for a broken PNG chunk
        return False
    return True
