"""Turns scores into decisions and probabilities: thresholds, rates, calibration, top-k. NumPy and SciPy, no TensorFlow.

`y_true` and `y_score` are those of `statistics`, with the same checks and the same NaN where the labels leave a figure
undefined. `probs` are scores in [0, 1] that claim to be probabilities; others raise ValueError naming row and class.
"""

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.special import expit, logit, ndtri
from scipy.stats import rankdata

from .auc import (
    bootstrap_ratio,
    check_names,
    check_one_class,
    check_scores,
    count_above,
    draw_patients,
    interval_around,
    number_patients,
    ratio,
    refuse_where,
)

_MIN_SLOPE = 0.01


def confusion_at(y_true, y_score, thresholds):
    """Counts the outcomes where a score at or above its class's threshold is called positive.

    Args:
        y_true: (n, classes) labels.
        y_score: (n, classes) scores.
        thresholds: (classes,) thresholds, or one number for all; at NaN nothing is called and every rate is NaN.

    Returns:
        Dict of (classes,) arrays: int64 `tp`, `fp`, `fn`, `tn`, and float64 `sensitivity`, `specificity`, `ppv`, `npv`
        in [0, 1], NaN where nothing is there to divide by.

    Raises:
        ValueError: if labels, scores or thresholds are malformed.
    """
    y, score = check_scores(y_true, y_score)
    thresholds = np.asarray(thresholds, dtype="float64")
    if thresholds.shape not in ((), (y.shape[1],)):
        raise ValueError(f"thresholds has shape {thresholds.shape}; expected () or ({y.shape[1]},)")
    called = score >= thresholds
    tp, fp = (called & y).sum(axis=0), (called & ~y).sum(axis=0)
    fn, tn = (~called & y).sum(axis=0), (~called & ~y).sum(axis=0)
    rates = {"sensitivity": (tp, tp + fn), "specificity": (tn, tn + fp), "ppv": (tp, tp + fp), "npv": (tn, tn + fn)}
    known = ~np.isnan(thresholds)
    return {
        **{"tp": tp, "fp": fp, "fn": fn, "tn": tn},
        **{name: ratio(part, np.where(known, whole, 0)) for name, (part, whole) in rates.items()},
    }


def choose_thresholds(y_true, y_score, method="youden", sensitivity=None):
    """Chooses an operating threshold for each class among its observed scores.

    "youden" takes the score at which sensitivity + specificity - 1 is largest (Youden, 1950), "f1" that at which
    2 tp / (2 tp + fp + fn) is, "sensitivity" the highest that reaches the wished sensitivity. Of several equally good
    scores the highest is taken, which calls the fewest images. A score equal to the threshold is positive, as in
    `confusion_at`.

    Args:
        y_true: (n, classes) labels.
        y_score: (n, classes) scores.
        method: "youden", "f1" or "sensitivity".
        sensitivity: the wished sensitivity in (0, 1], for the method of that name only.

    Returns:
        (classes,) float64 thresholds; NaN without positives or without negatives.

    Raises:
        ValueError: if labels or scores are malformed, or method and sensitivity do not fit.
    """
    if method not in _MERITS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(_MERITS)}")
    if (method == "sensitivity") != (sensitivity is not None):
        raise ValueError(f"method {method!r} with sensitivity {sensitivity}; they go together, or neither is given")
    if sensitivity is not None and not 0 < sensitivity <= 1:
        raise ValueError(f"sensitivity is {sensitivity}; expected a share above 0 and at most 1")
    y, score = check_scores(y_true, y_score)
    result = np.full(y.shape[1], np.nan)
    for c in np.flatnonzero(y.any(axis=0) & ~y.all(axis=0)):
        tp, fp, thresholds = count_above(y[:, c], score[:, c])
        # Thresholds descend, and the first of equal merits wins.
        result[c] = thresholds[np.argmax(_MERITS[method](tp, fp, sensitivity))]
    return result


def rates_table(y_true, y_score, thresholds, groups, class_names, n_resamples=1000, seed=0, level=0.95):
    """Builds the table of outcomes and rates at thresholds, with patient-wise bootstrap intervals.

    The thresholds are taken as given: choose them on other images, or the rates are too good.

    Args:
        y_true: (n, classes) labels; n may be 0.
        y_score: (n, classes) scores.
        thresholds: (classes,) thresholds, or one number for all, as in `confusion_at`.
        groups: (n,) patient of each row.
        class_names: the classes' names, in column order.
        n_resamples: number of resamples.
        seed: seed of the draw.
        level: share of the resamples inside the interval.

    Returns:
        DataFrame with a row a class: `pathology`, `threshold`, `tp`, `fp`, `fn`, `tn`, then `sensitivity`,
        `specificity`, `ppv` and `npv`, each followed by its `_low` and `_high`. Rates that nothing defines are NaN.

    Raises:
        ValueError: if labels, scores, thresholds, groups or names are malformed.
    """
    y, score = check_scores(y_true, y_score)
    check_names(class_names, y.shape[1])
    counts = confusion_at(y, score, thresholds)
    table = pd.DataFrame({"pathology": list(class_names)})
    table["threshold"] = np.broadcast_to(np.asarray(thresholds, dtype="float64"), y.shape[1:])
    for name in ("tp", "fp", "fn", "tn"):
        table[name] = counts[name]
    called = score >= thresholds
    of = {"sensitivity": (called, y), "specificity": (~called, ~y), "ppv": (y, called), "npv": (~y, ~called)}
    hits, cases = (np.hstack(parts) for parts in zip(*((a & b, b) for a, b in of.values()), strict=True))
    samples = np.split(bootstrap_ratio(hits, cases, groups, n_resamples, seed), len(of), axis=1)
    for name, values in zip(of, samples, strict=True):
        table[name] = counts[name]
        table[f"{name}_low"], table[f"{name}_high"] = interval_around(counts[name], values, level, 0, 1)
    return table


def fit_platt(y_true, logits):
    """Fits Platt scaling: the probability of class c is `sigmoid(slope[c] * logit + intercept[c])`.

    Newton's method on the log loss with Platt's smoothed targets (Platt, 1999; Lin, Lin and Weng, 2007). The slope is
    kept at 0.01 a standard deviation of the logits, or more: the loss is convex, so where its minimum has a smaller
    slope, the best allowed one is that bound. It reports nearly the prevalence without inverting the ranking on which
    the AUC rests.

    Args:
        y_true: (n, classes) labels.
        logits: (n, classes) logits.

    Returns:
        Tuple `(slope, intercept)` of (classes,) float64; 1 and 0 without positives or without negatives, where there is
        nothing to fit.

    Raises:
        ValueError: if labels or logits are malformed.
    """
    y, logits = check_scores(y_true, logits)
    slope, intercept = np.ones(y.shape[1]), np.zeros(y.shape[1])
    for c in np.flatnonzero(y.any(axis=0) & ~y.all(axis=0)):
        n_pos, n_neg = y[:, c].sum(), (~y[:, c]).sum()
        target = np.where(y[:, c], (n_pos + 1) / (n_pos + 2), 1 / (n_neg + 2))
        center, spread = logits[:, c].mean(), logits[:, c].std()
        # Standardized logits keep the Hessian well conditioned; constant ones leave no slope to fit.
        x = (logits[:, c] - center) / spread if spread > 0 else np.zeros(len(y))
        weights = _newton(x, target, np.array([0.0, logit(target.mean())]), free=spread > 0)
        if spread > 0 and weights[0] < _MIN_SLOPE:
            weights = _newton(x, target, np.array([_MIN_SLOPE, weights[1]]), free=False)
        slope[c] = weights[0] / spread if spread > 0 else 1.0
        intercept[c] = weights[1] - slope[c] * center
    return slope, intercept


def apply_platt(logits, slope, intercept):
    """Applies Platt scaling as `fit_platt` fits it: `sigmoid(slope * logits + intercept)`.

    Args:
        logits: (n, classes) logits.
        slope: (classes,) slopes.
        intercept: (classes,) intercepts.

    Returns:
        (n, classes) float64 probabilities.
    """
    return expit(np.asarray(slope) * np.asarray(logits, dtype="float64") + np.asarray(intercept))


def reliability_curve(y_true, probs, n_bins=10):
    """Compares the probabilities of one class with the frequencies of its label, bin by bin.

    Bins hold equal numbers of images, not equal ranges of probability: findings are rare, and ranges would leave most
    bins empty. Equal probabilities share a bin, so with many ties there are fewer bins and they differ in size.

    Args:
        y_true: (n,) labels.
        probs: (n,) probabilities.
        n_bins: number of bins wished.

    Returns:
        DataFrame with a row a bin, by rising probability: `mean_prob`, `frequency` (share of positives), `n` (images),
        `low` and `high`, the 95 % interval of the frequency (Wilson, JASA 1927), which takes images as independent.

    Raises:
        ValueError: if labels or probabilities are malformed or hold several classes, or n_bins is below 1.
    """
    y, probs = check_one_class(*_check_probs(y_true, probs))
    _, bins = np.unique(_bins(probs[:, None], n_bins), return_inverse=True)
    n, bins = np.bincount(bins.ravel()), bins.ravel()
    k = np.bincount(bins, weights=y)
    z = ndtri(0.975)
    center, half = (k + z**2 / 2) / (n + z**2), z / (n + z**2) * np.sqrt(k * (n - k) / n + z**2 / 4)
    columns = {"mean_prob": np.bincount(bins, weights=probs) / n, "frequency": k / n, "n": n}
    # Rounding must not leave a frequency of 0 or 1 outside its interval.
    low, high = np.where(k == 0, 0, center - half), np.where(k == n, 1, center + half)
    return pd.DataFrame({**columns, "low": low, "high": high})


def calibration_error(y_true, probs, n_bins=10):
    """Computes the expected calibration error: the mean distance of probability and frequency over bins of images.

    Bins are those of `reliability_curve` and weigh as many images as they hold (Naeini, Cooper and Hauskrecht, AAAI
    2015). In a finite sample the error is biased upward: a frequency misses even a perfect probability by chance, and
    the distance counts as an error in either direction. Fewer images or more bins mean more of it, so only errors of
    equally many images and bins compare.

    Args:
        y_true: (n, classes) labels.
        probs: (n, classes) probabilities.
        n_bins: number of bins wished.

    Returns:
        (classes,) float64 in [0, 1]; NaN without images.

    Raises:
        ValueError: if labels or probabilities are malformed or n_bins is below 1.
    """
    y, probs = _check_probs(y_true, probs)
    excess = _bin_sums(y - probs, _bins(probs, n_bins), np.zeros(len(y), dtype="int64"), 1, n_bins)
    return ratio(np.abs(excess.toarray()).reshape(-1, n_bins).sum(axis=1), len(y))


def bootstrap_calibration_error(y_true, probs, groups, n_resamples=1000, seed=0, n_bins=10):
    """Computes the expected calibration error in the resamples of patients that `bootstrap_auc` draws.

    Bins stay those of the whole sample. The figures inherit the upward bias of `calibration_error` and add that of
    resampling: where probabilities are good, an interval of them can lie above the estimate.

    Args:
        y_true: (n, classes) labels.
        probs: (n, classes) probabilities.
        groups: (n,) patient of each row.
        n_resamples: number of resamples.
        seed: seed of the draw.
        n_bins: number of bins wished.

    Returns:
        (n_resamples, classes) float64 in [0, 1]; NaN without images.

    Raises:
        ValueError: if labels, probabilities or groups are malformed or n_bins is below 1.
    """
    y, probs = _check_probs(y_true, probs)
    patient_of_row, n_patients = number_patients(groups, len(y))
    excess = _bin_sums(y - probs, _bins(probs, n_bins), patient_of_row, n_patients, n_bins)
    images = np.bincount(patient_of_row, minlength=n_patients)
    result = np.full((n_resamples, y.shape[1]), np.nan)
    for resamples, times in draw_patients(n_patients, n_resamples, seed):
        distances = np.abs(excess @ times).reshape(y.shape[1], n_bins, -1)
        result[resamples] = ratio(distances.sum(axis=1), images @ times).T
    return result


def top_k_hits(y_true, y_score, k=5):
    """Finds the true labels that are among the k highest scores of their image.

    Scores of different classes are compared, so they should be probabilities. The interval of `top_k_recall` comes from
    `bootstrap_ratio(hits.sum(axis=1), y_true.sum(axis=1), groups)`.

    Args:
        y_true: (n, classes) labels.
        y_score: (n, classes) scores; of tied classes the earlier ranks higher.
        k: classes named for each image.

    Returns:
        (n, classes) bool.

    Raises:
        ValueError: if labels or scores are malformed or k is below 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}; expected 1 or more")
    y, score = check_scores(y_true, y_score)
    named = np.zeros(y.shape, dtype=bool)
    np.put_along_axis(named, np.argsort(-score, axis=1, kind="stable")[:, :k], True, axis=1)
    return named & y


def top_k_recall(y_true, y_score, k=5):
    """Computes the share of all true labels that are among the k highest scores of their image.

    The same row of scores for every image, for instance the prevalences, gives the constant ranking that any model must
    beat.

    Args:
        y_true: (n, classes) labels.
        y_score: (n, classes) scores, as in `top_k_hits`.
        k: classes named for each image.

    Returns:
        Share in [0, 1]; NaN without any true label.

    Raises:
        ValueError: if labels or scores are malformed or k is below 1.
    """
    return float(ratio(top_k_hits(y_true, y_score, k).sum(), np.sum(y_true)))


# What each method of `choose_thresholds` makes as large as it can, from counts at each distinct score. The first is
# Youden's index times positives times negatives: in whole numbers equal indices are equal.
_MERITS = {
    "youden": lambda tp, fp, _: tp * fp[-1] - fp * tp[-1],
    "f1": lambda tp, fp, _: 2 * tp / (tp + fp + tp[-1]),
    "sensitivity": lambda tp, fp, wished: tp / tp[-1] >= wished,
}


def _check_probs(y_true, probs):
    y, probs = check_scores(y_true, probs)
    refuse_where((probs < 0) | (probs > 1), probs, "probability", "a number in [0, 1]")
    return y, probs


def _bins(probs, n_bins):
    """Numbers each class's bins by the midrank of the probability, which equal probabilities share."""
    if n_bins < 1:
        raise ValueError(f"n_bins is {n_bins}; expected 1 or more")
    if not len(probs):
        return np.zeros(probs.shape, dtype="int64")
    twice = np.rint(2 * rankdata(probs, axis=0)).astype("int64")  # Whole numbers, so that no bin edge is rounded.
    return (twice - 1) * n_bins // (2 * len(probs))


def _bin_sums(values, bins, patient_of_row, n_patients, n_bins):
    """Sums (n, classes) values by class and bin, classes * n_bins rows, and by patient: a sparse matrix."""
    classes = values.shape[1]
    cells = (np.arange(classes) * n_bins + bins).ravel(), np.repeat(patient_of_row, classes)
    return sparse.csr_array((values.ravel(), cells), shape=(classes * n_bins, n_patients))


def _newton(x, target, start, free):
    """Minimizes the log loss of `sigmoid(w[0] * x + w[1])`; without `free`, w[0] stays where it starts."""
    design = np.column_stack([x, np.ones(len(x))])
    active = slice(0 if free else 1, 2)

    def loss(weights):
        z = design @ weights
        return np.mean(np.logaddexp(0, z) - target * z)

    weights, current = np.array(start, dtype="float64"), loss(start)
    for _ in range(100):
        p = expit(design @ weights)
        gradient = (design.T @ (p - target) / len(x))[active]
        if np.abs(gradient).max() < 1e-12:
            break
        hessian = (design.T * (p * (1 - p)) @ design / len(x))[active, active]
        # The smallest addition that lets saturated probabilities through.
        step = np.linalg.solve(hessian + 1e-12 * np.eye(len(gradient)), gradient)
        size = 1.0
        while size > 1e-10:
            trial = weights.copy()
            trial[active] -= size * step
            if loss(trial) < current:
                break
            size /= 2
        else:
            break
        weights, current = trial, loss(trial)
    return weights
