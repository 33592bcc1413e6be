"""Images of one's own: `labels.csv` with a row an image and a column a finding, if wanted `boxes.csv`, `study.json`.

Packed studies of every layout but NIH's carry their labels in this form.
"""

from ..labels import read_header, read_table
from ..study import ABOUT, BOX_COLUMNS, BOXES, LABELS, make_study, read_about
from ..study_folder import list_image_files

FILES = LABELS


def is_here(folder):
    """Returns whether a folder has this layout."""
    return (folder / LABELS).is_file()


def load(folder, uncertain):
    """Loads the study, see `readers.load_study`.

    `labels.csv` has the column `image`, the path below the folder; if known `patient_id`, `split`, `view`, `sex`, `age`
    (years), `follow_up`; and 1 to 100 other columns, each a finding: 1, 0, empty for unknown, -1 for uncertain.
    `boxes.csv` has `image`, `finding`, `x`, `y`, `width`, `height` in pixels of the image, from its upper left corner.
    `study.json` may hold `name`, `labels`, `source` and `terms`, which the model card shows.
    """
    path = folder / LABELS
    header = read_header(path)
    if "image" not in header:
        raise ValueError(
            f"{path} has no column called image, the path of an image below {folder}: rename it. It has "
            f"{', '.join(header) or 'none'}, and columns are separated by commas"
        )
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise ValueError(f"{path} has the column {twice[0]} twice; remove one")
    table = read_table(path, [name for name in header if name])
    table["image"] = _unify(table["image"])
    about = read_about(folder / ABOUT)
    kind = about.pop("kind", LABELS)
    kind = LABELS if kind == "nih" else kind  # whose files and boxes have another form
    return make_study(
        folder, kind, path, table, lister=list_image_files, boxes=_load_boxes(folder), about=about, uncertain=uncertain
    )


def _load_boxes(folder):
    path = folder / BOXES
    if not path.is_file():
        return None
    header = read_header(path)
    called = "pathology" if "pathology" in header else "finding"
    boxes = read_table(path, [called if name == "pathology" else name for name in BOX_COLUMNS])
    boxes = boxes.rename(columns={called: "pathology"}).assign(image=_unify(boxes["image"]))
    boxes.attrs = {"source": str(path)}
    return boxes


def _unify(images):
    """Returns paths as `list_image_files` writes them."""
    return images.str.replace("\\", "/", regex=False).str.removeprefix("./")
