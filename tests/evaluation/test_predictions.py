"""Tests of evaluation.predictions: CSVs as others write them are joined or refused, and only like scores compared."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest

from helpers.evaluation.predictions import (
    add_to_leaderboard,
    gather_scores,
    join_predictions,
    load_predictions,
    name_columns,
)
from helpers.study import PATHOLOGIES, load_official_lists, load_study

PROBS, LABELS = name_columns(PATHOLOGIES)
CONTRACT = ["image", "patient_id", "split", *PROBS, *LABELS]


@pytest.fixture(scope="module")
def study(phantom_dir):
    return load_study(phantom_dir).rows, load_official_lists(phantom_dir)


def make_predictions(metadata, seed=0):
    """Returns a table in the contract's format with random probabilities for all of the study's images."""
    probs = np.random.default_rng(seed).random((len(metadata), 14)).round(4)
    return join_predictions(metadata, probs, ["all"] * len(metadata))[CONTRACT]


def write(folder, frame, name="file.csv"):
    frame.to_csv(folder / name, index=False)
    return folder / name


def of_list(frame, names):
    return frame[frame["image"].isin(names)]


@pytest.mark.parametrize("style", ["contract", "bare", "spelled"])
def test_any_csv_is_joined_with_the_study(tmp_path, study, style):
    """The order of rows and columns does not matter, nor what else the file holds."""
    metadata, lists = study
    full = of_list(make_predictions(metadata), lists[1]).sample(frac=1, random_state=1)
    frame = full.drop(columns="split")
    if style != "contract":
        frame = frame[["image", *PROBS[::-1]]].rename(columns={"image": "Image Index"})
        frame.columns = frame.columns.str.removeprefix("prob_")
        frame["note"] = "text, with comma"
    if style == "spelled":
        frame = frame.rename(columns={"Pleural_Thickening": "pleural thickening", "Infiltration": "Infiltrate"})
    predictions, report = load_predictions(write(tmp_path, frame), metadata)
    assert list(predictions.columns[: len(CONTRACT)]) == CONTRACT
    expected = full.sort_values("image", ignore_index=True).assign(split="official-test")
    pd.testing.assert_frame_equal(predictions[CONTRACT], expected, check_dtype=False)
    rows = metadata.set_index("image").loc[predictions["image"]]
    np.testing.assert_array_equal(predictions[LABELS], rows[list(PATHOLOGIES)])
    assert (predictions["view"].to_numpy() == rows["view"].to_numpy()).all()
    assert (report.n_rows, report.n_joined, report.n_unknown, report.n_unscored) == (len(full), len(full), 0, 0)


def test_subsets_are_named_after_their_images(tmp_path, study):
    metadata, lists = study
    frame = make_predictions(metadata)
    bare = frame.drop(columns="split")
    for names, expected in (
        (lists[0], "official-train_val"),
        (lists[1], "official-test"),
        (lists[0] | lists[1], "mixed"),
    ):
        predictions, _ = load_predictions(write(tmp_path, of_list(bare, names)), metadata)
        assert set(predictions["split"]) == {expected} and predictions.attrs["subsets"] == {expected: ""}
    frame["split"] = np.where(frame["image"].isin(lists[1]), "test", "val")
    predictions, _ = load_predictions(write(tmp_path, frame), metadata)
    assert predictions.attrs["subsets"] == {"official-train_val": "val", "official-test": "test"}
    assert set(predictions.loc[predictions["split"].eq("official-test"), "image"]) == lists[1]
    # A random split: both subsets hold images of both lists, and keep their own names beside.
    halves = [sorted(set(of_list(frame, names)["patient_id"]))[::2] for names in lists]
    frame["split"] = np.where(frame["patient_id"].isin(halves[0] + halves[1]), "test", "val")
    predictions, _ = load_predictions(write(tmp_path, frame), metadata)
    assert predictions.attrs["subsets"] == {"mixed-val": "val", "mixed-test": "test"}


def test_subsets_go_by_usual_names_and_what_was_written_is_read_again(tmp_path, study):
    metadata, lists = study
    frame = make_predictions(metadata)
    frame["split"] = np.where(frame["image"].isin(lists[1]), "Testing", "Validation")
    predictions, _ = load_predictions(write(tmp_path, frame), metadata)
    assert predictions.attrs["subsets"] == {"official-train_val": "val", "official-test": "test"}
    again, _ = load_predictions(write(tmp_path, predictions[CONTRACT]), metadata)
    pd.testing.assert_frame_equal(again, predictions)
    assert again.attrs["subsets"] == predictions.attrs["subsets"]


def test_other_columns_beside_the_bare_names_do_not_matter(tmp_path, study):
    metadata, _ = study
    frame = make_predictions(metadata)[["image", *PROBS]].rename(columns={"image": "IMAGE"})
    frame.columns = frame.columns.str.removeprefix("prob_")
    predictions, _ = load_predictions(write(tmp_path, frame.assign(prob_max=0.5)), metadata)
    np.testing.assert_array_equal(predictions[PROBS], frame.sort_values("IMAGE")[list(PATHOLOGIES)])


def test_what_does_not_match_is_counted(tmp_path, study):
    metadata, lists = study
    frame = of_list(make_predictions(metadata), lists[1]).drop(columns="split")
    stray = frame.iloc[:2].assign(image=["stray_1.png", "stray_2.png"])
    other = frame.iloc[3:].reset_index(drop=True)
    other.loc[0, "label_Mass"] = 1 - other.loc[0, "label_Mass"]
    predictions, report = load_predictions(write(tmp_path, pd.concat([other, stray])), metadata)
    assert (report.n_rows, report.n_joined, report.n_unknown) == (len(frame) - 1, len(frame) - 3, 2)
    assert report.unknown == ("stray_1.png", "stray_2.png")
    assert report.n_unscored == 3 and report.unscored == tuple(sorted(frame["image"].iloc[:3]))
    assert report.n_relabeled == 1
    truth = metadata.set_index("image").loc[other.loc[0, "image"], "Mass"]
    assert predictions.set_index("image").loc[other.loc[0, "image"], "label_Mass"] == truth


@pytest.mark.parametrize(
    ("value", "hint"),
    [("120", "sigmoid"), ("7", "percent"), ("-0.001", "sigmoid"), ("", "not a prob"), ("nan", "not a prob"),
     ("high", "not a prob"), ("inf", "not a prob")],
)  # fmt: skip
def test_bad_probabilities_are_refused_by_row_and_column(tmp_path, study, value, hint):
    metadata, _ = study
    frame = make_predictions(metadata).drop(columns="split").astype(str)
    frame.loc[4, "prob_Edema"] = value
    with pytest.raises(ValueError, match=rf"file.csv, row 6 \({frame['image'][4]}\), column prob_Edema: .*{hint}"):
        load_predictions(write(tmp_path, frame), metadata)


def test_bad_files_are_refused_by_name(tmp_path, study):
    metadata, _ = study
    frame = make_predictions(metadata).drop(columns="split")

    def refused(changed, message):
        with pytest.raises(ValueError, match=message):
            load_predictions(write(tmp_path, changed), metadata)

    refused(frame.drop(columns="prob_Hernia"), r"file.csv has no probabilities for Hernia; .*prob_Hernia")
    refused(frame.rename(columns={"image": "file"}), r"file.csv has no column image or Image Index; rename")
    refused(frame.assign(prob_mass=0.5), r"columns prob_Mass and prob_mass both name Mass")
    twice = pd.concat([frame, frame.iloc[[7]]])
    refused(twice, rf"rows 9 and {len(frame) + 2}: {frame['image'][7]} is listed twice")
    refused(frame.assign(image=[f"x/{name}" for name in frame["image"]]), "none of its 90 images, such as x/")
    refused(frame.iloc[:0], "file.csv has a header and no rows")
    refused(
        frame.assign(split=["train", "dev"] * 45), "the column split names train, val; call the subset to be measured"
    )
    refused(frame.assign(**{"Image Index": frame["image"]}), "several columns of image names, image and Image Index")
    (tmp_path / "semicolon.csv").write_text(frame.to_csv(index=False, sep=";"))
    with pytest.raises(ValueError, match=r"semicolon.csv: its columns are not separated by commas"):
        load_predictions(tmp_path / "semicolon.csv", metadata)
    (tmp_path / "latin.csv").write_bytes(frame.assign(note="naïve").to_csv(index=False).encode("cp1252"))
    with pytest.raises(ValueError, match=r"latin.csv is not text in UTF-8"):
        load_predictions(tmp_path / "latin.csv", metadata)
    one_patient = frame["patient_id"].duplicated(keep=False).to_numpy().argmax()
    split = ["val"] * len(frame)
    split[one_patient] = "test"
    refused(
        frame.assign(split=split),
        rf"file.csv: 1 patients are in more than one subset: {frame['patient_id'][one_patient]}",
    )
    with pytest.raises(ValueError, match=r"file.csv: \d+ images are .* in no subset of the study's own split"):
        load_predictions(write(tmp_path, frame), metadata.replace({"split": {"test": ""}}))
    with pytest.raises(FileNotFoundError, match="no file of predictions"):
        load_predictions(tmp_path / "absent.csv", metadata)


@pytest.mark.parametrize("name", ["pred_{}", "{}_pred", "{} (sigmoid)", "P({})", "y_score {}"])
def test_columns_are_found_whatever_stands_beside_the_name_and_two_sets_are_refused(tmp_path, study, name):
    """Labels of another edition under the bare names must not be taken for the model's answers."""
    metadata, _ = study
    full = make_predictions(metadata)[["image", *PROBS]]
    frame = full.rename(columns=dict(zip(PROBS, map(name.format, PATHOLOGIES), strict=True)))
    predictions, _ = load_predictions(write(tmp_path, frame.assign(label_Mass=1)), metadata)
    np.testing.assert_array_equal(predictions[PROBS], full.sort_values("image")[PROBS])
    both = frame.join(metadata[list(PATHOLOGIES)])
    some = ["Atelectasis", name.format("Atelectasis")]
    with pytest.raises(ValueError, match="several columns for each finding, such as") as error:
        load_predictions(write(tmp_path, both), metadata)
    assert all(column in str(error.value) for column in some)


@pytest.mark.parametrize("name", ["prob_{}", "Prob_{}", "{}_prob", "PROBABILITY {}"])
def test_columns_called_probabilities_are_taken_whatever_else_there_is(tmp_path, study, name):
    metadata, _ = study
    full = make_predictions(metadata)[["image", *PROBS]]
    frame = full.rename(columns=dict(zip(PROBS, map(name.format, PATHOLOGIES), strict=True)))
    frame = frame.join(metadata[list(PATHOLOGIES)]).join(metadata[list(PATHOLOGIES)].add_suffix("_target"))
    predictions, report = load_predictions(write(tmp_path, frame), metadata)
    np.testing.assert_array_equal(predictions[PROBS], full.sort_values("image")[PROBS])
    assert report.notes == ()


def test_labels_and_decisions_are_refused_and_hardly_plausible_columns_are_noted(tmp_path, study):
    metadata, _ = study
    frame, truth = make_predictions(metadata), metadata[list(PATHOLOGIES)].to_numpy()
    frame = frame[["image", *PROBS]]
    rng = np.random.default_rng(0)

    def load(values):
        return load_predictions(write(tmp_path, frame.assign(**dict(zip(PROBS, values.T, strict=True)))), metadata)

    for values in (truth, np.where(rng.random(truth.shape) < 0.01, 1 - truth, truth), 0.1 + 0.8 * truth):
        with pytest.raises(ValueError, match=r"file.csv: no column has more than two values.*before a threshold"):
            load(values)
    decisions = (frame[PROBS].to_numpy() > 0.9).astype(float)
    with pytest.raises(ValueError, match=r"no column has more than two values; the first row has 0 and"):
        load(decisions)
    with pytest.raises(ValueError, match=r"the first row has 0.5 and 0.5"):
        load(np.full(truth.shape, 0.5))
    with pytest.raises(ValueError, match=r"are the study's labels, or nearly: the mean AUC would be 0\.99"):
        load(np.where(rng.random(truth.shape) < 0.002, 1 - truth, truth) * 0.9 + rng.random(truth.shape) * 0.09)
    probs = frame[PROBS].to_numpy()
    some = probs.copy()
    some[:, 0], some[:, 1] = 0.5, decisions[:, 1]
    notes = ("prob_Atelectasis: one value for all images.", "prob_Cardiomegaly: two values, so decisions or labels.")
    assert load(some)[1].notes == notes
    assert "sigmoid" in load(1 / (1 + np.exp(-probs)))[1].notes[0] and load(probs)[1].notes == ()


def test_labels_written_as_words_are_compared(tmp_path, study):
    frame = make_predictions(study[0])
    frame[LABELS] = frame[LABELS].astype(bool)
    assert load_predictions(write(tmp_path, frame.drop(columns="split")), study[0])[1].n_relabeled == 0


def entry(run="a", split="official", auc=0.8, images="0123", **more):
    base = {"run": run, "study": "nih", "split": split, "part": "test", "images_sha256": images, "mean_auc": auc}
    return base | more


def scores(split, *aucs):
    return pd.DataFrame({"split": split, "pathology": ["Mass", "Edema"], "auc": aucs})


def test_scores_on_one_split_stand_side_by_side():
    table = gather_scores({"ours": scores("official", 0.7, 0.9), "theirs": scores("official", 0.6, 0.8).iloc[::-1]})
    assert table.index.tolist() == ["Mass", "Edema"]
    assert table["ours"].tolist() == [0.7, 0.9] and table["theirs"].tolist() == [0.6, 0.8]


def test_scores_on_different_splits_are_refused_in_one_table():
    with pytest.raises(ValueError, match="ours is on official; CheXNet is on random_patients"):
        gather_scores({"ours": scores("official", 0.7, 0.9), "CheXNet": scores("random_patients", 0.8, 0.9)})


def test_leaderboard_never_mixes_splits(tmp_path):
    path = tmp_path / "leaderboard.csv"
    add_to_leaderboard(path, entry("a", auc=0.80))
    add_to_leaderboard(path, entry("b", "random_patients", auc=0.84))
    add_to_leaderboard(path, entry("c", auc=0.81, images="4567"))
    table = add_to_leaderboard(path, entry("007", auc=0.82, views=9))
    assert table["run"].tolist() == ["007", "a"] and table["mean_auc"].tolist() == [0.82, 0.80]
    assert set(table["images_sha256"]) == {"0123"}
    held = pd.read_csv(path, dtype=str)
    assert len(held) == 4 and set(held["run"]) == {"a", "b", "c", "007"}


def test_runs_that_end_together_lose_no_entry(tmp_path):
    path = tmp_path / "leaderboard.csv"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: add_to_leaderboard(path, entry(str(n))), range(40)))
    assert sorted(pd.read_csv(path)["run"]) == list(range(40))


def test_the_same_run_replaces_its_entry_on_the_same_images_only(tmp_path):
    path = tmp_path / "leaderboard.csv"
    add_to_leaderboard(path, entry("a", auc=0.5))
    add_to_leaderboard(path, entry("a", "random_patients", auc=0.6))
    table = add_to_leaderboard(path, entry("a", auc=0.7))
    assert table["mean_auc"].tolist() == [0.7]
    assert sorted(pd.read_csv(path)["mean_auc"]) == [0.6, 0.7]


def test_another_file_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "leaderboard.csv"
    path.write_text("name,score\nx,1\n")
    with pytest.raises(ValueError, match=r"leaderboard.csv lacks run, study, .*move"):
        add_to_leaderboard(path, entry())
    assert path.read_text() == "name,score\nx,1\n"
