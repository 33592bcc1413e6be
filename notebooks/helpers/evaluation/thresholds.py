"""Turns scores into decisions: operating thresholds, the rates at them, and lists of the top k. NumPy and pandas only.

Arguments are those of `auc`, with the same checks, and the same NaN where labels leave a figure undefined. `thresholds`
are (classes,), or one number for all; at NaN nothing is called and every rate is NaN. Notebook 3 writes what is chosen
here to thresholds.json.
"""

import numpy as np
import pandas as pd

from .auc import check_scores
from .bootstrap import bootstrap_ratio, interval_around, ratio

# With fewer images with the finding than this, what is chosen on them (a threshold, Platt's slope) is little more than
# chance, and is marked wherever it is shown: at a sensitivity of 0.8, 20 of them leave a standard error of 0.09.
FEW_POSITIVES = 20

# What each method of `choose_thresholds` makes as large as it can, from the true and false positives at each distinct
# score. The first is Youden's index times positives times negatives: in whole numbers equal indices are equal.
_MERITS = {
    "youden": lambda tp, fp, _: tp * fp[-1] - fp * tp[-1],
    "f1": lambda tp, fp, _: 2 * tp / (tp + fp + tp[-1]),
    "sensitivity": lambda tp, fp, wished: tp / tp[-1] >= wished,
}


def confusion_at(y_true, y_score, thresholds):
    """Counts the outcomes where a score at or above its class's threshold is called positive.

    Returns:
        Dict of (classes,) arrays: int64 `tp`, `fp`, `fn`, `tn`, and float64 `sensitivity`, `specificity`, `ppv`, `npv`
        in [0, 1], NaN where nothing is there to divide by.
    """
    positive, negative, score = check_scores(y_true, y_score)
    called = score >= thresholds
    tp, fp = (called & positive).sum(axis=0), (called & negative).sum(axis=0)
    fn, tn = (~called & positive).sum(axis=0), (~called & negative).sum(axis=0)
    rates = {"sensitivity": (tp, tp + fn), "specificity": (tn, tn + fp), "ppv": (tp, tp + fp), "npv": (tn, tn + fn)}
    known = ~np.isnan(np.asarray(thresholds, dtype="float64"))
    return {
        **{"tp": tp, "fp": fp, "fn": fn, "tn": tn},
        **{name: ratio(part, np.where(known, whole, 0)) for name, (part, whole) in rates.items()},
    }


def choose_thresholds(y_true, y_score, method="youden", sensitivity=None):
    """Chooses an operating threshold for each class among its observed scores.

    "youden" takes the score at which sensitivity + specificity - 1 is largest (Youden, 1950), "f1" that at which
    2 tp / (2 tp + fp + fn) is, "sensitivity" the highest that reaches the wished sensitivity. Of several equally good
    scores the highest is taken, which calls the fewest images. A score equal to the threshold is positive, as in
    `confusion_at`. `sensitivity` is the wished one in (0, 1], for the method of that name only.

    Returns:
        (classes,) float64 thresholds; NaN without positives or without negatives.
    """
    positive, negative, score = check_scores(y_true, y_score)
    result = np.full(score.shape[1], np.nan)
    for c in np.flatnonzero(positive.any(axis=0) & negative.any(axis=0)):
        known = np.flatnonzero(positive[:, c] | negative[:, c])
        order = known[np.argsort(-score[known, c], kind="stable")]
        sorted_y, sorted_score = positive[order, c], score[order, c]
        last = np.flatnonzero(np.append(np.diff(sorted_score) != 0, True))  # of the images that share a score
        tp = np.cumsum(sorted_y)[last]
        # Thresholds descend, and the first of equal merits wins.
        result[c] = sorted_score[last[np.argmax(_MERITS[method](tp, last + 1 - tp, sensitivity))]]
    return result


def rates_table(y_true, y_score, thresholds, groups, class_names, n_resamples=1000, seed=0, level=0.95):
    """Builds the table of outcomes and rates at thresholds, with patient-wise bootstrap intervals.

    The thresholds are taken as given: choose them on other images, or the rates are too good.

    Returns:
        DataFrame with a row a class: `pathology`, `threshold`, `tp`, `fp`, `fn`, `tn`, then `sensitivity`,
        `specificity`, `ppv` and `npv`, each followed by its `_low` and `_high`. Rates that nothing defines are NaN.
    """
    positive, negative, score = check_scores(y_true, y_score)
    counts = confusion_at(y_true, y_score, thresholds)
    table = pd.DataFrame({"pathology": list(class_names)})
    table["threshold"] = np.broadcast_to(np.asarray(thresholds, dtype="float64"), score.shape[1:])
    for name in ("tp", "fp", "fn", "tn"):
        table[name] = counts[name]
    called = score >= thresholds
    right = called & positive, ~called & negative
    known = positive | negative
    of = {"sensitivity": (right[0], positive), "specificity": (right[1], negative)}
    of |= {"ppv": (right[0], called & known), "npv": (right[1], ~called & known)}
    hits, cases = (np.hstack(parts) for parts in zip(*of.values(), strict=True))
    samples = np.split(bootstrap_ratio(hits, cases, groups, n_resamples, seed), len(of), axis=1)
    for name, values in zip(of, samples, strict=True):
        table[name] = counts[name]
        table[f"{name}_low"], table[f"{name}_high"] = interval_around(counts[name], values, level, 0, 1)
    return table


def top_k_hits(y_true, y_score, k):
    """Finds the true labels that are among the k highest scores of their image.

    Scores of different classes are compared, so they should be probabilities. The same row of scores for every image,
    for instance the prevalences, gives the constant ranking that any model must beat. Of tied classes the earlier ranks
    higher.

    Returns:
        (n, classes) bool.
    """
    positive, _, score = check_scores(y_true, y_score)
    named = np.zeros(score.shape, dtype=bool)
    np.put_along_axis(named, np.argsort(-score, axis=1, kind="stable")[:, :k], True, axis=1)
    return named & positive
