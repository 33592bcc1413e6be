"""What shows, without a TPU, that training starts on one: the cheap parts of `make tpu-check`."""

import importlib.util
import json
from dataclasses import replace
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from benchmarks.tpu import check, compiler, recipe, replicas, roofline, steps

from helpers.training import CHIPS

LIMIT = 900  # seconds for a process; it takes half a minute on 2 idle cores
needs_tensorboard = pytest.mark.skipif(
    not importlib.util.find_spec("tensorboard"), reason="needs TensorBoard, whose list of TPU ops is used"
)


@pytest.fixture
def keeps_precision():
    """Undoes the change of Keras's precision that building notebook 2's network makes."""
    policy = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(policy)


def inspect(function, *specs, known=()):
    return steps.inspect_graph(tf.function(function).get_concrete_function(*specs).graph, set(known))


@needs_tensorboard
def test_the_list_of_tpu_ops_is_found():
    known = steps.load_tpu_ops()
    assert len(known) > 400 and {"Conv2D", "FusedBatchNormGradV3", "AssignVariableOp"} <= known
    assert not {"ImageProjectiveTransformV3", "DecodePng", "EagerPyFunc"} & known


@needs_tensorboard
@pytest.mark.slow
def test_train_step_has_tpu_ops_only_and_a_planted_rotation_is_caught(keeps_precision):
    found = steps.check_graph("small", shallow=True)
    assert found["ops"] > 1000 and found["kinds"] > 40
    assert found["outside"] == found["dynamic"] == found["host"] == []
    assert found["planted rotation found by"] == ["ImageProjectiveTransformV3"]


def test_ops_are_found_in_called_functions_too():
    scalar = tf.TensorSpec(())
    branches = inspect(lambda x: tf.cond(x > 0, lambda: tf.sin(x), lambda: tf.cos(x)), scalar, known=["Cos"])
    assert "Sin" in branches["outside"] and "Cos" not in branches["outside"]


def test_dynamic_shapes_and_calls_to_the_host_are_found():
    row = tf.TensorSpec((4,))
    assert inspect(lambda x: tf.boolean_mask(x, x > 0), row)["dynamic"]
    assert not inspect(lambda x: x + 1, row)["dynamic"]
    assert inspect(lambda x: tf.py_function(tf.sin, [x], tf.float32), row)["host"] == ["EagerPyFunc"]
    assert inspect(lambda x: tf.numpy_function(np.sin, [x], tf.float32), row)["host"] == ["PyFunc"]
    assert not inspect(lambda x: x + 1, row)["host"]


@pytest.mark.slow
def test_keras_keeps_compiling_and_the_compiled_step_trains(keeps_precision):
    found = steps.check_jit(shallow=True)
    assert found["jit_compile"] is True and np.isfinite(found["loss"])


@pytest.mark.slow
def test_two_devices_train_as_one(packed):
    """Under TensorFlow; the tests of `fit_resumable` have several devices and hosts on JAX."""
    found = check.run_step("mirrored", str(packed.folder), 2, limit=LIMIT)
    assert found["devices"] == 2 and all(0 <= auc <= 1 for auc in found["val_auc"])
    assert found["loss"][-1] < found["loss"][0]
    assert max(found["largest differences"].values()) < 5e-3
    assert {"python", "keras", "tensorflow"} <= set(found["versions"])


def test_devices_that_differ_are_caught():
    one = {"loss": [0.7, 0.6], "val_auc": [0.7, 0.8]}
    assert replicas.compare_devices(one, one) == {"loss": 0, "val_auc": 0}
    for key in one:
        with pytest.raises(AssertionError, match=key):
            replicas.compare_devices(one, one | {key: np.add(one[key], 0.01)})


def test_a_step_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"the step huge failed \(1\)[\s\S]*KeyError: 'huge'"):
        check.run_step("huge", environment={}, limit=LIMIT)


def test_roofline_is_bound_by_the_slower_of_arithmetic_and_memory(monkeypatch):
    machine = replace(CHIPS["v5e-1"], n_cores=2, flops=1e12, bandwidth=1e11)
    monkeypatch.setitem(CHIPS, "none", machine)
    step = {"batch": 100, "flops": 2e12, "bytes moved": 1e11}
    row = roofline.compute_roofline("none", step, images_per_second_per_cpu=20)
    assert (row["compute"], row["memory"], row["binds"]) == (50, 100, "compute")
    assert (row["best"], row["cpus for best"], row["cpus for peak"]) == (50, 2.5, 2.5)
    row = roofline.compute_roofline("none", step | {"bytes moved": 4e11}, images_per_second_per_cpu=20)
    assert (row["best"], row["binds"], row["cpus for best"], row["cpus for peak"]) == (25, "memory", 1.25, 2.5)


@pytest.mark.parametrize("size", recipe.SIZES)
def test_sizes_are_those_of_the_notebook(size):
    found, side, batch = recipe.load_size(size)
    assert (side, batch) == ((64, 16) if size == "small" else (found["IMAGE_SIZE"], found["BATCH_SIZE"]))
    assert batch % 8 == 0  # every core of the machines gets as many
    assert found["make_optimizer"](1e-3, 3).weight_decay == found["WEIGHT_DECAY"]


def test_all_reduces_are_counted_with_their_bytes():
    text = """
  %sum.1 = f32[64]{0:T(128)} all-reduce(f32[64]{0:T(128)} %part), channel_id=1, to_apply=%add
  %sum.2 = (bf16[8,4]{1,0:T(8,128)(2,1)}, f32[]{:T(128)}) all-reduce-start(%a, %b), channel_id=2, to_apply=%add
  %done = f32[8]{0} all-reduce-done(%sum.2)
  ROOT %use = f32[64]{0} add(%sum.1, %all-reduce.7)
"""
    assert compiler.count_all_reduces(text) == {"all-reduces": 2, "bytes summed": 4 * 64 + 2 * 8 * 4 + 4}


def test_a_step_that_does_not_fit_is_refused():
    sizes = dict.fromkeys(["argument", "output", "alias", "temp", "generated_code"], 2**30)
    memory = SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})
    cost = [{"flops": 1.0, "bytes accessed": 2.0}]
    held = compiler.describe_executable(memory, cost, CHIPS["v5e-1"], np.zeros(2))["bytes held"]
    assert held == 3 * 2**30  # the output takes the place of the arguments
    memory.temp_size_in_bytes = 15 * 2**30
    with pytest.raises(AssertionError, match="bytes a core"):
        compiler.describe_executable(memory, cost, CHIPS["v5e-1"], np.zeros(2))


def test_the_page_shows_the_committed_results():
    results = json.loads(check.RESULTS.read_text(encoding="utf-8"))
    tables = check.draw_tables(results)
    assert tables in check.PAGE.read_text(encoding="utf-8")
    assert "not run: no TPU was available" in tables
