"""Fetches a study archive by archive, so that 42 GB need not lie on the disk at once.

Each archive is downloaded, unpacked and removed; with a `side`, its images are then shrunk into a store of their own and
removed as well. Every stage leaves its result whole or not at all, and a run that was killed goes on behind the last
one that it finished. No stage takes more of the disk than `fetch_plan` says.
"""

from ..packing.image_cache import shrink_images
from ..runtime.files import hash_file, remove_folder
from .archives import ArchiveError, unpack_archive
from .downloads import DownloadError, assert_space, download_file
from .plan import UNPACKED, Places, claim_folder, is_done, local_folder
from .sources import assert_no_other_images, is_known_metadata


def fetch_study(study, folder, *, side=None, progress=None, n_threads=None, **options):
    """Fetches a study: its labels and lists, then archive after archive.

    Args:
        study: `RemoteStudy`.
        folder: path of the study's folder, on a disk of this machine; made if missing.
        side: pixels, to shrink the images into stores and remove them; None to keep them in `images_0NN/`.
        progress: callable such as `tqdm`: one bar over the bytes of all archives that are still to come, called with
            `total=`, `desc=`, `unit="B"` and `unit_scale=True`, returning an object with `update(n)` and `close()`,
            and, if it has them, `total` and `set_postfix_str(text)` for the stage.
        n_threads: threads that decode; by default one a core.
        **options: `retries`, `pause` and `timeout` of `download_file`.

    Returns:
        List of `ImageCache`, one an archive; empty without `side`.

    Raises:
        DownloadError: a file cannot be had or the disk lacks space; names the archive, and what is kept.
        ArchiveError: an archive is damaged, unsafe or larger than planned.
        RuntimeError: another process fetches into the folder.
        ValueError: the folder is in a bucket, or holds synthetic images or ChestMNIST's.
    """
    folder = local_folder(folder)
    with claim_folder(folder):
        assert_no_other_images(folder)
        for file in study.metadata:
            _fetch_metadata(file, folder, study.page, options)
        return _fetch_archives(study, folder, side, progress, n_threads, options)


def _fetch_archives(study, folder, side, progress, n_threads, options):
    places = {archive: Places(archive, folder, side) for archive in study.archives}
    todo = [archive for archive, at in places.items() if not is_done(archive, at, side)]
    finished = [archive.name for archive in places if archive not in todo]
    work = _Work(progress, [archive for archive in todo if not places[archive].unpacked()])
    try:
        for archive, at in places.items():
            if archive in todo:
                try:
                    _fetch_archive(archive, at, side, work, n_threads, options)
                except (OSError, ArchiveError) as error:  # also of a disk that another program has filled
                    kept = f"Kept: {', '.join(finished) or 'no whole archive yet'}. Run this again to go on from there"
                    kind = ArchiveError if isinstance(error, ArchiveError) else DownloadError
                    raise kind(f"{archive.name}: {str(error).rstrip('.')}. {kept}") from error
                finished.append(archive.name)
            _remove_leftovers(at, side)
    finally:
        work.close()
    return [shrink_images(None, at.stores, archive.stem, side=side) for archive, at in places.items()] if side else []


def list_cached_images(stores):
    """Returns the names of all images of `ImageCache`s, with those that could not be read."""
    return [image for store in stores for image in (*store.images, *(film["image"] for film in store.excluded))]


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


def _fetch_archive(archive, at, side, work, n_threads, options):
    """Takes one archive from where it is to the end; a stage whose result is there is skipped."""
    unpacked = at.unpacked()
    if unpacked is None:
        unpacked = at.images if side is None else at.draft
        work.say(f"{archive.name}: downloading")
        options = {"md5": archive.md5, "progress": work.share(archive), **options}
        download_file(archive.url, at.archive, archive.sha256, archive.size, **options)
        work.say(f"{archive.name}: unpacking")
        limit = round(UNPACKED * at.archive.stat().st_size)
        assert_space(at.downloads, limit)
        unpack_archive(at.archive, unpacked, max_bytes=limit)
        at.archive.unlink()
    if side is None:
        if unpacked == at.draft:  # of a run that was to shrink them
            at.draft.rename(at.images)
        return
    for killed in at.stores.glob(f"part-*-{archive.stem}.*"):  # of a run that was: nobody else would remove them
        killed.unlink()
    work.say(f"{archive.name}: shrinking")
    paths = {path.name: path for path in sorted(unpacked.rglob("*.png"))}
    if not 0 < len(paths) <= archive.images:
        raise ArchiveError(f"{len(paths):,} PNGs are in it, up to {archive.films:,} are expected; is it the right one?")
    at.stores.mkdir(exist_ok=True)
    assert_space(at.stores, len(paths) * side * side)
    shrink_images(paths, at.stores, archive.stem, side=side, n_threads=n_threads)


def _remove_leftovers(at, side):
    """Removes what is no longer needed, also of a run that was killed before it came to that."""
    if side is not None:
        remove_folder(at.draft)
    at.archive.unlink(missing_ok=True)


class _Work:
    """One bar over the bytes that are still to come, however many archives and attempts they take."""

    def __init__(self, progress, archives):
        self.expected = {archive: archive.size or archive.about for archive in archives}
        total = sum(self.expected.values())
        self.bar = progress(total=total, desc="Fetching", unit="B", unit_scale=True) if progress else None

    def share(self, archive):
        """Returns what `download_file` takes for `progress`, for one archive."""

        def start(*, total, initial, **_):
            if hasattr(self.bar, "total"):  # what is there needs no download, and by now the size is known
                self.bar.total += (total or self.expected[archive]) - initial - self.expected[archive]
            return _Share(self.bar)

        return start if self.bar is not None else None

    def say(self, text):
        if hasattr(self.bar, "set_postfix_str"):
            self.bar.set_postfix_str(text)

    def close(self):
        if self.bar is not None:
            self.bar.close()


class _Share:
    """One download's part of the bar."""

    def __init__(self, bar):
        self.update = bar.update

    def close(self):
        pass
