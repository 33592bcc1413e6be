"""What tests of fetching share: a small study as its sources publish it, in archives on a server of this machine."""

import hashlib
import io
import tarfile
import zipfile

import numpy as np
from PIL import Image

from helpers.fetch.sources import RemoteFile, RemoteStudy

LISTS = {"train_val_list.txt": b"00000001_000.png\n00000001_001.png\n", "test_list.txt": b"00000002_000.png\n"}


def make_image(seed, side=40):
    """Returns an image of noise as the bytes of a PNG, which no archive can make smaller."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def make_tar(files, folder="images/"):
    """Returns the bytes of a tar.gz with files in a folder, as NIH's are."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{folder}{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def make_zip(files):
    """Returns the bytes of a zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(f"images/{name}", data)
    return buffer.getvalue()


def serve_study(server, *, n_archives=2, images=3, side=40):
    """Puts a study into a `FaultyServer`; returns the `RemoteStudy` and the images of all archives by name."""
    metadata, archives, everything = [], [], {}
    for name, data in LISTS.items():
        server.files[f"/{name}"] = data
        metadata.append(RemoteFile(name, f"{server.url}/{name}", sha256=hashlib.sha256(data).hexdigest()))
    for number in range(1, n_archives + 1):
        held = {f"{number:08d}_{k:03d}.png": make_image(100 * number + k, side) for k in range(images)}
        data, name = make_tar(held), f"images_{number:03d}.tar.gz"
        server.files[f"/{name}"] = data
        md5 = hashlib.md5(data).hexdigest()
        archives.append(RemoteFile(name, f"{server.url}/{name}", len(data), len(data), md5=md5, images=images))
        everything |= held
    return RemoteStudy(tuple(metadata), tuple(archives), "https://example.org/study"), everything
