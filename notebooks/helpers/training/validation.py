"""Exact AUC of the averaged weights on the validation images after each epoch."""

import contextlib

import keras
import numpy as np
from keras import ops

from ..evaluation.auc import roc_auc
from .model import predict_logits
from .optimizer import inner_optimizer


@contextlib.contextmanager
def averaged_weights(model, estimator=None):
    """Puts the optimizer's moving average of the weights into the model for a `with` block.

    Args:
        model: compiled keras.Model; where its optimizer keeps no average, nothing changes.
        estimator: a `StatisticsEstimator`, which gives the averaged weights batch-norm statistics of their own; None
            leaves those of the weights of the last steps.
    """
    optimizer = inner_optimizer(model)
    # Before the first step, or where loss scaling has skipped all steps so far, there is no average.
    if not optimizer.use_ema or not ops.convert_to_numpy(optimizer.iterations):
        yield
        return
    # Not `keras.callbacks.SwapEMAWeights`: on TensorFlow it swaps by adding and subtracting, which rounds the weights.
    own = [ops.copy(ops.convert_to_tensor(variable)) for variable in model.variables]
    optimizer.finalize_variable_values(model.trainable_variables)
    for variable in model.trainable_variables:  # on JAX they now share the averages' memory, which `predict` may free
        variable.assign(ops.copy(ops.convert_to_tensor(variable)))
    try:
        if estimator is not None:
            estimator.estimate()
        yield
    finally:
        for variable, value in zip(model.variables, own, strict=True):
            variable.assign(value)


class ValidationAUC(keras.callbacks.Callback):
    """Measures exact AUC and loss on the validation images after each epoch, and keeps the best weights.

    Adds `val_auc` (mean over the classes with positives and negatives; NaN if there is none) and `val_loss` to the
    logs, so it stands before every callback that reads them. `keras.metrics.AUC` bins scores and can be far off for
    rare classes. With `use_ema` the averaged weights are measured and kept, see `averaged_weights`.

    Args:
        dataset: from `make_eval_dataset`.
        labels: float array (images, classes) in the order of the dataset.
        estimator: see `averaged_weights`.

    Attributes:
        best_auc: float, -1 before the first epoch.
        best_epoch: int, from 0; -1 before the first epoch.
        best_weights: list of arrays as from `model.get_weights()`; empty before the first epoch.
    """

    def __init__(self, dataset, labels, estimator=None):
        super().__init__()
        self.dataset, self.labels, self.estimator = dataset, labels, estimator
        self.best_auc, self.best_epoch, self.best_weights = -1.0, -1, []

    def on_train_begin(self, logs=None):
        """Resets the best epoch, as Keras's own callbacks do: each stage has its own, and the last stage's counts."""
        self.best_auc, self.best_epoch, self.best_weights = -1.0, -1, []

    def on_epoch_end(self, epoch, logs=None):
        """Measures, and keeps the weights if they are the best so far or if nothing can be measured."""
        with averaged_weights(self.model, self.estimator):
            logits = predict_logits(self.model, self.dataset, len(self.labels))
            aucs = roc_auc(self.labels, logits) if len(self.labels) else np.array([np.nan])
            auc = float(np.mean(aucs[np.isfinite(aucs)])) if np.isfinite(aucs).any() else float("nan")
            loss = self.model.loss(self.labels, logits) if len(self.labels) else float("nan")
            logs["val_auc"], logs["val_loss"] = auc, float(loss)
            if auc > self.best_auc or np.isnan(auc):
                self.best_auc, self.best_epoch = -1.0 if np.isnan(auc) else auc, epoch
                self.best_weights = [np.copy(array) for array in self.model.get_weights()]
