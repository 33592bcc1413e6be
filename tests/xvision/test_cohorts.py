"""Cohorts of images with and without a finding: what is selected of a study, and what is refused."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from helpers.packing import decode_image, load_image, pack_study
from helpers.pipeline import make_eval_dataset
from helpers.study import PATHOLOGIES, load_study, plan_nodule_study, plan_synthetic_study, write_synthetic_study
from helpers.xvision import load_cohort, read_cohort_images


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
    cohort = load_cohort(load_study(nodule_dir))
    planned = pd.DataFrame(plan_nodule_study(21)).set_index("image")["findings"].str.len()
    assert cohort.rows["label"].tolist() == planned[cohort.rows["image"]].tolist()
    assert set(cohort.boxes["image"]) == set(planned.index[planned.eq(1)])
    assert len(cohort) == cohort.counts["films"] == 21 and cohort.counts["patients"] == 11
    assert cohort.counts["Normal"] + cohort.counts["Nodule"] == 21 and cohort.classes == ("Normal", "Nodule")
    direct = np.array([np.asarray(Image.open(path)) for path in cohort.paths])
    assert np.array_equal(read_cohort_images(cohort, 48, np.arange(21))[..., 0], direct)
    assert np.array_equal(read_cohort_images(cohort, 48, [9, 2, 20])[..., 0], direct[[9, 2, 20]])
    assert read_cohort_images(cohort, 48, []).shape == (0, 48, 48, 1)


def test_hash_depends_on_the_images_and_not_on_the_folder(nodule_dir, tmp_path):
    cohort = load_cohort(load_study(nodule_dir))
    shutil.copytree(nodule_dir, tmp_path / "copy")
    copy = load_cohort(load_study(tmp_path / "copy"))
    assert copy.sha256 == cohort.sha256 and copy.paths != cohort.paths
    Image.fromarray(np.full((48, 48), 7, np.uint8)).save(copy.paths[4])
    assert load_cohort(load_study(tmp_path / "copy")).sha256 != cohort.sha256


@pytest.fixture(scope="module")
def packed(phantom_dir, rows_and_paths, tmp_path_factory):
    """`phantom_dir` packed with its boxes."""
    rows, paths = rows_and_paths
    options = {"split_name": "official", "side": 48, "shard_images": 16, "study": load_study(phantom_dir)}
    return pack_study(rows, paths, tmp_path_factory.mktemp("packed"), **options)


def test_packed_study_gives_the_images_of_both_classes(packed):
    cohort = load_cohort(packed)
    rows = packed.index.set_index("image").loc[cohort.rows["image"]]
    findings = rows[list(PATHOLOGIES)]
    assert (rows["Nodule"].to_numpy() == cohort.rows["label"]).all()
    assert findings[cohort.rows["label"].eq(0).to_numpy()].to_numpy().sum() == 0
    n_wanted = packed.index["Nodule"].sum() + packed.index[findings.columns].sum(axis=1).eq(0).sum()
    assert len(cohort) == n_wanted
    assert len(cohort.boxes) and set(cohort.boxes["pathology"]) == {"Nodule"}
    assert set(cohort.boxes["image"]) <= set(cohort.rows["image"][cohort.rows["label"].eq(1)])
    assert cohort.rows.index.tolist() == list(range(len(cohort)))  # read_cohort_images uses the row's number


def test_packed_study_and_its_files_give_the_same_images_whatever_the_finding(packed, phantom_dir):
    """The shards have another order, and the study's own files have one that depends on the names alone."""
    for finding in ("Nodule", "effusion"):
        of_shards, of_files = load_cohort(packed, finding), load_cohort(load_study(phantom_dir), finding)
        assert of_shards.classes == of_files.classes == ("Normal", finding.title())
        in_order = of_shards.rows.sort_values("image", ignore_index=True)
        assert in_order.equals(of_files.rows)
        boxes = [cohort.boxes.sort_values(["image", "x"], ignore_index=True) for cohort in (of_shards, of_files)]
        assert boxes[0].equals(boxes[1])
    with pytest.raises(ValueError, match=r"has no finding 'Cough'; it has Atelectasis, Cardiomegaly"):
        load_cohort(packed, "Cough")


def test_packed_images_are_those_of_the_rows(packed):
    cohort, rows = load_cohort(packed, subsets=("test",)), packed.rows("test")
    images = next(iter(make_eval_dataset(packed, "test", len(rows))))[0].numpy()
    numbers = [rows["image"].tolist().index(image) for image in cohort.rows["image"]]
    assert np.array_equal(read_cohort_images(cohort, 48, np.arange(len(cohort))), images[numbers])
    assert np.array_equal(read_cohort_images(cohort, 48, [3, 1]), images[[numbers[3], numbers[1]]])


def write_images(folder, images):
    for number, image in enumerate(images):
        (folder / image).parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(np.full((20, 40), 10 * number, np.uint8)).save(folder / image)


def write_study(folder, table, boxes=None):
    """Writes images of 40 x 20 pixels and the labels of a study of one's own; returns it."""
    write_images(folder, table["image"])
    table.to_csv(folder / "labels.csv", index=False)
    if boxes is not None:
        boxes.to_csv(folder / "boxes.csv", index=False)
    return load_study(folder)


def test_images_whose_labels_do_not_tell_are_left_out(tmp_path):
    labels = {"image": [f"{n}.png" for n in range(6)], "Mass": [1, 0, 0, 1, "", ""], "Nodule": [1, 1, 0, 0, 1, 0]}
    study = write_study(tmp_path / "own", pd.DataFrame(labels))
    cohort = load_cohort(study)
    assert cohort.rows["image"].tolist() == ["0.png", "1.png", "2.png", "4.png"]
    assert cohort.rows["label"].tolist() == [1, 1, 0, 1] and not cohort.has_patients
    assert "patients" not in cohort.counts and cohort.counts["other findings"] == 2
    assert load_cohort(study, "mass").rows["image"].tolist() == ["0.png", "2.png", "3.png"]


def test_where_no_image_is_normal_those_without_the_finding_stand_for_it(tmp_path):
    write_images(tmp_path / "pets", [f"{kind}/{n}.png" for kind in ("cats", "dogs") for n in range(3)])
    cohort = load_cohort(load_study(tmp_path / "pets"), "Dogs")
    assert cohort.classes == ("No dogs", "dogs") and cohort.rows["label"].tolist() == [0, 0, 0, 1, 1, 1]


def test_boxes_of_the_finding_are_moved_into_the_square(tmp_path):
    labels = pd.DataFrame({"image": ["a.png", "b.png"], "Mass": [1, 0], "Nodule": [1, 0]})
    boxes = pd.DataFrame(
        {"image": "a.png", "finding": ["Nodule", "Mass"], "x": [10, 1], "y": 5, "width": 20, "height": 10}
    )
    cohort = load_cohort(write_study(tmp_path / "own", labels, boxes))
    assert cohort.boxes.to_dict("records") == [  # 40 x 20 pixels in the middle of 40 x 40, as 1024 x 1024
        {"image": "a.png", "pathology": "Nodule", "x": 256, "y": 384, "width": 512, "height": 256}
    ]


def test_files_that_are_missing_or_no_images_are_counted_and_left_out(nodule_dir, tmp_path):
    whole = load_cohort(load_study(nodule_dir))
    folder = shutil.copytree(nodule_dir, tmp_path / "copy")
    paths = sorted((folder / "images").iterdir())
    paths[0].unlink()
    paths[1].write_bytes(b"<html>not found</html>")
    paths[2].write_bytes(paths[2].read_bytes()[:-200])
    flipped = bytearray(paths[3].read_bytes())
    flipped[-100] ^= 1
    paths[3].write_bytes(flipped)
    cohort = load_cohort(load_study(folder))
    assert (cohort.counts["missing images"], cohort.counts["broken images"], len(cohort)) == (1, 3, 17)
    assert cohort.rows["image"].tolist() == whole.rows["image"].tolist()[4:]
    assert [path.rsplit("/", 1)[1] for path in cohort.paths] == cohort.rows["image"].tolist()


def test_real_jsrt_images_are_counted(shared_data):
    cohort = load_cohort(load_study(shared_data / "jsrt"))
    assert (cohort.counts["Nodule"], cohort.counts["Normal"], cohort.counts["boxes"]) == (154, 93, 154)
    assert cohort.rows["image"].is_monotonic_increasing and cohort.rows["patient_id"].is_unique
    # What an earlier version computed, so that features that were cached then are those of these images.
    assert cohort.sha256.startswith("cf170a636cb83c04")
    first = cohort.boxes.set_index("image").loc["JPCLN001.png"]
    side = 15 / 0.175 / 2  # a nodule of 15 mm at 1634, 692 of 2048, in pixels of 1024
    expected = [1634 / 2 - side / 2, 692 / 2 - side / 2, side, side]
    assert first[["x", "y", "width", "height"]].tolist() == pytest.approx(expected)


def test_dicom_files_are_read(shared_data, tmp_path):
    names = ["RG1_J2KI.dcm", "RG3_J2KR.dcm"]
    for name in names:
        shutil.copy(shared_data / "dicom" / name, tmp_path)
    pd.DataFrame({"image": names, "Nodule": [0, 1]}).to_csv(tmp_path / "labels.csv", index=False)
    cohort = load_cohort(load_study(tmp_path))
    images = read_cohort_images(cohort, 64, [0, 1])
    for name, image in zip(names, images, strict=True):
        (tmp_path / "one.png").write_bytes(load_image(tmp_path / name)[0])
        assert np.array_equal(image, decode_image((tmp_path / "one.png").read_bytes(), 64))


def test_one_class_alone_is_refused(packed):
    with pytest.raises(ValueError, match=r"none of the 0 images is of class .*; two classes are needed\. Left out: 90"):
        load_cohort(packed, subsets=())
