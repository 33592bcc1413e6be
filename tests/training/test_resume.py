"""Exact validation AUC, and runs that go on bit by bit where they were killed, stopped, paused or broke."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
import resumable_run
import tensorflow as tf
from sklearn.metrics import roc_auc_score

from helpers.packing import load_packed_study
from helpers.pipeline import make_eval_dataset, make_train_dataset
from helpers.training import CheckpointStore, TrainingCheckpoint, ValidationAUC, averaged_weights, fit_resumable

STEPS = 7  # of an epoch of the run in resumable_run.py on the packed study of conftest.py


def train(packed, run_dir, **options):
    """Trains in this process; returns model, state and the measuring callback, with the folder free again."""
    model, state, validation = resumable_run.run(packed.folder, run_dir, resumable_run.OPTIONS | options)
    state.store.close()
    return model, state, validation


def outcome(packed, run_dir, **options):
    _, state, validation = train(packed, run_dir, **options)
    return resumable_run.describe_outcome(state, validation)


@pytest.fixture(scope="module")
def whole(packed, tmp_path_factory):
    """The outcome of an uninterrupted run of 4 epochs; `history`, `best` and so on."""
    return outcome(packed, tmp_path_factory.mktemp("whole"), epochs=4)


# A run in parts is the run in one


def start(packed, run_dir, backend="tensorflow", environment=None, **options):
    """Starts the run in a process of its own."""
    command = [sys.executable, resumable_run.__file__, str(packed.folder), str(run_dir)]
    command += [f"{name}={value}" for name, value in options.items()]
    environment = os.environ | {"KERAS_BACKEND": backend, "CUDA_VISIBLE_DEVICES": ""} | (environment or {})
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=run_dir
    )


def call(*arguments, **options):
    """Starts the run, and returns its process once it is about to train."""
    process = start(*arguments, **options)
    assert process.stdout.readline() == "ready\n", process.communicate()[1][-3000:]
    return process


def wait_until(condition, process):
    """Waits with hardly a pause, so that what comes next hits the moment; False where the process ended before it."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(1e-4)
    return False


@pytest.mark.parametrize(("backend", "kills"), [("tensorflow", (True, False, True)), ("jax", (True, False))])
def test_a_run_killed_again_and_again_is_bit_identical_to_one_that_was_not(packed, tmp_path, backend, kills):
    """SIGKILL at random moments, some amid the writing of a state; dropout, averages, shuffling, early stopping on."""
    if backend == "jax":
        pytest.importorskip("jax")
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    options = {"backend": backend, "epochs": 40, "patience": 40}
    process = call(packed, tmp_path / "whole", **options)
    began = time.monotonic()
    assert process.wait(300) == 0, process.stderr.read()[-3000:]
    seconds = time.monotonic() - began
    part = tmp_path / "killed" / "state" / "state.bin.part"
    rng = np.random.default_rng()
    n_kills = 0
    for in_write in kills:
        process = call(packed, tmp_path / "killed", **options)
        moment = time.monotonic() + rng.uniform(0.1, 0.5) * seconds
        wait_until(lambda moment=moment: time.monotonic() > moment, process)
        n_kills += not in_write or wait_until(part.exists, process)
        process.kill()
        process.communicate()
    assert n_kills >= len(kills) - 1
    process = call(packed, tmp_path / "killed", **options)
    assert process.wait(300) == 0, process.stderr.read()[-3000:]
    one, other = (json.loads((tmp_path / name / "outcome.json").read_text()) for name in ("whole", "killed"))
    assert one == other and len(one["history"]) == 40


@pytest.mark.parametrize("seed", [0, 99])
def test_a_run_paused_for_its_time_budget_goes_on_within_the_epoch(packed, tmp_path, whole, seed):
    """Whatever the weights at the start of a part are: all comes from the state."""
    _, state, _ = train(packed, tmp_path, epochs=4, seconds=0.01)
    assert (state.epoch, state.step) == (0, 1) and "paused before TIME_BUDGET" in state.pause
    assert "at epoch 1, step 1;" in state.pause and "Run this again" in state.pause
    for part in range(2, 6):
        _, state, _ = train(packed, tmp_path, epochs=4, seconds=0.01, seed=seed)
        assert (state.epoch, state.step) == (0, part)
    assert outcome(packed, tmp_path, epochs=4, seed=seed) == whole
    assert len(pd.read_csv(tmp_path / "history.csv")) == 4


def test_parts_of_a_run_are_recorded(packed, tmp_path):
    train(packed, tmp_path, epochs=3, seconds=0.01)
    _, state, _ = train(packed, tmp_path, epochs=3)
    assert [(part["epoch"], part["step"], part["backend"]) for part in state.parts] == [
        (0, 0, "tensorflow"),
        (0, 1, "tensorflow"),
    ]
    assert all(part["seconds"] > 0 for part in state.parts)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 1)])
def test_a_run_that_is_asked_to_stop_writes_its_state_first(packed, tmp_path, number, code):
    process = call(packed, tmp_path, epochs=100_000, every=0)
    wait_until((tmp_path / "history.csv").exists, process)
    before = len((tmp_path / "history.csv").read_text().splitlines()) - 1
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode in (code, -number) and f"asked to stop ({number.name}) at epoch" in errors
    store = CheckpointStore(tmp_path / "state")
    _, meta = store.read()
    store.close()
    assert meta["epoch"] >= before and f"epoch {meta['epoch'] + 1}, step {meta['step']};" in errors


def test_a_finished_run_is_not_trained_again(packed, tmp_path):
    first = outcome(packed, tmp_path, epochs=2)
    content = (tmp_path / "state" / "state.bin").read_bytes()
    history = (tmp_path / "history.csv").read_text()
    (tmp_path / "history.csv").write_text(history.splitlines()[0])  # killed before the last row was written
    _, state, validation = train(packed, tmp_path, epochs=2)
    assert (tmp_path / "history.csv").read_text() == history
    assert not state.trained and len(state.parts) == 1
    assert resumable_run.describe_outcome(state, validation) == first
    assert (tmp_path / "state" / "state.bin").read_bytes() == content


def test_a_run_that_stopped_early_stays_stopped(packed, tmp_path):
    _, state, _ = train(packed, tmp_path, epochs=40, patience=1)
    n_epochs = len(state.history)
    assert state.stopped and n_epochs < 40
    _, again, _ = train(packed, tmp_path, epochs=40, patience=1)
    assert again.stopped and len(again.history) == n_epochs


def test_the_next_stage_takes_the_weights_but_not_the_optimizer(packed, tmp_path):
    train(packed, tmp_path, epochs=2)
    model = resumable_run.build_model(seed=50)
    store = CheckpointStore(tmp_path / "state")
    state = TrainingCheckpoint(store, {}, tmp_path / "history.csv")
    assert state.restore(model, "another stage") == (2, 0)
    arrays, _ = store.read()
    store.close()
    assert np.array_equal(model.get_weights()[0], arrays["model/0"])
    assert int(model.optimizer.iterations) == 0


def test_a_stage_that_another_has_followed_is_done_even_if_it_was_stopped_early(packed, tmp_path):
    _, state, _ = train(packed, tmp_path, stage="head", epochs=40, patience=1)
    n_epochs = len(state.history)
    train(packed, tmp_path, stage="all", epochs=n_epochs + 3, seconds=0.01)
    _, again, _ = train(packed, tmp_path, stage="head", epochs=40, patience=1)
    assert not again.trained and len(again.history) == n_epochs
    _, state, _ = train(packed, tmp_path, stage="all", epochs=n_epochs + 3)
    assert [row["stage"] for row in state.history] == ["head"] * n_epochs + ["all"] * 3


def test_a_cell_that_was_interrupted_can_be_run_again(packed, tmp_path):
    """In one kernel, with the same state and callbacks."""
    study = load_packed_study(packed.folder)
    model, store = resumable_run.build_model(0), CheckpointStore(tmp_path / "state")
    validation = ValidationAUC(make_eval_dataset(study, "val", 8), study.labels("val"))
    state = TrainingCheckpoint(store, {}, tmp_path / "history.csv")

    class Interrupt(keras.callbacks.Callback):
        done = False

        def on_train_batch_end(self, batch, logs=None):
            if batch == 2 and not self.done:
                self.done = True
                signal.raise_signal(signal.SIGINT)

    def make_train(epoch, step, epochs):
        return make_train_dataset(study, 40, 8, seed=0, epochs=epochs, first_epoch=epoch, first_step=step)

    callbacks, stages = [validation, Interrupt()], {"stage": "all", "epochs": 2, "steps_per_epoch": STEPS}
    with pytest.raises(KeyboardInterrupt, match="epoch 1, step 3"):
        fit_resumable(model, state, make_train, callbacks=callbacks, verbose=0, **stages)
    said = fit_resumable(model, state, make_train, callbacks=callbacks, verbose=0, **stages)
    store.close()
    assert said == "Trained from epoch 1, step 4 to the end of epoch 2." and len(state.history) == 2


def test_a_run_of_one_backend_goes_on_with_the_other(packed, tmp_path):
    """Not bit by bit, but from the same weights, averages and step."""
    pytest.importorskip("jax")
    train(packed, tmp_path, epochs=8, seconds=0.01)
    process = call(packed, tmp_path, "jax", epochs=8)
    assert process.wait(300) == 0, process.stderr.read()[-3000:]
    _, state, _ = train(packed, tmp_path, epochs=8)
    assert [part["backend"] for part in state.parts][:2] == ["tensorflow", "jax"] and len(state.history) == 8


def find_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def test_two_hosts_train_as_one_and_go_on_together(packed, tmp_path):
    """Two processes, each with its own shards and half of every batch, against one process with two devices."""
    pytest.importorskip("jax")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    two_devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    single = call(packed, tmp_path / "one", "jax", two_devices, epochs=3, devices=1, hosts=2)
    assert single.wait(300) == 0, single.stderr.read()[-3000:]
    for seconds in (0.01, 0):  # paused after the first step by the first host, and then to the end
        places = {"JOB_ADDRESSES": f"localhost:{find_port()}", "NUM_PROCESSES": "2"}
        processes = [
            start(packed, tmp_path / "two", "jax", {f"KERAS_DISTRIBUTION_{name}": value for name, value in
                  (places | {"PROCESS_ID": str(host)}).items()}, epochs=3, devices=1, seconds=seconds * (1 - host))
            for host in (0, 1)
        ]  # fmt: skip
        for process in processes:
            assert process.wait(300) == 0, process.stderr.read()[-3000:]
        printed = [process.stdout.read() for process in processes]
        assert all(("paused before TIME_BUDGET" in text) == bool(seconds) for text in printed)
    one, two = (pd.read_csv(tmp_path / name / "history.csv") for name in ("one", "two"))
    columns = ["loss", "val_loss", "val_auc", "learning_rate"]
    np.testing.assert_allclose(two[columns], one[columns], rtol=1e-5)
    assert json.loads((tmp_path / "two" / "outcome.json").read_text())["history"][2]["epoch"] == 2


# What is refused, and what fails loudly


def test_other_settings_are_refused_by_name(packed, tmp_path):
    train(packed, tmp_path, epochs=1)
    with pytest.raises(ValueError, match="IMAGE_SIZE was 40, now 36"):
        train(packed, tmp_path, epochs=2, size=36)


def test_another_model_is_refused(packed, tmp_path):
    train(packed, tmp_path, epochs=1)
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(14)])
    other.compile("adam", "mse")
    store = CheckpointStore(tmp_path / "state")
    with pytest.raises(ValueError, match="of another model"):
        TrainingCheckpoint(store, {}, tmp_path / "history.csv").restore(other, "all")
    store.close()


def test_a_run_whose_state_is_gone_does_not_silently_begin_anew(packed, tmp_path):
    train(packed, tmp_path, epochs=1)
    for path in (tmp_path / "state").glob("*.bin"):
        path.unlink()
    with pytest.raises(ValueError, match=r"its state is gone from .*START_OVER"):
        train(packed, tmp_path, epochs=2)


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
def test_a_full_disk_stops_the_run_and_costs_no_state(packed, tmp_path, whole):
    train(packed, tmp_path, epochs=4, seconds=0.01)
    (tmp_path / "state" / "state.bin.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"state.bin cannot be written \(No space left on device\): it takes"):
        train(packed, tmp_path, epochs=4)
    CheckpointStore(tmp_path / "state").close()
    assert outcome(packed, tmp_path, epochs=4) == whole


# Validation


def measure(packed, labels=None):
    """Trains an epoch with `ValidationAUC` alone."""
    model = resumable_run.build_model(seed=3)
    study = load_packed_study(packed.folder)
    callback = ValidationAUC(make_eval_dataset(study, "val", 8), study.labels("val") if labels is None else labels)
    x = np.random.default_rng(0).normal(size=(32, 48, 48, 1)).astype("float32") * 255
    y = np.random.default_rng(1).integers(0, 2, (32, 14)).astype("float32")
    history = model.fit(x, y, batch_size=8, epochs=2, callbacks=[callback], verbose=0).history
    return model, study, callback, history


def test_validation_auc_is_exact_and_of_the_averaged_weights(packed):
    _, study, callback, history = measure(packed)
    fresh = resumable_run.build_model(seed=4)
    fresh.set_weights(callback.best_weights)
    labels = study.labels("val")
    logits = fresh.predict(make_eval_dataset(study, "val", 8), verbose=0)[: len(labels)]
    both = (labels.sum(0) > 0) & (labels.sum(0) < len(labels))
    exact = roc_auc_score(labels[:, both], logits[:, both], average="macro")
    assert history["val_auc"][callback.best_epoch] == pytest.approx(exact, abs=1e-9) == callback.best_auc
    assert callback.best_epoch == int(np.argmax(history["val_auc"]))


def test_averaged_weights_are_put_back_after_an_error():
    model = resumable_run.build_model(seed=3)
    x = np.random.default_rng(0).normal(size=(16, 20, 20, 1)).astype("float32")
    y = np.zeros((16, 14), "float32")
    model.fit(x, y, verbose=0)
    model.train_on_batch(x[:8], y[:8])
    before = model.get_weights()
    with pytest.raises(RuntimeError), averaged_weights(model):
        assert not np.array_equal(model.get_weights()[0], before[0])
        raise RuntimeError
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), before, strict=True))


def test_validation_without_positives_keeps_the_latest_weights(packed):
    _, _, callback, history = measure(packed, np.zeros((len(packed.labels("val")), 14), "float32"))
    assert np.isnan(history["val_auc"]).all() and callback.best_epoch == 1 and callback.best_weights


def test_a_scheduled_rate_and_plateaus_go_on_too(packed, tmp_path):
    """ReduceLROnPlateau lowers a rate that is a variable; its counters and the rate come from the state."""

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
            state = TrainingCheckpoint(store, {}, folder / "history.csv")

            def make_train(epoch, step, epochs):
                x = np.random.default_rng(5).normal(size=(16, 48, 48, 1)).astype("float32")
                y = np.random.default_rng(6).integers(0, 2, (16, 14)).astype("float32")
                data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8).repeat()
                return data.skip(step).take((epochs - epoch) * 2 - step)

            callbacks = [validation, plateau]
            fit_resumable(model, state, make_train, stage="all", epochs=end, steps_per_epoch=2, callbacks=callbacks,
                           verbose=0)  # fmt: skip
            store.close()
        return resumable_run.describe_outcome(state, validation)

    one, other = run(tmp_path / "one", 9), run(tmp_path / "other", 2, 5, 9)
    assert one == other and one["history"][-1]["learning_rate"] < 1e-2


def test_writes_within_an_epoch_take_no_more_than_their_share(packed, tmp_path):
    """Of steps of milliseconds, a write each would take the most: but for the first, they wait for the epoch's end."""
    written = {}
    for share in (float("inf"), 1e-6):
        (tmp_path / str(share)).mkdir()
        _, state, _ = train(packed, tmp_path / str(share), epochs=2, share=share)
        written[share] = state.store.read()[1]["serial"]
    assert written[1e-6] == 1 + 2 and written[float("inf")] > 2 * 3
