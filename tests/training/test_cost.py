"""What a run would cost: counted from the layers, and compared with what the TPU compiler compiled."""

import json
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest

from helpers.training import CHIPS, build_classifier, count_layers, estimate_cost
from helpers.training.cost import SLOWDOWN, estimate_step, store_maps

COMPILED = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "tpu_check.json").read_text())["jax"]
RUN = {"image_size": 224, "eval_size": 256, "n_train": 78_000, "n_val": 8_000, "epochs": 15}
HERE = {"forward_per_second": 20.0, "augmented_per_second": 1000.0}
BLOCKS = {"densenet121": [1, 1, 1, 1], "convnext_base": [1, 1, 1, 1], "efficientnetv2_s": [1] * 6}


@pytest.fixture(scope="module")
def densenet121():
    """DenseNet-121 as the full profile trains it, in bfloat16."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    yield build_classifier()
    keras.config.set_dtype_policy(policy)


def test_layers_are_counted_by_hand():
    images = keras.Input((None, None, 1))
    maps = keras.layers.Conv2D(8, 3, padding="same")(images)  # 9 * 1 * 8 products a pixel
    grouped = keras.layers.Conv2D(8, 3, groups=4, padding="same")(maps)  # 9 * 2 * 8
    depthwise = keras.layers.DepthwiseConv2D(3, strides=2, padding="same")(grouped)  # 9 * 8, at a quarter of the pixels
    nested = keras.Sequential([keras.layers.LayerNormalization(), keras.layers.Conv2D(4, 1)])(depthwise)  # 8 * 4
    joined = keras.layers.Concatenate()([nested, depthwise])
    logits = keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(joined))  # 12 * 2
    layers = count_layers(keras.Model(images, logits), 16)
    assert list(layers["flops"]) == [2 * 256 * 72, 2 * 256 * 144, 2 * 64 * 72, 2 * 64 * 32, 0, 0, 2 * 24]
    assert list(layers["positions"] * layers["channels"]) == [2048, 2048, 512, 256, 768, 12, 2]
    assert list(layers["kept"]) == [True] * 5 + [False, True] and layers["joins"].sum() == 1
    assert set(layers["itemsize"]) == {4}


def test_maps_are_stored_in_whole_tiles():
    layers = pd.DataFrame({"positions": [1, 10, 4, 4], "channels": [14, 32, 32, 128], "itemsize": [4, 2, 2, 2]})
    assert list(store_maps(layers, 16)) == [4 * 16 * 128, 20 * 128 * 16, 8 * 128 * 16, 8 * 128 * 16]
    assert list(store_maps(layers, 128)) == [4 * 16 * 128, 20 * 32 * 128, 8 * 32 * 128, 8 * 128 * 128]


@pytest.mark.parametrize("backbone", BLOCKS)
def test_counts_of_every_backbone_follow_size_and_precision(backbone):
    small, large = (count_layers(build_classifier(backbone, blocks=BLOCKS[backbone]), side) for side in (64, 128))
    assert large["flops"].sum() == pytest.approx(4 * small["flops"].sum(), rel=0.01)
    assert 0 < small["kept"].sum() < len(small) and list(small["channels"]) == list(large["channels"])
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        half = count_layers(build_classifier(backbone, blocks=BLOCKS[backbone]), 64)
    finally:
        keras.config.set_dtype_policy("float32")
    assert half["flops"].sum() == small["flops"].sum()
    assert set(half["itemsize"][:-1]) == {2} and half["itemsize"].iloc[-1] == 4  # the head stays in float32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "side", "products"),
    [("densenet121", 224, 2.83e9), ("convnext_base", 224, 15.36e9), ("efficientnetv2_s", 384, 8.37e9)],
)
def test_operations_are_those_of_the_published_networks(backbone, side, products):
    """Multiplications as in torchvision's documentation of its weights, with the head for ImageNet."""
    assert count_layers(build_classifier(backbone), side)["flops"].sum() == pytest.approx(2 * products, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("size", [size for size in ("small", "full", "best") if size in COMPILED])
def test_estimates_meet_what_was_compiled(densenet121, size):
    """The tolerances are those of the docstring of `estimate_step`."""
    for name, compiled in COMPILED[size].items():
        layers, n_images = count_layers(densenet121, compiled["side"]), compiled["batch"] // compiled["cores"]
        step = estimate_step(layers, densenet121.count_params(), n_images, CHIPS[name])
        assert step["bytes held"] == pytest.approx(compiled["bytes held"], rel=0.13)
        is_small = size == "small" or n_images < 16
        assert is_small or name == "v3-8" or step["bytes moved"] == pytest.approx(compiled["bytes moved"], rel=0.2)
        assert 0.45 < step["bytes moved"] / compiled["bytes moved"] < 1.6
        assert step["flops"] == pytest.approx(compiled["flops"], rel=0.12 if is_small else 0.03)


@pytest.mark.slow
def test_published_speed_of_resnet50_is_within_the_range():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = keras.applications.ResNet50(weights=None, input_shape=(None, None, 3), include_top=False)
    finally:
        keras.config.set_dtype_policy("float32")
    step = estimate_step(count_layers(model, 224), model.count_params(), 16, CHIPS["v3-8"])
    assert 1 < 16 / step["seconds"] / (1.05e6 / 2048) < SLOWDOWN


def test_table_of_a_run():
    model = build_classifier(blocks=[1, 1, 1, 1])
    table = estimate_cost(model, batch_size=128, **RUN, **HERE, kind="")
    assert list(table.index) == [*CHIPS, "this machine"]
    train, validate = (count_layers(model, side)["flops"].sum() for side in (224, 256))
    assert np.allclose(table["PFLOP a run"], 15e-15 * (78_000 * 3 * train + 8_000 * validate))
    assert list(table["images a core"]) == [128, 16, 16, 128]
    here = table.loc["this machine"]
    rate = HERE["forward_per_second"] * validate / train / 3
    assert here["images/s at best"] == pytest.approx(rate) and np.isnan(here["GB a core"])
    assert here["hours at best"] == pytest.approx(15 * (78_000 / rate + 8_000 / 20) / 3600)
    tpus = table.loc[list(CHIPS)]
    assert np.allclose(tpus[f"hours at {SLOWDOWN} times that"], SLOWDOWN * tpus["hours at best"])
    assert np.allclose(table["CPUs for best"], table["images/s at best"] / 1000)
    assert table.loc["v5e-8", "images/s at best"] > table.loc["v5e-1", "images/s at best"]
    twice = estimate_cost(model, batch_size=128, **RUN | {"epochs": 30}, **HERE, kind="")
    assert np.allclose(twice["hours at best"], 2 * table["hours at best"])


def test_batch_that_does_not_fit_is_refused_on_such_a_tpu_only():
    model = build_classifier(blocks=[1, 1, 1, 1])
    table = estimate_cost(model, batch_size=4096, **RUN, **HERE, kind="cpu")
    one, fits = table.loc["v5e-1"], int(table.loc["v5e-1", "BATCH_SIZE that fits"])
    assert one["GB a core"] > 16 and 0 < fits < 4096
    assert estimate_cost(model, batch_size=fits, **RUN, **HERE, kind="TPU v5 lite").loc["v5e-1", "GB a core"] <= 16
    with pytest.raises(ValueError, match=rf"BATCH_SIZE = 4096 takes about \d+ GB .* has 16\. Set it to {fits} or less"):
        estimate_cost(model, batch_size=4096, **RUN, **HERE, kind="TPU v5 lite")
    estimate_cost(model, batch_size=4096, **RUN, **HERE, kind="TPU v5 lite", n_replicas=8)
