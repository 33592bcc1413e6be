"""Tests of fetch.archives: archives that lead out, blow up or are cut, and ordinary ones."""

import collections
import gzip
import io
import os
import tarfile
import zipfile

import pytest

from helpers.fetch import ArchiveError, DownloadError, downloads, unpack_archive

FILES = {"top.txt": b"1", "folder/deep/a.bin": os.urandom(100_000), "folder/empty": b""}


def write_tar(path, files=FILES, members=(), mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, kind, target in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    return path


def write_zip(path, files=FILES):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


WRITERS = {"a.tgz": write_tar, "a.tar": lambda path, *args: write_tar(path, *args, mode="w"), "a.zip": write_zip}


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(params=WRITERS)
def write(request, tmp_path):
    return lambda *args: WRITERS[request.param](tmp_path / request.param, *args)


def test_what_was_packed_comes_out_and_is_left_alone_later(write, tmp_path):
    counts = []

    class Bar:
        def __init__(self, **options):
            assert options == {"unit": "file", "desc": "out"}

        def update(self, n):
            counts.append(n)

        def close(self):
            counts.append("closed")

    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "left.over").touch()
    archive = write()
    assert unpack_archive(archive, tmp_path / "out", progress=Bar) == tmp_path / "out"
    assert contents(tmp_path / "out") == FILES and counts == [1, 1, 1, "closed"]
    assert sorted(os.listdir(tmp_path)) == [archive.name, "out"]
    (tmp_path / "out" / "top.txt").write_bytes(b"2")
    unpack_archive(archive, tmp_path / "out")
    assert (tmp_path / "out" / "top.txt").read_bytes() == b"2"


@pytest.mark.parametrize("name", ["../out.txt", "a/../../out.txt", "/tmp/out.txt", "..\\out.txt", "C:\\out.txt", "C:a"])
def test_names_that_lead_out_are_refused(write, tmp_path, name):
    with pytest.raises(ArchiveError, match="leads out of the folder"):
        unpack_archive(write({"good": b"1", name: b"2"}), tmp_path / "out")
    assert len(os.listdir(tmp_path)) == 1  # the archive


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        (tarfile.SYMTYPE, "/etc/passwd"),
        (tarfile.SYMTYPE, "top.txt"),
        (tarfile.LNKTYPE, "top.txt"),
        (tarfile.FIFOTYPE, ""),
    ],
)
def test_links_and_devices_are_refused(tmp_path, kind, target):
    archive = write_tar(tmp_path / "a.tgz", members=[("link", kind, target)])
    with pytest.raises(ArchiveError, match="'link' is a link or a device"):
        unpack_archive(archive, tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.tgz"]


def test_links_in_a_zip_are_refused(tmp_path):
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(ArchiveError, match="link"):
        unpack_archive(tmp_path / "a.zip", tmp_path / "out")


def test_bombs_are_refused(tmp_path):
    bomb = {"zeros": bytes(20_000_000)}  # a thousand times as large as its archive
    for archive in (write_tar(tmp_path / "a.tgz", bomb), write_zip(tmp_path / "a.zip", bomb)):
        with pytest.raises(ArchiveError, match="unpacks to more than"):
            unpack_archive(archive, tmp_path / "out")
    assert unpack_archive(archive, tmp_path / "out", max_ratio=2000).is_dir()


def test_a_bomb_in_a_header_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tgz", "w:gz", pax_headers={"comment": "0" * 20_000_000}) as tar:
        tar.addfile(tarfile.TarInfo("a"))
    with pytest.raises(ArchiveError, match="unpacks to more than"):
        unpack_archive(tmp_path / "a.tgz", tmp_path / "out")


def test_limits_on_bytes_and_members_are_held(write, tmp_path):
    archive = write({str(i): os.urandom(100_000) for i in range(40)})
    with pytest.raises(ArchiveError, match="unpacks to more than"):
        unpack_archive(archive, tmp_path / "out", max_bytes=1_000_000)
    with pytest.raises(ArchiveError, match="more than the 39 files"):
        unpack_archive(archive, tmp_path / "out", max_members=39)
    assert unpack_archive(archive, tmp_path / "out", max_members=40).is_dir()


@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_archives_that_are_cut_leave_nothing(write, tmp_path, keep):
    archive = write()
    data = archive.read_bytes()
    archive.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ArchiveError, match=r"damaged, cut short or locked .*download it again"):
        unpack_archive(archive, tmp_path / "out")
    assert os.listdir(tmp_path) == [archive.name]


def test_a_tar_that_is_cut_between_two_members_is_noticed(tmp_path):
    archive = write_tar(tmp_path / "a.tar", mode="w")
    archive.write_bytes(archive.read_bytes()[:1024])  # the first file and its header
    with pytest.raises(ArchiveError, match="its end is missing"):
        unpack_archive(archive, tmp_path / "out")


def test_a_flipped_byte_is_noticed(tmp_path):
    for archive in (write_tar(tmp_path / "a.tgz"), write_zip(tmp_path / "a.zip")):
        data = bytearray(archive.read_bytes())
        data[len(data) // 2] ^= 1
        archive.write_bytes(data)
        with pytest.raises(ArchiveError, match="damaged"):
            unpack_archive(archive, tmp_path / "out")


def test_what_is_no_archive_is_named(tmp_path):
    (tmp_path / "a.tgz").write_bytes(gzip.compress(b"text" * 1000))
    with pytest.raises(ArchiveError, match=r"a\.tgz: damaged"):
        unpack_archive(tmp_path / "a.tgz", tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        unpack_archive(tmp_path / "b.tgz", tmp_path / "out")


def test_space_is_looked_for(write, tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage(0, 0, 2**26))
    with pytest.raises(DownloadError, match="bytes are needed"):
        unpack_archive(write(), tmp_path / "out")
