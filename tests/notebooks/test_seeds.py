"""`make seeds`: killed and resumed, refused where it would mix, and its numbers recomputed from the predictions."""

import ast
import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from chain import SHORT, name_folders
from scipy.special import expit, logit
from seeds_run import execute_here
from sklearn.metrics import roc_auc_score

from helpers.runtime.settings import ROOT
from helpers.study import PATHOLOGIES

sys.path.insert(0, str(ROOT / "scripts"))
import run_notebooks
import train_seeds

PREPARE, TRAIN, EVALUATE, EXPLAIN = run_notebooks.NOTEBOOKS[:4]


@pytest.fixture
def make_seeds(monkeypatch, capsys):
    """A function that runs the script in this process with a way to execute notebooks; returns what it printed."""
    monkeypatch.setenv("TQDM_MININTERVAL", "1")
    monkeypatch.setattr(run_notebooks.signal, "signal", lambda *_: None)

    def run(execute, *arguments):
        monkeypatch.setattr(run_notebooks, "execute_into", execute)
        monkeypatch.setattr(sys, "argv", ["train_seeds.py", *map(str, arguments)])
        train_seeds.main()
        return capsys.readouterr().out

    return run


class Notebooks:
    """Stands for the notebooks: records what is executed, and writes what a run leaves, with drawn predictions."""

    def __init__(self, pauses=()):
        self.executed, self.pauses = [], list(pauses)

    def __call__(self, executed_dir, name, settings):
        folder = executed_dir.parent
        self.executed.append((name, folder.name))
        self.settings = settings
        executed_dir.mkdir(parents=True, exist_ok=True)
        (executed_dir / f"{name}.ipynb").touch()
        if name == TRAIN:
            pause = self.pauses.pop(0) if self.pauses else ""
            chosen = train_seeds.check_settings(train_seeds.read_parameters(TRAIN) | settings)
            record = {"finished": not pause, "pause": pause, "settings": chosen, "seed": settings["SEED"]}
            split = {"name": "official", "sha256": "5" * 64, "patients": {"test": 20, "val": 7}}
            record |= {"study": "drawn", "synthetic": True, "split": split}
            record |= {"best_epoch": 1, "best_val_auc": 0.7, "epochs_run": 2, "weights_sha256": "7" * 64}
            (folder / "run.json").write_text(json.dumps(record))
        elif name == EVALUATE:
            rng = np.random.default_rng([len(self.executed), 1])
            labels = np.random.default_rng(0).random((80, 14)) < 0.3
            rows = pd.DataFrame({"image": [f"{n:03d}.png" for n in range(80)], "patient_id": np.arange(80) // 3})
            rows["split"] = np.where(np.arange(80) < 60, "test", "val")
            probs = expit(labels * 1.0 + rng.normal(size=labels.shape))
            rows = rows.assign(**{f"prob_{name}": probs[:, c] for c, name in enumerate(PATHOLOGIES)})
            rows = rows.assign(**{f"label_{name}": labels[:, c].astype(int) for c, name in enumerate(PATHOLOGIES)})
            rows.sample(frac=1, random_state=len(self.executed)).to_csv(folder / "predictions.csv", index=False)
            source = {"views": settings.get("VIEWS", 1), "notices": ["The weights have seen test images."]}
            (folder / "source.json").write_text(json.dumps(source))
        elif name == EXPLAIN:
            rows = pd.DataFrame({"pathology": ["Mass", "mean"], "n_boxes": [20, 20]})
            for k, measure in enumerate(("pointing", "energy")):
                rows[measure] = 0.4 - 0.2 * k + 0.01 * int(folder.name.removeprefix("seed-"))
                rows = rows.assign(**{f"{measure}_{control}": 0.1 for control in ("random", "center", "location")})
            rows.to_csv(folder / "localization.csv", index=False)


def check_numbers(run_dir, seeds, average):
    """Recomputes seeds.json and seeds.csv from the predictions; returns seeds.json."""
    summary, table = json.loads((run_dir / "seeds.json").read_text()), pd.read_csv(run_dir / "seeds.csv")
    folders = [run_dir / f"seed-{seed}" for seed in range(seeds)] + [run_dir / average]
    tables = [pd.read_csv(folder / "predictions.csv").query("split == 'test'") for folder in folders]
    tables = [rows.sort_values("image") for rows in tables]

    def measure(probs):
        labels = tables[0][[f"label_{name}" for name in PATHOLOGIES]].to_numpy()
        defined = [c for c in range(14) if labels[:, c].any() and not labels[:, c].all()]
        aucs = np.full(14, np.nan)
        aucs[defined] = [roc_auc_score(labels[:, c], probs[:, c]) for c in defined]
        return np.append(aucs, np.nanmean(aucs))

    probs = [rows[[f"prob_{name}" for name in PATHOLOGIES]].to_numpy() for rows in tables]
    aucs = np.array([measure(values) for values in probs])
    single, one_view = aucs[:-1], measure(logit(probs[:-1]).mean(axis=0))
    expected = {f"seed_{seed}": single[seed] for seed in range(seeds)}
    expected |= {"mean": single.mean(axis=0), "sd": single.std(axis=0, ddof=1), "min": single.min(axis=0)}
    expected |= {"max": single.max(axis=0), "one_view": one_view, "average": aucs[-1]}
    expected["gain"] = aucs[-1] - single.mean(axis=0)
    for name, values in expected.items():
        np.testing.assert_allclose(table[name], values, atol=1e-9, err_msg=name)
    for low, value, high in (("low", "mean", "high"), *((f"{x}_low", x, f"{x}_high") for x in ("average", "gain"))):
        assert (table[low].le(table[value]) & table[value].le(table[high]) | table[value].isna()).all()
    mean = table.iloc[-1]
    assert [seed["auc"] for seed in summary["seeds"]] == pytest.approx(single[:, -1])
    assert summary["spread"] == pytest.approx(mean[list(summary["spread"])].to_dict())
    figures = {name: value for name, value in summary["average"].items() if name not in ("folder", "views")}
    assert figures == pytest.approx(mean[list(figures)].to_dict()) and summary["average"]["folder"] == average
    assert summary["images"] == len(tables[0]) and (run_dir / "figures" / "seeds.png").stat().st_size > 1000
    return summary


@pytest.mark.slow
def test_each_seed_is_trained_and_evaluated_then_their_average(make_seeds, tmp_path):
    notebooks = Notebooks()
    shown = make_seeds(notebooks, "--run-dir", tmp_path, "--seeds", 3, "--set", "VIEWS=25", "RESAMPLES=100", "EPOCHS=2")
    each = [(name, f"seed-{seed}") for seed in range(3) for name in (TRAIN, EVALUATE, EXPLAIN)]
    average = "average-3-seeds-25-views"
    assert notebooks.executed == [(PREPARE, tmp_path.name), *each, (EVALUATE, average)]
    assert notebooks.settings["MODELS"] == [str(tmp_path / f"seed-{seed}") for seed in range(3)]
    summary = check_numbers(tmp_path, 3, average)
    assert [seed["seed"] for seed in summary["seeds"]] == [0, 1, 2] and summary["average"]["views"] == 25
    assert summary["bootstrap"] == {"n_resamples": 100, "seed": 0, "level": 0.95}
    assert all(name in shown for name in PATHOLOGIES) and "synthetic" in shown and len(shown.splitlines()) <= 32
    assert summary["notices"][0] in shown
    pointing = summary["heatmaps"]["pointing"]
    assert pointing["seeds"] == pytest.approx([0.4, 0.41, 0.42]) and pointing["mean"] == pytest.approx(0.41)
    assert pointing["sd"] == pytest.approx(0.01) and "pointing: mean 0.410 (0.400 to 0.420 over the seeds)" in shown
    assert len(pd.read_csv(tmp_path / "seeds_localization.csv").query("pathology == 'Mass'")) == 3
    before = (tmp_path / "seeds.csv").read_bytes()

    again = Notebooks()  # nothing is left to do; one more seed is trained alone, and the average is another
    make_seeds(again, "--run-dir", tmp_path, "--seeds", 3, "--set", "VIEWS=25", "RESAMPLES=100", "EPOCHS=2")
    assert again.executed == [] and (tmp_path / "seeds.csv").read_bytes() == before
    make_seeds(again, "--run-dir", tmp_path, "--seeds", 4, "--set", "VIEWS=25", "RESAMPLES=100", "EPOCHS=2")
    more = [(TRAIN, "seed-3"), (EVALUATE, "seed-3"), (EXPLAIN, "seed-3"), (EVALUATE, "average-4-seeds-25-views")]
    assert again.executed == [(PREPARE, tmp_path.name), *more]


def test_one_seed_has_no_spread(make_seeds, tmp_path):
    shown = make_seeds(Notebooks(), "--run-dir", tmp_path, "--seeds", 1, "--set", "RESAMPLES=100")
    summary = json.loads((tmp_path / "seeds.json").read_text())
    assert summary["spread"]["sd"] is None and summary["average"]["views"] == 9 and "nan" not in shown


def test_a_pause_stops_with_its_reason_and_is_resumed(make_seeds, tmp_path):
    notebooks = Notebooks(pauses=["", "Training paused at epoch 1."])
    with pytest.raises(SystemExit, match=r"Seed 1: Training paused at epoch 1\."):
        make_seeds(notebooks, "--run-dir", tmp_path, "--seeds", 2)
    assert notebooks.executed[-1] == (TRAIN, "seed-1") and not (tmp_path / "seeds.json").exists()
    make_seeds(notebooks, "--run-dir", tmp_path, "--seeds", 2)
    left = [(TRAIN, "seed-1"), (EVALUATE, "seed-1"), (EXPLAIN, "seed-1"), (EVALUATE, "average-2-seeds-9-views")]
    assert notebooks.executed[5:] == [(PREPARE, tmp_path.name), *left]


def test_the_time_budget_is_that_of_all_seeds(make_seeds, tmp_path, monkeypatch):
    clock = iter([0.0, 600.0, 4000.0])  # seconds: at the start, before seed 0, before seed 1
    monkeypatch.setattr(train_seeds, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    budgets, notebooks = [], Notebooks()

    def execute(folder, name, settings):
        budgets.extend([settings["TIME_BUDGET"]] if name == TRAIN else [])
        notebooks(folder, name, settings)

    with pytest.raises(SystemExit, match=r"ran out before seed 1\. Give the same command"):
        make_seeds(execute, "--run-dir", tmp_path, "--seeds", 2, "--set", "TIME_BUDGET=1")
    assert budgets == [pytest.approx(5 / 6)]


def test_seeds_of_other_settings_are_refused_before_anything_runs(make_seeds, tmp_path):
    make_seeds(Notebooks(), "--run-dir", tmp_path, "--seeds", 1, "--set", "EPOCHS=2", "SAVE_STEPS=7")
    notebooks = Notebooks()
    with pytest.raises(SystemExit, match=r"seed-0 was trained with EPOCHS 2 \(now \d+\)\. Give the settings"):
        make_seeds(notebooks, "--run-dir", tmp_path, "--seeds", 2)
    assert notebooks.executed == []


def test_later_seeds_train_in_the_precision_of_the_first(make_seeds, tmp_path):
    """Left to each, it would be that of the machine on which the command is given again."""
    make_seeds(Notebooks(), "--run-dir", tmp_path, "--seeds", 1, "--set", "PRECISION=mixed_float16")
    make_seeds(Notebooks(), "--run-dir", tmp_path, "--seeds", 2)
    assert json.loads((tmp_path / "seed-1" / "run.json").read_text())["settings"]["PRECISION"] == "mixed_float16"


def test_the_settings_in_which_seeds_may_differ_are_those_in_which_a_run_may():
    cells = json.loads((ROOT / "notebooks" / f"{TRAIN}.ipynb").read_text())["cells"]
    names = next(line for cell in cells for line in cell["source"] if line.startswith("free = "))
    free = ast.literal_eval(names.removeprefix("free = ").partition("#")[0].strip())
    assert {*train_seeds.FREE, "RUNTIME"} == {*free, "SEED"}


def test_seeds_measured_on_other_images_are_not_averaged(make_seeds, tmp_path):
    make_seeds(Notebooks(), "--run-dir", tmp_path, "--seeds", 2, "--set", "RESAMPLES=100")
    path = tmp_path / "seed-1" / "predictions.csv"
    pd.read_csv(path).query("image != '003.png'").to_csv(path, index=False)
    with pytest.raises(SystemExit, match="seed-1 was measured on other images"):
        make_seeds(Notebooks(), "--run-dir", tmp_path, "--seeds", 2, "--set", "RESAMPLES=100")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", 0], "SEEDS is 0"),
        (["--set", "SEED=1"], "SEED is no setting of `make seeds`: the seeds are 0"),
        (["--set", "START_OVER=True"], "delete a seed's folder"),
        (["--set", "VIEWS=4"], "VIEWS is '4'; expected one of 1, 9, 25, 49"),
        (["--set", "EPOCH=4"], "expected NAME=VALUE"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make_seeds, tmp_path, arguments, message):
    notebooks = Notebooks()
    with pytest.raises(SystemExit, match=message):
        make_seeds(notebooks, "--run-dir", tmp_path / "run", *arguments)
    assert notebooks.executed == [] and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_killed_run_resumes_in_the_seed_that_it_was_in(make_seeds, phantom_dir, tmp_path):
    """With the notebooks themselves: killed at the first checkpoint of the second seed, then finished."""
    run_dir = tmp_path / "run"
    settings = SHORT | name_folders(phantom_dir, run_dir, tmp_path / "packed") | {"EPOCHS": 2, "VIEWS": 9}
    arguments = ["--data-dir", settings.pop("DATA_DIR"), "--run-dir", settings.pop("RUN_DIR"), "--seeds", "2", "--set"]
    arguments += [f"{name}={value}" for name, value in settings.items() if name != "VERBOSE"]
    driver = ROOT / "tests" / "support" / "seeds_run.py"
    killed = subprocess.run([sys.executable, str(driver), "seed-1", *arguments], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    first = (run_dir / "seed-0" / "run.json").read_bytes()
    assert json.loads(first)["finished"] and not (run_dir / "seed-1" / "run.json").exists()

    executed = []

    def execute(folder, name, settings):
        executed.append((name, folder.parent.name))
        execute_here(folder, name, settings)

    make_seeds(execute, *arguments)
    left = [(TRAIN, "seed-1"), (EVALUATE, "seed-1"), (EXPLAIN, "seed-1"), (EVALUATE, "average-2-seeds-9-views")]
    assert executed == [(PREPARE, "run"), *left] and (run_dir / "seed-0" / "run.json").read_bytes() == first
    second = json.loads((run_dir / "seed-1" / "run.json").read_text())
    assert second["finished"] and second["interruptions"] == 1 and second["seed"] == 1
    summary = check_numbers(run_dir, 2, "average-2-seeds-9-views")
    assert summary["spread"]["sd"] > 0 and summary["seeds"][0]["auc"] != summary["seeds"][1]["auc"]
    aucs = pd.read_csv(run_dir / "average-2-seeds-9-views" / "aucs.csv").query("split == 'test'")
    table = pd.read_csv(run_dir / "seeds.csv")
    for theirs, ours in (("auc", "average"), ("auc_low", "average_low"), ("auc_high", "average_high")):
        np.testing.assert_allclose(table[ours], aucs[theirs], atol=1e-9)
    board = pd.read_csv(run_dir / "leaderboard.csv").set_index("run")
    assert board.loc["average-2-seeds-9-views", ["models", "views"]].tolist() == [2, 9]
