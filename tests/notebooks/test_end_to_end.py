"""The whole chain of notebooks as `make run` executes it, shortened, on synthetic images, and what follows on such a run."""

import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from chain import DENSENET, call_chain, check_artifacts, check_nodules, run_chain
from scipy.special import logit
from sklearn.metrics import roc_auc_score

from helpers.runtime.settings import ROOT
from helpers.study import PATHOLOGIES, hash_split, list_images


def evaluate(study, run_dir, *settings, only="03_evaluate"):
    """Executes one notebook as `make evaluate` does; returns the finished process."""
    command = [sys.executable, str(ROOT / "scripts" / "run_notebooks.py"), "--only", only, "--data-dir", str(study)]
    command += ["--run-dir", str(run_dir), "--set", "RESAMPLES=100", "LEAKAGE_DEMO=False", *settings]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def drawn_run(tmp_path_factory):
    """A shortened run on 300 synthetic images, in two stages from a weights file like that of keras.applications.

    It was paused for its time budget once, in the first stage, and went on.
    """
    import h5py
    from keras.src.applications.densenet import DenseNet
    from keras.src.legacy.saving import legacy_h5_format

    from helpers.study import write_synthetic_study

    folder = tmp_path_factory.mktemp("drawn")
    write_synthetic_study(folder / "study", n_images=300, size=64, seed=2)
    backbone = DenseNet([1, 1, 1, 1], include_top=False, weights=None)
    with h5py.File(folder / "notop.h5", "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, backbone)
    settings = (f"WEIGHTS={folder / 'notop.h5'}", "FROZEN_EPOCHS=1", "EPOCHS=2", "PRECISION=mixed_bfloat16")
    settings += ("FORMATS=saved_model onnx litert",)
    paused = call_chain(folder / "study", folder / "run", folder / "packed", *settings, "TIME_BUDGET=1e-6")
    assert paused.returncode != 0 and "paused before TIME_BUDGET ran out at epoch 1, step 1" in paused.stderr
    assert not (folder / "run" / "model.weights.h5").exists()
    printed = run_chain(folder / "study", folder / "run", folder / "packed", *settings, only=())
    return folder, printed, settings


def test_chain_on_drawn_images_leaves_every_artifact(drawn_run):
    folder, printed, _ = drawn_run
    predictions = check_artifacts(folder / "run", only=())
    test_list = (folder / "study" / "test_list.txt").read_text().split()
    assert set(predictions.loc[predictions["split"].eq("test"), "image"]) == set(test_list)
    assert all(name in printed for name in PATHOLOGIES) and "not for clinical use" in printed
    parity = json.loads((folder / "run" / "exports" / "parity.json").read_text())
    assert list(parity) == ["saved_model", "model.onnx", "model.tflite", "model_int8.tflite"]
    assert all((folder / "run" / "exports" / name).is_file() for name in list(parity)[1:])
    n_test = predictions["split"].eq("test").sum()
    assert all(row["films"] == n_test for row in parity.values())


def test_study_of_nodules_uses_the_network_of_the_run(drawn_run):
    folder, printed, _ = drawn_run
    study = check_nodules(folder / "run" / "xvision-phantom")
    assert study["counts"]["films"] == 60 and "Nodules (phantom, 60 images), on" in printed
    scores = pd.read_csv(folder / "run" / "xvision-phantom" / "scores.csv")
    assert set(scores["features"]) == {"VGG16, random weights", "DenseNet121, trained on study"}
    if study["saliency"]:
        assert [row["method"] for row in study["saliency"]] == ["gradient", "SmoothGrad", "occlusion"]
    assert len(list((folder / "packed-features").glob("*/bank.json"))) == 2


@pytest.mark.parametrize("setting", ["EPOCH=3", "EPOCHS", "RUN_DIR=elsewhere"])
def test_unknown_settings_are_refused_before_anything_runs(tmp_path, setting):
    answer = call_chain(tmp_path / "study", tmp_path / "run", tmp_path / "packed", setting)
    assert answer.returncode != 0 and f"{setting}: expected NAME=VALUE" in answer.stderr
    assert not (tmp_path / "run").exists()


def test_run_record_names_split_seed_and_machine(drawn_run):
    folder, _, _ = drawn_run
    record = json.loads((folder / "run" / "run.json").read_text())
    index = pd.read_csv(folder / "packed" / "index.csv")
    assert record["split"]["sha256"] == hash_split(index["image"], index["subset"])
    assert pd.read_csv(folder / "run" / "history.csv")["stage"].tolist() == ["head", "all"]
    assert record["classes"] == list(PATHOLOGIES) and record["seed"] == 0
    assert {"tensorflow", "keras", "devices", "commit", "runtime", "strategy"} <= set(record["runtime"])
    assert record["interruptions"] == 1 and record["parts"][1]["step"] == 1 and record["finished"]
    weights = (folder / "run" / "model.weights.h5").read_bytes()
    assert record["weights_sha256"] == hashlib.sha256(weights).hexdigest()


def test_saved_model_reads_any_image_and_needs_nothing_of_ours(drawn_run, tmp_path):
    """In a fresh process that imports TensorFlow alone: bytes in, the probabilities of predictions.csv out."""
    folder, _, _ = drawn_run
    predictions = pd.read_csv(folder / "run" / "predictions.csv").set_index("image")
    name, path = next((n, p) for n, p in list_images(folder / "study").items() if n in predictions.index)
    from PIL import Image

    image = Image.open(path)
    image.convert("RGBA").resize((500, 400)).save(tmp_path / "other.png")
    image.convert("RGB").save(tmp_path / "other.jpg")
    code = """
import json, sys
import tensorflow as tf
serve = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
answer = serve(image_bytes=tf.constant([open(path, "rb").read() for path in sys.argv[2:]]))
kinds = {key: str if value.dtype == tf.string else float for key, value in answer.items()}
print(json.dumps({key: answer[key].numpy().astype(kind).tolist() for key, kind in kinds.items()}))
"""
    command = [sys.executable, "-c", code, str(folder / "run" / "saved_model"), str(path)]
    command += [str(tmp_path / "other.png"), str(tmp_path / "other.jpg")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    answer = json.loads(printed.splitlines()[-1])
    probs = np.array(answer["probabilities"])
    assert probs.shape == (3, 14) and ((probs > 0) & (probs < 1)).all()
    expected = predictions.loc[name, [f"prob_{p}" for p in PATHOLOGIES]].to_numpy(float)
    assert np.allclose(answer["raw_probabilities"][0], expected, rtol=0, atol=1e-4)  # as TOLERANCE in chain.py
    points = json.loads((folder / "run" / "thresholds.json").read_text())["pathologies"]
    platt = [points[name]["calibration"] for name in PATHOLOGIES]
    slope, intercept = (np.array([point[key] for point in platt]) for key in ("slope", "intercept"))
    assert np.allclose(logit(probs[0]), slope * logit(expected) + intercept, atol=1e-2)
    order = np.argsort(-probs[0], kind="stable")[:5]
    assert answer["top5_label"][0] == [PATHOLOGIES[i] for i in order]
    assert np.allclose(answer["top5_prob"][0], probs[0][order])


def test_second_run_in_the_folder_goes_on_instead_of_training_again(drawn_run):
    """The run is finished, so training is skipped; other settings are refused by name."""
    folder, _, settings = drawn_run
    kept = [folder / "run" / name for name in ("history.csv", "run.json")]
    before = [path.read_bytes() for path in kept]
    run_chain(folder / "study", folder / "run", folder / "packed", *settings, only=DENSENET[1:2])
    assert [path.read_bytes() for path in kept] == before
    answer = call_chain(folder / "study", folder / "run", folder / "packed", *settings, "SEED=1", only=DENSENET[1:2])
    assert answer.returncode != 0 and "SEED was 0, now 1" in answer.stderr and "START_OVER" in answer.stderr


def test_views_and_several_models_are_averaged_and_compared(drawn_run, tmp_path):
    """Of two models alike, the average is the model; of shifted views it is close. All stand in the ledger."""
    folder, _, _ = drawn_run
    for name in ("a", "b"):
        shutil.copytree(folder / "run", tmp_path / name)
    common = (f"PACKED_DIR={folder / 'packed'}", f"COMPARE={tmp_path / 'a'}")
    both = f"MODELS={tmp_path / 'a'},{tmp_path / 'b'}"
    for name, more in (("both", (both,)), ("views", (f"MODELS={tmp_path / 'a'}", "VIEWS=9"))):
        answer = evaluate(folder / "study", tmp_path / name, *common, *more)
        assert answer.returncode == 0, answer.stderr[-3000:]
    single, double, views = (pd.read_csv(tmp_path / name / "predictions.csv") for name in ("a", "both", "views"))
    pd.testing.assert_frame_equal(single, double, rtol=1e-5)
    columns = [f"prob_{name}" for name in PATHOLOGIES]
    gap = np.abs(single[columns] - views[columns]).to_numpy()
    assert 0 < gap.mean() < 0.05
    difference = pd.read_csv(tmp_path / "views" / "figures" / "03_difference.csv").set_index("pathology")
    aucs = [
        pd.read_csv(tmp_path / n / "aucs.csv").query("split == 'test'").set_index("pathology") for n in ("views", "a")
    ]
    expected = (aucs[0]["auc"] - aucs[1]["auc"]).loc[list(PATHOLOGIES)]
    np.testing.assert_allclose(difference.loc[list(PATHOLOGIES), "difference"], expected, atol=1e-9)
    board = pd.read_csv(tmp_path / "leaderboard.csv").set_index("run")
    assert board.loc["both", "models"] == 2 and board.loc["views", "views"] == 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("VIEWS=9",), "holds a trained model"),
        (("MODELS=models/a,models/a",), "MODELS names a folder twice"),
        (("VIEWS=4",), "VIEWS must be 1, 9, 25"),
    ],
)
def test_settings_that_would_mix_results_are_refused(drawn_run, settings, message):
    folder, _, _ = drawn_run
    kept = [folder / "run" / name for name in ("aucs.csv", "thresholds.json", "executed/03_evaluate.ipynb")]
    before = [path.read_bytes() for path in kept]
    answer = evaluate(folder / "study", folder / "run", f"PACKED_DIR={folder / 'packed'}", *settings)
    assert answer.returncode != 0 and message in answer.stderr
    assert [path.read_bytes() for path in kept] == before
    for path in (folder / "run" / "executed").glob("*.failed.*"):
        path.unlink()


def test_a_run_on_another_split_is_not_compared(drawn_run, tmp_path):
    folder, _, _ = drawn_run
    for name in ("run", "other"):
        shutil.copytree(folder / "run", tmp_path / name)
    record = json.loads((tmp_path / "other" / "run.json").read_text())
    record["split"] = {"name": "random_patients", "sha256": "0" * 64}
    (tmp_path / "other" / "run.json").write_text(json.dumps(record))
    settings = (f"PACKED_DIR={folder / 'packed'}", f"COMPARE={tmp_path / 'other'}")
    answer = evaluate(folder / "study", tmp_path / "run", *settings)
    assert answer.returncode != 0 and "other was trained on split random_patients (000000000000)" in answer.stderr


def test_any_predictions_are_evaluated_without_model_or_images(drawn_run, tmp_path):
    """The same numbers come from the model's predictions.csv, and from a bare CSV as others write it."""
    folder, _, _ = drawn_run
    study = tmp_path / "study"
    shutil.copytree(folder / "study", study, ignore=shutil.ignore_patterns("images"))
    ours = pd.read_csv(folder / "run" / "predictions.csv")
    bare = ours[ours["split"].eq("test")][["image", *(f"prob_{name}" for name in PATHOLOGIES)]]
    bare = bare.rename(columns={"image": "Image Index"} | {f"prob_{name}": name for name in PATHOLOGIES})
    bare.iloc[3:].to_csv(tmp_path / "bare.csv", index=False)
    answer = evaluate(study, tmp_path / "runs" / "full", f"PREDICTIONS={folder / 'run' / 'predictions.csv'}")
    assert answer.returncode == 0, answer.stderr[-3000:]
    again = pd.read_csv(tmp_path / "runs" / "full" / "aucs.csv")
    first = pd.read_csv(folder / "run" / "aucs.csv").replace({"test": "official-test", "val": "official-train_val"})
    pd.testing.assert_frame_equal(again, first)
    chosen = [json.loads((run / "thresholds.json").read_text()) for run in (folder / "run", tmp_path / "runs" / "full")]
    for name in PATHOLOGIES:
        kept = [table["pathologies"][name]["threshold"] for table in chosen]
        assert kept[0] == pytest.approx(kept[1])

    answer = evaluate(study, tmp_path / "runs" / "bare", f"PREDICTIONS={tmp_path / 'bare.csv'}")
    assert answer.returncode == 0, answer.stderr[-3000:]
    aucs = pd.read_csv(tmp_path / "runs" / "bare" / "aucs.csv").set_index("pathology")
    assert set(aucs["split"]) == {"official-test"} and not (tmp_path / "runs" / "bare" / "thresholds.json").exists()
    labels = ours.set_index("image").loc[bare["Image Index"].iloc[3:]]
    assert aucs.loc["Effusion", "auc"] == pytest.approx(
        roc_auc_score(labels["label_Effusion"], labels["prob_Effusion"])
    )
    text = (tmp_path / "runs" / "bare" / "executed" / "03_evaluate.ipynb").read_text()
    assert "n_unscored=3" in text and f"n_joined={len(bare) - 3}" in text
    first, second = (
        pd.read_csv(run.parent / "leaderboard.csv") for run in (folder / "run", tmp_path / "runs" / "full")
    )
    keys = ["split", "part", "images_sha256"]  # ours and theirs meet in one table
    assert first.loc[first["run"].eq("run"), keys].iloc[0].equals(second.loc[second["run"].eq("full"), keys].iloc[0])


def test_predictions_never_replace_what_a_run_holds(drawn_run, tmp_path):
    folder, _, _ = drawn_run
    before = (folder / "run" / "aucs.csv").read_bytes()
    answer = evaluate(folder / "study", folder / "run", f"PREDICTIONS={folder / 'run' / 'predictions.csv'}")
    assert answer.returncode != 0 and "holds a trained model" in answer.stderr
    assert (folder / "run" / "aucs.csv").read_bytes() == before
    for path in (folder / "run" / "executed").glob("*.failed.*"):
        path.unlink()
    shutil.copy(folder / "run" / "predictions.csv", tmp_path)
    answer = evaluate(folder / "study", tmp_path, f"PREDICTIONS={tmp_path / 'predictions.csv'}")
    assert answer.returncode != 0 and "which this notebook writes" in answer.stderr
    assert not (tmp_path / "aucs.csv").exists()
    (tmp_path / "source.json").write_text(json.dumps({"predictions": "/elsewhere/predictions.csv", "models": []}))
    answer = evaluate(folder / "study", tmp_path, f"PREDICTIONS={folder / 'run' / 'predictions.csv'}")
    assert answer.returncode != 0 and "holds the results of another source" in answer.stderr


def test_gradient_maps_of_some_findings(drawn_run, tmp_path):
    folder, _, _ = drawn_run
    shutil.copytree(folder / "run", tmp_path / "run")
    settings = ("HEATMAP=grad-cam", "FINDINGS=Mass, Cardiomegaly", "VIEWS=1", f"PACKED_DIR={folder / 'packed'}")
    answer = evaluate(folder / "study", tmp_path / "run", *settings, only="04_explain")
    assert answer.returncode == 0, answer.stderr[-3000:]
    table = pd.read_csv(tmp_path / "run" / "figures" / "04_localization.csv")
    assert table["pathology"].tolist() == ["Cardiomegaly", "Mass", "mean"]
    whole = [(path / "localization.csv").read_bytes() for path in (tmp_path / "run", folder / "run")]
    assert whole[0] == whole[1]  # a part does not replace it
