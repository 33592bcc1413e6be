"""Tests of evaluation.calibration against scikit-learn, SciPy, brute force and known answers."""

import warnings

import numpy as np
import pytest
from drawn_scores import draw, resample_rows
from scipy import stats
from scipy.special import expit
from sklearn import metrics
from sklearn.calibration import calibration_curve

from helpers.evaluation import (
    apply_platt,
    bootstrap_calibration_error,
    bootstrap_ratio,
    calibration_error,
    choose_thresholds,
    confusion_at,
    fit_platt,
    rates_table,
    reliability_curve,
    top_k_hits,
    top_k_recall,
)


def draw_probs(n=300, classes=4, seed=0, decimals=None):
    """Labels and probabilities in [0, 1], neither perfect nor useless."""
    y, score = draw(n, classes, seed)
    probs = expit(score - 1)
    return y, probs if decimals is None else np.round(probs, decimals)


def test_undefined_figures_are_nan():
    y = np.array([[0, 1, 0], [0, 1, 1]])
    score = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    empty = np.zeros((0, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({}, {"method": "f1"}, {"method": "sensitivity", "sensitivity": 0.9}):
            np.testing.assert_array_equal(choose_thresholds(y, score, **options), [np.nan, np.nan, 0.6])
            np.testing.assert_array_equal(choose_thresholds(empty, empty, **options), [np.nan] * 3)
        assert np.isnan(top_k_recall(empty, empty))
        np.testing.assert_array_equal(fit_platt(empty, empty), [[1, 1, 1], [0, 0, 0]])
        np.testing.assert_array_equal(confusion_at(empty, empty, 0.5)["tp"], [0, 0, 0])
        np.testing.assert_array_equal(confusion_at(empty, empty, 0.5)["ppv"], [np.nan] * 3)
        np.testing.assert_array_equal(calibration_error(empty, empty), [np.nan] * 3)
        np.testing.assert_array_equal(bootstrap_calibration_error(empty, empty, [], 2), [[np.nan] * 3] * 2)
        assert reliability_curve([], []).empty
        assert rates_table(empty, empty, 0.5, [], list("abc")).filter(regex="sens|spec|pv").isna().all(axis=None)
        # Calibration needs no two classes.
        np.testing.assert_allclose(calibration_error([0, 0, 0, 0], [0.1, 0.2, 0.3, 0.4]), [0.25])


@pytest.mark.parametrize(
    ("y", "score", "text"),
    [
        ([[0, 1], [1, 0]], [[0.1, 0.2], [0.3, np.nan]], "score nan in row 1, class 1"),
        ([[0, 1], [2, 0]], [[0.1, 0.2], [0.3, 0.4]], "label 2 in row 1, class 0"),
        ([[0, np.nan], [1, 0]], [[0.1, 0.2], [0.3, 0.4]], "label nan in row 0, class 1"),
        ([[0, 1]], [[0.1, 0.2], [0.3, 0.4]], r"\(1, 2\).*\(2, 2\)"),
    ],
)
def test_malformed_input_is_refused(y, score, text):
    for figure in (choose_thresholds, fit_platt, top_k_hits, top_k_recall, calibration_error, reliability_curve):
        with pytest.raises(ValueError, match=text):
            figure(y, score)
    with pytest.raises(ValueError, match=text):
        bootstrap_calibration_error(y, score, np.arange(len(y)))
    with pytest.raises(ValueError, match=text):
        rates_table(y, score, 0.5, np.arange(len(y)), ["a", "b"])


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


@pytest.mark.parametrize("decimals", [None, 1, 0])
def test_thresholds_maximize_f1(decimals):
    y, score = draw(120, decimals=decimals)
    chosen = choose_thresholds(y, score, "f1")
    for c in range(4):
        levels = np.unique(score[:, c])
        f1 = [metrics.f1_score(y[:, c], score[:, c] >= level) for level in levels]
        assert chosen[c] == levels[np.isclose(f1, np.max(f1), atol=1e-12)].max()
    # F1 is 2/3 at 0.9 and at 0.6; the higher one is taken.
    assert choose_thresholds([1, 0, 0, 1], [0.9, 0.8, 0.7, 0.6], "f1") == [0.9]


@pytest.mark.parametrize("decimals", [None, 1, 0])
@pytest.mark.parametrize("wished", [0.01, 0.5, 0.9, 1.0])
def test_thresholds_reach_the_wished_sensitivity(decimals, wished):
    y, score = draw(120, decimals=decimals)
    chosen = choose_thresholds(y, score, "sensitivity", sensitivity=wished)
    assert (confusion_at(y, score, chosen)["sensitivity"] >= wished).all()
    for c in range(4):
        assert chosen[c] in score[:, c]
        higher = [level for level in np.unique(score[:, c]) if level > chosen[c]]
        assert all(confusion_at(y[:, c], score[:, c], level)["sensitivity"][0] < wished for level in higher)


def test_a_wished_sensitivity_that_is_met_exactly_is_met():
    # 7 of 100 positives: the product 0.07 * 100 is rounded to a number above 7 and must not ask for the eighth.
    for n_pos in (3, 7, 49, 100):
        y, score = np.append(np.ones(n_pos), 0), np.append(np.arange(n_pos, 0, -1.0), 0)
        for found in range(1, n_pos + 1):
            assert choose_thresholds(y, score, "sensitivity", found / n_pos) == [n_pos + 1 - found]


@pytest.mark.parametrize(
    ("method", "sensitivity", "text"),
    [
        ("cost", None, "'cost'; expected one of youden, f1, sensitivity"),
        ("sensitivity", None, "sensitivity None"),
        ("youden", 0.9, "'youden' with sensitivity 0.9"),
        ("sensitivity", 0, "above 0"),
        ("sensitivity", 90, "at most 1"),
        ("sensitivity", np.nan, "sensitivity is nan"),
    ],
)
def test_unfit_methods_are_refused(method, sensitivity, text):
    with pytest.raises(ValueError, match=text):
        choose_thresholds([0, 1], [0.1, 0.2], method, sensitivity)


@pytest.mark.parametrize("decimals", [None, 1])
def test_rates_table_values(decimals):
    y, score = draw(200, decimals=decimals)
    groups = np.random.default_rng(1).integers(0, 30, 200)
    thresholds = [0.5, 0.0, 9.0, np.nan]
    table = rates_table(y, score, thresholds, groups, list("abcd"), n_resamples=200, seed=2, level=0.9)
    rates = ["sensitivity", "specificity", "ppv", "npv"]
    ends = [name for rate in rates for name in (rate, f"{rate}_low", f"{rate}_high")]
    assert list(table.columns) == ["pathology", "threshold", "tp", "fp", "fn", "tn", *ends]
    expected = confusion_at(y, score, thresholds)
    for name in ("tp", "fp", "fn", "tn", *rates):
        np.testing.assert_array_equal(table[name], expected[name])
    np.testing.assert_array_equal(table["threshold"], thresholds)
    assert table["sensitivity"][1] == metrics.recall_score(y[:, 1], score[:, 1] >= 0)
    assert table["ppv"][1] == metrics.precision_score(y[:, 1], score[:, 1] >= 0)
    samples = [confusion_at(y[rows], score[rows], thresholds) for rows in resample_rows(groups, 200, 2)]
    for rate in rates:
        for c in (0, 1):
            interval = np.nanquantile([sample[rate][c] for sample in samples], [0.05, 0.95])
            np.testing.assert_allclose(table.loc[c, [f"{rate}_low", f"{rate}_high"]].tolist(), interval, atol=1e-8)
    # Where nothing is called, PPV is unknown; at an unknown threshold all is.
    assert table.loc[2, ["ppv", "ppv_low", "ppv_high"]].isna().all()
    assert (table["sensitivity"][2], table["specificity"][2]) == (0, 1)
    assert table.loc[3, ends].isna().all()
    with pytest.raises(ValueError, match="3 class names for 4 columns"):
        rates_table(y, score, 0.5, groups, list("abc"))
    with pytest.raises(ValueError, match="thresholds has shape"):
        rates_table(y, score, [0.5, 0.5], groups, list("abcd"))


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


def test_platt_is_applied_as_it_is_fitted():
    y, logits = draw(400, seed=3)
    slope, intercept = fit_platt(y, 3 * logits + 2)
    probs = apply_platt(3 * logits + 2, slope, intercept)
    # Scaled inputs change the parameters and not the probabilities.
    np.testing.assert_allclose(probs, apply_platt(logits, *fit_platt(y, logits)), atol=1e-9)
    for c in range(4):
        own = [metrics.log_loss(y[:, c], values) for values in (probs[:, c], expit(3 * logits[:, c] + 2))]
        assert own[0] < own[1]
    assert apply_platt([[0.0, 1e9, -1e9]], [1, 1, 1], [0, 0, 0]).tolist() == [[0.5, 1, 0]]


def bins_by_hand(probs, n_bins):
    """Rows of each bin: images in order of probability, cut into equal numbers; equal ones go where their middle is."""
    ranked = np.sort(probs)
    bins = {}
    for value in np.unique(probs):
        place = np.flatnonzero(ranked == value).mean()  # 0 for the lowest image, n - 1 for the highest
        number = next(b for b in range(n_bins) if (2 * place + 1) * n_bins < 2 * (b + 1) * len(probs))
        bins.setdefault(number, []).extend(np.flatnonzero(probs == value))
    return list(bins.values())


@pytest.mark.parametrize("decimals", [None, 2, 1, 0])
@pytest.mark.parametrize("n_bins", [1, 7, 10])
def test_reliability_and_calibration_error_by_hand(decimals, n_bins):
    y, probs = draw_probs(203, decimals=decimals)
    for c in range(4):
        curve = reliability_curve(y[:, c], probs[:, c], n_bins)
        bins = bins_by_hand(probs[:, c], n_bins)
        np.testing.assert_allclose(curve["mean_prob"], [probs[rows, c].mean() for rows in bins])
        np.testing.assert_allclose(curve["frequency"], [y[rows, c].mean() for rows in bins])
        np.testing.assert_array_equal(curve["n"], [len(rows) for rows in bins])
        intervals = [stats.binomtest(int(y[rows, c].sum()), len(rows)).proportion_ci(method="wilson") for rows in bins]
        np.testing.assert_allclose(curve[["low", "high"]], intervals, atol=1e-12)
        assert ((curve["low"] <= curve["frequency"]) & (curve["frequency"] <= curve["high"])).all()
        gap = (curve["mean_prob"] - curve["frequency"]).abs()
        assert calibration_error(y, probs, n_bins)[c] == pytest.approx((gap * curve["n"]).sum() / 203)
        if decimals is None:
            assert curve["n"].max() - curve["n"].min() <= 1
            assert len(curve) == n_bins
        else:
            assert len(curve) <= len(np.unique(probs[:, c]))


def test_reliability_curve_equals_sklearn_without_ties():
    y, probs = draw_probs(1000)
    for c in range(4):
        curve = reliability_curve(y[:, c], probs[:, c])
        frequency, mean_prob = calibration_curve(y[:, c], probs[:, c], n_bins=10, strategy="quantile")
        np.testing.assert_allclose(curve["frequency"], frequency)
        np.testing.assert_allclose(curve["mean_prob"], mean_prob)
        assert curve["n"].tolist() == [100] * 10
    with pytest.raises(ValueError, match="4 classes"):
        reliability_curve(y, probs)


def test_calibration_error_of_known_probabilities():
    rng = np.random.default_rng(0)
    probs = rng.random((100_000, 2)) * 0.5
    y = rng.random(probs.shape) < probs
    np.testing.assert_allclose(calibration_error(y, probs), 0, atol=0.01)
    np.testing.assert_allclose(calibration_error(y, probs + 0.3), 0.3, atol=0.01)
    # What the docstring warns of: the same perfect probabilities, fewer images or more bins, a larger error.
    few = calibration_error(y[:200], probs[:200])
    assert (few > 3 * calibration_error(y, probs)).all()
    assert (calibration_error(y[:200], probs[:200], n_bins=50) > few).all()
    resampled = bootstrap_calibration_error(y[:2000], probs[:2000], np.arange(2000), 200)
    assert (resampled.mean(axis=0) > 1.2 * calibration_error(y[:2000], probs[:2000])).all()
    np.testing.assert_allclose(calibration_error([0, 1], [0.0, 1.0]), 0)
    np.testing.assert_allclose(calibration_error([1, 0], [0.0, 1.0]), 1)


@pytest.mark.parametrize("decimals", [None, 1])
def test_bootstrap_calibration_error_equals_a_plain_loop(decimals):
    y, probs = draw_probs(150, decimals=decimals)
    groups = np.random.default_rng(1).integers(0, 25, 150)
    samples = bootstrap_calibration_error(y, probs, groups, n_resamples=150, seed=4, n_bins=6)
    for c in range(4):
        bin_of_row = np.empty(150, dtype=int)
        for number, rows in enumerate(bins_by_hand(probs[:, c], 6)):
            bin_of_row[rows] = number
        for sample, rows in zip(samples[:, c], resample_rows(groups, 150, 4), strict=True):
            parts = [rows[bin_of_row[rows] == number] for number in range(6)]
            gaps = [len(part) * abs(y[part, c].mean() - probs[part, c].mean()) for part in parts if len(part)]
            assert sample == pytest.approx(sum(gaps) / len(rows), abs=1e-12)
    with pytest.raises(ValueError, match="groups has shape"):
        bootstrap_calibration_error(y, probs, groups[1:])


@pytest.mark.parametrize("value", [-0.001, 1.001, 7.0])
def test_probabilities_outside_their_range_are_refused(value):
    y, probs = draw_probs(20)
    probs[7, 2] = value
    for figure in (calibration_error, lambda *pair: bootstrap_calibration_error(*pair, np.arange(20))):
        with pytest.raises(ValueError, match=f"probability {value} in row 7, class 2"):
            figure(y, probs)
    with pytest.raises(ValueError, match=f"probability {value} in row 7, class 0"):
        reliability_curve(y[:, 2], probs[:, 2])
    for figure in (calibration_error, lambda *pair: reliability_curve(pair[0][:, 0], pair[1][:, 0], pair[2])):
        with pytest.raises(ValueError, match="n_bins is 0"):
            figure(*draw_probs(20), 0)


@pytest.mark.parametrize("k", [1, 2, 4, 9])
def test_top_k_by_brute_force(k):
    y, score = draw(100, decimals=0)
    expected = np.zeros(y.shape, dtype=bool)
    for row, (labels, scores) in enumerate(zip(y, score, strict=True)):
        for c in sorted(range(4), key=lambda c, scores=scores: (-scores[c], c))[:k]:
            expected[row, c] = labels[c]
    hits = top_k_hits(y, score, k)
    np.testing.assert_array_equal(hits, expected)
    assert hits.dtype == bool
    assert top_k_recall(y, score, k) == pytest.approx(expected.sum() / y.sum())
    # As the docstring says: one row a patient, drawn as often as it is there, gives back the recall.
    samples = bootstrap_ratio(hits.sum(axis=1), y.sum(axis=1), np.zeros(100), 3)
    np.testing.assert_allclose(samples, top_k_recall(y, score, k))


def test_top_k_recall_of_a_constant_ranking():
    y = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1]])
    assert top_k_recall(y, np.broadcast_to([0.9, 0.5, 0.1], (3, 3)), k=1) == 0.5
    assert top_k_recall(y, np.zeros((3, 3)), k=2) == 0.75
    assert np.isnan(top_k_recall(np.zeros((2, 3)), np.zeros((2, 3))))
    with pytest.raises(ValueError, match="k is 0"):
        top_k_recall(y, y, k=0)


def test_single_class_vectors_are_accepted():
    y, probs = draw_probs(50, 1)
    for figure in (choose_thresholds, fit_platt, calibration_error):
        np.testing.assert_array_equal(figure(y[:, 0], probs[:, 0]), figure(y, probs))
    table = rates_table(y[:, 0], probs[:, 0], 0.5, np.arange(50), ["a"])
    assert table.equals(rates_table(y, probs, [0.5], np.arange(50), ["a"]))
