"""Tests of study.labels and study.study_folder on small written studies and on NIH's own files."""

import re

import numpy as np
import pandas as pd
import pytest

from helpers.study.labels import ADJUDICATED, PATHOLOGIES, load_adjudicated, load_boxes, load_metadata
from helpers.study.study_folder import list_images, load_official_lists, match_images

V2020 = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
REST = ",2682,2749,0.143,0.143"
NAMES = list(PATHOLOGIES)


def write_table(folder, rows, header=V2020, rest=REST, name="Data_Entry_2017_v2020.csv"):
    (folder / name).write_text("\n".join([header, *[row + rest for row in rows]]) + "\n")
    return folder


def test_metadata_columns_types_and_order(tmp_path):
    write_table(
        tmp_path,
        ["00000002_001.png,No Finding,1,2,80,F,AP", "00000002_000.png,Infiltrate|Pleural Thickening,0,2,79,M,PA"],
    )
    frame = load_metadata(str(tmp_path))
    assert list(frame.columns) == ["image", "patient_id", "follow_up", "age", "sex", "view", *NAMES]
    assert frame["image"].tolist() == ["00000002_000.png", "00000002_001.png"]
    assert frame.index.tolist() == [0, 1]
    assert (frame["patient_id"].dtype, frame["follow_up"].dtype, frame["age"].dtype) == ("int64", "int64", "float64")
    assert set(frame[NAMES].dtypes) == {np.dtype("uint8")}
    assert {name for name in NAMES if frame.loc[0, name]} == {"Infiltration", "Pleural_Thickening"}
    assert frame.loc[1, NAMES].sum() == 0
    assert frame.loc[0, ["follow_up", "age", "sex", "view"]].tolist() == [0, 79.0, "M", "PA"]
    nothing = {"count": 0, "examples": []}
    assert frame.attrs == {
        "source": "Data_Entry_2017_v2020.csv",
        "ages": {"missing": nothing, "converted": nothing},
    }


def test_metadata_of_2017_with_units_and_trailing_column(tmp_path):
    ages = ["058Y", "003M", "012D", "412Y", "100Y", "101Y", "", "old"]
    rows = [f"{i:08d}_000.png,Hernia,0,{i},{age},F,AP" for i, age in enumerate(ages)]
    write_table(tmp_path, rows, V2020 + ",", REST + ",", "Data_Entry_2017.csv")
    frame = load_metadata(tmp_path)
    np.testing.assert_allclose(frame["age"], [58, 3 / 12, 12 / 365.25, np.nan, 100, np.nan, np.nan, np.nan])
    assert frame.attrs["ages"] == {
        "missing": {
            "count": 4,
            "examples": [
                {"image": f"{i:08d}_000.png", "text": text, "years": None}
                for i, text in ((3, "412Y"), (5, "101Y"), (6, ""), (7, "old"))
            ],
        },
        "converted": {
            "count": 2,
            "examples": [
                {"image": "00000001_000.png", "text": "003M", "years": 3 / 12},
                {"image": "00000002_000.png", "text": "012D", "years": 12 / 365.25},
            ],
        },
    }
    assert frame["Hernia"].sum() == len(ages)


def test_metadata_prefers_the_corrected_edition(tmp_path):
    write_table(tmp_path, ["a.png,Mass,0,1,500,M,PA"], name="Data_Entry_2017.csv")
    write_table(tmp_path, ["a.png,Mass,0,1,50,M,PA"])
    assert load_metadata(tmp_path)["age"].tolist() == [50.0]


@pytest.mark.parametrize("name", ["Data_Entry_2017_v2020_backup.csv", "Data_Entry_2017 (1).csv"])
def test_a_label_file_of_another_name_is_refused(tmp_path, name):
    write_table(tmp_path, ["a.png,Hernia,0,1,50,M,PA"], name=name)
    message = re.escape(f"holds {name}, and label files are called Data_Entry_2017_v2020.csv or Data_Entry_2017.csv")
    with pytest.raises(ValueError, match=message):
        load_metadata(tmp_path)
    write_table(tmp_path, ["a.png,Mass,0,1,50,M,PA"])
    with pytest.raises(ValueError, match=message):
        load_metadata(tmp_path)
    (tmp_path / name).rename(tmp_path / "old.csv")
    assert load_metadata(tmp_path).attrs["source"] == "Data_Entry_2017_v2020.csv"


def test_other_encodings_are_read_by_their_mark_or_refused_by_name(tmp_path):
    path = write_table(tmp_path, ["a.png,Mass,0,1,50,M,PA"]) / "Data_Entry_2017_v2020.csv"
    text = path.read_text()
    path.write_bytes(text.encode("utf-16"))  # with its mark, as PowerShell writes
    assert load_metadata(tmp_path)["Mass"].tolist() == [1]
    (tmp_path / "train_val_list.txt").write_bytes("a.png\r\n".encode("utf-16"))
    (tmp_path / "test_list.txt").write_bytes(b"b.png")
    assert load_official_lists(tmp_path) == ({"a.png"}, {"b.png"})
    for content, message in (
        (text.replace("Mass", "Übung").encode("cp1252"), r"v2020.csv is not text in UTF-8 \(byte 157\).*iconv"),
        (text.encode("utf-16-le"), r"v2020.csv is no text.*zero bytes"),
        (text.encode() + bytes(512), r"v2020.csv is no text.*zero bytes"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_metadata(tmp_path)


def test_metadata_tolerates_marks_blank_lines_and_the_new_sex_column(tmp_path):
    header = "\ufeff" + V2020.replace("Gender", "Sex")
    lines = [header, "a.png,Mass,0,1,50,M,PA" + REST, "", "b.png,Edema,0,2,60,f,ap" + REST]
    (tmp_path / "Data_Entry_2017_v2020.csv").write_bytes("\r\n".join(lines).encode())
    frame = load_metadata(tmp_path)
    assert frame["sex"].tolist() == ["M", "F"]
    assert frame["view"].tolist() == ["PA", "AP"]


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ("b.png,Mass|Tuberculosis,0,2,50,M,PA", ["row 4", "'Tuberculosis'", "Pleural_Thickening", "No Finding"]),
        ("b.png,No Finding|Mass,0,2,50,M,PA", ["row 4", "No Finding|Mass"]),
        ("b.png,,0,2,50,M,PA", ["row 4", "''"]),
        ("a.png,Mass,0,2,50,M,PA", ["a.png", "rows 2 and 4"]),
        ("../b.png,Mass,0,2,50,M,PA", ["row 4", "../b.png"]),
        ("b.png,Mass,0,x,50,M,PA", ["row 4", "'x'"]),
        ("b.png,Mass,0,-2,50,M,PA", ["row 4", "'-2'"]),
        ("b.png,Mass,,2,50,M,PA", ["row 4", "''"]),
        ("b.png,Mass,0,2,50,U,PA", ["row 4", "'U'"]),
        ("b.png,Mass,0,2,50,M,LL", ["row 4", "'LL'"]),
        ("b.png,Mass,0", ["row 4", "3 fields"]),
    ],
)
def test_metadata_errors_name_the_file_and_the_row(tmp_path, row, parts):
    # The blank line moves the row, and a text editor counts it.
    write_table(tmp_path, ["a.png,Mass,0,1,50,M,PA", "", row, "c.png,Mass,0,3,50,M,PA"], rest="")
    with pytest.raises(ValueError) as error:
        load_metadata(tmp_path)
    for part in ["Data_Entry_2017_v2020.csv", *parts]:
        assert part in str(error.value)


def test_metadata_names_lacking_columns_and_rows(tmp_path):
    write_table(tmp_path, [], "Image Index,Finding Labels,Patient ID,Patient Age")
    with pytest.raises(ValueError, match=r"v2020.csv lacks the columns Follow-up #, Patient Gender, View Position"):
        load_metadata(tmp_path)
    write_table(tmp_path, [])
    with pytest.raises(ValueError, match="no rows"):
        load_metadata(tmp_path)


@pytest.mark.parametrize("load", [load_metadata, list_images, load_boxes, load_official_lists])
def test_a_missing_folder_is_named(tmp_path, load):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")


def test_missing_files_are_named_with_a_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Data_Entry_2017\*.csv.*copy"):
        load_metadata(tmp_path)
    with pytest.raises(FileNotFoundError, match="images/"):
        list_images(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"train_val_list.txt.*random_patients"):
        load_official_lists(tmp_path)


def test_images_are_listed_in_both_layouts(tmp_path):
    for name in ("images/b.png", "images_001/images/a.png", "images_012/c.png", "images/note.txt", "other/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    images = list_images(tmp_path)
    assert list(images) == ["a.png", "b.png", "c.png"]
    assert images["a.png"] == tmp_path / "images_001/images/a.png"
    (tmp_path / "images/a.png").touch()
    with pytest.raises(ValueError, match=r"images/a.png and .*images_001/images/a.png"):
        list_images(tmp_path)


def test_an_archive_that_was_unpacked_in_part_holds_no_images(tmp_path):
    for folder in ("images_001/images", "images_002.part/images"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"{folder[7:10]}.png").touch()
    assert list(list_images(tmp_path)) == ["001.png"]


def test_match_images_counts_both_sides():
    frame = pd.DataFrame({"image": [f"{number:08d}_000.png" for number in range(12)]})
    frame.attrs["ages"] = 3
    images = {**dict.fromkeys(frame["image"][2:9]), "stray.png": None}
    found, report = match_images(frame, images)
    assert found["image"].tolist() == frame["image"][2:9].tolist()
    assert found.index.tolist() == list(range(7))
    assert found.attrs["ages"] == 3
    assert (report.n_rows, report.n_found, report.n_missing, report.n_extra) == (len(frame), 7, len(frame) - 7, 1)
    assert report.missing == tuple(frame["image"][[0, 1, 9, 10, 11]])
    assert report.extra == ("stray.png",)
    with pytest.raises(FileNotFoundError, match=r"00000000_000.png, is on disk.*stray.png"):
        match_images(frame, ["stray.png"])


def test_official_lists_tolerate_line_ends_and_refuse_overlap(tmp_path):
    (tmp_path / "train_val_list.txt").write_bytes(b"a.png\r\n\r\nb.png\r\n")
    (tmp_path / "test_list.txt").write_bytes(b"c.png\nd.png")
    assert load_official_lists(tmp_path) == ({"a.png", "b.png"}, {"c.png", "d.png"})
    (tmp_path / "test_list.txt").write_bytes(b"c.png\nb.png")
    with pytest.raises(ValueError, match=r"1 image is \(b.png\) in both"):
        load_official_lists(tmp_path)


def test_boxes(tmp_path):
    empty = load_boxes(tmp_path)
    assert empty.empty
    path = tmp_path / "BBox_List_2017.csv"
    header = "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
    path.write_text(header + "b.png,Infiltrate,1.5,2,30,40,,,\na.png,Mass,1,2,3,4,,,\n")
    boxes = load_boxes(tmp_path)
    assert list(boxes.columns) == list(empty.columns)
    assert boxes.loc[2].tolist() == ["b.png", "Infiltration", 1.5, 2.0, 30.0, 40.0]  # the file's second row
    assert boxes.index.tolist() == [2, 3] and boxes.attrs["source"] == str(path)
    numbers = ["x", "y", "width", "height"]
    assert set(boxes[numbers].dtypes) == set(empty[numbers].dtypes) == {np.dtype("float64")}
    for row, part in (("Cough,1,2,3,4", "'Cough'"), ("Mass,1,2,0,4", "area"), ("Mass,1,nan,3,4", "'nan'"),
                      ("Mass,1000,0,25,9", "x 1025, y 9, outside the frame of 1024x1024")):  # fmt: skip
        path.write_text(f"{header}a.png,{row},,,\n")
        with pytest.raises(ValueError, match=rf"BBox_List_2017.csv, row 2: .*{part}"):
            load_boxes(tmp_path)


def test_boxes_of_nih_are_all_in_the_test_list(nih_folder):
    boxes = load_boxes(nih_folder)
    assert (len(boxes), boxes["image"].nunique()) == (984, 880)
    assert set(boxes["image"]) <= load_official_lists(nih_folder)[1]


def test_adjudicated_labels(tmp_path):
    assert list(load_adjudicated(tmp_path).columns) == ["image", *ADJUDICATED] and load_adjudicated(tmp_path).empty
    path = tmp_path / "google2019_nih-chest-xray-labels.csv"
    header = "Image Index,Fracture,Pneumothorax,Airspace opacity,Nodule or mass"
    path.write_text(f"{header}\na.png,YES,NO,YES,NO\nb.png,NO,yes,NO,NO\n")
    table = load_adjudicated(tmp_path).set_index("image")
    assert table.loc["a.png"].to_dict() == {"Pneumothorax": 0, "Nodule or mass": 0, "Airspace opacity": 1}
    assert table.loc["b.png"].to_dict() == {"Pneumothorax": 1, "Nodule or mass": 0, "Airspace opacity": 0}
    path.write_text(f"{header}\na.png,YES,NO,YES,NO\na.png,NO,YES,NO,NO\n")
    with pytest.raises(ValueError, match=r"google2019.*rows 2 and 3: a.png is listed twice"):
        load_adjudicated(tmp_path)
    path.write_text(f"{header}\na.png,YES,NO,perhaps,NO\n")
    with pytest.raises(ValueError, match=r"google2019.*row 2: 'perhaps' is not a label"):
        load_adjudicated(tmp_path)


def test_adjudicated_labels_of_nih(nih_folder):
    table = load_adjudicated(nih_folder)
    assert len(table) == 4376
    assert table[list(ADJUDICATED)].sum().tolist() == [238, 605, 2166]
    assert {name for names in ADJUDICATED.values() for name in names} <= set(PATHOLOGIES)
