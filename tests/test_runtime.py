"""Settings, paths and records that all notebooks share."""

import json
import re
import shutil
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


def test_a_tpu_that_tensorflow_cannot_use_gives_a_warning_and_the_default(monkeypatch):
    """As on a machine with a chip and the CPU build of TensorFlow: only the device file is pretended."""
    import tensorflow as tf

    from helpers import runtime

    monkeypatch.setattr(runtime.glob, "glob", lambda pattern: ["/dev/vfio/0"])
    with pytest.warns(UserWarning, match="There is a TPU, but TensorFlow .* cannot use it"):
        assert make_strategy() is tf.distribute.get_strategy()


def test_fetch_cell_clones_the_repository_where_a_notebook_comes_alone(tmp_path):
    """The cell as it stands in the notebooks, with a local clone URL, in an empty folder."""
    notebook = json.loads((ROOT / "notebooks" / "01_prepare_data.ipynb").read_text())
    cell = next("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code")
    source = tmp_path / "source" / "chest"
    subprocess.run(["git", "init", "-q", source], check=True)
    for name in ("requirements.txt", "notebooks/helpers"):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, target)
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "-C", source, "add", "."], check=True)
    subprocess.run(["git", "-C", source, *identity, "commit", "-qm", "all"], check=True)
    code = re.sub(r'REPOSITORY = ".*"', f'REPOSITORY = "{source}"', cell) + "\nprint(os.getcwd(), sys.path[0])"
    empty = tmp_path / "empty"
    empty.mkdir()
    for _ in range(2):  # the second time the clone is there
        answer = subprocess.run([sys.executable, "-c", code], cwd=empty, capture_output=True, text=True)
        assert answer.stdout.split() == [str(empty / "chest" / "notebooks")] * 2, answer.stderr


def test_fetch_cell_without_an_address_says_what_to_set(tmp_path):
    notebook = json.loads((ROOT / "notebooks" / "01_prepare_data.ipynb").read_text())
    cell = next("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code")
    code = re.sub(r'REPOSITORY = ".*"', 'REPOSITORY = "https://github.com/OWNER/REPOSITORY"', cell)
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode != 0 and "Set REPOSITORY" in answer.stderr


def test_a_new_address_reaches_notebooks_badges_and_citation(tmp_path):
    for name in ("CITATION.cff", "README.md", "notebooks", "scripts"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    stamp = [sys.executable, str(tmp_path / "scripts" / "stamp_notebooks.py")]
    subprocess.run([*stamp, "--address", "https://github.com/jane/cxr/"], check=True)
    old = re.search(r"^repository-code: https://github.com/(\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[
        1
    ]
    for path in [tmp_path / "CITATION.cff", tmp_path / "README.md", *(tmp_path / "notebooks").glob("*.ipynb")]:
        assert "jane/cxr" in path.read_text() and old not in path.read_text(), path
    assert subprocess.run([*stamp, "--check"]).returncode == 0
    assert subprocess.run([*stamp, "--address", "cxr"], capture_output=True).returncode != 0
