"""Does the evaluation give chance its due? Trainings of the quick profile whose training labels are shuffled.

Five times, the findings of the training list are dealt out anew among its images, another seed trains on them, and the
test images keep their own labels. A network that gains from shuffled labels has seen the test images, or the evaluation
is wrong. The same number of epochs with true labels stands beside. One such training varies by more than its interval
over patients tells: 14 outputs of one network are right or wrong together, so only several trainings show the spread.

Usage: learning.py [--trainings 5] [--epochs 3] [NAME=VALUE ...]    settings go to notebooks 1 and 2; 40 minutes
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))

import keras
import numpy as np
import tensorflow as tf

from helpers.evaluation import auc_table
from helpers.packing import load_packed_study
from helpers.pipeline import make_eval_dataset
from helpers.runtime import describe_machine, write_json
from helpers.study import PATHOLOGIES, write_synthetic_study
from helpers.training import load_classifier, predict_logits, read_run

N_IMAGES = 4000  # as in notebook 1


def shuffle_training_labels(study, target, seed):
    """Makes a copy of a study, its images linked, in which the findings of training images are dealt out at random."""
    target.mkdir()
    (target / "images").symlink_to(study / "images")
    for name in ("train_val_list.txt", "test_list.txt", "BBox_List_2017.csv", "phantom.json"):
        shutil.copy(study / name, target / name)
    header, *rows = (study / "Data_Entry_2017_v2020.csv").read_text().splitlines()
    cells = [row.split(",") for row in rows]
    listed = set((study / "train_val_list.txt").read_text().split())
    places = [i for i, row in enumerate(cells) if row[0] in listed]
    findings = [cells[i][1] for i in places]
    for i, j in zip(places, np.random.default_rng(seed).permutation(len(places)), strict=True):
        cells[i][1] = findings[j]
    (target / "Data_Entry_2017_v2020.csv").write_text("\n".join([header, *(",".join(row) for row in cells)]) + "\n")


def train(study, folder, seed, settings):
    """Runs notebooks 1 and 2; returns the mean test AUC with its interval over patients, and each finding's."""
    run_dir, packed = folder / "run", folder / "packed"
    command = [sys.executable, str(ROOT / "scripts" / "run_notebooks.py"), "--only", "01_prepare_data"]
    command += ["02_train_densenet121", "--data-dir", str(study), "--run-dir", str(run_dir), "--set"]
    subprocess.run([*command, f"PACKED_DIR={packed}", f"SEED={seed}", *settings], check=True, stdout=subprocess.DEVNULL)
    run, packed = read_run(run_dir), load_packed_study(packed)
    labels = packed.labels("test")
    dataset = make_eval_dataset(packed, "test", 32, image_size=run["eval_size"])
    logits = predict_logits(load_classifier(run_dir, packed), dataset, len(labels))
    table = auc_table(labels, logits, packed.rows("test")["patient_id"], PATHOLOGIES).set_index("pathology")
    low, auc, high = table.loc["mean", ["auc_low", "auc", "auc_high"]].astype(float).round(4)
    aucs = table["auc"].drop("mean").round(4).to_dict()
    return {"seed": seed, "mean_test_auc": auc, "low": low, "high": high, "epochs": run["epochs_run"], "aucs": aucs}


def main():
    """Trains with true labels once and with shuffled ones several times; writes benchmarks/results/learning.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainings", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3, help="shuffled labels need no more: nothing is to be learned")
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE")
    arguments = parser.parse_args()
    settings = [f"EPOCHS={arguments.epochs}", *arguments.settings]
    results = {"machine": describe_machine(tf, keras), "settings": settings, "shuffled": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_synthetic_study(folder / "phantom", n_images=N_IMAGES)
        results["true labels"] = train(folder / "phantom", folder / "true", 0, settings)
        for seed in range(arguments.trainings):
            shuffle_training_labels(folder / "phantom", folder / f"shuffled-{seed}", seed)
            results["shuffled"].append(train(folder / f"shuffled-{seed}", folder / f"run-{seed}", seed, settings))
            print(json.dumps(results["shuffled"][-1]), flush=True)
    means = np.array([result["mean_test_auc"] for result in results["shuffled"]])
    results["mean of shuffled"], results["sd of shuffled"] = round(means.mean(), 4), round(means.std(ddof=1), 4)
    print(json.dumps(results, indent=1))
    write_json(ROOT / "benchmarks" / "results" / "learning.json", results)


if __name__ == "__main__":
    main()
