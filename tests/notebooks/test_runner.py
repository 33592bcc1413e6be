"""How `make run` executes a notebook: with which Python, in folders of any name, and what it says of a killed one."""

import json
import os
import signal
import sys
import threading
import time

import nbformat
import pytest

from helpers.runtime import lock_folder
from helpers.runtime.settings import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import run_notebooks

pytestmark = pytest.mark.slow


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """A function that executes cells as a notebook in a folder with braces; returns error and the copy's text.

    The kernel called python3 that Jupyter finds first belongs to another Python, which would fail.
    """
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    other = {"argv": ["/bin/false", "{connection_file}"], "display_name": "other", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(other))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    folder = tmp_path / "run{1}[2]"

    def run(*sources):
        cells = [
            nbformat.v4.new_code_cell("A = 1", metadata={"tags": ["parameters"]}),
            *map(nbformat.v4.new_code_cell, sources),
        ]
        kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernelspec})
        folder.mkdir()
        nbformat.write(notebook, folder / "source.ipynb")
        monkeypatch.setattr(run_notebooks, "find_notebook", lambda name: folder / "source.ipynb")
        error = run_notebooks.execute("made", folder, {"A": 2, "B": 3})
        return error, {path.name: path.read_text() for path in folder.glob("made*.ipynb")}

    return run


def test_a_notebook_runs_with_this_python_whatever_jupyter_finds(execute):
    error, copies = execute("import sys", "print(sys.executable, A)")
    assert error is None and list(copies) == ["made.ipynb"]
    assert f"{sys.executable} 2" in copies["made.ipynb"]


def test_a_killed_notebook_is_one_sentence_with_the_remedy(execute):
    error, copies = execute("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert error.startswith("made: its process was killed, most often because memory ran out. Close other programs")
    assert list(copies) == ["made.failed.ipynb"]


def test_bars_are_shown_and_messages_of_libraries_are_left_to_the_copy(execute, capsys):
    bar = "from tqdm import tqdm; [None for _ in tqdm([1, 2], desc='Views', miniters=1)]"
    error, copies = execute("import sys; print('a message', file=sys.stderr)", bar)
    printed = capsys.readouterr().out
    assert error is None and "Views: 100%|" in printed and "a message" not in printed
    assert "a message" in copies["made.ipynb"]


def test_two_runs_do_not_execute_into_one_folder(tmp_path):
    """The second would remove what the first is writing."""
    with (
        lock_folder(tmp_path),
        pytest.raises(SystemExit, match=r"Another process executes notebooks into .* choose another RUN_DIR"),
    ):
        run_notebooks.execute_into(tmp_path, "01_prepare_data", {})
    assert not list(tmp_path.iterdir())


def test_after_each_epoch_of_a_training_it_says_how_long_the_others_take(tmp_path, capsys):
    history, row = tmp_path / "history.csv", "{},all,100\n"
    with run_notebooks.epochs_reported(
        run_notebooks.TRAIN, {"RUN_DIR": str(tmp_path), "PROFILE": "quick", "EPOCHS": 4}
    ):
        for text in ("epoch,stage,seconds\n", row.format(0), row.format(1)):
            with history.open("a") as file:
                file.write(text)
            time.sleep(1.5)
    said = capsys.readouterr().out.splitlines()
    assert said == ["1 of 4 epochs: about 5 min left", "2 of 4 epochs: about 3 min left"]
    with run_notebooks.epochs_reported("03_evaluate", {"RUN_DIR": str(tmp_path)}):
        pass
    assert not capsys.readouterr().out


STAND_IN = """
import sys, time
from pathlib import Path

name, folder = sys.argv[2], Path(sys.argv[sys.argv.index("--run-dir") + 1])
(folder / f"{name}.began").write_text(" ".join(path.name for path in folder.glob("*.ended")))
print(f"{name} begins\\rand goes on", flush=True)
if (folder / f"{name}.waits").exists():
    sys.stdin.read()
    sys.exit("interrupted")
limit = time.monotonic() + 60
while len(list(folder.glob("*.began"))) < 2:  # the first two end after both have begun
    assert time.monotonic() < limit, "no other runs beside this one"
    time.sleep(0.02)
(folder / f"{name}.ended").touch()
sys.exit(name in (folder / "failing").read_text())
"""


@pytest.fixture
def two_at_a_time(tmp_path, monkeypatch):
    """A function that executes stand-ins of the notebooks after the training; returns which had ended as each began."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(run_notebooks, "__file__", str(tmp_path / "stand_in.py"))

    def run(failing=""):
        (tmp_path / "failing").write_text(failing)
        run_notebooks.execute_two_at_a_time([*run_notebooks.AFTER_TRAINING], ["--run-dir", str(tmp_path)])

    return run


def read_ended(folder):
    """Returns a dict from each notebook that began to the notebooks that had ended then."""
    return {path.stem: {name.split(".")[0] for name in path.read_text().split()} for path in folder.glob("*.began")}


def test_two_notebooks_run_at_a_time_and_none_before_those_whose_files_it_reads(two_at_a_time, tmp_path, capfd):
    two_at_a_time()
    ended = read_ended(tmp_path)
    assert ended["04_explain"] == ended["03_evaluate"] == set() != ended["06_xvision_vgg16_nodules"]
    assert ended["05_export_and_predict"] >= {"03_evaluate", "04_explain"}
    assert {"04 | 04_explain begins", "04 | and goes on"} <= set(capfd.readouterr().out.splitlines())


def test_after_a_failure_the_others_end_and_what_needs_it_is_not_executed(two_at_a_time, tmp_path):
    with pytest.raises(SystemExit, match=r"04_explain has failed, see above; 05_export_and_predict was not executed\."):
        two_at_a_time("04_explain")
    assert read_ended(tmp_path).keys() == {*run_notebooks.AFTER_TRAINING} - {"05_export_and_predict"}


def test_an_interruption_reaches_both(two_at_a_time, tmp_path):
    for name in run_notebooks.AFTER_TRAINING:
        (tmp_path / f"{name}.waits").touch()

    def interrupt():
        while len(list(tmp_path.glob("*.began"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        two_at_a_time()
    assert not list(tmp_path.glob("*.ended")) and len(read_ended(tmp_path)) == 2
