"""Measures multi-label scores: AUC, curves, and intervals that respect patients. NumPy and SciPy, no TensorFlow.

Everywhere `y_true` is (n, classes) of 0 and 1 and `y_score` (n, classes) of finite numbers, larger for more suspicious;
a vector counts as one class. Labels or scores outside these raise ValueError naming the row and the class. A figure
that the labels leave undefined, such as the AUC of a class without positives, is NaN and is never dropped.
"""

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.special import ndtr, ndtri
from scipy.stats import rankdata

_CHUNK = 128  # Resamples at once: 2 * positives * 128 int32 is 6 MB for the commonest finding of the official test set.


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
    y, score = check_scores(y_true, y_score)
    return _auc_of_rank_sums((rankdata(score, axis=0) * y).sum(axis=0) if len(y) else 0, y)


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
    y, score = check_scores(y_true, y_score)
    result = np.full(y.shape[1], np.nan)
    for c in np.flatnonzero(y.any(axis=0)):
        tp, fp, _ = count_above(y[:, c], score[:, c])
        result[c] = np.sum(np.diff(tp, prepend=0) / tp[-1] * (tp / (tp + fp)))
    return result


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
    tp, fp, thresholds = count_above(*check_one_class(y_true, y_score))
    if len(tp) > 2:
        bends = np.flatnonzero((np.diff(tp, 2) != 0) | (np.diff(fp, 2) != 0)) + 1
        kept = np.concatenate([[0], bends, [len(tp) - 1]])
        tp, fp, thresholds = tp[kept], fp[kept], thresholds[kept]
    tp, fp = np.concatenate([[0], tp]), np.concatenate([[0], fp])
    return ratio(fp, fp[-1]), ratio(tp, tp[-1]), np.concatenate([[np.inf], thresholds])


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
    tp, fp, thresholds = count_above(*check_one_class(y_true, y_score))
    if len(tp) > 2:
        change = np.diff(tp) != 0
        kept = np.concatenate([[0], np.flatnonzero(change[:-1] | change[1:]) + 1, [len(tp) - 1]])
        tp, fp, thresholds = tp[kept], fp[kept], thresholds[kept]
    recall = ratio(tp, tp[-1] if len(tp) else 0)
    return np.append(ratio(tp, tp + fp)[::-1], 1.0), np.append(recall[::-1], 0.0), thresholds[::-1]


def delong(y_true, y_score, level=0.95):
    """Computes the AUC with its normal interval after DeLong, DeLong and Clarke-Pearson (Biometrics, 1988).

    It treats images as independent, so it is too narrow where patients have several; `bootstrap_auc` is not. It serves
    as a check that draws nothing. Midranks make it fast (Sun and Xu, IEEE Signal Processing Letters, 2014).

    Args:
        y_true: (n, classes) labels.
        y_score: (n, classes) scores.
        level: coverage of the interval, in (0, 1).

    Returns:
        Tuple `(auc, low, high)` of (classes,) float64, the interval clipped to [0, 1]. `auc` is that of `roc_auc`; the
        interval is NaN with fewer than two positives or two negatives, and has no width at an AUC of 0 or 1.

    Raises:
        ValueError: if labels, scores or level are malformed.
    """
    y, score = check_scores(y_true, y_score)
    auc = roc_auc(y, score)
    half = ndtri((1 + _check_level(level)) / 2) * np.sqrt(_delong_variance(y, score))
    return auc, np.maximum(auc - half, 0), np.minimum(auc + half, 1)


def delong_test(y_true, y_score_a, y_score_b):
    """Tests whether two scores of the same images have the same AUC: the paired two-sided test of DeLong et al. (1988).

    Like `delong` it treats images as independent; `difference_table` has the interval that respects patients.

    Args:
        y_true: (n, classes) labels.
        y_score_a: (n, classes) scores of the first model.
        y_score_b: (n, classes) scores of the second.

    Returns:
        Tuple `(difference, p)` of (classes,) float64: AUC of a minus AUC of b, and the probability of a difference at
        least as large if there were none, 1 where the two rank alike. p is NaN with fewer than two positives or two
        negatives, the difference with none.

    Raises:
        ValueError: if labels or scores are malformed.
    """
    y, a = check_scores(y_true, y_score_a)
    b = check_scores(y, y_score_b)[1]
    difference = roc_auc(y, a) - roc_auc(y, b)
    deviation = np.sqrt(_delong_variance(y, a, b))
    # Without variance any difference is beyond chance, and none is none.
    z = np.divide(difference, deviation, out=np.where(difference == 0, 0, np.inf), where=deviation != 0)
    return difference, 2 * ndtr(-np.abs(z))


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
    y, score = check_scores(y_true, y_score)
    patient_of_row, n_patients = number_patients(groups, len(y))
    result = np.full((n_resamples, y.shape[1]), np.nan)
    parts = [_segments(y[:, c], score[:, c], patient_of_row, n_patients) for c in range(y.shape[1])]
    for resamples, times in draw_patients(n_patients, n_resamples, seed):
        for c, (positives, negatives) in enumerate(parts):
            at = positives @ times  # (distinct positive scores, resamples): positive images at each
            below = np.cumsum(negatives @ times, axis=0)
            # Twice the negatives below a positive score plus those tied with it once.
            twice = below[:-1:2] + below[1::2]
            wins = np.einsum("kr,kr->r", at, twice, dtype="float64") / 2
            result[resamples, c] = ratio(wins, at.sum(axis=0, dtype="int64") * below[-1].astype("int64"))
    return result


def bootstrap_ratio(numerator, denominator, groups, n_resamples=1000, seed=0):
    """Computes sum(numerator) / sum(denominator) in the resamples of patients that `bootstrap_auc` draws.

    Sensitivity is one such ratio (found positives over positives), and so are predictive values, pointing-game accuracy
    and any share. Two calls with the same groups and seed are paired.

    Args:
        numerator: (n, columns) or (n,) finite numbers.
        denominator: (n, columns) or (n,) finite numbers; one column serves all.
        groups: (n,) patient of each row.
        n_resamples: number of resamples.
        seed: seed of the draw.

    Returns:
        (n_resamples, columns) float64; NaN where the denominator is 0.

    Raises:
        ValueError: if numbers or groups are malformed.
    """
    parts = [np.asarray(values, dtype="float64") for values in (numerator, denominator)]
    parts = [values[:, None] if values.ndim == 1 else values for values in parts]
    if any(values.ndim != 2 for values in parts) or len(parts[0]) != len(parts[1]):
        raise ValueError(f"shapes {np.shape(numerator)} and {np.shape(denominator)}; expected (n, columns) of both")
    for name, values in zip(("numerator", "denominator"), parts, strict=True):
        refuse_where(~np.isfinite(values), values, name, "a finite number")
    patient_of_row, n_patients = number_patients(groups, len(parts[0]))
    entries = (np.ones(len(patient_of_row)), (patient_of_row, np.arange(len(patient_of_row))))
    rows_of_patient = sparse.csr_array(entries, shape=(n_patients, len(patient_of_row)))
    above, below = (rows_of_patient @ values for values in parts)
    result = np.full((n_resamples, np.broadcast(above[:1], below[:1]).shape[1]), np.nan)
    for resamples, times in draw_patients(n_patients, n_resamples, seed):
        result[resamples] = ratio(times.T @ above, times.T @ below)
    return result


def shuffled_auc(y_true, y_score, groups, n_shuffles=200, seed=0):
    """Computes the AUC that chance alone reaches: labels are detached from the images and keep their clustering.

    Patients are put in random order and their label rows, one patient after the other, laid on the images from a random
    start. Shuffling single rows instead would make chance look narrower, because a patient's images share findings.

    Args:
        y_true: (n, classes) labels.
        y_score: (n, classes) scores.
        groups: (n,) patient of each row.
        n_shuffles: number of shuffles.
        seed: seed of the draw.

    Returns:
        (n_shuffles, classes) float64, around 0.5; NaN without positives or without negatives.

    Raises:
        ValueError: if labels, scores or groups are malformed.
    """
    y, score = check_scores(y_true, y_score)
    patient_of_row, n_patients = number_patients(groups, len(y))
    result = np.full((n_shuffles, y.shape[1]), np.nan)
    if not len(y):
        return result
    ranks, by_patient = rankdata(score, axis=0), np.argsort(patient_of_row, kind="stable")
    rows, classes = np.nonzero(y)
    image_of_label = np.empty(len(y), dtype="int64")
    rng = np.random.default_rng(seed)
    for shuffle in range(n_shuffles):
        labels = np.argsort(rng.permutation(n_patients)[patient_of_row], kind="stable")
        image_of_label[np.roll(labels, rng.integers(len(y)))] = by_patient
        sums = np.bincount(classes, weights=ranks[image_of_label[rows], classes], minlength=y.shape[1])
        result[shuffle] = _auc_of_rank_sums(sums, y)
    return result


def percentile_interval(samples, level=0.95):
    """Computes the central percentile interval along the first axis, skipping NaN.

    Args:
        samples: (n_resamples, ...) resampled figures.
        level: share of the resamples inside, in (0, 1).

    Returns:
        Tuple `(low, high)` of arrays with the shape of one sample; NaN where all samples are.

    Raises:
        ValueError: if level is malformed.
    """
    _check_level(level)
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
    y, score = check_scores(y_true, y_score)
    check_names(class_names, y.shape[1])
    samples = _with_mean(bootstrap_auc(y, score, groups, n_resamples, seed))
    n_patients = [len(np.unique(np.asarray(groups)[y[:, c]])) for c in range(y.shape[1])]
    table = pd.DataFrame({"pathology": [*class_names, "mean"]})
    for name, count in (("n_pos", y.sum(axis=0)), ("n_neg", (~y).sum(axis=0)), ("n_pos_patients", n_patients)):
        table[name] = np.append(count, np.sum(count)).astype("int64")
    table["auc"] = _with_mean(roc_auc(y, score))
    table["auc_low"], table["auc_high"] = interval_around(table["auc"], samples, level, 0, 1)
    table["ap"] = _with_mean(average_precision(y, score))
    return table


def difference_table(y_true, y_score_a, y_score_b, groups, class_names, n_resamples=1000, seed=0, level=0.95):
    """Builds the table of AUC differences between two models on the same images, model a minus model b.

    Each resample draws the same patients for both models, so what both find hard cancels out.

    Args:
        y_true: (n, classes) labels; n may be 0.
        y_score_a: (n, classes) scores of the first model.
        y_score_b: (n, classes) scores of the second.
        groups: (n,) patient of each row.
        class_names: the classes' names, in column order.
        n_resamples: number of resamples.
        seed: seed of the draw.
        level: share of the resamples inside the interval.

    Returns:
        DataFrame with a row a class and a last row `mean`: `pathology`, `n_pos`, `auc_a`, `auc_b`, `difference`,
        `difference_low`, `difference_high`, `p_delong`. The row `mean` is formed as in `auc_table`, and `p_delong`
        is NaN in it: `delong_test` knows single classes, and it treats images as independent, so that its p is mostly
        too small. The interval is what respects patients.

    Raises:
        ValueError: if labels, scores, groups or names are malformed.
    """
    y, a = check_scores(y_true, y_score_a)
    b = check_scores(y, y_score_b)[1]
    check_names(class_names, y.shape[1])
    samples = bootstrap_auc(y, a, groups, n_resamples, seed) - bootstrap_auc(y, b, groups, n_resamples, seed)
    difference, p = delong_test(y, a, b)
    table = pd.DataFrame({"pathology": [*class_names, "mean"]})
    table["n_pos"] = np.append(y.sum(axis=0), y.sum()).astype("int64")
    table["auc_a"], table["auc_b"] = _with_mean(roc_auc(y, a)), _with_mean(roc_auc(y, b))
    table["difference"] = _with_mean(difference)
    ends = interval_around(table["difference"], _with_mean(samples), level, -1, 1)
    table["difference_low"], table["difference_high"] = ends
    table["p_delong"] = np.append(p, np.nan)
    return table


def check_scores(y_true, y_score):
    """Returns labels as (n, classes) bool and scores as (n, classes) float64, or raises ValueError."""
    y, score = np.asarray(y_true), np.asarray(y_score, dtype="float64")
    y, score = (values[:, None] if values.ndim == 1 else values for values in (y, score))
    if y.ndim != 2 or y.shape != score.shape:
        shapes = f"labels have shape {np.shape(y_true)}, scores {np.shape(y_score)}"
        raise ValueError(f"{shapes}; expected (n, classes) of both")
    refuse_where((y != 0) & (y != 1), y, "label", "0 or 1")
    refuse_where(~np.isfinite(score), score, "score", "a finite number")
    return y.astype(bool), score


def check_one_class(y_true, y_score):
    """Returns the labels and scores of a single class as vectors, or raises ValueError."""
    y, score = check_scores(y_true, y_score)
    if y.shape[1] != 1:
        raise ValueError(f"{y.shape[1]} classes; expected one")
    return y[:, 0], score[:, 0]


def check_names(class_names, n_classes):
    """Raises ValueError unless each class has a name."""
    if len(class_names) != n_classes:
        raise ValueError(f"{len(class_names)} class names for {n_classes} columns")


def refuse_where(bad, values, name, expected):
    """Raises ValueError naming the first row and class at which (n, classes) values are bad."""
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ValueError(f"{name} {values[row, column]} in row {row}, class {column}; expected {expected}")


def ratio(part, whole):
    """Divides elementwise; NaN, and no warning, where there is nothing to divide by."""
    part, whole = np.broadcast_arrays(part, whole)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole != 0)


def count_above(y, score):
    """Counts true and false positives at each distinct score, descending, and returns these scores."""
    order = np.argsort(-score, kind="stable")
    y, score = y[order], score[order]
    last = np.flatnonzero(np.append(np.diff(score) != 0, True)[: len(score)])
    tp = np.cumsum(y)[last]
    return tp, last + 1 - tp, score[last]


def number_patients(groups, n_rows):
    """Returns the patient's number in each row, (n_rows,) int64 from 0, and how many there are."""
    groups = np.asarray(groups)
    if groups.shape != (n_rows,):
        raise ValueError(f"groups has shape {groups.shape}; expected ({n_rows},), one patient a row")
    patients, patient_of_row = np.unique(groups, return_inverse=True)
    return patient_of_row, len(patients)


def draw_patients(n_patients, n_resamples, seed):
    """Draws patients with replacement, some resamples at a time, and counts how often each was drawn.

    All resampling goes through these draws, so the same patients and seed give paired figures. Nothing is drawn where
    there is nobody to draw.

    Yields:
        Tuple `(resamples, times)`: which resamples, a slice, and (n_patients, resamples) int32 counts.
    """
    rng = np.random.default_rng(seed)
    for start in range(0, n_resamples if n_patients else 0, _CHUNK):
        size = min(_CHUNK, n_resamples - start)
        drawn = rng.integers(0, n_patients, size=(size, n_patients))
        cells = drawn * size + np.arange(size)[:, None]
        times = np.bincount(cells.ravel(), minlength=n_patients * size).reshape(n_patients, size)
        yield slice(start, start + size), times.astype("int32")


def interval_around(estimate, samples, level, lowest, highest):
    """Computes the percentile interval of (n_resamples, k) samples and widens it to hold the (k,) estimates.

    With a handful of patients the percentiles can miss the estimate, which would read as an error in a table. The
    margin keeps it inside for programs that compute the same figure with another last bit. Where no resample defines
    the figure, nothing is known and the interval is the whole range; where the estimate is NaN, so is the interval.
    """
    low, high = percentile_interval(samples, level)
    low = np.minimum(np.nan_to_num(low, nan=lowest), estimate - 1e-9)
    high = np.maximum(np.nan_to_num(high, nan=highest), estimate + 1e-9)
    return np.maximum(low, lowest), np.minimum(high, highest)


def _check_level(level):
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a share between 0 and 1")
    return level


def _auc_of_rank_sums(sums, y):
    n_pos, n_neg = y.sum(axis=0), (~y).sum(axis=0)
    return ratio(sums - n_pos * (n_pos + 1) / 2, n_pos * n_neg)  # Multiples of one half, hence exact.


def _with_mean(values):
    """Appends to the last axis its mean over what is not NaN; NaN, and no warning, where nothing is."""
    # A class that is undefined in the study is undefined in every resample, so it never enters the means.
    defined = ~np.isnan(values)
    mean = ratio(np.where(defined, values, 0).sum(axis=-1), defined.sum(axis=-1))
    return np.concatenate([values, mean[..., None]], axis=-1)


def _delong_variance(y, score, other=None):
    """Estimates each class's variance of the AUC, or of the AUC's difference between two scores."""
    result = np.full(y.shape[1], np.nan)
    for c in np.flatnonzero((y.sum(axis=0) > 1) & ((~y).sum(axis=0) > 1)):
        parts = _placements(y[:, c], score[:, c])
        if other is not None:
            # The variance of the differences is that with the covariance, and exactly 0 for equal rankings.
            parts = [a - b for a, b in zip(parts, _placements(y[:, c], other[:, c]), strict=True)]
        result[c] = sum(np.var(part, ddof=1) / len(part) for part in parts)
    return result


def _placements(y, score):
    """Computes the share of negatives below each positive, and of positives above each negative; ties count half."""
    ranks, n_pos, n_neg = rankdata(score), y.sum(), (~y).sum()
    return (ranks[y] - rankdata(score[y])) / n_neg, 1 - (ranks[~y] - rankdata(score[~y])) / n_pos


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
