"""Tests of xvision.cross_validation against scikit-learn, plain loops and simulation."""

import warnings

import numpy as np
import pytest
from drawn_scores import resample_rows
from scipy import stats
from sklearn import metrics

from helpers.evaluation import bootstrap_auc
from helpers.xvision import compare_scores, cross_validation, make_folds, score_table

FIGURES = [
    *("accuracy", "balanced_accuracy", "precision_normal", "recall_normal", "f1_normal"),
    *("precision_finding", "recall_finding", "f1_finding", "auc"),
]


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def draw_study(n=240, n_patients=90, repeats=3, seed=0, prevalence=0.3, decimals=None):
    """Labels, probabilities that carry some signal, and patients with several rows, some of both classes."""
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, n_patients, n) * 10 + 3
    y = (rng.random(n) < prevalence).astype(int)
    probs = stats.norm.cdf(rng.normal(size=(n, repeats)) + 1.2 * y[:, None] - 0.6)
    return y, probs if decimals is None else probs.round(decimals), groups


def measure(y, probs):
    """The figures of one repeat by scikit-learn."""
    called = probs >= 0.5
    of_class = [
        figure(y, called, pos_label=k) for k in (0, 1)
        for figure in (metrics.precision_score, metrics.recall_score, metrics.f1_score)
    ]  # fmt: skip
    accuracies = metrics.accuracy_score(y, called), metrics.balanced_accuracy_score(y, called)
    return np.array([*accuracies, *of_class, metrics.roc_auc_score(y, probs)])


@pytest.mark.parametrize("by_patient", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_every_row_is_tested_once_and_patients_stay_together(seed, by_patient):
    y, _, groups = draw_study(seed=seed)
    folds = make_folds(y, groups, n_folds=4, n_repeats=3, seed=seed, by_patient=by_patient)
    assert [(fold.repeat, fold.fold) for fold in folds] == [(r, k) for r in range(3) for k in range(4)]
    shared = 0
    for repeat in range(3):
        tested = np.concatenate([fold.test for fold in folds if fold.repeat == repeat])
        np.testing.assert_array_equal(np.sort(tested), np.arange(240))
    for fold in folds:
        subsets = fold.train, fold.val, fold.test
        np.testing.assert_array_equal(np.sort(np.concatenate(subsets)), np.arange(240))
        patients = [set(groups[rows]) for rows in subsets]
        shared += sum(len(patients[i] & patients[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
        assert all((np.diff(rows) > 0).all() for rows in subsets)
        for rows, size in zip(subsets, (144, 36, 60), strict=True):
            assert abs(len(rows) - size) <= 18
            assert abs(y[rows].mean() - y.mean()) < 0.12
    assert (shared == 0) == by_patient
    assert shared == 0 or shared > 12 * 20


def test_folds_are_balanced_where_each_patient_has_one_row():
    y = np.repeat([0, 1], [50, 25])
    for fold in make_folds(y, np.arange(75)):
        assert [np.bincount(y[rows]).tolist() for rows in fold[2:]] == [[32, 16], [8, 4], [10, 5]]


def test_folds_depend_on_patients_and_seed_alone():
    y, _, groups = draw_study()
    folds = make_folds(y, groups, n_repeats=2, seed=5)
    order = np.random.default_rng(0).permutation(len(y))
    for fold, other in zip(folds, make_folds(y[order], groups[order], n_repeats=3, seed=5), strict=False):
        for rows, other_rows in zip(fold[2:], other[2:], strict=True):
            np.testing.assert_array_equal(rows, np.sort(order[other_rows]))
    assert not np.array_equal(folds[0].test, folds[5].test)
    assert not np.array_equal(folds[0].test, make_folds(y, groups, seed=6)[0].test)
    vals = [set(fold.val) for fold in folds]
    assert all(vals[i] != vals[j] for i in range(10) for j in range(i))


def test_smallest_study_fills_every_subset():
    y, groups = np.repeat([0, 1], [9, 3]), [f"p{number}" for number in range(12)]
    for seed in range(20):
        for fold in make_folds(y, groups, n_folds=3, seed=seed):
            assert [len(set(y[rows])) for rows in fold[2:]] == [2, 2, 2]


@pytest.mark.parametrize(
    ("y", "groups", "options", "text"),
    [
        ([0] * 6, range(6), {}, "0 patients are of class finding, too few for 5 folds; add patients"),
        ([1] * 6, range(6), {}, "0 patients are of class normal"),
        ([0] * 9 + [1] * 8, [*range(9), *[9, 10, 11, 12] * 2], {}, "4 patients are of class f.* n_folds of 4 or fewer"),
        (
            [0] * 9 + [1] * 4,
            [*range(9), 9, 9, 9, 9],
            {},
            "1 patients are of class .*, too few for 5 folds; add patients",
        ),
        ([0] * 9 + [1] * 4, [0] * 13, {"by_patient": False}, "4 rows are of class finding"),
        ([0] * 9 + [1] * 9, range(18), {"n_folds": 10}, "9 patients are of class normal"),
        ([0, 0, 1, 1], range(4), {"n_folds": 2}, "2 patients are of class normal, too few for 2 folds; add p"),
        ([0, 1], range(3), {}, r"groups has shape \(3,\)"),
    ],
)
def test_what_cannot_be_divided_is_refused(y, groups, options, text):
    with pytest.raises(ValueError, match=text):
        make_folds(np.array(y), list(groups), **options)


@pytest.mark.parametrize("decimals", [None, 1])
def test_values_equal_sklearn(decimals):
    y, probs, groups = draw_study(decimals=decimals)
    table = score_table(y, probs, groups, n_resamples=20)
    assert list(table.columns) == ["figure", "value", "low", "high", "n_rows", "n_patients"]
    assert table["figure"].tolist() == [*FIGURES, "majority", "accuracy_minus_majority"]
    expected = np.mean([measure(y, column) for column in probs.T], axis=0)
    np.testing.assert_allclose(table["value"][:9], expected, rtol=0, atol=1e-14)
    majority = 1 - y.mean()
    np.testing.assert_allclose(table["value"][9:], [majority, expected[0] - majority], rtol=0, atol=1e-14)
    n_rows = [240, *(y == 0).sum().repeat(3), *y.sum().repeat(3)]
    np.testing.assert_array_equal(table["n_rows"], [240, *n_rows, 240, 240, 240])
    n_patients = [len(set(groups[y == k])) for k in (0, 1)]
    assert table["n_patients"].tolist()[1:9] == [len(set(groups)), *[n_patients[0]] * 3, *[n_patients[1]] * 3,
                                                 len(set(groups))]  # fmt: skip
    one = score_table(y, probs[:, 1], groups, n_resamples=20)
    np.testing.assert_allclose(one["value"][:9], measure(y, probs[:, 1]), rtol=0, atol=1e-14)


@pytest.mark.slow
def test_intervals_equal_sklearn_on_the_repeated_rows(monkeypatch):
    """More than one chunk of resamples, every one by hand."""
    library = cross_validation.draw_patients.__globals__
    assert library["_CHUNK"] > 8
    monkeypatch.setitem(library, "_CHUNK", 8)
    y, probs, groups = draw_study(n=150, n_patients=40, repeats=2, decimals=1)
    other = np.random.default_rng(3).random((150, 1)).round(1)
    samples, others, shares = [], [], []
    for rows in resample_rows(groups, 20, 3):
        samples.append(np.mean([measure(y[rows], column[rows]) for column in probs.T], axis=0))
        others.append(np.mean([measure(y[rows], column[rows]) for column in other.T], axis=0))
        shares.append(1 - y[rows].mean())
    samples, others, shares = np.array(samples), np.array(others), np.array(shares)
    table = score_table(y, probs, groups, n_resamples=20, seed=3, level=0.8)
    expected = np.column_stack([samples, shares, samples[:, 0] - shares])
    np.testing.assert_allclose(table[["low", "high"]].T, np.quantile(expected, [0.1, 0.9], axis=0), atol=1e-8)
    both = compare_scores(y, probs, other, groups, n_resamples=20, seed=3, level=0.8)
    assert list(both.columns) == ["figure", "a", "b", "difference", "low", "high"]
    assert both["figure"].tolist() == FIGURES
    np.testing.assert_allclose(both[["low", "high"]].T, np.quantile(samples - others, [0.1, 0.9], axis=0), atol=1e-8)
    np.testing.assert_array_equal(both["a"], table["value"][:9])
    np.testing.assert_array_equal(both["b"], score_table(y, other, groups, n_resamples=5)["value"][:9])
    np.testing.assert_allclose(both["difference"], both["a"] - both["b"])
    auc = bootstrap_auc(np.column_stack([y, y]), probs, groups, 20, 3).mean(axis=1)
    np.testing.assert_allclose(auc, samples[:, 8], atol=1e-12)


def test_pairing_makes_differences_narrow():
    y, probs, groups = draw_study()
    near = probs.copy()
    near[::40] = 1 - near[::40]
    both = compare_scores(y, probs, near, groups, n_resamples=200)
    alone = score_table(y, probs, groups, n_resamples=200)[:9]
    assert ((both["high"] - both["low"]) < 0.6 * (alone["high"] - alone["low"])).all()
    same = compare_scores(y, probs, probs[:, [2, 0, 1]], groups, n_resamples=50)
    np.testing.assert_allclose(same[["difference", "low", "high"]], 0, atol=1e-8)
    back = compare_scores(y, near, probs, groups, n_resamples=200)
    np.testing.assert_allclose(back[["difference", "low", "high"]], -both[["difference", "high", "low"]], atol=1e-12)


def test_majority_shows_what_an_accuracy_is_worth():
    y, _, groups = draw_study(n=400, n_patients=400, prevalence=0.15)
    always = score_table(y, np.full(400, 0.1), groups).set_index("figure")
    accuracy, majority, lead = (always.loc[name] for name in ("accuracy", "majority", "accuracy_minus_majority"))
    assert accuracy["value"] == majority["value"] == pytest.approx(1 - y.mean())
    assert (accuracy["low"], accuracy["high"]) == (majority["low"], majority["high"])
    np.testing.assert_allclose(lead[["value", "low", "high"]].astype(float), 0, atol=1e-8)
    good = score_table(y, 0.1 + 0.8 * y, groups).set_index("figure")
    assert good.loc["accuracy_minus_majority", "low"] > 0.05
    # The majority class may be the other one.
    flipped = score_table(1 - y, np.full(400, 0.9), groups).set_index("figure")
    assert flipped.loc["majority", "value"] == majority["value"]
    worse = score_table(y, 0.9 - 0.8 * y, groups).set_index("figure").loc["accuracy_minus_majority"]
    assert -1 <= worse["low"] < worse["value"] < worse["high"] < -0.7


@pytest.mark.parametrize("seed", range(12))
def test_intervals_hold_the_value_in_tiny_studies(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, 9))
    y, groups = rng.integers(0, 2, n), rng.integers(0, 3, n)
    probs = rng.random((n, 1 + seed % 3)).round(1)
    table = score_table(y, probs, groups, n_resamples=25, seed=seed)
    other = compare_scores(y, probs, 1 - probs, groups, n_resamples=25, seed=seed)
    for value, low, high, lowest in (
        (table["value"], table["low"], table["high"], np.append(np.zeros(10), -1)),
        (other["difference"], other["low"], other["high"], np.full(9, -1)),
    ):
        known = value.notna()
        assert ((lowest <= low) & (low <= value) & (value <= high) & (high <= 1))[known].all()
        assert low[~known].isna().all() and high[~known].isna().all()
    assert table.set_index("figure")["value"].isna()[["accuracy", "majority"]].eq(n == 0).all()


def test_undefined_figures_are_nan():
    groups = np.arange(6)
    # The second repeat predicts no nodule.
    table = score_table([0, 0, 0, 1, 1, 1], [[0.1, 0.1]] * 3 + [[0.9, 0.2]] * 3, groups, n_resamples=30)
    nan = table.set_index("figure")["value"].isna()
    assert nan[nan].index.tolist() == ["precision_finding"]
    assert table.set_index("figure").loc["f1_finding", "value"] == 0.5
    # One class only.
    nan = score_table([0] * 6, [0.1] * 6, groups, n_resamples=30).set_index("figure")["value"].isna()
    expected = ["balanced_accuracy", "precision_finding", "recall_finding", "f1_finding", "auc"]
    assert nan[nan].index.tolist() == expected
    assert score_table([], [], [], n_resamples=3)["value"].isna().all()
    assert score_table([], np.zeros((0, 2)), [], n_resamples=3)["n_rows"].tolist() == [0] * 11


@pytest.mark.parametrize(
    ("y", "probs", "groups", "text"),
    [
        ([0, 1], [0.2, np.nan], [1, 2], "score nan in row 1, class 0; expected a finite number"),
        ([0, 1], [0.2, 0.3, 0.4], [1, 2], r"labels have shape \(2, 1\), scores \(3, 1\)"),
        ([0, 3], [0.2, 0.3], [1, 2], "label 3 in row 1"),
        ([0, np.nan], [0.2, 0.3], [1, 2], "label nan in row 1"),
        ([0, 1], [0.2, 0.3], [1], r"groups has shape \(1,\)"),
    ],
)
def test_malformed_input_is_refused(y, probs, groups, text):
    with pytest.raises(ValueError, match=text):
        score_table(y, probs, groups, n_resamples=3)
    with pytest.raises(ValueError, match=text):
        compare_scores(y, np.full(len(y), 0.5), probs, groups, n_resamples=3)
