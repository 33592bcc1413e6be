"""NIH ChestX-ray14, and the synthetic study in the same layout: `Data_Entry_2017*.csv`, two lists, boxes.

Wang et al., CVPR 2017. Labels were mined from the radiology reports by a program that errs in about a tenth by NIH's
own estimate; "No Finding" means that none of the 14 was mentioned.
"""

import dataclasses

import numpy as np

from ..labels import COLUMNS, load_boxes, load_metadata
from ..study import Study
from ..study_folder import list_images, list_small_files, load_official_lists

FILES = "NIH's Data_Entry_2017*.csv"
NAME = "NIH ChestX-ray14"

_ABOUT = {
    "name": NAME,
    "labels": "Mined from radiology reports by a program; 0 means that a finding was not mentioned.",
    "not_read": "Lateral images: the data set has none.",
    "source": "https://nihcc.app.box.com/v/ChestXray-NIHCC",
    "terms": "Free use, with the paper cited: Wang et al., CVPR 2017.",
}
_SYNTHETIC = {"name": "Synthetic chest radiographs", "labels": "Those that the images were drawn from."}


def is_here(folder):
    """Returns whether a folder has this layout."""
    return any(path.name.startswith("Data_Entry_2017") for path in list_small_files(folder))


def load(folder, uncertain):  # NIH's labels know no -1
    """Loads the study, see `readers.load_study`; `split` says in which of NIH's lists an image is, if they are here."""
    rows = load_metadata(folder)
    if all((folder / name).is_file() for name in ("train_val_list.txt", "test_list.txt")):
        train_val, test = load_official_lists(folder)
        in_list = np.select([rows["image"].isin(test), rows["image"].isin(train_val)], ["test", "train_val"], "")
        rows.insert(len(COLUMNS), "split", in_list)
    study = Study(folder, "nih", rows.attrs["source"], rows, True, list_images, load_boxes(folder), dict(_ABOUT))
    return dataclasses.replace(study, about=dict(_SYNTHETIC)) if study.is_synthetic else study
