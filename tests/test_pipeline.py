"""Training and evaluation pipelines: order and augmentation that can be repeated, geometry, and nobody left out."""

import functools
import gc
import math
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from helpers.packing import load_packed_study, pack_study
from helpers.pipeline import (
    N_DRAWS,
    Augmentation,
    augment,
    count_steps,
    list_batch,
    make_eval_dataset,
    make_train_dataset,
)
from helpers.study import PATHOLOGIES

SIDE = 16
RUN = {"batch_size": 4, "epochs": 3, "strength": Augmentation()}
NO_CHANGE = Augmentation(min_area=1, max_stretch=1, rotation=0, translation=0, contrast=0, brightness=0)


def pack(noise, folder, **options):
    rows, paths = noise
    return pack_study(rows, paths, folder, split_name="official", side=SIDE, **options)


@pytest.fixture(scope="module")
def noise(make_images, tmp_path_factory):
    """37 train images and 10 val images, whose labels are their numbers in binary."""
    return make_images(tmp_path_factory.mktemp("pipeline") / "images", train=37, val=10)


@pytest.fixture(scope="module")
def study(noise, tmp_path_factory):
    """`noise` in train shards of 8, 8, 7, 7 and 7; never written to by a test."""
    return pack(noise, tmp_path_factory.mktemp("pipeline") / "packed", shard_images=8)


def make_train(study, batch_size=4, *, image_size=SIDE, seed=3, epochs=2, strength=NO_CHANGE, **options):
    return make_train_dataset(study, image_size, batch_size, seed=seed, epochs=epochs, strength=strength, **options)


def read(data):
    return [tuple(part.numpy() for part in batch) for batch in data]


def number_images(labels):
    """Returns the images' numbers from their labels."""
    return labels.astype(int) @ (1 << np.arange(14))


def read_order(data):
    return np.concatenate([number_images(labels) for _, labels in data.as_numpy_iterator()])


def assert_same(left, right):
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


# Training: what comes


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"window_shards": 1}, {"window_shards": 2}, {"batch_size": 8}])
def test_each_epoch_takes_every_image_once_but_for_the_remainder(study, options):
    batch_size = options.get("batch_size", 4)
    steps = 37 // batch_size
    order = read_order(make_train(study, epochs=5, **options)).reshape(5, steps * batch_size)
    train = set(number_images(study.labels("train")))
    assert len(train) == 37
    dropped = set()
    for epoch in order:
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= train
        dropped |= train - set(epoch)
    assert len(dropped) > 37 % batch_size  # other images every time


@pytest.mark.slow
def test_shards_of_very_unequal_size_lose_no_image(noise, study, tmp_path):
    rows, paths = noise
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"<html>")
    lost = study.rows("train")["image"][1:15].tolist()  # leaves 1, 1, 7, 7 and 7 images
    lame = pack((rows, paths | dict.fromkeys(lost, broken)), tmp_path / "packed", shard_images=8)
    assert [shard["count"] for shard in lame.shards["train"]] == [1, 1, 7, 7, 7]
    for window_shards in (1, 3):
        order = read_order(make_train(lame, 1, epochs=2, window_shards=window_shards)).reshape(2, 23)
        assert all(set(epoch) == set(number_images(lame.labels("train"))) for epoch in order)


@pytest.mark.slow
def test_without_augmentation_an_image_comes_as_it_is_with_its_own_labels(study):
    expected = {}
    for images, labels, mask in make_eval_dataset(study, "train", 10).as_numpy_iterator():
        expected |= {n: image for n, image, kept in zip(number_images(labels), images, mask, strict=True) if kept}
    assert len(expected) == 37
    for images, labels in make_train(study, epochs=1).as_numpy_iterator():
        for number, image in zip(number_images(labels), images, strict=True):
            np.testing.assert_allclose(image, expected[number], atol=1e-3)


def test_shapes_types_and_cardinality_are_known_and_true(study):
    data = make_train(study, 5, image_size=12, epochs=3)
    assert data.element_spec == (tf.TensorSpec((5, 12, 12, 1), tf.float32), tf.TensorSpec((5, 14), tf.float32))
    assert data.cardinality().numpy() == len(read(data)) == 3 * (37 // 5)
    assert make_train(study, 5, epochs=3, first_epoch=2).cardinality().numpy() == 7


@pytest.mark.slow
def test_a_finished_run_has_nothing_left(study):
    for first_epoch in (2, 3):
        data = make_train(study, 37, epochs=2, first_epoch=first_epoch)
        assert data.cardinality().numpy() == 0
        assert read(data) == []


@pytest.mark.slow
def test_augmented_values_stay_in_range(study):
    batches = read(make_train(study, image_size=20, strength=Augmentation(contrast=0.9, brightness=0.5)))
    values = np.concatenate([images.ravel() for images, _ in batches])
    assert values.min() == 0 and values.max() == 255


# Training: that it can be repeated


@pytest.fixture(scope="module")
def whole(study):
    """Function window_shards -> all batches of a run of three epochs of 9 steps, read once."""
    return functools.cache(lambda window_shards: read(make_train(study, **RUN, window_shards=window_shards)))


@pytest.mark.slow
@pytest.mark.parametrize("window_shards", [1, 8])
def test_seed_and_epoch_alone_decide_whatever_the_global_seed(study, whole, window_shards):
    for global_seed, n_parallel in ((2, 1), (3, 3)):
        tf.random.set_seed(global_seed)
        data = make_train(study, **RUN, window_shards=window_shards, n_parallel=n_parallel)
        assert_same(read(data), whole(window_shards))
    assert_same(read(data), whole(window_shards))  # also when read twice


@pytest.mark.slow
@pytest.mark.parametrize(
    ("window_shards", "epoch", "step"),
    [(1, 0, 1), (1, 1, 0), (1, 2, 7), (2, 0, 8), (2, 1, 4), (2, 2, 0), (8, 1, 0), (8, 2, 3)],
)
def test_a_resumed_run_sees_the_tail_of_the_whole_one(study, whole, window_shards, epoch, step):
    tail = read(make_train(study, first_epoch=epoch, first_step=step, window_shards=window_shards, **RUN))
    assert_same(tail, whole(window_shards)[epoch * 9 + step :])


def find_shards(study):
    """Returns a dict from the number of each training image to the file of its shard."""
    shards = zip(study.files("train"), study.shards["train"], strict=True)
    files = [file for file, shard in shards for _ in range(shard["count"])]
    return dict(zip(number_images(study.labels("train")), files, strict=True))


@pytest.mark.slow
def test_shards_used_up_before_the_step_are_not_read_again(copy):
    """All shards but that of the epoch's last image are emptied on the disk: the last step still comes."""
    data = make_train(copy, 1, epochs=1, first_step=36, window_shards=1)
    (last,) = read_order(data)
    shards = find_shards(copy)
    for path in set(shards.values()) - {shards[last]}:
        Path(path).write_bytes(b"")
    assert read_order(data) == [last]


@pytest.mark.slow
def test_hosts_read_shards_of_their_own_and_make_up_the_whole_batches(study):
    options = {"batch_size": 4, "epochs": 2, "n_hosts": 2, "strength": Augmentation()}
    whole, *parts = (read(make_train(study, host=host, **options)) for host in (None, 0, 1))
    steps = count_steps(study, 4, n_hosts=2)
    assert len(whole) == 2 * steps == len(parts[0])
    joined = [tuple(np.concatenate(some) for some in zip(*pair, strict=True)) for pair in zip(*parts, strict=True)]
    assert_same(joined, whole)
    shards = find_shards(study)
    for epoch in (slice(steps), slice(steps, None)):
        read_by = [{shards[n] for _, labels in part[epoch] for n in number_images(labels)} for part in parts]
        assert not read_by[0] & read_by[1]
    tail = read(make_train(study, first_epoch=1, first_step=2, host=1, **options))
    assert_same(tail, parts[1][steps + 2 :])
    names = list_batch(study, 4, seed=3, epoch=1, step=2, n_hosts=2, host=1)
    labels = study.rows("train").set_index("image")[list(PATHOLOGIES)]
    assert np.array_equal(labels.loc[names], tail[0][1])


@pytest.mark.parametrize(("batch_size", "n_hosts"), [(5, 2), (40, 40)])
def test_batches_that_cannot_be_dealt_to_the_hosts_are_refused(study, batch_size, n_hosts):
    with pytest.raises(ValueError, match=f"BATCH_SIZE {batch_size} .* {n_hosts} hosts"):
        make_train(study, batch_size, n_hosts=n_hosts)


@pytest.mark.slow
def test_the_images_of_a_batch_are_listed(study, whole):
    labels = study.rows("train").set_index("image")[list(PATHOLOGIES)]
    for epoch, step in ((0, 0), (1, 8)):
        images = list_batch(study, 4, seed=3, epoch=epoch, step=step)
        assert np.array_equal(labels.loc[images], whole(2)[epoch * 9 + step][1])


def test_the_number_of_epochs_changes_nothing_in_those_before(study, whole):
    assert_same(read(make_train(study, **RUN | {"epochs": 1})), whole(2)[:9])


@pytest.mark.slow
def test_other_seeds_and_other_epochs_give_another_order(study):
    orders = [
        tuple(read_order(make_train(study, 37, seed=seed, epochs=1, window_shards=window_shards)))
        for seed in range(2)
        for window_shards in (1, 8)
    ]
    orders += [tuple(epoch) for epoch in read_order(make_train(study, 37, epochs=6, seed=9)).reshape(6, 37)]
    assert len(set(orders)) == 10


@pytest.mark.slow
def test_other_seeds_and_other_epochs_give_another_augmentation(make_images, tmp_path):
    """With a single image the order cannot differ, so that all difference is augmentation."""
    single = pack(make_images(tmp_path / "images", train=1), tmp_path / "packed")
    images = [
        images.tobytes()
        for seed in range(2)
        for images, _ in read(make_train(single, 1, seed=seed, epochs=10, strength=Augmentation()))
    ]
    assert len(set(images)) == len(images) == 20


@pytest.fixture(scope="module")
def many(make_images, tmp_path_factory):
    """240 train images in 12 shards of 20."""
    folder = tmp_path_factory.mktemp("many")
    return pack(make_images(folder / "images", train=240), folder / "packed", shard_images=20)


@pytest.mark.slow
@pytest.mark.parametrize("window_shards", [1, 12])
def test_positions_in_different_epochs_are_not_correlated(many, window_shards):
    # Windows of one shard shuffle least: only the shards' order and the order within each changes.
    order = read_order(make_train(many, 24, epochs=24, window_shards=window_shards)).reshape(24, 240)
    places = np.argsort(order, axis=1)
    between = np.corrcoef(places)[np.triu_indices(24, 1)]
    # 276 pairs; with one shard a window 12 shards are permuted, so a pair deviates by 1 / sqrt(11) at most.
    assert abs(between.mean()) < 0.05
    assert np.abs(between).max() < (0.99 if window_shards == 1 else 0.3)
    if window_shards == 12:
        assert abs(np.mean([np.corrcoef(row[:-1], row[1:])[0, 1] for row in order])) < 0.05
        # Every image visits the early, the middle and the late part of epochs.
        thirds = (places[..., None] // 80 == np.arange(3)).sum(0)
        assert thirds.min() >= 1
        assert np.abs((places - 119.5).mean(0)).max() < 70


@pytest.mark.slow
def test_the_windows_of_an_epoch_are_not_shuffled_alike(many):
    place = {number: place % 20 for place, number in enumerate(number_images(many.labels("train")))}
    order = read_order(make_train(many, 20, epochs=1, window_shards=1)).reshape(12, 20)
    assert len({tuple(place[number] for number in window) for window in order}) == 12


@pytest.mark.slow
def test_a_window_mixes_the_images_of_its_shards(study):
    """The interleaved shards are shuffled as one, not image by image of each shard in turn."""
    shard_of = {
        number: shard
        for shard, numbers in enumerate(np.split(number_images(study.labels("train")), [8, 16, 23, 30]))
        for number in numbers
    }
    order = read_order(make_train(study, 1, epochs=8, window_shards=8)).reshape(8, 37)
    shards = np.vectorize(shard_of.get)(order)
    repeats = (shards[:, 1:] == shards[:, :-1]).mean()  # 0.18 by chance, 0 when dealt in turn, 0.89 one by one
    assert 0.1 < repeats < 0.3


# Training: what is refused, and what fails loudly


def test_too_few_images_for_a_batch_are_refused(study):
    with pytest.raises(ValueError, match=r"BATCH_SIZE is 38, but .* holds only 37 images"):
        make_train(study, 38)
    assert make_train(study, 37).cardinality().numpy() == 2


def test_a_study_without_training_images_is_refused(make_images, tmp_path):
    with pytest.raises(ValueError, match=r"BATCH_SIZE is 1, but .* holds only 0 images"):
        make_train(pack(make_images(tmp_path / "images", val=3), tmp_path / "packed"), 1)


def test_images_much_larger_than_the_crops_are_refused(study):
    for image_size in (4, SIDE // 2):
        with pytest.raises(ValueError, match=f"packed at {SIDE} pixels alias in crops of {image_size}"):
            make_train(study, image_size=image_size)
    make_train(study, image_size=SIDE // 2 + 1)


@pytest.fixture
def copy(study, tmp_path):
    return load_packed_study(shutil.copytree(study.folder, tmp_path / "copy"))


@pytest.mark.slow
@pytest.mark.parametrize("subset", ["train", "val"])
def test_a_record_damaged_after_loading_is_an_error(copy, subset):
    path = Path(copy.files(subset)[-1])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(tf.errors.DataLossError):
        read(make_train(copy) if subset == "train" else make_eval_dataset(copy, "val", 4))


@pytest.mark.slow
@pytest.mark.parametrize("subset", ["train", "val"])
def test_a_shard_cut_at_the_border_of_a_record_after_loading_is_an_error(copy, subset):
    path = copy.files(subset)[-1]
    records = [record.numpy() for record in tf.data.TFRecordDataset(path)]
    with tf.io.TFRecordWriter(path) as writer:
        writer.write(records[0])
    with pytest.raises(tf.errors.OpError, match="expected to contain"):
        read(make_train(copy) if subset == "train" else make_eval_dataset(copy, "val", 2))


def read_resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc/self/statm")
def test_memory_does_not_grow_with_the_epochs(study):
    """Warmed up over 9 epochs, 9 more (of 1.3 MB of images each) stay within a few megabytes."""
    data = make_train(study, image_size=96, epochs=27, strength=Augmentation(), n_parallel=1)
    resident = []
    for step, _ in enumerate(data.as_numpy_iterator()):
        if step % (3 * 9) == 0:
            gc.collect()
            resident.append(read_resident_bytes())
    assert len(resident) == 9
    assert min(resident[6:]) - min(resident[3:6]) < 5e6


# Augmentation


def draw(n=1, **named):
    """Returns draws that change nothing (0.5 everywhere), but for those named."""
    places = {"area": 0, "stretch": 1, "x": 2, "y": 3, "rotation": 4, "flip": 5, "contrast": 6, "brightness": 7}
    draws = np.full((n, N_DRAWS), 0.5, np.float32)
    for name, values in named.items():
        draws[:, places[name]] = values
    return tf.constant(draws)


def change(image, image_size=None, *, draws=None, **strength):
    """Augments one image (height, width) and returns one."""
    strength = Augmentation(**{name: getattr(NO_CHANGE, name) for name in vars(NO_CHANGE)} | strength)
    result = augment(image[None, ..., None], draw() if draws is None else draws, image_size or len(image), strength)
    return result.numpy()[0, ..., 0]


def find_center(image):
    """Returns x and y of the center of mass, in pixels."""
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    return (image * x).sum() / image.sum(), (image * y).sum() / image.sum()


def make_dot(side, x, y, radius=3.0):
    """Returns a smooth bright dot on black."""
    rows, columns = np.mgrid[:side, :side]
    return np.rint(200 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * radius**2))).astype(np.uint8)


def make_draws(n, seed=0):
    return tf.constant(np.random.default_rng(seed).random((n, N_DRAWS)), tf.float32)


NOISE = np.random.default_rng(2).integers(0, 256, (32, 32), dtype=np.uint8)


def test_no_strength_gives_the_image_back_whatever_is_drawn():
    images = np.repeat(NOISE[None, ..., None], 50, 0)
    np.testing.assert_allclose(augment(images, make_draws(50), 32, NO_CHANGE), images, atol=1e-3)


def test_middling_draws_of_the_default_strength_are_a_centered_crop():
    dot = make_dot(64, 31.5, 31.5, 5)
    x, y = find_center(change(dot, **vars(Augmentation())))
    assert (x, y) == pytest.approx((31.5, 31.5), abs=0.01)


def test_no_image_is_ever_upside_down():
    image = np.zeros((16, 16, 1), np.uint8)
    image[:8] = 200
    for strength in (Augmentation(), Augmentation(horizontal_flip=True, rotation=15, contrast=0.5)):
        images = augment(np.repeat(image[None], 1000, 0), make_draws(1000), 16, strength).numpy()[..., 0]
        # The middle, since a crop may leave the image at its border.
        assert (images[:, 2:6, 4:12].mean((1, 2)) > images[:, -6:-2, 4:12].mean((1, 2)) + 20).all()


def test_images_are_mirrored_only_where_asked_for_and_then_half_of_them():
    image = np.zeros((16, 16, 1), np.uint8)
    image[:, :8] = 200
    images = np.repeat(image[None], 1000, 0)
    left, right = np.s_[:, 4:12, 2:6], np.s_[:, 4:12, -6:-2]
    plain = augment(images, make_draws(1000), 16, Augmentation()).numpy()[..., 0]
    assert (plain[left].mean((1, 2)) > plain[right].mean((1, 2))).all()
    flipped = augment(images, make_draws(1000), 16, Augmentation(horizontal_flip=True)).numpy()[..., 0]
    assert 440 < (flipped[left].mean((1, 2)) < flipped[right].mean((1, 2))).sum() < 560


def test_a_mirrored_image_is_the_image_mirrored():
    mirrored = change(NOISE, draws=draw(flip=0.2), horizontal_flip=True)
    np.testing.assert_allclose(mirrored, NOISE[:, ::-1], atol=1e-3)
    np.testing.assert_allclose(change(NOISE, draws=draw(flip=0.7), horizontal_flip=True), NOISE, atol=1e-3)


@pytest.mark.parametrize(("name", "axis"), [("x", 1), ("y", 0)])
@pytest.mark.parametrize(("drawn", "pixels"), [(1.0, 4), (0.0, -4), (0.75, 2), (0.5, 0)])
def test_translation_moves_the_image_and_leaves_black(name, axis, drawn, pixels):
    """An eighth of 32 pixels is 4; the crop moves to higher places, so what is seen moves to lower ones."""
    image = np.maximum(NOISE, 1)
    moved = change(image, draws=draw(**{name: drawn}), translation=0.125)
    expected = np.roll(image, -pixels, axis).astype(float)
    if pixels:
        beyond = np.s_[-pixels:] if pixels > 0 else np.s_[:-pixels]
        expected[(slice(None),) * axis + (beyond,)] = 0
    np.testing.assert_allclose(moved, expected, atol=1e-3)


@pytest.mark.parametrize("angle", [7, -7, 30])
@pytest.mark.parametrize("flip", [False, True])
def test_rotation_turns_about_the_center(angle, flip):
    """A positive angle turns what is seen counterclockwise, with y pointing down; mirroring comes after."""
    side, middle = 129, 64.0
    sine, cosine = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    for u, v in ((40, 0), (0, -40), (-25, 30)):
        dot = make_dot(side, middle + u, middle + v)
        draws = draw(rotation=1.0 if angle > 0 else 0.0, flip=0.0)
        turned = change(dot, draws=draws, rotation=abs(angle), horizontal_flip=flip)
        x, y = cosine * u + sine * v, -sine * u + cosine * v
        expected = middle + (-x if flip else x), middle + y
        assert find_center(turned) == pytest.approx(expected, abs=0.1)
        assert turned.sum() == pytest.approx(dot.sum(), rel=1e-3)  # neither squeezed nor stretched


def test_crop_stretch_and_rotation_together_stretch_along_the_sides_of_the_crop():
    """A turned crop of 91 by 45 of 129 pixels: the image turns first and is stretched along the result's axes after."""
    side, middle, angle = 129, 64.0, math.radians(20)
    for u, v in ((16, 0), (0, 12), (-10, 8)):
        dot = make_dot(side, middle + u, middle + v, 2)
        draws = draw(area=0.0, stretch=1.0, rotation=1.0)
        changed = change(dot, draws=draws, min_area=0.25, max_stretch=2.0, rotation=20)
        x, y = math.cos(angle) * u + math.sin(angle) * v, -math.sin(angle) * u + math.cos(angle) * v
        expected = middle + math.sqrt(2) * x, middle + math.sqrt(8) * y
        assert find_center(changed) == pytest.approx(expected, abs=0.1)


def test_rotation_is_by_the_same_angle_at_another_image_size():
    dot = make_dot(128, 63.5 + 40, 63.5, 4)
    turned = change(dot, 96, draws=draw(rotation=1.0), rotation=7)
    u = 0.75 * 40
    angle = math.radians(7)
    assert find_center(turned) == pytest.approx((47.5 + u * math.cos(angle), 47.5 - u * math.sin(angle)), abs=0.1)


def test_a_rotated_image_has_black_corners():
    image = np.full((65, 65), 100, np.uint8)
    turned = change(image, draws=draw(rotation=1.0), rotation=20)
    assert turned[0, 0] == turned[0, -1] == turned[-1, 0] == turned[-1, -1] == 0
    assert turned[16:49, 16:49] == pytest.approx(100, abs=1e-3)


def test_a_crop_of_a_quarter_of_the_area_doubles_the_middle():
    dots = make_dot(64, 31.5 + 6, 31.5 - 4, 2)
    zoomed = change(dots, 64, draws=draw(area=0.0), min_area=0.25)
    assert find_center(zoomed) == pytest.approx((31.5 + 12, 31.5 - 8), abs=0.1)
    assert zoomed.sum() == pytest.approx(4 * dots.sum(), rel=1e-2)
    np.testing.assert_allclose(change(dots, 32, draws=draw(area=0.0), min_area=0.25), dots[16:48, 16:48], atol=1e-3)


@pytest.mark.parametrize(("x", "y"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_a_crop_reaches_all_corners_and_stays_inside(x, y):
    image = np.maximum(NOISE, 1)
    corner = change(image, 16, draws=draw(area=0.0, x=x, y=y), min_area=0.25)
    left, top = int(16 * x), int(16 * y)
    np.testing.assert_allclose(corner, image[top : top + 16, left : left + 16], atol=1e-3)


@pytest.mark.parametrize(("drawn", "wide"), [(1.0, True), (0.0, False)])
def test_stretching_keeps_the_area_of_the_crop(drawn, wide):
    """A crop twice as wide as high, of a quarter of the area: what is seen is half as wide for its height."""
    image = make_dot(128, 63.5, 63.5, 5)
    stretched = change(image, draws=draw(area=0.0, stretch=drawn), min_area=0.25, max_stretch=2.0)
    y, x = np.mgrid[:128, :128]
    width = math.sqrt((stretched * (x - 63.5) ** 2).sum() / stretched.sum())
    height = math.sqrt((stretched * (y - 63.5) ** 2).sum() / stretched.sum())
    assert (height / width if wide else width / height) == pytest.approx(2, rel=0.02)
    assert width * height == pytest.approx(4 * 25, rel=0.03)


def test_the_area_of_crops_is_uniform_between_its_limits():
    """Measured on a ramp, whose slope in the result is the width of the crop."""
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))[None, ..., None]
    draws = draw(400, area=np.linspace(0, 1, 400))
    images = augment(np.repeat(ramp, 400, 0), draws, 64, Augmentation(0.25, 1, 0, 0, 0, 0)).numpy()[..., 0]
    share = ((images[:, 32, 52] - images[:, 32, 12]) / 40 / (255 / 63)) ** 2
    np.testing.assert_allclose(share, np.linspace(0.25, 1, 400), atol=0.03)  # gray levels are whole numbers


@pytest.mark.parametrize(("drawn", "gain"), [(1.0, 1.4), (0.0, 0.6), (0.5, 1.0)])
def test_contrast_turns_about_the_middle_of_the_range(drawn, gain):
    changed = change(NOISE, draws=draw(contrast=drawn), contrast=0.4)
    expected = np.clip(127.5 + gain * (NOISE - 127.5), 0, 255)
    np.testing.assert_allclose(changed, expected, atol=0.501)


@pytest.mark.parametrize(("drawn", "shift"), [(1.0, 51), (0.0, -51), (0.75, 25.5)])
def test_brightness_is_a_share_of_the_range_and_is_clipped(drawn, shift):
    changed = change(NOISE, draws=draw(brightness=drawn), brightness=0.2)
    np.testing.assert_allclose(changed, np.clip(NOISE.astype(float) + shift, 0, 255), atol=0.501)


def test_augmentation_is_the_same_eagerly_and_in_a_dataset():
    images = np.random.default_rng(1).integers(0, 256, (12, 24, 24, 1), dtype=np.uint8)
    draws, strength = make_draws(12), Augmentation(horizontal_flip=True)
    eager = augment(images, draws, 20, strength).numpy()
    assert eager.tobytes() == augment(images, draws, 20, strength).numpy().tobytes()
    data = tf.data.Dataset.from_tensor_slices((images, draws)).batch(4, drop_remainder=True)
    data = data.map(lambda images, draws: augment(images, draws, 20, strength))
    assert data.element_spec == tf.TensorSpec((4, 20, 20, 1), tf.float32)
    np.testing.assert_allclose(np.concatenate(list(data.as_numpy_iterator())), eager, atol=1e-3)
    # An image's result does not depend on its neighbors in the batch.
    np.testing.assert_allclose(augment(images[5:6], draws[5:6], 20, strength), eager[5:6], atol=1e-3)


# Evaluation


@pytest.fixture(scope="module")
def val_images(study):
    """The 10 images of the validation subset as packed, float32 (10, SIDE, SIDE, 1)."""
    return np.concatenate([images for images, *_ in read(make_eval_dataset(study, "val", 5))])


@pytest.mark.parametrize("batch_size", [1, 4, 10, 64])
def test_evaluation_takes_every_image_once_in_order_and_pads_with_black(study, batch_size):
    data = make_eval_dataset(study, "val", batch_size)
    steps = -(-10 // batch_size)
    assert data.cardinality().numpy() == steps
    shapes = (batch_size, SIDE, SIDE, 1), (batch_size, 14), (batch_size,)
    assert data.element_spec == tuple(tf.TensorSpec(shape, tf.float32) for shape in shapes)
    batches = read(data)
    assert len(batches) == steps
    images, labels, mask = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    np.testing.assert_array_equal(mask, np.arange(steps * batch_size) < 10)
    np.testing.assert_array_equal(labels[:10], study.labels("val"))
    assert not labels[10:].any() and not images[10:].any()
    assert images[:10].reshape(10, -1).any(1).all()


def test_evaluation_images_are_whole_and_unchanged(noise, study, val_images):
    for image, name in zip(val_images, study.rows("val")["image"], strict=True):
        np.testing.assert_array_equal(image[..., 0], np.asarray(Image.open(noise[1][name])))


def test_evaluation_of_images_in_many_shards_is_in_the_order_of_the_index(study):
    labels = np.concatenate([labels for _, labels, _ in read(make_eval_dataset(study, "train", 37))])
    np.testing.assert_array_equal(labels, study.labels("train"))


def test_evaluation_of_no_image_is_empty(study):
    data = make_eval_dataset(study, "test", 4)
    assert data.cardinality().numpy() == 0
    assert read(data) == []


@pytest.mark.slow
@pytest.mark.parametrize("image_size", [4, 8, 12, 16, 32])
def test_evaluation_resizes_to_another_image_size(study, val_images, image_size):
    data = make_eval_dataset(study, "val", 5, image_size=image_size)
    assert data.element_spec[0] == tf.TensorSpec((5, image_size, image_size, 1), tf.float32)
    images = np.concatenate([images for images, *_ in read(data)])
    assert images.min() >= 0 and images.max() <= 255
    np.testing.assert_allclose(images.mean(), val_images.mean(), atol=2)
    if image_size in (4, 8):  # noise shows whether pixels are averaged or skipped
        factor = 16 // image_size
        blocks = val_images.reshape(10, image_size, factor, image_size, factor, 1).mean((2, 4))
        np.testing.assert_allclose(images, blocks, atol=1e-3)


@pytest.mark.parametrize("shift", [(2, 0), (-1, 3), (0, -2)])
def test_shifted_views_move_every_image_and_mirror_the_edge(study, val_images, shift):
    moved = np.concatenate([images for images, *_ in read(make_eval_dataset(study, "val", 5, shift=shift))])
    padded = np.pad(val_images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="symmetric")
    side = SIDE
    down, right = shift
    np.testing.assert_array_equal(moved, padded[:, 4 - down : 4 - down + side, 4 - right : 4 - right + side])


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [5, 16])
def test_the_mask_keeps_padding_out_of_what_keras_evaluates(study, batch_size):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((SIDE, SIDE, 1))
    logits = keras.layers.Dense(14)(keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(inputs)))
    model = keras.Model(inputs, logits)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    metric = keras.metrics.BinaryCrossentropy(from_logits=True, name="bce")
    model.compile(loss=loss, weighted_metrics=[metric], jit_compile=False)
    result = model.evaluate(make_eval_dataset(study, "val", batch_size), verbose=0, return_dict=True)

    images, labels, mask = (
        np.concatenate(parts) for parts in zip(*read(make_eval_dataset(study, "val", 5)), strict=True)
    )
    assert mask.all()
    x = model(images).numpy().astype(float)
    by_hand = np.mean(labels * np.logaddexp(0, -x) + (1 - labels) * np.logaddexp(0, x))
    assert result["bce"] == pytest.approx(by_hand, rel=1e-5)
    # Keras divides its own `loss` by the places in the batches, padding and all.
    places = batch_size * -(-10 // batch_size)
    assert result["loss"] == pytest.approx(by_hand * 10 / places, rel=1e-5)
