"""Features of images from a pretrained network, computed once and kept on disk as memory-mapped arrays.

A cache is a folder with `codes.npy` (the features) and, written last, `bank.json`, which records what they depend on:
the images, the network, its weights and its preprocessing. An interrupted computation resumes where it stopped.
"""

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
from ..packing.dicom import load_image
from ..packing.image_files import ImageError, assert_image_decodes
from ..runtime.cluster import map_tasks
from ..runtime.files import as_path, hash_file, is_remote, lock_folder, write_text
from ..training.backbones import BACKBONES
from ..training.model import load_classifier
from ..training.model_files import check_model_file
from ..training.run_record import read_run
from .cohorts import make_cohort_dataset

FORMAT = 1  # of a cache; part of its facts, so that another format has a folder of its own
_SAVE_SECONDS = 20  # between two records of the progress
_TASK_BATCHES = 8  # that a worker of a cluster computes at a time


@dataclass(frozen=True)
class Backbone:
    """A network up to one of its layers, including its preprocessing.

    Attributes:
        model: keras.Model, float32 (n, side, side, 1) in [0, 255] to features (n, h, w, channels).
        facts: dict of what its features depend on: `backbone`, `layer`, `side` (pixels), `weights` (their source),
            `weights_sha256`, `scale` and `offset` (of the preprocessing, one number a channel).
    """

    model: keras.Model
    facts: dict


@dataclass(frozen=True)
class FeatureCache:
    """The features of a cohort.

    Attributes:
        folder: path of the cache.
        features: (images, h, w, channels) float16 or float32, memory-mapped.
        facts: dict, the content of `bank.json`; `seconds` is the time of computing, with reading and decoding.
    """

    folder: os.PathLike
    features: np.ndarray
    facts: dict


def build_backbone(name="VGG16", weights="none", *, side=224, layer=None):
    """Builds a network of keras.applications, from gray images to the output of one of its layers.

    Args:
        name: class in keras.applications, such as "VGG16" or "ResNet50V2".
        weights: "imagenet", "none" for random weights, or the path of a file with the network's weights without its
            top layers.
        side: int, pixels a side of the square images. At 224, VGG16's last pooling gives 7 x 7 x 512 features.
        layer: name of the layer; None for the network's last one, `block5_pool` of VGG16.

    Returns:
        A `Backbone`.

    Raises:
        FileNotFoundError: the file of weights is missing, or ImageNet's weights cannot be downloaded.
        ModelFileError: the file holds anything but weights, see `check_model_file`.
        ValueError: there is no such network or layer.
    """
    build = getattr(keras.applications, name, None)
    if not isinstance(build, type(keras.applications.VGG16)):
        raise ValueError(f"{name!r} is not a network of keras.applications; expected such as VGG16 or ResNet50V2")
    images = keras.Input((side, side, 1), name="images")
    scale, offset = _measure_preprocessing(build)
    channels = keras.layers.Concatenate(name="gray_to_rgb")([images] * 3)
    scaled = keras.layers.Rescaling(scale, offset, name="preprocessing")(channels)
    if weights not in ("imagenet", "none"):
        if not as_path(weights).is_file():
            raise FileNotFoundError(f'weights are "{weights}", but there is no such file')
        check_model_file(as_path(weights))  # keras.applications opens the file itself
    try:
        network = build(include_top=False, weights=None if weights == "none" else str(weights), input_tensor=scaled)
    except Exception as error:  # get_file raises a bare Exception when a download fails
        if weights != "imagenet":
            raise
        raise FileNotFoundError(
            f"The ImageNet weights of {name} cannot be downloaded ({error}). Download Keras's file of them whose name "
            'ends in "notop.h5" elsewhere and give its path as weights, or use "none" for random weights.'
        ) from error
    names = [known.name for known in network.layers]
    if layer not in (None, *names):
        raise ValueError(f"{name} has no layer {layer!r}; its last ones are {names[-5:]}")
    output = network.get_layer(layer).output if layer else network.output
    source = weights if weights in ("imagenet", "none") else as_path(weights).name
    facts = {"backbone": name, "layer": layer or names[-1], "side": side, "weights": source}
    return _make_backbone(keras.Model(images, output, name=name.lower()), facts | {"scale": scale, "offset": offset})


def load_trained_backbone(run_dir):
    """Loads the network that notebook 2 trained, up to its last feature map.

    Args:
        run_dir: folder of the run.

    Returns:
        A `Backbone` for images of the side at which the network is evaluated.

    Raises:
        FileNotFoundError: there is no finished run in the folder.
        ModelFileError: its weights are damaged, hold anything else or are not those that `run.json` names.
        ValueError: `run.json` is damaged.
    """
    trained = load_classifier(run_dir)
    record = read_run(run_dir)
    known, last_map = BACKBONES[record["backbone"]], trained.get_layer("average").input
    images = keras.Input((record["eval_size"], record["eval_size"], 1), name="images")
    model = keras.Model(images, keras.Model(trained.inputs, last_map)(images), name="trained")
    facts = {"backbone": known.network, "layer": last_map._keras_history.operation.name, "side": record["eval_size"]}
    facts |= {"weights": f"trained on {record['study']}", **known.preprocessing}
    return _make_backbone(model, facts)


def write_feature_cache(cohort, backbone, folder, *, dtype="float16", batch_size=32, progress=None, cluster=""):
    """Computes the features of a cohort's images, unless they are cached; resumes what was interrupted.

    Args:
        cohort: a `Cohort`.
        backbone: a `Backbone`.
        folder: where caches are kept; each has a folder of its own there, named after what it depends on.
        dtype: "float16" or "float32", of the features on disk.
        batch_size: int, images at once.
        progress: callable such as `tqdm`.
        cluster: "", "auto" or an address, see `runtime.cluster.map_tasks`; the images are then on a disk that all
            machines share, or in a bucket. The features come here.

    Returns:
        A `FeatureCache`.

    Raises:
        ImageError: an image cannot be decoded; with its name.
        ValueError: a finished cache is damaged; a feature is too large for float16, or not a number; or `folder` is in
            a bucket, from which nothing can be memory-mapped.
        RuntimeError: another process computes the same features; or the cluster fails, see `map_tasks`.
        OSError: the features cannot be written; too little disk space is reported before anything is computed.
    """
    if is_remote(folder):
        raise ValueError(f"{folder} is in a bucket, and features are mapped from a disk; choose a local FEATURES_DIR")
    # The keys, too, decide the folder's name: with others, features kept by earlier runs would not be found.
    facts = {"format": FORMAT, "cohort": cohort.name, "films_sha256": cohort.sha256, **backbone.facts, "dtype": dtype}
    facts["shape"] = [len(cohort), *backbone.model.output_shape[1:]]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    folder = as_path(folder) / f"{cohort.name}-{facts['backbone']}-{facts['layer']}-{facts['side']}-{key[:12]}".lower()
    if not (folder / "bank.json").is_file():
        busy = (
            f"Another process computes the features in {folder}. Wait until it ends, then run this again; or stop it "
            "(in Jupyter, shut its kernel down)."
        )
        with lock_folder(folder, busy):
            draft, seconds = _compute_features(cohort, backbone, folder, facts, batch_size, progress, cluster)
            content = facts | {"seconds": round(seconds, 2), "codes_sha256": hash_file(draft)}
            os.replace(draft, folder / "codes.npy")
            write_text(folder / "bank.json", json.dumps(content, indent=1) + "\n")
            (folder / "progress.json").unlink(missing_ok=True)
    return load_feature_cache(folder, facts)


def load_feature_cache(folder, facts):
    """Maps the features of a finished cache. Hashes them first, at about 1.5 GB a second, to find any damage.

    Args:
        folder: path of the cache.
        facts: dict of what the features must depend on, compared with `bank.json`.

    Returns:
        A `FeatureCache`.

    Raises:
        FileNotFoundError: there is no finished cache in the folder.
        ValueError: the features are damaged, or of other images or another network than asked for.
    """
    folder = as_path(folder)
    record, array = folder / "bank.json", folder / "codes.npy"
    remedy = f"Delete {folder} to have them computed again."
    if not record.is_file() or not array.is_file():
        raise FileNotFoundError(f"{folder} holds no finished features: bank.json or codes.npy is missing. {remedy}")
    try:
        found = json.loads(record.read_text())
        digest, _ = found["codes_sha256"], found["seconds"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{record} is damaged ({type(error).__name__}: {error}). {remedy}") from None
    differing = [f"{name} is {found.get(name)}, not {facts[name]}" for name in facts if found.get(name) != facts[name]]
    if differing:
        raise ValueError(f"{array} holds other features than asked for: {'; '.join(differing)}. {remedy}")
    if hash_file(array) != digest:
        raise ValueError(f"{array} is damaged: its SHA-256 is not that in bank.json. {remedy}")
    return FeatureCache(folder, np.load(array, mmap_mode="r"), found)


def _measure_preprocessing(build):
    """Finds scale and offset of each channel in a network's own preprocessing, which is linear in every mode of Keras.

    A gray image has three equal channels, so it does not matter that some modes reverse their order.
    """
    preprocess = sys.modules[build.__module__].preprocess_input
    black, white = (np.asarray(preprocess(np.full((1, 1, 3), level, "float32"))).ravel() for level in (0, 255))
    return ((white - black) / 255).astype(float).round(9).tolist(), black.astype(float).round(9).tolist()


def _make_backbone(model, facts):
    digest = hashlib.sha256()
    for weight in model.get_weights():
        digest.update(f"{weight.dtype} {weight.shape}".encode() + np.ascontiguousarray(weight).tobytes())
    model.trainable = False
    return Backbone(model, facts | {"weights_sha256": digest.hexdigest()})


def _compute_features(cohort, backbone, folder, facts, batch_size, progress, cluster):
    """Computes the features that an earlier call has not; returns the path of all and the seconds of all calls."""
    draft, progress_file, n_images = folder / "codes.part.npy", folder / "progress.json", len(cohort)
    done, seconds = 0, 0.0
    if draft.is_file() and progress_file.is_file():
        earlier = json.loads(progress_file.read_text())
        done, seconds = earlier["done"], earlier["seconds"]
    if not done:  # a full disk would kill the process when it writes to the mapped file
        assert_space(folder, int(np.prod(facts["shape"])) * np.dtype(facts["dtype"]).itemsize)
    mode = {"mode": "r+"} if done else {"mode": "w+", "dtype": facts["dtype"], "shape": tuple(facts["shape"])}
    features = np.lib.format.open_memmap(draft, **mode)
    bar = progress(total=n_images, unit="image", initial=done) if progress else None
    started = saved = time.monotonic()

    def save():
        features.flush()
        write_text(progress_file, json.dumps({"done": done, "seconds": seconds + time.monotonic() - started}))

    try:
        step = _TASK_BATCHES * batch_size if cluster else max(1, n_images)
        spans = ((start, min(start + step, n_images)) for start in range(done, n_images, step))
        for batch in map_tasks(_prepare_features, spans, cohort, backbone, batch_size, facts["dtype"], cluster=cluster):
            if not np.isfinite(batch).all():
                raise ValueError(f"features of {facts['backbone']} do not fit into {facts['dtype']}; use float32")
            features[done : done + len(batch)] = batch
            done += len(batch)
            if bar:
                bar.update(len(batch))
            if time.monotonic() > saved + _SAVE_SECONDS:
                save()
                saved = time.monotonic()
    finally:
        save()  # an interrupted call loses nothing
        if bar:
            bar.close()
    return draft, seconds + time.monotonic() - started


def _prepare_features(cohort, backbone, batch_size, dtype):
    """Returns the function from (first, last but one) row numbers to features, batch by batch, for `map_tasks`."""

    def compute(spans):
        for start, stop in spans:
            for images in make_cohort_dataset(cohort, backbone.facts["side"], batch_size, np.arange(start, stop)):
                images = images.numpy().astype("float32")
                padded = np.concatenate([images, np.zeros((batch_size - len(images), *images.shape[1:]), "float32")])
                batch = np.asarray(backbone.model.predict_on_batch(padded))  # padded: one shape to compile
                with np.errstate(over="ignore"):  # whoever gets them checks
                    yield batch[: len(images)].astype(dtype)

    def compute_or_name(spans):
        try:
            yield from compute(spans)
        except tf.errors.OpError as error:
            raise ImageError(_find_broken_image(cohort) or f"{cohort.name}: an image cannot be read: {error}") from None

    return compute_or_name


def _find_broken_image(cohort):
    """Returns a sentence that names the first image file that cannot be decoded; "" if all can."""
    for path in cohort.paths or ():
        try:
            assert_image_decodes(load_image(path)[0])
        except (ImageError, OSError) as error:
            return f"{path} cannot be decoded ({error}). Fetch it again, or remove it from the labels."
    return ""
