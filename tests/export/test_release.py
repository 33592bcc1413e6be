"""The folder for the Hugging Face Hub: complete, itself only, of one run, and free of people and paths."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hub_server import serve_hub
from made_run import make_run, write_json
from PIL import Image

from helpers.export import check_release, gather_release
from helpers.export.release import REQUIRED
from helpers.runtime.settings import ROOT
from helpers.study import PATHOLOGIES

sys.path.append(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def gathered_runs(tmp_path_factory):
    """A synthetic and a real run with their releases, at an address of their own; never written to by a test."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("helpers.export.model_card.find_address", lambda: "https://github.com/ada/radiographs")
        runs = {kind: make_run(folder / kind, synthetic=kind == "synthetic") for kind in ("synthetic", "real")}
        return {kind: (run_dir, gather_release(run_dir)) for kind, run_dir in runs.items()}


@pytest.fixture
def gathered(gathered_runs):
    return gathered_runs["real"]


@pytest.fixture
def release(gathered, tmp_path):
    """A copy of a release of a run on real radiographs, to break."""
    return shutil.copytree(gathered[1], tmp_path / "hub")


def find_problems(folder):
    return [problem for problems in check_release(folder).values() for problem in problems]


@pytest.mark.parametrize("kind", ["synthetic", "real"])
def test_a_gathered_release_is_complete(gathered_runs, kind):
    assert find_problems(gathered_runs[kind][1]) == []


def test_holds_what_is_to_be_published_and_nothing_else(tmp_path):
    run_dir = make_run(tmp_path / "run")
    for name in ("model.pkl", ".env", "saved_model/.cache", "saved_model/00000001_000.png", "exports/SHA256SUMS"):
        (run_dir / name).write_text("x")
    hub = gather_release(run_dir)
    names = {path.relative_to(hub).as_posix() for path in hub.rglob("*") if path.is_file()}
    written = {"README.md", "LICENSE", "metadata.json", "SHA256SUMS"}
    others = {"figures/03_aucs.png", "saved_model/variables/variables.data-00000-of-00001"}
    assert names == {*REQUIRED, *written, *others}


def test_large_files_take_no_space_twice_unless_links_are_refused(gathered, tmp_path, monkeypatch):
    run_dir, hub = gathered
    assert os.path.samefile(run_dir / "exports" / "model.onnx", hub / "exports" / "model.onnx")

    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    run_dir = make_run(tmp_path / "run")
    hub = gather_release(run_dir)
    assert (hub / "aucs.csv").read_bytes() == (run_dir / "aucs.csv").read_bytes()
    assert not os.path.samefile(hub / "aucs.csv", run_dir / "aucs.csv")


def test_the_run_record_loses_paths_and_keeps_all_else(gathered):
    given = json.loads((gathered[1] / "run.json").read_text())
    own = json.loads((gathered[0] / "run.json").read_text())
    assert given["settings"] == {"WEIGHTS": "(path)", "EPOCHS": 3}
    assert given["split"] == own["split"] and given["runtime"]["devices"] == ["/device:CPU:0"]
    assert "ada" not in (gathered[1] / "run.json").read_text()


def test_sums_are_those_of_sha256sum(release):
    if not shutil.which("sha256sum"):
        pytest.skip("needs sha256sum, which this system lacks")
    listed = {line.split("  ")[1] for line in (release / "SHA256SUMS").read_text().splitlines()}
    files = {path.relative_to(release).as_posix() for path in release.rglob("*") if path.is_file()}
    assert listed == files - {"SHA256SUMS"}
    command = ["sha256sum", "--strict", "--check", "SHA256SUMS"]
    assert subprocess.run(command, cwd=release, capture_output=True).returncode == 0
    (release / "aucs.csv").write_text("changed")
    assert subprocess.run(command, cwd=release, capture_output=True).returncode == 1


def test_gathers_again_and_leaves_nothing_of_before(tmp_path):
    run_dir = make_run(tmp_path / "run")
    gather_release(run_dir)
    (run_dir / "localization.csv").unlink()
    hub = gather_release(run_dir)
    assert not (hub / "localization.csv").exists()
    assert any(
        problem.startswith("missing or empty: localization.csv. Run 04_explain") for problem in find_problems(hub)
    )


def test_what_cannot_be_gathered_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="Copy it to a local folder"):
        gather_release("gs://bucket/run")
    run_dir = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="unknown license 'mine'"):
        gather_release(run_dir, "mine")
    (run_dir / "aucs.csv").unlink()
    with pytest.raises(FileNotFoundError, match="Run 03_evaluate"):
        gather_release(run_dir)
    assert not (run_dir / "hub").exists()


def test_every_missing_or_empty_file_is_found_with_its_remedy(release):
    names = set(REQUIRED) - {"run.json"}
    for number, name in enumerate(sorted(names)):
        (release / name).write_bytes(b"") if number % 2 else (release / name).unlink()
    found = {problem.split(". ")[0]: problem for problem in find_problems(release) if problem.startswith("missing")}
    assert found.keys() == {f"missing or empty: {name}" for name in names}
    assert all(REQUIRED[name] in found[f"missing or empty: {name}"] for name in names)


BREAKS = {
    "other weights": ("model.weights.h5", b"other", "not the file that run.json describes"),
    "ONNX of other weights": ("exports/model.onnx", b"other", "model.onnx is of other weights than run.json"),
    "SavedModel of other weights": ("saved_model/saved_model.pb", b"other", "saved_model.pb is of other weights"),
    "placeholder": ("README.md", b"https://github.com/OWNER/REPOSITORY", "make address"),
    "home in JSON": ("thresholds.json", b'"/home/ada/phantom"', "thresholds.json names a folder"),
    "home in a model": ("exports/model.tflite", b"\0/Users/ada/x.py\0", "model.tflite names a folder"),
    "bucket": ("exports/golden.json", b'"gs://ada-run/x"', "golden.json names a folder"),
    "patient column": ("localization.csv", b"patient_id,pathology\n", "column patient_id"),
    "patient's image": ("exports/golden.json", b'{"film": "00012345_001.png"}', "patient's image"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_each_break_is_found(release, name):
    file, content, problem = BREAKS[name]
    (release / file).unlink()  # a copy, but may be linked within the run
    (release / file).write_bytes(content)
    assert any(problem in found for found in find_problems(release)), find_problems(release)


def test_names_of_synthetic_images_are_no_patients(gathered_runs, tmp_path):
    release = shutil.copytree(gathered_runs["synthetic"][1], tmp_path / "hub")
    write_json(release / "exports" / "parity.json", {"film": "00012345_001.png"})
    assert find_problems(release) == []


@pytest.fixture
def command(monkeypatch, capsys):
    """The command, run in this process; returns what it exits with and what it prints."""
    import publish_check

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["publish_check.py", *map(str, arguments)])
        try:
            publish_check.main()
        except SystemExit as error:
            return error.code, capsys.readouterr().out
        return 0, capsys.readouterr().out

    return run


def test_the_command_lists_each_point_and_fails_if_one_does(command, tmp_path):
    run_dir = make_run(tmp_path / "run")
    (run_dir / "exports" / "model.onnx").unlink()
    code, printed = command("--run-dir", run_dir)
    assert "Not ready" in code
    assert "missing or empty: exports/model.onnx. Run 05_export_and_predict" in printed
    assert "ok      all files are of the same weights" in printed and "hf upload" not in printed


def test_the_command_shows_how_to_upload_a_complete_release(command, tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.export.model_card.find_address", lambda: "https://github.com/ada/radiographs")
    run_dir = make_run(tmp_path / "a run")
    code, printed = command("--run-dir", run_dir)
    assert code == 0, printed
    assert printed.rstrip().splitlines()[-1].strip() == f"hf upload 'YOUR_NAME/a run' '{run_dir / 'hub'}' ."


def test_the_command_names_the_notebook_for_an_empty_run(command, tmp_path):
    code, _ = command("--run-dir", tmp_path)
    assert "Run 02_train_densenet121" in code and not list(tmp_path.iterdir())


@pytest.fixture
def complete_run(tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.export.model_card.find_address", lambda: "https://github.com/ada/radiographs")
    return make_run(tmp_path / "run")


def test_the_zip_is_the_release(command, complete_run):
    code, printed = command("--run-dir", complete_run, "--zip")
    with zipfile.ZipFile(complete_run / "model.zip") as archive:
        files = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    hub = complete_run / "hub"
    assert code == 0 and files == {
        path.relative_to(hub).as_posix(): path.read_bytes() for path in hub.rglob("*") if path.is_file()
    }
    assert f"{complete_run / 'model.zip'}" in printed and not list(complete_run.glob("part-*"))


# As `make publish`, in a process of its own: the client reads the address when it is imported.
UPLOAD = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import publish_check, helpers.export.model_card as card
card.find_address = lambda: "https://github.com/ada/radiographs"
for token in ("wrong", "good"):
    os.environ["HF_TOKEN"] = token
    try:
        publish_check.main()
    except SystemExit as refused:
        print(refused)
"""


@pytest.mark.slow
def test_the_release_is_uploaded_with_the_users_token_and_nothing_else_is(complete_run, command, monkeypatch):
    to = ["--run-dir", str(complete_run), "--upload", "ada/model"]
    with serve_hub("good") as server:
        environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        script = [sys.executable, "-c", UPLOAD, str(ROOT / "scripts"), *to]
        done = subprocess.run(script, capture_output=True, text=True, env=environment)
    refused, _, printed = done.stdout.partition("refuses the upload to ada/model (401). Get a token that may")
    assert f"Uploaded: {server.url}/ada/model" in printed, done.stderr
    assert "Uploaded" not in refused and "Traceback" not in done.stderr
    hub = complete_run / "hub"
    sent = {path.relative_to(hub).as_posix(): path.read_bytes() for path in hub.rglob("*") if path.is_file()}
    assert server.files == sent
    (complete_run / "exports" / "model.onnx").unlink()
    monkeypatch.setattr("publish_check.upload_release", lambda *_: pytest.fail("it is not complete"))
    assert "Not ready to publish" in command(*to)[0]


def test_the_lines_of_the_readme_classify_an_image_and_draw_a_heatmap(tiny_run, tmp_path, capsys, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert lines.count("\n") <= 14
    Image.fromarray(np.arange(6400, dtype=np.uint8).reshape(80, 80)).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("agg")
    exec(lines.replace('"models/densenet121"', repr(str(tiny_run))), {})
    assert any(name in capsys.readouterr().out for name in PATHOLOGIES)
    assert np.std(np.asarray(Image.open("heatmap.png").convert("RGB")), axis=(0, 1)).min() > 5
    plt.close("all")
