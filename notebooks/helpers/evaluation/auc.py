"""Area under the ROC curve, exact under ties, with intervals that respect patients. NumPy, SciPy and pandas only.

Everywhere `y_true` is (n, classes) of 0 and 1, `y_score` (n, classes) of finite numbers, larger for more suspicious,
and `groups` (n,) the patient of each row; a vector counts as one class. Other labels and scores raise ValueError, which
names the row and the class. A figure that the labels leave undefined, such as the AUC of a class without positives, is
NaN and is never dropped. Resamples are those of `bootstrap`.
"""

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.special import ndtr
from scipy.stats import rankdata

from .bootstrap import draw_patients, interval_around, number_patients, ratio, refuse_where


def roc_auc(y_true, y_score):
    """Computes the exact area under the ROC curve (Mann-Whitney); a tie of positive and negative counts one half.

    Args:
        y_true: (n, classes) labels.
        y_score: (n, classes) scores.

    Returns:
        (classes,) float64 in [0, 1]; NaN without positives or without negatives.
    """
    y, score = check_scores(y_true, y_score)
    return _auc_of_rank_sums((rankdata(score, axis=0) * y).sum(axis=0) if len(y) else 0, y)


def auc_table(y_true, y_score, groups, class_names, n_resamples=1000, seed=0, level=0.95):
    """Builds the table of AUCs and average precisions, with patient-wise bootstrap intervals of the AUCs.

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
    """
    from sklearn.metrics import average_precision_score  # on use: predicting with an exported model needs none of it

    y, score = check_scores(y_true, y_score)
    samples = with_mean(bootstrap_auc(y, score, groups, n_resamples, seed))
    n_patients = [len(np.unique(np.asarray(groups)[y[:, c]])) for c in range(y.shape[1])]
    precisions = np.full(y.shape[1], np.nan)
    for c in np.flatnonzero(y.any(axis=0)):
        precisions[c] = average_precision_score(y[:, c], score[:, c])
    table = pd.DataFrame({"pathology": [*class_names, "mean"]})
    for name, count in (("n_pos", y.sum(axis=0)), ("n_neg", (~y).sum(axis=0)), ("n_pos_patients", n_patients)):
        table[name] = np.append(count, np.sum(count)).astype("int64")
    table["auc"] = with_mean(roc_auc(y, score))
    table["auc_low"], table["auc_high"] = interval_around(table["auc"], samples, level, 0, 1)
    table["ap"] = with_mean(precisions)
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
        `difference_low`, `difference_high`, `p_delong`. The row `mean` is formed as in `auc_table`; `p_delong`, of
        `delong_test`, is NaN in it.
    """
    y, a = check_scores(y_true, y_score_a)
    b = check_scores(y, y_score_b)[1]
    samples = bootstrap_auc(y, a, groups, n_resamples, seed) - bootstrap_auc(y, b, groups, n_resamples, seed)
    difference, p = delong_test(y, a, b)
    table = pd.DataFrame({"pathology": [*class_names, "mean"]})
    table["n_pos"] = np.append(y.sum(axis=0), y.sum()).astype("int64")
    table["auc_a"], table["auc_b"] = with_mean(roc_auc(y, a)), with_mean(roc_auc(y, b))
    table["difference"] = with_mean(difference)
    ends = interval_around(table["difference"], with_mean(samples), level, -1, 1)
    table["difference_low"], table["difference_high"] = ends
    table["p_delong"] = np.append(p, np.nan)
    return table


def delong_test(y_true, y_score_a, y_score_b):
    """Tests whether two scores have the same AUC: the paired two-sided test of DeLong et al. (Biometrics, 1988).

    It treats images as independent, so that with several images a patient its p is mostly too small. Midranks make it
    fast (Sun and Xu, IEEE Signal Processing Letters, 2014).

    Returns:
        Tuple `(difference, p)` of (classes,) float64: AUC of a minus AUC of b, and the probability of a difference at
        least as large if there were none, 1 where the two rank alike. p is NaN with fewer than two positives or two
        negatives, the difference with none.
    """
    y, a = check_scores(y_true, y_score_a)
    b = check_scores(y, y_score_b)[1]
    difference, deviation = roc_auc(y, a) - roc_auc(y, b), np.full(y.shape[1], np.nan)
    for c in np.flatnonzero((y.sum(axis=0) > 1) & ((~y).sum(axis=0) > 1)):
        # The variance of the differences is that with the covariance, and exactly 0 for equal rankings.
        parts = zip(_placements(y[:, c], a[:, c]), _placements(y[:, c], b[:, c]), strict=True)
        deviation[c] = np.sqrt(sum(np.var(of_a - of_b, ddof=1) / len(of_a) for of_a, of_b in parts))
    # Without variance any difference is beyond chance, and none is none.
    z = np.divide(difference, deviation, out=np.where(difference == 0, 0, np.inf), where=deviation != 0)
    return difference, 2 * ndtr(-np.abs(z))


def bootstrap_auc(y_true, y_score, groups, n_resamples=1000, seed=0):
    """Computes the AUC in bootstrap resamples of patients.

    Returns:
        (n_resamples, classes) float64, exact under ties; NaN where a resample holds one class only.
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


def shuffled_auc(y_true, y_score, groups, n_shuffles=200, seed=0):
    """Computes the AUC that chance alone reaches: labels are detached from the images and keep their clustering.

    Patients are put in random order and their label rows, one patient after the other, laid on the images from a random
    start. Shuffling single rows instead would make chance look narrower, because a patient's images share findings.

    Returns:
        (n_shuffles, classes) float64, around 0.5; NaN without positives or without negatives.
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


def with_mean(values):
    """Appends to the last axis its mean over what is not NaN; NaN, and no warning, where nothing is."""
    # A class that is undefined in the study is undefined in every resample, so it never enters the means.
    defined = ~np.isnan(values)
    mean = ratio(np.where(defined, values, 0).sum(axis=-1), defined.sum(axis=-1))
    return np.concatenate([values, mean[..., None]], axis=-1)


def _auc_of_rank_sums(sums, y):
    n_pos, n_neg = y.sum(axis=0), (~y).sum(axis=0)
    return ratio(sums - n_pos * (n_pos + 1) / 2, n_pos * n_neg)  # multiples of one half, hence exact


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
