"""Whole chains of notebooks on studies of all kinds: bad images, other splits, real radiographs if at hand."""

import json
import shutil
import sys
import zlib

import pytest
from chain import DENSENET, XVISION, call_chain, check_artifacts, check_nodules, run_chain

from helpers.export import fill_model_card
from helpers.packing import load_packed_study
from helpers.runtime.settings import ROOT
from helpers.study import write_synthetic_study
from helpers.training import DENSENET121, load_densenet121

sys.path.insert(0, str(ROOT / "scripts"))
from run_notebooks import show_results


def spoil(path, how):
    """Puts in the place of an image what downloads leave behind."""
    if how == "html":
        path.write_bytes(b"<!DOCTYPE html><html>404</html>")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:500])
    elif how == "bomb":  # a PNG whose header declares 20,000 x 20,000 pixels
        head = bytearray(path.read_bytes())
        head[16:24] = (20_000).to_bytes(4) * 2
        head[29:33] = zlib.crc32(head[12:29]).to_bytes(4)
        path.write_bytes(head)
    else:
        path.unlink()


@pytest.fixture
def study(tmp_path):
    """A study of 120 images with a bad one at every tenth place."""
    write_synthetic_study(tmp_path / "a study", n_images=120, size=48, seed=3)
    for number, path in enumerate(sorted((tmp_path / "a study" / "images").iterdir())[::10]):
        spoil(path, ("html", "truncated", "bomb", "missing")[number % 4])
    return tmp_path / "a study"


def read_counts(run_dir):
    record = json.loads((run_dir / "data_report.json").read_text())
    return record["found"], record["missing"], len(record["unreadable"])


def test_chain_of_densenet121_goes_on_past_bad_images_and_without_the_study(study, tmp_path, capsys):
    """They are listed, the rest is packed, in two steps, and the whole network trained on it, measured, explained and
    exported from a copy of the packed study alone, to which nothing may be written."""
    settings = ("SPLIT=random_patients", f"BLOCKS={list(DENSENET121)}", "RECORDS=png")
    packed, moved = tmp_path / "packed", tmp_path / "attached" / "packed"
    printed = run_chain(study, tmp_path / "host2", packed, *settings, "PART=2/2", only=DENSENET[:1])
    assert "Part 2/2 is packed" in printed and "without PART" in printed and not (packed / "manifest.json").exists()
    assert {path.name[:4] for path in packed.iterdir()} == {"val-"}
    run_chain(study, tmp_path / "run", packed, *settings, only=DENSENET[:1])
    shutil.copytree(packed, moved)
    shutil.rmtree(study)
    shutil.rmtree(packed)
    for path in [*moved.rglob("*"), moved]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in [moved, *moved.rglob("*")]}
    run_chain(study, tmp_path / "run", moved, *settings, only=DENSENET[1:])
    assert {path: path.stat().st_mtime_ns for path in [moved, *moved.rglob("*")]} == before
    for path in before:
        path.chmod(0o755)
    check_artifacts(tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["study"] == "a study" and record["synthetic"]
    assert load_densenet121(tmp_path / "run").count_params() == 7_051_854
    assert read_counts(tmp_path / "run") == (117, 3, 9)
    show_results(tmp_path / "run")
    assert "117 of 120 images found, 3 missing, 9 unreadable" in capsys.readouterr().out
    card = (tmp_path / "run" / "model_card.md").read_text()
    assert "validation with test: 0" in card and "scores are flattered" not in card and "# DenseNet-121 for" in card


def test_a_split_by_image_is_measured_and_said_to_leak(study, tmp_path):
    """The first three notebooks tell it already, the fifth writes the card that is written here."""
    run_chain(study, tmp_path / "run", tmp_path / "packed", "SPLIT=leaky_images", only=DENSENET[:3])
    assert read_counts(tmp_path / "run") == (117, 3, 9)
    card = fill_model_card(tmp_path / "run")
    assert "validation with test: 0" not in card and "scores are flattered" in card
    assert "# DenseNet of blocks 1, 1, 1, 1 for" in card


@pytest.fixture
def real_study(shared_data, tmp_path):
    """A function that lays real radiographs of a kind and the whole metadata of NIH into a folder."""

    def lay(kind, place):
        shutil.copytree(shared_data / "nih_metadata", tmp_path / "nih")
        (tmp_path / "nih" / place).parent.mkdir(exist_ok=True)
        (tmp_path / "nih" / place).symlink_to(shared_data / kind)
        return tmp_path / "nih", {path.name for path in (shared_data / kind).iterdir()}

    return lay


def test_chain_on_real_images(real_study, tmp_path):
    """Real NIH files, a part of the images of the whole metadata: the chain ends and says what is missing."""
    study, found = real_study("nih_sample/images", "images")
    only = (*DENSENET, XVISION)
    nodules = ("SOURCE=nih", "BACKBONES=VGG16")  # few of the images are of test patients
    run_chain(study, tmp_path / "run", tmp_path / "packed", "RECIPE=original", *nodules, only=only)
    predictions = check_artifacts(tmp_path / "run", only=only)
    counts = check_nodules(tmp_path / "run" / "xvision-nih")["counts"]
    assert (counts["Nodule"], counts["Normal"], counts["boxes"]) == (20, 116, 0)
    listed = set((study / "test_list.txt").read_text().split())
    assert set(predictions.loc[predictions["split"].eq("test"), "image"]) == found & listed
    assert read_counts(tmp_path / "run") == (304, 112_120 - 304, 0)


def test_real_images_of_full_size_in_numbered_folders(real_study, tmp_path):
    """Packing is all that differs from the chain above."""
    study, found = real_study("nih_original/images_001/images", "images_001/images")
    run_chain(study, tmp_path / "run", tmp_path / "packed", only=DENSENET[:1])
    packed = load_packed_study(tmp_path / "packed")
    assert set(packed.index["image"]) == found and not packed.excluded
    assert read_counts(tmp_path / "run") == (48, 112_120 - 48, 0)


def test_nodules_of_jsrt(shared_data, tmp_path):
    """Real radiographs with positions of their nodules, and a run without the network that BACKBONES asks for by default."""
    folder = str(shared_data / "jsrt")
    settings = ("SOURCE=jsrt", f"SOURCE_DIR={folder}")
    answer = call_chain(tmp_path / "none", tmp_path / "run", tmp_path / "packed", *settings, only=(XVISION,))
    assert answer.returncode != 0 and "holds no run of notebook 2: run that first, or set BACKBONES" in answer.stderr
    settings += ("BACKBONES=VGG16", f"FILM={shared_data / 'dicom' / 'RG1_J2KI.dcm'}")
    printed = run_chain(tmp_path / "none", tmp_path / "run", tmp_path / "packed", *settings, only=(XVISION,))
    study = check_nodules(tmp_path / "run" / "xvision-jsrt")
    assert (study["counts"]["Nodule"], study["counts"]["Normal"], study["counts"]["boxes"]) == (154, 93, 154)
    assert study["saliency"][0]["n_images"] == 3 and "Nodules (jsrt, 247 images), on VGG16 features (none)" in printed
