"""Finds what lies in a study folder: images of any layout; of NIH's also label file, lists and other small files.

The images may be only some of those in the label file.
"""

import dataclasses
import fnmatch
import os

from ..runtime.files import as_path, is_remote, read_text

LABEL_FILES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")  # NIH's editions, of which the first is corrected
SMALL_FILES = (  # all that a study in NIH's layout has beside its images
    *("Data_Entry_2017*.csv", "train_val_list.txt", "test_list.txt", "BBox_List_2017.csv"),
    *("google2019_nih-chest-xray-labels.csv", "phantom.json"),
)
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")


@dataclasses.dataclass(frozen=True)
class StudyReport:
    """Counts how the rows of a label file and the images on disk match; `missing` and `extra` name the first five."""

    n_rows: int
    n_found: int
    n_missing: int
    n_extra: int
    missing: tuple[str, ...]
    extra: tuple[str, ...]


def open_study(study_dir):
    """Returns the study's folder as a path object; FileNotFoundError if there is none."""
    folder = as_path(study_dir)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no study folder {study_dir}; expected a folder with images and their labels, such as labels.csv "
            "or NIH's files: name another; docs/your_data.md shows what it may hold"
        )
    return folder


def list_images(study_dir):
    """Lists the study's images: `images/*.png` and `images_001/images/*.png` to `images_012/images/*.png`.

    Folders may be links, as on a cluster where one copy of the images serves everybody.

    Args:
        study_dir: folder in NIH's layout.

    Returns:
        Dict from image name to its path, sorted by name.

    Raises:
        FileNotFoundError: if the folder is missing or holds no image.
        ValueError: if two folders hold an image of the same name; names both.
    """
    folder = open_study(study_dir)
    paths = sorted([*folder.glob("images*/*.png"), *folder.glob("images*/*/*.png")])
    # Without those of an archive that was not unpacked to its end.
    images = _name_paths(path for path in paths if not path.relative_to(folder).parts[0].endswith(".part"))
    if not images:
        caches = sorted({path.parent.name for path in folder.glob("films-*/*.npy")})
        if caches:
            raise FileNotFoundError(
                f"{study_dir} holds no images, only {', '.join(caches)}, the cache of an earlier fetch with STREAM: "
                "use the same FETCH and SIDE as then, and nothing is downloaded again"
            )
        raise FileNotFoundError(
            f"{study_dir} holds no images; expected images/*.png or images_001/images/*.png: unpack NIH's archives"
        )
    return dict(sorted(images.items()))


def list_image_files(study_dir):
    """Lists all PNG, JPEG and DICOM files of a folder, at any depth.

    Args:
        study_dir: path of the folder, also a link or in a bucket.

    Returns:
        Dict from an image's path below the folder, with "/", to its path, sorted.

    Raises:
        FileNotFoundError: the folder is missing, or holds no image.
    """
    folder = open_study(study_dir)
    found = {}
    for place, _, names in folder.walk() if is_remote(folder) else walk_folders(folder):
        below = as_path(place).relative_to(folder).as_posix()
        for name in filter(is_image, names):
            found[name if below == "." else f"{below}/{name}"] = as_path(place) / name
    if not found:
        raise FileNotFoundError(f"{study_dir} holds no images; expected PNG, JPEG or DICOM files, in folders or not")
    return dict(sorted(found.items()))


def walk_folders(folder, onerror=None):
    """Yields what `os.walk` does, also through links: each folder, those in it that are not entered, and its files.

    Hidden folders are not entered, nor are links to a folder that they lie in, or were reached through.
    """
    entered = {os.fspath(folder): [os.path.realpath(folder)]}  # where a folder and those above it really are
    for place, folders, names in os.walk(folder, onerror=onerror, followlinks=True):
        above, closed = entered.pop(place), []
        for name in list(folders):
            path = os.path.join(place, name)
            is_link = os.path.islink(path)
            real = os.path.realpath(path) if is_link else os.path.join(above[-1], name)
            if name.startswith(".") or (is_link and any(os.path.commonpath([outer, real]) == real for outer in above)):
                folders.remove(name)
                closed.append(name)
            else:
                entered[path] = [*above, real]
        yield place, closed, names


def list_named_images(study_dir, name=lambda path: path.name):
    """Lists the images as `list_image_files`, but named by file, or by what `name` makes of a path.

    Raises:
        FileNotFoundError: see `list_image_files`.
        ValueError: two images have the same name; names both.
    """
    return _name_paths(list_image_files(study_dir).values(), name)


def _name_paths(paths, name=lambda path: path.name):
    """Returns a dict from each path's name to it; ValueError where two have the same."""
    images = {}
    for path in paths:
        if name(path) in images:
            raise ValueError(f"two images are called {name(path)}: {images[name(path)]} and {path}; remove one")
        images[name(path)] = path
    return images


def is_image(name):
    """Returns whether a file's name is that of an image, by its ending."""
    return name.lower().endswith(IMAGE_ENDINGS) and not name.startswith(".")


def list_small_files(study_dir):
    """Returns the sorted paths of NIH's files but the images, `SMALL_FILES`; FileNotFoundError without the folder."""
    # Not by `glob`, which in a bucket lists every image to find these few.
    files = open_study(study_dir).iterdir()
    return sorted(path for path in files if any(fnmatch.fnmatchcase(path.name, name) for name in SMALL_FILES))


def find_label_file(study_dir):
    """Finds the study's label file: NIH's corrected edition or else the first one.

    Args:
        study_dir: folder in NIH's layout.

    Returns:
        Path of the file.

    Raises:
        FileNotFoundError: if the folder is missing or has no label file.
        ValueError: if it has a label file of another name, such as a copy: which one is meant cannot be known.
    """
    found = {path.name: path for path in list_small_files(study_dir) if path.name.startswith("Data_Entry_2017")}
    others = sorted(found.keys() - {*LABEL_FILES})
    if others == ["Data_Entry_2017_chestmnist.csv"]:
        raise ValueError(f"{study_dir} holds ChestMNIST as an earlier version wrote it; delete it and fetch it again")
    if others:
        raise ValueError(
            f"{study_dir} holds {', '.join(others)}, and label files are called {' or '.join(LABEL_FILES)}: give such "
            "a name to the one that is meant, and remove or rename the others"
        )
    if not found:
        raise FileNotFoundError(
            f"{study_dir} holds no Data_Entry_2017*.csv; copy NIH's label file, Data_Entry_2017_v2020.csv, into it"
        )
    return found[max(found)]  # the corrected edition's name is the last


def load_official_lists(study_dir):
    """Loads NIH's own division of the images, `train_val_list.txt` and `test_list.txt`.

    Args:
        study_dir: folder in NIH's layout.

    Returns:
        Tuple `(train_val, test)` of sets of image names, without a common member.

    Raises:
        FileNotFoundError: if the folder or a list is missing.
        ValueError: if an image is in both lists.
    """
    lists = []
    for name in ("train_val_list.txt", "test_list.txt"):
        path = open_study(study_dir) / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{study_dir} holds no {name}; copy NIH's list into it, or choose split='random_patients'"
            )
        lists.append({line.strip() for line in read_text(path).splitlines() if line.strip()})
    both = sorted(lists[0] & lists[1])
    if both:
        raise ValueError(f"{study_dir}: {name_some(both)} in both train_val_list.txt and test_list.txt")
    return lists[0], lists[1]


def match_images(metadata, images):
    """Keeps the rows whose image is on disk. A partial download is common, so missing images are only counted.

    Args:
        metadata: DataFrame of `load_metadata`.
        images: image names, for instance the dict of `list_images`.

    Returns:
        Tuple of the rows found, in their order and numbered from 0, and a `StudyReport`.

    Raises:
        FileNotFoundError: if none of the rows has an image.
    """
    on_disk, listed = set(images), set(metadata["image"])
    present = metadata["image"].isin(on_disk)
    if not present.any():
        example = f", for instance {min(on_disk)}" if on_disk else ""
        raise FileNotFoundError(
            f"none of the {len(metadata)} images in the label file, such as {metadata['image'].iloc[0]}, is on disk; "
            f"there are {len(on_disk)} others{example}; images keep the names that they have in the label file"
        )
    found = metadata[present].reset_index(drop=True)
    found.attrs = dict(metadata.attrs)
    missing, extra = metadata["image"][~present].tolist(), sorted(on_disk - listed)
    counts = len(metadata), len(found), len(missing), len(extra)
    return found, StudyReport(*counts, tuple(missing[:5]), tuple(extra[:5]))


def name_some(names):
    """Returns a count and up to five image names, with a verb, for error messages: "1 image is (a.png)"."""
    listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} image{'s are' if len(names) > 1 else ' is'} ({listed})"
