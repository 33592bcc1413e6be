"""Trains on JAX as notebook 2 does on an accelerator and answers commands: a process of `gpu_step.py`.

Commands as in `keras_step.py`. Each step gets its images from the host, as in training.

Usage: jax_step.py SETUP, a JSON object of `side`, `batch` and `steps`, the steps that run between two looks of Python.
"""

import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "notebooks"), str(ROOT)]
os.environ |= {"KERAS_BACKEND": "jax", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # others use the device beside it
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import keras
import numpy as np
import tensorflow as tf
from benchmarks.tpu import recipe as notebook_2

from helpers.training import count_layers


def main():
    """Builds, takes the first steps, which compile, and answers until there is no more to read."""
    setup = json.loads(sys.argv[1])
    side, batch, rng = setup["side"], setup["batch"], np.random.default_rng(0)
    model = notebook_2.build_model(notebook_2.load_recipe("full"), fused=False, jit_compile=True)
    model.steps_per_execution = setup["steps"]
    # `fit` ends by putting the averages into the weights; on JAX they then share memory that the next `fit` frees.
    model.optimizer.finalize_variable_values = lambda variables: None
    images = rng.integers(0, 256, (batch, side, side, 1)).astype("float32")
    data = tf.data.Dataset.from_tensors((images, rng.integers(0, 2, (batch, 14)).astype("float32"))).repeat()

    def time_steps(calls):
        steps = calls * setup["steps"]
        started, worked = time.perf_counter(), time.process_time()
        logs = model.fit(data.take(steps).prefetch(2), verbose=0).history
        seconds, cpu = time.perf_counter() - started, time.process_time() - worked
        return {"seconds": seconds / steps, "cpu": cpu / steps, "loss": logs["loss"][-1]}

    def measure_peak(size=8192, times=20):
        matrix = jax.random.normal(jax.random.key(0), (size, size), "bfloat16")
        multiply = jax.jit(jax.numpy.matmul)
        multiply(matrix, matrix).block_until_ready()
        started = time.perf_counter()
        for _ in range(times):
            product = multiply(matrix, matrix)
        product.block_until_ready()
        return 2 * size**3 * times / (time.perf_counter() - started)

    started = time.perf_counter()
    time_steps(2)
    about = {
        "forward": int(count_layers(model, side)["flops"].sum()),
        "versions": f"jax {jax.__version__}, keras {keras.__version__}",
        "device": str(jax.devices()[0].device_kind),
        "compiled_in_seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(about), flush=True)
    commands = {"steps": time_steps, "peak": measure_peak}
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(commands[name](*arguments)), flush=True)


if __name__ == "__main__":
    main()
