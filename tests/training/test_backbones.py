"""Every backbone: its own preprocessing, an exact class activation map, and all that follows."""

import h5py
import keras
import numpy as np
import pytest
from seeded_run import write_seeded_run

from helpers.evaluation import build_activation_model, grad_cam
from helpers.training import backbone_layers, build_classifier, fuse_batch_norm, load_classifier
from helpers.training.backbones import BACKBONES
from helpers.training.model_files import ModelFileError

pytestmark = pytest.mark.slow
FAMILIES = ["densenet121", "convnext_base", "efficientnetv2_s"]


def build(backbone, **options):
    """Builds a classifier of one block a stage; all else is the backbone's own."""
    return build_classifier(backbone, blocks=[1] * len(BACKBONES[backbone].blocks), **options)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    keras.utils.set_random_seed(0)
    return build(request.param)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(0, 255, (2, 64, 96, 1)).astype("float32")


def reference_preprocessing(backbone):
    """Returns what keras.applications does with three channels of 0 to 255, as a layer or function of its own."""
    if backbone == "convnext_base":
        from keras.src.applications.convnext import PreStem

        return PreStem("reference")
    if backbone == "efficientnetv2_s":
        from keras.src.applications import efficientnet_v2

        blocks = efficientnet_v2.DEFAULT_BLOCKS_ARGS["efficientnetv2-s"][:1]
        shape = {"blocks_args": blocks, "include_top": False, "weights": None, "name": "efficientnetv2-s"}
        return efficientnet_v2.EfficientNetV2(1.0, 1.0, 384, **shape).layers[1]
    return lambda x: keras.applications.densenet.preprocess_input(np.array(x))


def test_preprocessing_is_that_of_keras_applications(model, images):
    scaling = keras.Model(model.input, model.get_layer("preprocessing").output)
    expected = reference_preprocessing(model.name)(np.repeat(images, 3, axis=-1))
    assert np.allclose(scaling(images), expected, atol=1e-5)


def test_maps_are_exact_and_gradients_agree_with_them(model, images):
    maps, logits = map(np.asarray, build_activation_model(model)(images))
    assert maps.shape == (2, 2, 3, 14) and np.allclose(np.mean(maps, axis=(1, 2)), logits, atol=1e-4)
    assert np.allclose(logits, model(images), atol=1e-4)
    exact = (maps - model.get_layer("logits").bias.numpy())[..., [3, 8]] / 6
    assert np.allclose(grad_cam(model, images, "", [3, 8]), np.maximum(exact, 0), atol=1e-5)


def test_frozen_backbone_leaves_only_the_head_and_keeps_its_statistics(model, images):
    for layer in backbone_layers(model):
        layer.trainable = False
    before = [v.numpy() for v in model.non_trainable_variables if "seed" not in v.path]
    model(images, training=True)
    after = [v.numpy() for v in model.non_trainable_variables if "seed" not in v.path]
    assert [v.path for v in model.trainable_variables] == ["logits/kernel", "logits/bias"]
    assert before and all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    model.trainable = True


def test_faster_batch_normalization_computes_the_same(model, images):
    fused = fuse_batch_norm(model)
    assert [v.shape for v in fused.variables] == [v.shape for v in model.variables]
    assert np.allclose(fused(images), model(images), atol=1e-5)


def test_a_step_in_bfloat16_trains_from_the_first_layer_to_the_last(model, images):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        built = build(model.name)
    finally:
        keras.config.set_dtype_policy("float32")
    before = built.get_weights()
    built.compile("adamw", keras.losses.BinaryCrossentropy(from_logits=True))
    assert np.isfinite(built.train_on_batch(images, np.eye(2, 14)))
    changed = [not np.array_equal(a, b) for a, b in zip(before, built.get_weights(), strict=True)]
    assert changed[0] and changed[-1] and sum(changed) > 0.8 * len(changed)


def test_whole_model_is_loaded_by_keras_in_its_safe_mode(model, images, tmp_path):
    model.save(tmp_path / "model.keras")
    assert np.array_equal(keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)(images), model(images))


@pytest.mark.parametrize("backbone", FAMILIES[1:])
def test_exports_agree_with_keras(backbone, tmp_path):
    """DenseNet's are tested in tests/export."""
    from helpers.export import open_export
    from helpers.export.formats import describe_export, write_formats

    run = write_seeded_run(tmp_path, blocks=(1,) * len(BACKBONES[backbone].blocks), backbone=backbone)
    write_formats(run, ["saved_model", "onnx", "litert"])
    squares = np.random.default_rng(0).uniform(0, 255, (4, 64, 64, 1)).round().astype("float32")
    facts = describe_export(run)
    logits = load_classifier(run).predict(squares, verbose=0).astype(float)
    probs = 1 / (1 + np.exp(-(logits * facts["calibration_slope"] + facts["calibration_intercept"])))
    for name in ("saved_model", "exports/model.onnx", "exports/model.tflite"):
        assert np.abs(open_export(run / name).predict_pixels(squares)["probabilities"] - probs).max() < 1e-5, name


def cut(model):
    """Returns a classifier up to its last map."""
    return keras.Model(model.input, model.get_layer("average").input)


def write_legacy(path, network):
    from keras.src.legacy.saving import legacy_h5_format

    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, network)


def test_files_of_keras_applications_and_of_runs_start_a_classifier(model, images, tmp_path):
    last_map = cut(model)
    keras.utils.set_random_seed(1)
    write_legacy(tmp_path / "notop.h5", last_map)
    model.save_weights(tmp_path / "run.weights.h5")
    for name in ("notop.h5", "run.weights.h5"):
        built = build(model.name, weights=tmp_path / name)
        assert np.allclose(cut(built)(images), last_map(images), atol=1e-5)
        assert not np.array_equal(built.get_layer("logits").kernel, model.get_layer("logits").kernel)


def test_weights_of_another_network_are_refused_with_the_layer(tmp_path):
    network = cut(build("densenet121"))
    write_legacy(tmp_path / "one.h5", network)
    network.save_weights(tmp_path / "one.weights.h5")
    with pytest.raises(ModelFileError, match=r"one\.h5 is refused: it does not fit .*conv2_block2_1_conv.*BACKBONE"):
        build_classifier(blocks=[2, 1, 1, 1], weights=tmp_path / "one.h5")
    with pytest.raises(ModelFileError, match=r"one\.weights\.h5 is refused: it does not fit .*conv.*BACKBONE"):
        build_classifier(blocks=[2, 1, 1, 1], weights=tmp_path / "one.weights.h5")
    with pytest.raises(ModelFileError, match=r"where the network has convnext_base_stem .* the file has conv1_conv"):
        build("convnext_base", weights=tmp_path / "one.h5")


def test_settings_that_do_not_fit_a_backbone_are_refused():
    with pytest.raises(ValueError, match='BACKBONE is "resnet"; expected one of densenet121, densenet169'):
        build_classifier("resnet")
    with pytest.raises(ValueError, match=r"OUTPUT_STRIDE = 16 is for DenseNets only; set it to 32 for ConvNeXt-Base"):
        build_classifier("convnext_base", output_stride=16)
    with pytest.raises(ValueError, match=r"BLOCKS has 4 numbers, EfficientNetV2-S has 6 stages; set it to \[\]"):
        build_classifier("efficientnetv2_s", blocks=[1, 1, 1, 1])


@pytest.mark.parametrize(
    ("backbone", "millions"),
    [("densenet169", 12.64), ("densenet201", 18.32), ("convnext_base", 87.57), ("efficientnetv2_s", 20.33)],
)
def test_full_backbones_have_the_size_of_keras_networks_without_a_top(backbone, millions):
    assert abs(cut(build_classifier(backbone)).count_params() / 1e6 - millions) < 0.01
