"""Unknown labels: for each finding, a row whose label is unknown counts as if it were not there."""

import warnings

import numpy as np
import pandas as pd
import pytest
from drawn_scores import draw, draw_patients
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from helpers.evaluation.auc import (
    auc_table,
    bootstrap_auc,
    delong_test,
    difference_table,
    roc_auc,
    shuffled_auc,
)
from helpers.evaluation.calibration import (
    bootstrap_calibration_error,
    calibration_error,
    fit_platt,
    reliability_curve,
)
from helpers.evaluation.floors import measure_leakage, predict_by_ridge, predict_without_pixels
from helpers.evaluation.predictions import assert_no_labels, join_predictions, load_predictions, name_columns
from helpers.evaluation.subgroups import gap_table, list_subgroups, subgroup_table
from helpers.evaluation.thresholds import choose_thresholds, confusion_at, rates_table, top_k_hits

FEW = {"n_resamples": 40, "seed": 3}


def draw_study(n=600, classes=3, n_patients=80):
    """Labels, each finding's with its own unknown ones, two scores, and a table of the images."""
    y, score = draw(n, classes, seed=5, decimals=1)
    rng = np.random.default_rng(6)
    patients = draw_patients(n, n_patients)
    first = ~pd.Series(patients).duplicated().to_numpy()
    unknown = (rng.random(y.shape) < 0.4) & ~first[:, None]  # a patient without any known label is drawn all the same
    rows = pd.DataFrame({"image": [f"{i}.png" for i in range(n)], "patient_id": patients, "follow_up": 0})
    rows["age"], rows["sex"] = 20 + patients % 60, np.where(patients % 4 < 2, "M", "F")
    rows["view"] = np.where(patients % 3, "PA", "AP")
    return np.where(unknown, np.nan, y), score, score + rng.normal(size=score.shape).round(1), rows


def by_finding(table, findings):
    """The numbers of a table with rows of findings, (numbers, findings)."""
    rows = [table[table["pathology"].eq(name)].select_dtypes("number") for name in findings]
    return np.stack([numbers.to_numpy().ravel() for numbers in rows], axis=1)


# Each takes labels, two scores, rows and names of some findings, and returns (..., findings).
MEASURES = {
    "roc_auc": lambda y, a, b, rows, names: roc_auc(y, a),
    "auc_table": lambda y, a, b, rows, names: by_finding(auc_table(y, a, rows["patient_id"], names, **FEW), names),
    "difference_table": lambda y, a, b, rows, names: by_finding(
        difference_table(y, a, b, rows["patient_id"], names, **FEW), names
    ),
    "delong_test": lambda y, a, b, rows, names: np.stack(delong_test(y, a, b)),
    "bootstrap_auc": lambda y, a, b, rows, names: bootstrap_auc(y, a, rows["patient_id"], **FEW),
    "shuffled_auc": lambda y, a, b, rows, names: shuffled_auc(y, a, rows["patient_id"], 20, seed=1),
    "confusion_at": lambda y, a, b, rows, names: np.stack([*confusion_at(y, a, 0.5).values()]),
    "rates_table": lambda y, a, b, rows, names: by_finding(
        rates_table(y, a, 0.5, rows["patient_id"], names, **FEW), names
    ),
    "youden": lambda y, a, b, rows, names: choose_thresholds(y, a),
    "f1": lambda y, a, b, rows, names: choose_thresholds(y, a, "f1"),
    "sensitivity": lambda y, a, b, rows, names: choose_thresholds(y, a, "sensitivity", 0.8),
    "fit_platt": lambda y, a, b, rows, names: np.stack(fit_platt(y, a)),
    "calibration_error": lambda y, a, b, rows, names: calibration_error(y, expit(a)),
    "bootstrap_calibration_error": lambda y, a, b, rows, names: bootstrap_calibration_error(
        y, expit(a), rows["patient_id"], **FEW
    ),
    "reliability_curve": lambda y, a, b, rows, names: np.stack(
        [reliability_curve(y[:, c], expit(a[:, c])).to_numpy() for c in range(y.shape[1])], axis=-1
    ),
    "subgroup_table": lambda y, a, b, rows, names: by_finding(
        subgroup_table(y, a, np.full(len(names), 0.5), pick_groups(rows), rows["patient_id"], names, **FEW), names
    ),
    "gap_table": lambda y, a, b, rows, names: by_finding(
        gap_table(y, a, np.full(len(names), 0.5), pick_groups(rows), rows["patient_id"], names, **FEW), names
    ),
    "predict_by_ridge": lambda y, a, b, rows, names: predict_by_ridge(rows[["age", "feature"]], y, FEATURES),
    "predict_without_pixels": lambda y, a, b, rows, names: predict_without_pixels(
        add_labels(rows.drop(columns="feature"), names, y), OTHERS, ("age", "sex", "view")
    ),
}
FEATURES = np.random.default_rng(0).normal(30, 20, (50, 2))
OTHERS = pd.DataFrame({"patient_id": -1, "age": [20.0, 40.0, 60.0], "sex": ["F", "M", "F"], "view": ["PA", "AP", "AP"]})


def add_labels(rows, names, y):
    return pd.concat([rows, pd.DataFrame(y, rows.index, names)], axis=1)


def pick_groups(rows):
    return {key: mask for key, mask in list_subgroups(rows).items() if key[0] in ("sex", "view")}


@pytest.mark.parametrize("measure", MEASURES)
def test_masking_a_finding_equals_dropping_its_rows(measure):
    y, a, b, rows = draw_study()
    rows["feature"] = a[:, 0]
    names = ["Mass", "Lung Opacity", "Opacity"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masked = MEASURES[measure](y, a, b, rows, names)
        for c, name in enumerate(names):
            known = ~np.isnan(y[:, c])
            some = [values[known][:, [c]] for values in (y, a, b)]
            dropped = MEASURES[measure](*some, rows[known].reset_index(drop=True), [name])
            np.testing.assert_allclose(masked[..., [c]], dropped, rtol=1e-14)
    assert np.isfinite(masked.astype("float64")).any() and not np.array_equal(masked[..., 0], masked[..., 1])


def test_resamples_draw_patients_of_whom_nothing_is_known():
    """As for the row `mean`, the same patients are drawn for all findings; AUCs equal scikit-learn's on known rows."""
    y, a, _, rows = draw_study(200, 2, 20)
    patients = np.unique(rows["patient_id"])
    y[rows["patient_id"].isin(patients[:8]).to_numpy(), 0] = np.nan
    samples = bootstrap_auc(y, a, rows["patient_id"], 30, seed=2)
    drawn = np.random.default_rng(2).integers(0, 20, (30, 20))
    for sample, places in zip(samples, drawn, strict=True):
        taken = np.concatenate([np.flatnonzero(rows["patient_id"] == patients[place]) for place in places])
        for c in range(2):
            known = taken[~np.isnan(y[taken, c])]
            assert sample[c] == pytest.approx(roc_auc_score(y[known, c], a[known, c]), abs=1e-12)


def test_unknown_labels_are_no_hits_and_their_neighbors_name_nothing():
    y, a, _, rows = draw_study()
    np.testing.assert_array_equal(top_k_hits(y, a, 2), top_k_hits(np.nan_to_num(y), a, 2))
    labels = dict(zip("abc", y.T, strict=True))
    faces = np.random.default_rng(0).integers(0, 255, (len(rows), 8, 8)).astype("uint8")
    leakage = measure_leakage(faces, rows.assign(**labels), seeds=[0])
    assert leakage["auc_by_patient"].notna().all() and abs(leakage["flattery"][0]) < 0.2
    nothing = measure_leakage(faces, rows.assign(**labels | {"a": np.nan}), seeds=[0])
    without = measure_leakage(faces, rows.assign(b=labels["b"], c=labels["c"]), seeds=[0])
    pd.testing.assert_frame_equal(nothing, without)


@pytest.mark.parametrize("n_findings", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_one_finding_and_a_hundred_go_through(tmp_path, n_findings):
    """The last finding is never known; names are of any kind."""
    y, a, b, rows = draw_study(classes=n_findings + 1)
    y[:, -1] = np.nan
    names = [f"Finding {c}, (left) ß" for c in range(n_findings)] + ["Nothing known"]
    rows["feature"] = a[:, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, measure in MEASURES.items():
            columns = slice(None, -1) if name == "reliability_curve" and n_findings == 1 else slice(None)
            if name != "reliability_curve" or n_findings == 1:  # curves of other ties have other numbers of bins
                result = measure(y[:, columns], a[:, columns], b[:, columns], rows, names[columns])
                assert result.shape[-1] == len(names[columns])
        metadata = add_labels(rows.drop(columns="feature"), names, y)
        table = join_predictions(metadata, expit(a), ["test"] * len(rows))
    table.to_csv(tmp_path / "predictions.csv", index=False)
    again, report = load_predictions(tmp_path / "predictions.csv", metadata)
    assert again.attrs["subsets"] == {"test": "test"}
    assert (report.n_joined, report.n_relabeled, report.n_unscored) == (600, 0, 0)
    pd.testing.assert_frame_equal(again.sort_values("image"), table.sort_values("image").reset_index(drop=True))
    of_probs, of_labels = name_columns(names)
    assert list(again) == ["image", "patient_id", "split", *of_probs, *of_labels, "follow_up", "age", "sex", "view"]
    leaked = np.where(np.isnan(y), 0.3, 0.1 + 0.8 * y) + 0.01 * expit(a)
    with pytest.raises(ValueError, match="are the study's labels"):
        assert_no_labels("x.csv", y, leaked)
