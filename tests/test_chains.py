"""Whole chains of notebooks on studies of all kinds: bad films, other splits, real films if at hand."""

import json
import shutil
import zlib

import pytest
from chain import check_artifacts, run_chain


def spoil(path, how):
    """Puts in the place of a film what downloads leave behind."""
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


@pytest.mark.parametrize("split", ["random_patients", "leaky_images"])
def test_chain_goes_on_past_bad_films_on_other_splits(tmp_path, split):
    """A study with a bad film at every tenth place: they are listed, the rest is packed, trained on and measured."""
    from helpers import write_phantom_study

    write_phantom_study(tmp_path / "a study", n_images=120, size=48, seed=3)
    bad = sorted((tmp_path / "a study" / "images").iterdir())[::10]
    for number, path in enumerate(bad):
        spoil(path, ("html", "truncated", "bomb", "missing")[number % 4])
    printed = run_chain(tmp_path / "a study", tmp_path / "run", tmp_path / "packed", f"SPLIT={split}")
    record = json.loads((tmp_path / "run" / "study.json").read_text())
    assert (record["found"], record["missing"], len(record["unreadable"])) == (117, 3, 9)
    assert "117 of 120 images found, 3 missing, 9 unreadable" in printed
    card = (tmp_path / "run" / "model_card.md").read_text()
    assert ("validation with test: 0" in card) == (split == "random_patients")
    assert ("scores are flattered" in card) == (split == "leaky_images")


@pytest.mark.parametrize(
    ("kind", "n_found", "recipe"),
    [("nih_sample/images", 304, "ours"), ("nih_original/images_001/images", 48, "original")],
)
def test_chain_on_real_films(shared_data, tmp_path, kind, n_found, recipe):
    """Real NIH files, a part of the images of the whole metadata: the chain ends and says what is missing."""
    study = tmp_path / "nih"
    study.mkdir()
    for path in (shared_data / "nih_metadata").iterdir():
        shutil.copy(path, study)
    target = study / ("images" if "sample" in kind else "images_001/images")
    target.parent.mkdir(exist_ok=True)
    target.symlink_to(shared_data / kind)
    run_chain(study, tmp_path / "run", tmp_path / "packed", f"RECIPE={recipe}")
    predictions = check_artifacts(tmp_path / "run")
    found = {path.name for path in (shared_data / kind).iterdir()}
    listed = set((study / "test_list.txt").read_text().split())
    assert set(predictions.loc[predictions["split"].eq("test"), "image"]) == found & listed
    record = json.loads((tmp_path / "run" / "study.json").read_text())
    assert (record["found"], record["missing"], record["unreadable"]) == (n_found, 112_120 - n_found, [])
