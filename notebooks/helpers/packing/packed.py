"""Packed studies: what packing leaves in a folder, and how it is found, checked and read.

A packed study is one folder: `train-00000-of-00004.tfrecord`, ..., `index.csv` (a row for each image, in the order of
the records), `study/` (the study's label files and lists) and `manifest.json`, written last. Everything in it is
relative, so the folder can be moved, attached or put into a bucket.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pandas as pd
import tensorflow as tf

from ..runtime.files import as_path, hash_file, measure_file, read_csv
from ..runtime.settings import read_json, resolve_path
from ..study.labels import BOX_FRAME, list_findings
from ..study.readers import load_study
from ..study.splits import SUBSETS, assert_no_patient_overlap
from ..study.study import BOX_COLUMNS, read_patients
from .dicom import load_image
from .records import FORMAT, parse_records

_MANIFEST_KEYS = {
    *("format", "name", "side", "encoding", "classes", "split", "split_sha256"),
    *("index_sha256", "study_files", "shards"),
}


@dataclass(frozen=True)
class PackedStudy:
    """A packed study that was checked on loading.

    Attributes:
        folder: path of the folder.
        name: of the study that was packed.
        side: pixels, of the square images in the shards.
        encoding: of the images in the records, one of `records.ENCODINGS`.
        split_name: which split, one of `splits.SPLITS`.
        split_sha256: `splits.hash_split` of the images in it.
        index_sha256: of `index.csv`, in which the labels are.
        shards: dict subset -> list of dicts with `file`, `count`, `bytes`, `sha256`.
        findings: names of the findings, a tuple.
        has_patients: whether it is known which images belong to one patient; if not, each has a number of its own.
        about: dict of what the study says of itself, see `study.Study`.
        index: DataFrame in the order of the records: `subset`, the metadata columns, a column of 1, 0 or NaN (unknown)
            for each finding, and of each image's file `width`, `height` (pixels), `mode` (Pillow's name of its pixel
            format) and `n_bytes`.
        excluded: list of dicts `image`, `reason`: images that could not be read.
    """

    folder: os.PathLike
    name: str
    side: int
    encoding: str
    split_name: str
    split_sha256: str
    index_sha256: str
    shards: dict
    findings: tuple
    has_patients: bool
    about: dict
    index: pd.DataFrame
    excluded: list

    def files(self, subset):
        """Paths of a subset's shards, as strings, in order."""
        return [str(self.folder / shard["file"]) for shard in self.shards[subset]]

    def rows(self, subset):
        """The index of one subset, in the order in which `make_eval_dataset` gives the images."""
        return self.index[self.index["subset"].eq(subset)].reset_index(drop=True)

    def labels(self, subset):
        """Labels of one subset: float32 array (images, findings) of 1, 0 and NaN (unknown), in the order of `rows`."""
        return self.rows(subset)[list(self.findings)].to_numpy(np.float32)

    def prevalence(self, subset):
        """Share of images with each finding among those whose label is known: float64 (findings,), NaN if none is."""
        return self.rows(subset)[list(self.findings)].mean(skipna=True).to_numpy(np.float64)

    def load_boxes(self):
        """Loads the study's boxes in pixels of the square of `BOX_FRAME` into which every image is fitted.

        Returns:
            DataFrame, one row a box: `image`, `pathology` (str), `x`, `y`, `width`, `height` (float64, from the upper
            left corner). `attrs["strays"]` lists images with boxes that the label file does not have; their boxes are
            left out. Empty where the study has none.
        """
        folder = self.folder / "study"
        if not folder.is_dir():
            return pd.DataFrame(columns=list(BOX_COLUMNS))
        study = load_study(folder)
        is_stray = ~study.boxes["image"].isin(study.rows["image"])
        boxes = study.boxes[~is_stray] if study.kind == "nih" else frame_boxes(study.boxes, self.index)
        boxes.attrs["strays"] = sorted({*study.boxes["image"][is_stray]})
        return boxes

    def parse(self, records):
        """Images and labels of a batch of its records, see `records.parse_records`."""
        return parse_records(records, self.side, self.encoding, len(self.findings))


def load_packed_study(folder):
    """Loads and checks a packed study: every file's presence, size and SHA-256, the class order, the patients.

    A TFRecord file that is cut off between two records reads as a shorter file without any error, so sizes and hashes
    are compared before the first record is used. Hashing runs at about a gigabyte a second and core.

    Args:
        folder: path of the folder that `pack_study` wrote.

    Returns:
        The `PackedStudy`.

    Raises:
        FileNotFoundError: no manifest, or a shard is missing.
        ValueError: a file differs from the manifest, the findings are not those of the index, the format is not that of
            this code, or one patient is in two subsets of a split that is meant to be by patient.
    """
    folder = as_path(folder)
    manifest = read_manifest(folder)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{folder / 'manifest.json'} has record format {manifest['format']}, this code reads {FORMAT}. "
            "Delete that folder and run 01_prepare_data.ipynb."
        )
    _assert_files_are_intact(folder, manifest)
    index = read_index(folder)
    if manifest["classes"] != list(list_findings(index)):
        raise ValueError(
            f"{folder / 'manifest.json'} names the findings {', '.join(manifest['classes'])}, index.csv has "
            f"{', '.join(list_findings(index))}. Delete that folder and run 01_prepare_data.ipynb."
        )
    assert_split_by_patient(folder, manifest["split"], index["patient_id"], index["subset"])
    return PackedStudy(
        folder=folder,
        name=manifest["name"],
        side=manifest["side"],
        encoding=manifest["encoding"],
        split_name=manifest["split"],
        split_sha256=manifest["split_sha256"],
        index_sha256=manifest["index_sha256"],
        shards={subset: [s for s in manifest["shards"] if s["subset"] == subset] for subset in SUBSETS},
        findings=tuple(manifest["classes"]),
        has_patients=manifest.get("has_patients", manifest["split"] != "chestmnist"),  # so of earlier versions
        about=manifest.get("about", {}),
        index=index,
        excluded=[left_out for shard in manifest["shards"] for left_out in shard["excluded"]],
    )


def frame_boxes(boxes, index):
    """Moves boxes from pixels of the image to those of the square of `BOX_FRAME` into which packing fits it.

    Args:
        boxes: DataFrame of `Study.boxes`.
        index: DataFrame with `image`, `width` and `height` (pixels); boxes of other images are left out.

    Returns:
        DataFrame with the same columns; what reaches beyond the image is cut off.

    Raises:
        ValueError: a box lies wholly outside its image.
    """
    sizes = index.set_index("image")[["width", "height"]]
    boxes = boxes[boxes["image"].isin(sizes.index)].copy()
    size = sizes.loc[boxes["image"]].to_numpy("float64")
    scale, before = BOX_FRAME / size.max(axis=1), (size.max(axis=1, keepdims=True) - size) // 2
    outside = (boxes[["x", "y"]].to_numpy() >= size).any(axis=1)
    if outside.any():
        box, (width, height) = boxes[outside].iloc[0], size[outside][0]
        raise ValueError(
            f"boxes.csv: a box of {box['image']} begins at x {box['x']:g}, y {box['y']:g}, outside the image's "
            f"{width:g} x {height:g} pixels; correct or remove it, and run notebook 1 again"
        )
    for axis, (low, length) in enumerate((("x", "width"), ("y", "height"))):
        start, end = boxes[low].to_numpy(), (boxes[low] + boxes[length]).to_numpy()
        start, end = (np.clip(value, 0, size[:, axis]) + before[:, axis] for value in (start, end))
        boxes[low], boxes[length] = start * scale, (end - start) * scale
    return boxes


def read_manifest(folder):
    """Reads the manifest of a packed study, which may have another format than this code's.

    Args:
        folder: path object of the folder.

    Returns:
        dict.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError("it holds no object")
        lacking = _MANIFEST_KEYS - manifest.keys()
        if lacking and manifest.get("format", FORMAT) == FORMAT:
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
        return manifest
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} holds no manifest.json: it is no packed study, or packing did not finish. "
            "Run 01_prepare_data.ipynb, which resumes where it stopped."
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{folder / 'manifest.json'} is damaged ({error}). Delete it and run 01_prepare_data.ipynb."
        ) from None


def read_index(folder):
    """Reads `index.csv` of a packed study as it was written."""
    text = dict.fromkeys(("subset", "image", "patient_id", "sex", "view", "mode"), str)
    # Patients may be called NA or 1e5: pandas would take these for a missing value and a number.
    options = {"dtype": text, "keep_default_na": False, "na_values": [""], "float_precision": "round_trip"}
    index = read_csv(folder / "index.csv", **options)
    return index.assign(patient_id=read_patients(folder / "index.csv", index["patient_id"]))


def list_intact(folder, shards):
    """Returns those of some shards, entries of a manifest, whose files are there with their size and SHA-256."""

    def is_intact(shard):
        path = folder / shard["file"]
        return path.exists() and measure_file(path) == shard["bytes"] and hash_file(path) == shard["sha256"]

    with ThreadPoolExecutor() as pool:  # hashlib releases the interpreter's lock
        return [shard for shard, ok in zip(shards, pool.map(is_intact, shards), strict=True) if ok]


def _assert_files_are_intact(folder, manifest):
    missing = [shard["file"] for shard in manifest["shards"] if not (folder / shard["file"]).exists()]
    if missing:
        raise FileNotFoundError(f"{folder / missing[0]} is missing ({len(missing)} in all). Run 01_prepare_data.ipynb.")
    intact = list_intact(folder, manifest["shards"])
    damaged = [shard["file"] for shard in manifest["shards"] if shard not in intact]
    if damaged:
        raise ValueError(
            f"{folder / damaged[0]} does not match its size and SHA-256 in manifest.json ({len(damaged)} in all): "
            "cut short or altered. Run 01_prepare_data.ipynb; it rewrites damaged shards only."
        )
    small = {"index.csv": manifest["index_sha256"]}
    small |= {f"study/{name}": sha256 for name, sha256 in manifest["study_files"].items()}
    for name, sha256 in small.items():
        if not (folder / name).exists() or hash_file(folder / name) != sha256:
            raise ValueError(f"{folder / name} is missing or altered. Run 01_prepare_data.ipynb.")


def assert_split_by_patient(folder, split_name, patient_ids, subsets):
    """Raises ValueError if a patient is in two subsets, unless the split is the one that shows what leakage does."""
    if split_name == "leaky_images":  # the demonstration split leaks on purpose, and says so in its name
        return
    try:
        assert_no_patient_overlap(patient_ids, subsets)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}. Split by patient and pack into an empty folder.") from None


def load_image_files(study, subset, n_images, study_dir):
    """Loads the files of the first images of a subset.

    Where one of them is not in `study_dir`, as with a packed study attached alone, all are PNGs of the images
    as packed, which every function that shrinks images to the packed side leaves as they are.

    Args:
        study: a `PackedStudy`.
        subset: "train", "val" or "test".
        n_images: int, or None for all.
        study_dir: folder of the study, with or without images.

    Returns:
        List of bytes, PNG or JPEG, in the order of `study.rows(subset)`.
    """
    names = study.rows(subset)["image"].head(n_images)
    try:
        paths = load_study(study_dir).list_images()
    except FileNotFoundError:
        paths = {}
    if paths.keys() >= set(names):
        return [load_image(paths[name])[0] for name in names]
    records = tf.data.TFRecordDataset(study.files(subset)).take(len(names)).batch(1)
    pngs = records.map(lambda record: tf.io.encode_png(study.parse(record)[0][0]), tf.data.AUTOTUNE)
    return list(pngs.as_numpy_iterator())


def resolve_paths(data_dir, run_dir, packed_dir, split, profile, attached="/kaggle/input"):
    """Turns the path settings of the notebooks into paths; relative ones are relative to the repository's root.

    A packed study is enough to train and evaluate on: it is searched for where Kaggle attaches data sets if no other
    one is named or at its usual place, and its copies of the label files are used where the study itself is missing.

    Args:
        data_dir: folder of a study; only the synthetic study is ever written to.
        run_dir: folder of one training run; made if missing.
        packed_dir: folder of the packed study; empty for `data/packed/<study>-<split>-<profile>`.
        split: name of the split.
        profile: name of the profile.
        attached: folder below which packed studies of that split are recognized by their manifest; None for a study
            that is still to be packed.

    Returns:
        A namespace with the paths `study`, `packed`, `run`, and `name`, that of the study.

    Raises:
        ValueError: several packed studies could be meant.
    """
    study, run = resolve_path(data_dir), resolve_path(run_dir)
    run.mkdir(parents=True, exist_ok=True)
    packed, name = resolve_path(packed_dir or f"data/packed/{study.name}-{split}-{profile}"), study.name
    if attached is None:
        return SimpleNamespace(study=study, packed=packed, run=run, name=name)
    is_missing = not study.is_dir()
    if not packed_dir and not packed.is_dir():
        found = [path for path, of in _find_packed_studies(attached, split).items() if is_missing or of == name]
        if len(found) > 1:
            raise ValueError(
                f"Several packed studies fit: {', '.join(map(str, found))}. Set PACKED_DIR to one of them."
            )
        packed = found[0] if found else packed
    if is_missing and (packed / "study").is_dir() and (packed / "manifest.json").is_file():
        study, name = packed / "study", read_json(packed / "manifest.json")["name"]
    return SimpleNamespace(study=study, packed=packed, run=run, name=name)


def _find_packed_studies(root, split_name):
    """Returns a dict path -> name of the packed studies of a split below a folder; empty if there is no such folder."""
    found = {}
    for path, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("images"))  # NIH's take minutes to list
        if "manifest.json" not in files:
            continue
        folders.clear()  # a packed study holds no other one
        try:
            manifest = read_manifest(as_path(path))
        except ValueError:  # another program's manifest
            continue
        if manifest.get("format") == FORMAT and manifest.get("split") == split_name:
            found[as_path(path)] = manifest["name"]
    return found
