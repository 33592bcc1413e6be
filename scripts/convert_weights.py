"""Converts pretrained PyTorch networks into weights that notebook 2 starts from: `SET="WEIGHTS=start.h5"`.

Runs in a Python that has PyTorch, such as that of `make .venv/peers/ready`:

    .venv/peers/bin/python scripts/convert_weights.py torchvision/densenet121 start.h5

The library downloads the weights, or finds them in its cache. The file has the layout of keras.applications without the
top, and a record of where the weights come from in its attribute `provenance`.

Usage: convert_weights.py NAME OUT, with a NAME of torchvision/densenet121, torchvision/convnext_base,
torchxrayvision/densenet121-res224-nih or another of torchxrayvision's densenet121-res224-... (all, rsna, pc, chex,
mimic_nb, mimic_ch).
"""

import argparse
import hashlib
import json
import os
from pathlib import Path

import h5py
import numpy as np

# What torchxrayvision names its data sets by in the files of its weights. Those in the second table hold images of NIH
# ChestX-ray14, and were split at random, not by NIH's official lists (torchxrayvision, issue 47): the Google labels and
# the RSNA Pneumonia Detection Challenge ("kaggle") are of NIH's images too.
_OTHERS = {
    "pc": "PadChest",
    "chex": "CheXpert",
    "mimic_ch": "MIMIC-CXR",
    "mimic_nb": "MIMIC-CXR",
    "openi": "Open-i",
}
_OF_NIH = {
    "nih": "NIH ChestX-ray14",
    "google": "NIH ChestX-ray14, Google's labels",
    "kaggle": "RSNA Pneumonia Challenge",
}

_KERAS_EPSILON, _TORCH_EPSILON = 1.001e-5, 1e-5  # of batch normalization in the DenseNets of both
# ImageNet's mean and deviation of each channel, by which the classifier scales gray / 255.
_MEANS, _DEVIATIONS = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))


def convert_densenet(arrays):
    """Converts the features of a DenseNet of torchvision or torchxrayvision.

    Args:
        arrays: dict from names in PyTorch's state dict to arrays. A first convolution of one channel is that of
            torchxrayvision, for images of -1024 to 1024.

    Returns:
        List of (layer, arrays), in the order of keras.applications' DenseNet.
    """

    def conv(name):
        return [arrays[f"{name}.weight"].transpose(2, 3, 1, 0)]

    def norm(name):
        gamma, beta, mean, variance = (arrays[f"{name}.{k}"] for k in ("weight", "bias", "running_mean", "running_var"))
        # The same scale although Keras adds another epsilon, which shows where a channel hardly varies.
        return [gamma * np.sqrt((variance + _KERAS_EPSILON) / (variance + _TORCH_EPSILON)), beta, mean, variance]

    (kernel,) = conv("features.conv0")
    layers = [("conv1_conv", [kernel if kernel.shape[2] == 3 else _spread_kernel(kernel)])]
    layers += [("conv1_bn", norm("features.norm0"))]
    for block in range(1, 5):
        number = 1
        while f"features.denseblock{block}.denselayer{number}.conv1.weight" in arrays:
            theirs, ours = f"features.denseblock{block}.denselayer{number}", f"conv{block + 1}_block{number}"
            layers += [(f"{ours}_0_bn", norm(f"{theirs}.norm1")), (f"{ours}_1_conv", conv(f"{theirs}.conv1"))]
            layers += [(f"{ours}_1_bn", norm(f"{theirs}.norm2")), (f"{ours}_2_conv", conv(f"{theirs}.conv2"))]
            number += 1
        if block < 4:
            theirs, ours = f"features.transition{block}", f"pool{block + 1}"
            layers += [(f"{ours}_bn", norm(f"{theirs}.norm")), (f"{ours}_conv", conv(f"{theirs}.conv"))]
    return [*layers, ("bn", norm("features.norm5"))]


def _spread_kernel(kernel):
    """Spreads a kernel for one channel of -1024 to 1024 over three that are scaled as for ImageNet.

    Channel c is (gray / 255 - mean_c) / deviation_c. The weights a_c of the three copies of the kernel are the smallest
    whose sum over the channels is 2048 * gray / 255 - 1024 for every gray level. No offset is left over, so the border,
    which both networks pad with zeros after scaling, is the same as well.
    """
    equations = np.stack([1 / _DEVIATIONS, _MEANS / _DEVIATIONS])
    shares, *_ = np.linalg.lstsq(equations, np.array([2048.0, 1024.0]), rcond=None)
    return kernel.astype(float) * shares[:, None]


def convert_convnext(arrays):
    """Converts the features of a ConvNeXt of torchvision, as `convert_densenet` does.

    The last layer normalization, which torchvision applies to the average of the map, goes to the one that Keras
    applies to each cell of it.
    """

    def conv(name):
        return [arrays[f"{name}.weight"].transpose(2, 3, 1, 0), arrays[f"{name}.bias"]]

    def dense(name):
        return [arrays[f"{name}.weight"].T, arrays[f"{name}.bias"]]

    def norm(name):
        return [arrays[f"{name}.weight"], arrays[f"{name}.bias"]]

    layers = [("convnext_base_stem", conv("features.0.0") + norm("features.0.1"))]
    for stage in range(4):
        if stage:
            block = norm(f"features.{2 * stage}.0") + conv(f"features.{2 * stage}.1")
            layers.append((f"convnext_base_downsampling_block_{stage - 1}", block))
        number = 0
        while f"features.{2 * stage + 1}.{number}.layer_scale" in arrays:
            theirs, ours = f"features.{2 * stage + 1}.{number}", f"convnext_base_stage_{stage}_block_{number}"
            layers += [(f"{ours}_depthwise_conv", conv(f"{theirs}.block.0"))]
            layers += [(f"{ours}_layernorm", norm(f"{theirs}.block.2"))]
            layers += [(f"{ours}_pointwise_conv_1", dense(f"{theirs}.block.3"))]
            layers += [(f"{ours}_pointwise_conv_2", dense(f"{theirs}.block.5"))]
            layers += [(f"{ours}_layer_scale", [arrays[f"{theirs}.layer_scale"].ravel()])]
            number += 1
    return [*layers, ("layer_normalization", norm("classifier.0"))]


CONVERTERS = {"densenet121": convert_densenet, "convnext_base": convert_convnext}


def write_weights(path, model, backbone, record):
    """Converts a PyTorch model and writes the file.

    Args:
        path: path of the file, which ends in `.h5`, since Keras chooses the layout by that.
        model: torch.nn.Module.
        backbone: key of `CONVERTERS`.
        record: dict with `source`, `trained_on` and `seen_test_images`, and what else is known.
    """
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
    layers = CONVERTERS[backbone](arrays)
    draft = path.with_name("part-" + path.name)
    with h5py.File(draft, "w") as file:
        file.attrs["layer_names"] = [name.encode() for name, _ in layers]
        file.attrs["provenance"] = json.dumps({"backbone": backbone, **record})
        for name, values in layers:
            group = file.create_group(name)
            group.attrs["weight_names"] = [f"weight_{number}".encode() for number in range(len(values))]
            for number, value in enumerate(values):
                group.create_dataset(f"weight_{number}", data=np.ascontiguousarray(value, "float32"))
    os.replace(draft, path)


def load_pretrained(name):
    """Loads a network with the weights that its library offers.

    Args:
        name: see the module's docstring.

    Returns:
        torch.nn.Module, its key in `CONVERTERS`, and the record for `write_weights`.
    """
    library, _, wanted = name.partition("/")
    if library == "torchxrayvision" and wanted.startswith("densenet121-res224-"):
        import torchxrayvision

        if wanted not in torchxrayvision.models.model_urls:
            raise SystemExit(f"{wanted} is not among torchxrayvision's weights: {', '.join(_list_names())}")
        model = torchxrayvision.models.DenseNet(weights=wanted)
        url = torchxrayvision.models.model_urls[wanted]["weights_url"]  # its file is named by the data sets
        sets = url.rsplit("/", 1)[1].partition("-densenet121")[0].split("-")
        record = {
            "source": f"torchxrayvision {torchxrayvision.__version__}, {wanted}",
            "trained_on": [(_OF_NIH | _OTHERS).get(part, part) for part in sets],
            "seen_test_images": any(part in _OF_NIH for part in sets) or (None if set(sets) - {*_OTHERS} else False),
        }
        return model, "densenet121", record | _describe_file(Path(model.weights_filename_local), url)
    if library == "torchvision" and wanted in CONVERTERS:
        import torch
        import torchvision

        weights = torchvision.models.get_model_weights(wanted).DEFAULT
        model = torchvision.models.get_model(wanted, weights=weights)
        record = {"source": f"torchvision {torchvision.__version__}, {weights}", "trained_on": ["ImageNet"]}
        file = Path(torch.hub.get_dir(), "checkpoints", weights.url.rsplit("/", 1)[1])
        return model, wanted, record | {"seen_test_images": False} | _describe_file(file, weights.url)
    raise SystemExit(f"{name} is not known; expected {', '.join(_list_names())}")


def _list_names():
    models = [f"torchvision/{name}" for name in CONVERTERS]
    sets = ("all", "nih", "rsna", "pc", "chex", "mimic_nb", "mimic_ch")
    return [*models, *(f"torchxrayvision/densenet121-res224-{name}" for name in sets)]


def _describe_file(file, url):
    return {"url": url, "url_sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def main():
    """Converts what the command line names, and prints the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help=", ".join(_list_names()))
    parser.add_argument("out", type=Path, help="file to write, such as start.h5")
    arguments = parser.parse_args()
    if arguments.out.suffix != ".h5" or arguments.out.name.endswith(".weights.h5"):
        parser.error("OUT must end in .h5 and not in .weights.h5, by which Keras knows another layout")
    model, backbone, record = load_pretrained(arguments.name)
    write_weights(arguments.out, model, backbone, record)
    print(json.dumps({"backbone": backbone, **record}, indent=1))


if __name__ == "__main__":
    main()
