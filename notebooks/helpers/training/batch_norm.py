"""Batch normalization over the global batch, fast on TensorFlow, and statistics that belong to given weights."""

import keras
import numpy as np
from keras import ops


class BatchNormalization(keras.layers.BatchNormalization):
    """Keras's layer for training on TensorFlow: one fused operation, or moments of the batches of all replicas.

    On one device, `FusedBatchNormV3` needs a few passes over the maps, where Keras 3 composes a dozen operations. On
    several replicas, mean and variance are those of the global batch, as they are on JAX: the replicas then keep equal
    statistics, and their number does not change what is trained. Keras's own layer has either statistics of each
    replica, of which those of the first are saved, or, with `synchronized`, three sums over the replicas in place of
    one. Weights, statistics and inference are Keras's. The class has the same name as Keras's because weight files name
    layers by their class.
    """

    def call(self, inputs, training=None, mask=None):
        """Normalizes maps (batch, height, width, channels); returns the same shape, in the layer's compute dtype."""
        if not (training and self.trainable):
            return super().call(inputs, training=training, mask=mask)
        import tensorflow as tf

        inputs = tf.cast(inputs, self.compute_dtype)
        context = tf.distribute.get_replica_context()
        if context is not None and context.num_replicas_in_sync > 1:
            outputs, mean, variance = self._normalize_globally(inputs, context)
        else:
            outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
                x=inputs, scale=self.gamma, offset=self.beta, mean=[], variance=[], epsilon=self.epsilon,
                is_training=True,
            )  # fmt: skip
            # The operation divides the variance by n - 1 (the population's estimate); Keras divides by n (the batch's).
            n_values = tf.cast(tf.size(inputs) // inputs.shape[-1], tf.float32)
            variance *= (n_values - 1) / n_values
        for moving, value in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(moving * self.momentum + value * (1 - self.momentum))
        return ops.cast(outputs, self.compute_dtype)

    def _normalize_globally(self, inputs, context):
        import tensorflow as tf

        inputs = tf.cast(inputs, tf.float32)
        moments = [tf.reduce_mean(inputs, (0, 1, 2)), tf.reduce_mean(tf.square(inputs), (0, 1, 2))]
        mean, square = tf.unstack(context.all_reduce(tf.distribute.ReduceOp.MEAN, tf.stack(moments)))
        variance = tf.maximum(square - tf.square(mean), 0)
        outputs = ops.batch_normalization(inputs, mean, variance, -1, self.beta, self.gamma, self.epsilon)
        return outputs, mean, variance


def fuse_batch_norm(model):
    """Rebuilds a model so that its batch normalization trains as `BatchNormalization` of this module does.

    It is meant for training. A model to be saved as `.keras` or exported is built without it and takes the weights.

    Args:
        model: functional or sequential keras.Model that is not compiled yet; it normalizes maps over their channels,
            with scale and center, as all `BACKBONES` do.

    Returns:
        A keras.Model with the same names, weights, order of variables and, on one device, results up to rounding; on
        another backend than TensorFlow, or without batch normalization, the model itself.
    """

    def rebuild(layer):
        kind = type(layer)
        return (BatchNormalization if kind is keras.layers.BatchNormalization else kind).from_config(layer.get_config())

    has_any = any(isinstance(layer, keras.layers.BatchNormalization) for layer in model.layers)
    if keras.backend.backend() != "tensorflow" or not has_any:
        return model

    fused = keras.models.clone_model(model, clone_function=rebuild)
    fused.set_weights(model.get_weights())
    return fused


class StatisticsEstimator:
    """Estimates the batch-norm statistics of a model's present weights from training batches.

    The moving averages that training keeps are of the weights of its last steps. Averaged weights are others, so they
    need statistics of their own: the mean over batches, see Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (2021),
    section 3.

    Args:
        model: keras.Model; nothing but its moving means and variances changes.
        make_dataset: function without arguments that returns a Dataset of (images, labels), the same every time. Of
            several hosts, each gets its share of the batches.
    """

    def __init__(self, model, make_dataset):
        self.model, self.make_dataset = model, make_dataset
        self.layers = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
        self._forward = None  # compiled once; it is called after every epoch

    def estimate(self):
        """Puts the statistics of the present weights into the model; does nothing where no layer has any."""
        if not self.layers:
            return
        others = [ops.convert_to_numpy(variable) for variable in self.model.non_trainable_variables]
        batches = np.stack(list(self._measure_batches())).astype(np.float64)
        for variable, value in zip(self.model.non_trainable_variables, others, strict=True):
            variable.assign(np.copy(value))  # a forward pass in training also moves the seeds of dropout
        means, variances = np.split(batches, 2, axis=1)
        mean = means.mean(axis=0)
        variance = variances.mean(axis=0) + means.var(axis=0)  # within the batches, and between them
        ends = np.cumsum([layer.moving_mean.shape[0] for layer in self.layers])[:-1]
        for layer, *values in zip(self.layers, np.split(mean, ends), np.split(variance, ends), strict=True):
            layer.moving_mean.assign(values[0].astype("float32"))
            layer.moving_variance.assign(values[1].astype("float32"))

    def _measure_batches(self):
        """Yields float32 (2 channels,) for each batch: the means of all layers, then their variances."""
        momenta = [layer.momentum for layer in self.layers]
        for layer in self.layers:
            layer.momentum = 0.0  # so that the moving averages become those of the batch
        try:
            yield from (self._run_jax() if keras.backend.backend() == "jax" else self._run_tensorflow())
        finally:
            for layer, momentum in zip(self.layers, momenta, strict=True):
                layer.momentum = momentum

    def _list_statistics(self):
        return [layer.moving_mean for layer in self.layers] + [layer.moving_variance for layer in self.layers]

    def _run_tensorflow(self):
        import tensorflow as tf

        strategy = self.model.distribute_strategy

        def run(images):
            self.model(images, training=True)
            return tf.concat([variable.value for variable in self._list_statistics()], axis=0)

        if self._forward is None:
            self._forward = tf.function(lambda images: strategy.run(run, args=(images,)), autograph=False)
        for images, _ in strategy.experimental_distribute_dataset(self.make_dataset()):
            yield strategy.experimental_local_results(self._forward(images))[0].numpy()  # equal on all replicas

    def _run_jax(self):
        import jax

        variables = self.model.trainable_variables, self.model.non_trainable_variables
        numbers = {id(variable): number for number, variable in enumerate(variables[1])}
        places = [numbers[id(variable)] for variable in self._list_statistics()]

        def run(trainable, non_trainable, images):
            _, updated = self.model.stateless_call(trainable, non_trainable, images, training=True)
            return jax.numpy.concatenate([updated[place] for place in places])

        if self._forward is None:
            self._forward = jax.jit(run)
        values = [[variable.value for variable in some] for some in variables]
        distribution = keras.distribution.distribution()
        for images, _ in self.make_dataset():
            images = images.numpy()
            if distribution is not None:
                shape = (len(images) * jax.process_count(), *images.shape[1:])
                layout = distribution.get_data_layout(shape).backend_layout
                images = jax.make_array_from_process_local_data(layout, images)
            yield np.asarray(self._forward(*values, images))
