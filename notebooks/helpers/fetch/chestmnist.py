"""ChestMNIST: the images of ChestX-ray14 at small sizes, with a split of its own and without patient IDs.

MedMNIST (Yang et al., Scientific Data 2023) publishes all 112,120 images at 64, 128 or 224 pixels in one file. It
becomes a study with `labels.csv`, which has neither patients, view, sex nor age: see docs/your_data.md for what is then
not reported. The split is the community's random one by patient, so its scores do not compare with those on NIH's
official list.
"""

import contextlib
import csv
import itertools
import json
import os
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from ..runtime.files import local_draft, read_text, remove_folder, write_text
from ..study.labels import PATHOLOGIES
from ..study.splits import SUBSETS
from ..study.study import ABOUT, LABELS
from .archives import ArchiveError
from .downloads import assert_space, download_file
from .sources import RemoteFile, parse_mirror
from .streaming import RECORD, DiskPlan, assert_room, claim_folder, local_folder

CHESTMNIST_PAGE = "https://zenodo.org/records/10519652"
_FILES = {  # by pixels: MD5 from MedMNIST's own list, whose order of findings is that of `PATHOLOGIES`; bytes, about
    64: ("9de6cd0b934ebb5b7426cfba5efbae16", 400_000_000),
    128: ("db107e5590b27930b62dbaf558aebee3", 1_400_000_000),
    224: ("45bd33e6f06c3e8cdb481c74a89152aa", 3_900_000_000),
}
_IMAGES = 112_120
_ABOUT = {
    "kind": "chestmnist",
    "name": "ChestMNIST",
    "labels": "Those of NIH ChestX-ray14, mined from radiology reports by a program; 0: a finding was not mentioned.",
    "not_read": "Nothing; patient, view, sex and age are not in the file.",
    "source": CHESTMNIST_PAGE,
    "terms": "CC BY 4.0, from the NIH Clinical Center. Cite Yang et al., MedMNIST v2, Scientific Data 2023, and Wang "
    "et al., ChestX-ray8, CVPR 2017.",
}
_CHUNK = 256  # images in memory at a time


def list_chestmnist_file(side, mirror=""):
    """Returns the `RemoteFile` of ChestMNIST at 64, 128 or 224 pixels, at Zenodo or in a `mirror`'s folder."""
    name, mirror, (md5, about) = f"chestmnist_{side}.npz", parse_mirror(mirror), _FILES[side]
    url = f"{mirror}/{name}" if mirror else f"{CHESTMNIST_PAGE}/files/{name}?download=1"
    return RemoteFile(name, url, about, md5=md5, images=_IMAGES)


def plan_chestmnist(file, folder, side, *, images=None, packed_side=None, packed_dir=None):
    """Plans what ChestMNIST takes on the disk, and checks that there is space for it; see `plan_fetch`.

    Args:
        file: `RemoteFile` of `list_chestmnist_file`.
        folder: path of the study's folder; made if missing.
        side: pixels, of its images.
        images: most images of each subset, or None.
        packed_side: pixels, of the packed images; None for `side`.
        packed_dir: path of the folder for the shards; None to leave them out of the check.

    Returns:
        A `DiskPlan`.

    Raises:
        DownloadError: the disk lacks space.
    """
    folder = local_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    n_images = min(_IMAGES, 3 * images) if images else _IMAGES
    is_written = _is_written(folder, side, images)
    if is_written:
        n_images = sum(_read_mark(folder)["counts"].values())
    kept, packed = n_images * side * side, n_images * ((packed_side or side) ** 2 + RECORD)
    if is_written:
        return DiskPlan(0, kept, kept, packed)
    here = sum(path.stat().st_size for path in folder.glob(f"{file.name}*"))
    plan = DiskPlan(max(0, file.about - here), file.about + kept, kept, packed)
    assert_room(plan, folder, here, packed_dir, "Fewer CHESTMNIST_IMAGES or a smaller CHESTMNIST_SIDE")
    return plan


def fetch_chestmnist(file, folder, side, *, images=None, keep_file=False, progress=None, **options):
    """Downloads ChestMNIST and writes it as a study; one that is there is left as it is.

    Args:
        file: `RemoteFile` of `list_chestmnist_file`.
        folder: path of the study's folder, on a disk of this machine; made if missing.
        side: pixels, of its images.
        images: most images of each subset, the first ones in the file; None for all.
        keep_file: whether the downloaded file stays.
        progress: callable such as `tqdm`.
        **options: `retries`, `pause` and `timeout` of `download_file`.

    Returns:
        Path of the study's folder.

    Raises:
        DownloadError: see `download_file`.
        ArchiveError: the file is damaged or not of ChestMNIST.
        RuntimeError: another process fetches into the folder.
        ValueError: the folder is in a bucket, or holds another study.
    """
    folder = local_folder(folder)
    if _is_written(folder, side, images):
        return folder
    path = folder / file.name
    with claim_folder(folder):
        download_file(file.url, path, file.sha256, file.size, progress, md5=file.md5, **options)
        origin = {"url": file.url, "md5": file.md5}
        write_chestmnist_study(path, folder, side, images=images, origin=origin, progress=progress)
        if not keep_file:
            path.unlink()
    return folder


def write_chestmnist_study(npz, folder, side, *, images=None, origin=None, progress=None):
    """Writes a downloaded file as a study: `images/*.png`, `labels.csv`, `study.json`; see `fetch_chestmnist`.

    Arrays are read in pieces, never whole, which at 224 pixels would be 5.6 GB. After an interruption it starts again.
    `origin` is what `study.json` records of the file, such as `url` and `md5`.
    """
    folder = local_folder(folder)
    if _is_written(folder, side, images):
        return
    mark = {"complete": False, "side": side, "images": images, **(origin or {})}
    _write_mark(folder, mark)  # first: from now on the folder is ours
    draft, final = folder / "images.part", folder / "images"
    remove_folder(draft)
    remove_folder(final)
    draft.mkdir()
    try:
        with zipfile.ZipFile(npz) as archive, contextlib.ExitStack() as stack:
            arrays = {subset: _Images(archive, subset, side, images, stack) for subset in SUBSETS}
            n_images = sum(len(array.labels) for array in arrays.values())
            assert_space(folder, n_images * side * side)
            bar = progress(total=n_images, unit="image", desc="Writing images") if progress else None
            rows = _write_images(arrays, draft, bar)
            if bar is not None:
                bar.close()
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
        raise ArchiveError(
            f"{npz}: damaged, or not a file of MedMNIST ({error}); remove it and download it again"
        ) from error
    os.replace(draft, final)
    with local_draft(folder / LABELS) as path, path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["image", "split", *PATHOLOGIES], *rows])
    counts = {subset: len(array.labels) for subset, array in arrays.items()}
    _write_mark(folder, mark | {"complete": True, "counts": counts})


class _Images:
    """The images of one subset: checked `labels`, and the pixels as they are read from the archive."""

    def __init__(self, archive, subset, side, limit, stack):
        with archive.open(f"{subset}_labels.npy") as file:
            labels = np.lib.format.read_array(file, allow_pickle=False)
        if labels.shape != (len(labels), len(PATHOLOGIES)) or not np.isin(labels, (0, 1)).all():
            raise ValueError(f"{subset}_labels, of shape {labels.shape}, are no labels of ChestMNIST")
        self.labels, self.side = labels[:limit], side
        self.file = stack.enter_context(archive.open(f"{subset}_images.npy"))
        version = np.lib.format.read_magic(self.file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(self.file)
        if (shape, is_fortran, dtype) != ((len(labels), side, side), False, np.uint8):
            raise ValueError(
                f"{subset}_images is {dtype} of shape {shape}; expected uint8 of shape {(len(labels), side, side)}"
            )

    def __iter__(self):
        left = len(self.labels)
        while left:
            n_bytes = min(left, _CHUNK) * self.side**2
            data = self.file.read(n_bytes)
            if len(data) < n_bytes:
                raise EOFError("it ends within the images")
            yield from np.frombuffer(data, np.uint8).reshape(-1, self.side, self.side)
            left -= min(left, _CHUNK)


def _write_images(arrays, folder, bar):
    """Writes the images as PNGs and returns their rows of `labels.csv`."""
    rows = []

    def write(image, name):
        Image.fromarray(image).save(folder / name)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for subset, array in arrays.items():
            names = (f"chestmnist-{subset}-{number:06d}.png" for number in itertools.count())
            pairs = zip(array, array.labels, names, strict=False)
            while chunk := list(itertools.islice(pairs, _CHUNK)):
                written = [pool.submit(write, image, name) for image, _, name in chunk]
                for future in written:
                    future.result()
                rows += [[f"images/{name}", subset, *map(int, labels)] for _, labels, name in chunk]
                if bar is not None:
                    bar.update(len(chunk))
    return rows


def _read_mark(folder):
    """Returns what `study.json` says of the fetch; {} where it is not of ChestMNIST."""
    path = folder / ABOUT
    return json.loads(read_text(path)).get("fetched", {}) if path.is_file() else {}


def _write_mark(folder, mark):
    write_text(folder / ABOUT, json.dumps({**_ABOUT, "fetched": mark}, indent=1) + "\n")


def _is_written(folder, side, images):
    """Returns whether the study is complete; ValueError where the folder holds another."""
    held = _read_mark(folder)
    if held:
        if (held["side"], held["images"]) != (side, images):
            raise ValueError(
                f"{folder} holds ChestMNIST at {held['side']} pixels, {held['images'] or 'all'} images a subset, "
                f"not at {side} pixels, {images or 'all'} images: name another DATA_DIR, or delete that folder"
            )
        return held["complete"]
    if any(any(folder.glob(pattern)) for pattern in ("Data_Entry_2017*", "images*", LABELS, ABOUT)):
        raise ValueError(f"{folder} holds another study; name another DATA_DIR for ChestMNIST, such as data/chestmnist")
    return False
