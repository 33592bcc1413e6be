"""Tests of fetch.streaming, against a server on this machine that cuts, lies and refuses."""

import dataclasses
import errno
import hashlib
import os
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bars import Bars
from faulty_server import FaultyServer, answer, cut_after, serve
from made_archives import LISTS, make_image, make_tar, make_zip, serve_study

from helpers.fetch import fetch_study, list_cached_images, plan_fetch, streaming
from helpers.fetch.archives import ArchiveError
from helpers.fetch.downloads import DownloadError
from helpers.fetch.sources import RemoteFile, RemoteStudy
from helpers.packing import pack_study
from helpers.packing.image_cache import load_image_cache
from helpers.study import PATHOLOGIES, list_images

SIDE = 32
QUICK = {"pause": 0.01, "timeout": 5, "retries": 2}
FIRST, SECOND = "/images_001.tar.gz", "/images_002.tar.gz"
CACHED = [*(f"films-32/images_00{n}.{ending}" for n in (1, 2) for ending in ("json", "npy")), *sorted(LISTS)[::-1]]
STAGES = ("download_file", "unpack_archive", "shrink_images", "remove_folder")


@pytest.fixture
def server():
    with FaultyServer() as server:
        yield server


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def asked(server, ending=".gz"):
    return [path for path, *_ in server.asked if path.endswith(ending)]


def make_rows(images):
    rows = pd.DataFrame({"image": sorted(images), "follow_up": 0, "age": 50.0, "sex": "F", "view": "PA"})
    rows["patient_id"] = np.arange(len(rows)) + 1
    rows["split"] = np.resize(["train", "train", "val", "test"], len(rows))
    return rows.assign(**dict.fromkeys(PATHOLOGIES, np.uint8(0)))


def read_shards(study):
    return {path.name: path.read_bytes() for path in Path(study.folder).iterdir() if path.suffix != ".json"}


@pytest.mark.slow
def test_a_streamed_study_is_fetched_once_and_packs_to_the_same_bytes_as_a_folder_of_it(server, tmp_path):
    study, content = serve_study(server)
    caches = fetch_study(study, tmp_path / "nih", side=SIDE, **QUICK)
    assert names(tmp_path / "nih") == sorted(CACHED) and sorted(list_cached_images(caches)) == sorted(content)
    with pytest.raises(FileNotFoundError, match=r"no images, only films-32, .*FETCH and .*SIDE"):
        list_images(tmp_path / "nih")
    assert fetch_study(study, tmp_path / "whole", **QUICK) == []
    images = list_images(tmp_path / "whole")
    assert {name: path.read_bytes() for name, path in images.items()} == content
    options = {"split_name": "random_patients", "side": SIDE, "shard_images": 4}
    one = pack_study(make_rows(content), caches, tmp_path / "one", **options)
    other = pack_study(make_rows(content), images, tmp_path / "other", **options)
    assert len(one.index) == 6 and read_shards(one) == read_shards(other)

    server.asked.clear()
    assert [len(cache.images) for cache in fetch_study(study, tmp_path / "nih", side=SIDE, **QUICK)] == [3, 3]
    assert not server.asked
    fetch_study(dataclasses.replace(study, archives=study.archives[:1]), tmp_path / "nih", side=48, **QUICK)
    assert asked(server) == [FIRST]  # images of another side have to be fetched again


@pytest.mark.parametrize("make", [make_tar, make_zip], ids=["tar", "zip"])
def test_images_of_both_kinds_of_archives_that_exist_already_are_shrunk_and_stay(server, tmp_path, make):
    images = {f"{k:08d}_000.png": make_image(k) for k in range(3)}
    ending = "zip" if make is make_zip else "tar.gz"
    server.files["/a"] = make(images)
    study = RemoteStudy((), (RemoteFile(f"images_001.{ending}", f"{server.url}/a", about=1, images=9),), "")
    fetch_study(study, tmp_path, **QUICK)
    assert set(list_images(tmp_path)) == set(images)
    server.asked.clear()
    (cache,) = fetch_study(study, tmp_path, side=SIDE, **QUICK)
    assert cache.images == sorted(images) and not cache.excluded
    assert not server.asked and set(list_images(tmp_path)) == set(images)


def test_a_wrong_answer_ends_it_names_the_archive_and_keeps_what_is_done(server, tmp_path):
    study, _ = serve_study(server)
    size = study.archives[1].size
    page = b"<!DOCTYPE html><html><body>Please log in</body></html>"
    faults = {
        "a web page came instead of images_002.tar.gz": serve(kind="text/html"),
        "are expected; is this the right file": answer(200, page),
        "HTTP 404": answer(404),
        "does not begin like a .gz file": answer(200, bytes(size)),
        r"MD5 \w+ is not the expected": answer(200, b"\x1f\x8b" + bytes(size - 2)),
    }
    for message, fault in faults.items():
        server.faults[SECOND] = [fault]
        with pytest.raises(
            DownloadError, match=rf"^images_002\.tar\.gz: .*{message}.*Kept: images_001\.tar\.gz\. Run this again"
        ):
            fetch_study(study, tmp_path, side=SIDE, **QUICK)
        assert load_image_cache(tmp_path / "films-32", "images_001") and not list(tmp_path.rglob("*.part"))
    server.asked.clear()
    assert len(fetch_study(study, tmp_path, side=SIDE, **QUICK)) == 2
    assert asked(server) == [SECOND]


def test_a_small_file_that_cannot_be_downloaded_names_the_page_and_the_folder(server, tmp_path):
    study, _ = serve_study(server)
    server.files["/test_list.txt"] = b"something else"
    with pytest.raises(
        DownloadError, match=r"SHA-256 .*Or download test_list\.txt from https://example\.org/study by hand"
    ):
        fetch_study(study, tmp_path, side=SIDE, **QUICK)
    assert not asked(server)  # before any archive


def test_known_metadata_of_another_source_is_kept(shared_data, server, tmp_path):
    """The label file of Box where Hugging Face's is listed; its header differs."""
    data = (shared_data / "nih_metadata" / "Data_Entry_2017_v2020.csv").read_bytes()
    (tmp_path / "Data_Entry_2017_v2020.csv").write_bytes(data.replace(b"Patient Gender", b"Patient Sex", 1))
    file = RemoteFile("Data_Entry_2017_v2020.csv", f"{server.url}/x", sha256=hashlib.sha256(data).hexdigest())
    fetch_study(RemoteStudy((file,), (), ""), tmp_path, side=SIDE, **QUICK)
    assert not server.asked


def test_an_archive_that_unpacks_to_more_than_planned_or_holds_other_images_is_refused(server, tmp_path):
    study, _ = serve_study(server, n_archives=1)
    archive = dataclasses.replace(study.archives[0], url=f"{server.url}/a", size=None, md5=None)
    contents = [
        ({"00000001_000.png": make_image(0, 1000) + bytes(3_000_000)}, r"images_001\.tar\.gz: .*unpacks to more than"),
        ({}, "0 PNGs are in it, up to 3 are expected"),
        ({f"{k:08d}_000.png": make_image(k, 16) for k in range(4)}, "4 PNGs are in it, up to 3 are expected"),
    ]
    for number, (images, message) in enumerate(contents):
        server.files["/a"] = make_tar(images)
        with pytest.raises(ArchiveError, match=message):
            fetch_study(RemoteStudy((), (archive,), ""), tmp_path / str(number), side=SIDE, **QUICK)


def test_a_disk_that_fills_up_on_the_way_is_named_with_what_is_kept(server, tmp_path, monkeypatch):
    study, _ = serve_study(server)
    unpack = streaming.unpack_archive

    def fill(archive, folder, **options):
        if "002" in folder.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        return unpack(archive, folder, **options)

    monkeypatch.setattr(streaming, "unpack_archive", fill)
    with pytest.raises(
        DownloadError, match=r"^images_002\.tar\.gz: .*No space left.*images_002'\. Kept: images_001\.tar\.gz\. Run"
    ):
        fetch_study(study, tmp_path, **QUICK)


def test_nothing_is_fetched_beside_another_process_into_a_bucket_or_into_another_study(server, tmp_path):
    study, _ = serve_study(server)
    refused = pytest.raises(RuntimeError, match=r"another process fetches into .*/nih")
    with streaming.claim_folder(tmp_path / "nih"), refused:
        fetch_study(study, tmp_path / "nih", side=SIDE, **QUICK)
    for call in (plan_fetch, fetch_study):
        with pytest.raises(ValueError, match="Fetch into a local DATA_DIR; PACKED_DIR may be in the bucket"):
            call(study, "gs://bucket/nih", side=SIDE)
        for mark in ("labels.csv", "phantom.json"):
            (tmp_path / mark).mkdir(exist_ok=True)
            (tmp_path / mark / mark).write_text("{}")
            with pytest.raises(ValueError, match=f"holds another study, by its {mark}: name another DATA_DIR"):
                call(study, tmp_path / mark, side=SIDE)
    assert not server.asked
    fetch_study(study, tmp_path / "nih", **QUICK)  # the other process has ended


class Killed(BaseException):
    """Stands for a kill: nothing that handles errors may handle it."""


def test_killed_before_or_after_any_stage_it_continues_there(server, tmp_path, monkeypatch):
    study, images = serve_study(server)
    kills = [(stage, when) for stage in STAGES for when in ("before", "after")]
    ahead = []  # the next kill

    def killable(stage, function):
        def call(*arguments, **options):
            is_image_stage = "images_00" in str(arguments)  # and not of the lists
            if is_image_stage and ahead == [(stage, "before")]:
                raise Killed
            result = function(*arguments, **options)
            if is_image_stage and ahead == [(stage, "after")]:
                raise Killed
            return result

        return call

    for stage in STAGES:
        monkeypatch.setattr(streaming, stage, killable(stage, getattr(streaming, stage)))
    for kill in kills:
        ahead[:] = [kill]
        with pytest.raises(Killed):
            fetch_study(study, tmp_path, side=SIDE, **QUICK)
    ahead.clear()
    (tmp_path / "films-32" / "part-0123456789ab-images_002.npy").write_bytes(b"half")  # of a kill while it shrank
    caches = fetch_study(study, tmp_path, side=SIDE, **QUICK)
    assert sorted(list_cached_images(caches)) == sorted(images) and names(tmp_path) == sorted(CACHED)
    assert asked(server) == [FIRST, SECOND]  # no whole download came twice


def measure(folder):
    total = 0
    for path in Path(folder).rglob("*"):
        total += path.stat().st_size if path.is_file() else 0
    return total


@pytest.mark.parametrize("stream", [True, False])
def test_the_disk_never_holds_more_than_the_plan_says(server, tmp_path, monkeypatch, stream):
    study, images = serve_study(server, n_archives=3, images=4, side=160)
    plan = plan_fetch(study, tmp_path, side=96, stream=stream)
    highest = []

    def watched(function):
        def call(*arguments, **options):
            result = function(*arguments, **options)
            highest.append(measure(tmp_path))
            return result

        return call

    # At this rename both the archive and all its images lie on the disk.
    monkeypatch.setattr("helpers.fetch.archives.os.replace", watched(os.replace))
    for stage in STAGES:
        monkeypatch.setattr(streaming, stage, watched(getattr(streaming, stage)))
    fetch_study(study, tmp_path, side=96 if stream else None, **QUICK)
    slack = 8_000  # of headers, lists and the caches' JSON files, compared with 310,000 bytes of images
    whole = sum(map(len, images.values()))
    assert 0.8 * plan.peak < max(highest) <= plan.peak + slack
    assert measure(tmp_path) <= plan.kept + slack and plan.download == sum(a.size for a in study.archives)
    assert max(highest) < whole if stream else max(highest) > whole
    again = plan_fetch(study, tmp_path, side=96, stream=stream)
    assert again.download == 0 and again.peak == again.kept <= plan.kept + slack


def test_room_is_checked_before_anything_is_fetched_and_counts_what_is_here(server, tmp_path, monkeypatch):
    study, _ = serve_study(server, side=100)
    plan = plan_fetch(study, tmp_path, side=SIDE, packed_dir=tmp_path / "packed" / "new")
    assert str(plan).startswith(
        "0 MB to download. The study's folder takes at most 0 MB at a time, of which 0 MB stay;"
    )
    assert "takes at most 15.0 GB at a time" in str(dataclasses.replace(plan, peak=15_040_000_000))
    assert not server.asked
    server.faults[FIRST] = [cut_after(20_000)] + [cut_after(0)] * 9
    with pytest.raises(
        DownloadError, match=r"20,000 bytes are kept in images_001\.tar\.gz\.part.*no whole archive yet"
    ):
        fetch_study(study, tmp_path, side=SIDE, **QUICK)
    again = plan_fetch(study, tmp_path, side=SIDE)
    assert again == dataclasses.replace(plan, download=plan.download - 20_000)

    disk = types.SimpleNamespace(free=2**26 + max(plan.peak, plan.kept + plan.packed) - 20_000)
    monkeypatch.setattr("helpers.fetch.downloads.shutil.disk_usage", lambda path: disk)
    plan_fetch(study, tmp_path, side=SIDE, packed_dir=tmp_path / "packed")
    disk.free -= 1
    with pytest.raises(DownloadError, match=r"bytes are needed .*Fewer ARCHIVES or a smaller SIDE take less"):
        plan_fetch(study, tmp_path, side=SIDE, packed_dir=tmp_path / "packed")


def test_each_stage_of_an_archive_has_a_bar(server, tmp_path):
    study, _ = serve_study(server, n_archives=1)
    bars = Bars()
    fetch_study(study, tmp_path, side=SIDE, progress=bars, **QUICK)
    assert [bar.options["desc"] for bar in bars.made] == ["images_001.tar.gz", "images_001", "Shrinking images_001"]
    assert [bar.at for bar in bars.made] == [study.archives[0].size, 3, 3] and all(bar.closed for bar in bars.made)
