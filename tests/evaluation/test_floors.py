"""Tests of evaluation.floors against the published floors, planted shortcuts and a synthetic study."""

import warnings

import numpy as np
import pandas as pd
import pytest

from helpers.evaluation import floors
from helpers.evaluation.auc import roc_auc
from helpers.evaluation.floors import (
    METADATA_COLUMNS,
    _draw_patients,
    measure_leakage,
    predict_by_ridge,
    predict_without_pixels,
)
from helpers.runtime.settings import ROOT
from helpers.study import PATHOLOGIES, load_metadata, load_official_lists, make_split

# Test AUC on the official split without pixels, measured elsewhere with other software, in the order of PATHOLOGIES.
FLOORS = {
    ("view",): [0.511, 0.482, 0.535, 0.605, 0.556, 0.556, 0.572, 0.583, 0.618, 0.681, 0.428, 0.645, 0.587, 0.697],
    METADATA_COLUMNS: [
        *(0.565, 0.536, 0.592, 0.646, 0.544, 0.530, 0.576),
        *(0.668, 0.647, 0.712, 0.622, 0.675, 0.605, 0.810),
    ],
}


def draw_rows(n, seed=0, first_patient=1):
    """Rows as load_metadata gives them, a patient each: Edema follows the view, Hernia the age, all else nothing."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "image": [f"{first_patient + i:08d}_000.png" for i in range(n)],
            "patient_id": np.arange(first_patient, first_patient + n),
            "follow_up": rng.integers(0, 9, n),
            "age": np.where(rng.random(n) < 0.1, np.nan, rng.uniform(5, 90, n)),
            "sex": rng.choice(["M", "F"], n),
            "view": rng.choice(["PA", "AP"], n),
        }
    )
    labels = pd.DataFrame((rng.random((n, 14)) < 0.2).astype("uint8"), columns=list(PATHOLOGIES))
    labels["Edema"] = frame["view"].eq("AP").astype("uint8")
    labels["Hernia"] = frame["age"].between(40, 60).astype("uint8")
    return pd.concat([frame, labels], axis=1)


@pytest.fixture(scope="module")
def planted():
    """Rows of 600 images of 200 patients, and thumbnails of 16 pixels that resemble their patient's others.

    A patient has a few findings, which most of the images show.
    """
    rng = np.random.default_rng(0)
    patient = np.sort(rng.permutation(np.concatenate([np.arange(200), rng.integers(0, 200, 400)])))
    rows = pd.DataFrame({"image": [f"{i:08d}_000.png" for i in range(600)], "patient_id": patient + 1})
    faces = rng.normal(128, 30, (200, 16, 16))[patient] + rng.normal(0, 15, (600, 16, 16))
    usual, other = rng.random((200, 14)) < 1 / 7, rng.random((600, 14)) < 1 / 7
    findings = np.where(rng.random((600, 14)) < 0.3, other, usual[patient]).astype("uint8")
    return pd.concat([rows, pd.DataFrame(findings, columns=list(PATHOLOGIES))], axis=1), np.clip(faces, 0, 255).astype(
        "uint8"
    )


@pytest.mark.slow
def test_floors_of_the_official_split_are_reproduced(shared_data):
    committed = pd.read_csv(ROOT / "docs" / "reference_evaluation" / "metadata_floors.csv").groupby("floor")
    folder = shared_data / "nih_metadata"
    metadata, (train_val, test) = load_metadata(folder), load_official_lists(folder)
    train, rows = (metadata[metadata["image"].isin(names)] for names in (train_val, test))
    for (columns, expected), name in zip(FLOORS.items(), ("view only", "metadata only"), strict=True):
        probs = predict_without_pixels(train, rows, columns)
        assert (probs.shape, probs.dtype) == ((25_596, 14), np.float64)
        auc = roc_auc(rows[list(PATHOLOGIES)], probs)
        assert auc.mean() == pytest.approx(np.mean(expected), abs=0.01)
        np.testing.assert_allclose(auc, expected, atol=0.001 if columns == ("view",) else 0.03)
        table = committed.get_group(name).set_index("pathology")["auc"]
        np.testing.assert_allclose(auc, table[list(PATHOLOGIES)], atol=0.003)  # other releases grow other trees
        assert auc.mean() == pytest.approx(table["mean"], abs=5e-4)


def test_ridge_finds_what_is_linear_and_nothing_else():
    """Two of fourteen labels follow the features, one by a sum and one by a product; the features differ in scale."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(1200, 20)) * np.logspace(-3, 3, 20) + 7
    z = (features - features.mean(axis=0)) / features.std(axis=0)
    labels = rng.random((1200, 14)) < 0.3
    labels[:, 2] = z[:, 0] + z[:, 19] + 0.5 * rng.normal(size=1200) > 1
    labels[:, 5] = z[:, 3] * z[:, 4] > 0.5
    scores = predict_by_ridge(features[:800], labels[:800], features[800:])
    auc = roc_auc(labels[800:], scores)
    assert scores.shape == (400, 14) and auc[2] > 0.95
    assert np.abs(np.delete(auc, 2) - 0.5).max() < 0.12
    labels[:, 0] = 0
    assert np.ptp(predict_by_ridge(features[:800], labels[:800], features[800:])[:, 0]) < 1e-6
    with pytest.raises(ValueError, match="1 images are too few"):
        predict_by_ridge(features[:1], labels[:1], features)


def test_only_the_named_columns_are_learned_from():
    train, rows = draw_rows(400), draw_rows(300, seed=1, first_patient=1000)
    edema, hernia = PATHOLOGIES.index("Edema"), PATHOLOGIES.index("Hernia")
    labels = rows[list(PATHOLOGIES)].to_numpy()
    auc = {columns: roc_auc(labels, predict_without_pixels(train, rows, columns)) for columns in (("view",), ("age",))}
    assert auc[("view",)][edema] == 1
    assert auc[("age",)][hernia] > 0.97
    assert abs(auc[("age",)][edema] - 0.5) < 0.1
    assert abs(auc[("view",)][hernia] - 0.5) < 0.1
    everything = predict_without_pixels(train, rows)
    auc = roc_auc(labels, everything)
    assert auc[[edema, hernia]].min() > 0.97
    assert np.abs(np.delete(auc, [edema, hernia]) - 0.5).max() < 0.15
    # Neither the labels of the rows nor their order matter, and nothing is drawn anew.
    backwards = predict_without_pixels(train, rows[::-1].drop(columns=list(PATHOLOGIES)))
    np.testing.assert_array_equal(everything, backwards[::-1])
    # A row scores the same in whatever company, also where all rows are of one view.
    frontal = rows["view"].eq("PA").to_numpy()
    np.testing.assert_array_equal(everything[frontal], predict_without_pixels(train, rows[frontal]))


def test_poor_training_rows_give_constant_or_finite_scores():
    train, rows = draw_rows(200), draw_rows(30, seed=1, first_patient=1000)
    train["Mass"], train["Nodule"] = 0, 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probs = predict_without_pixels(train, rows)
        assert (probs[:, PATHOLOGIES.index("Mass")] == 0).all()
        assert (probs[:, PATHOLOGIES.index("Nodule")] == 1).all()
        for few in (1, 2, 7):
            probs = predict_without_pixels(train[:few], rows)
            assert (np.ptp(probs, axis=0) == 0).all()
            np.testing.assert_allclose(probs[0], train[list(PATHOLOGIES)][:few].mean(), atol=0.1)
        one_view = predict_without_pixels(train[train["view"] == "PA"], rows, ("view",))
        assert (np.ptp(one_view, axis=0) == 0).all()
        ageless = predict_without_pixels(train.assign(age=np.nan), rows.assign(age=np.nan))
        assert ((ageless >= 0) & (ageless <= 1)).all()
        nothing = predict_without_pixels(train.assign(age=np.nan), rows, ("age",))
        assert (np.ptp(nothing, axis=0) == 0).all()
        assert predict_without_pixels(train, rows[:0]).shape == (0, 14)
    with pytest.raises(ValueError, match="no rows to learn from"):
        predict_without_pixels(train[:0], rows)


def test_patients_of_the_training_rows_are_refused_by_name():
    train = draw_rows(50)
    with pytest.raises(ValueError, match=r"2 patients .*: 49 \(rows\+train\), 50 \(rows\+train\)"):
        predict_without_pixels(train, draw_rows(10, seed=1, first_patient=49))


@pytest.mark.slow
def test_the_auc_is_too_high_on_a_split_by_image(planted):
    rows, thumbnails = planted
    result = measure_leakage(thumbnails, rows, seeds=range(3))
    assert result["seed"].tolist() == [0, 1, 2]
    assert (result["flattery"] > 0.03).all()
    assert result["flattery"].mean() > 0.07
    np.testing.assert_allclose(result["flattery"], result["auc_by_image"] - result["auc_by_patient"])
    assert (result["known_by_patient"] == 0).all()
    assert (result["recognized_by_image"] > 0.4).all()
    for seed, known in zip(result["seed"], result["known_by_image"], strict=True):
        in_test = make_split(rows, split="leaky_images", seed=seed) == "test"
        assert known == rows["patient_id"][in_test].isin(rows["patient_id"][~in_test]).mean()
    pd.testing.assert_frame_equal(result[:1], measure_leakage(thumbnails, rows, seeds=[0]))


@pytest.mark.slow
def test_of_many_images_leakage_takes_patients_at_random_and_whole(planted, monkeypatch):
    rows, thumbnails = planted
    drawn = [_draw_patients(rows["patient_id"].to_numpy(), 200, seed) for seed in range(40)]
    for taken in drawn:
        patients = rows["patient_id"].iloc[taken]
        assert 150 < len(taken) <= 200 and rows["patient_id"].isin(patients).sum() == len(taken)
        assert (np.diff(taken) > 0).all()
    # Every patient is as likely, early ones and late ones: a third of the images, each time.
    often = np.bincount(np.concatenate(drawn), minlength=len(rows)) / len(drawn)
    assert often.min() > 0 and abs(often[:200].mean() - often[-200:].mean()) < 0.1
    np.testing.assert_array_equal(_draw_patients(rows["patient_id"].to_numpy(), len(rows), 0), np.arange(len(rows)))
    monkeypatch.setattr(floors, "_MAX_IMAGES", 300)
    result = measure_leakage(thumbnails, rows, seeds=range(2))
    assert result["n_images"].between(250, 300).all() and (result["known_by_patient"] == 0).all()


@pytest.mark.slow
def test_leakage_of_unmistakable_and_of_unknown_patients(planted):
    rows, _ = planted
    rng = np.random.default_rng(0)
    patient = np.unique(rows["patient_id"], return_inverse=True)[1]
    # Each patient has one face and one set of findings, which have nothing to do with each other.
    findings = pd.DataFrame(rng.integers(0, 2, (patient.max() + 1, 14))[patient], columns=list(PATHOLOGIES))
    rows = rows.assign(**findings)
    faces = rng.integers(0, 240, (patient.max() + 1, 16, 16))[patient]
    result = measure_leakage((faces + rng.integers(0, 15, faces.shape)).astype("uint8"), rows, seeds=range(2))
    assert (result["recognized_by_image"] == 1).all()
    assert result["auc_by_image"].min() > 0.8  # a quarter of the test images are of patients never seen
    assert abs(result["auc_by_patient"].mean() - 0.5) < 0.05
    noise = measure_leakage(rng.integers(0, 255, faces.shape).astype("uint8"), rows, seeds=range(2))
    assert noise["recognized_by_image"].max() < 0.05
    assert abs(noise["flattery"].mean()) < 0.05


@pytest.mark.slow
def test_leakage_of_odd_input(planted):
    rows, thumbnails = planted
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = measure_leakage(thumbnails[:12], rows[:12].reset_index(drop=True), seeds=[0])
        few = rows[:150].reset_index(drop=True)
        blank = measure_leakage(np.zeros((150, 8, 8), "uint8"), few, seeds=[0])
        healthy = measure_leakage(thumbnails[:150], few.assign(**dict.fromkeys(PATHOLOGIES, 0)), seeds=[0])
    assert len(small) == 1
    assert blank["flattery"].notna().all()
    assert healthy["flattery"].isna().all()
