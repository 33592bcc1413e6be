"""Notebook 2 on two hosts: two processes on this machine, started as by Slurm, beside one with two devices."""

import json
import os
import socket
import subprocess
import sys
import time

import h5py
import numpy as np
import pandas as pd
import psutil
import pytest
from chain import DENSENET

from helpers.runtime.settings import ROOT

pytestmark = pytest.mark.slow
SETTINGS = {"VERBOSE": 2, "IMAGE_SIZE": 40, "BATCH_SIZE": 8, "EPOCHS": 3, "SAVE_STEPS": 2, "BLOCKS": [1, 1, 1, 1]}
# One process that takes the images in the order in which two hosts take them.
ONE = """
import json, sys
sys.path[:0] = sys.argv[1:3]
from helpers import pipeline
count_steps = pipeline.count_steps

def deal_to_two(function):
    return lambda *arguments, **options: function(*arguments, **options | {"n_hosts": 2, "host": None})

pipeline.make_train_dataset = deal_to_two(pipeline.make_train_dataset)
pipeline.count_steps = lambda study, batch_size, n_hosts, group: count_steps(study, batch_size, 2, group)
from notebook_cells import run_cells
run_cells("02_train_densenet121", json.loads(sys.argv[3]), draw=False)
"""


def find_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def start_host(number, port, settings, folder):
    """Starts notebook 2 as `srun --ntasks=2` on this machine does; its output goes into a file."""
    step = {"SLURM_JOB_ID": 7, "JAX_COORDINATOR_PORT": port, "SLURM_STEP_NODELIST": "localhost"}
    step |= {"SLURM_NTASKS": 2, "SLURM_STEP_NUM_TASKS": 2, "SLURM_PROCID": number, "SLURM_LOCALID": number}
    step |= {"RUNTIME": "jax", "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, ROOT / "scripts" / "run_notebooks.py", "--only", DENSENET[1], "--set"]
    command += [f"{name}={value}" for name, value in settings.items() if name not in ("DATA_DIR", "RUN_DIR", "VERBOSE")]
    command += ["--data-dir", settings["DATA_DIR"], "--run-dir", settings["RUN_DIR"]]
    environment = os.environ | {name: str(value) for name, value in step.items()}
    with open(folder / f"log-{number}.txt", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def kill(process):
    """Kills a process with those that it has started, as a machine that is taken away would."""
    for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        one.kill()


def read_weights(run):
    arrays = {}
    with h5py.File(run / "model.weights.h5") as file:
        file.visititems(lambda name, item: arrays.update({name: item[()]} if isinstance(item, h5py.Dataset) else {}))
    return arrays


def test_two_processes_of_srun_train_as_one_and_resume_after_one_is_killed(packed, phantom_dir, tmp_path):
    pytest.importorskip("jax")
    run, port = tmp_path / "two", find_port()
    settings = SETTINGS | {"DATA_DIR": str(phantom_dir), "PACKED_DIR": str(packed.folder), "RUN_DIR": str(run)}

    hosts = [start_host(number, port, settings | {"BLOCKS": "1,1,1,1"}, tmp_path) for number in (0, 1)]
    try:
        deadline = time.monotonic() + 600
        while not (run / "history.csv").exists():
            running = [host.poll() for host in hosts] == [None, None] and time.monotonic() < deadline
            assert running, (tmp_path / "log-0.txt").read_text()[-3000:]
            time.sleep(0.05)
        kill(hosts[1])
        assert hosts[0].wait(timeout=240) == 1
        said = (tmp_path / "log-0.txt").read_text()
        assert "02_train_densenet121 failed in cell" in said and "give the same command again to all of them" in said
        assert not (run / "run.json").exists()

        hosts = [start_host(number, port, settings | {"BLOCKS": "1,1,1,1"}, tmp_path) for number in (0, 1)]
        for number, host in enumerate(hosts):
            assert host.wait(timeout=600) == 0, (tmp_path / f"log-{number}.txt").read_text()[-3000:]
    finally:
        for host in hosts:
            host.kill()

    flags = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"}
    flags |= {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    folders = [str(ROOT / "notebooks"), str(ROOT / "tests" / "support")]
    given = json.dumps(settings | {"RUN_DIR": str(tmp_path / "one")})
    subprocess.run([sys.executable, "-c", ONE, *folders, given], env=os.environ | flags, check=True)

    record = json.loads((run / "run.json").read_text())
    assert (record["runtime"]["n_hosts"], record["runtime"]["n_replicas"]) == (2, 2)
    assert len(record["parts"]) == 2 and record["parts"][1]["epoch"] >= 1
    one, two = (pd.read_csv(folder / "history.csv") for folder in (tmp_path / "one", run))
    columns = ["loss", "val_loss", "val_auc", "learning_rate"]
    np.testing.assert_allclose(two[columns], one[columns], rtol=1e-5)
    one, two, other = (read_weights(folder) for folder in (tmp_path / "one", run, run / "host-1"))
    assert one.keys() == two.keys() == other.keys() and len(one) > 40
    for name, array in one.items():
        np.testing.assert_allclose(two[name], array, rtol=1e-4, atol=1e-5)
        assert np.array_equal(other[name], two[name])
    executed = {path.name for path in (run / "executed").glob("*.ipynb")}
    assert executed == {"02_train_densenet121.ipynb", "02_train_densenet121.host-1.ipynb"}
