"""The small classifiers on features: what is learned, what is chosen, what does not depend on neighbors."""

import keras
import numpy as np
import pytest

from helpers.evaluation import roc_auc
from helpers.xvision import (
    XVISION,
    Backbone,
    HeadTrainer,
    LogisticHead,
    build_head,
    join_head,
    pool_features,
    predict_head,
)


@pytest.fixture(scope="module")
def data():
    """Codes in which the label shifts one channel; rows to train, validate and test on."""
    rng = np.random.default_rng(0)
    labels = (np.arange(200) % 2).astype("int8")
    codes = rng.normal(size=(200, 2, 2, 8)).astype("float16")
    codes[..., 3] += 1.5 * labels[:, None, None]
    return codes, labels, (np.arange(120), np.arange(120, 150), np.arange(150, 200))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    codes, labels, (train, val, _) = data
    folder = tmp_path_factory.mktemp("epochs")
    trainer = HeadTrainer(codes.shape[1:], **XVISION)
    return trainer, trainer.train(codes, labels, train, val, seed=1, folder=folder), folder


def test_preset_is_that_of_the_study():
    assert XVISION == {"units": (512, 512), "learning_rate": 0.01, "batch_size": 20, "epochs": 20}
    head = build_head((7, 7, 512))
    assert head.count_params() == 7 * 7 * 512 * 512 + 512 * 512 + 2 * 4 * 512 + 512 + 1


def test_head_learns_and_keeps_the_best_epoch(data, trained):
    codes, labels, (_, val, test) = data
    trainer, history, folder = trained
    assert roc_auc(labels[test], trainer.predict(codes, test))[0] > 0.9
    assert history["epoch"].tolist() == list(range(1, 21)) and history["best"].sum() == 1
    assert history["val_loss"].idxmin() == history["best"].idxmax()
    prob = trainer.predict(codes, val)
    wrong = ((prob >= 0.5) != labels[val]).mean()
    assert history.loc[history["best"], "val_error"].item() == pytest.approx(wrong)
    assert history["loss"].iloc[-1] < history["loss"].iloc[0] and history["error"].between(0, 1).all()
    files = sorted(folder.iterdir())
    assert [path.name for path in files] == [f"epoch-{epoch:02d}.weights.h5" for epoch in range(1, 21)]
    best = int(history.loc[history["best"], "epoch"].item())
    head = build_head(codes.shape[1:])
    head.load_weights(files[best - 1])
    assert np.allclose(predict_head(head, codes[val].astype("float32")), prob, atol=1e-6)


def test_same_seed_gives_the_same_training_whatever_came_before(data, trained):
    codes, labels, (train, val, test) = data
    trainer = HeadTrainer(codes.shape[1:], units=(16,), epochs=3)
    trainer.train(codes, labels, train, val, seed=1)
    first = trainer.predict(codes, test)
    trainer.train(codes, 1 - labels, train, val, seed=2)
    trainer.train(codes, labels, train, val, seed=1)
    assert np.allclose(trainer.predict(codes, test), first, atol=1e-5)


def test_answers_do_not_depend_on_neighbors_but_with_batch_moments_they_do(data, trained):
    codes, _, (_, _, test) = data
    trainer, _, _ = trained
    whole = trainer.predict(codes, test)
    assert np.allclose(trainer.predict(codes, test[:25]), whole[:25], atol=1e-6)
    flawed = trainer.predict(codes, test, batch_moments=True)
    other = trainer.predict(codes, test[:30], batch_moments=True)
    assert not np.allclose(flawed[:30], other, atol=1e-3)
    assert np.allclose(trainer.predict(codes, test), whole, atol=1e-6)  # and leave no trace in the weights


def test_batch_moments_are_those_of_both_classes_whatever_the_order(data, trained):
    """Batches of one class would lose what tells it from the other, which no test set of the original did."""
    codes, labels, (_, _, test) = data
    by_class = test[np.argsort(labels[test], kind="stable")]
    assert roc_auc(labels[by_class], trained[0].predict(codes, by_class, batch_moments=True))[0] > 0.9


def test_a_remainder_of_one_image_is_never_a_batch(data):
    codes, labels, (train, val, _) = data
    trainer = HeadTrainer(codes.shape[1:], units=(8,), epochs=2)
    history = trainer.train(codes, labels, train[:41], val)
    assert np.isfinite(history["loss"]).all()


def test_fewer_images_than_a_batch_still_train(data):
    codes, labels, (train, val, _) = data
    history = HeadTrainer(codes.shape[1:], units=(8,), epochs=2).train(codes, labels, train[:7], val)
    assert np.isfinite(history["loss"]).all()


def test_logistic_regression_is_that_of_the_codes_themselves(data):
    """The rotation must change nothing: compared with a fit without it at the chosen penalty."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    codes, labels, (train, val, test) = data
    logistic = LogisticHead()
    logistic.train(codes, labels, train, val)
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=logistic.penalty, max_iter=2000))
    plain.fit(codes[train].reshape(len(train), -1).astype("float32"), labels[train])
    expected = plain.predict_proba(codes[test].reshape(len(test), -1).astype("float32"))[:, 1]
    assert np.allclose(logistic.predict(codes, test), expected, atol=1e-2)
    assert roc_auc(labels[test], expected)[0] > 0.9


def test_pooled_codes_are_means_over_the_image(data):
    codes, _, _ = data
    assert np.allclose(pool_features(codes), codes.astype("float32").mean(axis=(1, 2)), atol=1e-6)


def test_joined_model_answers_from_images_as_the_head_from_codes(data):
    images = keras.Input((16, 16, 1))
    network = keras.Model(images, keras.layers.Conv2D(4, 8, strides=8)(images))
    head = build_head((2, 2, 4), units=(8,))
    rows = np.random.default_rng(0).uniform(0, 255, (5, 16, 16, 1)).astype("float32")
    logits = np.asarray(join_head(Backbone(network, {}), head)(rows))[:, 0]
    expected = predict_head(head, np.asarray(network(rows)))
    assert np.allclose(1 / (1 + np.exp(-logits)), expected, atol=1e-5)
