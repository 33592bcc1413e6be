"""Settings of a notebook, its paths, JSON files and figures."""

import json
from pathlib import Path

from .files import as_path, is_remote, local_draft, read_text, write_csv, write_text

ROOT = Path(__file__).resolve().parents[3]  # the repository's root


def choose_settings(settings, *choices):
    """Picks the values of settings that differ by profile or recipe, such as `SIDE = {"quick": 88, "full": 256}`.

    Args:
        settings: dict name -> value, such as `globals()`; only names in capitals with a dict as value are used.
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


def read_json(path):
    """Returns the content of a JSON file."""
    return json.loads(read_text(path))


def write_json(path, content):
    """Writes JSON, see `files.write_text`; if the content cannot be written, the file stays as it was."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def save_figure(figure, run_dir, name, table=None):
    """Writes `figures/<name>.png` and, beside it, the CSV of the numbers that it shows.

    Args:
        figure: matplotlib figure.
        run_dir: path of the run's folder.
        name: file name without its extension.
        table: pandas.DataFrame behind the figure; None where the figure shows images.
    """
    folder = as_path(run_dir) / "figures"
    with local_draft(folder / f"{name}.png") as draft:
        figure.savefig(draft, dpi=150, bbox_inches="tight")
    if table is not None:
        write_csv(folder / f"{name}.csv", table, index=False)
