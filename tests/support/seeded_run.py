"""A run's folder with weights drawn from a seed, the same on every machine, for the golden files of the exports."""

import hashlib
import json

import keras
import numpy as np

from helpers.study import PATHOLOGIES
from helpers.training import build_classifier

SIDE = 64


def draw_weights(model, seed=0):
    """Gives a model weights from NumPy's frozen generator, which no version of anything changes."""
    rng, drawn = np.random.RandomState(seed), []
    for variable in model.variables:
        kind, shape = variable.path.rsplit("/", 1)[1], variable.shape
        if kind == "kernel":
            drawn.append(rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[:-1])))
        elif kind in ("gamma", "moving_variance"):
            drawn.append(rng.uniform(0.8, 1.2, shape))
        else:
            drawn.append(rng.uniform(-0.1, 0.1, shape))
    head = next(n for n, variable in enumerate(model.variables) if variable.path.startswith("logits"))
    drawn[head] -= drawn[head].mean(axis=0)  # or all images would lie far on one side of every finding
    for variable, values in zip(model.variables, drawn, strict=True):
        variable.assign(values.astype("float32"))


def write_seeded_run(folder, blocks=(), backbone="densenet121"):
    """Writes the files that `export_model` reads, with weights of a network in mixed bfloat16; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    stride = 16 if backbone.startswith("densenet") else 32
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = build_classifier(backbone, output_stride=stride, blocks=blocks)
    finally:
        keras.config.set_dtype_policy(before)
    draw_weights(model)
    model.save_weights(folder / "model.weights.h5")
    weights_sha256 = hashlib.sha256((folder / "model.weights.h5").read_bytes()).hexdigest()
    run = {
        "classes": list(PATHOLOGIES),
        "side": SIDE,
        "backbone": backbone,
        "output_stride": stride,
        "blocks": list(blocks),
        "study": "seeded",
        "synthetic": True,
        "split": {"name": "official", "sha256": "5" * 64, "patients": {"train": 9, "val": 3, "test": 3}},
        "prevalence": dict(zip(PATHOLOGIES, np.linspace(0.02, 0.2, 14).round(4).tolist(), strict=True)),
        "weights_sha256": weights_sha256,
        "runtime": {"commit": "unknown", "tensorflow": "of this machine", "keras": keras.__version__},
    }
    points = {
        name: {
            "threshold": round(0.3 + 0.03 * k, 4),
            "calibration": {"method": "platt", "slope": round(0.6 + 0.05 * k, 4), "intercept": round(0.1 * (k - 7), 4)},
        }
        for k, name in enumerate(PATHOLOGIES)
    }
    cells = SIDE // stride
    maps = np.linspace(-1, 1, cells * cells * 14).reshape(cells, cells, 14).tolist()
    others = {"thresholds": {"pathologies": points}, "reference_maps": {"films": 9, "maps": maps}}
    for name, content in {"run": run, **others}.items():
        (folder / f"{name}.json").write_text(json.dumps({"weights_sha256": weights_sha256} | content))
    return folder
