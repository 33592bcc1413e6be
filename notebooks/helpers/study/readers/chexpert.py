"""CheXpert (Stanford), as CheXpert-v1.0 or CheXpert-v1.0-small unpacks: `train.csv`, `valid.csv`, and their folders.

Irvin et al., AAAI 2019 (arXiv:1901.07031). A program labeled the reports of `train.csv`: 1 positive, 0 negative, -1
uncertain, and nothing where the report does not mention a finding. That becomes 0 here, as in NIH's labels and in the
programs that others train by (such as github.com/jfhealthcare/Chexpert): reports seldom list what is absent, so that
of the reports with a label for most findings nearly all are positive. Columns are those of the two files' headers.
"""

import pandas as pd

from ..labels import read_header, read_table
from ..study import make_study
from ..study_folder import list_image_files

FILES = "CheXpert's train.csv"

_SUBSETS = {"train.csv": "train", "valid.csv": "test"}
_FACTS = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA"]
_ABOUT = {
    "name": "CheXpert",
    "labels": "Training images: mined from radiology reports by a program; 0 means negative or not mentioned. Test "
    "images: the consensus of three radiologists who saw the images.",
    "not_read": "Lateral images, the order of a patient's studies, and the column No Finding.",
    "source": "https://aimi.stanford.edu/datasets/chexpert-chest-x-rays",
    "terms": "Stanford's research use agreement: no commercial use, not to be passed on. Cite Irvin et al., AAAI 2019.",
}


def is_here(folder):
    """Returns whether a folder has this layout."""
    paths = [folder / name for name in _SUBSETS if (folder / name).is_file()]
    return any({*_FACTS} <= {*read_header(path)} for path in paths)


def load(folder, uncertain):
    """Loads the study, see `readers.load_study`; `valid.csv`, which radiologists labeled, is the split's test."""
    paths = [folder / name for name in _SUBSETS if (folder / name).is_file()]
    table = pd.concat([_read_frontal(path) for path in paths])
    return make_study(folder, "chexpert", paths[0], table, lister=_list_frontal, about=_ABOUT, uncertain=uncertain)


def _read_frontal(path):
    findings = [name for name in read_header(path) if name not in (*_FACTS, "No Finding", "")]
    table = read_table(path, [*_FACTS, *findings])
    table = table[table["Frontal/Lateral"].eq("Frontal")]
    table = table.set_axis([f"{line} of {path.name}" for line in table.index])
    patients = table["Path"].str.extract(r"/patient(\d+)/", expand=False)
    if patients.isna().any():
        line = patients.isna().idxmax()
        raise ValueError(f"{path}, row {line}: {table.loc[line, 'Path']!r} names no folder such as patient00001")
    facts = {
        "image": table["Path"].str.replace("^CheXpert[^/]*/", "", regex=True),  # the folder that the archive unpacks to
        "patient_id": patients,
        "split": _SUBSETS[path.name],
        "view": table["AP/PA"].where(table["AP/PA"].isin(["AP", "PA"]), ""),  # a few frontal images say LL or RL
        "sex": table["Sex"],
        "age": table["Age"],
    }
    return pd.concat([pd.DataFrame(facts), table[findings].replace("", "0")], axis=1)


def _list_frontal(folder):
    return {name: path for name, path in list_image_files(folder).items() if "_lateral." not in name}
