"""Settings, paths and files that all notebooks share."""

import json

import pytest

from helpers.packing import resolve_paths
from helpers.runtime import choose_settings, write_json
from helpers.runtime.settings import ROOT


def test_settings_take_the_value_of_profile_and_recipe():
    settings = {
        "SIDE": {"quick": 72, "full": 256},
        "EPOCHS": {"ours": {"quick": 12, "full": 15}, "original": 100},
        "SEED": 0,
        "lower": {"quick": 1},
    }
    assert choose_settings(settings, "quick", "ours") == {"SIDE": 72, "EPOCHS": 12}
    assert choose_settings(settings, "full", "original") == {"SIDE": 256, "EPOCHS": 100}


def test_unknown_profile_is_refused_with_the_setting():
    with pytest.raises(ValueError, match=r"SIDE has values for \['quick', 'full'\].*'fast'"):
        choose_settings({"SIDE": {"quick": 72, "full": 256}}, "fast")


def test_relative_paths_start_at_the_root_and_absolute_ones_stay(tmp_path):
    paths = resolve_paths("data/phantom", tmp_path / "run", "", "official", "quick")
    assert paths.study == ROOT / "data" / "phantom"
    assert paths.packed == ROOT / "data" / "packed" / "phantom-official-quick"
    assert paths.run == tmp_path / "run" and paths.run.is_dir()
    assert resolve_paths(tmp_path, tmp_path, tmp_path / "p", "official", "quick").packed == tmp_path / "p"


def test_an_interrupted_write_leaves_the_old_json(tmp_path):
    write_json(tmp_path / "a.json", {"good": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"bad": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"good": 1}
