"""Loss scaling, without which the small gradients of `mixed_float16` become zero. GPUs without bfloat16 need it."""

import keras
from keras import ops


class LossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
    """Keras's optimizer of this name, for several replicas too.

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
