"""Tests of fetch.sources: finding a study, and the lists of files that are elsewhere."""

import os
import sys
import types

import pytest

from helpers.fetch import (
    download_with_kagglehub,
    find_attached_study,
    link_study,
    list_chestmnist_file,
    list_remote_study,
)
from helpers.fetch.downloads import DownloadError
from helpers.fetch.sources import KAGGLE_MOUNTS, is_known_metadata, parse_archives
from helpers.runtime import hash_file
from helpers.study import list_images, load_metadata, load_study


def lay_study(folder, images="images_001/images"):
    (folder / images).mkdir(parents=True)
    (folder / images / "00000001_000.png").write_bytes(b"")
    (folder / "Data_Entry_2017.csv").write_text("")
    return folder


@pytest.mark.parametrize("place", [*KAGGLE_MOUNTS, "mine", "competitions/chest/nih/v1"])
def test_an_attached_study_is_found_wherever_it_is_mounted(tmp_path, place):
    study = lay_study(tmp_path / place)
    (tmp_path / "other" / "images").mkdir(parents=True)  # images alone are no study
    assert find_attached_study(tmp_path) == study


def test_the_known_mount_goes_before_a_copy_and_two_copies_are_not_chosen_between(tmp_path):
    lay_study(tmp_path / "a")
    lay_study(tmp_path / "b")
    with pytest.raises(ValueError, match=r"2 studies are attached: .*/a, .*/b\. Name one as DATA_DIR"):
        find_attached_study(tmp_path)
    assert find_attached_study(tmp_path / "a") == tmp_path / "a"
    known = lay_study(tmp_path / KAGGLE_MOUNTS[1])
    assert find_attached_study(tmp_path) == known


def test_without_an_attached_study_the_error_says_where_it_looked_and_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*/input: .*nih-chest-xrays/data by “Add Input”"):
        find_attached_study(tmp_path / "input")
    lay_study(tmp_path / "a/b/c/d/e/f")  # too deep
    with pytest.raises(FileNotFoundError, match=r"neither .*/data nor .*/datasets/nih-chest-xrays/data nor a folder"):
        find_attached_study(tmp_path)


def test_what_is_attached_in_place_of_a_study_is_named(tmp_path):
    (tmp_path / "sample" / "images").mkdir(parents=True)
    (tmp_path / "sample" / "sample_labels.csv").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "images.zip").touch()
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "00000001_000.png").touch()
    with pytest.raises(FileNotFoundError) as error:
        find_attached_study(tmp_path)
    for text in (
        f"{tmp_path}/sample holds images and sample_labels.csv. ",
        f"{tmp_path}/mine/images.zip has to be unpacked. ",
        f"{tmp_path}/flat holds PNGs and no CSV file. ",
        "attach the data set nih-chest-xrays/data by “Add Input”",
    ):
        assert text in str(error.value)


def test_folders_of_images_are_not_opened(tmp_path, monkeypatch):
    study = lay_study(tmp_path / "nih")
    (tmp_path / "pictures" / "images").mkdir(parents=True)
    opened, scan = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: opened.append(str(path)) or scan(path))
    assert find_attached_study(tmp_path) == study
    assert opened and not [path for path in opened if os.path.basename(path).startswith("images")]


def test_a_study_elsewhere_appears_by_links(tmp_path, phantom_dir):
    link_study(phantom_dir, tmp_path / "nih")
    link_study(phantom_dir, tmp_path / "nih")  # again
    assert list(list_images(tmp_path / "nih")) == list(list_images(phantom_dir))
    assert load_metadata(tmp_path / "nih").equals(load_metadata(phantom_dir))
    link_study(lay_study(tmp_path / "one", "images"), tmp_path / "both")
    with pytest.raises(ValueError, match=r"both/.* is there already and is not .*other/.*; name another"):
        link_study(lay_study(tmp_path / "other", "images"), tmp_path / "both")
    with pytest.raises(ValueError, match="links need a local folder"):
        link_study(phantom_dir, "gs://bucket/nih")


def test_what_marks_synthetic_images_comes_along_with_them(tmp_path, phantom_dir):
    link_study(phantom_dir, tmp_path / "synthetic")
    assert load_study(tmp_path / "synthetic").is_synthetic


def test_images_of_another_kind_are_not_mixed_with_those_linked_to(tmp_path):
    (lay_study(tmp_path / "data", "images") / "labels.csv").write_text("")
    with pytest.raises(ValueError, match=r"data holds another study, by its labels\.csv: name another DATA_DIR"):
        link_study(lay_study(tmp_path / "nih"), tmp_path / "data")
    assert not (tmp_path / "data" / "images_001").exists()


def test_an_attached_study_of_ones_own_is_found_and_linked_whole(tmp_path):
    own, packed = tmp_path / "input" / "ward", tmp_path / "input" / "packed"
    (own / "a" / "b").mkdir(parents=True)
    (own / "labels.csv").write_text("image,Mass\na/b/0.png,1\na/b/1.png,0\n")
    for name in ("0.png", "1.png"):
        (own / "a" / "b" / name).write_bytes(b"")
    (packed / "study").mkdir(parents=True)
    (packed / "manifest.json").write_text("{}")
    (packed / "study" / "labels.csv").write_text("image,Mass\n")
    assert find_attached_study(tmp_path / "input") == own
    link_study(own, tmp_path / "mine")
    study = load_study(tmp_path / "mine")
    assert study.findings == ("Mass",) and [*study.list_images()] == ["a/b/0.png", "a/b/1.png"]


def test_links_follow_a_mount_that_has_moved(tmp_path):
    lay_study(tmp_path / "old")
    link_study(tmp_path / "old", tmp_path / "nih")
    (tmp_path / "old").rename(tmp_path / "new")
    link_study(tmp_path / "new", tmp_path / "nih")
    assert (tmp_path / "nih" / "images_001").resolve() == tmp_path / "new" / "images_001"


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("1-12", tuple(range(1, 13))), ("1", (1,)), ("5, 1-2,2", (1, 2, 5))],
)
def test_archives_are_named_by_number(text, numbers):
    assert parse_archives(text) == numbers


@pytest.mark.parametrize("text", ["", "0", "13", "3-1", "1-", "all", "1;2"])
def test_other_names_of_archives_are_refused(text):
    with pytest.raises(ValueError, match=r"ARCHIVES is .*expected numbers from 1 to 12"):
        parse_archives(text)


def test_the_archives_hold_all_images_of_the_label_file(shared_data):
    rows = (shared_data / "nih_metadata" / "Data_Entry_2017_v2020.csv").read_text().splitlines()[1:]
    for source in ("nih_box", "hugging_face"):
        study = list_remote_study(source)
        assert len(study.archives) == 12 and sum(archive.images for archive in study.archives) == len(rows)
        assert len({archive.url for archive in study.archives}) == 12
        assert len({archive.name for archive in study.archives}) == 12
        assert all(archive.url.startswith("https://") and archive.about > 2e9 for archive in study.archives)
        assert [archive.stem for archive in study.archives][::11] == ["images_001", "images_012"]


def test_the_small_files_are_compared_with_known_hashes(shared_data):
    """Box's label file is the mirror's with one header of a column changed, to the byte."""
    mirror, box = (list_remote_study(source, "1").metadata for source in ("hugging_face", "nih_box"))
    assert [file.name for file in mirror] == [file.name for file in box]
    for one, other in zip(mirror, box, strict=True):
        path = shared_data / "nih_metadata" / one.name
        assert hash_file(path) == one.sha256 and is_known_metadata(one.name, one.sha256)
        assert is_known_metadata(other.name, other.sha256)
    assert not is_known_metadata("test_list.txt", mirror[0].sha256)


def test_box_s_label_file_differs_by_the_header_of_a_column(shared_data, tmp_path):
    labels = list_remote_study("nih_box", "1").metadata[0]
    data = (shared_data / "nih_metadata" / labels.name).read_bytes()
    (tmp_path / labels.name).write_bytes(data.replace(b"Patient Gender", b"Patient Sex", 1))
    assert hash_file(tmp_path / labels.name) == labels.sha256


def test_a_mirror_takes_the_place_of_the_address():
    box, hub = (list_remote_study(source, "3", "http://localhost/x/") for source in ("nih_box", "hugging_face"))
    assert box.archives[0].url == "http://localhost/x/images_003.tar.gz" and box.archives[0].md5
    assert box.metadata[1].url == "http://localhost/x/train_val_list.txt"
    assert hub.archives[0].url == "http://localhost/x/data/images/images_003.zip" and hub.archives[0].size is None
    assert hub.metadata[1].url == "http://localhost/x/data/train_val_list.txt"
    for call in (
        lambda mirror: list_remote_study("nih_box", "1", mirror),
        lambda mirror: list_chestmnist_file(64, mirror),
    ):
        for mirror in ("/data/mirror", "ftp://host/x"):
            with pytest.raises(ValueError, match=f"MIRROR is '{mirror}'; expected an address"):
                call(mirror)


def use_kagglehub(monkeypatch, tmp_path, download):
    monkeypatch.setitem(sys.modules, "kagglehub", types.SimpleNamespace(dataset_download=download))
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "datasets" / "nih-chest-xrays" / "data").mkdir(parents=True)


def test_kagglehub_gives_a_study(tmp_path, monkeypatch):
    use_kagglehub(monkeypatch, tmp_path, lambda handle: str(lay_study(tmp_path / handle.replace("/", "-"))))
    assert download_with_kagglehub() == tmp_path / "nih-chest-xrays-data"


def test_a_refusal_of_kagglehub_and_a_download_that_is_no_study_are_reported(tmp_path, monkeypatch):
    def refuse(handle):
        raise RuntimeError("401")

    use_kagglehub(monkeypatch, tmp_path, refuse)
    refused = r"does not give nih-chest-xrays/data \(RuntimeError: 401\).*Create New Token.*authenticate"
    with pytest.raises(DownloadError, match=refused):
        download_with_kagglehub()
    monkeypatch.setitem(sys.modules, "kagglehub", types.SimpleNamespace(dataset_download=lambda handle: str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="is nih-chest-xrays/data the right data set"):
        download_with_kagglehub()


def test_a_missing_kagglehub_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    with pytest.raises(ModuleNotFoundError, match="pip install kagglehub"):
        download_with_kagglehub()


def test_kagglehub_does_not_start_on_a_disk_that_is_too_small(tmp_path, monkeypatch):
    use_kagglehub(monkeypatch, tmp_path, lambda handle: pytest.fail("started"))
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "empty"))
    is_folder = os.path.isdir  # on Kaggle, where the data is only mounted, nothing is checked
    monkeypatch.setattr(os.path, "isdir", lambda path: path != "/kaggle/input" and is_folder(path))
    monkeypatch.setattr(
        "helpers.fetch.downloads.shutil.disk_usage", lambda path: types.SimpleNamespace(free=80_000_000_000)
    )
    with pytest.raises(DownloadError, match="90,000,000,000 bytes are needed and 80,000,000,000 are free"):
        download_with_kagglehub()
