"""The synthetic study: NIH's formats, reproducible bytes, patient-disjoint lists, findings that can be seen."""

import csv
import functools
import hashlib
import json
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from helpers.study import PATHOLOGIES, draw_image, plan_synthetic_study, write_synthetic_study
from helpers.study.synthetic import PREVALENCE, SYNTHETIC_VERSION

CSV, BOXES = "Data_Entry_2017_v2020.csv", "BBox_List_2017.csv"
SMALL = {"n_images": 60, "size": 64, "seed": 3, "n_workers": 1}


def digest(study_dir):
    """Returns {relative path: SHA-256} of all files of a study."""
    files = (path for path in sorted(study_dir.rglob("*")) if path.is_file())
    return {str(path.relative_to(study_dir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_rows(path):
    with path.open(newline="") as table:
        return list(csv.reader(table))


def shrink(image, size=64):
    """Returns an image reduced to what a small model sees, as float."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX), float)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    study_dir = tmp_path_factory.mktemp("phantom") / "study"
    write_synthetic_study(study_dir, **SMALL)
    return study_dir


def test_files_have_the_formats_of_nih(study):
    header = (study / CSV).read_text().splitlines()[0]
    assert header == (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    )
    assert (study / BOXES).read_text().splitlines()[0] == "Image Index,Finding Label,Bbox [x,y,w,h],,,"
    rows = read_rows(study / CSV)[1:]
    assert len(rows) == 60
    for image, labels, visit, patient, age, sex, view, width, height, spacing, spacing_y in rows:
        assert image == f"{int(patient):08d}_{int(visit):03d}.png"
        names = labels.split("|")
        assert names == ["No Finding"] or (names == sorted(names) and set(names) <= set(PATHOLOGIES))
        assert 0 < int(age) < 100 and sex in "MF" and view in ("PA", "AP")
        assert int(width) > 1000 and int(height) > 1000 and 0.1 < float(spacing) == float(spacing_y) < 0.3
        with Image.open(study / "images" / image) as opened:
            assert opened.mode == "L" and opened.size == (64, 64) and opened.format == "PNG"
    assert len(list((study / "images").iterdir())) == 60


def test_lists_are_disjoint_by_patient_and_complete(study):
    train, test = ((study / f"{name}_list.txt").read_text() for name in ("train_val", "test"))
    assert not train.endswith("\n") and not test.endswith("\n")
    train, test = train.split("\n"), test.split("\n")
    assert sorted(train + test) == sorted(row[0] for row in read_rows(study / CSV)[1:])
    assert not {name[:8] for name in train} & {name[:8] for name in test}
    assert len(test) == round(0.22 * 60)


@pytest.mark.slow
def test_same_seed_same_bytes_with_any_number_of_workers(study, tmp_path):
    write_synthetic_study(tmp_path / "two", **SMALL | {"n_workers": 2})
    assert digest(tmp_path / "two") == digest(study)


def test_another_seed_gives_other_images(study, tmp_path):
    write_synthetic_study(tmp_path / "other", **SMALL | {"seed": 4, "n_images": 10})
    images = {hashed for name, hashed in digest(study).items() if name.endswith("png")}
    assert len(images) == 60 and not images & set(digest(tmp_path / "other").values())


def test_plan_holds_every_finding_in_both_lists():
    for n_images, seed in ((300, 0), (300, 7), (1000, 1)):
        images = plan_synthetic_study(n_images, seed)
        assert len(images) == n_images == len({image["image"] for image in images})
        for name in PATHOLOGIES:
            ill = [image for image in images if name in image["findings"]]
            for split in ("train_val", "test"):
                assert len({image["patient"] for image in ill if image["split"] == split}) >= 3, (name, split, seed)
        assert 0.3 < np.mean([not image["findings"] for image in images]) < 0.45


def test_plan_resembles_the_study_that_it_stands_for():
    images = plan_synthetic_study(4000, 0)
    has = {name: np.array([name in image["findings"] for image in images]) for name in PATHOLOGIES}
    bedside = np.array([image["view"] == "AP" for image in images])
    for name in PATHOLOGIES:
        assert has[name].mean() == pytest.approx(PREVALENCE[name], abs=0.01)
    assert bedside[has["Edema"]].mean() > bedside.mean() + 0.3
    for first, second in (("Effusion", "Atelectasis"), ("Cardiomegaly", "Edema"), ("Consolidation", "Pneumonia")):
        assert has[second][has[first]].mean() > 1.3 * has[second].mean()
    visits = {
        split: [image["patient"] for image in images if image["split"] == split] for split in ("train_val", "test")
    }
    per_patient = {split: len(ids) / len(set(ids)) for split, ids in visits.items()}
    assert per_patient["test"] > 1.5 * per_patient["train_val"]
    for image, later in pairwise(images):
        if image["patient"] == later["patient"]:
            assert later["visit"] == image["visit"] + 1
            assert later["age"] >= image["age"] and later["sex"] == image["sex"]


def test_boxes_are_in_the_frame_and_for_every_boxed_positive_of_the_test_list(study):
    boxes = read_rows(study / BOXES)[1:]
    test = set((study / "test_list.txt").read_text().split("\n"))
    expected = {
        (row[0], name.replace("Infiltration", "Infiltrate"))
        for row in read_rows(study / CSV)[1:]
        for name in row[1].split("|")
        if row[0] in test and name in PATHOLOGIES[:8]
    }
    assert {(row[0], row[1]) for row in boxes} == expected
    for row in boxes:
        x, y, width, height = map(float, row[2:])
        assert x >= 0 and y >= 0 and width > 0 and height > 0 and x + width <= 1024 and y + height <= 1024


@functools.cache
def draw_normal(seed, view="PA", size=256):
    return draw_image(seed, view=view, size=size)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", PATHOLOGIES)
def test_every_finding_shows_at_64_pixels(name):
    for seed, view in ((0, "PA"), (1, "AP"), (2, "PA")):
        ill, boxes = draw_image(seed, (name,), view=view)
        change = np.abs(shrink(ill) - shrink(draw_normal(seed, view)))
        # Grain of 3-4 gray levels at 256 pixels averages to below 1 in these blocks of 4 by 4.
        assert (change > 8).sum() >= 8
        assert list(boxes) == [name]


@pytest.mark.parametrize("name", PATHOLOGIES[:8])
def test_the_change_lies_in_the_boxes(name):
    for seed in range(3):
        normal = draw_normal(seed, size=128)
        ill, boxes = draw_image(seed, (name,), size=128)
        inside = np.zeros((128, 128), bool)
        for x, y, width, height in boxes[name]:
            inside[int(y) : int(y + height), int(x) : int(x + width)] = True
        change = np.abs(ill.astype(float) - normal)
        assert change[inside].mean() > 3 * change[~inside].mean()


def test_findings_leave_anatomy_pose_and_noise_alone():
    normal = draw_normal(5, size=128)
    ill, boxes = draw_image(5, ("Nodule",), size=128)
    untouched = np.ones((128, 128), bool)
    for x, y, width, height in boxes["Nodule"]:
        untouched[int(y) - 4 : int(y + height) + 4, int(x) - 4 : int(x + width) + 4] = False
    np.testing.assert_array_equal(ill[untouched], normal[untouched])


def test_order_of_findings_does_not_matter():
    first, _ = draw_image((1, 2), ("Mass", "Edema"), size=64)
    second, _ = draw_image((1, 2), ("Edema", "Mass"), size=64)
    np.testing.assert_array_equal(first, second)


def test_follow_ups_keep_the_anatomy():
    images = np.array(
        [[shrink(draw_image(seed, size=128, visit=v)[0], 32).ravel() for v in (0, 1)] for seed in range(12)]
    )
    likeness = np.corrcoef(images[:, 0], images[:, 1])[:12, 12:]
    same, others = np.diag(likeness), likeness[~np.eye(12, dtype=bool)]
    assert same.mean() > others.mean() + others.std() / 2
    assert not np.array_equal(images[0, 0], images[0, 1])


def test_label_noise_changes_the_csv_and_not_the_pixels(study, tmp_path):
    write_synthetic_study(tmp_path / "noisy", **SMALL | {"label_noise": 0.3})
    clean, noisy = digest(study), digest(tmp_path / "noisy")
    assert {name for name in clean if clean[name] != noisy[name]} == {CSV, BOXES, "phantom.json"}
    rows, others = read_rows(study / CSV), read_rows(tmp_path / "noisy" / CSV)
    changed = [(a[1], b[1]) for a, b in zip(rows, others, strict=True) if a[1] != b[1]]
    assert 5 < len(changed) < 50
    assert [r[:1] + r[2:] for r in rows] == [r[:1] + r[2:] for r in others]
    labeled = {(row[0], name) for row in others for name in row[1].replace("Infiltration", "Infiltrate").split("|")}
    assert {(row[0], row[1]) for row in read_rows(tmp_path / "noisy" / BOXES)[1:]} <= labeled


def test_a_complete_study_is_left_alone_and_other_settings_are_refused(study):
    before = {path: path.stat().st_mtime_ns for path in study.rglob("*")}
    assert write_synthetic_study(study, **SMALL)["written"] is False
    assert {path: path.stat().st_mtime_ns for path in study.rglob("*")} == before
    with pytest.raises(ValueError, match="delete that folder"):
        write_synthetic_study(study, **SMALL | {"seed": 9})
    assert json.loads((study / "phantom.json").read_text())["settings"]["version"] == SYNTHETIC_VERSION


@pytest.mark.slow
def test_an_interrupted_study_is_completed(study, tmp_path):
    class Interrupted(Exception):
        pass

    def give_up(jobs):
        yield from list(jobs)[:5]
        raise Interrupted

    # Begun with more images, so that some of what is left behind does not belong to the study asked for next.
    with pytest.raises(Interrupted):
        write_synthetic_study(tmp_path / "cut", **SMALL | {"n_images": 90}, progress=give_up)
    assert not (tmp_path / "cut" / "phantom.json").exists()
    assert list((tmp_path / "cut" / "images").iterdir())
    write_synthetic_study(tmp_path / "cut", **SMALL)
    assert digest(tmp_path / "cut") == digest(study)


@pytest.mark.parametrize("name", ["notes.txt", CSV, "images/00000001_000.png"])
def test_a_folder_of_other_files_is_refused(name, tmp_path):
    # Real NIH files bear the names that ours do, so a name alone must not make a file ours to overwrite.
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=name):
        write_synthetic_study(tmp_path, **SMALL)
    assert path.read_text() == "mine"
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == [path]


def test_progress_sees_every_patient(tmp_path):
    seen = []

    def watch(jobs):
        assert len(jobs) > 0  # a bar needs a total
        for job in jobs:
            seen.append(job)
            yield job

    summary = write_synthetic_study(tmp_path / "study", n_images=9, size=32, progress=watch)
    assert len(seen) == summary["n_patients"] and summary["n_images"] == 9


@pytest.mark.parametrize(
    "wrong", [{"findings": ("Infiltrate",)}, {"view": "LL"}, {"sex": "f"}, {"size": 16}], ids=lambda w: next(iter(w))
)
def test_draw_image_refuses_what_it_cannot_draw(wrong):
    with pytest.raises(ValueError, match="cannot draw"):
        draw_image(0, **wrong)
