"""Settings, paths and files that all notebooks share."""

import ast
import json
import re
import sys

import pytest

from helpers.packing import resolve_paths
from helpers.runtime import MACHINE, SHARED, check_setting, check_settings, resolve_path, write_json
from helpers.runtime.settings import ROOT, SETTINGS

sys.path.insert(0, str(ROOT / "scripts"))
import run_notebooks

LINE = re.compile(r"([A-Z_]+) = (.*?)  # (?:@param (\[.*?\]))?")


def list_parameters():
    """Yields notebook, name, value and choices of the form of every setting in the cells tagged `parameters`."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for line in next(cell["source"] for cell in cells if "parameters" in cell["metadata"].get("tags", [])):
            name, value, choices = LINE.match(line).groups()
            yield path.stem, name, ast.literal_eval(value), ast.literal_eval(choices or "None")


def list_values(value):
    return [item for one in value.values() for item in list_values(one)] if isinstance(value, dict) else [value]


def test_every_setting_of_a_notebook_is_in_the_table_with_its_type_and_choices():
    seen = {"RUNTIME", *SHARED, *MACHINE}
    for notebook, name, default, choices in list_parameters():
        kind, allowed = SETTINGS[name]
        seen.add(name)
        for value in list_values(default) if (name, default) != ("RUN_DIR", "") else ():  # `share_settings` finds one
            checked = check_setting(name, value)
            assert checked == value or isinstance(kind, list), f"{notebook}: {name}"
            assert isinstance(value, bool) == (kind is bool) and isinstance(value, float) == (kind is float), name
        if choices:
            assert choices == list(allowed), f"{notebook}: {name}"
    assert seen == SETTINGS.keys()


def test_choices_are_those_of_the_modules_that_take_them():
    from helpers.export.formats import FORMATS
    from helpers.packing.records import ENCODINGS
    from helpers.runtime.accelerator import BACKENDS
    from helpers.study.splits import SPLITS
    from helpers.training.backbones import BACKBONES

    assert SETTINGS["BACKBONE"][1] == tuple(BACKBONES) and SETTINGS["SPLIT"][1] == SPLITS
    assert SETTINGS["RUNTIME"][1] == ("auto", *BACKENDS) and SETTINGS["FORMATS"][1] == tuple(FORMATS)
    assert set(SETTINGS["RECORDS"][1]) == set(ENCODINGS)


def test_notebooks_check_their_settings_before_anything_else():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        number = next(n for n, cell in enumerate(cells) if "parameters" in cell["metadata"].get("tags", []))
        lines = cells[number + 1]["source"][:2]
        first = lines[lines[0] == "settings, taken = share_settings(globals())\n"]
        assert re.match(r"globals\(\)\.update\((settings|(settings := )?check_settings\(globals\(\)\))\)\n", first)


@pytest.mark.parametrize(
    ("name", "given", "meant"),
    [
        *(("START_OVER", word, False) for word in (False, 0, "false", "False", " no ", "off", "0")),
        *(("HORIZONTAL_FLIP", word, True) for word in (True, 1, "true", "YES", "on", "1")),
        *(("RESAMPLES", text, 200) for text in (200, 200.0, "200", "2e2", "200.0", "2_00")),
        *(("LEARNING_RATE", text, 0.001) for text in (0.001, "0.001", "1e-3", ".001")),
        *(("WEIGHT_DECAY", zero, 0.0) for zero in (0, "0", "0.0")),
        *(("BLOCKS", text, [1, 2]) for text in ([1, 2], (1, 2.0), "1,2", "1, 2", ["1", "2"])),
        *(("FORMATS", text, ["onnx", "litert"]) for text in ("onnx litert", "onnx,litert", ["onnx", "litert"])),
        *(("MODELS", text, ["a b", "c"]) for text in ("a b,c", " a b , c,", ["a b", "c"])),
        *(("MODELS", nothing, []) for nothing in ("", None, [])),
        ("MODELS", ["lr=1,2"], ["lr=1,2"]),
        *(("PACKED_DIR", nothing, "") for nothing in ("", None)),
        ("DATA_DIR", ROOT, str(ROOT)),
        ("ARCHIVES", 3, "3"),
    ],
)
def test_settings_are_converted_to_what_is_meant(name, given, meant):
    checked = check_setting(name, given)
    assert checked == meant and type(checked) is type(meant)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        *(("START_OVER", wrong, "True or False") for wrong in ("", "flase", 2, None, [], "None")),
        *(("EPOCHS", wrong, "a whole number in [1, inf)") for wrong in (0, 2.5, "2,5", "two", True, None, [3], "inf")),
        *(("LEARNING_RATE", wrong, "a number with a decimal point in (0, inf)") for wrong in ("0,001", 0, "nan", -1)),
        ("SEED", -1, "a whole number in [0, 2147483647]"),
        ("LEVEL", "95%", "a number with a decimal point in (0, 1)"),
        ("PROFILE", "Full", "one of quick, full, best"),
        ("CHESTMNIST_SIDE", "28", "one of 64, 128, 224"),
        ("FORMATS", "saved_model onxx", "one of saved_model, onnx, litert, or several with commas"),
        ("BLOCKS", 4, "a whole number in [1, inf), or several with commas"),
        *(("RUN_DIR", wrong, "a path") for wrong in ("", " ", None, True)),
        ("PACKED_DIR", False, "text"),
    ],
)
def test_other_values_are_refused_with_what_is_expected(name, given, expected):
    with pytest.raises(ValueError, match=re.escape(f"{name} is {given!r}; expected {expected}.")):
        check_setting(name, given)


def test_settings_take_the_value_of_profile_and_recipe():
    settings = {
        "SIDE": {"quick": "72", "full": 256},
        "EPOCHS": {"ours": {"quick": 12, "full": 15}, "original": 100},
        "PROFILE": "quick",
        "RECIPE": "ours",
        "OTHER": {"quick": 1},
    }
    chosen = {"PROFILE": "quick", "RECIPE": "ours", "SIDE": 72, "EPOCHS": 12}
    assert check_settings(settings) == chosen
    assert check_settings(settings | {"PROFILE": "full", "RECIPE": "original"})["EPOCHS"] == 100
    with pytest.raises(ValueError, match=r"SIDE has values for \['quick', 'full'\], but chosen are \['best'\]"):
        check_settings({"SIDE": {"quick": 72, "full": 256}, "PROFILE": "best"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "START_OVER=flase"], "START_OVER is 'flase'; expected True or False."),
        (["--set", "LEARNING_RATE=0,001"], "LEARNING_RATE is '0,001'; expected a number with a decimal point"),
        (["--set", "EPOCH=3"], "but EPOCH is no setting of the notebooks. Did you mean EPOCHS?"),
        (["--set", "SEED"], "SEED: expected NAME=VALUE, without spaces around the ="),
        (
            ["--set", "PROFILE=full"],
            "PROFILE=full: expected not in SET, but as `make run PROFILE=full`, or by --profile.",
        ),
        (["--profile", "fast"], "PROFILE is 'fast'; expected one of quick, full, best."),
    ],
)
def test_the_script_refuses_a_wrong_setting_before_anything_runs(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_notebooks.py", "--run-dir", str(tmp_path / "run"), *arguments])
    monkeypatch.setenv("TQDM_MININTERVAL", "1")
    monkeypatch.setattr(run_notebooks, "execute_into", lambda *_: pytest.fail("a notebook was started"))
    with pytest.raises(SystemExit, match=re.escape(message)):
        run_notebooks.main()
    assert not (tmp_path / "run").exists()


def test_the_script_gives_notebooks_what_is_meant(tmp_path, monkeypatch):
    texts = [
        "HORIZONTAL_FLIP=false",
        "EPOCHS=2.0",
        "BLOCKS=[1,1,1,1]",
        "MODELS=['a','b']",
        "ARCHIVES=1,2",
        "PACKED_DIR=None",
    ]
    monkeypatch.setattr(sys, "argv", ["run_notebooks.py", "--set", *texts])
    settings = run_notebooks.read_settings(run_notebooks.parse_arguments(), str(tmp_path))
    assert settings == {
        **{"RUN_DIR": str(tmp_path), "SPLIT": "official", "UNCERTAIN": "ignore"},
        **{
            "PROFILE": "quick",
            "DATA_DIR": "data/phantom",
            "HORIZONTAL_FLIP": False,
            "EPOCHS": 2,
            "BLOCKS": [1, 1, 1, 1],
        },
        **{"MODELS": ["a", "b"], "ARCHIVES": "1,2", "PACKED_DIR": "", "VERBOSE": 2},
    }
    monkeypatch.setenv("RUNTIME", "tpu")
    with pytest.raises(SystemExit, match="RUNTIME is 'tpu'; expected one of auto, tf-tpu, jax, gpu, cpu"):
        run_notebooks.read_settings(run_notebooks.parse_arguments(), str(tmp_path))


def test_relative_paths_start_at_the_root_and_absolute_ones_stay(tmp_path):
    paths = resolve_paths("data/phantom", tmp_path / "run", "", "official", "quick")
    assert paths.study == ROOT / "data" / "phantom"
    assert paths.packed == ROOT / "data" / "packed" / "phantom-official-quick"
    assert paths.run == tmp_path / "run" and paths.run.is_dir()
    assert resolve_paths(tmp_path, tmp_path, tmp_path / "p", "official", "quick").packed == tmp_path / "p"
    (tmp_path / "0123abc").write_bytes(b"")
    (tmp_path / "model.keras").symlink_to(tmp_path / "0123abc")  # as in a Hugging Face cache
    assert resolve_path(tmp_path / "run" / ".." / "model.keras") == tmp_path / "model.keras"


def test_an_interrupted_write_leaves_the_old_json(tmp_path):
    write_json(tmp_path / "a.json", {"good": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"bad": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"good": 1}
