"""Tests of study.nih_counts on NIH's own files, whole, in part and damaged."""

import shutil

import pandas as pd
import pytest

from helpers.study.labels import PATHOLOGIES, load_metadata, load_official_lists
from helpers.study.nih_counts import PUBLISHED, compare_counts, identify_study

LABELS = "Data_Entry_2017_v2020.csv"


@pytest.fixture
def nih(shared_data, tmp_path):
    """A copy of NIH's metadata, to be damaged."""
    return shutil.copytree(shared_data / "nih_metadata", tmp_path / "nih")


def differences(folder):
    """Dict (count, part) -> difference, of those that are not 0."""
    metadata = load_metadata(folder)
    assert identify_study(folder, metadata) == "nih"
    table = compare_counts(folder, metadata, metadata["image"]).set_index(["count", "part"])["difference"]
    return table[table.ne(0)].to_dict()


def rewrite(path, change):
    path.write_text(change(path.read_text()))


def test_nih_has_what_it_published(shared_data):
    """Every count of the data card, in all and on both lists."""
    folder = shared_data / "nih_metadata"
    metadata = load_metadata(folder)
    table = compare_counts(str(folder), metadata, metadata["image"])
    assert len(table) == 3 * len(PUBLISHED) == 99
    assert table["difference"].eq(0).all() and table["here"].equals(table["listed"])
    assert table["share"].dropna().eq(1).all() and table["share"].isna().equals(table["published"].eq(0))


def test_published_counts_add_up():
    """Those of the two lists make up the whole."""
    assert all(sum(counts[1:]) == counts[0] for name, counts in PUBLISHED.items() if name != "findings with boxes")
    assert PUBLISHED["PA"][0] + PUBLISHED["AP"][0] == PUBLISHED["films"][0] == 112_120
    assert sum(PUBLISHED[f"boxes of {name}"][0] for name in PATHOLOGIES if f"boxes of {name}" in PUBLISHED) == 984


def test_lost_rows_are_named(nih):
    rewrite(nih / LABELS, lambda text: "".join(text.splitlines(keepends=True)[:-3]))  # of one patient, in test_list.txt
    found = differences(nih)
    assert found["films", "all"] == found["films", "test"] == -3
    assert ("films", "train_val") not in found


def test_a_flipped_label_is_named(nih):
    def change(text):
        line = next(line for line in text.splitlines() if ",Hernia," in line)
        return text.replace(line, line.replace(",Hernia,", ",Mass,"))

    rewrite(nih / LABELS, change)
    found = differences(nih)
    assert {count for count, _ in found} == {"Hernia", "Mass"}
    assert found["Hernia", "all"] == -1 and found["Mass", "all"] == 1


@pytest.mark.parametrize("n_films", [1, 5])
def test_a_image_on_the_other_list_is_named(nih, n_images):
    """The patient of one image changes sides with it; one of five images is on both lists then."""
    test = (nih / "test_list.txt").read_text().split()
    images = pd.Series(test).groupby([name[:8] for name in test])
    moved = images.get_group(images.size().eq(n_images).idxmax()).iloc[0]
    (nih / "test_list.txt").write_text("\n".join(name for name in test if name != moved))
    rewrite(nih / "train_val_list.txt", lambda text: f"{text}\n{moved}")
    found = differences(nih)
    assert found["films", "test"] == -1 and found["films", "train_val"] == found["patients", "train_val"] == 1
    assert found.get(("patients in both lists", "all"), 0) == (n_images > 1)
    assert ("patients", "test") in found if n_images == 1 else ("patients", "test") not in found


def test_lost_boxes_are_named(nih):
    lines = (nih / "BBox_List_2017.csv").read_text().splitlines(keepends=True)
    (nih / "BBox_List_2017.csv").write_text("".join(lines[:-1]))
    lost = ("boxes", "images with boxes", f"boxes of {lines[-1].split(',')[1]}")
    assert differences(nih) == {(name, part): -1 for name in lost for part in ("all", "test")}


def test_a_part_is_compared_by_its_share(shared_data):
    folder = shared_data / "nih_metadata"
    metadata = load_metadata(folder)
    images = sorted(path.name for path in (shared_data / "nih_sample" / "images").iterdir())
    table = compare_counts(folder, metadata, images).set_index(["count", "part"])
    assert table.loc[("films", "all"), "here"] == 304 and table.loc[("patients", "all"), "here"] == 246
    assert table.loc[("films", "test"), "here"] == len(set(images) & load_official_lists(folder)[1])
    assert table.loc[("Pneumonia", "all"), "share"] == pytest.approx(93 / 1431)
    assert table["difference"].eq(0).all()


def test_kinds_of_studies(shared_data, phantom_dir, tmp_path):
    metadata = load_metadata(shared_data / "nih_metadata")
    assert identify_study(tmp_path, metadata) == "nih"
    assert identify_study(tmp_path, metadata[metadata["patient_id"] < 2000]) == "part of nih"
    assert identify_study(tmp_path, metadata.assign(patient_id=metadata["patient_id"] + 1)) == "other"
    assert identify_study(tmp_path, metadata.assign(image="train_" + metadata["image"])) == "other"
    assert identify_study(tmp_path, pd.concat([metadata] * 2)) == "other"
    assert identify_study(str(phantom_dir), load_metadata(phantom_dir)) == "synthetic"


def test_a_study_without_lists_is_counted_as_a_whole(phantom_dir, tmp_path):
    for path in phantom_dir.glob("*.csv"):
        shutil.copy(path, tmp_path)
    metadata = load_metadata(tmp_path)
    table = compare_counts(tmp_path, metadata, metadata["image"][:10]).set_index("count")
    assert set(table["part"]) == {"all"} and table.loc["films", ["listed", "here"]].tolist() == [len(metadata), 10]


def test_files_that_no_source_has_are_not_counted_as_lost(nih):
    """The radiologists' labels are in neither NIH's Box nor at Kaggle; the boxes may be left out."""
    (nih / "google2019_nih-chest-xray-labels.csv").unlink()
    assert differences(nih) == {}
    (nih / "BBox_List_2017.csv").unlink()
    metadata = load_metadata(nih)
    table = compare_counts(nih, metadata, metadata["image"])
    assert table["difference"].eq(0).all() and not table["count"].str.contains("boxes|judged").any()
    assert set(table["count"]) == {name for name in PUBLISHED if "boxes" not in name and "judged" not in name}
