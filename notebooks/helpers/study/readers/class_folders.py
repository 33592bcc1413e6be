"""A folder a class: `normal/` and `nodule/`, or any other names; the images lie in them, not in folders below.

Folders called normal, no finding, negative or healthy hold images without any finding; each other folder is a finding,
which the images in it have and all others have not. `train/`, `val/` and `test/` above the classes are the study's own
split, which is how Kaggle's chest_xray (pneumonia of children; Kermany et al., Cell 2018) comes.
"""

import re

import pandas as pd

from ..labels import _BESIDE, COLUMNS
from ..study import ABOUT, OWN_SPLITS, make_study, read_about
from ..study_folder import is_image, list_image_files

FILES = "a folder a class, such as normal/ and nodule/"

_NORMAL = {"normal", "no finding", "no findings", "nofinding", "negative", "healthy"}
_ABOUT = {
    "labels": "The folder that an image lies in; 0 means that it lies in another one.",
    "not_read": "Images outside the folders of the classes. Patients, view, sex and age are not known.",
}


def is_here(folder):
    """Returns whether a folder has this layout: two folders of classes or more, with images, and no table of labels."""
    entries = list(folder.iterdir())
    if any(path.suffix.casefold() in (".csv", ".tsv", ".xlsx") for path in entries):  # labels under another name
        return False
    classes = [path for path in entries if path.is_dir()]
    splits = [path for path in classes if path.name.casefold() in OWN_SPLITS]
    if splits:
        classes = [path for split in splits for path in split.iterdir() if path.is_dir()]
    held = {path.name.casefold() for path in classes if any(is_image(file.name) for file in path.iterdir())}
    return len([name for name in held if not name.startswith("images")]) > 1  # NIH's are in images_001 and so on


def load(folder, uncertain):  # labels know no -1
    """Loads the study, see `readers.load_study`; `study.json` may say name, source and terms."""
    images = _list_classes(folder)
    table = pd.DataFrame({"image": images})
    if images[0].count("/") == 2:
        table["split"] = [image.split("/")[0] for image in images]
    lies_in = pd.Series([image.split("/")[-2] for image in images])
    spellings = {name.casefold(): name for name in lies_in}  # the same class may be Nodule here and nodule there
    for name in sorted(spellings.keys() - {name for name in spellings if re.sub("[ _-]+", " ", name) in _NORMAL}):
        if name in {*COLUMNS, *_BESIDE}:
            raise ValueError(f"{folder}: {name!r} cannot be the name of a finding; rename the folder")
        table[spellings[name]] = lies_in.str.casefold().eq(name).map({True: "1", False: "0"})
    about = {"name": folder.name, **_ABOUT, **read_about(folder / ABOUT)}
    return make_study(folder, "class folders", folder, table, lister=list_image_files, about=about)


def _list_classes(folder):
    """Returns the names of the images that lie in a folder of a class; others are reported as images without a row."""
    names = [name.split("/") for name in list_image_files(folder)]
    has_splits = any(name[0].casefold() in OWN_SPLITS for name in names if len(name) == 3)
    fits = (len(name) == 3 and name[0].casefold() in OWN_SPLITS if has_splits else len(name) == 2 for name in names)
    return ["/".join(name) for name, fit in zip(names, fits, strict=True) if fit]
