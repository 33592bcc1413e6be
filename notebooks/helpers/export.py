"""Writes a trained classifier as one SavedModel that reads PNG and JPEG bytes.

A SavedModel is TensorFlow's, whatever Keras trained on, so this runs in a process of its own, on that backend:
`KERAS_BACKEND=tensorflow python -m helpers.export RUN_DIR`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from .files import as_path


def export_saved_model(run_dir):
    """Exports the model of a run in a fresh Python process on the TensorFlow backend.

    Args:
        run_dir: path of the folder that 02_train_densenet121 wrote.

    Returns:
        Path of the SavedModel, `saved_model` in the run's folder. Its `serving_default` takes `image_bytes`, a batch of
        PNG or JPEG files, and gives `probabilities` (batch, 14), `top5_label` and `top5_prob` (batch, 5).

    Raises:
        RuntimeError: the export failed; with the last lines of its error.
    """
    environment = os.environ | {"KERAS_BACKEND": "tensorflow"}
    command = [sys.executable, "-m", "helpers.export", os.fspath(run_dir)]
    folder = Path(__file__).resolve().parents[1]
    answer = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(f"The model in {run_dir} could not be exported:\n{answer.stderr[-2000:]}")
    return as_path(run_dir) / "saved_model"


def _export(run_dir):
    import keras
    import tensorflow as tf

    from .images import decode_film
    from .model import load_densenet121

    run = json.loads((as_path(run_dir) / "run.json").read_text())
    model = load_densenet121(run_dir)
    class_names = tf.constant(run["classes"])

    # The input is named `image_bytes`: TensorFlow Serving decodes base64 for names that end in `_bytes`.
    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")])
    def classify(image_bytes):
        films = tf.map_fn(lambda data: decode_film(data, run["side"]), image_bytes, fn_output_signature=tf.uint8)
        probs = tf.sigmoid(model(tf.cast(films, tf.float32), training=False))
        top5 = tf.math.top_k(probs, 5)
        return {"probabilities": probs, "top5_label": tf.gather(class_names, top5.indices), "top5_prob": top5.values}

    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serving_default", classify)
    archive.write_out(os.fspath(as_path(run_dir) / "saved_model"), verbose=False)


if __name__ == "__main__":
    _export(sys.argv[1])
