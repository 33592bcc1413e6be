"""What is in NIH ChestX-ray14 as it is distributed, and how a study on disk compares with it."""

from types import MappingProxyType

import numpy as np
import pandas as pd

from ..runtime.files import as_path
from .labels import PATHOLOGIES, load_adjudicated, load_boxes, load_official_lists

LISTS = ("all", "train_val", "test")

# Images in all, in train_val_list.txt and in test_list.txt, from the files that the NIH Clinical Center distributes
# (Data_Entry_2017_v2020.csv, the two lists, BBox_List_2017.csv) and google2019_nih-chest-xray-labels.csv. Totals are
# also those of the data set's own description: 112,120 images of 30,805 patients, 984 boxes.
PUBLISHED = MappingProxyType(
    {
        "films": (112_120, 86_524, 25_596),
        "patients": (30_805, 28_008, 2_797),
        "patients in both lists": (0, 0, 0),
        "Atelectasis": (11_559, 8_280, 3_279),
        "Cardiomegaly": (2_776, 1_707, 1_069),
        "Effusion": (13_317, 8_659, 4_658),
        "Infiltration": (19_894, 13_782, 6_112),
        "Mass": (5_782, 4_034, 1_748),
        "Nodule": (6_331, 4_708, 1_623),
        "Pneumonia": (1_431, 876, 555),
        "Pneumothorax": (5_302, 2_637, 2_665),
        "Consolidation": (4_667, 2_852, 1_815),
        "Edema": (2_303, 1_378, 925),
        "Emphysema": (2_516, 1_423, 1_093),
        "Fibrosis": (1_686, 1_251, 435),
        "Pleural_Thickening": (3_385, 2_242, 1_143),
        "Hernia": (227, 141, 86),
        "No Finding": (60_361, 50_500, 9_861),
        "several findings": (20_796, 13_053, 7_743),
        "PA": (67_310, 56_214, 11_096),
        "AP": (44_810, 30_310, 14_500),
        "boxes": (984, 0, 984),
        "images with boxes": (880, 0, 880),
        "findings with boxes": (8, 0, 8),
        "boxes of Atelectasis": (180, 0, 180),
        "boxes of Cardiomegaly": (146, 0, 146),
        "boxes of Effusion": (153, 0, 153),
        "boxes of Infiltration": (123, 0, 123),
        "boxes of Mass": (85, 0, 85),
        "boxes of Nodule": (79, 0, 79),
        "boxes of Pneumonia": (120, 0, 120),
        "boxes of Pneumothorax": (98, 0, 98),
        "images judged anew": (4_376, 2_414, 1_962),
    }
)

_COMPLETE = 0.9  # of the images; a label file with fewer rows is a part on purpose, not one that lost some
# What the counts of files that a study need not have are called.
_OF_FILE = MappingProxyType({"BBox_List_2017.csv": "boxes", "google2019_nih-chest-xray-labels.csv": "judged anew"})
_NIH_NAME = r"(\d{8})_\d{3}\.png"  # patient and number


def identify_study(study_dir, metadata):
    """Tells what a study's label file is, since only a complete one of NIH can be compared with NIH's counts.

    Args:
        study_dir: path of the folder; `phantom.json` in it marks a synthetic study.
        metadata: frame of `load_metadata`.

    Returns:
        "synthetic"; "nih" where 99 % of the names and patients are of NIH's form and number and at least nine tenths as
        many as NIH's; "part of nih" where they are fewer; or "other".
    """
    if (as_path(study_dir) / "phantom.json").exists():
        return "synthetic"
    patients = pd.to_numeric(metadata["image"].str.extract(f"^{_NIH_NAME}$", expand=False))
    known = patients.eq(metadata["patient_id"]) & patients.between(1, PUBLISHED["patients"][0])
    if known.mean() < 0.99 or len(metadata) > 1.1 * PUBLISHED["films"][0]:
        return "other"
    return "nih" if len(metadata) >= _COMPLETE * PUBLISHED["films"][0] else "part of nih"


def compare_counts(study_dir, metadata, images):
    """Counts a study's label file, lists and boxes, and its images on disk, beside NIH's own counts.

    Args:
        study_dir: path of the folder in NIH's layout. Without the two lists there is only the part "all", and of boxes
            and adjudicated labels nothing is counted where their file is not there, as in NIH's Box and at Kaggle.
        metadata: frame of `load_metadata`.
        images: names of the images that there are, such as `PackedStudy.index["image"]`.

    Returns:
        DataFrame, a row for each of `PUBLISHED` and each of `LISTS`: `count` (its name), `part`, `published`, `listed`
        (in the study's files), `difference` (listed less published), `here` (of that, on images in `images`; int64) and
        `share` (here over published, NaN for 0). A difference is a fault only where `identify_study` says "nih".

    Raises:
        ValueError: a file cannot be read, see the functions that load them.
    """
    try:
        lists = dict(zip(LISTS[1:], load_official_lists(study_dir), strict=True))
    except FileNotFoundError:
        lists = {}
    files = metadata, load_boxes(study_dir), load_adjudicated(study_dir)
    on_disk, columns = set(images), {}
    columns["listed"] = _count_all(files, lists)
    columns["here"] = _count_all([file[file["image"].isin(on_disk)] for file in files], lists)
    parts = ("all", *lists)
    lacking = [file for file in _OF_FILE if not (as_path(study_dir) / file).is_file()]
    names = [name for name in PUBLISHED if not any(_OF_FILE[file] in name for file in lacking)]
    keys = [(name, part) for name in names for part in parts]
    table = pd.DataFrame(keys, columns=["count", "part"])
    table["published"] = [PUBLISHED[name][LISTS.index(part)] for name, part in keys]
    table["listed"] = [columns["listed"][part][name] for name, part in keys]
    table["difference"] = table["listed"] - table["published"]
    table["here"] = [columns["here"][part][name] for name, part in keys]
    table["share"] = table["here"] / table["published"].replace(0, np.nan)
    return table


def _count_all(files, lists):
    """Returns a dict part -> dict of counts; `files` are labels, boxes and adjudicated labels."""
    counts = {"all": _count(*files)}
    for part, names in lists.items():
        counts[part] = _count(*(file[file["image"].isin(names)] for file in files))
    patients = [set(files[0].loc[files[0]["image"].isin(names), "patient_id"]) for names in lists.values()]
    for part in counts:
        counts[part]["patients in both lists"] = len(set.intersection(*patients)) if patients else 0
    return counts


def _count(rows, boxes, adjudicated):
    n_findings = rows[list(PATHOLOGIES)].sum(axis=1)
    counts = {"films": len(rows), "patients": rows["patient_id"].nunique(), **rows[list(PATHOLOGIES)].sum()}
    counts |= {"No Finding": n_findings.eq(0).sum(), "several findings": n_findings.gt(1).sum()}
    counts |= {view: rows["view"].eq(view).sum() for view in ("PA", "AP")}
    counts |= {"boxes": len(boxes), "images with boxes": boxes["image"].nunique()}
    counts["findings with boxes"] = boxes["pathology"].nunique()
    counts |= {f"boxes of {name}": boxes["pathology"].eq(name).sum() for name in PATHOLOGIES}
    return {name: int(count) for name, count in counts.items()} | {"images judged anew": len(adjudicated)}
