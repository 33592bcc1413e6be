"""The small classifiers on features: what is learned, what is chosen, what does not depend on other images."""

import keras
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from helpers.evaluation import roc_auc
from helpers.xvision import XVISION, HeadTrainer, LogisticHead, build_head, join_head, pool_features
from helpers.xvision.features import Backbone


@pytest.fixture(scope="module")
def data():
    """Features in which the label shifts one channel; rows to train, validate and test on."""
    rng = np.random.default_rng(0)
    labels = (np.arange(200) % 2).astype("int8")
    features = rng.normal(size=(200, 2, 2, 8)).astype("float16")
    features[..., 3] += 3 * labels[:, None, None]
    return features, labels, (np.arange(120), np.arange(120, 150), np.arange(150, 200))


@pytest.fixture(scope="module")
def trainer(data):
    """A small head, which tests train again: it traces once."""
    return HeadTrainer(data[0].shape[1:], units=(32, 32), learning_rate=0.1, epochs=3)


@pytest.fixture(scope="module")
def trained(data, trainer):
    """The head's weights after training with seed 1, and the history."""
    features, labels, (train, val, _) = data
    history = trainer.train(features, labels, train, val, seed=1)
    return trainer.head.get_weights(), history


def test_settings_are_those_of_the_xvision_study():
    assert XVISION == {"units": (512, 512), "learning_rate": 0.01, "batch_size": 20, "epochs": 20}
    assert build_head((1, 1, 8)).count_params() == 8 * 512 + 512 * 512 + 2 * 4 * 512 + 512 + 1


@pytest.mark.slow
def test_head_learns_and_keeps_the_best_epoch(data, trainer, trained):
    features, labels, (_, val, test) = data
    kept, history = trained
    trainer.head.set_weights(kept)
    assert roc_auc(labels[test], trainer.predict(features, test))[0] > 0.9
    assert history["epoch"].tolist() == [1, 2, 3] and history["best"].sum() == 1
    assert history["val_loss"].idxmin() == history["best"].idxmax()
    assert history["loss"].iloc[-1] < history["loss"].iloc[0] and history["error"].between(0, 1).all()
    probs = trainer.predict(features, val)
    best = history[history["best"]].iloc[0]
    assert best["val_error"] == pytest.approx(((probs >= 0.5) != labels[val]).mean(), abs=1e-6)
    assert best["val_loss"] == pytest.approx(-np.log(np.where(labels[val], probs, 1 - probs)).mean(), abs=1e-5)


@pytest.mark.slow
def test_best_epoch_need_not_be_the_last_and_leaves_nothing_to_the_next_training(data, trainer, trained):
    """Validation labels are flipped, so every epoch makes it worse. Then the first training must come out again."""
    features, labels, (train, val, test) = data
    trainer.head.set_weights(trained[0])
    first = trainer.predict(features, test)
    flipped = np.where(np.isin(np.arange(200), val), 1 - labels, labels)
    history = trainer.train(features, flipped, train, val, seed=2)
    assert history["best"].tolist() == [True, False, False]
    probs = trainer.predict(features, val)
    loss = -np.log(np.where(flipped[val], probs, 1 - probs)).mean()
    assert history["val_loss"].iloc[0] == pytest.approx(loss, abs=1e-5)
    assert not np.allclose(trainer.predict(features, test), first, atol=1e-2)
    trainer.train(features, labels, train, val, seed=1)
    assert np.allclose(trainer.predict(features, test), first, atol=1e-5)


@pytest.mark.slow
def test_results_depend_on_other_images_with_batch_moments_only(data, trainer, trained):
    features, labels, (_, _, test) = data
    trainer.head.set_weights(trained[0])
    whole = trainer.predict(features, test)
    assert np.allclose(trainer.predict(features, test[:25]), whole[:25], atol=1e-6)
    flawed = trainer.predict(features, test, batch_moments=True)
    other = trainer.predict(features, test[:30], batch_moments=True)
    assert not np.allclose(flawed[:30], other, atol=1e-3)
    assert np.allclose(trainer.predict(features, test), whole, atol=1e-6)  # and no trace is left in the weights
    # Batches of one class would lose what distinguishes it from the other, which no test set of Xvision did.
    by_class = test[np.argsort(labels[test], kind="stable")]
    assert roc_auc(labels[by_class], trainer.predict(features, by_class, batch_moments=True))[0] > 0.9


@pytest.mark.slow
def test_odd_numbers_of_images_still_train(data, trainer):
    """A remainder of one image, and fewer images than a batch."""
    features, labels, (train, val, _) = data
    for n_images in (41, 7):
        history = trainer.train(features, labels, train[:n_images], val)
        assert np.isfinite(history["loss"]).all()


@pytest.mark.parametrize("n_images", [25, 120], ids=["fewer images than features", "more"])
def test_logistic_regression_is_that_of_the_features_themselves(data, n_images):
    """The rotation must change nothing: compared with a fit without it at the chosen penalty."""
    features, labels, (train, val, test) = data
    train = train[:n_images]
    logistic = LogisticHead()
    logistic.train(features, labels, train, val)
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=logistic.penalty, max_iter=2000))
    plain.fit(features[train].reshape(len(train), -1).astype("float32"), labels[train])
    expected = plain.predict_proba(features[test].reshape(len(test), -1).astype("float32"))[:, 1]
    assert np.allclose(logistic.predict(features, test), expected, atol=1e-2)
    assert roc_auc(labels[test], expected)[0] > 0.9


def test_pooled_features_are_means_over_the_image(data):
    features, _, _ = data
    assert np.allclose(pool_features(features), features.astype("float32").mean(axis=(1, 2)), atol=1e-6)


def test_joined_model_gives_from_images_what_the_head_gives_from_features():
    images = keras.Input((16, 16, 1))
    network = keras.Model(images, keras.layers.Conv2D(4, 8, strides=8)(images))
    head = build_head((2, 2, 4), units=(8,))
    rows = np.random.default_rng(0).uniform(0, 255, (5, 16, 16, 1)).astype("float32")
    assert np.allclose(join_head(Backbone(network, {}), head)(rows), head(network(rows)), atol=1e-5)
