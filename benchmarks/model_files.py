"""How long does it take to refuse a hostile model file, or to accept a good one, and in how much memory?

Every file is checked by `check_model_file` in processes of its own, and, where that does no harm, opened by what would
open it otherwise: `keras.models.load_model`, h5py reading all data, `tf.saved_model.load`. Imports are not counted.
The zip bomb and the shape bomb declare little enough (1 GiB) for the peer to survive them.

Usage: model_files.py [--rounds 3]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import h5py
import numpy as np

# Runs in a process of its own: file, task, folder of the helpers.
TASK = """
import json, re, sys, time
path, task, folder = sys.argv[1:]
sys.path.insert(0, folder)
import h5py
if task == "check":
    from helpers.training import check_model_file as run
elif task == "keras":
    import keras
    run = lambda path: keras.models.load_model(path, compile=False)
elif task == "tensorflow":
    import tensorflow as tf
    run = tf.saved_model.load
else:
    run = lambda path: h5py.File(path).visititems(lambda _, item: item[()] is None if hasattr(item, "shape") else None)
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak of the imports
before, started = peak(), time.perf_counter()
try:
    run(path)
    said = "opened"
except Exception as error:
    said = f"{type(error).__name__}: {str(error).replace(path, 'the file')[:160]}"
print(json.dumps([time.perf_counter() - started, peak() - before, said]))
"""


def make_files(folder):
    """Writes good and hostile files; returns the path and the peer of each."""
    import keras
    import tensorflow as tf

    from helpers.training import build_densenet121

    model = build_densenet121()
    good = folder / "good.keras"
    model.save(good)
    model.save_weights(folder / "good.weights.h5")
    model.export(folder / "saved_model", verbose=False)
    with zipfile.ZipFile(good) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    def pack(name, changed, **options):
        with zipfile.ZipFile(folder / name, "w", **options) as archive:
            for member, data in (members | changed).items():
                archive.writestr(member, data)
        return folder / name

    def add_layer(name, layer):
        config = json.loads(members["config.json"])
        layer = {"registered_name": None, "name": "extra", "inbound_nodes": [], **layer}
        config["config"]["layers"].append(layer)
        return pack(name, {"config.json": json.dumps(config)})

    code = {"class_name": "__lambda__", "config": {"value": "", "defaults": None, "closure": None}}
    keras_lambda = {"module": "keras.layers", "class_name": "Lambda", "config": {"name": "extra", "function": code}}
    system = {"module": "os", "class_name": "function", "config": "system", "registered_name": "system"}
    graph_layer = {
        "module": "keras.layers",
        "class_name": "TFSMLayer",
        "config": {"name": "extra", "filepath": "nowhere"},
    }
    layer = keras.layers.Lambda(lambda x: x, output_shape=(2,))
    keras.Sequential([keras.Input((2,)), layer]).save(folder / "lambda.h5")
    with h5py.File(folder / "shape.weights.h5", "w") as file:
        file.create_dataset("bomb", (2**14, 2**14), "f4", chunks=(2**10, 2**10), compression="gzip")
    with h5py.File(folder / "external.weights.h5", "w") as file:
        file.create_dataset("secret", (2,), "f4", external=[(str(folder / "good.keras"), 0, 8)])
    module = tf.Module()
    module.call = tf.function(
        lambda x: (tf.io.write_file("marker", x), x)[1], input_signature=[tf.TensorSpec([], tf.string)]
    )
    tf.saved_model.save(module, str(folder / "writes"))
    return {
        "DenseNet-121, .keras": (good, "keras"),
        "DenseNet-121, .weights.h5": (folder / "good.weights.h5", "h5py"),
        "DenseNet-121, SavedModel": (folder / "saved_model", "tensorflow"),
        "lambda layer in .keras": (add_layer("lambda.keras", keras_lambda), "keras"),
        "lambda layer in .h5": (folder / "lambda.h5", "keras"),
        "os.system in config.json": (add_layer("system.keras", system), "keras"),
        "TFSMLayer in .keras": (add_layer("graph.keras", graph_layer), "keras"),
        "shape bomb in .weights.h5 (1 GiB)": (folder / "shape.weights.h5", "h5py"),
        "data of another file in .weights.h5": (folder / "external.weights.h5", "h5py"),
        "zip bomb in .keras (1 GiB)": (
            pack("zip.keras", {"model.weights.h5": bytes(2**30)}, compression=zipfile.ZIP_DEFLATED),
            "keras",
        ),
        "WriteFile in a SavedModel": (folder / "writes", "tensorflow"),
    }


def measure(path, task, rounds):
    """Returns median seconds, largest growth of memory in MiB, and what came of it."""
    command = [sys.executable, "-c", TASK, str(path), task, str(ROOT / "notebooks")]
    runs = []
    for _ in range(rounds):
        answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tempfile.gettempdir())
        runs.append(json.loads(answer.stdout.splitlines()[-1]))
    seconds, growths, said = zip(*runs, strict=True)
    return {
        "seconds": round(float(np.median(seconds)), 3),
        "peak_memory_growth_mib": round(max(growths), 1),
        "said": said[0],
    }


def main():
    """Measures, prints a table and writes benchmarks/results/model_files.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(Path(folder))
        import keras
        import tensorflow as tf

        from helpers.runtime import describe_machine

        results = {
            "machine": describe_machine(keras, tf, h5py, np),
            "method": f"medians of {rounds} fresh processes, wall clock without imports; largest growth of memory",
            "files": {},
        }
        print(f"{results['machine']}\n{results['method']}\n")
        print(f"{'':38}{'check, s':>9}{'MiB':>7}   {'peer':12}{'s':>7}{'MiB':>8}  what came of it")
        for name, (path, peer) in files.items():
            ours, theirs = measure(path, "check", rounds), measure(path, peer, 1)
            results["files"][name] = {"check_model_file": ours, peer: theirs}
            print(
                f"{name:38}{ours['seconds']:9.3f}{ours['peak_memory_growth_mib']:7.1f}   {peer:12}"
                f"{theirs['seconds']:7.2f}{theirs['peak_memory_growth_mib']:8.1f}  {theirs['said'][:60]!r}"
            )
    target = ROOT / "benchmarks" / "results" / "model_files.json"
    target.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
