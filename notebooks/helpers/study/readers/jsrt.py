"""Images of the Japanese Society of Radiological Technology: 154 with one nodule, 93 without.

Shiraishi et al., AJR 2000; 174: 71-74. `jsrt_metadata.csv` has a row an image: `study_id`, the file name; `size`, the
nodule's diameter in mm; `x` and `y`, its center in pixels of 2048; all three empty without a nodule; and if known `age`
and `gender`. The nodule's box is the square around its center whose side is the diameter.
"""

import numpy as np
import pandas as pd
from PIL import Image

from ..labels import read_header, read_table
from ..study import make_study
from ..study_folder import list_named_images

FILES = "jsrt_metadata.csv"

_FRAME = 2048  # pixels a side of the images that positions refer to (Shiraishi et al.)
_PIXEL = 0.175  # mm (same source)
_ABOUT = {
    "name": "JSRT",
    "labels": "One nodule that CT confirmed, or none.",
    "not_read": "How subtle a nodule is, its diagnosis and its place in words.",
    "source": "http://db.jsrt.or.jp/eng.php",
    "terms": "For research, from the society. Cite Shiraishi et al., AJR 2000; 174: 71-74.",
}


def is_here(folder):
    """Returns whether a folder has this layout."""
    return (folder / FILES).is_file()


def load(folder, uncertain):  # labels know no -1
    """Loads the study, see `readers.load_study`; images are named by file, and every one is of another patient."""
    path = folder / FILES
    facts = [name for name in ("age", "gender") if name in read_header(path)]
    table = read_table(path, ["study_id", "size", "x", "y", *facts]).rename(
        columns={"study_id": "image", "gender": "sex"}
    )
    given = table[["size", "x", "y"]]
    numbers = given.apply(pd.to_numeric, errors="coerce")
    # Without its x a nodule would count as a normal image, without its size its box would be empty.
    unclear = (numbers.isna() & given.ne("")).any(axis=1) | (numbers.isna().any(axis=1) & given.ne("").any(axis=1))
    outside = ~(numbers[["x", "y"]].ge(0) & numbers[["x", "y"]].lt(_FRAME)).all(axis=1) | numbers["size"].le(0)
    for line in table.index[unclear | (outside & given["x"].ne(""))][:1]:
        found = ", ".join(f"{name} {value!r}" for name, value in given.loc[line].items())
        raise ValueError(
            f"{path}, row {line}: {found}; expected three numbers, x and y below {_FRAME}, or nothing without a nodule"
        )
    has_nodule = given["x"].ne("")
    table = table.drop(columns=["size", "x", "y"]).assign(
        patient_id=table["image"], Nodule=has_nodule.map({True: "1", False: "0"})
    )
    if "age" in table:
        table["age"] = table["age"].where(table["age"].str.fullmatch(r"\d+"), "")
    boxes = _make_boxes(table["image"][has_nodule], numbers[has_nodule], _list_images(folder))
    return make_study(folder, "jsrt", path, table, lister=_list_images, boxes=boxes, about=_ABOUT)


def _list_images(folder):
    return list_named_images(folder / "images")  # beside which masks of the same names may lie


def _make_boxes(images, nodules, paths):
    """Returns the nodules' boxes in pixels of the files, none for a file that is missing or no image."""
    radius = nodules["size"] / _PIXEL / 2
    boxes = pd.DataFrame({"image": images, "pathology": "Nodule"})
    scale = images.map(paths).map(_measure_side, na_action="ignore").astype("float64") / _FRAME
    for axis, length in (("x", "width"), ("y", "height")):
        low, high = (np.clip(nodules[axis] + sign * radius, 0, _FRAME) for sign in (-1, 1))
        boxes[axis], boxes[length] = scale * low, scale * (high - low)
    return boxes[scale.notna()]


def _measure_side(path):
    try:
        with path.open("rb") as file, Image.open(file) as image:
            return image.width
    except OSError:  # packing will say why
        return np.nan
