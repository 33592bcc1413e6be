"""Exported models: every format gives the golden image's numbers, agrees with Keras, and tells what it is.

`tests/golden` holds a synthetic image and what the network of `seeded_run` says of it, so this also verifies an
installation: `pytest tests/test_export.py`.
"""

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.special import expit, logit
from seeded_run import SIDE, write_seeded_run

from helpers.export import ExportedModel, compare_export, describe_export, export_model, open_export
from helpers.packing import decode_image
from helpers.runtime.settings import ROOT
from helpers.study import PATHOLOGIES, draw_image
from helpers.training import ModelFileError, load_densenet121

GOLDEN = Path(__file__).parent / "golden"
FILES = ["saved_model", "exports/model.onnx", "exports/model.tflite", "exports/model_int8.tflite"]
CLOSE = {"exports/model_int8.tflite": 0.05}  # the other formats compute with floats


@pytest.fixture(scope="module")
def seeded(tmp_path_factory):
    """A run with seeded weights, stored by a network in mixed bfloat16, and all of its exports."""
    folder = write_seeded_run(tmp_path_factory.mktemp("seeded") / "run")
    written = export_model(folder)
    assert written == [folder / name for name in FILES]
    return folder


@pytest.fixture(scope="module")
def images():
    """Twelve synthetic images as the network takes them, float32 (12, 64, 64, 1)."""
    drawn = [draw_image(k, [PATHOLOGIES[k]], size=SIDE)[0] for k in range(12)]
    return np.stack(drawn)[..., None].astype("float32")


@pytest.fixture(scope="module")
def served(seeded):
    """The SavedModel."""
    return ExportedModel(seeded / "saved_model")


@pytest.fixture(scope="module")
def logits(seeded, images):
    """What Keras says of the images."""
    return load_densenet121(seeded).predict(images, verbose=0).astype("float64")


def platt(facts, logits):
    return expit(np.array(facts["calibration_slope"]) * logits + facts["calibration_intercept"])


@pytest.mark.parametrize("name", FILES)
def test_golden_image_gets_its_numbers(seeded, name):
    """The numbers in git, computed once on Linux, in every format: installation, decoding, resizing, network."""
    expected = json.loads((GOLDEN / "expected.json").read_text())
    model, close = open_export(seeded / name), CLOSE.get(name, 1e-4)
    answer = model.ask_file((GOLDEN / "film.png").read_bytes())
    for key in ("probabilities", "raw_probabilities"):
        assert np.allclose(answer[key][0], expected[key], atol=close), key
    if name not in CLOSE:
        assert answer["above_threshold"][0].tolist() == expected["above_threshold"]
    if name == "saved_model":
        assert answer["top5_label"][0].tolist() == expected["top5_label"]
        assert np.allclose(answer["top5_lift"][0], expected["top5_lift"], rtol=1e-3)


@pytest.mark.parametrize("name", FILES)
def test_format_agrees_with_keras(seeded, images, logits, name):
    """Weights kept in mixed bfloat16 come out as Keras has them in float32."""
    expected = platt(describe_export(seeded), logits)
    found = compare_export(
        seeded / name, [images[:8], images[8:]], expected, (GOLDEN / "film.png").read_bytes(), repeats=2
    )
    assert found["films"] == 12 and found["bytes"] > 5e6
    if name in CLOSE:
        assert found["max_difference"] <= CLOSE[name] and found["bytes"] < 9e6
    else:
        assert found["max_difference"] <= 1e-5 and found["same_top5"] == 1 and found["largest_swap"] == 0


@pytest.mark.parametrize("name", FILES[1:3])
def test_images_of_full_size_differ_by_what_the_readme_says(seeded, served, name):
    """ONNX and LiteRT shrink images by matrix products, which round some gray levels to the other side."""
    images = [draw_image(k, [PATHOLOGIES[k]], size=1024)[0] for k in range(4)]
    expected = served.predict([encode(image) for image in images])["probabilities"]
    model = open_export(seeded / name)
    found = np.concatenate([model.ask_file(encode(image))["probabilities"] for image in images])
    assert np.abs(found - expected).max() < 2e-3


def encode(image):
    Image.fromarray(image).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


@pytest.mark.parametrize("name", FILES)
def test_a_difference_is_seen(seeded, images, logits, name):
    """The comparison would notice another calibration, and another order."""
    expected = platt(describe_export(seeded), logits)
    found = compare_export(seeded / name, [images], expected[:, ::-1], (GOLDEN / "film.png").read_bytes(), repeats=1)
    assert found["max_difference"] > 0.1 and found["same_top5"] < 0.5 and found["largest_swap"] > 0.1


@pytest.mark.parametrize("name", FILES)
def test_every_file_tells_what_must_be_known(seeded, name):
    facts, expected = open_export(seeded / name).facts, describe_export(seeded)
    assert facts.keys() == expected.keys() and facts["class_names"] == list(PATHOLOGIES)
    for key, value in expected.items():
        is_numbers = isinstance(value, list) and key != "class_names"
        assert facts[key] == (pytest.approx(value, rel=1e-6) if is_numbers else value), key
    assert "not for clinical use" in facts["notice"] and "synthetic" in facts["notice"]


def test_weights_of_a_jax_run_are_exported_alike(seeded, tmp_path):
    """What Keras saves on JAX, in mixed bfloat16, is read as what it saves on TensorFlow, and that is all of a run."""
    code = "import sys, pathlib; from seeded_run import write_seeded_run; write_seeded_run(pathlib.Path(sys.argv[1]))"
    paths = os.pathsep.join(str(ROOT / name) for name in ("notebooks", "tests"))
    environment = os.environ | {"KERAS_BACKEND": "jax", "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    jax, tensorflow = (load_densenet121(run).get_weights() for run in (tmp_path / "run", seeded))
    assert all(np.array_equal(one, other) for one, other in zip(jax, tensorflow, strict=True))
    facts = [describe_export(run) | {"weights_sha256": ""} for run in (tmp_path / "run", seeded)]
    assert facts[0] == facts[1]


def test_lite_file_is_a_zip_archive_too(seeded):
    with zipfile.ZipFile(seeded / "exports" / "model.tflite") as archive:
        assert archive.read("labels.txt").decode().split() == list(PATHOLOGIES)


def test_served_answer_fits_together(served, images):
    """Ranking, lift and thresholds follow from the probabilities; calibrated and raw thresholds are the same points."""
    facts, answer = served.facts, served.predict_pixels(images)
    probs, rows = answer["probabilities"], np.arange(len(images))[:, None]
    assert np.allclose(probs, platt(facts, logit(answer["raw_probabilities"])), atol=1e-5)
    order = np.argsort(-probs, axis=1, kind="stable")[:, :5]
    assert (answer["top5_label"] == np.array(PATHOLOGIES)[order]).all()
    assert np.allclose(answer["top5_prob"], probs[rows, order])
    assert np.allclose(answer["top5_lift"], (probs / facts["prevalence"])[rows, order], rtol=1e-5)
    assert (answer["above_threshold"] == (probs >= facts["thresholds"])).all()
    assert (answer["above_threshold"] == (answer["raw_probabilities"] >= facts["raw_thresholds"])).all()
    assert answer["above_threshold"].any() and not answer["above_threshold"].all()


def test_maps_average_to_the_logit_and_heatmaps_lack_what_all_images_show(served, seeded, tmp_path):
    image = draw_image(3, ["Mass"], size=SIDE)[0]
    Image.fromarray(image).save(tmp_path / "film.png")
    data = (tmp_path / "film.png").read_bytes()
    answer, raw = served.explain([data]), served.predict([data])["raw_probabilities"][0]
    assert (answer["films"][0, ..., 0] == image).all()
    assert np.allclose(expit(answer["maps"][0].mean(axis=(0, 1))), raw, atol=1e-5)
    reference = np.array(json.loads((seeded / "reference_maps.json").read_text())["maps"])
    assert np.allclose(answer["maps"][0] - reference, answer["heatmaps"][0], atol=1e-5)


def test_image_of_any_kind_is_read_as_for_training(served, tmp_path):
    """PNG of 8 and 16 bits, RGB, RGBA, palette, JPEG, wide and high: each as `decode_image` reads it, in one batch."""
    image = Image.fromarray(draw_image(5, size=200)[0][:, 20:170])
    image.save(tmp_path / "gray.png")
    Image.fromarray(np.asarray(image).astype("uint16") * 257).save(tmp_path / "deep.png")
    image.convert("RGB").save(tmp_path / "rgb.png")
    image.convert("RGBA").save(tmp_path / "rgba.png")
    image.convert("P").save(tmp_path / "palette.png")
    image.rotate(90, expand=True).save(tmp_path / "wide.png")
    image.save(tmp_path / "film.jpg", quality=95)
    files = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    squares = np.stack([decode_image(data, SIDE).numpy() for data in files])
    answer = served.predict(files)["probabilities"]
    assert np.allclose(answer, served.predict_pixels(squares)["probabilities"], atol=1e-6)
    with pytest.raises(ValueError, match="at least one image"):
        served.predict([])


def test_bad_bytes_are_named_and_harm_nothing(served):
    good = (GOLDEN / "film.png").read_bytes()
    before = served.predict([good])["probabilities"]
    for signature in (served.predict, served.explain):
        with pytest.raises(ValueError, match=r"image_bytes, item 1, 3 \(from 0\): no complete PNG or JPEG"):
            signature([good, b"no image", good, good[: len(good) // 2]])
    assert (served.predict([good])["probabilities"] == before).all()


def test_export_again_keeps_the_old_files_until_the_new_are_whole(seeded, tmp_path):
    """A failing export says why and leaves the SavedModel that is there."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("run.json", "thresholds.json"):
        (folder / name).write_bytes((seeded / name).read_bytes())
    (folder / "saved_model").mkdir()
    (folder / "saved_model" / "saved_model.pb").write_bytes(b"the old one")
    with pytest.raises(RuntimeError, match=r"could not be exported:[\s\S]*model.weights.h5 is missing"):
        export_model(folder, ["saved_model"])
    assert (folder / "saved_model" / "saved_model.pb").read_bytes() == b"the old one"


def test_export_says_what_is_missing_or_does_not_fit(seeded, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"unknown formats.*tensorrt"):
        export_model(seeded, ["tensorrt"])
    (tmp_path / "run.json").write_bytes((seeded / "run.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"thresholds.json is missing\. Run 03_evaluate"):
        export_model(tmp_path)
    chosen = json.loads((seeded / "thresholds.json").read_text()) | {"weights_sha256": "6" * 64}
    (tmp_path / "thresholds.json").write_text(json.dumps(chosen))
    with pytest.raises(ValueError, match=r"thresholds.json was made from other weights .* Run 03_evaluate"):
        describe_export(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install tf2onnx"):
        export_model(seeded, ["onnx"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -1, 256])
def test_pixels_that_are_no_gray_levels_are_refused(served, images, value):
    spoiled = images.copy()
    spoiled[3, 5, 7] = value
    with pytest.raises(ValueError, match=r"^pixels: expected numbers from 0 to 255"):
        served.predict_pixels(spoiled)


def test_a_image_is_not_taken_for_a_list_of_images(served):
    for images in (b"one image", ["film.png"]):
        with pytest.raises(TypeError, match="expected a list of bytes"):
            served.predict(images)


def test_lite_file_with_a_bomb_at_its_end_is_refused(seeded, tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes((seeded / "exports" / "model_int8.tflite").read_bytes())
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("more.json", bytes(2**24))
    with pytest.raises(ModelFileError, match="archive at its end unpacks to"):
        open_export(path)
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(100):
            archive.writestr(f"empty{number}", b"")
    with pytest.raises(ModelFileError, match="directory of the archive at its end has more than"):
        open_export(path)


def test_exported_model_wants_its_signatures(tmp_path):
    import tensorflow as tf

    module = tf.Module()
    module.one = tf.function(lambda x: {"y": x + 1}, input_signature=[tf.TensorSpec([], tf.float32)])
    tf.saved_model.save(module, str(tmp_path / "other"), signatures={"serving_default": module.one})
    with pytest.raises(ValueError, match="has no signatures explain, metadata, pixels"):
        ExportedModel(tmp_path / "other")
