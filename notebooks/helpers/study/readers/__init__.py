"""Readers of study folders, one module a layout; `load_study` finds the one whose files are there."""

from ..study_folder import open_study
from . import chexpert, class_folders, jsrt, labels_csv, nih, openi, vindr

# In this order: a labels.csv of one's own goes first, and folders of classes last.
_READERS = (labels_csv, nih, chexpert, vindr, openi, jsrt, class_folders)


def load_study(study_dir, uncertain="ignore"):
    """Loads a study by the reader whose files are in the folder.

    Args:
        study_dir: path of the folder, in any layout that docs/your_data.md describes.
        uncertain: what a label of -1, CheXpert's "uncertain", becomes: "ignore" (unknown), "zeros" or "ones".

    Returns:
        A `study.Study`.

    Raises:
        FileNotFoundError: there is no such folder, or no reader knows what is in it.
        ValueError: its files are malformed; names the file, the row and the remedy.
    """
    folder = open_study(study_dir)
    for reader in _READERS:
        if reader.is_here(folder):
            return reader.load(folder, uncertain)
    raise FileNotFoundError(
        f"{study_dir} holds no labels: expected labels.csv with a row an image and a column a finding, or "
        f"{', '.join(reader.FILES for reader in _READERS[1:])}; docs/your_data.md shows each"
    )
