"""Opens exported models of any format, predicts with them, and compares them with Keras."""

import json
import os
import re
import time
import warnings
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from ..evaluation.thresholds import FEW_POSITIVES
from ..packing.decoding import decode_gray
from ..runtime.files import as_path, local_copy, measure_file
from ..training.model_files import check_model_file, load_model


class ExportedModel:
    """A SavedModel of `export_model`, with NumPy in and out.

    Args:
        folder: path of the SavedModel.
        sha256: the hash that it must have, see `hash_model`; None accepts any that passes `check_model_file`.

    Attributes:
        folder: path of the SavedModel.
        facts: dict from `describe_export`: `class_names`, `thresholds`, `prevalence`, `notice`, ...

    Raises:
        FileNotFoundError: there is no such folder.
        ModelFileError: see `check_model_file`.
        ValueError: the SavedModel lacks the signatures of `export_model`.
    """

    def __init__(self, folder, sha256=None):
        self.folder = as_path(folder)
        self._signatures = load_model(folder, sha256=sha256).signatures
        missing = {"serving_default", "explain", "pixels", "metadata"} - set(self._signatures)
        if missing:
            raise ValueError(f"{folder} has no signatures {', '.join(sorted(missing))}. Export the model again.")
        self.facts = {name: value.tolist() for name, value in self._call("metadata").items()}

    def __reduce__(self):
        """Is opened anew by a worker of a cluster, from the same folder."""
        return ExportedModel, (self.folder,)

    def predict(self, files):
        """Predicts encoded images.

        Args:
            files: list of bytes, PNG or JPEG.

        Returns:
            Dict of arrays, see `export_model`; `top5_label` holds str.

        Raises:
            TypeError: `files` is not a list of bytes.
            ValueError: the list is empty, or some files are not images; with their numbers, from 0.
        """
        return self._call("serving_default", image_bytes=_encoded(files))

    def explain(self, files):
        """Returns a dict with `maps`, `heatmaps` and `films` (the images) for encoded images, see `export_model`.

        Raises:
            TypeError, ValueError: as in `predict`.
        """
        return self._call("explain", image_bytes=_encoded(files))

    def predict_pixels(self, pixels):
        """Predicts decoded images: float32 (n, height, width, 1), 0 to 255, of one size. Returns the same as `predict`.

        Raises:
            ValueError: a value is not in 0 to 255.
        """
        return self._call("pixels", pixels=tf.constant(pixels, tf.float32))

    def _call(self, signature, **inputs):
        try:
            answer = self._signatures[signature](**inputs)
        except tf.errors.InvalidArgumentError as error:
            # Only the sentence of the failed assertion; the rest is TensorFlow's trace.
            found = re.search(r"assertion failed: \[(.*?)\]", error.message)
            raise ValueError(found[1] if found else error.message) from None
        values = {name: np.asarray(value.numpy()) for name, value in answer.items()}
        return {name: value.astype(str) if value.dtype.kind in "OS" else value for name, value in values.items()}


def _encoded(files):
    if isinstance(files, bytes) or not all(isinstance(data, bytes) for data in files):
        raise TypeError("expected a list of bytes, one for each image, such as [Path('image.png').read_bytes()]")
    if len(files) == 0:  # oneDNN, which TensorFlow uses on some processors, returns a wrong shape for no images
        raise ValueError("expected at least one image")
    return tf.constant(files, tf.string)


def name_few_positives(facts):
    """Lists the findings whose threshold and calibration rest on fewer than `FEW_POSITIVES` validation images with it.

    Args:
        facts: dict from `describe_export`; of an older export, which does not say, no finding is listed.
    """
    positives = facts.get("validation_positives", [])
    return [name for name, n in zip(facts["class_names"], positives, strict=False) if 0 <= n < FEW_POSITIVES]


class OpenExport(NamedTuple):
    """An exported model of any format.

    Attributes:
        predict_pixels: takes pixels, float32 (n, height, width, 1) in [0, 255]; returns a dict with `probabilities` and
            `raw_probabilities`, float32 (n, findings), and `above_threshold`, bool of that shape.
        predict_file: takes the bytes of one PNG or JPEG; returns the same dict for it.
        facts: dict from `describe_export`.
    """

    predict_pixels: Callable
    predict_file: Callable
    facts: dict


def open_export(path):
    """Opens an exported model of any format.

    Args:
        path: path of `saved_model`, `model.onnx`, `model.tflite` or `model_int8.tflite`; the last three must have the
            hash that the export recorded.

    Returns:
        An `OpenExport`.

    Raises:
        FileNotFoundError: there is no such file.
        ModelFileError: see `check_model_file`.
        ModuleNotFoundError: the format needs a package that is not installed.
        ValueError: the file carries no `model.json`.
    """
    path = as_path(path)
    if path.suffix not in (".onnx", ".tflite"):
        model = ExportedModel(path)
        return OpenExport(model.predict_pixels, lambda data: model.predict([data]), model.facts)
    with local_copy(check_model_file(path)) as file:
        predict, facts = (_open_onnx if path.suffix == ".onnx" else _open_litert)(os.fspath(file))
    if facts is None:
        raise ValueError(f"{path} carries no model.json, which describes it. Export the model again.")
    return OpenExport(predict, lambda data: predict(tf.cast(decode_gray(data), tf.float32).numpy()[None]), facts)


def _open_onnx(file):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = os.cpu_count()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    stored = session.get_modelmeta().custom_metadata_map
    return (
        lambda pixels: dict(zip(names, session.run(None, {"pixels": np.asarray(pixels, "float32")}), strict=True)),
        json.loads(stored["model.json"]) if "model.json" in stored else None,
    )


def _open_litert(file):
    try:
        from ai_edge_litert.interpreter import Interpreter  # TensorFlow moves its own there
    except ModuleNotFoundError:
        Interpreter = tf.lite.Interpreter
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorFlow's own is deprecated
        runner = Interpreter(file, num_threads=os.cpu_count()).get_signature_runner()
    try:
        with zipfile.ZipFile(file) as archive:
            facts = json.loads(archive.read("model.json"))
    except (zipfile.BadZipFile, KeyError):
        facts = None
    return lambda pixels: runner(pixels=np.asarray(pixels, "float32")), facts


def compare_export(path, batches, expected, image, *, repeats=30):
    """Measures how far an exported model is from Keras, and its size and speed on this machine.

    Args:
        path: path of the exported model, see `open_export`.
        batches: iterable of float32 arrays (n, side, side, 1) in [0, 255], the images as packed.
        expected: float array (images, findings), Keras's calibrated probabilities of the same images.
        image: bytes of one PNG or JPEG, of 1024 pixels for the usual latency.
        repeats: int, timed predictions of the one image.

    Returns:
        A dict: `images`; `max_difference` of the probabilities and `same_top5`, the share of images with the same five
        findings in the same order; `largest_swap`, how far apart a finding and the one whose place among the five it
        takes are in `expected`, at most; `bytes`; `load_seconds`; `p50_ms` and `p95_ms` from the bytes of one image to
        its answer, decoding included; `images_per_second` in batches of 32 squares.
    """
    began = time.perf_counter()
    model = open_export(path)
    load_seconds = time.perf_counter() - began
    batches = list(batches)
    probs = np.concatenate([model.predict_pixels(batch)["probabilities"] for batch in batches])
    top5, expected_top5 = (np.argsort(-values, axis=1, kind="stable")[:, :5] for values in (probs, expected))
    swaps = np.take_along_axis(expected, expected_top5, 1) - np.take_along_axis(expected, top5, 1)
    model.predict_file(image)  # the first call is slower
    seconds = [_time(model.predict_file, image) for _ in range(repeats)]
    many = np.resize(np.concatenate(batches), (32, *batches[0].shape[1:]))
    model.predict_pixels(many)
    batch_seconds = [_time(model.predict_pixels, many) for _ in range(max(1, repeats // 10))]
    p50, p95 = np.percentile(seconds, [50, 95]) * 1e3
    return {
        "images": len(probs),
        "max_difference": float(np.abs(probs - expected).max()),
        "same_top5": float((top5 == expected_top5).all(axis=1).mean()),
        "largest_swap": float(np.abs(swaps).max()),
        "bytes": _measure(as_path(path)),
        "load_seconds": round(load_seconds, 3),
        "p50_ms": round(float(p50), 2),
        "p95_ms": round(float(p95), 2),
        "images_per_second": round(len(many) / float(np.mean(batch_seconds)), 1),
    }


def _time(function, argument):
    began = time.perf_counter()
    function(argument)
    return time.perf_counter() - began


def _measure(path):
    return sum(map(_measure, path.iterdir())) if path.is_dir() else measure_file(path)
