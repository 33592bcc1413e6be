"""The network, the settings and the optimizer of notebook 2, taken out of the notebook itself."""

import json
from pathlib import Path

import numpy as np

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "02_train_densenet121.ipynb"
SIZES = {"small": (64, 16), "full": None}  # side in pixels and global batch; full: what the notebook trains with


def load_recipe(profile="full"):
    """Reads settings and optimizer from notebook 2, so that what is checked is what is trained.

    Returns:
        Dict of the settings of `profile` with the recipe "ours", and `make_optimizer(peak, n_epochs)`.
    """
    import keras

    from helpers.runtime import choose_settings

    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    settings = next(cell for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    optimizer = next(cell for cell in cells if "".join(cell["source"]).startswith("def make_optimizer"))
    recipe = {"keras": keras, "steps_per_epoch": 100}
    exec("".join(settings["source"]), recipe)
    recipe |= choose_settings(recipe, profile, "ours")
    exec("".join(optimizer["source"]), recipe)
    return recipe


def choose_size(name, recipe):
    """Returns side in pixels and global batch of a size."""
    return SIZES[name] or (recipe["IMAGE_SIZE"], recipe["BATCH_SIZE"])


def build_model(recipe, *, shallow=False, frozen_statistics=False, fused=True, jit_compile="auto"):
    """Builds and compiles the model of notebook 2 from random weights.

    Args:
        recipe: from `load_recipe`.
        shallow: whether to leave one layer in each dense block: the same kinds of layers, an eighth of their number.
        frozen_statistics: whether batch normalization keeps the statistics that it has.
        fused: whether batch normalization is TensorFlow's fused operation, as in notebook 2, or Keras's.
        jit_compile: as in `keras.Model.compile`.
    """
    import keras

    from helpers.training import build_classifier, fuse_batch_norm, make_loss

    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(recipe["PRECISION"])
    model = build_classifier(
        batch_norm_momentum=recipe["BATCH_NORM_MOMENTUM"],
        output_stride=recipe["OUTPUT_STRIDE"],
        blocks=[1, 1, 1, 1] if shallow else recipe["BLOCKS"],
    )
    model = fuse_batch_norm(model) if fused else model
    for layer in model.layers:
        layer.trainable = not (frozen_statistics and isinstance(layer, keras.layers.BatchNormalization))
    labels = np.random.default_rng(0).random((200, model.output_shape[-1])) < 0.1
    optimizer = recipe["make_optimizer"](recipe["LEARNING_RATE"], recipe["EPOCHS"])
    model.compile(optimizer, make_loss(recipe["LOSS"], labels.astype("float32")), jit_compile=jit_compile)
    model.optimizer.build(model.trainable_variables)
    return model


def count_forward_flops(model, side):
    """Counts the operations of an image's forward pass: two for each multiplication of a layer with a kernel."""
    import keras

    layers = [layer for layer in model.layers if hasattr(layer, "kernel")]
    outputs = keras.Model(model.inputs, [layer.output for layer in layers])
    shapes = outputs.compute_output_shape((1, side, side, 1))
    return sum(
        2 * np.prod(layer.kernel.shape) * np.prod(shape[1:-1]) for layer, shape in zip(layers, shapes, strict=True)
    )
