"""Unpacks the archives that images come in, tar.gz and zip: whole or not at all.

`tarfile`'s data filter refuses names that lead out of the folder; `zipfile` removes the parts of a name that do, and
makes no links. What they leave to the caller is here: a limit on the unpacked bytes, gzip's checksum, which stands at
the end of the file, and a folder that appears only when it is complete.
"""

import gzip
import os
import tarfile
import zipfile
import zlib

from ..runtime.files import as_path, remove_folder
from .downloads import assert_space

_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, gzip.BadGzipFile, RuntimeError)


class ArchiveError(ValueError):
    """An archive that is damaged, unsafe, or larger than it should be."""


def unpack_archive(archive, folder, *, max_ratio=10, progress=None):
    """Unpacks a tar.gz or zip into a new folder.

    The files are written to NAME.part, which is renamed at the end: a folder that exists is complete and is left as it
    is. What an interrupted attempt left behind is removed.

    Args:
        archive: path of the archive; a zip ends in `.zip`.
        folder: path of the folder.
        max_ratio: most bytes that may come out of one byte of the archive; about 1 for PNGs, which are compressed
            already.
        progress: callable such as `tqdm`.

    Returns:
        Path of the folder.

    Raises:
        FileNotFoundError: the archive does not exist.
        ArchiveError: it is damaged or cut short, a name leads out of the folder, a member is a link or a device, or it
            unpacks to more than allowed.
        DownloadError: the disk lacks space for as many bytes as the archive has.
    """
    archive, folder = as_path(archive), as_path(folder)
    if folder.exists():
        return folder
    n_bytes, draft = archive.stat().st_size, folder.with_name(folder.name + ".part")
    remove_folder(draft)
    draft.mkdir(parents=True)
    bar = progress(unit="file", desc=folder.name) if progress else None
    try:
        assert_space(draft, n_bytes)
        unpack = _unpack_zip if archive.name.endswith(".zip") else _unpack_tar
        for _ in unpack(archive, draft, round(max_ratio * n_bytes)):
            if bar is not None:
                bar.update(1)
        os.replace(draft, folder)
    except tarfile.FilterError as error:
        raise ArchiveError(f"{archive}: {error}; do not use this archive") from error
    except _DAMAGE as error:
        raise ArchiveError(
            f"{archive}: damaged, cut short or locked ({error}); remove it and download it again"
        ) from error
    finally:
        remove_folder(draft)  # gives the space of a failed attempt back
        if bar is not None:
            bar.close()
    return folder


def _unpack_tar(archive, folder, limit):
    n_bytes = 0
    with gzip.open(archive) as stream:
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                if not (member.isfile() or member.isdir()):  # chains of links deceived the filter before June 2025
                    raise ArchiveError(f"{archive}: {member.name!r} is a link or a device; do not use this archive")
                n_bytes += member.size
                _assert_below(limit, n_bytes, archive)
                tar.extract(member, folder, filter="data")
                yield
        while stream.read(2**20):  # to the end, where the checksum stands
            pass


def _unpack_zip(archive, folder, limit):
    with zipfile.ZipFile(archive) as packed:
        members = packed.infolist()
        _assert_below(limit, sum(member.file_size for member in members), archive)
        for member in members:
            packed.extract(member, folder)  # checks the CRC, and never writes more than file_size
            yield


def _assert_below(limit, n_bytes, archive):
    if n_bytes > limit:
        raise ArchiveError(
            f"{archive}: unpacks to more than {limit:,} bytes, the most allowed for it; is this the right archive?"
        )
