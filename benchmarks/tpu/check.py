"""Does the training of notebook 2 start on a TPU? Checks everything that can be known without one.

Usage: check.py [--size small|full|best] [--parts PART ...] [--chips NAME] [--tpu-python PYTHON]

The parts, each in a process of its own, since each needs its own backend, devices or environment:
  graph      TensorFlow's train step: no op outside TensorBoard's TPU list, no dynamic shape, no call to the host
  jit        that step compiled by XLA and run on this CPU; Keras has not switched compilation off
  mirrored   four logical CPUs under tf.distribute.MirroredStrategy, compared with one
  parallel   four logical CPUs under keras.distribution.DataParallel on JAX, compared with one
  jax        the step on JAX, compiled by the real TPU compiler for each machine of `helpers.training.CHIPS`
  stablehlo  TensorFlow's step, compiled by the real TPU compiler
  precision  what a TPU makes of float32, by the real TPU compiler
Results go to benchmarks/results/tpu_check.json, and from there into the tables of docs/tpu.md.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "tpu_check.json"
PAGE = ROOT / "docs" / "tpu.md"
if __name__ == "__main__":
    sys.path[:1] = [str(ROOT / "notebooks"), str(ROOT)]  # in place of this folder

from benchmarks.tpu import compiler, replicas, steps
from benchmarks.tpu.page import draw_tables
from benchmarks.tpu.recipe import SIZES
from benchmarks.workers.renew_page import renew_page

from helpers.training import CHIPS

DEVICES_OF_JAX = f"--xla_force_host_platform_device_count={replicas.N_DEVICES}"
PARTS = {  # environment of each part; those of the TPU compiler run in an environment of their own
    "graph": {"KERAS_BACKEND": "tensorflow"},
    "jit": {"KERAS_BACKEND": "tensorflow"},
    "mirrored": {"KERAS_BACKEND": "tensorflow"},
    "parallel": {"KERAS_BACKEND": "jax", "XLA_FLAGS": DEVICES_OF_JAX},
    "jax": {"KERAS_BACKEND": "jax"},
    "stablehlo": {"KERAS_BACKEND": "tensorflow"},
    "precision": {"KERAS_BACKEND": "jax"},
}
TPU_COMPILER = {  # no chip is looked for, and none is waited for
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
STEPS = {  # what a process of its own can run; most are the parts themselves
    "graph": steps.check_graph,
    "jit": steps.check_jit,
    "study": lambda file: {"folder": str(replicas.make_study(Path(file)))},
    "mirrored": replicas.check_mirrored,
    "parallel": replicas.check_parallel,
    "jax": compiler.compile_jax_step,
    "stablehlo": compiler.lower_tensorflow_step,
    "text": compiler.compile_text,
    "precision": compiler.compile_precisions,
}


def run_step(step, *arguments, python=sys.executable, environment=None, limit=3600):
    """Runs a step of `STEPS` in a process of its own.

    Args:
        step: name in `STEPS`.
        *arguments: of its function; what JSON can hold.
        python: path of the interpreter.
        environment: dict of variables; None for those of `PARTS`.
        limit: int, seconds after which the process is killed.

    Returns:
        Dict of what it found, with `part seconds` and `versions`.

    Raises:
        RuntimeError: the step failed; the message ends with its output.
        subprocess.TimeoutExpired: it took longer than `limit`.
    """
    silent = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    started = time.perf_counter()
    done = subprocess.run(
        [str(python), __file__, "--step", json.dumps([step, *arguments])],
        env=os.environ | silent | (PARTS[step] if environment is None else environment),
        capture_output=True,
        text=True,
        timeout=limit,
    )
    if done.returncode:
        raise RuntimeError(f"the step {step} failed ({done.returncode}):\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"part seconds": round(time.perf_counter() - started, 1)}


def list_versions(step):
    """Returns the versions of Python and of the packages that this process has used, as a dict."""
    loaded = {name.replace("_", "-") for name in importlib.metadata.packages_distributions() if name in sys.modules}
    loaded |= {"graph": {"tensorboard"}, "jax": {"libtpu"}, "text": {"libtpu"}, "precision": {"libtpu"}}.get(
        step, set()
    )
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("tensorflow", "tensorflow-cpu", "tensorboard", "keras", "jax", "libtpu"):
        if package.removesuffix("-cpu") in loaded:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
    return versions


def run_parts(parts, size, tpu_python, chips):
    """Runs parts one after the other; yields the keys under which each result is filed, and the result."""
    on_compiler = {"python": tpu_python, "environment": PARTS["jax"] | TPU_COMPILER}
    with tempfile.TemporaryDirectory() as folder:
        study = None
        for part in parts:
            if part == "jax":
                for name in chips:
                    yield (part, size, name), run_step(part, size, name, **on_compiler)
            elif part == "stablehlo":
                text = str(Path(folder) / "step.mlir")
                traced = run_step(part, size, text)
                compiled = run_step("text", text, "v5e-1", **on_compiler)
                yield (part, size, "v5e-1"), traced | compiled | {"traced by": traced["versions"]}
            elif part == "precision":
                yield (part,), run_step(part, "v5e-1", **on_compiler)
            elif part in ("mirrored", "parallel"):
                study = study or run_step("study", folder, environment=PARTS["graph"])["folder"]
                yield (part,), run_step(part, study)
            else:
                yield (part,), run_step(part, *(["small"] if part == "graph" else []))


def parse_arguments(words=None):
    """Returns the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="small", choices=list(SIZES))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), metavar="PART")
    parser.add_argument("--tpu-python", default=ROOT / ".venv" / "tpu" / "bin" / "python", type=Path)
    parser.add_argument("--chips", choices=list(CHIPS), help="compile for this machine only")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main():
    """Runs the parts, prints what they found, and writes it."""
    arguments = parse_arguments()
    if arguments.step:
        step, *given = json.loads(arguments.step)
        found = STEPS[step](*given)
        print(json.dumps(found | {"versions": list_versions(step)}))
        return
    from helpers.runtime import write_json

    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results |= {"what": "compiled, not run: no TPU was available", "date": str(date.today())}
    results |= {"machine": f"a machine of {os.cpu_count()} cores"}
    chips = [arguments.chips] if arguments.chips else list(CHIPS)
    for keys, result in run_parts(arguments.parts, arguments.size, arguments.tpu_python, chips):
        print(" ".join(keys), json.dumps(result, indent=1), flush=True)
        *outer, last = keys
        place = results
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = result
        write_json(RESULTS, results)
    renew_page(PAGE, "results", draw_tables(results))
    print(draw_tables(results))


if __name__ == "__main__":
    main()
