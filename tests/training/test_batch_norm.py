"""Fused batch normalization: it trains as Keras's own does, and leaves everything else as it is."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from helpers.training import build_classifier, fuse_batch_norm
from helpers.training.batch_norm import BatchNormalization

layers = keras.layers


def build_small():
    """Returns a network with batch normalization of maps, on which gradients are not lost in rounding."""
    model = keras.Sequential([
        keras.Input((None, None, 1)), layers.Conv2D(4, 3, use_bias=False), layers.BatchNormalization(momentum=0.9),
        layers.ReLU(), layers.Conv2D(3, 3, use_bias=False), layers.BatchNormalization(name="second"),
        layers.GlobalAveragePooling2D(), layers.Dense(2, dtype="float32"),
    ])  # fmt: skip
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.2, 1.2, weight.shape).astype("float32") for weight in model.get_weights()])
    return model


@pytest.fixture
def images():
    return np.random.default_rng(1).normal(size=(3, 8, 8, 1)).astype("float32")


def differentiate(model, images):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(images, training=True) ** 3)
    return [loss, *tape.gradient(loss, model.trainable_variables)]


def train_once(model, images):
    """Returns loss and gradients of a step, and the weights with the statistics after it."""
    return differentiate(model, images) + model.get_weights()


def assert_close(found, expected, rtol=1e-4):
    for one, other in zip(found, expected, strict=True):
        assert np.allclose(one, other, rtol, atol=rtol * np.abs(other).max() + 1e-5)


def list_kinds(model, images):
    step = tf.function(lambda images: differentiate(model, images)).get_concrete_function(images)
    return {operation.type for operation in step.graph.get_operations()}


def test_loss_gradients_and_statistics_are_those_of_keras(images):
    model = build_small()
    fused = fuse_batch_norm(model)
    before = model.get_weights()
    assert_close(train_once(fused, images), train_once(model, images))
    assert not np.allclose(fused.get_weights()[4], before[4])  # the statistics moved


def test_one_fused_operation_takes_the_place_of_many(images):
    kinds, of_keras = list_kinds(fuse_batch_norm(build_small()), images), list_kinds(build_small(), images)
    assert {"FusedBatchNormV3", "FusedBatchNormGradV3"} <= kinds and "SquaredDifference" not in kinds
    assert "SquaredDifference" in of_keras and "FusedBatchNormV3" not in of_keras


def test_in_mixed_precision_too(images):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = build_small()
        fused = fuse_batch_norm(model)
    finally:
        keras.config.set_dtype_policy("float32")
    maps = np.zeros((2, 4, 4, 3), "float32")
    assert fused.get_layer("second")(maps, training=True).dtype == tf.bfloat16
    assert_close(train_once(fused, images), train_once(model, images), rtol=0.03)


def test_frozen_layers_keep_their_statistics(images):
    model = build_small()
    fused = fuse_batch_norm(model)
    for some in (model, fused):
        some.get_layer("second").trainable = False
    assert_close(train_once(fused, images), train_once(model, images))
    statistics = fused.get_layer("second").moving_mean
    assert np.array_equal(statistics, model.get_layer("second").moving_mean)


@pytest.mark.slow
def test_the_network_keeps_names_weights_order_and_inference(tmp_path):
    model = build_classifier(blocks=[1, 1, 1, 1], batch_norm_momentum=0.9, output_stride=16)
    fused = fuse_batch_norm(model)
    assert sum(type(layer) is BatchNormalization for layer in fused.layers) == 13
    assert [layer.name for layer in fused.layers] == [layer.name for layer in model.layers]
    assert [v.path for v in fused.variables] == [v.path for v in model.variables]  # checkpoints go by the order
    image = np.random.default_rng(0).uniform(0, 255, (1, 64, 64, 1)).astype("float32")
    assert np.array_equal(fused(image), model(image))
    fused.set_weights([weight + 0.01 for weight in fused.get_weights()])
    keras.Model(fused.inputs, fused.outputs).save_weights(tmp_path / "model.weights.h5")  # as notebook 2 does
    model.load_weights(tmp_path / "model.weights.h5")
    assert np.array_equal(fused(image), model(image))


def test_on_another_backend_the_model_is_left_alone(monkeypatch):
    model = build_small()
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    assert fuse_batch_norm(model) is model
