"""Tests of evaluation.calibration against scikit-learn, SciPy, brute force and known answers."""

import warnings

import numpy as np
import pytest
from drawn_scores import draw, resample_rows
from scipy import stats
from scipy.special import expit
from sklearn import metrics
from sklearn.calibration import calibration_curve

from helpers.evaluation.calibration import (
    apply_platt,
    bootstrap_calibration_error,
    calibration_error,
    fit_platt,
    reliability_curve,
)


def draw_probs(n=300, classes=4, seed=0, decimals=None):
    """Labels and probabilities in [0, 1], neither perfect nor useless."""
    y, score = draw(n, classes, seed)
    probs = expit(score - 1)
    return y, probs if decimals is None else np.round(probs, decimals)


def test_undefined_figures_are_nan():
    empty = np.zeros((0, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(fit_platt(empty, empty), [[1, 1, 1], [0, 0, 0]])
        np.testing.assert_array_equal(calibration_error(empty, empty), [np.nan] * 3)
        np.testing.assert_array_equal(bootstrap_calibration_error(empty, empty, [], 2), [[np.nan] * 3] * 2)
        assert reliability_curve([], []).empty
        # Calibration needs no two classes.
        np.testing.assert_allclose(calibration_error([0, 0, 0, 0], [0.1, 0.2, 0.3, 0.4]), [0.25])


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
    np.testing.assert_allclose(error.mean(axis=0), 0, atol=1e-11)
    np.testing.assert_allclose((error * logits).mean(axis=0), 0, atol=1e-11)


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
        assert expit(a * cases[name][1] + b).mean() == pytest.approx(smoothed, abs=1e-9)
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
    np.testing.assert_array_equal(fit_platt(y[:, 0], logits[:, 0]), fit_platt(y[:, :1], logits[:, :1]))


def bins_by_hand(probs, n_bins=10):
    """Rows of each bin: images in order of probability, cut into equal numbers; equal ones go where their middle is."""
    ranked = np.sort(probs)
    bins = {}
    for value in np.unique(probs):
        place = np.flatnonzero(ranked == value).mean()  # 0 for the lowest image, n - 1 for the highest
        number = next(b for b in range(n_bins) if (2 * place + 1) * n_bins < 2 * (b + 1) * len(probs))
        bins.setdefault(number, []).extend(np.flatnonzero(probs == value))
    return list(bins.values())


@pytest.mark.parametrize("n", [7, 203])
@pytest.mark.parametrize("decimals", [None, 2, 1, 0])
def test_reliability_and_calibration_error_by_hand(decimals, n):
    y, probs = draw_probs(n, decimals=decimals)
    for c in range(4):
        curve = reliability_curve(y[:, c], probs[:, c])
        bins = bins_by_hand(probs[:, c])
        np.testing.assert_allclose(curve["mean_prob"], [probs[rows, c].mean() for rows in bins])
        np.testing.assert_allclose(curve["frequency"], [y[rows, c].mean() for rows in bins])
        np.testing.assert_array_equal(curve["n"], [len(rows) for rows in bins])
        k = curve["frequency"] * curve["n"]
        z = stats.norm.ppf(0.975)  # Wilson's interval by its formula
        half = z / (curve["n"] + z**2) * np.sqrt(k * (curve["n"] - k) / curve["n"] + z**2 / 4)
        center = (k + z**2 / 2) / (curve["n"] + z**2)
        np.testing.assert_allclose(curve["low"], center - half, atol=1e-12)
        np.testing.assert_allclose(curve["high"], center + half, atol=1e-12)
        assert ((curve["low"] <= curve["frequency"]) & (curve["frequency"] <= curve["high"])).all()
        gap = (curve["mean_prob"] - curve["frequency"]).abs()
        assert calibration_error(y, probs)[c] == pytest.approx((gap * curve["n"]).sum() / n)
        if decimals is None:
            assert curve["n"].max() - curve["n"].min() <= 1
            assert len(curve) == min(n, 10)
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


def test_calibration_error_of_known_probabilities():
    rng = np.random.default_rng(0)
    probs = rng.random((100_000, 2)) * 0.5
    y = rng.random(probs.shape) < probs
    np.testing.assert_allclose(calibration_error(y, probs), 0, atol=0.01)
    np.testing.assert_allclose(calibration_error(y, probs + 0.3), 0.3, atol=0.01)
    # What the docstring warns of: the same perfect probabilities, fewer images, a larger error.
    assert (calibration_error(y[:200], probs[:200]) > 3 * calibration_error(y, probs)).all()
    resampled = bootstrap_calibration_error(y[:2000], probs[:2000], np.arange(2000), 200)
    assert (resampled.mean(axis=0) > 1.2 * calibration_error(y[:2000], probs[:2000])).all()
    np.testing.assert_allclose(calibration_error([0, 1], [0.0, 1.0]), 0)
    np.testing.assert_allclose(calibration_error([1, 0], [0.0, 1.0]), 1)


@pytest.mark.parametrize("decimals", [None, 1])
def test_bootstrap_calibration_error_equals_a_plain_loop(decimals):
    y, probs = draw_probs(150, decimals=decimals)
    groups = np.random.default_rng(1).integers(0, 25, 150)
    samples = bootstrap_calibration_error(y, probs, groups, n_resamples=150, seed=4)
    rows_of_resample = resample_rows(groups, 150, 4)[::7]
    for c in range(4):
        bin_of_row = np.empty(150, dtype=int)
        for number, rows in enumerate(bins_by_hand(probs[:, c])):
            bin_of_row[rows] = number
        for sample, rows in zip(samples[::7, c], rows_of_resample, strict=True):
            parts = [rows[bin_of_row[rows] == number] for number in range(10)]
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
