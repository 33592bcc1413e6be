"""ChestMNIST: the images of ChestX-ray14 in small, with a split of its own and nothing that tells who a patient is.

MedMNIST (Yang et al., Scientific Data 2023) gives all 112,120 images at 64, 128 or 224 pixels in one file. It becomes a
study in NIH's layout, marked by `chestmnist.json`, from which everything that follows knows that there are no patients:
one split, intervals over images, no floors or subgroups by view, sex and age. Its split is the community's random one
by patient, so its scores do not compare with those on NIH's official list.
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
from ..study.labels import CHESTMNIST_MARK, PATHOLOGIES
from .archives import ArchiveError
from .downloads import assert_space, download_file
from .plan import DiskPlan, ask_sizes, assert_room, claim_folder, local_folder
from .sources import RemoteFile, parse_mirror

CHESTMNIST_PAGE = "https://zenodo.org/records/10519652"
# MD5 of each size, from MedMNIST's own list. Their order of findings is that of `PATHOLOGIES`.
_MD5 = {
    64: "9de6cd0b934ebb5b7426cfba5efbae16",
    128: "db107e5590b27930b62dbaf558aebee3",
    224: "45bd33e6f06c3e8cdb481c74a89152aa",
}
_IMAGES = 112_120
_PACKED = 0.75  # bytes of the file for a byte of an image, more or less: 3.9 GB at 224 pixels
_TERMS = {
    "license": "CC BY 4.0",
    "citation": "Yang et al., MedMNIST v2, Scientific Data 2023; Wang et al., ChestX-ray8, CVPR 2017",
    "provider": "NIH Clinical Center",
}
_PARTS = ("train", "val", "test")
_CHUNK = 256  # images in memory at a time
_COLUMNS = "Image Index|Finding Labels|Follow-up #|Patient ID|Patient Age|Patient Gender|View Position"


def list_chestmnist_file(side, mirror=""):
    """Returns the `RemoteFile` of ChestMNIST at 64, 128 or 224 pixels, at Zenodo or in a `mirror`'s folder."""
    if side not in _MD5:
        raise ValueError(f"CHESTMNIST_SIDE is {side!r}; expected {', '.join(map(str, _MD5))} pixels")
    name = f"chestmnist_{side}.npz"
    mirror = parse_mirror(mirror)
    url = f"{mirror}/{name}" if mirror else f"{CHESTMNIST_PAGE}/files/{name}?download=1"
    return RemoteFile(name, url, round(_PACKED * _IMAGES * side * side), md5=_MD5[side], images=_IMAGES)


def plan_chestmnist(file, folder, side, *, images=None, packed_side=None, packed_dir=None, retries=5, pause=1.0):
    """Plans what ChestMNIST takes on the disk, and checks that there is room for it; see `plan_fetch`.

    Args:
        file: `RemoteFile` of `list_chestmnist_file`.
        folder: path of the study's folder; made if missing.
        side: pixels, of its images.
        images: most images of each part, or None.
        packed_side: pixels, of the packed images; None for `side`.
        packed_dir: path of the folder for the shards; None to leave them out of the check of room.
        retries: as for `open_session`, while the size is asked for.
        pause: as for `open_session`.

    Returns:
        A `DiskPlan`.

    Raises:
        DownloadError: the disk lacks space.
    """
    folder = local_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    n_images = min(_IMAGES, 3 * images) if images else _IMAGES
    kept, packed = n_images * side * side, n_images * ((packed_side or side) ** 2 + 300)
    if _is_written(folder, side, images):
        n_images = sum(json.loads(read_text(folder / CHESTMNIST_MARK))["counts"].values())
        return DiskPlan(0, n_images * side**2, n_images * side**2, n_images * ((packed_side or side) ** 2 + 300))
    there = sum(path.stat().st_size for path in folder.glob(f"{file.name}*"))
    size = ask_sizes([file], retries, pause)[file]
    plan = DiskPlan(max(0, size - there), size + kept, kept, packed)
    assert_room(plan, folder, there, packed_dir, less="Fewer CHESTMNIST_IMAGES or a smaller CHESTMNIST_SIDE")
    return plan


def fetch_chestmnist(file, folder, side, *, images=None, keep_file=False, progress=None, **options):
    """Downloads ChestMNIST and writes it as a study in NIH's layout; one that is there is left as it is.

    Args:
        file: `RemoteFile` of `list_chestmnist_file`.
        folder: path of the study's folder, on a disk of this machine; made if missing.
        side: pixels, of its images.
        images: most images of each part, the first ones in the file; None for all.
        keep_file: whether the downloaded file stays.
        progress: callable such as `tqdm`, see `download_file` and `write_chestmnist_study`.
        **options: `retries`, `pause` and `timeout` of `download_file`.

    Returns:
        Path of the study's folder.

    Raises:
        DownloadError: see `download_file`.
        ArchiveError: the file is damaged or no ChestMNIST.
        RuntimeError: another process fetches into the folder.
        ValueError: the folder is in a bucket, or holds another study.
    """
    folder = local_folder(folder)
    if _is_written(folder, side, images):
        return folder
    path = folder / file.name
    with claim_folder(folder):
        download_file(file.url, path, file.sha256, file.size, progress, md5=file.md5, **options)
        about = {"source": file.url, "file": file.name, "md5": file.md5}
        write_chestmnist_study(path, folder, side, images=images, about=about, progress=progress)
        if not keep_file:
            path.unlink()
    return folder


def write_chestmnist_study(npz, folder, side, *, films=None, about=None, progress=None):
    """Writes ChestMNIST's file as a study: `images/*.png`, a label file in NIH's columns, `chestmnist.json`.

    Arrays are read in pieces, never whole, which at 224 pixels would be 5.6 GB. There being no patients, every image
    gets a patient ID of its own, and age, sex and view are unknown. An interrupted call begins anew.

    Args:
        npz: path of the file.
        folder: path of the study's folder; made if missing.
        side: pixels, of its images.
        images: most images of each part; None for all.
        about: dict of what else `chestmnist.json` is to tell, such as `source` and `md5`.
        progress: callable such as `tqdm`, called with `total=`, `unit=` and `desc=`, returning an object with
            `update(n)` and `close()`.

    Raises:
        ArchiveError: the file is damaged, or its arrays are not those of ChestMNIST at this size.
        DownloadError: the disk lacks space.
        ValueError: the folder holds another study.
    """
    folder = local_folder(folder)
    if _is_written(folder, side, films):
        return
    mark = {"complete": False, "side": side, "images_a_part": films, **(about or {}), **_TERMS}
    write_text(folder / CHESTMNIST_MARK, json.dumps(mark, indent=1) + "\n")  # first: from now on the folder is ours
    draft, images = folder / "images.part", folder / "images"
    remove_folder(draft)
    remove_folder(images)
    draft.mkdir()
    try:
        with zipfile.ZipFile(npz) as archive, contextlib.ExitStack() as stack:
            arrays = {part: _Images(archive, part, side, films, stack) for part in _PARTS}
            n_images = sum(len(array.labels) for array in arrays.values())
            assert_space(folder, n_images * side * side)
            bar = progress(total=n_images, unit="film", desc="Writing images") if progress else None
            rows = _write_images(arrays, draft, bar)
            if bar is not None:
                bar.close()
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise ArchiveError(
            f"{npz}: damaged, or no file of MedMNIST ({error}); remove it and download it again"
        ) from error
    os.replace(draft, images)
    with local_draft(folder / "Data_Entry_2017_chestmnist.csv") as path, path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([_COLUMNS.split("|"), *rows])
    counts = {part: len(array.labels) for part, array in arrays.items()}
    write_text(folder / CHESTMNIST_MARK, json.dumps(mark | {"complete": True, "counts": counts}, indent=1) + "\n")


class _Images:
    """The images of one part: checked `labels`, and the pixels as they are read from the archive."""

    def __init__(self, archive, part, side, limit, stack):
        with archive.open(f"{part}_labels.npy") as file:
            labels = _read_header(archive, file, f"{part}_labels")
            n_images = labels[0][0]
            if labels[0] != (n_images, len(PATHOLOGIES)) or labels[1].kind not in "biu":
                raise ArchiveError(f"{archive.filename}: {part}_labels has shape {labels[0]}; is this ChestMNIST?")
            self.labels = np.frombuffer(file.read(), labels[1]).reshape(labels[0])[:limit]
        if not np.isin(self.labels, (0, 1)).all():
            raise ArchiveError(f"{archive.filename}: {part}_labels holds other numbers than 0 and 1")
        self.file, self.side = stack.enter_context(archive.open(f"{part}_images.npy")), side
        shape, dtype = _read_header(archive, self.file, f"{part}_images")
        if shape != (n_images, side, side) or dtype != np.uint8:
            raise ArchiveError(
                f"{archive.filename}: {part}_images is {dtype} of shape {shape}; expected uint8 of shape "
                f"{(n_images, side, side)}"
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


def _read_header(archive, file, name):
    """Returns shape and dtype of an array in an npz; ArchiveError for what is no plain array."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(file)
    except ValueError as error:
        raise ArchiveError(f"{archive.filename}: {name} is no array ({error})") from error
    if is_fortran or dtype.hasobject or len(shape) < 2:
        raise ArchiveError(f"{archive.filename}: {name} is {dtype} of shape {shape}; is this ChestMNIST?")
    return shape, dtype


def _write_images(arrays, folder, bar):
    """Writes the images as PNGs and returns their rows of the label file."""
    rows = []

    def write(image, name):
        Image.fromarray(image).save(folder / name)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for part, array in arrays.items():
            names = (f"chestmnist-{part}-{number:06d}.png" for number in itertools.count())
            pairs = zip(array, array.labels, names, strict=False)
            while chunk := list(itertools.islice(pairs, _CHUNK)):
                written = [pool.submit(write, image, name) for image, _, name in chunk]
                for future in written:
                    future.result()
                for _, labels, name in chunk:
                    found = [finding for finding, value in zip(PATHOLOGIES, labels, strict=True) if value]
                    findings = "|".join(found) or "No Finding"
                    rows.append([name, findings, 0, len(rows) + 1, "", "unknown", "unknown"])
                if bar is not None:
                    bar.update(len(chunk))
    return rows


def _is_written(folder, side, images):
    """Whether the study is there; ValueError where the folder holds another."""
    mark = folder / CHESTMNIST_MARK
    if mark.exists():
        held = json.loads(read_text(mark))
        if (held["side"], held["images_a_part"]) != (side, images):
            raise ValueError(
                f"{folder} holds ChestMNIST at {held['side']} pixels, {held['images_a_part'] or 'all'} images a part, "
                f"and {side} pixels, {images or 'all'} images are asked for: name another DATA_DIR, or delete that folder"
            )
        return held["complete"]
    if folder.exists() and (any(folder.glob("Data_Entry_2017*")) or any(folder.glob("images*"))):
        raise ValueError(f"{folder} holds another study; name another DATA_DIR for ChestMNIST, such as data/chestmnist")
    return False
