"""docs/your_data.md: its example is a study, and its lines turn other data sets' tables into one."""

import re
from pathlib import Path

import pandas as pd
from made_dicom import make_dicom

from helpers.study import load_study, make_split
from helpers.study.readers import labels_csv

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "your_data.md").read_text()
SNIPPETS = {
    name: re.search(rf"\*\*{name}.*?```python\n(.*?)```", PAGE, re.DOTALL)[1] for name in ("MIMIC", "PadChest", "RSNA")
}


def run(name, folder, monkeypatch):
    """Runs the page's lines for a data set in its folder; returns the study."""
    monkeypatch.chdir(folder)
    exec(compile(SNIPPETS[name], name, "exec"), {})
    return load_study(folder)


def test_the_example_is_a_study(tmp_path):
    for name, beginning in (("labels.csv", "image,patient"), ("study.json", "{")):
        text = re.search(rf"```\n({re.escape(beginning)}.*?)```", PAGE, re.DOTALL)[1]
        (tmp_path / name).write_text(text)
    study = load_study(tmp_path)
    assert study.findings == ("Effusion", "Heart too large") and len(study.rows) == 3 and study.has_patients
    assert study.about.keys() == {"name", "labels", "terms"}
    assert study.rows["Heart too large"].tolist()[0] == 0 and study.rows["Heart too large"].isna().sum() == 2


def test_every_reader_and_every_message_is_on_the_page():
    for kind in ("NIH", "ChestMNIST", "CheXpert", "VinDr-CXR", "Open-i", "JSRT", "a folder a class"):
        assert f"| **{kind}" in PAGE
    assert labels_csv.FILES in PAGE
    assert all(len(text.splitlines()) <= 13 for text in SNIPPETS.values())


def test_mimic(tmp_path, monkeypatch):
    """Columns of PhysioNet's three tables, as described at physionet.org/content/mimic-cxr-jpg/2.1.0."""
    ids = {"subject_id": [10000032, 10000032, 19999999], "study_id": [50414267, 50414267, 59999999]}
    ids |= {"dicom_id": ["02aa804e-bde0afdd", "174413ec-4ec4c1f7", "cc"]}
    facts = {**ids, "PerformedProcedureStepDescription": "CHEST", "ViewPosition": ["PA", "LATERAL", "AP"], "Rows": 3056}
    pd.DataFrame(facts).to_csv(tmp_path / "mimic-cxr-2.0.0-metadata.csv.gz", index=False)
    split = pd.DataFrame({**ids, "split": ["train", "train", "validate"]})
    split.to_csv(tmp_path / "mimic-cxr-2.0.0-split.csv.gz", index=False)
    labels = {"subject_id": [10000032, 19999999], "study_id": [50414267, 59999999], "Atelectasis": [None, -1.0]}
    labels |= {"Edema": [1.0, 0.0], "No Finding": [None, 1.0], "Pleural Effusion": [-1.0, None]}
    pd.DataFrame(labels).to_csv(tmp_path / "mimic-cxr-2.0.0-chexpert.csv.gz", index=False)
    study = run("MIMIC", tmp_path, monkeypatch)
    assert study.findings == ("Atelectasis", "Edema", "Pleural Effusion") and study.rows["view"].tolist() == [
        "PA",
        "AP",
    ]
    assert study.rows["image"][0] == "files/p10/p10000032/s50414267/02aa804e-bde0afdd.jpg"
    assert study.rows["patient_id"].tolist() == [10000032, 19999999] and study.rows["split"].tolist() == [
        "train",
        "val",
    ]
    assert study.rows["Atelectasis"].isna().tolist() == [False, True] and study.rows["Edema"].tolist() == [1, 0]


def test_padchest(tmp_path, monkeypatch):
    rows = [
        ("a.png", 0, 20140915, "P1", 1930.0, "F", "PA", "['pleural effusion', ' nodule', 'pleural effusion']"),
        ("b.png", 0, 20140915, "P1", 1930.0, "F", "L", "['normal']"),
        ("c.png", 54, 20150102, "P2", None, "O", "AP_horizontal", "['normal']"),
        ("d.png", 54, 20150102, "P3", 1950.0, "M", "PA", "['unchanged', 'nodule']"),
        ("e.png", 54, 20150102, "P4", 1950.0, "M", "PA", None),
    ]
    columns = ["ImageID", "ImageDir", "StudyDate_DICOM", "PatientID", "PatientBirth", "PatientSex_DICOM", "Projection"]
    name = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
    pd.DataFrame(rows, columns=[*columns, "Labels"]).to_csv(tmp_path / name)  # with numbers, as there
    study = run("PadChest", tmp_path, monkeypatch)
    assert study.rows["image"].tolist() == ["0/a.png", "54/c.png"] and study.rows["view"].tolist() == ["PA", "AP"]
    assert study.rows["sex"].tolist() == ["F", "unknown"] and study.rows["age"].fillna(-1).tolist() == [84, -1]
    assert study.rows[["nodule", "pleural effusion", "pneumonia"]].to_numpy().tolist() == [[1, 1, 0], [0, 0, 0]]


def test_rsna(tmp_path, monkeypatch):
    (tmp_path / "stage_2_train_labels.csv").write_text(
        "patientId,x,y,width,height,Target\n0004cfab,,,,,0\n00436515,264.0,152.0,213.0,379.0,1\n"
        "00436515,562.0,152.0,256.0,453.0,1\n003d8fa0,,,,,0\n"
    )
    (tmp_path / "stage_2_detailed_class_info.csv").write_text(
        "patientId,class\n0004cfab,No Lung Opacity / Not Normal\n00436515,Lung Opacity\n00436515,Lung Opacity\n"
        "003d8fa0,Normal\n"
    )
    (tmp_path / "stage_2_train_images").mkdir()
    for name in ("0004cfab", "00436515", "003d8fa0"):
        (tmp_path / "stage_2_train_images" / f"{name}.dcm").write_bytes(
            make_dicom(pd.DataFrame(20 * [20 * [7]]).to_numpy("uint8"))
        )
    study = run("RSNA", tmp_path, monkeypatch)
    assert study.rows["image"].tolist() == sorted(study.list_images()) and not study.has_patients
    assert study.rows["Lung opacity"].tolist() == [0, 0, 1] and study.rows["Other abnormality"].tolist() == [1, 0, 0]
    assert len(study.boxes) == 2 and set(study.boxes["image"]) == {"stage_2_train_images/00436515.dcm"}
    assert set(make_split(study.rows, "random_patients")) == {"train", "val", "test"}
