"""Fetches a study archive by archive, so that its 42 GB need not lie on the disk at once; and plans what that takes.

Each archive is downloaded, unpacked and removed; with a `side`, its images are then shrunk into a cache and removed as
well. Every stage leaves its result whole or not at all, and a run that was killed continues after the last stage
that it finished. No stage takes more of the disk than `plan_fetch` says.
"""

import dataclasses
import functools

from ..packing.image_cache import load_image_cache, shrink_images
from ..runtime.files import as_path, hash_file, is_remote, lock_folder, remove_folder
from .archives import ArchiveError, unpack_archive
from .downloads import DownloadError, assert_space, download_file
from .sources import assert_no_other_images, is_known_metadata

RECORD = 300  # bytes of a packed image beside its pixels; 200 were measured
_UNPACKED = 1.1  # bytes that come out of a byte of an archive, at most: PNGs are compressed already


@dataclasses.dataclass(frozen=True)
class DiskPlan:
    """What fetching and packing take, in bytes.

    Attributes:
        download: still to be downloaded.
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


class _Places:
    """Where an archive and what is made of it lie; nothing stays in `downloads`.

    Attributes:
        side: pixels, to which the images are shrunk, or None.
        archive: path of the downloaded archive.
        part: path of its download in progress.
        draft: path of the folder of unpacked images that are to be shrunk and removed.
        images: path of the folder of unpacked images that stay.
        caches: path of the folder of caches of this side.
        result: path of what stays: the images, or their cache.
    """

    def __init__(self, archive, folder, side):
        downloads = folder / "downloads"
        self.side, self.archive = side, downloads / archive.name
        self.part, self.draft = downloads / f"{archive.name}.part", downloads / archive.stem
        self.images, self.caches = folder / archive.stem, folder / f"films-{side}"  # as earlier versions named it
        self.result = self.caches / f"{archive.stem}.npy" if side else self.images

    def unpacked(self):
        """Returns the folder with the archive's images, or None; it is complete if it exists."""
        return next((place for place in (self.images, self.draft) if place.exists()), None)

    def load_result(self):
        """Returns the `ImageCache`, or without a side the folder of images; None where it is not finished."""
        if self.side is None:
            return self.images if self.images.exists() else None
        return load_image_cache(self.caches, self.result.stem, self.side)


def plan_fetch(study, folder, *, side, stream=True, packed_dir=None):
    """Plans what fetching a study takes, and checks that there is space for it.

    Args:
        study: `RemoteStudy`.
        folder: path of the study's folder, on a disk of this machine; made if missing.
        side: pixels, of the packed images.
        stream: whether images are shrunk archive by archive and removed, or stay as they come.
        packed_dir: path of the folder for the shards; None to leave them out of the check.

    Returns:
        A `DiskPlan`.

    Raises:
        DownloadError: a disk lacks space; names the folder, what is needed and what is free.
        ValueError: the folder is in a bucket, or holds synthetic images or ChestMNIST's.
    """
    folder = local_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    assert_no_other_images(folder)
    kept = peak = download = here = 0
    for archive in study.archives:
        at = _Places(archive, folder, side if stream else None)
        on_the_way = _measure(at.archive) + _measure(at.part) + _measure(at.draft)
        if at.load_result():
            result = most = _measure(at.result)
            here += result
        else:
            is_wanted = at.unpacked() is None
            packed = archive.about if is_wanted else 0
            unpacked = round(_UNPACKED * archive.about) if is_wanted else _measure(at.draft)
            result = archive.images * side * side if stream else unpacked
            most = max(packed + unpacked, unpacked + result if stream else result)
            download += max(0, packed - on_the_way)
        here += on_the_way
        peak = max(peak, kept + most)
        kept += result
    packed = sum(archive.images for archive in study.archives) * (side * side + RECORD)
    plan = DiskPlan(download, max(peak, kept), kept, packed)
    assert_room(plan, folder, here, packed_dir, "Fewer ARCHIVES or a smaller SIDE")
    return plan


def fetch_study(study, folder, *, side=None, progress=None, **options):
    """Fetches a study: its labels and lists, then archive after archive.

    Args:
        study: `RemoteStudy`.
        folder: path of the study's folder, on a disk of this machine; made if missing.
        side: pixels, to shrink the images into caches and remove them; None to keep them in `images_0NN/`.
        progress: callable such as `tqdm`, see `download_file` and `unpack_archive`: one bar for each stage.
        **options: `retries`, `pause` and `timeout` of `download_file`.

    Returns:
        List of `ImageCache`, one an archive; empty without `side`.

    Raises:
        DownloadError: a file cannot be downloaded or the disk lacks space; names the archive, and what is kept.
        ArchiveError: an archive is damaged, unsafe or larger than planned.
        RuntimeError: another process fetches into the folder.
        ValueError: the folder is in a bucket, or holds synthetic images or ChestMNIST's.
    """
    folder = local_folder(folder)
    results, finished = [], []
    with claim_folder(folder):
        assert_no_other_images(folder)
        for file in study.metadata:
            _fetch_metadata(file, folder, study.page, options)
        for archive in study.archives:
            at = _Places(archive, folder, side)
            try:
                result = at.load_result() or _fetch_archive(archive, at, progress, options)
            except (OSError, ArchiveError) as error:  # also of a disk that another program has filled
                kept = f"Kept: {', '.join(finished) or 'no whole archive yet'}. Run this again to continue from there"
                kind = ArchiveError if isinstance(error, ArchiveError) else DownloadError
                raise kind(f"{archive.name}: {str(error).rstrip('.')}. {kept}") from error
            if side:
                remove_folder(at.draft)
            at.archive.unlink(missing_ok=True)  # of a run that was killed before it came to that
            results.append(result)
            finished.append(archive.name)
    return results if side else []


def list_cached_images(caches):
    """Returns the names of all images of `ImageCache`s, including those that could not be read."""
    return [image for cache in caches for image in (*cache.images, *(row["image"] for row in cache.excluded))]


def _fetch_metadata(file, folder, page, options):
    path = folder / file.name
    if path.exists() and is_known_metadata(file.name, hash_file(path)):
        return  # of another source, with the same content
    try:
        download_file(file.url, path, sha256=file.sha256, **options)
    except DownloadError as error:
        raise DownloadError(
            f"{str(error).rstrip('.')}. Or download {file.name} from {page} by hand and put it into {folder}, or "
            "choose another FETCH."
        ) from error


def _fetch_archive(archive, at, progress, options):
    """Takes an archive from where it is to its result, which is returned; a stage that is finished is skipped."""
    unpacked = at.unpacked()
    if unpacked is None:
        unpacked = at.draft if at.side else at.images
        download_file(archive.url, at.archive, archive.sha256, archive.size, progress, md5=archive.md5, **options)
        unpack_archive(at.archive, unpacked, max_ratio=_UNPACKED, progress=progress)
        at.archive.unlink()
    if at.side is None:
        if unpacked == at.draft:  # of a killed run that was to shrink them
            at.draft.rename(at.images)
        return at.images
    for draft in at.caches.glob(f"part-*-{archive.stem}.*"):  # of a killed run: nothing else would remove them
        draft.unlink()
    paths = {path.name: path for path in sorted(unpacked.rglob("*.png"))}
    if not 0 < len(paths) <= archive.images:
        raise ArchiveError(
            f"{len(paths):,} PNGs are in it, up to {archive.images:,} are expected; is it the right one?"
        )
    at.caches.mkdir(exist_ok=True)
    assert_space(at.caches, len(paths) * at.side**2)
    bar = functools.partial(progress, desc=f"Shrinking {archive.stem}") if progress else None
    return shrink_images(paths, at.caches, archive.stem, side=at.side, progress=bar)


def local_folder(folder):
    """Returns the path of a folder to fetch into; ValueError for one in a bucket."""
    if is_remote(folder):
        raise ValueError(f"{folder} lies in a bucket. Fetch into a local DATA_DIR; PACKED_DIR may be in the bucket.")
    return as_path(folder)


def claim_folder(folder):
    """Keeps other processes from fetching into a folder, for a `with` block, see `files.lock_folder`."""
    busy = f"another process fetches into {folder}: let it end, and run this again, or name another DATA_DIR"
    return lock_folder(folder, busy)


def assert_room(plan, folder, here, packed_dir, less):
    """Checks the disks of the study's folder and of the shards, which may be one, for what is not there yet.

    Args:
        plan: `DiskPlan`.
        folder: path of the study's folder.
        here: bytes of the plan that are in it already.
        packed_dir: path of the folder for the shards, or None.
        less: the settings that take less, in words.

    Raises:
        DownloadError: a disk lacks space; names the folder, what is needed, what is free, and the plan.
    """
    needed = {folder: max(0, plan.peak - here)}
    if packed_dir is not None and not is_remote(packed_dir):
        packed_dir = as_path(packed_dir).absolute()
        disk = next(place for place in (packed_dir, *packed_dir.parents) if place.exists())
        missing = max(0, plan.packed - _measure(packed_dir))
        if disk.stat().st_dev == folder.stat().st_dev:
            needed[folder] = max(needed[folder], plan.kept - here + missing)
        else:
            needed[disk] = missing
    for disk, n_bytes in needed.items():
        try:
            assert_space(disk, n_bytes)
        except DownloadError as error:
            raise DownloadError(f"{error}. {plan} {less} take less.") from None


def _measure(path):
    """Returns the bytes of a file, or of all files in a folder; 0 if the path does not exist."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
