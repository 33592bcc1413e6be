"""Tests of study.counts on NIH's own files, whole, in part and damaged, and the tables of its two populations."""

import shutil
import sys

import numpy as np
import pandas as pd
import pytest

from helpers.runtime.settings import ROOT
from helpers.study.counts import (
    PUBLISHED,
    age_table,
    band_table,
    compare_counts,
    count_together,
    finding_table,
    findings_per_image,
    identify_study,
    subset_table,
    view_table,
)
from helpers.study.labels import PATHOLOGIES, load_metadata
from helpers.study.study_folder import load_official_lists

pytestmark = pytest.mark.slow  # NIH's whole label file


@pytest.fixture
def copy(nih_folder, tmp_path):
    """A copy of NIH's lists and boxes, to be damaged."""
    names = ("train_val_list.txt", "test_list.txt", "BBox_List_2017.csv", "google2019_nih-chest-xray-labels.csv")
    for name in names:
        shutil.copy(nih_folder / name, tmp_path)
    return tmp_path


def differences(folder, metadata):
    """Dict (count, part) -> difference, of those that are not 0."""
    assert identify_study(folder, metadata) == "nih"
    table = compare_counts(folder, metadata, metadata["image"]).set_index(["count", "part"])["difference"]
    return table[table.ne(0)].to_dict()


def test_nih_has_what_it_published(nih, nih_folder):
    """Every count of the data card, in all and on both lists."""
    table = compare_counts(str(nih_folder), nih, nih["image"])
    assert len(table) == 3 * len(PUBLISHED) == 99
    assert table["difference"].eq(0).all() and table["here"].equals(table["listed"])
    assert table["share"].dropna().eq(1).all() and table["share"].isna().equals(table["published"].eq(0))


def test_published_counts_add_up():
    """Those of the two lists make up the whole."""
    assert all(sum(counts[1:]) == counts[0] for name, counts in PUBLISHED.items() if name != "findings with boxes")
    assert PUBLISHED["PA"][0] + PUBLISHED["AP"][0] == PUBLISHED["images"][0] == 112_120
    assert sum(PUBLISHED[f"boxes of {name}"][0] for name in PATHOLOGIES if f"boxes of {name}" in PUBLISHED) == 984


def test_lost_rows_and_a_wrong_label_are_named(nih, nih_folder):
    hernia = nih[PATHOLOGIES[-1]].eq(1) & nih[list(PATHOLOGIES)].sum(axis=1).eq(1)
    damaged = nih.copy()
    damaged.loc[hernia.idxmax(), ["Hernia", "Mass"]] = 0, 1
    found = differences(nih_folder, damaged)
    assert {count for count, _ in found} == {"Hernia", "Mass"}
    assert found["Hernia", "all"] == -1 and found["Mass", "all"] == 1

    found = differences(nih_folder, nih[:-3])  # of one patient, in test_list.txt
    assert found["images", "all"] == found["images", "test"] == -3
    assert ("images", "train_val") not in found


@pytest.mark.parametrize("n_images", [1, 5])
def test_an_image_on_the_other_list_is_named(nih, copy, n_images):
    """If its patient has one image, the patient is on the other list then; if five, on both."""
    test = (copy / "test_list.txt").read_text().split()
    images = pd.Series(test).groupby([name[:8] for name in test])
    moved = images.get_group(images.size().eq(n_images).idxmax()).iloc[0]
    (copy / "test_list.txt").write_text("\n".join(name for name in test if name != moved))
    with (copy / "train_val_list.txt").open("a") as file:
        file.write(f"\n{moved}")
    found = differences(copy, nih)
    assert found["images", "test"] == -1 and found["images", "train_val"] == found["patients", "train_val"] == 1
    assert found.get(("patients in both lists", "all"), 0) == (n_images > 1)
    assert (("patients", "test") in found) == (n_images == 1)


def test_lost_boxes_are_named_and_missing_files_are_not_counted_as_lost(nih, copy):
    """The radiologists' labels are in neither NIH's Box nor at Kaggle; the boxes may be left out."""
    lines = (copy / "BBox_List_2017.csv").read_text().splitlines(keepends=True)
    (copy / "BBox_List_2017.csv").write_text("".join(lines[:-1]))
    (copy / "google2019_nih-chest-xray-labels.csv").unlink()
    lost = ("boxes", "images with boxes", f"boxes of {lines[-1].split(',')[1]}")
    assert differences(copy, nih) == {(name, part): -1 for name in lost for part in ("all", "test")}

    (copy / "BBox_List_2017.csv").unlink()
    table = compare_counts(copy, nih, nih["image"])
    assert table["difference"].eq(0).all()
    assert set(table["count"]) == {name for name in PUBLISHED if "boxes" not in name and "again" not in name}


def test_a_partial_download_is_compared_by_its_share(nih, nih_folder, shared_data):
    images = sorted(path.name for path in (shared_data / "nih_sample" / "images").iterdir())
    table = compare_counts(nih_folder, nih, images).set_index(["count", "part"])
    assert table.loc[("images", "all"), "here"] == 304 and table.loc[("patients", "all"), "here"] == 246
    assert table.loc[("images", "test"), "here"] == len(set(images) & load_official_lists(nih_folder)[1])
    assert table.loc[("Pneumonia", "all"), "share"] == pytest.approx(93 / 1431)
    assert table["difference"].eq(0).all()


def test_a_study_without_lists_is_counted_as_a_whole(phantom_dir, tmp_path):
    for path in phantom_dir.glob("*.csv"):
        shutil.copy(path, tmp_path)
    metadata = load_metadata(tmp_path)
    table = compare_counts(tmp_path, metadata, metadata["image"][:10]).set_index("count")
    assert set(table["part"]) == {"all"} and table.loc["images", ["listed", "here"]].tolist() == [len(metadata), 10]


def test_kinds_of_studies(nih, phantom_dir, tmp_path):
    rows = nih[["image", "patient_id"]]
    assert identify_study(tmp_path, rows) == "nih"
    assert identify_study(tmp_path, rows[rows["patient_id"] < 2000]) == "part of nih"
    assert identify_study(tmp_path, rows.assign(patient_id=rows["patient_id"] + 1)) == "other"
    assert identify_study(tmp_path, rows.assign(image="train_" + rows["image"])) == "other"
    assert identify_study(tmp_path, pd.concat([rows] * 2)) == "other"
    assert identify_study(str(phantom_dir), load_metadata(phantom_dir)) == "synthetic"


def by(table, *columns):
    return table.set_index(list(columns))


def test_the_lists_of_nih_are_two_populations(nih):
    official = nih.assign(subset=np.where(nih["subset"].eq("test"), "test", "train"))
    table = by(subset_table(official), "subset").round(3)
    assert table.loc["train", ["images", "patients"]].tolist() == [86_524, 28_008]
    assert table.loc["test", ["images", "patients"]].tolist() == [25_596, 2_797]
    assert table["no_finding"].tolist() == [0.584, 0.385] and table["ap"].tolist() == [0.350, 0.566]
    assert table["images_per_patient"].round(1).tolist() == [3.1, 9.2]


def test_findings_and_views_of_nih(nih):
    """Edema is eleven times more common in AP."""
    table = by(finding_table(nih), "subset", "pathology")
    assert table.loc[("test", "Hernia"), ["images", "patients"]].tolist() == [86, 32]
    assert table["images"].groupby("pathology").sum().loc["Infiltration"] == 19_894
    assert table.loc[("test", "Effusion"), "prevalence"] == pytest.approx(4_658 / 25_596)
    per_image = by(findings_per_image(nih), "findings").sum(axis=1)
    assert per_image.loc[0] == 60_361 and per_image.loc[2:].sum() == 20_796 and per_image.sum() == 112_120
    together = count_together(nih)
    assert together.loc["Hernia", "Hernia"] == 227 and together.equals(together.T)
    assert together.loc["Edema", "Pneumonia"] == (nih["Edema"] & nih["Pneumonia"]).sum() == 340

    views = by(view_table(nih), "pathology")
    assert views.loc["Edema", "ratio"] == pytest.approx(11, abs=0.05)
    assert views.loc["No Finding", ["images_pa", "images_ap"]].sum() == 60_361
    edema = table.xs("Edema", level="pathology")
    assert views.loc["Edema", "images_ap"] == pytest.approx((edema["images"] * edema["ap"]).sum())


def test_follow_ups_and_ages_of_nih(nih):
    table = by(band_table(nih, nih["follow_up"]), "band")
    assert table["images"].sum() == 112_120 and table.index[0] == "0" and table.index[-1] == "64 and more"
    assert table.loc["0", ["images", "patients"]].tolist() == [30_805, 30_805]
    assert table.loc["4 to 7", "images"] == nih["follow_up"].between(4, 7).sum()
    ill = table["any_finding"]
    assert ill.is_monotonic_increasing and ill.iloc[0] == pytest.approx(0.305, abs=0.001)
    ages = by(age_table(nih), "age", "sex")["images"]
    assert ages.sum() == 112_120 and ages.loc[(90, "F")] == (nih["age"].ge(90) & nih["sex"].eq("F")).sum()


def test_a_study_without_view_and_age_is_counted(rows_and_paths):
    rows = rows_and_paths[0]
    rows = rows.assign(subset=rows["split"], view="", sex="", age=np.nan)
    assert view_table(rows)[["pa", "ap", "ratio"]].isna().all(axis=None)
    assert len(age_table(rows)) == 0 and subset_table(rows)["median_age"].isna().all()
    assert band_table(rows, rows["follow_up"])["ap"].eq(0).all()


def test_the_data_card_says_what_nih_has(nih):
    """Numbers in the card's sentences, counted in NIH's own files and rounded as they are written there."""
    sys.path.append(str(ROOT / "scripts"))
    from page_tables import renew_sentence

    in_list, is_ap = nih["subset"].eq("test"), nih["view"].eq("AP")
    none = nih[list(PATHOLOGIES)].sum(axis=1).eq(0)
    shares = {view: nih.loc[nih["view"].eq(view), list(PATHOLOGIES)].mean() for view in ("AP", "PA")}
    n_images = nih.groupby("patient_id")["image"].transform("size")
    number = nih["image"].str.slice(9, 12).astype(int)
    differs = number.ne(nih["follow_up"])
    ages = nih.assign(number=number).sort_values(["patient_id", "number"]).groupby("patient_id")["age"]
    of = {
        "outside": 100 * none[~in_list].mean(),
        "inside": 100 * none[in_list].mean(),
        "ap_outside": 100 * is_ap[~in_list].mean(),
        "ap_inside": 100 * is_ap[in_list].mean(),
        "each_inside": in_list.sum() / nih["patient_id"][in_list].nunique(),
        "each_outside": (~in_list).sum() / nih["patient_id"][~in_list].nunique(),
        "edema": shares["AP"]["Edema"] / shares["PA"]["Edema"],
        "edema_ap": 100 * shares["AP"]["Edema"],
        "edema_pa": 100 * shares["PA"]["Edema"],
        "consolidation": shares["AP"]["Consolidation"] / shares["PA"]["Consolidation"],
        "fibrosis": shares["AP"]["Fibrosis"] / shares["PA"]["Fibrosis"],
        "many": 100 * (~none)[n_images > 30].mean(),
        "one": 100 * (~none)[n_images == 1].mean(),
        "renumbered": differs.sum(),
        "renumbered_patients": nih["patient_id"][differs].nunique(),
        "younger": (ages.diff() < 0).groupby(nih["patient_id"]).any().sum(),
    }
    sentences = [
        "No Finding falls from {outside:.1f} % to {inside:.1f} % of images, AP rises from {ap_outside:.0f} % to "
        "{ap_inside:.0f} %, and a patient has {each_inside:.1f} images instead of {each_outside:.1f}.",
        "Edema is {edema:.0f} times as common in AP images ({edema_ap:.1f} % against {edema_pa:.1f} %), Consolidation "
        "{consolidation:.1f} times, Fibrosis {fibrosis:.1f} times.",
        "Patients with more than 30 images have a finding on {many:.0f} % of them, patients with one image on "
        "{one:.0f} %",
        "In the 2020 edition {renumbered:,d} images of {renumbered_patients:,d} patients have another one",
        "by the names, {younger:,d} would",
    ]
    card = (ROOT / "data" / "README.md").read_text()
    for sentence in sentences:
        assert renew_sentence(card, sentence, of) == card, sentence


@pytest.mark.parametrize("split", ["official", "random_patients", "leaky_images"])
def test_the_data_card_has_the_split_s_hash_and_sizes(nih, nih_folder, split):
    from helpers.study import hash_split, make_split

    subset = nih["subset"] if split == "official" else make_split(nih, split=split)
    card = (ROOT / "data" / "README.md").read_text()
    row = next(line for line in card.splitlines() if line.startswith(f"| `{split}` |"))
    assert hash_split(nih["image"], subset) in row
    sizes = [f"{(np.asarray(subset) == name).sum():,}" for name in ("train", "val", "test")]
    assert " / ".join(sizes) in row
