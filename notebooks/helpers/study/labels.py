"""Reads the labels and boxes of the NIH chest X-ray study from a folder in NIH's own layout.

Wang et al., CVPR 2017, describe the data. Column names and their quirks are those of the files that the NIH Clinical
Center distributes.
"""

import csv
import io
import re
from types import MappingProxyType

import numpy as np
import pandas as pd

from ..runtime.files import read_text
from .study_folder import find_label_file, open_study

# fmt: off
PATHOLOGIES = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)
# fmt: on
COLUMNS = ("image", "patient_id", "follow_up", "age", "sex", "view")  # of a table of images; its findings follow

# Findings that radiologists labeled again (Majkowska et al., Radiology 2020), and those of NIH that are compared with
# them. The mapping is this repository's own: the names that NIH's text mining gives to an opacity of the air spaces,
# collapse included. The radiologists' fourth finding, Fracture, has no counterpart.
ADJUDICATED = MappingProxyType(
    {
        "Pneumothorax": ("Pneumothorax",),
        "Nodule or mass": ("Nodule", "Mass"),
        "Airspace opacity": ("Consolidation", "Infiltration", "Pneumonia", "Edema", "Atelectasis"),
    }
)

BOX_FRAME = 1024  # pixels a side of the square that NIH's boxes refer to, whatever the size of the image on disk

# What else such a table may hold: the subset, and facts about the image's file.
_BESIDE = {"split", "subset", "width", "height", "mode", "n_bytes"}
_NO_FINDING = "No Finding"
# The box list says "Infiltrate" where the label file says "Infiltration".
_SPELLINGS = {"infiltrate": "Infiltration", **{name.casefold(): name for name in PATHOLOGIES}}
_SEXES = {"M": "M", "F": "F", "MALE": "M", "FEMALE": "F"}
_VIEWS = {"PA": "PA", "AP": "AP"}
_YEARS_PER_UNIT = {"": 1.0, "Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
_MAX_AGE = 100.0  # The 2017 label file holds ages up to 414; its 2020 edition stops at 95.


def load_metadata(study_dir):
    """Loads the study's label file, see `study_folder.find_label_file`.

    An age above 100 years or one that cannot be read becomes NaN, since age serves only the subgroup tables; everything
    else that cannot be read is an error.

    Args:
        study_dir: folder in NIH's layout.

    Returns:
        DataFrame, one row an image, sorted by image name: `image` (str), `patient_id` and `follow_up` (int64), `age`
        (float64, years), `sex` ("M" or "F"), `view` ("PA" or "AP"), and one uint8 column of 0 and 1 for each of
        `PATHOLOGIES`. `attrs["source"]` is the file's name. `attrs["ages"]` reports the ages that became NaN
        ("missing") and those in months, weeks or days ("converted"): for each a dict with `count` and `examples`, the
        first five as dicts with `image`, the `text` in the file and `years` (None where missing).

    Raises:
        FileNotFoundError: if the folder or the label file is missing.
        ValueError: if it cannot be known which label file is meant; if the file lacks columns or rows, lists an image
            twice, or holds a value outside its vocabulary; the message names the file and the row as a text editor
            counts it.
    """
    path = find_label_file(study_dir)
    # A later copy of the same file heads the column "Patient Sex".
    renamed = {"Patient Sex": "Patient Gender"}
    needed = ["Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age", "Patient Gender"]
    table = read_table(path, [*needed, "View Position"], renamed)
    if table.empty:
        raise ValueError(f"{path} has a header and no rows; fetch the file again")
    for line, image in table["Image Index"].items():
        if not image or "/" in image or "\\" in image:
            raise ValueError(f"{path}, row {line}: {image!r} is not an image's file name")
    refuse_twice(path, table["Image Index"])

    ages = _map_values(path, table["Patient Age"], _parse_age).astype("float64")
    findings = _map_values(path, table["Finding Labels"], _parse_findings)
    columns = {
        "image": table["Image Index"],
        "patient_id": _map_values(path, table["Patient ID"], _parse_number).astype("int64"),
        "follow_up": _map_values(path, table["Follow-up #"], _parse_number).astype("int64"),
        "age": ages,
        "sex": _map_values(path, table["Patient Gender"], lambda text: _choose(text, _SEXES, "sex")),
        "view": _map_values(path, table["View Position"], lambda text: _choose(text, _VIEWS, "frontal view")),
    }
    labels = {name: np.array([name in found for found in findings], dtype="uint8") for name in PATHOLOGIES}
    frame = pd.DataFrame({**columns, **labels})
    converted = ages.notna() & table["Patient Age"].str.upper().str.endswith(("M", "W", "D"))
    reported = {"missing": ages.isna(), "converted": converted}
    texts = pd.DataFrame({"image": table["Image Index"], "text": table["Patient Age"], "years": ages})
    frame = frame.sort_values("image", kind="stable", ignore_index=True)
    frame.attrs = {"source": path.name, "ages": {name: _count_ages(texts[mask]) for name, mask in reported.items()}}
    return frame


def _count_ages(rows):
    """Counts rows and keeps the first five by image: pandas copies `attrs` with every operation on the table."""
    examples = rows.sort_values("image").head()
    examples = examples.astype(object).where(examples.notna(), None).to_dict("records")
    return {"count": len(rows), "examples": examples}


def list_findings(table):
    """Returns the names of a table's findings, a tuple: its columns that are neither metadata nor facts of the file."""
    return tuple(name for name in table.columns if name not in COLUMNS and name not in _BESIDE)


def load_boxes(study_dir):
    """Loads the radiologists' boxes, `BBox_List_2017.csv`.

    Args:
        study_dir: folder in NIH's layout.

    Returns:
        DataFrame, one row a box, in file order: `image` and `pathology` (str), `x`, `y`, `width`, `height` (float64,
        pixels of the 1024x1024 image, from its upper left corner). Empty where the study has no such file. The index
        is the row in the file as a text editor counts it, and `attrs["source"]` the file's path.

    Raises:
        FileNotFoundError: if the folder is missing.
        ValueError: if a column is missing, a finding is unknown, or a box has no area or is outside the frame; names
            the file and the row.
    """
    path = open_study(study_dir) / "BBox_List_2017.csv"
    # The header "Bbox [x,y,w,h]" splits on its commas.
    names = {"Bbox [x": "x", "y": "y", "w": "width", "h]": "height"}
    if path.is_file():
        table = read_table(path, ["Image Index", "Finding Label", *names])
    else:
        table = pd.DataFrame(columns=["Image Index", "Finding Label", *names], dtype=str)
    boxes = pd.DataFrame({"image": table["Image Index"]})
    boxes["pathology"] = _map_values(path, table["Finding Label"], parse_pathology)
    for column, name in names.items():
        boxes[name] = _map_values(path, table[column], _parse_length).astype("float64")
    flat = boxes.index[(boxes["width"] <= 0) | (boxes["height"] <= 0)]
    if len(flat):
        raise ValueError(f"{path}, row {flat[0]}: the box has no area")
    numbers = boxes[["x", "y", "width", "height"]].to_numpy()
    outside = boxes.index[(numbers[:, :2] + numbers[:, 2:] > BOX_FRAME + 0.5).any(axis=1)]  # half a pixel of rounding
    if len(outside):
        x, y, width, height = boxes.loc[outside[0], ["x", "y", "width", "height"]]
        raise ValueError(
            f"{path}, row {outside[0]}: the box ends at x {x + width:g}, y {y + height:g}, outside the frame of "
            f"{BOX_FRAME}x{BOX_FRAME} pixels, to which boxes refer whatever the image's size; correct or remove it"
        )
    boxes.attrs = {"source": str(path)}
    return boxes


def load_adjudicated(study_dir):
    """Loads the labels that radiologists gave some of the images again, `google2019_nih-chest-xray-labels.csv`.

    Args:
        study_dir: folder in NIH's layout.

    Returns:
        DataFrame, one row an image: `image` (str) and a uint8 column of 0 and 1 for each of `ADJUDICATED`. Empty where
        the study has no such file.

    Raises:
        FileNotFoundError: if the folder is missing.
        ValueError: if a column is missing, an image is listed twice or a label is neither YES nor NO; names the file
            and the row.
    """
    path = open_study(study_dir) / "google2019_nih-chest-xray-labels.csv"
    columns = ["Image Index", *ADJUDICATED]
    table = read_table(path, columns) if path.is_file() else pd.DataFrame(columns=columns, dtype=str)
    refuse_twice(path, table["Image Index"])
    for name in ADJUDICATED:
        parsed = _map_values(path, table[name], lambda text: _choose(text, {"YES": 1, "NO": 0}, "label"))
        table[name] = parsed.astype("uint8")
    return table.rename(columns={"Image Index": "image"}).reset_index(drop=True)


def refuse_twice(path, images):
    """Raises ValueError where a column of image names has one twice; names the file and both rows."""
    twice = images.duplicated()
    if twice.any():
        line = twice.idxmax()
        first = images.eq(images[line]).idxmax()
        raise ValueError(f"{path}, rows {first} and {line}: {images[line]} is listed twice; keep one row")


def read_header(path):
    """Returns the names of a CSV's columns, stripped."""
    return [name.strip() for name in next(csv.reader(io.StringIO(read_text(path), newline="")), [])]


def read_table(path, needed, renamed=None):
    """Reads the needed columns of a CSV as stripped text, indexed by line as a text editor counts."""
    # The csv module keeps the line numbers; pandas would take the files' empty trailing columns for an index.
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    header = [(renamed or {}).get(name.strip(), name.strip()) for name in next(reader, [])]
    missing = [name for name in needed if name not in header]
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(filter(None, header))}")
    positions = [header.index(name) for name in needed]
    lines, columns = [], [[] for _ in needed]  # by column: a list for each row would keep Python's collector busy
    for row in _iterate_rows(path, reader):
        if len(row) <= max(positions):
            raise ValueError(f"{path}, row {reader.line_num}: only {len(row)} fields; is the file cut off?")
        if any(row[len(header) :]):
            raise ValueError(
                f"{path}, row {reader.line_num}: {len(row)} fields, and the header has {len(header)}; put a text with "
                "a comma into quotation marks"
            )
        lines.append(reader.line_num)
        for column, position in zip(columns, positions, strict=True):
            column.append(row[position].strip())
    return pd.DataFrame(dict(enumerate(columns)), index=lines, dtype=str).set_axis(list(needed), axis=1)


def _iterate_rows(path, reader):
    """Yields a CSV's rows that are not empty."""
    try:
        yield from filter(any, reader)
    except csv.Error as error:
        raise ValueError(f"{path}, row {reader.line_num}: {error}; is a quotation mark missing?") from None


def _map_values(path, column, parse):
    """Parses each distinct text once; an error names the file and the first row that holds the text."""
    parsed = {}
    for text in pd.unique(column):
        try:
            parsed[text] = parse(text)
        except ValueError as error:
            line = column.index[(column == text).to_numpy().argmax()]
            raise ValueError(f"{path}, row {line}: {error}") from None
    return pd.Series([parsed[text] for text in column], index=column.index, dtype=None if parsed else str)


def parse_pathology(text):
    """Returns the name in `PATHOLOGIES` of a finding as NIH's files and others spell it; ValueError if unknown."""
    name = _SPELLINGS.get(text.strip().casefold().replace(" ", "_"))
    if name is None:
        known = ", ".join([*PATHOLOGIES, "Infiltrate (for Infiltration)", _NO_FINDING])
        raise ValueError(f"unknown finding {text.strip()!r}; known are {known}")
    return name


def _parse_findings(text):
    parts = [part.strip() for part in text.split("|")]
    found = {parse_pathology(part) for part in parts if part != _NO_FINDING}
    if _NO_FINDING in parts and found:
        raise ValueError(f"{text!r} names a finding beside {_NO_FINDING!r}")
    return found


def _parse_age(text):
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([YMWD]?)", text.upper())
    if match is None:
        return np.nan
    years = float(match[1]) * _YEARS_PER_UNIT[match[2]]
    return years if years <= _MAX_AGE else np.nan


def _parse_number(text):
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)


def _parse_length(text):
    if not re.fullmatch(r"[0-9]+(\.[0-9]*)?(e-?[0-9]+)?", text):
        raise ValueError(f"{text!r} is not a length in pixels")
    return float(text)


def _choose(text, known, what):
    if text.upper() not in known:
        raise ValueError(f"{text!r} is not a {what}; known are {', '.join(known)}")
    return known[text.upper()]
