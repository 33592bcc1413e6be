"""The DenseNet-121 builder: preprocessing inside, an exact class activation map, weights from anywhere."""

import json

import keras
import numpy as np
import pytest

from helpers.runtime import hash_file
from helpers.study import PATHOLOGIES
from helpers.training import (
    ModelFileError,
    backbone_layers,
    build_densenet121,
    load_densenet121,
    predict_logits,
    set_output_bias,
)


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return build_densenet121()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 1)).astype("float32")


def test_preprocessing_is_that_of_keras_applications(model, images):
    scaling = keras.Model(model.input, model.get_layer("imagenet_scaling").output)
    expected = keras.applications.densenet.preprocess_input(np.repeat(images, 3, axis=-1).copy())
    assert np.allclose(scaling(images), expected, atol=1e-5)


def test_mean_of_the_activation_map_and_bias_is_the_logit(model, images):
    features = keras.Model(model.input, model.get_layer("relu").output)(images)
    kernel, bias = model.get_layer("logits").get_weights()
    maps = np.asarray(features) @ kernel
    assert np.allclose(maps.mean(axis=(1, 2)) + bias, model(images), atol=1e-4)


def test_weights_serve_any_size(model):
    assert model(np.zeros((1, 32, 32, 1), "float32")).shape == (1, 14)
    assert model(np.zeros((1, 96, 64, 1), "float32")).shape == (1, 14)


def test_smaller_output_stride_has_a_finer_map_on_the_same_weights(model):
    finer = build_densenet121(output_stride=16)
    assert [w.shape for w in finer.get_weights()] == [w.shape for w in model.get_weights()]
    image = np.zeros((1, 96, 96, 1), "float32")
    for built, side in ((model, 3), (finer, 6)):
        assert keras.Model(built.input, built.get_layer("relu").output)(image).shape == (1, side, side, 1024)
    with pytest.raises(ValueError, match="output_stride is 8; expected 16 or 32"):
        build_densenet121(output_stride=8)


def test_fewer_layers_make_a_smaller_network_with_the_same_ends(model):
    small = build_densenet121(blocks=[1, 1, 1, 1])
    assert small.count_params() < model.count_params() / 20
    image = np.zeros((1, 96, 96, 1), "float32")
    assert small(image).shape == (1, 14)
    assert keras.Model(small.input, small.get_layer("relu").output)(image).shape[:3] == (1, 3, 3)
    with pytest.raises(ValueError, match=r"are for blocks of \(6, 12, 24, 16\) layers, not \(1, 1, 1, 1\)"):
        build_densenet121("imagenet", blocks=[1, 1, 1, 1])


def test_untrained_model_predicts_the_prevalence_on_average(model, images):
    prevalence = np.linspace(0.0, 0.5, 14)
    set_output_bias(model, prevalence)
    bias = model.get_layer("logits").bias.numpy()
    assert np.allclose(1 / (1 + np.exp(-bias)), np.maximum(prevalence, 1e-3), atol=1e-6)


def test_frozen_backbone_leaves_only_the_head(model):
    for layer in backbone_layers(model):
        layer.trainable = False
    assert [v.path for v in model.trainable_variables] == ["logits/kernel", "logits/bias"]
    model.trainable = True


def test_frozen_batch_norm_does_not_learn_the_batch(images):
    model = build_densenet121()
    for layer in backbone_layers(model):
        layer.trainable = False
    before = [v.numpy() for v in model.non_trainable_variables if "moving" in v.path]
    model(images, training=True)
    after = [v.numpy() for v in model.non_trainable_variables if "moving" in v.path]
    assert len(before) == 242 and all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_weights_file_of_keras_applications_lands_in_the_backbone(tmp_path, model, images):
    """Writes a file in the format that keras.applications distributes, with other weights, and loads it."""
    h5py = pytest.importorskip("h5py")
    from keras.src.legacy.saving import legacy_h5_format

    keras.utils.set_random_seed(5)
    plain = keras.applications.DenseNet121(include_top=False, weights=None, input_shape=(64, 64, 3))
    with h5py.File(tmp_path / "notop.h5", "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, plain)
    loaded = build_densenet121(str(tmp_path / "notop.h5"))
    features = keras.Model(loaded.input, loaded.get_layer("relu").output)(images)
    rgb = keras.applications.densenet.preprocess_input(np.repeat(images, 3, axis=-1).copy())
    assert np.allclose(features, plain(rgb), atol=1e-4)
    assert not np.allclose(features, keras.Model(model.input, model.get_layer("relu").output)(images), atol=1e-2)


def test_missing_weights_file_is_named():
    with pytest.raises(FileNotFoundError, match=r'WEIGHTS is "nowhere\.h5"'):
        build_densenet121("nowhere.h5")


def test_failed_download_says_which_file_to_put_where(monkeypatch, tmp_path):
    """Points Keras' cache at an empty folder and its download at a closed port of this machine."""
    from keras.src.applications import densenet

    original = densenet.file_utils.get_file

    def get_file(name, url, **options):
        return original(name, f"http://127.0.0.1:9/{name}", cache_dir=tmp_path)

    monkeypatch.setattr(densenet.file_utils, "get_file", get_file)
    with pytest.raises(FileNotFoundError, match=r"densenet121_weights.*notop\.h5.*models.*\"none\""):
        build_densenet121("imagenet")


def test_model_of_other_classes_is_refused(tmp_path, model):
    model.save_weights(tmp_path / "model.weights.h5")
    (tmp_path / "run.json").write_text(json.dumps({"classes": list(PATHOLOGIES[::-1])}))
    with pytest.raises(ValueError, match="was trained on"):
        load_densenet121(tmp_path)


def test_model_of_another_split_or_side_is_refused(tmp_path, model, packed):
    """Otherwise it would be measured on images that it was trained on."""
    model.save_weights(tmp_path / "model.weights.h5")
    record = {"classes": list(PATHOLOGIES), "side": packed.side, "split": {"name": "official", "sha256": "0" * 64}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"trained on split official \(0{12}\).*Use the SPLIT"):
        load_densenet121(tmp_path, packed)
    record["split"]["sha256"] = packed.split_sha256
    (tmp_path / "run.json").write_text(json.dumps(record | {"side": 99}))
    with pytest.raises(ValueError, match="at 99 pixels"):
        load_densenet121(tmp_path, packed)
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert load_densenet121(tmp_path, packed).count_params() == model.count_params()


def test_unfinished_run_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run\.json is missing\. Run 02_train_densenet121"):
        load_densenet121(tmp_path)


def test_weights_that_run_json_does_not_tell_of_are_refused(tmp_path, model, images):
    """They load without an error: they may be those of another training in the same folder."""
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    record = {"classes": list(PATHOLOGIES), "weights_sha256": hash_file(path)}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert np.array_equal(load_densenet121(tmp_path)(images), model(images))
    build_densenet121().save_weights(path)
    with pytest.raises(ModelFileError, match=r"weights\.h5 was altered: .* not that of run\.json\. Run 02_train"):
        load_densenet121(tmp_path)


@pytest.mark.parametrize("shape", [{}, {"output_stride": 16}, {"output_stride": 16, "blocks": [1, 2, 1, 3]}])
def test_rebuilt_model_gives_the_same_logits(tmp_path, model, images, shape):
    trained = build_densenet121(**shape) if shape else model
    trained.save_weights(tmp_path / "model.weights.h5")
    record = {"classes": list(PATHOLOGIES)} | shape
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert np.array_equal(load_densenet121(tmp_path)(images), trained(images))


def test_predictions_come_without_padding(packed):
    from helpers.pipeline import make_eval_dataset

    tiny = keras.Sequential([keras.Input((48, 48, 1)), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(14)])
    n_images = len(packed.labels("test"))
    logits = predict_logits(tiny, make_eval_dataset(packed, "test", 7), n_images)
    assert logits.shape == (n_images, 14) and np.isfinite(logits).all()
    assert predict_logits(tiny, None, 0).shape == (0, 14)
