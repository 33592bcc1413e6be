"""Runs that were killed, stopped, paused or broken resume exactly; what must not be resumed is refused by name."""

import json
import shutil
import signal
import socket
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
import resumable_run
import tensorflow as tf
from parts_of_runs import finish, kill, outcome, start, train

from helpers.packing import load_packed_study
from helpers.pipeline import make_eval_dataset, make_train_dataset
from helpers.training import CheckpointStore, TrainingCheckpoint, ValidationAUC, fit_resumable, resume

pytestmark = pytest.mark.slow
STEPS = 7  # of an epoch of the run in resumable_run.py on the packed study of conftest.py


@pytest.fixture(scope="module")
def whole(packed, tmp_path_factory):
    """Folder and outcome of an uninterrupted run of 3 epochs; never written to by a test."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, outcome(packed, folder, epochs=3)


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of the folder of `whole`."""
    return shutil.copytree(whole[0], tmp_path / "finished")


# A run in parts gives what the run without interruption gives


def test_a_run_killed_amid_a_write_is_bit_identical_to_one_that_was_not(packed, tmp_path):
    """SIGKILL in a random epoch; dropout, averages, early stopping are on. In test_device_chains.py, between writes."""
    options, killed = {"epochs": 12, "patience": 12}, tmp_path / "killed"
    expected = outcome(packed, tmp_path / "whole", **options)
    assert kill(start(packed, (killed, options)), killed, np.random.default_rng().integers(1, 5))
    assert outcome(packed, killed, **options) == expected and len(expected["history"]) == 12


def test_each_backend_takes_over_from_the_other(packed, tmp_path):
    """In float16. Begun on TensorFlow, run to its end on JAX, with a pause and without, and finished on TensorFlow.

    Each time, model and optimizer can be used afterwards on JAX.
    """
    pytest.importorskip("jax")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {"epochs": 4, "precision": "mixed_float16"}
    train(packed, whole, seconds=0.01, **options)
    shutil.copytree(whole, parts)
    options |= {"use": 1}
    finish(start(packed, (whole, options), (parts, options | {"seconds": 0.01}), (parts, options), backend="jax"))
    one, other = (json.loads((folder / "outcome.json").read_text()) for folder in (whole, parts))
    assert one == other and len(one["history"]) == 4
    checkpoint, _ = train(packed, parts, epochs=5, precision="mixed_float16")
    assert [part["backend"] for part in checkpoint.parts] == ["tensorflow", "jax", "jax", "tensorflow"]
    assert len(checkpoint.history) == 5


def test_a_run_paused_for_its_time_budget_resumes_within_the_epoch(packed, tmp_path, whole):
    """Whatever the weights at the start of a part are: all comes from the checkpoint."""
    checkpoint, _ = train(packed, tmp_path, epochs=3, seconds=0.01)
    assert (checkpoint.epoch, checkpoint.step) == (0, 1) and "paused before TIME_BUDGET" in checkpoint.pause
    assert "at epoch 1, step 1;" in checkpoint.pause and "Run this again" in checkpoint.pause
    checkpoint, _ = train(packed, tmp_path, epochs=3, seconds=0.01, seed=99)
    assert (checkpoint.epoch, checkpoint.step) == (0, 2)
    checkpoint, validation = train(packed, tmp_path, epochs=3, seed=99)
    assert resumable_run.describe_outcome(checkpoint, validation) == whole[1]
    assert len(pd.read_csv(tmp_path / "history.csv")) == 3
    parts = [(part["epoch"], part["step"], part["backend"]) for part in checkpoint.parts]
    assert parts == [(0, step, "tensorflow") for step in range(3)]
    assert all(part["seconds"] > 0 for part in checkpoint.parts)


def test_a_run_in_float16_resumes_with_the_scale_of_its_loss(packed, tmp_path):
    """The scale rises until steps are skipped, and falls."""
    options = {"epochs": 2, "precision": "mixed_float16"}
    whole = outcome(packed, tmp_path / "whole", **options)
    for seconds in (0.01, 0.01, 0.01, 0.01, 0):
        checkpoint, validation = train(packed, tmp_path / "parts", seconds=seconds, **options)
    assert resumable_run.describe_outcome(checkpoint, validation) == whole and len(whole["history"]) == 2
    scale, n_updates = (float(checkpoint.store.read()[0][f"optimizer/{number}"]) for number in (3, 4))
    assert scale != 2**15 and n_updates <= 2 * STEPS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_writes_a_checkpoint_first(packed, tmp_path, number):
    """The handler from before then gets the signal; the same cell, with the same callbacks, can be run again."""
    study = load_packed_study(packed.folder)
    model, store = resumable_run.build_model(0), CheckpointStore(tmp_path / "state")
    validation = ValidationAUC(make_eval_dataset(study, "val", 8), study.labels("val"))
    checkpoint = TrainingCheckpoint(store, {}, tmp_path / "history.csv")

    class Interrupt(keras.callbacks.Callback):
        done = False

        def on_train_batch_end(self, batch, logs=None):
            if batch == 2 and not self.done:
                self.done = True
                signal.raise_signal(number)

    def make_train(epoch, step, epochs):
        return make_train_dataset(study, 40, 8, seed=0, epochs=epochs, first_epoch=epoch, first_step=step)

    def fit():
        return fit_resumable(
            model, checkpoint, make_train, stage="all", epochs=2, steps_per_epoch=STEPS, verbose=0, callbacks=callbacks
        )

    callbacks, heard = [validation, Interrupt()], []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt, match=r"asked to stop \(SIGINT\) at epoch 1, step 3"):
                fit()
        else:
            with (
                pytest.warns(UserWarning, match=r"asked to stop \(SIGTERM\) at epoch 1, step 3"),
                pytest.raises(SystemExit) as stop,
            ):
                fit()
            assert stop.value.code == 128 + number and heard == [number]
        assert [store.read()[1][name] for name in ("epoch", "step")] == [0, 3]
        assert fit() == "Trained from epoch 1, step 4 to the end of epoch 2." and len(checkpoint.history) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
        store.close()


def test_a_finished_run_is_not_trained_again(packed, finished, whole):
    content = (finished / "state" / "state.bin").read_bytes()
    history = (finished / "history.csv").read_text()
    (finished / "history.csv").write_text(history.splitlines()[0])  # killed before the last row was written
    checkpoint, validation = train(packed, finished, epochs=3)
    assert (finished / "history.csv").read_text() == history
    assert not checkpoint.trained and len(checkpoint.parts) == 1
    assert resumable_run.describe_outcome(checkpoint, validation) == whole[1]
    assert (finished / "state" / "state.bin").read_bytes() == content


def test_a_stage_that_was_stopped_early_stays_stopped_and_the_next_takes_its_weights(packed, tmp_path):
    first = {"stage": "head", "epochs": 40, "patience": 1}
    checkpoint, _ = train(packed, tmp_path, **first)
    n_epochs = len(checkpoint.history)
    assert checkpoint.stopped and n_epochs < 40
    again, _ = train(packed, tmp_path, **first)
    assert again.stopped and not again.trained and len(again.history) == n_epochs
    model = resumable_run.build_model(seed=50)
    store = CheckpointStore(tmp_path / "state")
    assert TrainingCheckpoint(store, {}, tmp_path / "history.csv").restore(model, "all") == (n_epochs, 0)
    assert np.array_equal(model.get_weights()[0], store.read()[0]["model/0"])
    assert int(model.optimizer.iterations) == 0  # of the optimizer, nothing is restored
    store.close()
    train(packed, tmp_path, stage="all", epochs=n_epochs + 2, seconds=0.01)
    again, _ = train(packed, tmp_path, **first)
    assert not again.trained and len(again.history) == n_epochs
    checkpoint, _ = train(packed, tmp_path, stage="all", epochs=n_epochs + 2)
    assert [row["stage"] for row in checkpoint.history] == ["head"] * n_epochs + ["all"] * 2


def find_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def test_two_hosts_pause_and_resume_together(packed, tmp_path):
    """Started with Keras's variables; the first decides when. That two train as one is in test_hosts.py."""
    pytest.importorskip("jax")
    options, processes = {"epochs": 2, "devices": 1}, []
    places = {"JOB_ADDRESSES": f"localhost:{find_port()}", "NUM_PROCESSES": "2"}
    for host in (0, 1):
        runs = [(tmp_path, options | {"seconds": 0.01 * (1 - host)}), (tmp_path, options)]
        variables = {f"KERAS_DISTRIBUTION_{name}": text for name, text in places.items()}
        variables["KERAS_DISTRIBUTION_PROCESS_ID"] = str(host)
        processes.append(start(packed, *runs, backend="jax", **variables))
    for said in map(finish, processes):
        assert "paused before TIME_BUDGET" in said and "Trained from epoch 1, step 2 to the end of epoch 2" in said
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert [row["epoch"] for row in outcome["history"]] == [0, 1] and outcome["equal on devices"]


def test_a_lowered_rate_and_the_counters_of_a_plateau_are_restored(packed, tmp_path):
    """ReduceLROnPlateau lowers a rate that is a variable; its counters and the rate come from the checkpoint."""

    def run(folder, *ends):
        folder.mkdir()
        study = load_packed_study(packed.folder)
        for end in ends:
            keras.utils.set_random_seed(end)
            model = keras.Sequential([keras.Input((48, 48, 1)), keras.layers.Flatten(), keras.layers.Dense(14)])
            model.compile(keras.optimizers.Adam(1e-2), keras.losses.BinaryCrossentropy(from_logits=True))
            if end == ends[0]:
                model.set_weights([np.zeros_like(array) for array in model.get_weights()])
            validation = ValidationAUC(make_eval_dataset(study, "val", 8), study.labels("val"))
            plateau = keras.callbacks.ReduceLROnPlateau("val_auc", mode="max", factor=0.5, patience=1)
            store = CheckpointStore(folder / "state")
            checkpoint = TrainingCheckpoint(store, {}, folder / "history.csv")

            def make_train(epoch, step, epochs):
                x = np.random.default_rng(5).normal(size=(16, 48, 48, 1)).astype("float32")
                y = np.random.default_rng(6).integers(0, 2, (16, 14)).astype("float32")
                data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8).repeat()
                return data.skip(step).take((epochs - epoch) * 2 - step)

            callbacks = [validation, plateau]
            fit_resumable(model, checkpoint, make_train, stage="all", epochs=end, steps_per_epoch=2,
                          callbacks=callbacks, verbose=0)  # fmt: skip
            store.close()
        return resumable_run.describe_outcome(checkpoint, validation)

    one, other = run(tmp_path / "one", 9), run(tmp_path / "other", 2, 5, 9)
    assert one == other and one["history"][-1]["learning_rate"] < 1e-2


# What is refused, and what fails loudly


def test_a_run_that_is_not_the_same_is_refused(packed, finished):
    with pytest.raises(ValueError, match="IMAGE_SIZE was 40, now 36"):
        train(packed, finished, epochs=4, size=36)
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(14)])
    other.compile("adam", "mse")
    store = CheckpointStore(finished / "state")
    with pytest.raises(ValueError, match="of another model"):
        TrainingCheckpoint(store, {}, finished / "history.csv").restore(other, "all")
    arrays, meta = store.read()
    store.write(arrays, meta | {"format": 0})
    with pytest.raises(ValueError, match="of another version of this code"):
        TrainingCheckpoint(store, {}, finished / "history.csv").restore(other, "all")
    store.close()
    for path in (finished / "state").glob("*.bin"):
        path.unlink()
    with pytest.raises(ValueError, match=r"its checkpoint in .* is missing.*START_OVER"):
        train(packed, finished, epochs=4)


@pytest.mark.filterwarnings("ignore:.*invalid value.*")
@pytest.mark.parametrize("step", [3, STEPS - 1])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_images(packed, tmp_path, step):
    bad = STEPS + step  # of the second epoch
    message = rf"became nan in epoch 2, step {step + 1}\. The 8 images.*LEARNING_RATE"
    with pytest.raises(FloatingPointError, match=message):
        train(packed, tmp_path, epochs=3, every=1, nan_step=bad)
    listed = (tmp_path / "bad_batch.txt").read_text().split()
    assert len(listed) == 8 and set(listed) <= set(packed.rows("train")["image"])
    store = CheckpointStore(tmp_path / "state")
    arrays, meta = store.read()
    store.close()
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert (meta["epoch"], meta["step"]) == (1, step)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a file on a disk that is always full")
def test_a_full_disk_stops_the_run_and_costs_no_checkpoint(packed, tmp_path, whole):
    train(packed, tmp_path, epochs=3, seconds=0.01)
    (tmp_path / "state" / "state.bin.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"state.bin cannot be written \(No space left on device\): it takes"):
        train(packed, tmp_path, epochs=3)
    CheckpointStore(tmp_path / "state").close()
    assert outcome(packed, tmp_path, epochs=3) == whole[1]


def test_writes_within_an_epoch_take_no_more_than_their_share(packed, tmp_path, whole):
    """Of steps of milliseconds, a write each would take the most: but for the first, they wait for the epoch's end."""
    checkpoint, _ = train(packed, tmp_path, epochs=3, share=1e-6)
    assert checkpoint.store.read()[1]["serial"] == 1 + 3
    assert CheckpointStore(whole[0] / "state", writes=False).read()[1]["serial"] > 3 * 3


def test_a_shared_setting_that_an_earlier_version_did_not_have_was_the_default(tmp_path):
    settings = {"SPLIT": "official", "EPOCHS": 3}
    checkpoint = TrainingCheckpoint(CheckpointStore(tmp_path / "state"), settings, tmp_path / "history.csv")
    earlier = {"format": resume._FORMAT, "settings": {"EPOCHS": 3}}
    checkpoint._check_compatible(earlier)
    checkpoint.settings["SPLIT"] = "random_patients"
    with pytest.raises(ValueError, match="SPLIT was 'official', now 'random_patients'"):
        checkpoint._check_compatible(earlier)
