"""Tests of fetch.archives: ordinary archives, and those that lead out of the folder, expand too far or are cut."""

import gzip
import io
import os
import tarfile
import types
import zipfile

import pytest
from bars import Bars

from helpers.fetch import downloads
from helpers.fetch.archives import ArchiveError, unpack_archive
from helpers.fetch.downloads import DownloadError

FILES = {"top.txt": b"1", "folder/deep/a.bin": os.urandom(100_000), "folder/empty": b""}


def write_tar(path, files=FILES, members=()):
    with tarfile.open(path, "w:gz") as tar:
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


WRITERS = {"a.tgz": write_tar, "a.zip": write_zip}


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(params=WRITERS)
def write(request, tmp_path):
    return lambda *args: WRITERS[request.param](tmp_path / request.param, *args)


def test_an_archive_is_unpacked_whole_and_its_folder_left_alone_later(write, tmp_path):
    bars = Bars()
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "left.over").touch()
    archive = write()
    assert unpack_archive(archive, tmp_path / "out", progress=bars) == tmp_path / "out"
    assert contents(tmp_path / "out") == FILES
    (bar,) = bars.made
    assert bar.options == {"unit": "file", "desc": "out"} and bar.at == 3 and bar.closed
    assert sorted(os.listdir(tmp_path)) == [archive.name, "out"]
    (tmp_path / "out" / "top.txt").write_bytes(b"2")
    unpack_archive(archive, tmp_path / "out")
    assert (tmp_path / "out" / "top.txt").read_bytes() == b"2"
    with pytest.raises(FileNotFoundError):
        unpack_archive(tmp_path / "b.tgz", tmp_path / "new")


@pytest.mark.parametrize(
    ("name", "kind", "target", "reason"),
    [
        ("../out.txt", tarfile.REGTYPE, "", "outside the destination"),
        ("a/../../out.txt", tarfile.REGTYPE, "", "outside the destination"),
        ("link", tarfile.SYMTYPE, "/etc/passwd", "'link' is a link or a device"),
        ("link", tarfile.SYMTYPE, "top.txt", "'link' is a link or a device"),
        ("link", tarfile.LNKTYPE, "top.txt", "'link' is a link or a device"),
        ("link", tarfile.FIFOTYPE, "", "'link' is a link or a device"),
    ],
)
def test_a_tar_with_a_member_that_leads_out_of_the_folder_is_refused(tmp_path, name, kind, target, reason):
    archive = write_tar(tmp_path / "a.tgz", members=[(name, kind, target)])
    with pytest.raises(ArchiveError, match=f"{reason}.*do not use this archive"):
        unpack_archive(archive, tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.tgz"]


def test_other_names_and_links_stay_in_the_folder(write, tmp_path):
    absolute = str(tmp_path / "absolute.txt")
    in_zip = {"../up.txt": b"3", "link": b"/etc/passwd"}  # zipfile writes a link's target into a file
    archive = write({"good": b"1", absolute: b"2"})
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "a") as packed:
            for name, data in in_zip.items():
                info = zipfile.ZipInfo(name)
                info.external_attr = 0o120777 << 16 if name == "link" else 0
                packed.writestr(info, data)
    unpack_archive(archive, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == [archive.name, "out"] and not os.path.lexists(absolute)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert {b"1", b"2"} <= set(contents(tmp_path / "out").values())


def test_an_archive_that_expands_too_far_is_refused(write, tmp_path):
    archive = write({"zeros": bytes(1_000_000)})  # several hundred times as large as its archive
    with pytest.raises(ArchiveError, match="unpacks to more than"):
        unpack_archive(archive, tmp_path / "out")
    assert os.listdir(tmp_path) == [archive.name]
    assert unpack_archive(archive, tmp_path / "out", max_ratio=2000).is_dir()


@pytest.mark.parametrize("damage", ["half", "nine tenths", "flipped"])
def test_a_damaged_archive_leaves_nothing(write, tmp_path, damage):
    archive = write()
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 1
    archive.write_bytes({"half": data[: len(data) // 2], "nine tenths": data[: len(data) * 9 // 10]}.get(damage, data))
    with pytest.raises(ArchiveError, match=r"damaged, cut short or locked .*download it again"):
        unpack_archive(archive, tmp_path / "out")
    assert os.listdir(tmp_path) == [archive.name]


def test_the_checksum_at_the_end_of_a_tar_gz_is_read(tmp_path):
    archive = write_tar(tmp_path / "a.tgz")
    data = bytearray(archive.read_bytes())
    data[-6] ^= 1  # of the CRC, behind all members
    archive.write_bytes(data)
    with pytest.raises(ArchiveError, match=r"damaged.*CRC"):
        unpack_archive(archive, tmp_path / "out")


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    for name, data in {"a.tgz": gzip.compress(b"text" * 1000), "a.tar.gz": b"text", "a.zip": b"text"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ArchiveError, match=f"{name}: damaged"):
            unpack_archive(tmp_path / name, tmp_path / "out")


def test_a_disk_that_is_too_small_is_reported(write, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2**26))
    with pytest.raises(DownloadError, match="bytes are needed"):
        unpack_archive(write(), tmp_path / "out")
