"""What more than one study needs for training: losses for rare classes, exact AUC, a run that goes on."""

import contextlib
import hashlib
import io
import json
import os
import time
import warnings
from pathlib import Path

import keras
import numpy as np
from keras import ops

from .files import write_text
from .model import predict_logits
from .statistics import roc_auc


@keras.saving.register_keras_serializable("chestxray")
class WeightedBinaryCrossentropy(keras.losses.Loss):
    """Binary cross-entropy on logits in which a positive of class c counts `positive_weights[c]` times.

    Args:
        positive_weights: sequence of floats (classes,).
    """

    def __init__(self, positive_weights, reduction="sum_over_batch_size", name="weighted_bce"):
        super().__init__(reduction=reduction, name=name)
        self.positive_weights = [float(weight) for weight in positive_weights]

    def call(self, y_true, y_pred):
        """Returns float32 (batch,) from labels and logits (batch, classes)."""
        positive = y_true * ops.softplus(-y_pred) * ops.convert_to_tensor(self.positive_weights, "float32")
        return ops.mean(positive + (1.0 - y_true) * ops.softplus(y_pred), axis=-1)

    def get_config(self):
        """Returns what rebuilds the loss."""
        return super().get_config() | {"positive_weights": self.positive_weights}


@keras.saving.register_keras_serializable("chestxray")
class AsymmetricLoss(keras.losses.Loss):
    """Asymmetric loss for multi-label classification on logits (Ridnik et al., ICCV 2021, equation 8).

    Args:
        gamma_negative: focusing exponent of negatives; the paper's default is 4.
        gamma_positive: focusing exponent of positives; the paper's default is 1.
        margin: probability by which negatives are shifted; the paper's default is 0.05.
    """

    def __init__(
        self, gamma_negative=4.0, gamma_positive=1.0, margin=0.05, reduction="sum_over_batch_size", name="asymmetric"
    ):
        super().__init__(reduction=reduction, name=name)
        self.gamma_negative, self.gamma_positive, self.margin = gamma_negative, gamma_positive, margin

    def call(self, y_true, y_pred):
        """Returns float32 (batch,) from labels and logits (batch, classes)."""
        probs = ops.sigmoid(y_pred)
        shifted = ops.maximum(probs - self.margin, 0.0)
        positive = y_true * ops.power(1.0 - probs, self.gamma_positive) * ops.softplus(-y_pred)
        negative = (1.0 - y_true) * ops.power(shifted, self.gamma_negative) * -ops.log(1.0 - shifted + 1e-7)
        return ops.mean(positive + negative, axis=-1)

    def get_config(self):
        """Returns what rebuilds the loss."""
        own = {name: getattr(self, name) for name in ("gamma_negative", "gamma_positive", "margin")}
        return super().get_config() | own


def make_loss(name, labels):
    """Makes one of the losses by name; all take labels and logits (batch, classes).

    Args:
        name: "weighted_bce" (a positive counts as the square root of negatives over positives, at most 10: between
            no weights and full balance), "bce", "focal" (Lin et al., ICCV 2017) or "asymmetric".
        labels: float array (films, classes) of the training films.

    Returns:
        A keras.losses.Loss.

    Raises:
        ValueError: the name is none of these.
    """
    if name == "weighted_bce":
        positives = np.maximum(labels.sum(0), 1)
        return WeightedBinaryCrossentropy(np.clip(np.sqrt((len(labels) - positives) / positives), 1, 10))
    if name == "bce":
        return keras.losses.BinaryCrossentropy(from_logits=True)
    if name == "focal":
        return keras.losses.BinaryFocalCrossentropy(from_logits=True)
    if name == "asymmetric":
        return AsymmetricLoss()
    raise ValueError(f'LOSS is "{name}"; known are "weighted_bce", "bce", "focal" and "asymmetric".')


@contextlib.contextmanager
def averaged_weights(model):
    """Puts the optimizer's moving average of the weights into the model for the time of a `with` block."""
    if not getattr(model.optimizer, "use_ema", False):
        yield
        return
    # Not `keras.callbacks.SwapEMAWeights`: on TensorFlow it swaps by adding and subtracting, which rounds the weights.
    own = [ops.copy(ops.convert_to_tensor(variable)) for variable in model.trainable_variables]
    model.optimizer.finalize_variable_values(model.trainable_variables)
    try:
        yield
    finally:
        for variable, value in zip(model.trainable_variables, own, strict=True):
            variable.assign(value)


class ValidationAUC(keras.callbacks.Callback):
    """Measures exact AUC and loss on the validation films after each epoch, and keeps the best weights.

    Adds `val_auc` (mean over the classes that have positives and negatives; NaN where none has) and `val_loss` to the
    logs, so it stands before every callback that reads them. `keras.metrics.AUC` bins scores and can be far off for
    rare classes. With `use_ema` the averaged weights are measured and kept.

    Args:
        dataset: from `make_eval_dataset`.
        labels: float array (films, classes) in the order of the dataset.
        best_path: where to write the best weights; ends in `.weights.h5`.
    """

    def __init__(self, dataset, labels, best_path):
        super().__init__()
        self.dataset, self.labels, self.best_path = dataset, labels, Path(best_path)
        self.best_auc, self.best_epoch = -1.0, -1

    def on_train_begin(self, logs=None):
        """Begins anew, as Keras' own callbacks do: each stage has its best epoch, and the last stage's counts."""
        self.best_auc, self.best_epoch = -1.0, -1

    def on_epoch_end(self, epoch, logs=None):
        """Measures, and saves the weights if they are the best so far, or if there is nothing to measure on.

        Raises:
            FloatingPointError: the training loss is not finite. What earlier epochs wrote stays as it is.
        """
        if not np.isfinite(logs["loss"]):
            raise FloatingPointError(
                f"The loss became {logs['loss']} in epoch {epoch + 1}. The last good epoch is kept in "
                f'{self.best_path.parent}. Lower LEARNING_RATE or use PRECISION = "float32".'
            )
        with averaged_weights(self.model):
            logits = predict_logits(self.model, self.dataset, len(self.labels))
            aucs = roc_auc(self.labels, logits) if len(self.labels) else np.array([np.nan])
            auc = float(np.mean(aucs[np.isfinite(aucs)])) if np.isfinite(aucs).any() else float("nan")
            loss = self.model.loss(self.labels, logits) if len(self.labels) else float("nan")
            logs["val_auc"], logs["val_loss"] = auc, float(loss)
            if auc > self.best_auc or np.isnan(auc):
                part = self.best_path.with_name("part-" + self.best_path.name)
                # A model that was never compiled leaves out the optimizer, which is three times as large.
                keras.Model(self.model.inputs, self.model.outputs).save_weights(part)
                os.replace(part, self.best_path)
                self.best_auc, self.best_epoch = -1.0 if np.isnan(auc) else auc, epoch


class TrainingState(keras.callbacks.Callback):
    """Writes all that a run needs to go on after each epoch, and brings it back: it stands last in the list.

    One file holds the variables of model and optimizer (weights, moments, moving averages, random seeds), the
    counters of the other callbacks and the history, behind its own SHA-256. It is written to a temporary name and
    renamed, and the one before it is kept, so that a kill at any moment leaves a good one.

    Args:
        folder: path to write to.
        settings: dict of what must not change between the parts of a run, JSON values.
        history_path: CSV file with a row an epoch.

    Attributes:
        history: list of dicts, a row an epoch, over all parts and stages of the run.
        next_epoch: int, the epoch to go on with.
        stopped: bool, whether another callback has ended the stage early.
    """

    def __init__(self, folder, settings, history_path):
        super().__init__()
        self.folder, self.history_path = Path(folder), Path(history_path)
        self.settings = json.loads(json.dumps(settings))
        self.history, self.counters, self.others = [], {}, []
        self.stage, self.next_epoch, self.stopped = None, 0, False

    def restore(self, model, stage, callbacks=()):
        """Brings back the newest good state, if there is one. Called after `compile`, before `fit`.

        Args:
            model: compiled keras.Model.
            stage: name of the stage; optimizer and callbacks are brought back only within the same stage.
            callbacks: the other callbacks of the coming `fit`.

        Returns:
            The epoch to begin with, 0 in a new run.

        Raises:
            ValueError: the state belongs to a run with other settings; the message names them.
        """
        self.stage, self.others = stage, list(callbacks)
        arrays, meta = self._read()
        if meta is None:
            return 0
        differing = [key for key in self.settings if meta["settings"].get(key) != self.settings[key]]
        if differing:
            was = ", ".join(f"{key} was {meta['settings'].get(key)!r}, now {self.settings[key]!r}" for key in differing)
            raise ValueError(
                f"{self.folder} holds a run with other settings ({was}). "
                "Set them back, use another RUN_DIR, or set START_OVER = True."
            )
        variables = list(model.variables)
        if meta["stage"] == stage:
            model.optimizer.build(model.trainable_variables)
            variables += list(model.optimizer.variables)
            self.counters = meta["counters"]
        for number, variable in enumerate(variables):
            variable.assign(arrays[f"v{number}"])
        self.history, self.next_epoch = meta["history"], meta["next_epoch"]
        self.stopped = meta["stopped"] and meta["stage"] == stage
        return self.next_epoch

    def on_train_begin(self, logs=None):
        """Brings back the other callbacks' counters, last of all, since some of them reset themselves here."""
        for callback in self.others:
            vars(callback).update(self.counters.get(type(callback).__name__, {}))

    def on_epoch_begin(self, epoch, logs=None):
        """Starts the clock."""
        self.started = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        """Adds the epoch to the history and writes the state."""
        row = {"epoch": epoch, "stage": self.stage} | {key: float(value) for key, value in logs.items()}
        row["learning_rate"] = float(ops.convert_to_numpy(self.model.optimizer.learning_rate))
        row["seconds"] = round(time.perf_counter() - self.started, 2)
        self.history.append(row)
        self.next_epoch, self.stopped = epoch + 1, self.model.stop_training
        self._write()
        self._write_history()

    def _write_history(self):
        names = list(dict.fromkeys(key for row in self.history for key in row))
        lines = [",".join(names)] + [",".join(str(row.get(name, "")) for name in names) for row in self.history]
        write_text(self.history_path, "\n".join(lines) + "\n")

    def _write(self):
        simple = (bool, int, float, type(None))
        counters = {
            type(callback).__name__: {k: v for k, v in vars(callback).items() if isinstance(v, simple)}
            for callback in self.others
        }
        meta = {"settings": self.settings, "stage": self.stage, "next_epoch": self.next_epoch}
        meta |= {"stopped": self.stopped, "history": self.history, "counters": counters}
        variables = [*self.model.variables, *self.model.optimizer.variables]
        buffer = io.BytesIO()
        arrays = {f"v{number}": ops.convert_to_numpy(variable) for number, variable in enumerate(variables)}
        np.savez(buffer, meta=np.array(json.dumps(meta)), **arrays)
        content = buffer.getbuffer()
        self.folder.mkdir(parents=True, exist_ok=True)
        newest, part = self.folder / "state.bin", self.folder / "state.part"
        with open(part, "wb") as file:
            file.write(hashlib.sha256(content).digest())
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if newest.exists():
            os.replace(newest, self.folder / "state.previous.bin")
        os.replace(part, newest)

    def _read(self):
        paths = [path for name in ("state.bin", "state.previous.bin") if (path := self.folder / name).exists()]
        for path in paths:
            content = path.read_bytes()
            if hashlib.sha256(content[32:]).digest() == content[:32]:
                arrays = np.load(io.BytesIO(content[32:]), allow_pickle=False)
                return arrays, json.loads(str(arrays["meta"]))
            warnings.warn(f"{path} is damaged and is passed over.", stacklevel=2)
        if paths:
            raise ValueError(f"Every state in {self.folder} is damaged. Set START_OVER = True to begin anew.")
        return None, None
