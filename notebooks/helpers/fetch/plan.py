"""What fetching a study takes on the net and on the disk: told in advance, and checked."""

import contextlib
import dataclasses
import os

from ..packing.image_cache import load_image_cache
from ..runtime.files import as_path, is_remote
from .downloads import DownloadError, assert_space, open_session
from .sources import assert_no_other_images

UNPACKED = 1.1  # bytes that come out of a byte of an archive, at most: PNGs are packed already
_RECORD = 300  # bytes of a packed image beside its pixels; 200 were measured


@dataclasses.dataclass(frozen=True)
class DiskPlan:
    """What fetching and packing take, in bytes.

    Attributes:
        download: still to come over the net.
        peak: most that lie in the study's folder at a time.
        kept: that stay there.
        packed: the shards take, in their folder.
    """

    download: int
    peak: int
    kept: int
    packed: int

    def __str__(self):
        values = dataclasses.astuple(self)
        download, peak, kept, packed = (f"{v / 1e9:.1f} GB" if v > 1e9 else f"{v / 1e6:.0f} MB" for v in values)
        return (
            f"{download} to download. The study's folder takes at most {peak} at a time, of which {kept} stay; the "
            f"packed images take {packed} more."
        )


class Places:
    """Where an archive and what is made of it lie; of what is in `downloads`, nothing stays.

    Attributes:
        archive: path of the downloaded archive.
        draft: path of the folder that it is unpacked into where its images are to be removed.
        images: path of the folder where its images stay.
        stores: path of the folder of stores of this side.
    """

    def __init__(self, archive, folder, side):
        self.downloads, self.images, self.stores = folder / "downloads", folder / archive.stem, folder / f"films-{side}"
        self.archive, self.draft = self.downloads / archive.name, self.downloads / archive.stem

    def unpacked(self):
        """Returns the folder with the archive's images, or None; either appears at once and whole."""
        return next((place for place in (self.images, self.draft) if place.exists()), None)

    def downloaded(self):
        """Returns how many bytes of the archive are here."""
        part = self.archive.with_name(self.archive.name + ".part")
        return next((path.stat().st_size for path in (self.archive, part) if path.exists()), 0)


def plan_fetch(study, folder, *, side, stream=True, packed_dir=None, retries=5, pause=1.0):
    """Plans what fetching a study takes, and checks that there is room for it.

    Sizes of archives that nobody published are asked of the server, by its answer to a request for a single byte.

    Args:
        study: `RemoteStudy`.
        folder: path of the study's folder, on a disk of this machine; made if missing.
        side: pixels, of the packed images.
        stream: whether images are shrunk archive by archive and removed, or stay as they come.
        packed_dir: path of the folder for the shards; None to leave them out of the check of room.
        retries: as for `open_session`, while sizes are asked for.
        pause: as for `open_session`.

    Returns:
        A `DiskPlan`.

    Raises:
        DownloadError: a disk lacks space; names the folder, what is needed and what is free.
        ValueError: the folder is in a bucket, or holds synthetic images or ChestMNIST's.
    """
    folder = local_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    assert_no_other_images(folder)
    places = {archive: Places(archive, folder, side) for archive in study.archives}
    done = {archive for archive, at in places.items() if is_done(archive, at, side if stream else None)}
    wanted = [archive for archive, at in places.items() if archive not in done and not at.unpacked()]
    sizes = ask_sizes(wanted, retries, pause)
    kept = peak = download = there = 0
    for archive, at in places.items():
        n_bytes = sizes.get(archive, 0)
        unpacked = round(UNPACKED * n_bytes) if archive in wanted else _measure(at.draft)
        result = archive.images * side * side if stream else unpacked
        if archive in done:
            result = _measure(at.stores / f"{archive.stem}.npy" if stream else at.images)
        download += max(0, n_bytes - at.downloaded())
        there += at.downloaded() + _measure(at.draft) + result * (archive in done)
        peak = max(peak, kept + n_bytes + unpacked, kept + (unpacked + result if stream else result))
        kept += result
    images = sum(archive.images for archive in study.archives)
    plan = DiskPlan(download, max(peak, kept), kept, images * (side * side + _RECORD))
    assert_room(plan, folder, there, packed_dir)
    return plan


def is_done(archive, places, side):
    """Whether an archive's store of this side is finished, or with side None whether its images are all there."""
    if side is None:
        return places.images.exists()
    return load_image_cache(places.stores, archive.stem, side) is not None


def local_folder(folder):
    """Returns the path of a folder to fetch into; ValueError for one in a bucket."""
    if is_remote(folder):
        raise ValueError(f"{folder} lies in a bucket. Fetch into a local DATA_DIR; PACKED_DIR may be in the bucket.")
    return as_path(folder)


@contextlib.contextmanager
def claim_folder(folder):
    """Keeps other processes from fetching into a folder, for a `with` block; made if missing.

    The kernel lets go of it when the process ends, however it ends. Where a disk knows no locks, such as some that are
    shared by machines, nobody is kept out.

    Raises:
        RuntimeError: another process fetches into it.
    """
    import fcntl  # not above: not every system has it

    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)  # the folder itself: a file for it could not be removed without a race
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"another process fetches into {folder}: let it end, and run this again, or name another DATA_DIR"
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


def ask_sizes(files, retries=5, pause=1.0):
    """Returns a dict from each `RemoteFile` to its bytes: as published, as the server tells, or else as assumed."""
    sizes = {file: file.size or file.about for file in files}
    if all(file.size for file in files):
        return sizes
    import requests

    with open_session(retries, pause) as session:
        for file in (file for file in files if not file.size):
            try:  # not by HEAD, which Box for one answers with 404
                with session.get(file.url, headers={"Range": "bytes=0-0"}, stream=True, timeout=30) as response:
                    of_range = response.headers.get("Content-Range", "").rpartition("/")[2]
                    told = of_range if response.status_code == 206 else response.headers.get("Content-Length", "")
                    if response.ok and told.isdigit():
                        sizes[file] = int(told)
            except requests.RequestException:
                break  # the download itself says what is wrong
    return sizes


def assert_room(plan, folder, there, packed_dir=None, less="Fewer ARCHIVES or a smaller SIDE"):
    """Checks the disks of the study's folder and the shards', which may be one, for what is not on them yet.

    Args:
        plan: `DiskPlan`.
        folder: path of the study's folder.
        there: bytes of the plan that lie in it already.
        packed_dir: path of the folder for the shards, or None.
        less: settings that take less, in words.

    Raises:
        DownloadError: one lacks space; names the folder, what is needed, what is free, and the plan.
    """
    needed = {folder: max(0, plan.peak - there)}
    if packed_dir is not None and not is_remote(packed_dir):
        disk, rest = as_path(packed_dir).absolute(), max(0, plan.packed - _measure(as_path(packed_dir)))
        while not disk.exists():
            disk = disk.parent
        if os.stat(disk).st_dev == os.stat(folder).st_dev:
            needed[folder] = max(needed[folder], plan.kept - there + rest)
        else:
            needed[disk] = rest
    for disk, n_bytes in needed.items():
        try:
            assert_space(disk, n_bytes)
        except DownloadError as error:
            raise DownloadError(f"{error}. {plan} {less} take less.") from None


def _measure(path):
    """Returns the bytes of a file or of all files in a folder; 0 where there is none."""
    if not path.is_dir():
        return path.stat().st_size if path.exists() else 0
    return sum(os.path.getsize(os.path.join(place, name)) for place, _, names in os.walk(path) for name in names)
