"""Tests of evaluation.subgroups on a made-up study in which one group is served worse."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from helpers.evaluation.subgroups import gap_table, list_subgroups, subgroup_table


@pytest.fixture(scope="module")
def study():
    """600 images of 300 patients; the second class is scored at random in women."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(300), 2)
    sex = np.where(patients % 2, "M", "F")
    age = np.where(patients % 7 == 0, np.nan, 20 + patients % 60)
    rows = pd.DataFrame({"patient_id": patients, "sex": sex, "age": age, "view": np.where(patients % 3, "PA", "AP")})
    y = rng.random((600, 2)) < 0.4
    score = np.where(y, 0.7, 0.3) + rng.normal(0, 0.15, y.shape)
    score[sex == "F", 1] = rng.random((sex == "F").sum())
    return rows, y.astype(int), score


def test_groups_cover_the_study(study):
    rows, _, _ = study
    masks = list_subgroups(rows)
    for attribute, expected in (("sex", 600), ("view", 600), ("age", rows["age"].notna().sum())):
        assert sum(mask.sum() for (a, _), mask in masks.items() if a == attribute) == expected
    assert masks["age", "40 to 59"].sum() == rows["age"].between(40, 59.9).sum()
    assert not [group for attribute, group in masks if attribute == "images"]  # all patients have two images
    unknown = rows.assign(age=np.nan, sex="unknown", view=np.where(rows.index < 9, "PA", "unknown"))
    assert [*list_subgroups(unknown)] == [("view", "PA")]


def test_table_has_every_cell_and_equals_sklearn(study):
    rows, y, score = study
    masks = list_subgroups(rows)
    table = subgroup_table(y, score, [0.5, 0.5], masks, rows["patient_id"], ["a", "b"], n_resamples=100)
    assert len(table) == 2 * len(masks)
    for row in table.itertuples():
        mask, c = masks[row.attribute, row.group], "ab".index(row.pathology)
        if row.n_pos:
            assert row.auc == pytest.approx(roc_auc_score(y[mask, c], score[mask, c]))
            assert row.tpr == pytest.approx((score[mask, c] >= 0.5)[y[mask, c] == 1].mean())
            assert row.auc_low <= row.auc <= row.auc_high and row.tpr_low <= row.tpr <= row.tpr_high
            assert not row.small
        else:
            assert np.isnan([row.auc, row.tpr]).all() and row.small
    few = subgroup_table(y, score, None, masks, rows["patient_id"], ["a", "b"], small=1000, n_resamples=20)
    assert few["small"].all() and few["tpr"].isna().all() and few["auc"].notna().any()


def test_gap_finds_the_group_that_is_served_worse(study):
    rows, y, score = study
    masks = list_subgroups(rows)
    table = gap_table(y, score, np.array([0.5, 0.5]), masks, rows["patient_id"], ["a", "b"], n_resamples=300)
    table = table.set_index(["attribute", "pathology"])
    unfair, fair = table.loc[("sex", "b")], table.loc[("sex", "a")]
    assert (unfair["highest"], unfair["lowest"]) == ("M", "F") and unfair["gap_low"] > 0.2
    assert fair["gap"] < 0.15 and fair["gap_low"] < 0.05
    one = {("view", "PA"): masks["view", "PA"]}
    table = gap_table(y, score, np.array([0.5, 0.5]), one, rows["patient_id"], ["a", "b"], n_resamples=10)
    assert table[["highest", "gap", "gap_low"]].isna().all(axis=None)
