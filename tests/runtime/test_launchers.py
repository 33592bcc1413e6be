"""Several processes of one launcher: noticed, connected on JAX, and refused where they would overwrite each other."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from helpers.runtime import connect_devices, find_launch
from helpers.runtime.launchers import Launch
from helpers.runtime.settings import ROOT

STEP = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
SRUN = STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Launch()),
        (SRUN, Launch("srun", 2, 1)),
        (STEP, Launch()),  # a job of two tasks, in which srun has not been used
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, Launch()),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, Launch("Open MPI", 4, 3)),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, Launch("MPI", 2, 0)),
        (SRUN | {"KERAS_DISTRIBUTION_NUM_PROCESSES": "3"}, Launch("Keras's variables", 3, 0)),
    ],
)
def test_the_variables_of_launchers_are_read(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find_launch() == expected


def test_the_hosts_of_a_slice_come_from_kubernetes_or_from_the_metadata_server(monkeypatch, tmp_path):
    answers = {"instance/attributes/worker-network-endpoints": "a:1:10.0.0.2,a:2:10.0.0.3"}
    answers["instance/attributes/agent-worker-number"] = "1"
    monkeypatch.setattr("helpers.runtime.launchers.ask_metadata", answers.get)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    assert find_launch(tmp_path) == Launch()  # without a chip nobody is asked
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "accel0").touch()
    assert find_launch(tmp_path) == Launch("the TPU slice", 2, 1)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    assert find_launch(tmp_path) == Launch()
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c,d")
    monkeypatch.setenv("TPU_WORKER_ID", "3")
    assert find_launch(tmp_path) == Launch("the TPU slice", 4, 3)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    assert find_launch(tmp_path) == Launch()


def test_processes_that_would_train_apart_are_refused(monkeypatch):
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=r"srun has started 2 processes, but .* on JAX only: .*RUNTIME = 'jax'"):
        connect_devices(SimpleNamespace(name="cpu", chips=0))


@pytest.mark.slow
def test_processes_that_jax_does_not_find_are_refused():
    """Open MPI 5 sets no variable with an address."""
    pytest.importorskip("jax")
    code = """
from types import SimpleNamespace
from helpers.runtime import connect_devices
connect_devices(SimpleNamespace(name="jax", chips=0))
"""
    variables = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "KERAS_BACKEND": "jax"}
    command, place = [sys.executable, "-c", code], ROOT / "notebooks"
    done = subprocess.run(command, cwd=place, env=os.environ | variables, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode and last.startswith("RuntimeError: Open MPI has started 2 processes, but JAX does not find")


@pytest.mark.slow
def test_several_processes_of_a_command_for_one_are_refused_before_anything_is_written(tmp_path):
    for script, words in (("run_notebooks", []), ("run_notebooks", ["--only", "03_evaluate"]), ("train_seeds", [])):
        command = [sys.executable, ROOT / "scripts" / f"{script}.py", *words, "--run-dir", tmp_path / "run"]
        done = subprocess.run(command, env=os.environ | SRUN, capture_output=True, text=True)
        assert done.returncode == 1 and not (tmp_path / "run").exists()
        assert done.stderr.startswith("srun has started 2 processes of this command, which would overwrite")
        assert "`make train`" in done.stderr and done.stderr.count("\n") == 1
