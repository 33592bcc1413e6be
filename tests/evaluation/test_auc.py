"""Tests of evaluation.auc against scikit-learn, MLstatkit, brute force, simulation and known answers."""

import warnings

import numpy as np
import pytest
from drawn_scores import draw, resample_rows
from MLstatkit import Delong_test
from scipy import stats
from scipy.special import expit
from sklearn import metrics

from helpers.evaluation import (
    auc_table,
    average_precision,
    bootstrap_auc,
    bootstrap_ratio,
    delong,
    delong_test,
    difference_table,
    percentile_interval,
    precision_recall_curve,
    roc_auc,
    roc_curve,
    shuffled_auc,
)


def draw_patients(n, n_patients, seed=0):
    return np.random.default_rng(seed).integers(0, n_patients, n) * 10 + 7


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
        np.testing.assert_array_equal(delong(y, score), [[np.nan, np.nan, 1], [np.nan] * 3, [np.nan] * 3])
        np.testing.assert_array_equal(delong_test(y, score, -score), [[np.nan, np.nan, 1], [np.nan] * 3])
        assert np.isnan(shuffled_auc(y, score, [1, 2], 5)[:, :2]).all()
        samples = bootstrap_auc(y, score, [1, 2], 50)
        assert np.isnan(samples[:, :2]).all()
        # A resample with one of the two patients only has one class.
        assert 0 < np.isnan(samples[:, 2]).sum() < 50
        empty = np.zeros((0, 3))
        for figure in (roc_auc, average_precision):
            np.testing.assert_array_equal(figure(empty, empty), [np.nan] * 3)
        assert np.isnan(delong(empty, empty)).all()
        assert np.isnan(delong_test(empty, empty, empty)).all()
        for resample in (bootstrap_auc, bootstrap_ratio, shuffled_auc):
            samples = resample(empty, empty, [], 10)
            assert samples.shape == (10, 3)
            assert np.isnan(samples).all()
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
    groups = np.arange(len(y))
    for figure in (roc_auc, average_precision, delong):
        with pytest.raises(ValueError, match=text):
            figure(y, score)
    for resample in (bootstrap_auc, shuffled_auc):
        with pytest.raises(ValueError, match=text):
            resample(y, score, groups)
    with pytest.raises(ValueError, match=text):
        delong_test(y, np.zeros_like(y, dtype="float64"), score)
    with pytest.raises(ValueError, match=text):
        difference_table(y, np.zeros_like(y, dtype="float64"), score, groups, ["a", "b"])


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


def placements(y, score):
    """DeLong's structural components as the paper defines them: all pairs of a positive and a negative, compared."""
    wins = np.sign(score[y == 1][:, None] - score[y == 0][None, :]) / 2 + 0.5
    return wins.mean(axis=1), wins.mean(axis=0)


def delong_by_pairs(y, a, b):
    """AUCs, variances and covariance of two scores of one class from the 2 x 2 matrices of DeLong et al. (1988)."""
    (v10_a, v01_a), (v10_b, v01_b) = placements(y, a), placements(y, b)
    covariance = np.cov(v10_a, v10_b) / len(v10_a) + np.cov(v01_a, v01_b) / len(v01_a)
    return np.array([v10_a.mean(), v10_b.mean()]), covariance


@pytest.mark.parametrize("decimals", [None, 1, 0])
def test_delong_equals_all_pairs(decimals):
    y, a = draw(160, seed=1, decimals=decimals)
    b = draw(160, seed=2, decimals=decimals)[1] + 0.4 * a
    auc, low, high = delong(y, a, level=0.9)
    difference, p = delong_test(y, a, b)
    for c in range(4):
        expected, covariance = delong_by_pairs(y[:, c], a[:, c], b[:, c])
        half = stats.norm.ppf(0.95) * np.sqrt(covariance[0, 0])
        assert auc[c] == pytest.approx(expected[0], abs=1e-14)
        assert low[c] == pytest.approx(max(expected[0] - half, 0), abs=1e-12)
        assert high[c] == pytest.approx(min(expected[0] + half, 1), abs=1e-12)
        z = (expected[0] - expected[1]) / np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
        assert difference[c] == pytest.approx(expected[0] - expected[1], abs=1e-14)
        assert p[c] == pytest.approx(2 * stats.norm.sf(abs(z)), rel=1e-9)


@pytest.mark.parametrize("decimals", [None, 1, 0])
def test_delong_equals_mlstatkit(decimals):
    y, a = draw(500, seed=3, decimals=decimals)
    b = draw(500, seed=4, decimals=decimals)[1]
    auc, low, high = delong(y, a)
    difference, p = delong_test(y, a, b)
    for c in range(4):
        # Its sign is that of b minus a.
        z, expected_p, interval, _, auc_a, auc_b, info = Delong_test(y[:, c], a[:, c], b[:, c])
        assert info["method"] == "delong"
        np.testing.assert_allclose([auc[c], low[c], high[c]], [auc_a, *interval], atol=1e-12)
        np.testing.assert_allclose([difference[c], p[c]], [auc_a - auc_b, expected_p], rtol=1e-9, atol=1e-12)
        assert np.sign(z) == -np.sign(difference[c])


def test_delong_at_the_edges():
    y, score = draw(80)
    # The same ranking, told by other numbers, is the same model.
    np.testing.assert_array_equal(delong_test(y, score, expit(score)), [[0] * 4, [1] * 4])
    np.testing.assert_array_equal(delong_test(y, score, score)[1], [1] * 4)
    ties = np.zeros_like(score)
    np.testing.assert_array_equal(delong(y, ties), [[0.5] * 4] * 3)
    np.testing.assert_array_equal(delong_test(y, ties, ties), [[0] * 4, [1] * 4])
    # Swapping the models changes the sign alone.
    there, back = delong_test(y, score, draw(seed=9, n=80)[1]), delong_test(y, draw(seed=9, n=80)[1], score)
    np.testing.assert_array_equal(there[0], -back[0])
    np.testing.assert_array_equal(there[1], back[1])
    # Perfect and perfectly wrong: no variance, and a difference beyond chance.
    y, score = [1, 1, 0, 0], np.array([4.0, 3.0, 2.0, 1.0])
    np.testing.assert_array_equal(delong(y, score), [[1], [1], [1]])
    np.testing.assert_array_equal(delong_test(y, score, -score), [[1], [0]])
    # A normal interval does not end at 0 and 1 by itself.
    y, score = [0, 0, 0, 1, 1, 1], np.array([1, 2, 4, 3, 5, 6])
    assert delong(y, score)[2] == delong(y, -score)[1] + 1 == 1
    # Of a single positive the AUC is known and its variance is not.
    auc, low, high = delong([1, 0, 0], [0.5, 0.6, 0.4])
    assert (auc[0], np.isnan(low[0]), np.isnan(high[0])) == (0.5, True, True)
    for level in (0, 1, 95):
        with pytest.raises(ValueError, match="level"):
            delong(y, score, level)


def test_delong_covers_and_keeps_its_level_where_images_are_independent():
    # Each column is one study of 150 images.
    rng = np.random.default_rng(0)
    y = rng.random((150, 600)) < 0.3
    shared = rng.normal(size=y.shape) + 1.0 * y
    a, b = (shared + 0.7 * rng.normal(size=y.shape) for _ in range(2))
    truth = stats.norm.cdf(1 / np.sqrt(2 * (1 + 0.7**2)))
    _, low, high = delong(y, a)
    assert 0.92 <= np.mean((low <= truth) & (truth <= high)) <= 0.97
    p = delong_test(y, a, b)[1]
    assert 0.03 <= np.mean(p < 0.05) <= 0.07
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_patient_bootstrap_covers_and_image_bootstrap_does_not():
    # Each column is one study: 120 patients with 5 images that share the label and half of the score's variance.
    rng = np.random.default_rng(1)
    patients = np.repeat(np.arange(120), 5)
    y = (rng.random((120, 400)) < 0.4)[patients]
    score = y + rng.normal(size=(120, 400))[patients] + rng.normal(size=y.shape)
    truth = stats.norm.cdf(1 / np.sqrt(2 * 2))  # No patient has both labels, so no pair shares its effect.

    def coverage(groups):
        low, high = percentile_interval(bootstrap_auc(y, score, groups, 800, seed=2))
        return np.mean((low <= truth) & (truth <= high))

    assert 0.93 <= coverage(patients) <= 0.97
    assert coverage(np.arange(600)) < 0.85
    _, low, high = delong(y, score)
    assert np.mean((low <= truth) & (truth <= high)) < 0.85


@pytest.mark.parametrize("columns", [(3, 3), (3, 1), (1, 3), (None, None)])
def test_bootstrap_ratio_equals_a_plain_loop(columns):
    rng = np.random.default_rng(5)
    groups = draw_patients(90, 12)
    above, below = (rng.integers(0, 3, 90 if k is None else (90, k)).astype("float64") for k in columns)
    below[groups != groups[0]] *= 0.5 if columns != (3, 3) else 0  # With one patient in the denominator many are 0.
    samples = bootstrap_ratio(above, below, groups, n_resamples=150, seed=3)
    assert samples.shape == (150, 1 if columns[0] is None else 3)
    for sample, rows in zip(samples, resample_rows(groups, 150, 3), strict=True):
        sums = np.broadcast_arrays(np.atleast_1d(above[rows].sum(axis=0)), np.atleast_1d(below[rows].sum(axis=0)))
        for value, part, whole in zip(sample, *sums, strict=True):
            assert value == pytest.approx(part / whole if whole else np.nan, rel=1e-12, nan_ok=True)
    assert np.isnan(samples).any() == (columns == (3, 3))


def test_bootstrap_ratio_is_paired_and_refuses_malformed_numbers():
    y, _ = draw(200)
    groups = draw_patients(200, 30)
    shares = [bootstrap_ratio(part, np.ones(200), groups, 50, seed=6) for part in (y, 1 - y)]
    np.testing.assert_allclose(shares[0] + shares[1], 1)
    assert bootstrap_ratio(y[:, 0], y[:, 0], groups, 50).tolist() == [[1.0]] * 50
    with pytest.raises(ValueError, match="denominator inf in row 1, class 0"):
        bootstrap_ratio([1, 2], [1, np.inf], [1, 2])
    with pytest.raises(ValueError, match="numerator nan in row 0, class 0"):
        bootstrap_ratio([np.nan, 2], [1, 1], [1, 2])
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        bootstrap_ratio([1, 2], [1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match=r"groups has shape \(3,\)"):
        bootstrap_ratio([1, 2], [1, 2], [1, 2, 3])


def test_difference_table_values():
    y, a = draw(300, seed=7, decimals=1)
    y[:, 3] = 0
    b = a + np.random.default_rng(8).normal(size=a.shape).round(1)
    groups = draw_patients(300, 70)
    table = difference_table(y, a, b, groups, list("wxyz"), n_resamples=128, seed=9, level=0.8)
    ends = ["difference_low", "difference_high"]
    assert list(table.columns) == ["pathology", "n_pos", "auc_a", "auc_b", "difference", *ends, "p_delong"]
    assert table["pathology"].tolist() == ["w", "x", "y", "z", "mean"]
    np.testing.assert_array_equal(table["n_pos"], [*y.sum(axis=0), y.sum()])
    np.testing.assert_array_equal(table["auc_a"][:4], roc_auc(y, a))
    np.testing.assert_allclose(table["difference"], table["auc_a"] - table["auc_b"], atol=1e-15)
    assert table["auc_b"][4] == pytest.approx(roc_auc(y, b)[:3].mean())
    np.testing.assert_array_equal(table["p_delong"], [*delong_test(y, a, b)[1], np.nan])
    # The same patients for both models, AUCs by scikit-learn on the repeated rows.
    samples = []
    for rows in resample_rows(groups, 128, 9):
        aucs = [metrics.roc_auc_score(y[rows, :3], score[rows, :3], average=None) for score in (a, b)]
        samples.append([*(aucs[0] - aucs[1]), np.mean(aucs[0] - aucs[1])])
    np.testing.assert_allclose(table.loc[[0, 1, 2, 4], ends].T, np.quantile(samples, [0.1, 0.9], axis=0), atol=1e-8)
    assert table.loc[3, ["auc_a", "auc_b", "difference", *ends, "p_delong"]].isna().all()
    # Pairing is what makes it narrow.
    widths = auc_table(y, a, groups, list("wxyz"), 128, 9, 0.8).eval("auc_high - auc_low")
    near = difference_table(y, a, a + 0.01 * b, groups, list("wxyz"), 128, 9, 0.8)
    assert (near.eval("difference_high - difference_low").dropna() < 0.3 * widths.dropna()).all()
    with pytest.raises(ValueError, match="2 class names for 4 columns"):
        difference_table(y, a, b, groups, ["a", "b"])


@pytest.mark.parametrize("n", [0, 1, 2, 6])
def test_difference_table_of_tiny_studies(n):
    y, a = draw(n, seed=n, decimals=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = difference_table(y, a, -a, draw_patients(n, 3), list("abcd"), n_resamples=20)
    known = table.dropna(subset="difference")
    assert len(known) == np.sum((y.sum(axis=0) > 0) & (y.sum(axis=0) < n)) + (len(known) > 0)
    assert (known["difference_low"] <= known["difference"]).all()
    assert (known["difference"] <= known["difference_high"]).all()
    assert known["difference_low"].ge(-1).all()
    assert known["difference_high"].le(1).all()


def test_shuffled_auc_of_one_patient_is_a_rotation():
    y, score = draw(40, 3, decimals=1)
    rotations = np.array([roc_auc(np.roll(y, shift, axis=0), score) for shift in range(40)])
    samples = shuffled_auc(y, score, np.zeros(40), n_shuffles=400)
    # All classes turn together, and every turn is drawn.
    turns = [np.flatnonzero(np.isclose(rotations, sample, rtol=0, atol=1e-12).all(axis=1)) for sample in samples]
    assert min(len(found) for found in turns) == 1
    assert len(np.unique(np.concatenate(turns))) == 40


def test_shuffled_auc_keeps_each_patients_labels_together():
    # Four patients of three images each; only the first image of a patient is positive, so positives stay three apart.
    y, groups = np.tile([1, 0, 0], 4), np.repeat([5, 2, 9, 4], 3)
    score = np.tile([2.0, 1.0, 0.0], 4)
    samples = shuffled_auc(y, score, groups, 200)
    assert set(samples.ravel()) == {1.0, 0.5, 0.0}
    # Rows may come in any order: a patient's images are found, not assumed to be neighbors.
    order = np.random.default_rng(0).permutation(12)
    order = order[np.argsort(np.tile([0, 1, 2], 4)[order], kind="stable")]
    assert set(shuffled_auc(y[order], score[order], groups[order], 200).ravel()) == {1.0, 0.5, 0.0}


def test_shuffled_auc_has_the_known_spread_and_clustering_widens_it():
    y, score = draw(300, 2)
    samples = shuffled_auc(y, score, np.arange(300), 3000, seed=1)
    m = y.sum(axis=0)
    np.testing.assert_allclose(samples.mean(axis=0), 0.5, atol=0.005)
    # Mann and Whitney (1947).
    np.testing.assert_allclose(samples.std(axis=0), np.sqrt(301 / (12 * m * (300 - m))), rtol=0.05)
    np.testing.assert_array_equal(samples[:5], shuffled_auc(y, score, np.arange(300), 5, seed=1))
    copies = [np.repeat(values, 6, axis=0) for values in (y, score, np.arange(300))]
    clustered, single = shuffled_auc(*copies, 500), shuffled_auc(*copies[:2], np.arange(1800), 500)
    assert (clustered.std(axis=0) > 1.5 * single.std(axis=0)).all()
    with pytest.raises(ValueError, match=r"groups has shape \(299,\)"):
        shuffled_auc(y, score, np.arange(299))


def test_single_class_vectors_are_accepted():
    y, score = draw(50, 1)
    for figure in (roc_auc, average_precision, delong):
        np.testing.assert_array_equal(figure(y[:, 0], score[:, 0]), figure(y, score))
