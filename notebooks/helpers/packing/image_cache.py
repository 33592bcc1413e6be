"""Caches of shrunk images: what is kept of an archive's images once its files have to make room for the next one's.

A cache is two files: `NAME.npy`, the images at their packed side, and `NAME.json`, written last, with everything else
that packing has to know about them. Several caches make one packed study.
"""

import json
import pathlib
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from ..runtime.files import hash_file, is_remote, local_draft, measure_file, write_text
from ..study.study_folder import name_some
from .image_stream import BATCH, FACTS, ImageFiles, ShrunkImage, count_cores
from .records import encode_image

_FORMAT = 1  # of the JSON file; a cache of another one is made anew
_CHUNK = 64  # images that are taken from a cache at a time to be encoded


@dataclass(frozen=True)
class ImageCache:
    """Shrunk images of a finished cache.

    Attributes:
        path: pathlib.Path of `NAME.npy`.
        side: int, pixels, of the square images.
        images: list of str, the images' names in the order of the array.
        facts: dict of lists in the same order, of each image's file: `width`, `height` (pixels), `mode` (Pillow's name
            of the pixel format), `n_bytes`.
        excluded: list of dicts `image`, `reason`, `n_bytes` (-1 if the file is gone): images that could not be read.
    """

    path: pathlib.Path
    side: int
    images: list
    facts: dict
    excluded: list

    @property
    def pixels(self):
        """The images, uint8 (n, side, side), mapped into memory and read as they are used."""
        return np.load(self.path, mmap_mode="r")


def shrink_images(paths, folder, name, *, side, progress=None):
    """Decodes images once and keeps them shrunk; a finished and intact cache is only loaded.

    The images' files may be deleted afterwards. A cache that was interrupted, or that holds images of another side, is
    made anew. Memory does not grow with the number of images, see `image_stream`.

    Args:
        paths: dict image -> path of its file, PNG or JPEG; None where the cache has to be there.
        folder: path of a folder on a local disk; made if missing.
        name: of the cache, such as that of the archive.
        side: int, pixels, of the square images.
        progress: callable such as `tqdm`, see `pack.pack_study`.

    Returns:
        The `ImageCache`.

    Raises:
        FileNotFoundError: `paths` is None, and there is no such cache.
        ValueError: `folder` lies in a bucket.
        tf.errors.OpError: the bucket that `paths` are in cannot be reached.
    """
    cache = load_image_cache(folder, name, side)
    if cache:
        return cache
    target = pathlib.Path(folder) / f"{name}.npy"
    if paths is None:
        raise FileNotFoundError(
            f"{target} is missing, unfinished, damaged or not of {side} pixels. Fetch its images again."
        )
    source = ImageFiles(paths, side)
    target.with_suffix(".json").unlink(missing_ok=True)
    images, facts, excluded = [], {key: [] for key in FACTS}, []
    bar = progress(total=len(paths), unit="image") if progress else None
    with local_draft(target) as draft:
        with open(draft, "wb") as file:
            _write_header(file, len(paths), side)
            for image, shrunk in zip(paths, source.read(paths), strict=True):
                if bar:
                    bar.update(1)
                if isinstance(shrunk, str):
                    excluded.append({"image": image, "reason": shrunk, "n_bytes": source.measure([image])[0]})
                else:
                    file.write(shrunk.data)
                    images.append(image)
                    for key in FACTS:
                        facts[key].append(getattr(shrunk, key))
            file.seek(0)
            _write_header(file, len(images), side)
        content = {"format": _FORMAT, "side": side, "bytes": measure_file(draft), "sha256": hash_file(draft)}
    if bar:
        bar.close()
    content |= {"images": images, **facts, "excluded": excluded}
    write_text(target.with_suffix(".json"), json.dumps(content))
    return ImageCache(target, side, images, facts, excluded)


def _write_header(file, n, side):
    """Writes the beginning of a `.npy` file, in which NumPy leaves room for any number of images."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (n, side, side)}
    np.lib.format.write_array_header_1_0(file, header)


def load_image_cache(folder, name, side=None):
    """Loads a cache that `shrink_images` made.

    Args:
        folder: path of the folder.
        name: of the cache.
        side: int, pixels, of the images wanted; None for any.

    Returns:
        The `ImageCache`, or None where there is none that is finished, intact, and of that side.

    Raises:
        ValueError: `folder` lies in a bucket.
    """
    if is_remote(folder):
        raise ValueError(
            f"{folder} lies in a bucket, but caches are mapped into memory: name a folder on a local disk."
        )
    path = pathlib.Path(folder) / f"{name}.npy"
    try:
        content = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if content["format"] != _FORMAT or side not in (None, content["side"]):
            return None
        if measure_file(path) != content["bytes"] or hash_file(path) != content["sha256"]:
            return None
        facts = {key: content[key] for key in FACTS}
        return ImageCache(path, content["side"], content["images"], facts, content["excluded"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # no cache, or a power cut emptied its JSON file
        return None


class CachedImages:
    """The images of several caches, read as `image_stream.ImageFiles` reads files."""

    def __init__(self, caches, side, *, encoding="raw"):
        """Takes the caches.

        Args:
            caches: sequence of `ImageCache`s of that side, without an image in common.
            side: int, pixels.
            encoding: of `ShrunkImage.data`, one of `records.ENCODINGS`.

        Raises:
            ValueError: a cache is of another side, or an image is in two.
        """
        self._side, self._encoding = side, encoding
        self._places, self._excluded = {}, {}
        for cache in caches:
            if cache.side != side:
                raise ValueError(
                    f"{cache.path} holds images of {cache.side} pixels, but SIDE is {side}. Shrink them anew."
                )
            excluded = {left_out["image"]: left_out for left_out in cache.excluded}
            known = self._places.keys() | self._excluded.keys()
            if twice := [image for image in (*cache.images, *excluded) if image in known]:
                raise ValueError(f"{cache.path}: {name_some(twice)} in another cache too; leave one of them out.")
            pixels = cache.pixels
            facts = zip(*(cache.facts[key] for key in FACTS), strict=True)
            for number, (image, facts_of_one) in enumerate(zip(cache.images, facts, strict=True)):
                self._places[image] = pixels, number, facts_of_one
            self._excluded |= excluded

    def lacking(self, images):
        """Returns those of the images that are in no cache."""
        return [image for image in images if image not in self._places and image not in self._excluded]

    def measure(self, images):
        """Returns the bytes that each image's file had, -1 where that was unknown."""
        return [self._places[i][2][-1] if i in self._places else self._excluded[i]["n_bytes"] for i in images]

    def inspect(self, images):
        """Returns `ShrunkImage`'s facts (width, height, mode, bytes) of images that could be read."""
        return [self._places[image][2] for image in images]

    def read(self, images):
        """Yields a `ShrunkImage` for each image, in order, or the reason why there is none."""
        images = list(images)
        encoded = self._encode([image for image in images if image in self._places])
        for image in images:
            if image in self._excluded:
                yield self._excluded[image]["reason"]
            else:
                yield ShrunkImage(next(encoded), *self._places[image][2])

    def read_one(self, image):
        """Returns a `ShrunkImage`, or the reason why there is none."""
        return next(self.read([image]))

    def _encode(self, images):
        if self._encoding == "raw":
            for image in images:
                pixels, number, _ = self._places[image]
                yield pixels[number].tobytes()
        elif images:
            yield from self._encode_in_parallel(images)

    def _encode_in_parallel(self, images):
        def take_chunks():
            for start in range(0, len(images), _CHUNK):
                places = [self._places[image] for image in images[start : start + _CHUNK]]
                yield np.stack([pixels[number] for pixels, number, _ in places])[..., None]

        chunk = tf.TensorSpec((None, self._side, self._side, 1), tf.uint8)
        data = tf.data.Dataset.from_generator(take_chunks, output_signature=chunk).unbatch()
        data = data.map(lambda image: encode_image(image, self._encoding), count_cores(), deterministic=True)
        for batch in data.batch(BATCH).prefetch(2):
            yield from batch.numpy().tolist()
