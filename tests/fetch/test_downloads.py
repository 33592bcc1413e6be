"""Tests of fetch.downloads against a server on this machine that cuts, lies and refuses."""

import hashlib
import json
import time
import types

import pytest
from bars import Bars
from faulty_server import FaultyServer, answer, cut_after, serve

from helpers.fetch import downloads
from helpers.fetch.downloads import DownloadError, download_file

DATA = bytes(range(256)) * 4000  # 1 MB: several blocks
SHA256 = hashlib.sha256(DATA).hexdigest()
PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"


@pytest.fixture
def server():
    with FaultyServer() as server:
        server.files["/a.bin"] = DATA
        yield server


def fetch(server, folder, name="a.bin", **options):
    return download_file(f"{server.url}/{name}", folder / name, **{"pause": 0.01, "timeout": 5} | options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def ranges(server):
    return [asked for _, asked, _ in server.asked]


@pytest.fixture
def bars():
    return Bars()


def test_a_file_comes_whole_and_later_copies_are_compared_with_its_recorded_hash(server, tmp_path):
    path = fetch(server, tmp_path / "new")
    assert path.read_bytes() == DATA
    assert (path.parent / "a.bin.sha256").read_text() == f"{SHA256}  a.bin\n"
    assert names(path.parent) == ["a.bin", "a.bin.sha256"]
    fetch(server, path.parent)
    assert len(server.asked) == 1  # an existing file is checked, not fetched
    assert server.agents == {downloads.USER_AGENT}

    path.write_bytes(DATA[:-1] + b"x")
    with pytest.raises(DownloadError, match=r"a\.bin: SHA-256 .* is not the one recorded in a\.bin\.sha256"):
        fetch(server, path.parent)
    path.unlink()
    server.files["/a.bin"] = DATA[::-1]
    with pytest.raises(DownloadError, match=rf"is not the one recorded .*{SHA256}\. It was removed"):
        fetch(server, path.parent)
    assert names(path.parent) == ["a.bin.sha256"]


@pytest.mark.parametrize(("algorithm", "name"), [("sha256", "SHA-256"), ("md5", "MD5")])
def test_a_known_hash_is_compared_and_not_recorded(server, tmp_path, algorithm, name):
    digest = hashlib.new(algorithm, DATA).hexdigest()
    fetch(server, tmp_path, **{algorithm: digest.upper()}, size=len(DATA))
    assert names(tmp_path) == ["a.bin"]
    zeros = "0" * len(digest)
    with pytest.raises(DownloadError, match=rf"{name} {digest} is not the expected one, {zeros}\. Remove it"):
        fetch(server, tmp_path, **{algorithm: zeros})
    (tmp_path / "a.bin").unlink()
    with pytest.raises(DownloadError, match=rf"{digest} .*{zeros}.* It was removed; download again"):
        fetch(server, tmp_path, **{algorithm: zeros})
    assert names(tmp_path) == []


def test_a_cut_download_resumes_at_the_byte(server, tmp_path, bars):
    server.faults["/a.bin"] = [cut_after(300_000), cut_after(200_000)]
    assert fetch(server, tmp_path, sha256=SHA256, progress=bars).read_bytes() == DATA
    assert ranges(server) == [None, "bytes=300000-", "bytes=500000-"]
    assert [asked for _, _, asked in server.asked] == [None, '"1"', '"1"']
    (bar,) = bars.made
    assert bar.closed and bar.at == len(DATA)
    assert bar.options == {"total": len(DATA), "initial": 0, "desc": "a.bin", "unit": "B", "unit_scale": True}


def test_a_later_call_resumes_where_an_earlier_gave_up(server, tmp_path, bars):
    server.faults["/a.bin"] = [cut_after(300_000)] + [cut_after(0)] * 3
    with pytest.raises(DownloadError, match=r"broke 3 times in a row .*300,000 bytes are kept in a\.bin\.part: run"):
        fetch(server, tmp_path, retries=2)
    assert names(tmp_path) == ["a.bin.part", "a.bin.part.json"]
    server.faults.clear()
    assert fetch(server, tmp_path, progress=bars).read_bytes() == DATA
    assert ranges(server)[-1] == "bytes=300000-" and bars.made[0].options["initial"] == 300_000
    assert names(tmp_path) == ["a.bin", "a.bin.sha256"]


def test_a_file_that_changed_meanwhile_is_downloaded_from_the_start(server, tmp_path, bars):
    server.faults["/a.bin"] = [cut_after(300_000)]

    def change(handler):
        server.files["/a.bin"], server.etags["/a.bin"] = DATA[::-1], '"2"'
        handler.serve()

    server.faults["/a.bin"].append(change)
    assert fetch(server, tmp_path, progress=bars).read_bytes() == DATA[::-1]
    assert len(server.asked) == 2 and bars.made[0].at == len(DATA)


def test_a_changed_file_is_seen_by_its_size_where_the_server_has_no_etag(server, tmp_path):
    server.etags["/a.bin"] = None
    server.faults["/a.bin"] = [cut_after(300_000)]

    def change(handler):
        server.files["/a.bin"] = DATA[::-1] + b"more"
        handler.serve()

    server.faults["/a.bin"].append(change)
    assert fetch(server, tmp_path).read_bytes() == DATA[::-1] + b"more"
    assert ranges(server) == [None, "bytes=300000-", None]


def test_without_ranges_a_download_starts_again(server, tmp_path):
    server.faults["/a.bin"] = [cut_after(300_000), serve(ignore_range=True)]
    assert fetch(server, tmp_path).read_bytes() == DATA
    assert len(server.asked) == 2


def test_a_wrong_range_is_not_appended(server, tmp_path):
    server.faults["/a.bin"] = [cut_after(300_000), serve(shift=5)]
    assert fetch(server, tmp_path).read_bytes() == DATA
    assert ranges(server) == [None, "bytes=300000-", None]
    (tmp_path / "a.bin").unlink()
    server.faults["/a.bin"] = [cut_after(300_000), serve(shift=5)] * 5
    with pytest.raises(DownloadError, match="broke 2 times in a row"):
        fetch(server, tmp_path, retries=1)


def test_a_part_without_its_note_or_of_another_address_is_not_resumed(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(b"something else")
    assert fetch(server, tmp_path).read_bytes() == DATA and ranges(server) == [None]
    (tmp_path / "a.bin").unlink()
    (tmp_path / "a.bin.part").write_bytes(b"something else")
    (tmp_path / "a.bin.part.json").write_text('{"url": "http://elsewhere", "total": null, "validator": null}')
    assert fetch(server, tmp_path).read_bytes() == DATA and ranges(server) == [None, None]


def test_a_part_that_is_longer_than_the_file_is_removed(server, tmp_path):
    server.faults["/a.bin"] = [cut_after(300_000), cut_after(0)]
    with pytest.raises(DownloadError):
        fetch(server, tmp_path, retries=0)
    server.files["/a.bin"] = DATA[:1000]
    assert fetch(server, tmp_path).read_bytes() == DATA[:1000]


def test_a_whole_part_is_only_checked(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(DATA)
    note = {"url": f"{server.url}/a.bin", "total": len(DATA), "validator": None}
    (tmp_path / "a.bin.part.json").write_text(json.dumps(note))
    assert fetch(server, tmp_path, sha256=SHA256).read_bytes() == DATA and server.asked == []


def test_a_body_of_unknown_length_that_is_cut_is_noticed(server, tmp_path, bars):
    server.faults["/a.bin"] = [cut_after(300_000, no_length=True), serve(no_length=True, ignore_range=True)]
    assert fetch(server, tmp_path, progress=bars).read_bytes() == DATA
    assert bars.made[0].options["total"] is None and bars.made[0].at == len(DATA)


def test_a_busy_server_is_asked_again_when_it_says(server, tmp_path):
    server.faults["/a.bin"] = [answer(429, headers={"Retry-After": "1"}), answer(503)]
    start = time.monotonic()
    assert fetch(server, tmp_path).read_bytes() == DATA
    assert time.monotonic() - start >= 1 and len(server.asked) == 3
    (tmp_path / "a.bin").unlink()
    for status in (429, 503):
        server.asked.clear()
        server.faults["/a.bin"] = [answer(status)] * 9
        with pytest.raises(DownloadError, match=f"the server answers HTTP {status}"):
            fetch(server, tmp_path, retries=2)
        assert len(server.asked) == 3 and "a.bin" not in names(tmp_path)


def test_a_file_that_is_not_there_is_asked_for_once(server, tmp_path):
    with pytest.raises(DownloadError, match=r"b\.bin: the server answers HTTP 404"):
        fetch(server, tmp_path, "b.bin")
    assert len(server.asked) == 1 and names(tmp_path) == []


def test_a_server_that_is_not_there_is_named(tmp_path, monkeypatch):
    with FaultyServer() as server:
        pass
    with pytest.raises(DownloadError, match=r"connection broke 2 times.*continues from there$"):
        fetch(server, tmp_path, retries=1)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")  # where the internet is a setting
    with pytest.raises(DownloadError, match=r"from there; on Kaggle, .*Settings > Internet on$"):
        fetch(server, tmp_path, retries=0)


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/gzip"])
def test_a_web_page_with_status_200_is_refused_and_replaces_nothing(server, tmp_path, kind):
    server.files["/a.tgz"] = b"\x1f\x8b" + DATA
    server.faults["/a.tgz"] = [answer(200, PAGE, kind=kind)]
    with pytest.raises(DownloadError, match=r"a web page came instead of a\.tgz"):
        fetch(server, tmp_path, "a.tgz")
    assert names(tmp_path) == []
    server.faults["/a.tgz"] = [cut_after(300_000), answer(200, PAGE, kind="text/html")]
    with pytest.raises(DownloadError, match="web page"):
        fetch(server, tmp_path, "a.tgz")
    fetch(server, tmp_path, "a.tgz")
    assert ranges(server)[-1] == "bytes=300000-"  # the page did not cost what was there


@pytest.mark.parametrize("name", ["a.tgz", "a.zip"])
def test_a_file_that_does_not_begin_like_an_archive_is_refused(server, tmp_path, name):
    server.files["/" + name] = b'{"error": "gone"}'
    with pytest.raises(DownloadError, match=rf"does not begin like a \.{name[2:]} file"):
        fetch(server, tmp_path, name)
    assert names(tmp_path) == []


def test_a_wrong_size_is_refused_before_the_body_is_read(server, tmp_path):
    with pytest.raises(DownloadError, match="the server has 1,024,000 bytes, 5 are expected"):
        fetch(server, tmp_path, size=5)
    assert names(tmp_path) == []
    server.faults["/a.bin"] = [serve(no_length=True)]
    with pytest.raises(DownloadError, match="sends more than the 1,000 bytes"):
        fetch(server, tmp_path, size=1000)
    assert not (tmp_path / "a.bin").exists() and not (tmp_path / "a.bin.part").exists()
    (tmp_path / "a.bin").write_bytes(b"12")
    with pytest.raises(DownloadError, match="2 bytes, 5 are expected"):
        fetch(server, tmp_path, size=5)


def test_a_disk_that_is_too_small_is_reported_before_the_first_byte(server, tmp_path, monkeypatch):
    usage = types.SimpleNamespace(free=2**26 + len(DATA) - 1)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DownloadError, match=r"1,024,000 bytes are needed and 68,132,863 are free"):
        fetch(server, tmp_path)
    assert names(tmp_path) == []
    usage.free += 1
    fetch(server, tmp_path)


def test_no_download_goes_into_a_bucket():
    with pytest.raises(ValueError, match="bucket"):
        download_file("http://127.0.0.1/a", "gs://bucket/a")


def test_a_body_that_is_shorter_than_the_known_size_is_refused(server, tmp_path):
    server.faults["/a.bin"] = [serve(no_length=True, ignore_range=True)] * 9
    with pytest.raises(DownloadError, match="1,024,000 of 1,024,001 bytes came"):
        fetch(server, tmp_path, size=len(DATA) + 1, retries=1)
    assert not (tmp_path / "a.bin").exists()


def redirect_with_hash(sha256):
    headers = {"Location": "/a.bin", "X-Linked-ETag": f'"{sha256}"'}
    return lambda handler: handler.answer(302, b"", headers)


def test_a_hash_that_the_server_sends_on_the_way_is_compared_and_recorded(server, tmp_path):
    server.faults["/hub"] = [redirect_with_hash(SHA256), redirect_with_hash(SHA256)]
    server.faults["/a.bin"] = [cut_after(300_000)]
    download_file(f"{server.url}/hub", tmp_path / "a.bin", pause=0.01)
    assert (tmp_path / "a.bin.sha256").read_text() == f"{SHA256}  a.bin\n"
    assert ranges(server)[-2:] == ["bytes=300000-"] * 2  # the range goes along
    server.faults["/hub"] = [redirect_with_hash("0" * 64)]
    with pytest.raises(DownloadError, match=f"SHA-256 {SHA256} is not the one that the server sent, {'0' * 64}"):
        download_file(f"{server.url}/hub", tmp_path / "b.bin", pause=0.01)
    assert names(tmp_path) == ["a.bin", "a.bin.sha256"]
