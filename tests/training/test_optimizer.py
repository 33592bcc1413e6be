"""The optimizer trains what Keras's trains, and a step is traced once."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from helpers.training import AdamW, CheckpointStore, TrainingCheckpoint, fit_resumable


def fit(optimizer_class, folder):
    """Trains a small model for two epochs; returns its weights, its learning rates and how often a step was traced."""
    keras.utils.set_random_seed(1)
    traced = []

    class Model(keras.Model):
        def train_step(self, data):
            traced.append(1)
            return super().train_step(data)

    inputs = keras.Input((3,))
    model = Model(inputs, keras.layers.Dense(1)(keras.layers.Dense(4, activation="relu")(inputs)))
    rate = keras.optimizers.schedules.CosineDecay(1e-3, 20, warmup_target=1e-2, warmup_steps=4)
    optimizer = optimizer_class(rate, 0.05, use_ema=True, ema_momentum=0.9)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    model.compile(optimizer, "mse", jit_compile=False)
    x = np.random.default_rng(0).normal(size=(40, 3)).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((x, x[:, :1])).batch(8).repeat()
    checkpoint = TrainingCheckpoint(CheckpointStore(folder / "state"), {}, folder / "history.csv")
    fit_resumable(model, checkpoint, lambda *_: data, stage="all", epochs=2, steps_per_epoch=5, callbacks=[], verbose=0)
    rates = [row["learning_rate"] for row in checkpoint.history]
    return [*model.get_weights(), *map(np.asarray, optimizer.variables)], rates, len(traced)


def test_it_trains_what_kerass_trains_and_a_step_is_traced_once(tmp_path):
    ours, our_rates, n_traced = fit(AdamW, tmp_path / "ours")
    theirs, their_rates, _ = fit(keras.optimizers.AdamW, tmp_path / "keras")
    assert len(ours) == len(theirs) and n_traced == 1
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)
    assert our_rates == their_rates and our_rates[0] != our_rates[1]


def test_the_rate_of_a_schedule_is_computed_once_a_step(monkeypatch):
    variables = [keras.Variable(np.ones(3, "float32")) for _ in range(5)]
    rate = keras.optimizers.schedules.CosineDecay(1e-3, 20)
    calls, compute = [], type(rate).__call__
    monkeypatch.setattr(type(rate), "__call__", lambda self, step: calls.append(1) or compute(self, step))
    optimizer = AdamW(rate, 0.1)
    optimizer.build(variables)
    optimizer.apply([keras.ops.ones(3)] * 5)
    assert len(calls) == 1
    optimizer = AdamW(0.5, 0.1)
    optimizer.learning_rate = 0.25  # as a callback lowers it
    assert float(optimizer.learning_rate) == pytest.approx(0.25)


def count_operations(optimizer_class):
    """Returns how many operations an update of 20 variables has."""
    variables = [keras.Variable(np.ones(3, "float32")) for _ in range(20)]
    optimizer = optimizer_class(keras.optimizers.schedules.CosineDecay(1e-3, 20), 0.1, use_ema=True)
    optimizer.build(variables)
    step = tf.function(lambda: optimizer.apply([tf.ones(3)] * 20))
    return len(step.get_concrete_function().graph.get_operations())


def test_a_step_has_few_operations():
    assert count_operations(AdamW) < count_operations(keras.optimizers.AdamW) / 3
