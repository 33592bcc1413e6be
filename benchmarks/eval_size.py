"""What does another size of evaluation cost?

The network of a run sees the validation and test images whole at several sizes, each compared with the size that the
run records, on the same images; intervals are over patients. The sizes are from three quarters of that to one and a
half times it. Images are scaled from the side at which the study is packed, so larger ones show nothing more, only
larger.

Usage: eval_size.py [--run-dir models/densenet121]    takes one to two minutes for the quick run, on 2 cores
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "notebooks"), str(ROOT / "benchmarks" / "workers")]

import keras
import numpy as np
import tensorflow as tf
from renew_page import renew_page

from helpers.evaluation import difference_table, roc_auc
from helpers.packing import load_packed_study, resolve_paths
from helpers.pipeline import make_eval_dataset
from helpers.runtime import describe_machine, write_json
from helpers.study import PATHOLOGIES
from helpers.training import load_classifier, predict_logits, read_run

RESULTS = ROOT / "benchmarks" / "results" / "eval_size.json"


def list_sizes(run):
    """Returns sizes from 0.75 to 1.5 times the run's own, in steps of half a cell of the last map, and its own."""
    own, step = run["eval_size"], run["output_stride"] // 2
    return sorted({own, *range(round(0.75 * own / step) * step, int(1.5 * own) + 1, step)})


def measure(run, model, study):
    """Returns a row for each size: mean AUCs, and the difference from the run's own size on the test images."""
    rows, labels = study.rows("test"), {subset: study.labels(subset) for subset in ("val", "test")}
    min_area = run["settings"].get("MIN_AREA", 0.75)  # earlier versions had no such setting
    wanted = run["settings"]["IMAGE_SIZE"] * 2 / (1 + min_area**0.5)  # see `match_eval_size`
    logits, sizes = {}, list_sizes(run)
    for size in sizes:
        for subset, known in labels.items():
            dataset = make_eval_dataset(study, subset, 32, image_size=size)
            logits[size, subset] = predict_logits(model, dataset, len(known)).astype("float64")
    results = []
    for size in sizes:
        scores = logits[size, "test"], logits[run["eval_size"], "test"]
        table = difference_table(labels["test"], *scores, rows["patient_id"].to_numpy(), PATHOLOGIES)
        mean = table.set_index("pathology").loc["mean", ["difference", "difference_low", "difference_high"]]
        aucs = {f"{subset}_auc": np.nanmean(roc_auc(labels[subset], logits[size, subset])) for subset in labels}
        values = {"scale": size / wanted, **aucs, **mean}
        results.append({"size": size, **{name: round(float(value), 4) for name, value in values.items()}})
    return results


def draw_page(results):
    """Returns the table as Markdown."""
    about = (
        f"Trained on crops of {results['image_size']} pixels from images packed at {results['side']}, evaluated at "
        f"{results['eval_size']}; {results['n_test']:,} test images of {results['study']}. Scale: how large things are "
        "compared with their mean size in the crops."
    )
    lines = ["| size, pixels | scale | mean AUC, validation | mean AUC, test | difference on test, 95 % interval |"]
    lines.append("|---|---|---|---|---|")
    for row in results["sizes"]:
        low, high = row["difference_low"], row["difference_high"]
        is_own = row["size"] == results["eval_size"]
        difference = "–" if is_own else f"{row['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
        size = f"**{row['size']}**" if is_own else row["size"]
        lines.append(f"| {size} | {row['scale']:.2f} | {row['val_auc']:.3f} | {row['test_auc']:.3f} | {difference} |")
    return "\n".join([about, "", *lines])


def main():
    """Measures, prints, and writes benchmarks/results/eval_size.json and the table of docs/evaluate.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, default=ROOT / "models" / "densenet121", help="a finished run")
    run_dir = parser.parse_args().run_dir.resolve()
    began, run = time.perf_counter(), read_run(run_dir)
    settings = run["settings"]
    paths = resolve_paths(settings["DATA_DIR"], run_dir, settings["PACKED_DIR"], settings["SPLIT"], settings["PROFILE"])
    study = load_packed_study(paths.packed)
    sizes = measure(run, load_classifier(run_dir, study), study)
    results = {
        "study": run["study"],
        "image_size": settings["IMAGE_SIZE"],
        "side": study.side,
        "eval_size": run["eval_size"],
        "n_test": len(study.rows("test")),
        "weights_sha256": run["weights_sha256"],
        "sizes": sizes,
        "seconds": round(time.perf_counter() - began),
        "machine": describe_machine(tf, keras),
    }
    print(draw_page(results), f"\n\n{results['machine']}, {results['seconds']} s")
    write_json(RESULTS, results)
    renew_page(ROOT / "docs" / "evaluate.md", "eval size", draw_page(results))


if __name__ == "__main__":
    main()
