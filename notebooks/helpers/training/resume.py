"""Training that resumes exactly where it stopped, within an epoch too, and that pauses before its time is over."""

import contextlib
import json
import signal
import threading
import time
import uuid
import warnings
from datetime import UTC, datetime

import keras
import numpy as np
import pandas as pd
from keras import ops

from ..runtime.files import as_path, only_os_errors, write_csv, write_text
from ..runtime.shared import SHARED

_FORMAT = 1  # of a checkpoint's content; another is refused
_SIMPLE = (bool, int, float, type(None))  # attributes of callbacks that are kept, besides lists of arrays


class _Paused(Exception):
    """Leaves `fit` between two steps, after a checkpoint was written."""


class TrainingCheckpoint(keras.callbacks.Callback):
    """Writes all that a run needs to resume exactly as if it had never stopped, and restores it.

    A checkpoint holds the variables of model, optimizer and metrics (weights, moments, moving averages, random seeds),
    the counters and weights kept by the other callbacks, epoch, step and history. One is written after the first step,
    which shows early that the disk has room, then every so many steps and after each epoch. Where the model takes
    several steps in one execution, all this happens between two executions, whose number of steps must divide those of
    an epoch. This callback stands last in the list of callbacks; `fit_resumable` calls `fit` with it.

    Args:
        store: a `CheckpointStore`.
        settings: dict of JSON values that must not change when the run resumes.
        history_path: CSV file with a row per epoch.
        every: int, steps of an epoch between two writes; None writes at the ends of epochs only.
        max_share: share of the time that writes within epochs may take, 0 to 1; a write that would exceed it is
            skipped. Several hosts ignore it, since their clocks differ.
        stop_at: time as of `time.time()` before which training must have paused; None for never.
        devices: `Devices` that the model was built on; of several hosts, the first decides when to pause. None for one
            device.
        name_images: function from epoch and step, both from 0, to the images of that batch, for the error about a loss
            that is not finite.

    Attributes:
        history: list of dicts, a row per epoch, over all parts and stages of the run.
        parts: list of dicts, one for each start of the run: `began` (UTC), `epoch`, `step`, `seconds` until the last
            write, `backend`, and `strategy` and `n_replicas` where `devices` are given.
        trained: bool, whether this process has trained, rather than found the run finished.
        stopped: bool, whether another callback has ended the stage early.
        pause: str, why training paused before its end and how to resume; empty if it did not.
        write_seconds: float, seconds of the slowest write so far.
    """

    def __init__(
        self, store, settings, history_path, *, every=None, max_share=0.01, stop_at=None, devices=None, name_images=None
    ):
        super().__init__()
        self.store, self.history_path = store, as_path(history_path)
        self.settings = json.loads(json.dumps(settings))
        self.every, self.max_share, self.stop_at = every, max_share, stop_at
        self.devices, self.name_images = devices, name_images
        self.history, self.parts, self.others = [], [], []
        self.stage, self.epoch, self.step, self.stopped, self.pause = None, 0, 0, False, ""
        self.write_seconds = self._validation_seconds = 0.0
        self.trained, self._run, self._stages = False, uuid.uuid4().hex, []
        self._began, self._serial, self._signal, self._pending = time.time(), 0, None, None
        self._written = None  # time of the last write of this process
        self._callbacks, self._metrics, self._epoch_seconds = {}, [], 0.0
        self._several_hosts = devices is not None and devices.n_hosts > 1

    def restore(self, model, stage, callbacks=()):
        """Restores the newest good checkpoint, if there is one. Called after `compile`, before `fit`.

        Args:
            model: compiled keras.Model.
            stage: name of the stage; optimizer and callbacks are restored only within the same stage.
            callbacks: the other callbacks of the coming `fit`.

        Returns:
            Epoch and step to begin with, both from 0.

        Raises:
            ValueError: the checkpoint is of a run with other settings, which the message names, or of another model;
                or the checkpoint of an earlier run is missing.
        """
        self.stage, self.others = stage, list(callbacks)
        self.epoch, self.step, self.stopped, self._pending = 0, 0, False, None
        self._callbacks, self._metrics, self._epoch_seconds = {}, [], 0.0
        if self._several_hosts:
            self.devices.wait()  # until the first host has written
        if not model.optimizer.built:  # twice, one that scales the loss would have its variables twice
            # Where the first step makes variables, TensorFlow traces it once more without them.
            with self.devices.scope() if self.devices else contextlib.nullcontext():
                model.optimizer.build(model.trainable_variables)
        arrays, meta = self.store.read()
        if meta is None:
            if self.history_path.exists():
                raise ValueError(
                    f"{self.history_path} is of an earlier run, but its checkpoint in {self.store.folders[-1]} is "
                    "missing. Bring it back, use another RUN_DIR, or set START_OVER = True to begin anew."
                )
            return 0, 0
        self._check_compatible(meta)
        same_stage = meta["stage"] == stage
        _assign(model.variables, arrays, "model")
        if same_stage:
            _assign(model.optimizer.variables, arrays, "optimizer")
            self._metrics = [np.atleast_1d(arrays[f"metrics/{number}"]) for number in range(meta["n_metrics"])]
            self._callbacks = {
                name: values | {key: [arrays[f"{name}/{key}/{i}"] for i in range(n)] for key, n in lists.items()}
                for name, (values, lists) in meta["callbacks"].items()
            }
            self._epoch_seconds = meta["epoch_seconds"]
        # A stage that another has followed is done, even if it was stopped before its last epoch.
        self.stopped = meta["stopped"] if same_stage else stage in meta["stages"]
        self.history, self._serial, self._run, self._stages = (
            meta[name] for name in ("history", "serial", "run", "stages")
        )
        self.epoch, self.step = meta["epoch"], meta["step"]
        if self.history:
            self._validation_seconds = self.history[-1]["validation_seconds"]
            self._write_history()  # the run may have been killed between the checkpoint and this file
        self.parts = self.parts or meta["parts"]
        self.on_train_begin()
        return self.epoch, self.step

    def _check_compatible(self, meta):
        folder, remedy = self.store.folders[-1], "use another RUN_DIR, or set START_OVER = True"
        if meta.get("format") != _FORMAT:
            raise ValueError(f"The checkpoint in {folder} is of another version of this code: {remedy} to begin anew.")
        was = SHARED | meta["settings"]  # one that an earlier version did not have was the default
        differing = [(key, now) for key, now in self.settings.items() if was.get(key) != now]
        if differing:
            shown = ", ".join(f"{key} was {was.get(key)!r}, now {now!r}" for key, now in differing)
            raise ValueError(f"{folder} holds a run with other settings ({shown}). Set them back, {remedy}.")

    def begin_part(self):
        """Records, once, that training begins or resumes in this process."""
        if self.trained:
            return
        self.trained = True
        part = {"began": datetime.now(UTC).isoformat(timespec="seconds"), "epoch": self.epoch, "step": self.step}
        part |= {"seconds": 0.0, "backend": keras.backend.backend()}
        if self.devices:
            part |= {"strategy": self.devices.name, "n_replicas": self.devices.n_replicas}
        self.parts.append(part)

    def on_train_begin(self, logs=None):
        """Restores the other callbacks again, last of all, since some of them have just reset themselves."""
        for name, callback in _named(self.others):
            vars(callback).update(self._callbacks.get(name, {}))

    def on_epoch_begin(self, epoch, logs=None):
        """Restores the metrics of an interrupted epoch: Keras has just reset them."""
        if self.step:
            for variable, values in zip(self.model.metrics_variables, self._metrics, strict=True):
                _assign_copies(variable, values)
        self.epoch, self._first_step = epoch, self.step
        self._epoch_began = time.perf_counter() - self._epoch_seconds
        self._step_ended = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        """Checks the loss, writes a checkpoint if one is due, and pauses if there is a reason to.

        Raises:
            FloatingPointError: the loss is not finite. The earlier checkpoints are kept.
        """
        # The loss of the execution before: waiting for this one would leave the accelerator idle.
        self._check_loss()
        earlier, self.step = self.step, self._first_step + batch + 1
        group = self.step - earlier
        self._pending = self.epoch, range(earlier, self.step), logs["loss"]
        now = time.perf_counter()
        group_seconds, self._step_ended = now - self._step_ended, now
        left = self._first_step + self.params["steps"] - self.step
        if not left:  # the end of the epoch writes, after the validation
            self._check_loss()
            return
        needed = 2 * self.write_seconds + group_seconds + (self._validation_seconds if left <= group else 0)
        due = self._written is None or (self.every and self.step // self.every > earlier // self.every)
        if due and self._written and not self._several_hosts:
            due = (now - self._written) * self.max_share >= self.write_seconds
        if due or not self._several_hosts:
            self._decide_pause(needed)
        if due or self.pause:
            self._save()
        if self.pause:
            raise _Paused

    def on_epoch_end(self, epoch, logs=None):
        """Adds the epoch to the history and writes a checkpoint; pauses if there is a reason to."""
        seconds = time.perf_counter() - self._epoch_began
        self._validation_seconds = time.perf_counter() - self._step_ended
        row = {"epoch": epoch, "stage": self.stage} | {key: float(value) for key, value in logs.items()}
        row["learning_rate"] = float(ops.convert_to_numpy(self.model.optimizer.learning_rate))
        row |= {"seconds": round(seconds, 2), "validation_seconds": round(self._validation_seconds, 2)}
        self.history.append(row)
        self.epoch, self.step, self._epoch_seconds = epoch + 1, 0, 0.0
        self.stopped = self.model.stop_training
        is_last = self.stopped or epoch + 1 == self.params["epochs"]
        self._save()
        self._write_history()
        if self._signal or self._several_hosts or not is_last:
            group, steps = self.model.steps_per_execution, self.params["steps"]
            next_group = seconds * group / steps + (self._validation_seconds if steps <= group else 0)
            self._decide_pause(2 * self.write_seconds + next_group)
        if self.pause:
            raise _Paused

    def _check_loss(self):
        if self._pending is None:
            return
        (epoch, steps, loss), self._pending = self._pending, None
        if np.isfinite(float(loss)):
            return
        images = [image for step in steps for image in self.name_images(epoch, step)] if self.name_images else []
        where = ""
        if images:
            path = self.history_path.with_name("bad_batch.txt")
            if self.store.writes:
                write_text(path, "\n".join(images) + "\n")
            where = f" The {len(images)} images seen there, {images[0]} and so on, are listed in {path}."
        last = f" to {steps[-1] + 1}" if len(steps) > 1 else ""
        raise FloatingPointError(
            f"The loss became {float(loss)} in epoch {epoch + 1}, step {steps[0] + 1}{last}.{where} The earlier "
            f"checkpoints are kept in {self.store.folders[0]}. Look at these images; or train in another RUN_DIR with "
            'a lower LEARNING_RATE or with PRECISION = "float32".'
        )

    def _decide_pause(self, needed):
        """Sets `pause` if a signal came or less than `needed` seconds are left."""
        wanted = bool(self._signal or (self.stop_at and time.time() + needed > self.stop_at))
        if self._several_hosts:
            wanted = self.devices.agree(wanted)
        if not wanted:
            return
        why = "paused before TIME_BUDGET ran out"
        if self._signal:
            why = f"was asked to stop ({signal.Signals(self._signal).name})"
        self.pause = (
            f"Training {why} at epoch {self.epoch + 1}, step {self.step}; its checkpoint is in "
            f"{self.store.folders[-1]}. Run this again with the same settings to resume (and START_OVER = False)."
        )

    def _write_history(self):
        if not self.store.writes:
            return
        try:
            with only_os_errors(self.history_path):
                write_csv(self.history_path, pd.DataFrame(self.history), index=False)
        except OSError as error:
            message = f"{self.history_path} cannot be written ({error.strerror or error}); the checkpoint has its rows."
            if len(self.store.folders) == 1:
                raise OSError(error.errno, message) from None
            warnings.warn(message, stacklevel=2)

    def _save(self):
        self._check_loss()
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()  # within `fit` the variables live elsewhere
        groups = {"model": self.model.variables, "optimizer": self.model.optimizer.variables}
        arrays = {
            f"{group}/{number}": ops.convert_to_numpy(variable)
            for group, variables in groups.items()
            for number, variable in enumerate(variables)
        }
        metrics = self.model.metrics_variables if self.step else []
        arrays |= {f"metrics/{number}": _stack_copies(variable) for number, variable in enumerate(metrics)}
        if self.step:
            self._epoch_seconds = time.perf_counter() - self._epoch_began
        broken = [name for name, array in arrays.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]
        if broken:
            raise FloatingPointError(
                f"{len(broken)} of {len(arrays)} variables are not finite after epoch {self.epoch + 1}, step "
                f"{self.step}. The earlier checkpoints are kept in {self.store.folders[0]}. Train in another RUN_DIR "
                "with a lower LEARNING_RATE."
            )
        callbacks = {}
        for name, callback in _named(self.others):
            values = {key: value for key, value in vars(callback).items() if isinstance(value, _SIMPLE)}
            lists = {key: value for key, value in vars(callback).items() if _is_list_of_arrays(value)}
            arrays |= {f"{name}/{key}/{i}": array for key, value in lists.items() for i, array in enumerate(value)}
            callbacks[name] = values, {key: len(value) for key, value in lists.items()}
        self.parts[-1]["seconds"] = round(time.time() - self._began, 1)
        self._serial += 1
        if self.stage not in self._stages:
            self._stages.append(self.stage)
        meta = {name: getattr(self, name) for name in ("settings", "stage", "epoch", "step", "stopped", "history")}
        meta |= {"format": _FORMAT, "run": self._run, "stages": self._stages, "serial": self._serial}
        meta |= {"parts": self.parts, "epoch_seconds": self._epoch_seconds}
        meta |= {"callbacks": callbacks, "n_metrics": len(metrics)}
        started = time.perf_counter()
        self.store.write(arrays, meta)
        self.write_seconds = max(self.write_seconds, time.perf_counter() - started)
        self._written = time.perf_counter()


def _is_list_of_arrays(value):
    return isinstance(value, list) and all(isinstance(array, np.ndarray) for array in value)


def _named(callbacks):
    """Returns pairs of name and callback; the number tells several of one kind apart."""
    return [(f"{type(callback).__name__}-{number}", callback) for number, callback in enumerate(callbacks)]


def _list_copies(variable):
    """Returns a metric's variables, one for each of TensorFlow's replicas: their sum is the metric's."""
    return getattr(variable.value, "values", [variable])


def _stack_copies(variable):
    return np.stack([ops.convert_to_numpy(copy) for copy in _list_copies(variable)])


def _assign_copies(variable, values):
    copies = _list_copies(variable)
    if len(values) == len(copies):  # as they were: their sum alone would be rounded otherwise
        for copy, value in zip(copies, values, strict=True):
            copy.assign(value)
    else:  # the run resumes on another number of replicas
        variable.assign(values.sum(axis=0))


def _assign(variables, arrays, group):
    values = [arrays[name] for name in arrays if name.startswith(f"{group}/")]
    if [value.shape for value in values] != [tuple(variable.shape) for variable in variables]:
        raise ValueError(f"The checkpoint's {group} has other variables, of another model. Use another RUN_DIR.")
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def fit_resumable(model, checkpoint, make_dataset, *, stage, epochs, steps_per_epoch, callbacks, verbose="auto"):
    """Trains one stage to its end, from the run's newest checkpoint on.

    SIGTERM and Ctrl-C are handled between two steps: a checkpoint is written first. A second one acts at once.

    Args:
        model: compiled keras.Model.
        checkpoint: the run's `TrainingCheckpoint`.
        make_dataset: function (first_epoch, first_step, epochs) that returns a Dataset of the batches from that step
            of that epoch until the end of epoch `epochs` - 1.
        stage: name of the stage.
        epochs: int, epochs of the run at the end of this stage.
        steps_per_epoch: int, a multiple of the model's `steps_per_execution`; otherwise Keras would take the missing
            steps from the next epoch.
        callbacks: the other callbacks, in order.
        verbose: as in `keras.Model.fit`.

    Returns:
        A sentence that says what was done, or where training paused for `stop_at`, see `checkpoint.pause`.

    Raises:
        KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM.
        FloatingPointError: the loss is not finite.
        ValueError: `steps_per_epoch` is no such multiple; or see `TrainingCheckpoint.restore`.
    """
    if steps_per_epoch % model.steps_per_execution:
        raise ValueError(
            f"An epoch of {steps_per_epoch} steps cannot be divided into executions of {model.steps_per_execution}. "
            "Give count_steps the same STEPS_PER_EXECUTION as compile."
        )
    epoch, step = checkpoint.restore(model, stage, callbacks)
    if epoch >= epochs or checkpoint.stopped or checkpoint.pause:
        return checkpoint.pause or f"Nothing to do: {epoch} epochs are done" + _explain_stop(checkpoint)
    began = f"from epoch {epoch + 1}" + (f", step {step + 1}" if step else "")
    checkpoint.begin_part()
    with _note_signals(checkpoint):
        while epoch < epochs and not (checkpoint.stopped or checkpoint.pause):
            # The rest of an interrupted epoch is a `fit` of its own. After each, the checkpoint is restored: `fit` has
            # put the averaged weights in the place of the weights, and on JAX the two then share memory.
            last = epoch + 1 if step else epochs
            with contextlib.suppress(_Paused):
                model.fit(
                    make_dataset(epoch, step, last),
                    initial_epoch=epoch,
                    epochs=last,
                    steps_per_epoch=steps_per_epoch - step,
                    callbacks=[*callbacks, checkpoint],
                    shuffle=False,
                    verbose=verbose,
                )
            epoch, step = checkpoint.restore(model, stage, callbacks)
    if checkpoint._signal:  # also one that came after the last step
        number, said = checkpoint._signal, checkpoint.pause or "Training had just ended when it was asked to stop."
        checkpoint._signal, checkpoint.pause = None, ""  # so that the cell can be run again
        if number == signal.SIGINT:
            raise KeyboardInterrupt(said)
        warnings.warn(said, stacklevel=2)
        signal.raise_signal(number)  # for the handler that was there before
        raise SystemExit(128 + number)
    if checkpoint.pause:
        return checkpoint.pause
    return f"Trained {began} to the end of epoch {epoch}" + _explain_stop(checkpoint)


def _explain_stop(checkpoint):
    return "; another callback stopped training there." if checkpoint.stopped else "."


@contextlib.contextmanager
def _note_signals(checkpoint):
    def note(number, frame):
        checkpoint._signal = number
        signal.signal(number, earlier[number])

    if threading.current_thread() is not threading.main_thread():  # signals can be handled only there
        yield
        return
    earlier = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in earlier:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
