"""Predictions as one table, from any model's CSV, and the leaderboard, which keeps the scores of several runs.

A table of predictions has a row an image: `image`, `patient_id`, `split`, then for each finding of the study
`prob_<Finding>` in [0, 1], then for each `label_<Finding>` of 0, 1 and NaN for unknown, in the study's order, then
`follow_up`, `age`, `sex`, `view`. Here `split` names the subset that an image is in.
"""

import dataclasses
import itertools
import re

import numpy as np
import pandas as pd

from ..runtime.files import as_path, lock_folder, read_csv, write_csv
from ..study.labels import COLUMNS, list_findings, read_header, read_table, refuse_twice
from ..study.splits import assert_no_patient_overlap
from ..study.study_folder import name_some
from .auc import roc_auc

_LABEL_WORDS = {"label", "labels", "true", "truth", "target", "targets", "gt"}  # in names of columns of labels
_SAME_IMAGES = ["study", "split", "part", "images_sha256"]  # must agree for two scores to compare; `part` is the subset


@dataclasses.dataclass(frozen=True)
class JoinReport:
    """Counts how a CSV of predictions and a study's label file match; `unknown` and `unscored` name the first five.

    `n_unknown` images of the CSV are not in the label file and are left out; `n_unscored` images of the study's subsets
    that are scored have no prediction. `n_relabeled` images carry labels in the CSV that differ from the study's; the
    study's labels are used. `notes` are sentences about values that are hardly probabilities.
    """

    n_rows: int
    n_joined: int
    n_unknown: int
    n_unscored: int
    n_relabeled: int
    unknown: tuple[str, ...]
    unscored: tuple[str, ...]
    notes: tuple[str, ...]


def name_columns(findings):
    """Returns the columns of probabilities and those of labels in a table of predictions, two lists."""
    return [f"prob_{name}" for name in findings], [f"label_{name}" for name in findings]


def join_predictions(rows, probs, split):
    """Builds a table of predictions from a study's rows and the probabilities of a model.

    Args:
        rows: DataFrame of metadata as `load_metadata` gives it, one row an image.
        probs: (n, findings) probabilities in [0, 1], in the order of `rows` and of their findings.
        split: (n,) subset of each image.

    Returns:
        DataFrame of predictions, see the module.
    """
    columns = {"image": rows["image"], "patient_id": rows["patient_id"], "split": np.asarray(split)}
    findings = list_findings(rows)
    of_probs, of_labels = name_columns(findings)
    columns |= dict(zip(of_probs, np.asarray(probs, dtype="float64").T, strict=True))
    for column, name in zip(of_labels, findings, strict=True):
        columns[column] = rows[name].astype("float64" if rows[name].isna().any() else "int64")
    return pd.DataFrame(columns | {name: rows[name] for name in COLUMNS[2:]}).reset_index(drop=True)


def load_predictions(path, metadata):
    """Loads the predictions of any model and joins labels, patients and views from the study's metadata.

    The CSV needs a column `image` or `Image Index` and a column of probabilities for each finding of the study, named
    after it, with or without `prob_` or the like; other columns are skipped. Where it has a column `split`, such as
    that of our own predictions.csv, its subsets are kept apart, and of several one must be called "test"; thresholds
    and calibration may be chosen on "val". Subsets are named after the study's own split: `official-test`,
    `official-train_val`, or `mixed` with images of both; two subsets that would get one name keep their own in
    addition, such as `mixed-val` and `mixed-test`. Of a study without a split they keep their names, or are `all`.

    Args:
        path: path of the CSV.
        metadata: DataFrame of the study's images, `Study.rows`.

    Returns:
        Tuple of the DataFrame of predictions, sorted by image, with `attrs["subsets"]`, a dict from the name of each
        subset to what `split` called it ("" without such a column, else "test", "val" or another word), and a
        `JoinReport`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a column is lacking or could be one of several, an image is listed twice or in no subset of the
            study's split, a probability is not a number in [0, 1], a patient is in two subsets, or no image is one of
            the study; names the file, row and column. Or if the values are labels or decisions, see `assert_no_labels`.
    """
    findings = list_findings(metadata)
    probs, _ = name_columns(findings)
    table = read_predictions(path, findings)
    notes = tuple(table.attrs["notes"])
    known = table["image"].isin(metadata["image"])
    if not known.any():
        raise ValueError(
            f"{path}: none of its {len(table)} images, such as {table['image'].iloc[0]}, is in the study's label file; "
            f"images keep the names that they have there, such as {metadata['image'].iloc[0]}"
        )
    unknown = table["image"][~known].tolist()
    table = table[known].sort_values("image")
    rows = metadata.set_index("image").loc[table["image"]].reset_index()
    assert_no_labels(path, rows[[*findings]], table[probs])
    relabeled = _count_relabeled(table, rows, findings)
    own = metadata.get("split", pd.Series("all", metadata.index))
    unlisted = rows["image"][rows["image"].isin(metadata["image"][own.eq("")])].tolist()
    if unlisted:
        raise ValueError(f"{path}: {name_some(unlisted)} in no subset of the study's own split")
    in_test = rows["image"].isin(metadata["image"][own.eq("test")]).to_numpy()
    try:
        assert_no_patient_overlap(rows["patient_id"], table["split"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}; the score of such a subset would be too good") from None
    names = {called: called or "all" for called in pd.unique(table["split"])}
    names = _name_subsets(table["split"], in_test) if "split" in metadata else names
    predictions = join_predictions(rows, table[probs], table["split"].map(names))
    predictions.attrs["subsets"] = {name: called for called, name in names.items()}

    wanted = own.ne("") & own.eq("test").isin(in_test)  # all images of the lists of which some are scored
    unscored = sorted(set(metadata["image"][wanted]) - set(table["image"]))
    counts = len(known), len(table), len(unknown), len(unscored), relabeled
    return predictions, JoinReport(*counts, tuple(unknown[:5]), tuple(unscored[:5]), notes)


def read_predictions(path, findings):
    """Reads and checks a CSV of predictions, without a study.

    Args:
        path: path of the CSV, see `load_predictions`.
        findings: names of the findings.

    Returns:
        DataFrame indexed by the rows of the file as a text editor counts them: `image`, `prob_<Finding>` of all,
        `split` ("test", "val" or another word; "" without such a column) and, as text, the `label_` columns that it
        has. `attrs["notes"]` is a list of sentences about values that are hardly probabilities.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: as for `load_predictions`.
    """
    path = as_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of predictions {path}")
    header = read_header(path)
    if len(header) == 1 and any(sign in header[0] for sign in ";\t"):
        raise ValueError(f"{path}: its columns are not separated by commas; save it as a plain CSV with decimal points")
    images = [name for name in header if name.casefold() in ("image", "image index", "image_index")]
    if not images:
        raise ValueError(
            f"{path} has no column image or Image Index; rename that of the file names. It has "
            f"{', '.join(header) or 'no header'}"
        )
    if len(images) > 1:
        raise ValueError(f"{path} has several columns of image names, {' and '.join(images)}; keep one")
    columns = _find_columns(path, header, findings)
    of_probs, of_labels = name_columns(findings)
    known = {name.casefold(): name for name in ("split", *of_labels)}
    extra = {name: known[name.casefold()] for name in header if name.casefold() in known}
    names = {images[0]: "image"} | {column: f"prob_{name}" for name, column in columns.items()} | extra
    table = read_table(path, list(names)).rename(columns=names)
    if table.empty:
        raise ValueError(f"{path} has a header and no rows")
    refuse_twice(path, table["image"])
    for column in of_probs:
        table[column] = _parse_probs(path, table, column, columns[column.removeprefix("prob_")])
    table["split"] = _parse_split(path, table["split"]) if "split" in table else ""
    table.attrs["notes"] = _check_values(path, table[of_probs].set_axis(list(columns.values()), axis=1))
    return table


def assert_no_labels(path, labels, probs):
    """Raises ValueError where probabilities are so near to the labels that they can only be labels themselves.

    Those of another edition, or with noise, are such: models reach mean AUCs of 0.85 on NIH's labels. Findings with
    fewer than five images of either kind do not count.

    Args:
        path: path of the CSV, for the message.
        labels: (n, findings) of 0, 1 and NaN for unknown.
        probs: (n, findings) probabilities.
    """
    labels, probs = np.asarray(labels), np.asarray(probs)
    aucs = roc_auc(labels, probs)[np.minimum((labels == 1).sum(axis=0), (labels == 0).sum(axis=0)) >= 5]
    if len(aucs) and aucs.mean() > 0.99:
        raise ValueError(
            f"{path}: its probabilities are the study's labels, or nearly: the mean AUC would be {aucs.mean():.4f}. "
            "Give the columns of the model's answers, of a model that was not trained on these images"
        )


def _check_values(path, values):
    """Returns sentences about columns that are hardly probabilities; ValueError if none is."""
    kinds, shown = values.nunique(), values.head(1).to_numpy()
    if values.isin([0, 1]).all(axis=None) or (len(values) >= 10 and kinds.max() <= 2):
        raise ValueError(
            f"{path}: no column has more than two values; the first row has {shown.min():g} and {shown.max():g}. These "
            "are labels, decisions or constants; give the probabilities that the model had before a threshold"
        )
    notes = []
    for number, what in ((1, "one value for all images"), (2, "two values, so decisions or labels")):
        if len(values) >= 10 and (some := list(kinds.index[kinds.eq(number)])):
            notes.append(f"{', '.join(some)}: {what}.")
    if len(values) >= 10 and values.min(axis=None) >= 0.5 and values.max(axis=None) <= 0.7311:
        notes.append("All values are in 0.5 to 0.731, where a sigmoid puts what is a probability already.")
    return notes


def gather_scores(tables):
    """Builds a table of the AUCs of several sources, provided that all were measured on the same split.

    Args:
        tables: dict from a source's name to a DataFrame with `split`, `pathology` and `auc`, one split in each.

    Returns:
        DataFrame indexed by `pathology`, in the order of the first table, a column of AUCs a source.

    Raises:
        ValueError: if the tables name more than one split: such scores cannot be compared.
    """
    splits = {name: sorted(set(table["split"])) for name, table in tables.items()}
    if len({split for names in splits.values() for split in names}) > 1:
        described = "; ".join(f"{name} is on {' and '.join(names)}" for name, names in splits.items())
        raise ValueError(f"scores on different splits cannot be compared in one table: {described}")
    columns = {name: table.set_index("pathology")["auc"] for name, table in tables.items() if len(table)}
    return pd.DataFrame(columns).reindex(next(iter(columns.values())).index if columns else [])


def add_to_leaderboard(path, entry):
    """Adds a run's score to the leaderboard; the same run on the same images replaces its earlier entry.

    Args:
        path: path of the CSV; created if missing, replaced atomically.
        entry: dict with `run`, `study`, `split`, `part`, `images_sha256`, `mean_auc` and any other columns.

    Returns:
        DataFrame of the entries on the same images of the same split, best first: only these can be compared.

    Raises:
        ValueError: if the file lacks one of these columns; nothing is written then.
    """
    path = as_path(path)
    needed = ["run", *_SAME_IMAGES, "mean_auc"]
    # As text: a hash or a run called 007 must come out as it went in.
    kinds = dict.fromkeys(["run", *_SAME_IMAGES], str)
    with lock_folder(path.parent, wait=True):  # runs that end together add theirs one after the other
        entries = read_csv(path, dtype=kinds) if path.exists() else pd.DataFrame(columns=[*entry])
        if lacking := [name for name in needed if name not in entries]:
            raise ValueError(f"{path} lacks {', '.join(lacking)}; move {path} away to begin a new leaderboard")
        new = pd.DataFrame([entry]).astype(kinds)
        same = (entries[["run", *_SAME_IMAGES]] == new[["run", *_SAME_IMAGES]].iloc[0]).all(axis=1)
        kept = entries[~same]
        entries = pd.concat([kept, new], ignore_index=True) if len(kept) else new
        best_first = entries.sort_values("mean_auc", ascending=False)
        entries = best_first.sort_values(_SAME_IMAGES, kind="stable", ignore_index=True)
        write_csv(path, entries, index=False)
    return entries[(entries[_SAME_IMAGES] == new[_SAME_IMAGES].iloc[0]).all(axis=1)].reset_index(drop=True)


def _parse_probs(path, table, column, called):
    values = pd.to_numeric(table[column], errors="coerce")
    bad = ~values.between(0, 1)
    if bad.any():
        line = bad.index[bad.to_numpy().argmax()]
        hint = ""
        if values.notna().all():
            percent = values.min() >= 0 and values.max() <= 100
            hint = "; are these percent?" if percent else "; are these logits? Their sigmoid is a probability"
        raise ValueError(
            f"{path}, row {line} ({table['image'][line]}), column {called}: {table[column][line]!r} is not a "
            f"probability in [0, 1]{hint}"
        )
    return values


def _parse_split(path, split):
    """Returns the subsets under the names "test" and "val" where they go by these or other usual names."""
    usual = {"testing": "test", "official-test": "test", "valid": "val", "validation": "val", "dev": "val"}
    split = split.str.casefold().replace(usual | {"official-train_val": "val"})
    found = pd.unique(split)
    if len(found) > 1 and "test" not in found:
        named = ", ".join(sorted(name or "(empty)" for name in found))
        raise ValueError(
            f"{path}: the column split names {named}; call the subset to be measured test, or omit the column"
        )
    return split


def _find_columns(path, header, findings):
    """Finds the column of each finding among sets of columns, which differ by what their names have beside it.

    Names are compared in any case and spelling: `prob_Mass`, `Mass_pred`, `P(Mass)`. Sets that are called labels do not
    count; of several others, the only one that is called probabilities is taken.
    """
    sets, known = {}, {_split_words(name): name for name in findings}
    if "Infiltration" in findings:
        known.setdefault(("infiltrate",), "Infiltration")  # as NIH's box list has it
    for column in header:
        words = _split_words(column)
        for start, stop in itertools.combinations(range(len(words) + 1), 2):
            if name := known.get(words[start:stop]):
                beside = *words[:start], "X", *words[stop:]
                sets.setdefault(beside, {}).setdefault(name, []).append(column)
    sets = {beside: found for beside, found in sets.items() if not _LABEL_WORDS & {*beside}}
    whole = [beside for beside, found in sets.items() if len(found) == len(findings)]
    named = [beside for beside in whole if any(word.startswith("prob") for word in beside)]
    whole = named if len(named) == 1 else whole
    if len(whole) > 1:
        some = [sets[beside][findings[0]][0] for beside in whole]
        raise ValueError(
            f"{path} has several columns for each finding, such as {' and '.join(some)}; call those with the "
            f"model's probabilities prob_{findings[0]} and so on, or remove the others"
        )
    columns = sets[whole[0]] if whole else max(sets.values(), key=len, default={})
    lacking = [name for name in findings if name not in columns]
    if lacking:
        raise ValueError(
            f"{path} has no probabilities for {', '.join(lacking)}; expected a column for each finding of the study, "
            f"all named like {lacking[0]} or all like prob_{lacking[0]}. It has {', '.join(header)}"
        )
    for name, found in columns.items():
        if len(found) > 1:
            raise ValueError(f"{path}: the columns {' and '.join(found)} both name {name}; keep one")
    return {name: columns[name][0] for name in findings}


def _split_words(text):
    return tuple(re.findall(r"[^\W_]+", text.casefold()))


def _count_relabeled(table, rows, findings):
    differs = np.zeros(len(rows), dtype=bool)
    for name in findings:
        if f"label_{name}" in table:
            given = table[f"label_{name}"].str.casefold().replace({"true": "1", "false": "0"})
            given, own = pd.to_numeric(given, errors="coerce").to_numpy(), rows[name].to_numpy()
            differs |= (given != own) & ~(np.isnan(given) & np.isnan(own))
    return int(differs.sum())


def _name_subsets(split, in_test):
    """Returns a dict from each value of `split` to the name of that subset."""
    names = {}
    for called in pd.unique(split):
        inside = in_test[split.eq(called).to_numpy()]
        names[called] = "official-test" if inside.all() else "mixed" if inside.any() else "official-train_val"
    shared = {name for name in names.values() if list(names.values()).count(name) > 1}
    return {called: f"{name}-{called}" if name in shared else name for called, name in names.items()}
