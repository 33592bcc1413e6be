"""What does exact resume cost, and is it exact?

First: seconds and bytes of writing and reading a checkpoint of the full DenseNet-121 with AdamW and averaged weights,
compared with `keras.callbacks.BackupAndRestore` on the same model, and the share of training time at the default
interval. Both keep the checkpoint before. Then a small run, see tests/support/resumable_run.py, is killed many times at
random moments, some of them amid a write, with ours on both backends and with Keras's callback. Is the result that of a
run without interruption, to the last bit?

Usage: resume.py [--rounds 5] [--kills 20]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))
sys.path.append(str(ROOT / "tests" / "support"))
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import resumable_run
import tensorflow as tf

from helpers.runtime import describe_machine

BATCH, SIZE = 16, 224
INTERVAL = 500  # SAVE_STEPS of the full profile
EPOCHS = 40  # of the small run, of 7 steps each; patience is longer, so that all runs are


def measure_costs(rounds, folder):
    """Returns a dict of seconds and bytes for both ways, and of the seconds of a training step."""
    from helpers.training import CheckpointStore, TrainingCheckpoint, build_classifier, make_loss

    def build():
        keras.utils.set_random_seed(0)
        model = build_classifier()
        optimizer = keras.optimizers.AdamW(3e-4, weight_decay=1e-3, global_clipnorm=1.0, use_ema=True)
        model.compile(optimizer, make_loss("bce", None), jit_compile=False)
        model.optimizer.build(model.trainable_variables)
        return model

    model = build()
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, (BATCH, SIZE, SIZE, 1)).astype("float32")
    labels = rng.integers(0, 2, (BATCH, 14)).astype("float32")
    steps = []
    for _ in range(4):
        started = time.perf_counter()
        model.train_on_batch(images, labels)
        steps.append(time.perf_counter() - started)

    store = CheckpointStore(folder / "ours")
    checkpoint = TrainingCheckpoint(store, {}, folder / "history.csv")
    checkpoint.set_model(model)
    checkpoint.restore(model, "all")
    checkpoint.begin_part()
    peer = keras.callbacks.BackupAndRestore(folder / "peer", save_freq=1, double_checkpoint=True)
    peer.set_model(model)
    seconds = {"ours": [], "keras": []}
    reading = {"ours": [], "keras": []}
    for _ in range(rounds + 1):
        for name, write in (("ours", checkpoint._save), ("keras", peer._save_model)):
            started = time.perf_counter()
            write()
            seconds[name].append(time.perf_counter() - started)
    for _ in range(rounds):
        other = build()
        started = time.perf_counter()
        TrainingCheckpoint(store, {}, folder / "history.csv").restore(other, "all")
        reading["ours"].append(time.perf_counter() - started)
        same = all(np.array_equal(a, b) for a, b in zip(other.get_weights(), model.get_weights(), strict=True))
        assert same, "the checkpoint did not restore the weights"
        peer.set_model(other)
        started = time.perf_counter()
        peer.on_train_begin()
        reading["keras"].append(time.perf_counter() - started)
    files = {"ours": "ours/state.bin", "keras": "peer/latest.weights.h5"}
    size = {name: (folder / file).stat().st_size for name, file in files.items()}
    step = float(np.median(steps[1:]))
    result = {
        name: {
            "write_seconds": round(float(np.median(seconds[name][1:])), 3),
            "read_seconds": round(float(np.median(reading[name])), 3),
            "bytes": size[name],
        }
        for name in seconds
    }
    write = result["ours"]["write_seconds"]
    result["step"] = {
        "seconds": round(step, 2),
        "images": BATCH,
        "interval_steps": INTERVAL,
        "share_of_training_percent": round(100 * write / (INTERVAL * step), 4),
        "step_seconds_at_which_it_is_one_percent": round(100 * write / INTERVAL, 3),
    }
    return result


def train_with_peer(packed, run_dir):
    """Trains the small run with Keras's own callback, used as documented; writes outcome.json at the end."""
    from helpers.packing import load_packed_study
    from helpers.pipeline import count_steps, make_eval_dataset, make_train_dataset
    from helpers.training import ValidationAUC

    study = load_packed_study(packed)
    model = resumable_run.build_model(0)
    validation = ValidationAUC(make_eval_dataset(study, "val", 8), study.labels("val"))
    stopping = keras.callbacks.EarlyStopping("val_auc", mode="max", patience=EPOCHS)
    backup = keras.callbacks.BackupAndRestore(Path(run_dir) / "state", save_freq=2, double_checkpoint=True)
    size = resumable_run.OPTIONS["size"]
    print("ready", flush=True)
    history = model.fit(
        make_train_dataset(study, size, 8, seed=0, epochs=EPOCHS), epochs=EPOCHS, shuffle=False, verbose=0,
        steps_per_epoch=count_steps(study, 8), callbacks=[validation, stopping, backup],
    )  # fmt: skip
    outcome = {
        "model": resumable_run.digest(model.get_weights()),
        "optimizer": resumable_run.digest([np.asarray(v) for v in model.optimizer.variables]),
        "history": history.history,
        "best_epoch": validation.best_epoch,
    }
    (Path(run_dir) / "outcome.json").write_text(json.dumps(outcome))


def kill_again_and_again(kills, packed, folder, backend, peer=False):
    """Runs to the end once undisturbed and once with kills; returns a dict that compares the two."""
    script = [__file__, "--peer"] if peer else [resumable_run.__file__]
    options = [] if peer else [f"epochs={EPOCHS}", f"patience={EPOCHS}"]
    environment = os.environ | {"KERAS_BACKEND": backend}

    def start(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *script, str(packed), str(run_dir), *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        process = subprocess.Popen(command, env=environment, cwd=run_dir, **pipes)
        while process.stdout.readline() not in ("ready\n", ""):
            pass
        return process

    def has_written(run_dir, pattern, since):
        try:  # what the kill before has left is older
            return any(path.stat().st_mtime > since for path in (run_dir / "state").glob(pattern))
        except FileNotFoundError:  # just renamed
            return False

    def start_training(run_dir):
        began = time.time()
        process = start(run_dir)
        while process.poll() is None and not has_written(run_dir, "[!l]*", began):  # all but `lock`
            pass
        return process, began

    whole, killed = folder / "whole", folder / "killed"
    process, _ = start_training(whole)
    started = time.monotonic()
    assert process.wait() == 0, "the undisturbed run failed"
    seconds = time.monotonic() - started
    rng = np.random.default_rng(0)
    done = in_write = 0
    while done < kills:
        process, began = start_training(killed)
        moment = time.monotonic() + rng.uniform(0, 1.6 * seconds / kills)
        wanted = rng.random() < 0.4 and not peer  # Keras's callback writes without a temporary name
        while process.poll() is None and time.monotonic() < moment:
            pass
        while wanted and process.poll() is None and not has_written(killed, "*.part", began):
            pass
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        done, in_write = done + 1, in_write + has_written(killed, "*.part", began)
    process = start(killed)
    process.wait()
    report = {"kills": done, "of_which_amid_a_write": in_write, "ended": process.returncode == 0}
    if not report["ended"]:
        return report
    one, other = (json.loads((path / "outcome.json").read_text()) for path in (whole, killed))
    same = {f"same_{name}": one[name] == other[name] for name in ("model", "optimizer", "history", "best_epoch")}

    def count(outcome):
        history = outcome["history"]
        return len(history["loss"] if peer else history)

    return report | same | {"epochs_in_history": count(other), "of_epochs": count(one)}


def pack_small_study(folder):
    """Writes and packs the synthetic study of the small run; returns its folder."""
    from helpers.packing import pack_study
    from helpers.study import list_images, load_study, make_split, match_images, write_synthetic_study

    write_synthetic_study(folder / "study", n_images=90, size=64, seed=5)
    images = list_images(folder / "study")
    rows, _ = match_images(load_study(folder / "study").rows, images)
    rows["split"] = make_split(rows, val_share=0.15)
    pack_study(rows, images, folder / "packed", split_name="official", side=48, shard_images=16)
    return folder / "packed"


def main():
    """Measures, prints and writes benchmarks/results/resume.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--peer", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        train_with_peer(*arguments.peer)
        return
    report = {"machine": f"{describe_machine(tf, keras)}, no GPU"}
    folder = Path(tempfile.mkdtemp())
    try:
        report["densenet121"] = measure_costs(arguments.rounds, folder / "costs")
        packed = pack_small_study(folder)
        for name, backend, peer in (
            ("ours, TensorFlow", "tensorflow", False),
            ("ours, JAX", "jax", False),
            ("BackupAndRestore, TensorFlow", "tensorflow", True),
        ):
            report[name] = kill_again_and_again(arguments.kills, packed, folder / name, backend, peer)
            print(name, report[name], flush=True)
    finally:
        shutil.rmtree(folder)
    text = json.dumps(report, indent=1)
    print(text)
    (ROOT / "benchmarks" / "results" / "resume.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
