"""The network, the settings and the optimizer of notebook 2, taken out of the notebook itself."""

import json
from pathlib import Path

import numpy as np

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "02_train_densenet121.ipynb"
SIZES = {"small": (64, 16), "full": None, "best": None}  # side in pixels and global batch; None: those of the profile


def load_recipe(profile="full"):
    """Reads settings and optimizer from notebook 2, so that what is checked is what is trained.

    Returns:
        Dict of the settings of `profile` with the recipe "ours", and `make_optimizer(peak, n_epochs)`.
    """
    import keras

    from helpers.runtime import check_settings
    from helpers.training import AdamW, scale_loss

    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    settings = next(cell for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    optimizer = next(cell for cell in cells if "".join(cell["source"]).startswith("def make_optimizer"))
    recipe = {"keras": keras, "AdamW": AdamW, "scale_loss": scale_loss, "steps_per_epoch": 100}
    exec("".join(settings["source"]), recipe)
    recipe |= check_settings(recipe | {"PROFILE": profile, "RUN_DIR": "models"})  # empty in the notebook: the last run
    if recipe["PRECISION"] == "auto":  # the large profiles are for accelerators
        recipe["PRECISION"] = "float32" if profile == "quick" else "mixed_bfloat16"
    recipe["batch_size"] = recipe["BATCH_SIZE"]
    exec("".join(optimizer["source"]), recipe)
    return recipe


def load_size(name):
    """Returns recipe, side in pixels and global batch of a size of `SIZES`; the recipe of "small" is that of "full"."""
    recipe = load_recipe("full" if SIZES[name] else name)
    return recipe, *(SIZES[name] or (recipe["IMAGE_SIZE"], recipe["BATCH_SIZE"]))


def build_model(recipe, *, shallow=False, fused=True, jit_compile="auto"):
    """Builds and compiles the model of notebook 2 from random weights.

    Args:
        recipe: from `load_recipe`.
        shallow: whether to leave one layer in each dense block: the same kinds of layers, an eighth of their number.
        fused: whether batch normalization is TensorFlow's fused operation, as in notebook 2, or Keras's.
        jit_compile: as in `keras.Model.compile`.
    """
    import keras

    from helpers.training import build_classifier, fuse_batch_norm, make_loss

    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(recipe["PRECISION"])
    model = build_classifier(
        recipe["BACKBONE"],
        batch_norm_momentum=recipe["BATCH_NORM_MOMENTUM"],
        output_stride=recipe["OUTPUT_STRIDE"],
        blocks=[1, 1, 1, 1] if shallow else recipe["BLOCKS"],
    )
    model = fuse_batch_norm(model) if fused else model
    labels = np.random.default_rng(0).random((200, model.output_shape[-1])) < 0.1
    optimizer = recipe["make_optimizer"](recipe["LEARNING_RATE"], recipe["EPOCHS"])
    loss = make_loss(recipe["LOSS"], labels.astype("float32"), recipe["LABEL_SMOOTHING"])
    model.compile(optimizer, loss, jit_compile=jit_compile)
    model.optimizer.build(model.trainable_variables)
    return model
