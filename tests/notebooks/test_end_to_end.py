"""All formats, on tiny images with bad ones among them: notebooks 2, 3 and 5 as `make run` executes them, and 1.

The network has one layer in each dense block: all kinds of layers, an eighth of the time. `make run` has all of them.
"""

import io
import json
import shutil
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pandas as pd
import papermill
import pytest
import tensorflow as tf
from chain import DENSENET, call_script, check_artifacts, name_folders, read_counts, run_chain
from PIL import Image
from scipy.special import logit

from helpers.runtime.settings import ROOT
from helpers.study import PATHOLOGIES, list_images, write_synthetic_study

sys.path.insert(0, str(ROOT / "scripts"))
import run_notebooks

pytestmark = pytest.mark.slow
PREPARE, TRAIN_AND_AFTER = DENSENET[:1], [*DENSENET[1:3], DENSENET[4]]  # the last two each in a process of its own


def spoil(path, how):
    """Puts in the place of an image what downloads leave behind."""
    if how == "html":
        path.write_bytes(b"<!DOCTYPE html><html>404</html>")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:500])
    elif how == "bomb":  # a PNG whose header declares 20,000 x 20,000 pixels
        head = bytearray(path.read_bytes())
        head[16:24] = (20_000).to_bytes(4) * 2
        head[29:33] = zlib.crc32(head[12:29]).to_bytes(4)
        path.write_bytes(head)
    else:
        path.unlink()


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A run on a study of 120 images with a bad one at every tenth place, and a split by image.

    All but the packing is done from a copy of the packed study alone, to which nothing may be written. Gives `run`, the
    settings, the `images` as they were (name -> bytes), and whether the packed files were `untouched`.
    """
    folder = tmp_path_factory.mktemp("full")
    study, packed, moved = folder / "a study", folder / "packed", folder / "attached" / "packed"
    write_synthetic_study(study, n_images=120, size=48, seed=3, n_workers=1)
    for number, path in enumerate(sorted((study / "images").iterdir())[::10]):
        spoil(path, ("html", "truncated", "bomb", "missing")[number % 4])
    settings = {"SPLIT": "leaky_images", "FORMATS": "saved_model onnx litert", "LEAKAGE_DEMO": True}
    run_chain(PREPARE, name_folders(study, folder / "run", packed) | settings)
    images = {name: path.read_bytes() for name, path in list_images(study).items()}
    shutil.copytree(packed, moved)
    shutil.rmtree(study)
    shutil.rmtree(packed)
    for path in [*moved.rglob("*"), moved]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in [moved, *moved.rglob("*")]}
    settings |= name_folders(study, folder / "run", moved)
    done = call_script(TRAIN_AND_AFTER, settings)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    untouched = {path: path.stat().st_mtime_ns for path in [moved, *moved.rglob("*")]} == before
    for path in before:
        path.chmod(0o755)
    return SimpleNamespace(
        run=folder / "run", settings=settings, images=images, untouched=untouched, printed=done.stdout
    )


def test_a_run_leaves_every_artifact_and_goes_on_past_bad_images(chain):
    check_artifacts(chain.run, is_leaky=True)
    assert (chain.run / "figures" / "03_leakage.png").is_file() and (chain.run / "figures" / "03_leakage.csv").is_file()
    assert sorted(path.stem for path in (chain.run / "executed").glob("*.ipynb")) == TRAIN_AND_AFTER
    record = json.loads((chain.run / "run.json").read_text())
    assert record["study"] == "a study" and record["synthetic"]
    assert read_counts(chain.run) == (117, 3, 9)
    assert chain.untouched, "something was written to the packed study"
    assert all(name in chain.printed for name in PATHOLOGIES) and f"figures    {chain.run}" in chain.printed


def test_every_format_agrees_with_keras(chain):
    parity = json.loads((chain.run / "exports" / "parity.json").read_text())
    assert list(parity) == ["saved_model", "model.onnx", "model.tflite", "model_int8.tflite"]
    assert all((chain.run / "exports" / name).is_file() for name in list(parity)[1:])
    n_test = pd.read_csv(chain.run / "predictions.csv")["split"].eq("test").sum()
    assert all(row["images"] == n_test for row in parity.values())


def test_a_split_by_image_is_said_to_leak(chain):
    card = (chain.run / "model_card.md").read_text()
    assert "validation with test: 0" not in card and "scores are flattered" in card


def test_saved_model_reads_any_image(chain):
    """Bytes in, the probabilities of predictions.csv out. Notebook 5 asks it by a program that has TensorFlow alone."""
    predictions = pd.read_csv(chain.run / "predictions.csv").set_index("image")
    name = predictions.index[0]
    image, files = Image.open(io.BytesIO(chain.images[name])), [io.BytesIO(), io.BytesIO()]
    image.convert("RGBA").resize((500, 400)).save(files[0], "PNG")
    image.convert("RGB").save(files[1], "JPEG")
    serve = tf.saved_model.load(str(chain.run / "saved_model")).signatures["serving_default"]
    answer = serve(image_bytes=tf.constant([chain.images[name], *(file.getvalue() for file in files)]))
    answer = {key: value.numpy() for key, value in answer.items()}
    probs = answer["probabilities"]
    assert probs.shape == (3, 14) and ((probs > 0) & (probs < 1)).all()
    expected = predictions.loc[name, [f"prob_{p}" for p in PATHOLOGIES]].to_numpy(float)
    assert np.allclose(answer["raw_probabilities"][0], expected, rtol=0, atol=1e-4)  # as TOLERANCE in chain.py
    points = json.loads((chain.run / "thresholds.json").read_text())["pathologies"]
    positives = predictions[predictions["split"].eq("val")].filter(like="label_").sum()
    assert [point["n_pos_val"] for point in points.values()] == [positives[f"label_{name}"] for name in points]
    assert all(point["few_positives"] == (point["n_pos_val"] < 20) for point in points.values())
    facts = {
        key: value.numpy()
        for key, value in tf.saved_model.load(str(chain.run / "saved_model")).signatures["metadata"]().items()
    }
    assert facts["validation_positives"].tolist() == [points[name]["n_pos_val"] for name in PATHOLOGIES]
    platt = [points[name]["calibration"] for name in PATHOLOGIES]
    slope, intercept = (np.array([point[key] for point in platt]) for key in ("slope", "intercept"))
    assert np.allclose(logit(probs[0]), slope * logit(expected) + intercept, atol=1e-2)
    order = np.argsort(-probs[0], kind="stable")[:5]
    assert [label.decode() for label in answer["top5_label"][0]] == [PATHOLOGIES[i] for i in order]
    assert np.allclose(answer["top5_prob"][0], probs[0][order])


def test_a_notebook_that_is_killed_is_left_as_running_until_the_next_attempt(tmp_path, monkeypatch):
    name = DENSENET[0]

    def execute(source, target, *_, **__):
        (tmp_path / f"{name}.running.ipynb").write_text("half")
        assert target == str(tmp_path / f"{name}.running.ipynb") and not list(tmp_path.glob("*.failed.*"))
        if error := errors.pop(0):
            raise error

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    failure = papermill.PapermillExecutionError(0, 3, "x", "ValueError", "no", [])
    errors = [failure, KeyboardInterrupt(), None]
    assert run_notebooks.execute(name, tmp_path, {}) == f"{name} failed in cell 3: ValueError: no"
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.failed.ipynb", f"{name}.failed.log"}
    with pytest.raises(KeyboardInterrupt):
        run_notebooks.execute(name, tmp_path, {})
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.running.ipynb", f"{name}.running.log"}
    assert run_notebooks.execute(name, tmp_path, {}) is None
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.ipynb", f"{name}.log"}


def test_hosts_that_each_pack_a_part_do_not_share_a_copy():
    assert run_notebooks.name_copy(DENSENET[0], {"PART": "2/8"}) == "01_prepare_data.part-2-of-8"
    assert run_notebooks.name_copy(DENSENET[1], {"PART": "2/8"}) == DENSENET[1]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("EPOCH=3", "NAME=VALUE"),
        ("EPOCHS", "NAME=VALUE"),
        ("RUN_DIR=elsewhere", "not in SET, but as `make run RUN_DIR="),
    ],
)
def test_unknown_settings_are_refused_before_anything_runs(tmp_path, monkeypatch, setting, expected):
    monkeypatch.setattr(sys, "argv", ["run_notebooks.py", "--run-dir", str(tmp_path / "run"), "--set", setting])
    monkeypatch.setenv("TQDM_MININTERVAL", "1")
    with pytest.raises(SystemExit, match=f"{setting}: expected {expected}"):
        run_notebooks.main()
    assert not (tmp_path / "run").exists()
