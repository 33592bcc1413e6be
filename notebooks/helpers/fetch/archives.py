"""Unpacks tar and zip archives from strangers: no paths and links that leave the folder, no bombs, no half a folder."""

import gzip
import os
import pathlib
import stat
import tarfile
import zipfile
import zlib

from ..runtime.files import as_path, remove_folder
from .downloads import assert_space

_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, gzip.BadGzipFile, RuntimeError)


class ArchiveError(ValueError):
    """An archive that is damaged, or that holds what is not to be unpacked."""


def unpack_archive(archive, folder, *, max_bytes=2**36, max_members=200_000, max_ratio=100, progress=None):
    """Unpacks a tar, tar.gz or zip into a new folder, which appears at once and whole.

    It is written as NAME.part and renamed at the end, so that a folder that is there is complete and is left as it is;
    what an interrupted attempt left is thrown away.

    Args:
        archive: path of the archive; its first bytes tell what it is.
        folder: path of the folder.
        max_bytes: most bytes that come out, 64 GiB by default.
        max_members: most files and folders in it.
        max_ratio: most bytes that come out of one byte of the archive; 19 in the reports of Open-i, 1 in PNGs.
        progress: callable such as `tqdm`, called with `unit=` and `desc=`, returning an object with `update(n)` and
            `close()`.

    Returns:
        Path of the folder.

    Raises:
        FileNotFoundError: there is no such archive.
        ArchiveError: it is damaged or cut short, a name or a link leads out of the folder, a member is neither file nor
            folder, or a limit is passed.
        DownloadError: the disk lacks space.
    """
    archive, folder = as_path(archive), as_path(folder)
    if folder.exists():
        return folder
    draft = folder.with_name(folder.name + ".part")
    remove_folder(draft)
    limit = min(max_bytes, max_ratio * archive.stat().st_size)
    with archive.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    draft.mkdir(parents=True)
    bar = progress(unit="file", desc=folder.name) if progress else None
    try:
        unpack = _unpack_zip if is_zip else _unpack_tar
        for count, _ in enumerate(unpack(archive, draft, limit), 1):
            if count > max_members:
                raise ArchiveError(
                    f"{archive}: more than the {max_members:,} files allowed; is this the right archive?"
                )
            if bar is not None:
                bar.update(1)
    except _DAMAGE as error:
        remove_folder(draft)
        raise ArchiveError(
            f"{archive}: damaged, cut short or locked ({error}); remove it and download it again"
        ) from error
    except BaseException:
        remove_folder(draft)  # gives the space back
        raise
    finally:
        if bar is not None:
            bar.close()
    os.replace(draft, folder)
    return folder


def _unpack_tar(archive, folder, limit):
    with archive.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream = _Limited(gzip.GzipFile(fileobj=file) if packed else file, archive, limit)
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                _check_member(archive, member.name, (member.isreg() and not member.issparse()) or member.isdir())
                stream.expect(member.size)
                assert_space(folder, member.size)
                try:
                    # "data" refuses what leads out of the folder, a second time, and drops owners and odd rights.
                    tar.extract(member, folder, filter="data")
                except tarfile.FilterError as error:
                    raise ArchiveError(f"{archive}: {error}; nothing of it was kept") from error
                yield member.name
        while stream.read(2**18):  # to the end: only there does gzip tell that nothing is damaged
            pass
        if stream.tail.strip(b"\0"):  # a tar ends with blocks of zeros; without, it may be cut between two members
            raise tarfile.ReadError("its end is missing")


def _unpack_zip(archive, folder, limit):
    with zipfile.ZipFile(archive) as packed:
        members = packed.infolist()
        if sum(member.file_size for member in members) > limit:
            raise _too_much(archive, limit)
        assert_space(folder, sum(member.file_size for member in members))
        for member in members:
            kind = stat.S_IFMT(member.external_attr >> 16)
            _check_member(archive, member.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
            packed.extract(member, folder)  # never more than the size that was added up; its CRC is checked
            yield member.filename


def _check_member(archive, name, is_plain):
    parts = pathlib.PureWindowsPath(name)  # knows both kinds of slashes, and drives
    if parts.anchor or ".." in parts.parts or "\0" in name:
        raise ArchiveError(f"{archive}: the name {name!r} leads out of the folder; do not use this archive")
    if not is_plain:
        raise ArchiveError(f"{archive}: {name!r} is a link or a device; do not use this archive")


def _too_much(archive, limit):
    return ArchiveError(
        f"{archive}: unpacks to more than {limit:,} bytes, the most allowed for its size; is this the right archive?"
    )


class _Limited:
    """A stream that gives no more than `limit` bytes, padding and headers of a tar included."""

    def __init__(self, stream, archive, limit):
        self.stream, self.archive, self.limit, self.given, self.tail = stream, archive, limit + 2**20, 0, b""

    def read(self, size):
        block = self.stream.read(size)
        self.given += len(block)
        self.tail = (self.tail + block)[-512:]
        self.expect(0)
        return block

    def expect(self, size):
        if self.given + size > self.limit:
            raise _too_much(self.archive, self.limit)
