"""Where a study comes from: attached on Kaggle, from kagglehub, NIH's Box or Hugging Face; and which files are there.

`streaming` fetches them. The archives' sizes are those that Box reports, their MD5s those of NIH's FAQ_CHESTXRAY.pdf,
question 7; their images add up to the label file's 112,120. The label files of Hugging Face (revision below) and of Box
differ only in the header of one column, "Patient Gender" and "Patient Sex".
"""

import dataclasses
import fnmatch
import os
import pathlib
import re

from ..runtime.files import as_path, is_remote
from ..runtime.packages import explain_offline
from ..study.study import LABELS
from ..study.study_folder import SMALL_FILES
from .downloads import DownloadError, assert_space

BOX_PAGE = "https://nihcc.app.box.com/v/ChestXray-NIHCC"
HUGGING_FACE = "https://huggingface.co/datasets/alkzar90/NIH-Chest-X-ray-dataset"
KAGGLE_HANDLE = "nih-chest-xrays/data"
KAGGLE_MOUNTS = ("data", f"datasets/{KAGGLE_HANDLE}")  # below /kaggle/input: the older way and today's

_REVISION = "36778e3b0e4f4b4fad31d1728d6190f3eda5b543"  # of the mirror, whose files stay as they are in it
_BOX_FILE = "https://nihcc.app.box.com/index.php?rm=box_download_shared_file&vanity_name=ChestXray-NIHCC&file_id=f_{}"
_BOX_ARCHIVE = "https://nihcc.box.com/shared/static/{}.gz"
_ARCHIVES = (  # id in Box, bytes and MD5 of the tar.gz, images
    ("vfk49d74nhbxq3nqjg0900w5nvkorp5c", 2_008_470_987, "fe8ed0a6961412fddcbb3603c11b3698", 4_999),
    ("i28rlmbvmfjbl8p2n3ril0pptcmcu9d1", 3_952_623_504, "ab07a2d7cbe6f65ddd97b4ed7bde10bf", 10_000),
    ("f1t00wrtdk94satdfb9olcolqx20z2jp", 3_929_234_850, "2301d03bde4c246388bad3876965d574", 10_000),
    ("0aowwzs5lhjrceb3qp67ahp0rd1l1etg", 3_838_903_983, "9f1b7f5aae01b13f4bc8e2c44a4b8ef6", 10_000),
    ("v5e3goj22zr6h8tzualxfsqlqaygfbsn", 3_935_496_531, "1861f3cd0ef7734df8104f2b0309023b", 10_000),
    ("asi7ikud9jwnkrnkj99jnpfkjdes7l6l", 3_986_301_172, "456b53a8b351afd92a35bc41444c58c8", 10_000),
    ("jn1b4mw4n6lnh74ovmcjb8y48h8xj07n", 4_016_328_426, "1075121ea20a137b87f290d6a4a5965e", 10_000),
    ("tvpxmn7qyrgl0w8wfh9kqfjskv6nmm1j", 4_018_347_353, "b61f34cec3aa69f295fbb593cbd9d443", 10_000),
    ("upyy3ml7qdumlgk2rfcvlb9k6gvqq2pj", 4_111_327_929, "442a3caa61ae9b64e61c561294d1e183", 10_000),
    ("l6nilvfa9cg3s28tqv1qc1olm3gnz54p", 4_181_556_296, "09ec81c4c31e32858ad8cf965c494b74", 10_000),
    ("hhq8fkdgvcari67vfhs7ppg2w6ni4jze", 4_187_084_020, "499aefc67207a5a97692424cf5dbeed5", 10_000),
    ("ioqwiy20ihqwyr8pf4c24eazhh281pbu", 2_914_187_733, "dc9fda1757c2de0032b63347a7d2895c", 7_121),
)
_BOX_LABELS = "c69a6daca3549af707ca9cacbdf9f9a7b6a9188e8c61157df653520bb72d8eb1"  # of 9,003,496 bytes
_METADATA = (  # name, id in Box, SHA-256 in the mirror
    ("Data_Entry_2017_v2020.csv", 219760887468, "dc1d2df67fdc1c5a7601d48699cda2b13dc2c4841488b4183dcf04884dbaca11"),
    ("train_val_list.txt", 256056636701, "61fbe896321c1c1c8b75f3e4f3a08e4fef6486d95ef8a667c31d4d60dca6cb81"),
    ("test_list.txt", 256055473534, "38ca5ef7f756092946f57c1a59faca882ed589a1ab1f72590b45dc06c6d5e1cc"),
    ("BBox_List_2017.csv", 219760940956, "0bbfea9d4c4e9771481b3023b1bc9f0df9dea924453b12986beb29b0c4d0c95b"),
)
_MARKS = ("phantom.json", LABELS)  # of studies that are not NIH's
_MAX_DEPTH = 4  # folders between /kaggle/input and a study, at most
_KAGGLE_BYTES = 2 * 45_000_000_000  # kagglehub keeps the archive until it is unpacked


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file to fetch.

    Attributes:
        name: under which it is kept.
        url: its address.
        about: its bytes, more or less; 0 for small files.
        size: bytes it must have, or None.
        sha256: SHA-256 that it must have, in hexadecimal, or None.
        md5: MD5 that it must have, in hexadecimal, or None.
        images: number of images in an archive, 0 for other files.
    """

    name: str
    url: str
    about: int = 0
    size: int | None = None
    sha256: str | None = None
    md5: str | None = None
    images: int = 0

    @property
    def stem(self):
        """The name without its endings."""
        return self.name.partition(".")[0]


@dataclasses.dataclass(frozen=True)
class RemoteStudy:
    """The files of a study elsewhere: `metadata` and `archives` of `RemoteFile`, and a `page` for people."""

    metadata: tuple[RemoteFile, ...]
    archives: tuple[RemoteFile, ...]
    page: str


def list_remote_study(source, archives="1-12", mirror=""):
    """Lists the files of NIH ChestX-ray14 at a source.

    Args:
        source: "nih_box", archives as tar.gz, or "hugging_face", as zip.
        archives: which of the 12, such as "1", "1-12" or "1,3-5"; each but the first and last has 10,000 images.
        mirror: address of a copy with the same names, instead of the source's own: for NIH's Box the files in one
            folder, for Hugging Face what follows `/resolve/<revision>`.

    Returns:
        A `RemoteStudy`.

    Raises:
        ValueError: archives that are no such list, or a mirror that is no address.
    """
    numbers, mirror = parse_archives(archives), parse_mirror(mirror)
    chosen = [(f"images_{number:03d}", *_ARCHIVES[number - 1]) for number in numbers]
    if source == "nih_box":
        sums = {_METADATA[0][0]: _BOX_LABELS}
        metadata = [
            RemoteFile(name, f"{mirror}/{name}" if mirror else _BOX_FILE.format(key), sha256=sums.get(name, sha256))
            for name, key, sha256 in _METADATA
        ]
        packed = [
            RemoteFile(
                f"{stem}.tar.gz",
                f"{mirror}/{stem}.tar.gz" if mirror else _BOX_ARCHIVE.format(key),
                *(n_bytes, n_bytes),
                md5=md5,
                images=images,
            )
            for stem, key, n_bytes, md5, images in chosen
        ]
        return RemoteStudy(tuple(metadata), tuple(packed), BOX_PAGE)
    root = mirror or f"{HUGGING_FACE}/resolve/{_REVISION}"
    metadata = [RemoteFile(name, f"{root}/data/{name}", sha256=sha256) for name, _, sha256 in _METADATA]
    packed = [  # of the same PNGs: about as many bytes as at Box
        RemoteFile(f"{stem}.zip", f"{root}/data/images/{stem}.zip", about=n_bytes, images=images)
        for stem, _, n_bytes, _, images in chosen
    ]
    return RemoteStudy(tuple(metadata), tuple(packed), HUGGING_FACE)


def is_known_metadata(name, sha256):
    """Returns whether a file of NIH's metadata is one of the editions that the sources have."""
    known = {(file, digest) for file, _, digest in _METADATA} | {(_METADATA[0][0], _BOX_LABELS)}
    return (name, sha256) in known


def parse_mirror(text):
    """Returns the address of a mirror without a slash at its end, "" for none; ValueError if it is no address."""
    if text and not re.match("https?://", text):
        raise ValueError(f"MIRROR is {text!r}; expected an address, http:// or https://, or nothing")
    return text.rstrip("/")


def parse_archives(text):
    """Returns the numbers in "1,3-5"; ValueError unless all are from 1 to 12."""
    numbers = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,2})\s*(?:-\s*(\d{1,2})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last <= len(_ARCHIVES):
            raise ValueError(f'ARCHIVES is {text!r}; expected numbers from 1 to 12, such as "1", "1-12" or "1,3-5"')
        numbers |= set(range(first, last + 1))
    return tuple(sorted(numbers))


def assert_no_other_images(folder, allowed=()):
    """Raises ValueError if a folder holds synthetic images or a `labels.csv`, which must not be mixed with others.

    Args:
        folder: path of the folder that a study is fetched or linked into.
        allowed: names of the marks that are accepted.
    """
    marks = [mark for mark in _MARKS if mark not in allowed and (as_path(folder) / mark).exists()]
    if marks:
        raise ValueError(f"{folder} holds another study, by its {marks[0]}: name another DATA_DIR, such as data/nih")


def find_attached_study(root="/kaggle/input"):
    """Finds the study that is attached to a Kaggle notebook.

    The two places where Kaggle has mounted `nih-chest-xrays/data` are tried first, then all folders down to a depth.
    Folders of images are not opened: some hold 10,000 images.

    Args:
        root: path of the folder with what is attached.

    Returns:
        Path of the study, a folder with `Data_Entry_2017*.csv` and `images*/`, or with `labels.csv`.

    Raises:
        FileNotFoundError: nothing is attached, or nothing in one of these layouts.
        ValueError: several studies are attached; names them.
    """
    root = as_path(root)
    remedy = (
        f"On Kaggle, attach the data set {KAGGLE_HANDLE} by “Add Input”; elsewhere choose another FETCH, such as "
        "nih_box, or name a folder as DATA_DIR with FETCH = “folder”."
    )
    if not root.is_dir():
        raise FileNotFoundError(f"there is no {root}: this is no Kaggle notebook, or nothing is attached. {remedy}")
    mounts = [root / place for place in KAGGLE_MOUNTS]
    others = []  # sentences on what is attached and is no study
    found = next(([folder] for folder in mounts if _is_study(folder)), [])
    if not found:
        for place, folders, files in os.walk(root, followlinks=True):
            folder, images = pathlib.Path(place), fnmatch.filter(folders, "images*")
            if "manifest.json" in files:  # a packed study, which carries labels too
                folders.clear()
            elif LABELS in files or (images and fnmatch.filter(files, "Data_Entry_2017*.csv")):
                found.append(folder)
                folders.clear()
            else:
                others += _describe_other(folder, images, files)
            if len(folder.relative_to(root).parts) == _MAX_DEPTH:
                folders.clear()
            folders[:] = [name for name in folders if name not in images and not name.startswith(".")]
    if len(found) > 1:
        named = ", ".join(map(str, sorted(found)))
        raise ValueError(f"{len(found)} studies are attached: {named}. Name one as DATA_DIR with FETCH = “folder”.")
    if not found:
        raise FileNotFoundError(
            f"no study is attached: neither {' nor '.join(map(str, mounts))} nor a folder below {root} holds "
            f"Data_Entry_2017*.csv beside images*/, or labels.csv.{' '.join(['', *others[:3]])} {remedy}"
        )
    return found[0]


def _describe_other(folder, images, files):
    """Returns what a folder with images or archives that is no study holds, in a list of at most one sentence."""
    archives = sorted(name for name in files if name.endswith((".zip", ".tar", ".tar.gz", ".tgz")))
    if archives:
        return [f"{folder / archives[0]} has to be unpacked."]
    if not images and not fnmatch.filter(files, "*.png"):
        return []
    tables = ", ".join(sorted(fnmatch.filter(files, "*.csv"))) or "no CSV file"
    return [f"{folder} holds {', '.join(sorted(images)[:3]) or 'PNGs'} and {tables}."]


def _is_study(folder):
    """Returns whether a folder holds a study in NIH's layout."""
    return any(folder.glob("Data_Entry_2017*.csv")) and any(folder.glob("images*/"))


def download_with_kagglehub():
    """Downloads NIH ChestX-ray14 by kagglehub, Kaggle's own program, which keeps it in its own cache and resumes.

    Returns:
        Path of the study's folder.

    Raises:
        ModuleNotFoundError: kagglehub is not installed.
        DownloadError: Kaggle refuses, or the disk lacks space; says what to do.
        FileNotFoundError: the download is no study in NIH's layout.
    """
    try:
        import kagglehub  # optional: only users who choose it need it
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "FETCH = “kagglehub” needs kagglehub: pip install kagglehub, or choose another FETCH"
        ) from None
    cache = as_path(os.environ.get("KAGGLEHUB_CACHE") or os.path.expanduser("~/.cache/kagglehub"))
    if not (cache / "datasets" / KAGGLE_HANDLE).exists() and not os.path.isdir("/kaggle/input"):  # there it only mounts
        cache.mkdir(parents=True, exist_ok=True)
        assert_space(cache, _KAGGLE_BYTES)
    try:
        folder = as_path(kagglehub.dataset_download(KAGGLE_HANDLE))
    except Exception as error:  # the kinds of errors change from version to version
        raise DownloadError(
            f"Kaggle does not give {KAGGLE_HANDLE} ({type(error).__name__}: {error}). Run this again to continue; "
            "where a log-in is asked for or refused, make a token (kaggle.com > Settings > API > Create New Token) and "
            "give it as https://github.com/Kaggle/kagglehub#authenticate says, or choose another FETCH"
            f"{explain_offline()}"
        ) from error
    if not _is_study(folder):
        raise FileNotFoundError(
            f"{folder} holds no Data_Entry_2017*.csv beside images*/: is {KAGGLE_HANDLE} the right data set?"
        )
    return folder


def link_study(source, folder):
    """Makes a study that lies elsewhere appear in a folder, by symbolic links; nothing is copied.

    Args:
        source: path of a study in NIH's layout or with `labels.csv`, such as a read-only mount.
        folder: path of the folder, whose name becomes the study's; made if missing.

    Raises:
        ValueError: the folder is in a bucket, or holds other images, or other files under these names.
    """
    if is_remote(folder):
        raise ValueError(f"DATA_DIR is {folder}, but links need a local folder: name one, such as data/nih")
    source, folder = as_path(source).resolve(), as_path(folder)
    if folder.exists() and folder.resolve() == source:
        return
    folder.mkdir(parents=True, exist_ok=True)
    assert_no_other_images(folder, allowed=[mark for mark in _MARKS if (source / mark).exists()])
    # The small files include the mark of synthetic images.
    patterns = ("[!.]*",) if (source / LABELS).exists() else ("images*", *SMALL_FILES)
    for entry in sorted(source.iterdir()):
        if not any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in patterns):
            continue
        link = folder / entry.name
        if link.is_symlink() and not link.exists():  # to a mount that has moved, as Kaggle's have
            link.unlink()
        if not link.exists():
            link.symlink_to(entry, target_is_directory=entry.is_dir())
        elif link.resolve() != entry.resolve():
            raise ValueError(f"{link} is there already and is not {entry}; name another DATA_DIR, or remove it")
