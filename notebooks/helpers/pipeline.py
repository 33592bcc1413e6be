"""tf.data pipelines over a packed study: `make_train_dataset` and `make_eval_dataset`.

Read these two functions first; what follows are their steps. The order and the augmentation of the training images
depend on the seed, the epoch and the position within it, and on nothing else, so a run that is resumed at any step
sees exactly what the uninterrupted run would have seen. Everything runs on the host, in batches, with static shapes
and known cardinality.
"""

import tensorflow as tf

from .augmentation import N_DRAWS, Augmentation, augment

_WINDOW = 2  # shards in memory at a time


def make_train_dataset(study, image_size, batch_size, *, strength=None, **order):
    """Makes the training pipeline: one stream over all epochs that remain.

    Args:
        study: a `PackedStudy`.
        image_size: int, side of the crops in pixels.
        batch_size: int, global over all replicas and hosts.
        strength: an `Augmentation`; None for the default.
        **order: `seed`, `epochs` and the other arguments of `_order_images`: where to resume, and which host this is.

    Returns:
        A Dataset of (images, labels): float32 (batch_size, image_size, image_size, 1), 0 to 255, and float32
        (batch_size, findings), NaN where unknown; its cardinality is the number of steps that remain. Each of several
        hosts gets its share of the batch only.

    Raises:
        ValueError: the packed images are so large that crops would alias, or see `_order_images`.
    """
    if study.side >= 2 * image_size:
        raise ValueError(
            f"Images packed at {study.side} pixels alias in crops of {image_size}. Pack at less than twice."
        )
    strength = strength or Augmentation()

    def parse_and_augment(records, draws):
        images, labels = study.parse(records)
        return augment(images, draws, image_size, strength), labels

    data = _order_images(study, batch_size, **order)
    data = data.map(parse_and_augment, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return _stop_tuning(data.prefetch(tf.data.AUTOTUNE))


def make_eval_dataset(study, subset, batch_size, *, image_size=None, shift=(0, 0)):
    """Makes the evaluation pipeline: every image once, whole, in the order of `study.rows(subset)`.

    The last batch is filled up with black images of mask 0, so that shapes are static and any number of replicas
    divides every batch; no image is dropped.

    Args:
        study: a `PackedStudy`.
        subset: "train", "val" or "test".
        batch_size: int, global over all replicas.
        image_size: int, pixels, see `match_eval_size`; None for the side at which the study is packed.
        shift: pixels down and to the right by which every image is moved, see `shift_images`: a view for averaging.

    Returns:
        A Dataset of (images, labels, mask): float32 (batch_size, image_size, image_size, 1), 0 to 255, float32
        (batch_size, findings) and float32 (batch_size,), 1 for images and 0 for padding.
    """
    size = image_size or study.side

    def parse_and_pad(records):
        images, labels = study.parse(records)
        images = scale_images(images, size)
        images = shift_images(images, shift) if any(shift) else images
        mask = tf.ones(tf.shape(labels)[0])
        n_missing = batch_size - tf.shape(labels)[0]
        padded = [tf.pad(x, [[0, n_missing]] + [[0, 0]] * (len(x.shape) - 1)) for x in (images, labels, mask)]
        shapes = (batch_size, size, size, 1), (batch_size, len(study.findings)), (batch_size,)
        return tuple(tf.ensure_shape(x, shape) for x, shape in zip(padded, shapes, strict=True))

    data = tf.data.TFRecordDataset(study.files(subset), num_parallel_reads=None)
    data = data.batch(batch_size)
    data = data.map(parse_and_pad, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    data = data.apply(tf.data.experimental.assert_cardinality(-(-len(study.rows(subset)) // batch_size)))
    return _stop_tuning(data.prefetch(tf.data.AUTOTUNE))


def _stop_tuning(data):
    # The thread that tunes a pipeline while it runs wakes ever more rarely, in the end once a minute. TensorFlow may
    # wait for that when the pipeline ends (seen in 2.21, nearly a minute after each training). Without it, as many
    # batches as there are cores are made at a time, at most 16.
    options = tf.data.Options()
    options.autotune.enabled = False
    return data.with_options(options)


def scale_images(images, size):
    """Scales whole images to the size of evaluation; the exported model does it with the same operation.

    Args:
        images: uint8 tensor (batch, side, side, 1).
        size: int, pixels.

    Returns:
        float32 tensor (batch, size, size, 1), 0 to 255; of images of this size, the same values.
    """
    side = images.shape[1]
    if side == size:
        return tf.cast(images, tf.float32)
    # At less than half the side, bilinear would skip pixels. Above that, images packed at 320 pixels come within 1.05
    # gray levels (root mean square) of those packed at 224; with `antialias=True` 1.44, at a third of the speed.
    return tf.image.resize(images, (size, size), "area" if side >= 2 * size else "bilinear")


def match_eval_size(image_size, side, min_area, *, stride=32, eval_size=0):
    """Chooses the size at which whole images show things as large as the training crops do on average.

    A crop that keeps a share s of the area is magnified by 1 / sqrt(s), on average over shares from `min_area` to 1 by
    2 / (1 + sqrt(min_area)). At the size of the crops, whole images would show everything smaller (Touvron et al.,
    "Fixing the train-test resolution discrepancy", NeurIPS 2019); `benchmarks/eval_size.py` measures what that costs.
    A packed side within 5 % of the size wanted is taken, without resizing. Otherwise it is the nearest multiple of
    `stride`: what does not fill a cell of the last map is lost at the right and at the bottom.

    Args:
        image_size: int, side of the training crops in pixels.
        side: int, at which the study is packed.
        min_area: smallest share of the area that a crop keeps, 0 to 1.
        stride: input pixels per cell of the network's last map.
        eval_size: int, a size chosen by hand, which is only checked; 0 for none.

    Returns:
        int, pixels, more than `side` where training crops are enlarged as well; and float, how large things are at
        that size, as a multiple of the mean over training crops.

    Raises:
        ValueError: the packed images are smaller than the crops, or so large that whole images would alias.
    """
    if image_size > side:
        raise ValueError(
            f"IMAGE_SIZE is {image_size}, but the study is packed at {side} pixels. Name the PACKED_DIR of this "
            f"PROFILE, pack anew with a larger SIDE, or set IMAGE_SIZE to {side} or less."
        )
    wanted = image_size * 2 / (1 + min_area**0.5)
    if not eval_size:
        eval_size = side if abs(side / wanted - 1) <= 0.05 else round(wanted / stride) * stride
    if side >= 2 * eval_size:
        raise ValueError(
            f"Images packed at {side} pixels alias at EVAL_SIZE {eval_size}. Set EVAL_SIZE to 0, which chooses it."
        )
    return eval_size, eval_size / wanted


def count_steps(study, batch_size, n_hosts=1, group=1):
    """Returns the training steps of an epoch: as many as every host can fill, whichever shards it gets.

    Args:
        study: a `PackedStudy`.
        batch_size: int, global over all replicas and hosts.
        n_hosts: int, hosts among which batches are divided.
        group: int, steps that are executed at once; an epoch has a multiple of it.
    """
    counts = sorted(shard["count"] for shard in study.shards["train"])
    return sum(counts[: len(counts) // n_hosts]) // (batch_size // n_hosts) // group * group


def list_batch(study, batch_size, *, epoch, step, **order):
    """Returns the names of the images in one training batch: where a loss that is not finite came from.

    Args:
        study: a `PackedStudy`.
        batch_size: int.
        epoch: int, counted from 0.
        step: int, counted from 0.
        **order: `seed` and the other arguments that `make_train_dataset` was given.
    """
    data = _order_images(study, batch_size, epochs=epoch + 1, first_epoch=epoch, first_step=step, **order)
    records, _ = next(iter(data))
    parsed = tf.io.parse_example(records, {"image": tf.io.FixedLenFeature([], tf.string)})
    return [name.decode() for name in parsed["image"].numpy()]


def _order_images(study, batch_size, *, seed, epochs, first_epoch=0, first_step=0, n_hosts=1, host=None, group=1):
    """Orders the training images: which are in which batch depends on seed, epoch and step alone.

    Shuffling has two levels, so that memory does not grow with the study: an epoch takes the shards in a random order,
    `_WINDOW` at a time, and shuffles the images of each such window fully. Packing put the images into shards at
    random. Each epoch drops the images that do not fill its last batch, other ones every time. With several hosts,
    each epoch deals the shards anew, and a host reads its own only.

    Args:
        study: a `PackedStudy`.
        batch_size: int, global over all replicas and hosts.
        seed: int.
        epochs: int, epochs of the whole run.
        first_epoch: int, the epoch to begin with; a resumed run sees what the uninterrupted one would have seen.
        first_step: int, the step of that epoch to begin with. Shards that were used up before it are not read.
        n_hosts: int, hosts among which batches are divided.
        host: int, the host whose share is wanted; None for the whole batches, as one machine would train on them.
        group: int, steps that are executed at once, see `count_steps`.

    Returns:
        A Dataset of (records, draws): string (n,) and float32 (n, N_DRAWS), uniform in [0, 1), for `augment`; n is
        `batch_size`, or a host's share of it. An epoch has `count_steps` of them.

    Raises:
        ValueError: there are fewer images than one batch, fewer shards than hosts, or the batch cannot be divided.
    """
    counts = [shard["count"] for shard in study.shards["train"]]
    if n_hosts > 1 and (batch_size % n_hosts or len(counts) < n_hosts):
        raise ValueError(
            f"BATCH_SIZE {batch_size} and the {len(counts)} shards in {study.folder} cannot be divided among {n_hosts} "
            "hosts. Make BATCH_SIZE a multiple of the hosts; pack anew with a smaller SHARD_IMAGES for more shards."
        )
    steps = count_steps(study, batch_size, n_hosts, group)
    if not steps:
        groups = f", and STEPS_PER_EXECUTION {group}" if group > 1 else ""
        raise ValueError(
            f"BATCH_SIZE is {batch_size}{groups}, but {study.folder} holds only {sum(counts)} images to train on."
        )
    files, counts = tf.constant(study.files("train")), tf.constant(counts, tf.int64)
    n_images = batch_size // n_hosts  # of a host in a batch
    n_shards = len(files) // n_hosts  # of a host in an epoch
    n_windows = -(-n_shards // _WINDOW)
    window_images = _WINDOW * int(tf.reduce_max(counts))

    def seeds_for(purpose, counter):  # own seeds for the order of shards (0), of images (1) and for augmentation (2)
        return tf.stack([tf.constant(3 * seed + purpose, tf.int64), counter])

    def make_share(epoch, host):
        """One epoch of one host."""
        shuffled = tf.random.experimental.stateless_shuffle(tf.range(len(files)), seeds_for(0, epoch))
        own = tf.gather(shuffled, tf.range(n_shards) * n_hosts + host)
        n_seen = tf.where(epoch == first_epoch, tf.constant(first_step * n_images, tf.int64), tf.constant(0, tf.int64))
        n_used_up, n_seen_of_next = _find_window(tf.gather(counts, own), n_seen)

        def read_window(number):
            chosen = tf.gather(files, own[number * _WINDOW : (number + 1) * _WINDOW])
            window = tf.data.Dataset.from_tensor_slices(chosen).interleave(
                tf.data.TFRecordDataset,
                cycle_length=_WINDOW,
                num_parallel_calls=tf.data.AUTOTUNE,
                deterministic=True,
            )
            # Not `Dataset.shuffle`: its order also depends on TensorFlow's global seed.
            seeds = seeds_for(1, (epoch * n_hosts + host) * n_windows + number)
            window = window.batch(window_images)
            return window.map(lambda records: tf.random.experimental.stateless_shuffle(records, seeds)).unbatch()

        records = tf.data.Dataset.range(n_used_up, n_windows).flat_map(read_window).skip(n_seen_of_next)
        draws = tf.random.stateless_uniform([steps * n_images, N_DRAWS], seeds_for(2, epoch * n_hosts + host))
        data = tf.data.Dataset.zip(records, tf.data.Dataset.from_tensor_slices(draws[n_seen:]))
        return data.batch(n_images, drop_remainder=True)

    def make_epoch(epoch):
        if host is not None or n_hosts == 1:
            return make_share(epoch, host or 0)
        shares = tf.data.Dataset.zip(*(make_share(epoch, number) for number in range(n_hosts)))
        return shares.map(lambda *pairs: tuple(tf.concat(some, axis=0) for some in zip(*pairs, strict=True)))

    data = tf.data.Dataset.range(first_epoch, epochs).flat_map(make_epoch)
    # Without a known cardinality Keras miscounts steps and dilutes the loss on the TensorFlow backend.
    return data.apply(tf.data.experimental.assert_cardinality(max(0, steps * (epochs - first_epoch) - first_step)))


def _find_window(counts, n_seen):
    """Returns how many windows `n_seen` images have used up, and how many images of the next one they include.

    `counts` is an int64 tensor (shards,) of the images in each shard, in the order in which they are read.
    """
    n_windows = -(-len(counts) // _WINDOW)
    counts = tf.pad(counts, [[0, n_windows * _WINDOW - len(counts)]])
    ends = tf.cumsum(tf.reduce_sum(tf.reshape(counts, (n_windows, _WINDOW)), axis=1))
    n_used_up = tf.reduce_sum(tf.cast(ends <= n_seen, tf.int64))
    return n_used_up, n_seen - tf.concat([[0], ends], axis=0)[n_used_up]


def shift_images(images, shift):
    """Moves images by whole pixels; what comes in from beyond the edge is mirrored.

    Args:
        images: tensor (batch, height, width, 1).
        shift: tuple of ints, pixels down and to the right, each smaller than the image.

    Returns:
        Tensor of the same shape and dtype.
    """
    down, right = shift
    padding = [[0, 0], [max(down, 0), max(-down, 0)], [max(right, 0), max(-right, 0)], [0, 0]]
    height, width = images.shape[1:3]
    top, left = max(-down, 0), max(-right, 0)
    return tf.pad(images, padding, mode="SYMMETRIC")[:, top : top + height, left : left + width]
