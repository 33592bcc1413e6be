"""Is a folder of images predicted as fast as the model itself allows?

`predict_folder`, which lists, reads, decodes, predicts, checks and writes, is compared with the model's own throughput:
its `serving_default` on the same files in memory, which decodes and predicts, 32 at a time. The network alone, on
decoded squares, is measured too, and so is each step. Rounds of all three alternate in one process; loading the model
and the first batch of each are not counted. Processor time is reported too, since other work on the machine changes it
less. Last, the ONNX and LiteRT files beside the SavedModel predict the same images.

Usage: predict.py [--model models/densenet121/saved_model] [--named "quick profile"] [--images 384] [--rounds 5]
Images are those of ../shared/data/nih_original, or synthetic ones, repeated by links to one file each.
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

import numpy as np
import pandas as pd
import tensorflow as tf
from PIL import Image

from helpers.export import ExportedModel, check_images, measure_color, open_export, predict_folder
from helpers.packing import decode_image, load_image
from helpers.runtime import describe_machine
from helpers.study import draw_image

BATCH, SIDE, N_FILES = 32, 1024, 48


def gather_images(folder, n_images):
    """Fills a folder with links to images and returns a description of them."""
    found = sorted((ROOT.parent / "shared/data/nih_original/images_001/images").glob("*.png"))[:N_FILES]
    kind = f"{len(found)} real radiographs of {SIDE} pixels"
    if not found:
        kind = f"{N_FILES // 4} synthetic images of {SIDE} pixels"
        for seed in range(N_FILES // 4):
            path = folder.with_name(f"synthetic_{seed}.png")
            Image.fromarray(draw_image(seed, size=SIDE)[0]).save(path)
            found.append(path)
    folder.mkdir()
    originals = []
    for number, path in enumerate(found):  # copied once: links do not cross file systems
        originals.append(folder / f"image_{number:04d}.png")
        originals[-1].write_bytes(path.read_bytes())
    for number in range(len(found), n_images):
        os.link(originals[number % len(found)], folder / f"image_{number:04d}.png")
    return f"{kind}, repeated to {n_images}"


def clock(task):
    """Runs a task; returns its seconds, and the processor's."""
    start, used = time.perf_counter(), time.process_time()
    task()
    return time.perf_counter() - start, time.process_time() - used


def measure_parts(model, paths, rows):
    """Returns processor milliseconds an image of each step, measured separately on a batch."""
    side, files = model.facts["side"], [path.read_bytes() for path in paths]
    squares = np.stack([decode_image(tf.constant(data), side) for data in files])
    colors = [measure_color(data) for data in files]
    check_images(squares, colors)
    decode = tf.function(decode_image)
    decode(tf.constant(files[0]), side)

    def write():
        with open(os.devnull, "w") as file:
            pd.DataFrame(rows).to_csv(file, index=False, header=False)

    tasks = {
        "open, read, look at the header": lambda: [load_image(path) for path in paths],
        "decode and resize": lambda: [decode(tf.constant(data), side) for data in files],
        "color of the file": lambda: [measure_color(data) for data in files],
        "gate": lambda: check_images(squares, colors),
        "network": lambda: model.predict_pixels(squares),
        "write the rows": write,
    }
    return {
        name: round(1e3 * float(np.median([clock(task)[1] for _ in range(5)])) / len(paths), 3)
        for name, task in tasks.items()
    }


def compare_exports(folder, files, expected):
    """Returns how far ONNX and LiteRT files beside a SavedModel are from it on images of full size."""
    found = {}
    for path in sorted((folder.parent / "exports").glob("model*.*")):
        model = open_export(path)
        probs = np.concatenate([model.predict_file(data)["probabilities"] for data in files])
        top5, expected_top5 = (np.argsort(-values, axis=1, kind="stable")[:, :5] for values in (probs, expected))
        difference, same = np.abs(probs - expected).max(), (top5 == expected_top5).all(axis=1).mean()
        found[path.name] = {"images": len(files), "max_difference": float(difference), "same_top5": float(same)}
    return found


def main():
    """Measures, prints a table and writes benchmarks/results/predict.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "models/densenet121/saved_model"))
    parser.add_argument("--named", default="", help="name of the model in the results")
    parser.add_argument("--images", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--target", default=str(ROOT / "benchmarks/results/predict.json"))
    arguments = parser.parse_args()
    if not Path(arguments.model).is_dir():
        print(f"{arguments.model} is missing, nothing was measured. Run the notebooks first (make run).")
        return
    model = ExportedModel(arguments.model)
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch) / "images", Path(scratch) / "out" / "images.csv"
        kind = gather_images(folder, arguments.images)
        paths = sorted(folder.iterdir())
        files = [path.read_bytes() for path in paths]
        squares = np.stack([decode_image(tf.constant(data), model.facts["side"]) for data in files[:BATCH]])
        starts = range(0, len(files), BATCH)

        def predict_all():
            for path in out.parent.glob("*"):
                path.unlink()
            done = predict_folder(model, folder, out, batch_size=BATCH)
            assert done.predicted == len(paths)

        arms = {
            "predict_folder": predict_all,
            "model on files in memory": lambda: [model.predict(files[start : start + BATCH]) for start in starts],
            "network on ready squares": lambda: [model.predict_pixels(squares) for _ in starts],
        }
        predict_folder(model, paths[0], Path(scratch) / "one.csv")
        model.predict(files[:BATCH]), model.predict_pixels(squares)  # the first of a size is slow
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        seconds = {name: [] for name in arms}
        for number in range(arguments.rounds):
            for name in sorted(arms, reverse=number % 2):  # in alternating order
                seconds[name].append(clock(arms[name]))
        answers = pd.concat(
            [pd.DataFrame(model.predict(files[start : start + BATCH])["probabilities"]) for start in starts]
        )
        table = pd.read_csv(out)
        difference = np.abs(table.filter(regex="^prob_").to_numpy() - answers.to_numpy()).max()
        parts = measure_parts(model, paths[:BATCH], table[:BATCH])
        exports = compare_exports(Path(arguments.model), files[:N_FILES], answers.to_numpy()[:N_FILES])
    wall = {name: np.array(pairs)[:, 0] for name, pairs in seconds.items()}
    used = {name: np.array(pairs)[:, 1] for name, pairs in seconds.items()}
    own_used = used["model on files in memory"] / used["predict_folder"]
    own = wall["model on files in memory"] / wall["predict_folder"]
    side = model.facts["side"]
    results = {
        "machine": describe_machine(tf),
        "busy": f"{load:.1f} processes wanted a core before the rounds" if load is not None else "unknown",
        "model": f"{arguments.named or model.facts['study']}, {side} pixels a side",
        "images": kind,
        "method": f"medians of {arguments.rounds} rounds that take turns, batches of {BATCH}; loading is not counted, "
        "listing, hashing the model and all writing are",
        "images_per_second": {name: round(len(paths) / float(np.median(times)), 1) for name, times in wall.items()},
        "processor_ms_per_image": {
            name: round(1e3 * float(np.median(times)) / len(paths), 2) for name, times in used.items()
        },
        "share_of_the_models_own": round(float(np.median(own)), 3),
        "share_by_the_processors_time": round(float(np.median(own_used)), 3),
        "share_in_each_round": [round(float(share), 3) for share in own],
        "parts_processor_ms_per_image": parts,
        "largest_difference": float(difference),
        "exports_beside_the_saved_model_on_full_size": exports,
    }
    print(json.dumps(results, indent=1))
    Path(arguments.target).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
