"""Fetches the Indiana chest radiographs of Open-i: the whole collection in two archives, or what its search finds.

Both go on where they stopped. What comes is labeled by the room `openi`.
"""

import json
import pathlib
import re
import time
from urllib.parse import urlencode, urljoin, urlsplit

from ..fetch.archives import unpack_archive
from ..fetch.downloads import DownloadError, download_file, open_session
from ..runtime.files import as_path, read_text, write_text
from .openi_reports import frame_of_images

OPENI_URL = "https://openi.nlm.nih.gov"
# Of the copy that TorchXRayVision 1.5.7 carries, too. None is published for the images.
REPORTS_SHA256 = "8fb6de7eec73d8c3665067ad4bb003ccd57f971ae316d2642e1627ac7268667a"


def fetch_openi(folder, base_url=OPENI_URL, reports_sha256=REPORTS_SHA256, progress=None, **options):
    """Downloads the collection, 3,955 reports and 7,470 PNGs, and unpacks the images.

    Once `images` is there, the archive of the images is not asked for again and may be removed.

    Args:
        folder: path of the folder, on a disk of this machine; made if missing.
        base_url: address of Open-i, or of a mirror with the same layout.
        reports_sha256: SHA-256 of the archive of reports; None to record it on first use, as is done for the images'.
        progress: callable such as `tqdm`, see `download_file` and `unpack_archive`.
        **options: `retries`, `pause` and `timeout` of `download_file`.

    Returns:
        Tuple of the path of NLMCXR_reports.tgz and that of the folder `images`.

    Raises:
        DownloadError: see `download_file`.
        ArchiveError: see `unpack_archive`.
        ValueError: the folder has the images of a search, which are smaller and not all.
    """
    folder = as_path(folder)
    if (folder / "search").exists():
        raise ValueError(
            f"{folder} has images of a search, {folder / 'search'}; choose another folder for the whole collection, or "
            "give the query of the search"
        )
    source = f"{base_url}/imgs/collections/"
    options["progress"] = progress
    reports = folder / "NLMCXR_reports.tgz"
    download_file(source + reports.name, reports, sha256=reports_sha256, **options)
    images = folder / "images"
    if not images.exists():
        rows = download_file(source + "NLMCXR_png.tgz", folder / "NLMCXR_png.tgz", **options)
        unpack_archive(rows, images, progress=progress)
    return reports, images


def search_openi(query, folder, base_url=OPENI_URL, max_images=None, page_size=30, pause=1.0, progress=None, **options):
    """Downloads what Open-i's search finds among the Indiana images: pages of hits, then the images at 512 pixels.

    One request at a time with a pause between. Pages and images are kept as they come, so that the same call goes on
    where it stopped; the pages of another query need another folder.

    Args:
        query: words as in the search box, such as "nodule"; "" finds all.
        folder: path of the folder, on a disk of this machine; made if missing.
        base_url: address of Open-i.
        max_images: most images to download, in the order of the hits; None for all.
        page_size: hits a page.
        pause: seconds between requests.
        progress: callable such as `tqdm`, called with `total=`, `unit=` and `desc=` for the images, returning an object
            with `update(n)` and `close()`.
        **options: `retries` and `timeout` of `download_file`.

    Returns:
        Tuple of the hits, a frame like that of `read_openi_reports`, and a dict from the names of images that could not
        be had to the reason.

    Raises:
        DownloadError: a page cannot be had; see `download_file`.
        ValueError: the folder has the pages of another query or the whole collection, or a page is not what the search
            gives.
    """
    folder = as_path(folder)
    if any(folder.glob("NLMCXR_*.tgz*")) or (folder / "ecgen-radiology").exists():
        raise ValueError(
            f"{folder} has the whole collection; choose another folder for what the search {query!r} finds"
        )
    pages = folder / "search"
    asked = {"query": query, "page_size": page_size}
    if (pages / "query.json").exists():
        earlier = json.loads(read_text(pages / "query.json"))
        if earlier != asked:
            raise ValueError(f"{folder} has the hits of another search, {earlier}; choose another folder for {asked}")
    write_text(pages / "query.json", json.dumps(asked))
    options |= {"record": False, "pause": pause}
    with open_session(options.get("retries", 5), pause) as session:
        first, total = 1, None
        while total is None or first <= total:
            path = pages / f"{first:06d}.json"
            if not path.exists():
                last = first + page_size - 1
                address = urlencode({"query": query, "coll": "cxr", "m": first, "n": last})
                download_file(f"{base_url}/api/search?{address}", path, session=session, **options)
                _wait(pause)
            hits, found = _read_page(path)
            total = min(found, max_images or found)
            if not hits and first <= total:
                path.unlink()
                raise DownloadError(f"{base_url}: no hits from {first:,} on, though it has {found:,}; try again later")
            first += page_size
        frame = read_search_pages(folder, max_images)
        return frame, _download_images(frame, folder, base_url, session, pause, progress, options)


def read_search_pages(folder, limit=None):
    """Makes the frame of `read_openi_reports` of the pages that `search_openi` kept; `attrs["urls"]` has the images'."""
    pages = as_path(folder) / "search"
    paths = sorted(path for path in pages.iterdir() if re.fullmatch(r"[0-9]+[.]json", path.name))
    hits = [hit for path in paths for hit in _read_page(path)[0]][:limit]
    hits = list({row[0]: (row, url) for row, url in hits}.values())  # an image may move to a later page meanwhile
    frame = frame_of_images([row for row, _ in hits], len({row[1] for row, _ in hits}), pages)
    frame.attrs["urls"] = {row[0]: url for row, url in hits}
    return frame


def _read_page(path):
    """Returns the hits of a page, as rows of a frame with the images' addresses, and how many there are in all."""
    try:
        page = json.loads(read_text(path))
        hits = []
        for hit in page.get("list", []):
            address, number = hit["imgLarge"], re.fullmatch(r"F(\d+)", hit["image"]["id"])
            terms = tuple(map(str, hit["MeSH"]["major"]))
            caption = str(hit["image"].get("caption", ""))
            name = pathlib.PurePosixPath(urlsplit(address).path).name
            hits.append(((name, hit["uid"], int(number[1]), terms, (), caption), address))
        return hits, int(page["total"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        path.unlink()
        raise ValueError(
            f"{path}: not a page of hits ({type(error).__name__}: {error}), so it was removed; try again later, or see "
            f"whether Open-i's search has changed: {OPENI_URL}/services"
        ) from error


def _download_images(frame, folder, base_url, session, pause, progress, options):
    bar = progress(total=len(frame), unit="film", desc="films") if progress else None
    failed = {}
    for image, address in frame.attrs["urls"].items():
        url = urljoin(base_url + "/", address)
        path = folder / "images" / image
        try:
            if urlsplit(url).netloc != urlsplit(base_url).netloc:
                raise DownloadError(f"{url}: not at {base_url}, where the images of the collection are")
            if not path.exists():
                download_file(url, path, session=session, **options)
                _wait(pause)
        except DownloadError as error:
            failed[image] = str(error)
        if bar is not None:
            bar.update(1)
    if bar is not None:
        bar.close()
    return failed


def _wait(pause):
    time.sleep(pause)  # out of politeness: the server is a library's
