"""The size at which whole images are evaluated: things are as large in them as in the training crops."""

import numpy as np
import pytest
import tensorflow as tf

from helpers.pipeline import N_DRAWS, Augmentation, augment, match_eval_size, scale_images


@pytest.mark.parametrize(
    "image_size, side, min_area, stride, expected",
    [
        (80, 88, 0.75, 16, 88),  # quick: 85.7 wanted
        (224, 256, 0.5, 32, 256),  # full: 262.4
        (512, 608, 0.5, 32, 608),  # best: 599.8
        (224, 320, 0.5, 32, 256),
        (224, 320, 0.75, 32, 256),  # 240.1
        (224, 224, 1, 32, 224),  # no crops
        (224, 240, 0.5, 32, 256),  # enlarged, as the crops are
        (80, 128, 0.75, 16, 80),
    ],
)
def test_the_size_matches_the_mean_scale_of_the_crops(image_size, side, min_area, stride, expected):
    found, scale = match_eval_size(image_size, side, min_area, stride=stride)
    assert found == expected
    wanted = image_size * np.mean(1 / np.sqrt(np.linspace(min_area, 1, 10_001)))
    assert scale == pytest.approx(found / wanted, rel=1e-3)
    assert abs(found - wanted) <= max(stride / 2, 0.05 * wanted)


def test_an_object_is_as_large_as_in_augmented_crops():
    """A square of 40 pixels in the middle of images of 128, whose crops are 96 pixels: its area tells the scale."""
    side, image_size, strength = 128, 96, Augmentation(min_area=0.4, translation=0, contrast=0, brightness=0)
    images = np.zeros((400, side, side, 1), np.uint8)
    images[:, 44:84, 44:84] = 200
    draws = tf.random.stateless_uniform((len(images), N_DRAWS), (1, 2))
    crops = augment(tf.constant(images), draws, image_size, strength).numpy()
    is_whole = crops[:, [0, -1]].max((1, 2, 3)) == 0  # the square touches no edge
    is_whole &= crops[:, :, [0, -1]].max((1, 2, 3)) == 0
    assert is_whole.mean() > 0.9
    in_crops = np.sqrt((crops[is_whole] / 200).sum((1, 2, 3))).mean()
    size, _ = match_eval_size(image_size, side, strength.min_area, stride=1)
    whole = np.sqrt((scale_images(tf.constant(images[:1]), size).numpy() / 200).sum())
    assert whole == pytest.approx(in_crops, rel=0.02)
    assert np.sqrt((scale_images(tf.constant(images[:1]), image_size).numpy() / 200).sum()) < 0.9 * in_crops


def test_a_size_chosen_by_hand_is_kept():
    assert match_eval_size(224, 320, 0.5, eval_size=288)[0] == 288


@pytest.mark.parametrize(
    "image_size, side, options, message",
    [
        (512, 256, {}, r"IMAGE_SIZE is 512, but the study is packed at 256 .* set IMAGE_SIZE to 256 or less"),
        (224, 608, {"eval_size": 300}, r"608 pixels alias at EVAL_SIZE 300\. Set EVAL_SIZE to 0"),
    ],
)
def test_sizes_that_do_not_fit_the_packed_side_are_refused(image_size, side, options, message):
    with pytest.raises(ValueError, match=message):
        match_eval_size(image_size, side, 0.5, **options)


def test_images_of_the_size_wanted_are_not_changed():
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 1), dtype=np.uint8)
    scaled = scale_images(tf.constant(images), 24)
    assert scaled.dtype == tf.float32 and np.array_equal(scaled, images)
