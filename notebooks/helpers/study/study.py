"""What a study folder says of itself, whatever its layout: images, patients, findings, boxes, source and terms.

A reader in `readers` makes a `Study` of a folder; `write_study_files` writes any study's labels as `labels.csv`, which
is how packed studies carry them.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from ..runtime.files import copy_file, hash_file, read_text, write_text
from .labels import _BESIDE, COLUMNS, list_findings, refuse_twice
from .splits import SUBSETS, assert_no_patient_overlap
from .study_folder import list_small_files

MAX_FINDINGS = 100
LABELS, BOXES, ABOUT = "labels.csv", "boxes.csv", "study.json"  # of the layout for images of one's own
BOX_COLUMNS = ("image", "pathology", "x", "y", "width", "height")

# Of a finding that an image has, has not, or of which nothing is known, as text; -1 is CheXpert's "uncertain".
_LABELS = {"1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0, "": np.nan, "-1": -1.0, "-1.0": -1.0}
OWN_SPLITS = {  # names of subsets, and what they are called here
    **{name: name for name in (*SUBSETS, "train_val")},
    **{"training": "train", "testing": "test", "dev": "val"},
    **dict.fromkeys(("valid", "validate", "validation"), "val"),
}


@dataclass(frozen=True)
class Study:
    """A study folder as its reader understands it.

    Attributes:
        folder: path of the folder.
        kind: which layout it has: "nih", "labels.csv", "chexpert", ...
        source: name of the file or folders that the labels come from.
        rows: DataFrame, one row an image, sorted by `image` (its path below the folder, or NIH's file name):
            `patient_id` (int64, or str), `follow_up` (int64), `age` (years, NaN where unknown), `sex` ("M", "F" or
            "unknown"), `view` ("PA", "AP", "LATERAL" or "unknown"), where the study has a split of its own `split`
            ("train", "val", "test" or "train_val", "" for an image in none), then a column of 1, 0 and NaN (unknown)
            for each finding.
        has_patients: whether it is known which images belong to one patient; if not, each image has a number.
        boxes: DataFrame of `BOX_COLUMNS`, in pixels of the image; of NIH's, in pixels of `labels.BOX_FRAME`.
        about: dict of sentences that the model card shows: `name`, `labels` (what they are and where they come from),
            `not_read`, `source` (address), `terms`; some may be missing.
        lister: function that lists the image files, see `list_images`.
    """

    folder: os.PathLike
    kind: str
    source: str
    rows: pd.DataFrame
    has_patients: bool
    lister: Callable = field(repr=False)
    boxes: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(BOX_COLUMNS)), repr=False)
    about: dict = field(default_factory=dict)

    @property
    def findings(self):
        """The findings' names in the order of the columns, a tuple."""
        return list_findings(self.rows)

    @property
    def is_synthetic(self):
        """Whether the images are drawn."""
        return (self.folder / "phantom.json").exists()

    def list_images(self):
        """Lists the images: dict from name in `rows` to path; FileNotFoundError if there are none."""
        return self.lister(self.folder)


def make_study(folder, kind, path, table, *, lister, boxes=None, about=None, uncertain="ignore"):
    """Checks a reader's table and makes a `Study` of it.

    Args:
        folder: path of the study's folder.
        kind: see `Study`.
        path: of the file that the table was read from, for messages.
        table: DataFrame of text, indexed by row as a text editor counts: `image`, then if known `patient_id`, `split`,
            `view`, `sex`, `age`, `follow_up`; every other column is a finding: "1", "0", "-1" (uncertain) or "".
        lister: see `Study`.
        boxes: DataFrame of `BOX_COLUMNS`, or None.
        about: see `Study`.
        uncertain: what -1 becomes, "ignore" (unknown), "zeros" or "ones".

    Returns:
        The `Study`.

    Raises:
        ValueError: a value cannot be what its column holds, an image is listed twice, or a patient is in two subsets;
            names the file, the row and the remedy.
    """
    if table.empty:
        raise ValueError(f"{path} has a header and no rows; expected a row an image")
    findings = list_findings(table)
    if taken := [name for name in table if name.casefold() in _BESIDE - {"split"}]:
        raise ValueError(f"{path}: {taken[0]!r} is a name that packed studies use; rename or remove the column")
    _assert_names(path, findings)
    for line, image in table["image"].items():
        if not image or image.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", image):
            raise ValueError(f"{path}, row {line}: {image!r} is not the path of an image below {folder}")
    refuse_twice(path, table["image"])
    rows = pd.DataFrame({"image": table["image"]})
    has_patients = "patient_id" in table
    rows["patient_id"] = read_patients(path, table["patient_id"]) if has_patients else 0
    rows["follow_up"] = _read_numbers(path, table, "follow_up", whole=True).fillna(0).astype("int64")
    rows["age"] = _read_numbers(path, table, "age")
    rows["sex"] = _read_words(path, table, "sex", {"m": "M", "f": "F", "male": "M", "female": "F"})
    rows["view"] = _read_words(path, table, "view", {"pa": "PA", "ap": "AP", "lateral": "LATERAL"})
    if "split" in table:
        rows["split"] = _read_words(path, table, "split", OWN_SPLITS, "")
        try:
            if has_patients:
                in_one = rows["split"].ne("")
                assert_no_patient_overlap(rows["patient_id"][in_one], rows["split"][in_one])
        except ValueError as error:
            raise ValueError(f"{path}, column split: {error}; a model would recognize them") from None
    labels = {name: _read_labels(path, table[name], uncertain) for name in findings}
    rows = pd.concat([rows, pd.DataFrame(labels)], axis=1).sort_values("image", ignore_index=True)
    if not has_patients:
        rows["patient_id"] = np.arange(len(rows))  # in this order, so that a copy of the table gives the same numbers
    boxes = check_boxes(boxes, findings) if boxes is not None else pd.DataFrame(columns=list(BOX_COLUMNS))
    return Study(folder, kind, path.name, rows, has_patients, lister, boxes, dict(about or {}))


def check_boxes(boxes, findings):
    """Checks a reader's boxes: DataFrame of `BOX_COLUMNS`, `attrs["source"]` the file; returns it with numbers.

    Raises:
        ValueError: a finding is not one of the study's, or a box has no area; names the file and the row.
    """
    source = boxes.attrs.get("source", BOXES)
    for line, name in boxes["pathology"].items():
        if name not in findings:
            raise ValueError(f"{source}, row {line}: {name!r} is not a finding of the study: {', '.join(findings)}")
    numbers = boxes[["x", "y", "width", "height"]].apply(pd.to_numeric, errors="coerce").replace(np.inf, np.nan)
    flat = boxes.index[~(numbers[["x", "y"]].ge(0) & numbers[["width", "height"]].gt(0).to_numpy()).all(axis=1)]
    if len(flat):
        raise ValueError(
            f"{source}, row {flat[0]}: expected x and y of 0 or more, and width and height above 0, in pixels of the "
            "image; correct or remove the row"
        )
    checked = boxes.assign(**numbers.astype("float64"))[list(BOX_COLUMNS)]
    checked.attrs = {"source": str(source)}
    return checked


def write_study_files(study, folder):
    """Writes what a study has beside its images into a folder: NIH's own files, of others labels.csv and the like.

    Args:
        study: a `Study`.
        folder: path of the folder, made if missing. A file with the same content is left alone.

    Returns:
        List of the names of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if study.kind == "nih":
        files = list_small_files(study.folder)
        for path in files:
            copy = folder / path.name
            if not copy.exists() or hash_file(copy) != hash_file(path):
                copy_file(path, copy)
        return [path.name for path in files]
    rows = study.rows if study.has_patients else study.rows.drop(columns="patient_id")
    order = [name for name in (*COLUMNS, "split") if name in rows]
    known = rows[[*order, *study.findings]].replace({"sex": {"unknown": ""}, "view": {"unknown": ""}})
    known = known.astype(dict.fromkeys(study.findings, "Int64"))
    texts = {LABELS: known.to_csv(index=False, lineterminator="\n")}
    if len(study.boxes):
        texts[BOXES] = study.boxes.rename(columns={"pathology": "finding"}).to_csv(index=False, lineterminator="\n")
    texts[ABOUT] = json.dumps({"kind": study.kind, **study.about}, indent=1) + "\n"
    for name, text in texts.items():
        if not (folder / name).exists() or (folder / name).read_bytes() != text.encode():
            write_text(folder / name, text)
    return sorted(texts)


def read_about(path):
    """Returns the sentences in a `study.json`, {} where there is none; ValueError if it is no object of JSON."""
    try:
        about = json.loads(read_text(path)) if path.is_file() else {}
        return {key: value for key, value in about.items() if isinstance(value, str)}
    except (ValueError, AttributeError) as error:
        raise ValueError(f'{path} is not an object of JSON, such as {{"name": "..."}}: {error}') from None


def read_patients(path, column):
    """Returns a column of patient ids, text, as int64 where all are whole numbers; ValueError where one is empty."""
    empty = column.eq("")
    if empty.any():
        line = empty.idxmax()
        raise ValueError(
            f"{path}, row {line}: no patient_id. Give every image one, or leave out the column: then each image counts "
            "as a patient, and intervals are over images"
        )
    return column.astype("int64") if column.str.fullmatch("0|[1-9][0-9]{0,17}").all() else column  # 7 is not 007


def _assert_names(path, findings):
    if not 1 <= len(findings) <= MAX_FINDINGS:
        known = ", ".join((*COLUMNS, "split"))
        raise ValueError(
            f"{path} has {len(findings)} columns of findings; expected 1 to {MAX_FINDINGS}, each with 0, 1 or nothing, "
            f"beside the columns {known}"
        )
    for name in findings:
        if not re.fullmatch(r"[^,|\"'/\\\n]+", name) or name.casefold() in ("mean", "no finding"):
            raise ValueError(f"{path}: {name!r} cannot be the name of a finding; remove or rename the column")
    words = [
        " ".join(re.findall(r"[^\W_]+", name.casefold())) for name in findings
    ]  # as columns of predictions are read
    for name, word in zip(findings, words, strict=True):
        if name.casefold() in (*COLUMNS, "split"):
            raise ValueError(f"{path}: the column {name!r} has to be called {name.casefold()!r}; rename it")
        if not word or words.count(word) > 1:
            others = ", ".join(repr(other) for other, same in zip(findings, words, strict=True) if same == word)
            raise ValueError(f"{path}: the findings {others} differ by signs only; give each a name of its own")


def _read_labels(path, column, uncertain):
    values = column.map(_LABELS)
    bad = values.isna() & column.ne("")
    if bad.any():
        line = bad.idxmax()
        raise ValueError(
            f"{path}, row {line}: {column[line]!r} in the column {column.name!r} is not a label; expected 1, 0, -1 "
            "(uncertain) or nothing (unknown). Remove a column that is no finding"
        )
    values = values.replace(-1.0, {"ignore": np.nan, "zeros": 0.0, "ones": 1.0}[uncertain])
    return values.astype("float32" if values.isna().any() else "uint8")


def _read_numbers(path, table, name, whole=False):
    if name not in table:
        return pd.Series(np.nan, index=table.index)
    numbers = pd.to_numeric(table[name].where(table[name].ne(""), None), errors="coerce")
    numbers = numbers.replace(np.inf, np.nan)
    bad = (numbers.isna() & table[name].ne("")) | numbers.lt(0) | (whole & numbers.notna() & numbers.mod(1).ne(0))
    if bad.any():
        line = bad.idxmax()
        what = "a whole number" if whole else "a number"
        raise ValueError(f"{path}, row {line}: {table.loc[line, name]!r} in the column {name} is not {what}, 0 or more")
    return numbers.astype("float64")


def _read_words(path, table, name, known, unknown="unknown"):
    if name not in table:
        return unknown
    words = table[name].str.casefold().replace({"unknown": "", "u": "", "o": ""})
    bad = ~words.isin([*known, ""])
    if bad.any():
        line = bad.idxmax()
        expected = ", ".join(dict.fromkeys(known.values()))
        raise ValueError(
            f"{path}, row {line}: {table.loc[line, name]!r} is not a {name}; expected {expected} or nothing"
        )
    return words.map(known | {"": unknown})
