"""Tests of xvision.openi and openi_files: a made-up collection, the real reports, and a server on this machine."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from faulty_server import FaultyServer, cut_after
from PIL import Image

from helpers.fetch.downloads import DownloadError
from helpers.runtime.files import hash_file
from helpers.study import assert_no_patient_overlap, make_split
from helpers.xvision import fetch_openi, load_openi_cohort, read_openi_reports
from helpers.xvision.openi import find_frontal, label_openi, load_openi_images
from helpers.xvision.openi_files import REPORTS, REPORTS_SHA256

# Study to terms and images. By the list of views the first image of 2 and 3 is frontal, the second of 1, none of 62.
STUDIES = {
    1: (["normal"], ["CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001"]),
    2: (["Nodule/lung/upper lobe/right", "Opacity/lung"], ["CXR2_IM-0652-1001", "CXR2_IM-0652-2001"]),
    3: (["normal"], ["CXR3_IM-1384-1001", "CXR3_IM-1384-2001"]),
    4: (["Calcified Granuloma/lung", "Lung/hilum/lymph nodes"], ["CXR4_IM-2050-1001"]),
    5: (["Nodule"], ["CXR5_IM-2117-1003002"]),
    6: (["normal", "Nodule/lung"], ["CXR6_IM-2192-1001"]),
    7: (["No Indexing"], []),
    62: (["normal"], ["CXR62_IM-0133-1001"]),
}


def write_report(study, terms, images):
    nodes = "".join(f'<parentImage id="{image}"><caption>PA and lateral </caption></parentImage>' for image in images)
    majors = "".join(f"<major>{term}</major>" for term in terms)
    mesh = f"<MeSH>{majors}<automatic>lung &amp; heart</automatic></MeSH>"
    return f'<?xml version="1.0" encoding="utf-8"?><eCitation><uId id="CXR{study}"/>{mesh}{nodes}</eCitation>'.encode()


def pack(files):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def make_png(seed=0, side=64):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


REPORT_ARCHIVE = pack({f"ecgen-radiology/{n}.xml": write_report(n, *what) for n, what in STUDIES.items()})
IMAGES = {f"{image}.png": make_png(n) for n, (_, images) in STUDIES.items() for image in images}


@pytest.fixture
def collection(tmp_path):
    (tmp_path / REPORTS).write_bytes(REPORT_ARCHIVE)
    (tmp_path / "images").mkdir()
    for name, data in IMAGES.items():
        (tmp_path / "images" / name).write_bytes(data)
    return tmp_path


@pytest.fixture(scope="module")
def real_reports(shared_data):
    return read_openi_reports(shared_data / "openi" / REPORTS)


# Reports


def test_reports_become_one_row_an_image(collection):
    reports = read_openi_reports(collection / REPORTS)
    assert reports["image"].tolist() == sorted(IMAGES)
    assert reports.attrs == {"n_reports": 8}  # the one without an image, too
    row = reports.set_index("image").loc["CXR1_1_IM-0001-4001.png"]
    assert row.to_dict() == {"study": "CXR1", "position": 2, "terms": ("normal",)}


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (REPORT_ARCHIVE[: len(REPORT_ARCHIVE) // 2], ValueError, r"NLMCXR_reports\.tgz: damaged .*download it again"),
        (b"no archive", ValueError, "damaged or cut short"),
        (pack({"a.txt": b"1"}), FileNotFoundError, "holds no report"),
        (None, FileNotFoundError, "fetch_openi"),
        (pack({"1.xml": b""}), ValueError, "1.xml: .*download the archive again"),
        (pack({"1.xml": write_report(1, ["normal"], [])[:-5]}), ValueError, "1.xml: .*download the archive again"),
        (pack({"1.xml": b"<eCitation/>"}), ValueError, "lacks the identity"),
        (pack({"1.xml": write_report(1, ["normal"], ["../../CXR1"])}), ValueError, "is not an image's name"),
        (pack({"1.xml": write_report("1/..", ["normal"], ["CXR1_1"])}), ValueError, "is not an image's name"),
        (pack({"1.xml": write_report(1, ["normal"], ["CXR1_1", "CXR1_1"])}), ValueError, "named twice"),
    ],
    ids=["cut", "text", "no report", "no file", "empty", "cut report", "no identity", "path", "path in study", "twice"],
)
def test_broken_reports_are_named(tmp_path, data, error, message):
    if data is not None:
        (tmp_path / REPORTS).write_bytes(data)
    with pytest.raises(error, match=message):
        read_openi_reports(tmp_path / REPORTS)


def test_entities_that_grow_or_read_other_files_are_refused(tmp_path):
    (tmp_path / "secret").write_text("CXR1_1")
    entities = "".join(f'<!ENTITY e{i + 1} "{f"&e{i};" * 10}">' for i in range(9))
    for subset in (f'<!ENTITY e0 "{"ha" * 9}">{entities}', f'<!ENTITY e9 SYSTEM "{tmp_path / "secret"}">'):
        report = write_report(1, ["&e9;"], ["CXR1_1"])
        report = report.replace(b"<eCitation>", f"<!DOCTYPE e [{subset}]><eCitation>".encode())
        (tmp_path / REPORTS).write_bytes(pack({"1.xml": report}))
        with pytest.raises(ValueError, match=r"1\.xml: .*(amplification|undefined entity)"):
            read_openi_reports(tmp_path / REPORTS)


# Labels, views, cohort


def test_labels_follow_the_headings_of_the_terms():
    cases = {
        ("normal",): "Normal",
        ("Nodule/lung/upper lobe/right",): "Nodule",
        ("Opacity/lung", "Nodule"): "Nodule",
        ("normal", "Nodule/lung"): "Nodule",
        ("normal", "Opacity/lung"): "",
        ("Pleura/base/bilateral/abnormal/chronic",): "",
        ("Calcinosis/lung/hilum/lymph nodes",): "",
        ("Calcified Granuloma/lung",): "",
        ("Mass/lung",): "",
        (): "",
    }
    labels = label_openi(pd.DataFrame({"terms": list(cases)}, index=range(5, 5 + len(cases))))
    assert labels.tolist() == list(cases.values()) and labels.index[0] == 5


def test_images_have_labels_and_paths_and_what_is_left_out_is_counted(collection):
    (collection / "images" / "CXR9_IM-1-1.png").write_bytes(make_png())
    (collection / "more").mkdir()  # images are found at any depth
    (collection / "images" / "CXR6_IM-2192-1001.png").rename(collection / "more" / "CXR6_IM-2192-1001.png")
    rows, counts = load_openi_images(collection, views="both")
    assert rows.columns.tolist() == ["image", "path", "patient_id", "label"] and rows["label"].dtype == np.int8
    assert dict(zip(rows["image"], rows["label"], strict=True)) == {
        "CXR62_IM-0133-1001.png": 0,
        "CXR1_1_IM-0001-3001.png": 0,
        "CXR1_1_IM-0001-4001.png": 0,
        "CXR2_IM-0652-1001.png": 1,
        "CXR2_IM-0652-2001.png": 1,
        "CXR3_IM-1384-1001.png": 0,
        "CXR3_IM-1384-2001.png": 0,
        "CXR5_IM-2117-1003002.png": 1,
        "CXR6_IM-2192-1001.png": 1,
    }
    assert rows["image"].is_monotonic_increasing and rows["patient_id"].tolist()[-2:] == ["CXR62", "CXR6"]
    assert [Path(path).read_bytes() for path in rows["path"]] == [IMAGES[image] for image in rows["image"]]
    expected = {"reports": 8, "images of other reports": 1, "other views": 0, "missing images": 0, "broken images": 0}
    assert counts == expected

    rows, counts = load_openi_images(collection)
    frontal = ["CXR1_1_IM-0001-4001", "CXR2_IM-0652-1001", "CXR3_IM-1384-1001", "CXR5_IM-2117-1003002"]
    assert rows["image"].tolist() == [f"{name}.png" for name in [*frontal, "CXR6_IM-2192-1001"]]
    assert counts == expected | {"other views": 4} and rows["label"].tolist() == [0, 1, 0, 1, 1]
    cohort = load_openi_cohort(collection)
    assert cohort.counts.items() >= counts.items() and len(cohort) == 5
    with pytest.raises(ValueError, match="views is 'lateral'; expected one of frontal, both"):
        load_openi_images(collection, views="lateral")
    (collection / "more" / "CXR2_IM-0652-1001.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"two images are called CXR2_IM-0652-1001\.png"):
        load_openi_images(collection)


def test_missing_and_broken_images_are_counted(collection):
    images = collection / "images"
    (images / "CXR3_IM-1384-2001.png").unlink()
    whole = IMAGES["CXR2_IM-0652-1001.png"]
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (images / "CXR2_IM-0652-1001.png").write_bytes(flipped)
    (images / "CXR1_1_IM-0001-3001.png").write_bytes(whole[: len(whole) // 2])
    (images / "CXR62_IM-0133-1001.png").write_bytes(b"<html>")
    rows, counts = load_openi_images(collection, views="both")
    assert (counts["missing images"], counts["broken images"], len(rows)) == (1, 3, 5)


def test_a_folder_without_reports_images_or_one_class_says_what_to_do(collection):
    for name in ("CXR2_IM-0652-1001", "CXR2_IM-0652-2001", "CXR5_IM-2117-1003002", "CXR6_IM-2192-1001"):
        (collection / "images" / f"{name}.png").unlink()
    with pytest.raises(ValueError, match=r"5 images are Normal and 0 Nodule, and both are needed; 4 are missing"):
        load_openi_images(collection, views="both")
    for path in (collection / "images").iterdir():
        path.rename(path.with_name("0" + path.name))
    with pytest.raises(
        FileNotFoundError, match=r"none of the 10 images .* 6 others, for instance 0CXR1_1.*fetch_openi"
    ):
        load_openi_images(collection)
    (collection / REPORTS).unlink()
    with pytest.raises(FileNotFoundError, match="fetch_openi downloads"):
        load_openi_images(collection)


# Fetching


def test_the_collection_is_fetched_through_cuts_and_only_once(tmp_path):
    options = {"pause": 0.01, "timeout": 5}
    with FaultyServer() as server:
        server.files["/imgs/collections/NLMCXR_reports.tgz"] = REPORT_ARCHIVE
        server.files["/imgs/collections/NLMCXR_png.tgz"] = pack(IMAGES)
        server.faults["/imgs/collections/NLMCXR_png.tgz"] = [cut_after(20_000), cut_after(5)]
        for _ in range(2):
            reports, images = fetch_openi(tmp_path, server.url, reports_sha256=None, **options)
        assert [path for path, _, _ in server.asked] == ["/imgs/collections/NLMCXR_reports.tgz"] + [
            "/imgs/collections/NLMCXR_png.tgz"
        ] * 3
        with pytest.raises(DownloadError, match=f"is not the expected one, {REPORTS_SHA256}"):
            fetch_openi(tmp_path / "other", server.url, **options)
    assert reports.read_bytes() == REPORT_ARCHIVE and {path.name for path in images.iterdir()} == set(IMAGES)
    rows, counts = load_openi_images(tmp_path)
    assert len(rows) == 5 and counts["missing images"] == 0


# The real collection


def test_the_real_reports_are_the_known_ones(shared_data, real_reports):
    assert hash_file(shared_data / "openi" / REPORTS) == REPORTS_SHA256
    assert real_reports.attrs["n_reports"] == 3955 and len(real_reports) == 7470
    assert real_reports["study"].nunique() == 3851
    labels = label_openi(real_reports)
    assert labels.value_counts().to_dict() == {"": 4563, "Normal": 2696, "Nodule": 211}
    assert real_reports.groupby(labels)["study"].nunique().to_dict() == {"": 2366, "Normal": 1379, "Nodule": 106}
    assert not any(len(terms) > 1 and "normal" in terms for terms in real_reports["terms"])


def test_real_frontal_images_are_one_a_study(real_reports):
    frontal = find_frontal(real_reports)
    assert not real_reports[frontal]["study"].duplicated().any()
    labels = label_openi(real_reports)[frontal]
    assert labels.value_counts().to_dict() == {"": 2196, "Normal": 1337, "Nodule": 100}


def test_real_labels_agree_with_those_that_were_scraped(shared_data, real_reports):
    scraped = json.loads((shared_data / "openi" / "xvision_scraped_labels.json").read_text())
    terms = {hit["img"].rsplit("/", 1)[1]: tuple(hit["items"]) for hit in scraped.values()}
    ours = dict(zip(real_reports["image"], real_reports["terms"], strict=True))
    assert len(scraped) == len(terms) == 7469
    # One image was skipped: the scraper numbered the pages and kept none for 7150, the next after 7149.
    assert set(ours) - set(terms) == {"CXR845_IM-2367-1002.png"} and set(terms) <= set(ours)
    assert set(range(1, 7471)) - set(map(int, scraped)) == {7150}
    assert scraped["7149"]["img"].endswith("CXR845_IM-2367-1001.png")
    assert all(ours[image] == found for image, found in terms.items())

    # What Xvision made of them: an image is of a class if all the listed words in its terms together spell that class.
    words = (
        "normal|opacity|cardiomegaly|calcinosis|lung/hypoinflation|calcified granuloma|thoracic vertebrae/degenerative"
    )
    words += "|lung/hyperdistention|spine/degenerative |catheters, indwelling|granulomatous disease|nodule"
    words += "|surgical instruments|scoliosis|spondylosis"
    theirs = {
        image: "".join(word for word in words.split("|") if word in "/".join(found).lower())
        for image, found in terms.items()
    }
    xvision = {"normal": "Normal", "nodule": "Nodule", "calcinosisnodule": "Nodule"}
    labels = dict(zip(real_reports["image"], label_openi(real_reports), strict=True))
    pairs = Counter((labels[image], xvision.get(word, "")) for image, word in theirs.items())
    assert pairs == {
        ("", ""): 4561,
        ("", "Normal"): 1,  # "abnormal" contains "normal"
        ("Normal", "Normal"): 2696,
        ("Nodule", "Nodule"): 98,
        ("Nodule", ""): 113,  # another of the listed findings beside the nodule
    }
    (odd,) = (image for image, word in theirs.items() if word == "normal" and labels[image] != "Normal")
    assert "Pleura/base/bilateral/abnormal/chronic" in terms[odd]


def test_real_studies_split_without_a_shared_patient(real_reports):
    labels = label_openi(real_reports)
    rows = real_reports.assign(patient_id=real_reports["study"])[(labels != "") & find_frontal(real_reports)]
    subsets = make_split(rows, split="random_patients")
    assert_no_patient_overlap(rows["patient_id"], subsets)
    assert set(subsets) == {"train", "val", "test"}
