"""How fast are images packed, with how much memory, and what do PNG records cost and save?

Packing is compared with its ceiling, PNG decoding alone, in turn on the same images, several rounds; ratios are medians
over the rounds, of time and of all threads' processor time, which other work on the machine disturbs less. Python's
share is the processor time of the one thread that runs it, per image, from the difference of two packings; how many
cores it could feed is the processor time of an image over that. Memory is the largest resident set of a process of its
own. Two processes pack parts 1/2 and 2/2 beside one process that packs all.

Usage: packing.py [--images FOLDER] [--rounds 3]
FOLDER holds PNGs as NIH distributes them, see input_pipeline.py.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))

import numpy as np
import tensorflow as tf
from input_pipeline import BATCH_SIZE, IMAGE_SIZE, SIDE, find_images, make_rows, measure

from helpers.packing import load_packed_study, pack_study
from helpers.pipeline import Augmentation, make_eval_dataset, make_train_dataset
from helpers.runtime import describe_machine

SIDES = (224, 256, 320, 512, 1024)


def decode_alone(paths):
    """The ceiling: PNG decoding on all cores, nothing else. Returns images per second."""
    data = tf.data.Dataset.from_tensor_slices([str(path) for path in paths])
    data = data.map(lambda path: tf.io.decode_png(tf.io.read_file(path), channels=1), tf.data.AUTOTUNE)
    return measure(data.prefetch(2), len(paths))


def pack(paths, n_images, **options):
    """Packs images from their files. Returns seconds, seconds of this thread's processor time, and bytes an image."""
    rows, images = make_rows(paths, n_images, "train")
    with tempfile.TemporaryDirectory() as folder:
        started, thread_started = time.perf_counter(), time.thread_time()
        study = pack_study(rows, images, folder, split_name="official", **{"side": SIDE} | options)
        seconds, thread_seconds = time.perf_counter() - started, time.thread_time() - thread_started
        return seconds, thread_seconds, sum(shard["bytes"] for shard in study.shards["train"]) / n_images


def start_process(paths, n_images, folder, part=None):
    """Starts this script as a process that packs, and then prints when it began and ended, and its peak memory."""
    command = [sys.executable, __file__, "--images", str(paths[0].parent), "--pack", str(n_images), str(folder)]
    return subprocess.Popen(
        [*command, *map(str, part or ())], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def read_process(process):
    """Returns what a process of `start_process` printed; an error if it failed."""
    printed, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"packing in a process of its own failed with {process.returncode}")
    return json.loads(printed.splitlines()[-1])


def be_process(paths, n_images, folder, *part):
    """What `start_process` starts."""
    import resource

    rows, images = make_rows(paths, int(n_images), "train")
    options = {"split_name": "official", "side": SIDE, "shard_images": 128}
    pack_study(rows, {name: images[name] for name in rows["image"]}, Path(folder) / "warm", **options, part=(1, 10**6))
    began = time.time()
    pack_study(rows, images, Path(folder) / "packed", **options, part=tuple(map(int, part)) or None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    print(json.dumps({"began": began, "ended": time.time(), "peak_mib": round(peak)}))


def compare_processes(paths, n_images):
    """Returns images per second of one process, and of two that pack a part each."""
    rates = []
    for parts in ([None], [(1, 2), (2, 2)]):
        with tempfile.TemporaryDirectory() as folder:
            read = [read_process(p) for p in [start_process(paths, n_images, folder, part) for part in parts]]
            rates.append(n_images / (max(r["ended"] for r in read) - min(r["began"] for r in read)))
    return {"one process": round(rates[0], 1), "two processes": round(rates[1], 1)}


def measure_memory(paths, n_images):
    """Returns the peak resident MiB of a process that packs so many images."""
    with tempfile.TemporaryDirectory() as folder:
        return read_process(start_process(paths, n_images, folder))["peak_mib"]


def train_batches(study):
    """Training batches with the default augmentation, one epoch. Returns images per second."""
    data = make_train_dataset(study, IMAGE_SIZE, BATCH_SIZE, seed=0, epochs=1, strength=Augmentation())
    return measure(data, len(study.index) // BATCH_SIZE * BATCH_SIZE)


def eval_batches(study):
    """Evaluation batches of whole images as packed, one pass. Returns images per second."""
    return measure(make_eval_dataset(study, "train", BATCH_SIZE), len(study.index))


def main():
    """Measures, prints a table and writes benchmarks/results/packing.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="folder of 1024-pixel PNGs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pack", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    paths, kind = find_images(arguments.images)
    if arguments.pack:
        return be_process(paths, *arguments.pack)
    some = (list(paths) * (192 // len(paths) + 1))[:192]
    with tempfile.TemporaryDirectory() as folder:
        studies = {}
        for encoding in ("raw", "png"):
            rows, images = make_rows(paths, 1024, "train")
            target = Path(folder) / encoding
            pack_study(rows, images, target, split_name="official", side=SIDE, encoding=encoding)
            studies[encoding] = load_packed_study(target)
        tasks = {"PNG decode alone": lambda: decode_alone(some)}
        for encoding, study in studies.items():
            tasks[f"packing, {encoding}"] = lambda encoding=encoding: 512 / pack(paths, 512, encoding=encoding)[0]
            tasks[f"training batches, {encoding}"] = lambda study=study: train_batches(study)
            tasks[f"evaluation batches, {encoding}"] = lambda study=study: eval_batches(study)
        rates, cpu = {name: [] for name in tasks}, {name: [] for name in tasks}
        for number in range(arguments.rounds + 1):
            for name, task in tasks.items():
                started, began = time.perf_counter(), time.process_time()
                rate = task()
                if number:  # the first round warms caches and traces graphs
                    rates[name].append(rate)
                    share = (time.process_time() - began) / (time.perf_counter() - started)
                    cpu[name].append(1e3 * share / rate)
    sides = {}
    for side in SIDES:
        for encoding in ("raw", "png"):
            pack(paths, 16, side=side, encoding=encoding)  # traces the graph
            seconds, _, n_bytes = pack(paths, 128, side=side, encoding=encoding)
            sides[f"{side} px, {encoding}"] = {"images_per_second": round(128 / seconds, 1), "bytes": round(n_bytes)}
    python = np.median([(pack(paths, 1024)[1] - pack(paths, 256)[1]) / 768 for _ in range(arguments.rounds)])
    milliseconds = {name: float(np.median(values)) for name, values in cpu.items()}

    def ratio(name, other):
        return round(float(np.median([a / b for a, b in zip(rates[name], rates[other], strict=True)])), 3)

    results = {
        "machine": describe_machine(tf),
        "images": f"{len(paths)} {kind} of 1024 px, packed at {SIDE} unless said otherwise, batches of {BATCH_SIZE}",
        "images_per_second": {name: round(float(np.median(values)), 1) for name, values in rates.items()},
        "ratios": {
            "packing / PNG decode alone": ratio("packing, raw", "PNG decode alone"),
            "packing / PNG decode alone, by processor time": round(
                float(np.median([a / b for a, b in zip(cpu["PNG decode alone"], cpu["packing, raw"], strict=True)])), 3
            ),
            **{f"{what}, png / raw": ratio(f"{what}, png", f"{what}, raw")
               for what in ("packing", "training batches", "evaluation batches")},
        },
        "processor_milliseconds_per_image": {name: round(value, 3) for name, value in milliseconds.items()},
        "python_microseconds_per_image": round(1e6 * python, 1),
        "cores_that_python_could_feed": round(milliseconds["packing, raw"] / 1e3 / python),
        "by_side": sides,
        "peak_mib_of_packing": {f"{n:,} images": measure_memory(paths, n) for n in (1000, 4000)},
        "images_per_second_in_processes": compare_processes(paths, 768),
    }  # fmt: skip
    print(json.dumps(results, indent=1))
    target = ROOT / "benchmarks" / "results" / "packing.json"
    target.write_text(json.dumps(results, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
