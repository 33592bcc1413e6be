"""A stream of images, decoded from their files and shrunk, as fast as the cores decode.

Files are read, checked, decoded, shrunk and encoded in one tf.data graph, in which the interpreter's lock plays no
part: Python gets images by the batch, in order. In memory at a time are, for each thread, one file and its decoded image
(1 MB for a gray image of 1024 pixels, at most 134 MB: `MAX_PIXELS` at four bytes), and of shrunk images one for each
thread and three batches of 16.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import tensorflow as tf

from ..runtime.files import local_copy, measure_file
from .decoding import decode_image, read_header
from .image_files import PNG_MODES, ImageError, inspect_image

BATCH = 16  # images that Python takes from the graph at a time
PNG_LEVEL = 4  # of compression, 0 to 9: higher ones take longer and save nothing, see benchmarks/packing.py


class ShrunkImage(NamedTuple):
    """An image as it goes into a record, and what its file was.

    Attributes:
        data: bytes, pixels row by row or a PNG of them.
        width: int, pixels, of the file's picture.
        height: int, pixels.
        mode: Pillow's name of the file's pixel format: "L", "RGBA", "I;16", ...
        n_bytes: int, of the file.
    """

    data: bytes
    width: int
    height: int
    mode: str
    n_bytes: int


FACTS = ShrunkImage._fields[1:]  # of each image's file: also columns of a packed study's index


def count_cores():
    """Returns the cores that this process may use, which on a shared cluster are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def encode_image(image, encoding):
    """Encodes a uint8 image (side, side, 1) for a record, to a scalar string tensor, or leaves it as it is if "raw"."""
    return tf.io.encode_png(image, compression=PNG_LEVEL) if encoding == "png" else image


@functools.lru_cache  # traced once a process, not once a call
def _make_reader(side, encoding):
    @tf.function(input_signature=[tf.TensorSpec([], tf.string)])
    def read(path):
        data = tf.io.read_file(path)
        header = read_header(data)
        is_gray_or_rgb = tf.debugging.Assert(header[3] >= 0, ["a JPEG in the four colors of printing"])
        with tf.control_dependencies([header, is_gray_or_rgb]):  # before any pixel is decoded
            image = decode_image(tf.identity(data), side)
        n_bytes = tf.cast(tf.strings.length(data), tf.int64)
        return encode_image(image, encoding), tf.concat([header, n_bytes[None]], axis=0)

    return read


def _make_shrunk(image, facts):
    width, height, depth, color, n_bytes = facts
    return ShrunkImage(
        image if isinstance(image, bytes) else image.tobytes(), width, height, PNG_MODES[depth, color], n_bytes
    )


class ImageFiles:
    """Images in files of their own, PNG or JPEG."""

    def __init__(self, paths, side, *, encoding="raw", n_threads=None):
        """Takes the paths.

        Args:
            paths: dict image -> path of its file, also in a bucket.
            side: int, pixels, of the square images wanted.
            encoding: of `ShrunkImage.data`, one of `records.ENCODINGS`.
            n_threads: threads that read and decode; None for one a core.
        """
        self._paths = {image: str(path) for image, path in paths.items()}
        self._read = _make_reader(side, encoding)
        self._n_threads = n_threads or count_cores()

    def lacking(self, images):
        """Returns those of the images that there is no path for."""
        return [image for image in images if image not in self._paths]

    def measure(self, images):
        """Returns the bytes of each image's file, -1 where that cannot be told: reading it will say why."""
        with ThreadPoolExecutor(self._n_threads) as pool:
            return list(pool.map(_measure_image, [self._paths[image] for image in images]))

    def inspect(self, images):
        """Returns `ShrunkImage`'s facts (width, height, mode, bytes) of files that can be read, from their headers."""

        def look(path):
            with local_copy(path) as file:
                header = inspect_image(file)
                return header["width"], header["height"], header["mode"], measure_file(file)

        with ThreadPoolExecutor(self._n_threads) as pool:
            return list(pool.map(look, [self._paths[image] for image in images]))

    def read(self, images):
        """Yields a `ShrunkImage` for each image, in order, or the reason why there is none.

        Raises:
            tf.errors.OpError: the bucket that the files are in cannot be reached.
        """
        images = list(images)
        if not images:
            return
        number, batches = 0, iter(self._make_dataset(images))
        while number < len(images):
            try:
                numbers, rows, facts = (tensor.numpy() for tensor in next(batches, [tf.constant([len(images)])] * 3))
            except tf.errors.OpError:  # of one image, which costs the batch; the stream goes on behind it
                yield self.read_one(images[number])  # at once, lest every image be tried while a bucket is down
                number += 1
                continue
            for place, film, of_image in zip(numbers.tolist(), rows, facts.tolist(), strict=True):
                while number < place:
                    yield self.read_one(images[number])
                    number += 1
                if number == place < len(images):
                    yield _make_shrunk(film, of_image)
                    number += 1

    def _make_dataset(self, images):
        paths = tf.data.Dataset.from_tensor_slices([self._paths[image] for image in images]).enumerate()
        data = paths.map(
            lambda number, path: (number, *self._read(path)), num_parallel_calls=self._n_threads, deterministic=True
        )
        options = tf.data.Options()
        options.threading.private_threadpool_size = self._n_threads
        options.threading.max_intra_op_parallelism = 1
        return data.batch(BATCH).prefetch(2).with_options(options)

    def read_one(self, image):
        """Reads one image carefully, which takes longer; returns a `ShrunkImage`, or the reason why there is none.

        A bucket that cannot be reached is no such reason but an error, after which packing can go on later.
        """
        try:
            with local_copy(self._paths[image]) as file:
                return self._read_copy(file)
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"

    def _read_copy(self, file):
        try:
            inspect_image(file)
            film, facts = self._read(str(file))
            return _make_shrunk(film.numpy(), facts.numpy().tolist())
        except ImageError as error:
            return str(error)
        except tf.errors.InvalidArgumentError:
            return "the pixels cannot be decoded: the file is damaged or cut short"
        except tf.errors.OpError as error:
            return f"cannot be read: {error.message}"


def _measure_image(path):
    try:
        return measure_file(path)
    except OSError:
        return -1
