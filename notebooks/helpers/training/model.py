"""The classifier with its preprocessing inside: gray images of 0 to 255 in, one logit per finding out.

Its ends have the same names whatever the backbone: "images" (input), "preprocessing", "average" (what it reads is the
last map) and "logits" (head). `backbones.py` has the backbones; the loss is chosen by name in `losses.make_loss`.
"""

import functools

import keras
import numpy as np

from ..runtime.files import as_path, hash_file
from .backbones import build_network, find_backbone
from .model_files import ModelFileError, load_weights
from .run_record import check_study, read_run


def build_classifier(
    backbone="densenet121",
    *,
    n_classes=14,
    weights="none",
    batch_norm_momentum=0.99,
    output_stride=32,
    blocks=(),
):
    """Builds the classifier: gray to three channels, preprocessing, backbone, global average, one dense layer.

    The last map is `model.get_layer("average").input` and the head is `model.get_layer("logits")`, so the class
    activation map is exact: its spatial mean plus the bias is the logit. The input may have any size from 32 pixels on;
    weights do not depend on it.

    Args:
        backbone: key of `backbones.BACKBONES`.
        n_classes: int, outputs, one a finding; NIH has 14.
        weights: "none" (random start), "imagenet", or the path of a weights file: of the network without its top, as
            keras.applications has it and `scripts/convert_weights.py` writes it, or of an earlier run on the same
            backbone, whose head is not used.
        batch_norm_momentum: float in (0, 1). Keras's 0.99 averages over a few hundred steps, too many for a short run
            from scratch.
        output_stride: input pixels per cell of the last map: 32, the backbones' own, or 16, a DenseNet without its last
            pooling, for small images: at 80 pixels, 32 leaves 2 x 2 cells, in which nothing can be located. The weights
            have the same shapes.
        blocks: ints, the blocks of each stage of the backbone: fewer than its own for a quick test of all the rest;
            empty for its own.

    Returns:
        A keras.Model: float32 (batch, height, width, 1) in [0, 255] to float32 logits (batch, n_classes).

    Raises:
        FileNotFoundError: the weights are not here and cannot be downloaded; the message says what to put where.
        ModelFileError: the file holds other things than weights, see `check_model_file`, or those of another network.
        ValueError: there is no such backbone, or the settings of its shape are not for it; or ImageNet weights are
            wanted for other `blocks` than its own.
    """
    known = find_backbone(backbone, blocks, output_stride)
    if weights == "imagenet" and tuple(blocks) not in ((), known.blocks):
        raise ValueError(
            f'the "imagenet" weights are for BLOCKS = {list(known.blocks)}; leave it empty, or set WEIGHTS'
        )
    images = keras.Input((None, None, 1), name="images")
    channels = keras.layers.Concatenate(name="gray_to_rgb")([images] * 3)
    scaled = keras.layers.Rescaling(**known.preprocessing, name="preprocessing")(channels)
    network = _build_with_weights(backbone, weights, scaled, blocks)
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = batch_norm_momentum
    if output_stride == 16:  # possible after building, since the input's sides are not fixed
        pool = network.get_layer("pool4_pool")
        pool.pool_size = pool.strides = (1, 1)
    features = keras.layers.GlobalAveragePooling2D(name="average")(network.output)
    logits = keras.layers.Dense(n_classes, dtype="float32", name="logits")(features)
    return keras.Model(images, logits, name=backbone)


def _build_with_weights(backbone, weights, inputs, blocks):
    if weights == "none":
        return build_network(backbone, inputs, blocks=blocks)
    if weights == "imagenet":
        try:
            return build_network(backbone, inputs, "imagenet")
        except Exception as error:  # get_file raises a bare Exception when a download fails
            raise FileNotFoundError(
                f"The ImageNet weights cannot be downloaded ({error}). Fetch {find_backbone(backbone).weights_url} "
                'elsewhere and put it into ~/.keras/models/, or set WEIGHTS to its path, or to "none" to start from '
                "random weights."
            ) from error
    if not as_path(weights).is_file():
        raise FileNotFoundError(f'WEIGHTS is "{weights}", which is not a file. Use "none", "imagenet" or a path.')
    network = build_network(backbone, inputs, blocks=blocks)
    load_weights(network, weights)
    return network


def backbone_layers(model):
    """Returns the list of layers to freeze while only the head is trained."""
    return [layer for layer in model.layers if layer.name not in ("images", "average", "logits")]


def set_output_bias(model, prevalence):
    """Sets the head's bias to the log-odds of each class, so that training need not learn them first.

    Args:
        model: from `build_classifier`.
        prevalence: float array (classes,) in [0, 1]; taken as at least 0.001, at most 0.999, and as one half where NaN.
    """
    share = np.clip(np.nan_to_num(np.asarray(prevalence, np.float64), nan=0.5), 1e-3, 1 - 1e-3)
    head = model.get_layer("logits")
    head.bias.assign(np.log(share / (1 - share)).astype("float32"))


def load_classifier(run_dir, study=None):
    """Rebuilds a trained classifier in float32 from `run.json` and `model.weights.h5`.

    Weights with the builder load in every Keras 3; a `.keras` file does not load in an older Keras than wrote it.

    Args:
        run_dir: path of the folder that 02_train_densenet121 wrote.
        study: the `PackedStudy` that the model is to be used on; None skips the check that it was trained on this one.

    Returns:
        A keras.Model, see `build_classifier`; its outputs are the `classes` of `read_run`.

    Raises:
        FileNotFoundError: there is no finished run in the folder.
        ModelFileError: the weights are damaged or not those recorded in `run.json`.
        ValueError: the model was trained for other findings, on another split or at another side, see `check_study`.
    """
    run_dir = as_path(run_dir)
    record = read_run(run_dir)
    if study is not None:
        check_study(run_dir, record, study)
    weights = run_dir / "model.weights.h5"
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} is missing. Run 02_train_densenet121.ipynb with this RUN_DIR.")
    if record.get("weights_sha256", "") not in ("", hash_file(weights)):
        raise ModelFileError(
            f"{weights} was altered: its SHA-256 is not that of run.json. Run "
            "02_train_densenet121.ipynb again, or fetch the file again."
        )
    shape = {"output_stride": record["output_stride"], "blocks": record["blocks"]}
    model = build_classifier(record["backbone"], n_classes=len(record["classes"]), **shape)
    load_weights(model, weights)
    return model


def predict_logits(model, dataset, n_images, verbose=0):
    """Predicts every image of an evaluation dataset once.

    Args:
        model: from `build_classifier`.
        dataset: from `make_eval_dataset`.
        n_images: int, images without the padding of the last batch.
        verbose: as in `keras.Model.predict`.

    Returns:
        float32 array (n_images, classes), in the order of the dataset.
    """
    if not n_images:
        return np.zeros((0, model.output_shape[-1]), np.float32)
    if _count_processes() > 1:
        return np.concatenate(list(_predict_on_hosts(model, dataset)))[:n_images].astype(np.float32)
    # `predict` takes it too, and TensorFlow would unroll so many batches into one graph.
    group, model.steps_per_execution = model.steps_per_execution, 1
    try:
        return model.predict(dataset, verbose=verbose)[:n_images].astype(np.float32)
    finally:
        model.steps_per_execution = group


def _count_processes():
    if keras.backend.backend() != "jax":
        return 1
    import jax

    return jax.process_count()


def _predict_on_hosts(model, dataset):
    """Yields the logits of each batch: every host computes its share, and all get the whole.

    `keras.Model.predict` cannot do this: it tries to read values on the other hosts' devices.
    """
    import jax
    from jax.experimental import multihost_utils

    variables = [[v.value for v in some] for some in (model.trainable_variables, model.non_trainable_variables)]
    forward = _compile_forward(model)
    for images, *_ in dataset:
        own = np.split(images.numpy(), jax.process_count())[jax.process_index()]
        layout = keras.distribution.distribution().get_data_layout(images.shape).backend_layout
        logits = forward(*variables, jax.make_array_from_process_local_data(layout, own))
        yield np.asarray(multihost_utils.process_allgather(logits, tiled=True))


@functools.lru_cache(maxsize=1)  # compiling takes minutes, and validation comes after every epoch
def _compile_forward(model):
    import jax

    return jax.jit(lambda *arguments: model.stateless_call(*arguments, training=False)[0])
