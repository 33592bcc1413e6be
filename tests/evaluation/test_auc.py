"""Tests of evaluation.auc against scikit-learn, MLstatkit, brute force, simulation and known answers."""

import warnings

import numpy as np
import pytest
from drawn_scores import draw, draw_patients, resample_rows
from MLstatkit import Delong_test
from scipy import stats
from scipy.special import expit
from sklearn import metrics

from helpers.evaluation.auc import auc_table, bootstrap_auc, delong_test, difference_table, roc_auc, shuffled_auc
from helpers.evaluation.bootstrap import percentile_interval


@pytest.mark.parametrize("decimals", [None, 1, 0])
def test_auc_equals_sklearn(decimals):
    for seed in range(3):
        y, score = draw(seed=seed, decimals=decimals)
        np.testing.assert_allclose(roc_auc(y, score), metrics.roc_auc_score(y, score, average=None), atol=1e-12, rtol=0)
    np.testing.assert_array_equal(roc_auc(y[:, 0], score[:, 0]), roc_auc(y, score)[:1])  # a vector is one class


def test_single_class_columns_and_empty_input_are_nan():
    y = np.array([[0, 1, 0], [0, 1, 1]])
    score = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(roc_auc(y, score), [np.nan, np.nan, 1])
        np.testing.assert_array_equal(delong_test(y, score, -score), [[np.nan, np.nan, 1], [np.nan] * 3])
        np.testing.assert_array_equal(auc_table(y, score, [1, 2], "abc", 50)["ap"], [np.nan, 1, 1, 1])
        assert np.isnan(shuffled_auc(y, score, [1, 2], 5)[:, :2]).all()
        samples = bootstrap_auc(y, score, [1, 2], 50)
        assert np.isnan(samples[:, :2]).all()
        # A resample with one of the two patients only has one class.
        assert 0 < np.isnan(samples[:, 2]).sum() < 50
        empty = np.zeros((0, 3))
        np.testing.assert_array_equal(roc_auc(empty, empty), [np.nan] * 3)
        assert np.isnan(delong_test(empty, empty, empty)).all()
        for resample in (bootstrap_auc, shuffled_auc):
            samples = resample(empty, empty, [], 10)
            assert samples.shape == (10, 3)
            assert np.isnan(samples).all()


@pytest.mark.parametrize(
    ("y", "score", "text"),
    [
        ([[0, 1], [1, 0]], [[0.1, 0.2], [0.3, np.nan]], "score nan in row 1, class 1"),
        ([[0, 1], [1, 0]], [[0.1, np.inf], [0.3, 0.4]], "score inf in row 0, class 1"),
        ([[0, 1], [2, 0]], [[0.1, 0.2], [0.3, 0.4]], "label 2 in row 1, class 0"),
        ([[0, np.nan], [1, -1]], [[0.1, 0.2], [0.3, 0.4]], "label -1.0 in row 1, class 1; expected 0, 1 or NaN"),
        ([[0, 1]], [[0.1, 0.2], [0.3, 0.4]], r"\(1, 2\).*\(2, 2\)"),
        ([[[0]]], [[[0.5]]], r"\(1, 1, 1\)"),
    ],
)
def test_malformed_input_is_refused(y, score, text):
    groups, right = np.arange(len(y)), np.zeros_like(y, dtype="float64")
    calls = {
        "roc_auc": lambda: roc_auc(y, score),
        "bootstrap_auc": lambda: bootstrap_auc(y, score, groups),
        "shuffled_auc": lambda: shuffled_auc(y, score, groups),
        "delong_test": lambda: delong_test(y, right, score),
        "difference_table": lambda: difference_table(y, right, score, groups, ["a", "b"]),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=text):
            call()


@pytest.mark.parametrize("decimals", [None, 0])
def test_bootstrap_equals_sklearn_on_the_repeated_rows(decimals):
    y, score = draw(200, decimals=decimals)
    groups = draw_patients(200, 40)
    samples = bootstrap_auc(y, score, groups, n_resamples=150, seed=3)  # more than one chunk of resamples
    assert samples.shape == (150, 4)
    compared = 0
    for rows, sample in list(zip(resample_rows(groups, 128, 3), samples, strict=False))[::9]:
        for c in range(4):
            if len(np.unique(y[rows, c])) == 2:
                assert sample[c] == pytest.approx(metrics.roc_auc_score(y[rows, c], score[rows, c]), abs=1e-12)
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
    by_patient = bootstrap_auc(*copies, n_resamples=200)
    np.testing.assert_allclose(by_patient, bootstrap_auc(y, score, np.arange(60), n_resamples=200), atol=1e-12)
    by_image = bootstrap_auc(copies[0], copies[1], np.arange(1200), n_resamples=200)
    assert by_patient.std() > 3 * by_image.std()
    for resample in (bootstrap_auc, shuffled_auc):
        with pytest.raises(ValueError, match=r"groups has shape \(59,\)"):
            resample(y, score, np.arange(59))


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
    precision = metrics.average_precision_score(y[:, :3], score[:, :3], average=None)
    np.testing.assert_allclose(table["ap"], [*precision, np.nan, precision.mean()])
    assert table.loc[3, ["auc", "auc_low", "auc_high"]].isna().all()
    samples = bootstrap_auc(y, score, groups, 300, 4)[:, :3]
    expected = np.quantile(np.column_stack([samples, samples.mean(axis=1)]), [0.05, 0.95], axis=0)
    np.testing.assert_allclose(table.loc[[0, 1, 2, 4], ["auc_low", "auc_high"]].T, expected, atol=1e-8)
    with pytest.raises(ValueError, match="does not match length"):
        auc_table(y, score, groups, ["a", "b"], 10)


@pytest.mark.parametrize("n", [0, 1, 2, 5, 12])
def test_tables_of_tiny_studies(n):
    for seed in range(5):
        y, score = draw(n, seed=seed, decimals=0)
        groups = draw_patients(n, 3, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            table = auc_table(y, score, groups, list("abcd"), n_resamples=20)
            difference = difference_table(y, score, -score, groups, list("abcd"), n_resamples=20)
        defined = [0 < y[:, c].sum() < n for c in range(4)]
        for column in ("auc", "auc_low", "auc_high"):
            assert table[column].notna().tolist() == [*defined, any(defined)]
        known = table.dropna(subset="auc")
        assert ((known["auc_low"] >= 0) & (known["auc_low"] <= known["auc"])).all()
        assert ((known["auc"] <= known["auc_high"]) & (known["auc_high"] <= 1)).all()
        assert difference["difference"].notna().tolist() == [*defined, any(defined)]
        known = difference.dropna(subset="difference")
        assert ((known["difference_low"] >= -1) & (known["difference_low"] <= known["difference"])).all()
        assert ((known["difference"] <= known["difference_high"]) & (known["difference_high"] <= 1)).all()


def test_interval_contains_an_estimate_that_no_resample_reaches():
    y, score = np.array([0, 1, 0, 1]), np.array([0.1, 0.2, 0.3, 0.4])
    for seed in range(30):
        row = auc_table(y, score, np.arange(4), ["a"], n_resamples=1, seed=seed).iloc[0]
        assert row["auc_low"] < row["auc"] < row["auc_high"]


def placements(y, score):
    """DeLong's structural components as the paper defines them: all pairs of a positive and a negative, compared."""
    wins = np.sign(score[y == 1][:, None] - score[y == 0][None, :]) / 2 + 0.5
    return wins.mean(axis=1), wins.mean(axis=0)


@pytest.mark.parametrize("decimals", [None, 1, 0])
def test_delong_test_equals_all_pairs_and_mlstatkit(decimals):
    y, a = draw(160, seed=1, decimals=decimals)
    b = draw(160, seed=2, decimals=decimals)[1] + 0.4 * a
    difference, p = delong_test(y, a, b)
    for c in range(4):
        (v10_a, v01_a), (v10_b, v01_b) = placements(y[:, c], a[:, c]), placements(y[:, c], b[:, c])
        covariance = np.cov(v10_a, v10_b) / len(v10_a) + np.cov(v01_a, v01_b) / len(v01_a)
        z = (v10_a.mean() - v10_b.mean()) / np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
        assert difference[c] == pytest.approx(v10_a.mean() - v10_b.mean(), abs=1e-14)
        assert p[c] == pytest.approx(2 * stats.norm.sf(abs(z)), rel=1e-9)
        # The sign of its z is that of b minus a.
        z, expected_p, _, _, auc_a, auc_b, info = Delong_test(y[:, c], a[:, c], b[:, c])
        assert info["method"] == "delong"
        np.testing.assert_allclose([difference[c], p[c]], [auc_a - auc_b, expected_p], rtol=1e-9, atol=1e-12)
        assert np.sign(z) == -np.sign(difference[c])


def test_delong_test_at_the_edges():
    y, score = draw(80)
    # The same ranking by other numbers is the same model.
    np.testing.assert_array_equal(delong_test(y, score, expit(score)), [[0] * 4, [1] * 4])
    np.testing.assert_array_equal(delong_test(y, score, score)[1], [1] * 4)
    ties = np.zeros_like(score)
    np.testing.assert_array_equal(delong_test(y, ties, ties), [[0] * 4, [1] * 4])
    # Swapping the models changes the sign alone.
    there, back = delong_test(y, score, draw(seed=9, n=80)[1]), delong_test(y, draw(seed=9, n=80)[1], score)
    np.testing.assert_array_equal(there[0], -back[0])
    np.testing.assert_array_equal(there[1], back[1])
    # Perfect and perfectly wrong: no variance, and a difference beyond chance.
    y, score = [1, 1, 0, 0], np.array([4.0, 3.0, 2.0, 1.0])
    np.testing.assert_array_equal(delong_test(y, score, -score), [[1], [0]])
    # Of a single positive the difference is known and its variance is not.
    difference, p = delong_test([1, 0, 0], [0.5, 0.6, 0.4], [0.7, 0.6, 0.4])
    assert (difference[0], np.isnan(p[0])) == (-0.5, True)


def test_delong_test_keeps_its_level_where_images_are_independent():
    # Each column is one study of 150 images.
    rng = np.random.default_rng(0)
    y = rng.random((150, 600)) < 0.3
    shared = rng.normal(size=y.shape) + 1.0 * y
    p = delong_test(y, *(shared + 0.7 * rng.normal(size=y.shape) for _ in range(2)))[1]
    assert 0.03 <= np.mean(p < 0.05) <= 0.07
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_patient_bootstrap_covers_and_image_bootstrap_does_not():
    # Each column is one study: 120 patients with 5 images that share the label and half of the score's variance.
    rng = np.random.default_rng(1)
    patients = np.repeat(np.arange(120), 5)
    y = (rng.random((120, 400)) < 0.4)[patients]
    score = y + rng.normal(size=(120, 400))[patients] + rng.normal(size=y.shape)
    truth = stats.norm.cdf(1 / np.sqrt(2 * 2))  # no patient has both labels, so no pair shares its effect

    def coverage(groups, classes, n_resamples):
        samples = bootstrap_auc(y[:, :classes], score[:, :classes], groups, n_resamples, seed=2)
        low, high = percentile_interval(samples)
        return np.mean((low <= truth) & (truth <= high))

    assert 0.92 <= coverage(patients, 400, 250) <= 0.975
    assert coverage(np.arange(600), 150, 128) < 0.85


def test_difference_table_values():
    y, a = draw(300, seed=7, decimals=1)
    y[:, 3] = 0
    b = a + np.random.default_rng(8).normal(size=a.shape).round(1)
    groups = draw_patients(300, 70)
    table = difference_table(y, a, b, groups, list("wxyz"), n_resamples=60, seed=9, level=0.8)
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
    for rows in resample_rows(groups, 60, 9):
        aucs = [metrics.roc_auc_score(y[rows, :3], score[rows, :3], average=None) for score in (a, b)]
        samples.append([*(aucs[0] - aucs[1]), np.mean(aucs[0] - aucs[1])])
    np.testing.assert_allclose(table.loc[[0, 1, 2, 4], ends].T, np.quantile(samples, [0.1, 0.9], axis=0), atol=1e-8)
    assert table.loc[3, ["auc_a", "auc_b", "difference", *ends, "p_delong"]].isna().all()
    # Pairing is what makes it narrow.
    widths = auc_table(y, a, groups, list("wxyz"), 60, 9, 0.8).eval("auc_high - auc_low")
    near = difference_table(y, a, a + 0.01 * b, groups, list("wxyz"), 60, 9, 0.8)
    assert (near.eval("difference_high - difference_low").dropna() < 0.3 * widths.dropna()).all()


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
    samples = shuffled_auc(y, score, np.arange(300), 2500, seed=1)
    m = y.sum(axis=0)
    np.testing.assert_allclose(samples.mean(axis=0), 0.5, atol=0.005)
    # Mann and Whitney (1947).
    np.testing.assert_allclose(samples.std(axis=0), np.sqrt(301 / (12 * m * (300 - m))), rtol=0.05)
    np.testing.assert_array_equal(samples[:5], shuffled_auc(y, score, np.arange(300), 5, seed=1))
    copies = [np.repeat(values, 6, axis=0) for values in (y, score, np.arange(300))]
    clustered, single = shuffled_auc(*copies, 300), shuffled_auc(*copies[:2], np.arange(1800), 300)
    assert (clustered.std(axis=0) > 1.5 * single.std(axis=0)).all()
