"""The folder for the Hugging Face Hub: complete, itself only, true to the run, and free of people and paths."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from made_run import make_run, write_json

from helpers.export import check_release, gather_release
from helpers.export.release import write_sums
from helpers.export.release_checks import REQUIRED
from helpers.runtime.settings import ROOT


@pytest.fixture(scope="module")
def gathered_runs(tmp_path_factory):
    """A synthetic and a real run with their releases, at an address of their own; never written to by a test."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("helpers.export.model_card.find_address", lambda: "https://github.com/ada/films")
        runs = {kind: make_run(folder / kind, synthetic=kind == "synthetic") for kind in ("synthetic", "real")}
        return {kind: (run_dir, gather_release(run_dir)) for kind, run_dir in runs.items()}


@pytest.fixture
def gathered(gathered_runs):
    return gathered_runs["real"]


@pytest.fixture
def release(request, gathered_runs, tmp_path):
    """A copy of a release to break, of the run on real radiographs where the test does not say."""
    return shutil.copytree(gathered_runs[getattr(request, "param", "real")][1], tmp_path / "hub")


BOTH = pytest.mark.parametrize("release", ["synthetic", "real"], indirect=True)


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@BOTH
def test_a_gathered_release_is_complete(release):
    assert check_release(release) == []


def test_holds_what_is_to_be_given_away_and_nothing_else(gathered):
    names = {path.relative_to(gathered[1]).as_posix() for path in gathered[1].rglob("*") if path.is_file()}
    others = {"figures/03_aucs.png", "saved_model/variables/variables.data-00000-of-00001"}
    assert names == set(REQUIRED) | others


def test_large_files_take_no_space_twice(gathered):
    run_dir, hub = gathered
    assert os.path.samefile(run_dir / "exports" / "model.onnx", hub / "exports" / "model.onnx")


def test_without_hard_links_files_are_copied(gathered, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    hub = gather_release(gathered[0], tmp_path / "elsewhere")
    assert (hub / "aucs.csv").read_bytes() == (gathered[0] / "aucs.csv").read_bytes()
    assert not os.path.samefile(hub / "aucs.csv", gathered[0] / "aucs.csv")


def test_the_run_record_loses_paths_and_keeps_all_else(gathered):
    given = json.loads((gathered[1] / "run.json").read_text())
    own = json.loads((gathered[0] / "run.json").read_text())
    assert given["settings"] == {"WEIGHTS": "(path)", "EPOCHS": 3}
    assert given["split"] == own["split"] and given["runtime"]["devices"] == ["/device:CPU:0"]
    assert "ada" not in (gathered[1] / "run.json").read_text()


def test_sums_are_those_of_sha256sum(release):
    if not shutil.which("sha256sum"):
        pytest.skip("needs sha256sum, which this system lacks")
    command = ["sha256sum", "--strict", "--check", "SHA256SUMS"]
    assert subprocess.run(command, cwd=release, capture_output=True).returncode == 0
    (release / "aucs.csv").write_text("changed")
    assert subprocess.run(command, cwd=release, capture_output=True).returncode == 1


def test_gathers_anew_and_leaves_nothing_of_before(tmp_path):
    run_dir = make_run(tmp_path / "run")
    gather_release(run_dir)
    (run_dir / "localization.csv").unlink()
    hub = gather_release(run_dir)
    assert not (hub / "localization.csv").exists()
    assert any(problem.startswith("missing: localization.csv. Run 04_explain") for problem in check_release(hub))


def test_a_folder_of_something_else_is_not_replaced(gathered, tmp_path):
    (tmp_path / "thesis.md").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds other files"):
        gather_release(gathered[0], tmp_path)
    assert (tmp_path / "thesis.md").exists()


def test_a_run_in_a_bucket_is_refused():
    with pytest.raises(ValueError, match="Copy it to a local folder"):
        gather_release("gs://bucket/run")


@pytest.mark.parametrize("name", REQUIRED)
def test_every_missing_file_is_found_with_its_remedy(release, name):
    (release / name).unlink()
    (found,) = [problem for problem in check_release(release) if problem.startswith(f"missing: {name}. ")]
    assert REQUIRED[name] in found


def test_an_empty_file_is_found(release):
    (release / "exports" / "model.onnx").write_bytes(b"")
    assert any(problem.startswith("empty: exports/model.onnx") for problem in check_release(release))


def add(name, content=b"x"):
    def do(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return do


def edit(name, old, new):
    return lambda folder: change(folder / name, old, new)


def drop_header(folder):
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(text.split("\n---\n", 1)[1])


BREAKS = {
    "no header": (drop_header, "header"),
    "header no YAML": (edit("README.md", "license: apache-2.0", "license: [apache"), "header"),
    "license unknown": (edit("README.md", "license: apache-2.0", "license: mine"), "license 'mine'"),
    "license other": (edit("README.md", "license: apache-2.0", "license: other"), "license_name"),
    "no library": (edit("README.md", "library_name: keras\n", ""), "library_name"),
    "wrong task": (edit("README.md", "pipeline_tag: image-classification", "pipeline_tag: x"), "pipeline_tag"),
    "no model-index": (edit("README.md", "model-index:", "model_index:"), "model-index"),
    "no dataset type": (edit("README.md", "    dataset:\n      type:", "    dataset:\n      kind:"), "model-index"),
    "section lost": (edit("README.md", "## Caveats and recommendations", "## Praise"), "Caveats"),
    "use not said": (edit("README.md", "Research and teaching only", "For everyone"), "Research and teaching only"),
    "placeholder": (edit("README.md", "github.com/ada/films", "github.com/OWNER/REPOSITORY"), "make address"),
    "to do": (edit("README.md", "## Factors", "## Factors\n\nTODO"), "TODO"),
    "number in card": (edit("README.md", "| Edema | 1,009 | 0.", "| Edema | 1,009 | 1."), "AUC of Edema"),
    "number in index": (edit("README.md", "value: 0.", "value: 0.0"), "model-index has"),
    "other results": (edit("aucs.csv", "Mass,test,1004,4,9.0,0.", "Mass,test,1004,4,9.0,0.1"), "AUC of Mass"),
    "other weights": (add("model.weights.h5", b"other"), "not the file that run.json describes"),
    "exports of other weights": (add("exports/model.onnx", b"other"), "model.onnx is of other weights than run.json"),
    "model of other weights": (add("saved_model/saved_model.pb", b"other"), "saved_model.pb is of other weights"),
    "altered": (add("exports/model.onnx", b"other"), "exports/model.onnx was altered"),
    "not in sums": (add("saved_model/fingerprint.pb"), "not in SHA256SUMS"),
    "pickle": (add("model.pkl"), "model.pkl does not belong"),
    "Keras archive": (add("model.keras"), "model.keras does not belong"),
    "predictions": (add("predictions.csv"), "predictions.csv does not belong"),
    "DICOM": (add("film.dcm"), "film.dcm does not belong"),
    "film": (add("exports/00000001_000.png"), "exports/00000001_000.png does not belong"),
    "image among figures": (add("figures/04_hits_and_misses.png"), "does not belong"),
    "hidden": (add(".env"), ".env does not belong"),
    "hidden in a folder": (add("saved_model/.cache/x"), "saved_model/.cache/x does not belong"),
    "executable": (lambda folder: (folder / "exports" / "model.onnx").chmod(0o755), "is executable"),
    "link": (lambda folder: (folder / "exports" / "golden.json.lnk").symlink_to("/etc/hosts"), "does not belong"),
    "home in JSON": (edit("run.json", '"phantom"', '"/home/ada/phantom"'), "run.json names a folder"),
    "home in a model": (add("exports/model.onnx", b"\0/Users/ada/x.py\0"), "model.onnx names a folder"),
    "patient column": (edit("localization.csv", "pathology,", "patient_id,"), "column patient_id"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_each_break_is_found(release, name):
    break_it, said = BREAKS[name]
    break_it(release)
    assert any(said in problem for problem in check_release(release)), check_release(release)


def test_a_file_too_large_is_found(release, monkeypatch):
    monkeypatch.setattr("helpers.export.release_checks.LARGEST", 30)
    assert any("more than" in problem for problem in check_release(release))


@BOTH
def test_tags_that_deny_the_run_are_found(release):
    card = (release / "README.md").read_text()
    is_synthetic = json.loads((release / "run.json").read_text())["synthetic"]
    old, new = ("- synthetic\n", "") if is_synthetic else ("- research-only\n", "- research-only\n- synthetic\n")
    (release / "README.md").write_text(card.replace(old, new))
    assert any("its tags say otherwise" in problem for problem in check_release(release))


@BOTH
def test_names_of_patients_images_are_found_in_real_runs(release):
    write_json(release / "exports" / "golden.json", {"film": "00012345_001.png"})
    named = any("patient's image" in problem for problem in check_release(release))
    assert named != json.loads((release / "run.json").read_text())["synthetic"]


@pytest.mark.parametrize("release", ["synthetic"], indirect=True)
def test_a_card_that_hides_the_synthetic_is_found(release):
    change(release / "README.md", "> **Synthetic run.**", "> **Run.**")
    assert any("does not begin by saying" in problem for problem in check_release(release))


def test_a_missing_record_breaks_no_other_check(release):
    (release / "run.json").unlink()
    (release / ".env").write_text("x")
    problems = check_release(release)
    assert any("cannot be checked" in problem for problem in problems)
    assert any(".env does not belong" in problem for problem in problems)


def call_script(*arguments):
    command = [sys.executable, str(ROOT / "scripts" / "publish_check.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_script_tells_each_point_and_fails_where_one_does(tmp_path):
    run_dir = make_run(tmp_path / "run")
    (run_dir / "exports" / "model.onnx").unlink()
    answer = call_script("--run-dir", run_dir)
    assert answer.returncode == 1
    assert "missing: exports/model.onnx. Run 05_export_and_predict" in answer.stdout
    assert "ok      the hashes are right" in answer.stdout and "hf upload" not in answer.stdout


def test_the_script_gives_the_command_for_a_complete_release(release):
    answer = call_script("--as-is", "--folder", release)
    assert answer.returncode == 0, answer.stdout
    assert answer.stdout.rstrip().splitlines()[-1].strip() == f"hf upload YOUR_NAME/densenet121 {release} ."


def test_the_script_names_the_notebook_for_an_empty_run(tmp_path):
    answer = call_script("--run-dir", tmp_path)
    assert answer.returncode == 1 and "Run 02_train_densenet121" in answer.stderr and not list(tmp_path.iterdir())


def test_sums_leave_themselves_out(release):
    assert "SHA256SUMS" not in write_sums(release)
