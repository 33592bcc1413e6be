"""Evaluates the published predictions of a retrained CheXNet with notebook 3, and writes docs/reference_evaluation.

The predictions are `pretrained/preds.csv` of https://github.com/jrzech/reproduce-chexnet (BSD-3-Clause). They are
evaluated twice, on all of their images and on those in NIH's official test list. Tables and figures are kept, not the
predictions. `make results`, or `renew_results.py --pages-only`, then renews the pages that hold these numbers.

Usage: evaluate_reference.py PREDICTIONS --data-dir DIR
"""

import argparse
import base64
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import pandas as pd
from renew_results import ROOT, renew_pages, shrink_figure
from run_notebooks import execute_into
from sklearn.metrics import roc_auc_score

from helpers.evaluation import auc_table, confusion_at, name_columns, predict_without_pixels, roc_auc
from helpers.runtime import resolve_path
from helpers.study import ADJUDICATED, PATHOLOGIES, load_adjudicated, load_metadata, load_official_lists

OUT = ROOT / "docs" / "reference_evaluation"
COPIED = {  # from the folder of the evaluation, under which name
    "aucs.csv": "aucs.csv",
    "floors.csv": "floors.csv",
    "figures/03_aucs.csv": "beside.csv",
    "figures/03_subgroups_auc.csv": "subgroups.csv",
    "figures/03_radiologists.csv": "radiologists.csv",
    "figures/03_calibration.csv": "calibration.csv",
    "figures/03_top.csv": "top.csv",
    "figures/03_aucs.png": "aucs.png",
    "figures/03_roc.png": "roc.png",
    "figures/03_subgroups_auc.png": "subgroups.png",
}
PROBS, LABELS = name_columns(PATHOLOGIES)
HERNIA = PATHOLOGIES.index("Hernia")  # 11 images of 5 patients in the list, none of them AP: its AUC says little
N_RESAMPLES = 200  # of patients, for the intervals of weighted AUCs


def evaluate(predictions, data_dir, run_dir, out):
    """Executes notebook 3 on a CSV and copies its tables and figures to a folder; returns its predictions.csv."""
    settings = {"PREDICTIONS": str(predictions), "DATA_DIR": str(data_dir), "RUN_DIR": str(run_dir)}
    execute_into(run_dir / "executed", "03_evaluate", settings)
    out.mkdir(parents=True, exist_ok=True)
    for source, target in COPIED.items():
        if target.endswith(".png"):
            text = base64.b64encode((run_dir / source).read_bytes()).decode()
            (out / target).write_bytes(base64.b64decode(shrink_figure(text, kinds=("image/png",))[1]))
        else:
            shutil.copyfile(run_dir / source, out / target)
    return pd.read_csv(run_dir / "predictions.csv")


def measure_floors(metadata, lists):
    """Measures what metadata alone reach on all of NIH's test list, learned from its other list."""
    train, test = (metadata[metadata["image"].isin(names)].reset_index(drop=True) for names in lists)
    tables = []
    for name, columns in {"view only": {"columns": ("view",)}, "metadata only": {}}.items():
        scores = predict_without_pixels(train, test, **columns)
        table = auc_table(test[list(PATHOLOGIES)].to_numpy(), scores, test["patient_id"].to_numpy(), PATHOLOGIES)
        tables.append(table.assign(floor=name))
    return pd.concat(tables)[["floor", "pathology", "n_pos", "n_pos_patients", "auc", "auc_low", "auc_high"]]


def compare_labels(metadata, test_list, adjudicated):
    """Compares the mined labels of the test list with radiologists': a row a finding of `ADJUDICATED`."""
    theirs = adjudicated.add_suffix(" (radiologists)").rename(columns={"image (radiologists)": "image"})
    rows = metadata[metadata["image"].isin(test_list)].merge(theirs, on="image")
    table = []
    for finding, mapped in ADJUDICATED.items():
        found = confusion_at(
            rows[f"{finding} (radiologists)"].to_numpy(), rows[list(mapped)].max(axis=1).to_numpy(), 0.5
        )
        table.append(
            {"finding": finding, "n": len(rows), **{key: found[key][0] for key in ("sensitivity", "specificity")}}
        )
    return pd.DataFrame(table)


def weigh(strata, is_official):
    """Returns weights of the images outside the list, with which their strata are as frequent as in the list."""
    shares = [pd.Series(strata[chosen]).value_counts(normalize=True) for chosen in (is_official, ~is_official)]
    return pd.Series(strata[~is_official]).map(shares[0] / shares[1]).fillna(0).to_numpy()


def weighted_aucs(labels, probs, weights):
    """Returns the AUC of each finding where each image counts by its weight."""
    return np.array([roc_auc_score(y, p, sample_weight=weights) for y, p in zip(labels.T, probs.T, strict=True)])


def against(labels, probs, has_other):
    """Returns the mean AUC against those negatives only that have other findings, or that have none."""
    some = labels.any(axis=1) if has_other else ~labels.any(axis=1)
    chosen = [(y == 1) | some for y in labels.T]
    pairs = zip(labels.T, probs.T, chosen, strict=True)
    return np.mean([roc_auc(y[keep, None], p[keep, None])[0] for y, p, keep in pairs])


def describe_images(name, rows, keep):
    """Returns what a part of the images shows, and the mean AUC on it, as a dict; `rows` are predictions and views."""
    part = rows[keep]
    labels, probs = part[LABELS].to_numpy(), part[PROBS].to_numpy()
    mean = auc_table(labels, probs, part["patient_id"].to_numpy(), PATHOLOGIES).iloc[-1]
    of_view = {view: part["view"].eq(view).to_numpy() for view in ("AP", "PA")}
    without = np.delete(np.arange(len(PATHOLOGIES)), HERNIA)
    return {
        "images": name,
        "n": len(part),
        "ap": of_view["AP"].mean(),
        "no_finding": (labels.sum(axis=1) == 0).mean(),
        "findings": labels.sum(axis=1).mean(),
        "images_a_patient": len(part) / part["patient_id"].nunique(),
        **mean[["auc", "auc_low", "auc_high"]],
        "auc_without_hernia": roc_auc(labels, probs)[without].mean(),
        **{
            f"{view}_auc_without_hernia": roc_auc(labels[seen], probs[seen])[without].mean()
            for view, seen in of_view.items()
        },
        "auc_against_no_finding": against(labels, probs, has_other=False),
        "auc_against_other_findings": against(labels, probs, has_other=True),
    }


def weigh_others(rows, inside):
    """Yields the mean AUC of the images outside the list, weighted so that something is as frequent as in the list."""
    n_findings = np.minimum(rows[LABELS].sum(axis=1), 3).astype(str)
    n_images = np.digitize(rows.groupby("patient_id")["image"].transform("size"), [2, 5, 10, 20]).astype(str)
    mixes = {
        "views": rows["view"].to_numpy(),
        "number of findings": n_findings.to_numpy(),
        "views and number of findings": (rows["view"] + n_findings).to_numpy(),
        "images a patient": n_images,
    }
    labels, probs = rows.loc[~inside, LABELS].to_numpy(), rows.loc[~inside, PROBS].to_numpy()
    patient = np.unique(rows["patient_id"][~inside], return_inverse=True)[1]
    n_patients, rng = patient.max() + 1, np.random.default_rng(0)
    draws = [np.bincount(rng.integers(0, n_patients, n_patients), minlength=n_patients) for _ in range(N_RESAMPLES)]
    for name, strata in mixes.items():
        weights = weigh(strata, inside)
        samples = [weighted_aucs(labels, probs, weights * times[patient]).mean() for times in draws]
        low, high = np.percentile(samples, (2.5, 97.5))
        aucs = weighted_aucs(labels, probs, weights)
        row = {"images": f"not in the list, weighted to its {name}", "n": len(labels), "auc": aucs.mean()}
        yield row | {"auc_low": low, "auc_high": high, "auc_without_hernia": np.delete(aucs, HERNIA).mean()}


def explain_drop(predictions, metadata, official):
    """Compares the images in the list with the others: what they show, their AUC, the others' AUC at the list's mix.

    Args:
        predictions: DataFrame of notebook 3's predictions.csv.
        metadata: DataFrame of `load_metadata`.
        official: set of the names of the images in NIH's test list.

    Returns:
        DataFrame, a row a set of images or a weighting of those outside the list.
    """
    rows = predictions.merge(metadata[["image", "view"]], on="image")
    inside = rows["image"].isin(official).to_numpy()
    parts = {"all": inside | True, "in the list": inside, "not in the list": ~inside}
    described = [describe_images(name, rows, keep) for name, keep in parts.items()]
    return pd.DataFrame([*described, *weigh_others(rows, inside)])


def main():
    """Evaluates both sets of images, compares them, and renews the pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("predictions", type=Path, help="pretrained/preds.csv of jrzech/reproduce-chexnet")
    parser.add_argument(
        "--data-dir", required=True, help="folder with NIH's label file, lists and radiologists' labels"
    )
    arguments = parser.parse_args()
    if not arguments.predictions.is_file():
        sys.exit(f"{arguments.predictions} is no file: make reference PREDICTIONS=preds.csv DATA_DIR=/path/to/nih")
    given = pd.read_csv(arguments.predictions, dtype=str)
    if "Image Index" not in given:
        sys.exit(f"{arguments.predictions} has no column “Image Index”: it is not the file of jrzech/reproduce-chexnet")
    data_dir = resolve_path(arguments.data_dir)
    metadata, lists = load_metadata(data_dir), load_official_lists(data_dir)
    with tempfile.TemporaryDirectory() as folder:
        study = Path(folder) / "nih"  # figures bear the name of the study's folder
        study.mkdir()
        for path in (path for path in data_dir.iterdir() if path.suffix in (".csv", ".txt")):
            (study / path.name).symlink_to(path)
        parts = {"all": given, "official": given[given["Image Index"].isin(lists[1])]}
        for name, part in parts.items():
            path = Path(folder) / f"chexnet_{name}.csv"
            part.to_csv(path, index=False)
            predictions = evaluate(path, study, Path(folder) / name, OUT / name)
            if name == "all":
                drop = explain_drop(predictions, metadata, lists[1])
    drop.to_csv(OUT / "drop.csv", index=False, float_format="%.6f")
    measure_floors(metadata, lists).to_csv(OUT / "metadata_floors.csv", index=False, float_format="%.6f")
    labels = compare_labels(metadata, lists[1], load_adjudicated(data_dir))
    labels.to_csv(OUT / "mined_labels.csv", index=False, float_format="%.6f")
    renew_pages()


if __name__ == "__main__":
    main()
