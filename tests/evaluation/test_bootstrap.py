"""Tests of evaluation.bootstrap against plain loops over the resamples and known answers."""

import warnings

import numpy as np
import pytest
from drawn_scores import draw, draw_patients, resample_rows

from helpers.evaluation.bootstrap import bootstrap_ratio, percentile_interval


def test_percentile_interval_skips_nan():
    samples = np.column_stack([np.arange(101.0), np.full(101, np.nan), np.arange(101.0)])
    samples[51:, 2] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low, high = percentile_interval(samples, 0.9)
    np.testing.assert_allclose(low, [5, np.nan, 2.5])
    np.testing.assert_allclose(high, [95, np.nan, 47.5])
    assert percentile_interval(np.arange(101), 0.5) == (25, 75)
    with pytest.raises(ValueError, match="range"):
        percentile_interval(samples, 95)


@pytest.mark.parametrize("columns", [(3, 3), (3, 1), (1, 3), (None, None)])
def test_bootstrap_ratio_equals_a_plain_loop(columns):
    rng = np.random.default_rng(5)
    groups = draw_patients(90, 12)
    above, below = (rng.integers(0, 3, 90 if k is None else (90, k)).astype("float64") for k in columns)
    below[groups != groups[0]] *= 0.5 if columns != (3, 3) else 0  # with one patient in the denominator many are 0
    samples = bootstrap_ratio(above, below, groups, n_resamples=150, seed=3)
    assert samples.shape == (150, 1 if columns[0] is None else 3)
    for sample, rows in zip(samples, resample_rows(groups, 150, 3), strict=True):
        sums = np.broadcast_arrays(np.atleast_1d(above[rows].sum(axis=0)), np.atleast_1d(below[rows].sum(axis=0)))
        for value, part, whole in zip(sample, *sums, strict=True):
            assert value == pytest.approx(part / whole if whole else np.nan, rel=1e-12, nan_ok=True)
    assert np.isnan(samples).any() == (columns == (3, 3))


def test_bootstrap_ratio_is_paired_and_refuses_malformed_numbers():
    y, _ = draw(200)
    groups = draw_patients(200, 30)
    shares = [bootstrap_ratio(part, np.ones(200), groups, 50, seed=6) for part in (y, 1 - y)]
    np.testing.assert_allclose(shares[0] + shares[1], 1)
    assert bootstrap_ratio(y[:, 0], y[:, 0], groups, 50).tolist() == [[1.0]] * 50
    empty = bootstrap_ratio(y[:0], y[:0], [], 10)
    assert empty.shape == (10, 4) and np.isnan(empty).all()
    with pytest.raises(ValueError, match="denominator inf in row 1, class 0"):
        bootstrap_ratio([1, 2], [1, np.inf], [1, 2])
    with pytest.raises(ValueError, match="numerator nan in row 0, class 0"):
        bootstrap_ratio([np.nan, 2], [1, 1], [1, 2])
    with pytest.raises(ValueError, match="mismatch"):
        bootstrap_ratio([1, 2], [1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match=r"groups has shape \(3,\)"):
        bootstrap_ratio([1, 2], [1, 2], [1, 2, 3])
