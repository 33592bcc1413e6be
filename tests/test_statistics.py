"""Tests of helpers.statistics against scikit-learn, brute force and known answers."""

import warnings

import numpy as np
import pytest
from scipy.special import expit
from sklearn import metrics

from helpers.statistics import (
    auc_table,
    average_precision,
    bootstrap_auc,
    choose_thresholds,
    confusion_at,
    fit_platt,
    percentile_interval,
    precision_recall_curve,
    roc_auc,
    roc_curve,
    top_k_recall,
)


def draw(n=300, classes=4, seed=0, decimals=None):
    """Labels and scores that carry some signal; few decimals make many ties."""
    rng = np.random.default_rng(seed)
    y = (rng.random((n, classes)) < np.linspace(0.4, 0.05, classes)).astype("uint8")
    score = rng.normal(size=(n, classes)) + 0.7 * y
    return y, score if decimals is None else np.round(score, decimals)


def draw_patients(n, n_patients, seed=0):
    return np.random.default_rng(seed).integers(0, n_patients, n) * 10 + 7


def resample_rows(groups, n_resamples, seed):
    """Rows of each resample, drawn as the documented method says: patients with replacement, with all their images."""
    patients = np.unique(groups)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(patients), size=(n_resamples, len(patients)))
    return [np.concatenate([np.flatnonzero(groups == patients[i]) for i in row]) for row in drawn]


@pytest.mark.parametrize("decimals", [None, 1, 0])
@pytest.mark.parametrize("seed", range(3))
def test_auc_and_average_precision_equal_sklearn(decimals, seed):
    y, score = draw(seed=seed, decimals=decimals)
    np.testing.assert_allclose(roc_auc(y, score), metrics.roc_auc_score(y, score, average=None), atol=1e-12, rtol=0)
    expected = metrics.average_precision_score(y, score, average=None)
    np.testing.assert_allclose(average_precision(y, score), expected, atol=1e-12, rtol=0)


def test_auc_equals_pair_counting():
    rng = np.random.default_rng(1)
    for _ in range(50):
        y, score = rng.integers(0, 2, 12), rng.integers(0, 4, 12)
        if 0 < y.sum() < 12:
            pairs = [(p > q) + 0.5 * (p == q) for p in score[y == 1] for q in score[y == 0]]
            assert roc_auc(y, score) == pytest.approx([np.mean(pairs)], abs=1e-14)


def test_single_class_columns_and_empty_input_are_nan():
    y = np.array([[0, 1, 0], [0, 1, 1]])
    score = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(roc_auc(y, score), [np.nan, np.nan, 1])
        np.testing.assert_array_equal(average_precision(y, score), [np.nan, 1, 1])
        np.testing.assert_array_equal(choose_thresholds(y, score), [np.nan, np.nan, 0.6])
        samples = bootstrap_auc(y, score, [1, 2], 50)
        assert np.isnan(samples[:, :2]).all()
        # A resample with one of the two patients only has one class.
        assert 0 < np.isnan(samples[:, 2]).sum() < 50
        empty = np.zeros((0, 3))
        for figure in (roc_auc, average_precision, choose_thresholds):
            np.testing.assert_array_equal(figure(empty, empty), [np.nan] * 3)
        assert np.isnan(bootstrap_auc(empty, empty, [], 10)).all()
        assert np.isnan(top_k_recall(empty, empty))
        np.testing.assert_array_equal(fit_platt(empty, empty), [[1, 1, 1], [0, 0, 0]])
        np.testing.assert_array_equal(confusion_at(empty, empty, 0.5)["tp"], [0, 0, 0])
        np.testing.assert_array_equal(confusion_at(empty, empty, 0.5)["ppv"], [np.nan] * 3)
        fpr, tpr, _ = roc_curve([0, 0], [0.1, 0.2])
        assert np.isnan(tpr).all()
        assert fpr[-1] == 1
        assert np.isnan(precision_recall_curve([0, 0], [0.1, 0.2])[1][:-1]).all()


@pytest.mark.parametrize(
    ("y", "score", "text"),
    [
        ([[0, 1], [1, 0]], [[0.1, 0.2], [0.3, np.nan]], "score nan in row 1, class 1"),
        ([[0, 1], [1, 0]], [[0.1, np.inf], [0.3, 0.4]], "score inf in row 0, class 1"),
        ([[0, 1], [2, 0]], [[0.1, 0.2], [0.3, 0.4]], "label 2 in row 1, class 0"),
        ([[0, np.nan], [1, 0]], [[0.1, 0.2], [0.3, 0.4]], "label nan in row 0, class 1"),
        ([[0, 1]], [[0.1, 0.2], [0.3, 0.4]], r"\(1, 2\).*\(2, 2\)"),
        ([[[0]]], [[[0.5]]], r"\(1, 1, 1\)"),
    ],
)
def test_malformed_input_is_refused(y, score, text):
    for figure in (roc_auc, average_precision, choose_thresholds, fit_platt, top_k_recall):
        with pytest.raises(ValueError, match=text):
            figure(y, score)
    with pytest.raises(ValueError, match=text):
        bootstrap_auc(y, score, np.arange(len(y)))


@pytest.mark.parametrize("decimals", [None, 0])
def test_bootstrap_equals_sklearn_on_the_repeated_rows(decimals):
    y, score = draw(200, decimals=decimals)
    groups = draw_patients(200, 40)
    samples = bootstrap_auc(y, score, groups, n_resamples=150, seed=3)  # More than one chunk of resamples.
    assert samples.shape == (150, 4)
    compared = 0
    for r in range(0, 128, 9):
        rows = resample_rows(groups, 128, 3)[r]
        for c in range(4):
            if len(np.unique(y[rows, c])) == 2:
                assert samples[r, c] == pytest.approx(metrics.roc_auc_score(y[rows, c], score[rows, c]), abs=1e-12)
                compared += 1
    assert compared > 40


def test_bootstrap_is_repeatable_and_pairs_models():
    y, score = draw()
    groups = draw_patients(300, 60)
    samples = bootstrap_auc(y, score, groups, 20, seed=1)
    np.testing.assert_array_equal(samples, bootstrap_auc(y, score, groups, 20, seed=1))
    assert not np.array_equal(samples, bootstrap_auc(y, score, groups, 20, seed=2))
    # A class gives the same samples alone, and any rising function of the scores gives them too.
    np.testing.assert_array_equal(samples[:, [2]], bootstrap_auc(y[:, 2], expit(score[:, 2]), groups, 20, seed=1))
    order = np.random.default_rng(0).permutation(300)
    np.testing.assert_array_equal(samples, bootstrap_auc(y[order], score[order], groups[order], 20, seed=1))


def test_bootstrap_draws_patients_not_images():
    y, score = draw(60, 1)
    copies = [np.repeat(values, 20, axis=0) for values in (y, score, np.arange(60))]
    by_patient = bootstrap_auc(*copies, n_resamples=400)
    np.testing.assert_allclose(by_patient, bootstrap_auc(y, score, np.arange(60), n_resamples=400), atol=1e-12)
    by_image = bootstrap_auc(copies[0], copies[1], np.arange(1200), n_resamples=400)
    assert by_patient.std() > 3 * by_image.std()
    with pytest.raises(ValueError, match=r"groups has shape \(59,\)"):
        bootstrap_auc(y, score, np.arange(59))


def test_percentile_interval_passes_over_nan():
    samples = np.column_stack([np.arange(101.0), np.full(101, np.nan), np.arange(101.0)])
    samples[51:, 2] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low, high = percentile_interval(samples, 0.9)
        none = percentile_interval(np.zeros((0, 2)))
    np.testing.assert_allclose(low, [5, np.nan, 2.5])
    np.testing.assert_allclose(high, [95, np.nan, 47.5])
    assert np.isnan(none).all()
    assert percentile_interval(np.arange(101), 0.5) == (25, 75)
    with pytest.raises(ValueError, match="level"):
        percentile_interval(samples, 95)


def test_auc_table_values():
    y, score = draw(400)
    y[:, 3] = 0
    groups = draw_patients(400, 90)
    table = auc_table(y, score, groups, list("abcd"), n_resamples=300, seed=4, level=0.9)
    columns = ["pathology", "n_pos", "n_neg", "n_pos_patients", "auc", "auc_low", "auc_high", "ap"]
    assert list(table.columns) == columns
    assert table["pathology"].tolist() == ["a", "b", "c", "d", "mean"]
    np.testing.assert_array_equal(table["n_pos"], [*y.sum(axis=0), y.sum()])
    np.testing.assert_array_equal(table["n_neg"], [*(1 - y).sum(axis=0), (1 - y).sum()])
    patients = [len(set(groups[y[:, c] == 1])) for c in range(4)]
    np.testing.assert_array_equal(table["n_pos_patients"], [*patients, sum(patients)])
    assert {str(kind) for kind in table.dtypes[1:4]} == {"int64"}
    np.testing.assert_array_equal(table["auc"][:4], roc_auc(y, score))
    assert table["auc"][4] == pytest.approx(roc_auc(y, score)[:3].mean())
    assert table["ap"][4] == pytest.approx(average_precision(y, score)[:3].mean())
    assert table.loc[3, ["auc", "auc_low", "auc_high", "ap"]].isna().all()
    samples = bootstrap_auc(y, score, groups, 300, 4)[:, :3]
    expected = np.quantile(np.column_stack([samples, samples.mean(axis=1)]), [0.05, 0.95], axis=0)
    np.testing.assert_allclose(table.loc[[0, 1, 2, 4], ["auc_low", "auc_high"]].T, expected, atol=1e-8)
    with pytest.raises(ValueError, match="2 class names for 4 columns"):
        auc_table(y, score, groups, ["a", "b"])


@pytest.mark.parametrize("n", [0, 1, 2, 5, 12])
@pytest.mark.parametrize("seed", range(5))
def test_auc_table_of_tiny_studies(n, seed):
    y, score = draw(n, seed=seed, decimals=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = auc_table(y, score, draw_patients(n, 3, seed), list("abcd"), n_resamples=20)
    defined = [0 < y[:, c].sum() < n for c in range(4)]
    assert table["auc"].notna().tolist() == [*defined, any(defined)]
    for column in ("auc_low", "auc_high"):
        assert table[column].notna().tolist() == table["auc"].notna().tolist()
    known = table.dropna(subset="auc")
    assert ((known["auc_low"] >= 0) & (known["auc_low"] <= known["auc"])).all()
    assert ((known["auc"] <= known["auc_high"]) & (known["auc_high"] <= 1)).all()


def test_interval_contains_an_estimate_that_no_resample_reaches():
    y, score = np.array([0, 1, 0, 1]), np.array([0.1, 0.2, 0.3, 0.4])
    for seed in range(30):
        row = auc_table(y, score, np.arange(4), ["a"], n_resamples=1, seed=seed).iloc[0]
        assert row["auc_low"] < row["auc"] < row["auc_high"]
    nothing = auc_table(y, score, np.arange(4), ["a"], n_resamples=0).iloc[0]
    assert (nothing["auc_low"], nothing["auc_high"]) == (0, 1)


@pytest.mark.parametrize("decimals", [None, 1, 0])
def test_curves_equal_sklearn(decimals):
    y, score = draw(decimals=decimals)
    for c in range(4):
        expected = metrics.roc_curve(y[:, c], score[:, c])
        for ours, theirs in zip(roc_curve(y[:, c], score[:, c]), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-12)
        expected = metrics.precision_recall_curve(y[:, c], score[:, c], drop_intermediate=True)
        for ours, theirs in zip(precision_recall_curve(y[:, c], score[:, c]), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-12)
    for curve in (roc_curve, precision_recall_curve):
        with pytest.raises(ValueError, match="4 classes"):
            curve(y, score)


def test_confusion_counts_and_rates():
    y = np.array([[1, 0], [1, 0], [0, 0], [0, 1], [0, 1]])
    score = np.array([[0.9, 0.1], [0.5, 0.1], [0.5, 0.1], [0.4, 0.1], [0.1, 0.1]])
    result = confusion_at(y, score, [0.5, 0.2])
    assert {name: result[name].tolist() for name in ("tp", "fp", "fn", "tn")} == {
        "tp": [2, 0],
        "fp": [1, 0],
        "fn": [0, 2],
        "tn": [2, 3],
    }
    np.testing.assert_allclose(result["sensitivity"], [1, 0])
    np.testing.assert_allclose(result["specificity"], [2 / 3, 1])
    np.testing.assert_allclose(result["ppv"], [2 / 3, np.nan])
    np.testing.assert_allclose(result["npv"], [1, 3 / 5])
    unknown = confusion_at(y, score, [0.5, np.nan])
    assert np.isnan([unknown[name][1] for name in ("sensitivity", "specificity", "ppv", "npv")]).all()
    assert (unknown["fn"][1], unknown["tn"][1]) == (2, 3)
    with pytest.raises(ValueError, match="thresholds"):
        confusion_at(y, score, [0.5, 0.5, 0.5])


@pytest.mark.parametrize("decimals", [None, 1])
def test_thresholds_maximize_youden(decimals):
    y, score = draw(120, decimals=decimals)
    chosen = choose_thresholds(y, score)
    for c in range(4):
        levels = np.unique(score[:, c])
        at = [confusion_at(y[:, c], score[:, c], level) for level in levels]
        youden = [result["sensitivity"][0] + result["specificity"][0] - 1 for result in at]
        best = levels[np.isclose(youden, np.max(youden), atol=1e-12)]
        assert chosen[c] == best.max()
    # Two thresholds are equally good here; the higher one is taken.
    assert choose_thresholds([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.6]) == [0.9]
    with pytest.raises(ValueError, match="youden"):
        choose_thresholds(y, score, "f1")


def test_platt_recovers_known_parameters():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(40000, 3)) * 2 - 1
    slope, intercept = np.array([0.5, 1.0, 2.0]), np.array([-1.0, 0.0, 0.7])
    y = rng.random(logits.shape) < expit(slope * logits + intercept)
    fitted_slope, fitted_intercept = fit_platt(y, logits)
    np.testing.assert_allclose(fitted_slope, slope, rtol=0.06)
    np.testing.assert_allclose(fitted_intercept, intercept, atol=0.06)


def test_platt_minimizes_the_smoothed_loss():
    y, logits = draw(80, seed=2)
    slope, intercept = fit_platt(y, logits)
    n_pos, n_neg = y.sum(axis=0), (1 - y).sum(axis=0)
    target = np.where(y, (n_pos + 1) / (n_pos + 2), 1 / (n_neg + 2))
    error = expit(slope * logits + intercept) - target
    np.testing.assert_allclose(error.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose((error * logits).mean(axis=0), 0, atol=1e-9)


def test_platt_of_degenerate_columns():
    rng = np.random.default_rng(0)
    x = np.sort(rng.normal(size=200))
    y = (np.arange(200) >= 150).astype(int)
    cases = {
        "no positives": (np.zeros(200), x),
        "separable": (y, x),
        "huge": (y, 1e6 * x + 1e7),
        "tiny": (y, 1e-6 * x),
        "inverted": (y, -x),
        "constant": (y, np.full(200, 3.0)),
    }
    slope, intercept = fit_platt(*(np.column_stack(columns) for columns in zip(*cases.values(), strict=True)))
    assert np.isfinite([slope, intercept]).all()
    fitted = dict(zip(cases, zip(slope, intercept, strict=True), strict=True))
    assert fitted["no positives"] == (1, 0)
    assert fitted["separable"][0] == pytest.approx(1e6 * fitted["huge"][0], rel=1e-5)
    assert fitted["separable"][0] == pytest.approx(1e-6 * fitted["tiny"][0], rel=1e-5)
    for name in ("separable", "inverted", "constant"):
        a, b = fitted[name]
        assert a > 0
        # Whatever the slope, the mean probability is the smoothed prevalence.
        smoothed = (50 * 51 / 52 + 150 / 152) / 200
        assert expit(a * cases[name][1] + b).mean() == pytest.approx(smoothed, abs=1e-6)
    assert fitted["inverted"][0] == pytest.approx(0.01 / x.std())
    assert fitted["constant"][0] == 1


@pytest.mark.parametrize("k", [1, 2, 4, 9])
def test_top_k_recall_by_brute_force(k):
    y, score = draw(100, decimals=0)
    hits = 0
    for labels, row in zip(y, score, strict=True):
        ranking = sorted(range(4), key=lambda c, row=row: (-row[c], c))
        hits += sum(labels[c] for c in ranking[:k])
    assert top_k_recall(y, score, k) == pytest.approx(hits / y.sum())


def test_top_k_recall_of_a_constant_ranking():
    y = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1]])
    assert top_k_recall(y, np.broadcast_to([0.9, 0.5, 0.1], (3, 3)), k=1) == 0.5
    assert top_k_recall(y, np.zeros((3, 3)), k=2) == 0.75
    assert np.isnan(top_k_recall(np.zeros((2, 3)), np.zeros((2, 3))))
    with pytest.raises(ValueError, match="k is 0"):
        top_k_recall(y, y, k=0)


def test_single_class_vectors_are_accepted():
    y, score = draw(50, 1)
    for figure in (roc_auc, average_precision, choose_thresholds):
        np.testing.assert_array_equal(figure(y[:, 0], score[:, 0]), figure(y, score))
