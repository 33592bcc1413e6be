"""Downloads the Indiana chest radiographs of Open-i, 7,470 PNGs and 3,955 reports, for `study.readers.openi`."""

from ..runtime.files import as_path
from ..study.readers.openi import REPORTS
from .archives import unpack_archive
from .downloads import download_file
from .streaming import claim_folder

OPENI_URL = "https://openi.nlm.nih.gov"
# Of the copy that TorchXRayVision 1.5.7 carries, too. None is published for the images.
REPORTS_SHA256 = "8fb6de7eec73d8c3665067ad4bb003ccd57f971ae316d2642e1627ac7268667a"

_IMAGES = "NLMCXR_png.tgz"


def fetch_openi(folder, base_url=OPENI_URL, reports_sha256=REPORTS_SHA256, progress=None, **options):
    """Downloads the collection, 3,955 reports and 7,470 PNGs, and unpacks the images.

    Once `images` exists, the archive of the images is not downloaded again and may be removed.

    Args:
        folder: path of the folder, on a disk of this machine; made if missing.
        base_url: address of Open-i, or of a mirror with the same layout.
        reports_sha256: SHA-256 of the archive of reports; None to record it on first use, as is done for the images'.
        progress: callable such as `tqdm`.
        **options: `retries`, `pause` and `timeout` of `download_file`.

    Returns:
        Tuple of the path of NLMCXR_reports.tgz and that of the folder `images`.

    Raises:
        DownloadError: see `download_file`.
        ArchiveError: see `unpack_archive`.
        RuntimeError: another process fetches into the folder.
    """
    folder, source = as_path(folder), f"{base_url}/imgs/collections"
    options["progress"] = progress
    images = folder / "images"
    with claim_folder(folder):
        reports = download_file(f"{source}/{REPORTS}", folder / REPORTS, sha256=reports_sha256, **options)
        if not images.exists():
            archive = download_file(f"{source}/{_IMAGES}", folder / _IMAGES, **options)
            unpack_archive(archive, images, progress=progress)
    return reports, images
