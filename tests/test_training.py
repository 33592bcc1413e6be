"""Losses, exact validation AUC, and runs that go on where they were killed."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.metrics import roc_auc_score

from helpers import (
    AsymmetricLoss,
    TrainingState,
    ValidationAUC,
    WeightedBinaryCrossentropy,
    averaged_weights,
    make_loss,
)

N_FILMS, BATCH = 96, 16


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
    assert float(AsymmetricLoss()(labels, logits)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("loss", [WeightedBinaryCrossentropy([1.0, 2.0, 3.0, 4.0]), AsymmetricLoss(3.0, 0.5, 0.1)])
def test_losses_survive_serialization(loss, labels_and_logits):
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert float(again(*labels_and_logits)) == float(loss(*labels_and_logits))


def test_loss_weights_grow_with_rarity_and_stay_bounded():
    labels = np.zeros((1000, 3), "float32")
    labels[:500, 0] = labels[:50, 1] = 1
    weights = make_loss("weighted_bce", labels).positive_weights
    assert weights[0] == 1 and weights[1] == pytest.approx(np.sqrt(950 / 50)) and weights[2] == 10


@pytest.mark.parametrize("name", ["weighted_bce", "bce", "focal", "asymmetric"])
def test_every_named_loss_prefers_right_logits(name, labels_and_logits):
    labels, _ = labels_and_logits
    right = (labels * 2 - 1) * 3
    loss = make_loss(name, labels)
    assert float(loss(labels, right)) < float(loss(labels, -right))


def test_unknown_loss_is_refused_by_name():
    with pytest.raises(ValueError, match='LOSS is "hinge"'):
        make_loss("hinge", np.ones((2, 2)))


# A small network on arrays stands for DenseNet-121: the callbacks do not care.


def make_arrays():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(N_FILMS, 8, 8, 1)).astype("float32")
    score = np.stack([x[:, :4].mean((1, 2, 3)), x[:, 4:].mean((1, 2, 3))], axis=1)
    return x, (score + rng.normal(size=score.shape) * 0.05 > 0).astype("float32")


def make_model(learning_rate=1e-2, use_ema=True, seed=3):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([
        keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization(), keras.layers.ReLU(),
        keras.layers.Flatten(), keras.layers.Dropout(0.3), keras.layers.Dense(2),
    ])  # fmt: skip
    optimizer = keras.optimizers.AdamW(learning_rate, use_ema=use_ema, ema_momentum=0.9)
    model.compile(optimizer, keras.losses.BinaryCrossentropy(from_logits=True), jit_compile=False)
    return model


def make_train(first_epoch, epochs):
    """Batches as a pure function of the epoch, as `make_train_dataset` gives them."""
    x, y = make_arrays()
    orders = [np.random.default_rng([7, epoch]).permutation(N_FILMS) for epoch in range(first_epoch, epochs)]
    order = np.concatenate(orders)
    return tf.data.Dataset.from_tensor_slices((x[order], y[order])).batch(BATCH, drop_remainder=True)


def make_val():
    x, y = make_arrays()
    return tf.data.Dataset.from_tensor_slices((x[:40], y[:40], np.ones(40, "float32"))).batch(20), y[:40]


def train(folder, epochs, settings=None, model=None, patience=100, total=None):
    """Trains until `epochs` as notebook 2 does, going on where an earlier call in the folder stopped."""
    model = model or make_model()
    val_ds, val_labels = make_val()
    folder.mkdir(exist_ok=True)
    callbacks = [
        ValidationAUC(val_ds, val_labels, folder / "best.weights.h5"),
        keras.callbacks.EarlyStopping("val_auc", mode="max", patience=patience),
        keras.callbacks.ReduceLROnPlateau("val_auc", mode="max", factor=0.5, patience=1),
    ]
    state = TrainingState(folder, settings or {"SEED": 0}, folder / "history.csv")
    first = state.restore(model, "all", callbacks)
    if first < epochs and not state.stopped:
        model.fit(
            make_train(first, epochs), initial_epoch=first, epochs=epochs, steps_per_epoch=N_FILMS // BATCH,
            callbacks=[*callbacks, state], verbose=0,
        )  # fmt: skip
    return model, state, callbacks


def history_without_times(state):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in state.history]


def test_a_continued_run_is_bit_identical_to_an_uninterrupted_one(tmp_path):
    _, whole, whole_callbacks = train(tmp_path / "whole", 6)
    train(tmp_path / "parts", 2)
    train(tmp_path / "parts", 3, model=make_model(seed=99))  # other initial weights: all must come from the state
    _, parts, parts_callbacks = train(tmp_path / "parts", 6, model=make_model(seed=77))
    assert history_without_times(parts) == history_without_times(whole)
    assert [row["epoch"] for row in parts.history] == list(range(6))
    assert parts_callbacks[0].best_epoch == whole_callbacks[0].best_epoch
    assert parts_callbacks[2].best == whole_callbacks[2].best
    first, second = make_model(), make_model()
    first.load_weights(tmp_path / "whole" / "best.weights.h5")
    second.load_weights(tmp_path / "parts" / "best.weights.h5")
    assert all(np.array_equal(a, b) for a, b in zip(first.get_weights(), second.get_weights(), strict=True))
    state_arrays = [TrainingState(tmp_path / name, {}, tmp_path / "x.csv")._read()[0] for name in ("whole", "parts")]
    keys = [key for key in state_arrays[0].files if key != "meta"]
    assert len(keys) > 20 and all(np.array_equal(state_arrays[0][key], state_arrays[1][key]) for key in keys)


def test_history_file_has_a_row_an_epoch_after_a_continuation(tmp_path):
    train(tmp_path, 2)
    _, state, _ = train(tmp_path, 4)
    lines = (tmp_path / "history.csv").read_text().splitlines()
    assert len(lines) == 5 and lines[0].startswith("epoch,stage,loss,val_auc,val_loss")
    assert float(lines[4].split(",")[3]) == state.history[3]["val_auc"]


def test_a_damaged_state_is_passed_over_for_the_one_before(tmp_path):
    train(tmp_path, 3)
    newest = tmp_path / "state.bin"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match="state.bin is damaged"):
        _, state, _ = train(tmp_path, 3)
    assert [row["epoch"] for row in state.history] == [0, 1, 2]


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_without_any_good_state_the_run_does_not_silently_begin_anew(tmp_path, damage):
    train(tmp_path, 2)
    for path in tmp_path.glob("state*.bin"):
        path.write_bytes(path.read_bytes()[:-1] if damage is None else damage)
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(ValueError, match="START_OVER"):
        train(tmp_path, 3)


def test_other_settings_are_refused_by_name(tmp_path):
    train(tmp_path, 1, settings={"SEED": 0, "split_sha256": "abc", "IMAGE_SIZE": 64})
    with pytest.raises(ValueError, match="split_sha256 was 'abc', now 'def'"):
        train(tmp_path, 2, settings={"SEED": 0, "split_sha256": "def", "IMAGE_SIZE": 64})


def test_a_run_that_stopped_early_stays_stopped(tmp_path):
    _, state, _ = train(tmp_path, 30, patience=2)
    n_epochs = len(state.history)
    assert state.stopped and n_epochs < 30
    _, again, _ = train(tmp_path, 30, patience=2)
    assert len(again.history) == n_epochs


def test_the_next_stage_takes_the_weights_but_not_the_optimizer(tmp_path):
    train(tmp_path, 2)
    model = make_model(seed=50)
    state = TrainingState(tmp_path, {"SEED": 0}, tmp_path / "history.csv")
    assert state.restore(model, "another stage") == 2
    arrays, _ = state._read()
    assert np.array_equal(model.get_weights()[0], arrays["v0"])
    assert int(model.optimizer.iterations) == 0


def test_validation_auc_is_exact_and_of_the_averaged_weights(tmp_path):
    _, state, _ = train(tmp_path, 1)
    x, y = make_arrays()
    fresh = make_model()
    fresh.load_weights(tmp_path / "best.weights.h5")
    exact = roc_auc_score(y[:40], fresh.predict(x[:40], verbose=0), average="macro")
    assert state.history[0]["val_auc"] == pytest.approx(exact, abs=1e-9)
    arrays, _ = state._read()  # the raw weights, which training goes on with, are others
    assert not np.array_equal(fresh.get_weights()[0], arrays["v0"])


def test_averaged_weights_are_put_back_after_an_error():
    model = make_model()
    x, y = make_arrays()
    model.fit(x, y, verbose=0)
    model.train_on_batch(x[:8], y[:8])
    before = model.get_weights()
    with pytest.raises(RuntimeError), averaged_weights(model):
        assert not np.array_equal(model.get_weights()[0], before[0])
        raise RuntimeError
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), before, strict=True))


def test_validation_without_positives_keeps_the_latest_weights(tmp_path):
    model = make_model()
    val_ds, val_labels = make_val()
    callback = ValidationAUC(val_ds, np.zeros_like(val_labels), tmp_path / "best.weights.h5")
    history = model.fit(make_train(0, 2), epochs=2, steps_per_epoch=6, callbacks=[callback], verbose=0).history
    assert np.isnan(history["val_auc"]).all() and callback.best_epoch == 1
    assert (tmp_path / "best.weights.h5").exists()


def test_nan_loss_stops_the_run_and_leaves_the_good_files(tmp_path):
    train(tmp_path, 2)
    good = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = make_model()
    val_ds, val_labels = make_val()
    callbacks = [ValidationAUC(val_ds, val_labels, tmp_path / "best.weights.h5")]
    state = TrainingState(tmp_path, {"SEED": 0}, tmp_path / "history.csv")
    first = state.restore(model, "all", callbacks)
    broken = make_train(first, 3).map(lambda x, y: (x * float("nan"), y))
    with pytest.raises(FloatingPointError, match=r"epoch 3.*LEARNING_RATE"):
        model.fit(broken, initial_epoch=first, epochs=3, steps_per_epoch=6, callbacks=[*callbacks, state], verbose=0)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == good
