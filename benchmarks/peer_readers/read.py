"""One way of reading images in a process of its own: `peers.py` starts this file, in the Python that has the packages.

Prints a line of JSON for each thing that it has found out: that all is imported, the first batch, the speed.
"""

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "notebooks"), str(ROOT / "benchmarks")]
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

N_WARM = 4  # batches after the first: those that several workers had begun together with it


def count_processor_seconds():
    """Returns the processor seconds of this process and of all below it so far; NaN where Linux does not say."""
    if not Path("/proc/self/stat").exists():
        return float("nan")
    pids, ticks = [os.getpid()], 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            ticks += sum(map(int, fields[11:15]))  # its own and those of processes below it that have ended
            for thread in Path(f"/proc/{pid}/task").iterdir():
                pids += map(int, (thread / "children").read_text().split())
        except OSError:  # it has ended since
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


def report(**found):
    """Prints a line that `peers.py` reads."""
    print(json.dumps(found), flush=True)


def main():
    """Reads images for some seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module", help="with_tensorflow or with_torch")
    parser.add_argument("way", help="name of a function of that module")
    parser.add_argument("folder", type=Path, help="what `peers.py` prepared")
    parser.add_argument("--seconds", type=float, default=4)
    arguments = parser.parse_args()
    started = time.perf_counter()
    module = importlib.import_module(f"peer_readers.{arguments.module}")
    report(import_seconds=round(time.perf_counter() - started, 2))
    started = time.perf_counter()
    batches = iter(getattr(module, arguments.way)(arguments.folder))
    images, labels = next(batches)[:2]
    first = time.perf_counter() - started
    report(first_batch_seconds=round(first, 2), images=[*images.shape], labels=[*labels.shape])
    for _ in range(N_WARM):
        next(batches)
    n_images, spent, began = 0, count_processor_seconds(), time.perf_counter()
    while time.perf_counter() - began < arguments.seconds:
        n_images += len(next(batches)[0])
    seconds = time.perf_counter() - began
    spent = count_processor_seconds() - spent
    report(images_per_second=n_images / seconds, processor_ms_per_image=1000 * spent / n_images)
    os._exit(0)  # workers need not be waited for


if __name__ == "__main__":
    main()
