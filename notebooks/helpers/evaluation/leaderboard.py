"""Keeps the scores of several runs in one file, and scores on different splits out of one table."""

import pandas as pd

from ..runtime.files import as_path, read_csv, write_csv

_KEYS = ["study", "split", "part", "images_sha256"]  # what must agree for two scores to compare


def gather_scores(tables):
    """Puts the AUCs of several sources side by side, provided that all were measured on the same split.

    Args:
        tables: dict from a source's name to a DataFrame with `split`, `pathology` and `auc`, one split in each.

    Returns:
        DataFrame indexed by `pathology`, in the order of the first table, a column of AUCs a source.

    Raises:
        ValueError: if the tables name more than one split: such scores do not compare.
    """
    splits = {name: sorted(set(table["split"])) for name, table in tables.items()}
    if len({split for names in splits.values() for split in names}) > 1:
        described = "; ".join(f"{name} is on {' and '.join(names)}" for name, names in splits.items())
        raise ValueError(f"scores on different splits do not compare and are refused in one table: {described}")
    columns = {name: table.set_index("pathology")["auc"] for name, table in tables.items() if len(table)}
    return pd.DataFrame(columns).reindex(next(iter(columns.values())).index if columns else [])


def add_to_leaderboard(path, entry):
    """Enters a run's score in the ledger; the same run on the same images replaces its earlier entry.

    Args:
        path: path of the CSV; made if missing, replaced atomically.
        entry: dict with `run`, `study`, `split`, `part`, `images_sha256`, `mean_auc` and whatever else belongs to it.

    Returns:
        DataFrame of the entries on the same images of the same split, best first: nothing else compares.

    Raises:
        ValueError: if the entry or the file lacks one of these columns; nothing is written then.
    """
    path = as_path(path)
    needed = ["run", *_KEYS, "mean_auc"]
    # As text: a hash or a run called 007 must come out as it went in.
    kinds = dict.fromkeys(["run", *_KEYS], str)
    entries = read_csv(path, dtype=kinds) if path.exists() else pd.DataFrame(columns=[*entry])
    for held, what in ((entry, "the entry"), (entries, str(path))):
        lacking = [name for name in needed if name not in held]
        if lacking:
            raise ValueError(f"{what} lacks {', '.join(lacking)}; move {path} away to begin a new ledger")
    new = pd.DataFrame([entry]).astype(kinds)
    same = (entries[["run", *_KEYS]] == new[["run", *_KEYS]].iloc[0]).all(axis=1)
    kept = entries[~same]
    entries = pd.concat([kept, new], ignore_index=True) if len(kept) else new
    entries = entries.sort_values([*_KEYS, "mean_auc"], ascending=[True] * len(_KEYS) + [False], ignore_index=True)
    write_csv(path, entries, index=False)
    return entries[(entries[_KEYS] == new[_KEYS].iloc[0]).all(axis=1)].reset_index(drop=True)
