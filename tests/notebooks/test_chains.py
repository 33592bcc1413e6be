"""Notebooks 1 to 4 and 6 on synthetic images with a small network, and what is done with such a run afterwards."""

import hashlib
import json
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from chain import DENSENET, XVISION, check_artifacts, check_localization, check_nodules, name_folders, run_chain
from sklearn.metrics import roc_auc_score

import helpers.runtime
from helpers.export import fill_model_card
from helpers.runtime.settings import ROOT
from helpers.study import PATHOLOGIES, hash_split, write_synthetic_study

sys.path.insert(0, str(ROOT / "scripts"))
import run_notebooks

pytestmark = pytest.mark.slow
EVALUATE, EXPLAIN = ["03_evaluate"], ["04_explain"]


def write_backbone(path):
    """Writes random weights of a small DenseNet as keras.applications distributes those of ImageNet."""
    import h5py
    from keras.src.applications.densenet import DenseNet
    from keras.src.legacy.saving import legacy_h5_format

    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, DenseNet([1, 1, 1, 1], include_top=False, weights=None))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A run on 300 images: two stages from a weights file, in bfloat16, paused once in the first.

    The figures of notebooks 1 to 3 are rendered in test_end_to_end.py, which also has notebook 5.
    """
    folder = tmp_path_factory.mktemp("synthetic")
    write_synthetic_study(folder / "study", n_images=300, size=64, seed=2, n_workers=1)
    write_backbone(folder / "notop.h5")
    settings = name_folders(folder / "study", folder / "run", folder / "packed")
    settings |= {"WEIGHTS": str(folder / "notop.h5"), "WEIGHTS_SEEN": "unknown", "PRECISION": "mixed_bfloat16"}
    settings |= {"FROZEN_EPOCHS": 1, "EPOCHS": 2}
    run_chain(DENSENET[:1], settings, draw=False)
    with pytest.raises(RuntimeError, match="paused before TIME_BUDGET ran out at epoch 1, step 1"):
        run_chain(DENSENET[1:2], settings | {"TIME_BUDGET": 1e-6})
    assert not (folder / "run" / "model.weights.h5").exists()
    with pytest.MonkeyPatch.context() as other_machine:  # on which the run keeps the precision that it began with
        other_machine.setattr(helpers.runtime, "choose_precision", lambda runtime: "float32")
        run_chain(DENSENET[1:3], settings | {"PRECISION": "auto"}, draw=False)
    run_chain([DENSENET[3], XVISION], settings)
    return SimpleNamespace(folder=folder, run=folder / "run", packed=folder / "packed", settings=settings)


@pytest.fixture
def evaluate(chain):
    """A function that runs notebook 3, or others, on the run's images, with results in another folder."""

    def run(run_dir, notebooks=EVALUATE, **settings):
        return run_chain(notebooks, chain.settings | {"RUN_DIR": str(run_dir)} | settings, draw=False)

    return run


def test_chain_leaves_every_artifact(chain):
    predictions = check_artifacts(chain.run, is_exported=False)
    assert len(check_localization(chain.run))
    test_list = (chain.folder / "study" / "test_list.txt").read_text().split()
    assert set(predictions.loc[predictions["split"].eq("test"), "image"]) == set(test_list)
    card = fill_model_card(chain.run)
    assert "validation with test: 0" in card and "scores are flattered" not in card
    assert "# DenseNet-121 cut to blocks 1, 1, 1, 1 for" in card
    (notice,) = json.loads((chain.run / "source.json").read_text())["notices"]
    assert "may have seen images of NIH's official test list" in notice and f"on the test images. {notice}" in card


def test_run_record_names_split_seed_and_machine(chain):
    record = json.loads((chain.run / "run.json").read_text())
    index = pd.read_csv(chain.packed / "index.csv")
    assert record["split"]["sha256"] == hash_split(index["image"], index["subset"])
    assert pd.read_csv(chain.run / "history.csv")["stage"].tolist() == ["head", "all"]
    assert record["classes"] == list(PATHOLOGIES) and record["seed"] == 0
    assert record["settings"]["PRECISION"] == "mixed_bfloat16"
    assert {"tensorflow", "keras", "devices", "commit", "runtime", "strategy"} <= set(record["runtime"])
    assert record["interruptions"] == 1 and record["parts"][1]["step"] == 1 and record["finished"]
    assert (record["side"], record["eval_size"]) == (40, 32)  # as crops of 32 pixels show things, in whole cells of 16
    assert json.loads((chain.run / "thresholds.json").read_text())["eval_size"] == 32
    weights = (chain.run / "model.weights.h5").read_bytes()
    assert record["weights_sha256"] == hashlib.sha256(weights).hexdigest()


def test_study_of_nodules_uses_the_network_of_the_run(chain):
    study = check_nodules(chain.run / "xvision-phantom")
    assert study["counts"]["films"] == 60
    scores = pd.read_csv(chain.run / "xvision-phantom" / "scores.csv")
    assert set(scores["features"]) == {"VGG16, random weights", "DenseNet121, trained on study"}
    if study["saliency"]:
        assert [row["method"] for row in study["saliency"]] == ["gradient", "SmoothGrad", "occlusion"]
    assert len(list((chain.folder / "packed-features").glob("*/bank.json"))) == 2


@pytest.mark.parametrize(
    ("only", "shown"),
    [
        (EVALUATE, ["figures    ", "notebook   "]),
        ([XVISION], ["Nodule (phantom, 60 images), on"]),
    ],
)
def test_the_script_shows_the_results(chain, only, shown, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run_notebooks.py", "--run-dir", str(chain.run), "--only", *only])
    monkeypatch.setenv("TQDM_MININTERVAL", "1")
    executed = []
    monkeypatch.setattr(run_notebooks, "execute_into", lambda folder, name, *_: executed.append(name))
    monkeypatch.setattr(run_notebooks.signal, "signal", lambda *_: None)
    run_notebooks.main()
    printed = capsys.readouterr().out
    assert executed == only
    assert all(text in printed for text in shown)
    assert all(name in printed for name in PATHOLOGIES) or only == [XVISION]


def test_the_script_stops_where_training_paused(tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text(json.dumps({"pause": "Training paused."}))
    monkeypatch.setattr(sys, "argv", ["run_notebooks.py", "--run-dir", str(tmp_path)])
    monkeypatch.setenv("TQDM_MININTERVAL", "1")
    executed = []
    monkeypatch.setattr(run_notebooks, "execute_into", lambda folder, name, *_: executed.append(name))
    monkeypatch.setattr(run_notebooks.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match=r"Training paused\."):
        run_notebooks.main()
    assert executed == list(DENSENET[:2])


def test_second_run_in_the_folder_resumes_instead_of_training_again(chain):
    """The run is finished, so training is skipped; other settings are refused by name."""
    kept = [chain.run / name for name in ("history.csv", "run.json")]
    before = [path.read_bytes() for path in kept]
    run_chain(DENSENET[1:2], chain.settings)
    assert [path.read_bytes() for path in kept] == before
    with pytest.raises(ValueError, match=r"SEED was 0, now 1[\s\S]*START_OVER"):
        run_chain(DENSENET[1:2], chain.settings | {"SEED": 1})


def test_views_and_several_models_are_averaged_and_compared(chain, evaluate, tmp_path):
    """Of two models alike, the average is the model; of shifted views it is close. All stand in the leaderboard."""
    for name in ("a", "b"):
        shutil.copytree(chain.run, tmp_path / name)
    stale = tmp_path / "both" / "figures" / "03_difference.png"  # of an earlier evaluation, with COMPARE
    stale.parent.mkdir(parents=True)
    stale.touch()
    evaluate(tmp_path / "both", MODELS=f"{tmp_path / 'a'},{tmp_path / 'b'}")
    evaluate(tmp_path / "views", MODELS=str(tmp_path / "a"), VIEWS=9, COMPARE=str(tmp_path / "a"))
    assert not stale.exists()
    single, double, views = (pd.read_csv(tmp_path / name / "predictions.csv") for name in ("a", "both", "views"))
    pd.testing.assert_frame_equal(single, double, rtol=1e-5)
    columns = [f"prob_{name}" for name in PATHOLOGIES]
    gap = np.abs(single[columns] - views[columns]).to_numpy()
    assert 0 < gap.mean() < 0.05
    difference = pd.read_csv(tmp_path / "views" / "figures" / "03_difference.csv").set_index("pathology")
    tables = (pd.read_csv(tmp_path / name / "aucs.csv").query("split == 'test'") for name in ("views", "a"))
    aucs = [table.set_index("pathology")["auc"] for table in tables]
    expected = (aucs[0] - aucs[1]).loc[list(PATHOLOGIES)]
    np.testing.assert_allclose(difference.loc[list(PATHOLOGIES), "difference"], expected, atol=1e-9)
    board = pd.read_csv(tmp_path / "leaderboard.csv").set_index("run")
    assert board.loc["both", "models"] == 2 and board.loc["views", "views"] == 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"VIEWS": 9}, "holds a trained model"),
        ({"MODELS": "models/a,models/a"}, "MODELS names a folder twice"),
        ({"VIEWS": 4}, "VIEWS is 4; expected one of 1, 9, 25, 49"),
        ({"PREDICTIONS": "predictions.csv"}, "holds a trained model"),
    ],
)
def test_settings_that_would_mix_results_are_refused(chain, evaluate, settings, message):
    kept = [chain.run / name for name in ("aucs.csv", "thresholds.json", "predictions.csv")]
    before = [path.read_bytes() for path in kept]
    with pytest.raises((AssertionError, ValueError), match=message):
        evaluate(chain.run, **settings)
    assert [path.read_bytes() for path in kept] == before


def test_an_evaluation_that_stops_halfway_has_removed_nothing(chain, evaluate, tmp_path):
    shutil.copytree(chain.run, tmp_path / "run")
    run_chain(EVALUATE, chain.settings | {"RUN_DIR": str(tmp_path / "run")}, draw=False, until='"source.json", source')
    for name in ("figures", "."):
        assert {*os.listdir(tmp_path / "run" / name)} >= {*os.listdir(chain.run / name)}


def test_predictions_never_replace_their_own_file_or_those_of_another_source(chain, evaluate, tmp_path):
    shutil.copy(chain.run / "predictions.csv", tmp_path)
    with pytest.raises(AssertionError, match="which this notebook writes"):
        evaluate(tmp_path, PREDICTIONS=str(tmp_path / "predictions.csv"))
    (tmp_path / "source.json").write_text(json.dumps({"predictions": "/elsewhere/predictions.csv", "models": []}))
    with pytest.raises(AssertionError, match="holds the results of another source"):
        evaluate(tmp_path, PREDICTIONS=str(chain.run / "predictions.csv"))
    assert not (tmp_path / "aucs.csv").exists()


def test_a_run_on_another_split_is_not_compared(chain, evaluate, tmp_path):
    for name in ("run", "other"):
        shutil.copytree(chain.run, tmp_path / name)
    record = json.loads((tmp_path / "other" / "run.json").read_text())
    record["split"] = {"name": "random_patients", "sha256": "0" * 64}
    (tmp_path / "other" / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"other was trained on split random_patients \(000000000000\)"):
        evaluate(tmp_path / "run", COMPARE=str(tmp_path / "other"))


def test_any_predictions_are_evaluated_without_model_or_images(chain, evaluate, tmp_path):
    """The same numbers come from the model's predictions.csv, and from a bare CSV as others write it."""
    study = str(tmp_path / "study")
    shutil.copytree(chain.folder / "study", study, ignore=shutil.ignore_patterns("images"))
    full, run_dir = tmp_path / "runs" / "full", tmp_path / "runs" / "bare"
    ours = pd.read_csv(chain.run / "predictions.csv")
    bare = ours[ours["split"].eq("test")][["image", *(f"prob_{name}" for name in PATHOLOGIES)]]
    bare = bare.rename(columns={"image": "Image Index"} | {f"prob_{name}": name for name in PATHOLOGIES})
    bare.iloc[3:].to_csv(tmp_path / "bare.csv", index=False)
    evaluate(full, DATA_DIR=study, PREDICTIONS=str(chain.run / "predictions.csv"))
    first = pd.read_csv(chain.run / "aucs.csv").replace({"test": "official-test", "val": "official-train_val"})
    pd.testing.assert_frame_equal(pd.read_csv(full / "aucs.csv"), first)
    thresholds = [json.loads((folder / "thresholds.json").read_text())["pathologies"] for folder in (chain.run, full)]
    for name in PATHOLOGIES:
        assert thresholds[0][name]["threshold"] == pytest.approx(thresholds[1][name]["threshold"])

    report = evaluate(run_dir, DATA_DIR=study, PREDICTIONS=str(tmp_path / "bare.csv"))["report"]
    assert report.n_unscored == 3 and report.n_joined == len(bare) - 3
    aucs = pd.read_csv(run_dir / "aucs.csv").set_index("pathology")
    assert set(aucs["split"]) == {"official-test"} and not (run_dir / "thresholds.json").exists()
    labels = ours.set_index("image").loc[bare["Image Index"].iloc[3:]]
    auc = roc_auc_score(labels["label_Effusion"], labels["prob_Effusion"])
    assert aucs.loc["Effusion", "auc"] == pytest.approx(auc)
    first, second = (pd.read_csv(folder.parent / "leaderboard.csv") for folder in (chain.run, full))
    keys = ["split", "part", "images_sha256"]  # ours and theirs meet in one table
    assert first.loc[first["run"].eq("run"), keys].iloc[0].equals(second.loc[second["run"].eq("full"), keys].iloc[0])


def test_the_model_is_measured_on_another_hospitals_images(chain, evaluate, tmp_path):
    """Images of a study with findings of its own, packed, and then its answers and labels in a CSV."""
    pictures = sorted((chain.folder / "study" / "images").glob("*.png"))[:60]
    (tmp_path / "other").mkdir()
    for path in pictures:
        os.link(path, tmp_path / "other" / path.name)
    rng = np.random.default_rng(0)
    labels = pd.DataFrame({"image": [path.name for path in pictures], "view": "PA"})
    labels["Lung Lesion"], labels["Pleural Effusion"] = rng.integers(0, 2, (2, 60))
    labels["Rods"], labels.loc[::7, "Lung Lesion"] = 0, np.nan
    labels.astype({"Lung Lesion": "Int64"}).to_csv(tmp_path / "other" / "labels.csv", index=False)
    folders = name_folders(tmp_path / "other", tmp_path / "packing", tmp_path / "packed")
    run_chain(DENSENET[:1], folders | {"SPLIT": "random_patients"}, draw=False)
    shutil.copytree(chain.run, tmp_path / "run")
    names = evaluate(tmp_path / "run", EXTERNAL=str(tmp_path / "packed"))
    table = pd.read_csv(tmp_path / "run" / "external.csv").set_index("theirs")
    assert (tmp_path / "run" / "figures" / "03_external.png").exists()
    assert table["finding"].to_dict() == {"Pleural Effusion": "Effusion", "Lung Lesion": "Nodule or Mass"}
    own = pd.read_csv(tmp_path / "run" / "aucs.csv").query("split == 'test'").set_index("pathology")["auc"]
    assert table.loc["Pleural Effusion", "auc_here"] == pytest.approx(own["Effusion"], abs=1e-9)
    assert table.loc["Lung Lesion", ["n_pos_there", "n_neg_there"]].sum() == 60 - 9
    assert table["ap_there"].eq(0).all() and table["ap_here"].gt(0).all()
    assert ("theirs", "Rods") in names["apart"] and not names["external"].has_patients

    external, path = names["external"], tmp_path / "answers.csv"
    answers = pd.DataFrame(external.probs, columns=[f"prob_{name}" for name in PATHOLOGIES])
    named = external.rows[["image", "view", *external.findings]].rename(columns=lambda name: f"label_{name}")
    named = named.rename(columns={"label_image": "image", "label_view": "view"})
    named.join(answers).to_csv(path, index=False)
    evaluate(tmp_path / "run", EXTERNAL=str(path))
    again = pd.read_csv(tmp_path / "run" / "external.csv").set_index("theirs")
    same = ["finding", "n_pos_there", "n_neg_there", "auc_here", "auc_there", "drop", "ap_there", "is_same", "note"]
    pd.testing.assert_frame_equal(again[same], table[same])  # images are numbered in another order, and drawn so
    evaluate(tmp_path / "run")
    assert not (tmp_path / "run" / "external.csv").exists()
    with pytest.raises(AssertionError, match="EXTERNAL is the study itself"):
        evaluate(tmp_path / "run", EXTERNAL=str(chain.packed))


def test_gradient_maps_of_some_findings(chain, evaluate, tmp_path):
    shutil.copytree(chain.run, tmp_path / "run")
    evaluate(tmp_path / "run", EXPLAIN, HEATMAP="grad-cam", FINDINGS="Mass, Cardiomegaly")
    table = pd.read_csv(tmp_path / "run" / "figures" / "04_localization.csv")
    assert table["pathology"].tolist() == ["Cardiomegaly", "Mass", "mean"]
    whole = [(folder / "localization.csv").read_bytes() for folder in (tmp_path / "run", chain.run)]
    assert whole[0] == whole[1]  # the table of some findings does not replace that of all
