"""Settings that several notebooks share are given once: recorded in the run, found by the others, in any session."""

import json
import os
import sys

import pytest

from helpers.runtime import recall_shared, record_shared, share_settings
from helpers.runtime.settings import ROOT
from helpers.runtime.shared import hours_left

sys.path.insert(0, str(ROOT / "scripts"))
import run_notebooks

OTHER = {"DATA_DIR": "data/nih", "PROFILE": "full", "SPLIT": "random_patients", "UNCERTAIN": "zeros"}


def make_run(folder, age=0, **settings):
    """Records a run as notebook 1 does, some seconds ago."""
    record_shared(share_settings({"RUN_DIR": str(folder)} | OTHER | settings)[0])
    os.utime(folder / "settings.json", times=(1e9 - age,) * 2)
    return folder


def test_a_notebook_opened_alone_takes_the_run_that_was_worked_on_last(tmp_path):
    make_run(tmp_path / "old", age=100)
    new = make_run(tmp_path / "new", PACKED_DIR=str(tmp_path))
    settings, taken = share_settings({"RUN_DIR": "", "SEED": 3, "x": 1}, [tmp_path, tmp_path / "missing"])
    assert settings == {
        **OTHER,
        **{"RUN_DIR": str(new), "PACKED_DIR": str(tmp_path), "SEED": 3},
        **{"CHECKPOINT_DIR": "", "REPLICAS": 0, "VERBOSE": 1},
    }
    assert taken == (
        f"Run {new}, the last of 2 found; DATA_DIR, PACKED_DIR, PROFILE, SPLIT, UNCERTAIN as in its settings.json: "
        "DATA_DIR data/nih, PROFILE full, SPLIT random_patients."
    )


def test_an_interrupted_copy_is_no_run(tmp_path):
    run = make_run(tmp_path / "run", age=100)
    make_run(tmp_path / "part-run")
    assert share_settings({"RUN_DIR": ""}, [tmp_path])[0]["RUN_DIR"] == str(run)


def test_what_is_given_counts_and_other_packed_images_are_not_recalled(tmp_path):
    run = make_run(tmp_path / "run", PACKED_DIR=str(tmp_path))
    settings, _ = share_settings({"RUN_DIR": str(run), "PROFILE": "quick", "SPLIT": ""})
    assert (settings["PROFILE"], settings["SPLIT"], settings["PACKED_DIR"]) == ("quick", "random_patients", "")
    with pytest.raises(ValueError, match=r"SPLIT is 'random'; expected one of official"):
        share_settings({"RUN_DIR": str(run), "SPLIT": "random"})


def test_packed_images_that_are_gone_are_searched_anew(tmp_path):
    run = make_run(tmp_path / "run", PACKED_DIR=str(tmp_path / "gone"))
    assert "PACKED_DIR" not in recall_shared(run, {})[0]


def test_a_run_of_an_older_version_has_them_in_its_record(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"settings": OTHER | {"EPOCHS": 3, "PACKED_DIR": ""}}))
    settings, taken = share_settings({"RUN_DIR": ""}, [tmp_path])
    assert {name: settings[name] for name in OTHER} == OTHER and "EPOCHS" not in settings and "run.json" in taken


def test_without_any_run_there_are_the_defaults(tmp_path):
    settings, taken = share_settings({"RUN_DIR": ""}, [tmp_path], tmp_path / "nothing attached")
    assert settings["RUN_DIR"] == "models/densenet121" and settings["DATA_DIR"] == "data/phantom"
    assert taken.startswith("Run models/densenet121: DATA_DIR data/phantom")


def test_the_output_of_an_earlier_session_is_copied_to_where_it_can_be_written(tmp_path):
    attached = tmp_path / "input" / "my-notebook" / "clone" / "models" / "nih"
    make_run(attached)
    (attached / "state").mkdir()
    (attached / "state" / "state.bin").write_bytes(b"weights")
    other = tmp_path / "input" / "other"
    other.mkdir()
    (other / "settings.json").write_text("[]")
    for path in (attached / "state" / "state.bin", attached / "state", attached):
        path.chmod(0o555)
    settings, _ = share_settings({"RUN_DIR": ""}, [tmp_path / "models"], tmp_path / "input")
    for path in (attached, attached / "state"):
        path.chmod(0o755)
    assert settings["RUN_DIR"] == str(tmp_path / "models" / "nih") and settings["PROFILE"] == "full"
    copy = tmp_path / "models" / "nih" / "state"
    assert (copy / "state.bin").read_bytes() == b"weights"
    assert all(path.stat().st_mode & 0o200 for path in (copy.parent, copy, copy / "state.bin"))


def test_a_run_on_a_mounted_drive_has_its_checkpoints_on_the_machine_first():
    run_dir = "/content/drive/MyDrive/chest-xray/a"
    assert share_settings({"RUN_DIR": run_dir})[0]["CHECKPOINT_DIR"] == "/content/checkpoints"
    assert share_settings({"RUN_DIR": run_dir, "CHECKPOINT_DIR": "/x"})[0]["CHECKPOINT_DIR"] == "/x"


def test_a_command_given_with_the_folder_alone_takes_what_was_given_before(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "run")

    def read(*words):
        monkeypatch.setattr(sys, "argv", ["run_notebooks.py", *words])
        return run_notebooks.read_settings(run_notebooks.parse_arguments(), str(run))

    assert {name: read()[name] for name in OTHER} == OTHER
    assert (
        f"DATA_DIR=data/nih, PROFILE=full, SPLIT=random_patients, UNCERTAIN=zeros, as in {run}"
        in capsys.readouterr().out
    )
    settings = read("--data-dir", "data/x", "--set", "SPLIT=official", "PACKED_DIR=p")
    assert [settings[name] for name in ("DATA_DIR", "PROFILE", "SPLIT")] == ["data/x", "full", "official"]


def test_a_kaggle_session_limits_training_by_itself(monkeypatch):
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    assert hours_left() == 0
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert 0.1 <= hours_left() < 8.5
