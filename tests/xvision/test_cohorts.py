"""Cohorts of images with and without a nodule: what each source selects, and what it refuses."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from helpers.packing import ImageError
from helpers.study import PATHOLOGIES, load_boxes, plan_nodule_study, plan_synthetic_study, write_synthetic_study
from helpers.xvision import (
    cohort_of_files,
    load_folder_cohort,
    load_jsrt_cohort,
    load_nih_cohort,
    make_cohort_dataset,
    read_cohort_images,
)


@pytest.fixture(scope="module")
def nodule_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies") / "nodules"
    write_synthetic_study(folder, n_images=21, size=48, plan=plan_nodule_study, n_workers=1)
    return folder


@pytest.fixture
def jsrt_dir(tmp_path):
    """Three images in JSRT's layout, two with a nodule."""
    (tmp_path / "images").mkdir()
    rows = [("JPCLN001.png", 20, 1024, 512), ("JPCLN002.png", 35, 10, 2040), ("JPCNN001.png", None, None, None)]
    for number, (name, *_) in enumerate(rows):
        Image.fromarray(np.full((64, 64), 40 * number, np.uint8)).save(tmp_path / "images" / name)
    pd.DataFrame(rows, columns=["study_id", "size", "x", "y"]).to_csv(tmp_path / "jsrt_metadata.csv", index=False)
    return tmp_path


def test_nodule_study_has_two_images_a_patient_and_nothing_else_tells_the_kinds_apart():
    images = pd.DataFrame(plan_nodule_study(2000, seed=3))
    assert images.groupby("patient").size().eq(2).all() and images["image"].is_unique
    assert images.groupby("patient")["findings"].nunique().max() == 1
    has_nodule = images["findings"].str.len().eq(1)
    assert has_nodule.mean() == 0.4
    means = images.assign(male=images["sex"].eq("M"), bedside=images["view"].eq("AP")).groupby(has_nodule)
    means = means[["male", "bedside", "age"]].mean()
    assert np.abs(means.loc[True] - means.loc[False]).le([0.06, 0.06, 2.5]).all()


def test_nodule_study_shares_no_patient_with_other_drawn_studies():
    others = {image["patient"] for image in plan_synthetic_study(2000)}
    assert not others & {image["patient"] for image in plan_nodule_study(2000)}


def test_folders_of_two_plans_are_not_taken_for_each_other(nodule_dir, tmp_path):
    assert not write_synthetic_study(nodule_dir, n_images=21, size=48, plan=plan_nodule_study)["written"]
    with pytest.raises(ValueError, match="holds a phantom study with"):
        write_synthetic_study(nodule_dir, n_images=21, size=48)


def test_folder_gives_labels_boxes_and_images_in_order(nodule_dir):
    cohort = load_folder_cohort(nodule_dir)
    planned = pd.DataFrame(plan_nodule_study(21)).set_index("image")["findings"].str.len()
    assert cohort.images["label"].tolist() == planned[cohort.images["image"]].tolist()
    assert set(cohort.boxes["image"]) == set(planned.index[planned.eq(1)])
    assert cohort.counts["films"] == 21 and cohort.counts["patients"] == 11
    assert cohort.counts["Normal"] + cohort.counts["Nodule"] == 21
    batches = [batch.numpy() for batch in make_cohort_dataset(cohort, 48, 8)]
    assert [len(batch) for batch in batches] == [8, 8, 5]
    direct = [np.asarray(Image.open(path)) for path in cohort.paths]
    assert np.array_equal(np.concatenate(batches)[..., 0], direct)
    assert np.array_equal(read_cohort_images(cohort, 48, [9, 2, 20])[..., 0], np.array(direct)[[9, 2, 20]])
    assert read_cohort_images(cohort, 48, []).shape == (0, 48, 48, 1)


def test_hash_is_of_the_images_and_not_of_the_place(nodule_dir, tmp_path):
    first = load_folder_cohort(nodule_dir)
    paths = dict(zip(first.images["image"], first.paths, strict=True))
    for image, path in paths.items():
        shutil.copy(path, tmp_path / image)
    moved = {image: tmp_path / image for image in paths}
    assert cohort_of_files("phantom", first.images, moved).sha256 == first.sha256
    image = first.images["image"][4]
    Image.fromarray(np.full((48, 48), 7, np.uint8)).save(moved[image])
    assert cohort_of_files("phantom", first.images, moved).sha256 != first.sha256


def test_packed_study_gives_the_images_of_both_kinds(packed, phantom_dir):
    cohort = load_nih_cohort(packed, load_boxes(phantom_dir))
    rows = packed.index.set_index("image").loc[cohort.images["image"]]
    findings = rows[list(PATHOLOGIES)]
    assert (rows["Nodule"].to_numpy() == cohort.images["label"]).all()
    assert findings[cohort.images["label"].eq(0).to_numpy()].to_numpy().sum() == 0
    n_wanted = packed.index["Nodule"].sum() + packed.index[findings.columns].sum(axis=1).eq(0).sum()
    assert len(cohort) == n_wanted
    assert set(cohort.boxes["pathology"]) <= {"Nodule"} and set(cohort.boxes["image"]) <= set(cohort.images["image"])
    assert cohort.images.index.tolist() == list(range(len(cohort)))  # read_cohort_images goes by the row's number


def test_packed_images_are_those_of_the_rows(packed):
    cohort = load_nih_cohort(packed, subsets=("test",))
    assert set(packed.rows("test")["image"]) >= set(cohort.rows["image"])
    from helpers.pipeline import make_eval_dataset

    images = next(iter(make_eval_dataset(packed, "test", len(packed.rows("test")))))[0].numpy()
    numbers = [packed.rows("test")["image"].tolist().index(image) for image in cohort.rows["image"]]
    assert np.array_equal(read_cohort_images(cohort, 48, np.arange(len(cohort))), images[numbers])
    assert np.array_equal(read_cohort_images(cohort, 48, [3, 1]), images[[numbers[3], numbers[1]]])


def test_jsrt_positions_become_boxes_inside_the_image(jsrt_dir):
    cohort = load_jsrt_cohort(jsrt_dir)
    assert cohort.images["label"].tolist() == [1, 1, 0] and cohort.images["patient_id"].is_unique
    boxes = cohort.boxes.set_index("image")
    side = 20 / 0.175 / 2  # a nodule of 20 mm, in pixels of 1024
    assert boxes.loc["JPCLN001.png", ["x", "y"]].tolist() == pytest.approx([512 - side / 2, 256 - side / 2])
    assert boxes.loc["JPCLN001.png", ["width", "height"]].tolist() == pytest.approx([side, side])
    at_corner = boxes.loc["JPCLN002.png"]
    assert at_corner["x"] == 0 and at_corner["y"] + at_corner["height"] == pytest.approx(1024)


def test_jsrt_images_as_they_are(shared_data):
    cohort = load_jsrt_cohort(shared_data / "jsrt")
    assert (cohort.counts["Nodule"], cohort.counts["Normal"], cohort.counts["boxes"]) == (154, 93, 154)


def test_labels_that_name_unknown_images_are_refused(jsrt_dir):
    (jsrt_dir / "images" / "JPCLN002.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"JPCLN002\.png\) labeled but not there; fetch what is"):
        load_jsrt_cohort(jsrt_dir)


def test_jsrt_without_labels_or_with_other_columns_is_refused(jsrt_dir):
    table = pd.read_csv(jsrt_dir / "jsrt_metadata.csv")
    table.rename(columns={"x": "left"}).to_csv(jsrt_dir / "jsrt_metadata.csv", index=False)
    with pytest.raises(ValueError, match="has no column x; it has study_id, size, left, y"):
        load_jsrt_cohort(jsrt_dir)
    table.assign(x=table["x"].where(table["x"].isna(), 3000)).to_csv(jsrt_dir / "jsrt_metadata.csv", index=False)
    with pytest.raises(ValueError, match=r"JPCLN001\.png has a nodule at 3000, 512"):
        load_jsrt_cohort(jsrt_dir)
    (jsrt_dir / "jsrt_metadata.csv").unlink()
    with pytest.raises(FileNotFoundError, match="SOURCE_DIR"):
        load_jsrt_cohort(jsrt_dir)


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [("x", None, "size 20.0, x nan, y 512.0"), ("size", None, "size nan, x 1024"), ("y", "low", "y low")],
)
def test_jsrt_nodules_that_are_half_described_are_refused(jsrt_dir, column, value, told):
    """Without its x a nodule would be a normal image, without its size a box of no extent."""
    table = pd.read_csv(jsrt_dir / "jsrt_metadata.csv").astype(object)
    table.loc[0, column] = value
    table.to_csv(jsrt_dir / "jsrt_metadata.csv", index=False)
    with pytest.raises(ValueError, match=rf"JPCLN001\.png has .*{told}.*; expected three numbers, or none"):
        load_jsrt_cohort(jsrt_dir)


def test_image_that_is_labeled_twice_is_refused(jsrt_dir):
    table = pd.read_csv(jsrt_dir / "jsrt_metadata.csv")
    pd.concat([table, table.iloc[:1]]).to_csv(jsrt_dir / "jsrt_metadata.csv", index=False)
    with pytest.raises(ValueError, match=r"JPCLN001\.png is labeled more than once"):
        load_jsrt_cohort(jsrt_dir)


def test_files_that_are_no_images_are_named(jsrt_dir):
    (jsrt_dir / "images" / "JPCNN001.png").write_bytes(b"<html>not found</html>")
    with pytest.raises(ImageError, match=r"1 of 3 images cannot be read.*JPCNN001\.png.*a web page"):
        load_jsrt_cohort(jsrt_dir)


def test_one_class_alone_is_refused(jsrt_dir, packed):
    table = pd.read_csv(jsrt_dir / "jsrt_metadata.csv").iloc[:2]
    table.to_csv(jsrt_dir / "jsrt_metadata.csv", index=False)
    with pytest.raises(ValueError, match="none of the 2 images is of class Normal"):
        load_jsrt_cohort(jsrt_dir)
    with pytest.raises(ValueError, match="none of the 0 images is of class Normal"):
        load_nih_cohort(packed, subsets=())


def test_phantom_mark_tells_the_plan(nodule_dir):
    assert json.loads((nodule_dir / "phantom.json").read_text())["settings"]["plan"] == "plan_nodule_study"
