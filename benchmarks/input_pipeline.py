"""How fast do images reach the model?

Training batches and evaluation batches, beside their ceiling and the way this project's predecessor read its images:
decode each 1024-pixel PNG, resize it and change its colors, at every epoch anew. All are measured in turn, several
rounds, on the same images in one run; the ratios are medians over the rounds. Then ways to augment, in place of each
other in the training pipeline, at two sizes, alone and beside a thread that keeps Python busy. Packing has a
benchmark of its own, packing.py.

Usage: input_pipeline.py [--images FOLDER] [--rounds 5]
FOLDER holds PNGs as NIH distributes them, 1024 pixels wide. Without it, those in ../shared/data/nih_original are taken,
and where they are missing, synthetic images of that size are made.
"""

import argparse
import contextlib
import gc
import itertools
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pandas as pd
import psutil
import tensorflow as tf
from benchmarks.workers.augment_ways import WAYS
from PIL import Image

from helpers import pipeline
from helpers.augmentation import Augmentation
from helpers.packing import pack_study
from helpers.pipeline import make_eval_dataset, make_train_dataset
from helpers.runtime import describe_machine
from helpers.study import PATHOLOGIES, draw_image

SIDE, IMAGE_SIZE, BATCH_SIZE = 256, 224, 64
SIZES = {256: (224, 2048), 608: (512, 512)}  # packed side: crops, images
BEFORE = "OpenCV, two calls an image"


def find_images(folder):
    """Returns paths of 1024-pixel images, synthetic ones where there are no others, and what they are."""
    at_hand = ROOT.parent / "shared" / "data" / "nih_original"
    if folder or at_hand.is_dir():
        folder = folder or at_hand
        return sorted(Path(folder).rglob("*.png")), "real radiographs"
    made = Path(tempfile.mkdtemp())
    for seed in range(48):
        image, _ = draw_image(seed, size=1024)
        Image.fromarray(image).save(made / f"{seed:08d}_000.png")
    return sorted(made.glob("*.png")), "synthetic images"


def make_rows(paths, n_images, subset):
    """Returns rows and paths of a study in which the images at hand are repeated under new names."""
    names = [f"{i:08d}_000.png" for i in range(n_images)]
    labels = np.random.default_rng(0).integers(0, 2, (n_images, 14))
    rows = pd.DataFrame(labels, columns=list(PATHOLOGIES))
    rows = rows.assign(image=names, patient_id=range(n_images), follow_up=0, age=50.0, sex="F", view="PA", split=subset)
    return rows, dict(zip(names, itertools.cycle(paths), strict=False))


def measure(dataset, n_images):
    """Returns images per second of one pass, without the start-up of the first batch."""
    gc.collect()
    batches = iter(dataset)
    n_first = len(tf.nest.flatten(next(batches))[0])
    started = time.perf_counter()
    for _ in batches:
        pass
    return (n_images - n_first) / (time.perf_counter() - started)


def predecessor(paths, augment):
    """Decodes and resizes every image at every epoch, in color, and changes the colors of training images."""

    def load(path):
        image = tf.image.resize(tf.io.decode_png(tf.io.read_file(path), channels=3), (IMAGE_SIZE, IMAGE_SIZE)) / 255.0
        if augment:
            image = tf.image.random_flip_left_right(image)
            image = tf.image.random_brightness(image, 0.1)
            image = tf.image.random_contrast(image, 0.9, 1.1)
            image = tf.image.random_saturation(image, 0.9, 1.1)
            image = tf.image.random_hue(image, 0.02)
        return image

    data = tf.data.Dataset.from_tensor_slices([str(path) for path in paths])
    data = data.map(load, num_parallel_calls=tf.data.AUTOTUNE).batch(32).prefetch(tf.data.AUTOTUNE)
    return measure(data, len(paths))


def parse_alone(study, subset):
    """The ceiling of reading: records to uint8 images, nothing else."""
    data = tf.data.TFRecordDataset(study.files(subset)).batch(BATCH_SIZE)
    data = data.map(study.parse, num_parallel_calls=tf.data.AUTOTUNE).prefetch(2)
    return measure(data, len(study.labels(subset)))


def train_batches(study):
    """Training batches with the default augmentation and mirroring, one epoch."""
    strength = Augmentation(horizontal_flip=True)
    data = make_train_dataset(study, IMAGE_SIZE, BATCH_SIZE, seed=0, epochs=1, strength=strength)
    return measure(data, len(study.labels("train")) // BATCH_SIZE * BATCH_SIZE)


def eval_batches(study, image_size):
    """Evaluation batches, one pass."""
    return measure(make_eval_dataset(study, "train", BATCH_SIZE, image_size=image_size), len(study.labels("train")))


@contextlib.contextmanager
def busy_python():
    """Keeps Python's lock busy, as a progress bar, a plot or the dispatch of steps may."""
    is_over = threading.Event()

    def spin():
        while not is_over.is_set():
            sum(range(1000))

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def train_by(study, image_size, way, seconds):
    """Measures training batches augmented one way, alone and then beside a busy thread.

    Returns:
        Images per second alone, microseconds of a processor an image alone, images per second beside the thread.
    """

    def parse_and_augment(records, draws):
        images, labels = study.parse(records)
        return way(images, draws, image_size), labels

    data = pipeline._order_images(study, BATCH_SIZE, seed=0, epochs=10**6)
    data = data.map(parse_and_augment, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    batches = iter(data.prefetch(2))

    def draw():
        for _ in range(4):  # tracing, and what was made in advance
            next(batches)
        n, started, processor = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - started < seconds:
            next(batches)
            n += BATCH_SIZE
        return n / (time.perf_counter() - started), (time.process_time() - processor) / n * 1e6

    alone = draw()
    with busy_python():
        return *alone, draw()[0]


def compare_ways(study, image_size, rounds, seconds=1.5):
    """Measures every way in turn, alone and beside a busy thread.

    Returns:
        Dict from the name of a way to medians over the rounds, with those of the ratios within a round.
    """
    found = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, way in WAYS.items():
            alone, work, beside = train_by(study, image_size, way, seconds)
            found[name].append((alone, work, beside, beside / alone))
    found = {name: np.array(rows) for name, rows in found.items()}
    columns = ("images_per_second", "processor_us_per_image", "images_per_second_beside_busy_python", "share_kept")
    results = {}
    for name, rows in found.items():
        results[name] = dict(zip(columns, np.median(rows, axis=0).round(3).tolist(), strict=True))
        rate, work = np.median(rows / found[BEFORE], axis=0)[:2]
        results[name] |= {"times_opencv": round(float(rate), 3), "times_opencv_by_processor": round(float(1 / work), 3)}
    return results


def memory_of_epochs(study, n_epochs):
    """Returns resident MiB after each of some epochs of training batches, read from one iterator."""
    data = make_train_dataset(study, IMAGE_SIZE, BATCH_SIZE, seed=0, epochs=n_epochs)
    steps, process, resident = len(study.labels("train")) // BATCH_SIZE, psutil.Process(), []
    for step, _ in enumerate(data, 1):
        if step % steps == 0:
            resident.append(process.memory_info().rss / 2**20)
    return [round(mib) for mib in resident]


def main():
    """Measures, prints a table and writes benchmarks/results/input_pipeline.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="folder of 1024-pixel PNGs")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    paths, kind = find_images(arguments.images)
    some = (list(paths) * (192 // len(paths) + 1))[:192]
    with tempfile.TemporaryDirectory() as folder:
        rows, images = make_rows(paths, 4096, "train")
        study = pack_study(rows, images, Path(folder) / "large", split_name="official", side=SIDE)
        tasks = {
            "predecessor, training": lambda: predecessor(some, augment=True),
            "predecessor, evaluation": lambda: predecessor(some, augment=False),
            "record parse alone (ceiling of reading)": lambda: parse_alone(study, "train"),
            "training batches": lambda: train_batches(study),
            f"evaluation batches, {SIDE} px as packed": lambda: eval_batches(study, None),
            f"evaluation batches, resized to {IMAGE_SIZE} px": lambda: eval_batches(study, IMAGE_SIZE),
        }
        rates = {name: [] for name in tasks}
        for number in range(arguments.rounds + 1):
            for name, task in tasks.items():
                rate = task()
                if number:  # the first round warms caches and traces graphs
                    rates[name].append(rate)
        small = pack_study(*make_rows(paths, 1024, "train"), Path(folder) / "small", split_name="official", side=SIDE)
        ways = {}
        for side, (image_size, n_images) in SIZES.items():
            one = pack_study(
                *make_rows(paths, n_images, "train"), Path(folder) / str(side), split_name="official", side=side
            )
            ways[f"packed at {side}, crops of {image_size}"] = compare_ways(one, image_size, arguments.rounds)
        resident = {"1,024 images": memory_of_epochs(small, 12), "4,096 images": memory_of_epochs(study, 12)}

    def ratio(name, other):
        pairs = zip(rates[name], rates[other], strict=True)
        return round(float(np.median([a / b for a, b in pairs])), 3)

    parse, train, whole, resized = list(tasks)[2:6]
    results = {
        "machine": describe_machine(tf),
        "images": f"{len(paths)} {kind} of 1024 px, packed at {SIDE}, crops of {IMAGE_SIZE}, batches of {BATCH_SIZE}",
        "images_per_second": {name: round(float(np.median(values)), 1) for name, values in rates.items()},
        "ratios": {
            f"{train} / predecessor": ratio(train, "predecessor, training"),
            f"{train} / record parse alone": ratio(train, parse),
            f"{whole} / predecessor": ratio(whole, "predecessor, evaluation"),
            f"{resized} / predecessor": ratio(resized, "predecessor, evaluation"),
        },
        "ways_to_augment": ways,
        "resident_mib_after_each_epoch": resident,
    }
    print(json.dumps(results, indent=1))
    target = ROOT / "benchmarks" / "results" / "input_pipeline.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
