"""Training and evaluation pipelines: order and augmentation that can be repeated, geometry, and nobody left out."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from helpers.packing import load_packed_study, pack_study
from helpers.pipeline import (
    Augmentation,
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
@pytest.mark.parametrize("batch_size", [4, 8])
def test_each_epoch_takes_every_image_once_but_for_the_remainder(study, batch_size):
    steps = 37 // batch_size
    order = read_order(make_train(study, batch_size, epochs=5)).reshape(5, steps * batch_size)
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
    order = read_order(make_train(lame, 1, epochs=2)).reshape(2, 23)
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


def test_no_thread_that_tunes_a_pipeline_is_waited_for_at_its_end(study):
    """The wait itself takes minutes to come about."""
    for data in (make_train(study), make_eval_dataset(study, "val", 4)):
        assert not data.options().autotune.enabled


@pytest.mark.slow
def test_a_finished_run_has_nothing_left(study):
    for first_epoch in (2, 3):
        data = make_train(study, 37, epochs=2, first_epoch=first_epoch)
        assert data.cardinality().numpy() == 0
        assert read(data) == []


def list_ops(data):
    """Returns the names of all operations in the graph of a dataset, those of its functions too."""
    graph = tf.raw_ops.DatasetToGraphV2(input_dataset=tf.data.experimental.to_variant(data)).numpy()
    graph = tf.compat.v1.GraphDef.FromString(graph)
    nodes = [graph.node, *(function.node_def for function in graph.library.function)]
    return {node.op for some in nodes for node in some}


@pytest.mark.parametrize("rotation", [0, 7])
def test_training_batches_never_wait_for_python(study, rotation):
    """A call into Python waits for its lock: beside a busy thread, a training run would starve."""
    data = make_train(study, strength=Augmentation(rotation=rotation, horizontal_flip=True, erasing=0.5))
    ops = list_ops(data)
    assert ("ImageProjectiveTransformV3" if rotation else "ResizeBilinear") in ops  # so functions are looked into
    assert not [op for op in ops if "PyFunc" in op]
    python = data.map(lambda images, _: tf.numpy_function(lambda images: images, [images], tf.float32))
    assert [op for op in list_ops(python) if "PyFunc" in op]


# Training: that it can be repeated


@pytest.fixture(scope="module")
def whole(study):
    """All batches of a run of three epochs of 9 steps, read once."""
    return read(make_train(study, **RUN))


@pytest.mark.slow
def test_seed_and_epoch_alone_decide_whatever_the_global_seed(study, whole):
    for global_seed in (2, 3):
        tf.random.set_seed(global_seed)
        data = make_train(study, **RUN)
        assert_same(read(data), whole)
    assert_same(read(data), whole)  # also when read twice


@pytest.mark.slow
@pytest.mark.parametrize(("epoch", "step"), [(0, 1), (0, 8), (1, 0), (1, 4), (2, 0), (2, 7)])
def test_a_resumed_run_sees_the_tail_of_the_whole_one(study, whole, epoch, step):
    tail = read(make_train(study, first_epoch=epoch, first_step=step, **RUN))
    assert_same(tail, whole[epoch * 9 + step :])


def find_shards(study):
    """Returns a dict from the number of each training image to the file of its shard."""
    shards = zip(study.files("train"), study.shards["train"], strict=True)
    files = [file for file, shard in shards for _ in range(shard["count"])]
    return dict(zip(number_images(study.labels("train")), files, strict=True))


@pytest.mark.slow
def test_shards_used_up_before_the_step_are_not_read_again(copy):
    """All shards but that of the epoch's last image are emptied on the disk: the last step still comes."""
    data = make_train(copy, 1, epochs=1, first_step=36)
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
        assert np.array_equal(labels.loc[images], whole[epoch * 9 + step][1])


def test_the_number_of_epochs_changes_nothing_in_those_before(study, whole):
    assert_same(read(make_train(study, **RUN | {"epochs": 1})), whole[:9])


@pytest.mark.slow
def test_other_seeds_and_other_epochs_give_another_order(study):
    orders = [tuple(read_order(make_train(study, 37, seed=seed, epochs=1))) for seed in range(2)]
    orders += [tuple(epoch) for epoch in read_order(make_train(study, 37, epochs=6, seed=9)).reshape(6, 37)]
    assert len(set(orders)) == 8


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
def test_positions_in_different_epochs_are_not_correlated(many):
    order = read_order(make_train(many, 24, epochs=24)).reshape(24, 240)
    places = np.argsort(order, axis=1)
    between = np.corrcoef(places)[np.triu_indices(24, 1)]
    # Of 276 pairs; since 12 shards are permuted, a single pair may well be correlated.
    assert abs(between.mean()) < 0.05 and np.abs(between).max() < 0.95
    # Every image visits the early, the middle and the late part of epochs.
    thirds = (places[..., None] // 80 == np.arange(3)).sum(0)
    assert thirds.min() >= 1
    assert np.abs((places - 119.5).mean(0)).max() < 70


@pytest.mark.slow
def test_the_windows_of_an_epoch_are_not_shuffled_alike(many):
    place = {number: place % 20 for place, number in enumerate(number_images(many.labels("train")))}
    order = read_order(make_train(many, 20, epochs=1)).reshape(6, 40)
    assert len({tuple(place[number] for number in window) for window in order}) == 6


@pytest.mark.slow
def test_a_window_mixes_the_images_of_its_shards(study):
    """The interleaved shards are shuffled as one, not image by image of each shard in turn."""
    shard_of = {
        number: shard
        for shard, numbers in enumerate(np.split(number_images(study.labels("train")), [8, 16, 23, 30]))
        for number in numbers
    }
    order = read_order(make_train(study, 1, epochs=8)).reshape(8, 37)
    shards = np.vectorize(shard_of.get)(order)
    repeats = (shards[:, 1:] == shards[:, :-1]).mean()
    assert 0.4 < repeats < 0.7  # 0.2 when the shards of a window are dealt in turn, 0.89 when read one by one


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
