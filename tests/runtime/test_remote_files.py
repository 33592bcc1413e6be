"""Studies, packed shards and runs in Google Cloud Storage: the helpers and the whole chain against an emulator.

TensorFlow's own file system does all the reading and writing, as on a TPU machine. What an emulator does not show: real
credentials and permissions, speed, throttling, and lists of more than one page.
"""

import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import bucket
import numpy as np
import pandas as pd
import papermill
import pytest
import tensorflow as tf
from chain import (
    DENSENET,
    XVISION,
    check_artifacts,
    check_localization,
    check_nodules,
    name_folders,
    run_chain,
)
from own_study import write_own_study

from helpers.packing import load_packed_study, pack_study, resolve_paths
from helpers.packing.image_stream import ImageFiles
from helpers.runtime.files import (
    as_path,
    copy_file,
    hash_file,
    local_copy,
    local_draft,
    measure_file,
    read_csv,
    read_text,
    remove_folder,
    write_text,
)
from helpers.runtime.settings import ROOT, write_json
from helpers.study import (
    PATHOLOGIES,
    list_images,
    load_boxes,
    load_metadata,
    load_official_lists,
    load_study,
    make_split,
    match_images,
    write_synthetic_study,
)
from helpers.training import CheckpointStore

sys.path.insert(0, str(ROOT / "scripts"))
import run_notebooks

pytestmark = pytest.mark.slow  # through a server, and TensorFlow's file system


@pytest.fixture(scope="module")
def requests(tmp_path_factory):
    """Serves the bucket gs://bucket, empty at first; gives the list of requests so far."""
    if reason := bucket.why_not():
        pytest.skip(reason)
    patch = pytest.MonkeyPatch()
    with bucket.serve_bucket(tmp_path_factory.mktemp("certificate")) as (environment, requests):
        for name, value in environment.items():
            patch.setenv(name, value)
        yield requests
        patch.undo()


@pytest.fixture
def folder(requests, request):
    """A folder for each test."""
    return as_path("gs://bucket") / request.node.name


@pytest.fixture(scope="module")
def remote_study(requests, phantom_dir):
    """`phantom_dir` in the bucket."""
    for path in phantom_dir.rglob("*.*"):
        copy_file(path, as_path("gs://bucket/nih") / path.relative_to(phantom_dir).as_posix())
    return "gs://bucket/nih"


@pytest.fixture(scope="module")
def remote_packed(remote_study):
    """The study packed from the bucket into the bucket, as `packed` is on disk."""
    images = list_images(remote_study)
    rows, _ = match_images(load_study(remote_study).rows, images)
    rows["split"] = make_split(rows, val_share=0.15)
    pack = (rows, images, "gs://bucket/packed")
    return pack_study(*pack, split_name="official", side=48, shard_images=16), pack


def download(folder, target):
    """Copies a folder of the bucket to disk."""
    for place, _, names in tf.io.gfile.walk(str(folder)):
        for name in names:
            copy_file(as_path(place) / name, target / place.removeprefix(str(folder)).strip("/") / name)
    return target


def test_paths_behave_as_local_ones(folder):
    path = folder / "a" / "b.txt"
    assert not path.exists() and not folder.exists()
    write_text(path, "ä\r\n")
    assert path.is_file() and folder.is_dir() and read_text(path) == "ä\r\n"
    assert [*(folder / "a").glob("*.txt")] == [path] == [*(folder / "a").iterdir()]
    assert measure_file(path) == 4 and str(path) == f"{folder}/a/b.txt"
    copy_file(path, folder / "c.txt")
    remove_folder(folder / "a")
    remove_folder(folder / "a")
    assert [*folder.iterdir()] == [folder / "c.txt"]
    for use in (read_text, measure_file, hash_file, read_csv):
        with pytest.raises(FileNotFoundError):
            use(path)


def test_a_block_that_fails_leaves_the_object_as_it_was(folder, requests):
    write_text(folder / "a.h5", "old")
    n_requests = len(requests)
    with pytest.raises(KeyboardInterrupt), local_draft(folder / "a.h5") as draft:
        draft.write_text("half")
        raise KeyboardInterrupt
    assert len(requests) == n_requests and read_text(folder / "a.h5") == "old"
    with local_copy(folder / "a.h5") as file:
        assert file.read_text() == "old" and file.name == "a.h5"
    assert not file.exists() and not draft.exists()


def test_settings_pass_a_bucket_through(requests):
    paths = resolve_paths("gs://bucket/nih", "gs://bucket/runs/1", "", "official", "full")
    assert str(paths.study) == "gs://bucket/nih" and str(paths.run) == "gs://bucket/runs/1"
    assert paths.packed == ROOT / "data" / "packed" / "nih-official-full"
    paths = resolve_paths("data/phantom", "gs://bucket/runs/1", "gs://bucket/p/", "official", "full")
    assert str(paths.packed) == "gs://bucket/p" and paths.study == ROOT / "data" / "phantom"
    assert paths.run.exists()


def test_a_study_reads_the_same_from_a_bucket(remote_study, phantom_dir):
    pd.testing.assert_frame_equal(load_metadata(remote_study), load_metadata(phantom_dir))
    pd.testing.assert_frame_equal(load_boxes(remote_study), load_boxes(phantom_dir))
    assert load_official_lists(remote_study) == load_official_lists(phantom_dir)
    images, local = list_images(remote_study), list_images(phantom_dir)
    assert list(images) == list(local) and all(str(images[name]).startswith("gs://") for name in images)
    with pytest.raises(FileNotFoundError, match="gs://bucket/nowhere"):
        load_metadata("gs://bucket/nowhere")


@pytest.mark.parametrize("kind", ["own", "classes"])
def test_other_layouts_read_the_same_from_a_bucket(requests, tmp_path, kind):
    write_own_study(tmp_path / kind, n_images=4)
    if kind == "classes":
        for name in ("labels.csv", "boxes.csv"):
            (tmp_path / kind / name).unlink()
        (tmp_path / kind / "No Finding").mkdir()
        (tmp_path / kind / "ward" / "000.png").rename(tmp_path / kind / "No Finding" / "000.png")
    remote = as_path("gs://bucket") / kind
    for path in (path for path in (tmp_path / kind).rglob("*") if path.is_file()):
        copy_file(path, remote / path.relative_to(tmp_path / kind).as_posix())
    local, study = load_study(tmp_path / kind), load_study(str(remote))
    pd.testing.assert_frame_equal(study.rows, local.rows)
    pd.testing.assert_frame_equal(study.boxes, local.boxes)
    assert list(study.list_images()) == list(local.list_images()) and study.about == local.about
    images = ImageFiles(study.list_images(), 32).read(local.rows["image"])
    assert list(images) == list(ImageFiles(local.list_images(), 32).read(local.rows["image"]))


def test_a_synthetic_study_is_the_same_in_a_bucket(folder, tmp_path):
    settings = {"n_images": 12, "size": 32, "n_workers": 1}
    write_synthetic_study(tmp_path, **settings)
    assert write_synthetic_study(folder, **settings)["written"]
    assert not write_synthetic_study(str(folder), **settings)["written"]
    with pytest.raises(ValueError, match="delete that folder"):
        write_synthetic_study(folder, **settings, seed=1)
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*"))
    assert all((folder / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)
    assert not (folder / "phantom.json.part").exists()


def test_packing_in_a_bucket_writes_the_bytes_of_packing_on_disk(remote_packed, packed):
    study, _ = remote_packed
    local = {path.name: path.read_bytes() for path in packed.folder.iterdir()}
    assert {path.name: path.read_bytes() for path in study.folder.iterdir()} == local
    pd.testing.assert_frame_equal(study.index, packed.index)


def test_a_second_packing_writes_nothing(remote_packed, requests):
    before = len(requests)
    pack_study(*remote_packed[1], split_name="official", side=48, shard_images=16)
    uploaded = [address for method, address in requests[before:] if method == "PUT"]
    assert not uploaded


def test_damage_in_a_bucket_is_found_and_mended(remote_packed, packed, requests):
    study, pack = remote_packed
    shard = study.folder / study.shards["val"][0]["file"]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"?")
    with pytest.raises(ValueError, match=f"{shard.name} does not match"):
        load_packed_study(study.folder)
    before = len(requests)
    pack_study(*pack, split_name="official", side=48, shard_images=16)
    assert shard.read_bytes() == content
    uploaded = [address for method, address in requests[before:] if method == "PUT" and "tfrecord&" in address]
    assert len(uploaded) == 1 and shard.name in uploaded[0]


def test_a_missing_image_is_left_out_and_an_unreachable_bucket_is_an_error(
    remote_packed, folder, tmp_path, monkeypatch
):
    """Images are never left out because the network is down, and a write that fails is an OSError."""
    rows, images, _ = remote_packed[1]
    monkeypatch.setattr("helpers.packing.image_stream.count_cores", lambda: 1)
    settings = {"split_name": "official", "side": 48}
    name = rows["image"].iloc[0]
    study = pack_study(rows, images | {name: folder / name}, folder, **settings)
    assert [image["image"] for image in study.excluded] == [name]

    class Outage:
        """A progress bar under which the network goes down after the first image."""

        def update(self, n):
            monkeypatch.setenv("https_proxy", "http://localhost:9")  # where nothing listens

        def close(self):
            pass

    with pytest.raises(tf.errors.OpError):
        pack_study(rows, images, tmp_path, **settings, progress=lambda **_: Outage())
    with pytest.raises(OSError, match=r"gs://bucket/a\.txt: "):
        write_text("gs://bucket/a.txt", "new")
    left = {path.name for path in tmp_path.iterdir()}  # finished shards alone, each with its receipt
    shards = {name.removesuffix(".json") for name in left}
    assert all(name.endswith(".tfrecord") for name in shards) and left == shards | {f"{name}.json" for name in shards}


def test_the_checkpoints_of_a_run_come_back_from_a_bucket(folder, tmp_path):
    """On another machine, whose own disk is empty."""
    stores = [CheckpointStore(str(folder / "state"), tmp_path / machine) for machine in "ab"]
    for serial in (1, 2, 3):
        stores[0].write({"weights": np.full(9, serial)}, {"serial": serial})
    arrays, meta = stores[1].read()
    assert meta == {"serial": 3} and (arrays["weights"] == 3).all()
    newest = folder / "state" / "state.bin"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="damaged"):
        assert stores[1].read()[1] == {"serial": 2}
    stores[0].clear()
    assert stores[1].read() == (None, None)
    for store in stores:
        store.close()


def export(settings):
    run_chain(DENSENET[4:], settings, draw=False)


def test_chain_of_notebooks_in_a_bucket(remote_study, tmp_path, monkeypatch, capsys):
    """As `make run DATA_DIR=gs://... RUN_DIR=gs://...`: the artifacts are those of a run on disk."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))  # for the local copies of checkpoints
    monkeypatch.setattr(tempfile, "tempdir", None)
    settings = name_folders(remote_study, "gs://bucket/runs/one", "gs://bucket/runs/packed")
    settings |= {"SOURCE_DIR": str(tmp_path / "nodules"), "FEATURES_DIR": str(tmp_path / "features")}
    run_chain(DENSENET[:4], settings, draw=False)
    # Loading a SavedModel keeps Python's lock, without which the bucket, in this process, cannot answer.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(export, settings).result()
    run_chain([XVISION], settings | {"BACKBONES": "trained"}, draw=False)
    runs = download("gs://bucket/runs", tmp_path / "runs")
    predictions = check_artifacts(runs / "one")
    check_localization(runs / "one")
    check_nodules(runs / "one" / "xvision-phantom")
    test_list = read_text(f"{remote_study}/test_list.txt").split()
    assert set(predictions.loc[predictions["split"].eq("test"), "image"]) == set(test_list)
    assert json.loads((runs / "one" / "run.json").read_text())["settings"]["RUN_DIR"] == "gs://bucket/runs/one"
    assert not any(name.startswith("gs:") for name in os.listdir(ROOT))  # a path taken for a local one would be there
    assert not any(name.startswith("gs:") for name in os.listdir(ROOT / "notebooks"))
    capsys.readouterr()
    executed = []
    monkeypatch.setattr(sys, "argv", ["run_notebooks.py", "--run-dir", "gs://bucket/runs/one"])
    monkeypatch.setattr(run_notebooks, "execute_into", lambda folder, name, *_: executed.append(name))
    monkeypatch.setattr(run_notebooks, "call", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(run_notebooks.signal, "signal", lambda *_: None)
    monkeypatch.setenv("TQDM_MININTERVAL", "1")
    run_notebooks.main()
    printed = capsys.readouterr().out
    assert executed == [*DENSENET, XVISION]
    assert "90 of 90 images found" in printed and "Top 5 of" in printed and "not for clinical use" in printed
    assert all(name in printed for name in PATHOLOGIES) and "Heatmaps point" in printed
    assert "Nodule (phantom, 60 images), on" in printed and "figures    gs://bucket/runs/one/figures" in printed


def test_executed_notebooks_are_copied_to_a_bucket(folder, monkeypatch):
    """The script itself must not load TensorFlow, so a process of its own reaches the bucket."""
    write_json(folder / "run.json", {"pause": "later"})
    assert run_notebooks.call(run_notebooks.read_pause, folder) == "later"
    errors = [papermill.PapermillExecutionError(0, 3, "x", "ValueError", "no", []), None]

    def execute(source, target, *_, **__):
        Path(target).write_text("executed")
        if error := errors.pop(0):
            raise error

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    monkeypatch.setattr(run_notebooks, "call", lambda function, *arguments: function(*arguments))
    with pytest.raises(SystemExit, match=r"no\nSee gs://.*/01_prepare_data\.failed\.ipynb"):
        run_notebooks.execute_into(folder / "executed", DENSENET[0], {})
    assert read_text(folder / "executed" / "01_prepare_data.failed.ipynb") == "executed"
    run_notebooks.execute_into(folder / "executed", DENSENET[0], {})
    names = {path.name for path in (folder / "executed").iterdir()}
    assert names == {"01_prepare_data.ipynb", "01_prepare_data.log"}
