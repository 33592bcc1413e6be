"""A stream of images, decoded from their files and shrunk, as fast as the cores decode.

Files are read, checked, decoded, shrunk and encoded in one tf.data graph, without Python's global lock; Python gets
images by the batch, in order. Memory holds for each thread one file and its decoded image (1 MB for a gray image of
1024 pixels, at most 134 MB: `MAX_PIXELS` at four bytes) and one shrunk image, and three batches of 16 shrunk images.
DICOM files become PNGs first, in Python, one at a time.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import tensorflow as tf

from ..runtime.files import local_copy, measure_file
from .decoding import decode_image, read_header
from .dicom import load_image
from .image_files import PNG_MODES, ImageError, inspect_image
from .records import encode_image

BATCH = 16  # images that Python takes from the graph at a time


class ShrunkImage(NamedTuple):
    """An image as it goes into a record, and facts about its file.

    Attributes:
        data: bytes, pixels row by row or a PNG of them.
        width: int, pixels, of the image in the file.
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


@functools.lru_cache  # traced once a process, not once a call
def _make_reader(side, encoding):
    @tf.function(input_signature=[tf.TensorSpec([], tf.string)])
    def read(path):
        data, n_bytes = read_encoded(path)
        header = read_header(data)
        is_gray_or_rgb = tf.debugging.Assert(header[3] >= 0, ["a JPEG in CMYK"])
        with tf.control_dependencies([header, is_gray_or_rgb]):  # before any pixel is decoded
            image = decode_image(tf.identity(data), side)
        return encode_image(image, encoding), tf.concat([header, n_bytes[None]], axis=0)

    return read


def read_encoded(path):
    """Reads an image file in a graph.

    Args:
        path: string tensor.

    Returns:
        Tuple of a string tensor, the PNG or JPEG, or the PNG that `load_image` makes of a DICOM file (empty where it
        cannot), and an int64 tensor, the file's bytes.
    """
    held = tf.io.read_file(path)
    is_dicom = tf.strings.substr(tf.strings.join([held, 132 * b"\0"]), 128, 4) == b"DICM"
    data = tf.cond(is_dicom, lambda: tf.numpy_function(_convert, [held], tf.string), lambda: held)
    return tf.ensure_shape(data, ()), tf.cast(tf.strings.length(held), tf.int64)


def _convert(data):
    """Makes a PNG of a DICOM file's bytes; nothing where that fails: `read_one` will say why."""
    try:
        return load_image(data)[0]
    except ImageError:
        return b""


def _make_shrunk(image, facts):
    width, height, depth, color, n_bytes = facts
    data = image if isinstance(image, bytes) else image.tobytes()
    return ShrunkImage(data, width, height, PNG_MODES[depth, color], n_bytes)


class ImageFiles:
    """Images in files of their own, PNG, JPEG or DICOM."""

    def __init__(self, paths, side, *, encoding="raw", n_threads=None):
        """Takes the paths.

        Args:
            paths: dict image -> path of its file, also in a bucket.
            side: int, pixels, of the square images wanted.
            encoding: of `ShrunkImage.data`, one of `records.ENCODINGS`.
            n_threads: threads that read and decode; None for one a core.
        """
        self._paths = {image: str(path) for image, path in paths.items()}
        self._kind = side, encoding  # and not the reader itself, which cannot be sent to a worker
        self._n_threads = n_threads or count_cores()

    def select(self, images):
        """Returns the same for some of the images, read by one thread: what a worker of a cluster gets."""
        side, encoding = self._kind
        return ImageFiles({image: self._paths[image] for image in images}, side, encoding=encoding, n_threads=1)

    def lacking(self, images):
        """Returns those of the images that have no path."""
        return [image for image in images if image not in self._paths]

    def measure(self, images):
        """Returns the bytes of each image's file, -1 where that is unknown: reading it will say why."""
        return self._map_paths(_measure_or_not, images)

    def inspect(self, images):
        """Returns `ShrunkImage`'s facts (width, height, mode, bytes) of files that can be read, from their headers."""
        return self._map_paths(_inspect_file, images)

    def _map_paths(self, function, images):
        with ThreadPoolExecutor(self._n_threads) as pool:
            return list(pool.map(function, [self._paths[image] for image in images]))

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
                numbers, pixels, facts = (tensor.numpy() for tensor in next(batches, [tf.constant([len(images)])] * 3))
            except tf.errors.OpError:  # of one image, which costs the batch; the stream goes on behind it
                yield self.read_one(images[number])  # at once, lest every image be tried while a bucket is down
                number += 1
                continue
            for place, image, facts_of_one in zip(numbers.tolist(), pixels, facts.tolist(), strict=True):
                while number < place:
                    yield self.read_one(images[number])
                    number += 1
                if number == place < len(images):
                    yield _make_shrunk(image, facts_of_one)
                    number += 1

    def _make_dataset(self, images):
        paths = tf.data.Dataset.from_tensor_slices([self._paths[image] for image in images]).enumerate()
        data = paths.map(
            lambda number, path: (number, *_make_reader(*self._kind)(path)),
            num_parallel_calls=self._n_threads,
            deterministic=True,
        )
        options = tf.data.Options()
        options.threading.private_threadpool_size = self._n_threads
        options.threading.max_intra_op_parallelism = 1
        return data.batch(BATCH).prefetch(2).with_options(options)

    def read_one(self, image):
        """Reads one image carefully, which takes longer; returns a `ShrunkImage`, or the reason why there is none.

        A bucket that cannot be reached is not such a reason but an error, after which packing can be resumed later.
        """
        try:
            with local_copy(self._paths[image]) as file:
                load_image(file)
                return self._decode_copy(file)
        except ImageError as error:
            return str(error)
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"

    def _decode_copy(self, file):
        try:
            image, facts = _make_reader(*self._kind)(str(file))
        except tf.errors.InvalidArgumentError:
            return "the pixels cannot be decoded: the file is damaged or cut short; export or copy it again"
        except tf.errors.OpError as error:
            return f"cannot be read: {error.message}"
        return _make_shrunk(image.numpy(), facts.numpy().tolist())


def _measure_or_not(path):
    try:
        return measure_file(path)
    except OSError:
        return -1


def _inspect_file(path):
    with local_copy(path) as file:
        header = inspect_image(load_image(file)[0])
        return header["width"], header["height"], header["mode"], measure_file(file)
