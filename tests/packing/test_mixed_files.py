"""DICOM, PNG and JPEG in one folder: the same pixels as of the converted files, and one broken file costs itself."""

import io
import shutil

import numpy as np
import pandas as pd
import pytest
from made_dicom import make_dicom
from PIL import Image

from helpers.packing import load_image, pack_study
from helpers.packing.image_stream import BATCH, ImageFiles
from helpers.study import draw_image, load_study

FORMATS = (".png", ".dcm", ".jpg", ".dicom")


def encode(pixels, ending):
    if ending in (".dcm", ".dicom"):  # 12 bits, 0 white, and a window: what a detector writes
        levels = 4000 - 12 * pixels.astype(np.uint16)
        window = {"WindowCenter": 4000 - 12 * 128, "WindowWidth": 12 * 255}
        return make_dicom(levels, 12, PhotometricInterpretation="MONOCHROME1", **window)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG" if ending == ".png" else "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 images, two and a half batches, of 64 x 48 pixels in four kinds of files, with labels."""
    folder = tmp_path_factory.mktemp("mixed")
    names = [f"{number:02d}{FORMATS[number % 4]}" for number in range(40)]
    for number, name in enumerate(names):
        pixels = draw_image(number, size=64)[0][8:-8]
        (folder / name).write_bytes(encode(pixels, name[2:]))
    pd.DataFrame({"image": names, "Nodule": [number % 2 for number in range(40)]}).to_csv(
        folder / "labels.csv", index=False
    )
    return folder


def read(paths):
    return dict(zip(paths, ImageFiles(paths, 32).read(paths), strict=True))


def test_a_dicom_file_gives_the_pixels_and_facts_of_the_png_that_it_becomes(folder, tmp_path):
    paths = load_study(folder).list_images()
    converted = {}
    for name, path in paths.items():
        converted[name] = tmp_path / f"{name}.png"
        converted[name].write_bytes(load_image(path)[0])
    for name, image in read(paths).items():
        same = read({name: converted[name]})[name]
        assert image.data == same.data and image[1:4] == same[1:4]
        assert image.n_bytes == paths[name].stat().st_size
    facts = ImageFiles(paths, 32).inspect(paths)
    assert facts == [tuple(image[1:]) for image in read(paths).values()]


def test_a_file_is_what_it_holds_and_not_what_it_is_called(folder, tmp_path):
    (tmp_path / "png.dcm").write_bytes((folder / "00.png").read_bytes())
    (tmp_path / "dicom.png").write_bytes((folder / "01.dcm").read_bytes())
    (tmp_path / "bare.dcm").write_bytes((folder / "01.dcm").read_bytes()[132:])
    images = read({name: tmp_path / name for name in ("png.dcm", "bare.dcm", "dicom.png")})
    same = read({name: folder / name for name in ("00.png", "01.dcm")})
    assert images["png.dcm"] == same["00.png"] and images["dicom.png"] == same["01.dcm"]
    assert "no DICM at byte 128" in images["bare.dcm"]


def test_a_broken_file_is_left_out_with_its_reason_and_costs_no_other(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "study")
    whole = read(load_study(folder).list_images())
    cut = (folder / "01.dcm").read_bytes()
    (tmp_path / "study" / "01.dcm").write_bytes(cut[: len(cut) // 2])
    (tmp_path / "study" / "03.dicom").write_bytes(b"")
    (tmp_path / "study" / "05.dcm").write_bytes(cut[:132] + b"nothing")
    (tmp_path / "study" / f"{BATCH + 1}.dcm").write_bytes(b"<html>")
    (tmp_path / "study" / f"{BATCH + 2}.jpg").write_bytes((folder / f"{BATCH + 2}.jpg").read_bytes()[:300])
    paths = load_study(tmp_path / "study").list_images()
    images = read(paths)
    broken = {name: image for name, image in images.items() if isinstance(image, str)}
    assert list(broken) == ["01.dcm", "03.dicom", "05.dcm", "17.dcm", "18.jpg"]
    assert all(images[name] == whole[name] for name in images.keys() - broken.keys())

    study = load_study(tmp_path / "study")
    rows = study.rows.assign(split=np.resize(["train", "val", "test"], 40))
    packed = pack_study(rows, paths, tmp_path / "packed", split_name="random_patients", side=32, study=study)
    assert {entry["image"]: entry["reason"] for entry in packed.excluded} == broken
    assert "empty file" in broken["03.dicom"] and not any(str(tmp_path) in reason for reason in broken.values())
    assert len(packed.index) == 35 and set(packed.index["image"]) == set(images) - set(broken)
    again = pack_study(rows, paths, tmp_path / "packed", split_name="random_patients", side=32, study=study)
    assert again.index.equals(packed.index)
    shutil.copy(folder / "01.dcm", tmp_path / "study" / "01.dcm")  # a repaired file is taken up
    mended = pack_study(rows, paths, tmp_path / "packed", split_name="random_patients", side=32, study=study)
    assert len(mended.index) == 36 and len(mended.excluded) == 4
