"""Differentiates a network's outputs by its inputs, compiled for the Keras backend in use: TensorFlow or JAX."""

import keras
import tensorflow as tf


def compile_gradient(model):
    """Compiles the gradient of one output by a batch of inputs, with dropout and batch norm as at inference.

    Inputs of one shape are compiled once, whatever the column; the weights are those that the model has at the call.

    Args:
        model: a keras.Model from one input (batch, ...) to outputs (batch, columns).

    Returns:
        A function of inputs (batch, ...) and a column's number that gives the gradient of that column's sum by the
        inputs, a tensor of their shape. No example depends on another, so it holds each one's own gradient.
    """
    compiled = (_compile_jax if keras.backend.backend() == "jax" else _compile_tensorflow)(model)
    return lambda inputs, column: compiled(keras.ops.convert_to_tensor(inputs), column)


def _compile_tensorflow(model):
    @tf.function
    def differentiate(inputs, column):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            chosen = tf.gather(model(inputs, training=False), column, axis=1)
        return tape.gradient(chosen, inputs)

    return lambda inputs, column: differentiate(inputs, tf.constant(column))  # a bare number would be traced anew


def _compile_jax(model):
    import jax

    @jax.jit
    def differentiate(inputs, column, *variables):
        def choose(inputs):
            return model.stateless_call(*variables, inputs, training=False)[0][:, column].sum()

        return jax.grad(choose)(inputs)

    def call(inputs, column):
        variables = [[v.value for v in some] for some in (model.trainable_variables, model.non_trainable_variables)]
        return differentiate(inputs, column, *variables)

    return call
