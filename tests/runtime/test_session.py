"""Notebook 00: all notebooks in one session, resumed on the next day, on the machine, on Drive and on Kaggle."""

import json
import re
import shutil
import signal
import subprocess
import sys

import pytest
from session_runs import run_all

from helpers.runtime import NOTEBOOKS, session
from helpers.runtime.progress import follow
from helpers.runtime.session import PLACES, SOURCES, UNFINISHED
from helpers.runtime.settings import ROOT, SETTINGS


def test_the_form_offers_what_there_is():
    assert SETTINGS["DATA"][1] == tuple(SOURCES) and SETTINGS["KEEP_IN"][1] == tuple(PLACES)
    assert all(f"{name}.ipynb" in {path.name for path in (ROOT / "notebooks").iterdir()} for name in NOTEBOOKS)


def test_what_is_pushed_to_kaggle_is_this_notebook_under_the_name_that_its_title_gives():
    pushed = json.loads((ROOT / "notebooks" / "kernel-metadata.json").read_text())
    assert (ROOT / "notebooks" / pushed["code_file"]).exists() and pushed["enable_internet"] and pushed["enable_tpu"]
    assert pushed["id"].split("/")[1] == re.sub(r"\W+", "-", pushed["title"].lower())


def test_every_notebook_runs_once_with_its_figures_and_other_settings_run_all_again(start):
    assert run_all(start()) == dict.fromkeys(NOTEBOOKS, 3)
    assert {state for state, _ in start().list_states().values()} == {"done"} and run_all(start()) == {}
    assert start(more="EPOCHS=3").list_states()[NOTEBOOKS[0]][0] == "to do"
    assert start(hours=1.0).list_states()[NOTEBOOKS[-1]][0] == "done"  # the time that is left changes no result


def test_a_run_of_a_version_without_a_shared_setting_is_done_where_the_setting_is_the_default(start):
    """On Colab, the next day's session fetches a newer version."""
    first = start()
    run_all(first)
    record = json.loads((first.run_dir / "session.json").read_text())
    for entry in record.values():
        del entry["settings"]["SPLIT"]
    (first.run_dir / "session.json").write_text(json.dumps(record))
    assert {state for state, _ in start().list_states().values()} == {"done"}
    assert start(more="SPLIT=random_patients").list_states()[NOTEBOOKS[0]][0] == "to do"


def test_a_paused_training_is_exported_and_all_that_follows_runs_again_once_it_has_ended(start):
    first = start(hours=2.0)
    assert list(run_all(first)) == list(NOTEBOOKS[:5]) and first.find_pause() == "Training paused."
    budget = float((first.run_dir / "executions.txt").read_text().split()[2])
    assert 1.4 < budget < 1.51  # half an hour is kept for the export
    (first.run_dir / "state").mkdir()
    (first.run_dir / "state" / "state.bin").touch()
    second = start()
    states = [state for state, _ in second.list_states().values()]
    assert states == ["done", "to resume", *["to do"] * 4]
    assert list(run_all(second)) == list(NOTEBOOKS[1:]) and not second.find_pause()
    assert {state for state, _ in start().list_states().values()} == {"done"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("RUN_DIR=models/other", "SET holds RUN_DIR, which the form's own fields decide"),
        ("PROFILE=full", "SET holds PROFILE, which the form's own fields decide"),
        ("EPOCH=3", "SET holds 'EPOCH=3', which is no NAME=VALUE"),
        ("EPOCHS 3", "SET holds 'EPOCHS', which is no NAME=VALUE"),
        ("EPOCHS=three", "EPOCHS is 'three'; expected"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_what_is_done_is_forgotten(start, more, message):
    run_all(start())
    with pytest.raises(ValueError, match=message):
        start(more=more)
    assert run_all(start()) == {}


def test_starting_over_deletes_what_was_before_and_never_what_the_last_session_trained(start):
    first = start(hours=2.0, more="START_OVER=True")
    run_all(first)
    lines = (first.run_dir / "executions.txt").read_text().splitlines()
    assert lines[1].startswith(NOTEBOOKS[1]) and "START_OVER" in lines[1]
    (first.run_dir / "state").mkdir()
    (first.run_dir / "state" / "state.bin").touch()
    run_all(start(more="START_OVER=True"))
    lines = (first.run_dir / "executions.txt").read_text().splitlines()
    again = [line for line in lines if line.startswith(NOTEBOOKS[1])]
    assert len(again) == 2 and "START_OVER" not in again[1]
    list(start(more="START_OVER=True").run(NOTEBOOKS[1]))  # the one before was killed before its first checkpoint
    assert "START_OVER" not in (first.run_dir / "executions.txt").read_text().splitlines()[-1]


def test_without_a_finished_epoch_nothing_is_exported_and_nothing_fails(start, monkeypatch):
    monkeypatch.setenv("MADE_UNFINISHED", "1")
    session = start()
    assert list(run_all(session)) == list(NOTEBOOKS[:2])
    assert session.find_pause() == "Training has not finished an epoch yet." and not session.has_model()
    assert [state for state, _ in session.list_states().values()] == ["done", "to resume", *["to do"] * 4]
    text = (ROOT / "notebooks" / f"{NOTEBOOKS[1]}.ipynb").read_text()
    assert UNFINISHED in text, "notebook 2 says it in other words"


def test_a_notebook_that_fails_ends_the_session_with_its_reason_and_is_not_done(start, monkeypatch):
    monkeypatch.setenv("MADE_FAIL", NOTEBOOKS[1])
    failing = start()
    with pytest.raises(RuntimeError, match="02_train_densenet121 failed in cell 3: ValueError: no"):
        run_all(failing)
    assert [state for state, _ in failing.list_states().values()] == ["done", *["to do"] * 5]


def test_packed_images_are_read_from_the_machine_and_kept_on_drive(start, tmp_path, places):
    run_all(start("Drive"))
    kept = places["Drive"] / "packed" / "synthetic-quick"
    assert (kept / "study" / "labels.csv").read_text() == "labels"
    shutil.rmtree(tmp_path / "clone")  # the machine of the next day
    (places["Drive"] / "synthetic-quick" / "run.json").unlink()
    tomorrow = start("Drive", more="")
    assert tomorrow.list_states()[NOTEBOOKS[0]][0] == "done"
    list(tomorrow.run(NOTEBOOKS[1]))
    local = tmp_path / "clone" / "data" / "packed" / "synthetic-quick"
    assert (local / "manifest.json").exists() and (local / "study" / "labels.csv").exists()


def test_the_attached_output_of_a_kaggle_session_is_taken_up(start, tmp_path, places):
    run_all(start("Kaggle output"))
    attached = tmp_path / "input" / "my-notebook"
    shutil.move(places["Kaggle output"], attached)
    again = start("Kaggle output")
    assert again.settings["PACKED_DIR"] == str(attached / "packed" / "synthetic-quick")
    assert run_all(again) == {} and again.settings["DATA_DIR"] == "data/phantom"  # which notebook 1 draws, and no other
    assert start("Kaggle output", source="all of NIH").settings["DATA_DIR"] == "/kaggle/tmp/nih"


def test_complete_packed_images_of_the_user_are_left_as_they_are(start, tmp_path):
    run_all(start("Drive"))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "manifest.json").write_text("mine")
    list(start("Drive", more=f"PACKED_DIR={mine}").run(NOTEBOOKS[1]))
    assert [path.name for path in mine.iterdir()] == ["manifest.json"] and (
        mine / "manifest.json"
    ).read_text() == "mine"


def test_another_packed_study_replaces_the_one_that_was_kept(start, tmp_path, places):
    run_all(start("Drive"))
    kept, local = (
        places["Drive"] / "packed" / "synthetic-quick",
        tmp_path / "clone" / "data" / "packed" / "synthetic-quick",
    )
    (kept / "manifest.json").write_text("another")
    (kept / "shard").write_text("of another study")
    shutil.rmtree(local)
    other = start("Drive", more="DATA_SEED=1")
    next(other.run(NOTEBOOKS[0]))
    assert not (local / "shard").exists()  # notebook 1 would refuse it in its folder
    list(other.run(NOTEBOOKS[0]))
    assert (kept / "manifest.json").read_text() == "{}" and not (kept / "shard").exists()


def test_a_place_that_is_not_there_or_too_small_is_named_with_the_click_that_mends_it(start, places, monkeypatch):
    with pytest.raises(OSError, match=r"has \d+\.\d GB free, and .* take about 20\d\d\.\d.*choose a smaller profile"):
        monkeypatch.setitem(session.IMAGE_BYTES, "best", 500_000_000)
        start("Kaggle output", profile="best")
    shutil.rmtree(places["Drive"].parent)
    with pytest.raises(FileNotFoundError, match=r"KEEP_IN = “Drive”: there is no .*allow the access to Drive"):
        start("Drive")


def test_an_interrupted_session_interrupts_the_notebook_and_waits_for_it(tmp_path):
    code = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
        "try:\n  print('ready')\n  time.sleep(60)\n"
        "except KeyboardInterrupt: pathlib.Path(sys.argv[1]).write_text('checkpoint')"
    )
    run = follow([sys.executable, "-c", code, str(tmp_path / "state")], tmp_path / "copy")
    while next(run)[1] != "ready":
        pass
    run.close()
    assert (tmp_path / "state").read_text() == "checkpoint"


@pytest.mark.slow
def test_the_script_ends_when_the_session_is_killed(tmp_path):
    code = f"import sys, threading, time; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import run_notebooks; "
    code += "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "threading.Thread(target=run_notebooks.end_with_parent, daemon=True).start(); print('ready', flush=True); "
    code += "time.sleep(60)"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], **pipes)
    assert process.stdout.readline() == b"ready\n"
    process.stdin.close()  # as the kernel does when the process on the other side is gone
    assert process.wait(30) == -signal.SIGINT and b"KeyboardInterrupt" in process.stderr.read()


@pytest.mark.slow
def test_the_notebook_shows_the_results_and_repeats_nothing(run_notebook, called, capsys):
    for done in (False, True):
        names = run_notebook(HOURS_LEFT=0.0)
        printed = capsys.readouterr().out
        assert printed.count("is done already") == 6 * done and "NOT FINISHED" not in printed
        assert "'Mass': 0.5" in printed and "model.zip" in printed
    executions = (names["session"].run_dir / "executions.txt").read_text().split()
    assert executions == list(NOTEBOOKS)
    assert [name for name in called if name[-3:] == ".py"] == ["publish_check.py", "make_report.py"] * 2
    with pytest.raises(AssertionError, match=r"PROFILE = full needs a TPU or a GPU, .*Settings > Accelerator"):
        run_notebook(PROFILE="full")
