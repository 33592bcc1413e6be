"""Where does the time of a training step go on a CPU, and how fast is it compared with PyTorch and with the hardware?

Notebook 2's step, DenseNet-121 with its loss and optimizer, takes turns with the same step on Keras's own batch
normalization and, if there is a Python with torchvision, with torchvision's DenseNet-121 in PyTorch. Each is a process
of its own and waits while the others work. In each round all of them take a step, and each framework multiplies large
float32 matrices, which gives its highest rate on these cores. Then the step is profiled on one thread, where the times
of operations do not overlap.

Operations of an image: two for each product in convolutions and dense layers, from the layers' shapes, and three times
those of the forward pass, since gradients of maps and of weights take as many again.

Usage: training_step.py [--peers-python PATH] [--sizes 224x16 96x32] [--rounds 5] [--experiments] [--preload PATH ...]
PATH is a Python that has torch and torchvision, by default that of `make .venv/peers/ready`. --experiments tries other
settings of the step at the last size as well, which takes a long time; libraries in --preload, such as an allocator,
are tried too.
"""

import argparse
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORKERS = ROOT / "benchmarks" / "workers"
sys.path.insert(0, str(ROOT / "notebooks"))
sys.path.append(str(WORKERS))

import numpy as np
import speed_page
from renew_page import renew_page

from helpers.runtime import describe_machine

RESULTS = ROOT / "benchmarks" / "results" / "training_step.json"
PAGE = ROOT / "docs" / "speed.md"
OURS, KERAS = "TensorFlow, as notebook 2", "TensorFlow, Keras's batch normalization"
TORCH = {"PyTorch, channels last": "channels_last", "PyTorch, channels first": "channels_first"}
EXPERIMENTS = {  # what differs from notebook 2 in setup and environment
    "same again": ({}, {}),
    "mixed_bfloat16": ({"recipe": {"PRECISION": "mixed_bfloat16"}}, {}),
    "oneDNN may round to bfloat16 (TF_SET_ONEDNN_FPMATH_MODE=BF16)": ({}, {"TF_SET_ONEDNN_FPMATH_MODE": "BF16"}),
    "oneDNN off (TF_ENABLE_ONEDNN_OPTS=0)": ({}, {"TF_ENABLE_ONEDNN_OPTS": "0"}),
    "system allocator in oneDNN (TF_ONEDNN_USE_SYSTEM_ALLOCATOR=1)": ({}, {"TF_ONEDNN_USE_SYSTEM_ALLOCATOR": "1"}),
    "8 steps an execution": ({"steps_per_execution": 8}, {}),
    "1 thread between operations": ({"threads": [0, 1]}, {}),
    "1 thread within an operation": ({"threads": [1, 0]}, {}),
    "uint8 to the device": ({"images": "uint8"}, {}),
    "images read and augmented, not one batch kept in memory": ({"images": "packed"}, {}),
    "no averaged weights": ({"recipe": {"PRECISION": "float32", "AVERAGING": 0.0}}, {}),
    "channels first (Keras's batch normalization)": ({"layout": "channels_first"}, {}),
    "XLA (jit_compile)": ({"jit_compile": True}, {}),
}


class Worker:
    """A process that trains; it waits for commands.

    Args:
        script: path of its code.
        setup: dict that it is given.
        python: path of the Python that runs it.
        environment: dict of variables to set.
    """

    def __init__(self, script, setup, python=sys.executable, environment=None):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        command = [python, str(script), json.dumps(setup)]
        self.process = subprocess.Popen(command, env=os.environ | (environment or {}), **pipes)
        self.peaks, self.steps, self.about = [], [], None

    def read(self, limit):
        """Returns its next answer; raises TimeoutError after so many seconds, and EOFError if it has ended."""
        if not select.select([self.process.stdout], [], [], limit)[0]:
            raise TimeoutError(f"no answer within {limit} seconds")
        line = self.process.stdout.readline()
        if not line:
            raise EOFError(f"it ended, with exit status {self.process.wait()}")
        return json.loads(line)

    def ask(self, *command, limit=600):
        """Sends a command, such as "steps", 2; returns the answer."""
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self.read(limit)

    def close(self):
        """Ends the process."""
        self.process.kill()
        self.process.communicate()


def start(jobs, limit=900):
    """Starts processes at once; returns those that started, and why the others did not, both by name."""
    workers, failed = {name: Worker(*job) for name, job in jobs.items()}, {}
    until = time.time() + limit
    for name, worker in workers.items():
        try:
            worker.about = worker.read(max(1, until - time.time()))
        except (TimeoutError, EOFError) as error:
            failed[name] = str(error)
            worker.close()
    return {name: worker for name, worker in workers.items() if name not in failed}, failed


def take_turns(workers, rounds, calls=None):
    """Lets each process take steps, one or `calls[name]`, and multiply matrices in each round, in turned order."""
    for number in range(rounds + 1):  # the first warms up
        for name in sorted(workers, reverse=number % 2):
            step, peak = workers[name].ask("steps", calls[name] if calls else 1), workers[name].ask("peak")
            if number:
                workers[name].steps.append(step)
                workers[name].peaks.append(peak)


def summarize(workers, batch, flops):
    """Returns a dict of speeds for each process, medians over the rounds."""
    table = {}
    for name, worker in workers.items():
        seconds, cpu = (np.array([step[key] for step in worker.steps]) for key in ("seconds", "cpu"))
        rates = flops * batch / seconds
        peak = max(worker.peaks)  # a round in which the cores were busy with others is no ceiling
        table[name] = {
            "images_per_second": round(batch / float(np.median(seconds)), 2),
            "cpu_seconds_per_image": round(float(np.median(cpu)) / batch, 4),
            "gigaflops": round(1e-9 * float(np.median(rates)), 1),
            "matrix_product_gigaflops": round(1e-9 * peak, 1),
            "share_of_that": round(float(np.median(rates)) / peak, 3),
        }
    return table


def compare(one, other):
    """Returns how many times as fast one process is as another, in elapsed and in processor time: medians."""
    seconds, cpu = (
        [b[key] / a[key] for a, b in zip(one.steps, other.steps, strict=True)] for key in ("seconds", "cpu")
    )
    return {
        "speed": round(float(np.median(seconds)), 3),
        "by_processor_time": round(float(np.median(cpu)), 3),
        "in_each_round": [round(ratio, 3) for ratio in seconds],
    }


def measure_size(side, batch, rounds, torch_python):
    """Returns speeds and ratios at one size, and the versions of all that took part."""
    size = {"side": side, "batch": batch}
    jobs = {OURS: (WORKERS / "keras_step.py", size), KERAS: (WORKERS / "keras_step.py", size | {"fused": False})}
    for name, layout in TORCH.items() if torch_python else ():
        jobs[name] = WORKERS / "torch_step.py", size | {"layout": layout}, torch_python
    workers, failed = start(jobs)
    try:
        for name, why in failed.items():
            raise SystemExit(f'"{name}" did not train: {why}. Run its script in {WORKERS} to see what it says.')
        take_turns(workers, rounds)
        flops = 3 * workers[OURS].about["forward"]
        ratios = {f"{OURS} / {name}": compare(workers[OURS], workers[name]) for name in workers if name != OURS}
        versions = sorted({worker.about["versions"] for worker in workers.values()})
        found = {"gigaflop_per_image": round(1e-9 * flops, 2), "speeds": summarize(workers, batch, flops)}
        return found | {"ratios": ratios}, versions
    finally:
        for worker in workers.values():
            worker.close()


def profile_step(side, batch, steps=2):
    """Returns where the time of a step on one thread goes, with the fused operation and with Keras's own."""
    size = {"side": side, "batch": batch, "threads": [1, 1]}
    jobs = {name: (WORKERS / "keras_step.py", size | {"fused": name == OURS}) for name in (OURS, KERAS)}
    workers, failed = start(jobs)
    try:
        return failed | {name: worker.ask("profile", steps) for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()


def try_settings(side, batch, rounds, preload, limit, at_once=3):
    """Returns, for each experiment, how many times as fast as notebook 2's setup it is, or why it did not run."""
    experiments = EXPERIMENTS | {f"preloaded {Path(path).name}": ({}, {"LD_PRELOAD": path}) for path in preload}
    size, found = {"side": side, "batch": batch}, {}
    names = list(experiments)
    for first in range(0, len(names), at_once):
        jobs = {OURS: (WORKERS / "keras_step.py", size)}
        for name in names[first : first + at_once]:
            setup, environment = experiments[name]
            jobs[name] = WORKERS / "keras_step.py", size | setup, sys.executable, environment
        workers, failed = start(jobs, limit)
        if OURS in failed:
            raise SystemExit(f'"{OURS}" did not train: {failed[OURS]}. Give it a higher --limit.')
        found |= {name: f"did not train: {why}" for name, why in failed.items()}
        try:
            take_turns(workers, rounds)
            found |= {name: compare(workers[name], workers[OURS]) for name in workers if name != OURS}
        finally:
            for worker in workers.values():
                worker.close()
        print(json.dumps(found, indent=1), flush=True)
    return found


def main():
    """Measures, prints what it found, and writes benchmarks/results/training_step.json and docs/speed.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers-python", default=str(ROOT / ".venv/peers/bin/python"), help="has torch, torchvision")
    parser.add_argument("--sizes", nargs="+", default=["224x16", "96x32"], help="pixels and images of a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--experiments", action="store_true")
    parser.add_argument("--preload", nargs="*", default=[], help="libraries to try in LD_PRELOAD")
    parser.add_argument("--limit", type=float, default=900, help="seconds within which an experiment must have started")
    parser.add_argument("--target", default=str(RESULTS))
    arguments = parser.parse_args()
    torch_python = arguments.peers_python if Path(arguments.peers_python).exists() else None
    if not torch_python:
        print(f"Without PyTorch: there is no {arguments.peers_python}; make .venv/peers/ready makes one.", flush=True)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    target = Path(arguments.target)
    earlier = json.loads(target.read_text()) if target.is_file() else {}
    results = {
        "machine": describe_machine(),
        "busy": f"{load:.1f} processes wanted a core before the rounds" if load is not None else "unknown",
        "method": f"medians of {arguments.rounds} rounds that take turns; the matrix product is the best of all rounds",
        "sizes": {},
    }
    for text in arguments.sizes:
        side, batch = map(int, text.split("x"))
        results["sizes"][f"{side} pixels, {batch} images"], versions = measure_size(
            side, batch, arguments.rounds, torch_python
        )
        results["versions"] = versions
        print(json.dumps(results["sizes"], indent=1), flush=True)
    side, batch = map(int, arguments.sizes[0].split("x"))
    results["profile_on_one_thread"] = {"size": f"{side} pixels, {batch} images"} | profile_step(side, batch)
    if arguments.experiments:
        side, batch = map(int, arguments.sizes[-1].split("x"))
        settings = arguments.rounds, arguments.preload, arguments.limit
        results["experiments"] = {
            "size": f"{side} pixels, {batch} images",
            "busy": results["busy"],
        }  # kept by later runs
        results["experiments"] |= try_settings(side, batch, *settings)
    elif "experiments" in earlier:
        results["experiments"] = earlier["experiments"]
    print(json.dumps(results, indent=1))
    target.write_text(json.dumps(results, indent=1) + "\n")
    if target == RESULTS:
        renew_page(PAGE, "results", speed_page.draw_results(results).rstrip("\n"))


if __name__ == "__main__":
    main()
