"""The real TPU compiler, which needs no TPU: does it take the train step, and does that fit the memory of a core?"""

import math
import re
import time
from pathlib import Path

import numpy as np
from benchmarks.tpu.recipe import build_model, load_size
from benchmarks.tpu.steps import make_specs, make_step

from helpers.training import CHIPS

TOPOLOGIES = {"v5e-1": "v5e:1x1", "v5e-8": "v5e:2x4", "v3-8": "v3:2x2"}  # the compiler's names of the machines


def describe_devices(name):
    """Returns the devices of a machine that is not there, for the compiler."""
    from jax.experimental import topologies

    bounds = {"chips_per_host_bounds": (1, 1, 1)} if CHIPS[name].n_cores == 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[name], **bounds).devices


def compile_jax_step(size, name):
    """Part `jax`: compiles the step of one global batch, images shared out among the cores, weights on each."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    recipe, side, batch = load_size(size)
    chips, model = CHIPS[name], build_model(recipe)
    n_classes = model.output_shape[-1]
    devices = describe_devices(name)
    assert len(devices) == chips.n_cores
    mesh = Mesh(np.array(devices), ("batch",))

    def describe(shape, dtype="float32", spec=()):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    data = (describe((batch, side, side, 1), spec=("batch",)), describe((batch, n_classes), spec=("batch",)), None)
    zeros = [np.zeros((1, *part.shape[1:]), "float32") for part in data[:2]]
    model._symbolic_build(data_batch=(*zeros, None))  # makes the metrics, as `fit` does
    groups = [model.trainable_variables, model.non_trainable_variables, model.optimizer.variables]
    state = [[describe(v.shape, v.dtype) for v in group] for group in [*groups, model.metrics_variables]]
    clocks = _read_clocks()
    executable = jax.jit(model.train_step, donate_argnums=0).lower(tuple(state), data).compile()
    result = describe_executable(executable.memory_analysis(), executable.cost_analysis(), chips, clocks)
    return {"side": side, "batch": batch, "cores": chips.n_cores} | result | count_all_reduces(executable.as_text())


def compile_precisions(name):
    """Part `precision`: one convolution, in the ways that a number and JAX's precision can be chosen.

    Returns:
        Dict: `cycles` that the compiler estimates, by type and precision: what JAX does by default, or "highest".
    """
    import jax

    one_core, cycles = jax.sharding.SingleDeviceSharding(describe_devices(name)[0]), {}
    for dtype in ("bfloat16", "float32"):
        arrays = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=one_core) for shape in ((32, 28, 28, 128), (3, 3, 128, 128))
        ]
        for precision in (None, "highest"):
            convolve = lambda x, w, p=precision: jax.lax.conv_general_dilated(  # noqa: E731
                x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=p
            )
            text = jax.jit(convolve).lower(*arrays).compile().as_text()
            found = re.findall(r'estimated_cycles":"(\d+)"', text)
            cycles[f"{dtype}, {precision or 'default'}"] = sum(map(int, found))
    return {"cycles": cycles}


def count_all_reduces(text):
    """Counts what the cores of a compiled step add up between them.

    Args:
        text: the compiled program, as XLA writes it.

    Returns:
        Dict: `all-reduces`, the operations that send, and `bytes summed`, of the arrays that they give.
    """
    sent = re.findall(r"= (.+?) all-reduce(?:-start)?\(", text)
    arrays = [found for shapes in sent for found in re.findall(r"\b[a-z]+(\d+)\[([\d,]*)\]", shapes)]
    sizes = [int(bits) // 8 * math.prod(int(side) for side in sides.split(",") if side) for bits, sides in arrays]
    return {"all-reduces": len(sent), "bytes summed": sum(sizes)}


def lower_tensorflow_step(size, path):
    """Writes TensorFlow's step, of the whole batch on one core, as StableHLO that the TPU compiler takes."""
    recipe, side, batch = load_size(size)
    step, specs = make_step(build_model(recipe, jit_compile=True)), make_specs(side, batch)
    # `mhlo.copy` only keeps a value apart, and JAX knows no such dialect; the barrier does the same.
    text = step.experimental_get_compiler_ir(*specs)(stage="stablehlo")
    Path(path).write_text(text.replace("mhlo.copy", "stablehlo.optimization_barrier"), encoding="utf-8")
    return {"side": side, "batch": batch}


def compile_text(path, name):
    """Compiles StableHLO for one core of a machine. No public function of JAX takes such text."""
    from jax._src import compiler
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jax._src.lib.mlir import ir

    chips, devices = CHIPS[name], describe_devices(name)
    clocks = _read_clocks()
    with mlir.make_ir_context():
        module = ir.Module.parse(Path(path).read_text(encoding="utf-8"))
        options = compiler.get_compile_options(num_replicas=1, num_partitions=1)
        some = xla_client.DeviceList(tuple(devices[:1]))
        executable = compiler.backend_compile_and_load(devices[0].client, module, some, options, [])
    return describe_executable(executable.get_compiled_memory_stats(), executable.cost_analysis(), chips, clocks)


def describe_executable(memory, cost, chips, clocks):
    """Reports what a compiled step takes.

    Args:
        memory: the compiler's memory statistics, in bytes of one core.
        cost: the compiler's cost analysis of one core, a dict or a list of one.
        chips: `Chips` that the step was compiled for.
        clocks: array of the wall clock and the CPU clock before compiling, in seconds.

    Raises:
        AssertionError: the step does not fit the memory of a core.
    """
    seconds, cpu_seconds = (_read_clocks() - clocks).round(1).tolist()
    cost = cost[0] if isinstance(cost, list) else cost
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    held += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    assert held <= chips.memory, f"{held:,} bytes a core, but {chips.kind} has {chips.memory:,.0f}"
    return {
        "compile seconds": seconds,
        "compile cpu seconds": cpu_seconds,  # the same on a machine that does other things as well
        "bytes held": int(held),
        "share of memory": round(held / chips.memory, 3),
        "flops": float(cost["flops"]),
        "bytes moved": float(cost["bytes accessed"]),
    }


def _read_clocks():
    return np.array([time.perf_counter(), time.process_time()])
