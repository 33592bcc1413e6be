"""Writes a trained classifier as files that need no code of this repository: a SavedModel, ONNX, LiteRT.

TensorFlow writes them in float32, whichever backend and precision Keras trained with. Where this process has others, or
an accelerator, `export_model` starts one: `KERAS_BACKEND=tensorflow python -m helpers.export RUN_DIR saved_model onnx`.

Each file returns calibrated and raw probabilities and which findings are above their thresholds, and carries the facts
of `describe_export`.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from scipy.special import logit

from ..evaluation.calibration import apply_platt
from ..runtime.files import as_path, is_remote, local_draft, remove_folder
from ..runtime.settings import read_json, write_json
from ..training.model_files import record_hashes
from ..training.provenance import flag_start
from ..training.run_record import describe_data, read_run

FORMATS = {
    "saved_model": ["saved_model"],
    "onnx": ["exports/model.onnx"],
    "litert": ["exports/model.tflite", "exports/model_int8.tflite"],
}
_USE = "For research and teaching only, not for clinical use. Code under the Apache License 2.0. "
_NIH_NOTICE = _USE + (
    "Weights trained on NIH ChestX-ray14 or on images in its layout: cite Wang et al., CVPR 2017, and acknowledge the "
    "NIH Clinical Center as the data provider."
)
_SYNTHETIC_NOTICE = _USE + "Trained on synthetic images; it says nothing about real radiographs."


def describe_export(run_dir):
    """Gathers what the user of an exported model must know besides its weights.

    Args:
        run_dir: path of a run's folder, with `run.json` of notebook 2 and `thresholds.json` of notebook 3.

    Returns:
        A dict of plain values. Lists in the order of the findings: `class_names`; `thresholds`, for calibrated
        probabilities, and `raw_thresholds`, for raw ones; `calibration_slope` and `calibration_intercept` (Platt's, of
        the logit); `prevalence` in the training images; `validation_positives`, images with the finding by which
        threshold and calibration were chosen, -1 where thresholds.json is of an earlier version. Then, in pixels,
        `side` of the square into which an image is fitted, and `eval_size`, to which the square is scaled for the
        network; `split` and `split_sha256`; `study`, `synthetic`; `weights_sha256`, `commit`, `versions`; `input` and
        `notice`.

    Raises:
        FileNotFoundError: a file of the run is missing.
        ValueError: the thresholds were chosen for other weights, or at another size.
    """
    run_dir = as_path(run_dir)
    for name, notebook in {"run.json": "02_train_densenet121", "thresholds.json": "03_evaluate"}.items():
        if not (run_dir / name).is_file():
            raise FileNotFoundError(f"{run_dir / name} is missing. Run {notebook}.ipynb with this RUN_DIR first.")
    run, chosen = read_run(run_dir), read_json(run_dir / "thresholds.json")
    _check_source(run_dir / "thresholds.json", chosen, run, "03_evaluate")
    points = [chosen["pathologies"][name] for name in run["classes"]]
    raw_thresholds = [point["threshold"] for point in points]
    slope, intercept = ([point["calibration"][key] for point in points] for key in ("slope", "intercept"))
    return {
        "class_names": run["classes"],
        "thresholds": apply_platt(logit(raw_thresholds), slope, intercept).tolist(),
        "raw_thresholds": raw_thresholds,
        "calibration_slope": slope,
        "calibration_intercept": intercept,
        "prevalence": [run["prevalence"][name] for name in run["classes"]],
        "validation_positives": [point.get("n_pos_val", -1) for point in points],
        "side": run["side"],
        "eval_size": run["eval_size"],
        "study": run["study"],
        "synthetic": run["synthetic"],
        "split": run["split"]["name"],
        "split_sha256": run["split"]["sha256"],
        "weights_sha256": run["weights_sha256"],
        "commit": str(run["runtime"]["commit"]),
        "versions": f"TensorFlow {run['runtime']['tensorflow']}, Keras {run['runtime']['keras']}",
        "input": "a frontal chest radiograph, upright, bone bright; fitted into a square inside the model",
        "notice": " ".join(filter(None, [_choose_notice(run), flag_start(run)])),
    }


def _choose_notice(run):
    if run["synthetic"]:
        return _SYNTHETIC_NOTICE
    about, is_nih = describe_data(run)
    if is_nih:
        return _NIH_NOTICE
    terms = f": {about['terms']}" if about.get("terms") else ", whose terms the study does not name."
    return f"{_USE}Weights trained on {about.get('name', run['study'])}{terms}"


def _check_source(path, content, run, notebook):
    if content.get("weights_sha256") != run["weights_sha256"]:
        raise ValueError(f"{path} was made from other weights than those of run.json. Run {notebook}.ipynb again.")
    if content.get("eval_size", run["eval_size"]) != run["eval_size"]:
        raise ValueError(f"{path} was made at another size than the eval_size of run.json. Run {notebook}.ipynb again.")


def export_model(run_dir, formats=tuple(FORMATS)):
    """Exports the model of a run on the TensorFlow backend, in float32; where needed, in a process of its own.

    Signatures of the SavedModel, for batches of one or more images:

    - `serving_default` takes `image_bytes`, PNG or JPEG files, 8 or 16 bits, gray or RGB, from 16 pixels a side to 33
      million pixels. Returns `probabilities` (n, findings, calibrated), `raw_probabilities`, `above_threshold` (bool,
      decided on the raw ones), and for the five most probable findings `top5_label`, `top5_prob` and `top5_lift`
      (n, 5, or fewer), the last the probability over the finding's share of the training images.
    - `explain` takes the same. Returns `maps` (n, h, w, findings), class activation maps whose mean is the logit;
      `heatmaps`, the maps minus the mean maps of many images (`reference_maps.json` of notebook 4); `films`, the
      images as the network sees them, uint8 squares (n, eval_size, eval_size, 1).
    - `pixels` takes `pixels`, float32 (n, height, width, 1), 0 to 255, gray images of one size. Returns the same as
      `serving_default`; other values, also shares from 0 to 1, are an error.
    - `metadata` takes nothing. Returns `describe_export` as constants.

    ONNX and LiteRT take `pixels` and return `probabilities`, `raw_probabilities` and `above_threshold`; for what is no
    gray level of 0 to 255, NaN. They carry
    `describe_export` as `model.json`: in the metadata of ONNX, and in a zip archive at the end of a LiteRT file.

    A synthetic image and the SavedModel's answer go to `exports/golden.png` and `exports/golden.json`; with them an
    installation is checked.

    Args:
        run_dir: path of the folder that 02_train_densenet121 and 03_evaluate wrote.
        formats: some of "saved_model", "onnx" (needs tf2onnx) and "litert".

    Returns:
        List of the paths written.

    Raises:
        FileNotFoundError, ValueError: see `describe_export`.
        ModuleNotFoundError: a format needs a package that is not installed.
        RuntimeError: the export failed in a process of its own; with the last lines of its error.
    """
    if "onnx" in formats and importlib.util.find_spec("tf2onnx") is None:
        raise ModuleNotFoundError('ONNX needs tf2onnx: pip install tf2onnx, or leave "onnx" out of the formats.')
    describe_export(run_dir)
    if _computes_as_exports() and not is_remote(run_dir):  # TensorFlow waits for a bucket with Python's lock held
        with _without_messages():
            write_formats(run_dir, formats)
    else:
        _write_in_own_process(run_dir, formats)
    return [as_path(run_dir) / name for form in formats for name in FORMATS[form]]


def _computes_as_exports():
    """Returns whether this process computes with TensorFlow, in float32, on CPUs alone."""
    import keras
    import tensorflow as tf

    is_plain = keras.backend.backend() == "tensorflow" and keras.config.dtype_policy().name == "float32"
    return is_plain and {device.device_type for device in tf.config.list_logical_devices()} == {"CPU"}


@contextlib.contextmanager
def _without_messages():
    """Keeps TensorFlow, in a `with` block, from printing in a notebook where it writes temporary files."""
    import tensorflow as tf

    level = tf.get_logger().level
    tf.get_logger().setLevel("WARNING")
    try:
        yield
    finally:
        tf.get_logger().setLevel(level)


def _write_in_own_process(run_dir, formats):
    environment = os.environ | {"KERAS_BACKEND": "tensorflow"}
    command = [sys.executable, "-m", "helpers.export", os.fspath(run_dir), *formats]
    folder = Path(__file__).resolve().parents[2]
    answer = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(f"The model in {run_dir} could not be exported:\n{answer.stderr[-2000:]}")


def write_formats(run_dir, formats):
    """Writes the formats in this process, which must run on TensorFlow; see `export_model`."""
    run_dir = as_path(run_dir)
    facts = describe_export(run_dir)
    weights, signatures, judge_pixels = _build_signatures(run_dir, facts)
    if "saved_model" in formats:
        _write_saved_model(weights, signatures, run_dir / "saved_model")
        _write_golden(signatures["serving_default"], facts["weights_sha256"], run_dir / "exports")
    if "onnx" in formats:
        _write_onnx(judge_pixels, facts, run_dir / "exports" / "model.onnx")
    if "litert" in formats:
        _write_litert(weights, judge_pixels, facts, run_dir / "exports")
    names = [name for form in formats for name in FORMATS[form] if name != "saved_model"]
    record_hashes(run_dir / name for name in names)  # ONNX and LiteRT files are opened only with a known SHA-256


def _build_signatures(run_dir, facts):
    """Returns a tf.Module with the weights, the SavedModel's signatures, and the function of ONNX and LiteRT."""
    import numpy as np
    import tensorflow as tf

    from ..evaluation.heatmaps import build_activation_model
    from ..packing.decoding import are_gray_levels, decode_images, fit_images, refuse_pixels
    from ..pipeline import scale_images
    from ..training.backbones import make_portable
    from ..training.model import load_classifier

    side, eval_size = facts["side"], facts["eval_size"]
    network = make_portable(build_activation_model(load_classifier(run_dir)))
    slope, intercept, thresholds, prevalence = (
        np.asarray(facts[key], "float32")  # not tensors, of which ONNX would make inputs
        for key in ("calibration_slope", "calibration_intercept", "raw_thresholds", "prevalence")
    )
    reference = 0.0
    if (run_dir / "reference_maps.json").is_file():
        stored = read_json(run_dir / "reference_maps.json")
        _check_source(run_dir / "reference_maps.json", stored, facts, "04_explain")
        reference = np.asarray(stored["maps"], "float32")

    def judge(squares, doubt=0.0):
        _, logits = network(scale_images(squares, eval_size), training=False)
        logits += doubt
        raw = tf.sigmoid(logits)
        probs = tf.sigmoid(slope * logits + intercept)
        return {"probabilities": probs, "raw_probabilities": raw, "above_threshold": raw >= thresholds}

    def rank(answer):
        top5 = tf.math.top_k(answer["probabilities"], min(5, len(facts["class_names"])))
        lift = top5.values / tf.gather(np.maximum(prevalence, 1e-3), top5.indices)  # 0 for a finding without images
        names = tf.gather(facts["class_names"], top5.indices)
        return answer | {"top5_label": names, "top5_prob": top5.values, "top5_lift": lift}

    # The input is named `image_bytes`: TensorFlow Serving decodes base64 for names that end in `_bytes`.
    files = tf.TensorSpec([None], tf.string, name="image_bytes")
    pixels = tf.TensorSpec([None, None, None, 1], tf.float32, name="pixels")

    @tf.function(input_signature=[files])
    def classify(image_bytes):
        return rank(judge(decode_images(image_bytes, side)))

    @tf.function(input_signature=[files])
    def explain(image_bytes):
        images = scale_images(decode_images(image_bytes, side), eval_size)
        maps, _ = network(images, training=False)
        return {"maps": maps, "heatmaps": maps - reference, "films": tf.cast(tf.round(images), tf.uint8)}

    @tf.function(input_signature=[pixels])
    def judge_pixels(pixels):
        doubt = tf.where(are_gray_levels(pixels), 0.0, np.nan)  # those formats have no assertions
        return judge(fit_images(pixels, side), doubt)

    @tf.function(input_signature=[pixels])
    def classify_pixels(pixels):
        with tf.control_dependencies([refuse_pixels(pixels)]):
            return rank(judge(fit_images(tf.identity(pixels), side)))

    @tf.function(input_signature=[])
    def metadata():
        return {
            name: tf.constant(value, tf.float32 if isinstance(value, list) and name != "class_names" else None)
            for name, value in facts.items()
        }

    weights = tf.Module()
    # The plain variables: Keras's own objects would be written as well.
    weights.variables_in_order = [variable.value for variable in network.variables]
    signatures = {"serving_default": classify, "explain": explain, "pixels": classify_pixels, "metadata": metadata}
    return weights, signatures, judge_pixels


def _write_saved_model(weights, signatures, folder):
    """Writes a SavedModel; on a local disk it replaces an older one only when it is complete."""
    import tensorflow as tf

    draft = folder if is_remote(folder) else folder.with_name("part-" + folder.name)
    remove_folder(draft)
    tf.saved_model.save(weights, os.fspath(draft), signatures=signatures)
    if draft != folder:
        remove_folder(folder)
        os.replace(draft, folder)


def _write_golden(classify, weights_sha256, folder):
    """Writes an image that must be padded and resized, and what the model answers for it."""
    import tensorflow as tf
    from PIL import Image

    from ..study.synthetic import draw_image

    image, _ = draw_image(7, ["Cardiomegaly", "Effusion"], size=512)
    with local_draft(folder / "golden.png") as draft:
        Image.fromarray(image[:, 32:-32]).save(draft)
    data = (folder / "golden.png").read_bytes()
    answer = {name: value.numpy() for name, value in classify(tf.constant([data])).items()}
    answer["top5_label"] = answer["top5_label"].astype(str)
    expected = {name: value[0].tolist() for name, value in answer.items()}
    about = {"film": "golden.png", "sha256": hashlib.sha256(data).hexdigest(), "weights_sha256": weights_sha256}
    write_json(folder / "golden.json", about | expected)


def _write_onnx(judge_pixels, facts, path):
    import tf2onnx

    inputs = judge_pixels.input_signature
    proto, _ = tf2onnx.convert.from_function(judge_pixels, input_signature=inputs, opset=17)
    entry = proto.metadata_props.add()
    entry.key, entry.value = "model.json", json.dumps(facts, indent=1)
    with local_draft(path) as draft:
        draft.write_bytes(proto.SerializeToString())


def _write_litert(weights, judge_pixels, facts, folder):
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as scratch:
        tf.saved_model.save(weights, scratch, signatures={"serving_default": judge_pixels})
        for name, optimizations in {"model.tflite": [], "model_int8.tflite": [tf.lite.Optimize.DEFAULT]}.items():
            converter = tf.lite.TFLiteConverter.from_saved_model(scratch)
            converter.optimizations = optimizations  # DEFAULT without samples: int8 weights, float32 activations
            with local_draft(folder / name) as draft:
                draft.write_bytes(converter.convert())
                with zipfile.ZipFile(draft, "a") as archive:  # behind the end of the model
                    archive.writestr("model.json", json.dumps(facts, indent=1))
                    archive.writestr("labels.txt", "\n".join(facts["class_names"]))
