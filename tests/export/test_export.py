"""Exported models: the golden image gets its numbers, every format agrees with Keras and describes itself.

`golden` holds a synthetic image and the answer of DenseNet-121 with the weights of `seeded_run`, so this also checks an
installation: `pytest tests/export/test_export.py`.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from made_images import encode
from PIL import Image
from scipy.special import expit, logit
from seeded_run import SIDE, write_seeded_run

from helpers.export import ExportedModel, compare_export, export_model, formats, open_export
from helpers.export.formats import describe_export, write_formats
from helpers.packing import decode_image
from helpers.pipeline import scale_images
from helpers.runtime.settings import ROOT
from helpers.study import PATHOLOGIES, draw_image
from helpers.training import load_classifier
from helpers.training.model_files import ModelFileError

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "golden"
IMAGE = (GOLDEN / "image.png").read_bytes()
FILES = ["saved_model", "exports/model.onnx", "exports/model.tflite", "exports/model_int8.tflite"]


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A copy of the small run with the other formats."""
    folder = shutil.copytree(tiny_run, tmp_path_factory.mktemp("runs") / "run")
    write_formats(folder, ["onnx", "litert"])
    return folder


@pytest.fixture(scope="module")
def images():
    """Twelve synthetic images as the network takes them, float32 (12, 64, 64, 1)."""
    drawn = [draw_image(k, [PATHOLOGIES[k]], size=SIDE)[0] for k in range(12)]
    return np.stack(drawn)[..., None].astype("float32")


@pytest.fixture(scope="module")
def expected(tiny_run, images):
    """Keras's calibrated probabilities of the images."""
    return platt(describe_export(tiny_run), load_classifier(tiny_run).predict(images, verbose=0).astype("float64"))


def platt(facts, logits):
    return expit(np.array(facts["calibration_slope"]) * logits + facts["calibration_intercept"])


def test_densenet121_gives_the_golden_image_its_numbers(tmp_path):
    """The numbers in git, computed once on Linux: decoding, resizing, network, calibration."""
    folder = write_seeded_run(tmp_path / "run")
    signatures = formats._build_signatures(folder, describe_export(folder))[1]
    answer = {name: value.numpy() for name, value in signatures["serving_default"](tf.constant([IMAGE])).items()}
    expected = json.loads((GOLDEN / "expected.json").read_text())
    for key in ("probabilities", "raw_probabilities"):
        assert np.allclose(answer[key][0], expected[key], atol=1e-4), key
    assert answer["above_threshold"][0].tolist() == expected["above_threshold"]
    assert answer["top5_label"][0].astype(str).tolist() == expected["top5_label"]
    assert np.allclose(answer["top5_lift"][0], expected["top5_lift"], rtol=1e-3)


def test_an_installation_is_checked_by_the_golden_files_of_a_run(tiny_run, tiny_model):
    expected = json.loads((tiny_run / "exports" / "golden.json").read_text())
    answer = tiny_model.predict([(tiny_run / "exports" / "golden.png").read_bytes()])
    for name, values in answer.items():
        assert expected[name] == (
            pytest.approx(values[0], abs=1e-6) if values.dtype == "float32" else values[0].tolist()
        )


@pytest.mark.parametrize("name", FILES)
def test_format_agrees_with_keras_and_describes_itself(run, images, expected, tiny_model, name):
    """Weights kept in mixed bfloat16 come out as Keras has them in float32."""
    is_exact = "int8" not in name  # the other formats compute with floats
    found = compare_export(run / name, [images[:8], images[8:]], expected, IMAGE, repeats=2)
    assert found["images"] == 12 and found["bytes"] > 1e5
    assert found["max_difference"] <= (1e-5 if is_exact else 0.05)
    if is_exact:
        assert found["same_top5"] == 1 and found["largest_swap"] == 0
    other = compare_export(run / name, [images], expected[:, ::-1], IMAGE, repeats=1)
    assert other["max_difference"] > 0.1 and other["same_top5"] < 0.5 and other["largest_swap"] > 0.1

    model = open_export(run / name)
    answer, served = model.predict_file(IMAGE), tiny_model.predict([IMAGE])
    assert np.allclose(answer["raw_probabilities"], served["raw_probabilities"], atol=1e-4 if is_exact else 0.05)
    if is_exact:
        assert (answer["above_threshold"] == served["above_threshold"]).all()
        # ONNX and LiteRT shrink images by matrix products, which round some gray levels to the other side.
        large = [encode(draw_image(k, [PATHOLOGIES[k]], size=1024)[0]) for k in range(2)]
        probs = np.concatenate([model.predict_file(data)["probabilities"] for data in large])
        assert np.abs(probs - tiny_model.predict(large)["probabilities"]).max() < 2e-3

    facts = describe_export(run)
    assert model.facts.keys() == facts.keys() and model.facts["class_names"] == list(PATHOLOGIES)
    for key, value in facts.items():
        is_numbers = isinstance(value, list) and key != "class_names"
        assert model.facts[key] == (pytest.approx(value, rel=1e-6) if is_numbers else value), key
    assert "not for clinical use" in facts["notice"] and "synthetic" in facts["notice"]


def test_every_format_scales_images_to_the_size_of_evaluation(tiny_run, images, tmp_path):
    """Decoded and fitted as in packing, then scaled as `make_eval_dataset` does: probabilities are those of Keras.

    Here to more pixels than were packed; to fewer in tests/notebooks/test_end_to_end.py.
    """
    eval_size = 96
    folder = shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("reference_maps.json"))
    record = json.loads((folder / "run.json").read_text()) | {"eval_size": eval_size}
    (folder / "run.json").write_text(json.dumps(record))
    write_formats(folder, ["saved_model", "onnx", "litert"])
    facts, network = describe_export(folder), load_classifier(folder)
    logits = network.predict(scale_images(tf.constant(images), eval_size), verbose=0)
    assert np.abs(logits - network.predict(images, verbose=0)).max() > 0.05  # the size matters
    for name in FILES:
        found = compare_export(folder / name, [images], platt(facts, logits.astype("float64")), IMAGE, repeats=1)
        assert found["max_difference"] <= (0.05 if "int8" in name else 1e-5)
        assert open_export(folder / name).facts["eval_size"] == eval_size

    model, files = ExportedModel(folder / "saved_model"), [encode(image[..., 0].astype("uint8")) for image in images]
    answer, explained = model.predict(files), model.explain(files[:2])
    assert np.abs(answer["probabilities"] - platt(facts, logits)).max() < 1e-5
    assert explained["films"].shape == (2, eval_size, eval_size, 1) and explained["films"].dtype == "uint8"
    assert explained["maps"].shape[1] == eval_size // 16
    assert np.allclose(expit(explained["maps"].mean(axis=(1, 2))), answer["raw_probabilities"][:2], atol=1e-5)


@pytest.mark.parametrize("name", FILES[1:])
def test_pixels_normalized_as_for_other_networks_get_no_probability(run, images, name):
    """ONNX and LiteRT have no assertions; the network answered shares of gray levels with confidence."""
    predict = open_export(run / name).predict_pixels
    for wrong in (images / 255, (images / 255 - 0.5) / 0.25, np.full_like(images, np.nan)):
        answer = predict(wrong)
        assert np.isnan(answer["probabilities"]).all() and np.isnan(answer["raw_probabilities"]).all()
        assert not answer["above_threshold"].any()
    for right in (images, np.zeros_like(images), np.minimum(images, 1)):  # black, and almost black
        assert np.isfinite(predict(right)["probabilities"]).all()


def test_int8_is_smaller_and_a_lite_file_is_a_zip_archive_too(run):
    exports = run / "exports"
    assert (exports / "model_int8.tflite").stat().st_size < 0.6 * (exports / "model.tflite").stat().st_size
    with zipfile.ZipFile(exports / "model.tflite") as archive:
        assert archive.read("labels.txt").decode().split() == list(PATHOLOGIES)


def test_weights_of_a_jax_run_are_exported_alike(tiny_run, tmp_path):
    """What Keras saves on JAX, in mixed bfloat16, is read as what it saves on TensorFlow, and that is all of a run."""
    pytest.importorskip("jax")
    code = "import pathlib, seeded_run; seeded_run.write_seeded_run(pathlib.Path('run'), (1, 1, 1, 1))"
    paths = os.pathsep.join(str(ROOT / name) for name in ("notebooks", "tests/support"))
    environment = os.environ | {"KERAS_BACKEND": "jax", "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True, capture_output=True)
    jax, tensorflow = (load_classifier(folder).get_weights() for folder in (tmp_path / "run", tiny_run))
    assert all(np.array_equal(one, other) for one, other in zip(jax, tensorflow, strict=True))
    facts = [describe_export(folder) | {"weights_sha256": ""} for folder in (tmp_path / "run", tiny_run)]
    assert facts[0] == facts[1]


def test_served_answer_fits_together(tiny_model, images):
    """Ranking, lift and thresholds follow from the probabilities; calibrated and raw thresholds are the same points."""
    facts, answer = tiny_model.facts, tiny_model.predict_pixels(images)
    probs, rows = answer["probabilities"], np.arange(len(images))[:, None]
    assert np.allclose(probs, platt(facts, logit(answer["raw_probabilities"])), atol=1e-5)
    order = np.argsort(-probs, axis=1, kind="stable")[:, :5]
    assert (answer["top5_label"] == np.array(PATHOLOGIES)[order]).all()
    assert np.allclose(answer["top5_prob"], probs[rows, order])
    assert np.allclose(answer["top5_lift"], (probs / facts["prevalence"])[rows, order], rtol=1e-5)
    assert (answer["above_threshold"] == (probs >= facts["thresholds"])).all()
    assert (answer["above_threshold"] == (answer["raw_probabilities"] >= facts["raw_thresholds"])).all()
    assert answer["above_threshold"].any() and not answer["above_threshold"].all()


def test_maps_average_to_the_logit_and_heatmaps_lack_the_mean_maps(tiny_model, tiny_run):
    image = draw_image(3, ["Mass"], size=SIDE)[0]
    answer, raw = tiny_model.explain([encode(image)]), tiny_model.predict([encode(image)])["raw_probabilities"][0]
    assert (answer["films"][0, ..., 0] == image).all()
    assert np.allclose(expit(answer["maps"][0].mean(axis=(0, 1))), raw, atol=1e-5)
    reference = np.array(json.loads((tiny_run / "reference_maps.json").read_text())["maps"])
    assert np.allclose(answer["maps"][0] - reference, answer["heatmaps"][0], atol=1e-5)


def test_image_of_any_kind_is_read_as_for_training(tiny_model, tmp_path):
    """PNG of 8 and 16 bits, RGB, RGBA, palette, JPEG, wide and high: each as `decode_image` reads it, in one batch."""
    image = Image.fromarray(draw_image(5, size=200)[0][:, 20:170])
    image.save(tmp_path / "gray.png")
    Image.fromarray(np.asarray(image).astype("uint16") * 257).save(tmp_path / "deep.png")
    image.convert("RGB").save(tmp_path / "rgb.png")
    image.convert("RGBA").save(tmp_path / "rgba.png")
    image.convert("P").save(tmp_path / "palette.png")
    image.rotate(90, expand=True).save(tmp_path / "wide.png")
    image.save(tmp_path / "image.jpg", quality=95)
    files = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    squares = np.stack([decode_image(data, SIDE).numpy() for data in files])
    answer = tiny_model.predict(files)["probabilities"]
    assert np.allclose(answer, tiny_model.predict_pixels(squares)["probabilities"], atol=1e-6)


def test_bad_input_is_named_and_harms_nothing(tiny_model, images):
    before = tiny_model.predict([IMAGE])["probabilities"]
    for signature in (tiny_model.predict, tiny_model.explain):
        with pytest.raises(ValueError, match=r"image_bytes, item 1, 3 \(from 0\): no complete PNG or JPEG"):
            signature([IMAGE, b"no image", IMAGE, IMAGE[: len(IMAGE) // 2]])
    for value in (np.nan, np.inf, -1, 256):
        spoiled = images.copy()
        spoiled[3, 5, 7] = value
        with pytest.raises(ValueError, match=r"^pixels: expected gray levels from 0 to 255"):
            tiny_model.predict_pixels(spoiled)
    with pytest.raises(ValueError, match="not from 0 to 1"):
        tiny_model.predict_pixels(images / 255)
    for files in (b"one image", ["image.png"]):
        with pytest.raises(TypeError, match="expected a list of bytes"):
            tiny_model.predict(files)
    with pytest.raises(ValueError, match="at least one image"):
        tiny_model.predict([])
    assert (tiny_model.predict([IMAGE])["probabilities"] == before).all()


def test_a_failing_export_says_why_and_keeps_the_old_files(tmp_path, monkeypatch, tiny_run):
    old = tmp_path / "saved_model" / "saved_model.pb"
    old.parent.mkdir()
    old.write_bytes(b"the old one")

    def fail(weights, folder, signatures):
        Path(folder).mkdir()
        (Path(folder) / "saved_model.pb").write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(tf.saved_model, "save", fail)
        with pytest.raises(OSError, match="disk full"):
            formats._write_saved_model(None, {}, old.parent)
    assert old.read_bytes() == b"the old one"
    failed = SimpleNamespace(returncode=1, stderr="a long trace, and at its end: disk full")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    keras.config.set_dtype_policy("mixed_bfloat16")  # so that a process of its own is needed
    try:
        with pytest.raises(RuntimeError, match=r"could not be exported:[\s\S]*disk full"):
            export_model(tiny_run, ["saved_model"])
    finally:
        keras.config.set_dtype_policy("float32")


def test_the_export_stays_in_a_process_that_computes_alike(tiny_run, monkeypatch):
    """A second import of TensorFlow takes seconds."""
    written = []
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("started a process"))
    monkeypatch.setattr(formats, "write_formats", lambda *arguments: written.append(arguments))
    assert export_model(tiny_run, ["saved_model"]) == [tiny_run / "saved_model"]
    assert written == [(tiny_run, ["saved_model"])]


def test_export_says_what_is_missing_or_does_not_fit(tiny_run, tmp_path, monkeypatch):
    (tmp_path / "run.json").write_bytes((tiny_run / "run.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"thresholds.json is missing\. Run 03_evaluate"):
        export_model(tmp_path)
    chosen = json.loads((tiny_run / "thresholds.json").read_text()) | {"weights_sha256": "6" * 64}
    (tmp_path / "thresholds.json").write_text(json.dumps(chosen))
    with pytest.raises(ValueError, match=r"thresholds.json was made from other weights .* Run 03_evaluate"):
        describe_export(tmp_path)
    chosen |= {"weights_sha256": json.loads((tmp_path / "run.json").read_text())["weights_sha256"], "eval_size": 48}
    (tmp_path / "thresholds.json").write_text(json.dumps(chosen))
    with pytest.raises(ValueError, match=r"thresholds.json was made at another size .* Run 03_evaluate"):
        describe_export(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install tf2onnx"):
        export_model(tiny_run, ["onnx"])


@pytest.mark.parametrize("name", ["model.onnx", "model_int8.tflite"])
def test_an_altered_file_is_refused(run, tmp_path, name):
    folder = shutil.copytree(run / "exports", tmp_path / "exports")
    with (folder / name).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ModelFileError, match="its SHA-256 is"):
        open_export(folder / name)


def test_exported_model_wants_its_signatures(tmp_path):
    module = tf.Module()
    module.one = tf.function(lambda x: {"y": x + 1}, input_signature=[tf.TensorSpec([], tf.float32)])
    tf.saved_model.save(module, str(tmp_path / "other"), signatures={"serving_default": module.one})
    with pytest.raises(ValueError, match="has no signatures explain, metadata, pixels"):
        ExportedModel(tmp_path / "other")
