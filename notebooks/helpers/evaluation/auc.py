"""Area under the ROC curve, exact under ties, with intervals that respect patients. NumPy, SciPy and pandas only.

Everywhere `y_true` is (n, classes) of 0, 1 and NaN for unknown, `y_score` (n, classes) of finite numbers, larger for
more suspicious, and `groups` (n,) the patient of each row; a vector counts as one class. Other labels and scores raise
ValueError, which names the row and the class. A row counts for the classes of which its label is known, and for no
other. A figure that the labels leave undefined, such as the AUC of a class without positives, is NaN and is never
dropped. Resamples are those of `bootstrap`: `n_resamples` of them are drawn with `seed`, and `level` is the share of
them inside an interval. `class_names` are in column order.
"""

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.special import ndtr
from scipy.stats import rankdata

from .bootstrap import draw_patients, interval_around, number_patients, ratio, refuse_where


def roc_auc(y_true, y_score):
    """Computes the exact area under the ROC curve (Mann-Whitney); a tie of positive and negative counts one half.

    Returns:
        (classes,) float64 in [0, 1]; NaN without positives or without negatives.
    """
    positive, negative, score = check_scores(y_true, y_score)
    ranks = rank_known(score, positive | negative)
    return _auc_of_rank_sums((ranks * positive).sum(axis=0), positive.sum(axis=0), negative.sum(axis=0))


def auc_table(y_true, y_score, groups, class_names, n_resamples=1000, seed=0, level=0.95):
    """Builds the table of AUCs and average precisions, with patient-wise bootstrap intervals of the AUCs.

    Returns:
        DataFrame with a row a class and a last row `mean`: `pathology`, `n_pos`, `n_neg`, `n_pos_patients`, `auc`,
        `auc_low`, `auc_high`, `ap`. In the row `mean` the counts are totals over the classes, `auc` is the mean over
        classes whose AUC is defined, its interval that of the same mean in each resample (without the classes that the
        resample leaves undefined), and `ap` the mean over classes with positives.
    """
    from sklearn.metrics import average_precision_score  # on use: predicting with an exported model needs none of it

    positive, negative, score = check_scores(y_true, y_score)
    samples = with_mean(bootstrap_auc(y_true, y_score, groups, n_resamples, seed))
    n_patients = [len(np.unique(np.asarray(groups)[of_class])) for of_class in positive.T]
    precisions = np.full(positive.shape[1], np.nan)
    for c in np.flatnonzero(positive.any(axis=0)):
        known = positive[:, c] | negative[:, c]
        precisions[c] = average_precision_score(positive[known, c], score[known, c])
    table = pd.DataFrame({"pathology": [*class_names, "mean"]})
    counts = {"n_pos": positive.sum(axis=0), "n_neg": negative.sum(axis=0), "n_pos_patients": n_patients}
    for name, count in counts.items():
        table[name] = np.append(count, np.sum(count)).astype("int64")
    table["auc"] = with_mean(roc_auc(y_true, y_score))
    table["auc_low"], table["auc_high"] = interval_around(table["auc"], samples, level, 0, 1)
    table["ap"] = with_mean(precisions)
    return table


def difference_table(y_true, y_score_a, y_score_b, groups, class_names, n_resamples=1000, seed=0, level=0.95):
    """Builds the table of AUC differences between two models on the same images, model a minus model b.

    Each resample draws the same patients for both models, so what both find hard cancels out.

    Returns:
        DataFrame with a row a class and a last row `mean`: `pathology`, `n_pos`, `auc_a`, `auc_b`, `difference`,
        `difference_low`, `difference_high`, `p_delong`. The row `mean` is formed as in `auc_table`; `p_delong`, of
        `delong_test`, is NaN in it.
    """
    positive = check_scores(y_true, y_score_a)[0]
    samples = bootstrap_auc(y_true, y_score_a, groups, n_resamples, seed)
    samples = samples - bootstrap_auc(y_true, y_score_b, groups, n_resamples, seed)
    difference, p = delong_test(y_true, y_score_a, y_score_b)
    table = pd.DataFrame({"pathology": [*class_names, "mean"]})
    table["n_pos"] = np.append(positive.sum(axis=0), positive.sum()).astype("int64")
    table["auc_a"], table["auc_b"] = with_mean(roc_auc(y_true, y_score_a)), with_mean(roc_auc(y_true, y_score_b))
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
    positive, negative, a = check_scores(y_true, y_score_a)
    b = check_scores(y_true, y_score_b)[2]
    difference, deviation = roc_auc(y_true, a) - roc_auc(y_true, b), np.full(positive.shape[1], np.nan)
    for c in np.flatnonzero((positive.sum(axis=0) > 1) & (negative.sum(axis=0) > 1)):
        # The variance of the differences is that with the covariance, and exactly 0 for equal rankings.
        of_a, of_b = (_placements(score[positive[:, c], c], score[negative[:, c], c]) for score in (a, b))
        parts = zip(of_a, of_b, strict=True)
        deviation[c] = np.sqrt(sum(np.var(of_a - of_b, ddof=1) / len(of_a) for of_a, of_b in parts))
    # Without variance any difference is beyond chance, and none is none.
    z = np.divide(difference, deviation, out=np.where(difference == 0, 0, np.inf), where=deviation != 0)
    return difference, 2 * ndtr(-np.abs(z))


def bootstrap_auc(y_true, y_score, groups, n_resamples=1000, seed=0):
    """Computes the AUC in bootstrap resamples of patients.

    Returns:
        (n_resamples, classes) float64, exact under ties; NaN where a resample holds one class only.
    """
    positive, negative, score = check_scores(y_true, y_score)
    patient_of_row, n_patients = number_patients(groups, len(score))
    result = np.full((n_resamples, score.shape[1]), np.nan)
    parts = [
        _segments(*of_class, patient_of_row, n_patients)
        for of_class in zip(positive.T, negative.T, score.T, strict=True)
    ]
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
    Classes whose labels are known in the same rows are shuffled together, among these rows.

    Returns:
        (n_shuffles, classes) float64, around 0.5; NaN without positives or without negatives.
    """
    positive, negative, score = check_scores(y_true, y_score)
    groups = np.asarray(groups)
    number_patients(groups, len(score))  # refuses groups of another length
    result = np.full((n_shuffles, score.shape[1]), np.nan)
    for classes, rows in known_together(positive | negative):
        part = positive[rows][:, classes], score[rows][:, classes], groups[rows]
        result[:, classes] = _shuffle(*part, n_shuffles, seed)
    return result


def check_scores(y_true, y_score):
    """Returns where labels are positive and where negative, (n, classes) bool, and scores as (n, classes) float64.

    Where a label is unknown, neither is true. Raises ValueError, see the module.
    """
    y, score = np.asarray(y_true), np.asarray(y_score, dtype="float64")
    y, score = (values[:, None] if values.ndim == 1 else values for values in (y, score))
    if y.ndim != 2 or y.shape != score.shape:
        shapes = f"labels have shape {np.shape(y_true)}, scores {np.shape(y_score)}"
        raise ValueError(f"{shapes}; expected (n, classes) of both")
    positive, negative = y == 1, y == 0
    refuse_where(~(positive | negative | (y != y)), y, "label", "0, 1 or NaN for unknown")
    refuse_where(~np.isfinite(score), score, "score", "a finite number")
    return positive, negative, score


def known_together(known):
    """Yields the classes whose labels are known in the same rows, as a list, with these rows, (n,) bool.

    Args:
        known: (n, classes) bool.
    """
    classes = {}
    for c in range(known.shape[1]):
        classes.setdefault(np.packbits(known[:, c]).tobytes(), []).append(c)
    yield from ((together, known[:, together[0]]) for together in classes.values())


def rank_known(score, known):
    """Ranks (n, classes) scores among a class's rows of known label, from 1, ties at their middle; others come last."""
    return rankdata(np.where(known, score, np.inf), axis=0) if len(score) else score


def with_mean(values):
    """Appends to the last axis its mean over what is not NaN; NaN, and no warning, where nothing is."""
    # A class that is undefined in the study is undefined in every resample, so it never enters the means.
    defined = ~np.isnan(values)
    mean = ratio(np.where(defined, values, 0).sum(axis=-1), defined.sum(axis=-1))
    return np.concatenate([values, mean[..., None]], axis=-1)


def _auc_of_rank_sums(sums, n_pos, n_neg):
    return ratio(sums - n_pos * (n_pos + 1) / 2, n_pos * n_neg)  # multiples of one half, hence exact


def _placements(positives, negatives):
    """Computes the share of negatives below each positive, and of positives above each negative; ties count half."""
    n_pos, n_neg = len(positives), len(negatives)
    ranks = rankdata(np.concatenate([positives, negatives]))
    below = (ranks[:n_pos] - rankdata(positives)) / n_neg
    return below, 1 - (ranks[n_pos:] - rankdata(negatives)) / n_pos


def _shuffle(positive, score, groups, n_shuffles, seed):
    """Computes `shuffled_auc` of (n, classes) labels that are all known."""
    result = np.full((n_shuffles, score.shape[1]), np.nan)
    if not len(score):
        return result
    patient_of_row, n_patients = number_patients(groups, len(score))
    ranks, by_patient = rankdata(score, axis=0), np.argsort(patient_of_row, kind="stable")
    rows, classes = np.nonzero(positive)
    n_pos, n_neg = positive.sum(axis=0), (~positive).sum(axis=0)
    image_of_label = np.empty(len(score), dtype="int64")
    rng = np.random.default_rng(seed)
    for shuffle in range(n_shuffles):
        labels = np.argsort(rng.permutation(n_patients)[patient_of_row], kind="stable")
        image_of_label[np.roll(labels, rng.integers(len(score)))] = by_patient
        sums = np.bincount(classes, weights=ranks[image_of_label[rows], classes], minlength=score.shape[1])
        result[shuffle] = _auc_of_rank_sums(sums, n_pos, n_neg)
    return result


def _segments(positive, negative, score, patient_of_row, n_patients):
    """Counts a class's images by segment of the score axis and by patient, as two sparse int32 matrices.

    With K distinct positive scores, positives have K rows, one a score. Negatives have 2K + 1: row 2k below score k and
    above the one before, row 2k + 1 tied with score k. Multiplied by how often each patient was drawn, they give what
    the Mann-Whitney sum needs without sorting anything again.
    """
    levels, level_of_positive = np.unique(score[positive], return_inverse=True)
    negatives = score[negative]
    segment = np.searchsorted(levels, negatives, "left") + np.searchsorted(levels, negatives, "right")

    def matrix(rows, patients, n_rows):
        entries = (np.ones(len(rows), dtype="int32"), (rows, patients))
        return sparse.csr_array(entries, shape=(n_rows, n_patients))

    return (
        matrix(level_of_positive, patient_of_row[positive], len(levels)),
        matrix(segment, patient_of_row[negative], 2 * len(levels) + 1),
    )
