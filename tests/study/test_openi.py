"""Open-i: a made-up collection, the real reports, and a server on this machine to fetch from."""

import json
import tarfile
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from faulty_server import FaultyServer, cut_after
from made_archives import make_image, make_tar

from helpers.fetch import fetch_openi
from helpers.fetch.downloads import DownloadError
from helpers.fetch.openi import REPORTS_SHA256
from helpers.runtime.files import hash_file
from helpers.study import assert_no_patient_overlap, load_study, make_split, read_openi_reports
from helpers.study.labels import list_findings
from helpers.study.readers.openi import REPORTS, find_frontal, label_terms

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
    return make_tar(files, folder="")


REPORT_ARCHIVE = pack({f"ecgen-radiology/{n}.xml": write_report(n, *what) for n, what in STUDIES.items()})
IMAGES = {f"{image}.png": make_image(n, side=64) for n, (_, images) in STUDIES.items() for image in images}


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


# Labels and views


def label_all(reports):
    return pd.DataFrame([label_terms(terms) for terms in reports["terms"]]).apply(pd.to_numeric)


def label(rows):
    """Returns "Normal", "Nodule" or "" for the rows of a study, as `load_cohort` selects them."""
    findings = list(list_findings(rows))
    return np.select([rows["Nodule"].eq(1), rows[findings].eq(0).all(axis=1)], ["Nodule", "Normal"], "")


@pytest.mark.parametrize("unpacked", [False, True])
def test_a_frontal_image_of_each_visit_has_the_labels_of_its_terms(collection, unpacked):
    if unpacked:
        with tarfile.open(collection / REPORTS) as tar:
            tar.extractall(collection, filter="data")
        (collection / REPORTS).unlink()
    (collection / "images" / "CXR9_IM-1-1.png").write_bytes(make_image(0))
    (collection / "more").mkdir()  # images are found at any depth
    (collection / "images" / "CXR6_IM-2192-1001.png").rename(collection / "more" / "CXR6_IM-2192-1001.png")
    study = load_study(collection)
    assert study.kind == "openi" and study.has_patients and "CC BY-NC-ND" in study.about["terms"]
    rows = study.rows.set_index("image")
    assert dict(zip(rows.index, label(study.rows), strict=True)) == {
        "CXR1_1_IM-0001-4001.png": "Normal",  # its second image
        "CXR2_IM-0652-1001.png": "Nodule",
        "CXR3_IM-1384-1001.png": "Normal",
        "CXR4_IM-2050-1001.png": "",
        "CXR5_IM-2117-1003002.png": "Nodule",
        "CXR6_IM-2192-1001.png": "Nodule",
    }
    assert rows.loc["CXR2_IM-0652-1001.png", ["Opacity", "Mass", "Other"]].tolist() == [1, 0, 0]
    assert rows.loc["CXR4_IM-2050-1001.png", ["Calcified Granuloma", "Granuloma", "Other"]].tolist() == [1, 0, 1]
    assert rows.loc["CXR1_1_IM-0001-4001.png", "patient_id"] == "CXR1"
    assert study.list_images().keys() > set(rows.index)
    (collection / "more" / "CXR2_IM-0652-1001.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"two images are called CXR2_IM-0652-1001\.png"):
        study.list_images()


def test_headings_are_compared_whole_and_reports_without_indexing_are_unknown(tmp_path):
    terms = [
        ["normal"],
        ["Pleura/base/bilateral/abnormal/chronic"],
        ["Calcinosis/lung/hilum/lymph nodes"],
        ["Mass/lung"],
        ["normal", "Opacity/lung"],
        ["No Indexing"],
        [],
    ]
    reports = {f"{n}.xml": write_report(n, what, [f"CXR{n}_IM-1-1"]) for n, what in enumerate(terms, 18)}
    (tmp_path / REPORTS).write_bytes(pack(reports))
    rows = load_study(tmp_path).rows
    assert label(rows).tolist() == ["Normal", *[""] * 6]
    assert rows["Nodule"].tolist()[:5] == [0] * 5 and rows.loc[5:, "Nodule":].isna().all(axis=None)
    assert rows["Opacity"].tolist()[4] == 1 and rows["Calcinosis"].tolist()[2] == 1 and rows["Mass"].tolist()[3] == 1


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
    study = load_study(tmp_path)
    assert len(study.rows) == 6 and set(study.rows["image"]) <= study.list_images().keys()


# The real collection


def test_the_real_reports_are_the_known_ones(shared_data, real_reports):
    assert hash_file(shared_data / "openi" / REPORTS) == REPORTS_SHA256
    assert real_reports.attrs["n_reports"] == 3955 and len(real_reports) == 7470
    assert real_reports["study"].nunique() == 3851
    labels = label(label_all(real_reports))
    assert Counter(labels.tolist()) == {"": 4563, "Normal": 2696, "Nodule": 211}
    assert real_reports.groupby(labels)["study"].nunique().to_dict() == {"": 2366, "Normal": 1379, "Nodule": 106}
    assert not any(len(terms) > 1 and "normal" in terms for terms in real_reports["terms"])


def test_real_frontal_images_are_one_a_study(shared_data, real_reports):
    frontal = find_frontal(real_reports)
    assert not real_reports[frontal]["study"].duplicated().any()
    rows = load_study(shared_data / "openi").rows
    assert set(rows["image"]) == set(real_reports["image"][frontal])
    assert Counter(label(rows).tolist()) == {"": 2196, "Normal": 1337, "Nodule": 100}
    assert rows["Nodule"].isna().sum() == 84


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
    labels = dict(zip(real_reports["image"], label(label_all(real_reports)), strict=True))
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


def test_real_studies_split_without_a_shared_patient(shared_data):
    rows = load_study(shared_data / "openi").rows
    subsets = make_split(rows, split="random_patients")
    assert_no_patient_overlap(rows["patient_id"], subsets)
    assert set(subsets) == {"train", "val", "test"}
