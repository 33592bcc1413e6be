"""What the tests that run notebooks share: settings that make them short, two ways to run them, checks of a run."""

import hashlib
import json
import subprocess
import sys

import h5py
import numpy as np
import pandas as pd
import pytest
from notebook_cells import run_cells
from sklearn.metrics import accuracy_score, roc_auc_score

from helpers.runtime.settings import ROOT
from helpers.study import PATHOLOGIES

DENSENET = ("01_prepare_data", "02_train_densenet121", "03_evaluate", "04_explain", "05_export_and_predict")
XVISION = "06_xvision_vgg16_nodules"
SHORT = {
    **{"EPOCHS": 1, "IMAGE_SIZE": 32, "SIDE": 40, "RESAMPLES": 100, "VIEWS": 1, "RANDOM_NETWORKS": 1, "VERBOSE": 2},
    "BLOCKS": [1, 1, 1, 1],
    "PRECISION": "float32",  # what is compared must not depend on the CPU
    "BACKBONES": "VGG16,trained",
    **{"FORMATS": "saved_model", "LEAKAGE_DEMO": False},  # test_end_to_end.py has all formats and the demonstration
    **{"FEATURE_SIDE": 32, "NODULE_IMAGES": 60, "FOLDS": 2, "HEAD_EPOCHS": 2, "MAPS": 3},
    "TOLERANCE": 1e-4,  # after one step the statistics of batch norm do not fit yet, and rounding grows in every layer
}


def name_folders(study, run_dir, packed_dir):
    """Returns the settings that name folders: of the study, the run and the packed study, features and nodules."""
    folders = {
        "PACKED_DIR": packed_dir,
        "FEATURES_DIR": f"{packed_dir}-features",
        "SOURCE_DIR": f"{packed_dir}-nodules",
    }
    return {key: str(value) for key, value in ({"DATA_DIR": study, "RUN_DIR": run_dir} | folders).items()}


def run_chain(notebooks, settings, **options):
    """Executes notebooks in this process, shortened, with options of `run_cells`; returns the names of the last one."""
    for name in notebooks:
        names = run_cells(name, SHORT | settings, **options)
    return names


def call_script(notebooks, settings):
    """Executes notebooks as `make run` does, shortened; returns the finished process."""
    settings = SHORT | settings
    command = [sys.executable, str(ROOT / "scripts" / "run_notebooks.py"), "--only", *notebooks]
    command += ["--data-dir", settings.pop("DATA_DIR"), "--run-dir", settings.pop("RUN_DIR")]
    del settings["VERBOSE"]  # the script sets it
    command += ["--set", *(f"{key}={value}" for key, value in settings.items())]
    return subprocess.run(command, capture_output=True, text=True)


def check_nodules(folder, finding="Nodule"):
    """Compares the record of notebook 6 with its predictions; returns the record."""
    study = json.loads((folder / "study.json").read_text())
    images = pd.read_csv(folder / "predictions.csv")
    assert len(images) == study["counts"]["films"] and images["label"].sum() == study["counts"][finding]
    probs = images.filter(regex=r"^prob_\d+$")
    figures = {row["figure"]: row for row in study["scores"]}
    accuracy = np.mean([accuracy_score(images["label"], probs[name] >= 0.5) for name in probs])
    auc = np.mean([roc_auc_score(images["label"], probs[name]) for name in probs])
    for name, value in (("accuracy", accuracy), ("auc", auc)):
        assert figures[name]["value"] == pytest.approx(value, abs=1e-6)
        assert figures[name]["low"] <= value <= figures[name]["high"]
    scores = pd.read_csv(folder / "scores.csv")
    assert scores["classifier"].nunique() == 3 and {"precision_finding", "recall_normal"} <= set(scores["figure"])
    pictures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert pictures >= {f"06_{name}" for name in ("films", "scores", "training_error", "confusion_roc", "predictions")}
    assert pictures >= {"06_saliency", "06_new_film"} and (folder / "figures" / "06_flaws.csv").is_file()
    return study


def hash_weights(path):
    """Returns the hashes of the layers' arrays in a file of weights, whatever the layers are called."""
    found = set()

    def look(name, item):
        if "layers" in name and "optimizer" not in name and isinstance(item, h5py.Dataset):
            found.add(hashlib.sha256(item[()].tobytes()).hexdigest())

    with h5py.File(path) as file:
        file.visititems(look)
    return found


def check_artifacts(run_dir, *, has_patients=True, is_leaky=False, is_exported=True):
    """Checks a run against the contract of models/README.md and recomputes its numbers; returns the predictions.

    Args:
        run_dir: pathlib.Path of a local folder.
        has_patients: whether the study has patient ids.
        is_leaky: whether patients may be in several subsets.
        is_exported: whether notebook 5 was run.
    """
    names = ["model.weights.h5", "model.keras", "history.csv", "run.json", "thresholds.json", "source.json"]
    names += ["saved_model/saved_model.pb", "exports/parity.json", "exports/golden.json", "model_card.md"] * is_exported
    assert [name for name in names if not (run_dir / name).is_file()] == []
    predictions, aucs = pd.read_csv(run_dir / "predictions.csv"), pd.read_csv(run_dir / "aucs.csv")
    assert not predictions["image"].duplicated().any()
    assert is_leaky or predictions.groupby("patient_id")["split"].nunique().max() == 1
    for split, table in aucs.groupby("split"):
        rows, table = predictions[predictions["split"].eq(split)], table.set_index("pathology")
        assert list(table.index) == [*PATHOLOGIES, "mean"]
        exact = {}
        for name in PATHOLOGIES:
            labels = rows[f"label_{name}"]
            assert table.loc[name, "n_pos"] == labels.sum()
            if labels.nunique() == 2:
                exact[name] = roc_auc_score(labels, rows[f"prob_{name}"])
                assert table.loc[name, "auc"] == pytest.approx(exact[name], abs=1e-6)
                assert table.loc[name, "auc_low"] <= exact[name] <= table.loc[name, "auc_high"]
            else:
                assert np.isnan(table.loc[name, "auc"])
        if exact:
            assert table.loc["mean", "auc"] == pytest.approx(np.mean(list(exact.values())), abs=1e-6)
    figures = {path.stem for path in (run_dir / "figures").glob("*.png")}
    assert {"01_images", "01_prevalence", "01_cooccurrence", "02_training"} <= figures
    assert {"03_aucs", "03_roc", "03_confusion", "03_reliability", "03_prevalence_shift"} <= figures
    assert "05_top5" in figures or not is_exported
    by_patient = {"01_views", "01_follow_up", "01_ages", "03_subgroups_auc", "03_subgroups_tpr"}
    assert figures & by_patient == (by_patient if has_patients else set())
    board = pd.read_csv(run_dir.parent / "leaderboard.csv", dtype={"run": str}).set_index("run")
    assert board.loc[run_dir.name, "films"] == predictions["split"].eq("test").sum()
    return predictions


def check_localization(run_dir):
    """Checks the table of a run's heatmaps; returns it."""
    localization = pd.read_csv(run_dir / "localization.csv")
    if len(localization):
        figures = {path.stem for path in (run_dir / "figures").glob("04_*.png")}
        assert localization["pathology"].iloc[-1] == "mean" and {"04_localization", "04_hits_and_misses"} <= figures
        assert {"n_boxes", "pointing", "pointing_random", "pointing_center", "iou_0.1", "iobb_0.7"} <= {*localization}
    return localization


def read_counts(run_dir):
    """Returns the numbers of images that were found, missing and unreadable."""
    report = json.loads((run_dir / "data_report.json").read_text())
    return report["found"], report["missing"], len(report["unreadable"])
