"""Splits a study into train, validation and test, so that no patient is in two of them."""

import hashlib

import numpy as np
import pandas as pd

from .labels import list_findings
from .study_folder import name_some

SPLITS = ("official", "random_patients", "leaky_images")
SUBSETS = ("train", "val", "test")  # of each split

_TEST_SHARE = 0.2  # of the community's 70/10/20
_N_DRAWS, _N_MOVES = 500, 300  # random draws of validation patients, and most patients that are moved afterwards


def make_split(metadata, split="official", val_share=0.1, seed=0):
    """Assigns every row to train, val or test; the result depends on the rows and the seed, not on the rows' order.

    "official" is the study's own split, the column `split`: NIH's test list is that of most published tables. Where it
    has no validation images, `val_share` of the patients outside the test set are taken, balanced over the findings:
    where it is possible, a finding with positives of two patients or more is on both sides. "random_patients" is the
    community's 70/10/20 over patients, and "leaky_images" the same over images, which leaves most validation patients
    in train: for demonstration only.

    Args:
        metadata: DataFrame of `Study.rows` or `match_images`.
        split: one of `SPLITS`.
        val_share: validation's share in (0, 1), of the images outside the test set for "official", else of all
            patients or images, where it stays below 0.8, since the test share is 0.2.
        seed: seed of the random draw.

    Returns:
        Array of str, one of "train", "val", "test" for each row.

    Raises:
        ValueError: if an argument is out of range, the study has no split of its own, an image or a patient is in
            none or in two of its subsets, or there are too few patients to fill the subsets.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    if not 0 < val_share < (1 if split == "official" else 1 - _TEST_SHARE):
        raise ValueError(f"val_share is {val_share}; expected a share that leaves room for the other subsets")
    if metadata["image"].duplicated().any():
        raise ValueError(f"{metadata['image'][metadata['image'].duplicated()].iloc[0]} is in metadata twice")
    rng = np.random.Generator(np.random.PCG64(seed))
    if split != "official":
        units = metadata["image" if split == "leaky_images" else "patient_id"]
        return _split_at_random(units, val_share, rng)

    if "split" not in metadata:
        raise ValueError(
            "the study has no split of its own: no column split in labels.csv, of NIH's no train_val_list.txt and "
            "test_list.txt. Add it, or choose SPLIT = 'random_patients'"
        )
    unlisted = metadata["image"][~metadata["split"].isin([*SUBSETS, "train_val"])].sort_values().tolist()
    if unlisted:
        raise ValueError(
            f"{name_some(unlisted)} in no subset of the study's own split, of NIH's in neither train_val_list.txt nor "
            "test_list.txt; restore it, or choose SPLIT = 'random_patients'"
        )
    subsets = metadata["split"].replace("train_val", "train").to_numpy(dtype="<U5")
    if (subsets == "train").any() and not (subsets == "val").any():
        val_patients = _draw_val_patients(metadata[subsets == "train"], val_share, rng)
        subsets[(subsets == "train") & metadata["patient_id"].isin(val_patients).to_numpy()] = "val"
    assert_no_patient_overlap(metadata["patient_id"], subsets)
    return subsets


def _draw_val_patients(rows, val_share, rng):
    """Returns the patients of some rows that go to validation."""
    # groupby sorts by patient, which is what makes the result independent of the rows' order.
    counts = rows.groupby("patient_id")[list(list_findings(rows))].sum().astype("int64")
    if len(counts) < 2:
        raise ValueError(
            f"{len(counts)} patients outside the test set have images, and train and validation need one each; add "
            "images, or choose SPLIT = 'random_patients'"
        )
    counts["images"] = rows.groupby("patient_id").size()
    return counts.index[_choose_val(np.ascontiguousarray(counts.to_numpy().T), val_share, rng)]


def name_unit(has_patients):
    """Returns what resampling draws, in words: patients, or images where nobody knows whose they are."""
    return "patients" if has_patients else "images (no patient ids)"


def assert_no_patient_overlap(patient_ids, split):
    """Checks that no patient is in more than one subset, since a model recognizes patients.

    Args:
        patient_ids: (n,) patient of each image.
        split: (n,) subset of each image.

    Raises:
        ValueError: naming up to five patients that are in more than one subset, with their subsets.
    """
    frame = pd.DataFrame({"patient": np.asarray(patient_ids), "split": np.asarray(split)}).drop_duplicates()
    frame = frame[frame["patient"].duplicated(keep=False)]
    if len(frame):
        subsets = frame.groupby("patient")["split"].agg(lambda names: "+".join(sorted(names)))
        named = ", ".join(f"{patient} ({names})" for patient, names in subsets.head(5).items())
        raise ValueError(f"{len(subsets)} patients are in more than one subset: {named}")


def hash_split(images, split):
    """Hashes a split, so that two runs can show that they used the same one.

    Args:
        images: (n,) image names.
        split: (n,) subset of each image.

    Returns:
        SHA-256, in hexadecimal, of the sorted lines `image<TAB>split<LF>`.
    """
    lines = sorted(f"{image}\t{subset}\n" for image, subset in zip(images, split, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _split_at_random(units, val_share, rng):
    names, unit_of_row = np.unique(units.to_numpy(), return_inverse=True)
    n_test = max(1, round(_TEST_SHARE * len(names)))
    n_val = max(1, round(val_share * len(names)))
    if n_test + n_val >= len(names):
        raise ValueError(f"{len(names)} different values of {units.name} are too few for train, val and test")
    subset_of_unit = np.full(len(names), "train")
    order = np.argsort(rng.random(len(names)), kind="stable")
    subset_of_unit[order[:n_test]] = "test"
    subset_of_unit[order[n_test : n_test + n_val]] = "val"
    return subset_of_unit[unit_of_row]


def _choose_val(counts, val_share, rng):
    """Chooses validation patients: the best of random draws, then single patients moved while that helps.

    Args:
        counts: (columns, patients) int64, a patient's positive images of each finding; the last column is all images.
        val_share: share aimed at in every column.
        rng: numpy Generator.

    Returns:
        (patients,) bool. Sums run over the first axis, term after term, hence to the same bits on every machine.
    """
    n_patients = counts.shape[1]
    positive = counts[:-1] > 0
    n_positive = positive.sum(axis=1)
    target = val_share * counts.sum(axis=1)
    # Relative deviations, but a finding expected fewer than 20 times is not worth distorting the others for.
    weight = 1 / np.maximum(target, 20.0) ** 2
    absent_cost = 1e6  # a finding that is missing on one side outweighs every deviation

    def cost(sums, patients):
        missing = ((patients == 0) | (patients == n_positive[:, None])) & (n_positive[:, None] >= 2)
        return absent_cost * missing.sum(axis=0) + (weight[:, None] * (sums - target[:, None]) ** 2).sum(axis=0)

    size = min(max(round(val_share * n_patients), 1), n_patients - 1)
    best, best_cost = None, np.inf
    for _ in range(_N_DRAWS):
        # The smallest of uniform numbers: the draw rests on the generator's stream alone, not on numpy's shuffling.
        chosen = np.sort(np.argpartition(rng.random(n_patients), size - 1)[:size])
        draw_cost = cost(counts[:, chosen].sum(axis=1)[:, None], positive[:, chosen].sum(axis=1)[:, None])[0]
        if draw_cost < best_cost:
            best, best_cost = chosen, draw_cost
    in_val = np.zeros(n_patients, dtype=bool)
    in_val[best] = True

    for _ in range(_N_MOVES):
        sign = np.where(in_val, -1, 1)
        sums, patients = counts[:, in_val].sum(axis=1), positive[:, in_val].sum(axis=1)
        after = cost(sums[:, None] + sign * counts, patients[:, None] + sign * positive)
        for value in (True, False):  # Neither side may lose its last patient.
            if (in_val == value).sum() == 1:
                after[in_val == value] = np.inf
        move = int(after.argmin())
        if after[move] >= best_cost:
            break
        best_cost, in_val[move] = after[move], not in_val[move]
    return in_val
