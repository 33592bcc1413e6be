"""Cohorts of images with and without a nodule: what each source selects, and what it refuses."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from helpers.packing import ImageError
from helpers.pipeline import make_eval_dataset
from helpers.study import PATHOLOGIES, load_boxes, plan_nodule_study, plan_synthetic_study, write_synthetic_study
from helpers.xvision import load_folder_cohort, load_jsrt_cohort, load_nih_cohort, read_cohort_images


@pytest.fixture
def jsrt_dir(tmp_path):
    """Three images in JSRT's layout, two with a nodule."""
    (tmp_path / "images").mkdir()
    rows = [("JPCLN001.png", 20, 1024, 512), ("JPCLN002.png", 35, 10, 2040), ("JPCNN001.png", None, None, None)]
    for number, (name, *_) in enumerate(rows):
        Image.fromarray(np.full((64, 64), 40 * number, np.uint8)).save(tmp_path / "images" / name)
    pd.DataFrame(rows, columns=["study_id", "size", "x", "y"]).to_csv(tmp_path / "jsrt_metadata.csv", index=False)
    return tmp_path


def test_planned_nodule_study_has_two_images_a_patient_and_classes_differ_in_nothing_else():
    images = pd.DataFrame(plan_nodule_study(2000, seed=3))
    assert images.groupby("patient").size().eq(2).all() and images["image"].is_unique
    assert images.groupby("patient")["findings"].nunique().max() == 1
    has_nodule = images["findings"].str.len().eq(1)
    assert has_nodule.mean() == 0.4
    means = images.assign(male=images["sex"].eq("M"), bedside=images["view"].eq("AP")).groupby(has_nodule)
    means = means[["male", "bedside", "age"]].mean()
    assert np.abs(means.loc[True] - means.loc[False]).le([0.06, 0.06, 2.5]).all()
    assert not set(images["patient"]) & {image["patient"] for image in plan_synthetic_study(2000)}


def test_folder_of_one_plan_is_not_taken_for_another(nodule_dir):
    assert not write_synthetic_study(nodule_dir, n_images=21, size=48, plan=plan_nodule_study)["written"]
    with pytest.raises(ValueError, match="holds a synthetic study with"):
        write_synthetic_study(nodule_dir, n_images=21, size=48)
    assert json.loads((nodule_dir / "phantom.json").read_text())["settings"]["plan"] == "plan_nodule_study"


def test_folder_gives_labels_boxes_and_images_in_order(nodule_dir):
    cohort = load_folder_cohort(nodule_dir)
    planned = pd.DataFrame(plan_nodule_study(21)).set_index("image")["findings"].str.len()
    assert cohort.rows["label"].tolist() == planned[cohort.rows["image"]].tolist()
    assert set(cohort.boxes["image"]) == set(planned.index[planned.eq(1)])
    assert len(cohort) == cohort.counts["films"] == 21 and cohort.counts["patients"] == 11
    assert cohort.counts["Normal"] + cohort.counts["Nodule"] == 21
    direct = np.array([np.asarray(Image.open(path)) for path in cohort.paths])
    assert np.array_equal(read_cohort_images(cohort, 48, np.arange(21))[..., 0], direct)
    assert np.array_equal(read_cohort_images(cohort, 48, [9, 2, 20])[..., 0], direct[[9, 2, 20]])
    assert read_cohort_images(cohort, 48, []).shape == (0, 48, 48, 1)


def test_hash_depends_on_the_images_and_not_on_the_folder(nodule_dir, tmp_path):
    cohort = load_folder_cohort(nodule_dir)
    shutil.copytree(nodule_dir, tmp_path / "copy")
    copy = load_folder_cohort(tmp_path / "copy")
    assert copy.sha256 == cohort.sha256 and copy.paths != cohort.paths
    Image.fromarray(np.full((48, 48), 7, np.uint8)).save(copy.paths[4])
    assert load_folder_cohort(tmp_path / "copy").sha256 != cohort.sha256


def test_packed_study_gives_the_images_of_both_classes(packed, phantom_dir):
    cohort = load_nih_cohort(packed, load_boxes(phantom_dir))
    rows = packed.index.set_index("image").loc[cohort.rows["image"]]
    findings = rows[list(PATHOLOGIES)]
    assert (rows["Nodule"].to_numpy() == cohort.rows["label"]).all()
    assert findings[cohort.rows["label"].eq(0).to_numpy()].to_numpy().sum() == 0
    n_wanted = packed.index["Nodule"].sum() + packed.index[findings.columns].sum(axis=1).eq(0).sum()
    assert len(cohort) == n_wanted
    assert set(cohort.boxes["pathology"]) <= {"Nodule"} and set(cohort.boxes["image"]) <= set(cohort.rows["image"])
    assert cohort.rows.index.tolist() == list(range(len(cohort)))  # read_cohort_images uses the row's number


def test_packed_images_are_those_of_the_rows(packed):
    cohort, rows = load_nih_cohort(packed, subsets=("test",)), packed.rows("test")
    images = next(iter(make_eval_dataset(packed, "test", len(rows))))[0].numpy()
    numbers = [rows["image"].tolist().index(image) for image in cohort.rows["image"]]
    assert np.array_equal(read_cohort_images(cohort, 48, np.arange(len(cohort))), images[numbers])
    assert np.array_equal(read_cohort_images(cohort, 48, [3, 1]), images[[numbers[3], numbers[1]]])


def test_jsrt_positions_become_boxes_inside_the_image(jsrt_dir):
    cohort = load_jsrt_cohort(jsrt_dir)
    assert cohort.rows["label"].tolist() == [1, 1, 0] and cohort.rows["patient_id"].is_unique
    boxes = cohort.boxes.set_index("image")
    side = 20 / 0.175 / 2  # a nodule of 20 mm, in pixels of 1024
    assert boxes.loc["JPCLN001.png", ["x", "y"]].tolist() == pytest.approx([512 - side / 2, 256 - side / 2])
    assert boxes.loc["JPCLN001.png", ["width", "height"]].tolist() == pytest.approx([side, side])
    at_corner = boxes.loc["JPCLN002.png"]
    assert at_corner["x"] == 0 and at_corner["y"] + at_corner["height"] == pytest.approx(1024)


def test_real_jsrt_images_are_counted(shared_data):
    cohort = load_jsrt_cohort(shared_data / "jsrt")
    assert (cohort.counts["Nodule"], cohort.counts["Normal"], cohort.counts["boxes"]) == (154, 93, 154)


def test_labels_of_missing_images_are_refused(jsrt_dir):
    (jsrt_dir / "images" / "JPCLN002.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"JPCLN002\.png\) labeled but not there; fetch what is"):
        load_jsrt_cohort(jsrt_dir)
    (jsrt_dir / "jsrt_metadata.csv").unlink()
    with pytest.raises(FileNotFoundError, match="SOURCE_DIR"):
        load_jsrt_cohort(jsrt_dir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.rename(columns={"x": "left"}), "has no column x; it has study_id, size, left, y"),
        (lambda table: table.replace({"x": {1024: 3000}}), r"JPCLN001\.png has a nodule at 3000, 512"),
        (lambda table: pd.concat([table, table.iloc[:1]]), r"JPCLN001\.png is labeled more than once"),
        (lambda table: table.iloc[:2], "none of the 2 images is of class Normal"),
        # Without its x a nodule would count as a normal image, without its size its box would be empty.
        (lambda table: table.replace({"x": {1024: None}}), r"001\.png has size 20.0, x nan, y 512.0; expected three"),
        (lambda table: table.replace({"size": {20: None}}), r"001\.png has size nan, x 1024.*; expected three numbers"),
        (lambda table: table.astype(object).replace({"y": {512: "low"}}), r"001\.png has .*y low; expected three"),
    ],
)
def test_malformed_jsrt_labels_are_refused(jsrt_dir, change, message):
    change(pd.read_csv(jsrt_dir / "jsrt_metadata.csv")).to_csv(jsrt_dir / "jsrt_metadata.csv", index=False)
    with pytest.raises(ValueError, match=message):
        load_jsrt_cohort(jsrt_dir)


def test_unreadable_files_are_named(jsrt_dir):
    (jsrt_dir / "images" / "JPCNN001.png").write_bytes(b"<html>not found</html>")
    with pytest.raises(ImageError, match=r"1 of 3 images cannot be read.*JPCNN001\.png.*a web page"):
        load_jsrt_cohort(jsrt_dir)


def test_packed_study_without_one_class_is_refused(packed):
    with pytest.raises(ValueError, match="none of the 0 images is of class Normal"):
        load_nih_cohort(packed, subsets=())
