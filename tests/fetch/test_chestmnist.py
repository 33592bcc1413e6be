"""Tests of fetch.chestmnist: a made-up file of the same form becomes a study without patients."""

import dataclasses
import hashlib
import json
import tracemalloc
import types

import numpy as np
import pytest
from faulty_server import FaultyServer, cut_after
from PIL import Image

from helpers.fetch import fetch_chestmnist, list_chestmnist_file, plan_chestmnist
from helpers.fetch.archives import ArchiveError
from helpers.fetch.chestmnist import write_chestmnist_study
from helpers.fetch.downloads import DownloadError
from helpers.fetch.sources import RemoteFile
from helpers.packing import pack_study
from helpers.study import PATHOLOGIES, load_study, make_split

QUICK = {"pause": 0.01, "timeout": 5, "retries": 1}


def make_arrays(side=16, counts=(7, 3, 4)):
    rng = np.random.default_rng(3)
    arrays = {}
    for subset, n in zip(("train", "val", "test"), counts, strict=True):
        arrays[f"{subset}_images"] = rng.integers(0, 256, (n, side, side), dtype=np.uint8)
        arrays[f"{subset}_labels"] = (rng.random((n, 14)) < 0.2).astype(np.uint8)
    return arrays


def save(path, arrays, compress=True):
    (np.savez_compressed if compress else np.savez)(path, **arrays)
    return path


@pytest.fixture
def arrays():
    return make_arrays()


@pytest.fixture
def study(tmp_path, arrays):
    write_chestmnist_study(save(tmp_path / "a.npz", arrays), tmp_path / "study", 16, origin={"url": "here"})
    return tmp_path / "study"


@pytest.mark.parametrize("compress", [True, False])
def test_images_labels_and_subsets_are_those_of_the_file(tmp_path, arrays, compress):
    write_chestmnist_study(save(tmp_path / "a.npz", arrays, compress), tmp_path / "study", 16)
    study = load_study(tmp_path / "study")
    images, rows = study.list_images(), study.rows
    assert study.findings == PATHOLOGIES and len(images) == len(rows) == 14
    assert list(make_split(rows, "official")) == list(rows["split"])
    for subset in ("train", "val", "test"):
        some = rows[rows["split"].eq(subset)]
        assert list(some["image"]) == [f"images/chestmnist-{subset}-{number:06d}.png" for number in range(len(some))]
        assert np.array_equal(some[list(PATHOLOGIES)], arrays[f"{subset}_labels"])
        pixels = np.stack([np.asarray(Image.open(images[name])) for name in some["image"]])
        assert np.array_equal(pixels, arrays[f"{subset}_images"])


def test_no_patients_are_made_up(study):
    loaded = load_study(study)
    assert loaded.kind == "chestmnist" and not loaded.has_patients and loaded.rows["patient_id"].is_unique
    assert set(loaded.rows["sex"]) == set(loaded.rows["view"]) == {"unknown"} and loaded.rows["age"].isna().all()
    assert "CC BY 4.0" in loaded.about["terms"] and "Yang" in loaded.about["terms"]
    mark = json.loads((study / "study.json").read_text())["fetched"]
    assert mark["url"] == "here" and mark["counts"] == {"train": 7, "val": 3, "test": 4} and mark["complete"]


@pytest.mark.slow
def test_it_is_packed_like_any_study(study, tmp_path):
    loaded = load_study(study)
    packed = pack_study(
        loaded.rows, loaded.list_images(), tmp_path / "packed", split_name="official", side=32, study=loaded
    )
    assert not packed.excluded and len(packed.index) == 14 and not packed.has_patients
    again = load_study(tmp_path / "packed" / "study")  # the shards alone carry labels and terms, too
    assert again.kind == "chestmnist" and not again.has_patients and again.rows.equals(loaded.rows)
    assert again.about == loaded.about == packed.about


def test_a_quick_look_takes_the_first_images_of_each_subset(tmp_path, arrays):
    write_chestmnist_study(save(tmp_path / "a.npz", arrays), tmp_path / "study", 16, images=4)
    rows = load_study(tmp_path / "study").rows
    assert rows["split"].value_counts().to_dict() == {"train": 4, "val": 3, "test": 4}
    with pytest.raises(ValueError, match="holds ChestMNIST at 16 pixels, 4 images a subset, not at 16 pixels, all"):
        write_chestmnist_study(tmp_path / "a.npz", tmp_path / "study", 16)


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.fetch.chestmnist._CHUNK", 16)
    arrays = make_arrays(128, (200, 1, 1))  # 3 MB of images
    path = save(tmp_path / "a.npz", arrays, compress=False)
    del arrays
    tracemalloc.start()
    write_chestmnist_study(path, tmp_path / "study", 128)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5e6


def test_an_interrupted_call_starts_again_and_a_finished_one_is_left(tmp_path, arrays, monkeypatch):
    path, study = save(tmp_path / "a.npz", arrays), tmp_path / "study"

    def fail(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("helpers.fetch.chestmnist._write_images", fail)
        with pytest.raises(KeyboardInterrupt):
            write_chestmnist_study(path, study, 16)
    with monkeypatch.context() as patch:
        patch.setattr("helpers.fetch.chestmnist.local_draft", fail)  # the images are there, the labels are not
        with pytest.raises(KeyboardInterrupt):
            write_chestmnist_study(path, study, 16)
    write_chestmnist_study(path, study, 16)
    assert len(load_study(study).list_images()) == 14 and not list(study.glob("*.part"))
    before = {p: p.stat().st_mtime_ns for p in study.rglob("*")}
    write_chestmnist_study(tmp_path / "none.npz", study, 16)
    assert before == {p: p.stat().st_mtime_ns for p in study.rglob("*")}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"test_images": np.zeros((4, 20, 20), np.uint8)}, r"test_images is uint8 of shape \(4, 20, 20\)"),
        ({"val_images": np.zeros((3, 16, 16), np.float32)}, "val_images is float32"),
        ({"train_labels": np.zeros((7, 15), np.uint8)}, r"train_labels, of shape \(7, 15\), are no labels"),
        ({"train_labels": np.full((7, 14), 2, np.uint8)}, "train_labels, .* are no labels"),
        ({"val_labels": np.zeros((2, 14), np.uint8)}, "val_images is uint8"),
        ({"train_labels": np.full((7, 14), None)}, "Object arrays cannot be loaded"),
    ],
    ids=["side", "dtype", "classes", "values", "count", "pickle"],
)
def test_a_file_of_another_form_is_refused(tmp_path, arrays, change, said):
    with pytest.raises(ArchiveError, match=said):
        write_chestmnist_study(save(tmp_path / "a.npz", arrays | change), tmp_path / "study", 16)


def test_a_damaged_file_and_one_without_arrays_are_refused(tmp_path, arrays):
    path = save(tmp_path / "a.npz", arrays, compress=False)
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    with pytest.raises(ArchiveError, match="damaged, or not a file of MedMNIST"):
        write_chestmnist_study(path, tmp_path / "study", 16)
    del arrays["val_images"]
    with pytest.raises(ArchiveError, match=r"val_images\.npy"):
        write_chestmnist_study(save(path, arrays), tmp_path / "study", 16)


def test_another_study_in_the_folder_is_not_touched(phantom_dir, tmp_path, arrays):
    with pytest.raises(ValueError, match="holds another study; name another DATA_DIR"):
        write_chestmnist_study(save(tmp_path / "a.npz", arrays), phantom_dir, 16)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "labels.csv").write_text("image,Nodule\na.png,1\n")
    with pytest.raises(ValueError, match="own holds another study"):
        write_chestmnist_study(tmp_path / "a.npz", tmp_path / "own", 16)


def test_the_addresses_and_hashes_of_the_sizes():
    file = list_chestmnist_file(64)
    assert file.url == "https://zenodo.org/records/10519652/files/chestmnist_64.npz?download=1" and len(file.md5) == 32
    assert list_chestmnist_file(224, "http://localhost/x/").url == "http://localhost/x/chestmnist_224.npz"
    assert 3.8e9 < list_chestmnist_file(224).about < 4.5e9


@pytest.fixture
def served(tmp_path, arrays):
    data = save(tmp_path / "a.npz", arrays).read_bytes()
    with FaultyServer() as server:
        server.files["/chestmnist_64.npz"] = data
        url = f"{server.url}/chestmnist_64.npz"
        yield server, RemoteFile("chestmnist_64.npz", url, about=9, md5=hashlib.md5(data).hexdigest(), images=14)


def test_it_is_fetched_once_resumed_and_the_file_removed(served, tmp_path):
    server, file = served
    server.faults["/chestmnist_64.npz"] = [cut_after(2000)]
    folder = fetch_chestmnist(file, tmp_path / "study", 16, **QUICK)
    assert [sent for _, sent, _ in server.asked] == [None, "bytes=2000-"]
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["images", "labels.csv", "study.json"]
    assert json.loads((folder / "study.json").read_text())["fetched"]["md5"] == file.md5
    fetch_chestmnist(file, folder, 16, **QUICK)
    assert len(server.asked) == 2
    fetch_chestmnist(file, tmp_path / "kept", 16, keep_file=True, **QUICK)
    assert (tmp_path / "kept" / "chestmnist_64.npz").exists()


def test_a_wrong_md5_is_refused(served, tmp_path):
    server, file = served
    server.files["/chestmnist_64.npz"] = server.files["/chestmnist_64.npz"][:-1] + b"x"
    with pytest.raises(DownloadError, match=rf"MD5 \w+ is not the expected one, {file.md5}"):
        fetch_chestmnist(file, tmp_path / "study", 16, **QUICK)


def test_room_is_planned_and_checked(served, tmp_path, monkeypatch):
    _, file = served
    file = dataclasses.replace(file, about=2000)
    plan = plan_chestmnist(file, tmp_path / "study", 16, images=2, packed_side=32)
    assert plan.download == 2000 and plan.peak == 2000 + 6 * 256 and plan.kept == 6 * 256
    fetch_chestmnist(file, tmp_path / "study", 16, **QUICK)
    plan = plan_chestmnist(file, tmp_path / "study", 16)
    assert plan.download == 0 and plan.peak == plan.kept == 14 * 256
    usage = types.SimpleNamespace(free=2**26 + 5000)
    monkeypatch.setattr("helpers.fetch.downloads.shutil.disk_usage", lambda path: usage)
    with pytest.raises(DownloadError, match=r"bytes are needed and .*Fewer CHESTMNIST_IMAGES or"):
        plan_chestmnist(file, tmp_path / "other", 16)
