"""Chains of notebooks on studies that are fetched: real radiographs from a server of this machine, and ChestMNIST."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from chain import DENSENET, check_artifacts, run_chain
from faulty_server import FaultyServer, cut_after
from made_archives import make_zip

from helpers.fetch import write_chestmnist_study
from helpers.packing import load_packed_study, pack_study
from helpers.study import PATHOLOGIES


@pytest.fixture
def hub(shared_data):
    """A server with the layout of the mirror on Hugging Face: the real metadata and 48 real radiographs in two archives."""
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
    server.faults["/data/images/images_002.zip"] = [cut_after(0), cut_after(3_000_000)]  # the first asks for the size
    settings = ("FETCH=hugging_face", "ARCHIVES=1-2", f"MIRROR={server.url}")
    run_chain(tmp_path / "nih", tmp_path / "run", tmp_path / "packed", *settings, only=DENSENET[:1])
    packed = load_packed_study(tmp_path / "packed")
    assert set(packed.index["image"]) == {path.name for path in images} and not packed.excluded
    assert not list((tmp_path / "nih").rglob("*.png")) and not list((tmp_path / "nih").rglob("*.zip"))
    rows = packed.index.rename(columns={"subset": "split"})
    paths = {path.name: path for path in images}
    again = pack_study(rows, paths, tmp_path / "again", split_name="official", side=packed.side, shard_images=128)
    assert [s["sha256"] for shards in packed.shards.values() for s in shards] == [
        s["sha256"] for shards in again.shards.values() for s in shards
    ]
    assert json.loads((tmp_path / "run" / "data_report.json").read_text())["found"] == len(images)


def shown(notebook):
    """Returns all that the cells of an executed notebook put out as text."""
    texts = []
    for cell in json.loads(notebook.read_text())["cells"]:
        for output in cell.get("outputs", []):
            texts += [output.get("text", ""), output.get("data", {}).get("text/plain", "")]
    return "\n".join("".join(text) for text in texts)


def test_chestmnist_goes_through_all_notebooks_and_no_result_claims_patients(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 60), ("val", 24), ("test", 30)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (n, 64, 64), dtype=np.uint8)
        arrays[f"{part}_labels"] = (rng.random((n, 14)) < 0.3).astype(np.uint8)
    np.savez(tmp_path / "a.npz", **arrays)
    write_chestmnist_study(tmp_path / "a.npz", tmp_path / "mnist", 64)
    settings = ("FETCH=chestmnist", "SPLIT=chestmnist", "CHESTMNIST_IMAGES=0")
    run_dir = tmp_path / "run"
    run_chain(tmp_path / "mnist", run_dir, tmp_path / "packed", *settings)
    predictions = check_artifacts(run_dir, has_patients=False)
    assert predictions["patient_id"].is_unique and set(predictions["split"]) == {"val", "test"}
    for part, group in predictions.sort_values("image").groupby("split"):
        assert np.array_equal(group[[f"label_{name}" for name in PATHOLOGIES]], arrays[f"{part}_labels"])
    assert pd.read_csv(run_dir / "aucs.csv")["n_pos_patients"].isna().all()
    assert json.loads((run_dir / "run.json").read_text())["split"]["patients"] == {}
    texts = {path.stem: shown(path) for path in (run_dir / "executed").glob("*.ipynb")}
    texts["card"] = (run_dir / "model_card.md").read_text()
    claims = {name: re.findall(r"(?:\d|over|of|resampled) patients?\b", text) for name, text in texts.items()}
    assert not any(claims.values()), claims
    assert "intervals are over images" in texts["03_evaluate"] and "No floors" in texts["03_evaluate"]
    assert "over images (no patient ids)" in texts["card"]
