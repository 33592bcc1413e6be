"""Small classifiers on the features of images: the 512x512 network of the Xvision study, and logistic regression."""

from types import MappingProxyType

import keras
import numpy as np
import pandas as pd
from scipy.special import expit
from sklearn.decomposition import KernelPCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ..evaluation.auc import roc_auc
from ..runtime.files import local_draft

# Of scikit-learn's C, which is the inverse of the penalty: from hardly anything learned to hardly any penalty.
PENALTIES = tuple(10.0**power for power in range(-6, 2))
# What the Xvision study trained: two layers, plain SGD.
XVISION = MappingProxyType({"units": (512, 512), "learning_rate": 0.01, "batch_size": 20, "epochs": 20})
_STEPS = 16  # steps in one call of the device: a step of a small network takes less time than calling it


def build_head(code_shape, units=(512, 512), batch_norm_momentum=0.9):
    """Builds the head of the Xvision study: flat codes, dense layers with batch normalization, one logit.

    Args:
        code_shape: shape of one image's codes, (h, w, channels).
        units: outputs of the dense layers.
        batch_norm_momentum: float in (0, 1). Keras' 0.99 averages over some hundred steps, of which a small set has
            a dozen an epoch, so that early epochs would be validated with statistics of the start.

    Returns:
        A keras.Model: float32 (n, *code_shape) to the logits of `Nodule` (n, 1), not compiled.
    """
    codes = keras.Input(tuple(code_shape), name="codes")
    x = keras.layers.Flatten(name="flat")(codes)
    for number, n_outputs in enumerate(units, start=1):
        x = keras.layers.Dense(n_outputs, use_bias=False, name=f"dense_{number}")(x)
        x = keras.layers.BatchNormalization(momentum=batch_norm_momentum, name=f"norm_{number}")(x)
        x = keras.layers.ReLU(name=f"relu_{number}")(x)
    return keras.Model(codes, keras.layers.Dense(1, name="logit")(x), name="head")


class HeadTrainer:
    """Trains a head from new random weights as often as asked for, and traces or compiles it only once.

    Attributes:
        head: the keras.Model, with the weights of the last training.
    """

    def __init__(self, code_shape, *, units=(512, 512), learning_rate=0.01, batch_size=20, epochs=20):
        """Builds the head.

        Args:
            code_shape: shape of one image's codes.
            units: see `build_head`.
            learning_rate: float, of plain SGD.
            batch_size: int, images a step; fewer where there are fewer images.
            epochs: int.
        """
        self.head = build_head(code_shape, units)
        self._units, self._batch_size, self._epochs = units, batch_size, epochs
        self.head.compile(
            keras.optimizers.SGD(learning_rate),
            keras.losses.BinaryCrossentropy(from_logits=True),
            weighted_metrics=[keras.metrics.BinaryAccuracy(threshold=0.0, name="accuracy")],
            steps_per_execution=_STEPS,
            jit_compile=keras.backend.backend() == "jax",  # which needs it; on a CPU it costs TensorFlow time
        )

    def train(self, codes, labels, train, val, *, seed=0, folder=None):
        """Trains on some images, and keeps the weights of the epoch with the smallest validation loss.

        Args:
            codes: (images, *code_shape) array, may be mapped from disk.
            labels: (images,) 0 and 1.
            train: row numbers of the images to train on.
            val: row numbers of the images that choose the epoch.
            seed: int, of the first weights and the order of images.
            folder: path of a folder for `epoch-NN.weights.h5`, the weights after every epoch; None for none.

        Returns:
            DataFrame, a row an epoch: `epoch` (from 1), `loss`, `error`, `val_loss`, `val_error` (shares of images on
            the wrong side of 0.5), `val_auc`, `best` (bool).
        """
        keras.utils.set_random_seed(seed)
        self.head.set_weights(build_head(self.head.input_shape[1:], self._units).get_weights())
        batches = _Batches(codes, labels, train, min(self._batch_size, len(train)), seed)
        watch = _Watch(take_features(codes, val), np.asarray(labels)[val], folder)
        fitted = self.head.fit(batches, epochs=self._epochs, shuffle=False, verbose=0, callbacks=[watch])
        self.head.set_weights(watch.best_weights)
        history = pd.DataFrame(watch.rows)
        history.insert(1, "loss", fitted.history["loss"])
        history.insert(2, "error", 1 - np.array(fitted.history["accuracy"]))
        return history.assign(best=history["epoch"].eq(watch.best_epoch))

    def predict(self, codes, rows, *, batch_moments=False):
        """Predicts images.

        Args:
            codes: (images, *code_shape) array.
            rows: row numbers of the images.
            batch_moments: whether batch normalization uses the moments of the images that are predicted together, as in
                training, so that an image's answer depends on its neighbors: batches drawn at random, for in the order of
                names images of one class may follow each other. For demonstration only.

        Returns:
            float64 array (len(rows),): probabilities of `Nodule`.
        """
        if not batch_moments:
            return predict_head(self.head, take_features(codes, rows))
        trained = self.head.get_weights()
        order = np.random.default_rng(0).permutation(len(rows))
        logits = np.empty(len(rows))
        for part in np.array_split(order, max(1, len(rows) // self._batch_size)):
            answers = self.head(take_features(codes, np.asarray(rows)[part]), training=True)
            logits[part] = keras.ops.convert_to_numpy(answers)[:, 0]
        self.head.set_weights(trained)  # the running moments have moved
        return expit(logits)


class _Batches(keras.utils.PyDataset):
    """Batches read from a bank as they are needed, in an order that seed and epoch alone determine.

    What remains of an epoch is left out, other images each time: a batch of one would have no variance to normalize by.
    """

    def __init__(self, codes, labels, rows, batch_size, seed):
        super().__init__()
        self._codes, self._labels, self._rows, self._batch_size = codes, labels, np.asarray(rows), batch_size
        self._rng = np.random.default_rng(seed)
        self.on_epoch_end()

    def __len__(self):
        return len(self._rows) // self._batch_size

    def __getitem__(self, number):
        rows = self._order[number * self._batch_size : (number + 1) * self._batch_size]
        return take_features(self._codes, rows), np.float32(self._labels[rows])[:, None]

    def on_epoch_end(self):
        self._order = self._rng.permutation(self._rows)


class _Watch(keras.callbacks.Callback):
    """Measures the validation images after every epoch and keeps the best weights."""

    def __init__(self, codes, labels, folder):
        super().__init__()
        self._codes, self._labels, self._folder = codes, labels, folder
        self.rows, self.best_epoch, self.best_weights = [], 0, None

    def on_epoch_end(self, epoch, logs=None):
        prob = predict_head(self.model, self._codes)
        row = {
            "epoch": epoch + 1,
            "val_loss": log_loss(self._labels, prob, labels=[0, 1]),
            "val_error": float(((prob >= 0.5) != self._labels).mean()),
            "val_auc": float(roc_auc(self._labels, prob)[0]),
        }
        if not self.rows or row["val_loss"] < min(other["val_loss"] for other in self.rows):
            self.best_epoch, self.best_weights = epoch + 1, self.model.get_weights()
        self.rows.append(row)
        if self._folder is not None:
            with local_draft(self._folder / f"epoch-{epoch + 1:02d}.weights.h5") as draft:
                self.model.save_weights(draft)


class LogisticHead:
    """L2-regularized logistic regression on standardized codes, its penalty chosen on validation images.

    Codes mostly have far more numbers than there are images. A rotation into the space that the images span (a complete
    linear PCA) leaves the regularized solution as it is, since the penalty does not see rotations, and makes fitting
    fast; by way of the images' scalar products it is fast itself.

    What it takes grows with the images it is fitted to: their codes twice in float32, and where those are wider than the
    images are many, four squares of that number in float64 and the cube of it in time. 10,000 images of 25,088 numbers
    are 2 GB and 3 GB, and some minutes. For many more, average the codes first, see `pool_features`.

    Attributes:
        penalty: the one of `PENALTIES` that the last training chose.
    """

    def train(self, codes, labels, train, val, *, seed=0):
        """Fits on some images.

        Args:
            codes: (images, ...) array, may be mapped from disk.
            labels: (images,) 0 and 1.
            train: row numbers of the images to fit to.
            val: row numbers of the images that choose among `PENALTIES`.
            seed: int; nothing here is random, but whoever trains need not know.
        """
        fit_to = take_features(codes, train).reshape(len(train), -1)
        is_wide = fit_to.shape[1] > len(train)
        self._rotate = make_pipeline(StandardScaler(), KernelPCA(eigen_solver="dense") if is_wide else "passthrough")
        fit_to = self._rotate.fit_transform(fit_to)
        judge_by = self._rotate.transform(take_features(codes, val).reshape(len(val), -1))
        fits = [LogisticRegression(C=penalty, max_iter=500).fit(fit_to, labels[train]) for penalty in PENALTIES]
        losses = [log_loss(labels[val], fit.predict_proba(judge_by)[:, 1], labels=[0, 1]) for fit in fits]
        self._fit = fits[int(np.argmin(losses))]
        self.penalty = float(self._fit.C)

    def predict(self, codes, rows):
        """Predicts images: float64 array (len(rows),), probabilities of `Nodule`."""
        rotated = self._rotate.transform(take_features(codes, rows).reshape(len(rows), -1))
        return self._fit.predict_proba(rotated)[:, 1]


def pool_features(codes):
    """Averages codes (images, h, w, channels) over the image: float32 array (images, channels)."""
    return np.concatenate(
        [codes[start : start + 256].mean(axis=(1, 2), dtype="float32") for start in range(0, len(codes), 256)]
    )


def take_features(codes, rows):
    """Returns some images' codes as a float32 array in memory."""
    return np.asarray(codes[np.asarray(rows)], dtype="float32")


def predict_head(head, codes):
    """Predicts with a head: float64 array (n,) of probabilities from codes (n, *code_shape)."""
    return expit(np.asarray(head.predict(codes, batch_size=256, verbose=0), "float64")[:, 0])


def join_head(backbone, head):
    """Joins a backbone and its head into one keras.Model from gray images, as `Backbone.model` takes them, to logits."""
    return keras.Model(backbone.model.inputs, head(backbone.model.outputs[0]), name="nodules")
