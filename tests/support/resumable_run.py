"""A small training run like notebook 2's, made to be killed: shards, augmentation, dropout, averaging, early stopping.

Usage: resumable_run.py PACKED_DIR RUN_DIR [NAME=VALUE ...] [+ RUN_DIR [NAME=VALUE ...] ...]; the options are those of
OPTIONS, and what follows a + is run next. Prints "ready" before training and writes RUN_DIR/outcome.json, by which two
runs can be compared, after it.
"""

import contextlib
import hashlib
import itertools
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "notebooks"), str(ROOT)]
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

OPTIONS = {
    "stage": "all",
    "epochs": 8,
    "patience": 6,
    "every": 2,  # steps between two checkpoints
    "share": float("inf"),  # no limit to the time that checkpoints take
    "seconds": 0.0,  # the time budget; 0: none
    "local": "",  # the folder that checkpoints are written to first
    "seed": 0,  # of the weights alone
    "size": 40,  # pixels
    "nan_step": -1,  # the step of the run whose loss is not finite
    "devices": 0,  # 1: on all devices that JAX has, and with Keras's variables on several hosts
    "replicas": 0,  # logical devices of the CPU
    "group": 1,  # steps of an execution
    "dropout": 0.2,  # replicas draw their own
    "precision": "float32",  # with mixed_float16 the scale of the loss is doubled after every third step
    "use": 0,  # 1: predict, save and train on afterwards
}


def build_model(seed, dropout=0.2, group=1, precision="float32"):
    """Returns a compiled network with everything that a checkpoint must hold: seeds, averages, statistics, moments."""
    import keras

    from helpers.training import AdamW, fuse_batch_norm, scale_loss

    keras.utils.set_random_seed(seed)
    keras.config.set_dtype_policy(precision)
    layers = keras.layers
    model = keras.Sequential([
        keras.Input((None, None, 1)), layers.Rescaling(1 / 255), layers.Conv2D(8, 5, strides=2),
        layers.BatchNormalization(), layers.ReLU(), layers.Conv2D(16, 3, strides=2), layers.ReLU(),
        layers.GlobalAveragePooling2D(), layers.Dropout(dropout), layers.Dense(14, dtype="float32"),
    ])  # fmt: skip
    model = fuse_batch_norm(model)
    rate = keras.optimizers.schedules.CosineDecay(1e-2, 80, warmup_target=2e-2, warmup_steps=8)
    optimizer = scale_loss(AdamW(rate, use_ema=True, ema_momentum=0.8))
    optimizer.dynamic_growth_steps = 3
    model.compile(
        optimizer,
        keras.losses.BinaryCrossentropy(from_logits=True),
        jit_compile=keras.backend.backend() == "jax",
        steps_per_execution=group,
    )
    keras.config.set_dtype_policy("float32")
    return model


def run(packed, run_dir, options):
    """Trains from the newest checkpoint in the folder to the end; returns model, checkpoint and `ValidationAUC`."""
    import keras
    import tensorflow as tf

    from helpers.packing import load_packed_study
    from helpers.pipeline import count_steps, list_batch, make_eval_dataset, make_train_dataset
    from helpers.runtime import connect_devices
    from helpers.training import (
        CheckpointStore,
        StatisticsEstimator,
        TrainingCheckpoint,
        ValidationAUC,
        fit_resumable,
    )

    study = load_packed_study(packed)
    devices, order = None, {"group": options["group"]}
    if options["devices"] or options["replicas"]:
        name = "jax" if keras.backend.backend() == "jax" else "cpu"
        devices = connect_devices(SimpleNamespace(name=name, chips=0), options["replicas"])
        order |= {"n_hosts": devices.n_hosts, "host": devices.host}
    else:
        keras.distribution.set_distribution(None)  # that of the run before in this process
    with devices.scope() if devices else contextlib.nullcontext():
        model = build_model(options["seed"], options["dropout"], options["group"], options["precision"])
    estimator = StatisticsEstimator(model, lambda: make_train(0, 0, 1).take(2))
    validation = ValidationAUC(make_eval_dataset(study, "val", 8), study.labels("val"), estimator)
    callbacks = [validation, keras.callbacks.EarlyStopping("val_auc", mode="max", patience=options["patience"])]
    checkpoint = TrainingCheckpoint(
        CheckpointStore(Path(run_dir) / "state", options["local"] or None, writes=devices is None or devices.is_chief),
        {"SEED": 0, "IMAGE_SIZE": options["size"], "split_sha256": study.split_sha256},
        Path(run_dir) / "history.csv",
        every=options["every"] or None,
        max_share=options["share"],
        stop_at=time.time() + options["seconds"] if options["seconds"] else None,
        devices=devices,
        name_images=lambda epoch, step: list_batch(study, 8, seed=0, epoch=epoch, step=step, **order),
    )

    def make_train(first_epoch, first_step, epochs):
        data = make_train_dataset(
            study, options["size"], 8, seed=0, epochs=epochs, first_epoch=first_epoch, first_step=first_step, **order
        )
        bad = options["nan_step"] - first_epoch * steps - first_step
        poisoned = data.enumerate().map(lambda n, batch: (batch[0], batch[1] * tf.where(n == bad, float("nan"), 1.0)))
        return poisoned if options["nan_step"] >= 0 else data

    steps = count_steps(study, 8, order.get("n_hosts", 1), options["group"])
    print("ready", flush=True)
    said = fit_resumable(
        model, checkpoint, make_train, stage=options["stage"], epochs=options["epochs"], steps_per_epoch=steps,
        callbacks=callbacks, verbose=0,
    )  # fmt: skip
    print(said, flush=True)
    return model, checkpoint, validation


def digest(arrays):
    """Returns the SHA-256 over arrays, in hexadecimal."""
    sha256 = hashlib.sha256()
    for array in arrays:
        sha256.update(array.tobytes())
    return sha256.hexdigest()


def describe_outcome(checkpoint, validation):
    """Returns what must be the same, to the bit, whether a run was killed or not."""
    from benchmarks.tpu.replicas import is_equal_on_devices

    arrays, meta = checkpoint.store.read()
    measured = [{k: v for k, v in row.items() if "seconds" not in k} for row in checkpoint.history]
    groups = {name.split("/")[0] for name in arrays}
    model = checkpoint.model  # None where there was nothing left to train
    variables = [*model.variables, *model.optimizer.variables] if model else []
    return {group: digest([arrays[name] for name in sorted(arrays) if name.startswith(group)]) for group in groups} | {
        "equal on devices": all(is_equal_on_devices(variable) for variable in variables),
        "history": measured, "best_epoch": validation.best_epoch, "best": digest(validation.best_weights),
        "callbacks": meta["callbacks"], "stopped": checkpoint.stopped,
    }  # fmt: skip


def use(model, folder):
    """Does with a trained model and its optimizer what fails on JAX where they share memory.

    JAX deletes what a step or a prediction computes from. Keras's `fit` ends with the averages in the place of the
    weights, so that a prediction would delete them for the optimizer, and a second `fit` would fail.
    """
    images, labels = np.zeros((8, 40, 40, 1), "float32"), np.zeros((8, 14), "float32")
    model.predict(images, verbose=0)
    model.save(folder / "model.keras")  # with the optimizer
    model.fit(images, labels, verbose=0)


if __name__ == "__main__":
    for folder, *pairs in (list(words) for is_run, words in itertools.groupby(sys.argv[2:], "+".__ne__) if is_run):
        given = dict(pair.split("=", 1) for pair in pairs)
        chosen = {name: type(value)(given.get(name, value)) for name, value in OPTIONS.items()}
        model, finished, measured = run(sys.argv[1], folder, chosen)
        if not finished.pause and finished.store.writes:
            outcome = describe_outcome(finished, measured)
            (Path(folder) / "outcome.json").write_text(json.dumps(outcome, indent=1))
        finished.store.close()
        if chosen["use"]:
            use(model, Path(folder))
