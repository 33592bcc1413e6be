"""Losses on logits for findings of which some are rare; `make_loss` chooses one by name.

Labels are 1, 0 or NaN, which is unknown: such a label adds nothing to the loss, and no gradient.
"""

import keras
import numpy as np
from keras import ops


def smooth(labels, smoothing):
    """Returns labels moved a share `smoothing` of the way to one half, each finding alone: y (1 - s) + s / 2.

    This is what Keras's own binary losses do: the uniform distribution of Szegedy et al. (CVPR 2016, section 7) over
    the two outcomes of one finding.
    """
    return labels * (1.0 - smoothing) + 0.5 * smoothing


def mask_unknown(y_true):
    """Returns labels with 0 in place of NaN, and float32 of the same shape, 1 where a label is known and else 0."""
    known = ops.logical_not(ops.isnan(y_true))
    return ops.where(known, y_true, 0.0), ops.cast(known, "float32")


@keras.saving.register_keras_serializable("chestxray")
class WeightedBinaryCrossentropy(keras.losses.Loss):
    """Binary cross-entropy on logits in which a positive of class c counts `positive_weights[c]` times.

    Args:
        positive_weights: sequence of floats (classes,).
        label_smoothing: see `smooth`.
    """

    def __init__(self, positive_weights, label_smoothing=0.0, reduction="sum_over_batch_size", name="weighted_bce"):
        super().__init__(reduction=reduction, name=name)
        self.positive_weights = [float(weight) for weight in positive_weights]
        self.label_smoothing = label_smoothing

    def call(self, y_true, y_pred):
        """Returns float32 (batch,) from labels and logits (batch, classes)."""
        y_true, known = mask_unknown(y_true)
        y_true = smooth(y_true, self.label_smoothing)
        positive = y_true * ops.softplus(-y_pred) * ops.convert_to_tensor(self.positive_weights, "float32")
        return ops.mean(known * (positive + (1.0 - y_true) * ops.softplus(y_pred)), axis=-1)

    def get_config(self):
        """Returns the arguments that rebuild the loss."""
        own = {name: getattr(self, name) for name in ("positive_weights", "label_smoothing")}
        return super().get_config() | own


@keras.saving.register_keras_serializable("chestxray")
class AsymmetricLoss(keras.losses.Loss):
    """Asymmetric loss for multi-label classification on logits (Ridnik et al., ICCV 2021, equation 8).

    Args:
        gamma_negative: focusing exponent of negatives; the paper's default is 4.
        gamma_positive: focusing exponent of positives; the paper's default is 1.
        margin: probability by which negatives are shifted; the paper's default is 0.05.
        label_smoothing: see `smooth`; the paper has none.
    """

    def __init__(
        self,
        gamma_negative=4.0,
        gamma_positive=1.0,
        margin=0.05,
        label_smoothing=0.0,
        reduction="sum_over_batch_size",
        name="asymmetric",
    ):
        super().__init__(reduction=reduction, name=name)
        self.gamma_negative, self.gamma_positive, self.margin = gamma_negative, gamma_positive, margin
        self.label_smoothing = label_smoothing

    def call(self, y_true, y_pred):
        """Returns float32 (batch,) from labels and logits (batch, classes)."""
        y_true, known = mask_unknown(y_true)
        y_true = smooth(y_true, self.label_smoothing)
        probs = ops.sigmoid(y_pred)
        shifted = ops.maximum(probs - self.margin, 0.0)
        positive = y_true * ops.power(1.0 - probs, self.gamma_positive) * ops.softplus(-y_pred)
        negative = (1.0 - y_true) * ops.power(shifted, self.gamma_negative) * -ops.log(1.0 - shifted + 1e-7)
        return ops.mean(known * (positive + negative), axis=-1)

    def get_config(self):
        """Returns the arguments that rebuild the loss."""
        names = ("gamma_negative", "gamma_positive", "margin", "label_smoothing")
        return super().get_config() | {name: getattr(self, name) for name in names}


@keras.saving.register_keras_serializable("chestxray")
class FocalLoss(keras.losses.Loss):
    """Binary focal loss on logits (Lin et al., ICCV 2017) with Keras's focusing exponent of 2 and no class weights.

    Args:
        label_smoothing: see `smooth`.
    """

    def __init__(self, label_smoothing=0.0, reduction="sum_over_batch_size", name="focal"):
        super().__init__(reduction=reduction, name=name)
        self.label_smoothing = label_smoothing

    def call(self, y_true, y_pred):
        """Returns float32 (batch,) from labels and logits (batch, classes)."""
        y_true, known = mask_unknown(y_true)
        # Keras takes the mean over the last axis, here of one: what remains is one loss for each label.
        each = keras.losses.binary_focal_crossentropy(
            y_true[..., None], y_pred[..., None], from_logits=True, label_smoothing=self.label_smoothing
        )
        return ops.mean(known * each, axis=-1)

    def get_config(self):
        """Returns the arguments that rebuild the loss."""
        return super().get_config() | {"label_smoothing": self.label_smoothing}


def make_loss(name, labels, smoothing=0.0):
    """Makes a loss by its name, the setting LOSS of notebook 2; all take labels and logits (batch, classes).

    Args:
        name: "weighted_bce" (a positive counts sqrt(negatives / positives) times, from 1 to 10, which lies between no
            weights and full balance), "bce", "focal" (Lin et al., ICCV 2017) or "asymmetric".
        labels: float array (images, classes) of the training images, NaN where unknown.
        smoothing: share in [0, 1) by which each label is moved to one half, the setting LABEL_SMOOTHING; see `smooth`.

    Returns:
        A keras.losses.Loss.

    Raises:
        ValueError: the name is none of these, or the share is out of its range.
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"LABEL_SMOOTHING is {smoothing}; it must be at least 0 and below 1, such as 0.1.")
    if name == "weighted_bce":
        positives = np.maximum(np.nansum(labels, 0), 1)
        negatives = np.maximum((~np.isnan(labels)).sum(0) - positives, 0)
        weights = np.clip(np.sqrt(negatives / positives), 1, 10)
        return WeightedBinaryCrossentropy(weights, label_smoothing=smoothing)
    if name == "bce":
        return WeightedBinaryCrossentropy(np.ones(labels.shape[1]), label_smoothing=smoothing)
    if name == "focal":
        return FocalLoss(label_smoothing=smoothing)
    if name == "asymmetric":
        return AsymmetricLoss(label_smoothing=smoothing)
    raise ValueError(f'LOSS is "{name}"; known are "weighted_bce", "bce", "focal" and "asymmetric".')
