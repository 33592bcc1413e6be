"""The builder of the classifier: preprocessing inside, an exact class activation map, weights from anywhere."""

import json

import keras
import numpy as np
import pytest

from helpers.runtime import hash_file
from helpers.study import PATHOLOGIES
from helpers.training import (
    build_classifier,
    load_classifier,
    predict_logits,
    set_output_bias,
)
from helpers.training.model_files import ModelFileError

pytestmark = pytest.mark.slow
BLOCKS = [1, 1, 1, 1]  # all but the depth is DenseNet-121's
RECORD = {"classes": list(PATHOLOGIES), "blocks": BLOCKS}


def build(**options):
    return build_classifier(blocks=BLOCKS, **options)


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return build()


def write_run(folder, model, **record):
    """Writes what `load_classifier` reads."""
    model.save_weights(folder / "model.weights.h5")
    (folder / "run.json").write_text(json.dumps(RECORD | record))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 1)).astype("float32")


def test_smaller_output_stride_has_a_finer_map_on_the_same_weights(model):
    finer = build(output_stride=16)
    assert [w.shape for w in finer.get_weights()] == [w.shape for w in model.get_weights()]
    image = np.zeros((1, 96, 64, 1), "float32")
    for built, sides in ((model, (3, 2)), (finer, (6, 4))):
        assert keras.Model(built.input, built.get_layer("relu").output)(image).shape[1:3] == sides
    assert model(np.zeros((1, 32, 32, 1), "float32")).shape == (1, 14)


def test_the_network_is_densenet_121():
    full = build_classifier(n_classes=14)
    assert full.count_params() == 7_051_854 and full.get_layer("relu").output.shape[-1] == 1024
    assert len([v for v in full.non_trainable_variables if "moving" in v.path]) == 242
    with pytest.raises(ValueError, match=r"are for BLOCKS = \[6, 12, 24, 16\]; leave it empty"):
        build(weights="imagenet")


def test_untrained_model_predicts_the_prevalence_on_average(model, images):
    prevalence = np.linspace(0.0, 0.5, 14)
    set_output_bias(model, prevalence)
    bias = model.get_layer("logits").bias.numpy()
    assert np.allclose(1 / (1 + np.exp(-bias)), np.maximum(prevalence, 1e-3), atol=1e-6)


def test_missing_weights_file_is_named():
    with pytest.raises(FileNotFoundError, match=r'WEIGHTS is "nowhere\.h5"'):
        build(weights="nowhere.h5")


def test_failed_download_says_which_file_to_put_where(monkeypatch, tmp_path):
    """Points Keras' cache at an empty folder and its download at a closed port of this machine."""
    from keras.src.applications import densenet

    original = densenet.file_utils.get_file

    def get_file(name, url, **options):
        return original(name, f"http://127.0.0.1:9/{name}", cache_dir=tmp_path)

    monkeypatch.setattr(densenet.file_utils, "get_file", get_file)
    with pytest.raises(FileNotFoundError, match=r"densenet121_weights.*notop\.h5.*models.*\"none\""):
        build_classifier(weights="imagenet")


def test_a_run_that_does_not_fit_is_refused(tmp_path, model, packed):
    """A model of another split would be measured on images that it was trained on; see also test_run_record.py."""
    write_run(tmp_path, model, side=packed.side, split={"name": "official", "sha256": "0" * 64})
    with pytest.raises(ValueError, match=r"trained on split official \(0{12}\).*Use the SPLIT"):
        load_classifier(tmp_path, packed)
    split = {"name": "official", "sha256": packed.split_sha256}
    write_run(tmp_path, model, side=packed.side, split=split)
    assert load_classifier(tmp_path, packed).count_params() == model.count_params()


def test_weights_that_are_not_those_of_run_json_are_refused(tmp_path, model, images):
    """They load without an error: they may be those of another training in the same folder."""
    write_run(tmp_path, model)
    write_run(tmp_path, model, weights_sha256=hash_file(tmp_path / "model.weights.h5"))
    assert np.array_equal(load_classifier(tmp_path)(images), model(images))
    build().save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ModelFileError, match=r"weights\.h5 was altered: .* not that of run\.json\. Run 02_train"):
        load_classifier(tmp_path)


def test_rebuilt_model_gives_the_same_logits(tmp_path, images):
    shape = {"output_stride": 16, "blocks": [1, 2, 1, 3]}
    trained = build_classifier(**shape)
    write_run(tmp_path, trained, **shape)
    assert np.array_equal(load_classifier(tmp_path)(images), trained(images))


def test_predictions_come_without_padding(packed):
    from helpers.pipeline import make_eval_dataset

    tiny = keras.Sequential([keras.Input((48, 48, 1)), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(14)])
    n_images = len(packed.labels("test"))
    logits = predict_logits(tiny, make_eval_dataset(packed, "test", 7), n_images)
    assert logits.shape == (n_images, 14) and np.isfinite(logits).all()
    assert predict_logits(tiny, None, 0).shape == (0, 14)
