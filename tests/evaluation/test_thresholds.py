"""Tests of evaluation.thresholds against scikit-learn, brute force and known answers."""

import warnings

import numpy as np
import pytest
from drawn_scores import draw, resample_rows
from sklearn import metrics

from helpers.evaluation.bootstrap import bootstrap_ratio
from helpers.evaluation.thresholds import choose_thresholds, confusion_at, rates_table, top_k_hits


def test_undefined_figures_are_nan():
    y = np.array([[0, 1, 0], [0, 1, 1]])
    score = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    empty = np.zeros((0, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({}, {"method": "f1"}, {"method": "sensitivity", "sensitivity": 0.9}):
            np.testing.assert_array_equal(choose_thresholds(y, score, **options), [np.nan, np.nan, 0.6])
            np.testing.assert_array_equal(choose_thresholds(empty, empty, **options), [np.nan] * 3)
        np.testing.assert_array_equal(confusion_at(empty, empty, 0.5)["tp"], [0, 0, 0])
        np.testing.assert_array_equal(confusion_at(empty, empty, 0.5)["ppv"], [np.nan] * 3)
        assert rates_table(empty, empty, 0.5, [], list("abc")).filter(regex="sens|spec|pv").isna().all(axis=None)


def test_confusion_counts_and_rates():
    y = np.array([[1, 0], [1, 0], [0, 0], [0, 1], [0, 1]])
    score = np.array([[0.9, 0.1], [0.5, 0.1], [0.5, 0.1], [0.4, 0.1], [0.1, 0.1]])
    result = confusion_at(y, score, [0.5, 0.2])
    counts = {name: result[name].tolist() for name in ("tp", "fp", "fn", "tn")}
    assert counts == {"tp": [2, 0], "fp": [1, 0], "fn": [0, 2], "tn": [2, 3]}
    np.testing.assert_allclose(result["sensitivity"], [1, 0])
    np.testing.assert_allclose(result["specificity"], [2 / 3, 1])
    np.testing.assert_allclose(result["ppv"], [2 / 3, np.nan])
    np.testing.assert_allclose(result["npv"], [1, 3 / 5])
    unknown = confusion_at(y, score, [0.5, np.nan])
    assert np.isnan([unknown[name][1] for name in ("sensitivity", "specificity", "ppv", "npv")]).all()
    assert (unknown["fn"][1], unknown["tn"][1]) == (2, 3)


MERITS = {
    "youden": lambda tp, fp, fn, tn: tp / (tp + fn) + tn / (tn + fp) - 1,
    "f1": lambda tp, fp, fn, tn: 2 * tp / (2 * tp + fp + fn),
}


@pytest.mark.parametrize("decimals", [None, 1, 0])
@pytest.mark.parametrize("method", MERITS)
def test_thresholds_maximize_youden_or_f1(decimals, method):
    y, score = draw(60, decimals=decimals)
    chosen = choose_thresholds(y, score, method)
    for c in range(4):
        levels = np.unique(score[:, c])
        called, positive = score[:, c] >= levels[:, None], y[:, c] == 1
        counts = (called & positive, called & ~positive, ~called & positive, ~called & ~positive)
        merits = MERITS[method](*(count.sum(axis=1) for count in counts))
        assert chosen[c] == levels[np.isclose(merits, np.max(merits), atol=1e-12)].max()


def test_of_equally_good_thresholds_the_highest_is_taken():
    assert choose_thresholds([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.6]) == [0.9]
    # F1 is 2/3 at 0.9 and at 0.6.
    assert choose_thresholds([1, 0, 0, 1], [0.9, 0.8, 0.7, 0.6], "f1") == [0.9]


@pytest.mark.parametrize("decimals", [None, 1, 0])
@pytest.mark.parametrize("wished", [0.01, 0.5, 0.9, 1.0])
def test_thresholds_reach_the_wished_sensitivity(decimals, wished):
    y, score = draw(60, decimals=decimals)
    chosen = choose_thresholds(y, score, "sensitivity", sensitivity=wished)
    assert (confusion_at(y, score, chosen)["sensitivity"] >= wished).all()
    for c in range(4):
        assert chosen[c] in score[:, c]
        higher = [level for level in np.unique(score[:, c]) if level > chosen[c]]
        assert all(confusion_at(y[:, c], score[:, c], level)["sensitivity"][0] < wished for level in higher)


def test_a_wished_sensitivity_that_is_met_exactly_is_met():
    # 7 of 100 positives: the product 0.07 * 100 is rounded to a number above 7 and must not ask for the eighth.
    for n_pos in (3, 7, 49, 100):
        y, score = np.append(np.ones(n_pos), 0), np.append(np.arange(n_pos, 0, -1.0), 0)
        for found in range(1, n_pos + 1):
            assert choose_thresholds(y, score, "sensitivity", found / n_pos) == [n_pos + 1 - found]


@pytest.mark.parametrize("decimals", [None, 1])
def test_rates_table_values(decimals):
    y, score = draw(200, decimals=decimals)
    groups = np.random.default_rng(1).integers(0, 30, 200)
    thresholds = [0.5, 0.0, 9.0, np.nan]
    table = rates_table(y, score, thresholds, groups, list("abcd"), n_resamples=150, seed=2, level=0.9)
    rates = ["sensitivity", "specificity", "ppv", "npv"]
    ends = [name for rate in rates for name in (rate, f"{rate}_low", f"{rate}_high")]
    assert list(table.columns) == ["pathology", "threshold", "tp", "fp", "fn", "tn", *ends]
    expected = confusion_at(y, score, thresholds)
    for name in ("tp", "fp", "fn", "tn", *rates):
        np.testing.assert_array_equal(table[name], expected[name])
    np.testing.assert_array_equal(table["threshold"], thresholds)
    assert table["sensitivity"][1] == metrics.recall_score(y[:, 1], score[:, 1] >= 0)
    assert table["ppv"][1] == metrics.precision_score(y[:, 1], score[:, 1] >= 0)
    samples = [confusion_at(y[rows], score[rows], thresholds) for rows in resample_rows(groups, 150, 2)]
    for rate in rates:
        for c in (0, 1):
            interval = np.nanquantile([sample[rate][c] for sample in samples], [0.05, 0.95])
            np.testing.assert_allclose(table.loc[c, [f"{rate}_low", f"{rate}_high"]].tolist(), interval, atol=1e-8)
    # Where nothing is called, PPV is unknown; at an unknown threshold all is.
    assert table.loc[2, ["ppv", "ppv_low", "ppv_high"]].isna().all()
    assert (table["sensitivity"][2], table["specificity"][2]) == (0, 1)
    assert table.loc[3, ends].isna().all()
    # A vector is one class, and one number is a threshold for all.
    one = rates_table(y[:, 0], score[:, 0], 0.5, groups, ["a"], 20)
    assert one.equals(rates_table(y[:, :1], score[:, :1], [0.5], groups, ["a"], 20))
    with pytest.raises(ValueError, match="does not match length"):
        rates_table(y, score, 0.5, groups, list("abc"), 10)


@pytest.mark.parametrize("k", [1, 2, 4, 9])
def test_top_k_by_brute_force(k):
    y, score = draw(100, decimals=0)
    expected = np.zeros(y.shape, dtype=bool)
    for row, (labels, scores) in enumerate(zip(y, score, strict=True)):
        for c in sorted(range(4), key=lambda c, scores=scores: (-scores[c], c))[:k]:
            expected[row, c] = labels[c]
    hits = top_k_hits(y, score, k)
    np.testing.assert_array_equal(hits, expected)
    assert hits.dtype == bool
    # One patient, drawn as often as there are patients, gives back the share of all labels.
    samples = bootstrap_ratio(hits.sum(axis=1), y.sum(axis=1), np.zeros(100), 3)
    np.testing.assert_allclose(samples, expected.sum() / y.sum())


def test_top_k_of_a_constant_ranking():
    y = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1]])
    assert top_k_hits(y, np.broadcast_to([0.9, 0.5, 0.1], (3, 3)), k=1).sum() == 2
    assert top_k_hits(y, np.zeros((3, 3)), k=2).sum() == 3  # of tied classes the earlier ranks higher
