"""Do images reach the model faster than by other means?

Training and evaluation batches of ours beside torchxrayvision, albumentations and torchvision in PyTorch's DataLoader,
beside what Keras offers, and beside the way of this project's predecessor: from images as NIH distributes them, and
from images that were shrunk once, in the form that suits each. Every way runs in a process of its own with two workers
or threads; all take turns in each of several rounds, and ratios are medians over the rounds. Measured are images a
second after the first batches, the time to the first batch, the processor's time an image, and memory, that of workers
included.

Usage: peers.py [--peers-python /path/to/venv/bin/python] [--images FOLDER] [--rounds 3] [--seconds 3] [--only WORD ...]
The Python of the peers has what requirements/peers.txt lists, and is by default that of .venv/peers; without it, or
without one of its packages, those ways are left out, and the results say so. FOLDER is that of `input_pipeline.py`.
Renews `results/peers.json` and the tables of `docs/scale.md`.
"""

import argparse
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "peers.json"
PEERS = ROOT / ".venv" / "peers" / "bin" / "python"
sys.path.insert(0, str(ROOT / "notebooks"))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import cv2
import numpy as np
import PIL
import psutil
import tensorflow as tf
from input_pipeline import SIDE, find_images, make_rows
from peer_readers.read import count_processor_seconds
from PIL import Image
from scale import PAGE, renew_page

from helpers.packing import decode_image, pack_study
from helpers.runtime import describe_machine
from helpers.study import PATHOLOGIES

N_FILES, N_SMALL = 768, 4096
FILES, PACKED, EVALUATION = "training, from files", "training, images shrunk once", "evaluation, images shrunk once"

# Module and function in peer_readers, what it reads, and what it is called in the results.
WAYS = {
    FILES: {
        "ours: decode, average areas, augment": ("with_tensorflow", "ours_from_files"),
        "predecessor: decode, resize, four color operations": ("with_tensorflow", "predecessor"),
        "Keras image_dataset_from_directory, layers": ("with_tensorflow", "keras_directory"),
        "Keras PyDataset, Pillow, 2 processes": ("with_tensorflow", "keras_pillow"),
        "torchxrayvision NIH_Dataset, as set up by default": ("with_torch", "xrayvision"),
        "torchxrayvision NIH_Dataset, OpenCV resizing": ("with_torch", "xrayvision_cv2"),
        "torchvision transforms, Pillow": ("with_torch", "torchvision_files"),
        "albumentations, OpenCV": ("with_torch", "albumentations_files"),
    },
    PACKED: {
        "ours: packed shards": ("with_tensorflow", "ours_packed"),
        "Keras image_dataset_from_directory, layers, PNG": ("with_tensorflow", "keras_directory_small"),
        "the same with all images kept in memory": ("with_tensorflow", "keras_directory_cached"),
        "Keras PyDataset, Pillow, 2 processes, mapped array": ("with_tensorflow", "keras_pillow_small"),
        "torchxrayvision NIH_Dataset, OpenCV resizing, PNG": ("with_torch", "xrayvision_small"),
        "torchvision transforms, Pillow, mapped array": ("with_torch", "torchvision_small"),
        "albumentations, OpenCV, mapped array": ("with_torch", "albumentations_small"),
    },
    EVALUATION: {
        "ours: packed shards, resized to 224 px": ("with_tensorflow", "ours_evaluation"),
        "ours: packed shards, as packed, 256 px": ("with_tensorflow", "ours_evaluation_whole"),
        "Keras image_dataset_from_directory, PNG": ("with_tensorflow", "keras_directory_evaluation"),
        "torchxrayvision NIH_Dataset, OpenCV resizing, PNG": ("with_torch", "xrayvision_evaluation"),
        "albumentations, OpenCV, mapped array": ("with_torch", "albumentations_evaluation"),
    },
}
NEEDED = {"xrayvision": "torchxrayvision", "albumentations": "albumentations", "torchvision": "torchvision"}


def write_table(rows, folder):
    """Writes labels as an array, and as NIH's label file, for those who read that."""
    labels = rows[list(PATHOLOGIES)].to_numpy(np.float32)
    np.save(folder / "labels.npy", labels)
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position\n"
    with (folder / "Data_Entry_2017.csv").open("w") as file:
        file.write(header)
        for row, found in zip(rows.itertuples(), labels, strict=True):
            findings = "|".join(itertools.compress(PATHOLOGIES, found)) or "No Finding"
            file.write(f"{row.image},{findings},0,{row.patient_id},50,F,PA\n")


def prepare(paths, folder):
    """Prepares images as files, shrunk once as files and as an array, and packed."""
    for name, sources, n_images in (("files", paths, N_FILES), ("small", None, N_SMALL)):
        (folder / name / "images").mkdir(parents=True)
        if sources is None:
            shrunk = [decode_image(tf.io.read_file(str(path)), SIDE).numpy()[..., 0] for path in paths]
            sources = [folder / f"{number}.png" for number in range(len(paths))]
            for path, image in zip(sources, shrunk, strict=True):
                Image.fromarray(image).save(path)
        rows, files = make_rows(sources, n_images, "train")
        for image, path in files.items():
            (folder / name / "images" / image).symlink_to(Path(path).resolve())
        write_table(rows, folder / name)
    np.save(folder / "small" / "images.npy", np.array([shrunk[i % len(paths)] for i in range(N_SMALL)]))
    pack_study(rows, files, folder / "packed", split_name="official", side=SIDE)


def read_apart(python, module, way, folder, seconds):
    """Lets one way read in a process of its own; returns its report and its largest memory, or raises RuntimeError."""
    command = [python, ROOT / "benchmarks" / "peer_readers" / "read.py", module, way, folder, "--seconds", str(seconds)]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = psutil.Popen(command, stdout=output, stderr=errors)
        largest = 0
        while process.poll() is None:
            largest = max(largest, measure_memory(process))
            time.sleep(0.25)
        output.seek(0), errors.seek(0)
        if process.returncode:
            raise RuntimeError(([line for line in errors.read().splitlines() if line.strip()] or ["it ended"])[-1])
        found = {}
        for line in output:
            if line.startswith("{"):
                found |= json.loads(line)
    return found | {"memory_mib": largest / 2**20}


def measure_memory(process):
    """Returns bytes of a process and all below it, pages that several share counted once.

    Pages of files are left out, as libraries and mapped arrays, of which the system keeps what it has room for; where
    Linux does not separate them, all resident pages count.
    """
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            rollup = Path(f"/proc/{one.pid}/smaps_rollup")
            found = re.findall(r"Pss_(?:Anon|Shmem): +([0-9]+) kB", rollup.read_text()) if rollup.exists() else []
            total += 1024 * sum(map(int, found)) if found else one.memory_info().rss
    except (OSError, psutil.Error):  # it has ended since
        return 0
    return total


def find_missing(python, modules):
    """Returns those of some modules that a Python cannot import, with the reason."""
    missing = {}
    for module in modules:
        done = subprocess.run([python, "-c", f"import {module}"], capture_output=True, text=True)
        if done.returncode:
            missing[module] = (done.stderr.strip().splitlines() or ["cannot be imported"])[-1]
    return missing


def plan_ways(peers_python, only):
    """Returns a list of (group, name, python, module, way) to run, and why others are not run."""
    missing = find_missing(peers_python, ["torch", *NEEDED.values()])
    plan, not_run = [], {}
    for group, ways in WAYS.items():
        for name, (module, way) in ways.items():
            if only and not any(word in way for word in only):
                continue
            lacking = missing.get("torch") or missing.get(NEEDED.get(way.split("_")[0]))
            if module == "with_torch" and lacking:
                not_run[f"{group}: {name}"] = lacking
            else:
                plan.append((group, name, peers_python if module == "with_torch" else sys.executable, module, way))
    return plan, not_run


def measure_decoding(paths, rounds=3):
    """Returns the images a second and core that decoders reach which do nothing else, and zlib's inflating alone."""
    encoded = [Path(path).read_bytes() for path in paths]

    def inflate(data):
        at, streams = 8, []
        while at < len(data):
            n_bytes = int.from_bytes(data[at : at + 4], "big")
            if data[at + 4 : at + 8] == b"IDAT":
                streams.append(data[at + 8 : at + 8 + n_bytes])
            at += 12 + n_bytes
        zlib.decompress(b"".join(streams))

    tasks = {
        "TensorFlow": lambda data: tf.io.decode_png(data, channels=1),
        "OpenCV": lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE),
        "Pillow": lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("L")),
        "zlib's inflating alone, without undoing PNG's filters": inflate,
    }
    rates = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            began = count_processor_seconds()
            for data in encoded:
                task(data)
            rates[name].append(len(encoded) / (count_processor_seconds() - began))
    return {name: round(float(np.median(some)), 1) for name, some in rates.items()}


def summarize(runs):
    """Returns medians over the rounds of one way."""
    median = {key: float(np.median([run[key] for run in runs])) for key in runs[0] if key not in ("images", "labels")}
    return {
        "images_per_second": round(median["images_per_second"], 1),
        "in_each_round": [round(run["images_per_second"], 1) for run in runs],
        "processor_ms_per_image": round(median["processor_ms_per_image"], 3),
        "import_seconds": round(median["import_seconds"], 2),
        "first_batch_seconds": round(median["first_batch_seconds"], 2),
        "memory_mib": round(max(run["memory_mib"] for run in runs)),
        "batch": runs[0]["images"],
    }


def compare(runs):
    """Returns how ours, the first way, does beside each peer, as medians of the rounds' ratios; None without ours."""
    ours, *others = runs
    peers = [name for name in others if not name.startswith("ours")]
    if not peers or not ours.startswith("ours"):
        return None

    def divide(key, name, over=False):
        pairs = [(a[key], b[key]) for a, b in zip(runs[ours], runs[name], strict=True)]
        return round(float(np.median([b / a if over else a / b for a, b in pairs])), 2)

    return {
        "best_peer": max(peers, key=lambda name: np.median([run["images_per_second"] for run in runs[name]])),
        "times_as_fast": {name: divide("images_per_second", name) for name in peers},
        "images_per_processor_second": {name: divide("processor_ms_per_image", name, over=True) for name in peers},
        "time_to_first_batch": {name: divide("first_batch_seconds", name) for name in peers},
        "memory": {name: divide("memory_mib", name) for name in peers},
    }


def find_versions(python):
    """Returns the peers' packages and versions."""
    names = ("torch", "torchvision", "torchxrayvision", "albumentations", "opencv-python-headless", "pillow")
    code = (
        "import importlib.metadata as m\n"
        f"for name in {names}:\n"
        "    try: print(name, m.version(name))\n"
        "    except m.PackageNotFoundError: print(name, 'missing')"
    )
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()


def draw_tables(results):
    """Returns the results as tables in Markdown."""
    columns = "images/s | ms of a core an image | s to import | s to the first batch | memory, MiB"
    keys = ("images_per_second", "processor_ms_per_image", "import_seconds", "first_batch_seconds", "memory_mib")
    lines = []
    for group, ways in results["ways"].items():
        lines.append(f"| {group} | {columns} | ours is faster, times: by the clock, by the processor |")
        lines.append("|---|---:|---:|---:|---:|---:|---|")
        found = results["ours_over_peers"].get(group, {"times_as_fast": {}})
        for name, row in ways.items():
            cells = [f"{row[key]:,}" for key in keys]
            is_peer = name in found["times_as_fast"]
            cells.append(
                f"{found['times_as_fast'][name]}, {found['images_per_processor_second'][name]}" if is_peer else ""
            )
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    decoded = ", ".join(f"{name} {rate}" for name, rate in results["decoding_alone_images_per_second_and_core"].items())
    lines.append(f"The limit of reading files, images/s and core of decoding alone: {decoded}.")
    if results["not_run"]:
        lines += [
            "",
            "Not run: " + "; ".join(f"{name} ({reason})" for name, reason in results["not_run"].items()) + ".",
        ]
    return "\n".join(lines)


def draw_page(results):
    """Returns what docs/scale.md says of results, content of benchmarks/results/peers.json."""
    about = "; ".join([results["machine"], ", ".join(results["peers"]), results["images"], results["busy"]])
    return f"{about}.\n\n{draw_tables(results)}"


def main():
    """Measures, prints tables and writes benchmarks/results/peers.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--peers-python",
        default=PEERS if PEERS.exists() else sys.executable,
        help="the Python that has requirements/peers.txt",
    )
    parser.add_argument("--images", help="folder of 1024-pixel PNGs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=3, help="that each way is measured in each round, doubled for files"
    )
    parser.add_argument("--only", nargs="*", default=[], help="only functions whose name contains one of these")
    parser.add_argument("--target", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    paths, kind = find_images(arguments.images)
    load = f"{os.getloadavg()[0]:.1f} processes wanted a core before" if hasattr(os, "getloadavg") else "unknown"
    plan, not_run = plan_ways(arguments.peers_python, arguments.only)
    runs = {group: {} for group in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        prepare(paths, Path(scratch))
        decoding = measure_decoding(paths)
        for number in range(arguments.rounds):
            for group, name, python, module, way in plan:
                if f"{group}: {name}" in not_run:
                    continue
                try:
                    found = read_apart(python, module, way, scratch, arguments.seconds * (2 if group == FILES else 1))
                except RuntimeError as error:
                    not_run[f"{group}: {name}"] = str(error)
                    runs[group].pop(name, None)
                    continue
                runs[group].setdefault(name, []).append(found)
                rate, memory = found["images_per_second"], found["memory_mib"]
                print(f"round {number + 1}, {way}: {rate:,.0f} images/s, {memory:,.0f} MiB", flush=True)
    results = {
        "machine": describe_machine(tf, cv2, PIL),
        "peers": find_versions(arguments.peers_python),
        "busy": load,
        "images": f"{len(paths)} {kind} of 1024 px under {N_FILES} names; shrunk to {SIDE} px, under {N_SMALL} names",
        "method": f"medians of {arguments.rounds} rounds of {arguments.seconds:g} s, twice that from files, each way "
        "in a fresh process; batches of 64, crops of 224 px; memory is the largest of all rounds, workers included, "
        "without pages of files",
        "decoding_alone_images_per_second_and_core": decoding,
        "ways": {group: {name: summarize(some) for name, some in ways.items()} for group, ways in runs.items()},
        "ours_over_peers": {group: found for group, ways in runs.items() if ways and (found := compare(ways))},
        "not_run": not_run,
    }
    arguments.target.write_text(json.dumps(results, indent=1) + "\n")
    tables = draw_tables(results)
    print(f"\n{tables}")
    if not arguments.only and arguments.target == RESULTS:
        renew_page(PAGE, "peers", draw_page(results))


if __name__ == "__main__":
    main()
