"""What the tests of whole chains share: `make run`, shortened, and what a run must hold."""

import hashlib
import json
import subprocess
import sys

import h5py
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, roc_auc_score

from helpers.runtime.settings import ROOT
from helpers.study import PATHOLOGIES

SHORT = (
    *("EPOCHS=1", "IMAGE_SIZE=32", "SIDE=40", "RESAMPLES=100", "VIEWS=1", "RANDOM_NETWORKS=1"),
    "BLOCKS=[1,1,1,1]",  # one chain in test_chains.py has the whole DenseNet-121
    "FORMATS=saved_model",  # `drawn_run` writes them all
    *("FEATURE_SIDE=32", "NODULE_IMAGES=60", "FOLDS=2", "HEAD_EPOCHS=2", "MAPS=3", "NOISY_COPIES=2"),
    "TOLERANCE=1e-4",  # after one step the statistics of batch norm do not fit yet, and rounding grows in every layer
)
DENSENET = ("01_prepare_data", "02_train_densenet121", "03_evaluate", "04_explain", "05_export_and_predict")
XVISION = "06_xvision_vgg16_nodules"


def call_chain(study, run_dir, packed_dir, *settings, only=DENSENET):
    """Executes the notebooks named in `only`, or with an empty one all, as `make run` does; returns the process."""
    command = [sys.executable, str(ROOT / "scripts" / "run_notebooks.py"), "--data-dir", str(study)]
    command += ["--run-dir", str(run_dir), *(["--only", *only] if only else [])]
    folders = [f"PACKED_DIR={packed_dir}", f"FEATURES_DIR={packed_dir}-features", f"SOURCE_DIR={packed_dir}-nodules"]
    command += ["--set", *folders, *SHORT, *settings]
    return subprocess.run(command, capture_output=True, text=True)


def run_chain(study, run_dir, packed_dir, *settings, only=DENSENET):
    """As `call_chain`, where nothing may fail; returns what was printed."""
    answer = call_chain(study, run_dir, packed_dir, *settings, only=only)
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-3000:]
    return answer.stdout


def check_nodules(folder):
    """Holds a study of nodules against its own predictions; returns its record."""
    study = json.loads((folder / "study.json").read_text())
    images = pd.read_csv(folder / "predictions.csv")
    assert len(images) == study["counts"]["films"] and images["label"].sum() == study["counts"]["Nodule"]
    probs = images.filter(regex=r"^prob_\d+$")
    figures = {row["figure"]: row for row in study["scores"]}
    accuracy = np.mean([accuracy_score(images["label"], probs[name] >= 0.5) for name in probs])
    auc = np.mean([roc_auc_score(images["label"], probs[name]) for name in probs])
    for name, value in (("accuracy", accuracy), ("auc", auc)):
        assert figures[name]["value"] == pytest.approx(value, abs=1e-6)
        assert figures[name]["low"] <= value <= figures[name]["high"]
    scores = pd.read_csv(folder / "scores.csv")
    assert scores["classifier"].nunique() == 3 and {"precision_nodule", "recall_normal"} <= set(scores["figure"])
    pictures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert pictures >= {f"06_{name}" for name in ("films", "scores", "training_error", "confusion_roc", "predictions")}
    assert pictures >= {"06_saliency", "06_new_film"} and (folder / "figures" / "06_flaws.csv").is_file()
    kept = hash_weights(folder / "model.weights.h5")
    chosen = hash_weights(folder / "epochs" / f"epoch-{study['best_epoch']:02d}.weights.h5")
    assert len(chosen) >= 12 and chosen <= kept, "what is kept is not the head of the chosen epoch"
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


def check_artifacts(run_dir, only=DENSENET, has_patients=True):
    """Holds a run against the contract of models/README.md and recomputes its numbers; returns the predictions."""
    names = "model.weights.h5 model.keras history.csv run.json thresholds.json saved_model/saved_model.pb model_card.md"
    assert all((run_dir / name).is_file() for name in [*names.split(), "exports/parity.json", "exports/golden.json"])
    executed = sorted(path.stem for path in (run_dir / "executed").glob("*.ipynb"))
    assert executed == sorted(only or (path.stem for path in (ROOT / "notebooks").glob("*.ipynb")))
    predictions, aucs = pd.read_csv(run_dir / "predictions.csv"), pd.read_csv(run_dir / "aucs.csv")
    assert not predictions["image"].duplicated().any()
    assert predictions.groupby("patient_id")["split"].nunique().max() == 1
    for split, table in aucs.groupby("split"):
        part, table = predictions[predictions["split"].eq(split)], table.set_index("pathology")
        assert list(table.index) == [*PATHOLOGIES, "mean"]
        exact = {}
        for name in PATHOLOGIES:
            labels = part[f"label_{name}"]
            assert table.loc[name, "n_pos"] == labels.sum()
            if labels.nunique() == 2:
                exact[name] = roc_auc_score(labels, part[f"prob_{name}"])
                assert table.loc[name, "auc"] == pytest.approx(exact[name], abs=1e-6)
                assert table.loc[name, "auc_low"] <= exact[name] <= table.loc[name, "auc_high"]
            else:
                assert np.isnan(table.loc[name, "auc"])
        if exact:
            assert table.loc["mean", "auc"] == pytest.approx(np.mean(list(exact.values())), abs=1e-6)
    figures = {path.stem for path in (run_dir / "figures").glob("*.png")}
    assert {"01_films", "01_prevalence", "01_cooccurrence", "02_training"} <= figures
    assert {"03_aucs", "03_roc", "03_confusion", "05_top5", "03_reliability", "03_prevalence_shift"} <= figures
    by_patient = {"01_views", "01_follow_up", "01_ages", "03_subgroups_auc", "03_subgroups_tpr", "03_leakage"}
    assert figures & by_patient == (by_patient if has_patients else set())
    localization = pd.read_csv(run_dir / "localization.csv")
    if len(localization):
        assert localization["pathology"].iloc[-1] == "mean" and {"04_localization", "04_hits_and_misses"} <= figures
        assert {"n_boxes", "pointing", "pointing_random", "pointing_center", "iou_0.1", "iobb_0.7"} <= {*localization}
    board = pd.read_csv(run_dir.parent / "leaderboard.csv", dtype={"run": str}).set_index("run")
    test = predictions[predictions["split"].eq("test")]
    assert board.loc[run_dir.name, "films"] == len(test)
    return predictions
