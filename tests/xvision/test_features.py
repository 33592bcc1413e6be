"""Feature banks: right codes, written once, gone on with after a kill, refused when they are of anything else."""

import json
import os
import shutil
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest

from helpers.packing import ImageError
from helpers.runtime.settings import ROOT
from helpers.study import plan_nodule_study, write_synthetic_study
from helpers.training import ModelFileError
from helpers.xvision import (
    build_backbone,
    load_feature_cache,
    load_folder_cohort,
    load_trained_backbone,
    read_cohort_images,
    write_feature_cache,
)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies") / "nodules"
    write_synthetic_study(folder, n_images=20, size=48, plan=plan_nodule_study, n_workers=1)
    return load_folder_cohort(folder)


@pytest.fixture(scope="module")
def backbone():
    keras.utils.set_random_seed(0)
    return build_backbone("VGG16", side=32, layer="block2_pool")


@pytest.fixture
def bank_dir(cohort, backbone, tmp_path):
    write_feature_cache(cohort, backbone, tmp_path)
    return next(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["VGG16", "DenseNet121", "ResNet50V2", "MobileNetV3Small"])
def test_preprocessing_is_that_of_the_network(name):
    """One network of each mode: caffe, torch, tf, and one that has it inside."""
    backbone = build_backbone(name, side=32, layer=None)
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 1)).astype("float32")
    module = sys.modules[getattr(keras.applications, name).__module__]
    expected = module.preprocess_input(np.repeat(image, 3, axis=-1)[..., ::1].copy())
    found = keras.Model(backbone.model.inputs, backbone.model.get_layer("preprocessing").output)
    found = keras.ops.convert_to_numpy(found(image))
    assert np.allclose(np.sort(found, axis=-1), np.sort(expected, axis=-1), atol=1e-4)
    if name == "VGG16":
        assert np.allclose(found, expected, atol=1e-4)


def test_default_layer_of_vgg16_is_its_last_pooling():
    backbone = build_backbone(side=224)
    assert backbone.facts["layer"] == "block5_pool" and backbone.model.output_shape == (None, 7, 7, 512)


def test_codes_are_those_of_plain_prediction(cohort, backbone, tmp_path):
    images = read_cohort_images(cohort, 32, np.arange(len(cohort)))
    expected = backbone.model.predict(images, batch_size=20, verbose=0)
    exact = write_feature_cache(cohort, backbone, tmp_path, dtype="float32", batch_size=8)
    assert exact.codes.dtype == np.float32 and np.allclose(exact.codes, expected, rtol=1e-4, atol=1e-5)
    half = write_feature_cache(cohort, backbone, tmp_path, dtype="float16", batch_size=8)
    assert half.codes.dtype == np.float16 and np.allclose(half.codes, expected, rtol=2e-3, atol=1e-3)


def test_finished_bank_is_read_and_not_computed(cohort, backbone, bank_dir):
    before = (bank_dir / "codes.npy").stat().st_mtime_ns
    again = write_feature_cache(cohort, backbone, bank_dir.parent)
    assert isinstance(again.codes, np.memmap) and (bank_dir / "codes.npy").stat().st_mtime_ns == before
    assert sorted(path.name for path in bank_dir.iterdir()) == ["bank.json", "codes.npy"]


def test_other_images_weights_sides_and_types_have_banks_of_their_own(cohort, backbone, bank_dir, tmp_path):
    folder = bank_dir.parent
    write_feature_cache(cohort, backbone, folder, dtype="float32")
    keras.utils.set_random_seed(1)
    write_feature_cache(cohort, build_backbone("VGG16", side=32, layer="block2_pool"), folder)
    write_synthetic_study(tmp_path / "other", n_images=20, size=48, seed=1, plan=plan_nodule_study, n_workers=1)
    write_feature_cache(load_folder_cohort(tmp_path / "other"), backbone, folder)
    assert len([path for path in folder.iterdir() if (path / "bank.json").exists()]) == 4


KILLED = """
import os, signal, sys
sys.path.insert(0, "notebooks")
import keras
from helpers.xvision import build_backbone, features, load_folder_cohort, write_feature_cache

class Bar:
    done = 0
    def update(self, n):
        self.done += n
        if self.done > 8:
            os.kill(os.getpid(), signal.SIGKILL)

features._SAVE_SECONDS = 0
keras.utils.set_random_seed(0)
backbone = build_backbone("VGG16", side=32, layer="block2_pool")
write_feature_cache(load_folder_cohort(sys.argv[1]), backbone, sys.argv[2], batch_size=4, progress=lambda **_: Bar())
"""


class Bar:
    """Counts the images that are computed, and may interrupt."""

    def __init__(self, stop_at=1000):
        self.stop_at = stop_at

    def __call__(self, total, unit, initial):
        self.done = self.began = initial
        return self

    def update(self, n):
        self.done += n
        if self.done >= self.stop_at:
            raise KeyboardInterrupt

    def close(self):
        pass


def test_interrupted_and_killed_extraction_goes_on_where_it_was(cohort, backbone, bank_dir, tmp_path):
    command = [sys.executable, "-c", KILLED, os.path.dirname(os.path.dirname(cohort.paths[0])), str(tmp_path / "banks")]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    (folder,) = (tmp_path / "banks").iterdir()
    assert not (folder / "bank.json").exists() and not (folder / "codes.npy").exists()
    first, second = Bar(stop_at=16), Bar()
    with pytest.raises(KeyboardInterrupt):
        write_feature_cache(cohort, backbone, tmp_path / "banks", batch_size=4, progress=first)
    assert (first.began, first.done) == (8, 16)
    bank = write_feature_cache(cohort, backbone, tmp_path / "banks", batch_size=4, progress=second)
    assert (second.began, second.done) == (16, 20) and not (folder / "progress.json").exists()
    assert np.allclose(bank.codes, np.load(bank_dir / "codes.npy"), rtol=2e-3, atol=1e-4)


def test_extraction_interrupted_after_the_last_image_is_finished_without_computing(cohort, backbone, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_feature_cache(cohort, backbone, tmp_path, batch_size=4, progress=Bar(stop_at=20))
    bar = Bar()
    assert len(write_feature_cache(cohort, backbone, tmp_path, batch_size=4, progress=bar).codes) == 20
    assert bar.began == bar.done == 20


def test_only_one_process_writes_a_bank(cohort, backbone, tmp_path):
    class Second(Bar):
        def update(self, n):
            with pytest.raises(RuntimeError, match=r"Another process computes the features in .* Let it end"):
                write_feature_cache(cohort, backbone, tmp_path)
            super().update(n)

    bar = Second()
    bank = write_feature_cache(cohort, backbone, tmp_path, batch_size=10, progress=bar)
    assert bar.done == 20 and np.isfinite(bank.codes).all()
    assert sorted(path.name for path in bank.folder.iterdir()) == ["bank.json", "codes.npy"]


def test_bank_is_not_begun_in_a_bucket_or_on_a_full_disk(cohort, backbone, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="lies in a bucket, and features are mapped from a disk"):
        write_feature_cache(cohort, backbone, "gs://bucket/features")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(OSError, match="327,680 bytes are needed and 10 are free"):
        write_feature_cache(cohort, backbone, tmp_path)
    assert not list(tmp_path.rglob("*.npy"))


@pytest.mark.parametrize("text", ['{"format": 1, "coh', "{}", "[]"])
def test_damaged_record_of_a_bank_is_refused(bank_dir, text):
    (bank_dir / "bank.json").write_text(text)
    with pytest.raises(ValueError, match=r"bank\.json is damaged .* Delete .* to have them computed anew"):
        load_feature_cache(bank_dir)


def test_bank_cut_short_or_altered_is_refused(bank_dir):
    codes = (bank_dir / "codes.npy").read_bytes()
    (bank_dir / "codes.npy").write_bytes(codes[:-100])
    with pytest.raises(ValueError, match=r"codes\.npy is cut short or damaged .* Delete .* to have them computed anew"):
        load_feature_cache(bank_dir)
    (bank_dir / "codes.npy").write_bytes(codes[:-1] + bytes([codes[-1] ^ 1]))
    with pytest.raises(ValueError, match="was altered"):
        load_feature_cache(bank_dir)
    assert load_feature_cache(bank_dir, verify=False).codes.shape[0] == 20
    (bank_dir / "codes.npy").unlink()
    with pytest.raises(FileNotFoundError, match="no finished feature bank"):
        load_feature_cache(bank_dir)


def test_bank_of_another_network_is_refused(bank_dir):
    facts = json.loads((bank_dir / "bank.json").read_text())
    with pytest.raises(ValueError, match="backbone is VGG16, not DenseNet121; layer is block2_pool, not relu"):
        load_feature_cache(bank_dir, facts | {"backbone": "DenseNet121", "layer": "relu"})
    np.save(bank_dir / "codes.npy", np.zeros((20, 2), "float16"))
    with pytest.raises(ValueError, match=r"holds float16 \[20, 2\], bank\.json says"):
        load_feature_cache(bank_dir, facts)


def test_image_that_cannot_be_decoded_is_named(backbone, tmp_path):
    write_synthetic_study(tmp_path / "study", n_images=20, size=48, plan=plan_nodule_study, n_workers=1)
    bad = sorted((tmp_path / "study" / "images").iterdir())[5]
    bad.write_bytes(bad.read_bytes()[:-600])
    with pytest.raises(ImageError, match=rf"{bad.name} cannot be decoded"):
        write_feature_cache(load_folder_cohort(tmp_path / "study"), backbone, tmp_path / "banks")


def test_codes_too_large_for_float16_are_refused(cohort, backbone, tmp_path):
    large = keras.Model(backbone.model.inputs, keras.layers.Rescaling(1e6)(backbone.model.outputs[0]))
    with pytest.raises(ValueError, match="do not fit into float16; use float32"):
        write_feature_cache(cohort, type(backbone)(large, backbone.facts), tmp_path)


def test_unknown_networks_layers_and_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'VGG61' is no network of keras\.applications"):
        build_backbone("VGG61")
    with pytest.raises(ValueError, match="VGG16 has no layer 'block6_pool'; its last ones are"):
        build_backbone("VGG16", side=32, layer="block6_pool")
    with pytest.raises(FileNotFoundError, match="no such file"):
        build_backbone("VGG16", str(tmp_path / "none.h5"), side=32)


def test_weights_file_of_keras_applications_is_read(tmp_path):
    network = keras.applications.VGG16(include_top=False, weights=None)
    network.save_weights(tmp_path / "vgg16.weights.h5")
    backbone = build_backbone("VGG16", tmp_path / "vgg16.weights.h5", side=32)
    assert backbone.facts["weights"] == "vgg16.weights.h5"
    assert all(np.array_equal(a, b) for a, b in zip(network.get_weights(), backbone.model.get_weights(), strict=True))


def test_network_of_notebook_2_gives_its_last_map(tmp_path):
    from seeded_run import write_seeded_run

    from helpers.training import load_densenet121

    write_seeded_run(tmp_path)
    backbone = load_trained_backbone(tmp_path)
    assert backbone.facts["side"] == 64 and backbone.facts["weights"] == "trained on seeded"
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 1)).astype("float32")
    model = load_densenet121(tmp_path)
    kernel, bias = model.get_layer("logits").get_weights()
    logits = backbone.model.predict(images, verbose=0).mean(axis=(1, 2)) @ kernel + bias
    assert np.allclose(logits, model.predict(images, verbose=0), atol=1e-4)


def test_missing_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run\.json is missing"):
        load_trained_backbone(tmp_path)


def test_damaged_run_is_refused(tmp_path):
    from seeded_run import write_seeded_run

    write_seeded_run(tmp_path)
    text, weights = (tmp_path / "run.json").read_text(), tmp_path / "model.weights.h5"
    flipped = bytearray(weights.read_bytes())
    flipped[len(flipped) // 2] ^= 8
    weights.write_bytes(flipped)
    with pytest.raises(ModelFileError, match=r"was altered: its SHA-256 is not that of run\.json"):
        load_trained_backbone(tmp_path)
    (tmp_path / "run.json").write_text(text[:40])
    with pytest.raises(ValueError, match=r"run\.json is damaged .* Run 02_train"):
        load_trained_backbone(tmp_path)
