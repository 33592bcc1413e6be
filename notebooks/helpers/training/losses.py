"""Losses on logits for findings of which some are rare; `make_loss` chooses one by name.

Labels are 1, 0 or NaN, which is unknown: such a label adds nothing to the loss, and no gradient.
"""

import keras
import numpy as np
from keras import ops


class _Loss(keras.losses.Loss):
    """A loss of each label alone, with smoothing, and without the unknown labels.

    Args:
        smoothing: share s of the way to one half that a label y is moved, y (1 - s) + s / 2, as in Keras's own binary
            losses: the uniform distribution of Szegedy et al. (CVPR 2016, section 7) over the two outcomes of one
            finding.
    """

    def __init__(self, smoothing):
        super().__init__()
        self.smoothing = smoothing

    def call(self, y_true, y_pred):
        """Returns float32 (batch,) from labels and logits (batch, classes)."""
        known = ops.logical_not(ops.isnan(y_true))
        y_true = ops.where(known, y_true, 0.0) * (1.0 - self.smoothing) + 0.5 * self.smoothing
        return ops.mean(ops.cast(known, "float32") * self.measure(y_true, y_pred), axis=-1)


class WeightedBinaryCrossentropy(_Loss):
    """Binary cross-entropy on logits in which a positive of class c counts `positive_weights[c]` times."""

    def __init__(self, positive_weights, smoothing=0.0):
        super().__init__(smoothing)
        self.positive_weights = positive_weights

    def measure(self, y_true, y_pred):
        """Returns float32 (batch, classes)."""
        positive = y_true * ops.softplus(-y_pred) * ops.convert_to_tensor(self.positive_weights, "float32")
        return positive + (1.0 - y_true) * ops.softplus(y_pred)


class AsymmetricLoss(_Loss):
    """Asymmetric loss for multi-label classification on logits, with the paper's defaults.

    Ridnik et al., ICCV 2021, equation 8: the focusing exponent is 4 for negatives and 1 for positives, and the
    probabilities of negatives are shifted by 0.05.
    """

    def measure(self, y_true, y_pred):
        """Returns float32 (batch, classes)."""
        probs = ops.sigmoid(y_pred)
        shifted = ops.maximum(probs - 0.05, 0.0)
        positive = y_true * (1.0 - probs) * ops.softplus(-y_pred)
        return positive + (1.0 - y_true) * ops.power(shifted, 4.0) * -ops.log(1.0 - shifted + 1e-7)


class FocalLoss(_Loss):
    """Binary focal loss on logits (Lin et al., ICCV 2017) with Keras's focusing exponent of 2 and no class weights."""

    def measure(self, y_true, y_pred):
        """Returns float32 (batch, classes)."""
        # Keras takes the mean over the last axis, here of one: what remains is one loss for each label.
        return keras.losses.binary_focal_crossentropy(y_true[..., None], y_pred[..., None], from_logits=True)


def make_loss(name, labels, smoothing=0.0):
    """Makes a loss by its name, the setting LOSS of notebook 2; all take labels and logits (batch, classes).

    Args:
        name: "weighted_bce" (a positive counts sqrt(negatives / positives) times, from 1 to 10, which lies between no
            weights and full balance), "bce", "focal" (Lin et al., ICCV 2017) or "asymmetric".
        labels: float array (images, classes) of the training images, NaN where unknown.
        smoothing: share in [0, 1) by which each label is moved to one half, the setting LABEL_SMOOTHING.

    Returns:
        A keras.losses.Loss.
    """
    if name == "weighted_bce":
        positives = np.maximum(np.nansum(labels, 0), 1)
        negatives = np.maximum((~np.isnan(labels)).sum(0) - positives, 0)
        weights = np.clip(np.sqrt(negatives / positives), 1, 10)
        return WeightedBinaryCrossentropy(weights, smoothing)
    if name == "bce":
        return WeightedBinaryCrossentropy(1.0, smoothing)
    return {"focal": FocalLoss, "asymmetric": AsymmetricLoss}[name](smoothing)
