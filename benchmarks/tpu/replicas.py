"""Notebook 2's training on several logical CPUs of this machine, compared with one."""

import contextlib
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from benchmarks.tpu.recipe import build_model, load_recipe

N_DEVICES = 4  # logical CPUs


def train_briefly(study, scope, folder, *, batch_size=8, epochs=2, reload=True):
    """Trains the shallow network, batch normalization too, with notebook 2's callbacks; validates, saves and reloads.

    One thing is made gentler, or rounding would grow into differences: Adam divides by a gradient's own size, which
    makes whole steps of mere rounding; its epsilon is raised to leave them small.

    Args:
        study: a `PackedStudy`; its validation images do not fill the last batch.
        scope: function without arguments that returns the context in which models are built, or None.
        folder: path to write to.
        batch_size: int, images a step over all devices.
        epochs: int.
        reload: whether to check that checkpoint and weights file bring the model back.

    Returns:
        Dict: `loss` and `val_auc` of each epoch.

    Raises:
        AssertionError: devices end with different variables, or what was saved predicts otherwise.
    """
    import keras

    from helpers.evaluation import roc_auc
    from helpers.pipeline import count_steps, make_eval_dataset, make_train_dataset
    from helpers.training import (
        CheckpointStore,
        StatisticsEstimator,
        TrainingCheckpoint,
        ValidationAUC,
        fit_resumable,
        predict_logits,
    )

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
        models = [build_model(recipe, shallow=True) for _ in range(1 + reload)]
    model = models[0]
    model.optimizer.epsilon = 1e-3
    estimator = StatisticsEstimator(model, lambda: make_train(0, 0, 1).take(10))
    validation = ValidationAUC(val_ds, labels, estimator)
    store = CheckpointStore(Path(folder) / "state")
    checkpoint = TrainingCheckpoint(store, {}, Path(folder) / "history.csv", every=1)
    fit_resumable(
        model,
        checkpoint,
        make_train,
        stage="all",
        epochs=epochs,
        steps_per_epoch=steps,
        callbacks=[validation],
        verbose=0,
    )
    apart = [v.path for v in (*model.variables, *model.optimizer.variables) if not is_equal_on_devices(v)]
    assert not apart, f"devices hold different values of {apart}"
    if reload:
        TrainingCheckpoint(store, {}, Path(folder) / "history.csv").restore(models[1], "all")
        same = zip(model.get_weights(), models[1].get_weights(), strict=True)
        assert all(np.array_equal(a, b) for a, b in same), "the checkpoint does not bring the weights back"
    store.close()
    model.set_weights(validation.best_weights)
    logits = predict_logits(model, val_ds, len(labels))
    auc = float(np.nanmean(roc_auc(labels, logits)))
    assert abs(auc - validation.best_auc) < 1e-6, f"kept weights have a validation AUC of {auc}, not what was measured"
    if reload:
        path = Path(folder) / "model.weights.h5"
        keras.Model(model.inputs, model.outputs).save_weights(path)  # never compiled, so without the optimizer
        keras.Model(models[1].inputs, models[1].outputs).load_weights(path)
        same = np.array_equal(predict_logits(models[1], val_ds, len(labels)), logits)
        assert same, "reloaded weights predict otherwise"
    return {name: [row[name] for row in checkpoint.history] for name in ("loss", "val_auc")}


def is_equal_on_devices(variable):
    """Returns whether every device holds the same values of a variable."""
    copies = [variable.value]
    if hasattr(variable.value, "addressable_shards"):  # JAX
        copies = [shard.data for shard in variable.value.addressable_shards]
    elif hasattr(variable.value, "values"):  # TensorFlow, mirrored
        copies = variable.value.values
    return all(np.array_equal(np.asarray(copies[0]), np.asarray(copy)) for copy in copies)


def compare_devices(one, many, tolerance=5e-3):
    """Returns the largest differences between a run on one device and the same on several.

    Raises:
        AssertionError: one is beyond the tolerance.
    """
    differences = {key: float(np.max(np.abs(np.subtract(one[key], many[key])))) for key in one}
    for key, difference in differences.items():
        assert difference <= tolerance, f"{key}: {one[key]} on one device, {many[key]} on several"
    return differences


def check_mirrored(folder, n_devices=N_DEVICES):
    """Part `mirrored`: TensorFlow's MirroredStrategy."""
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * n_devices)
    strategy = tf.distribute.MirroredStrategy([f"CPU:{number}" for number in range(n_devices)])
    assert strategy.num_replicas_in_sync == n_devices
    return _check_devices(folder, n_devices, tf.distribute.get_strategy().scope, strategy.scope)


def check_parallel(folder):
    """Part `parallel`: Keras's DataParallel on JAX."""
    import keras

    devices = keras.distribution.list_devices("cpu")
    assert len(devices) == N_DEVICES, f"JAX shows {len(devices)} devices"
    distribution = keras.distribution.DataParallel(devices=devices)
    many = partial(keras.distribution.set_distribution, distribution)
    return _check_devices(folder, N_DEVICES, lambda: None, many)


def _check_devices(folder, n_devices, one, many):
    from helpers.packing import load_packed_study

    study, runs = load_packed_study(folder), []
    for scope in (one, many):
        with tempfile.TemporaryDirectory() as weights:
            runs.append(train_briefly(study, scope, weights, reload=scope is many))
    found = {"devices": n_devices, "loss": runs[1]["loss"], "val_auc": runs[1]["val_auc"]}
    compared = [{"loss": run["loss"]} for run in runs]  # an AUC of few images jumps, and with it which epoch is kept
    return found | {"largest differences": compare_devices(*compared)}


def make_study(folder):
    """Packs a small synthetic study, whose validation images do not fill batches of 8; returns its folder."""
    from helpers.packing import pack_study
    from helpers.study import list_images, load_study, make_split, match_images, write_synthetic_study

    write_synthetic_study(folder / "phantom", n_images=60, size=64, seed=5, n_workers=1)
    images = list_images(folder / "phantom")
    rows, _ = match_images(load_study(folder / "phantom").rows, images)
    rows["split"] = make_split(rows, val_share=0.25)
    pack_study(rows, images, folder / "packed", split_name="official", side=48, shard_images=16)
    return folder / "packed"
