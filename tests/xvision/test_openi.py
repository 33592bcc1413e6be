"""Tests of xvision.openi and its neighbors: a made-up collection, the real reports, and a server on this machine."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pandas as pd
import pytest
from faulty_server import FaultyServer, answer, cut_after
from PIL import Image

from helpers.fetch import DownloadError
from helpers.runtime.files import hash_file
from helpers.study import assert_no_patient_overlap, make_split
from helpers.xvision import (
    fetch_openi,
    find_frontal,
    label_openi,
    load_openi_images,
    match_openi_images,
    read_openi_reports,
    read_search_pages,
    search_openi,
)
from helpers.xvision.openi_fetch import REPORTS_SHA256

# Study to terms and images. By the list of views the first image of 2 and 3 is frontal, the second of 1, and none of 62.
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


def draw(seed=0, side=64):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


REPORTS = pack({f"ecgen-radiology/{n}.xml": write_report(n, *what) for n, what in STUDIES.items()})
IMAGES = {f"{image}.png": draw(n) for n, (_, images) in STUDIES.items() for image in images}


@pytest.fixture
def collection(tmp_path):
    (tmp_path / "NLMCXR_reports.tgz").write_bytes(REPORTS)
    (tmp_path / "images").mkdir()
    for name, data in IMAGES.items():
        (tmp_path / "images" / name).write_bytes(data)
    return tmp_path


@pytest.fixture(scope="module")
def real_reports(shared_data):
    return read_openi_reports(shared_data / "openi" / "NLMCXR_reports.tgz")


# Reports


def test_reports_become_one_row_a_image_in_archive_and_folder_alike(collection):
    reports = read_openi_reports(collection / "NLMCXR_reports.tgz")
    assert reports["image"].tolist() == sorted(IMAGES)
    assert reports.attrs == {"n_reports": 8}  # the one without an image, too
    row = reports.set_index("image").loc["CXR1_1_IM-0001-4001.png"]
    assert row.to_dict() == {
        "study": "CXR1",
        "position": 2,
        "major": ("normal",),
        "automatic": ("lung & heart",),
        "caption": "PA and lateral",
    }
    for number, what in STUDIES.items():
        path = collection / "ecgen-radiology" / f"{number}.xml"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(write_report(number, *what))
    pd.testing.assert_frame_equal(read_openi_reports(collection), reports)


def test_reports_that_are_missing_cut_or_no_reports_are_named(collection):
    path = collection / "NLMCXR_reports.tgz"
    path.write_bytes(REPORTS[: len(REPORTS) // 2])
    with pytest.raises(ValueError, match=r"NLMCXR_reports\.tgz: damaged or cut short .*download it again"):
        read_openi_reports(path)
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="damaged or cut short"):
        read_openi_reports(path)
    path.write_bytes(pack({"a.txt": b"1"}))
    with pytest.raises(FileNotFoundError, match=r"holds no report"):
        read_openi_reports(path)
    with pytest.raises(FileNotFoundError, match="fetch_openi"):
        read_openi_reports(collection / "absent.tgz")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty or larger"),
        (b" " * 300_000, "is empty or larger"),
        (write_report(1, ["normal"], [])[:-5], "1.xml: .*download it again"),
        (b"<eCitation/>", "lacks the identity"),
        (write_report(1, ["normal"], ["../../CXR1"]), "is not an image's name"),
        (write_report("1/..", ["normal"], ["CXR1_1"]), "is not an image's name"),
        (write_report(1, ["normal"], ["CXR1_1", "CXR1_1"]), "named twice"),
    ],
)
def test_broken_reports_are_named(tmp_path, data, message):
    (tmp_path / "1.xml").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_openi_reports(tmp_path)


def test_bombs_and_files_from_elsewhere_are_refused(tmp_path):
    (tmp_path / "secret").write_text("CXR1_1")
    entities = "".join(f'<!ENTITY e{i + 1} "{f"&e{i};" * 10}">' for i in range(9))
    for subset in (f'<!ENTITY e0 "ha">{entities}', f'<!ENTITY e9 SYSTEM "{tmp_path / "secret"}">'):
        report = write_report(1, ["&e9;"], ["CXR1_1"]).replace(b"<eCitation>", b"<!DOCTYPE e [%b]><eCitation>")
        for encoding in ("utf-8", "utf-16"):
            text = report.replace(b"%b", subset.encode()).decode().replace('"utf-8"', f'"{encoding}"')
            (tmp_path / "1.xml").write_bytes(text.encode(encoding))
            with pytest.raises(ValueError, match="has a document type"):
                read_openi_reports(tmp_path)


# Labels, views, cohort


def test_labels_follow_the_headings_of_the_major_terms():
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
    labels = label_openi(pd.DataFrame({"major": list(cases)}, index=range(5, 5 + len(cases))))
    assert labels.tolist() == list(cases.values()) and labels.index[0] == 5


def test_a_cohort_has_labels_paths_and_a_count_of_what_was_left_out(collection):
    (collection / "images" / "CXR9_IM-1-1.png").write_bytes(draw())
    frame, report = load_openi_images(collection, views="both")
    assert frame.columns.tolist() == ["image", "path", "patient_id", "label"] and frame["label"].dtype == np.int8
    assert dict(zip(frame["image"], frame["label"], strict=True)) == {
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
    assert frame["image"].is_monotonic_increasing and frame["patient_id"].tolist()[-2:] == ["CXR62", "CXR6"]
    assert [Path(path).read_bytes() for path in frame["path"]] == [IMAGES[image] for image in frame["image"]]
    assert (report.n_reports, report.n_listed, report.n_unlabeled, report.n_contradictory) == (8, 10, 1, 1)
    assert (report.n_normal, report.n_nodule, report.n_patients, report.n_extra) == (5, 4, 6, 1)
    assert (report.n_other_view, report.n_missing, report.n_unreadable) == (0, 0, 0)


def test_frontal_keeps_one_image_of_a_study_at_most(collection):
    frame, report = load_openi_images(collection)
    frontal = ["CXR1_1_IM-0001-4001", "CXR2_IM-0652-1001", "CXR3_IM-1384-1001", "CXR5_IM-2117-1003002"]
    assert frame["image"].tolist() == [f"{name}.png" for name in [*frontal, "CXR6_IM-2192-1001"]]
    assert (report.n_other_view, report.n_normal, report.n_nodule) == (4, 2, 3)
    with pytest.raises(ValueError, match="views is 'lateral'; expected one of frontal, both"):
        load_openi_images(collection, views="lateral")


def test_missing_and_broken_images_are_counted(collection):
    images = collection / "images"
    (images / "CXR3_IM-1384-2001.png").unlink()
    whole = IMAGES["CXR2_IM-0652-1001.png"]
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (images / "CXR2_IM-0652-1001.png").write_bytes(flipped)
    (images / "CXR1_1_IM-0001-3001.png").write_bytes(whole[: len(whole) // 2])
    (images / "CXR62_IM-0133-1001.png").write_bytes(b"<html>")
    frame, report = load_openi_images(collection, views="both")
    assert (report.n_missing, report.missing) == (1, ("CXR3_IM-1384-2001.png",))
    assert report.n_unreadable == len(report.unreadable) == 3
    assert report.unreadable[2] == "CXR62_IM-0133-1001.png: neither PNG nor JPEG, but a web page"
    assert len(frame) == report.n_normal + report.n_nodule == 5


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
    (collection / "NLMCXR_reports.tgz").unlink()
    with pytest.raises(FileNotFoundError, match="fetch_openi downloads the collection"):
        load_openi_images(collection)


def test_images_are_matched_at_any_depth_but_only_once(collection):
    reports = read_openi_reports(collection / "NLMCXR_reports.tgz")
    (collection / "more").mkdir()
    (collection / "images" / "CXR4_IM-2050-1001.png").rename(collection / "more" / "CXR4_IM-2050-1001.png")
    found, report = match_openi_images(reports, collection)
    assert len(found) == report.n_found == 10 and found["path"].str.contains("more").sum() == 1
    (collection / "more" / "CXR2_IM-0652-1001.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"two images are called CXR2_IM-0652-1001\.png"):
        match_openi_images(reports, collection)


# Fetching


@pytest.fixture
def server():
    with FaultyServer() as server:
        server.files["/imgs/collections/NLMCXR_reports.tgz"] = REPORTS
        server.files["/imgs/collections/NLMCXR_png.tgz"] = pack(IMAGES)
        yield server


FAST = {"pause": 0.01, "timeout": 5}


def test_the_collection_is_fetched_through_cuts_and_only_once(server, tmp_path):
    server.faults["/imgs/collections/NLMCXR_png.tgz"] = [cut_after(20_000), cut_after(5)]
    for _ in range(2):
        reports, images = fetch_openi(tmp_path, server.url, reports_sha256=None, **FAST)
    assert [path for path, _, _ in server.asked] == ["/imgs/collections/NLMCXR_reports.tgz"] + [
        "/imgs/collections/NLMCXR_png.tgz"
    ] * 3
    assert reports.read_bytes() == REPORTS and {path.name for path in images.iterdir()} == set(IMAGES)
    frame, report = load_openi_images(tmp_path)
    assert len(frame) == 5 and report.n_missing == 0


def test_the_collection_and_a_search_do_not_share_a_folder(search_server, tmp_path):
    """Else the collection's images would not be fetched, for `images` is there, and its reports label the search's."""
    search(search_server, tmp_path / "search-first", max_images=3)
    with pytest.raises(ValueError, match=r"has images of a search, .* choose another folder for the whole collection"):
        fetch_openi(tmp_path / "search-first", search_server.url, reports_sha256=None, **FAST)
    fetch_openi(tmp_path / "whole-first", search_server.url, reports_sha256=None, **FAST)
    with pytest.raises(ValueError, match="has the whole collection; choose another folder for what the search"):
        search(search_server, tmp_path / "whole-first")


def test_other_reports_than_the_known_are_refused(server, tmp_path):
    with pytest.raises(DownloadError, match=f"is not the expected one, {REPORTS_SHA256}"):
        fetch_openi(tmp_path, server.url, **FAST)


def hits(first, last):
    names = [(n, k, image) for n, (_, images) in STUDIES.items() for k, image in enumerate(images, 1)]
    return [
        {
            "uid": f"CXR{n}",
            "MeSH": {"minor": [], "major": STUDIES[n][0]},
            "image": {"id": f"F{k}", "caption": "PA"},
            "imgLarge": f"/imgs/512/{n}/{n}/{image}.png",
        }
        for n, k, image in names[first - 1 : last]
    ]


@pytest.fixture
def search_server(server):
    """A server whose search gives the images of STUDIES, in pages of 4."""

    def page(first, last):
        return json.dumps({"total": 10, "min": first, "max": last, "list": hits(first, last)}).encode()

    for first, last in ((1, 4), (5, 8), (9, 12)):
        server.files[f"/api/search?query=chest+film&coll=cxr&m={first}&n={last}"] = page(first, last)
    for hit in hits(1, 10):
        server.files[hit["imgLarge"]] = IMAGES[hit["imgLarge"].rsplit("/", 1)[1]]
    return server


def search(server, folder, **options):
    return search_openi("chest radiograph", folder, server.url, page_size=4, **FAST | options)


def test_a_search_gives_the_images_and_labels_of_the_collection(search_server, tmp_path):
    frame, failed = search(search_server, tmp_path)
    assert failed == {} and len(frame) == 10
    (tmp_path / "reports.tgz").write_bytes(REPORTS)
    columns = ["image", "study", "position", "major"]
    expected = read_openi_reports(tmp_path / "reports.tgz")
    pd.testing.assert_frame_equal(frame[columns], expected[columns], check_flags=False)
    cohort, report = load_openi_images(tmp_path)
    assert len(cohort) == 5 and report.n_reports == 7
    asked = len(search_server.asked)
    search(search_server, tmp_path)
    assert len(search_server.asked) == asked == 13
    query = parse_qs(urlsplit(search_server.asked[1][0]).query)
    assert query == {"query": ["chest radiograph"], "coll": ["cxr"], "m": ["5"], "n": ["8"]}


def test_a_search_goes_on_at_the_page_and_the_image_where_it_stopped(search_server, tmp_path):
    second = "/api/search?query=chest+film&coll=cxr&m=5&n=8"
    search_server.faults[second] = [answer(503)] * 2 + [cut_after(50)] + [cut_after(0)] * 2
    for message in ("HTTP 503", "50 bytes are kept"):
        with pytest.raises(DownloadError, match=message):
            search(search_server, tmp_path, retries=1)
    assert len(read_search_pages(tmp_path)) == 4
    image = hits(2, 2)[0]["imgLarge"]
    search_server.faults[image] = [answer(404)]
    _, failed = search(search_server, tmp_path)
    assert list(failed) == [image.rsplit("/", 1)[1]] and "HTTP 404" in failed[image.rsplit("/", 1)[1]]
    assert search(search_server, tmp_path)[1] == {}
    counts = Counter(path for path, _, _ in search_server.asked)
    assert counts[second] == 6 and counts[image] == 2 and sum(counts.values()) == 13 + 5 + 1


def test_a_search_can_be_limited_and_then_extended_but_not_changed(search_server, tmp_path):
    frame, _ = search(search_server, tmp_path, max_images=3)
    assert len(frame) == 3 and len(list((tmp_path / "images").iterdir())) == 3 and len(search_server.asked) == 4
    assert len(search(search_server, tmp_path)[0]) == 10
    with pytest.raises(ValueError, match="has the hits of another search"):
        search_openi("nodule", tmp_path, search_server.url, page_size=4, **FAST)


@pytest.mark.parametrize(
    "page",
    [
        b"no json",
        b"[]",
        b'{"total": 10, "list": [{}]}',
        b'{"list": []}',
        b'{"total": 10, "list": [{"uid": "CXR1", "MeSH": {"major": []}, "image": {"id": "X"}, "imgLarge": "/a"}]}',
    ],
)
def test_a_page_that_is_not_one_of_hits_is_not_kept(search_server, tmp_path, page):
    search_server.files["/api/search?query=chest+film&coll=cxr&m=5&n=8"] = page
    with pytest.raises(ValueError, match="not a page of hits"):
        search(search_server, tmp_path)
    assert [path.name for path in (tmp_path / "search").glob("0*.json")] == ["000001.json"]


def test_a_page_without_hits_where_there_should_be_some_is_asked_for_again(search_server, tmp_path):
    page = search_server.files["/api/search?query=chest+film&coll=cxr&m=5&n=8"]
    search_server.files["/api/search?query=chest+film&coll=cxr&m=5&n=8"] = b'{"total": 10, "list": []}'
    with pytest.raises(DownloadError, match="no hits from 5 on, though it has 10"):
        search(search_server, tmp_path)
    search_server.files["/api/search?query=chest+film&coll=cxr&m=5&n=8"] = page
    assert len(search(search_server, tmp_path)[0]) == 10


def test_a_search_fetches_from_no_other_server_and_writes_to_no_other_folder(search_server, tmp_path):
    address = "/api/search?query=chest+film&coll=cxr&m=1&n=4"
    page = json.loads(search_server.files[address])
    with FaultyServer() as elsewhere:
        page["list"][0]["imgLarge"] = f"{elsewhere.url}/CXR1_1_IM-0001-3001.png"
        search_server.files[address] = json.dumps(page).encode()
        _, failed = search(search_server, tmp_path)
        assert "where the images of the collection are" in failed.pop("CXR1_1_IM-0001-3001.png")
        assert not failed and not elsewhere.asked
    page["list"][0]["imgLarge"] = "/imgs/..png"
    (tmp_path / "search" / "000001.json").write_text(json.dumps(page))
    with pytest.raises(ValueError, match="is not an image's name"):
        read_search_pages(tmp_path)


# The real collection


def test_the_real_reports_are_the_known_ones(shared_data, real_reports):
    assert hash_file(shared_data / "openi" / "NLMCXR_reports.tgz") == REPORTS_SHA256
    assert real_reports.attrs["n_reports"] == 3955 and len(real_reports) == 7470
    assert real_reports["study"].nunique() == 3851
    labels = label_openi(real_reports)
    assert labels.value_counts().to_dict() == {"": 4563, "Normal": 2696, "Nodule": 211}
    assert real_reports.groupby(labels)["study"].nunique().to_dict() == {"": 2366, "Normal": 1379, "Nodule": 106}
    assert not any(len(terms) > 1 and "normal" in terms for terms in real_reports["major"])


def test_real_frontal_images_are_one_a_study(real_reports):
    frontal = find_frontal(real_reports)
    assert not real_reports[frontal]["study"].duplicated().any()
    labels = label_openi(real_reports)[frontal]
    assert labels.value_counts().to_dict() == {"": 2196, "Normal": 1337, "Nodule": 100}


def test_real_labels_agree_with_those_that_were_scraped(shared_data, real_reports):
    scraped = json.loads((shared_data / "openi" / "xvision_scraped_labels.json").read_text())
    terms = {hit["img"].rsplit("/", 1)[1]: tuple(hit["items"]) for hit in scraped.values()}
    ours = dict(zip(real_reports["image"], real_reports["major"], strict=True))
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
    frame = real_reports.assign(patient_id=real_reports["study"])[(labels != "") & find_frontal(real_reports)]
    parts = make_split(frame, split="random_patients")
    assert_no_patient_overlap(frame["patient_id"], parts)
    assert set(parts) == {"train", "val", "test"}
