"""Cached features: correct, computed once, resumed after a kill, refused when they are of anything else."""

import hashlib
import json
import shutil
import sys
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from helpers.packing import ImageError
from helpers.study import PATHOLOGIES, load_study
from helpers.training import build_classifier
from helpers.training.model_files import ModelFileError
from helpers.xvision import (
    build_backbone,
    features,
    load_cohort,
    load_feature_cache,
    load_trained_backbone,
    read_cohort_images,
    write_feature_cache,
)


@pytest.fixture(scope="module")
def cohort(nodule_dir):
    return load_cohort(load_study(nodule_dir))


@pytest.fixture(scope="module")
def backbone():
    return build_backbone("VGG16", side=32, layer="block1_pool")


@pytest.fixture(scope="module")
def finished(cohort, backbone, tmp_path_factory):
    """A finished cache; never written to by a test."""
    return write_feature_cache(cohort, backbone, tmp_path_factory.mktemp("features"))


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished cache, to be damaged."""
    return shutil.copytree(finished.folder, tmp_path / "features" / finished.folder.name)


@pytest.mark.parametrize("name", ["VGG16", "DenseNet121", "ResNet50V2", "MobileNetV3Small"])
def test_preprocessing_is_that_of_the_network(name):
    """One network of each mode: caffe, torch, tf, and one that includes it."""
    build = getattr(keras.applications, name)
    scale, offset = features._measure_preprocessing(build)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 1)).astype("float32")
    expected = sys.modules[build.__module__].preprocess_input(np.repeat(image, 3, axis=-1))
    assert np.allclose(scale * image + offset, expected, atol=1e-4)


@pytest.mark.slow
def test_vgg16_ends_with_its_last_pooling_and_takes_weights_of_keras_applications(tmp_path):
    network = keras.applications.VGG16(include_top=False, weights=None)
    network.save_weights(tmp_path / "vgg16.weights.h5")
    backbone = build_backbone("VGG16", tmp_path / "vgg16.weights.h5", side=32)
    assert backbone.facts["layer"] == "block5_pool" and backbone.model.output_shape == (None, 1, 1, 512)
    assert backbone.facts["weights"] == "vgg16.weights.h5"
    assert all(np.array_equal(a, b) for a, b in zip(network.get_weights(), backbone.model.get_weights(), strict=True))


def test_features_are_those_of_plain_prediction(cohort, backbone, finished, tmp_path):
    images = read_cohort_images(cohort, 32, np.arange(len(cohort)))
    preprocessed = keras.applications.vgg16.preprocess_input(np.repeat(images, 3, axis=-1))
    network = keras.Model(backbone.model.get_layer("block1_conv1").input, backbone.model.outputs)
    expected = network.predict(preprocessed, verbose=0)
    exact = write_feature_cache(cohort, backbone, tmp_path, dtype="float32", batch_size=8)
    assert exact.features.dtype == np.float32 and np.allclose(exact.features, expected, rtol=1e-4, atol=1e-3)
    assert finished.features.dtype == np.float16 and np.allclose(finished.features, expected, rtol=2e-3, atol=1e-2)


def test_finished_cache_is_read_and_not_computed(cohort, backbone, finished):
    before = (finished.folder / "codes.npy").stat().st_mtime_ns
    again = write_feature_cache(cohort, backbone, finished.folder.parent)
    assert isinstance(again.features, np.memmap) and (again.folder / "codes.npy").stat().st_mtime_ns == before
    assert sorted(path.name for path in again.folder.iterdir()) == ["bank.json", "codes.npy"]


def test_cache_has_the_name_and_the_record_of_earlier_runs(finished):
    """Features that were computed before must be found again: neither keys nor file names may change."""
    record = json.loads((finished.folder / "bank.json").read_text())
    assert list(record) == [
        *("format", "cohort", "films_sha256", "backbone", "layer", "side", "weights", "scale", "offset"),
        *("weights_sha256", "dtype", "shape", "seconds", "codes_sha256"),
    ]
    facts = {key: value for key, value in record.items() if key not in ("seconds", "codes_sha256")}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    assert finished.folder.name == f"nodules-vgg16-block1_pool-32-{key[:12]}"


def test_other_images_weights_and_types_have_caches_of_their_own(cohort, backbone, copied, nodule_dir, tmp_path):
    folder = copied.parent
    write_feature_cache(cohort, backbone, folder, dtype="float32")
    network = keras.models.clone_model(backbone.model)
    network.set_weights([weights + 1 for weights in backbone.model.get_weights()])
    other = features._make_backbone(network, backbone.facts)
    write_feature_cache(cohort, type(backbone)(backbone.model, other.facts), folder)
    other = shutil.copytree(nodule_dir, tmp_path / "other")
    first, second = sorted((other / "images").iterdir())[:2]
    shutil.copy(first, second)
    write_feature_cache(load_cohort(load_study(other)), backbone, folder)
    assert len([path for path in folder.iterdir() if (path / "bank.json").exists()]) == 4


class Bar:
    """Counts the images that are computed, and may interrupt."""

    def __init__(self, stop_at=1000, act=lambda done: None):
        self.stop_at, self.act = stop_at, act

    def __call__(self, total, unit, initial):
        self.done = self.began = initial
        return self

    def update(self, n):
        self.done += n
        self.act(self.done)
        if self.done >= self.stop_at:
            raise KeyboardInterrupt

    def close(self):
        pass


def test_interrupted_and_killed_computation_resumes(cohort, backbone, finished, tmp_path, monkeypatch):
    """What a killed process leaves on the disk is copied in the middle of the computation."""
    monkeypatch.setattr(features, "_SAVE_SECONDS", 0)
    name, killed = finished.folder.name, tmp_path / "killed"

    def kill(done):
        if done == 12:
            shutil.copytree(tmp_path / "whole", killed)

    write_feature_cache(cohort, backbone, tmp_path / "whole", batch_size=4, progress=Bar(act=kill))
    assert sorted(path.name for path in (killed / name).iterdir()) == ["codes.part.npy", "progress.json"]
    first, second = Bar(stop_at=16), Bar()
    with pytest.raises(KeyboardInterrupt):
        write_feature_cache(cohort, backbone, killed, batch_size=4, progress=first)
    assert (first.began, first.done) == (8, 16)
    cache = write_feature_cache(cohort, backbone, killed, batch_size=4, progress=second)
    assert (second.began, second.done) == (16, 21) and not (killed / name / "progress.json").exists()
    assert np.allclose(cache.features, finished.features, rtol=2e-3, atol=1e-4)


def test_computation_interrupted_after_the_last_image_ends_without_computing(cohort, backbone, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_feature_cache(cohort, backbone, tmp_path, batch_size=4, progress=Bar(stop_at=21))
    bar = Bar()
    assert len(write_feature_cache(cohort, backbone, tmp_path, batch_size=4, progress=bar).features) == 21
    assert bar.began == bar.done == 21


def test_only_one_process_writes_a_cache(cohort, backbone, tmp_path):
    def call_again(done):
        with pytest.raises(RuntimeError, match=r"Another process computes the features in .* Wait until it ends"):
            write_feature_cache(cohort, backbone, tmp_path)

    cache = write_feature_cache(cohort, backbone, tmp_path, batch_size=21, progress=Bar(act=call_again))
    assert np.isfinite(cache.features).all()
    assert sorted(path.name for path in cache.folder.iterdir()) == ["bank.json", "codes.npy"]


def test_cache_is_not_begun_in_a_bucket_or_on_a_full_disk(cohort, backbone, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is in a bucket, and features are mapped from a disk"):
        write_feature_cache(cohort, backbone, "gs://bucket/features")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(OSError, match="688,128 bytes are needed and 10 are free"):
        write_feature_cache(cohort, backbone, tmp_path)
    assert not list(tmp_path.rglob("*.npy"))


@pytest.mark.parametrize("text", ['{"format": 1, "coh', "{}", "[]"])
def test_damaged_record_is_refused(finished, copied, text):
    (copied / "bank.json").write_text(text)
    with pytest.raises(ValueError, match=r"bank\.json is damaged .* Delete .* to have them computed again"):
        load_feature_cache(copied, finished.facts)


def test_damaged_missing_or_other_features_are_refused(finished, copied):
    array = copied / "codes.npy"
    content = array.read_bytes()
    for damaged in (content[:-100], content[:-1] + bytes([content[-1] ^ 1])):
        array.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"codes\.npy is damaged.* Delete .* to have them computed again"):
            load_feature_cache(copied, finished.facts)
    with pytest.raises(ValueError, match="backbone is VGG16, not DenseNet121; layer is block1_pool, not relu"):
        load_feature_cache(copied, finished.facts | {"backbone": "DenseNet121", "layer": "relu"})
    array.unlink()
    with pytest.raises(FileNotFoundError, match="no finished features"):
        load_feature_cache(copied, finished.facts)


def test_image_that_cannot_be_decoded_is_named(backbone, nodule_dir, tmp_path):
    cohort = load_cohort(load_study(shutil.copytree(nodule_dir, tmp_path / "study")))
    bad = sorted((tmp_path / "study" / "images").iterdir())[5]
    bad.write_bytes(bad.read_bytes()[:-600])  # since the cohort was loaded, which would have left it out
    with pytest.raises(ImageError, match=rf"{bad.name} cannot be decoded"):
        write_feature_cache(cohort, backbone, tmp_path / "features")


def test_features_too_large_for_float16_are_refused(cohort, backbone, tmp_path):
    shape = backbone.model.output_shape
    large = SimpleNamespace(output_shape=shape, predict_on_batch=lambda images: np.full((32, *shape[1:]), 1e5))
    with pytest.raises(ValueError, match="do not fit into float16; use float32"):
        write_feature_cache(cohort, type(backbone)(large, backbone.facts), tmp_path)


def test_unknown_networks_layers_and_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'VGG61' is not a network of keras\.applications"):
        build_backbone("VGG61")
    with pytest.raises(ValueError, match="VGG16 has no layer 'block6_pool'; its last ones are"):
        build_backbone("VGG16", side=32, layer="block6_pool")
    with pytest.raises(FileNotFoundError, match="no such file"):
        build_backbone("VGG16", str(tmp_path / "none.h5"), side=32)


@pytest.mark.slow
def test_network_of_notebook_2_gives_its_last_map_and_a_damaged_one_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run\.json is missing"):
        load_trained_backbone(tmp_path)
    model = build_classifier(blocks=(1, 1, 1, 1), output_stride=16)
    weights = tmp_path / "model.weights.h5"
    model.save_weights(weights)
    run = {"classes": list(PATHOLOGIES), "side": 64, "output_stride": 16, "blocks": [1, 1, 1, 1], "study": "toy"}
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    (tmp_path / "run.json").write_text(json.dumps(run | {"weights_sha256": digest}))
    backbone = load_trained_backbone(tmp_path)
    assert backbone.facts["side"] == 64 and backbone.facts["weights"] == "trained on toy"
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 1)).astype("float32")
    kernel, bias = model.get_layer("logits").get_weights()
    logits = np.asarray(backbone.model(images)).mean(axis=(1, 2)) @ kernel + bias
    assert np.allclose(logits, np.asarray(model(images)), atol=1e-4)
    flipped = bytearray(weights.read_bytes())
    flipped[len(flipped) // 2] ^= 8
    weights.write_bytes(flipped)
    with pytest.raises(ModelFileError, match=r"was altered: its SHA-256 is not that of run\.json"):
        load_trained_backbone(tmp_path)
    (tmp_path / "run.json").write_text('{"classes": [')
    with pytest.raises(ValueError):
        load_trained_backbone(tmp_path)
