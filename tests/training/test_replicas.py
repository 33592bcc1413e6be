"""Several replicas train as one device does: equal curves, equal variables, and the same where a run was in parts.

That what is saved is what was measured is tested with the notebooks: tests/notebooks/test_device_chains.py.
"""

import json
import subprocess
import sys
from types import SimpleNamespace

import keras
import numpy as np
import pandas as pd
import pytest
import resumable_run
from parts_of_runs import finish, outcome, start, train

from helpers.runtime import connect_devices

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_replicas_follow_the_curve_of_one_device_and_resume_to_the_bit(packed, tmp_path, backend):
    """Batch normalization is trained, weights are averaged, and every callback is on; only rounding differs.

    Paused within an epoch and resumed, nothing differs.
    """
    pytest.importorskip(backend)
    folders = [tmp_path / name for name in ("one", "four", "parts")]
    options = {"epochs": 4, "dropout": 0}
    several, pause = options | {"replicas": 4}, {"seconds": 0.01}
    runs = [(folders[1], several), (folders[2], several | pause), (folders[2], several), (folders[0], options)]
    finish(start(packed, *runs, backend=backend))
    one, four, parts = (json.loads((folder / "outcome.json").read_text()) for folder in folders)
    assert four["equal on devices"] and parts == four
    columns = ["loss", "val_auc", "val_loss", "learning_rate"]
    np.testing.assert_allclose(*(pd.DataFrame(found["history"])[columns] for found in (four, one)), rtol=5e-5)


def test_replicas_that_differ_are_caught_and_all_skip_a_step_of_which_one_has_no_finite_gradients():
    """The check itself can fail: variables that were assigned apart are not equal. And loss scaling looks at all."""
    code = """
import sys
sys.path[:0] = sys.argv[1:]
from types import SimpleNamespace
from helpers.runtime import connect_devices
devices = connect_devices(SimpleNamespace(name="cpu", chips=0), 2)
import keras, tensorflow as tf
from benchmarks.tpu.replicas import is_equal_on_devices
with devices.scope():
    layer = keras.layers.BatchNormalization()
    layer.build((None, 4))
print(all(is_equal_on_devices(variable) for variable in layer.variables))
devices.strategy.run(lambda: layer.moving_mean.assign(
    tf.zeros(4) + tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.float32)))
print(all(is_equal_on_devices(variable) for variable in layer.variables))

from helpers.training.optimizer import LossScaleOptimizer
with devices.scope():
    weight, optimizer = keras.Variable([1.0]), LossScaleOptimizer(keras.optimizers.SGD(1.0))
    optimizer.build([weight])

@tf.function
def step(broken):
    number = tf.distribute.get_replica_context().replica_id_in_sync_group
    optimizer.apply([tf.where(number == broken, float("inf"), [2.0**13])], [weight])

for broken in (1, 0, 2):  # the last has no replica
    devices.strategy.run(step, args=(broken,))
    print(*weight.numpy(), optimizer.dynamic_scale.numpy())
"""
    folders = [str(resumable_run.ROOT / "notebooks"), str(resumable_run.ROOT)]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert said[:2] == ["True", "False"]
    assert said[2:] == ["1.0 16384.0", "1.0 8192.0", "-1.0 8192.0"]  # skipped, skipped, less the sum of 1 and 1


def test_steps_in_groups_give_the_same_run_and_resume_within_the_epoch(packed, tmp_path):
    """Two steps an execution, on TensorFlow a loop in the graph: paused after each, and never."""
    whole = outcome(packed, tmp_path / "whole", epochs=1, group=2)
    steps = []
    while len(steps) < 9:
        checkpoint, validation = train(packed, tmp_path / "parts", epochs=1, group=2, seconds=0.01)
        steps.append(checkpoint.step)
        if not checkpoint.pause:
            break
    assert steps[:2] == [2, 4] and steps[-1] == 0
    assert resumable_run.describe_outcome(checkpoint, validation) == whole


@pytest.mark.parametrize(
    ("name", "chips", "replicas", "message"),
    [("cpu", 0, -1, "REPLICAS is -1"), ("gpu", 0, 2, "RUNTIME = 'cpu'"), ("jax", 4, 2, "RUNTIME = 'cpu'")],
)
def test_logical_devices_where_there_are_none_are_refused(name, chips, replicas, message):
    with pytest.raises(ValueError, match=message):
        connect_devices(SimpleNamespace(name=name, chips=chips), replicas)


def test_too_late_is_said():
    keras.ops.zeros(1)  # TensorFlow has started
    with pytest.raises(RuntimeError, match="too late to divide the CPU into REPLICAS = 7"):
        connect_devices(SimpleNamespace(name="cpu", chips=0), 7)


def test_a_batch_that_replicas_cannot_share_is_refused():
    devices = connect_devices(SimpleNamespace(name="cpu", chips=0))
    assert devices.divide(7) == 7
    three = type(devices)("MirroredStrategy", 3)
    assert three.divide(9) == 3
    with pytest.raises(ValueError, match="BATCH_SIZE is 32, which 3 devices cannot share equally"):
        three.divide(32)
