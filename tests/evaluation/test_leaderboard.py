"""Tests of evaluation.leaderboard: what does not compare stays apart, and no entry is lost."""

import pandas as pd
import pytest

from helpers.evaluation.leaderboard import add_to_leaderboard, gather_scores


def entry(run="a", split="official", auc=0.8, images="0123", **more):
    base = {"run": run, "study": "nih", "split": split, "part": "test", "images_sha256": images, "mean_auc": auc}
    return base | more


def scores(split, *aucs):
    return pd.DataFrame({"split": split, "pathology": ["Mass", "Edema"], "auc": aucs})


def test_scores_on_one_split_stand_side_by_side():
    table = gather_scores({"ours": scores("official", 0.7, 0.9), "theirs": scores("official", 0.6, 0.8).iloc[::-1]})
    assert table.index.tolist() == ["Mass", "Edema"]
    assert table["ours"].tolist() == [0.7, 0.9] and table["theirs"].tolist() == [0.6, 0.8]


def test_scores_on_different_splits_are_refused_in_one_table():
    with pytest.raises(ValueError, match="ours is on official; CheXNet is on random_patients"):
        gather_scores({"ours": scores("official", 0.7, 0.9), "CheXNet": scores("random_patients", 0.8, 0.9)})


def test_leaderboard_never_mixes_splits(tmp_path):
    path = tmp_path / "leaderboard.csv"
    add_to_leaderboard(path, entry("a", auc=0.80))
    add_to_leaderboard(path, entry("b", "random_patients", auc=0.84))
    add_to_leaderboard(path, entry("c", auc=0.81, images="4567"))
    table = add_to_leaderboard(path, entry("007", auc=0.82, views=9))
    assert table["run"].tolist() == ["007", "a"] and table["mean_auc"].tolist() == [0.82, 0.80]
    assert set(table["images_sha256"]) == {"0123"}
    held = pd.read_csv(path, dtype=str)
    assert len(held) == 4 and set(held["run"]) == {"a", "b", "c", "007"}
    assert not list(tmp_path.glob("part-*"))


def test_the_same_run_replaces_its_entry_on_the_same_images_only(tmp_path):
    path = tmp_path / "leaderboard.csv"
    add_to_leaderboard(path, entry("a", auc=0.5))
    add_to_leaderboard(path, entry("a", "random_patients", auc=0.6))
    table = add_to_leaderboard(path, entry("a", auc=0.7))
    assert table["mean_auc"].tolist() == [0.7]
    assert sorted(pd.read_csv(path)["mean_auc"]) == [0.6, 0.7]


def test_a_foreign_file_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "leaderboard.csv"
    path.write_text("name,score\nx,1\n")
    with pytest.raises(ValueError, match=r"leaderboard.csv lacks run, study, .*move"):
        add_to_leaderboard(path, entry())
    with pytest.raises(ValueError, match="the entry lacks mean_auc"):
        add_to_leaderboard(tmp_path / "new.csv", {k: v for k, v in entry().items() if k != "mean_auc"})
    assert path.read_text() == "name,score\nx,1\n" and not (tmp_path / "new.csv").exists()
