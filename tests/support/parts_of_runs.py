"""Starts, kills and finishes the run of resumable_run.py, in this process or in one of its own."""

import os
import subprocess
import sys
import time

import resumable_run


def train(packed, run_dir, **options):
    """Trains in this process; returns checkpoint and the measuring callback, with the folder free again."""
    _, checkpoint, validation = resumable_run.run(packed.folder, run_dir, resumable_run.OPTIONS | options)
    checkpoint.store.close()
    return checkpoint, validation


def outcome(packed, run_dir, **options):
    return resumable_run.describe_outcome(*train(packed, run_dir, **options))


def start(packed, *runs, backend="tensorflow", **variables):
    """Starts runs, pairs of folder and options, one after the other in a process of their own."""
    command = [sys.executable, resumable_run.__file__, str(packed.folder)]
    for run_dir, options in runs:
        command += ["+", str(run_dir), *(f"{name}={value}" for name, value in options.items())]
    environment = os.environ | {"KERAS_BACKEND": backend, "CUDA_VISIBLE_DEVICES": ""} | variables
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process):
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return said


def kill(process, run_dir, n_rows):
    """Kills the run after so many epochs, amid the writing of a checkpoint; False if it had ended before."""
    history, part = run_dir / "history.csv", run_dir / "state" / "state.bin.part"
    while process.poll() is None and (not history.exists() or len(history.read_text().splitlines()) <= n_rows):
        time.sleep(0.01)
    while process.poll() is None and not part.exists():
        time.sleep(1e-4)
    running = process.poll() is None
    process.kill()
    process.communicate()
    return running
