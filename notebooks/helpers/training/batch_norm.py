"""Batch normalization that trains faster on TensorFlow, where Keras 3 composes it of a dozen operations."""

import keras
from keras import ops


class BatchNormalization(keras.layers.BatchNormalization):
    """Keras's layer, with TensorFlow's fused operation, forward and backward, in training.

    Keras 3 computes moments and normalizes in separate operations, each of which reads or writes the whole map, and so
    does the gradient. `FusedBatchNormV3` needs a few passes. Weights, statistics and inference are Keras's. The class
    has the same name as Keras's because weight files name layers by their class.
    """

    def call(self, inputs, training=None, mask=None):
        """Normalizes maps (batch, height, width, channels); returns the same shape, in the layer's compute dtype."""
        if not (training and self.trainable):
            return super().call(inputs, training=training, mask=mask)
        import tensorflow as tf

        inputs = tf.cast(inputs, tf.float32)
        outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=inputs, scale=self.gamma, offset=self.beta, mean=[], variance=[], epsilon=self.epsilon, is_training=True
        )
        # The operation divides the variance by n - 1 (the population's estimate); Keras divides by n (the batch's).
        n_values = tf.cast(tf.size(inputs) // inputs.shape[-1], tf.float32)
        variance *= (n_values - 1) / n_values
        for moving, value in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(moving * self.momentum + value * (1 - self.momentum))
        return ops.cast(outputs, self.compute_dtype)


def fuse_batch_norm(model):
    """Rebuilds a model so that its batch normalization trains with TensorFlow's fused operation.

    It is meant for training. A model to be saved as `.keras` or exported is built without it and takes the weights.

    Args:
        model: functional or sequential keras.Model that is not compiled yet.

    Returns:
        A keras.Model with the same names, weights, order of variables and results up to rounding; on another backend
        than TensorFlow, the model itself. Layers that the operation cannot replace stay Keras's: those of another axis
        than the last of maps, without scale or center, synchronized, or renormalizing.
    """
    if keras.backend.backend() != "tensorflow":
        return model

    def rebuild(layer):
        fits = type(layer) is keras.layers.BatchNormalization and len(layer.input.shape) == 4 and layer.axis in (-1, 3)
        fits = fits and layer.scale and layer.center and not (layer.synchronized or getattr(layer, "renorm", False))
        return (BatchNormalization if fits else type(layer)).from_config(layer.get_config())

    fused = keras.models.clone_model(model, clone_function=rebuild)
    fused.set_weights(model.get_weights())
    return fused
