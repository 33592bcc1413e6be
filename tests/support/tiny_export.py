"""A SavedModel with the signatures of this repository's export, written in seconds: a network of one layer."""

import numpy as np
import tensorflow as tf

from helpers.packing.decoding import decode_images, fit_images
from helpers.study import PATHOLOGIES

SIDE, CELLS = 64, 4  # the gate takes no smaller images


def write_tiny_model(folder):
    """Writes the SavedModel; what it says of an image depends on the image, and every finding has a map of its own."""
    facts = {
        "class_names": list(PATHOLOGIES),
        "thresholds": np.linspace(0.2, 0.6, 14),
        "raw_thresholds": np.linspace(0.2, 0.6, 14),
        "calibration_slope": np.ones(14),
        "calibration_intercept": np.zeros(14),
        "prevalence": np.linspace(0.05, 0.2, 14),
        "side": SIDE,
        "study": "phantom-tiny",
        "synthetic": True,
        "split": "official",
        "split_sha256": "0" * 64,
        "weights_sha256": "0" * 64,
        "commit": "unknown",
        "versions": "of this machine",
        "input": "a frontal chest radiograph, upright, bone bright; fitted into a square inside the model",
        "notice": "For research and teaching only, not for clinical use.",
    }
    rng = np.random.default_rng(3)
    thresholds, prevalence = (tf.constant(facts[name], tf.float32) for name in ("raw_thresholds", "prevalence"))
    class_names = tf.constant(facts["class_names"])
    module = tf.Module()
    module.kernel = tf.Variable(rng.normal(0, 6, (CELLS, CELLS, 14)), dtype=tf.float32)
    files = tf.TensorSpec([None], tf.string, name="image_bytes")
    pixels = tf.TensorSpec([None, None, None, 1], tf.float32, name="pixels")

    def look(images):
        cells = tf.nn.avg_pool2d(images / 255, SIDE // CELLS, SIDE // CELLS, "VALID")
        maps = (cells - tf.reduce_mean(cells, (1, 2), keepdims=True)) * module.kernel
        return maps, tf.reduce_mean(maps, (1, 2)) * 8 - 1

    def judge(images):
        probs = tf.sigmoid(look(images)[1])
        top5 = tf.math.top_k(probs, 5)
        return {
            "probabilities": probs,
            "raw_probabilities": probs,
            "above_threshold": probs >= thresholds,
            "top5_label": tf.gather(class_names, top5.indices),
            "top5_prob": top5.values,
            "top5_lift": top5.values / tf.gather(prevalence, top5.indices),
        }

    @tf.function(input_signature=[files])
    def classify(image_bytes):
        return judge(tf.cast(decode_images(image_bytes, SIDE), tf.float32))

    @tf.function(input_signature=[files])
    def explain(image_bytes):
        images = decode_images(image_bytes, SIDE)
        maps, _ = look(tf.cast(images, tf.float32))
        return {"maps": maps, "heatmaps": maps, "films": images}

    @tf.function(input_signature=[pixels])
    def classify_pixels(pixels):
        return judge(fit_images(pixels, SIDE))

    @tf.function(input_signature=[])
    def metadata():
        return {
            name: tf.constant(value, tf.float32 if isinstance(value, np.ndarray) else None)
            for name, value in facts.items()
        }

    signatures = {"serving_default": classify, "explain": explain, "pixels": classify_pixels, "metadata": metadata}
    tf.saved_model.save(module, str(folder), signatures=signatures)
    return folder
