"""Does the training of notebook 2 start on a TPU? Everything that can be known of it without one.

Usage: tpu_check.py [--size small|full] [--parts PART ...] [--chips NAME] [--tpu-python PYTHON] [--study FOLDER]

The parts, each in a process of its own, since each needs its own backend, devices or environment:
  graph      TensorFlow's train step: no op outside TensorBoard's TPU list, no dynamic shape, no call to the host
  jit        that step compiled by XLA and run on this CPU; Keras has not switched compilation off
  mirrored   four logical CPUs under tf.distribute.MirroredStrategy against one
  parallel   four logical CPUs under keras.distribution.DataParallel on JAX against one
  jax        the step on JAX, compiled by the real TPU compiler for each of CHIPS
  stablehlo  TensorFlow's step, compiled by the real TPU compiler
Results go to benchmarks/results/tpu_check.json, and from there into the tables of docs/tpu.md.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
from renew_page import renew_page

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "02_train_densenet121.ipynb"
RESULTS = ROOT / "benchmarks" / "results" / "tpu_check.json"
PAGE = ROOT / "docs" / "tpu.md"
sys.path.insert(0, str(ROOT / "notebooks"))

N_DEVICES = 4  # logical CPUs
SIZES = {"small": (64, 16), "full": None}  # side in pixels and global batch; full: what the notebook trains with
HOST_CALLS = re.compile("PyFunc|HostCompute|OutsideCompilation|Outfeed|Infeed|^Print|Summary")
PARTS = {  # environment of each part; those of the TPU compiler run in an environment of their own
    "graph": {"KERAS_BACKEND": "tensorflow"},
    "jit": {"KERAS_BACKEND": "tensorflow"},
    "mirrored": {"KERAS_BACKEND": "tensorflow"},
    "parallel": {"KERAS_BACKEND": "jax", "XLA_FLAGS": f"--xla_force_host_platform_device_count={N_DEVICES}"},
    "jax": {"KERAS_BACKEND": "jax"},
    "stablehlo": {"KERAS_BACKEND": "tensorflow"},
}
TPU_COMPILER = {  # no chip is looked for, and none is waited for
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclass(frozen=True)
class Chips:
    """One kind of TPU machine; figures of one core, of which XLA sees `n_cores`.

    Attributes:
        topology: its name for the compiler.
        n_cores: int.
        flops: float, peak bfloat16 operations per second of a core.
        bandwidth: float, bytes per second between a core and its high-bandwidth memory.
        memory: float, bytes of high-bandwidth memory of a core.
        host_cpus: int, virtual CPUs of the machine that feeds it; None where Google names no number.
    """

    topology: str
    n_cores: int
    flops: float
    bandwidth: float
    memory: float
    host_cpus: int | None


# Google's documentation, https://cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB and 819 GB/s a chip of one core,
# hosts of 24 and 224 virtual CPUs. https://cloud.google.com/tpu/docs/v3: 123 TFLOP/s, 32 GiB and 900 GB/s a chip of
# two cores, and no number of CPUs for their hosts.
CHIPS = {
    "v5e-1": Chips("v5e:1x1", 1, 197e12, 819e9, 16e9, 24),
    "v5e-8": Chips("v5e:2x4", 8, 197e12, 819e9, 16e9, 224),
    "v3-8": Chips("v3:2x2", 8, 61.5e12, 450e9, 16 * 2**30, None),
}


# The model and the step, as notebook 2 makes them


def load_recipe(profile="full"):
    """Takes settings and optimizer out of notebook 2, so that what is checked is what is trained.

    Returns:
        Dict of the settings of `profile` with the recipe "ours", and `make_optimizer(peak, n_epochs)`.
    """
    import keras

    from helpers.runtime import choose_settings

    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    settings = next(cell for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    optimizer = next(cell for cell in cells if "".join(cell["source"]).startswith("def make_optimizer"))
    recipe = {"keras": keras, "steps_per_epoch": 100}
    exec("".join(settings["source"]), recipe)
    recipe |= choose_settings(recipe, profile, "ours")
    exec("".join(optimizer["source"]), recipe)
    return recipe


def build_model(recipe, *, shallow=False, frozen_statistics=False, fused=True, jit_compile="auto"):
    """Builds and compiles the model of notebook 2 from random weights.

    Args:
        recipe: from `load_recipe`.
        shallow: whether to leave one layer in each dense block: the same kinds of layers, an eighth of their number.
        frozen_statistics: whether batch normalization keeps the statistics that it has.
        fused: whether batch normalization is TensorFlow's fused operation, as in notebook 2, or Keras's.
        jit_compile: as in `keras.Model.compile`.
    """
    import keras

    from helpers.training import build_densenet121, fuse_batch_norm, make_loss

    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(recipe["PRECISION"])
    model = build_densenet121(
        batch_norm_momentum=recipe["BATCH_NORM_MOMENTUM"],
        output_stride=recipe["OUTPUT_STRIDE"],
        blocks=[1, 1, 1, 1] if shallow else recipe["BLOCKS"],
    )
    model = fuse_batch_norm(model) if fused else model
    for layer in model.layers:
        layer.trainable = not (frozen_statistics and isinstance(layer, keras.layers.BatchNormalization))
    labels = np.random.default_rng(0).random((200, model.output_shape[-1])) < 0.1
    optimizer = recipe["make_optimizer"](recipe["LEARNING_RATE"], recipe["EPOCHS"])
    model.compile(optimizer, make_loss(recipe["LOSS"], labels.astype("float32")), jit_compile=jit_compile)
    model.optimizer.build(model.trainable_variables)
    return model


def plant_rotation(model, side):
    """Puts a layer in front of a model that no TPU can run."""
    import keras

    images = keras.Input((side, side, 1))
    return keras.Model(images, model(keras.layers.RandomRotation(0.02)(images)))


def count_forward_flops(model, side):
    """Counts the operations of an image's forward pass: two for each multiplication of convolutions and dense layers."""
    import keras

    layers = [layer for layer in model.layers if hasattr(layer, "kernel")]
    outputs = keras.Model(model.inputs, [layer.output for layer in layers])
    shapes = outputs.compute_output_shape((1, side, side, 1))
    return sum(
        2 * np.prod(layer.kernel.shape) * np.prod(shape[1:-1]) for layer, shape in zip(layers, shapes, strict=True)
    )


def choose_size(name, recipe):
    """Returns side in pixels and global batch of a size."""
    return SIZES[name] or (recipe["IMAGE_SIZE"], recipe["BATCH_SIZE"])


# TensorFlow's graph


def load_tpu_ops():
    """Reads the names of ops that TensorBoard's graph view knows to run on TPUs, out of its JavaScript.

    Returns:
        Set of str.

    Raises:
        ImportError: TensorBoard is not installed.
        ValueError: this version keeps its list elsewhere.
    """
    found = importlib.util.find_spec("tensorboard")
    if found is None:
        raise ImportError("TensorBoard, whose list of TPU ops is used, is not installed: pip install tensorboard")
    with zipfile.ZipFile(Path(found.origin).parent / "webfiles.zip") as files:
        script = files.read("index.js").decode()
    found = re.search(r'WHITELIST=\[((?:"\w+",?)+)\]', script)
    if not found:
        raise ValueError(f"TensorBoard {importlib.metadata.version('tensorboard')} has no list of TPU ops.")
    return set(re.findall(r"\w+", found[1]))


def make_step(model):
    """Returns TensorFlow's train step as `fit` compiles it: with XLA, unless Keras has switched that off."""
    import tensorflow as tf

    return tf.function(lambda images, labels: model.train_step((images, labels)), jit_compile=model.jit_compile)


def make_specs(side, batch, n_classes=14):
    """Returns what the step is traced with: static shapes."""
    import tensorflow as tf

    return tf.TensorSpec((batch, side, side, 1)), tf.TensorSpec((batch, n_classes))


def inspect_graph(graph, known):
    """Looks through a traced function and all functions that it calls.

    Args:
        graph: `concrete_function.graph`.
        known: set of names of ops that TPUs run.

    Returns:
        Dict: `ops`, their number; and sorted lists of names of ops `outside` of the known ones, with outputs of a
        `dynamic` shape, and that call the `host`.
    """
    graphs = [graph] + [function.graph for function in graph._functions.values() if hasattr(function, "graph")]
    ops = [op for graph in graphs for op in graph.get_operations()]
    outputs = [out for op in ops for out in op.outputs if not out.shape.is_fully_defined()]
    dynamic = {out.op.type for out in outputs if not _is_scratch(out)}
    kinds = {op.type for op in ops}
    host = {kind for kind in kinds if HOST_CALLS.search(kind)}
    return {
        "ops": len(ops),
        "kinds": len(kinds),
        "outside": sorted(kinds - known),
        "dynamic": sorted(dynamic),
        "host": sorted(host),
    }


def _is_scratch(tensor):
    """Tells cuDNN's scratch, or zeros like it: TensorFlow states no shape, and what XLA compiles has none of it."""
    source = tensor.op.inputs[0] if tensor.op.type == "ZerosLike" else tensor
    return source.op.type == "FusedBatchNormV3" and source.value_index == 5


def check_graph(size, shallow=False):
    """Part `graph`. A planted rotation must be found."""
    import tensorflow as tf

    recipe, known = load_recipe(), load_tpu_ops()
    side, batch = choose_size(size, recipe)
    model = build_model(recipe, shallow=shallow)
    found = inspect_graph(make_step(model).get_concrete_function(*make_specs(side, batch)).graph, known)
    for kind in ("outside", "dynamic", "host"):
        assert not found[kind], f"the train step has ops for no TPU ({kind}): {found[kind]}"
    planted = plant_rotation(model, side)
    forward = tf.function(partial(planted, training=True)).get_concrete_function(make_specs(side, batch)[0])
    caught = inspect_graph(forward.graph, known)["outside"]
    assert caught, "RandomRotation was planted in the model and not found"
    return found | {"known": len(known), "planted rotation found by": caught}


def check_jit(shallow=False):
    """Part `jit`. Small on purpose: this CPU takes minutes for what a TPU does in milliseconds."""
    recipe = load_recipe()
    model = build_model(recipe, shallow=shallow, jit_compile=True)
    assert model.jit_compile is True, "Keras has switched XLA off: a layer of the model does not support it"
    rotating = plant_rotation(model, 32)
    rotating.compile(jit_compile=True)
    assert rotating.jit_compile is False, "Keras has kept XLA on with RandomRotation in the model"
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, (2, 32, 32, 1)).astype("float32")
    labels = (rng.random((2, 14)) < 0.3).astype("float32")
    before = model.get_layer("logits").kernel.numpy()
    step = make_step(model)
    assert step._jit_compile, "the step is not compiled"
    started = time.perf_counter()
    loss = float(step(images, labels)["loss"])
    assert np.isfinite(loss) and (model.get_layer("logits").kernel.numpy() != before).any()
    return {"jit_compile": model.jit_compile, "loss": loss, "compile seconds": round(time.perf_counter() - started, 1)}


# Several devices


def train_briefly(study, scope, folder, *, batch_size=8, epochs=2):
    """Trains the shallow network with notebook 2's callbacks, validates, saves and reloads as it does.

    Two things are made gentler, or rounding would grow into differences. Batch normalization keeps its statistics;
    under TensorFlow each replica would also have its own. And Adam divides by a gradient's own size, which makes whole
    steps of mere rounding; its epsilon is raised to leave them small.

    Args:
        study: a `PackedStudy`; its validation images do not fill the last batch.
        scope: function without arguments that returns the context in which models are built, or None.
        folder: path to write to.
        batch_size: int, images a step over all devices.
        epochs: int.

    Returns:
        Dict: `loss` and `val_auc` of each epoch, and `logits` of the validation images.
    """
    import keras

    from helpers.pipeline import count_steps, make_eval_dataset, make_train_dataset
    from helpers.training import CheckpointStore, TrainingCheckpoint, ValidationAUC, fit_resumable, predict_logits

    def make_train(first_epoch, first_step, epochs):
        return make_train_dataset(
            study, study.side, batch_size, seed=0, epochs=epochs, first_epoch=first_epoch, first_step=first_step
        )

    val_ds, labels = make_eval_dataset(study, "val", batch_size), study.labels("val")
    assert len(labels) % batch_size, "the last validation batch is full, so padding would not be tested"
    steps = count_steps(study, batch_size)
    recipe = load_recipe("quick")
    recipe |= {"EPOCHS": epochs, "steps_per_epoch": steps}
    with scope() or contextlib.nullcontext():
        model, again = (build_model(recipe, shallow=True, frozen_statistics=True) for _ in range(2))
    model.optimizer.epsilon = 1e-3
    validation = ValidationAUC(val_ds, labels)
    callbacks = [validation, keras.callbacks.EarlyStopping("val_auc", mode="max", patience=epochs)]
    store = CheckpointStore(Path(folder) / "state")
    state = TrainingCheckpoint(store, {}, Path(folder) / "history.csv", every=1)
    fit_resumable(
        model,
        state,
        make_train,
        stage="all",
        epochs=epochs,
        steps_per_epoch=steps,
        callbacks=callbacks,
        verbose=0,
    )
    TrainingCheckpoint(store, {}, Path(folder) / "history.csv").restore(again, "all")
    store.close()
    same = all(np.array_equal(a, b) for a, b in zip(model.get_weights(), again.get_weights(), strict=True))
    assert same, "the state does not bring the weights back"
    model.set_weights(validation.best_weights)
    logits = predict_logits(model, val_ds, len(labels))
    weights = Path(folder) / "model.weights.h5"
    keras.Model(model.inputs, model.outputs).save_weights(weights)  # never compiled, so without the optimizer
    keras.Model(again.inputs, again.outputs).load_weights(weights)
    assert np.array_equal(predict_logits(again, val_ds, len(labels)), logits), "reloaded weights predict otherwise"
    return {name: [row[name] for row in state.history] for name in ("loss", "val_auc")} | {"logits": logits}


def compare_devices(one, many, tolerance=1e-3):
    """Returns the largest differences between a run on one device and the same on several.

    Raises:
        AssertionError: one is beyond the tolerance.
    """
    differences = {key: float(np.max(np.abs(np.subtract(one[key], many[key])))) for key in one}
    for key, difference in differences.items():
        assert difference <= tolerance, f"{key}: {one[key]} on one device, {many[key]} on {N_DEVICES}"
    return differences


def check_mirrored(folder):
    """Part `mirrored`."""
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * N_DEVICES)
    strategy = tf.distribute.MirroredStrategy([f"CPU:{number}" for number in range(N_DEVICES)])
    assert strategy.num_replicas_in_sync == N_DEVICES
    return _check_devices(folder, tf.distribute.get_strategy().scope, strategy.scope)


def check_parallel(folder):
    """Part `parallel`."""
    import keras

    devices = keras.distribution.list_devices("cpu")
    assert len(devices) == N_DEVICES, f"JAX shows {len(devices)} devices"
    distribution = keras.distribution.DataParallel(devices=devices)
    many = partial(keras.distribution.set_distribution, distribution)
    return _check_devices(folder, lambda: None, many)


def _check_devices(folder, one, many):
    from helpers.packing import load_packed_study

    study, runs = load_packed_study(folder), []
    for scope in (one, many):
        with tempfile.TemporaryDirectory() as weights:
            runs.append(train_briefly(study, scope, weights))
    found = {"devices": N_DEVICES, "loss": runs[1]["loss"], "val_auc": runs[1]["val_auc"]}
    return found | {"largest differences": compare_devices(*runs)}


def make_study(folder):
    """Packs a small synthetic study, whose validation images do not fill batches of 8; returns its folder."""
    from helpers.packing import pack_study
    from helpers.study import list_images, load_metadata, make_split, match_images, write_synthetic_study

    write_synthetic_study(folder / "phantom", n_images=60, size=64, seed=5, n_workers=1)
    images = list_images(folder / "phantom")
    rows, _ = match_images(load_metadata(folder / "phantom"), images)
    rows["split"] = make_split(rows, folder / "phantom", val_share=0.25)
    pack_study(rows, images, folder / "packed", split_name="official", side=48, shard_images=16)
    return folder / "packed"


# The TPU compiler


def describe_chips(chips):
    """Returns the devices of a machine that is not there."""
    from jax.experimental import topologies

    bounds = {"chips_per_host_bounds": (1, 1, 1)} if chips.n_cores == 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=chips.topology, **bounds).devices


def compile_jax_step(size, name):
    """Part `jax`: compiles the step of one global batch, images dealt to the cores, weights on each."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    recipe, chips = load_recipe(), CHIPS[name]
    side, batch = choose_size(size, recipe)
    model = build_model(recipe)
    n_classes = model.output_shape[-1]
    devices = describe_chips(chips)
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
    counted = 3 * count_forward_flops(model, side) * batch / chips.n_cores
    result = _describe_executable(executable.memory_analysis(), executable.cost_analysis(), chips, clocks)
    return {"side": side, "batch": batch, "cores": chips.n_cores} | result | {"counted flops": float(counted)}


def lower_tensorflow_step(size, path):
    """Writes TensorFlow's step, of the whole batch on one core, as StableHLO that the TPU compiler takes."""
    recipe = load_recipe()
    side, batch = choose_size(size, recipe)
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

    chips = CHIPS[name]
    devices = describe_chips(chips)
    clocks = _read_clocks()
    with mlir.make_ir_context():
        module = ir.Module.parse(Path(path).read_text(encoding="utf-8"))
        options = compiler.get_compile_options(num_replicas=1, num_partitions=1)
        some = xla_client.DeviceList(tuple(devices[:1]))
        executable = compiler.backend_compile_and_load(devices[0].client, module, some, options, [])
    return _describe_executable(executable.get_compiled_memory_stats(), executable.cost_analysis(), chips, clocks)


def _read_clocks():
    return np.array([time.perf_counter(), time.process_time()])


def _describe_executable(memory, cost, chips, clocks):
    seconds, cpu_seconds = (_read_clocks() - clocks).round(1).tolist()
    cost = cost[0] if isinstance(cost, list) else cost
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    held += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    assert held <= chips.memory, f"{held:,} bytes a core, but {chips.topology} has {chips.memory:,.0f}"
    return {
        "compile seconds": seconds,
        "compile cpu seconds": cpu_seconds,  # the same on a machine that does other things as well
        "bytes held": int(held),
        "share of memory": round(held / chips.memory, 3),
        "flops": float(cost["flops"]),
        "bytes moved": float(cost["bytes accessed"]),
    }


# On paper


def draw_roofline(steps, films_per_second_per_cpu):
    """Computes how fast each machine could train at best, and whether its host could keep up.

    Args:
        steps: dict name in `CHIPS` -> dict with `batch` (global), `flops` and `bytes moved` of one core in one step.
        films_per_second_per_cpu: float, what one virtual CPU of a host augments.

    Returns:
        List of dicts, one a machine. `compute` and `memory` are images per second at peak arithmetic and at peak
        bandwidth; the smaller `binds` and is the `best`. `cpus for best` keep up with that, `cpus for peak` with peak
        arithmetic, should the compiler count bytes that stay on the chip.
    """
    rows = []
    for name, step in steps.items():
        chips = CHIPS[name]
        compute = step["batch"] * chips.flops / step["flops"]
        memory = step["batch"] * chips.bandwidth / step["bytes moved"]
        best = min(compute, memory)
        rows.append(
            {
                "machine": name,
                "compute": compute,
                "memory": memory,
                "binds": "compute" if compute < memory else "memory",
                "best": best,
                "cpus for best": best / films_per_second_per_cpu,
                "cpus for peak": compute / films_per_second_per_cpu,
                "cpus": chips.host_cpus,
            }
        )
    return rows


def measure_host():
    """Returns images per second that one core augments, from the committed benchmark."""
    bench = json.loads((RESULTS.parent / "input_pipeline.json").read_text(encoding="utf-8"))
    n_cores = int(re.search(r"(\d+) cores", bench["machine"])[1])
    return bench["films_per_second"]["training batches"] / n_cores


# All of it


def run_part(part, *, python=sys.executable, environment=None, limit=3600, **options):
    """Runs a part in a process of its own.

    Args:
        part: name in `PARTS`, or a step of one, see `_run_inside`.
        python: path of the interpreter.
        environment: dict of variables; None for those of `PARTS`.
        limit: int, seconds after which the process is killed.
        **options: handed on: `size`, `study`, `shallow`, `chips`, `file`.

    Returns:
        Dict of what it found, with `part seconds` and `versions`.

    Raises:
        RuntimeError: the part failed; the message ends with its output.
        subprocess.TimeoutExpired: it took longer than `limit`.
    """
    command = [str(python), __file__, "--inside", part]
    for name, value in options.items():
        if value not in (None, False):
            command += [f"--{name}"] + ([] if value is True else [str(value)])
    silent = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    started = time.perf_counter()
    done = subprocess.run(
        command,
        env=os.environ | silent | (PARTS[part] if environment is None else environment),
        capture_output=True,
        text=True,
        timeout=limit,
    )
    if done.returncode:
        raise RuntimeError(f"the part {part} failed ({done.returncode}):\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"part seconds": round(time.perf_counter() - started, 1)}


def _run_inside(arguments):
    steps = {
        "graph": lambda: check_graph(arguments.size, arguments.shallow),
        "jit": lambda: check_jit(arguments.shallow),
        "study": lambda: {"folder": str(make_study(Path(arguments.file)))},
        "mirrored": lambda: check_mirrored(arguments.study),
        "parallel": lambda: check_parallel(arguments.study),
        "jax": lambda: compile_jax_step(arguments.size, arguments.chips),
        "stablehlo": lambda: lower_tensorflow_step(arguments.size, arguments.file),
        "text": lambda: compile_text(arguments.file, arguments.chips),
    }
    found = steps[arguments.inside]()
    packages = ["tensorflow", "tensorflow-cpu", "tensorboard", "keras", "jax", "libtpu"]
    loaded = {name.replace("_", "-") for name in importlib.metadata.packages_distributions() if name in sys.modules}
    loaded |= {"libtpu"} if arguments.chips else set()
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in packages:
        try:
            used = package.removesuffix("-cpu") in loaded or (package == "tensorboard" and arguments.inside == "graph")
            versions |= {package: importlib.metadata.version(package)} if used else {}
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"versions": versions}


def run_parts(parts, size, tpu_python, chips=CHIPS, study=None):
    """Runs parts one after the other, and yields for each the keys under which its result is filed, and the result."""
    compiler = {"python": tpu_python, "environment": PARTS["jax"] | TPU_COMPILER}
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            if part == "jax":
                for name in chips:
                    yield (part, size, name), run_part(part, size=size, chips=name, **compiler)
            elif part == "stablehlo":
                text = Path(folder) / "step.mlir"
                traced = run_part(part, size=size, file=text)
                compiled = run_part("text", file=text, chips="v5e-1", **compiler)
                yield (part, size, "v5e-1"), traced | compiled | {"traced by": traced["versions"]}
            elif part in ("mirrored", "parallel"):
                if study is None:
                    study = run_part("study", file=folder, environment=PARTS["graph"])["folder"]
                yield (part,), run_part(part, study=study)
            else:
                yield (part,), run_part(part, size="small")


def file_result(results, keys, result):
    """Puts a result into the nested dict of all results."""
    for key in keys[:-1]:
        results = results.setdefault(key, {})
    results[keys[-1]] = result


def draw_tables(results):
    """Returns the tables of docs/tpu.md as Markdown, every figure from the committed results."""
    lines = [
        f"Compiled, not run: no TPU was available. {results['date']}, {results['machine']}.",
        "",
        "| check | found | seconds, all in all |",
        "|---|---|---:|",
    ]
    if "graph" in results:
        graph = results["graph"]
        lines += [
            f"| TensorFlow's train step against TensorBoard's {graph['known']} TPU ops | {graph['ops']:,} ops of "
            f"{graph['kinds']} kinds; outside the list {len(graph['outside'])}, of dynamic shape "
            f"{len(graph['dynamic'])}, calls to the host {len(graph['host'])}; a planted RandomRotation shows as "
            f"{', '.join(graph['planted rotation found by'])} | {graph['part seconds']:.0f} |"
        ]
    if "jit" in results:
        lines += [
            "| that step compiled by XLA for this CPU, and one step run | `jit_compile` stays on; with a planted "
            f"RandomRotation Keras turns it off | {results['jit']['part seconds']:.0f} |"
        ]
    names = {"mirrored": "`MirroredStrategy`, TensorFlow", "parallel": "`DataParallel`, JAX"}
    for part in (part for part in names if part in results):
        found = results[part]
        largest = ", ".join(f"{key} {value:.1e}" for key, value in found["largest differences"].items())
        lines += [
            f"| {found['devices']} logical CPUs under {names[part]}, against one | largest differences: {largest} | "
            f"{found['part seconds']:.0f} |"
        ]
    lines += [
        "",
        "| train step of | size | machine | images a core | CPU seconds to compile | memory a core | of what it has | "
        "operations a core | bytes moved a core |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for part, backend in (("jax", "Keras on JAX"), ("stablehlo", "Keras on TensorFlow")):
        for size in SIZES:
            by_chips = results.get(part, {}).get(size, {})
            for name in (name for name in CHIPS if name in by_chips):
                found = by_chips[name]
                lines += [
                    f"| {backend} | {found['side']} px, batch {found['batch']} | {name} | "
                    f"{found['batch'] // found.get('cores', 1)} | {found['compile cpu seconds']:.0f} | "
                    f"{found['bytes held'] / 2**20:,.0f} MiB | {found['share of memory']:.1%} | "
                    f"{found['flops'] / 1e9:,.0f} G | {found['bytes moved'] / 1e9:.1f} GB |"
                ]
    steps = results.get("jax", {}).get("full")
    if steps:
        host = measure_host()
        lines += [
            "",
            "| machine | films/s at peak arithmetic | at peak bandwidth | at best | what binds | "
            "host: CPUs that keep up with the best | with peak arithmetic | CPUs it has |",
            "|---|---:|---:|---:|---|---:|---:|---:|",
        ]
        for row in draw_roofline({name: steps[name] for name in CHIPS if name in steps}, host):
            lines += [
                f"| {row['machine']} | {row['compute']:,.0f} | {row['memory']:,.0f} | {row['best']:,.0f} | "
                f"{row['binds']} | {row['cpus for best']:.1f} | {row['cpus for peak']:.1f} | "
                f"{row['cpus'] or 'not documented'} |"
            ]
        lines += ["", f"One core of the machine of `input_pipeline.json` augments {host:,.0f} films/s."]
    return "\n".join(lines)


def parse_arguments(words=None):
    """Returns the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="small", choices=list(SIZES))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), metavar="PART")
    parser.add_argument("--tpu-python", default=ROOT / ".venv" / "tpu" / "bin" / "python", type=Path)
    parser.add_argument("--study", help="folder of a packed study for the devices; one is drawn where there is none")
    parser.add_argument("--chips", choices=list(CHIPS), help="compile for this machine only")
    for name in ("inside", "file"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--shallow", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main():
    """Runs the parts, prints what they found, and keeps it."""
    arguments = parse_arguments()
    if arguments.inside:
        print(json.dumps(_run_inside(arguments)))
        return
    from helpers.runtime import write_json

    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results |= {"what": "compiled, not run: no TPU was available", "date": str(date.today())}
    results |= {"machine": f"a machine of {os.cpu_count()} cores"}
    chips = [arguments.chips] if arguments.chips else list(CHIPS)
    for keys, result in run_parts(arguments.parts, arguments.size, arguments.tpu_python, chips, arguments.study):
        print(" ".join(keys), json.dumps(result, indent=1), flush=True)
        file_result(results, keys, result)
        write_json(RESULTS, results)
    renew_page(PAGE, "results", draw_tables(results))
    print(draw_tables(results))


if __name__ == "__main__":
    main()
