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

# The settings of the Xvision study: two layers, plain SGD.
XVISION = MappingProxyType({"units": (512, 512), "learning_rate": 0.01, "batch_size": 20, "epochs": 20})
# Values of scikit-learn's C, the inverse of the penalty: from almost nothing learned to almost no penalty.
_PENALTIES = tuple(10.0**power for power in range(-6, 2))
# Keras' 0.99 averages over some hundred steps. A small set has a dozen an epoch, so that early epochs would be
# validated with statistics of the untrained network.
_NORM_MOMENTUM = 0.9
_STEPS = 16  # steps in one call of the device: a step of a small network takes less time than calling it


def build_head(feature_shape, units=(512, 512)):
    """Builds the head of the Xvision study: flat features, dense layers with batch normalization, one logit.

    Args:
        feature_shape: shape of one image's features, (h, w, channels).
        units: outputs of the dense layers.

    Returns:
        A keras.Model: float32 (n, *feature_shape) to the logits of `Nodule` (n, 1), not compiled.
    """
    features = keras.Input(tuple(feature_shape), name="features")
    x = keras.layers.Flatten(name="flat")(features)
    for number, n_outputs in enumerate(units, start=1):
        x = keras.layers.Dense(n_outputs, use_bias=False, name=f"dense_{number}")(x)
        x = keras.layers.BatchNormalization(momentum=_NORM_MOMENTUM, name=f"norm_{number}")(x)
        x = keras.layers.ReLU(name=f"relu_{number}")(x)
    return keras.Model(features, keras.layers.Dense(1, name="logit")(x), name="head")


def join_head(backbone, head):
    """Joins a `Backbone` and a head into one keras.Model: float32 images (n, side, side, 1), 0 to 255, to logits."""
    return keras.Model(backbone.model.inputs[0], head(backbone.model.outputs[0]), name="nodules")


class HeadTrainer:
    """Trains a head from new random weights, any number of times, and traces or compiles it only once.

    Attributes:
        head: the keras.Model, with the weights of the last training.
    """

    def __init__(self, feature_shape, *, units=(512, 512), learning_rate=0.01, batch_size=20, epochs=20):
        """Builds the head.

        Args:
            feature_shape: shape of one image's features.
            units: see `build_head`.
            learning_rate: float, of plain SGD.
            batch_size: int, images a step; fewer where there are fewer images.
            epochs: int.
        """
        self.head = build_head(feature_shape, units)
        self._units, self._batch_size, self._epochs = units, batch_size, epochs
        self.head.compile(
            keras.optimizers.SGD(learning_rate),
            keras.losses.BinaryCrossentropy(from_logits=True),
            weighted_metrics=[keras.metrics.BinaryAccuracy(threshold=0.0, name="accuracy")],
            steps_per_execution=_STEPS,
            jit_compile=keras.backend.backend() == "jax",  # required there; on a CPU it costs TensorFlow time
        )

    def train(self, features, labels, train, val, *, seed=0):
        """Trains on some images, and keeps the weights of the epoch with the smallest validation loss.

        Args:
            features: (images, *feature_shape) array, may be memory-mapped.
            labels: (images,) 0 and 1.
            train: row numbers of the images to train on.
            val: row numbers of the images that choose the epoch.
            seed: int, of the first weights and the order of images.

        Returns:
            DataFrame, a row an epoch: `epoch` (from 1), `loss`, `error`, `val_loss`, `val_error` (the errors are shares
            of images on the wrong side of 0.5), `best` (bool).
        """
        keras.utils.set_random_seed(seed)
        self.head.set_weights(build_head(self.head.input_shape[1:], self._units).get_weights())
        y = np.float32(labels)[:, None]
        batches = _Batches(features, y, train, min(self._batch_size, len(train)), seed)
        best = keras.callbacks.EarlyStopping("val_loss", patience=self._epochs, restore_best_weights=True)
        known = {"validation_data": (take_features(features, val), y[val]), "validation_batch_size": 256}
        fit = self.head.fit(batches, epochs=self._epochs, shuffle=False, verbose=0, callbacks=[best], **known)
        history = pd.DataFrame({"epoch": 1 + np.array(fit.epoch)})
        for prefix in ("", "val_"):
            history[f"{prefix}loss"] = fit.history[f"{prefix}loss"]
            history[f"{prefix}error"] = 1 - np.array(fit.history[f"{prefix}accuracy"])
        return history.assign(best=history["epoch"].eq(best.best_epoch + 1))

    def predict(self, features, rows, *, batch_moments=False):
        """Predicts images.

        Args:
            features: (images, *feature_shape) array.
            rows: row numbers of the images.
            batch_moments: whether batch normalization uses the mean and variance of the images that are predicted
                together, as in training, so that an image's result depends on the others in its batch. Batches are
                random, since files in order of their names may hold one class first. For demonstration only.

        Returns:
            float64 array (len(rows),): probabilities of `Nodule`.
        """
        if not batch_moments:
            return _predict(self.head, take_features(features, rows))
        trained = self.head.get_weights()
        order = np.random.default_rng(0).permutation(len(rows))
        logits = np.empty(len(rows))
        for batch in np.array_split(order, max(1, len(rows) // self._batch_size)):
            outputs = self.head(take_features(features, np.asarray(rows)[batch]), training=True)
            logits[batch] = keras.ops.convert_to_numpy(outputs)[:, 0]
        self.head.set_weights(trained)  # the running moments have changed
        return expit(logits)


class LogisticHead:
    """L2-regularized logistic regression on standardized features, its penalty chosen on validation images.

    An image mostly has far more features than there are images. A rotation into the space that the images span (a
    complete linear PCA, computed from their scalar products) leaves the regularized solution as it is, since the
    penalty does not change under rotation, and makes fitting fast.

    Memory: the features twice in float32; where an image has more features than there are images, also four times the
    square of the number of images in float64. Time grows with the cube of that number. 10,000 images of 25,088 features
    take 2 GB and 3 GB, and some minutes. For many more, average the features first, see `pool_features`.

    Attributes:
        penalty: scikit-learn's C that the last training chose.
    """

    def train(self, features, labels, train, val, *, seed=0):
        """Fits on some images.

        Args:
            features: (images, ...) array, may be memory-mapped.
            labels: (images,) 0 and 1.
            train: row numbers of the images to fit to.
            val: row numbers of the images that choose the penalty.
            seed: ignored, since nothing here is random; it makes the call the same as that of `HeadTrainer`.
        """
        fit_to = take_features(features, train).reshape(len(train), -1)
        is_wide = fit_to.shape[1] > len(train)
        self._rotate = make_pipeline(StandardScaler(), KernelPCA(eigen_solver="dense") if is_wide else "passthrough")
        fit_to = self._rotate.fit_transform(fit_to)
        judge_by = self._rotate.transform(take_features(features, val).reshape(len(val), -1))
        fits = [LogisticRegression(C=penalty, max_iter=500).fit(fit_to, labels[train]) for penalty in _PENALTIES]
        losses = [log_loss(labels[val], fit.predict_proba(judge_by)[:, 1], labels=[0, 1]) for fit in fits]
        self._fit = fits[int(np.argmin(losses))]
        self.penalty = float(self._fit.C)

    def predict(self, features, rows):
        """Predicts images: float64 array (len(rows),), probabilities of `Nodule`."""
        rotated = self._rotate.transform(take_features(features, rows).reshape(len(rows), -1))
        return self._fit.predict_proba(rotated)[:, 1]


def pool_features(features):
    """Averages features (images, h, w, channels) over the image: float32 array (images, channels)."""
    return np.concatenate(
        [features[start : start + 256].mean(axis=(1, 2), dtype="float32") for start in range(0, len(features), 256)]
    )


def take_features(features, rows):
    """Returns some images' features as a float32 array in memory."""
    return np.asarray(features[np.asarray(rows)], dtype="float32")


class _Batches(keras.utils.PyDataset):
    """Batches that are read from disk as needed, in an order that depends on seed and epoch only.

    The last, smaller batch of an epoch is left out, other images each time: batch normalization of a single image would
    divide by a variance of zero.
    """

    def __init__(self, features, y, rows, batch_size, seed):
        super().__init__()
        self._features, self._y, self._rows, self._batch_size = features, y, np.asarray(rows), batch_size
        self._rng = np.random.default_rng(seed)
        self.on_epoch_end()

    def __len__(self):
        return len(self._rows) // self._batch_size

    def __getitem__(self, number):
        rows = self._order[number * self._batch_size : (number + 1) * self._batch_size]
        return take_features(self._features, rows), self._y[rows]

    def on_epoch_end(self):
        self._order = self._rng.permutation(self._rows)


def _predict(head, features):
    """Returns probabilities, float64 (n,), from features (n, *feature_shape)."""
    return expit(np.asarray(head.predict(features, batch_size=256, verbose=0), "float64")[:, 0])
