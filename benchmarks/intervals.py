"""How long does an interval take?

AUCs of 14 findings in 1,000 resamples of the patients of the official test set, 25,596 images, beside a loop over
scikit-learn's `roc_auc_score` on the same resamples, of which it is given some and its time scaled up; with scores that
all differ and with scores of three decimals, which tie. Then DeLong's test and the shuffled labels. Everything runs
in a single thread on one core, each task in a process of its own whose memory is measured. Seconds are those of the
processor, which other load on the machine does not stretch.

Usage: intervals.py [--rounds 3] [--compared 20]
Labels and patients are those of ../shared/data/nih_metadata; where it is missing, synthetic ones of the same size.
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

for library in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{library}_NUM_THREADS"] = "1"  # read when NumPy is imported

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))

import numpy as np
import scipy
import sklearn
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from helpers.evaluation import bootstrap_auc, delong_test, shuffled_auc
from helpers.runtime import describe_machine
from helpers.study import PATHOLOGIES, load_metadata

N_RESAMPLES, SEED = 1000, 0
N_IMAGES, N_PATIENTS = 25596, 2797  # the official test set


def load_labels():
    """Returns labels, patients and what they are."""
    folder = ROOT.parent / "shared" / "data" / "nih_metadata"
    if folder.is_dir():
        images = load_metadata(folder)
        images = images[images["image"].isin((folder / "test_list.txt").read_text().split())]
        return images[list(PATHOLOGIES)].to_numpy(), images["patient_id"].to_numpy(), "NIH's official test set"
    rng = np.random.default_rng(SEED)
    patients = np.concatenate([np.arange(N_PATIENTS), rng.integers(0, N_PATIENTS, N_IMAGES - N_PATIENTS)])
    labels = rng.random((N_IMAGES, len(PATHOLOGIES))) < np.geomspace(0.003, 0.24, len(PATHOLOGIES))
    return labels.astype("uint8"), patients, "synthetic labels and patients"


def make_scores(labels, decimals):
    """Returns probabilities that rank positives higher; with few decimals most are tied."""
    scores = expit(np.random.default_rng(SEED).normal(size=labels.shape) + labels)
    return scores if decimals is None else scores.round(decimals)


def resample_rows(patients, chosen):
    """Returns the rows of chosen resamples, drawn as `bootstrap_auc` documents it: patients with all their images."""
    _, patient_of_row, sizes = np.unique(patients, return_inverse=True, return_counts=True)
    rows_of_patient = np.split(np.argsort(patient_of_row, kind="stable"), np.cumsum(sizes)[:-1])
    drawn = np.random.default_rng(SEED).integers(0, len(sizes), size=(N_RESAMPLES, len(sizes)))
    return [np.concatenate([rows_of_patient[patient] for patient in drawn[number]]) for number in chosen]


def peak_mib():
    """Returns the largest resident memory of this process since it was last forgotten; NaN where Linux does not say."""
    status = Path("/proc/self/status")
    return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 1024 if status.exists() else float("nan")


def measure(task, decimals, chosen):
    """Runs one task in this process and returns what it computes, its seconds and by how many MiB memory grew."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    labels, patients, _ = load_labels()
    scores, other = make_scores(labels, decimals), make_scores(1 - labels, decimals)
    rows = resample_rows(patients, chosen)
    tasks = {
        "bootstrap_auc": lambda: bootstrap_auc(labels, scores, patients, N_RESAMPLES, SEED),
        "roc_auc_score": lambda: [roc_auc_score(labels[some], scores[some], average=None) for some in rows],
        "delong_test": lambda: delong_test(labels, scores, other),
        "shuffled_auc, 200 shuffles": lambda: shuffled_auc(labels, scores, patients, 200, SEED),
    }
    if os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the preparations
    before, started = peak_mib(), time.process_time()
    figures = tasks[task]()
    seconds = time.process_time() - started
    return np.array(figures), seconds, peak_mib() - before


def measure_apart(task, decimals, chosen=(), rounds=1):
    """Measures a task in fresh processes and returns its figures, median seconds and largest growth of memory."""
    results = []
    for _ in range(rounds):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            results.append(pool.submit(measure, task, decimals, chosen).result())
    figures, seconds, growths = zip(*results, strict=True)
    return figures[0], float(np.median(seconds)), max(growths)


def main():
    """Measures, prints a table and writes benchmarks/results/intervals.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compared", type=int, default=20, help="resamples given to scikit-learn")
    arguments = parser.parse_args()
    labels, patients, kind = load_labels()
    chosen = np.linspace(0, N_RESAMPLES - 1, arguments.compared).astype(int)
    results = {
        "machine": describe_machine(np, scipy, sklearn),
        "films": f"{kind}: {len(labels)} images of {len(np.unique(patients))} patients, {labels.shape[1]} findings",
        "method": f"{N_RESAMPLES} resamples of patients; scikit-learn computed {len(chosen)} of them, its processor "
        f"seconds are scaled up; ours are medians of {arguments.rounds} runs",
        "bootstrap": {},
    }
    for name, decimals in (("all scores differ", None), ("scores of three decimals", 3)):
        ours, seconds, growth = measure_apart("bootstrap_auc", decimals, rounds=arguments.rounds)
        theirs, their_seconds, _ = measure_apart("roc_auc_score", decimals, chosen)
        scaled = their_seconds * N_RESAMPLES / len(chosen)
        results["bootstrap"][name] = {
            "seconds": round(seconds, 2),
            "seconds_scikit_learn_scaled": round(scaled, 1),
            "times_as_fast": round(scaled / seconds, 1),
            "largest_difference": float(np.abs(ours[chosen] - theirs).max()),
            "peak_memory_growth_mib": round(growth, 1),
        }
    others = ("delong_test", "shuffled_auc, 200 shuffles")
    results["seconds_of_others"] = {
        task: round(measure_apart(task, None, rounds=arguments.rounds)[1], 3) for task in others
    }
    print(f"{results['machine']}\n{results['films']}\n{results['method']}\n")
    print(f"{'':26}{'ours, s':>9}{'sklearn, s':>12}{'ratio':>7}{'difference':>12}{'memory, MiB':>13}")
    for name, row in results["bootstrap"].items():
        ours, theirs, times, difference, growth = row.values()
        print(f"{name:26}{ours:9.2f}{theirs:12.1f}{times:7.1f}{difference:12.1e}{growth:13.1f}")
    for name, seconds in results["seconds_of_others"].items():
        print(f"{name:26}{seconds:9.2f}")
    target = ROOT / "benchmarks" / "results" / "intervals.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
