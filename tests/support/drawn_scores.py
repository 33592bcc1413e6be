"""Labels, scores, patients and resamples for the tests of the figures."""

import numpy as np


def draw(n=300, classes=4, seed=0, decimals=None):
    """Labels and scores that carry some signal; few decimals make many ties."""
    rng = np.random.default_rng(seed)
    y = (rng.random((n, classes)) < np.linspace(0.4, 0.05, classes)).astype("uint8")
    score = rng.normal(size=(n, classes)) + 0.7 * y
    return y, score if decimals is None else np.round(score, decimals)


def draw_patients(n, n_patients, seed=0):
    """Patient numbers of n images, not consecutive."""
    return np.random.default_rng(seed).integers(0, n_patients, n) * 10 + 7


def resample_rows(groups, n_resamples, seed):
    """Rows of each resample, drawn as the documented method says: patients with replacement, with all their images."""
    patients = np.unique(groups)
    drawn = np.random.default_rng(seed).integers(0, len(patients), size=(n_resamples, len(patients)))
    return [np.concatenate([np.flatnonzero(groups == patients[i]) for i in row]) for row in drawn]
