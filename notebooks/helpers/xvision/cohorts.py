"""Images of two kinds, with a nodule and normal, from wherever they are: files in a folder or a packed study.

A cohort is what the study of nodules works on: a table of images with patient and label, the boxes that are known, and a
way to read the images, in the table's order. "Normal" means what each source means by it: in NIH's files that none of
14 findings was mentioned, in Open-i's that the report was indexed as normal, in JSRT's that radiologists found none.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import tensorflow as tf

from ..packing.decoding import decode_image, resize_image
from ..packing.image_files import ImageError, assert_image_decodes, inspect_image
from ..runtime.files import as_path, hash_file, read_csv
from ..study.labels import (
    BOX_FRAME,
    NODULE_CLASSES,
    PATHOLOGIES,
    list_images,
    load_boxes,
    load_metadata,
    match_images,
    name_some,
)
from ..study.splits import CHESTMNIST, SUBSETS
from .openi import load_openi_images

_BOX_COLUMNS = ["image", "pathology", "x", "y", "width", "height"]
_JSRT_FRAME = 2048  # pixels a side, of the images that JSRT's positions refer to (Shiraishi et al., AJR 2000)
_JSRT_PIXEL = 0.175  # mm


@dataclass(frozen=True)
class Cohort:
    """Images with and without a nodule.

    Attributes:
        name: the source, such as "jsrt".
        images: DataFrame, one row an image, numbered from 0: `image` (name), `patient_id`, `label` (int8, index of
            `NODULE_CLASSES`).
        boxes: DataFrame as `labels.load_boxes` gives it, of nodules in these images alone; may be empty.
        counts: dict of what was found and left out, to be shown.
        sha256: of all that the images are, in their order: equal for the same images wherever they lie.
        paths: list of the images' files, or None for images of a packed study.
        study: the `PackedStudy` that holds the images, or None.
    """

    name: str
    images: pd.DataFrame
    boxes: pd.DataFrame
    counts: dict
    sha256: str
    paths: list | None = None
    study: object = field(default=None, repr=False)

    def __len__(self):
        """Number of images."""
        return len(self.images)


def cohort_of_files(name, images, paths, boxes=None, counts=None):
    """Makes a cohort of files. Each is read once, to look at its header and to hash it.

    Args:
        name: the source.
        images: DataFrame with `image`, `patient_id` and `label`, in any order.
        paths: dict image -> path of a PNG or JPEG file.
        boxes: DataFrame as `labels.load_boxes` gives it; what is no nodule of these images is left out.
        counts: dict of what the source found and left out.

    Returns:
        A `Cohort`, its images sorted by name.

    Raises:
        FileNotFoundError: images have no file.
        ImageError: files are no images that can be read; with their names.
        ValueError: an image is labeled twice, or there are images of one class only.
    """
    images = images[["image", "patient_id", "label"]].sort_values("image", ignore_index=True)
    images = images.astype({"label": "int8"})
    twice = images["image"][images["image"].duplicated()]
    if len(twice):
        raise ValueError(f"{name}: {twice.iloc[0]} is labeled more than once; keep one row of each image")
    missing = [image for image in images["image"] if image not in paths or not as_path(paths[image]).is_file()]
    if missing:
        raise FileNotFoundError(f"{name}: {name_some(missing)} labeled but not there; fetch what is missing")
    _check_classes(name, images)
    files = [as_path(paths[image]) for image in images["image"]]
    with ThreadPoolExecutor() as pool:  # hashlib and files release the interpreter's lock
        looked_at = list(pool.map(_look_at, files))
    broken = [f"{path} ({problem})" for path, (problem, _) in zip(files, looked_at, strict=True) if problem]
    if broken:
        raise ImageError(
            f"{name}: {len(broken)} of {len(files)} images cannot be read, for instance {'; '.join(broken[:3])}. "
            "Fetch them again, or remove them from the labels"
        )
    lines = [f"{image}\t{digest}\n" for image, (_, digest) in zip(images["image"], looked_at, strict=True)]
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    boxes = _own_boxes(boxes, images)
    return Cohort(name, images, boxes, _count(images, boxes, counts), digest, [str(path) for path in files])


def load_nih_cohort(study, boxes=None, subsets=SUBSETS):
    """Takes the images with a nodule, and those without any finding, out of a packed study.

    Args:
        study: a `PackedStudy`.
        boxes: frame of `labels.load_boxes`, or None.
        subsets: those of its parts whose images may be used. A network that was trained on this study knows all but the
            test images.

    Returns:
        A `Cohort`, its images in the order of the shards.

    Raises:
        ValueError: there are images of one class only, or the study does not tell patients.
    """
    if study.split_name == CHESTMNIST:
        raise ValueError(
            f"{study.folder}: ChestMNIST has no patient ids, and without them no folds can be made by patient"
        )
    rows = pd.concat([study.rows(subset) for subset in SUBSETS], ignore_index=True)
    chosen = _select_nodules(rows)[rows["subset"].isin(subsets)]
    images = rows.loc[chosen.index, ["image", "patient_id"]].assign(label=chosen).reset_index(drop=True)
    _check_classes(study.folder, images)
    digest = hashlib.sha256(
        "".join(shard["sha256"] for subset in SUBSETS for shard in study.shards[subset]).encode()
        + "".join(f"{image}\n" for image in images["image"]).encode()
    ).hexdigest()
    own = _own_boxes(boxes, images)
    counts = _count(images, own, {"other findings, or another part": len(rows) - len(images)})
    return Cohort("nih", images, own, counts, digest, study=study)


def load_folder_cohort(study_dir, name="phantom"):
    """Takes the images with a nodule, and those without any finding, out of a folder in NIH's layout.

    Args:
        study_dir: folder in NIH's layout; it needs no list of test images.
        name: name of the cohort.

    Returns:
        A `Cohort`.

    Raises:
        FileNotFoundError: labels or images are missing.
        ImageError: images cannot be read.
        ValueError: a label file is malformed, or there are images of one class only.
    """
    images = list_images(study_dir)
    found, report = match_images(load_metadata(study_dir), images)
    chosen = _select_nodules(found)
    rows = found.loc[chosen.index].assign(label=chosen)
    counts = {"missing images": report.n_missing, "other findings": len(found) - len(rows)}
    return cohort_of_files(name, rows, images, load_boxes(study_dir), counts)


def load_jsrt_cohort(folder):
    """Loads the images of the Japanese Society of Radiological Technology: 154 with one nodule, 93 without.

    Positions and sizes of the nodules (Shiraishi et al., AJR 2000) become boxes: a square around the center whose side
    is the nodule's diameter. Every image is of a patient of its own.

    Args:
        folder: path of a folder with `jsrt_metadata.csv` (columns `study_id`, the file name; `size`, mm; `x` and `y`,
            pixels of 2048; empty without a nodule) and `images/`, PNG or JPEG files of any size.

    Returns:
        A `Cohort`.

    Raises:
        FileNotFoundError: the file of labels, or images that it names, are missing.
        ImageError: images cannot be read.
        ValueError: the file of labels lacks a column, or has a position outside the image, a nodule without position or
            size, or anything that is no number; or one class only.
    """
    source = as_path(folder) / "jsrt_metadata.csv"
    if not source.is_file():
        raise FileNotFoundError(f"{source} is missing. SOURCE_DIR has to be the folder with it and with images/.")
    table = read_csv(source)
    lacking = {"study_id", "size", "x", "y"} - set(table.columns)
    if lacking:
        raise ValueError(f"{source} has no column {', '.join(sorted(lacking))}; it has {', '.join(table.columns)}")
    numbers = table[["size", "x", "y"]].apply(pd.to_numeric, errors="coerce")
    unclear = (numbers.isna() & table[["size", "x", "y"]].notna()).any(axis=1)  # no number
    unclear |= numbers.isna().any(axis=1) & numbers.notna().any(axis=1)  # some of the three
    if unclear.any():
        row = table[unclear].iloc[0]
        told = ", ".join(f"{name} {row[name]}" for name in ("size", "x", "y"))
        raise ValueError(f"{source}: {row['study_id']} has {told}; expected three numbers, or none without a nodule")
    table = table.assign(**numbers)
    has_nodule = table["x"].notna()
    radius = table["size"] / _JSRT_PIXEL / 2
    outside = has_nodule & ~(table[["x", "y"]].ge(0) & table[["x", "y"]].lt(_JSRT_FRAME)).all(axis=1)
    if outside.any():
        row = table[outside].iloc[0]
        raise ValueError(f"{source}: {row['study_id']} has a nodule at {row['x']:g}, {row['y']:g} of {_JSRT_FRAME}")
    scale = BOX_FRAME / _JSRT_FRAME
    boxes = pd.DataFrame({"image": table["study_id"], "pathology": "Nodule"})
    for axis, length in (("x", "width"), ("y", "height")):
        low, high = (np.clip(table[axis] + sign * radius, 0, _JSRT_FRAME) for sign in (-1, 1))
        boxes[axis], boxes[length] = scale * low, scale * (high - low)
    images = pd.DataFrame({"image": table["study_id"], "patient_id": table["study_id"], "label": has_nodule})
    paths = {path.name: path for path in (as_path(folder) / "images").glob("*")}
    return cohort_of_files("jsrt", images, paths, boxes[has_nodule])


def load_openi_cohort(folder, views="frontal"):
    """Loads what `fetch_openi` or `search_openi` left in a folder, labeled by the indexers' terms.

    Args:
        folder: path of the folder.
        views: "frontal" or "both", see `openi.load_openi_images`.

    Returns:
        A `Cohort` without boxes; images that are missing or broken are counted and left out.

    Raises:
        FileNotFoundError: there are no reports or none of their images.
        ValueError: unknown `views`, or only one class is left.
    """
    images, report = load_openi_images(folder, views)
    counts = {
        "reports": report.n_reports, "images of other reports": report.n_unlabeled, "other views": report.n_other_view,
        "missing images": report.n_missing, "broken images": report.n_unreadable,
    }  # fmt: skip
    return cohort_of_files("openi", images, dict(zip(images["image"], images["path"], strict=True)), counts=counts)


def make_cohort_dataset(cohort, side, batch_size, rows=None):
    """Makes a dataset of a cohort's images, whole and in order; the last batch is as small as it turns out.

    Args:
        cohort: a `Cohort`.
        side: int, pixels, of the square images.
        batch_size: int.
        rows: sorted row numbers of the images wanted; None for all.

    Returns:
        A Dataset of uint8 (batch, side, side, 1), 0 to 255.
    """
    rows = np.arange(len(cohort)) if rows is None else np.asarray(rows)
    in_order = {"num_parallel_calls": tf.data.AUTOTUNE, "deterministic": True}
    if cohort.paths is not None:
        data = tf.data.Dataset.from_tensor_slices(tf.constant([cohort.paths[row] for row in rows], tf.string))
        data = data.map(
            lambda path: decode_image(tf.io.read_file(path), side),
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )
    else:
        wanted = pd.concat([cohort.study.rows(subset) for subset in SUBSETS])["image"]
        wanted = wanted.isin(cohort.images["image"].iloc[rows]).to_numpy()
        files = [file for subset in SUBSETS for file in cohort.study.files(subset)]
        data = tf.data.Dataset.zip(tf.data.TFRecordDataset(files), tf.data.Dataset.from_tensor_slices(wanted))
        data = data.filter(lambda _, is_wanted: is_wanted).map(lambda record, _: record)
        data = data.map(lambda item: resize_image(cohort.study.parse(item[None])[0][0], side), **in_order)
    return data.batch(batch_size).prefetch(tf.data.AUTOTUNE)


def read_cohort_images(cohort, side, rows):
    """Reads some images of a cohort.

    Args:
        cohort: a `Cohort`.
        side: int, pixels.
        rows: row numbers of the images, each once, in any order.

    Returns:
        float32 array (len(rows), side, side, 1), 0 to 255, in the order of `rows`.
    """
    rows = np.asarray(rows, dtype="int64")
    images = np.zeros((len(rows), side, side, 1), dtype="float32")
    order = np.argsort(rows)
    batches = make_cohort_dataset(cohort, side, 64, rows[order]) if len(rows) else ()
    for number, batch in enumerate(batches):
        images[order[64 * number : 64 * (number + 1)]] = batch.numpy()
    return images


def find_broken_image(cohort):
    """Returns a sentence that names the first image of a cohort of files that cannot be decoded; "" if all can."""
    for path in cohort.paths or ():
        try:
            assert_image_decodes(as_path(path).read_bytes())
        except (ImageError, OSError) as error:
            return f"{path} cannot be decoded ({error}). Fetch it again, or remove it from the labels."
    return ""


def _select_nodules(rows):
    """Returns labels, by index, of the rows that have a nodule or no finding at all."""
    label = rows["Nodule"].astype("int8")
    return label[rows["Nodule"].eq(1) | rows[list(PATHOLOGIES)].sum(axis=1).eq(0)]


def _look_at(path):
    """Returns why a file is no image ("" if it is one) and its SHA-256."""
    try:
        inspect_image(path)
        return "", hash_file(path)
    except (ImageError, OSError) as error:
        return str(error), ""


def _check_classes(source, images):
    counts = images["label"].value_counts()
    for label, name in enumerate(NODULE_CLASSES):
        if not counts.get(label, 0):
            raise ValueError(
                f"{source}: none of the {len(images)} images is of class {name}, and two classes are needed"
            )


def _own_boxes(boxes, images):
    if boxes is None:
        return pd.DataFrame(columns=_BOX_COLUMNS)
    own = boxes["pathology"].eq("Nodule") & boxes["image"].isin(images.loc[images["label"].eq(1), "image"])
    return boxes.loc[own, _BOX_COLUMNS]


def _count(images, boxes, counts):
    of_class = {name: int(images["label"].eq(label).sum()) for label, name in enumerate(NODULE_CLASSES)}
    return {
        "films": len(images),
        "patients": images["patient_id"].nunique(),
        **of_class,
        "boxes": len(boxes),
        **(counts or {}),
    }
