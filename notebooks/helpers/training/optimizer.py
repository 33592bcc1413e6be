"""AdamW as Keras has it, in fewer operations, and loss scaling for several replicas."""

import keras
from keras import ops


class AdamW(keras.optimizers.AdamW):
    """Keras's optimizer, on TensorFlow in a third of the operations: Keras makes some 14,000 for DenseNet-121's step.

    Keras computes the learning rate, the powers of beta and the momentum of the averages again for each of 364
    variables, and applies Adam to each by a dozen operations, where TensorFlow has one. What is trained is the same up
    to rounding.
    """

    _rate = _powers = None  # of the step that is being made

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
        step = ops.cast(self.iterations + 1, "float32")
        self._powers = [ops.power(beta, step) for beta in (self.beta_1, self.beta_2)]
        try:
            super().apply(grads, trainable_variables)
        finally:
            self._rate = self._powers = None

    def update_step(self, gradient, variable, learning_rate):
        """Updates one variable, as Keras's optimizer does."""
        if keras.backend.backend() != "tensorflow" or self.amsgrad:
            super().update_step(gradient, variable, learning_rate)
            return
        import tensorflow as tf

        number = self._get_variable_index(variable)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[number].value.handle,
            v=self._velocities[number].value.handle,
            beta1_power=self._powers[0],
            beta2_power=self._powers[1],
            lr=learning_rate,
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=gradient,
        )

    def _update_model_variables_moving_average(self, trainable_variables):
        share = 1 - ops.cast(self.iterations > 0, "float32") * self.ema_momentum  # the first average is the weights
        for variable, average in zip(trainable_variables, self._model_variables_moving_average, strict=True):
            average.assign(average + (variable - average) * share)


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
