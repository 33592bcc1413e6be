"""Tests of fetch.streaming and fetch.plan, against a server on this machine that cuts, lies and refuses."""

import dataclasses
import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from faulty_server import FaultyServer, answer, cut_after, serve
from made_archives import LISTS, make_image, make_tar, make_zip, serve_study

from helpers.fetch import ArchiveError, DownloadError, fetch_study, plan_fetch, streaming
from helpers.fetch.plan import ask_sizes, claim_folder
from helpers.fetch.sources import RemoteFile, RemoteStudy
from helpers.packing import pack_study
from helpers.packing.image_cache import load_image_cache
from helpers.study import PATHOLOGIES, list_images

SIDE = 32
QUICK = {"pause": 0.01, "timeout": 5, "retries": 2}
PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"


@pytest.fixture
def server():
    with FaultyServer() as server:
        yield server


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def make_rows(images):
    frame = pd.DataFrame({"image": sorted(images), "follow_up": 0, "age": 50.0, "sex": "F", "view": "PA"})
    frame["patient_id"] = np.arange(len(frame)) + 1
    frame["split"] = np.resize(["train", "train", "val", "test"], len(frame))
    return frame.assign(**dict.fromkeys(PATHOLOGIES, np.uint8(0)))


def read_shards(study):
    return {path.name: path.read_bytes() for path in Path(study.folder).iterdir() if path.suffix != ".json"}


def asked(server, ending=".gz"):
    return [path for path, *_ in server.asked if path.endswith(ending)]


STREAMED = [*(f"films-32/images_00{n}.{ending}" for n in (1, 2, 3) for ending in ("json", "npy")), *sorted(LISTS)[::-1]]


def test_streamed_images_pack_to_the_same_bytes_as_a_folder_of_them(server, tmp_path):
    study, rows = serve_study(server)
    stores = fetch_study(study, tmp_path / "nih", side=SIDE, **QUICK)
    assert names(tmp_path / "nih") == sorted(STREAMED)
    assert fetch_study(study, tmp_path / "whole", **QUICK) == []
    images = list_images(tmp_path / "whole")
    assert {name: path.read_bytes() for name, path in images.items()} == rows
    options = {"split_name": "random_patients", "side": SIDE, "shard_images": 4}
    one = pack_study(make_rows(rows), stores, tmp_path / "one", **options)
    other = pack_study(make_rows(rows), images, tmp_path / "other", **options)
    assert len(one.index) == 15 and read_shards(one) == read_shards(other)


def test_what_is_finished_is_not_fetched_again(server, tmp_path):
    study, _ = serve_study(server)
    fetch_study(study, tmp_path, side=SIDE, **QUICK)
    server.asked.clear()
    assert [len(store.images) for store in fetch_study(study, tmp_path, side=SIDE, **QUICK)] == [5, 5, 5]
    assert not server.asked
    fetch_study(dataclasses.replace(study, archives=study.archives[:1]), tmp_path, side=48, **QUICK)
    assert asked(server) == ["/images_001.tar.gz"]  # images of another side have to come again


def test_images_that_are_there_already_are_shrunk_and_stay(server, tmp_path):
    study, images = serve_study(server, n_archives=1)
    fetch_study(study, tmp_path, **QUICK)
    server.asked.clear()
    fetch_study(study, tmp_path, side=SIDE, **QUICK)
    assert not server.asked and set(list_images(tmp_path)) == set(images)


@pytest.mark.parametrize("make", [make_tar, make_zip], ids=["tar", "zip"])
def test_both_kinds_of_archives_and_images_without_a_folder_of_their_own(server, tmp_path, make):
    images = {f"{k:08d}_000.png": make_image(k) for k in range(3)}
    ending = "zip" if make is make_zip else "tar.gz"
    server.files["/a"] = make(images)
    study = RemoteStudy((), (RemoteFile(f"images_001.{ending}", f"{server.url}/a", about=1, images=9),), "")
    fetch_study(study, tmp_path, **QUICK)
    assert set(list_images(tmp_path)) == set(images)
    (store,) = fetch_study(study, tmp_path, side=SIDE, **QUICK)
    assert store.images == sorted(images) and not store.excluded


def test_a_server_that_fails_in_every_way_is_outlasted(server, tmp_path):
    study, images = serve_study(server)
    size = study.archives[0].size
    server.faults = {
        "/images_001.tar.gz": [cut_after(size // 2), serve(shift=7), cut_after(size // 3), serve(ignore_range=True)],
        "/images_002.tar.gz": [
            answer(503),
            answer(429, headers={"Retry-After": "0"}),
            cut_after(100),
            answer(416, b""),
        ],
        "/test_list.txt": [answer(500)],
    }
    stores = fetch_study(study, tmp_path, side=SIDE, **QUICK)
    assert sorted(image for store in stores for image in store.images) == sorted(images)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (serve(kind="text/html"), "a web page came instead of images_002.tar.gz"),
        (answer(200, PAGE), "are expected; is this the right file"),
        (answer(404), "HTTP 404"),
        (lambda handler: handler.answer(200, bytes(handler.server.size)), "does not begin like a .gz file"),
        (
            lambda handler: handler.answer(200, b"\x1f\x8b" + bytes(handler.server.size - 2)),
            r"MD5 \w+ is not the expected",
        ),
    ],
    ids=["html", "short html", "404", "zeros", "other"],
)
def test_a_wrong_answer_ends_it_names_the_archive_and_keeps_what_is_done(server, tmp_path, fault, said):
    study, _ = serve_study(server)
    server.size = study.archives[1].size
    server.faults["/images_002.tar.gz"] = [fault]
    with pytest.raises(
        DownloadError, match=rf"^images_002\.tar\.gz: .*{said}.*Kept: images_001\.tar\.gz\. Run this again"
    ):
        fetch_study(study, tmp_path, side=SIDE, **QUICK)
    assert load_image_cache(tmp_path / "films-32", "images_001") and not list(tmp_path.rglob("*.part"))
    server.asked.clear()
    assert len(fetch_study(study, tmp_path, side=SIDE, **QUICK)) == 3
    assert asked(server) == ["/images_002.tar.gz", "/images_003.tar.gz"]


def test_a_small_file_that_cannot_be_had_names_the_page_and_the_folder(server, tmp_path):
    study, _ = serve_study(server)
    server.files["/test_list.txt"] = b"something else"
    with pytest.raises(
        DownloadError, match=r"SHA-256 .*Or download test_list\.txt from https://example\.org/study by hand"
    ):
        fetch_study(study, tmp_path, side=SIDE, **QUICK)
    assert not asked(server)  # before any archive


def test_an_archive_that_unpacks_to_more_than_planned_or_holds_other_images_is_refused(server, tmp_path):
    study, _ = serve_study(server, n_archives=1)
    (archive,) = study.archives
    server.files["/a"] = make_tar({"00000001_000.png": make_image(0, 1000) + bytes(3_000_000)})
    bomb = dataclasses.replace(archive, url=f"{server.url}/a", size=None, md5=None)
    with pytest.raises(ArchiveError, match=r"images_001\.tar\.gz: .*unpacks to more than"):
        fetch_study(RemoteStudy((), (bomb,), ""), tmp_path, side=SIDE, **QUICK)
    for images in ({}, {f"{k:08d}_000.png": make_image(k, 16) for k in range(6)}):
        server.files["/a"] = make_tar(images)
        (tmp_path / "downloads" / "images_001.tar.gz").unlink(missing_ok=True)
        (tmp_path / "downloads" / "images_001.tar.gz.sha256").unlink(missing_ok=True)
        with pytest.raises(ArchiveError, match=f"{len(images)} PNGs are in it, up to 5 are expected"):
            fetch_study(RemoteStudy((), (bomb,), ""), tmp_path, side=SIDE, **QUICK)
        streaming.remove_folder(tmp_path / "downloads" / "images_001")


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
        fetch_study(study, tmp_path, side=SIDE, **QUICK)


def test_a_second_process_is_kept_out(server, tmp_path):
    study, _ = serve_study(server)
    with claim_folder(tmp_path / "nih"), pytest.raises(RuntimeError, match=r"another process fetches into .*/nih"):
        fetch_study(study, tmp_path / "nih", side=SIDE, **QUICK)
    assert not server.asked and len(fetch_study(study, tmp_path / "nih", side=SIDE, **QUICK)) == 3


@pytest.mark.parametrize("mark", ["chestmnist.json", "phantom.json"])
def test_nih_s_images_are_not_fetched_into_a_folder_of_others(server, tmp_path, mark):
    study, _ = serve_study(server)
    (tmp_path / mark).write_text("{}")
    for call in (plan_fetch, fetch_study):
        with pytest.raises(ValueError, match=f"holds another study, by its {mark}: name another DATA_DIR"):
            call(study, tmp_path, side=SIDE, **{key: QUICK[key] for key in ("pause", "retries")})
    assert not server.asked


def test_a_streamed_study_taken_for_a_folder_of_images_says_how_to_read_it(server, tmp_path):
    study, _ = serve_study(server)
    fetch_study(study, tmp_path, side=SIDE, **QUICK)
    with pytest.raises(FileNotFoundError, match=r"no images, only images-32, .*give the FETCH and the SIDE"):
        list_images(tmp_path)


class Killed(BaseException):
    """Stands for a kill: nothing that handles errors may handle it."""


KILLS = (1, 3)  # of the calls of a stage
STAGES = ("download_file", "unpack_archive", "shrink_images", "remove_folder")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_between_any_two_stages_it_goes_on(server, tmp_path, monkeypatch, stage, when):
    study, images = serve_study(server)
    function, calls = getattr(streaming, stage), []

    def call(*arguments, **options):
        calls.append(stage)
        if len(calls) in KILLS and when == "before":
            raise Killed
        result = function(*arguments, **options)
        if len(calls) in KILLS:
            raise Killed
        return result

    monkeypatch.setattr(streaming, stage, call)
    for _ in KILLS:
        with pytest.raises(Killed):
            fetch_study(study, tmp_path, side=SIDE, **QUICK)
    stores = fetch_study(study, tmp_path, side=SIDE, **QUICK)
    assert sorted(image for store in stores for image in store.images) == sorted(images)
    assert names(tmp_path) == sorted(STREAMED)
    assert len(asked(server)) <= 3 + (stage == "download_file")  # nothing that was whole came twice


def test_killed_while_it_shrinks_it_leaves_no_half_store_behind(server, tmp_path):
    study, _ = serve_study(server)
    (tmp_path / "films-32").mkdir()
    for name in ("part-0123456789ab-images_002.npy", "part-0123456789ab-images_002.json"):
        (tmp_path / "films-32" / name).write_bytes(b"half")
    fetch_study(study, tmp_path, side=SIDE, **QUICK)
    assert names(tmp_path) == sorted(STREAMED)


KILLED = """
import sys, time
sys.path[:0] = [{helpers!r}, {tests!r}]
from helpers.fetch.sources import RemoteFile, RemoteStudy
from helpers.fetch.streaming import fetch_study
study = eval(sys.argv[1])
print("ready", flush=True)
fetch_study(study, sys.argv[2], pause=0.01)
"""


def test_killed_within_a_download_it_goes_on_at_the_byte(server, tmp_path):
    study, images = serve_study(server, n_archives=2, side=500)
    half, waiting = study.archives[1].size // 2, threading.Event()

    def stall(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", study.archives[1].size)
        handler.send_header("ETag", '"1"')
        handler.end_headers()
        handler.wfile.write(handler.server.files[handler.path][:half])
        handler.wfile.flush()
        waiting.wait(20)

    server.faults["/images_002.tar.gz"] = [stall]
    folders = {"helpers": str(Path(streaming.__file__).parents[2]), "tests": str(Path(__file__).parents[1] / "support")}
    code = [sys.executable, "-c", KILLED.format(**folders), repr(study), str(tmp_path)]
    with subprocess.Popen(code, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        part = tmp_path / "downloads" / "images_002.tar.gz.part"
        for _ in range(2000):
            if part.exists() and part.stat().st_size:
                break
            threading.Event().wait(0.01)
        os.kill(process.pid, signal.SIGKILL)
    waiting.set()
    kept = part.stat().st_size
    assert kept
    fetch_study(study, tmp_path, **QUICK)
    assert {name: path.read_bytes() for name, path in list_images(tmp_path).items()} == images
    assert asked(server) == ["/images_001.tar.gz", "/images_002.tar.gz", "/images_002.tar.gz"]
    assert server.asked[-1][1] == f"bytes={kept}-"


def measure(folder):
    total = 0
    for path in Path(folder).rglob("*"):
        total += path.stat().st_size if path.is_file() else 0
    return total


@pytest.mark.parametrize("stream", [True, False])
def test_the_disk_never_holds_more_than_the_plan_says(server, tmp_path, monkeypatch, stream):
    study, images = serve_study(server, n_archives=4, images=4, side=160)
    plan = plan_fetch(study, tmp_path, side=96, stream=stream, retries=0)
    highest = []

    def watched(function):
        def call(*arguments, **options):
            result = function(*arguments, **options)
            highest.append(measure(tmp_path))
            return result

        return call

    monkeypatch.setattr(
        "helpers.fetch.archives.os.replace", watched(os.replace)
    )  # where archive and images are there, whole
    for stage in STAGES:
        monkeypatch.setattr(streaming, stage, watched(getattr(streaming, stage)))
    fetch_study(study, tmp_path, side=96 if stream else None, **QUICK)
    slack = 8_000  # of headers, lists and the stores' JSON files, against 410,000 bytes of images
    whole = sum(map(len, images.values()))
    assert 0.8 * plan.peak < max(highest) <= plan.peak + slack
    assert measure(tmp_path) <= plan.kept + slack and plan.download == sum(a.size for a in study.archives)
    assert max(highest) < 0.8 * whole if stream else max(highest) > whole
    again = plan_fetch(study, tmp_path, side=96, stream=stream, retries=0)
    assert again.download == 0 and again.peak == again.kept <= plan.kept + slack


def test_room_is_checked_before_anything_is_fetched(server, tmp_path, monkeypatch):
    study, _ = serve_study(server)
    plan = plan_fetch(study, tmp_path, side=SIDE, packed_dir=tmp_path / "packed" / "new")
    assert str(plan).startswith(
        "0 MB to download. The study's folder takes at most 0 MB at a time, of which 0 MB stay;"
    )
    assert "takes at most 15.0 GB at a time" in str(dataclasses.replace(plan, peak=15_040_000_000))
    spare = 2**26

    def leave(n_bytes):
        monkeypatch.setattr(
            "helpers.fetch.downloads.shutil.disk_usage", lambda path: types.SimpleNamespace(free=n_bytes + spare)
        )

    needed = max(plan.peak, plan.kept + plan.packed)
    leave(needed)
    plan_fetch(study, tmp_path, side=SIDE, packed_dir=tmp_path / "packed")
    leave(needed - 1)
    with pytest.raises(
        DownloadError, match=f"{needed:,} bytes are needed .*Fewer ARCHIVES or a smaller SIDE take less"
    ):
        plan_fetch(study, tmp_path, side=SIDE, packed_dir=tmp_path / "packed")
    assert not asked(server)


def test_what_is_here_already_counts_as_room_taken(server, tmp_path):
    study, _ = serve_study(server, side=100)
    first = plan_fetch(study, tmp_path, side=SIDE)
    server.faults["/images_001.tar.gz"] = [cut_after(20_000)] + [cut_after(0)] * 9
    with pytest.raises(
        DownloadError, match=r"20,000 bytes are kept in images_001\.tar\.gz\.part.*no whole archive yet"
    ):
        fetch_study(study, tmp_path, side=SIDE, **QUICK)
    again = plan_fetch(study, tmp_path, side=SIDE)
    assert again == dataclasses.replace(first, download=first.download - 20_000)


def test_sizes_that_nobody_published_are_asked_for(server, tmp_path):
    server.files |= {"/a": bytes(1000), "/b": bytes(2000)}
    files = [RemoteFile(name, f"{server.url}/{name}", about=7) for name in "abc"]
    server.faults["/b"] = [serve(ignore_range=True)]
    assert list(ask_sizes(files, retries=0).values()) == [1000, 2000, 7]  # what is not there is assumed
    assert [held for _, held, _ in server.asked] == ["bytes=0-0"] * 3


class Bar:
    made = None

    def __init__(self, **options):
        self.options, self.total, self.at, self.stages = options, options["total"], 0, []
        Bar.made.append(self)

    def update(self, n):
        self.at += n

    def set_postfix_str(self, text):
        self.stages.append(text)

    def close(self):
        self.closed = True


def test_one_bar_runs_over_all_archives_and_ends_at_its_total(server, tmp_path):
    study, _ = serve_study(server)
    server.faults["/images_002.tar.gz"] = [cut_after(1000)] + [cut_after(0)] * 9
    Bar.made = []
    with pytest.raises(DownloadError):
        fetch_study(study, tmp_path, side=SIDE, progress=Bar, **QUICK)
    server.faults.clear()
    about = [dataclasses.replace(archive, size=None, about=9) for archive in study.archives]
    fetch_study(dataclasses.replace(study, archives=tuple(about)), tmp_path, side=SIDE, progress=Bar, **QUICK)
    first, second = Bar.made
    sizes = [archive.size for archive in study.archives]
    assert first.options == {"total": sum(sizes), "desc": "Fetching", "unit": "B", "unit_scale": True} and first.closed
    assert first.at == sizes[0] + 1000 and first.stages[-1] == "images_002.tar.gz: downloading"
    assert second.at == second.total == sizes[1] - 1000 + sizes[2]
    assert second.stages[-3:] == [f"images_003.tar.gz: {stage}" for stage in ("downloading", "unpacking", "shrinking")]


def test_nothing_is_fetched_into_a_bucket(server):
    study, _ = serve_study(server)
    for call in (plan_fetch, fetch_study):
        with pytest.raises(ValueError, match="Fetch into a local DATA_DIR; PACKED_DIR may be in the bucket"):
            call(study, "gs://bucket/nih", side=SIDE)


def test_known_metadata_of_another_source_is_kept(shared_data, server, tmp_path):
    """The label file of Box where Hugging Face's is asked for, and the other way round."""
    data = (shared_data / "nih_metadata" / "Data_Entry_2017_v2020.csv").read_bytes()
    (tmp_path / "Data_Entry_2017_v2020.csv").write_bytes(data.replace(b"Patient Gender", b"Patient Sex", 1))
    file = RemoteFile("Data_Entry_2017_v2020.csv", f"{server.url}/x", sha256=hashlib.sha256(data).hexdigest())
    fetch_study(RemoteStudy((file,), (), ""), tmp_path, side=SIDE, **QUICK)
    assert not server.asked
