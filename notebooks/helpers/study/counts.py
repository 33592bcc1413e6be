"""Counts the images of a study: by subset, finding, view, follow-up and age, and beside NIH's own published counts.

In the tables, `rows` is a DataFrame such as `PackedStudy.index`: a row an image with `image`, `subset`, `patient_id`,
`follow_up`, `age`, `sex`, `view` and a column of 1, 0 or NaN (unknown) for each finding. Columns that count something
are int64, shares are in [0, 1] and of the images whose label is known.
"""

from types import MappingProxyType

import numpy as np
import pandas as pd

from ..runtime.files import as_path
from .labels import PATHOLOGIES, list_findings, load_adjudicated, load_boxes
from .splits import SUBSETS
from .study_folder import load_official_lists

LISTS = ("all", "train_val", "test")

# Images in all, in train_val_list.txt and in test_list.txt, from the files that the NIH Clinical Center distributes
# (Data_Entry_2017_v2020.csv, the two lists, BBox_List_2017.csv) and google2019_nih-chest-xray-labels.csv. The totals
# 112,120, 30,805 and 984 are also in the description of the data set.
PUBLISHED = MappingProxyType(
    {
        "images": (112_120, 86_524, 25_596), "patients": (30_805, 28_008, 2_797), "patients in both lists": (0, 0, 0),
        "Atelectasis": (11_559, 8_280, 3_279), "Cardiomegaly": (2_776, 1_707, 1_069),
        "Effusion": (13_317, 8_659, 4_658), "Infiltration": (19_894, 13_782, 6_112), "Mass": (5_782, 4_034, 1_748),
        "Nodule": (6_331, 4_708, 1_623), "Pneumonia": (1_431, 876, 555), "Pneumothorax": (5_302, 2_637, 2_665),
        "Consolidation": (4_667, 2_852, 1_815), "Edema": (2_303, 1_378, 925), "Emphysema": (2_516, 1_423, 1_093),
        "Fibrosis": (1_686, 1_251, 435), "Pleural_Thickening": (3_385, 2_242, 1_143), "Hernia": (227, 141, 86),
        "No Finding": (60_361, 50_500, 9_861), "several findings": (20_796, 13_053, 7_743),
        "PA": (67_310, 56_214, 11_096), "AP": (44_810, 30_310, 14_500),
        "boxes": (984, 0, 984), "images with boxes": (880, 0, 880), "findings with boxes": (8, 0, 8),
        "boxes of Atelectasis": (180, 0, 180), "boxes of Cardiomegaly": (146, 0, 146),
        "boxes of Effusion": (153, 0, 153), "boxes of Infiltration": (123, 0, 123), "boxes of Mass": (85, 0, 85),
        "boxes of Nodule": (79, 0, 79), "boxes of Pneumonia": (120, 0, 120), "boxes of Pneumothorax": (98, 0, 98),
        "images labeled again": (4_376, 2_414, 1_962),
    }
)  # fmt: skip

_NAMES = list(PATHOLOGIES)
_BANDS = (0, 1, 2, 4, 8, 16, 32, 64)  # lower ends
# Files that a study need not have, and the word in the names of their counts.
_OPTIONAL = MappingProxyType({"BBox_List_2017.csv": "boxes", "google2019_nih-chest-xray-labels.csv": "labeled again"})


def identify_study(study_dir, metadata):
    """Recognizes a study by its label file: only a complete one of NIH can be compared with NIH's counts.

    Args:
        study_dir: path of the folder; `phantom.json` in it marks a synthetic study.
        metadata: DataFrame of `load_metadata`.

    Returns:
        "synthetic"; "nih" where 99 % of the names and patients are of NIH's form and number and at least nine tenths as
        many as NIH's; "part of nih" where they are fewer; or "other".
    """
    if (as_path(study_dir) / "phantom.json").exists():
        return "synthetic"
    n_images, n_patients = PUBLISHED["images"][0], PUBLISHED["patients"][0]
    patients = pd.to_numeric(metadata["image"].str.extract(r"^(\d{8})_\d{3}\.png$", expand=False))
    known = patients.eq(metadata["patient_id"]) & patients.between(1, n_patients)
    if known.mean() < 0.99 or len(metadata) > 1.1 * n_images:
        return "other"
    return "nih" if len(metadata) >= 0.9 * n_images else "part of nih"


def compare_counts(study_dir, metadata, images):
    """Counts label file, lists, boxes and images on disk of a study in NIH's layout, beside NIH's own counts.

    Args:
        study_dir: path of the folder in NIH's layout. Without the two lists there is only the part "all"; boxes and
            radiologists' labels are counted only where their file is there, as they are not in every download.
        metadata: DataFrame of `load_metadata`.
        images: names of the images that there are, such as `PackedStudy.index["image"]`.

    Returns:
        DataFrame, a row for each of `PUBLISHED` and each of `LISTS`: `count` (its name), `part`, `published`, `listed`
        (in the study's files), `difference` (listed less published), `here` (of `listed`, on images in `images`) and
        `share` (here over published, NaN for 0). A difference is a fault only where `identify_study` returns "nih".

    Raises:
        ValueError: a file cannot be read, see the functions that load them.
    """
    try:
        lists = dict(zip(LISTS[1:], load_official_lists(study_dir), strict=True))
    except FileNotFoundError:
        lists = {}
    files = metadata, load_boxes(study_dir), load_adjudicated(study_dir)
    on_disk = set(images)
    listed = _count_lists(files, lists)
    here = _count_lists([file[file["image"].isin(on_disk)] for file in files], lists)
    absent = [word for file, word in _OPTIONAL.items() if not (as_path(study_dir) / file).is_file()]
    table = [
        (name, part, published, listed[part][name], here[part][name])
        for name, counts in PUBLISHED.items()
        for part, published in zip(LISTS, counts, strict=True)
        if part in listed and not any(word in name for word in absent)
    ]
    table = pd.DataFrame(table, columns=["count", "part", "published", "listed", "here"])
    table.insert(4, "difference", table["listed"] - table["published"])
    return table.assign(share=table["here"] / table["published"].replace(0, np.nan))


def _count_lists(files, lists):
    """Returns a dict part -> dict of counts; `files` are labels, boxes and radiologists' labels."""
    counts = {"all": _count(*files)}
    for part, names in lists.items():
        counts[part] = _count(*(file[file["image"].isin(names)] for file in files))
    patients = [set(files[0].loc[files[0]["image"].isin(names), "patient_id"]) for names in lists.values()]
    for part in counts:
        counts[part]["patients in both lists"] = len(set.intersection(*patients)) if patients else 0
    return counts


def _count(rows, boxes, adjudicated):
    n_findings = rows[_NAMES].sum(axis=1)
    counts = {"images": len(rows), "patients": rows["patient_id"].nunique(), **rows[_NAMES].sum()}
    counts |= {"No Finding": n_findings.eq(0).sum(), "several findings": n_findings.gt(1).sum()}
    counts |= {view: rows["view"].eq(view).sum() for view in ("PA", "AP")}
    counts |= {"boxes": len(boxes), "images with boxes": boxes["image"].nunique()}
    counts["findings with boxes"] = boxes["pathology"].nunique()
    counts |= {f"boxes of {name}": boxes["pathology"].eq(name).sum() for name in PATHOLOGIES}
    return {name: int(count) for name, count in counts.items()} | {"images labeled again": len(adjudicated)}


def subset_table(rows):
    """Describes the subsets of a split, since a subset that is another population gives other scores.

    Returns:
        DataFrame, a row a subset: `subset`, `images`, `patients`, `images_per_patient`, and the shares of images
        `no_finding`, `several_findings`, and of those whose view or sex is known `ap` and `female`, NaN where none is;
        `median_age` (years).
    """
    n_findings = rows[[*list_findings(rows)]].sum(axis=1)
    columns = {"no_finding": 1 - _has_any(rows), "several_findings": n_findings.gt(1)}
    columns |= {"ap": _match(rows["view"], "AP"), "female": _match(rows["sex"], "F")}
    groups = rows.assign(**columns).groupby("subset")
    table = groups["patient_id"].agg(images="size", patients="nunique")
    table["images_per_patient"] = table["images"] / table["patients"]
    table = table.join(groups[list(columns)].mean()).assign(median_age=groups["age"].median())
    return table.reindex([subset for subset in SUBSETS if subset in table.index]).reset_index()


def _has_any(rows):
    """Returns 1 where an image has a finding, 0 where it is known to have none, NaN where it cannot be known."""
    labels = rows[[*list_findings(rows)]]
    has = labels.eq(1).any(axis=1)
    return has.astype("float64").where(has | labels.eq(0).all(axis=1))


def _match(column, value):
    """Returns 1 where a column of words has the value, 0 where it has another, NaN where it is unknown."""
    return column.eq(value).astype("float64").where(column.ne("unknown"))


def finding_table(rows):
    """Counts each finding in each subset.

    Returns:
        DataFrame, a row for each subset and finding: `subset`, `pathology`, `images` and `patients` (with it),
        `prevalence` (share of the subset's images, NaN where none is known) and `ap` (share of the images with it that
        are AP, NaN for none).
    """
    table = []
    for subset in SUBSETS:
        images = rows[rows["subset"].eq(subset)]
        for name in list_findings(rows) if len(images) else ():
            found = images[images[name].eq(1)]
            share = _match(found["view"], "AP").mean()
            prevalence = images[name].mean(skipna=True)
            table.append((subset, name, len(found), found["patient_id"].nunique(), prevalence, share))
    return pd.DataFrame(table, columns=["subset", "pathology", "images", "patients", "prevalence", "ap"])


def findings_per_image(rows):
    """Counts the images that have 0, 1, 2 and more findings: DataFrame of `findings` and a column for each subset."""
    counts = pd.crosstab(rows[[*list_findings(rows)]].sum(axis=1).astype("int64"), rows["subset"])
    counts = counts.reindex(range(counts.index.max() + 1), fill_value=0).reindex(columns=list(SUBSETS), fill_value=0)
    return counts.rename_axis("findings").rename_axis(None, axis=1).reset_index()


def count_together(rows):
    """Counts images with both of two findings: DataFrame (findings, findings), on the diagonal those with one."""
    labels = rows[[*list_findings(rows)]].eq(1).astype("int64")
    return labels.T @ labels


def view_table(rows):
    """Compares the views; AP is taken of patients too ill to stand.

    Returns:
        DataFrame, a row a finding and one for "No Finding": `pathology`, `images_pa` and `images_ap` (with it), `pa`
        and `ap` (prevalences, NaN where there is no image of the view), `ratio` (ap over pa, NaN where pa is 0).
    """
    labels = rows[[*list_findings(rows)]]
    labels = labels.assign(**{"No Finding": 1 - _has_any(rows)})
    of_view = {view: labels[rows["view"].eq(view)] for view in ("PA", "AP")}
    table = pd.DataFrame({f"images_{view.lower()}": of_view[view].eq(1).sum() for view in of_view})
    table = table.assign(pa=of_view["PA"].mean(), ap=of_view["AP"].mean())
    table["ratio"] = table["ap"] / table["pa"].replace(0, np.nan)
    return table.rename_axis("pathology").reset_index()


def band_table(rows, numbers):
    """Counts images by bands of a number, 0, 1, 2 to 3, 4 to 7 and so on, and how ill they are.

    Args:
        rows: DataFrame of images.
        numbers: (n,) of each image, such as its follow-up number or the number of its patient's images.

    Returns:
        DataFrame, a row a band that has images: `band`, `images`, `patients`, `any_finding` and `ap` (shares).
    """
    ends = [*(high - 1 for high in _BANDS[1:]), None]
    names = [f"{low}" if low == high else f"{low} to {high}" if high else f"{low} and more"
             for low, high in zip(_BANDS, ends, strict=True)]  # fmt: skip
    bands = pd.Categorical.from_codes(np.searchsorted(_BANDS, numbers, side="right") - 1, names, ordered=True)
    columns = {"band": bands, "any_finding": _has_any(rows), "ap": _match(rows["view"], "AP")}
    groups = rows[["patient_id"]].assign(**columns).groupby("band", observed=True)
    table = groups["patient_id"].agg(images="size", patients="nunique").join(groups[["any_finding", "ap"]].mean())
    return table.reset_index().astype({"band": str})


def age_table(rows):
    """Counts images by decade of age and by sex; those of unknown age are left out.

    Returns:
        DataFrame, a row for each decade and sex that has images: `age` (int64, its first year), `sex`, `images`,
        `any_finding` and `ap` (shares of images).
    """
    known = rows[rows["age"].notna()]
    columns = {"age": (known["age"] // 10 * 10).astype("int64"), "ap": _match(known["view"], "AP")}
    columns["any_finding"] = _has_any(known)
    groups = known[["sex"]].assign(**columns).groupby(["age", "sex"])
    return groups.size().rename("images").to_frame().join(groups[["any_finding", "ap"]].mean()).reset_index()
