"""Resamples of patients, and the intervals that they give. NumPy and SciPy only.

A patient's images resemble each other, so resamples draw patients, each with all images: drawing images alone would
give intervals that are too narrow. All resampling goes through `draw_patients`, so that calls with the same groups,
number of resamples and seed draw the same patients: differences can be formed resample by resample.
"""

import warnings

import numpy as np
from scipy import sparse

_CHUNK = 128  # resamples at once: 2 * positives * 128 int32 is 6 MB for the commonest finding of the official test set


def bootstrap_ratio(numerator, denominator, groups, n_resamples=1000, seed=0):
    """Computes sum(numerator) / sum(denominator) in the resamples of patients that `bootstrap_auc` draws.

    Sensitivity is one such ratio (found positives over positives), and so are predictive values, pointing-game accuracy
    and any share.

    Args:
        numerator: (n, columns) or (n,) finite numbers.
        denominator: (n, columns) or (n,) finite numbers; one column serves all.
        groups: (n,) patient of each row.
        n_resamples: number of resamples.
        seed: seed of the draw.

    Returns:
        (n_resamples, columns) float64; NaN where the denominator is 0.

    Raises:
        ValueError: if a number is not finite, or the lengths differ.
    """
    parts = [np.asarray(values, dtype="float64") for values in (numerator, denominator)]
    parts = [values[:, None] if values.ndim == 1 else values for values in parts]
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


def percentile_interval(samples, level=0.95):
    """Computes the central interval that holds a share `level` of (n_resamples, ...) samples, skipping NaN.

    Returns:
        Tuple `(low, high)` of arrays with the shape of one sample; NaN where all samples are.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        return tuple(np.nanquantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0))


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


def draw_patients(n_patients, n_resamples, seed):
    """Draws patients with replacement, some resamples at a time, and counts how often each was drawn.

    Yields:
        Tuple `(resamples, times)`: which resamples, a slice, and (n_patients, resamples) int32 counts; nothing where
        there are no patients.
    """
    rng = np.random.default_rng(seed)
    for start in range(0, n_resamples if n_patients else 0, _CHUNK):
        size = min(_CHUNK, n_resamples - start)
        drawn = rng.integers(0, n_patients, size=(size, n_patients))
        cells = drawn * size + np.arange(size)[:, None]
        times = np.bincount(cells.ravel(), minlength=n_patients * size).reshape(n_patients, size)
        yield slice(start, start + size), times.astype("int32")


def number_patients(groups, n_rows):
    """Returns the patient's number in each row, (n_rows,) int64 from 0, and how many patients there are."""
    groups = np.asarray(groups)
    if groups.shape != (n_rows,):
        raise ValueError(f"groups has shape {groups.shape}; expected ({n_rows},), one patient a row")
    patients, patient_of_row = np.unique(groups, return_inverse=True)
    return patient_of_row, len(patients)


def refuse_where(bad, values, name, expected):
    """Raises ValueError naming the first row and class at which (n, classes) values are bad."""
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ValueError(f"{name} {values[row, column]} in row {row}, class {column}; expected {expected}")


def ratio(part, whole):
    """Divides elementwise; NaN, and no warning, where there is nothing to divide by."""
    part, whole = np.broadcast_arrays(part, whole)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole != 0)
