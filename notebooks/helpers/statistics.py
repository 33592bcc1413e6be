"""Measures multi-label scores: AUC with intervals, curves, thresholds, calibration. NumPy and SciPy, no TensorFlow.

Everywhere `y_true` is (n, classes) of 0 and 1 and `y_score` (n, classes) of finite numbers, larger for more suspicious;
a vector counts as one class. Labels or scores outside these raise ValueError naming the row and the class. A figure
that the labels leave undefined, such as the AUC of a class without positives, is NaN and is never dropped.
"""

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.special import expit, logit
from scipy.stats import rankdata

_CHUNK = 128  # Resamples at once: 2 * positives * 128 int32 is 6 MB for the commonest finding of the official test set.
_MIN_SLOPE = 0.01


def roc_auc(y_true, y_score):
    """Computes the exact area under the ROC curve (Mann-Whitney); a tie of positive and negative counts one half.

    Args:
        y_true: (n, classes) labels.
        y_score: (n, classes) scores.

    Returns:
        (classes,) float64 in [0, 1]; NaN without positives or without negatives.

    Raises:
        ValueError: if labels or scores are malformed.
    """
    y, score = _check(y_true, y_score)
    n_pos, n_neg = y.sum(axis=0), (~y).sum(axis=0)
    ranks = rankdata(score, axis=0) if len(y) else score
    wins = (ranks * y).sum(axis=0) - n_pos * (n_pos + 1) / 2  # Multiples of one half, hence exact.
    return _ratio(wins, n_pos * n_neg)


def average_precision(y_true, y_score):
    """Computes the average precision: the sum over distinct scores of the gain in recall times the precision there.

    Args:
        y_true: (n, classes) labels.
        y_score: (n, classes) scores.

    Returns:
        (classes,) float64 in [0, 1], as scikit-learn defines it; NaN without positives.

    Raises:
        ValueError: if labels or scores are malformed.
    """
    y, score = _check(y_true, y_score)
    result = np.full(y.shape[1], np.nan)
    for c in np.flatnonzero(y.any(axis=0)):
        tp, fp, _ = _cumulated(y[:, c], score[:, c])
        result[c] = np.sum(np.diff(tp, prepend=0) / tp[-1] * (tp / (tp + fp)))
    return result


def bootstrap_auc(y_true, y_score, groups, n_resamples=1000, seed=0):
    """Computes the AUC in bootstrap resamples of patients, each drawn with all its images.

    A patient's images resemble each other, so drawing images alone would give intervals that are too narrow. All
    classes share a resample's patients, so that means over classes and differences between two models (same `groups`,
    same seed) can be formed resample by resample.

    Args:
        y_true: (n, classes) labels.
        y_score: (n, classes) scores.
        groups: (n,) patient of each row.
        n_resamples: number of resamples.
        seed: seed of the draw.

    Returns:
        (n_resamples, classes) float64, exact under ties; NaN where a resample holds one class only.

    Raises:
        ValueError: if labels, scores or groups are malformed.
    """
    y, score = _check(y_true, y_score)
    groups = np.asarray(groups)
    if groups.shape != (len(y),):
        raise ValueError(f"groups has shape {groups.shape}; expected ({len(y)},), one patient a row")
    result = np.full((n_resamples, y.shape[1]), np.nan)
    if not len(y):
        return result
    patients, patient_of_row = np.unique(groups, return_inverse=True)
    parts = {c: _segments(y[:, c], score[:, c], patient_of_row, len(patients)) for c in range(y.shape[1])}
    rng = np.random.default_rng(seed)
    for start in range(0, n_resamples, _CHUNK):
        size = min(_CHUNK, n_resamples - start)
        drawn = rng.integers(0, len(patients), size=(size, len(patients)))
        times = np.stack([np.bincount(row, minlength=len(patients)) for row in drawn], axis=1).astype("int32")
        for c, (positives, negatives) in parts.items():
            at = positives @ times  # (distinct positive scores, resamples): positive images at each
            below = np.cumsum(negatives @ times, axis=0)
            # Twice the negatives below a positive score plus those tied with it once.
            twice = below[:-1:2] + below[1::2]
            wins = np.einsum("kr,kr->r", at, twice, dtype="float64") / 2
            result[start : start + size, c] = _ratio(wins, at.sum(axis=0, dtype="int64") * below[-1].astype("int64"))
    return result


def percentile_interval(samples, level=0.95):
    """Computes the central percentile interval along the first axis, passing over NaN.

    Args:
        samples: (n_resamples, ...) resampled figures.
        level: share of the resamples inside, in (0, 1).

    Returns:
        Tuple `(low, high)` of arrays with the shape of one sample; NaN where all samples are.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a share between 0 and 1")
    samples = np.asarray(samples, dtype="float64")
    columns = samples.reshape(len(samples), int(np.prod(samples.shape[1:])))
    ends = np.full((2, columns.shape[1]), np.nan)
    for c in range(columns.shape[1]):
        finite = columns[~np.isnan(columns[:, c]), c]
        if len(finite):
            ends[:, c] = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    low, high = ends.reshape(2, *samples.shape[1:])
    return low, high


def auc_table(y_true, y_score, groups, class_names, n_resamples=1000, seed=0, level=0.95):
    """Builds the table of AUCs with patient-wise bootstrap intervals.

    Args:
        y_true: (n, classes) labels; n may be 0.
        y_score: (n, classes) scores.
        groups: (n,) patient of each row.
        class_names: the classes' names, in column order.
        n_resamples: number of resamples.
        seed: seed of the draw.
        level: share of the resamples inside the interval.

    Returns:
        DataFrame with a row a class and a last row `mean`: `pathology`, `n_pos`, `n_neg`, `n_pos_patients`, `auc`,
        `auc_low`, `auc_high`, `ap`. In the row `mean` the counts are totals over the classes, `auc` is the mean over
        classes whose AUC is defined, its interval that of the same mean in each resample (without the classes that the
        resample leaves undefined), and `ap` the mean over classes with positives.

    Raises:
        ValueError: if labels, scores, groups or names are malformed.
    """
    y, score = _check(y_true, y_score)
    if len(class_names) != y.shape[1]:
        raise ValueError(f"{len(class_names)} class names for {y.shape[1]} columns")
    samples = bootstrap_auc(y, score, groups, n_resamples, seed)
    auc, ap = roc_auc(y, score), average_precision(y, score)
    n_patients = [len(np.unique(np.asarray(groups)[y[:, c]])) for c in range(y.shape[1])]
    # A class that is undefined in the study is undefined in every resample, so it never enters the means.
    low, high = percentile_interval(np.column_stack([samples, _nan_mean(samples)]), level)
    counts = {"n_pos": y.sum(axis=0), "n_neg": (~y).sum(axis=0), "n_pos_patients": n_patients}
    table = pd.DataFrame(
        {
            "pathology": [*class_names, "mean"],
            **{name: np.append(count, np.sum(count)).astype("int64") for name, count in counts.items()},
            "auc": np.append(auc, _nan_mean(auc)),
        }
    )
    # With a handful of patients the percentiles can miss the estimate, which would read as an error in a table. The
    # margin keeps it inside for programs that compute the same AUC with another last bit. Where every resample lacks
    # a class, nothing is known and the interval is the whole range.
    table["auc_low"] = np.maximum(np.minimum(np.nan_to_num(low, nan=0.0), table["auc"] - 1e-9), 0)
    table["auc_high"] = np.minimum(np.maximum(np.nan_to_num(high, nan=1.0), table["auc"] + 1e-9), 1)
    table["ap"] = np.append(ap, _nan_mean(ap))
    return table


def roc_curve(y_true, y_score):
    """Computes the ROC curve of one class, reduced to its corners.

    Args:
        y_true: (n,) labels.
        y_score: (n,) scores.

    Returns:
        Tuple `(fpr, tpr, thresholds)`, thresholds descending from infinity; a rate without cases is NaN throughout.

    Raises:
        ValueError: if labels or scores are malformed or hold several classes.
    """
    tp, fp, thresholds = _cumulated(*_check_one(y_true, y_score))
    if len(tp) > 2:
        bends = np.flatnonzero((np.diff(tp, 2) != 0) | (np.diff(fp, 2) != 0)) + 1
        kept = np.concatenate([[0], bends, [len(tp) - 1]])
        tp, fp, thresholds = tp[kept], fp[kept], thresholds[kept]
    tp, fp = np.concatenate([[0], tp]), np.concatenate([[0], fp])
    return _ratio(fp, fp[-1]), _ratio(tp, tp[-1]), np.concatenate([[np.inf], thresholds])


def precision_recall_curve(y_true, y_score):
    """Computes the precision-recall curve of one class, without the inner points of constant recall.

    Args:
        y_true: (n,) labels.
        y_score: (n,) scores.

    Returns:
        Tuple `(precision, recall, thresholds)` by ascending threshold; the first two end with the point (1, 0), which
        has no threshold. Recall is NaN without positives.

    Raises:
        ValueError: if labels or scores are malformed or hold several classes.
    """
    tp, fp, thresholds = _cumulated(*_check_one(y_true, y_score))
    if len(tp) > 2:
        change = np.diff(tp) != 0
        kept = np.concatenate([[0], np.flatnonzero(change[:-1] | change[1:]) + 1, [len(tp) - 1]])
        tp, fp, thresholds = tp[kept], fp[kept], thresholds[kept]
    recall = _ratio(tp, tp[-1] if len(tp) else 0)
    return np.append(_ratio(tp, tp + fp)[::-1], 1.0), np.append(recall[::-1], 0.0), thresholds[::-1]


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
    y, score = _check(y_true, y_score)
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
        **{name: _ratio(part, np.where(known, whole, 0)) for name, (part, whole) in rates.items()},
    }


def choose_thresholds(y_true, y_score, method="youden"):
    """Chooses an operating threshold for each class.

    "youden" takes the observed score at which sensitivity + specificity - 1 is largest (Youden, 1950); of several, the
    highest, which calls the fewest films. A score equal to the threshold is positive, as in `confusion_at`.

    Args:
        y_true: (n, classes) labels.
        y_score: (n, classes) scores.
        method: "youden".

    Returns:
        (classes,) float64 thresholds; NaN without positives or without negatives.

    Raises:
        ValueError: if labels or scores are malformed or the method is unknown.
    """
    if method != "youden":
        raise ValueError(f"method is {method!r}; expected 'youden'")
    y, score = _check(y_true, y_score)
    result = np.full(y.shape[1], np.nan)
    for c in np.flatnonzero(y.any(axis=0) & ~y.all(axis=0)):
        tp, fp, thresholds = _cumulated(y[:, c], score[:, c])
        # Youden's index times positives times negatives: in whole numbers equal indices are equal.
        result[c] = thresholds[np.argmax(tp * fp[-1] - fp * tp[-1])]
    return result


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
    y, logits = _check(y_true, logits)
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


def top_k_recall(y_true, y_score, k=5):
    """Computes the share of all true labels that are among the k highest scores of their image.

    Scores of different classes are compared, so they should be probabilities. The same row of scores for every image,
    for instance the prevalences, gives the constant ranking that any model must beat.

    Args:
        y_true: (n, classes) labels.
        y_score: (n, classes) scores; of tied classes the earlier ranks higher.
        k: classes named for each image.

    Returns:
        Share in [0, 1]; NaN without any true label.

    Raises:
        ValueError: if labels or scores are malformed or k is below 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}; expected 1 or more")
    y, score = _check(y_true, y_score)
    top = np.argsort(-score, axis=1, kind="stable")[:, :k]
    return float(_ratio(np.take_along_axis(y, top, axis=1).sum(), y.sum()))


def _check(y_true, y_score):
    """Returns labels as (n, classes) bool and scores as (n, classes) float64."""
    y, score = np.asarray(y_true), np.asarray(y_score, dtype="float64")
    y, score = (values[:, None] if values.ndim == 1 else values for values in (y, score))
    if y.ndim != 2 or y.shape != score.shape:
        shapes = f"labels have shape {np.shape(y_true)}, scores {np.shape(y_score)}"
        raise ValueError(f"{shapes}; expected (n, classes) of both")
    for name, values, bad in (("label", y, (y != 0) & (y != 1)), ("score", score, ~np.isfinite(score))):
        if bad.any():
            row, column = np.argwhere(bad)[0]
            allowed = "0 or 1" if name == "label" else "a finite number"
            raise ValueError(f"{name} {values[row, column]} in row {row}, class {column}; expected {allowed}")
    return y.astype(bool), score


def _check_one(y_true, y_score):
    y, score = _check(y_true, y_score)
    if y.shape[1] != 1:
        raise ValueError(f"{y.shape[1]} classes; expected one")
    return y[:, 0], score[:, 0]


def _ratio(part, whole):
    part, whole = np.broadcast_arrays(part, whole)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole != 0)


def _nan_mean(values):
    """Averages the last axis over what is not NaN; NaN, and no warning, where nothing is."""
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0).sum(axis=-1), defined.sum(axis=-1))


def _cumulated(y, score):
    """Counts true and false positives at each distinct score, descending, and returns these scores."""
    order = np.argsort(-score, kind="stable")
    y, score = y[order], score[order]
    last = np.flatnonzero(np.append(np.diff(score) != 0, True)[: len(score)])
    tp = np.cumsum(y)[last]
    return tp, last + 1 - tp, score[last]


def _segments(y, score, patient_of_row, n_patients):
    """Counts a class's images by segment of the score axis and by patient, as two sparse int32 matrices.

    With K distinct positive scores, positives have K rows, one a score. Negatives have 2K + 1: row 2k below score k and
    above the one before, row 2k + 1 tied with score k. Multiplied by how often each patient was drawn, they give what
    the Mann-Whitney sum needs without sorting anything again.
    """
    levels, level_of_positive = np.unique(score[y], return_inverse=True)
    negatives = score[~y]
    segment = np.searchsorted(levels, negatives, "left") + np.searchsorted(levels, negatives, "right")

    def matrix(rows, patients, n_rows):
        entries = (np.ones(len(rows), dtype="int32"), (rows, patients))
        return sparse.csr_array(entries, shape=(n_rows, n_patients))

    return (
        matrix(level_of_positive, patient_of_row[y], len(levels)),
        matrix(segment, patient_of_row[~y], 2 * len(levels) + 1),
    )


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
