"""Opens exported models to ask them, in any format, and compares what they say."""

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

from ..packing.decoding import decode_gray
from ..runtime.files import as_path, local_copy, measure_file
from ..training.model_files import check_model_file, load_model


class ExportedModel:
    """A SavedModel of `export_model`, with NumPy in and out.

    Args:
        folder: path of the SavedModel.
        sha256: the hash that it must have, see `model_files.hash_model`; None accepts any that is harmless.

    Attributes:
        facts: dict, what `export.describe_export` gathered: `class_names`, `thresholds`, `prevalence`, `notice`, ...

    Raises:
        ModelFileError: there is no SavedModel, it is not the one expected, or it holds what a model does not need.
        ValueError: it is a SavedModel without the signatures of this repository's export.
    """

    def __init__(self, folder, sha256=None):
        self.folder = as_path(folder)
        self._signatures = load_model(folder, sha256=sha256).signatures
        missing = {"serving_default", "explain", "pixels", "metadata"} - set(self._signatures)
        if missing:
            raise ValueError(f"{folder} has no signatures {', '.join(sorted(missing))}. Export the model anew.")
        self.facts = {name: value.tolist() for name, value in self._ask("metadata").items()}

    def predict(self, files):
        """Asks for encoded images.

        Args:
            files: list of bytes, PNG or JPEG.

        Returns:
            Dict of arrays, see `export.export_model`; `top5_label` holds str.

        Raises:
            TypeError: it is something else than a list of bytes.
            ValueError: some are no images; with their numbers, from 0. Or there are none at all.
        """
        return self._ask("serving_default", image_bytes=_encoded(files))

    def explain(self, files):
        """Returns a dict with `maps`, `heatmaps` and `films` for encoded images, see `export.export_model`.

        Raises:
            ValueError: some are no images; with their numbers, from 0.
        """
        return self._ask("explain", image_bytes=_encoded(files))

    def predict_pixels(self, pixels):
        """Asks for decoded images: float32 (n, height, width, 1), 0 to 255, of one size. Returns as `predict`.

        Raises:
            ValueError: there are other values than 0 to 255.
        """
        return self._ask("pixels", pixels=tf.constant(pixels, tf.float32))

    def _ask(self, signature, **inputs):
        try:
            answer = self._signatures[signature](**inputs)
        except tf.errors.InvalidArgumentError as error:
            # Of what was asserted in the graph, the sentence; the rest is TensorFlow's trace.
            found = re.search(r"assertion failed: \[(.*?)\]", error.message)
            raise ValueError(found[1] if found else error.message) from None
        values = {name: np.asarray(value.numpy()) for name, value in answer.items()}
        return {name: value.astype(str) if value.dtype.kind in "OS" else value for name, value in values.items()}


def _encoded(files):
    if isinstance(files, bytes) or not all(isinstance(data, bytes) for data in files):
        raise TypeError("expected a list of bytes, one for each image, such as [Path('film.png').read_bytes()]")
    if len(files) == 0:  # oneDNN, which TensorFlow takes on some processors, gives no images a wrong shape
        raise ValueError("expected at least one image")
    return tf.constant(files, tf.string)


class OpenExport(NamedTuple):
    """An exported model of any format, ready to be asked.

    `ask_pixels` takes pixels, float32 (n, height, width, 1) in [0, 255], and gives a dict with `probabilities` and
    `raw_probabilities` (n, 14) float32 and `above_threshold` (n, 14) bool. `ask_file` takes the bytes of one image and
    gives the same for it. `facts` is what `export.describe_export` gathered.
    """

    ask_pixels: Callable
    ask_file: Callable
    facts: dict


def open_export(path, n_threads=None):
    """Opens an exported model of any format.

    Args:
        path: path of `saved_model`, `model.onnx`, `model.tflite` or `model_int8.tflite`.
        n_threads: int; None for as many as there are cores. TensorFlow has settings of its own.

    Returns:
        An `OpenExport`.

    Raises:
        ModelFileError: the file is missing or holds what a model does not need.
        ModuleNotFoundError: the format needs a package that is not installed.
    """
    path = as_path(path)
    n_threads = n_threads or os.cpu_count()
    if path.suffix not in (".onnx", ".tflite"):
        model = ExportedModel(path)
        return OpenExport(model.predict_pixels, lambda data: model.predict([data]), model.facts)
    with local_copy(check_model_file(path)) as file:
        ask, facts = (_open_onnx if path.suffix == ".onnx" else _open_litert)(file, n_threads)
    return OpenExport(ask, lambda data: ask(tf.cast(decode_gray(data), tf.float32).numpy()[None]), facts)


def _open_onnx(file, n_threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    session = onnxruntime.InferenceSession(os.fspath(file), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def ask(pixels):
        return dict(zip(names, session.run(None, {"pixels": np.asarray(pixels, "float32")}), strict=True))

    stored = session.get_modelmeta().custom_metadata_map
    if "model.json" not in stored:
        raise ValueError(f"{file} does not say what it is: its metadata lack model.json. Export the model anew.")
    return ask, json.loads(stored["model.json"])


def _open_litert(file, n_threads):
    try:
        from ai_edge_litert.interpreter import Interpreter  # where TensorFlow is moving its own
    except ModuleNotFoundError:
        Interpreter = tf.lite.Interpreter
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TensorFlow's own is going
        runner = Interpreter(os.fspath(file), num_threads=n_threads).get_signature_runner()
    try:
        with zipfile.ZipFile(file) as archive:
            facts = json.loads(archive.read("model.json"))
    except (zipfile.BadZipFile, KeyError):
        raise ValueError(
            f"{file} does not say what it is: model.json is not at its end. Export the model anew."
        ) from None
    return lambda pixels: runner(pixels=np.asarray(pixels, "float32")), facts


def compare_export(path, batches, expected, image, *, n_threads=None, repeats=30):
    """Measures how an exported model differs from Keras, and how large and how fast it is on this machine.

    Args:
        path: path of the exported model, see `open_export`.
        batches: iterable of float32 arrays (n, side, side, 1) in [0, 255], the images as packed.
        expected: float array (images, 14), Keras's calibrated probabilities of the same images.
        image: bytes of one PNG or JPEG, of 1024 pixels for the usual latency.
        n_threads: see `open_export`.
        repeats: how often the one image is asked for.

    Returns:
        A dict: `films`; `max_difference` of the probabilities and `same_top5`, the share of images with the same five
        findings in the same order; `largest_swap`, how far apart a finding and the one whose place among the five it
        takes are in `expected`, at most; `bytes`; `load_seconds`; `p50_ms` and `p95_ms` from the bytes of one image to
        its answer, decoding included; `films_per_second` in batches of 32 squares.
    """
    began = time.perf_counter()
    model = open_export(path, n_threads)
    load_seconds = time.perf_counter() - began
    batches = list(batches)
    probs = np.concatenate([model.ask_pixels(batch)["probabilities"] for batch in batches])
    top5, expected_top5 = (np.argsort(-values, axis=1, kind="stable")[:, :5] for values in (probs, expected))
    swaps = np.take_along_axis(expected, expected_top5, 1) - np.take_along_axis(expected, top5, 1)
    seconds = []
    for _ in range(repeats + 1):  # the first one warms up
        began = time.perf_counter()
        model.ask_file(image)
        seconds.append(time.perf_counter() - began)
    many = np.resize(np.concatenate(batches), (32, *batches[0].shape[1:]))
    model.ask_pixels(many)
    began, rounds = time.perf_counter(), max(1, repeats // 10)
    for _ in range(rounds):
        model.ask_pixels(many)
    rate = rounds * len(many) / (time.perf_counter() - began)
    p50, p95 = (1e3 * float(value) for value in np.percentile(seconds[1:], [50, 95]))
    return {
        "films": len(probs),
        "max_difference": float(np.abs(probs - expected).max()),
        "same_top5": float((top5 == expected_top5).all(axis=1).mean()),
        "largest_swap": float(np.abs(swaps).max()),
        "bytes": _measure(as_path(path)),
        "load_seconds": round(load_seconds, 3),
        "p50_ms": round(p50, 2),
        "p95_ms": round(p95, 2),
        "films_per_second": round(rate, 1),
    }


def _measure(path):
    return sum(_measure(part) for part in path.iterdir()) if path.is_dir() else measure_file(path)
