"""Tests of study.audit: NIH's own metadata, and a study damaged in every way."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from helpers.packing import pack_study
from helpers.study import (
    PATHOLOGIES,
    audit_study,
    find_study_duplicates,
    load_metadata,
    load_study,
    make_split,
    match_images,
)
from helpers.study.audit import (
    count_duplicates,
    count_narrow,
    find_oddities,
    judge,
    list_limits,
    patient_overlap,
    take_census,
)


def by(table, *columns):
    return table.set_index(list(columns))


@pytest.mark.slow
def test_a_split_by_image_leaves_patients_in_train(nih):
    assert patient_overlap(nih)["patients"].tolist() == patient_overlap(nih)["images_of_b"].tolist() == [0, 0, 0]
    subset = np.where(np.random.default_rng(0).random(len(nih)) < 0.2, "val", "train")
    overlap = by(patient_overlap(nih.assign(subset=subset)), "a", "b").loc[("train", "val")]
    assert overlap["images_of_b"] == pytest.approx(0.829, abs=0.006) and overlap["patients"] > 8_000


@pytest.mark.slow
def test_oddities_of_nih(nih):
    """The 2020 edition numbers follow-ups again, by age; nothing else in it contradicts itself."""
    found = {name: odd["count"] for name, odd in find_oddities(nih).items()}
    assert found.pop("named with another number") == 24_106
    assert set(found.values()) == {0}


def test_oddities_are_counted_and_named(tmp_path):
    """As in the 2017 edition: ages with units, or of no human, and rows that contradict each other."""
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position"
    rows = [
        *("00000001_000.png,Mass,0,1,058Y,M,PA", "00000001_001.png,Mass,1,1,057Y,M,PA"),  # younger than before
        *("00000002_000.png,Mass,0,2,414Y,M,PA", "00000002_001.png,Mass,1,2,041Y,F,PA"),  # an age, two sexes
        *("00000003_000.png,Mass,0,3,011M,F,PA", "00000003_001.png,Mass,0,3,002D,F,PA"),  # a number taken
        "00000004_000.png,Mass,0,5,060Y,F,PA",  # another patient
    ]
    (tmp_path / "Data_Entry_2017.csv").write_text("\n".join([header, *rows]))
    odd = find_oddities(load_metadata(tmp_path))
    assert {name: found["count"] for name, found in odd.items()} == {
        "missing": 1,
        "converted": 2,
        "younger than before": 2,
        "patients of two sexes": 1,
        "follow-up number taken": 1,
        "named after another patient": 1,
        "named with another number": 1,
    }
    assert odd["missing"]["examples"] == [{"image": "00000002_000.png", "text": "414Y", "years": None}]
    assert [image["text"] for image in odd["converted"]["examples"]] == ["011M", "002D"]
    assert [image["image"] for image in odd["younger than before"]["examples"]] == [
        "00000001_001.png",
        "00000003_001.png",
    ]
    assert odd["named after another patient"]["examples"][0]["patient_id"] == 5
    assert {image["sex"] for image in odd["patients of two sexes"]["examples"]} == {"M", "F"}


def test_ages_across_a_missing_one_are_compared():
    rows = pd.DataFrame({"image": ["a", "b", "c"], "patient_id": 1, "follow_up": [0, 1, 2], "sex": "F"})
    rows["age"] = [50.0, np.nan, 49.0]
    rows.attrs["ages"] = {}
    assert find_oddities(rows)["younger than before"]["count"] == 1


def test_images_that_use_less_than_half_of_the_gray_levels_are_counted(monkeypatch):
    wide = np.tile(np.arange(256, dtype="uint8"), (64, 1))[:, ::4]
    packed = [wide, wide // 2, wide // 16, np.pad(wide // 16, ((0, 0), (0, 0)), constant_values=255)]
    monkeypatch.setattr("helpers.study.audit.read_images", lambda study: iter([np.stack(packed)[..., None]]))
    study = SimpleNamespace(side=64, index=pd.DataFrame({"image": [f"{k}.png" for k in range(4)]}))
    narrow = count_narrow(study)
    assert narrow["count"] == 3
    assert [row["image"] for row in narrow["examples"]] == ["1.png", "2.png", "3.png"]
    assert narrow["examples"][1]["levels"] <= 15


def test_census_of_files():
    modes = ["L"] * 6 + ["RGBA", "I;16"]
    files = {"width": [64] * 7 + [32], "height": [64] * 8, "mode": modes, "n_bytes": np.arange(8) + 100}
    census = take_census(pd.DataFrame({"image": [f"{i}.png" for i in range(8)], **files}))
    assert census["sizes"] == [{"width": 64, "height": 64, "images": 7}, {"width": 32, "height": 64, "images": 1}]
    assert census["modes"][0] == {"mode": "L", "images": 6} and len(census["modes"]) == 3
    assert census["not_square"]["count"] == 1 and census["not_square"]["examples"][0]["image"] == "7.png"
    assert [image["image"] for image in census["uncommon"]["examples"]] == ["6.png", "7.png"]
    assert census["bytes"] == {"min": 100, "median": 103, "max": 107, "sum": 828}


@pytest.fixture(scope="module")
def damaged(phantom_dir, tmp_path_factory):
    """A study with something wrong of every kind: its report, its packed study, and names of what was done."""
    folder = shutil.copytree(phantom_dir, tmp_path_factory.mktemp("damaged") / "study")
    names = load_metadata(folder)["image"].tolist()
    images = folder / "images"
    path = next(folder.glob("Data_Entry_2017*.csv"))
    lines = path.read_text().splitlines()
    test = set((folder / "test_list.txt").read_text().split())
    train = [name for name in names if name not in test]
    done = {"missing": train[0], "cut": train[1], "rgba": train[2], "deep": train[3], "wide": train[4]}
    done |= {"source": train[5], "same": "00099001_000.png", "across": "00099002_000.png", "extra": "99999999_000.png"}
    (images / train[0]).unlink()
    (images / train[1]).write_bytes((images / train[1]).read_bytes()[:300])
    Image.open(images / train[2]).convert("RGBA").save(images / train[2])
    deep = np.asarray(Image.open(images / train[3])).astype("uint16") * 257
    Image.fromarray(deep).save(images / train[3])
    Image.open(images / train[4]).crop((0, 0, 64, 50)).save(images / train[4])
    row = next(line for line in lines if line.startswith(train[5])).split(",")
    for copy in ("same", "across"):  # under other patients, one of them in the other list and with another finding
        findings = row[1] if copy == "same" else "Hernia" if row[1] != "Hernia" else "Mass"
        lines.append(",".join([done[copy], findings, "0", done[copy][3:8], *row[4:]]))
        shutil.copy(images / train[5], images / done[copy])
        with (folder / ("train_val_list.txt" if copy == "same" else "test_list.txt")).open("a") as file:
            file.write(f"\n{done[copy]}")
    shutil.copy(images / train[5], images / done["extra"])
    path.write_text("\n".join(lines))
    with (folder / "BBox_List_2017.csv").open("a") as file:
        file.write("99999998_000.png,Mass,1,2,3,4,,,\n99999998_000.png,Nodule,1,2,3,4,,,\n")

    source = load_study(folder)
    paths = source.list_images()
    rows, matched = match_images(source.rows, paths)
    rows["split"] = make_split(rows)
    study = pack_study(rows, paths, folder.parent / "packed", split_name="official", side=48, shard_images=32)
    return audit_study(source, matched, study, find_study_duplicates(study)), study, done


def test_every_damage_is_named(damaged):
    report, _, done = damaged
    lines = {line["check"]: line for line in report["verdict"]}
    assert lines["rows without an image"]["detail"] == done["missing"]
    assert lines["images without a row"]["detail"] == done["extra"]
    assert done["cut"] in lines["images that cannot be read"]["detail"]
    uncommon = lines["images of uncommon size or mode"]["detail"]
    assert all(done[name] in uncommon for name in ("rgba", "deep", "wide"))
    assert done["wide"] in lines["images that are not square"]["detail"]
    assert lines["images with boxes and without a row"]["detail"] == "99999998_000.png"
    copies = [{*pair.values()} & {done["source"], done["same"], done["across"]} for pair in report["duplicate_pairs"]]
    assert {done["source"], done["same"]} in copies and {done["source"], done["across"]} in copies
    found = {name: line["found"] for name, line in lines.items() if line["status"] == "look"}
    assert found == {
        "rows without an image": 1,
        "images without a row": 1,
        "images with boxes and without a row": 1,
        "images that cannot be read": 1,
        "images that are not square": 1,
        "images of uncommon size or mode": 3,
    } | {name: n for name, n in found.items() if name.startswith(("near copies", "exact copies"))}
    assert sum(n for name, n in found.items() if name.startswith("exact copies")) == 3
    assert {line["status"] for line in report["verdict"]} == {"ok", "look", "not compared"}


def test_what_later_notebooks_cannot_do_is_listed():
    rows = pd.DataFrame({"image": list("abcdef"), "subset": ["train", "train", "val", "val", "test", "test"]})
    rows[list(PATHOLOGIES)] = np.tile(np.arange(6)[:, None] % 2, len(PATHOLOGIES))
    boxes = pd.DataFrame({"image": ["e", "z"]})
    assert list_limits(rows, boxes) == []
    rows.loc[rows["subset"].eq("val"), list(PATHOLOGIES)] = 0
    rows.loc[0, "Mass"] = 1
    assert list_limits(rows, boxes) == [
        "Of Mass, the images in train are all alike: they cannot be learned.",
        "Of all 14 findings, the images in val are all alike: they have no AUC in training and a threshold of 0.5.",
    ]
    train = rows[rows["subset"].eq("train")].assign(Mass=[0, 1])
    no_val, no_test, no_boxes = list_limits(train, boxes)
    assert no_val.startswith("No image is in val: notebook 2 keeps the last epoch")
    assert no_test.startswith("No image is in test: notebooks 3 and 4 take validation images")
    assert no_boxes.startswith("No image in val or test has a box: notebook 4")


def test_copies_are_counted_by_kind_patient_subset_and_findings(damaged):
    report, study, _ = damaged
    table = by(pd.DataFrame(report["duplicates"]), "kind", "patient", "subset").sort_index()
    exact = table.loc[("exact", "other")]
    assert exact["pairs"].sum() == 3 and exact["labels_differ"].sum() == 2 and exact.loc["other", "images"] == 3
    assert table.loc[("exact", "same"), "pairs"].sum() == 0
    nothing = find_study_duplicates(study).head(0)
    assert not count_duplicates(nothing, study.index)[["pairs", "images", "labels_differ"]].to_numpy().any()


def test_report_is_plain_json_and_counts_the_packed_images(damaged):
    report, study, _ = damaged
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["found"] == len(study.index) + 1 and len(report["unreadable"]) == 1
    assert sum(subset["images"] for subset in report["parts"]) == len(study.index)
    assert report["kind"] == "synthetic" and all(row["difference"] is None for row in report["published"])
    images = next(row for row in report["published"] if (row["count"], row["part"]) == ("images", "all"))
    assert images["share"] == round(len(study.index) / 112_120, 6)


@pytest.mark.slow
def test_counts_other_than_nihs_and_patients_in_two_subsets_are_wrong(nih, nih_folder, damaged):
    """A wrong label, and a patient's images in two subsets, in a study that has all of NIH."""
    metadata = nih.drop(columns="subset")
    metadata.loc[metadata["Hernia"].eq(1).idxmax(), "Hernia"] = 0
    _, matched = match_images(metadata, metadata["image"])
    rows = nih.assign(width=1024, height=1024, mode="L", n_bytes=400_000)
    rows.loc[nih["patient_id"].eq(13).idxmax(), "subset"] = "val"
    facts = {
        "split_name": "official",
        "split_sha256": "",
        "index_sha256": "",
        "side": 256,
        "excluded": [],
        "shards": {},
    }
    nothing = find_study_duplicates(damaged[1]).head(0)
    source = dataclasses.replace(load_study(nih_folder), rows=metadata)
    report = audit_study(source, matched, SimpleNamespace(index=rows, **facts), nothing)
    wrong = {line["check"]: line for line in report["verdict"] if line["status"] == "wrong"}
    assert set(wrong) == {"counts other than NIH's", "patients in two subsets"}
    assert "Hernia (all) 226, not 227" in wrong["counts other than NIH's"]["detail"]
    overlap = wrong["patients in two subsets"]
    assert (overlap["found"], overlap["detail"]) == (1, "1 in val and test")
    verdict = judge(report | {"split": "leaky_images"})
    (overlap,) = [line for line in verdict if line["check"] == "patients in two subsets"]
    assert overlap["status"] == "look"  # it is the purpose
