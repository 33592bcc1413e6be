"""Losses equal their definitions and prefer what is right."""

import numpy as np
import pytest

from helpers.training import make_loss
from helpers.training.losses import WeightedBinaryCrossentropy

LOSSES = ["weighted_bce", "bce", "focal", "asymmetric"]


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits))


@pytest.fixture
def labels_and_logits():
    rng = np.random.default_rng(0)
    return (rng.random((7, 4)) < 0.3).astype("float32"), rng.normal(size=(7, 4)).astype("float32") * 3


def test_weighted_cross_entropy_counts_positives_by_their_weight(labels_and_logits):
    labels, logits = labels_and_logits
    weights = np.array([1.0, 2.0, 5.0, 10.0])
    p = sigmoid(logits.astype("float64"))
    expected = -(weights * labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean()
    assert float(WeightedBinaryCrossentropy(weights)(labels, logits)) == pytest.approx(expected, rel=1e-5)


def test_weighted_cross_entropy_stays_finite_for_extreme_logits():
    loss = WeightedBinaryCrossentropy([2.0])(np.array([[1.0], [0.0]]), np.array([[-500.0], [500.0]], "float32"))
    assert float(loss) == pytest.approx((2 * 500 + 500) / 2)


def test_asymmetric_loss_equals_its_definition(labels_and_logits):
    labels, logits = labels_and_logits
    p = sigmoid(logits.astype("float64"))
    shifted = np.maximum(p - 0.05, 0)
    expected = -(labels * (1 - p) * np.log(p) + (1 - labels) * shifted**4 * np.log(1 - shifted)).mean()
    assert float(make_loss("asymmetric", labels)(labels, logits)) == pytest.approx(expected, rel=1e-4)


def test_loss_weights_grow_with_rarity_and_stay_bounded():
    labels = np.zeros((1000, 3), "float32")
    labels[:500, 0] = labels[:50, 1] = 1
    weights = make_loss("weighted_bce", labels).positive_weights
    assert weights[0] == 1 and weights[1] == pytest.approx(np.sqrt(950 / 50)) and weights[2] == 10


@pytest.mark.parametrize("name", LOSSES)
def test_every_named_loss_prefers_right_logits(name, labels_and_logits):
    labels, _ = labels_and_logits
    right = (labels * 2 - 1) * 3
    loss = make_loss(name, labels)
    assert float(loss(labels, right)) < float(loss(labels, -right))


@pytest.mark.parametrize("name", LOSSES)
def test_smoothing_moves_each_label_to_one_half(name, labels_and_logits):
    labels, logits = labels_and_logits
    smoothed = make_loss(name, labels, 0.1)(labels, logits)
    by_hand = make_loss(name, labels)(np.where(labels > 0, 0.95, 0.05).astype("float32"), logits)
    assert float(smoothed) == pytest.approx(float(by_hand), rel=1e-5)
    assert float(smoothed) != pytest.approx(float(make_loss(name, labels)(labels, logits)), rel=1e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_an_unknown_label_adds_nothing_and_has_no_gradient(name, labels_and_logits):
    """Losses are means over all labels of a batch: of an unknown one the part is 0, of the others it stays."""
    import tensorflow as tf

    labels, logits = labels_and_logits
    unknown = np.zeros(labels.shape, bool)
    unknown[1, 2] = unknown[4, 0] = unknown[:, 3] = True
    loss = make_loss(name, np.where(unknown, np.nan, labels), 0.1)
    with tf.GradientTape() as tape:
        tape.watch(inputs := tf.constant(logits))
        value = loss(np.where(unknown, np.nan, labels).astype("float32"), inputs)
    gradient = tape.gradient(value, inputs).numpy()
    assert np.isfinite(gradient).all() and (gradient[unknown] == 0).all() and (gradient[~unknown] != 0).all()
    one = [[float(loss(labels[i : i + 1, :] * 0 + np.where(np.arange(4) == j, labels[i, j], np.nan), logits[i : i + 1]))
            for j in range(4)] for i in range(7)]  # fmt: skip
    assert float(value) == pytest.approx(np.array(one)[~unknown].sum() / 7, rel=1e-5)


def test_loss_weights_count_known_labels_only():
    labels = np.zeros((1000, 2), "float32")
    labels[:50] = 1
    labels[500:, 1] = np.nan
    weights = make_loss("weighted_bce", labels).positive_weights
    assert weights == pytest.approx([np.sqrt(950 / 50), np.sqrt(450 / 50)])
