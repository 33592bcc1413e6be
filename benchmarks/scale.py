"""Does all of ChestX-ray14 go through, and what does it take?

NIH's own label file and lists, 112,120 rows of 30,805 patients, on synthetic images of 64 pixels: some hundred of them,
each linked under many names. Every stage of notebooks 1 to 3 that is not the network runs over a tenth of the patients
and over all, in a process of its own, so that its peak of memory is its own: resident memory at most, less what was
resident once everything was imported. Between the two studies a stage that is linear takes ten times as long, or less
where a part of it is the same for both, and one that streams takes as much memory. With --images, tables of any size
are made up, and the smaller study has a hundredth of the patients.

Usage: scale.py [--metadata FOLDER] [--images 1000000] [--rounds 1] [--only WORD ...] [--scratch FOLDER]
FOLDER is by default ../shared/data/nih_metadata beside the repository; it holds `Data_Entry_2017*.csv` and both lists.
Without it, tables of the same size are made up. Renews `results/scale.json`, with --images `results/growth.json`, and
its table in `docs/scale.md`.
"""

import argparse
import contextlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scale.json"
PAGE = ROOT / "docs" / "scale.md"
sys.path.insert(0, str(ROOT / "notebooks"))
sys.path.append(str(ROOT / "benchmarks" / "workers"))
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pandas as pd
from renew_page import renew_page

from helpers import evaluation
from helpers.evaluation import (
    apply_platt,
    auc_table,
    bootstrap_calibration_error,
    fit_platt,
    list_subgroups,
    name_columns,
    rates_table,
    subgroup_table,
)
from helpers.packing import load_packed_study, pack_study
from helpers.pipeline import make_eval_dataset, make_train_dataset
from helpers.runtime import describe_machine
from helpers.study import (
    PATHOLOGIES,
    ImageHashes,
    find_duplicates,
    hash_images,
    list_images,
    load_study,
    make_split,
    match_images,
    write_synthetic_study,
)

SIDE, CROP, BATCH, N_DRAWN = 64, 56, 128, 512  # pixels, pixels, images, images
SHARES, SEED = {"tenth": 0.1, "hundredth": 0.01}, 0
BOOTSTRAP = {"n_resamples": 1000, "seed": SEED}
PROBS, LABELS = name_columns(PATHOLOGIES)


def write_studies(metadata, folder, part):
    """Writes two studies in NIH's layout, a part of the patients, one of `SHARES`, and all; returns their folders."""
    table = pd.read_csv(sorted(metadata.glob("Data_Entry_2017*.csv"))[-1], dtype=str)
    write_synthetic_study(folder / "drawn", n_images=N_DRAWN, size=SIDE, seed=SEED)
    drawn = sorted((folder / "drawn" / "images").glob("*.png"))
    patients = np.random.default_rng(SEED).permutation(table["Patient ID"].unique())
    n_images = table["Patient ID"].value_counts()[patients].cumsum()
    chosen = patients[: int(np.searchsorted(n_images, SHARES[part] * len(table))) + 1]
    studies = []
    for name, rows in ((part, table[table["Patient ID"].isin(chosen)]), ("all", table)):
        study = folder / name
        study.mkdir()
        rows.to_csv(study / "Data_Entry_2017_v2020.csv", index=False)
        for file in ("train_val_list.txt", "test_list.txt"):
            (study / file).write_text((metadata / file).read_text())
        for number, image in enumerate(rows["Image Index"]):
            images = study / f"images_{1 + number // 10_000:03d}" / "images"  # as NIH's archives unpack
            if number % 10_000 == 0:
                images.mkdir(parents=True)
            os.link(drawn[number % len(drawn)], images / image)
        studies.append(study)
    return studies


def make_up_tables(folder, n_images):
    """Writes tables of so many images, with as many a patient as NIH has; returns their folder."""
    n_patients = round(n_images * 30_805 / 112_120)
    rng = np.random.default_rng(SEED)
    folder.mkdir()
    patients = np.sort(np.append(np.arange(n_patients), rng.integers(0, n_patients, n_images - n_patients))) + 1
    follow_up = np.arange(n_images) - np.searchsorted(patients, patients)
    present = rng.random((n_images, len(PATHOLOGIES))) < np.geomspace(0.002, 0.18, len(PATHOLOGIES))
    found = ["|".join(np.array(PATHOLOGIES)[row]) or "No Finding" for row in present]
    table = pd.DataFrame({"Image Index": [f"{p:08d}_{f:03d}.png" for p, f in zip(patients, follow_up, strict=True)]})
    table["Finding Labels"], table["Follow-up #"], table["Patient ID"] = found, follow_up, patients
    table["Patient Age"] = rng.integers(1, 95, n_images)
    table["Patient Gender"], table["View Position"] = (
        rng.choice(["M", "F"], n_images),
        rng.choice(["PA", "AP"], n_images),
    )
    table.to_csv(folder / "Data_Entry_2017_v2020.csv", index=False)
    in_test = np.isin(patients, rng.permutation(n_patients)[: n_patients // 5] + 1)
    for name, rows in (("train_val_list.txt", ~in_test), ("test_list.txt", in_test)):
        (folder / name).write_text("\n".join(table["Image Index"][rows]))
    return folder


def draw_predictions(study):
    """Returns validation and test rows with random probabilities, as notebook 3 has them."""
    rows = pd.read_pickle(study / "rows.pickle").rename(columns=dict(zip(PATHOLOGIES, LABELS, strict=True)))
    rows = rows[rows["split"].isin(("val", "test"))].reset_index(drop=True)
    labels = rows[LABELS].to_numpy()
    logits = np.random.default_rng(SEED).normal(-2 + 1.2 * labels, 1)
    return pd.concat([rows, pd.DataFrame(1 / (1 + np.exp(-logits)), columns=PROBS)], axis=1)


def take_subset(predictions, name):
    """Returns one subset's rows, labels and probabilities."""
    rows = predictions[predictions["split"].eq(name)].reset_index(drop=True)
    return rows, rows[LABELS].to_numpy(), rows[PROBS].to_numpy()


# Each stage prepares what earlier ones left, and returns the task to be measured. The task returns how many images it
# had, and may return what later stages need.


def read_metadata(study):
    """Label file, list of the images on disk, and how they meet."""

    def task():
        images = list_images(study)
        rows, _ = match_images(load_study(study).rows, images)
        return len(rows), {"matched.pickle": rows, "images.pickle": pd.Series(images)}

    return task


def split(study):
    """NIH's test list, and validation by whole patients."""
    rows = pd.read_pickle(study / "matched.pickle")

    def task():
        rows["split"] = make_split(rows, val_share=0.1, seed=SEED)
        return len(rows), {"rows.pickle": rows}

    return task


def pack(study):
    """Decoding, resizing, shards, index and manifest; or, where all is there, the check of it."""
    rows = pd.read_pickle(study / "rows.pickle")
    images = pd.read_pickle(study / "images.pickle").to_dict()

    def task():
        packed = pack_study(rows, images, study / "packed", split_name="official", side=SIDE)
        return len(packed.index), {}

    return task


def load_packed(study):
    """Presence, sizes and SHA-256 of all shards, and the index."""
    return lambda: (len(load_packed_study(study / "packed").index), {})


def train(study):
    """Shuffled and augmented batches."""
    packed = load_packed_study(study / "packed")

    def task():
        return sum(len(images) for images, _ in make_train_dataset(packed, CROP, BATCH, seed=SEED, epochs=1)), {}

    return task


def read_evaluation(study):
    """Every image of every subset once, in order."""
    packed = load_packed_study(study / "packed")

    def task():
        datasets = [make_eval_dataset(packed, subset, BATCH) for subset in ("train", "val", "test")]
        return int(sum(mask.numpy().sum() for data in datasets for _, _, mask in data)), {}

    return task


def hash_pixels(study):
    """Exact and perceptual hashes, as notebook 3 takes them."""
    packed = load_packed_study(study / "packed")

    def task():
        datasets = [make_eval_dataset(packed, subset, BATCH) for subset in ("train", "val", "test")]
        batches = (images.numpy()[mask.numpy() > 0].astype("uint8") for data in datasets for images, _, mask in data)
        hashes = hash_images(batches)
        return len(hashes.exact), {"perceptual.pickle": pd.DataFrame(hashes.perceptual)}

    return task


def search_duplicates(study):
    """All pairs of near hashes, within and across subsets."""
    rows = pd.read_pickle(study / "rows.pickle")
    rows["subset"] = rows["split"]
    # Each synthetic image is there hundreds of times, so its copies are made different by bits turned at random: as far
    # from each other as different images are, 0.4 of the bits turned in each being 0.48 between two.
    rng = np.random.default_rng(SEED)
    perceptual = pd.read_pickle(study / "perceptual.pickle").to_numpy("uint8")
    perceptual = perceptual ^ np.packbits(rng.random((len(rows), 256), "float32") < 0.4, axis=1)
    hashes = ImageHashes(rng.integers(0, 256, (len(rows), 16), dtype="uint8"), perceptual)
    hashes.perceptual[-1] = hashes.perceptual[0]

    def task():
        assert len(find_duplicates(rows, hashes)) >= 1, "the planted pair was not found"
        return len(rows), {}

    return task


def table_aucs(study):
    """AUCs and average precision, 1,000 resamples of the patients."""
    test, labels, probs = take_subset(draw_predictions(study), "test")
    patients = test["patient_id"].to_numpy()
    return lambda: (len(auc_table(labels, probs, patients, PATHOLOGIES, **BOOTSTRAP)) and len(test), {})


def calibrate(study):
    """Platt scaling on validation images, calibration errors of test images in 1,000 resamples."""
    predictions = draw_predictions(study)
    (val, val_labels, val_probs), (test, labels, probs) = (take_subset(predictions, name) for name in ("val", "test"))
    patients = test["patient_id"].to_numpy()

    def task():
        slope, intercept = fit_platt(val_labels, np.log(val_probs / (1 - val_probs)))
        calibrated = apply_platt(np.log(probs / (1 - probs)), slope, intercept)
        bootstrap_calibration_error(labels, calibrated, patients, **BOOTSTRAP)
        return len(val) + len(test), {}

    return task


def choose_thresholds(study):
    """Thresholds on validation images, rates at them on test images in 1,000 resamples."""
    predictions = draw_predictions(study)
    (val, val_labels, val_probs), (test, labels, probs) = (take_subset(predictions, name) for name in ("val", "test"))
    choose, patients = evaluation.choose_thresholds, test["patient_id"].to_numpy()

    def task():
        rates_table(labels, probs, choose(val_labels, val_probs), patients, PATHOLOGIES, **BOOTSTRAP)
        return len(val) + len(test), {}

    return task


def table_subgroups(study):
    """AUC and sensitivity of each finding in each sex, view and band of age, 1,000 resamples each."""
    test, labels, probs = take_subset(draw_predictions(study), "test")
    masks, patients = list_subgroups(test), test["patient_id"].to_numpy()

    def task():
        subgroup_table(labels, probs, np.full(len(PATHOLOGIES), 0.3), masks, patients, PATHOLOGIES, **BOOTSTRAP)
        return len(test), {}

    return task


STAGES = {
    "read metadata, find and match images": read_metadata,
    "split by patient": split,
    "pack": pack,
    "pack again: all is there": pack,
    "load the packed study, all hashes checked": load_packed,
    "one epoch of training batches": train,
    "one pass of evaluation batches": read_evaluation,
    "hash images for duplicates": hash_pixels,
    "search duplicates among all images": search_duplicates,
    "AUCs with intervals, test images": table_aucs,
    "calibration with intervals, validation and test images": calibrate,
    "thresholds, rates with intervals, validation and test images": choose_thresholds,
    "subgroups with intervals, test images": table_subgroups,
}


def read_status(key):
    """Returns MiB of VmRSS (now) or VmHWM (at most) of this process; where Linux does not say, the largest so far."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(rf"{key}:\s*(\d+)", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def run_stage(name, study):
    """Runs one stage in this process and prints what it took as a line of JSON."""
    task = STAGES[name](study)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the preparations
    before, spent, began = read_status("VmRSS"), time.process_time(), time.perf_counter()
    n_images, left = task()
    seconds, spent = time.perf_counter() - began, time.process_time() - spent
    growth = read_status("VmHWM") - before
    for file, table in left.items():
        table.to_pickle(study / file)
    taken = {"images": n_images, "seconds": seconds, "processor_seconds": spent}
    print(json.dumps(taken | {"mib_before": before, "mib_growth": growth}))


def run_apart(name, study):
    """Runs one stage in a process of its own and returns what it took."""
    command = [sys.executable, __file__, "--stage", name, "--scratch", study]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"The stage {name!r} failed on {study}.")
    return json.loads(done.stdout.splitlines()[-1])


def summarize(runs):
    """Returns one stage's figures from its runs on a part and on all."""
    sizes = {}
    for name, some in runs.items():
        median = {key: float(np.median([run[key] for run in some])) for key in some[0]}
        sizes[name] = {
            "images": round(median["images"]),
            "seconds": round(median["seconds"], 3),
            "processor_seconds": round(median["processor_seconds"], 3),
            "images_per_second": round(median["images"] / median["seconds"]),
            "mib_once_imported": round(median["mib_before"]),
            "mib_growth": round(median["mib_growth"], 1),
        }
    small, everything = sizes.values()
    return sizes | {
        "times_the_images": round(everything["images"] / small["images"], 2),
        "times_the_seconds": round(everything["seconds"] / small["seconds"], 2),
        "times_the_processor_seconds": round(everything["processor_seconds"] / small["processor_seconds"], 2),
        "more_mib": round(everything["mib_growth"] - small["mib_growth"], 1),
    }


def draw_table(stages):
    """Returns a table in Markdown."""
    part = next(iter(next(iter(stages.values()))))
    lines = [
        f"| stage | images | s | images/s | times the images, s, processor s | memory grows by, MiB: {part}, all |",
        "|---|---:|---:|---:|---|---|",
    ]
    for name, row in stages.items():
        small, whole = row[part], row["all"]
        times = ", ".join(f"{row[f'times_the_{key}']:.1f}" for key in ("images", "seconds", "processor_seconds"))
        lines.append(
            f"| {name} | {whole['images']:,} | {whole['seconds']:.1f} | {whole['images_per_second']:,} | {times} "
            f"| {small['mib_growth']:.0f}, {whole['mib_growth']:.0f} |"
        )
    return "\n".join(lines)


def draw_page(results):
    """Returns what docs/scale.md says of results, content of benchmarks/results/scale.json."""
    return f"{results['machine']}; {results['study']}; {results['busy']}.\n\n{draw_table(results['stages'])}"


def main():
    """Measures, prints a table and writes benchmarks/results/scale.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--metadata", type=Path, default=ROOT.parent / "shared" / "data" / "nih_metadata")
    parser.add_argument("--images", type=int, help="rows of tables that are made up, in place of NIH's")
    parser.add_argument(
        "--rounds", type=int, default=1, help="runs of each stage on all; three times as many on a tenth"
    )
    parser.add_argument("--only", nargs="*", default=[], help="only stages whose name contains one of these")
    parser.add_argument("--scratch", type=Path, help="folder to work in, kept; by default a temporary one")
    parser.add_argument("--target", type=Path)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        run_stage(arguments.stage, arguments.scratch)
        return
    load = f"{os.getloadavg()[0]:.1f} processes wanted a core before" if hasattr(os, "getloadavg") else "unknown"
    with tempfile.TemporaryDirectory() as temporary:
        scratch = arguments.scratch or Path(temporary)
        is_real = arguments.metadata.is_dir() and not arguments.images
        part, n_images = ("hundredth", arguments.images) if arguments.images else ("tenth", 112_120)
        studies = [scratch / part, scratch / "all"]
        if not studies[1].is_dir():
            scratch.mkdir(parents=True, exist_ok=True)
            tables = arguments.metadata if is_real else make_up_tables(scratch / "tables", n_images)
            write_studies(tables, scratch, part)
        stages = {}
        for name in STAGES:
            if arguments.only and not any(word in name for word in arguments.only):
                continue
            runs = {study.name: [] for study in studies}
            for _ in range(arguments.rounds):
                for study in (*studies, *studies[:1] * (0 if arguments.images else 2)):
                    # Packing can be done once only: packing again is a stage of its own.
                    if name != "pack" or not runs[study.name]:
                        runs[study.name].append(run_apart(name, study))
            stages[name] = summarize(runs)
            print(draw_table({name: stages[name]}).splitlines()[-1], flush=True)
    results = {
        "machine": describe_machine(np, pd),
        "busy": load,
        "study": f"{'NIH’s label file and lists' if is_real else f'made-up tables of {n_images:,} images'}, on "
        f"{N_DRAWN} synthetic images of {SIDE} px under all names; a {part} of the patients, and all",
        "method": f"each stage in a process of its own, {arguments.rounds} time(s)"
        f"{'' if arguments.images else ', on the tenth three times as often, medians'}; memory is the peak less what "
        "was resident before the stage",
        "stages": stages,
    }
    name = "growth" if arguments.images else "scale"
    results_file = RESULTS.with_name(f"{name}.json")
    (arguments.target or results_file).write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    table = draw_table(stages)
    print(f"\n{table}")
    if not arguments.only and arguments.target in (None, results_file):
        renew_page(PAGE, name, draw_page(results))


if __name__ == "__main__":
    main()
