"""All notebooks on several devices: on JAX, which gives away the memory of what it computes from, and on TensorFlow."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import device_chain
import numpy as np
import pandas as pd
import pytest
from chain import check_artifacts, check_localization, check_nodules, hash_weights
from sklearn.metrics import roc_auc_score

from helpers.export import ExportedModel
from helpers.study import PATHOLOGIES
from helpers.training import CheckpointStore

pytestmark = pytest.mark.slow


def start(folder, task, **variables):
    """Starts a task of device_chain.py; what it says goes into log.txt."""
    command = [sys.executable, device_chain.__file__, str(folder), task]
    with open(folder / "log.txt", "w") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | variables
        )


def finish(process, folder, code=0):
    assert process.wait(timeout=1800) == code, (folder / "log.txt").read_text()[-5000:]


@pytest.fixture(scope="module")
def on_jax(tmp_path_factory):
    """Folders of a run on one device, and of one on four, killed and resumed, beside one on four without that."""
    jax = pytest.importorskip("jax")
    given = jax.numpy.zeros(8)
    jax.jit(lambda values: values + 1, donate_argnums=0)(given)
    if not given.is_deleted():
        pytest.skip(f"JAX {jax.__version__} does not donate buffers on CPUs, as JAX does on accelerators; 0.12 does")
    folders = {n_devices: tmp_path_factory.mktemp(f"devices-{n_devices}") for n_devices in (1, 4)}

    def begin(n_devices, task):
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={n_devices}"
        return start(folders[n_devices], task, KERAS_BACKEND="jax", XLA_FLAGS=flags)

    one = begin(1, "whole")
    finish(begin(4, "begin"), folders[4], -signal.SIGKILL)
    finish(begin(4, "resume"), folders[4])
    finish(one, folders[1])
    return SimpleNamespace(one=folders[1] / "whole", killed=folders[4] / "killed", whole=folders[4] / "whole")


@pytest.fixture(scope="module")
def on_tensorflow(tmp_path_factory):
    """Folder of a run on two replicas, and of its study."""
    folder = tmp_path_factory.mktemp("replicas")
    finish(start(folder, "whole", KERAS_BACKEND="tensorflow", REPLICAS="2"), folder)
    return SimpleNamespace(run=folder / "whole", study=folder / "study")


def measure_val_auc(labels, probs):
    known = (labels.sum(axis=0) > 0) & (labels.sum(axis=0) < len(labels))
    return roc_auc_score(labels[:, known], probs[:, known], average="macro")


def check_val_auc(run, predictions):
    """Checks that the AUC measured in training is that of predictions.csv; returns it and the rows it is of."""
    val = predictions[predictions["split"].eq("val")]
    labels, probs = (val[[f"{kind}_{name}" for name in PATHOLOGIES]].to_numpy() for kind in ("label", "prob"))
    history = pd.read_csv(run / "history.csv")
    measured = history.loc[history["stage"].eq("all"), "val_auc"].max()
    assert measure_val_auc(labels, probs) == pytest.approx(measured, abs=1e-6)
    return measured, val["image"], labels


def test_on_jax_a_run_killed_within_an_epoch_resumes_to_the_bit(on_jax):
    """Of notebook 2, on four devices; test_resume.py has one device, test_replicas.py has TensorFlow."""
    killed, whole = on_jax.killed, on_jax.whole
    record = json.loads((killed / "run.json").read_text())
    assert [(part["epoch"], part["step"]) for part in record["parts"]] == [(0, 0), (device_chain.KILLED_AT[0], 4)]
    assert {part["backend"] for part in record["parts"]} == {"jax"}
    states = [CheckpointStore(folder / "state").read()[0] for folder in (killed, whole)]
    assert states[0].keys() == states[1].keys() and any(name.startswith("ValidationAUC") for name in states[0])
    assert all(np.array_equal(array, states[1][name]) for name, array in states[0].items())
    histories = [pd.read_csv(folder / "history.csv") for folder in (killed, whole)]
    histories = [history.filter(regex="^(?!.*seconds)") for history in histories]
    pd.testing.assert_frame_equal(*histories, check_exact=True)
    assert len(histories[0]) == 3
    kept = [hash_weights(folder / "model.weights.h5") for folder in (killed, whole)]
    assert kept[0] == kept[1] and len(kept[0]) > 20


@pytest.mark.parametrize(("run", "n_devices"), [("one", 1), ("killed", 4)])
def test_every_notebook_runs_on_jax(on_jax, run, n_devices):
    """One device is enough for notebook 6, which uses no more; four for notebook 5, whose processes have TensorFlow."""
    run = getattr(on_jax, run)
    runtime = json.loads((run / "run.json").read_text())["runtime"]
    strategy = "DataParallel" if n_devices > 1 else "one device"
    assert (runtime["backend"], runtime["strategy"], runtime["n_replicas"]) == ("jax", strategy, n_devices)
    predictions = check_artifacts(run, is_exported=n_devices > 1)
    assert len(check_localization(run))
    if n_devices == 1:
        check_nodules(run / "xvision-phantom")
    check_val_auc(run, predictions)


def test_on_two_replicas_what_is_saved_and_exported_is_what_was_measured(on_tensorflow):
    """The exact validation AUC of training, of predictions.csv and of the SavedModel on the images' files."""
    run = on_tensorflow.run
    runtime = json.loads((run / "run.json").read_text())["runtime"]
    assert (runtime["backend"], runtime["strategy"], runtime["n_replicas"]) == ("tensorflow", "MirroredStrategy", 2)
    measured, images, labels = check_val_auc(run, check_artifacts(run))
    files = [(on_tensorflow.study / "images" / name).read_bytes() for name in images]
    probs = ExportedModel(run / "saved_model").predict(files)["raw_probabilities"]
    assert measure_val_auc(labels, probs) == pytest.approx(measured, abs=1e-6)
