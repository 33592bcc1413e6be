"""Tables of who and what is in a study: parts of the split, findings, co-occurrence, views, follow-ups, ages.

Each function takes `rows`, a DataFrame such as `PackedStudy.index`: a row an image with `subset`, `patient_id`,
`follow_up`, `age`, `sex`, `view` and the 14 labels.
"""

import numpy as np
import pandas as pd

from .labels import PATHOLOGIES
from .splits import SUBSETS

_NAMES = list(PATHOLOGIES)
_BANDS = (0, 1, 2, 4, 8, 16, 32, 64)  # lower ends


def subset_table(rows):
    """Describes the parts of a split, since one that is another population gives other scores.

    Args:
        rows: DataFrame of images.

    Returns:
        DataFrame, a row a part: `subset`, `films`, `patients`, `images_per_patient`, and the shares of images
        `no_finding`, `several_findings`, `ap`, `female`; `median_age` (years).
    """
    n_findings = rows[_NAMES].sum(axis=1)
    columns = {"no_finding": n_findings.eq(0), "several_findings": n_findings.gt(1)}
    columns |= {"ap": rows["view"].eq("AP"), "female": rows["sex"].eq("F")}
    groups = rows.assign(**columns).groupby("subset")
    table = groups["patient_id"].agg(images="size", patients="nunique")
    table["images_per_patient"] = table["films"] / table["patients"]
    table = table.join(groups[list(columns)].mean()).assign(median_age=groups["age"].median())
    return table.reindex([part for part in SUBSETS if part in table.index]).reset_index()


def finding_table(rows):
    """Counts each finding in each part.

    Args:
        rows: DataFrame of images.

    Returns:
        DataFrame, a row for each part and finding: `subset`, `pathology`, `films` and `patients` (int64, with it),
        `prevalence` (share of the part's images) and `ap` (share of the images with it that are AP, NaN for none).
    """
    table = []
    for subset in SUBSETS:
        part = rows[rows["subset"].eq(subset)]
        for name in _NAMES if len(part) else ():
            found = part[part[name].eq(1)]
            share = found["view"].eq("AP").mean() if len(found) else np.nan
            table.append((subset, name, len(found), found["patient_id"].nunique(), len(found) / len(part), share))
    return pd.DataFrame(table, columns=["subset", "pathology", "films", "patients", "prevalence", "ap"])


def findings_per_image(rows):
    """Counts the images that have 0, 1, 2 and more findings: DataFrame of `findings` and a column of int64 a part."""
    counts = pd.crosstab(rows[_NAMES].sum(axis=1).astype("int64"), rows["subset"])
    counts = counts.reindex(range(counts.index.max() + 1), fill_value=0).reindex(columns=list(SUBSETS), fill_value=0)
    return counts.rename_axis("findings").rename_axis(None, axis=1).reset_index()


def count_together(rows):
    """Counts images with both of two findings: int64 DataFrame (14, 14), on the diagonal those with the finding."""
    labels = rows[_NAMES].to_numpy("int64")
    return pd.DataFrame(labels.T @ labels, index=_NAMES, columns=_NAMES)


def view_table(rows):
    """Compares the views, of which AP is that of patients too ill to stand.

    Args:
        rows: DataFrame of images.

    Returns:
        DataFrame, a row a finding and one for "No Finding": `pathology`, `images_pa`, `images_ap` (int64, with it), `pa`
        and `ap` (prevalences, NaN where there is no image of the view), `ratio` (ap over pa, NaN where pa is 0).
    """
    labels = rows[_NAMES].assign(**{"No Finding": rows[_NAMES].sum(axis=1).eq(0)}).astype("int64")
    of_view = {view: labels[rows["view"].eq(view)] for view in ("PA", "AP")}
    table = pd.DataFrame({f"images_{view.lower()}": of_view[view].sum() for view in of_view})
    table = table.assign(pa=of_view["PA"].mean(), ap=of_view["AP"].mean())
    table["ratio"] = table["ap"] / table["pa"].replace(0, np.nan)
    return table.rename_axis("pathology").reset_index()


def band_table(rows, numbers):
    """Counts images by bands of a number, 0, 1, 2 to 3, 4 to 7 and so on, and how ill they are.

    Args:
        rows: DataFrame of images.
        numbers: (n,) of each image, such as its follow-up number or the images of its patient.

    Returns:
        DataFrame, a row a band that has images: `band`, `films`, `patients`, `any_finding` and `ap` (shares of images).
    """
    ends = [*(high - 1 for high in _BANDS[1:]), None]
    names = [f"{low}" if low == high else f"{low} to {high}" if high else f"{low} and more"
             for low, high in zip(_BANDS, ends, strict=True)]  # fmt: skip
    bands = pd.Categorical.from_codes(np.searchsorted(_BANDS, numbers, side="right") - 1, names, ordered=True)
    columns = {"band": bands, "any_finding": rows[_NAMES].any(axis=1), "ap": rows["view"].eq("AP")}
    groups = rows[["patient_id"]].assign(**columns).groupby("band", observed=True)
    table = groups["patient_id"].agg(images="size", patients="nunique").join(groups[["any_finding", "ap"]].mean())
    return table.reset_index().astype({"band": str})


def age_table(rows):
    """Counts images by decade of age and by sex.

    Args:
        rows: DataFrame of images; those of unknown age are left out.

    Returns:
        DataFrame, a row for each decade and sex that has images: `age` (int64, its first year), `sex`, `films`,
        `any_finding` and `ap` (shares of images).
    """
    known = rows[rows["age"].notna()]
    columns = {"age": (known["age"] // 10 * 10).astype("int64"), "ap": known["view"].eq("AP")}
    columns["any_finding"] = known[_NAMES].any(axis=1)
    groups = known[["sex"]].assign(**columns).groupby(["age", "sex"])
    return groups.size().rename("films").to_frame().join(groups[["any_finding", "ap"]].mean()).reset_index()
