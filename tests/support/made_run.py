"""A small finished run, written by code, for the tests of the model card and of the release."""

import hashlib
import json
import zipfile

import numpy as np
import pandas as pd
from PIL import Image

from helpers.runtime import read_json
from helpers.study import PATHOLOGIES


def make_run(folder, *, synthetic=True, study="phantom"):
    """Writes everything that a run publishes, and some of what it must not; returns the folder."""
    rng = np.random.default_rng(3)
    for name in ("figures", "exports", "saved_model/variables"):
        (folder / name).mkdir(parents=True)
    weights = rng.bytes(500)
    (folder / "model.weights.h5").write_bytes(weights)
    run = {
        "classes": list(PATHOLOGIES),
        "finished": True,
        "settings": {
            "DATA_DIR": "/home/ada/images",
            "RUN_DIR": "models/x",
            "WEIGHTS": "/home/ada/start.h5",
            "EPOCHS": 3,
        },
        "seed": 7,
        "study": study,
        "synthetic": synthetic,
        "split": {
            "name": "official",
            "sha256": "ab" * 32,
            "films": {"train": 1200, "val": 100, "test": 300},
            "patients": {"train": 600, "val": 50, "test": 60},
        },
        "prevalence": {name: 0.01 * (k + 1) for k, name in enumerate(PATHOLOGIES)},
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "side": 88,
        "output_stride": 16,
        "best_epoch": 2,
        "epochs_run": 3,
        "seconds": {"wall_clock": 12.5},
        "parts": [{"began": "2026-01-02T03:04:05+00:00"}],
        "runtime": {
            **{"python": "3.11.7", "tensorflow": "2.21.0", "keras": "3.15.1", "commit": "c0ffee" * 6, "runtime": "cpu"},
            **{
                "devices": ["/device:CPU:0"],
                "why": "asked for in C:\\Users\\ada\\notes.txt, by ~ada/me and gs://ada/run",
            },
        },
    }
    write_json(folder / "run.json", run)
    _write_measurements(folder, rng)
    _write_exports(folder, rng)
    return folder


def write_json(path, content):
    path.write_text(json.dumps(content))


def with_interval(name, values):
    return {name: values, f"{name}_low": values - 0.05, f"{name}_high": values + 0.05}


def _write_measurements(folder, rng):
    counts = {"n_pos": np.arange(14) + 1000, "n_neg": np.arange(14), "n_pos_patients": np.arange(14) + 5}
    subsets = []
    for subset in ("test", "val"):
        rows = pd.DataFrame({"pathology": PATHOLOGIES, "split": subset, **counts})
        rows = rows.assign(**with_interval("auc", rng.uniform(0.6, 0.9, 14)), ap=rng.random(14))
        if subset == "test":
            rows.loc[13, ["auc", "auc_low", "auc_high"]] = np.nan  # one class only
        mean = rows.mean(numeric_only=True).to_dict() | {"pathology": "mean", "split": subset, "n_pos": 9, "n_neg": 9}
        subsets += [rows, pd.DataFrame([mean])]
    pd.concat(subsets).to_csv(folder / "aucs.csv", index=False)
    point = {"method": "youden", "sensitivity_test": 0.71234, "specificity_test": 0.62345}
    points = {name: point | {"threshold": 0.1 + 0.01 * k} for k, name in enumerate(PATHOLOGIES)}
    points["Hernia"]["sensitivity_test"] = None
    points["Pneumonia"]["n_pos_val"], points["Fibrosis"]["n_pos_val"] = 19, 20
    write_json(folder / "thresholds.json", {"pathologies": points})
    located = pd.DataFrame({"pathology": ["Mass", "mean"], "n_images": [40, 40], "pointing_random": [0.1, 0.1]})
    located.assign(**with_interval("pointing", np.array([0.5, 0.5]))).to_csv(folder / "localization.csv", index=False)
    calibration = pd.DataFrame({"pathology": PATHOLOGIES, "error as given": 0.3, "error Platt": 0.0456})
    calibration.to_csv(folder / "figures" / "03_calibration.csv", index=False)
    floors = pd.DataFrame({"pathology": PATHOLOGIES, "view only": 0.575, "metadata only": 0.629})
    floors.to_csv(folder / "figures" / "03_aucs.csv", index=False)
    groups = [("sex", "F"), ("sex", "M"), ("age", "below 40"), ("view", "PA"), ("view", "AP")]
    rows = [(*group, name, 4, 96) for group in groups for name in PATHOLOGIES]
    table = pd.DataFrame(rows, columns=["attribute", "group", "pathology", "n_pos", "n_neg"])
    table = table.assign(**with_interval("auc", rng.uniform(0.5, 0.9, len(rows))), small=table["group"].eq("AP"))
    table.to_csv(folder / "figures" / "03_subgroups_auc.csv", index=False)
    gaps = pd.DataFrame({"attribute": ["sex", "view"], "pathology": ["Edema", "Mass"], "highest": ["F", "AP"]})
    gaps = gaps.assign(lowest=["M", "PA"], gap=[0.2, 0.1], gap_low=[0.05, -0.1], gap_high=[0.3, 0.2])
    gaps.to_csv(folder / "figures" / "03_gaps.csv", index=False)
    patients = pd.DataFrame({"image": "00000001_000.png", "patient_id": [1, 1, 2], "split": ["test", "test", "val"]})
    patients.to_csv(folder / "predictions.csv", index=False)


def _write_exports(folder, rng):
    exports = ("exports/model.onnx", "exports/model.tflite", "exports/model_int8.tflite", "saved_model/saved_model.pb")
    weights_sha256 = read_json(folder / "run.json")["weights_sha256"]
    for name in (
        *exports,
        "saved_model/variables/variables.index",
        "saved_model/variables/variables.data-00000-of-00001",
    ):
        (folder / name).write_bytes(rng.bytes(50) + weights_sha256.encode() * (name in exports))
    write_json(folder / "exports" / "parity.json", {"saved_model": {"images": 64, "max_difference": 2e-7}})
    golden = {"film": "golden.png", "weights_sha256": weights_sha256, "probabilities": [0.5] * 14}
    write_json(folder / "exports" / "golden.json", golden)
    for name in ("exports/golden.png", "figures/03_aucs.png", "figures/04_hits_and_misses.png"):
        Image.new("L", (4, 4)).save(folder / name)
    with zipfile.ZipFile(folder / "model.keras", "w") as archive:
        archive.writestr("config.json", json.dumps({"class_name": "Functional"}))
