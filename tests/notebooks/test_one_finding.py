"""Notebook 6 on folders of one's own: a folder a class, without patients and boxes, and a finding of another name."""

import json

import numpy as np
import pandas as pd
import pytest
from chain import XVISION, check_nodules, name_folders, run_chain
from made_dicom import make_dicom
from PIL import Image

from helpers.study import draw_image

pytestmark = pytest.mark.slow


def test_a_folder_a_class_without_patients(tmp_path, capsys):
    for number in range(48):
        kind = ("No Finding", "Big heart", "mass")[number % 3]
        found = {"Big heart": ["Cardiomegaly"], "mass": ["Mass"]}.get(kind, [])
        pixels = draw_image(number, found, size=64)[0]
        (tmp_path / "hearts" / kind).mkdir(parents=True, exist_ok=True)
        path = tmp_path / "hearts" / kind / f"{number}{('.png', '.dicom')[number % 2]}"
        if path.suffix == ".png":
            Image.fromarray(pixels).save(path)
        else:
            path.write_bytes(make_dicom(pixels))
    settings = name_folders(tmp_path / "none", tmp_path / "run", tmp_path / "packed")
    settings |= {
        "SOURCE": "folder",
        "SOURCE_DIR": str(tmp_path / "hearts"),
        "FINDING": "big heart",
        "BACKBONES": "VGG16",
    }
    names = run_chain([XVISION], settings, draw=False)
    study = check_nodules(tmp_path / "run" / "xvision-hearts", "Big heart")
    assert study["classes"] == ["Normal", "Big heart"] and "patients" not in study["counts"]
    assert study["counts"] | {"films": 32, "Normal": 16, "Big heart": 16, "boxes": 0} == study["counts"]
    assert not study["saliency"] and "probability of Big heart" in names["answer"]
    assert names["unit"] == "images (no patient ids)"
    images = pd.read_csv(tmp_path / "run" / "xvision-hearts" / "predictions.csv")
    assert images["label"].tolist() == [int("Big heart" in image) for image in images["image"]]
    assert np.isfinite(
        json.loads((tmp_path / "run" / "xvision-hearts" / "study.json").read_text())["scores"][0]["value"]
    )
    with pytest.raises(ValueError, match="has no finding 'Nodule'; it has Big heart, mass"):
        run_chain([XVISION], settings | {"FINDING": "Nodule"}, until="cohort = gather_cohort()")
