"""Notebook 00 on stand-ins of Colab and Kaggle, and what it says before hours are spent where something is amiss."""

import ast
import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from IPython.display import HTML
from notebook_cells import run_cells
from platforms import Colab, dropping, read_only
from session_runs import run_all

from helpers.fetch import find_attached_study
from helpers.runtime import NOTEBOOKS, packages, progress, session
from helpers.runtime.progress import TrainingClock
from helpers.runtime.settings import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import run_notebooks

SECRETS = {"KAGGLE_USERNAME": "ada", "KAGGLE_KEY": "0123"}


def find_cell(text):
    """Returns the source of the only code cell of notebook 00 with a text."""
    cells = json.loads((ROOT / "notebooks" / "00_run_everything.ipynb").read_text())["cells"]
    [source] = [source for cell in cells if text in (source := "".join(cell["source"])) and cell["cell_type"] == "code"]
    return source


@pytest.fixture
def open_colab(tmp_path, monkeypatch):
    """A function that makes this process a kernel of Colab."""

    def open_colab(**options):
        colab = Colab(tmp_path / "drive", **options)
        for name, module in colab.list_modules().items():
            monkeypatch.setitem(sys.modules, name, module)
        return colab

    shutil.rmtree(tmp_path / "drive", ignore_errors=True)
    return open_colab


def log_in(monkeypatch, keep_in, settings):
    """Runs the cell that mounts Drive and reads the secrets; returns the secrets that the notebooks get."""
    for name in SECRETS:
        monkeypatch.delenv(name, raising=False)
    exec(find_cell("drive.mount"), {"KEEP_IN": keep_in, "SET": settings, "sys": sys, "os": os})
    given = {name: os.environ.pop(name) for name in SECRETS if name in os.environ}
    return given


@pytest.mark.slow
def test_on_colab_the_results_are_on_drive_and_the_model_in_the_browser(places, open_colab, run_notebook, shown):
    colab = open_colab()
    names = run_notebook(KEEP_IN="Drive")
    assert names["session"].run_dir == places["Drive"] / "synthetic-quick" and names["hours"] is None
    assert (places["Drive"] / "packed" / "synthetic-quick" / "manifest.json").exists()
    assert colab.downloads == [("model.zip", b"zip")]
    assert [text.partition(":")[2][:11] for text in shown if "done after" in text] == [" done after"] * 6
    assert any(": 0 s, time left unknown. cell" in text for text in shown)


def test_the_link_to_the_model_is_relative_to_where_kaggle_keeps_the_notebook(monkeypatch):
    """The notebook has changed into the clone's folder, from which the link would lead nowhere."""
    archive = Path("/kaggle/working/chest-xray/run/model.zip")
    names = {"os": os, "sys": sys, "archive": archive, "packing": SimpleNamespace(stdout=f"{archive}\n")}
    cell = ast.parse(find_cell("is_packed = "))
    monkeypatch.setattr(os.path, "isdir", lambda path: path == "/kaggle/working")
    exec(compile(ast.Module(cell.body[:-1], []), "cell", "exec"), names | {"HTML": HTML}, names)
    shown = eval(compile(ast.Expression(cell.body[-1].value), "cell", "eval"), names)
    assert 'href="chest-xray/run/model.zip"' in shown._repr_html_()


@pytest.mark.slow
def test_the_line_of_progress_stays_below_the_figures(run_notebook, monkeypatch):
    order, line = [], SimpleNamespace(update=lambda text: None)

    def display(*shown, **_):
        order.extend(type(value).__name__ for value in shown)
        return line

    monkeypatch.setattr("IPython.display.display", display)
    run_notebook()
    ends = [after for value, after in itertools.pairwise(order) if value == "Image" != after]
    assert ends[:6] == ["Pretty"] * 6


def test_drive_and_secrets_are_asked_for_only_if_the_form_does(open_colab, monkeypatch, tmp_path):
    open_colab(secrets=SECRETS, allows=False)
    assert log_in(monkeypatch, "this machine", "EPOCHS=3") == {}
    assert not (tmp_path / "drive").exists()
    assert log_in(monkeypatch, "this machine", "FETCH=kagglehub") == SECRETS
    for name in ("google.colab", "google.colab.drive", "google.colab.userdata"):
        monkeypatch.delitem(sys.modules, name)
    assert log_in(monkeypatch, "Drive", "FETCH=kagglehub") == {}  # another machine than Colab's


def test_a_refused_drive_is_named_with_what_to_do(open_colab, monkeypatch):
    open_colab(allows=False)
    with pytest.raises(
        RuntimeError, match=r"not mounted \(mount failed\).*allow the access, or choose KEEP_IN = “this"
    ):
        log_in(monkeypatch, "Drive", "")


@pytest.mark.parametrize(
    ("secrets", "reason"),
    [
        ({}, "Secret KAGGLE_USERNAME does not exist."),
        (SECRETS | {"KAGGLE_KEY": None}, "Notebook does not have access to secret KAGGLE_KEY"),
    ],
)
def test_a_secret_that_is_missing_or_refused_is_named_with_the_click(open_colab, monkeypatch, secrets, reason):
    open_colab(secrets=secrets)
    with pytest.raises(
        RuntimeError, match=rf"{reason} The key in Colab's left bar .*Create New Token.*notebook access"
    ):
        log_in(monkeypatch, "this machine", "FETCH=kagglehub")


@pytest.mark.slow
def test_the_next_version_on_kaggle_goes_on_from_the_attached_output(
    places, tmp_path, run_notebook, monkeypatch, capsys
):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setattr(session, "hours_left", lambda: 2.0)
    first = run_notebook(KEEP_IN="Kaggle output")["session"]
    assert "NOT FINISHED. Training paused." in capsys.readouterr().out
    attached = tmp_path / "input" / "my-notebook"
    shutil.move(places["Kaggle output"], attached)
    monkeypatch.setattr(session, "hours_left", lambda: 0.0)
    with read_only(tmp_path / "input"):
        with pytest.raises(OSError, match="Read-only file system"):
            (attached / "file").touch()
        second = run_notebook(KEEP_IN="Kaggle output")["session"]
    assert "NOT FINISHED" not in capsys.readouterr().out
    assert second.settings["PACKED_DIR"] == str(attached / "packed" / "synthetic-quick")
    ran = (second.run_dir / "executions.txt").read_text().splitlines()
    assert [line.split()[0] for line in ran] == [*NOTEBOOKS[:5], *NOTEBOOKS[1:]] and first.run_dir == second.run_dir


def test_what_kaggle_keeps_counts_against_its_20_gb(start, places, monkeypatch):
    monkeypatch.setattr(session, "KAGGLE_BYTES", 1_000_000_000)
    start("Kaggle output")
    with (places["Kaggle output"].parent / "other.bin").open("wb") as file:
        file.truncate(800_000_000)  # a hole: takes no space here
    with pytest.raises(OSError, match=r"has 0\.2 GB free, .* about 0\.6\. .*delete what else /kaggle/working holds"):
        start("Kaggle output")


@pytest.mark.parametrize("number", [errno.ENOTCONN, errno.ENOSPC, errno.EDQUOT])
def test_a_drive_that_drops_or_fills_in_the_middle_of_a_write_ends_the_session_before_the_training(
    start, places, number
):
    today = start("Drive")
    with dropping(places["Drive"], number), pytest.raises(OSError, match=rf"{os.strerror(number)}.*mounts Drive again"):
        run_all(today)
    kept = places["Drive"] / "packed" / "synthetic-quick"
    assert not [path for path in kept.rglob("*") if path.is_file()]  # nothing that looks whole
    assert today.list_states()[NOTEBOOKS[0]][0] == "to do"
    assert list(run_all(start("Drive"))) == list(NOTEBOOKS) and (kept / "manifest.json").exists()


def test_a_place_that_refuses_writing_is_named_at_once(start, places):
    places["Drive"].mkdir()
    with (
        read_only(places["Drive"].parent),
        pytest.raises(OSError, match=r"runs cannot be written \(.*mounts Drive again"),
    ):
        start("Drive")


def test_a_notebook_that_cannot_write_ends_with_what_to_do(start, monkeypatch):
    monkeypatch.setenv("MADE_FAIL", NOTEBOOKS[1])
    monkeypatch.setenv("MADE_REASON", "OSError")
    failing = start("Drive")
    with pytest.raises(RuntimeError, match=r"failed in cell 3: OSError: no\n.*mounts Drive again"):
        run_all(failing)


def test_without_anything_attached_it_is_said_before_anything_runs(start, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing is attached in .*input\. On Kaggle, .*“Add Input”"):
        start(source="attached")
    (tmp_path / "input" / "data").mkdir(parents=True)
    assert start(source="attached").settings["FETCH"] == "kaggle"


@pytest.mark.slow
def test_notebook_1_reads_what_is_attached_without_writing_there_and_refuses_what_has_no_labels(
    phantom_dir, tmp_path, monkeypatch
):
    attached = tmp_path / "input" / "datasets" / "nih-chest-xrays" / "data"
    shutil.copytree(phantom_dir, attached)
    monkeypatch.setattr(find_attached_study, "__defaults__", (str(tmp_path / "input"),))
    settings = {"FETCH": "kaggle", "DATA_DIR": str(tmp_path / "tmp" / "attached"), "SIDE": 64}
    settings |= {"RUN_DIR": str(tmp_path / "run"), "PACKED_DIR": str(tmp_path / "packed")}
    with read_only(tmp_path / "input"):
        run_cells("01_prepare_data", settings, draw=False, until="load_packed_study(paths.packed)")
    assert (tmp_path / "packed" / "manifest.json").exists()
    for path in attached.glob("Data_Entry_2017*.csv"):
        path.unlink()
    settings |= {"DATA_DIR": str(tmp_path / "tmp" / "other"), "RUN_DIR": str(tmp_path / "other")}
    with pytest.raises(FileNotFoundError, match=r"data holds images and BBox_List_2017\.csv\. On Kaggle, attach"):
        run_cells("01_prepare_data", settings, draw=False)


def test_without_internet_the_first_cell_names_kaggles_switch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: SimpleNamespace(returncode=128))
    source = find_cell("git could not fetch").replace("OWNER/REPOSITORY", "me/fork")
    with pytest.raises(RuntimeError, match=r"On Kaggle: Settings > Internet on\. Then run this cell again"):
        exec(source, {})


def test_without_internet_pip_names_kaggles_switch(monkeypatch):
    failed = SimpleNamespace(returncode=1, stdout="ERROR: No matching distribution found for papermill")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: failed)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    with pytest.raises(RuntimeError, match=r"No matching distribution found for papermill$"):
        packages.install(["papermill"])
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    with pytest.raises(RuntimeError, match=r"for papermill; on Kaggle, .*Settings > Internet on$"):
        packages.install(["papermill"])


def read_left(session, name, seconds):
    """Starts a notebook, asks for the time left after some seconds, and lets it end."""
    run = session.run(name)
    next(run)
    left = [session.describe_time_left(number) for number in seconds]
    list(run)
    return left


def set_seconds(session, name, seconds):
    record = json.loads((session.run_dir / "session.json").read_text())
    record[name]["seconds"] = seconds
    (session.run_dir / "session.json").write_text(json.dumps(record))


def test_a_notebook_takes_as_long_as_the_last_time_with_the_same_settings(start):
    today, name = start(), NOTEBOOKS[2]
    run_all(today)
    set_seconds(today, name, 400)
    list(today.run(NOTEBOOKS[1]))  # trained further: what follows is of other results, and takes as long as before
    assert today.list_states()[name] == ("to do", 400)
    assert read_left(today, name, [10, 390, 410]) == ["about 6 min left", "about 10 s left", "time left unknown"]


def test_what_other_settings_took_says_nothing(start):
    first, name = start(), NOTEBOOKS[0]
    run_all(first)
    set_seconds(first, name, 400)
    other = start(more="EPOCHS=3")
    next(other.run(name))  # not to its end
    assert read_left(other, name, [10]) == ["time left unknown"]


@pytest.fixture
def write_history(tmp_path):
    """A function that writes a history of epochs, the last of which ended at the time 1,000."""

    def write(*epochs):
        (tmp_path / "history.csv").write_text("stage,seconds\n" + "".join(f"{s},{n}\n" for s, n in epochs))
        os.utime(tmp_path / "history.csv", (1000, 1000))

    return write


def test_training_takes_as_long_as_its_own_epochs(tmp_path, write_history, monkeypatch):
    monkeypatch.setattr(progress.time, "time", lambda: 1004.0)
    earlier = [("head", 5), ("all", 999)]  # perhaps on another machine
    write_history(*earlier)
    clock = TrainingClock(tmp_path / "history.csv", NOTEBOOKS[1], {"PROFILE": "full"})
    assert clock.n_epochs == 15 and clock.estimate() is None
    write_history(*earlier, ("head", 5))
    assert clock.estimate() is None
    write_history(*earlier, ("all", 50), ("all", 10), ("all", 12))
    assert clock.estimate() == 10 * 12 - 4
    write_history(*[("all", 10)] * 15)
    assert clock.estimate() is None  # what follows the last epoch is not known
    (tmp_path / "history.csv").unlink()
    assert clock.estimate() is None
    write_history(("all", 10))  # started over
    assert clock.estimate() == 14 * 10 - 4


@pytest.mark.parametrize(("given", "n"), [({"EPOCHS": "4"}, 4), ({"RECIPE": "original"}, 100), ({}, None)])
def test_the_number_of_epochs_is_that_of_notebook_2(tmp_path, given, n):
    values = run_notebooks.read_parameters(NOTEBOOKS[1])["EPOCHS"]["ours"]
    clock = TrainingClock(tmp_path / "history.csv", NOTEBOOKS[1], {"PROFILE": "quick"} | given)
    assert clock.n_epochs == (n or values["quick"])
