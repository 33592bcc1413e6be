"""Reports of runs: complete, without paths and patients, and pages and table that say what report.json says."""

import json
import re
import sys

import pytest
from made_run import make_run

from helpers.runtime.settings import ROOT
from helpers.study import PATHOLOGIES

sys.path.insert(0, str(ROOT / "benchmarks" / "workers"))
sys.path.insert(0, str(ROOT / "scripts"))
import make_report


def check_report(path):
    """Checks one report and its page."""
    text = path.read_text()
    report = json.loads(text)
    assert not re.search(r"/(home|root|Users|work|content|kaggle)/|gs://|\b\d{8}_\d{3}\.png", text)
    aucs = {row["pathology"]: row["auc"] for row in report["aucs"]}
    assert list(aucs) == [*PATHOLOGIES, "mean"]
    known = [aucs[name] for name in PATHOLOGIES if aucs[name] is not None]
    assert aucs["mean"] == pytest.approx(sum(known) / len(known), abs=1e-6)
    assert all(row["auc_low"] <= row["auc"] <= row["auc_high"] for row in report["aucs"] if row["auc"] is not None)
    assert re.fullmatch(r"[0-9a-f]{64}", report["weights_sha256"]) and report["settings"] and report["runtime"]["keras"]
    assert (path.parent / "README.md").read_text() == make_report.draw_page(path.parent.name, report)


def test_reported_runs_are_whole_and_the_table_is_made_from_them():
    for path in make_report.RUNS.glob("*/report.json"):
        check_report(path)
    page = (make_report.RUNS / "README.md").read_text()
    assert f"<!-- runs -->\n{make_report.draw_runs()}\n<!-- end of runs -->" in page


@pytest.mark.parametrize(
    ("devices", "runtime", "machine"),
    [
        (["TPU v5 lite"] * 8, "jax", "EPYC, 224 cores, TPU v5 lite, jax x 8"),
        (["/device:TPU:0", "/device:TPU:1"], "tf-tpu", "EPYC, 224 cores, TPU, tf-tpu x 2"),
        (["NVIDIA H200"], "gpu", "EPYC, 224 cores, NVIDIA H200, gpu x 1"),
        (["/device:CPU:0"], "cpu", "EPYC, 224 cores, cpu x 1"),
        (["cpu", "cpu"], "jax", "EPYC, 224 cores, jax x 2"),
    ],
)
def test_a_report_names_the_accelerators(devices, runtime, machine):
    described = {"processor": "EPYC, 224 cores", "devices": devices, "runtime": runtime, "n_replicas": len(devices)}
    assert make_report.name_machine(described) == machine


@pytest.fixture
def finished(tmp_path):
    """A run of which everything is written that a report needs."""
    run_dir = make_run(tmp_path / "run", synthetic=False)
    record = json.loads((run_dir / "run.json").read_text())
    record |= {"weights": {"source": "ImageNet"}, "interruptions": 1, "index_sha256": "cd" * 32, "pause": ""}
    record["runtime"] |= {"processor": "a CPU, 96 cores", "backend": "jax", "n_replicas": 8}
    (run_dir / "run.json").write_text(json.dumps(record))
    (run_dir / "executed").mkdir()
    (run_dir / "executed" / "03_evaluate.ipynb").write_text('{"metadata": {"papermill": {"duration": 12.4}}}')
    return run_dir


def test_a_report_holds_the_run_without_its_paths(finished, tmp_path):
    folder = tmp_path / "runs" / "nih-full"
    make_report.write_report(finished, folder, "nih-full")
    check_report(folder / "report.json")
    report = json.loads((folder / "report.json").read_text())
    assert report["settings"] == {"WEIGHTS": "(path)", "EPOCHS": 3} and report["notebooks"] == {"03_evaluate": 12}
    page, mean = (folder / "README.md").read_text(), report["aucs"][-1]
    assert f"**{mean['auc']:.3f} ({mean['auc_low']:.3f} to" in page and "03 12 s" in page and "Hernia" not in page
    assert "on 50 % of 40" in page.replace("50%", "50 %") and (folder / "aucs.png").exists()


def test_the_table_of_runs_is_renewed_with_each_report(finished, tmp_path, monkeypatch):
    """The best of a study stands first, but synthetic images never stand above real ones."""
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "README.md").write_text("# Runs\n\n<!-- runs -->\nnone\n<!-- end of runs -->\n\nThe end.\n")
    monkeypatch.setattr(make_report, "RUNS", runs)
    record, aucs = json.loads((finished / "run.json").read_text()), (finished / "aucs.csv").read_text()

    def report(name, mean, **changes):
        (finished / "run.json").write_text(json.dumps(record | changes))
        lines = [line if not line.startswith("mean,") else re.sub(r"0\.\d+", mean, line) for line in aucs.splitlines()]
        (finished / "aucs.csv").write_text("\n".join(lines))
        monkeypatch.setattr(sys, "argv", ["make_report.py", "--run-dir", str(finished), "--name", name])
        make_report.main()
        return re.findall(r"\| \[([\w-]+)\]", (runs / "README.md").read_text())

    assert report("first", "0.6") == ["first"]
    assert report("better", "0.7") == ["better", "first"]
    assert report("drawn", "0.9", synthetic=True, study="drawn") == ["better", "first", "drawn"]
    assert report("better", "0.5") == ["first", "better", "drawn"]  # reported again
    page = (runs / "README.md").read_text()
    assert page.startswith("# Runs\n\n<!-- runs -->\n| run |") and page.endswith("<!-- end of runs -->\n\nThe end.\n")
    row = "| [first](first/README.md) | phantom | official, 300 test images | 0.600 (0.600 to 0.600) | 3 epochs, "
    assert row in page and "96 cores, cpu x 8 |" in page and "| drawn (synthetic) |" in page


def test_an_unfinished_run_is_not_reported(finished, tmp_path, monkeypatch):
    record = json.loads((finished / "run.json").read_text())
    (finished / "run.json").write_text(json.dumps(record | {"finished": False, "pause": "Training paused."}))
    with pytest.raises(ValueError, match=r"run: Training paused\."):
        make_report.gather_report(finished)
    monkeypatch.setattr(sys, "argv", ["make_report.py", "--run-dir", str(finished), "--name", "My run"])
    with pytest.raises(SystemExit, match="NAME is 'My run'; expected small letters, digits and dashes"):
        make_report.main()
