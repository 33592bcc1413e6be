"""Writes features of PyTorch networks of random weights, and these converted: a process of `convert_weights.py`.

Its Python has torch, torchvision, torchxrayvision and h5py. All weights are random, those of batch normalization too:
statistics as a new network has them would hide errors in the conversion.

Usage: torch_features.py FOLDER SIDE NAME ..., names as in `NETWORKS`. FOLDER gets NAME.h5, and NAME.npz with `images`
(n, side, side), 0 to 255, and `features`, the last map, (n, channels, h, w). Prints the versions as JSON.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import convert_weights

MEANS, DEVIATIONS = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def scale_as_imagenet(images):
    """Scales gray images as torchvision's `Normalize` does."""
    return (torch.from_numpy(images)[:, None] / 255 - MEANS) / DEVIATIONS


def build_torchvision(name):
    """Returns a torchvision network with random weights, its last map as a function, and its scaling."""
    import torchvision

    model = torchvision.models.get_model(name, weights=None)
    if name == "densenet121":
        return model, lambda x: torch.relu(model.features(x)), scale_as_imagenet, torchvision.__version__
    norm = model.classifier[0]  # the classifier here normalizes each cell, before the average
    return model, lambda x: norm(model.features(x)), scale_as_imagenet, torchvision.__version__


def build_torchxrayvision(name):
    """Returns a torchxrayvision network with random weights, its last map as a function, and its scaling."""
    import torchxrayvision

    def scale(images):
        return torch.from_numpy(torchxrayvision.utils.normalize(images, 255)[:, None])

    model = torchxrayvision.models.DenseNet(weights=None)
    model.features.conv0.weight.data /= 1024  # as training would, or all features would be in the thousands
    return model, lambda x: torch.relu(model.features(x)), scale, torchxrayvision.__version__


NETWORKS = {
    "torchvision densenet121": (build_torchvision, "densenet121"),
    "torchvision convnext_base": (build_torchvision, "convnext_base"),
    "torchxrayvision densenet121": (build_torchxrayvision, "densenet121"),
}


def randomize(model):
    """Draws what a new network has as constants: scales, offsets, statistics, biases; some channels hardly vary."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or "op_threshs" in name:
            continue
        kind = name.rsplit(".", 1)[1]
        if kind == "running_var":
            tensor.uniform_(0.5, 2.0)
            tensor[::16] = 1e-6
        elif kind == "layer_scale" or (kind == "weight" and tensor.ndim == 1):
            tensor.uniform_(0.5, 1.5)
            if kind == "weight" and name.replace("weight", "running_var") in model.state_dict():
                tensor[::16] *= 1e-3  # or what hardly varies would be multiplied by a thousand
        elif kind in ("bias", "running_mean"):
            tensor.uniform_(-0.2, 0.2)


def main():
    """Writes what the command line names."""
    folder, side, names = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    versions = {"torch": torch.__version__}
    torch.manual_seed(0)
    images = np.random.default_rng(0).uniform(0, 255, (2, side, side)).astype("float32")
    for name in names:
        build, backbone = NETWORKS[name]
        model, compute_map, scale, version = build(backbone)
        versions[name.split()[0]] = version
        model.eval()
        with torch.no_grad():
            randomize(model)
            features = compute_map(scale(images)).numpy()
        record = {"source": f"{name}, random", "trained_on": [], "seen_test_images": False}
        convert_weights.write_weights(folder / f"{name}.h5", model, backbone, record)
        np.savez(folder / f"{name}.npz", images=images, features=features)
    print(json.dumps(versions))


if __name__ == "__main__":
    main()
