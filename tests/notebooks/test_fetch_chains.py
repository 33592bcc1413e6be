"""Notebooks on other studies: packed in two steps, real radiographs from a folder and a server, ChestMNIST, JSRT."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from chain import (
    DENSENET,
    XVISION,
    check_artifacts,
    check_localization,
    check_nodules,
    name_folders,
    read_counts,
    run_chain,
)
from faulty_server import FaultyServer, cut_after
from made_archives import make_zip

from helpers.export import fill_model_card
from helpers.fetch.chestmnist import write_chestmnist_study
from helpers.packing import load_packed_study, pack_study
from helpers.study import PATHOLOGIES

pytestmark = pytest.mark.slow
PREPARE = DENSENET[:1]


def test_two_hosts_pack_a_study_in_parts(phantom_dir, tmp_path, capsys):
    packed = tmp_path / "packed"
    settings = {"SPLIT": "random_patients", "RECORDS": "png", "SHARD_IMAGES": 16}
    run_chain(PREPARE, name_folders(phantom_dir, tmp_path / "host2", packed) | settings | {"PART": "2/2"}, draw=False)
    printed = capsys.readouterr().out
    assert "Part 2/2 is packed" in printed and "without PART" in printed and not (packed / "manifest.json").exists()
    of_host2 = {path.name: path.stat().st_mtime_ns for path in packed.glob("*.tfrecord")}
    run_chain(PREPARE, name_folders(phantom_dir, tmp_path / "run", packed) | settings, draw=False)
    study = load_packed_study(packed)
    assert len(study.index) == 90 and study.split_name == "random_patients"
    shards = {path.name: path.stat().st_mtime_ns for path in packed.glob("*.tfrecord")}
    assert 0 < len(of_host2) < len(shards) and of_host2.items() <= shards.items()


@pytest.fixture
def real_study(shared_data, tmp_path):
    """A function that lays real radiographs of a kind and the whole metadata of NIH into a folder."""

    def lay(kind, place):
        shutil.copytree(shared_data / "nih_metadata", tmp_path / "nih")
        (tmp_path / "nih" / place).parent.mkdir(exist_ok=True)
        (tmp_path / "nih" / place).symlink_to(shared_data / kind)
        return tmp_path / "nih", {path.name for path in (shared_data / kind).iterdir()}

    return lay


def test_chain_on_real_images_with_the_original_recipe(real_study, tmp_path):
    """Real NIH files, only some of the images in the metadata: the notebooks report what is missing."""
    study, found = real_study("nih_sample/images", "images")
    settings = name_folders(study, tmp_path / "run", tmp_path / "packed") | {"RECIPE": "original", "SOURCE": "packed"}
    run_chain(DENSENET[:4], settings, draw=False)
    predictions = check_artifacts(tmp_path / "run", is_exported=False)
    check_localization(tmp_path / "run")
    # Few of the images are of test patients, so the network of the run cannot be used.
    counts = run_chain([XVISION], settings | {"BACKBONES": "VGG16"}, until="cohort = gather_cohort()")["cohort"].counts
    assert (counts["Nodule"], counts["Normal"], counts["boxes"]) == (20, 116, 0)
    listed = set((study / "test_list.txt").read_text().split())
    assert set(predictions.loc[predictions["split"].eq("test"), "image"]) == found & listed
    assert read_counts(tmp_path / "run") == (304, 112_120 - 304, 0)


def test_real_images_of_full_size_in_numbered_folders(real_study, tmp_path):
    """Packing is all that differs from the chain above."""
    study, found = real_study("nih_original/images_001/images", "images_001/images")
    run_chain(PREPARE, name_folders(study, tmp_path / "run", tmp_path / "packed"), draw=False)
    packed = load_packed_study(tmp_path / "packed")
    assert set(packed.index["image"]) == found and not packed.excluded
    assert read_counts(tmp_path / "run") == (48, 112_120 - 48, 0)


@pytest.fixture
def hub(shared_data):
    """A server laid out like the mirror on Hugging Face: the real metadata, and 48 real radiographs in two archives."""
    images = sorted((shared_data / "nih_original" / "images_001" / "images").iterdir())
    with FaultyServer() as server:
        for name in ("Data_Entry_2017_v2020.csv", "train_val_list.txt", "test_list.txt", "BBox_List_2017.csv"):
            server.files[f"/data/{name}"] = (shared_data / "nih_metadata" / name).read_bytes()
        for number, part in enumerate((images[:30], images[30:]), 1):
            data = make_zip({path.name: path.read_bytes() for path in part})
            server.files[f"/data/images/images_{number:03d}.zip"] = data
        yield server, images


def test_images_are_streamed_from_a_mirror_into_shards(hub, tmp_path):
    """Real radiographs of 1024 pixels, a cut connection, and the same shards as from the files themselves."""
    server, images = hub
    server.faults["/data/images/images_002.zip"] = [cut_after(3_000_000)]
    settings = {"FETCH": "hugging_face", "ARCHIVES": "1-2", "MIRROR": server.url}
    run_chain(PREPARE, name_folders(tmp_path / "nih", tmp_path / "run", tmp_path / "packed") | settings, draw=False)
    packed = load_packed_study(tmp_path / "packed")
    assert set(packed.index["image"]) == {path.name for path in images} and not packed.excluded
    assert not list((tmp_path / "nih").rglob("*.png")) and not list((tmp_path / "nih").rglob("*.zip"))
    rows = packed.index.rename(columns={"subset": "split"})
    paths = {path.name: path for path in images}
    again = pack_study(rows, paths, tmp_path / "again", split_name="official", side=packed.side, shard_images=128)
    assert [s["sha256"] for shards in packed.shards.values() for s in shards] == [
        s["sha256"] for shards in again.shards.values() for s in shards
    ]
    assert read_counts(tmp_path / "run")[0] == len(images)


def test_no_result_on_chestmnist_claims_patients(tmp_path, capsys):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 60), ("val", 24), ("test", 30)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (n, 64, 64), dtype=np.uint8)
        arrays[f"{part}_labels"] = (rng.random((n, 14)) < 0.3).astype(np.uint8)
    np.savez(tmp_path / "a.npz", **arrays)
    write_chestmnist_study(tmp_path / "a.npz", tmp_path / "mnist", 64)
    run_dir = tmp_path / "run"
    settings = {"FETCH": "chestmnist", "CHESTMNIST_IMAGES": 0}
    run_chain(DENSENET[:4], name_folders(tmp_path / "mnist", run_dir, tmp_path / "packed") | settings, draw=False)
    printed, card = capsys.readouterr().out, fill_model_card(run_dir)
    predictions = check_artifacts(run_dir, has_patients=False, is_exported=False)
    assert not len(check_localization(run_dir))
    assert predictions["patient_id"].is_unique and set(predictions["split"]) == {"val", "test"}
    for part, group in predictions.sort_values("image").groupby("split"):
        assert np.array_equal(group[[f"label_{name}" for name in PATHOLOGIES]], arrays[f"{part}_labels"])
    assert pd.read_csv(run_dir / "aucs.csv")["n_pos_patients"].isna().all()
    assert json.loads((run_dir / "run.json").read_text())["split"]["patients"] == {}
    claims = re.findall(r"(?:\d|over|of|resampled) patients?\b", printed + card)
    assert not claims
    assert "intervals are over images" in printed and "No floors" in printed
    assert "over images (no patient ids)" in card


def test_nodules_of_jsrt(shared_data, tmp_path):
    """Real radiographs with positions of their nodules, and no run of the network that BACKBONES has by default."""
    settings = name_folders(tmp_path / "none", tmp_path / "run", tmp_path / "packed")
    settings |= {"SOURCE": "folder", "SOURCE_DIR": str(shared_data / "jsrt")}
    with pytest.raises(AssertionError, match="has no run of notebook 2: run that first, or set BACKBONES"):
        run_chain([XVISION], settings)
    new_image = str(shared_data / "dicom" / "RG1_J2KI.dcm")
    run_chain([XVISION], settings | {"BACKBONES": "VGG16", "IMAGE": new_image}, draw=False)
    study = check_nodules(tmp_path / "run" / "xvision-jsrt")
    assert (study["counts"]["Nodule"], study["counts"]["Normal"], study["counts"]["boxes"]) == (154, 93, 154)
    assert study["saliency"][0]["n_images"] == 3
