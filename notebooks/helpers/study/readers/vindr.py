"""VinDr-CXR: PhysioNet's `image_labels_train.csv`, `annotations_train.csv` and the like, or Kaggle's `train.csv`.

Nguyen et al., Scientific Data 9:429, 2022. Three radiologists read each training image by themselves, five agreed on
each test image. An image has a finding here if most of them saw it (two of three); of a finding that it has, the boxes
of all of them are kept. Columns: physionet.org/content/vindr-cxr/1.0.0; those of Kaggle's edition, which has 14 of the
27 findings and no labels of its test images: kaggle.com/c/vinbigdata-chest-xray-abnormalities-detection/data.
"""

import pandas as pd

from ..labels import read_header, read_table
from ..study import check_boxes, make_study
from ..study_folder import list_named_images

FILES = "VinDr-CXR's image_labels_train.csv or Kaggle's train.csv"

_CORNERS = ["x_min", "y_min", "x_max", "y_max"]
_KAGGLE = ["image_id", "class_name", "rad_id", *_CORNERS]
_NO_FINDING = "No finding"
_SPELLINGS = {"Nodule/Mass": "Nodule or mass", "Other disease": "Other diseases"}  # the second is the test file's
_ABOUT = {
    "name": "VinDr-CXR",
    "labels": "Training images: what most of three radiologists saw, each by themselves. Test images: the consensus of "
    "five radiologists.",
    "not_read": "Who saw what where they differ; age and sex in the DICOM files; boxes of images of another "
    "format, as boxes are in the DICOM files' pixels. Patients are not known.",
    "source": "https://physionet.org/content/vindr-cxr/1.0.0/",
    "terms": "PhysioNet's credentialed health data license 1.5.0, after a course and a signed agreement. Cite Nguyen "
    "et al., Scientific Data 2022.",
}


def is_here(folder):
    """Returns whether a folder has this layout."""
    paths = [*_find(folder, "image_labels_*.csv"), folder / "train.csv"]
    headers = [{*read_header(path)} for path in paths if path.is_file()]
    # The data set of children's radiographs, VinDr-PCXR, has files of the same names and other findings.
    return any(header >= {"image_id", "Aortic enlargement"} or header >= {*_KAGGLE} for header in headers)


def load(folder, uncertain):  # labels know no -1
    """Loads the study, see `readers.load_study`; images are named by `image_id`, without folder and ending."""
    paths = _find(folder, "image_labels_*.csv") or [folder / "train.csv"]
    labels = pd.concat([_vote(path) for path in paths])
    findings = [name for name in labels if name not in ("image", "split")]
    files = _find(folder, "annotations_*.csv") or [path for path in paths if path.name == "train.csv"]
    boxes = pd.concat([_read_boxes(path, findings) for path in files]) if files else None
    if boxes is not None:
        seen = labels.melt("image", findings, "pathology").query("value == True")
        others = {image for image, path in _list_images(folder).items() if not path.name.endswith((".dicom", ".dcm"))}
        boxes = boxes[~boxes["image"].isin(others)].merge(seen[["image", "pathology"]])
    texts = labels[findings].map(lambda value: "" if pd.isna(value) else str(int(value)))
    table = pd.concat([labels.drop(columns=findings).assign(view="PA"), texts], axis=1)
    return make_study(folder, "vindr", paths[0], table, lister=_list_images, boxes=boxes, about=_ABOUT)


def _find(folder, pattern):
    """Returns the sorted paths of some files, which PhysioNet has in `annotations/` and copies beside the images."""
    return sorted(folder.glob(f"annotations/{pattern}"), reverse=True) or sorted(folder.glob(pattern), reverse=True)


def _list_images(folder):
    return list_named_images(folder, lambda path: path.stem)


def _vote(path):
    """Returns a row an image: `image`, PhysioNet's `split`, and whether most radiologists saw each finding."""
    header = read_header(path)
    if path.name == "train.csv":
        table = read_table(path, _KAGGLE).replace({"class_name": _SPELLINGS})
        seen = pd.crosstab(table["image_id"], table["class_name"], table["rad_id"], aggfunc="nunique").fillna(0)
        share = seen.div(table.groupby("image_id")["rad_id"].nunique(), axis=0)
    else:
        findings = [name for name in header if name not in ("image_id", "rad_id", "")]
        table = read_table(path, ["image_id", *findings]).rename(columns=_SPELLINGS)
        marks = table.drop(columns="image_id")
        bad = ~marks.isin(["0", "1", "0.0", "1.0", ""])
        if bad.any(axis=None):
            line = bad.any(axis=1).idxmax()
            name = bad.loc[line].idxmax()
            raise ValueError(f"{path}, row {line}: {marks.loc[line, name]!r} in the column {name!r} is not 0 or 1")
        share = marks.isin(["1", "1.0"]).groupby(table["image_id"]).mean()
    lines = table.reset_index().groupby("image_id")["index"].first()
    votes = share.gt(0.5).drop(columns=_NO_FINDING, errors="ignore").reset_index(names="image")
    if path.name != "train.csv":
        votes.insert(1, "split", "test" if path.name.endswith("_test.csv") else "train")
    return votes.set_axis([f"{line} of {path.name}" for line in lines[votes["image"]]])


def _read_boxes(path, findings):
    table = read_table(path, ["image_id", "class_name", *_CORNERS]).replace({"class_name": _SPELLINGS})
    table = table[table["class_name"].ne(_NO_FINDING)]
    left, top, right, bottom = (pd.to_numeric(table[name], errors="coerce") for name in _CORNERS)
    corners = {"x": left, "y": top, "width": right - left, "height": bottom - top}
    boxes = pd.DataFrame({"image": table["image_id"], "pathology": table["class_name"], **corners})
    boxes.attrs = {"source": str(path)}
    return check_boxes(boxes, findings)
