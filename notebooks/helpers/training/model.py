"""DenseNet-121 with its preprocessing inside: gray images of 0 to 255 in, one logit per finding out.

To add a backbone, write a builder beside `build_classifier` with the same input and output, and give its ends the same
layer names, which heatmaps, export and notebook 6 look up: "images" (input), "imagenet_scaling" (preprocessing), "relu"
(last map), "average" and "logits" (head). Call it in notebook 2, write its name into `run.json` there, and choose the
builder by that name in `load_classifier`. The loss is chosen by name in `losses.make_loss`.
"""

import functools
import json

import keras
import numpy as np

from ..runtime.files import as_path, hash_file, local_copy
from ..study.labels import PATHOLOGIES
from .model_files import ModelFileError, check_model_file, load_weights

# What the "torch" mode of keras.applications.densenet.preprocess_input does: ImageNet's channel statistics.
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_DEVIATION = (0.229, 0.224, 0.225)

# Layers of the four dense blocks.
_DENSENETS = {"densenet121": (6, 12, 24, 16), "densenet169": (6, 12, 32, 32), "densenet201": (6, 12, 48, 32)}
WEIGHTS_FILE = "densenet121_weights_tf_dim_ordering_tf_kernels_notop.h5"
WEIGHTS_URL = f"https://storage.googleapis.com/tensorflow/keras-applications/densenet/{WEIGHTS_FILE}"


def build_classifier(
    backbone="densenet121",
    *,
    weights="none",
    n_classes=len(PATHOLOGIES),
    batch_norm_momentum=0.99,
    output_stride=32,
    blocks=(),
):
    """Builds the classifier: gray to three channels, ImageNet scaling, backbone, global average, one dense layer.

    The layers lie flat in one model. The last convolutional map is `model.get_layer("relu").output` and the head is
    `model.get_layer("logits")`, so the class activation map is exact: its spatial mean plus the bias is the logit.
    The input may have any size from 32 pixels on; weights do not depend on it.

    Args:
        backbone: "densenet121", "densenet169" or "densenet201".
        weights: "none" (random start), "imagenet", or the path of a weights file of the network without its top.
        n_classes: int, outputs.
        batch_norm_momentum: float in (0, 1). Keras's 0.99 averages over a few hundred steps, too many for a short run
            from scratch.
        output_stride: input pixels per cell of the last map: 32, DenseNet's own, or 16, without its last pooling, for
            small images: at 80 pixels, 32 leaves 2 x 2 cells, in which nothing can be located. The weights have the
            same shapes.
        blocks: four ints, the layers of the dense blocks: fewer than the backbone's own for a quick test of all the
            rest; empty for its own.

    Returns:
        A keras.Model: float32 (batch, height, width, 1) in [0, 255] to float32 logits (batch, n_classes).

    Raises:
        FileNotFoundError: the weights are not here and cannot be downloaded; the message says what to put where.
        ModelFileError: the file holds other things than weights, see `check_model_file`.
        ValueError: there is no such backbone; `output_stride` is neither 16 nor 32; or ImageNet weights are wanted for
            other `blocks`.
    """
    if backbone not in _DENSENETS:
        raise ValueError(f'BACKBONE is "{backbone}"; expected {", ".join(_DENSENETS)}')
    own = _DENSENETS[backbone]
    blocks = tuple(blocks) or own
    if output_stride not in (16, 32):
        raise ValueError(f"output_stride is {output_stride}; expected 16 or 32")
    if weights == "imagenet" and blocks != own:
        raise ValueError(f'the "imagenet" weights are for blocks of {own} layers, not {blocks}')
    images = keras.Input((None, None, 1), name="images")
    channels = keras.layers.Concatenate(name="gray_to_rgb")([images] * 3)
    scale = [1 / (255 * deviation) for deviation in _IMAGENET_DEVIATION]
    offset = [-mean / deviation for mean, deviation in zip(_IMAGENET_MEAN, _IMAGENET_DEVIATION, strict=True)]
    scaled = keras.layers.Rescaling(scale, offset, name="imagenet_scaling")(channels)
    network = _build_backbone(None if weights == "none" else weights, scaled, blocks)
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = batch_norm_momentum
    if output_stride == 16:  # possible after building, since the input's sides are not fixed
        pool = network.get_layer("pool4_pool")
        pool.pool_size = pool.strides = (1, 1)
    features = keras.layers.GlobalAveragePooling2D(name="average")(network.output)
    logits = keras.layers.Dense(n_classes, dtype="float32", name="logits")(features)
    return keras.Model(images, logits, name=backbone)


def _build_backbone(weights, inputs, blocks):
    from keras.src.applications.densenet import DenseNet  # Keras offers the three networks of the paper only

    build = functools.partial(DenseNet, blocks)
    if weights not in (None, "imagenet") and not as_path(weights).is_file():
        raise FileNotFoundError(f'WEIGHTS is "{weights}", which is not a file. Use "none", "imagenet" or a path.')
    try:
        if weights in (None, "imagenet"):
            return build(include_top=False, weights=weights, input_tensor=inputs)
        with local_copy(weights) as file:
            check_model_file(file)  # keras.applications opens it itself
            return build(include_top=False, weights=str(file), input_tensor=inputs)
    except Exception as error:  # get_file raises a bare Exception when a download fails
        if weights != "imagenet":
            raise
        raise FileNotFoundError(
            f"The ImageNet weights cannot be downloaded ({error}). Fetch {WEIGHTS_URL} elsewhere and put it into "
            f'~/.keras/models/, or set WEIGHTS to its path, or to "none" to start from random weights.'
        ) from error


def backbone_layers(model):
    """Returns the list of layers to freeze while only the head is trained."""
    return [layer for layer in model.layers if layer.name not in ("images", "average", "logits")]


def set_output_bias(model, prevalence):
    """Sets the head's bias to the log-odds of each class, so that training need not learn them first.

    Args:
        model: from `build_classifier`.
        prevalence: float array (classes,) in [0, 1]; taken as at least 0.001, at most 0.999.
    """
    share = np.clip(np.asarray(prevalence, np.float64), 1e-3, 1 - 1e-3)
    head = model.get_layer("logits")
    head.bias.assign(np.log(share / (1 - share)).astype("float32"))


def load_classifier(run_dir, study=None, classes=PATHOLOGIES):
    """Rebuilds a trained classifier in float32 from `run.json` and `model.weights.h5`.

    Weights with the builder load in every Keras 3; a `.keras` file does not load in an older Keras than wrote it.

    Args:
        run_dir: path of the folder that 02_train_densenet121 wrote.
        study: the `PackedStudy` that the model is to be used on; None skips the check that it was trained on this one.
        classes: sequence of class names in the order that the caller will use.

    Returns:
        A keras.Model, see `build_classifier`.

    Raises:
        FileNotFoundError: there is no finished run in the folder.
        ModelFileError: the weights are damaged or not those recorded in `run.json`.
        ValueError: the model was trained on other classes, or on the same in another order; or on another split than
            the study's, so that its test images may have been trained on; or on images of another side.
    """
    run_dir = as_path(run_dir)
    for name in ("run.json", "model.weights.h5"):
        if not (run_dir / name).is_file():
            raise FileNotFoundError(f"{run_dir / name} is missing. Run 02_train_densenet121.ipynb with this RUN_DIR.")
    record = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    if list(record["classes"]) != list(classes):
        raise ValueError(f"The model in {run_dir} was trained on {record['classes']}, the data has {list(classes)}.")
    if study is not None and (record["split"]["sha256"], record["side"]) != (study.split_sha256, study.side):
        raise ValueError(
            f"The model in {run_dir} was trained on split {record['split']['name']} "
            f"({record['split']['sha256'][:12]}) at {record['side']} pixels, but {study.folder} holds split "
            f"{study.split_name} ({study.split_sha256[:12]}) at {study.side}. "
            "Use the SPLIT, PROFILE and PACKED_DIR of its training."
        )
    if record.get("weights_sha256", "") not in ("", hash_file(run_dir / "model.weights.h5")):
        raise ModelFileError(
            f"{run_dir / 'model.weights.h5'} was altered: its SHA-256 is not that of run.json. Run "
            "02_train_densenet121.ipynb again, or fetch the file again."
        )
    shape = {"output_stride": record.get("output_stride", 32), "blocks": record.get("blocks", ())}
    model = build_classifier(record.get("backbone", "densenet121"), n_classes=len(classes), **shape)
    load_weights(model, run_dir / "model.weights.h5")
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
    return model.predict(dataset, verbose=verbose)[:n_images].astype(np.float32)


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
