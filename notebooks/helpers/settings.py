"""What a notebook is told and where it puts things: settings, paths, JSON files and figures."""

import json
from pathlib import Path
from types import SimpleNamespace

from .files import as_path, is_remote, local_draft, read_text, write_csv, write_text

ROOT = Path(__file__).resolve().parents[2]  # of the repository


def choose_settings(settings, *choices):
    """Picks the values of settings that differ by profile or recipe, such as `SIDE = {"quick": 88, "full": 256}`.

    Args:
        settings: dict name -> value, such as `globals()`; of it, names in capitals with a dict as value are looked at.
        *choices: the choices made, such as "quick" and "ours". Dicts may be nested.

    Returns:
        Dict of those names to their chosen values.

    Raises:
        ValueError: a setting has no value for any of the choices.
    """
    chosen = {}
    for name, value in settings.items():
        if not name.isupper() or not isinstance(value, dict):
            continue
        while isinstance(value, dict):
            keys = [choice for choice in choices if choice in value]
            if not keys:
                raise ValueError(f"{name} has values for {list(value)}, but chosen are {list(choices)}.")
            value = value[keys[0]]
        chosen[name] = value
    return chosen


def resolve_path(path):
    """Returns a setting as an absolute path: relative ones start at the repository's root, `~` is home.

    A path in a bucket, `gs://`, is absolute as it is, see `files.as_path`.
    """
    return as_path(path) if is_remote(path) else (ROOT / Path(path).expanduser()).resolve()


def resolve_paths(data_dir, run_dir, packed_dir, split, profile, attached="/kaggle/input"):
    """Turns the path settings of the notebooks into paths; relative ones are relative to the repository's root.

    A packed study is enough to train and evaluate on: it is looked for where Kaggle attaches data sets if no other one
    is named or at its usual place, and its copies of the label files serve where the study itself is not there.

    Args:
        data_dir: folder of a study in NIH layout; only the synthetic study is ever written to.
        run_dir: folder of one training run; made if missing.
        packed_dir: folder of the packed study; empty for `data/packed/<study>-<split>-<profile>`.
        split: name of the split.
        profile: name of the profile.
        attached: folder below which packed studies of that split are recognized by their manifest; None for a study
            that is still to be packed.

    Returns:
        A namespace with the paths `study`, `packed`, `run`, and `name`, that of the study.

    Raises:
        ValueError: several packed studies could be meant.
    """
    study, run = resolve_path(data_dir), resolve_path(run_dir)
    run.mkdir(parents=True, exist_ok=True)
    packed, name = resolve_path(packed_dir or f"data/packed/{study.name}-{split}-{profile}"), study.name
    if attached is None:
        return SimpleNamespace(study=study, packed=packed, run=run, name=name)
    is_missing = not study.is_dir()
    if not packed_dir and not packed.is_dir() and as_path(attached).is_dir():
        packed = _choose_packed(attached, split, packed, None if is_missing else name)
    if is_missing and (packed / "study").is_dir() and (packed / "manifest.json").is_file():
        study, name = packed / "study", read_json(packed / "manifest.json")["name"]
    return SimpleNamespace(study=study, packed=packed, run=run, name=name)


def _choose_packed(attached, split, usual, name):
    """Returns the folder of the one packed study of a split, and of a name unless that is None; else the usual one."""
    from .packed import find_packed_studies  # not above: TensorFlow comes with it

    found = [path for path, called in find_packed_studies(attached, split).items() if name in (None, called)]
    if len(found) > 1:
        raise ValueError(f"Several packed studies fit: {', '.join(map(str, found))}. Set PACKED_DIR to one of them.")
    return found[0] if found else usual


def read_json(path):
    """Returns the content of a JSON file."""
    return json.loads(read_text(path))


def write_json(path, content):
    """Writes JSON, see `files.write_text`; what cannot be written leaves the file as it was."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def save_figure(figure, run_dir, name, table=None):
    """Writes `figures/<name>.png` and, beside it, the CSV of the numbers that it shows.

    Args:
        figure: matplotlib figure.
        run_dir: path of the run's folder.
        name: file name without its ending.
        table: pandas.DataFrame behind the figure; None where the figure shows films.
    """
    folder = as_path(run_dir) / "figures"
    with local_draft(folder / f"{name}.png") as draft:
        figure.savefig(draft, dpi=150, bbox_inches="tight")
    if table is not None:
        write_csv(folder / f"{name}.csv", table, index=False)
