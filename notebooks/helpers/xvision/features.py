"""Features of images from a network that stays as it is, computed once and kept on disk as memory-mapped arrays.

A bank is a folder with `codes.npy` and, written last, `bank.json`, which says what the codes are of: which images, which
network with which weights and preprocessing. Codes that were computed halfway are gone on with.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from ..fetch.downloads import assert_space
from ..packing.image_files import ImageError
from ..runtime.files import as_path, hash_file, is_remote, write_text
from ..training.model import load_densenet121
from ..training.model_files import check_model_file
from .cohorts import find_broken_image, make_cohort_dataset

FORMAT = 1  # of a bank; a reader refuses any other
_SAVE_SECONDS = 20  # between two records of how far a bank is


@dataclass(frozen=True)
class Backbone:
    """A network up to one of its layers, with its preprocessing inside.

    Attributes:
        model: keras.Model, float32 (n, side, side, 1) in [0, 255] to codes (n, h, w, channels).
        facts: dict of what its codes depend on: `backbone`, `layer`, `side` (pixels), `weights` (where they come from),
            `weights_sha256`, `scale` and `offset` (of the preprocessing, a number a channel).
    """

    model: keras.Model
    facts: dict


@dataclass(frozen=True)
class FeatureCache:
    """The codes of a cohort.

    Attributes:
        folder: path of the bank's folder.
        codes: (images, h, w, channels) float16 or float32, mapped from disk.
        facts: dict as in `bank.json`.
        seconds: that computing took, reading and decoding images included.
    """

    folder: os.PathLike
    codes: np.ndarray
    facts: dict
    seconds: float


def build_backbone(name="VGG16", weights="none", *, side=224, layer=None):
    """Builds a network of keras.applications, from gray images to the output of one of its layers.

    Args:
        name: class in keras.applications, such as "VGG16" or "ResNet50V2".
        weights: "imagenet", "none" for random ones (features of no training at all), or the path of a file with the
            weights of the network without its top.
        side: int, pixels, of the square images. VGG16's last pooling gives 7 x 7 x 512 numbers of 224.
        layer: name of the layer; None for the network's last one, `block5_pool` of VGG16.

    Returns:
        A `Backbone`.

    Raises:
        FileNotFoundError: there is no such file of weights, or they cannot be downloaded.
        ModelFileError: the file of weights holds anything else, see `check_model_file`.
        ValueError: there is no such network or layer.
    """
    build = getattr(keras.applications, name, None)
    if not isinstance(build, type(keras.applications.VGG16)):
        raise ValueError(f"{name!r} is no network of keras.applications; expected such as VGG16 or ResNet50V2")
    images = keras.Input((side, side, 1), name="images")
    scale, offset = _measure_preprocessing(build)
    channels = keras.layers.Concatenate(name="gray_to_rgb")([images] * 3)
    scaled = keras.layers.Rescaling(scale, offset, name="preprocessing")(channels)
    if weights not in ("imagenet", "none"):
        path = as_path(weights)
        if not path.is_file():
            raise FileNotFoundError(f'weights are "{weights}", but there is no such file')
        check_model_file(path)  # keras.applications opens it itself
    try:
        network = build(include_top=False, weights=None if weights == "none" else str(weights), input_tensor=scaled)
    except Exception as error:  # get_file raises a bare Exception when a download fails
        if weights != "imagenet":
            raise
        raise FileNotFoundError(
            f"The ImageNet weights of {name} cannot be downloaded ({error}). Fetch Keras's file of them that ends in "
            '"notop.h5" elsewhere and give its path as weights, or "none" for random features.'
        ) from error
    if layer is not None and layer not in [known.name for known in network.layers]:
        raise ValueError(f"{name} has no layer {layer!r}; its last ones are {[k.name for k in network.layers[-5:]]}")
    source = weights if weights in ("imagenet", "none") else as_path(weights).name
    output = network.get_layer(layer).output if layer else network.output
    facts = {"backbone": name, "layer": layer or network.layers[-1].name, "side": side, "weights": source}
    return _as_backbone(keras.Model(images, output, name=name.lower()), facts | {"scale": scale, "offset": offset})


def load_trained_backbone(run_dir):
    """Takes the DenseNet-121 that notebook 2 trained, up to its last map.

    Args:
        run_dir: folder of the run.

    Returns:
        A `Backbone` for images of the side that the network was trained on.

    Raises:
        FileNotFoundError: there is no finished run in the folder.
        ModelFileError: its weights are damaged, hold anything else or are not those that `run.json` tells of.
        ValueError: `run.json` is damaged.
    """
    run_dir = as_path(run_dir)
    try:
        record = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
        side, study = record["side"], record["study"]
    except FileNotFoundError:
        record = {}  # load_densenet121 says what is missing
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{run_dir / 'run.json'} is damaged ({type(error).__name__}: {error}). Run 02_train_densenet121.ipynb "
            "again."
        ) from None
    trained = load_densenet121(run_dir)
    images = keras.Input((side, side, 1), name="images")
    model = keras.Model(images, keras.Model(trained.inputs, trained.get_layer("relu").output)(images), name="trained")
    scaling = trained.get_layer("imagenet_scaling")
    facts = {"backbone": "DenseNet121", "layer": "relu", "side": side, "weights": f"trained on {study}"}
    return _as_backbone(model, facts | {"scale": list(scaling.scale), "offset": list(scaling.offset)})


def write_feature_cache(cohort, backbone, folder, *, dtype="float16", batch_size=32, progress=None):
    """Computes the codes of a cohort's images, or finds that they are there; interrupted, it goes on where it was.

    Args:
        cohort: a `Cohort`.
        backbone: a `Backbone`.
        folder: where banks lie; each has a folder of its own there, named after what it is of.
        dtype: "float16" or "float32", of the codes on disk.
        batch_size: int, images at once.
        progress: callable such as `tqdm`, see `records.pack_study`.

    Returns:
        A `FeatureCache`.

    Raises:
        ImageError: an image cannot be decoded; with its name.
        ValueError: a finished bank is damaged; a code is too large for float16, or no number; or `folder` is in a
            bucket, from which nothing can be mapped.
        RuntimeError: another process computes the same bank.
        OSError: the codes cannot be written; before anything is computed where the disk has too little space.
    """
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype is {dtype!r}; expected float16 or float32")
    if is_remote(folder):
        raise ValueError(f"{folder} lies in a bucket, and features are mapped from a disk; choose a local FEATURES_DIR")
    facts = {"format": FORMAT, "cohort": cohort.name, "images_sha256": cohort.sha256, **backbone.facts, "dtype": dtype}
    facts["shape"] = [len(cohort), *backbone.model.output_shape[1:]]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    folder = as_path(folder) / f"{cohort.name}-{facts['backbone']}-{facts['layer']}-{facts['side']}-{key[:12]}".lower()
    if (folder / "bank.json").is_file():
        return load_feature_cache(folder, facts)
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        if not (folder / "bank.json").is_file():  # else another process has just finished it
            draft, seconds = _compute_codes(cohort, backbone, folder, facts, batch_size, progress)
            content = facts | {"seconds": round(seconds, 2), "codes_sha256": hash_file(draft)}
            os.replace(draft, folder / "codes.npy")
            write_text(folder / "bank.json", json.dumps(content, indent=1) + "\n")
            (folder / "progress.json").unlink(missing_ok=True)
    return load_feature_cache(folder, facts)


def load_feature_cache(folder, facts=None, *, verify=True):
    """Maps the codes of a finished bank.

    Args:
        folder: path of the bank's folder.
        facts: dict of what the codes have to be of, compared with `bank.json`; None takes whatever is there.
        verify: whether to hash the codes, some 1.5 GB a second, to notice a flipped bit. Their size is always checked.

    Returns:
        A `FeatureCache`.

    Raises:
        FileNotFoundError: there is no finished bank in the folder.
        ValueError: the codes are of other images or another network than asked for, cut short, or altered.
    """
    folder = as_path(folder)
    remedy = f"Delete {folder} to have them computed anew."
    if not (folder / "bank.json").is_file() or not (folder / "codes.npy").is_file():
        raise FileNotFoundError(f"{folder} holds no finished feature bank: bank.json or codes.npy is missing. {remedy}")
    try:
        held = json.loads((folder / "bank.json").read_text())
        told = [held["dtype"], held["shape"], held["codes_sha256"], held["seconds"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'bank.json'} is damaged ({type(error).__name__}: {error}). {remedy}") from None
    differing = [
        f"{name} is {held.get(name)}, not {value}" for name, value in (facts or {}).items() if held.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"{folder / 'codes.npy'} holds other features than asked for: {'; '.join(differing)}. {remedy}"
        )
    try:
        codes = np.load(folder / "codes.npy", mmap_mode="r")
    except ValueError as error:
        raise ValueError(f"{folder / 'codes.npy'} is cut short or damaged ({error}). {remedy}") from None
    if [str(codes.dtype), list(codes.shape)] != told[:2]:
        found = f"{codes.dtype} {list(codes.shape)}"
        raise ValueError(
            f"{folder / 'codes.npy'} holds {found}, bank.json says {held['dtype']} {held['shape']}. {remedy}"
        )
    if verify and hash_file(folder / "codes.npy") != held["codes_sha256"]:
        raise ValueError(f"{folder / 'codes.npy'} was altered: its SHA-256 is not that of bank.json. {remedy}")
    return FeatureCache(folder, codes, held, held["seconds"])


def _measure_preprocessing(build):
    """Finds scale and offset of each channel in a network's own preprocessing, which is linear in every mode of Keras.

    A gray image has three equal channels, so the order of channels that some modes turn around does not matter.
    """
    preprocess = sys.modules[build.__module__].preprocess_input
    black, white = (np.asarray(preprocess(np.full((1, 1, 3), level, "float32"))).ravel() for level in (0, 255))
    return ((white - black) / 255).astype(float).round(9).tolist(), black.astype(float).round(9).tolist()


def _as_backbone(model, facts):
    digest = hashlib.sha256()
    for weight in model.get_weights():
        digest.update(f"{weight.dtype} {weight.shape}".encode() + np.ascontiguousarray(weight).tobytes())
    model.trainable = False
    return Backbone(model, facts | {"weights_sha256": digest.hexdigest()})


@contextlib.contextmanager
def _lock(folder):
    """Keeps other processes from writing the same bank. The kernel lets go of the lock when a process ends."""
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"Another process computes the features in {folder}. Let it end, and this one only reads them; or stop "
                "it (in Jupyter, shut its kernel down)."
            ) from None
        except OSError:  # a mounted drive may know no locks
            pass
        yield
        (folder / "lock").unlink()  # whoever waits for it finds the bank finished


def _compute_codes(cohort, backbone, folder, facts, batch_size, progress):
    """Computes what an earlier call has not; returns the path of the codes and the seconds that all calls took."""
    draft, n_images = folder / "codes.part.npy", len(cohort)
    done, seconds = _find_progress(folder, draft, facts)
    if not done:  # a full disk would kill the process when it writes to the mapped file
        assert_space(folder, int(np.prod(facts["shape"])) * np.dtype(facts["dtype"]).itemsize)
    mode = {"mode": "r+"} if done else {"mode": "w+", "dtype": facts["dtype"], "shape": tuple(facts["shape"])}
    codes = np.lib.format.open_memmap(draft, **mode)
    bar = progress(total=n_images, unit="film", initial=done) if progress else None
    started = saved = time.monotonic()

    def save():
        codes.flush()
        write_text(
            folder / "progress.json",
            json.dumps({"facts": facts, "done": done, "seconds": seconds + time.monotonic() - started}),
        )

    try:
        for images in make_cohort_dataset(cohort, facts["side"], batch_size, np.arange(done, n_images)):
            images = images.numpy().astype("float32")
            padded = np.concatenate([images, np.zeros((batch_size - len(images), *images.shape[1:]), "float32")])
            batch = np.asarray(backbone.model.predict_on_batch(padded))[: len(images)]  # one shape to compile
            with np.errstate(over="ignore"):  # looked at in the next line
                codes[done : done + len(images)] = batch
            if not np.isfinite(codes[done : done + len(images)]).all():
                raise ValueError(f"codes of {facts['backbone']} do not fit into {facts['dtype']}; use float32")
            done += len(images)
            if bar:
                bar.update(len(images))
            if time.monotonic() > saved + _SAVE_SECONDS:
                save()
                saved = time.monotonic()
    except tf.errors.OpError as error:
        broken = find_broken_image(cohort)
        raise ImageError(broken or f"an image of {cohort.name} cannot be read: {error.message}") from None
    finally:
        save()  # an interrupted call loses nothing
        if bar:
            bar.close()
    return draft, seconds + time.monotonic() - started


def _find_progress(folder, draft, facts):
    """Returns how many images an interrupted call has finished, and the seconds that it took."""
    try:
        record = json.loads((folder / "progress.json").read_text())
        codes = np.load(draft, mmap_mode="r")
    except (OSError, ValueError):
        return 0, 0.0
    whole = record["facts"] == facts and list(codes.shape) == facts["shape"] and codes.dtype == facts["dtype"]
    return (record["done"], record["seconds"]) if whole else (0, 0.0)
