"""Divides a small study into folds by patient, and measures a classifier of two classes on what it was not trained on.

NumPy, pandas and scikit-learn, no TensorFlow. Labels are 0 and 1; by default 0 is called normal and 1 nodule. Figures
that labels or calls leave undefined are NaN and are never dropped.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from ..evaluation.auc import (
    bootstrap_auc,
    bootstrap_ratio,
    draw_patients,
    interval_around,
    number_patients,
    ratio,
    roc_auc,
)
from ..study.splits import assert_no_patient_overlap

CLASS_NAMES = ("normal", "nodule")


class Fold(NamedTuple):
    """Row numbers, rising, of one fold's parts; together they are all rows."""

    repeat: int
    fold: int
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def make_folds(labels, groups, n_folds=5, n_repeats=1, val_share=0.2, seed=0, by_patient=True, class_names=CLASS_NAMES):
    """Divides rows into folds, each with its own train, val and test, so that no patient is in two of them.

    Test folds are balanced over the classes by scikit-learn's `StratifiedGroupKFold`. Of the patients outside a test
    fold, `val_share` of those with a row of class 1 and of the others are drawn for validation, at least one of each:
    the epoch is to be chosen on them, never on the test fold. The result depends on patients, labels and seed, not on
    the rows' order, and more repeats leave the first ones as they were.

    Args:
        labels: (n,) 0 or 1.
        groups: (n,) patient of each row.
        n_folds: int, 2 or more.
        n_repeats: int, how often all rows are divided anew.
        val_share: share in (0, 1) of the patients outside the test fold.
        seed: seed of the draw.
        by_patient: False divides rows, whoever's they are, which leaves patients on both sides: for demonstration only.
        class_names: the names of 0 and 1, for messages.

    Returns:
        List of `Fold`, repeat by repeat. Every row is in exactly one test fold of a repeat.

    Raises:
        ValueError: if an argument is malformed, a class has fewer patients (or rows, if not `by_patient`) than there
            are folds or parts, or a part would lack a class; the message names class and part.
    """
    y = _check_labels(labels)
    patients, n_patients = number_patients(groups, len(y))
    if n_folds < 2 or n_repeats < 1 or not 0 < val_share < 1:
        raise ValueError(
            f"n_folds is {n_folds}, n_repeats {n_repeats}, val_share {val_share}; expected 2 folds or more, 1 repeat "
            "or more and a share between 0 and 1"
        )
    units, n_units, noun = (patients, n_patients, "patients") if by_patient else (np.arange(len(y)), len(y), "rows")
    for value, name in enumerate(class_names):
        count = len(np.unique(units[y == value]))
        if not count:
            raise ValueError(f"no row is {name}; folds are for two classes, so add such rows")
        if count < max(n_folds, 3):  # one of them each for train, val and test
            remedy = f"choose n_folds of {count} or fewer, or add {noun}" if count > 2 else f"add {noun}"
            raise ValueError(f"{count} {noun} are {name}, too few for {n_folds} folds; {remedy}")
    unit_is_1 = np.bincount(units, weights=y, minlength=n_units) > 0
    folds = []
    for repeat in range(n_repeats):
        rng = np.random.default_rng([seed, repeat])
        # Not `shuffle=True`: before 1.8 scikit-learn then mixes up whose labels are whose (its pull request 32540).
        shuffled = rng.permutation(n_units)[units]
        for fold, (rest, test) in enumerate(StratifiedGroupKFold(n_folds).split(y, y, shuffled)):
            in_val = np.isin(units, _draw_val(np.unique(units[rest]), unit_is_1, val_share, rng))
            part = np.where(in_val, "val", "train")
            part[test] = "test"
            if by_patient:
                assert_no_patient_overlap(groups, part)
            rows = {name: np.flatnonzero(part == name) for name in ("train", "val", "test")}
            for name, numbers in rows.items():
                lacking = [class_names[value] for value in (0, 1) if not (y[numbers] == value).any()]
                if lacking:
                    raise ValueError(
                        f"repeat {repeat}, fold {fold}: no {lacking[0]} in {name}; choose fewer folds, another "
                        "val_share or another seed"
                    )
            folds.append(Fold(repeat, fold, **rows))
    return folds


def score_table(labels, probs, groups, n_resamples=1000, seed=0, level=0.95, threshold=0.5, class_names=CLASS_NAMES):
    """Builds the table of a classifier's figures from out-of-fold probabilities, with patient-wise bootstrap intervals.

    An interval covers what other patients would change. It does not cover what other trainings would: the resamples
    keep the probabilities, and of chance in folds and training they average what the repeats show and no more. Nor are
    the folds independent: their networks share most training images, so that a spread over folds or repeats, too, is
    narrower than that of new studies (Nadeau and Bengio, Machine Learning 2003). Probabilities of a repeat are pooled
    over its folds, so that the AUC compares images which different networks judged; it suffers where their scales
    differ.

    Args:
        labels: (n,) 0 or 1; n may be 0.
        probs: (n,) or (n, repeats) probabilities of class 1, each from a network that was not trained on the row.
        groups: (n,) patient of each row.
        n_resamples: number of resamples.
        seed: seed of the draw.
        level: share of the resamples inside an interval.
        threshold: a probability at or above it is called class 1.
        class_names: the names of 0 and 1 in the names of figures.

    Returns:
        DataFrame with a row a figure: `figure`, `value`, `low`, `high`, `n_rows`, `n_patients`. Figures are `accuracy`,
        `balanced_accuracy` (mean of the recalls), `precision_`, `recall_` and `f1_` of each class, `auc`; `majority`,
        the accuracy of always answering the class that is commoner in all rows; and `accuracy_minus_majority`, in -1 to
        1, whose interval draws the same patients for both. A value is the mean of the figure over the repeats, and so
        it is in a resample; it is NaN where one repeat leaves it undefined, such as a precision where nothing is
        called. `n_rows` and `n_patients` count what a class's figures are about, its rows, and elsewhere all.

    Raises:
        ValueError: if labels, probabilities, groups or names are malformed.
    """
    y, probs = _check_probs(labels, probs)
    patients, _ = number_patients(groups, len(y))
    names = [*_name_figures(class_names), "majority", "accuracy_minus_majority"]
    value, samples = _resample(y, probs, groups, n_resamples, seed, threshold)
    is_commoner = y == (2 * y.sum() > len(y))
    majority = float(ratio(is_commoner.sum(), len(y)))
    majorities = bootstrap_ratio(is_commoner, np.ones(len(y)), groups, n_resamples, seed)
    value = np.append(value, [majority, value[0] - majority])
    samples = np.hstack([samples, majorities, samples[:, :1] - majorities])
    lowest = np.array([0.0] * (len(names) - 1) + [-1.0])
    low, high = interval_around(value, samples, level, lowest, 1)
    table = pd.DataFrame({"figure": names, "value": value, "low": low, "high": high})
    about = np.ones(len(y), dtype=bool), ~y, y
    whose = [0, 0, *[1] * 3, *[2] * 3, 0, 0, 0]
    table["n_rows"] = [int(about[k].sum()) for k in whose]
    table["n_patients"] = [len(np.unique(patients[about[k]])) for k in whose]
    return table


def compare_scores(
    labels, probs_a, probs_b, groups, n_resamples=1000, seed=0, level=0.95, threshold=0.5, class_names=CLASS_NAMES
):
    """Builds the table of differences between two classifiers on the same rows, a minus b.

    Each resample draws the same patients for both, so what both find hard cancels out. What the intervals cover, and
    what not, is as in `score_table`.

    Args:
        labels: (n,) 0 or 1; n may be 0.
        probs_a: (n,) or (n, repeats) out-of-fold probabilities of the first classifier.
        probs_b: the same of the second, of as many repeats or of others.
        groups: (n,) patient of each row.
        n_resamples: number of resamples.
        seed: seed of the draw.
        level: share of the resamples inside an interval.
        threshold: a probability at or above it is called class 1.
        class_names: the names of 0 and 1 in the names of figures.

    Returns:
        DataFrame with a row a figure, those of `score_table` up to `auc`: `figure`, `a`, `b`, `difference`, `low`,
        `high`. A difference is NaN where either value is.

    Raises:
        ValueError: if labels, probabilities, groups or names are malformed.
    """
    names = _name_figures(class_names)
    (a, samples_a), (b, samples_b) = (
        _resample(*_check_probs(labels, probs), groups, n_resamples, seed, threshold) for probs in (probs_a, probs_b)
    )
    low, high = interval_around(a - b, samples_a - samples_b, level, -1, 1)
    return pd.DataFrame({"figure": names, "a": a, "b": b, "difference": a - b, "low": low, "high": high})


def _check_labels(labels):
    y = np.asarray(labels)
    if y.ndim != 1:
        raise ValueError(f"labels have shape {y.shape}; expected (n,)")
    bad = (y != 0) & (y != 1)
    if bad.any():
        raise ValueError(f"label {y[bad][0]} in row {bad.argmax()}; expected 0 or 1")
    return y.astype(bool)


def _check_probs(labels, probs):
    """Returns labels as (n,) bool and probabilities as (n, repeats) float64, or raises ValueError."""
    y, shape = _check_labels(labels), np.shape(probs)
    probs = np.asarray(probs, dtype="float64")
    probs = probs[:, None] if probs.ndim == 1 else probs
    if probs.ndim != 2 or len(probs) != len(y) or not probs.shape[1]:
        raise ValueError(f"probs have shape {shape}; expected ({len(y)},) or ({len(y)}, repeats), as labels have")
    bad = ~((probs >= 0) & (probs <= 1))  # NaN compares false
    if bad.any():
        row, repeat = np.argwhere(bad)[0]
        raise ValueError(
            f"probability {probs[row, repeat]} in row {row}, repeat {repeat}; expected a number in [0, 1] for every "
            "row, from the fold that tests it"
        )
    return y, probs


def _name_figures(class_names):
    if len(set(class_names)) != 2 or len(class_names) != 2:
        raise ValueError(f"class_names are {class_names}; expected two different names, of 0 and of 1")
    of_class = [f"{figure}_{name}" for name in class_names for figure in ("precision", "recall", "f1")]
    return ["accuracy", "balanced_accuracy", *of_class, "auc"]


def _draw_val(units, unit_is_1, val_share, rng):
    """Draws validation's units: its share of those with class 1 and of the others, at least one and never all."""
    drawn = []
    for value in (True, False):
        some = units[unit_is_1[units] == value]
        size = min(max(round(val_share * len(some)), 1), max(len(some) - 1, 0))
        drawn.append(rng.permutation(some)[:size])
    return np.concatenate(drawn)


def _resample(y, probs, groups, n_resamples, seed, threshold):
    """Computes the (figures,) values and their (n_resamples, figures) resamples, each a mean over the repeats."""
    patients, n_patients = number_patients(groups, len(y))
    called, truth = probs >= threshold, np.broadcast_to(y[:, None], probs.shape)
    outcomes = np.hstack([called & truth, called & ~truth, ~called & truth, ~called & ~truth])
    by_patient = np.zeros((n_patients, outcomes.shape[1]))
    np.add.at(by_patient, patients, outcomes)
    samples = np.full((n_resamples, 8), np.nan)
    for resamples, times in draw_patients(n_patients, n_resamples, seed):
        samples[resamples] = _figures(times.T @ by_patient)
    auc = bootstrap_auc(truth, probs, groups, n_resamples, seed).mean(axis=1)
    value = np.append(_figures(by_patient.sum(axis=0)[None])[0], roc_auc(truth, probs).mean())
    return value, np.column_stack([samples, auc])


def _figures(outcomes):
    """Computes (k, 8) figures from (k, 4 * repeats) true and false positives, false and true negatives."""
    tp, fp, fn, tn = np.split(outcomes, 4, axis=1)
    recalls = ratio(tn, tn + fp), ratio(tp, tp + fn)
    figures = (
        *(ratio(tp + tn, tp + fp + fn + tn), (recalls[0] + recalls[1]) / 2),
        *(ratio(tn, tn + fn), recalls[0], ratio(2 * tn, 2 * tn + fn + fp)),
        *(ratio(tp, tp + fp), recalls[1], ratio(2 * tp, 2 * tp + fp + fn)),
    )
    return np.stack(figures, axis=1).mean(axis=2)
