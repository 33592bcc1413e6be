"""Does the quick run really learn?

The whole chain on the synthetic study, and once more with its training labels shuffled: the first must rank the test
images far above chance, the second must not.

Usage: learning.py [NAME=VALUE ...]    settings passed on to the notebooks; takes two quick runs, about 15 minutes
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))

import numpy as np

from helpers.study import write_synthetic_study

N_IMAGES = 1800  # as in notebook 1


def shuffle_training_labels(study, target):
    """Makes a copy of a study, its images linked, in which the findings of training images are dealt out at random."""
    target.mkdir()
    (target / "images").symlink_to(study / "images")
    for name in ("train_val_list.txt", "test_list.txt", "BBox_List_2017.csv", "phantom.json"):
        (target / name).write_bytes((study / name).read_bytes())
    header, *rows = (study / "Data_Entry_2017_v2020.csv").read_text().splitlines()
    cells = [row.split(",") for row in rows]
    listed = set((study / "train_val_list.txt").read_text().split())
    places = [i for i, row in enumerate(cells) if row[0] in listed]
    findings = [cells[i][1] for i in places]
    for i, j in zip(places, np.random.default_rng(0).permutation(len(places)), strict=True):
        cells[i][1] = findings[j]
    (target / "Data_Entry_2017_v2020.csv").write_text("\n".join([header, *(",".join(row) for row in cells)]) + "\n")


def run_chain(study, folder):
    """Runs the notebooks; returns the test rows of aucs.csv, the run's record and the seconds."""
    started = time.perf_counter()
    command = [sys.executable, str(ROOT / "scripts" / "run_notebooks.py"), "--data-dir", str(study)]
    command += ["--run-dir", str(folder / "run"), "--set", f"PACKED_DIR={folder / 'packed'}", *sys.argv[1:]]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    aucs = pd.read_csv(folder / "run" / "aucs.csv").query("split == 'test'").set_index("pathology")
    return aucs, json.loads((folder / "run" / "run.json").read_text()), round(time.perf_counter() - started)


def main():
    """Runs both, prints and writes benchmarks/results/learning.json."""
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_synthetic_study(folder / "phantom", n_images=N_IMAGES)
        shuffle_training_labels(folder / "phantom", folder / "shuffled")
        for kind in ("phantom", "shuffled"):
            (folder / f"of {kind}").mkdir()
            aucs, record, seconds = run_chain(folder / kind, folder / f"of {kind}")
            low, auc, high = aucs.loc["mean", ["auc_low", "auc", "auc_high"]].astype(float).round(4)
            results[kind] = {"mean_test_auc": auc, "low": low, "high": high, "seconds": seconds}
            results[kind] |= {"epochs": record["epochs_run"], "best_epoch": record["best_epoch"] + 1}
            results[kind]["aucs"] = aucs["auc"].drop("mean").round(4).to_dict()
        results["machine"] = record["runtime"]
    print(json.dumps(results, indent=1))
    target = ROOT / "benchmarks" / "results" / "learning.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")
    assert results["phantom"]["mean_test_auc"] >= 0.80 and results["shuffled"]["mean_test_auc"] < 0.60


if __name__ == "__main__":
    main()
