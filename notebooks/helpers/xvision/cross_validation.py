"""Divides a small study into folds by patient, and measures classifiers on images they were not trained on.

NumPy, pandas and scikit-learn, no TensorFlow. Labels are 0, normal, and 1, with the finding; a probability of 0.5 or
more counts as a prediction of 1. Figures that labels or predictions leave undefined are NaN and are never dropped.

In both tables labels are (n,), probabilities of class 1 (n,) or (n, repeats), each from a network that was not trained
on the row, and groups (n,) the patient of each row; other arguments are those of `evaluation.auc`.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from ..evaluation.auc import bootstrap_auc, check_scores, roc_auc
from ..evaluation.bootstrap import (
    bootstrap_ratio,
    draw_patients,
    interval_around,
    number_patients,
    ratio,
    refuse_where,
)

_CLASSES = ("normal", "finding")
_FIGURES = (
    *("accuracy", "balanced_accuracy"),
    *(f"{figure}_{name}" for name in _CLASSES for figure in ("precision", "recall", "f1")),
    "auc",
)
_VAL_SHARE = 0.2  # of the patients outside a test fold


class Fold(NamedTuple):
    """Row numbers, rising, of one fold's subsets; together they are all rows."""

    repeat: int
    fold: int
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def make_folds(labels, groups, n_folds=5, n_repeats=1, seed=0, by_patient=True):
    """Divides rows into folds, each with its own train, val and test, so that no patient is in two of them.

    Test folds are balanced over the classes by scikit-learn's `StratifiedGroupKFold`. Of the patients outside a test
    fold, a fifth of those with a row of class 1 and a fifth of the others are drawn for validation, at least one of
    each: the epoch is to be chosen on them, never on the test fold. The result depends on patients, labels and seed,
    not on the rows' order, and more repeats leave the first ones as they were.

    Args:
        labels: (n,) 0 or 1.
        groups: (n,) patient of each row.
        n_folds: int, 2 or more.
        n_repeats: int, how often all rows are divided anew.
        seed: seed of the draw.
        by_patient: False divides rows regardless of patients, who are then in several subsets: for demonstration only.

    Returns:
        List of `Fold`, repeat by repeat. Every row is in exactly one test fold of a repeat.

    Raises:
        ValueError: a class has fewer patients (or rows, if not `by_patient`) than there are folds or subsets, or a
            subset would lack a class; the message names class and subset.
    """
    y = np.asarray(labels).astype(bool)
    patients, n_patients = number_patients(groups, len(y))
    units, n_units, noun = (patients, n_patients, "patients") if by_patient else (np.arange(len(y)), len(y), "rows")
    for value, name in enumerate(_CLASSES):
        count = len(np.unique(units[y == value]))
        if count < max(n_folds, 3):  # one of them each for train, val and test
            remedy = f"choose n_folds of {count} or fewer, or add {noun}" if count > 2 else f"add {noun}"
            raise ValueError(f"{count} {noun} are of class {name}, too few for {n_folds} folds; {remedy}")
    unit_is_1 = np.bincount(units, weights=y, minlength=n_units) > 0
    folds = []
    for repeat in range(n_repeats):
        rng = np.random.default_rng([seed, repeat])
        # Not `shuffle=True`: before 1.8 scikit-learn then mixes up whose labels are whose (its pull request 32540).
        shuffled = rng.permutation(n_units)[units]
        for fold, (rest, test) in enumerate(StratifiedGroupKFold(n_folds).split(y, y, shuffled)):
            in_val = np.isin(units, _draw_val(np.unique(units[rest]), unit_is_1, rng))
            subset = np.where(in_val, "val", "train")
            subset[test] = "test"
            rows = {name: np.flatnonzero(subset == name) for name in ("train", "val", "test")}
            for name, numbers in rows.items():
                lacking = [_CLASSES[value] for value in (0, 1) if not (y[numbers] == value).any()]
                if lacking:
                    raise ValueError(
                        f"repeat {repeat}, fold {fold}: no {lacking[0]} in {name}; choose fewer folds or another seed"
                    )
            folds.append(Fold(repeat, fold, **rows))
    return folds


def score_table(labels, probs, groups, n_resamples=1000, seed=0, level=0.95):
    """Builds the table of a classifier's figures from out-of-fold probabilities, with patient-wise bootstrap intervals.

    An interval covers what other patients would change. It does not cover what other trainings would: the resamples
    keep the probabilities, and the repeats average over chance in folds and training only as far as they go. Nor are
    the folds independent: their networks share most training images, so that a spread over folds or repeats is also
    narrower than that of new studies (Nadeau and Bengio, Machine Learning 2003). Probabilities of a repeat are pooled
    over its folds, so the AUC compares images that different networks judged, and is lower where their scales differ.

    Returns:
        DataFrame with a row a figure: `figure`, `value`, `low`, `high`, `n_rows`, `n_patients`. Figures are `accuracy`,
        `balanced_accuracy` (mean of the recalls), `precision_`, `recall_` and `f1_` of each class, `auc`; `majority`,
        the accuracy of always predicting the majority class of all rows; and `accuracy_minus_majority`, in -1 to 1,
        whose interval draws the same patients for both. A value is the mean of the figure over the repeats, also in a
        resample; it is NaN where one repeat leaves it undefined, such as the precision of a class that is never
        predicted. `n_rows` and `n_patients` count the rows that a figure is about: a class's, or all.

    Raises:
        ValueError: labels, probabilities, groups or level are malformed.
    """
    y, value, samples = _resample(labels, probs, groups, n_resamples, seed)
    is_majority = y == (2 * y.sum() > len(y))
    majority = float(ratio(is_majority.sum(), len(y)))
    majorities = bootstrap_ratio(is_majority, np.ones(len(y)), groups, n_resamples, seed)
    value = np.append(value, [majority, value[0] - majority])
    samples = np.hstack([samples, majorities, samples[:, :1] - majorities])
    lowest = np.array([0.0] * (len(value) - 1) + [-1.0])
    low, high = interval_around(value, samples, level, lowest, 1)
    names = [*_FIGURES, "majority", "accuracy_minus_majority"]
    table = pd.DataFrame({"figure": names, "value": value, "low": low, "high": high})
    kept = [
        ~y if name.endswith("_normal") else y if name.endswith("_finding") else np.ones(len(y), bool) for name in names
    ]
    table["n_rows"] = [int(rows.sum()) for rows in kept]
    table["n_patients"] = [len(np.unique(np.asarray(groups)[rows])) for rows in kept]
    return table


def compare_scores(labels, probs_a, probs_b, groups, n_resamples=1000, seed=0, level=0.95):
    """Builds the table of differences between two classifiers on the same rows, a minus b.

    Each resample draws the same patients for both, so what both find hard cancels out. What the intervals cover, and
    what not, is as in `score_table`. The two may have other numbers of repeats.

    Returns:
        DataFrame with a row a figure, those of `score_table` up to `auc`: `figure`, `a`, `b`, `difference`, `low`,
        `high`. A difference is NaN where either value is.

    Raises:
        ValueError: labels, probabilities, groups or level are malformed.
    """
    _, a, samples_a = _resample(labels, probs_a, groups, n_resamples, seed)
    _, b, samples_b = _resample(labels, probs_b, groups, n_resamples, seed)
    low, high = interval_around(a - b, samples_a - samples_b, level, -1, 1)
    return pd.DataFrame({"figure": _FIGURES, "a": a, "b": b, "difference": a - b, "low": low, "high": high})


def _draw_val(units, unit_is_1, rng):
    """Draws validation's units: its share of those with class 1 and of the others, at least one and never all.

    scikit-learn's stratified `train_test_split` does not draw at least one: of 12 patients, 3 of them with a nodule, it
    left 27 of 60 validation sets without one.
    """
    drawn = []
    for value in (True, False):
        some = units[unit_is_1[units] == value]
        size = min(max(round(_VAL_SHARE * len(some)), 1), max(len(some) - 1, 0))
        drawn.append(rng.permutation(some)[:size])
    return np.concatenate(drawn)


def _resample(labels, probs, groups, n_resamples, seed):
    """Computes figures and their resamples, each a mean over the repeats.

    Returns:
        Tuple of the labels, (n,) bool, the values, (figures,), and the resampled values, (n_resamples, figures).
    """
    y, probs = np.asarray(labels), np.asarray(probs, dtype="float64")
    probs = probs[:, None] if probs.ndim == 1 else probs
    truth, negative, probs = check_scores(np.tile(y[:, None], probs.shape[1]), probs)
    refuse_where(~(truth | negative), np.broadcast_to(y[:, None], probs.shape), "label", "0 or 1")
    patients, n_patients = number_patients(groups, len(y))
    called = probs >= 0.5
    outcomes = np.hstack([called & truth, called & ~truth, ~called & truth, ~called & ~truth])
    by_patient = np.zeros((n_patients, outcomes.shape[1]))
    np.add.at(by_patient, patients, outcomes)
    samples = np.full((n_resamples, len(_FIGURES) - 1), np.nan)
    for resamples, times in draw_patients(n_patients, n_resamples, seed):
        samples[resamples] = _measure(times.T @ by_patient)
    auc = bootstrap_auc(truth, probs, groups, n_resamples, seed).mean(axis=1)
    value = np.append(_measure(by_patient.sum(axis=0)[None])[0], roc_auc(truth, probs).mean())
    return y.astype(bool), value, np.column_stack([samples, auc])


def _measure(outcomes):
    """Computes (k, 8) figures from (k, 4 * repeats) true and false positives, false and true negatives."""
    tp, fp, fn, tn = np.split(outcomes, 4, axis=1)
    recalls = ratio(tn, tn + fp), ratio(tp, tp + fn)
    figures = (
        *(ratio(tp + tn, tp + fp + fn + tn), (recalls[0] + recalls[1]) / 2),
        *(ratio(tn, tn + fn), recalls[0], ratio(2 * tn, 2 * tn + fn + fp)),
        *(ratio(tp, tp + fp), recalls[1], ratio(2 * tp, 2 * tp + fp + fn)),
    )
    return np.stack(figures, axis=1).mean(axis=2)
