"""All notebooks on JAX, which gives away the memory of what it computes from, on one device and on four."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax_chain
import numpy as np
import pandas as pd
import pytest
from chain import check_artifacts, check_localization, check_nodules, hash_weights
from sklearn.metrics import roc_auc_score

from helpers.study import PATHOLOGIES
from helpers.training import CheckpointStore

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a run on one device, and of one on four, killed and resumed, beside one on four without that."""
    jax = pytest.importorskip("jax")
    given = jax.numpy.zeros(8)
    jax.jit(lambda values: values + 1, donate_argnums=0)(given)
    if not given.is_deleted():
        pytest.skip(f"JAX {jax.__version__} does not donate buffers on CPUs, as JAX does on accelerators; 0.12 does")
    folders = {n_devices: tmp_path_factory.mktemp(f"devices-{n_devices}") for n_devices in (1, 4)}

    def start(n_devices, task):
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={n_devices}", "CUDA_VISIBLE_DEVICES": ""}
        flags |= {
            "JAX_COMPILATION_CACHE_DIR": str(folders[n_devices] / "cache")
        }  # the resumed run compiles nothing again
        flags |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
        command = [sys.executable, jax_chain.__file__, str(folders[n_devices]), task]
        with open(folders[n_devices] / "log.txt", "w") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | flags)

    def finish(process, n_devices, code):
        assert process.wait(timeout=1800) == code, (folders[n_devices] / "log.txt").read_text()[-5000:]

    one = start(1, "whole")
    finish(start(4, "begin"), 4, -signal.SIGKILL)
    finish(start(4, "resume"), 4, 0)
    finish(one, 1, 0)
    return SimpleNamespace(one=folders[1] / "whole", killed=folders[4] / "killed", four=folders[4] / "whole")


def test_a_run_killed_within_an_epoch_resumes_to_the_bit(runs):
    """Of notebook 2, on four devices; test_resume.py has one device."""
    record = json.loads((runs.killed / "run.json").read_text())
    assert [(part["epoch"], part["step"]) for part in record["parts"]] == [(0, 0), (jax_chain.KILLED_AT[0], 4)]
    assert {part["backend"] for part in record["parts"]} == {"jax"}
    states = [CheckpointStore(folder / "state").read()[0] for folder in (runs.killed, runs.four)]
    assert states[0].keys() == states[1].keys() and any(name.startswith("ValidationAUC") for name in states[0])
    assert all(np.array_equal(array, states[1][name]) for name, array in states[0].items())
    histories = [pd.read_csv(folder / "history.csv") for folder in (runs.killed, runs.four)]
    histories = [history.filter(regex="^(?!.*seconds)") for history in histories]
    pd.testing.assert_frame_equal(*histories, check_exact=True)
    assert len(histories[0]) == 3
    kept = [hash_weights(folder / "model.weights.h5") for folder in (runs.killed, runs.four)]
    assert kept[0] == kept[1] and len(kept[0]) > 20


@pytest.mark.parametrize(("run", "n_devices"), [("one", 1), ("killed", 4)])
def test_every_notebook_runs_on_jax(runs, run, n_devices):
    """On one device without notebook 5, whose processes have TensorFlow, whatever the devices are."""
    run = getattr(runs, run)
    runtime = json.loads((run / "run.json").read_text())["runtime"]
    assert (runtime["backend"], runtime["strategy"], runtime["n_replicas"]) == ("jax", "DataParallel", n_devices)
    predictions = check_artifacts(run, is_exported=n_devices > 1)
    assert len(check_localization(run))
    check_nodules(run / "xvision-phantom")
    val = predictions[predictions["split"].eq("val")]
    labels, probs = (val[[f"{kind}_{name}" for name in PATHOLOGIES]].to_numpy() for kind in ("label", "prob"))
    known = (labels.sum(axis=0) > 0) & (labels.sum(axis=0) < len(labels))
    auc = roc_auc_score(labels[:, known], probs[:, known], average="macro")
    history = pd.read_csv(run / "history.csv")
    assert auc == pytest.approx(history.loc[history["stage"].eq("all"), "val_auc"].max(), abs=1e-6)
