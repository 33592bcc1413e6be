"""The validation AUC is exact and of the averaged weights."""

import numpy as np
import pytest
import resumable_run
from sklearn.metrics import roc_auc_score

from helpers.pipeline import make_eval_dataset
from helpers.training import ValidationAUC
from helpers.training.optimizer import inner_optimizer
from helpers.training.validation import averaged_weights

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_validation_auc_is_exact_and_of_the_averaged_weights(packed, precision):
    labels, dataset = packed.labels("val"), make_eval_dataset(packed, "val", 8)
    model = resumable_run.build_model(seed=3, precision=precision)
    callback = ValidationAUC(dataset, labels)
    x = np.random.default_rng(0).normal(size=(32, 48, 48, 1)).astype("float32") * 255
    y = np.random.default_rng(1).integers(0, 2, (32, 14)).astype("float32")
    history = model.fit(x, y, batch_size=8, epochs=2, callbacks=[callback], verbose=0).history
    fresh = resumable_run.build_model(seed=4, precision=precision)
    fresh.set_weights(callback.best_weights)
    logits = fresh.predict(dataset, verbose=0)[: len(labels)]
    both = (labels.sum(0) > 0) & (labels.sum(0) < len(labels))
    exact = roc_auc_score(labels[:, both], logits[:, both], average="macro")
    assert history["val_auc"][callback.best_epoch] == pytest.approx(exact, abs=1e-9) == callback.best_auc
    assert callback.best_epoch == int(np.argmax(history["val_auc"]))

    averages = [average.numpy() for average in inner_optimizer(model)._model_variables_moving_average]
    with averaged_weights(model):
        assert all(np.array_equal(a, b) for a, b in zip(model.trainable_variables, averages, strict=True))
    before = [weight + 0.5 for weight in model.get_weights()]
    model.set_weights(before)
    with pytest.raises(RuntimeError), averaged_weights(model):
        assert not np.array_equal(model.get_weights()[0], before[0])
        raise RuntimeError
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), before, strict=True))  # put back

    callback = ValidationAUC(dataset, np.zeros_like(labels))  # without positives, the latest weights are kept
    callback.set_model(model)
    callback.on_train_begin()
    for epoch in range(2):
        callback.on_epoch_end(epoch, logs := {})
        assert np.isnan(logs["val_auc"]) and callback.best_epoch == epoch and callback.best_weights
