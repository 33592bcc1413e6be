"""Runs the notebooks on several devices, as a program of its own: `python device_chain.py FOLDER whole|begin|resume`.

`whole` executes them without interruption. `begin` trains until it kills itself within an epoch; `resume` ends that
run, executes the notebooks after it, and trains the same once more without interruption. KERAS_BACKEND names the
backend. On JAX, devices are those that it shows; on TensorFlow, the logical devices of the variable REPLICAS. Notebook
6, which uses one device, takes in `whole` on JAX the place of the export, whose processes have TensorFlow.
"""

import functools
import os
import signal
import sys
from pathlib import Path

os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3"}
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "notebooks"))

from types import SimpleNamespace

from chain import DENSENET, XVISION, name_folders, run_chain

from helpers.runtime import accelerator, connect_devices
from helpers.study import write_synthetic_study
from helpers.training import TrainingCheckpoint

KILLED_AT = 1, 5  # epoch, from 0, and step; the checkpoint before it is of step 4
SETTINGS = {
    **{"BATCH_SIZE": 8, "EPOCHS": 3, "FROZEN_EPOCHS": 1, "SAVE_STEPS": 4},
    **{"NODULE_IMAGES": 40, "BACKBONES": "trained"},
    "REPLICAS": int(os.environ.get("REPLICAS", 0)),
}


def kill_within_an_epoch():
    """Makes this process kill itself after a step of an epoch, as a machine that is taken away would."""
    go_on = TrainingCheckpoint.on_train_batch_end

    def go_on_or_die(checkpoint, batch, logs=None):
        go_on(checkpoint, batch, logs)
        if (checkpoint.epoch, checkpoint.step) == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)

    TrainingCheckpoint.on_train_batch_end = go_on_or_die


def main(folder, task):
    if SETTINGS["REPLICAS"]:  # before notebook 1 starts TensorFlow in this process
        connect_devices(SimpleNamespace(name="cpu", chips=0), SETTINGS["REPLICAS"])
    accelerator.try_way = functools.cache(accelerator.try_way)  # starts a process, each time with the same result
    TrainingCheckpoint.__init__.__kwdefaults__["max_share"] = float("inf")  # in so short a run it would write nothing
    killed, whole = (
        SETTINGS | name_folders(folder / "study", folder / run, folder / "packed") for run in ("killed", "whole")
    )
    if task != "resume":
        write_synthetic_study(folder / "study", n_images=90, size=40, seed=5, n_workers=1)
    if task == "begin":
        kill_within_an_epoch()
        run_chain(DENSENET[:2], killed, draw=False)
    elif task == "resume":
        run_chain(DENSENET[1:], killed, draw=False)
        run_chain(DENSENET[1:2], whole, draw=False)
    else:
        run_chain(DENSENET if SETTINGS["REPLICAS"] else [*DENSENET[:4], XVISION], whole, draw=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
