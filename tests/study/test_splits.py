"""Tests of study.splits on made-up metadata and on NIH's own files."""

import hashlib

import numpy as np
import pandas as pd
import pytest

from helpers.study.labels import PATHOLOGIES
from helpers.study.splits import SPLITS, assert_no_patient_overlap, hash_split, make_split
from helpers.study.study_folder import list_images, match_images

NAMES = list(PATHOLOGIES)


def make_metadata(n_patients, seed=0, share=0.1, max_images=6):
    """A frame like that of load_metadata, with findings drawn for each image."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(1, n_patients + 1), rng.integers(1, max_images + 1, n_patients))
    visit = pd.Series(patient).groupby(patient).cumcount()
    frame = pd.DataFrame({"image": [f"{p:08d}_{v:03d}.png" for p, v in zip(patient, visit, strict=True)]})
    frame["patient_id"] = patient
    for i, name in enumerate(NAMES):
        frame[name] = (rng.random(len(frame)) < share / (1 + i / 4)).astype("uint8")
    return frame


def with_lists(frame, n_test):
    """The frame with a split of its own, as NIH's lists are: the first patients are in test."""
    return frame.assign(split=np.where(frame["patient_id"] <= n_test, "test", "train_val"))


def val_coverage(frame, subsets):
    """Pathologies with two or more patients outside test that are missing in train or in val."""
    missing = []
    for name in NAMES:
        patients = {part: set(frame["patient_id"][(subsets == part) & (frame[name] == 1)]) for part in ("train", "val")}
        if len(patients["train"] | patients["val"]) >= 2 and not (patients["train"] and patients["val"]):
            missing.append(name)
    return missing


def test_official_split_keeps_the_test_list_and_balances_val(tmp_path):
    frame = make_metadata(1500)
    subsets = make_split(with_lists(frame, 300))
    assert isinstance(subsets, np.ndarray)
    np.testing.assert_array_equal(subsets == "test", frame["patient_id"] <= 300)
    assert_no_patient_overlap(frame["patient_id"], subsets)
    rest, val = frame[subsets != "test"], frame[subsets == "val"]
    assert len(val) / len(rest) == pytest.approx(0.1, rel=0.05)
    common = [name for name in NAMES if 0.1 * rest[name].sum() >= 20]
    assert len(common) >= 5
    np.testing.assert_allclose(val[common].mean(), rest[common].mean(), rtol=0.05)


@pytest.mark.parametrize("split", SPLITS)
def test_split_depends_on_rows_and_seed_but_not_on_order(tmp_path, split):
    frame = with_lists(make_metadata(200), 40)
    subsets = pd.Series(make_split(frame, split, seed=5), index=frame["image"])
    shuffled = frame.sample(frac=1, random_state=1)
    again = pd.Series(make_split(shuffled, split, seed=5), index=shuffled["image"])
    pd.testing.assert_series_equal(again[subsets.index], subsets)
    other = pd.Series(make_split(frame, split, seed=6), index=frame["image"])
    assert not other.equals(subsets)
    assert set(subsets) == {"train", "val", "test"}


def test_splits_are_the_same_on_every_machine(tmp_path):
    frame = with_lists(make_metadata(200), 40)
    digests = [hash_split(frame["image"], make_split(frame, split))[:12] for split in SPLITS]
    assert digests == ["9b77a9962499", "e077963a6c46", "7fee53deaa3c"]


def test_community_and_leaky_splits():
    frame = make_metadata(1000)
    subsets = make_split(frame, split="random_patients")
    assert_no_patient_overlap(frame["patient_id"], subsets)
    patients = frame.groupby(subsets)["patient_id"].nunique()
    assert patients.to_dict() == {"train": 700, "val": 100, "test": 200}
    leaky = make_split(frame, split="leaky_images")
    assert pd.Series(leaky).value_counts(normalize=True).round(2).to_dict() == {"train": 0.7, "test": 0.2, "val": 0.1}
    with pytest.raises(ValueError, match="more than one subset"):
        assert_no_patient_overlap(frame["patient_id"], leaky)


@pytest.mark.parametrize("seed", range(8))
def test_small_studies_have_every_repeated_pathology_on_both_sides(tmp_path, seed):
    frame = make_metadata(25, seed, share=0.25, max_images=1)
    subsets = make_split(with_lists(frame, 0), seed=seed)
    assert val_coverage(frame, subsets) == []
    assert 1 <= (subsets == "val").sum() < 15
    assert not (subsets == "test").any()


def test_studies_without_findings_and_with_two_patients(tmp_path):
    frame = make_metadata(2, share=0)
    for val_share in (0.01, 0.99):
        subsets = make_split(with_lists(frame, 0), val_share=val_share)
        assert frame.groupby(subsets)["patient_id"].nunique().to_dict() == {"train": 1, "val": 1}
    with pytest.raises(ValueError, match="1 patients"):
        make_split(with_lists(frame, 1))
    with pytest.raises(ValueError, match="too few"):
        make_split(frame, split="random_patients")


def test_split_refuses_what_would_leak():
    frame = with_lists(make_metadata(20), 5)
    first = frame.index[frame["split"].eq("train_val")][0]
    unlisted = frame.assign(split=frame["split"].mask(frame.index == first, ""))
    with pytest.raises(ValueError, match=rf"1 image is \({frame['image'][first]}\) in no subset .*random_patients"):
        make_split(unlisted)
    patient = frame["patient_id"].value_counts().drop(range(1, 6)).idxmax()
    moved = frame.index[frame["patient_id"] == patient][0]
    with pytest.raises(ValueError, match=rf"1 patients .* {patient} \(test\+(train|val)\)"):
        make_split(frame.assign(split=frame["split"].mask(frame.index == moved, "test")))
    with pytest.raises(ValueError, match="twice"):
        make_split(pd.concat([frame, frame[:1]]), split="random_patients")
    with pytest.raises(ValueError, match="no split of its own"):
        make_split(make_metadata(20))


def test_a_study_s_own_validation_images_stay():
    frame = with_lists(make_metadata(60), 20)
    frame["split"] = frame["split"].mask(frame["patient_id"].between(21, 30), "val").replace("train_val", "train")
    np.testing.assert_array_equal(make_split(frame, seed=3), frame["split"])
    only_test = frame[frame["split"].eq("test")]  # another hospital's images, on which nothing is trained
    assert set(make_split(only_test)) == {"test"}


@pytest.mark.parametrize(
    ("split", "val_share"), [("by_image", 0.1), ("official", 0), ("official", 1), ("random_patients", 0.8)]
)
def test_split_refuses_arguments_out_of_range(tmp_path, split, val_share):
    with pytest.raises(ValueError, match=r"expected (one|a share)"):
        make_split(with_lists(make_metadata(20), 5), split, val_share)


def test_overlap_names_up_to_five_patients():
    assert_no_patient_overlap([1, 1, 2], ["val", "val", "test"])
    patients = np.repeat(np.arange(7), 2)
    with pytest.raises(ValueError, match=r"7 patients.*: 0 \(test\+train\), .*4 \(test\+train\)$"):
        assert_no_patient_overlap(patients, ["train", "test"] * 7)


def test_hash_is_of_the_sorted_lines():
    expected = hashlib.sha256(b"a.png\ttrain\nb.png\tval\n").hexdigest()
    assert hash_split(["b.png", "a.png"], np.array(["val", "train"])) == expected
    assert hash_split(["b.png", "a.png"], ["train", "val"]) != expected
    with pytest.raises(ValueError):
        hash_split(["a.png"], ["val", "train"])


@pytest.mark.slow
def test_nih_official_split(nih):
    assert_no_patient_overlap(nih["patient_id"], nih["subset"])
    assert (nih["subset"] == "test").sum() == 25596
    rest, val = nih[nih["subset"] != "test"], nih[nih["subset"] == "val"]
    assert len(val) / len(rest) == pytest.approx(0.1, rel=0.01)
    assert rest["patient_id"].nunique() == 28008
    np.testing.assert_allclose(val[NAMES].mean(), rest[NAMES].mean(), rtol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "n_images"), [("nih_sample", 304), ("nih_original", 48)])
def test_partial_nih_downloads_split(nih, nih_folder, shared_data, folder, n_images):
    frame, report = match_images(nih, list_images(shared_data / folder))
    assert (report.n_rows, report.n_found, report.n_extra) == (112120, n_images, 0)
    subsets = make_split(frame)
    assert_no_patient_overlap(frame["patient_id"], subsets)
    assert set(subsets) == {"train", "val", "test"}
    assert val_coverage(frame, subsets) == []
    assert (subsets == "val").sum() < 0.25 * (subsets != "test").sum()
