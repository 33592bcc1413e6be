"""Images with one finding and images without any, of a study in any layout or of a packed study.

A cohort holds a table of images with patient and label, the known boxes, and a way to read the images in the table's
order. "Normal" means what the study means by it: in NIH's files that none of 14 findings was mentioned, in Open-i's
that the report was indexed as normal, in JSRT's that there is no nodule.
"""

import functools
import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import tensorflow as tf
from PIL import Image

from ..packing.decoding import decode_image, resize_image
from ..packing.dicom import load_image
from ..packing.image_files import ImageError, inspect_image
from ..packing.image_stream import read_encoded
from ..packing.packed import PackedStudy, frame_boxes
from ..runtime.files import hash_file
from ..study.splits import SUBSETS
from ..study.study_folder import match_images


@dataclass(frozen=True)
class Cohort:
    """Images with a finding and images without any.

    Attributes:
        name: of the study.
        classes: tuple of two names, such as ("Normal", "Nodule"); the position is the label.
        rows: DataFrame, one row an image, numbered from 0: `image` (name), `patient_id`, `label` (int8).
        has_patients: whether it is known which images belong to one patient; if not, each image has a number.
        boxes: DataFrame of `BOX_COLUMNS` in pixels of the square of `BOX_FRAME`, of the finding in these images only;
            may be empty.
        counts: dict of what was found and left out, to be displayed.
        sha256: hash of the images in their order: equal for the same images in any folder.
        paths: list of the image files, or None for images of a packed study.
        study: the `PackedStudy` that holds the images, or None.
    """

    name: str
    classes: tuple
    rows: pd.DataFrame
    has_patients: bool
    boxes: pd.DataFrame
    counts: dict
    sha256: str
    paths: list | None = None
    study: object = field(default=None, repr=False)

    def __len__(self):
        """Number of images."""
        return len(self.rows)


def load_cohort(study, finding="Nodule", subsets=SUBSETS):
    """Selects the images that have a finding, and those that have none.

    Where every image has some finding, as with a folder a class and none of them normal, the images without this one
    stand for the latter. Images whose labels do not tell are left out.

    Args:
        study: a `Study`, or a `PackedStudy`, whose shards are read in place of its images' files.
        finding: name of a finding of the study, in any case.
        subsets: of a `PackedStudy`, the subsets whose images are used. A network that was trained on this study has
            seen all but "test".

    Returns:
        A `Cohort`, in the order of the images' names, or of the shards. Files that are missing or cannot be read are
        counted and left out.

    Raises:
        FileNotFoundError: there are no images.
        ValueError: the study has no such finding, or only one of the two classes.
    """
    names = {name.casefold(): name for name in study.findings}
    if finding.casefold() not in names:
        raise ValueError(f"{study.folder} has no finding {finding!r}; it has {', '.join(study.findings)}")
    finding, is_packed = names[finding.casefold()], isinstance(study, PackedStudy)
    gather = functools.partial(_gather_packed, subsets=subsets) if is_packed else _gather_files
    rows, other, boxes, left_out, hashed, paths = gather(study, finding)
    of_class = {name: int(rows["label"].eq(label).sum()) for label, name in enumerate((other, finding))}
    for name in (name for name, count in of_class.items() if not count):
        counted = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise ValueError(
            f"{study.folder}: none of the {len(rows)} images is of class {name}; two classes are needed. Left out: "
            f"{counted}"
        )
    positive = rows.loc[rows["label"].eq(1), "image"]
    boxes = boxes[boxes["pathology"].eq(finding) & boxes["image"].isin(positive)].reset_index(drop=True)
    patients = {"patients": rows["patient_id"].nunique()} if study.has_patients else {}
    return Cohort(
        name=study.name if is_packed else study.folder.name,
        classes=(other, finding),
        rows=rows[["image", "patient_id", "label"]],
        has_patients=study.has_patients,
        boxes=boxes,
        counts={"films": len(rows), **patients, **of_class, "boxes": len(boxes), **left_out},
        sha256=hashlib.sha256(hashed.encode()).hexdigest(),
        paths=paths,
        study=study if is_packed else None,
    )


def _gather_packed(study, finding, subsets):
    """Returns the rows of both classes, the other class's name, boxes, counts of what is left out, what is hashed."""
    every = pd.concat([study.rows(subset) for subset in SUBSETS], ignore_index=True)
    rows, other = _select(every[every["subset"].isin(subsets)], study.findings, finding)
    hashed = "".join(shard["sha256"] for subset in SUBSETS for shard in study.shards[subset])
    hashed += "".join(f"{image}\n" for image in rows["image"])
    left_out = {"other findings, or another subset": len(every) - len(rows)}
    return rows, other, study.load_boxes(), left_out, hashed, None


def _gather_files(study, finding):
    """Returns the same, and the paths of the images, each of which is read once, checked and hashed."""
    files = study.list_images()
    every, report = match_images(study.rows, files)
    rows, other = _select(every, study.findings, finding)
    left_out = {"missing images": report.n_missing, "other findings": len(every) - len(rows)}
    with ThreadPoolExecutor() as pool:  # hashing and reading release the interpreter's lock
        facts = pd.DataFrame(pool.map(_inspect, [files[image] for image in rows["image"]]))
    facts = facts.reindex(columns=["width", "height", "sha256"])
    rows = rows.join(facts)[facts["sha256"].notna()].reset_index(drop=True)
    left_out["broken images"] = len(facts) - len(rows)
    boxes = study.boxes if study.kind == "nih" else frame_boxes(study.boxes, rows)
    hashed = "".join(f"{image}\t{sha256}\n" for image, sha256 in zip(rows["image"], rows["sha256"], strict=True))
    return rows, other, boxes, left_out, hashed, [str(files[image]) for image in rows["image"]]


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
        data = data.map(lambda path: decode_image(read_encoded(path)[0], side), **in_order)
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


def _select(rows, findings, finding):
    """Returns the rows of both classes with their `label`, and the name of the class without the finding."""
    labels = rows[list(findings)]
    is_other, other = labels.eq(0).all(axis=1), "Normal"
    if labels.eq(1).any(axis=1).all():
        is_other, other = labels[finding].eq(0), f"No {finding}"
    chosen = rows[labels[finding].eq(1) | is_other]
    return chosen.assign(label=chosen[finding].astype("int8")).reset_index(drop=True), other


def _inspect(path):
    """Returns `width`, `height` and the file's `sha256`, {} of a file that is no image or is cut short."""
    try:
        data, _ = load_image(path)
        header = inspect_image(data)
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            image.verify()  # reads the chunks of a PNG to the last and checks their sums
        return {"width": header["width"], "height": header["height"], "sha256": hash_file(path)}
    except (ImageError, OSError, SyntaxError, ValueError):  # Pillow raises SyntaxError for a broken PNG chunk
        return {}
