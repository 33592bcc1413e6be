"""TensorFlow's train step on this machine: only ops that TPUs run, and compiled by XLA it trains."""

import importlib.metadata
import importlib.util
import re
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
from benchmarks.tpu.recipe import build_model, load_recipe, load_size

HOST_CALLS = re.compile("PyFunc|HostCompute|OutsideCompilation|Outfeed|Infeed|^Print|Summary")


def load_tpu_ops():
    """Reads the names of ops that TensorBoard's graph view knows to run on TPUs, from its JavaScript.

    Returns:
        Set of str.

    Raises:
        ImportError: TensorBoard is not installed.
        ValueError: this version has no such list, or keeps it elsewhere.
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


def plant_rotation(model, side):
    """Puts a layer in front of a model that no TPU can run."""
    import keras

    images = keras.Input((side, side, 1))
    return keras.Model(images, model(keras.layers.RandomRotation(0.02)(images)))


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
        Dict: `ops`, their number; `kinds`, the number of their kinds; and sorted lists of names of ops `outside` of the
        known ones, with outputs of a `dynamic` shape, and that call the `host`.
    """
    graphs = [graph] + [function.graph for function in graph._functions.values() if hasattr(function, "graph")]
    ops = [op for graph in graphs for op in graph.get_operations()]
    outputs = [out for op in ops for out in op.outputs if not out.shape.is_fully_defined()]
    kinds = {op.type for op in ops}
    return {
        "ops": len(ops),
        "kinds": len(kinds),
        "outside": sorted(kinds - known),
        "dynamic": sorted({out.op.type for out in outputs if not _is_scratch(out)}),
        "host": sorted(kind for kind in kinds if HOST_CALLS.search(kind)),
    }


def _is_scratch(tensor):
    """Recognizes cuDNN's scratch, or zeros like it: its shape is unknown, and what XLA compiles has none of it."""
    source = tensor.op.inputs[0] if tensor.op.type == "ZerosLike" else tensor
    return source.op.type == "FusedBatchNormV3" and source.value_index == 5


def check_graph(size, shallow=False):
    """Part `graph`: finds no op that a TPU cannot run, and finds a planted one."""
    import tensorflow as tf

    known = load_tpu_ops()
    recipe, side, batch = load_size(size)
    model = build_model(recipe, shallow=shallow)
    found = inspect_graph(make_step(model).get_concrete_function(*make_specs(side, batch)).graph, known)
    for kind in ("outside", "dynamic", "host"):
        assert not found[kind], f"the train step has ops that no TPU runs ({kind}): {found[kind]}"
    planted = plant_rotation(model, side)
    forward = tf.function(partial(planted, training=True)).get_concrete_function(make_specs(side, batch)[0])
    caught = inspect_graph(forward.graph, known)["outside"]
    assert caught, "RandomRotation was planted in the model and not found"
    return found | {"known": len(known), "planted rotation found by": caught}


def check_jit(shallow=False):
    """Part `jit`: the step compiles and trains. Small: this CPU takes minutes for a TPU's milliseconds."""
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
