"""The evaluation of a published model, scripts/evaluate_reference.py, on small data and on the real predictions."""

import sys

import numpy as np
import pandas as pd
import pytest

from helpers.evaluation import load_predictions
from helpers.runtime.settings import ROOT
from helpers.study import load_adjudicated, load_metadata, load_official_lists, load_study

sys.path.append(str(ROOT / "scripts"))

import evaluate_reference as reference


def test_weights_make_the_strata_as_frequent_as_in_the_list():
    strata, inside = np.array(list("aaabbbbcab")), np.array([1, 1, 0, 1, 0, 0, 0, 0, 0, 0], bool)
    weights = pd.Series(reference.weigh(strata, inside)).groupby(strata[~inside]).sum()
    assert (weights / weights.sum()).round(9).to_dict() == {"a": round(2 / 3, 9), "b": round(1 / 3, 9), "c": 0}


def test_negatives_with_and_without_other_findings_are_told_apart():
    """Two findings: the first is told from images with nothing, not from those with the second, and the reverse."""
    labels = np.repeat([[1, 0], [0, 1], [0, 0]], 5, axis=0)
    probs = np.repeat([[0.5, 0.5], [0.5, 0.5], [0.1, 0.9]], 5, axis=0)
    assert reference.against(labels, probs, has_other=False) == 0.5  # the mean of 1 and 0
    assert reference.against(labels, probs, has_other=True) == 0.5
    probs[10:, 1] = 0.1
    assert reference.against(labels, probs, has_other=False) == 1
    assert reference.against(labels, probs, has_other=True) == 0.5


@pytest.mark.slow
def test_the_committed_comparison_is_that_of_the_published_predictions(shared_data, monkeypatch):
    path, folder = shared_data / "reference" / "preds.csv", shared_data / "nih_metadata"
    if not path.is_file():
        pytest.skip(f"needs {path}, the predictions of jrzech/reproduce-chexnet, which are not part of the repository")
    metadata, lists = load_metadata(folder), load_official_lists(folder)
    predictions, _ = load_predictions(path, load_study(folder).rows)
    monkeypatch.setattr(reference, "N_RESAMPLES", 2)
    drop = reference.explain_drop(predictions.drop(columns=["view"]), metadata, lists[1])
    committed = pd.read_csv(reference.OUT / "drop.csv")
    exact = [name for name in committed if not name.endswith(("_low", "_high"))]
    pd.testing.assert_frame_equal(drop[exact], committed[exact], check_dtype=False, atol=1e-6)
    labels = reference.compare_labels(metadata, lists[1], load_adjudicated(folder))
    pd.testing.assert_frame_equal(labels, pd.read_csv(reference.OUT / "mined_labels.csv"), atol=1e-6)
