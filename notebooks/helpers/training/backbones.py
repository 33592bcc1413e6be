"""The backbones of the classifier: networks of keras.applications, each with its own preprocessing.

To add one, add a row to `BACKBONES` and, for shallow copies in tests, a branch to `_build_shallow`. It must end in a
map; `model.build_classifier` adds the global average and the head, so that class activation maps are exact.
"""

from dataclasses import dataclass

import keras

_WEIGHTS = "https://storage.googleapis.com/tensorflow/keras-applications"
# keras.applications.densenet.preprocess_input in its "torch" mode, and the layer that Keras's ConvNeXt begins with:
# from [0, 255] to ImageNet's statistics of each channel.
_DEVIATIONS = (0.229, 0.224, 0.225)
_IMAGENET = {
    "scale": [1 / (255 * deviation) for deviation in _DEVIATIONS],
    "offset": [-mean / deviation for mean, deviation in zip((0.485, 0.456, 0.406), _DEVIATIONS, strict=True)],
}


@dataclass(frozen=True)
class Backbone:
    """What is known of a backbone.

    Attributes:
        title: its name in prose.
        paper: where it was published.
        network: its class in keras.applications.
        blocks: tuple of ints, the blocks of each of its stages.
        weights_url: address of Keras's ImageNet weights without the top.
        preprocessing: dict of `scale` and `offset`, lists of a number for each of three channels in [0, 255], as
            `keras.layers.Rescaling` takes them.
    """

    title: str
    paper: str
    network: str
    blocks: tuple
    weights_url: str
    preprocessing: dict


def _describe_densenet(depth, blocks):
    address = f"{_WEIGHTS}/densenet/densenet{depth}_weights_tf_dim_ordering_tf_kernels_notop.h5"
    return Backbone(f"DenseNet-{depth}", "Huang et al., CVPR 2017", f"DenseNet{depth}", blocks, address, _IMAGENET)


BACKBONES = {
    "densenet121": _describe_densenet(121, (6, 12, 24, 16)),
    "densenet169": _describe_densenet(169, (6, 12, 32, 32)),
    "densenet201": _describe_densenet(201, (6, 12, 48, 32)),
    "convnext_base": Backbone(
        title="ConvNeXt-Base",
        paper="Liu et al., CVPR 2022",
        network="ConvNeXtBase",
        blocks=(3, 3, 27, 3),
        weights_url=f"{_WEIGHTS}/convnext/convnext_base_notop.h5",
        preprocessing=_IMAGENET,
    ),
    "efficientnetv2_s": Backbone(
        title="EfficientNetV2-S",
        paper="Tan and Le, ICML 2021",
        network="EfficientNetV2S",
        blocks=(2, 4, 4, 6, 9, 15),
        weights_url=f"{_WEIGHTS}/efficientnet_v2/efficientnetv2-s_notop.h5",
        preprocessing={"scale": [1 / 128] * 3, "offset": [-1.0] * 3},  # as Keras's own first layer for this network
    ),
}


def find_backbone(name, blocks=(), output_stride=32):
    """Looks a backbone up and checks that the settings of its shape fit it.

    Args:
        name: key of `BACKBONES`.
        blocks: see `model.build_classifier`.
        output_stride: see `model.build_classifier`.

    Returns:
        A `Backbone`.

    Raises:
        ValueError: there is no such backbone, or the settings are not for it; one sentence with the remedy.
    """
    if name not in BACKBONES:
        raise ValueError(f'BACKBONE is "{name}"; expected one of {", ".join(BACKBONES)}')
    found = BACKBONES[name]
    if blocks and len(blocks) != len(found.blocks):
        raise ValueError(
            f"BLOCKS has {len(blocks)} numbers, {found.title} has {len(found.blocks)} stages; set it to [] for its own"
        )
    if output_stride == 16 and not name.startswith("densenet"):
        raise ValueError(f"OUTPUT_STRIDE = 16 is for DenseNets only; set it to 32 for {found.title}")
    return found


def build_network(name, inputs, weights=None, blocks=()):
    """Builds a backbone without its top.

    Args:
        name: key of `BACKBONES`.
        inputs: symbolic float tensor (batch, height, width, 3), preprocessed.
        weights: None (random start) or "imagenet", which Keras downloads.
        blocks: blocks of each stage; empty for the backbone's own.

    Returns:
        A keras.Model from the inputs of `inputs` to the last map. ConvNeXt's map ends in a layer normalization of each
        cell, as in Keras without a top; in the paper it follows the average, where no map would be exact.
    """
    options = {"include_top": False, "weights": weights, "input_tensor": inputs}
    if not name.startswith("densenet"):
        options["include_preprocessing"] = False  # `Normalization`, which cannot be written as ONNX
    if blocks and tuple(blocks) != BACKBONES[name].blocks:
        return _build_shallow(name, list(blocks), options)
    return getattr(keras.applications, BACKBONES[name].network)(**options)


def _build_shallow(name, blocks, options):
    from keras.src.applications import convnext, densenet, efficientnet_v2  # Keras offers the papers' sizes only

    if name == "convnext_base":
        return convnext.ConvNeXt(blocks, convnext.MODEL_CONFIGS["base"]["projection_dims"], name=name, **options)
    if name == "efficientnetv2_s":
        stages = efficientnet_v2.DEFAULT_BLOCKS_ARGS["efficientnetv2-s"]
        stages = [stage | {"num_repeat": number} for stage, number in zip(stages, blocks, strict=True)]
        return efficientnet_v2.EfficientNetV2(1.0, 1.0, 384, blocks_args=stages, name="efficientnetv2-s", **options)
    return densenet.DenseNet(blocks, **options)


def make_portable(model):
    """Rebuilds a model from operations that ONNX and LiteRT have; only ConvNeXt has others.

    Keras lets XLA compute a convolution with a group for each channel, and TensorFlow computes GELU by `erfc`.

    Args:
        model: functional keras.Model, in float32.

    Returns:
        A keras.Model with the same results up to rounding; the model itself if nothing is to be replaced.
    """

    def is_depthwise(layer):
        return type(layer) is keras.layers.Conv2D and layer.groups > 1 and layer.groups == layer.filters

    def rebuild(layer):
        config = layer.get_config()
        if is_depthwise(layer):
            same = ("name", "kernel_size", "strides", "padding", "dilation_rate", "use_bias")
            return keras.layers.DepthwiseConv2D(**{key: config[key] for key in same})
        return Gelu(name=layer.name) if _is_gelu(layer) else type(layer).from_config(config)

    if not any(is_depthwise(layer) or _is_gelu(layer) for layer in model.layers):
        return model
    portable = keras.models.clone_model(model, clone_function=rebuild)
    for layer in model.layers:
        weights = layer.get_weights()
        if is_depthwise(layer):
            weights[0] = weights[0].swapaxes(2, 3)
        portable.get_layer(layer.name).set_weights(weights)
    return portable


def _is_gelu(layer):
    return isinstance(layer, keras.layers.Activation) and layer.activation is keras.activations.gelu


class Gelu(keras.layers.Layer):
    """GELU by its definition, with `erf`."""

    def call(self, inputs):
        """Applies it to each element; returns the shape and dtype of the input."""
        return 0.5 * inputs * (1 + keras.ops.erf(inputs / 2**0.5))
