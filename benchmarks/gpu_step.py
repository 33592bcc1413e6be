"""How many images a second does notebook 2 train on a GPU, beside the same network in PyTorch and beside its limit?

The full profile's step on JAX, bfloat16 with float32 weights, takes turns with torchvision's DenseNet-121 in PyTorch
under autocast, as written and by torch.compile. Each is a process of its own and waits while the others work. The limit
is the rate at which the same library multiplies two 8192 x 8192 matrices of random bfloat16 numbers.

Usage: gpu_step.py [--sizes 224x128 ...] [--rounds 5] [--steps 20] [--torch-python PATH]
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "notebooks"), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "workers")]

from renew_page import renew_page
from speed_page import draw_gpu
from training_step import PAGE, WORKERS, compare, start, summarize, take_turns

from helpers.runtime import describe_machine

RESULTS = ROOT / "benchmarks" / "results" / "gpu_step.json"
OURS = "Keras on JAX, as notebook 2"
TORCH = {"PyTorch": False, "PyTorch, torch.compile": True}


def measure(side, batch, rounds, steps, torch_python):
    """Returns speeds and ratios at one size."""
    size = {"side": side, "batch": batch}
    jobs = {OURS: (WORKERS / "jax_step.py", size | {"steps": 10})}
    for name, compiled in TORCH.items():
        setup = size | {"layout": "channels_last", "device": "cuda", "compiled": compiled}
        jobs[name] = WORKERS / "torch_step.py", setup, torch_python
    workers, failed = start(jobs, limit=400)
    try:
        if OURS in failed:
            raise SystemExit(f"{OURS} did not train: {failed[OURS]}")
        per_call = {name: steps // 10 if name == OURS else steps for name in workers}
        take_turns(workers, rounds, per_call)
        about = workers[OURS].about
        found = {"failed": failed, "device": about["device"], "compiled_in_seconds": about["compiled_in_seconds"]}
        found["versions"] = sorted({worker.about["versions"] for worker in workers.values()})
        found["gigaflop_per_image"] = round(3e-9 * about["forward"], 2)
        found["speeds"] = summarize(workers, batch, 3 * about["forward"])
        found["ratios"] = {
            f"{OURS} / {name}": compare(workers[OURS], worker) for name, worker in workers.items() if name != OURS
        }
        return found
    finally:
        for worker in workers.values():
            worker.close()


def main():
    """Measures, prints what it found, and writes benchmarks/results/gpu_step.json and docs/speed.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["224x128"], help="pixels and images of a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="steps of each in a round")
    parser.add_argument("--torch-python", default=sys.executable, help="has torch and torchvision with CUDA")
    parser.add_argument("--target", default=str(RESULTS))
    arguments = parser.parse_args()
    results = {"machine": describe_machine(), "sizes": {}}
    for text in arguments.sizes:
        side, batch = map(int, text.split("x"))
        found = measure(side, batch, arguments.rounds, arguments.steps, arguments.torch_python)
        results["sizes"][f"{side} pixels, {batch} images"] = found
        print(json.dumps(found, indent=1), flush=True)
        Path(arguments.target).write_text(json.dumps(results, indent=1) + "\n")
    if arguments.target == str(RESULTS):
        renew_page(PAGE, "gpu", draw_gpu(results))


if __name__ == "__main__":
    main()
