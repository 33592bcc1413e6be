"""Tests of evaluation.external on drawn scores: known drops, known shifts, and what is chosen on whom."""

import numpy as np
import pandas as pd
import pytest
from drawn_scores import draw, draw_patients
from scipy.special import expit, logit

from helpers.evaluation.auc import auc_table, bootstrap_auc, roc_auc
from helpers.evaluation.calibration import apply_platt, calibration_error, fit_platt
from helpers.evaluation.external import (
    draw_share,
    drop_table,
    pair_labels,
    pair_scores,
    read_external,
    recalibration_table,
)
from helpers.evaluation.thresholds import choose_thresholds, confusion_at
from helpers.study import PATHOLOGIES
from helpers.study.finding_names import match_findings


def draw_site(n, n_patients, seed, strength, shift=0.0):
    """Labels and probabilities that are right, but for a shift of the logits; of two findings."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 2)) * strength - 1
    return (rng.random(z.shape) < expit(z)).astype(float), expit(z + shift), draw_patients(n, n_patients, seed)


def test_the_drop_is_the_difference_of_two_independent_sides():
    here, there = draw_site(600, 200, 0, 2.0), draw_site(300, 90, 1, 0.5)
    there[0][:40, 0] = np.nan
    table = drop_table(here, there, ["a", "b"], 200, seed=3, level=0.9)
    np.testing.assert_array_equal(table["auc_here"], roc_auc(*here[:2]))
    np.testing.assert_array_equal(table["auc_there"], roc_auc(*there[:2]))
    np.testing.assert_array_equal(table["drop"], table["auc_here"] - table["auc_there"])
    samples = bootstrap_auc(*here, 200, 3) - bootstrap_auc(*there, 200, 4)
    ends = np.quantile(samples, [0.05, 0.95], axis=0)
    np.testing.assert_allclose(table[["drop_low", "drop_high"]].T, ends, atol=1e-8)
    alone = auc_table(*there, ["a", "b"], 200, seed=4, level=0.9)[["auc_low", "auc_high"]].to_numpy()[:2]
    np.testing.assert_array_equal(table[["auc_there_low", "auc_there_high"]], alone)
    assert (table["drop_low"] > 0.05).all() and table["n_pos_there"].tolist() == (there[0] == 1).sum(axis=0).tolist()
    assert table["prevalence_there"][0] == pytest.approx(np.nanmean(there[0][:, 0]))
    same = drop_table(here, draw_site(600, 200, 2, 2.0), ["a", "b"], 200)
    assert (same["drop_low"] < 0).all() and (same["drop_high"] > 0).all()


def test_the_interval_of_the_drop_covers():
    """Of 40 pairs of samples of one population, the interval of 90 % should hold no drop in nine tenths."""
    held = []
    for seed in range(40):
        sites = (draw_site(150, 50, (seed, number), 1.5) for number in range(2))
        table = drop_table(*sites, ["a", "b"], 100, level=0.9)
        held += [*(table["drop_low"].lt(0) & table["drop_high"].gt(0))]
    assert 0.82 <= np.mean(held) <= 0.97


def test_recalibration_is_chosen_on_the_share_and_measured_on_the_rest():
    y, probs, groups = draw_site(3000, 900, 5, 1.5, shift=2.0)
    y[:100, 1] = np.nan
    in_share = draw_share(groups, 0.3, seed=2)
    assert not set(groups[in_share]) & set(groups[~in_share])
    assert len(set(groups[in_share])) == round(0.3 * len(set(groups)))
    table = recalibration_table((y, probs, groups), ["a", "b"], [0.5, np.nan], in_share, n_resamples=100)
    table = table.set_index(["finding", "version"])
    as_it_comes, after = (table.xs(version, level="version") for version in ("as it comes", "recalibrated"))
    assert (as_it_comes["error"] > 0.2).all() and (after["error"] < 0.06).all()
    assert (as_it_comes["mean_prob"] > after["prevalence_rest"] + 0.2).all()
    np.testing.assert_allclose(after["mean_prob"], after["prevalence_rest"], atol=0.04)
    np.testing.assert_array_equal(as_it_comes["error"], calibration_error(y[~in_share], probs[~in_share]))
    scaled = apply_platt(logit(probs), *fit_platt(y[in_share], logit(probs)[in_share]))
    threshold = choose_thresholds(y[in_share], scaled[in_share])
    np.testing.assert_allclose(after["threshold"], threshold)
    at = confusion_at(y[~in_share], scaled[~in_share], threshold)
    for name in ("sensitivity", "specificity"):
        np.testing.assert_allclose(after[name], at[name])
    assert after["n_pos_share"].tolist() == (y[in_share] == 1).sum(axis=0).tolist()
    assert np.isnan(as_it_comes.loc["b", ["threshold", "sensitivity", "sensitivity_low"]].astype(float)).all()
    # What is in the rest changes nothing of what is chosen.
    flipped = np.where(in_share[:, None], y, 1 - y)
    other = recalibration_table((flipped, probs, groups), ["a", "b"], [0.5, 0.5], in_share, n_resamples=10)
    assert other["threshold"][2:].tolist() == after["threshold"].tolist()


def test_a_share_without_the_finding_leaves_the_probabilities():
    y, probs, groups = draw_site(200, 60, 6, 1.0)
    in_share = draw_share(groups, 0.001)
    assert len(set(groups[in_share])) == 1
    y[in_share] = 0
    table = recalibration_table((y, probs, groups), ["a", "b"], [0.5, 0.5], in_share, n_resamples=10)
    assert table["threshold"].isna().tolist() == [False, False, True, True]
    np.testing.assert_allclose(table["error"][:2], table["error"][2:])


def test_several_findings_count_as_one():
    matches, _ = match_findings(["Nodule", "Effusion", "Mass"], ["Lung Lesion", "Pleural Effusion"])
    scores = np.array([[0.1, 0.2, 0.3], [0.6, 0.5, 0.4]])
    assert pair_scores(matches, ["Nodule", "Effusion", "Mass"], scores).tolist() == [[0.3, 0.2], [0.6, 0.5]]
    rows = pd.DataFrame({"Nodule": [1, 0, 0, np.nan], "Mass": [np.nan, 0, np.nan, 1], "Effusion": [0, 1, np.nan, 0]})
    expected = [[1, 0], [0, 1], [np.nan, np.nan], [1, 0]]
    np.testing.assert_array_equal(pair_labels(matches, "ours", rows), expected)


def write_csv(path, **columns):
    y, score = draw(40, 14)
    table = pd.DataFrame({"image": [f"{i:03d}.png" for i in range(40)]})
    table = table.join(pd.DataFrame(expit(score), columns=[f"prob_{name}" for name in PATHOLOGIES]))
    table.assign(**columns).iloc[:, ::-1].to_csv(path, index=False)
    return y


def test_answers_on_another_study_are_read_from_one_file(tmp_path):
    path = tmp_path / "other.csv"
    lesion = [1, 0, None, 0] * 10
    columns = {"label_Lung Lesion": lesion, "label_Edema": 0, "patient_id": ["007"] * 40, "view": ["PA", None] * 20}
    write_csv(path, **columns)
    external = read_external(path, PATHOLOGIES)
    assert (external.name, external.findings, external.has_patients) == ("other", ("Edema", "Lung Lesion"), True)
    assert external.probs.shape == (40, 14) and set(external.rows["patient_id"]) == {"007"}
    assert external.rows["Lung Lesion"].isna().sum() == 10 and set(external.rows["view"]) == {"PA", "unknown"}
    write_csv(path, label_Edema=1)
    external = read_external(path, PATHOLOGIES)
    assert (
        not external.has_patients
        and external.rows["patient_id"].is_unique
        and set(external.rows["view"]) == {"unknown"}
    )
    write_csv(path)
    with pytest.raises(ValueError, match=r"other.csv has no column label_"):
        read_external(path, PATHOLOGIES)
    write_csv(path, label_Edema=2)
    with pytest.raises(ValueError, match=r"other.csv: label_Edema may hold 0, 1"):
        read_external(path, PATHOLOGIES)
    with pytest.raises(FileNotFoundError):
        read_external(tmp_path / "absent.csv", PATHOLOGIES)
