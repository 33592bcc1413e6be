"""Does a converted PyTorch network compute the same features?

PyTorch networks of random weights are converted by `scripts/convert_weights.py`, and the last map of the classifier
that is built on the file is compared with PyTorch's, on random images.

Usage: convert_weights.py [--peers-python PATH] [--side 224] [--names NAME ...] [--out FILE]
PATH is a Python that has torch, torchvision, torchxrayvision and h5py, by default that of `make .venv/peers/ready`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "benchmarks" / "workers" / "torch_features.py"
sys.path.insert(0, str(ROOT / "notebooks"))

import keras
import numpy as np
import tensorflow as tf

from helpers.runtime import describe_machine
from helpers.training import build_classifier

PEERS = ROOT / ".venv" / "peers" / "bin" / "python"
RESULTS = ROOT / "benchmarks" / "results" / "convert_weights.json"
NAMES = ["torchvision densenet121", "torchvision convnext_base", "torchxrayvision densenet121"]


def compare(python, names, side):
    """Compares the last maps of networks with random weights.

    Args:
        python: path of a Python with PyTorch.
        names: some of `NAMES`.
        side: int, pixels of the images.

    Returns:
        Dict from name to the largest difference of a feature, and the root mean square of the features; and the
        versions.
    """
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [python, WORKER, folder, str(side), *names]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{WORKER.name} failed: {done.stderr[-2000:]}")
        for name in names:
            model = build_classifier(name.split()[1], weights=Path(folder, f"{name}.h5"))
            last_map = keras.Model(model.inputs, model.get_layer("average").input)
            with np.load(Path(folder, f"{name}.npz")) as theirs:
                features = theirs["features"].transpose(0, 2, 3, 1)
                difference = np.abs(last_map(theirs["images"][..., None]) - features).max()
            rows[name] = {"largest_difference": float(difference), "rms": float(np.sqrt(np.square(features).mean()))}
    versions = {"tensorflow": tf.__version__, "keras": keras.__version__} | json.loads(done.stdout.splitlines()[-1])
    return rows, versions


def main():
    """Compares, writes the results and prints them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers-python", default=PEERS)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--names", nargs="+", default=NAMES, choices=NAMES, metavar="NAME")
    parser.add_argument("--out", default=RESULTS, type=Path)
    arguments = parser.parse_args()
    if not Path(arguments.peers_python).exists():
        sys.exit(f"{arguments.peers_python} is missing; `make .venv/peers/ready` installs it")
    rows, versions = compare(arguments.peers_python, arguments.names, arguments.side)
    report = {
        "side": arguments.side,
        "images": 2,
        "networks": rows,
        "versions": versions,
        "machine": describe_machine(),
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
