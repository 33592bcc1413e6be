"""What does it save to cache features, and what does caching cost?

Two tasks take turns in one process: writing a cache of features from image files, and plain `keras.Model.predict` of
the same network on the same images as arrays in memory. Then an epoch of the 512x512 head on cached features is
compared with an epoch of end-to-end fine-tuning of the same network and head on the same images: some steps of the
latter are timed and scaled up. Also measured: bytes on disk, and seconds to read a cache again.

Usage: features.py [--images 96] [--side 224] [--rounds 3] [--steps 2]
Images are synthetic and weights random, which does not change the amount of work.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

from helpers.runtime import describe_machine
from helpers.study import load_study, plan_nodule_study, write_synthetic_study
from helpers.xvision import (
    XVISION,
    HeadTrainer,
    build_backbone,
    join_head,
    load_cohort,
    read_cohort_images,
    write_feature_cache,
)

BATCH = 32
VGG16_GFLOP = 30.7  # two operations for each of the 15.35 billion products in VGG16's convolutions at 224 pixels


def clock(task):
    """Runs a task; returns what it returns, and its seconds."""
    started = time.perf_counter()
    result = task()
    return result, time.perf_counter() - started


def measure_peak(size=4096, times=5):
    """Returns the billions of operations a second that a product of two large matrices reaches."""
    matrix = keras.random.normal((size, size))
    seconds = [clock(lambda: keras.ops.convert_to_numpy(matrix @ matrix))[1] for _ in range(1 + times)][1:]
    return 2e-9 * size**3 / float(np.median(seconds))


def time_head(features, labels, epochs):
    """Returns the seconds of an epoch of the head, validation included, without tracing."""
    rows = np.arange(len(labels))
    seconds = {}
    for n_epochs in (1, 1 + epochs):  # the first call traces
        trainer = HeadTrainer(features.shape[1:], **(XVISION | {"epochs": n_epochs}))
        trainer.train(features, labels, rows, rows[:4])
        seconds[n_epochs] = clock(lambda trainer=trainer: trainer.train(features, labels, rows, rows[:4]))[1]
    return (seconds[1 + epochs] - seconds[1]) / epochs


def time_fine_tuning(backbone, features, images, labels, steps):
    """Returns the seconds of an epoch of fine-tuning, from the median of some steps."""
    trainer = HeadTrainer(features.shape[1:], **XVISION)
    backbone.model.trainable = True
    model = join_head(backbone, trainer.head)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(XVISION["learning_rate"]), loss, jit_compile=False)
    batch = images[: XVISION["batch_size"]], labels[: XVISION["batch_size"], None].astype("float32")
    model.train_on_batch(*batch)  # traces
    step = np.median([clock(lambda: model.train_on_batch(*batch))[1] for _ in range(steps)])
    return float(step) * len(images) / XVISION["batch_size"]


def main():
    """Measures, prints a table and writes benchmarks/results/features.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--target", default=str(ROOT / "benchmarks/results/features.json"))
    arguments = parser.parse_args()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with tempfile.TemporaryDirectory() as scratch:
        study = Path(scratch) / "study"
        write_synthetic_study(study, arguments.images, arguments.side, plan=plan_nodule_study, n_workers=1)
        cohort = load_cohort(load_study(study))
        labels = cohort.rows["label"].to_numpy()
        keras.utils.set_random_seed(0)
        backbone = build_backbone("VGG16", side=arguments.side)
        images = read_cohort_images(cohort, arguments.side, np.arange(len(cohort)))
        backbone.model.predict(images[:BATCH], batch_size=BATCH, verbose=0)
        backbone.model.predict_on_batch(images[:BATCH])  # the first of each is slow
        shares, seconds = [], {"cache": [], "predict": []}
        for number in range(arguments.rounds):
            tasks = {
                "cache": lambda number=number: write_feature_cache(
                    cohort, backbone, Path(scratch) / f"caches-{number}", dtype="float32", batch_size=BATCH
                ),
                "predict": lambda: backbone.model.predict(images, batch_size=BATCH, verbose=0),
            }
            done = {name: clock(tasks[name]) for name in sorted(tasks, reverse=number % 2)}
            for name, (_, taken) in done.items():
                seconds[name].append(taken)
            assert np.allclose(done["cache"][0].features, done["predict"][0], rtol=1e-4, atol=1e-5)
            shares.append(seconds["predict"][-1] / seconds["cache"][-1])
        cache, again = clock(lambda: write_feature_cache(cohort, backbone, Path(scratch) / "caches-0", dtype="float32"))
        half = write_feature_cache(cohort, backbone, Path(scratch) / "caches-half", dtype="float16")
        caches = {"float32": cache, "float16": half}
        sizes = {name: (found.folder / "codes.npy").stat().st_size for name, found in caches.items()}
        sizes["image files"] = sum(Path(path).stat().st_size for path in cohort.paths)
        peak = measure_peak()
        head = time_head(np.array(cache.features), labels, 10)
        tuning = time_fine_tuning(backbone, cache.features, images, labels, arguments.steps)
    results = {
        "machine": describe_machine(tf, keras),
        "busy": f"{load:.1f} processes wanted a core before the rounds" if load is not None else "unknown",
        "work": f"VGG16 to block5_pool, {arguments.images} synthetic images of {arguments.side} pixels, "
        f"batches of {BATCH}",
        "method": f"medians of {arguments.rounds} rounds that take turns; reading, writing and hashing count for "
        "the cache",
        "images_per_second": {
            name: round(arguments.images / float(np.median(taken)), 2) for name, taken in seconds.items()
        },
        "share_of_plain_predict": round(float(np.median(shares)), 3),
        "gigaflops_of_a_matrix_product": round(peak),
        "cache_as_share_of_that": round(
            VGG16_GFLOP * (arguments.side / 224) ** 2 * arguments.images / float(np.median(seconds["cache"])) / peak, 2
        ),
        "share_in_each_round": [round(share, 3) for share in shares],
        "seconds_to_read_again": round(again, 3),
        "bytes_per_image": {name: round(size / arguments.images) for name, size in sizes.items()},
        "seconds_of_an_epoch": {"head on cached features": round(head, 3), "fine-tuning end to end": round(tuning, 1)},
        "fine_tuning_over_head": round(tuning / head, 1),
    }
    print(json.dumps(results, indent=1))
    Path(arguments.target).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
