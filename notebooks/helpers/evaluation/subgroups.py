"""Measures a classifier in groups of patients: in which it is worse, and how certain that is.

In both tables `thresholds` are the (classes,) operating thresholds, `masks` those of `list_subgroups`, and the other
arguments those of `auc`.
"""

import numpy as np
import pandas as pd

from .auc import auc_table, check_scores
from .bootstrap import bootstrap_ratio, percentile_interval

AGE_BANDS = {"below 40": (0, 40), "40 to 59": (40, 60), "60 and above": (60, np.inf)}  # years
IMAGE_BANDS = {"1": (1, 2), "2 to 5": (2, 6), "6 and more": (6, np.inf)}  # images a patient


def list_subgroups(rows):
    """Sorts images into subgroups by sex, age band, view and number of images a patient has among them.

    Args:
        rows: DataFrame with `patient_id`, `sex`, `age` (years, NaN where unknown), `view`.

    Returns:
        Dict from (attribute, group) to a bool array (n,), in order of display. Images of unknown age, sex or view are
        in no group of it, and a group without images or with all of them is not listed: it compares nothing.
    """
    n_images = rows.groupby("patient_id")["patient_id"].transform("size")
    masks = {("sex", sex): rows["sex"].eq(sex) for sex in ("F", "M")}
    masks |= {("age", band): rows["age"].between(*ends, inclusive="left") for band, ends in AGE_BANDS.items()}
    masks |= {("view", view): rows["view"].eq(view) for view in ("PA", "AP")}
    masks |= {("images", band): n_images.between(*ends, inclusive="left") for band, ends in IMAGE_BANDS.items()}
    return {group: mask.to_numpy() for group, mask in masks.items() if mask.any() and not mask.all()}


def subgroup_table(y_true, y_score, thresholds, masks, groups, class_names, *, small=10, n_resamples=1000, seed=0,
                   level=0.95):  # fmt: skip
    """Builds the table of AUC and true-positive rate in each subgroup.

    A cell with fewer than `small` patients with the finding, or fewer images without it, is marked. Without thresholds,
    None, rates are NaN.

    Returns:
        DataFrame, a row for each subgroup and class: `attribute`, `group`, `pathology`, `n_pos`, `n_neg`,
        `n_pos_patients`, `auc`, `auc_low`, `auc_high`, `tpr`, `tpr_low`, `tpr_high`, `small`.
    """
    y_true, groups = np.asarray(y_true), np.asarray(groups)
    positive, _, score = check_scores(y_true, y_score)
    hit = np.zeros_like(positive) if thresholds is None else positive & (score >= thresholds)
    tables = []
    for (attribute, group), mask in masks.items():
        table = auc_table(y_true[mask], score[mask], groups[mask], class_names, n_resamples, seed, level).iloc[:-1]
        samples = bootstrap_ratio(hit[mask], positive[mask], groups[mask], n_resamples, seed)
        low, high = percentile_interval(samples, level)
        hits = hit[mask].sum(axis=0)
        rates = {"tpr": hits / np.maximum(table["n_pos"].to_numpy(), 1), "tpr_low": low, "tpr_high": high}
        unknown = np.full(len(table), thresholds is None) | table["n_pos"].eq(0).to_numpy()
        table = table.drop(columns="ap").assign(**{name: np.where(unknown, np.nan, v) for name, v in rates.items()})
        is_small = (table["n_pos_patients"] < small) | (table["n_neg"] < small)
        tables.append(table.assign(attribute=attribute, group=group, small=is_small))
    table = pd.concat(tables, ignore_index=True)
    return table[["attribute", "group", *table.columns.drop(["attribute", "group"])]]


def gap_table(y_true, y_score, thresholds, masks, groups, class_names, *, small=10, n_resamples=1000, seed=0,
              level=0.95):  # fmt: skip
    """Builds the table of gaps: the largest difference in true-positive rate between two subgroups of an attribute.

    The pair is chosen for its difference, which makes the gap look large: with many groups some differ by chance. Where
    the interval reaches below 0, the data do not show a difference. Subgroups with fewer than `small` patients with the
    finding are left out; resamples draw the same patients for both groups.

    Returns:
        DataFrame, a row for each attribute and class: `attribute`, `pathology`, `highest` and `lowest` (the groups;
        None where fewer than two are large enough), `gap`, `gap_low`, `gap_high` in [-1, 1].
    """
    groups = np.asarray(groups)
    positive, _, score = check_scores(y_true, y_score)
    hit = positive & (score >= thresholds)
    rows = []
    for attribute in dict.fromkeys(attribute for attribute, _ in masks):
        named = {group: mask for (a, group), mask in masks.items() if a == attribute}
        samples = {
            group: bootstrap_ratio(hit & mask[:, None], positive & mask[:, None], groups, n_resamples, seed)
            for group, mask in named.items()
        }
        for c, name in enumerate(class_names):
            large = {g: m for g, m in named.items() if len(np.unique(groups[m & positive[:, c]])) >= small}
            rates = {group: hit[mask & positive[:, c], c].mean() for group, mask in large.items()}
            row = {"attribute": attribute, "pathology": name, "highest": None, "lowest": None}
            row |= dict.fromkeys(("gap", "gap_low", "gap_high"), np.nan)
            if len(rates) > 1:
                high, low = max(rates, key=rates.get), min(rates, key=rates.get)
                ends = percentile_interval(samples[high][:, c] - samples[low][:, c], level)
                row |= {"highest": high, "lowest": low, "gap": rates[high] - rates[low]}
                row |= {"gap_low": float(ends[0]), "gap_high": float(ends[1])}
            rows.append(row)
    return pd.DataFrame(rows)
