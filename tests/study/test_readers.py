"""Readers of study folders, each on a small folder made after the published documentation that its module names."""

import json

import numpy as np
import pandas as pd
import pytest
from made_dicom import make_dicom
from PIL import Image

from helpers.evaluation import External, compare_sites
from helpers.packing import load_packed_study, pack_study
from helpers.study import PATHOLOGIES, load_study, make_split, match_findings, match_images
from helpers.study.readers import _READERS


def write_images(folder, names, side=20):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        levels = np.full((side, side), 5 * number, np.uint8)
        if name.endswith((".dicom", ".dcm")):
            path.write_bytes(make_dicom(levels))
        else:
            Image.fromarray(levels).save(path)


def write_table(path, header, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n")


# CheXpert

CHEXPERT = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,"
    "Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)


@pytest.fixture
def chexpert(tmp_path):
    root = "CheXpert-v1.0-small"
    write_table(
        tmp_path / "train.csv",
        CHEXPERT,
        f"{root}/train/patient00001/study1/view1_frontal.jpg,Female,68,Frontal,AP,1.0,,,,,,,,,0.0,,,,1.0",
        f"{root}/train/patient00002/study2/view1_frontal.jpg,Male,87,Frontal,PA,,,-1.0,1.0,,-1.0,-1.0,,-1.0,,-1.0,,1.0,",
        f"{root}/train/patient00002/study1/view2_lateral.jpg,Male,87,Lateral,,,,-1.0,1.0,,,,,,,,,,",
        f"{root}/train/patient00003/study1/view1_frontal.jpg,Unknown,41,Frontal,LL,,,,,,1.0,,,,0.0,,,,",
    )
    write_table(
        tmp_path / "valid.csv",
        CHEXPERT,
        f"{root}/valid/patient64541/study1/view1_frontal.jpg,Male,73,Frontal,AP,0.0,1.0,1.0,1.0,"
        "0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0",
    )
    names = ["patient00001/study1/view1_frontal", "patient00002/study2/view1_frontal"]
    names += ["patient00002/study1/view2_lateral", "patient00003/study1/view1_frontal"]
    write_images(tmp_path, [*(f"train/{name}.jpg" for name in names), "valid/patient64541/study1/view1_frontal.jpg"])
    return tmp_path


def test_chexpert_has_frontal_images_and_what_reports_do_not_mention_is_0(chexpert):
    study = load_study(chexpert)
    assert study.kind == "chexpert" and study.has_patients and study.source == "train.csv" and len(study.findings) == 13
    rows = study.rows
    assert rows["image"].tolist() == sorted(study.list_images())  # the lateral one is not listed
    assert rows["patient_id"].tolist() == ["00001", "00002", "00003", "64541"]
    assert rows["split"].tolist() == ["train", "train", "train", "test"]
    assert rows["view"].tolist() == ["AP", "PA", "unknown", "AP"]
    assert rows["sex"].tolist() == ["F", "M", "unknown", "M"] and rows["age"].tolist() == [68, 87, 41, 73]
    assert rows["Pneumonia"].tolist() == [0, 0, 0, 0] and rows["Lung Opacity"].tolist() == [0, 1, 0, 1]
    assert rows["Cardiomegaly"].isna().tolist() == [False, True, False, False]


@pytest.mark.parametrize(("policy", "label"), [("zeros", 0), ("ones", 1)])
def test_chexpert_s_uncertain_labels_follow_the_policy(chexpert, policy, label):
    rows = load_study(chexpert, policy).rows
    assert rows["Cardiomegaly"].tolist() == [0, label, 0, 1] and rows["Cardiomegaly"].dtype == np.uint8


def test_chexpert_s_faults_are_named_with_file_and_row(chexpert):
    text = (chexpert / "valid.csv").read_text()
    (chexpert / "valid.csv").write_text(text.replace("patient64541", "somebody"))
    with pytest.raises(ValueError, match=r"valid\.csv, row 2 of valid\.csv: .*names no folder such as patient00001"):
        load_study(chexpert)
    (chexpert / "valid.csv").write_text(text.replace("1.0,1.0,1.0", "1.0,2.0,1.0"))
    with pytest.raises(ValueError, match=r"row 2 of valid\.csv: '2\.0' in the column 'Cardiomegaly' is not a label"):
        load_study(chexpert)
    (chexpert / "valid.csv").write_text(text.replace("valid/patient64541", "train/patient00003"))
    with pytest.raises(ValueError, match=r"rows 5 of train\.csv and 2 of valid\.csv: .* is listed twice; keep one row"):
        load_study(chexpert)
    (chexpert / "valid.csv").write_text(text.replace("patient64541", "patient00003"))
    with pytest.raises(ValueError, match=r"1 patients are in more than one subset: 00003 \(test\+train\)"):
        load_study(chexpert)


# VinDr-CXR

VINDR = [
    *("Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture", "Consolidation"),
    *("Edema", "Emphysema", "Enlarged PA", "ILD", "Infiltration", "Lung Opacity", "Lung cavity", "Lung cyst"),
    *("Mediastinal shift", "Nodule/Mass", "Pleural effusion", "Pleural thickening", "Pneumothorax"),
    *("Pulmonary fibrosis", "Rib fracture", "Other lesion", "COPD", "Lung tumor", "Pneumonia", "Tuberculosis"),
]


def vindr_row(*start, found=()):
    return ",".join([*start, *(str(int(name in found)) for name in (*VINDR, "Other diseases", "No finding"))])


@pytest.fixture
def vindr(tmp_path):
    """Training images read by three radiologists each, and a test image, whose file spells the last disease so."""
    nodule, effusion, nothing = ("Nodule/Mass",), ("Pleural effusion", "Nodule/Mass"), ("No finding",)
    rows = [("aa", "R1", nodule), ("aa", "R2", effusion), ("aa", "R3", nothing)]
    rows += [("bb", reader, nothing) for reader in ("R1", "R4", "R5")]
    rows += [("cc", "R1", ("COPD",)), ("cc", "R4", ("COPD",)), ("cc", "R5", ("COPD", "Other diseases"))]
    labels = [vindr_row(image, reader, found=found) for image, reader, found in rows]
    header = ",".join(["image_id", "rad_id", *VINDR])
    write_table(tmp_path / "annotations/image_labels_train.csv", f"{header},Other diseases,No finding", *labels)
    header = ",".join(["image_id", *VINDR])
    test = vindr_row("dd", found=("Other diseases", "Pneumothorax"))
    write_table(tmp_path / "annotations/image_labels_test.csv", f"{header},Other disease,No finding", test)
    write_table(
        tmp_path / "annotations/annotations_train.csv",
        "image_id,rad_id,class_name,x_min,y_min,x_max,y_max",
        "aa,R1,Nodule/Mass,2,3,8,9",
        "aa,R2,Nodule/Mass,2.5,3,8,10",
        "aa,R2,Pleural effusion,0,12,9,19",
        "aa,R3,No finding,,,,",
    )
    write_table(
        tmp_path / "annotations/annotations_test.csv",
        "image_id,class_name,x_min,y_min,x_max,y_max",
        "dd,Pneumothorax,1,1,5,7",
    )
    write_images(tmp_path, ["train/aa.dicom", "train/bb.dicom", "train/cc.dicom", "test/dd.dicom"])
    return tmp_path


def test_vindr_has_what_most_radiologists_saw_and_all_their_boxes_of_it(vindr):
    study = load_study(vindr)
    assert study.kind == "vindr" and not study.has_patients and len(study.findings) == 27
    rows = study.rows.set_index("image")
    assert rows.index.tolist() == sorted(study.list_images()) == ["aa", "bb", "cc", "dd"]
    assert rows["Nodule or mass"].tolist() == [1, 0, 0, 0] and rows["COPD"].tolist() == [0, 0, 1, 0]
    assert rows["Pleural effusion"].tolist() == [0] * 4 and rows["Other diseases"].tolist() == [0, 0, 0, 1]
    assert rows["split"].tolist() == ["train"] * 3 + ["test"] and set(rows["view"]) == {"PA"}
    assert study.boxes.to_numpy().tolist() == [
        ["aa", "Nodule or mass", 2, 3, 6, 6],
        ["aa", "Nodule or mass", 2.5, 3, 5.5, 7],
        ["dd", "Pneumothorax", 1, 1, 4, 6],
    ]


def test_vindr_as_other_files_than_dicom_has_no_boxes(vindr):
    """The boxes are in pixels of the DICOM files, and the files that others made of them are smaller."""
    for name in ("train/aa", "test/dd"):
        (vindr / f"{name}.dicom").unlink()
        Image.fromarray(np.zeros((16, 16), np.uint8)).save(vindr / f"{name}.png")
    assert not len(load_study(vindr).boxes)


def test_vindr_s_faults_are_named_with_file_and_row(vindr):
    path = vindr / "annotations/image_labels_train.csv"
    text = path.read_text()
    path.write_text(text.replace("bb,R4,0,0", "bb,R4,0,x"))
    with pytest.raises(
        ValueError, match=r"image_labels_train\.csv, row 6: 'x' in the column 'Atelectasis' is not 0 or 1"
    ):
        load_study(vindr)
    path.write_text(text.replace("cc,", "dd,"))
    with pytest.raises(
        ValueError, match=r"rows 8 of image_labels_train\.csv and 2 of image_labels_test\.csv: dd is li"
    ):
        load_study(vindr)
    path.write_text(text)
    path = vindr / "annotations/annotations_train.csv"
    path.write_text(path.read_text().replace("2,3,8,9", "2,3,1,9"))
    with pytest.raises(ValueError, match=r"annotations_train\.csv, row 2: expected .*width and height above 0"):
        load_study(vindr)


def test_kaggle_s_edition_of_vindr_has_its_14_findings_and_no_split(tmp_path):
    write_table(
        tmp_path / "train.csv",
        "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max",
        "50a4,No finding,14,R11,,,,",
        "50a4,No finding,14,R15,,,,",
        "50a4,Cardiomegaly,3,R7,1,1,9,9",
        "9a5b,Cardiomegaly,3,R7,691,1375,1653,1831",
        "9a5b,Cardiomegaly,3,R8,700,1375,1653,1831",
        "9a5b,Nodule/Mass,8,R8,3,3,5,5",
        "9a5b,Nodule/Mass,8,R8,7,7,9,9",
        "9a5b,No finding,14,R9,,,,",
    )
    write_images(tmp_path, ["train/50a4.dicom", "train/9a5b.dicom"])
    study = load_study(tmp_path)
    assert study.findings == ("Cardiomegaly", "Nodule or mass") and "split" not in study.rows
    assert study.rows["Cardiomegaly"].tolist() == [0, 1] and study.rows["Nodule or mass"].tolist() == [0, 0]
    assert study.boxes["image"].tolist() == ["9a5b", "9a5b"]


# JSRT


@pytest.fixture
def jsrt(tmp_path):
    """Three images in JSRT's layout, two with a nodule."""
    write_table(
        tmp_path / "jsrt_metadata.csv",
        "study_id,subtlety,size,age,gender,x,y,state,position,diagnosis",
        "JPCLN001.png,5,20,53,Male,1024,512,malignant,l.upper lobe,lung cancer",
        "JPCLN002.png,5,35,?,Female,10,2040,benign,l.upper lobe(S5),pulmonary hematoma",
        "JPCNN001.png,,,41,Female,,,non-nodule,,",
    )
    write_images(tmp_path, [f"images/{name}.png" for name in ("JPCLN001", "JPCLN002", "JPCNN001")], side=64)
    write_images(tmp_path, ["masks/JPCLN001.png"])
    return tmp_path


def test_jsrt_positions_become_boxes_inside_the_image(jsrt):
    study = load_study(jsrt)
    assert study.kind == "jsrt" and study.findings == ("Nodule",) and study.has_patients
    assert study.rows["Nodule"].tolist() == [1, 1, 0] and study.rows["patient_id"].is_unique
    assert study.rows["sex"].tolist() == ["M", "F", "F"] and study.rows["age"].isna().tolist() == [False, True, False]
    boxes = study.boxes.set_index("image")
    side = 20 / 0.175 / 32  # a nodule of 20 mm, in pixels of 64 of 2048
    assert boxes.loc["JPCLN001.png", ["x", "y"]].tolist() == pytest.approx([32 - side / 2, 16 - side / 2])
    assert boxes.loc["JPCLN001.png", ["width", "height"]].tolist() == pytest.approx([side, side])
    at_corner = boxes.loc["JPCLN002.png"]
    assert at_corner["x"] == 0 and at_corner["y"] + at_corner["height"] == pytest.approx(64)
    (jsrt / "images" / "JPCLN001.png").write_bytes(b"<html>")  # packing says why it is left out
    assert load_study(jsrt).boxes["image"].tolist() == ["JPCLN002.png"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("gender,x,y", "gender,left,y", "lacks the columns x; it has study_id"),
        ("1024,512", "3000,512", r"row 2: size '20', x '3000', y '512'; expected three numbers, x and y below 2048"),
        ("1024,512", ",512", "row 2: size '20', x '', y '512'; expected three"),
        # Without its x a nodule would count as a normal image, without its size its box would be empty.
        ("5,20,", "5,,", "row 2: size '', x '1024'.*; expected three numbers"),
        ("5,20,", "5,0,", "row 2: size '0', x '1024'.*; expected three numbers"),
        ("1024,512", "1024,low", "row 2: .*y 'low'; expected three"),
        ("JPCLN002", "JPCLN001", r"rows 2 and 3: JPCLN001\.png is listed twice; keep one row"),
    ],
)
def test_malformed_jsrt_labels_are_refused(jsrt, old, new, message):
    path = jsrt / "jsrt_metadata.csv"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=rf"jsrt_metadata\.csv.*{message}"):
        load_study(jsrt)


# A folder a class


def test_folders_are_classes_and_those_called_normal_no_finding(tmp_path):
    names = ["Nodule/a.png", "Nodule/b.PNG", "mass/a.jpg", "No_Finding/c.png", "readme/notes.png.txt", "loose.png"]
    write_images(tmp_path, [name for name in names if not name.endswith("txt")])
    (tmp_path / "mass" / "below").mkdir()
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / "mass" / "below" / "d.png")
    study = load_study(tmp_path)
    assert study.kind == "class folders" and study.findings == ("mass", "Nodule") and not study.has_patients
    assert study.rows["image"].tolist() == sorted(names[:4])
    labels = study.rows.set_index("image")[["mass", "Nodule"]]
    assert labels.loc["mass/a.jpg"].tolist() == [1, 0] and labels.loc["Nodule/b.PNG"].tolist() == [0, 1]
    assert labels.loc["No_Finding/c.png"].tolist() == [0, 0] and "split" not in study.rows
    assert study.about["name"] == tmp_path.name
    (tmp_path / "study.json").write_text(json.dumps({"name": "Ours", "terms": "None."}))
    assert load_study(tmp_path).about["terms"] == "None."


def test_kaggle_s_chest_xray_has_its_own_split(tmp_path):
    """As its archive unpacks: with a copy of itself, and what a Macintosh adds."""
    names = ["train/NORMAL/IM-0115-0001.jpeg", "train/PNEUMONIA/person1_bacteria_1.jpeg"]
    names += ["train/NORMAL/NORMAL2-IM-0001-0001.jpeg", "train/PNEUMONIA/person3_virus_15.jpeg"]
    names += ["val/NORMAL/NORMAL2-IM-1427-0001.jpeg", "val/PNEUMONIA/person1946_bacteria_4874.jpeg"]
    names += ["test/NORMAL/IM-0001-0001.jpeg", "test/PNEUMONIA/person1_virus_6.jpeg"]
    write_images(tmp_path, [*names, *(f"chest_xray/{name}" for name in names)])
    (tmp_path / "__MACOSX" / "chest_xray").mkdir(parents=True)
    study = load_study(tmp_path)
    assert study.findings == ("PNEUMONIA",) and study.rows["image"].tolist() == sorted(names)
    assert len(study.list_images()) == 2 * len(names)  # the copy's are counted as images without a row
    assert study.rows["PNEUMONIA"].tolist() == [int("PNEUMONIA" in name) for name in sorted(names)]
    assert make_split(study.rows, "official").tolist() == [name.split("/")[0] for name in sorted(names)]


@pytest.mark.parametrize(
    "names",
    [
        ["normal/a.png"],  # one class
        ["images_001/a.png", "images_002/b.png"],  # NIH's, without its label file
        ["phantom/images/a.png", "jsrt/images/b.png"],  # a folder of studies
    ],
)
def test_other_folders_are_no_classes(tmp_path, names):
    write_images(tmp_path, names)
    with pytest.raises(
        FileNotFoundError, match=r"holds no labels: expected labels\.csv .*NIH's Data_Entry.*folder a class"
    ):
        load_study(tmp_path)


@pytest.mark.parametrize("name", ["view", "Width", "split"])
def test_a_class_cannot_have_the_name_of_a_column(tmp_path, name):
    write_images(tmp_path, ["normal/a.png", f"{name}/a.png"])
    with pytest.raises(ValueError, match=f"'{name.lower()}' cannot be the name of a finding; rename the folder"):
        load_study(tmp_path)


def test_a_class_may_be_called_class(tmp_path):
    write_images(tmp_path, ["class/a.png", "a/b.png", "lies_in/c.png"])
    assert load_study(tmp_path).rows[["a", "class", "lies_in"]].to_numpy().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


# All of them


@pytest.mark.parametrize("name", ["chexpert", "vindr", "jsrt"])
def test_a_packed_copy_has_the_same_labels_patients_and_boxes(request, tmp_path_factory, name):
    folder = request.getfixturevalue(name)
    study = load_study(folder)
    rows, report = match_images(study.rows, images := study.list_images())
    assert report.n_missing == report.n_extra == 0
    rows["split"] = np.resize(["train", "val", "test"], len(rows))
    packed_dir = tmp_path_factory.mktemp("packed")
    pack_study(rows, images, packed_dir, split_name="random_patients", side=32, study=study)
    packed, again = load_packed_study(packed_dir), load_study(packed_dir / "study")
    assert not packed.excluded and packed.findings == study.findings and packed.has_patients == study.has_patients
    assert (again.kind, again.has_patients, again.about) == (study.kind, study.has_patients, study.about)
    pd.testing.assert_frame_equal(again.rows, study.rows)
    pd.testing.assert_frame_equal(again.boxes.reset_index(drop=True), study.boxes.reset_index(drop=True))
    index = packed.index.sort_values("image", ignore_index=True)
    assert index["patient_id"].equals(study.rows["patient_id"])


@pytest.mark.parametrize(("name", "compared"), [("chexpert", 8), ("vindr", 3), ("jsrt", 1)])
def test_a_model_of_nih_s_findings_can_be_measured_on_it(request, name, compared):
    """In form: the folders hold a few images, so that most figures are not defined."""
    study, rng = load_study(request.getfixturevalue(name)), np.random.default_rng(0)
    matches, apart = match_findings(PATHOLOGIES, study.findings)
    here = pd.DataFrame(rng.integers(0, 2, (40, 14)), columns=PATHOLOGIES).assign(patient_id=range(40), view="PA")
    there = External(name, study.rows, study.findings, rng.random((len(study.rows), 14)), study.has_patients)
    sides = (here, rng.random((40, 14))), None, there
    drops, versions = compare_sites(matches, list(PATHOLOGIES), *sides, share=0.5, n_resamples=100)
    assert len(drops) == len(matches) >= compared and len(versions) == 2 * len(matches)
    assert {finding for _, finding in apart} | {f for match in matches for f in match.theirs} >= {*study.findings}
    for match, row in zip(matches, drops.itertuples(), strict=True):
        labels = study.rows[[*match.theirs]]
        assert row.n_pos_there == labels.eq(1).any(axis=1).sum() and row.n_neg_there == labels.eq(0).all(axis=1).sum()


def test_drawn_images_are_not_called_nih_s(phantom_dir):
    study = load_study(phantom_dir)
    assert study.kind == "nih" and study.about["name"] == "Synthetic chest radiographs"
    assert "drawn" in study.about["labels"] and "terms" not in study.about


def test_every_reader_says_what_its_labels_are_and_where_the_data_come_from():
    for reader in _READERS:
        about = getattr(reader, "_ABOUT", None)
        if reader.__name__.endswith("class_folders"):  # nobody knows whose they are
            assert about.keys() == {"labels", "not_read"}
        elif about is not None:
            assert about.keys() == {"name", "labels", "not_read", "source", "terms"}, reader.__name__
        assert isinstance(reader.FILES, str) and reader.__doc__


def test_a_table_under_another_name_is_not_taken_for_folders_of_classes(tmp_path):
    for ward in ("ward5", "ward7"):
        (tmp_path / ward).mkdir()
        (tmp_path / ward / "a.png").write_bytes(b"")
    assert load_study(tmp_path).findings == ("ward5", "ward7")
    (tmp_path / "Labels.csv").write_text("image,Mass\nward5/a.png,1\n")
    with pytest.raises(FileNotFoundError, match="holds no labels: expected labels"):
        load_study(tmp_path)


def test_images_outside_the_classes_are_counted(tmp_path):
    for name in ("normal/a.png", "nodule/b.png", "nodule/more/c.png", "d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    study = load_study(tmp_path)
    _, report = match_images(study.rows, study.list_images())
    assert report.n_found == 2 and report.extra == ("d.png", "nodule/more/c.png")
