"""Can models that see no shape solve the synthetic study? Linear models of thumbnails and of gradients try.

A study that they solve shows nothing about a network. Fitted on the training list of the default synthetic study,
measured on its test list.

Usage: difficulty.py [--images 4000]; about three minutes
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))

from helpers.evaluation import auc_table, predict_by_ridge, predict_without_pixels
from helpers.study import PATHOLOGIES, list_images, load_metadata, match_images, write_synthetic_study
from helpers.study.study_folder import load_official_lists

SIDE = 88  # pixels, as notebook 1 packs in the quick profile
CELL, BINS = 8, 9  # pixels a cell, directions: those of Dalal and Triggs (2005), whose descriptor this is
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)


def load_study(folder):
    """Returns the rows of a study's images, with `test`, whether in its test list, and uint8 images (n, SIDE, SIDE)."""
    paths = list_images(folder)
    rows, _ = match_images(load_metadata(folder), paths)
    opened = (Image.open(paths[image]).convert("L") for image in rows["image"])
    images = [image.resize((SIDE, SIDE), Image.Resampling.BOX) for image in opened]
    return rows.assign(test=rows["image"].isin(load_official_lists(folder)[1])), np.stack(list(map(np.asarray, images)))


def make_thumbnails(images, side):
    """Returns float32 (n, side * side): each image averaged to `side` pixels."""
    small = [Image.fromarray(image).resize((side, side), Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(image, "float32").ravel() for image in small])


def describe_gradients(images):
    """Returns float32 (n, features): histograms of gradient directions, normalized over blocks of 2 x 2 cells."""
    down, right = np.gradient(images.astype("float32") / 255, axis=(1, 2))
    strength, place = np.hypot(down, right), (np.arctan2(down, right) % np.pi) / np.pi * BINS
    lower, share = np.floor(place).astype(int) % BINS, place % 1
    n, cells = len(images), images.shape[1] // CELL
    histograms = np.empty((n, cells, cells, BINS), "float32")
    for k in range(BINS):
        weight = strength * ((lower == k) * (1 - share) + ((lower + 1) % BINS == k) * share)
        weight = weight[:, : cells * CELL, : cells * CELL].reshape(n, cells, CELL, cells, CELL)
        histograms[..., k] = weight.sum((2, 4))
    corners = [histograms[:, i : i + cells - 1, j : j + cells - 1] for i in (0, 1) for j in (0, 1)]
    blocks = np.concatenate(corners, axis=-1)
    return (blocks / np.sqrt((blocks**2).sum(-1, keepdims=True) + 1e-3)).reshape(n, -1)


def predict_by_logistic(train, labels, patients, features):
    """Returns (m, 14) scores of a logistic regression a finding; the penalty is chosen on a fifth of the patients."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train)
    train, features = scaler.transform(train), scaler.transform(features)
    held_out = np.isin(patients, np.random.default_rng(0).permutation(np.unique(patients))[::5])
    scores = np.zeros((len(features), labels.shape[1]))
    for k in range(labels.shape[1]):
        trials = []
        for penalty in PENALTIES:
            model = LogisticRegression(C=penalty, max_iter=300).fit(train[~held_out], labels[~held_out, k])
            trials.append(roc_auc_score(labels[held_out, k], model.decision_function(train[held_out])))
        best = PENALTIES[int(np.argmax(trials))]
        scores[:, k] = LogisticRegression(C=best, max_iter=300).fit(train, labels[:, k]).decision_function(features)
    return scores


def measure_study(rows, images):
    """Returns {model: {finding: AUC, ..., "mean", "low", "high"}} on the test list."""
    labels, patients = rows[list(PATHOLOGIES)].to_numpy(), rows["patient_id"].to_numpy()
    test = rows["test"].to_numpy()
    gradients = describe_gradients(images)
    scores = {
        f"ridge, {side} x {side} pixels": predict_by_ridge(x[~test], labels[~test], x[test])
        for side, x in ((side, make_thumbnails(images, side)) for side in (8, 16, 32))
    }
    scores["ridge, gradients"] = predict_by_ridge(gradients[~test], labels[~test], gradients[test])
    scores["logistic, gradients"] = predict_by_logistic(
        gradients[~test], labels[~test], patients[~test], gradients[test]
    )
    scores["age, sex, view, follow-up"] = predict_without_pixels(rows[~test], rows[test])
    gray = np.stack([images.mean((1, 2)), images.std((1, 2))], axis=1)
    scores["mean and spread of gray"] = predict_by_ridge(gray[~test], labels[~test], gray[test])
    results = {}
    for name, score in scores.items():
        table = auc_table(labels[test], score, patients[test], PATHOLOGIES).set_index("pathology")
        results[name] = table["auc"].round(4).to_dict()
        results[name] |= table.loc["mean", ["auc_low", "auc_high"]].astype(float).round(4).to_dict()
    return results


def main():
    """Measures, prints and writes benchmarks/results/difficulty.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4000, help="in the synthetic study, as in notebook 1")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_synthetic_study(Path(name) / "phantom", n_images=arguments.images)
        rows, images = load_study(Path(name) / "phantom")
    results = {"images": len(rows), "models": measure_study(rows, images)}
    print(json.dumps(results, indent=1))
    (ROOT / "benchmarks" / "results" / "difficulty.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
