"""Tests of study.duplicates with planted copies, real radiographs and brute force."""

import dataclasses
import io
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from helpers.study import duplicates
from helpers.study.duplicates import (
    HASH_BITS,
    MAX_DISTANCE,
    ImageHashes,
    find_duplicates,
    find_study_duplicates,
    hash_images,
)


def read(paths, side=None):
    images = [Image.open(path).convert("L") for path in paths]
    return np.stack(
        [np.asarray(image.resize((side, side), Image.Resampling.BOX) if side else image) for image in images]
    )


def save_as_jpeg(image, quality=50):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def brighten(image, by=20):
    return np.clip(image.astype(int) + by, 0, 255).astype("uint8")


def bend(image, gamma):
    return np.round(255 * (image / 255) ** gamma).astype("uint8")


def resize(image, side):
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))


def blur_with_noise(image, seed=0):
    noise = np.random.default_rng(seed).normal(0, 5, image.shape)
    return np.clip(np.round(image + noise), 0, 255).astype("uint8")


def distances(a, b):
    """All pairs of two sets of hashes, bit by bit."""
    bits = [np.unpackbits(hashes.perceptual, axis=1).astype(int) for hashes in (a, b)]
    return (bits[0][:, None] != bits[1][None]).sum(axis=2)


@pytest.fixture(scope="module")
def synthetic(rows_and_paths):
    """Rows of a synthetic study with their `subset`, and its images at 64 pixels."""
    rows, paths = rows_and_paths
    return rows.assign(subset=rows["split"]), read([paths[name] for name in rows["image"]])


def test_a_clean_study_has_no_duplicates(synthetic):
    rows, images = synthetic
    hashes = hash_images(images)
    found = find_duplicates(rows, hashes)
    assert len(found) == 0
    names = [f"{name}_{letter}" for letter in "ab" for name in ("image", "subset", "patient")]
    assert list(found.columns) == [*names, "kind", "distance"]


def test_planted_duplicates_are_found_by_name(synthetic):
    rows, images = synthetic
    originals = [int(np.flatnonzero(rows["subset"] == subset)[k]) for subset in ("train", "test") for k in (3, 7, 11)]
    changes = (np.copy, save_as_jpeg, brighten, lambda image: resize(image, 80), blur_with_noise, np.copy)
    copies = [change(images[i]) for change, i in zip(changes, originals, strict=True)]
    kinds = ["exact", "near", "near", "near", "near", "exact"]
    # The last copy stays in its subset, under another patient.
    subsets = ["test", "test", "val", "val", "train", "test"]
    names = [f"copy_{i}.png" for i in range(6)]
    planted = rows.iloc[originals].assign(image=names, patient_id=range(90_001, 90_007), subset=subsets)
    everything = pd.concat([rows, planted])  # With an index that repeats itself.
    hashes = hash_images([images[:50], images[50:], *(copy[None] for copy in copies)])

    pairs = find_duplicates(everything, hashes)
    assert pairs["distance"].is_monotonic_increasing
    found = pairs.sort_values("image_b", ignore_index=True)
    assert found["image_a"].tolist() == rows["image"].iloc[originals].tolist()
    assert found["subset_a"].tolist() == ["train"] * 3 + ["test"] * 3
    assert found["patient_a"].tolist() == rows["patient_id"].iloc[originals].tolist()
    assert found["image_b"].tolist() == planted["image"].tolist()
    assert found["subset_b"].tolist() == subsets
    assert found["patient_b"].tolist() == planted["patient_id"].tolist()
    assert found["kind"].tolist() == kinds
    assert (found["distance"][found["kind"] == "exact"] == 0).all()


def test_hashes_are_what_they_are_said_to_be(synthetic):
    images = synthetic[1][:40]
    hashes = hash_images(images)
    assert (hashes.exact.shape, hashes.exact.dtype) == ((40, 16), np.uint8)
    assert (hashes.perceptual.shape, hashes.perceptual.dtype) == ((40, HASH_BITS // 8), np.uint8)
    for same in (images[..., None], [images[:1], images[1:1], images[1:]], (image[None] for image in images)):
        for ours, theirs in zip(hashes, hash_images(same), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    touched = images.copy()
    touched[:, 5, 5] ^= 1
    assert (hash_images(touched).exact != hashes.exact).any(axis=1).all()
    assert np.diag(distances(hashes, hash_images(touched))).max() <= 3
    # A linear change that clips nothing moves only bits that rounding decides.
    dim = hash_images((images // 2 + 60).astype("uint8"))
    assert np.diag(distances(hashes, dim)).max() <= 6
    flipped = hash_images(images[:, :, ::-1])
    assert np.diag(distances(hashes, flipped)).min() > 3 * MAX_DISTANCE


def test_blank_images_are_like_each_other_and_like_no_image(synthetic):
    blank = np.stack([np.full((64, 64), level, "uint8") for level in (0, 0, 130, 255)])
    hashes = hash_images(np.concatenate([blank, synthetic[1][:20]]))
    assert (hashes.perceptual[:4] == 0).all()
    rows = pd.DataFrame({"image": range(24), "patient_id": range(24), "subset": "train"})
    found = find_duplicates(rows, hashes)
    assert found[["image_a", "image_b"]].to_numpy().tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert found["kind"].tolist() == ["exact", *["near"] * 5]


def test_search_equals_brute_force():
    rng = np.random.default_rng(0)
    n = 120
    # A handful of originals, disturbed more and more.
    centers = rng.integers(0, 256, (6, 32), dtype="uint8")
    masks = np.packbits(rng.random((n, 256)) < rng.uniform(0, 0.15, (n, 1)) * (np.arange(n)[:, None] % 3 > 0), axis=1)
    hashes = ImageHashes(rng.integers(0, 2, (n, 16), dtype="uint8") // 2, centers[rng.integers(0, 6, n)] ^ masks)
    rows = pd.DataFrame({"image": [f"{i:03d}" for i in range(n)], "patient_id": range(n), "subset": "train"})
    found = find_duplicates(rows, hashes)
    everyone = distances(hashes, hashes)
    expected = {
        (f"{i:03d}", f"{j:03d}"): everyone[i, j]
        for i in range(n)
        for j in range(i + 1, n)
        if everyone[i, j] <= MAX_DISTANCE
    }
    pairs = zip(found["image_a"], found["image_b"], strict=True)
    assert dict(zip(pairs, found["distance"], strict=True)) == expected
    assert len(found) == len(expected) > 0


def test_a_pair_is_found_wherever_its_bits_differ():
    """One bit in each piece but one, of pieces of adjacent bits and of every so many bits."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, 32, dtype="uint8")
    spread = np.linspace(0, HASH_BITS - 1, MAX_DISTANCE, dtype=int)
    first = np.arange(MAX_DISTANCE)
    for bits in (first, first + 1, spread, rng.permutation(HASH_BITS)[:MAX_DISTANCE]):
        other = np.unpackbits(image)
        other[bits] ^= 1
        far = other.copy()
        far[np.setdiff1d(np.arange(HASH_BITS), bits)[: MAX_DISTANCE + 1]] ^= 1
        hashes = ImageHashes(np.zeros((3, 16), "uint8"), np.stack([image, np.packbits(other), np.packbits(far)]))
        rows = pd.DataFrame({"image": list("abc"), "patient_id": [1, 2, 3], "subset": "train"})
        found = find_duplicates(rows, hashes)
        assert found[["image_a", "image_b", "distance"]].to_numpy().tolist() == [["a", "b", MAX_DISTANCE]]


def test_few_images_are_compared_in_a_large_study(monkeypatch):
    n, compared = 4000, []
    rng = np.random.default_rng(0)
    hashes = ImageHashes(np.zeros((n, 16), "uint8"), rng.integers(0, 256, (n, 32), dtype="uint8"))
    hashes.perceptual[-40:] = hashes.perceptual[:40]
    rows = pd.DataFrame({"image": range(n), "patient_id": range(n), "subset": "train"})
    count = np.bitwise_count
    monkeypatch.setattr(np, "bitwise_count", lambda words: compared.append(len(words)) or count(words))
    assert len(find_duplicates(rows, hashes)) == 40
    assert sum(compared) < n**2 / 2 / 500


def test_odd_input():
    images = np.zeros((3, 64, 64), "uint8")
    rows = pd.DataFrame({"image": list("abc"), "patient_id": [1, 2, 3], "subset": "train"})
    assert len(find_duplicates(rows, hash_images(images))) == 3
    for nothing in (images[:0], [], [images[:0]]):
        assert len(find_duplicates(rows[:0], hash_images(nothing))) == 0
    with pytest.raises(ValueError, match="sides of 31 pixels"):
        hash_images(images[:, :31, :31])
    many = pd.DataFrame({"image": range(2200), "patient_id": range(2200), "subset": "train"})
    with pytest.raises(ValueError, match="more than 1,000,000 pairs"):
        find_duplicates(many, ImageHashes(np.zeros((2200, 16), "uint8"), np.zeros((2200, 32), "uint8")))


@pytest.mark.slow
def test_real_images_and_their_copies(shared_data):
    paths = sorted((shared_data / "nih_sample" / "images").glob("*.png"))
    images = read(paths)
    hashes = hash_images(images)
    others = distances(hashes, hashes) + HASH_BITS * np.eye(len(paths), dtype=int)
    assert others.min() > 3 * MAX_DISTANCE
    assert len(np.unique(hashes.exact, axis=0)) == len(images)
    jsrt = hash_images(read(sorted((shared_data / "jsrt" / "images").glob("*.png"))))
    other = distances(jsrt, jsrt) + HASH_BITS * np.eye(len(jsrt.exact), dtype=int)
    assert min(other.min(), distances(jsrt, hashes).min()) > 3 * MAX_DISTANCE

    some = images[::6]  # copies take long to make

    originals = hash_images(some)

    def share_found(change):
        copies = hash_images(np.stack([change(image) for image in some]))
        return np.mean(np.diag(distances(originals, copies)) <= MAX_DISTANCE)

    sides = (lambda image: resize(image, 224), lambda image: resize(image, 88))
    for change in (save_as_jpeg, brighten, blur_with_noise, *sides):
        assert share_found(change) == 1
    for gamma in (0.8, 1.25):
        assert share_found(lambda image, gamma=gamma: bend(image, gamma)) > 0.95

    paths = sorted((shared_data / "nih_original" / "images_001" / "images").glob("*.png"))
    names = [path.name for path in sorted((shared_data / "nih_sample" / "images").glob("*.png"))]
    large = hash_images(image[None] for image in read(paths))
    own = [names.index(path.name) for path in paths]
    between = distances(large, hashes)
    assert between[np.arange(len(own)), own].max() <= MAX_DISTANCE
    between[np.arange(len(own)), own] = HASH_BITS
    assert between.min() > 3 * MAX_DISTANCE


def test_copies_in_a_packed_study_are_searched_once(packed, tmp_path, monkeypatch):
    """They are kept beside the images, and searched again for other images or where the file is cut short."""
    study = dataclasses.replace(packed, folder=shutil.copytree(packed.folder, tmp_path / "packed"))
    images = np.concatenate(list(duplicates.read_images(study)))
    monkeypatch.setattr(duplicates, "MAX_DISTANCE", 90)  # at which different images of a study are near
    expected = find_duplicates(study.index, hash_images(images))
    found = find_study_duplicates(study)
    assert len(found) and found.equals(expected)

    monkeypatch.setattr(duplicates, "read_images", None)
    assert find_study_duplicates(study).equals(found)
    for other in (dataclasses.replace(study, index_sha256="another"), dataclasses.replace(study, shards={"train": []})):
        with pytest.raises(TypeError):
            find_study_duplicates(other)
    kept = study.folder / "duplicates.json"
    kept.write_text(kept.read_text()[:50])
    with pytest.raises(TypeError):
        find_study_duplicates(study)


def test_copies_in_a_read_only_study_are_found(packed, tmp_path, monkeypatch):
    def refuse(path, text):
        raise PermissionError(path)

    monkeypatch.setattr(duplicates, "write_text", refuse)
    monkeypatch.setattr(duplicates, "MAX_DISTANCE", 90)
    study = dataclasses.replace(packed, folder=shutil.copytree(packed.folder, tmp_path / "packed"))
    assert len(find_study_duplicates(study)) and not (study.folder / "duplicates.json").exists()
