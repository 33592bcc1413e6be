"""Settings, paths and records that all notebooks share."""

import json
import subprocess
import sys

import numpy as np
import pytest

from helpers import choose_settings, describe_runtime, make_strategy, prepare_runtime, resolve_paths, write_json
from helpers.runtime import ROOT


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


def test_nothing_is_installed_where_all_is_there():
    assert prepare_runtime() == []


def test_another_backend_than_the_imported_one_is_refused(monkeypatch):
    import keras

    other = "jax" if keras.backend.backend() != "jax" else "torch"
    monkeypatch.setenv("KERAS_BACKEND", other)
    with pytest.raises(RuntimeError, match=f"another backend than {other}.*Restart"):
        prepare_runtime()


def test_importing_the_helpers_imports_neither_keras_nor_tensorflow():
    code = (
        "import sys; import helpers; from helpers import PATHOLOGIES, roc_auc, choose_settings; "
        "print(sorted({'keras', 'tensorflow'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "notebooks", capture_output=True, text=True)
    assert answer.stdout.strip() == "[]", answer.stderr


def test_every_public_name_exists():
    import helpers

    for name in helpers.__all__:
        assert getattr(helpers, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = helpers.no_such_name


def test_runtime_report_names_what_a_reader_needs():
    report = describe_runtime()
    assert {"python", "tensorflow", "keras", "backend", "devices", "processor", "commit"} <= set(report)
    assert json.loads(json.dumps(report)) == report and report["devices"]


def test_default_strategy_computes():
    with make_strategy().scope():
        import keras

        layer = keras.layers.Dense(2)
        assert np.asarray(layer(np.ones((1, 3), "float32"))).shape == (1, 2)
