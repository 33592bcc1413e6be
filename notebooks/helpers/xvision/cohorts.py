"""Images with a nodule and normal images, from different sources: files in a folder or a packed study.

A cohort holds a table of images with patient and label, the known boxes, and a way to read the images in the table's
order. "Normal" means what each source means by it: in NIH's files that none of 14 findings was mentioned, in Open-i's
that the report was indexed as normal, in JSRT's that radiologists found no nodule.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import tensorflow as tf

from ..packing.decoding import decode_image, resize_image
from ..packing.image_files import ImageError, inspect_image
from ..runtime.files import as_path, hash_file, read_csv
from ..study.labels import BOX_FRAME, NODULE_CLASSES, PATHOLOGIES, load_boxes, load_metadata
from ..study.splits import CHESTMNIST, SUBSETS
from ..study.study_folder import list_images, match_images, name_some
from .openi import load_openi_images

_BOX_COLUMNS = ["image", "pathology", "x", "y", "width", "height"]
_JSRT_FRAME = 2048  # pixels a side of the images that JSRT's positions refer to (Shiraishi et al., AJR 2000)
_JSRT_PIXEL = 0.175  # mm (same source)


@dataclass(frozen=True)
class Cohort:
    """Images with and without a nodule.

    Attributes:
        name: the source, such as "jsrt".
        rows: DataFrame, one row an image, numbered from 0: `image` (name), `patient_id`, `label` (int8, index of
            `NODULE_CLASSES`).
        boxes: DataFrame as returned by `load_boxes`, of nodules in these images only; may be empty.
        counts: dict of what was found and left out, to be displayed.
        sha256: hash of the images in their order: equal for the same images in any folder.
        paths: list of the image files, or None for images of a packed study.
        study: the `PackedStudy` that holds the images, or None.
    """

    name: str
    rows: pd.DataFrame
    boxes: pd.DataFrame
    counts: dict
    sha256: str
    paths: list | None = None
    study: object = field(default=None, repr=False)

    def __len__(self):
        """Number of images."""
        return len(self.rows)


def load_nih_cohort(study, boxes=None, subsets=SUBSETS):
    """Selects the images of a packed study that have a nodule or no finding at all.

    Args:
        study: a `PackedStudy`.
        boxes: DataFrame as returned by `load_boxes`, or None.
        subsets: the subsets whose images are used. A network that was trained on this study has seen all but "test".

    Returns:
        A `Cohort`, its images in the order of the shards.

    Raises:
        ValueError: there are images of one class only, or the study has no patient ids.
    """
    if study.split_name == CHESTMNIST:
        raise ValueError(f"{study.folder}: ChestMNIST has no patient ids, so no folds can be made by patient")
    every = pd.concat([study.rows(subset) for subset in SUBSETS], ignore_index=True)
    rows = _select_nodules(every[every["subset"].isin(subsets)])[["image", "patient_id", "label"]]
    rows = rows.reset_index(drop=True)
    digest = hashlib.sha256(
        "".join(shard["sha256"] for subset in SUBSETS for shard in study.shards[subset]).encode()
        + "".join(f"{image}\n" for image in rows["image"]).encode()
    ).hexdigest()
    boxes = _select_boxes(boxes, rows)
    counts = _count(study.folder, rows, boxes, {"other findings, or another subset": len(every) - len(rows)})
    return Cohort("nih", rows, boxes, counts, digest, study=study)


def load_folder_cohort(study_dir):
    """Selects the images of a synthetic study that have a nodule or no finding at all.

    Args:
        study_dir: folder in NIH's layout; it needs no list of test images.

    Returns:
        A `Cohort`.

    Raises:
        FileNotFoundError: labels or images are missing.
        ImageError: images cannot be read.
        ValueError: a label file is malformed, or there are images of one class only.
    """
    paths = list_images(study_dir)
    found, report = match_images(load_metadata(study_dir), paths)
    rows = _select_nodules(found)
    counts = {"missing images": report.n_missing, "other findings": len(found) - len(rows)}
    return _make_file_cohort("phantom", rows, paths, load_boxes(study_dir), counts)


def load_jsrt_cohort(folder):
    """Loads the images of the Japanese Society of Radiological Technology: 154 with one nodule, 93 without.

    Position and size of a nodule (Shiraishi et al., AJR 2000) become a box: a square around the center whose side is
    the nodule's diameter. Every image is of another patient.

    Args:
        folder: path of a folder with `jsrt_metadata.csv` (columns `study_id`, the file name; `size`, mm; `x` and `y`,
            pixels of 2048; empty without a nodule) and `images/`, PNG or JPEG files of any size.

    Returns:
        A `Cohort`.

    Raises:
        FileNotFoundError: the label file, or images that it names, are missing.
        ImageError: images cannot be read.
        ValueError: the label file lacks a column, or a row has a position outside the image, only some of the three
            numbers, or text in place of one; or there are images of one class only.
    """
    source = as_path(folder) / "jsrt_metadata.csv"
    if not source.is_file():
        raise FileNotFoundError(f"{source} is missing. SOURCE_DIR must be the folder with this file and images/.")
    table = read_csv(source)
    lacking = {"study_id", "size", "x", "y"} - set(table.columns)
    if lacking:
        raise ValueError(f"{source} has no column {', '.join(sorted(lacking))}; it has {', '.join(table.columns)}")
    given = table[["size", "x", "y"]]
    numbers = given.apply(pd.to_numeric, errors="coerce")
    # Without its x a nodule would count as a normal image, without its size its box would be empty.
    unclear = (numbers.isna() & given.notna()).any(axis=1) | (numbers.isna().any(axis=1) & numbers.notna().any(axis=1))
    for row in table[unclear].itertuples():
        found = f"size {row.size}, x {row.x}, y {row.y}"
        raise ValueError(f"{source}: {row.study_id} has {found}; expected three numbers, or none without a nodule")
    has_nodule = numbers["x"].notna()
    inside = (numbers[["x", "y"]].ge(0) & numbers[["x", "y"]].lt(_JSRT_FRAME)).all(axis=1)
    for row in table[has_nodule & ~inside].itertuples():
        raise ValueError(f"{source}: {row.study_id} has a nodule at {row.x:g}, {row.y:g} of {_JSRT_FRAME}")
    radius, scale = numbers["size"] / _JSRT_PIXEL / 2, BOX_FRAME / _JSRT_FRAME
    boxes = pd.DataFrame({"image": table["study_id"], "pathology": "Nodule"})
    for axis, length in (("x", "width"), ("y", "height")):
        low, high = (np.clip(numbers[axis] + sign * radius, 0, _JSRT_FRAME) for sign in (-1, 1))
        boxes[axis], boxes[length] = scale * low, scale * (high - low)
    rows = pd.DataFrame({"image": table["study_id"], "patient_id": table["study_id"], "label": has_nodule})
    paths = {path.name: path for path in (as_path(folder) / "images").glob("*")}
    return _make_file_cohort("jsrt", rows, paths, boxes[has_nodule])


def load_openi_cohort(folder, views="frontal"):
    """Loads the images that `fetch_openi` left in a folder, labeled by the indexers' terms.

    Args:
        folder: path of the folder.
        views: "frontal" or "both", see `load_openi_images`.

    Returns:
        A `Cohort` without boxes; images that are missing or broken are counted and left out.

    Raises:
        FileNotFoundError: there are no reports or none of their images.
        ValueError: unknown `views`, or only one class is left.
    """
    rows, counts = load_openi_images(folder, views)
    return _make_file_cohort("openi", rows, dict(zip(rows["image"], rows["path"], strict=True)), counts=counts)


def make_cohort_dataset(cohort, side, batch_size, numbers):
    """Makes a dataset of some of a cohort's images, in order; the last batch may be smaller.

    Args:
        cohort: a `Cohort`.
        side: int, pixels a side of the square images.
        batch_size: int.
        numbers: rising row numbers of the images.

    Returns:
        A Dataset of uint8 (batch, side, side, 1), 0 to 255.
    """
    in_order = {"num_parallel_calls": tf.data.AUTOTUNE, "deterministic": True}
    if cohort.paths is not None:
        data = tf.data.Dataset.from_tensor_slices(tf.constant([cohort.paths[row] for row in numbers], tf.string))
        data = data.map(lambda path: decode_image(tf.io.read_file(path), side), **in_order)
    else:
        wanted = pd.concat([cohort.study.rows(subset) for subset in SUBSETS])["image"]
        wanted = wanted.isin(cohort.rows["image"].iloc[numbers]).to_numpy()
        files = [file for subset in SUBSETS for file in cohort.study.files(subset)]
        ends = np.cumsum([shard["count"] for subset in SUBSETS for shard in cohort.study.shards[subset]])[:-1]
        some = [(file, mask) for file, mask in zip(files, np.split(wanted, ends), strict=True) if mask.any()]
        files, wanted = [file for file, _ in some], np.concatenate([mask for _, mask in some])
        data = tf.data.Dataset.zip(tf.data.TFRecordDataset(files), tf.data.Dataset.from_tensor_slices(wanted))
        data = data.filter(lambda _, is_wanted: is_wanted).map(lambda record, _: record)
        data = data.map(lambda record: resize_image(cohort.study.parse(record[None])[0][0], side), **in_order)
    return data.batch(batch_size).prefetch(tf.data.AUTOTUNE)


def read_cohort_images(cohort, side, numbers):
    """Reads some images of a cohort.

    Args:
        cohort: a `Cohort`.
        side: int, pixels a side of the square images.
        numbers: row numbers of the images, each once, in any order.

    Returns:
        float32 array (len(numbers), side, side, 1), 0 to 255, in the order of `numbers`.
    """
    numbers = np.asarray(numbers, dtype="int64")
    images = np.zeros((len(numbers), side, side, 1), dtype="float32")
    order = np.argsort(numbers)
    batches = make_cohort_dataset(cohort, side, 64, numbers[order]) if len(numbers) else ()
    for batch_number, batch in enumerate(batches):
        images[order[64 * batch_number : 64 * (batch_number + 1)]] = batch.numpy()
    return images


def _make_file_cohort(name, rows, paths, boxes=None, counts=None):
    """Makes a cohort of files, sorted by name. Reads each file once: its header is checked and its content hashed.

    Args:
        name: the source.
        rows: DataFrame with `image`, `patient_id` and `label`, in any order.
        paths: dict image -> path of a PNG or JPEG file.
        boxes: DataFrame as returned by `load_boxes`, or None; only nodules of these images are kept.
        counts: dict of what the source found and left out.
    """
    rows = rows[["image", "patient_id", "label"]].sort_values("image", ignore_index=True).astype({"label": "int8"})
    twice = rows["image"][rows["image"].duplicated()]
    if len(twice):
        raise ValueError(f"{name}: {twice.iloc[0]} is labeled more than once; keep one row of each image")
    missing = [image for image in rows["image"] if image not in paths or not as_path(paths[image]).is_file()]
    if missing:
        raise FileNotFoundError(f"{name}: {name_some(missing)} labeled but not there; fetch what is missing")
    files = [as_path(paths[image]) for image in rows["image"]]
    with ThreadPoolExecutor() as pool:  # hashing and reading release the interpreter's lock
        problems, digests = zip(*pool.map(_inspect_and_hash, files), strict=True)
    broken = [f"{path} ({problem})" for path, problem in zip(files, problems, strict=True) if problem]
    if broken:
        raise ImageError(
            f"{name}: {len(broken)} of {len(files)} images cannot be read, for instance {'; '.join(broken[:3])}. "
            "Fetch them again, or remove them from the labels"
        )
    lines = [f"{image}\t{digest}\n" for image, digest in zip(rows["image"], digests, strict=True)]
    boxes = _select_boxes(boxes, rows)
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    return Cohort(name, rows, boxes, _count(name, rows, boxes, counts), digest, [str(path) for path in files])


def _inspect_and_hash(path):
    """Returns why a file is not a readable image ("" if it is one) and its SHA-256."""
    try:
        inspect_image(path)
        return "", hash_file(path)
    except (ImageError, OSError) as error:
        return str(error), ""


def _select_nodules(rows):
    """Returns the rows with a nodule or without any finding, with their `label`; the index stays."""
    chosen = rows["Nodule"].eq(1) | rows[list(PATHOLOGIES)].sum(axis=1).eq(0)
    return rows[chosen].assign(label=rows["Nodule"].astype("int8"))


def _select_boxes(boxes, rows):
    """Returns the boxes of nodules in the images that are labeled Nodule."""
    if boxes is None:
        return pd.DataFrame(columns=_BOX_COLUMNS)
    chosen = boxes["pathology"].eq("Nodule") & boxes["image"].isin(rows.loc[rows["label"].eq(1), "image"])
    return boxes.loc[chosen, _BOX_COLUMNS]


def _count(source, rows, boxes, others):
    """Returns counts of the images kept and, from the source, of `others`; ValueError if a class has none."""
    of_class = {name: int(rows["label"].eq(label).sum()) for label, name in enumerate(NODULE_CLASSES)}
    for name, count in of_class.items():
        if not count:
            raise ValueError(f"{source}: none of the {len(rows)} images is of class {name}; two classes are needed")
    own = {"films": len(rows), "patients": rows["patient_id"].nunique(), **of_class, "boxes": len(boxes)}
    return own | (others or {})
