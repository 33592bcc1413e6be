"""Measures whether probabilities are right, and corrects them by Platt scaling. NumPy, SciPy and pandas only.

`y_true` and `groups` are those of `auc`, with the same checks, and the same NaN where labels leave a figure undefined.
`probs` are scores in [0, 1] that claim to be probabilities; others raise ValueError naming row and class.
"""

import numpy as np
import pandas as pd
from scipy import optimize, sparse
from scipy.special import expit, logit
from scipy.stats import binomtest

from .auc import check_scores, rank_known
from .bootstrap import draw_patients, number_patients, ratio, refuse_where

N_BINS = 10  # of the reliability curve and the calibration error
_MIN_SLOPE = 0.01  # of Platt scaling, a standard deviation of the logits


def fit_platt(y_true, logits):
    """Fits Platt scaling: the probability of class c is `sigmoid(slope[c] * logit + intercept[c])`.

    Minimizes the log loss with Platt's smoothed targets (Platt, 1999; Lin, Lin and Weng, 2007). The slope is kept at
    0.01 a standard deviation of the logits, or more: the loss is convex, so where its minimum has a smaller slope, the
    best allowed one is that bound. It reports nearly the prevalence without inverting the ranking on which the AUC
    rests.

    Returns:
        Tuple `(slope, intercept)` of (classes,) float64; 1 and 0 without positives or without negatives, where there is
        nothing to fit.
    """
    positive, negative, logits = check_scores(y_true, logits)
    slope, intercept = np.ones(logits.shape[1]), np.zeros(logits.shape[1])
    for c in np.flatnonzero(positive.any(axis=0) & negative.any(axis=0)):
        known = positive[:, c] | negative[:, c]
        y, x = positive[known, c], logits[known, c]
        n_pos, n_neg = y.sum(), (~y).sum()
        target = np.where(y, (n_pos + 1) / (n_pos + 2), 1 / (n_neg + 2))
        center, spread = x.mean(), x.std()
        weights = (0.0, logit(target.mean()))
        if spread > 0:  # constant logits leave no slope to fit
            weights = _fit_sigmoid((x - center) / spread, target)
            slope[c] = weights[0] / spread
        intercept[c] = weights[1] - slope[c] * center
    return slope, intercept


def apply_platt(logits, slope, intercept):
    """Returns (n, classes) float64 probabilities of logits of that shape, with slope and intercept of `fit_platt`."""
    return expit(np.asarray(slope) * np.asarray(logits, dtype="float64") + np.asarray(intercept))


def reliability_curve(y_true, probs):
    """Compares the (n,) probabilities of one class with the frequencies of its label, bin by bin.

    Bins hold equal numbers of images, not equal ranges of probability: findings are rare, and ranges would leave most
    bins empty. Equal probabilities share a bin, so with many ties there are fewer bins and they differ in size.

    Returns:
        DataFrame with a row a bin, by rising probability: `mean_prob`, `frequency` (share of positives), `n` (images),
        `low` and `high`, the 95 % interval of the frequency (Wilson, JASA 1927), which takes images as independent.
    """
    positive, known, probs = _check_probs(y_true, probs)
    positive, probs = positive[known][:, None], probs[known][:, None]
    bins = np.unique(_bins(probs, np.ones_like(positive)), return_inverse=True)[1].ravel()
    n, k = np.bincount(bins), np.bincount(bins, weights=positive[:, 0])
    tests = [binomtest(int(part), int(whole)) for part, whole in zip(k, n, strict=True)]
    intervals = np.array([test.proportion_ci(0.95, "wilson") for test in tests]).reshape(-1, 2)
    columns = {"mean_prob": np.bincount(bins, weights=probs[:, 0]) / n, "frequency": k / n, "n": n}
    return pd.DataFrame({**columns, "low": intervals[:, 0], "high": intervals[:, 1]})


def calibration_error(y_true, probs):
    """Computes the expected calibration error: the mean distance of probability and frequency over bins of images.

    Bins are those of `reliability_curve` and weigh as many images as they hold (Naeini, Cooper and Hauskrecht, AAAI
    2015). In a finite sample the error is biased upward: a frequency misses even a perfect probability by chance, and
    the distance counts as an error in either direction. Fewer images mean more of it, so only errors of equally many
    images compare.

    Returns:
        (classes,) float64 in [0, 1]; NaN without images of known label.
    """
    positive, known, probs = _check_probs(y_true, probs)
    excess = _bin_sums((positive - probs) * known, _bins(probs, known), np.zeros(len(probs), dtype="int64"), 1)
    return ratio(np.abs(excess.toarray()).reshape(-1, N_BINS).sum(axis=1), known.sum(axis=0))


def bootstrap_calibration_error(y_true, probs, groups, n_resamples=1000, seed=0):
    """Computes the expected calibration error in the resamples of patients that `bootstrap_auc` draws.

    Bins stay those of the whole sample. The figures inherit the upward bias of `calibration_error` and add that of
    resampling: where probabilities are good, an interval of them can lie above the estimate.

    Returns:
        (n_resamples, classes) float64 in [0, 1]; NaN without images of known label.
    """
    positive, known, probs = _check_probs(y_true, probs)
    patient_of_row, n_patients = number_patients(groups, len(probs))
    excess = _bin_sums((positive - probs) * known, _bins(probs, known), patient_of_row, n_patients)
    images = np.stack([np.bincount(patient_of_row, of_class, n_patients) for of_class in known.T])
    result = np.full((n_resamples, probs.shape[1]), np.nan)
    for resamples, times in draw_patients(n_patients, n_resamples, seed):
        distances = np.abs(excess @ times).reshape(probs.shape[1], N_BINS, -1)
        result[resamples] = ratio(distances.sum(axis=1), images @ times).T
    return result


def _fit_sigmoid(x, target):
    """Finds slope (at least `_MIN_SLOPE`) and intercept of `sigmoid(slope * x + intercept)` with the least log loss."""
    design, start = np.column_stack([x, np.ones(len(x))]), np.array([0.0, logit(target.mean())])

    def loss(weights):
        z = design @ weights
        return np.mean(np.logaddexp(0, z) - target * z)

    def gradient(weights):
        return design.T @ (expit(design @ weights) - target) / len(x)

    def hessian(weights):
        p = expit(design @ weights)
        return (design.T * (p * (1 - p))) @ design / len(x)

    found = optimize.minimize(loss, start, jac=gradient, hess=hessian, method="trust-exact", options={"gtol": 1e-8})
    # One more step of Newton: the loss cannot tell weights apart that agree to half of their digits, its gradient can.
    weights = found.x - np.linalg.solve(hessian(found.x), gradient(found.x))
    if weights[0] >= _MIN_SLOPE:
        return weights
    reach = _MIN_SLOPE * np.abs(x).max() + 1e-6
    ends = start[1] - reach, start[1] + reach
    return _MIN_SLOPE, optimize.brentq(lambda b: gradient(np.array([_MIN_SLOPE, b]))[1], *ends, xtol=1e-14)


def _check_probs(y_true, probs):
    """Returns where labels are positive and where they are known, (n, classes) bool, and the probabilities."""
    positive, negative, probs = check_scores(y_true, probs)
    refuse_where((probs < 0) | (probs > 1), probs, "probability", "a number in [0, 1]")
    return positive, positive | negative, probs


def _bins(probs, known):
    """Numbers each class's bins by the midrank of the probability, which equal probabilities share.

    Only rows of known label count; the others are in the last bin.
    """
    if not len(probs):
        return np.zeros(probs.shape, dtype="int64")
    twice = np.rint(2 * rank_known(probs, known)).astype("int64")  # whole numbers, so that no bin edge is rounded
    return np.minimum((twice - 1) * N_BINS // np.maximum(2 * known.sum(axis=0), 1), N_BINS - 1)


def _bin_sums(values, bins, patient_of_row, n_patients):
    """Sums (n, classes) values by class and bin, classes * N_BINS rows, and by patient: a sparse matrix."""
    classes = values.shape[1]
    cells = (np.arange(classes) * N_BINS + bins).ravel(), np.repeat(patient_of_row, classes)
    return sparse.csr_array((values.ravel(), cells), shape=(classes * N_BINS, n_patients))
