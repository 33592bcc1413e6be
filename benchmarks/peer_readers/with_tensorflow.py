"""Ways of reading images with TensorFlow: ours, this project's predecessor's, and those that Keras offers.

Each takes the folder that `peers.py` prepared and returns batches of (images, labels) without end, or nearly.
`files` in it holds images as NIH distributes them, `small` the same shrunk to `SIDE` once, `packed` our shards.
"""

import keras
import numpy as np
import tensorflow as tf
from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter  # what `Model.fit` reads it with
from PIL import Image

from helpers.augmentation import N_DRAWS, Augmentation, augment
from helpers.packing import load_packed_study
from helpers.packing.decoding import decode_image
from helpers.pipeline import make_eval_dataset, make_train_dataset

SIDE, CROP, BATCH = 256, 224, 64
ENDLESS = 1_000_000  # epochs
STRENGTH = Augmentation(rotation=7, horizontal_flip=True)  # as the others turn images too


def _list_files(folder):
    return sorted(str(path) for path in (folder / "images").iterdir()), np.load(folder / "labels.npy")


def ours_from_files(folder):
    """The path by which packing reads, decoding and averaging areas, then the augmentation of training."""
    paths, labels = _list_files(folder / "files")
    data = tf.data.Dataset.from_tensor_slices((paths, labels)).shuffle(len(paths)).repeat()
    data = data.map(lambda path, label: (decode_image(tf.io.read_file(path), SIDE), label), tf.data.AUTOTUNE)
    data = data.batch(BATCH, drop_remainder=True)
    data = data.map(
        lambda images, labels: (augment(images, tf.random.uniform((BATCH, N_DRAWS)), CROP, STRENGTH), labels),
        tf.data.AUTOTUNE,
    )
    return data.prefetch(tf.data.AUTOTUNE)


def ours_packed(folder):
    """What notebook 2 trains on, the check of all hashes included."""
    study = load_packed_study(folder / "packed")
    return make_train_dataset(study, CROP, BATCH, seed=0, epochs=ENDLESS, strength=STRENGTH)


def ours_evaluation(folder):
    """Evaluation batches, resized."""
    return make_eval_dataset(load_packed_study(folder / "packed"), "train", BATCH, image_size=CROP).repeat()


def ours_evaluation_whole(folder):
    """Evaluation batches as packed."""
    return make_eval_dataset(load_packed_study(folder / "packed"), "train", BATCH).repeat()


def predecessor(folder):
    """Decodes and resizes every image at every epoch, in color, and changes its colors."""

    def load(path, label):
        image = tf.image.resize(tf.io.decode_png(tf.io.read_file(path), channels=3), (CROP, CROP)) / 255.0
        image = tf.image.random_flip_left_right(image)
        image = tf.image.random_brightness(image, 0.1)
        image = tf.image.random_contrast(image, 0.9, 1.1)
        image = tf.image.random_saturation(image, 0.9, 1.1)
        return tf.image.random_hue(image, 0.02), label

    data = tf.data.Dataset.from_tensor_slices(_list_files(folder / "files")).repeat()
    return data.map(load, num_parallel_calls=tf.data.AUTOTUNE).batch(BATCH).prefetch(tf.data.AUTOTUNE)


def _keras_directory(folder, side):
    images = keras.utils.image_dataset_from_directory(
        folder / "images", labels=None, color_mode="grayscale", batch_size=None, image_size=(side, side),
        shuffle=False, interpolation="area" if folder.name == "files" else "bilinear", verbose=False,
    )  # fmt: skip
    # It knows labels of one class an image only.
    return tf.data.Dataset.zip(images, tf.data.Dataset.from_tensor_slices(np.load(folder / "labels.npy")))


def _keras_augmented(data):
    layers = [
        keras.layers.RandomCrop(CROP, CROP),
        keras.layers.RandomRotation(7 / 360, fill_mode="constant"),
        keras.layers.RandomTranslation(0.03, 0.03, fill_mode="constant"),
        keras.layers.RandomFlip("horizontal"),
        keras.layers.RandomContrast(0.2, value_range=(0, 255)),
        keras.layers.RandomBrightness(0.1, value_range=(0, 255)),
    ]

    def change(images, labels):
        for layer in layers:
            images = layer(images, training=True)
        return images, labels

    data = data.shuffle(512).repeat().batch(BATCH, drop_remainder=True)
    return data.map(change, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def keras_directory(folder):
    """`image_dataset_from_directory` on the images as distributed, then layers."""
    return _keras_augmented(_keras_directory(folder / "files", SIDE))


def keras_directory_small(folder):
    """The same on images shrunk once."""
    return _keras_augmented(_keras_directory(folder / "small", SIDE))


def keras_directory_cached(folder):
    """The same with all decoded images kept in memory, where they fit; as uint8, or they take four times as much."""
    data = _keras_directory(folder / "small", SIDE).map(lambda image, label: (tf.cast(image, tf.uint8), label))
    data = data.cache().map(lambda image, label: (tf.cast(image, tf.float32), label))
    return _keras_augmented(data)


def keras_directory_evaluation(folder):
    """`image_dataset_from_directory` on images shrunk once, to be evaluated."""
    return _keras_directory(folder / "small", CROP).repeat().batch(BATCH).prefetch(tf.data.AUTOTUNE)


class _Images(keras.utils.PyDataset):
    """Images of files or of an array, changed by Pillow: one affine map and one table of gray levels an image."""

    def __init__(self, source, labels, **workers):
        super().__init__(**workers)
        self.source, self.labels = source, labels

    def __len__(self):
        return len(self.labels) // BATCH

    def __getitem__(self, number):
        rows = range(number * BATCH, (number + 1) * BATCH)
        images = np.empty((BATCH, CROP, CROP, 1), np.float32)
        for image, row in zip(images, rows, strict=True):
            image[..., 0] = self._change(self._read(self.source[row]))
        return images, self.labels[rows.start : rows.stop]

    def _read(self, image):
        if isinstance(image, str):
            return Image.open(image).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
        return Image.fromarray(image)

    def _change(self, image):
        rng = np.random.default_rng()
        area, stretch, x, y, angle, side, gain, offset = rng.random(8)
        scale = np.sqrt(0.75 + 0.25 * area) * SIDE / CROP
        width, height = scale * 1.1 ** (stretch - 0.5), scale * 1.1 ** (0.5 - stretch)
        angle = np.deg2rad(7 * (2 * angle - 1))
        facing = -1 if side < 0.5 else 1
        a, b, d, e = np.cos(angle) * width, -np.sin(angle) * height, np.sin(angle) * width, np.cos(angle) * height
        a, d = facing * a, facing * d
        shift = 0.03 * SIDE * (2 * np.array([x, y]) - 1) + SIDE / 2 - (np.array([a + b, d + e]) * CROP / 2)
        affine = (a, b, shift[0], d, e, shift[1])
        image = image.transform((CROP, CROP), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
        gain, offset = 0.8 + 0.4 * gain, 51 * offset - 25.5
        return image.point([min(255, max(0, round(gain * (level - 127.5) + 127.5 + offset))) for level in range(256)])


def _read_with_keras(source, labels):
    images = _Images(source, labels, workers=2, use_multiprocessing=True, max_queue_size=8)
    return PyDatasetAdapter(images, shuffle=True).get_tf_dataset().repeat()


def keras_pillow(folder):
    """A `PyDataset` with two processes and Pillow, on the images as distributed."""
    return _read_with_keras(*_list_files(folder / "files"))


def keras_pillow_small(folder):
    """The same on an array of images shrunk once, mapped into memory."""
    return _read_with_keras(
        np.load(folder / "small" / "images.npy", mmap_mode="r"), np.load(folder / "small/labels.npy")
    )
