"""Follows a notebook that runs in another process: the lines that it prints, its figures, the time that is left."""

import base64
import csv
import json
import os
import queue
import signal
import statistics
import subprocess
import threading
import time
from pathlib import Path

from .settings import ROOT, check_settings
from .shared import read_form

EPOCHS_FROM = ("PROFILE", "RECIPE", "EPOCHS")  # settings that say how many epochs there are


def follow(command, copy, runtime="auto"):
    """Runs a command that executes a notebook, and reports on it while it runs.

    If the loop over it ends early, also by an interrupt, the command is interrupted, and waited for: it may be writing
    a checkpoint. If this process is killed, the command ends by itself, as its standard input is closed.

    Args:
        command: list of words.
        copy: path of the executed notebook without its ending, which is `.running.ipynb` while it runs.
        runtime: name of the runtime for it.

    Yields:
        As `Session.run`.

    Raises:
        RuntimeError: the command failed, with its last lines.
    """
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "RUNTIME": runtime, "TQDM_MININTERVAL": "5"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    lines, shown, printed, started = queue.Queue(), set(), [""], time.time()  # before the first figure can be written
    process = subprocess.Popen(command, **pipes, text=True, errors="replace", env=environment, start_new_session=True)
    reader = threading.Thread(target=_read_lines, args=(process.stdout, lines), daemon=True)
    reader.start()
    try:
        running = True
        while running:
            try:
                line = lines.get(timeout=1)
                while line is not None:
                    printed.append(line.rstrip())
                    line = lines.get_nowait()
                running = False
            except queue.Empty:
                if process.poll() is not None:  # what it started may keep its output open
                    reader.join(2)
                    lines.put(None)
            printed = [line for line in printed if line.strip()][-20:] or [""]
            yield time.time() - started, printed[-1], list(_list_new_figures(copy, started, shown))
        process.wait()
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                process.kill()
        process.stdin.close()
    if process.returncode:
        raise RuntimeError("\n".join(printed[-4:]))


def _read_lines(stream, lines):
    """Puts the lines of a stream into a queue, and None at its end."""
    for line in stream:
        lines.put(line)
    lines.put(None)


def _list_new_figures(copy, since, shown):
    """Yields the figures in an executed notebook that are not in the set `shown` yet."""
    for ending in (".running.ipynb", ".ipynb", ".failed.ipynb"):
        path = copy.with_name(copy.name + ending)
        try:
            if path.stat().st_mtime < since:  # of an earlier attempt
                continue
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        except (OSError, ValueError):  # not there, or just being written
            continue
        for place, cell in enumerate(cells):
            for number, output in enumerate(cell.get("outputs", ())):
                png = output.get("data", {}).get("image/png")
                if png and (place, number) not in shown:
                    shown.add((place, number))
                    yield base64.b64decode("".join(png))
        return


class TrainingClock:
    """Estimates how long a training still takes, by the epochs that ended since this object was made.

    Args:
        history: path of its history.csv, which may be missing and gets a row after each epoch.
        notebook: name of the notebook that trains.
        settings: dict of those of its settings that are given.

    Attributes:
        n_ended: int, epochs that had ended at the last estimate.
        n_epochs: int, epochs of the whole training.
    """

    def __init__(self, history, notebook, settings):
        self.history = Path(history)
        self.n_epochs = _count_epochs(notebook, settings)
        self._before = self.n_ended = len(self._read()[0])  # of an earlier session, which may have had another machine

    def estimate(self):
        """Returns the seconds until the last epoch ends; None until an epoch of the whole network has ended."""
        rows, ended = self._read()
        self.n_ended = len(rows)
        self._before = min(self._before, len(rows))  # the training was started over
        seconds = [float(row["seconds"]) for row in rows[self._before :] if row["stage"] == "all"]
        if not seconds:
            return None
        typical = statistics.median_low(seconds)  # the first one takes longer, as the network is compiled
        left = (self.n_epochs - len(rows)) * typical - (time.time() - ended)
        return left if left > 0 else None

    def _read(self):
        """Returns the rows and the time of the last one."""
        try:
            with self.history.open(encoding="utf-8", newline="") as file:
                return list(csv.DictReader(file)), os.fstat(file.fileno()).st_mtime
        except OSError:  # not there yet, or on a mount that does not answer
            return [], 0.0


def _count_epochs(notebook, given):
    """Returns the number of epochs that a notebook trains with the settings that are given."""
    values = read_form(ROOT / "notebooks" / f"{notebook}.ipynb") | given
    return check_settings({name: values[name] for name in EPOCHS_FROM})["EPOCHS"]


def describe_left(seconds):
    """Returns a time left in words, such as "about 3 min left"; None is unknown."""
    if seconds is None:
        return "time left unknown"
    return f"about {seconds:.0f} s left" if seconds < 100 else f"about {seconds / 60:,.0f} min left"
