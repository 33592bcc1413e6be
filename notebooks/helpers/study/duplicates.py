"""Finds images that are in a study twice: the same pixels, or the same image at another size, brightness or quality.

A duplicate across the subsets of a split is a test image that the model was trained on, whatever the names of its file
and its patient. ChestX-ray14 is known to hold some.
"""

import contextlib
import dataclasses
import hashlib
import json
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import fft

from ..runtime.cluster import map_tasks
from ..runtime.files import read_text, write_text

HASH_BITS = 256
MAX_DISTANCE = 16  # bits; measured, see `find_duplicates`

_MIN_SIDE = 32  # pixels; smaller images lack the frequencies that are hashed
_BATCH = 128  # images at once: 34 MB in float32 at 256 pixels
_MAX_PAIRS = 1_000_000
_PAIR_COLUMNS = ["image_a", "subset_a", "patient_a", "image_b", "subset_b", "patient_b", "kind", "distance"]


class ImageHashes(NamedTuple):
    """Hashes of n images; each array has a row an image.

    Attributes:
        exact: uint8 (n, 16), BLAKE2b of the pixels: equal for the same pixels only.
        perceptual: uint8 (n, 32), 256 packed bits: alike for the same image.
    """

    exact: np.ndarray
    perceptual: np.ndarray


def hash_images(images):
    """Hashes images exactly and perceptually.

    A bit of the perceptual hash is the sign of a coefficient of the image's cosine transform, at 1 to 16 half-waves
    across and 1 to 16 down. Brightness shifts only the coefficient left out, contrast scales all alike, and size
    cancels, so that images of any side can be compared. It is the "pHash" of Zauner (2010) with more bits and the
    fixed threshold 0, because 64 bits tell images apart that have nothing in common, but not one chest from another.

    Args:
        images: uint8 array (n, side, side) or (n, side, side, 1), or an iterable of such batches, of any sides from 32
            pixels.

    Returns:
        `ImageHashes` in the order of the images.

    Raises:
        ValueError: the images are smaller.
    """
    batches = (
        (images[i : i + _BATCH] for i in range(0, len(images), _BATCH)) if isinstance(images, np.ndarray) else images
    )
    exact, perceptual = [np.empty((0, 16), "uint8")], [np.empty((0, HASH_BITS // 8), "uint8")]
    for batch in map(np.asarray, batches):
        side = batch.shape[1]
        if side < _MIN_SIDE:
            raise ValueError(f"images have sides of {side} pixels; expected {_MIN_SIDE} or more")
        if not len(batch):
            continue
        batch = np.ascontiguousarray(batch.reshape(len(batch), side, side))
        digests = b"".join(hashlib.blake2b(image, digest_size=16).digest() for image in batch)
        exact.append(np.frombuffer(digests, "uint8").reshape(-1, 16))
        n_waves = int(HASH_BITS**0.5)
        waves = fft.dct(np.eye(side), axis=0, norm="ortho")[1 : 1 + n_waves].astype("float32")
        across = (batch.reshape(-1, side).astype("float32") @ waves.T).reshape(-1, side, n_waves)  # one large product
        coefficients = waves @ across
        # A tolerance, so that the rounding of a blank image is no pattern.
        perceptual.append(np.packbits((coefficients > 1e-3 * side).reshape(len(batch), -1), axis=1))
    return ImageHashes(np.concatenate(exact), np.concatenate(perceptual))


def find_duplicates(rows, hashes):
    """Finds all pairs of images that are exact or near duplicates of each other: at most `MAX_DISTANCE` bits differ.

    Finds every such pair, in memory proportional to the number of images. Only images that agree in a whole piece of
    the hash are compared, which all near ones do: as many images as NIH's take a second on one core
    (`benchmarks/scale.py`).

    The distance was measured on 304 images of ChestX-ray14 and 247 of JSRT. Different images are 55 bits apart
    or more (151,000 pairs, median 121), follow-ups of one patient 63 or more. Copies resized to 64 to 1024 pixels,
    saved as JPEG of quality 50, brightened by 20 or with noise of 5 gray levels are at most 10 bits from the original;
    98 % of those with gamma 0.8 or 1.25 are at most 16, and 95 % of those with a fifth more contrast, clipped. A crop
    is missed: 2 % of the side moves 23 bits. The tail of different images falls tenfold each 9 to 10 bits, so that
    among NIH's billions of pairs some near ones will be different images: look at them.

    Args:
        rows: DataFrame of the n images with `image`, `patient_id` and `subset`, for instance `PackedStudy.index`.
        hashes: `ImageHashes` of the images, in the order of the rows.

    Returns:
        DataFrame, one row a pair, nearest first: `image_a`, `subset_a`, `patient_a`, `image_b`, `subset_b`,
        `patient_b`, with a before b in `rows`; `kind`, "exact" or "near"; `distance` (int64, bits).

    Raises:
        ValueError: if more than a million pairs are that near, as with many blank images.
    """
    a, b, distance = _search(hashes.perceptual)
    order = np.lexsort((b, a, distance))
    a, b = a[order], b[order]
    columns = {
        f"{name}_{letter}": rows[column].to_numpy()[row]
        for letter, row in (("a", a), ("b", b))
        for name, column in (("image", "image"), ("subset", "subset"), ("patient", "patient_id"))
    }
    same = (hashes.exact[a] == hashes.exact[b]).all(axis=1)
    return pd.DataFrame({**columns, "kind": np.where(same, "exact", "near"), "distance": distance[order]})


def find_study_duplicates(study, cluster=""):
    """Finds all pairs of copies in a packed study and keeps them in its `duplicates.json`, so that it searches once.

    Images are read batch by batch and only their hashes, 48 bytes each, are kept.

    Args:
        study: a `PackedStudy` of images of 32 pixels or more.
        cluster: where images are hashed, a shard at a time, see `runtime.cluster.map_tasks`; they are compared here.

    Returns:
        DataFrame of `find_duplicates`.

    Raises:
        ValueError: more than a million pairs are that near.
    """
    shards = [shard["sha256"] for subset in study.shards.values() for shard in subset]
    asked = json.dumps([study.index_sha256, *shards, HASH_BITS, MAX_DISTANCE])
    path, key = study.folder / "duplicates.json", hashlib.sha256(asked.encode()).hexdigest()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # missing or cut short: it is made again
        kept = json.loads(read_text(path))
        if kept["of"] == key:
            return pd.DataFrame(kept["pairs"], columns=_PAIR_COLUMNS)
    files = [file for subset in study.shards for file in study.files(subset)]
    form = dataclasses.replace(study, index=study.index.head(0), shards={}, excluded=[])  # how records are read
    hashes = [hash_images(()), *map_tasks(_prepare_hashing, files, form, cluster=cluster)]
    hashes = ImageHashes(*map(np.concatenate, zip(*hashes, strict=True)))
    pairs = find_duplicates(study.index, hashes)
    with contextlib.suppress(OSError):  # an attached study may be read-only
        write_text(path, json.dumps({"of": key, "pairs": pairs.to_dict("list")}))
    return pairs


def _prepare_hashing(study):
    """Returns the function from shards' paths to the hashes of their images, batch by batch, for `map_tasks`."""
    return lambda files: map(hash_images, read_images(study, list(files)))


def read_images(study, files=None):
    """Yields the images of a packed study's shards, all in the order of its index unless some are named.

    Args:
        study: a `PackedStudy`.
        files: list of paths of its shards.

    Yields:
        uint8 arrays (n, side, side, 1), none of which crosses the border of a shard.
    """
    import tensorflow as tf  # not above: the hashes do not need it

    files = [file for subset in study.shards for file in study.files(subset)] if files is None else files
    if not files:
        return
    data = tf.data.Dataset.from_tensor_slices(files).flat_map(lambda file: tf.data.TFRecordDataset(file).batch(_BATCH))
    for images, _ in data.map(study.parse, num_parallel_calls=2).prefetch(2):
        yield images.numpy()


def _search(perceptual):
    """Returns the rows of all near pairs, as two int64 arrays, the earlier row in the first, and their distances."""
    n, keys = len(perceptual), _make_keys(perceptual)
    words = np.ascontiguousarray(perceptual).view("uint64")  # (n, 4)
    pairs = [np.empty((3, 0), "int64")]
    n_pairs = 0
    for piece, key in enumerate(keys):
        order = np.argsort(key, kind="stable")
        ends = np.searchsorted(key[order], key[order], side="right")
        first, step = np.arange(n), 0
        while len(first):  # rows of the same key lie side by side: each with its next, its next but one, ...
            step += 1
            first = first[first + step < ends[first]]
            a, b = order[first], order[first + step]  # the sort is stable: a is the earlier row
            distance = np.bitwise_count(words[a] ^ words[b]).sum(axis=1, dtype="uint16")
            near = distance <= MAX_DISTANCE
            near[near] = (keys[:piece, a[near]] != keys[:piece, b[near]]).all(axis=0)  # others were found before
            n_pairs += int(near.sum())
            if n_pairs > _MAX_PAIRS:
                raise ValueError(
                    f"more than {_MAX_PAIRS:,} pairs are within {MAX_DISTANCE} bits of each other; remove blank images"
                )
            pairs.append(np.stack([a[near], b[near], distance[near]]))
    return np.concatenate(pairs, axis=1).astype("int64")


def _make_keys(perceptual):
    """Cuts hashes into pieces, one more than bits may differ, so that near ones agree in a whole piece or more.

    Of images of ChestX-ray14 that are not near, one pair in 800 agrees in one of 17 pieces (304 images); for
    independent bits it would be one in 1,900. Pieces take every 17th bit, since neighboring bits are alike in all
    images: with pieces of adjacent bits it is one in 300.

    Returns:
        uint32 (pieces, n), the bits of each piece.
    """
    n_pieces = MAX_DISTANCE + 1
    bits, keys = np.unpackbits(perceptual, axis=1), np.zeros((n_pieces, len(perceptual)), "uint32")
    for piece, key in enumerate(keys):
        for bit in bits[:, piece::n_pieces].T:
            key <<= 1
            key |= bit
    return keys
