"""Images of one's own: what `labels.csv`, `boxes.csv` and `study.json` may hold, and how each fault is named."""

import json

import numpy as np
import pandas as pd
import pytest
from own_study import FINDINGS, write_own_study

from helpers.packing import load_packed_study, pack_study
from helpers.study import load_study, match_images

LABELS = "image,patient_id,split,view,sex,age,follow_up,Mass,Heart too large\n"


def write(folder, text=None, **files):
    (folder / "labels.csv").write_text(text or f"{LABELS}a.png,P1,train,PA,F,61,0,1,\nward/b.dcm,P2,,,,,,0,-1\n")
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_text(content)
    return folder


def test_all_columns_are_read_and_what_is_empty_is_unknown(tmp_path):
    study = load_study(write(tmp_path))
    assert study.kind == study.source == "labels.csv" and study.has_patients and study.about == {}
    assert study.findings == ("Mass", "Heart too large") and not len(study.boxes)
    first, second = study.rows.astype(object).where(study.rows.notna(), None).to_dict("records")
    assert first == {
        **{"image": "a.png", "patient_id": "P1", "follow_up": 0, "age": 61, "sex": "F", "view": "PA", "split": "train"},
        **{"Mass": 1, "Heart too large": None},
    }
    assert second == {
        **{"image": "ward/b.dcm", "patient_id": "P2", "follow_up": 0, "age": None, "sex": "unknown", "view": "unknown"},
        **{"split": "", "Mass": 0, "Heart too large": None},
    }
    assert study.rows["Mass"].dtype == np.uint8 and study.rows["Heart too large"].dtype == np.float32


@pytest.mark.parametrize(("policy", "label"), [("ignore", None), ("zeros", 0), ("ones", 1)])
def test_uncertain_labels_follow_the_policy_and_empty_ones_stay_unknown(tmp_path, policy, label):
    labels = load_study(write(tmp_path), policy).rows["Heart too large"]
    assert np.isnan(labels[0]) and (np.isnan(labels[1]) if label is None else labels[1] == label)


def test_images_and_one_finding_are_enough_and_order_and_spelling_do_not_matter(tmp_path):
    text = "\ufeffNodule ,image\r\n1,ward\\b.png\r\n0.0,./a.png\r\n,\r\n"
    study = load_study(
        write(tmp_path, text, boxes_csv="image,finding,x,y,width,height\nward\\b.png,Nodule,1,2,3,4.5\n")
    )
    assert study.rows["image"].tolist() == ["a.png", "ward/b.png"] and study.rows["Nodule"].tolist() == [0, 1]
    assert not study.has_patients and study.rows["patient_id"].tolist() == [0, 1] and "split" not in study.rows
    assert study.boxes.to_numpy().tolist() == [["ward/b.png", "Nodule", 1, 2, 3, 4.5]]


def test_a_patient_with_an_image_in_no_subset_is_in_one(tmp_path):
    write(tmp_path, "image,patient_id,split,Mass\na.png,P1,train,1\nb.png,P1,,0\nc.png,P2,validation,0\n")
    assert load_study(tmp_path).rows["split"].tolist() == ["train", "", "val"]


def test_one_and_100_findings_are_read_and_0_and_101_refused(tmp_path):
    for count in (1, 100):
        names = [f"finding {number}" for number in range(count)]
        write(tmp_path, ",".join(["image", *names]) + "\n" + ",".join(["a.png", *"1" * count]) + "\n")
        assert load_study(tmp_path).findings == tuple(names)
    for names in ([], [f"finding {number}" for number in range(101)]):
        write(tmp_path, ",".join(["image", *names]) + "\n" + ",".join(["a.png", *"1" * len(names)]) + "\n")
        with pytest.raises(ValueError, match=rf"labels\.csv has {len(names)} columns of findings; expected 1 to 100"):
            load_study(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            "image;Mass\na.png;1",
            "has no column called image, .* It has image;Mass, and columns are separated by c",
        ),
        ("", "has no column called image, .* It has none"),
        ("image,Mass", "has a header and no rows; expected a row an image"),
        ("image,Mass,Mass\na.png,1,0", "has the column Mass twice; remove one"),
        ("image,Mass,mass\na.png,1,0", "the findings 'Mass', 'mass' differ by signs only"),
        ("image,Patient_ID,Mass\na.png,1,0", "the column 'Patient_ID' has to be called 'patient_id'; rename it"),
        ("image,No Finding\na.png,1", "'No Finding' cannot be the name of a finding; remove or rename the column"),
        ("image,Nodule/Mass\na.png,1", "'Nodule/Mass' cannot be the name of a finding; remove or rename the column"),
        (
            "image,notes,Mass\na.png,none,1",
            "row 2: 'none' in the column 'notes' is not a label; .*Remove a column that",
        ),
        ("image,Mass\na.png,2", "row 2: '2' in the column 'Mass' is not a label; expected 1, 0, -1 .*or nothing"),
        ("image,Mass\na.png,0.5", "row 2: '0.5' in the column 'Mass' is not a label"),
        ("image,Mass\na.png,1\nb.png,0\na.png,0", r"rows 2 and 4: a\.png is listed twice; keep one row"),
        ("image,Mass\na.png,1\n./a.png,0", r"rows 2 and 3: a\.png is listed twice"),
        ("image,Mass\n../a.png,1", r"row 2: '\.\./a\.png' is not the path of an image below"),
        ("image,Mass\nb/../../a.png,1", "row 2: .* is not the path of an image below"),
        ("image,Mass\n..\\a.png,1", "row 2: .* is not the path of an image below"),
        ("image,Mass\n/etc/a.png,1", "row 2: '/etc/a.png' is not the path of an image below"),
        ("image,Mass\n,1", "row 2: '' is not the path of an image below"),
        ("image,Mass\nward, 5.png,1", "row 2: 3 fields, and the header has 2; put a text with a comma into quotation"),
        ("image,patient_id,Mass\na.png,1,1\nb.png,2", "row 3: only 2 fields; is the file cut off"),
        ('image,Mass\n"a.png,1\n' + "b.png,1\n" * 20_000, "is a quotation mark missing"),
        ("image,patient_id,Mass\na.png,1,1\nb.png,,1", "row 3: no patient_id. Give every image one, or leave out the"),
        (
            "image,patient_id,split,Mass\na.png,P1,train,1\nb.png,P1,test,0",
            r"column split: 1 patients .*P1 \(test\+train\)",
        ),
        (
            "image,split,Mass\na.png,holdout,1",
            "row 2: 'holdout' is not a split; expected train, val, test, train_val or n",
        ),
        ("image,view,Mass\na.png,LL,1", "row 2: 'LL' is not a view; expected PA, AP, LATERAL or nothing"),
        ("image,sex,Mass\na.png,3,1", "row 2: '3' is not a sex; expected M, F or nothing"),
        ("image,age,Mass\na.png,60Y,1", "row 2: '60Y' in the column age is not a number, 0 or more"),
        ("image,age,Mass\na.png,inf,1", "row 2: 'inf' in the column age is not a number"),
        ("image,follow_up,Mass\na.png,1.5,1", "row 2: '1.5' in the column follow_up is not a whole number, 0 or more"),
    ],
)
def test_a_fault_is_named_with_file_row_and_remedy(tmp_path, rows, message):
    with pytest.raises(ValueError, match=rf"{tmp_path}/labels\.csv.*{message}"):
        load_study(write(tmp_path, f"{rows}\n"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.png,Nodule,1,1,2,2", "row 2: 'Nodule' is not a finding of the study: Mass, Heart too large"),
        ("a.png,Mass,1,1,0,2", "row 2: expected x and y of 0 or more, and width and height above 0, in pixels"),
        ("a.png,Mass,-1,1,2,2", "row 2: expected x and y"),
        ("a.png,Mass,1,1,inf,2", "row 2: expected x and y"),
        ("a.png,Mass,1,,2,2", "row 2: expected x and y"),
        ("a.png,Mass,1,1,2", "row 2: only 5 fields"),
    ],
)
def test_a_fault_among_the_boxes_is_named(tmp_path, row, message):
    write(tmp_path, boxes_csv=f"image,finding,x,y,width,height\n{row}\n")
    with pytest.raises(ValueError, match=rf"{tmp_path}/boxes\.csv, {message}"):
        load_study(tmp_path)
    write(tmp_path, boxes_csv="image,x,y,width,height\n")
    with pytest.raises(ValueError, match=r"boxes\.csv lacks the columns finding; it has image, x"):
        load_study(tmp_path)


def test_study_json_says_whose_images_they_are_and_cannot_make_them_nih_s(tmp_path):
    about = {"kind": "nih", "name": "Ward 5", "terms": "Not for others.", "extra": {"a": 1}}
    study = load_study(write(tmp_path, study_json=json.dumps(about)))
    assert study.kind == "labels.csv" and study.about == {"name": "Ward 5", "terms": "Not for others."}
    for text in ('{"name":', "[1]"):
        with pytest.raises(ValueError, match=r"study\.json is not an object of JSON, such as"):
            load_study(write(tmp_path, study_json=text))


def test_a_folder_without_labels_says_which_files_would_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no labels: expected labels\.csv .*NIH's .*CheXpert's .*VinDr"):
        load_study(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no study folder .*docs/your_data\.md"):
        load_study(tmp_path / "none")


def test_images_without_rows_and_rows_without_images_are_counted(tmp_path):
    write_own_study(tmp_path / "own", n_images=6)
    lines = (tmp_path / "own" / "labels.csv").read_text().splitlines()
    (tmp_path / "own" / "labels.csv").write_text("\n".join([*lines[:-1], lines[-1].replace("005", "006")]))
    (tmp_path / "own" / ".thumbnails").mkdir()
    (tmp_path / "own" / ".thumbnails" / "t.png").write_bytes(b"")
    (tmp_path / "own" / "ward" / "again").symlink_to(tmp_path / "own")  # which would never end
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "own")  # nor would this
    (tmp_path / "own" / "more").symlink_to(tmp_path / "elsewhere")
    study = load_study(tmp_path / "own")
    rows, report = match_images(study.rows, study.list_images())
    assert (len(rows), report.n_missing, report.missing) == (5, 1, ("ward/006.dcm",))
    assert (report.n_extra, report.extra) == (1, ("ward/005.dcm",))


def test_packed_and_read_again_is_equal(tmp_path):
    """Also patients whose names pandas would take for a missing value, a number, or a truth."""
    table = write_own_study(tmp_path / "own", n_images=12)
    table["patient_id"] = ["NA", "1e5", "007", "True", "", "nan"] * 2
    table.loc[table["patient_id"].eq(""), "patient_id"] = "12345678901234567890123"
    table.to_csv(tmp_path / "own" / "labels.csv", index=False)
    study = load_study(tmp_path / "own")
    rows, _ = match_images(study.rows, images := study.list_images())
    rows["split"] = rows["patient_id"].map(dict(zip(table["patient_id"], ["train", "val", "test"] * 2, strict=False)))
    packed = pack_study(rows, images, tmp_path / "packed", split_name="random_patients", side=32, study=study)
    again = load_study(tmp_path / "packed" / "study")
    pd.testing.assert_frame_equal(again.rows, study.rows)
    pd.testing.assert_frame_equal(again.boxes, study.boxes, check_like=True)
    assert again.about == study.about == packed.about and packed.findings == FINDINGS and len(packed.index) == 12
    for index in (packed.index, load_packed_study(tmp_path / "packed").index):
        in_order = index.sort_values("image", ignore_index=True)
        assert in_order["patient_id"].tolist() == study.rows["patient_id"].tolist()
        assert in_order[list(FINDINGS)].astype("float32").equals(study.rows[list(FINDINGS)].astype("float32"))


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("image,Nodule (any),Nodule any", "findings 'Nodule \\(any\\)', 'Nodule any' differ by signs only"),
        ("image,+,Mass", "findings '\\+' differ by signs only"),
        ("image,width,Mass", "'width' is a name that packed studies use; rename"),
        ("image,Subset,Mass", "'Subset' is a name that packed studies use; rename"),
        ("Image,Mass,Nodule", "no column called image, .* rename it. It has Image"),
    ],
)
def test_names_that_would_be_confused_later_are_refused(tmp_path, header, said):
    with pytest.raises(ValueError, match=said):
        load_study(write(tmp_path, f"{header}\na.png,0,1\n"))


def test_patients_whose_numbers_differ_by_zeros_are_different(tmp_path):
    text = "image,patient_id,Mass\na.png,7,0\nb.png,007,1\nc.png,12,1\n"
    assert load_study(write(tmp_path, text)).rows["patient_id"].tolist() == ["7", "007", "12"]
    assert load_study(write(tmp_path, text.replace("007", "8"))).rows["patient_id"].tolist() == [7, 8, 12]
