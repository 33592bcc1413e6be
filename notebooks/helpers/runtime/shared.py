"""The settings that several notebooks share: given once, recorded in the run's folder, found by the other notebooks."""

import ast
import json
import os
import shutil
from pathlib import Path

from .files import as_path, is_remote
from .settings import ROOT, SETTINGS, check_settings, read_json, resolve_path, write_json

SHARED = {
    "DATA_DIR": "data/phantom",
    "RUN_DIR": "models/densenet121",
    "PACKED_DIR": "",
    "PROFILE": "quick",
    "SPLIT": "official",
    "UNCERTAIN": "ignore",
}
MACHINE = {"CHECKPOINT_DIR": "", "REPLICAS": 0, "VERBOSE": 1}  # in no notebook's form, and not recorded
RECORD = "settings.json"  # in RUN_DIR
PLACES = {  # where runs are kept; notebook 00 offers them
    "this machine": str(ROOT / "models"),
    "Drive": "/content/drive/MyDrive/chest-xray",
    "Kaggle output": "/kaggle/working/chest-xray",
}
DRIVE = "/content/drive"
ATTACHED = "/kaggle/input"  # read-only; holds the output of earlier sessions
SESSION_HOURS = 9  # of a Kaggle session with a TPU, the shortest


def share_settings(given, places=tuple(PLACES.values()), attached=ATTACHED):
    """Completes a notebook's settings with those that it shares with the others, and checks them.

    What is given counts. What is not, is what notebook 1 or 2 recorded in RUN_DIR, else the default. Without a RUN_DIR,
    the run that was worked on last is taken; if there is none, the newest that is attached is copied first.

    Args:
        given: dict name -> value, such as `globals()`; names that are not in `SETTINGS` are left out.
        places: folders that hold runs.
        attached: folder below which earlier sessions' output is attached, read-only.

    Returns:
        Dict name -> value, see `check_settings`, and a sentence that says where the shared ones come from.

    Raises:
        ValueError: see `check_settings`.
    """
    given = {name: given[name] for name in SETTINGS if name in given}
    runs = [] if given.get("RUN_DIR") else find_runs(places) or restore_attached(places[0], attached)
    run_dir = given.get("RUN_DIR") or (_shorten(runs[0]) if runs else SHARED["RUN_DIR"])
    check_settings({"RUN_DIR": run_dir})
    wanted = {name: value for name, value in given.items() if name not in SHARED or value not in ("", None)}
    recalled, source = recall_shared(resolve_path(run_dir), wanted)
    settings = check_settings(MACHINE | SHARED | recalled | wanted | {"RUN_DIR": run_dir})
    if not settings["CHECKPOINT_DIR"] and str(resolve_path(run_dir)).startswith(f"{DRIVE}/"):
        settings["CHECKPOINT_DIR"] = "/content/checkpoints"  # a mount that drops then costs a copy, not the training
    text = f"Run {settings['RUN_DIR']}" + (f", the last of {len(runs)} found" if len(runs) > 1 else "")
    text += f"; {', '.join(sorted(recalled))} as in its {source}" if recalled else ""
    named = ", ".join(f"{name} {settings[name]}" for name in ("DATA_DIR", "PROFILE", "SPLIT"))
    return settings, f"{text}: {named}."


def read_form(path):
    """Returns the settings in the form of the notebook at a path; those that differ by profile are dicts."""
    cells = read_json(path)["cells"]
    source = next("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(source).body}


def record_shared(settings, replace=True):
    """Writes the shared settings to RUN_DIR, for the other notebooks.

    Args:
        settings: dict of `share_settings`.
        replace: whether to replace an earlier record.
    """
    run_dir = resolve_path(settings["RUN_DIR"])
    if replace or not (run_dir / RECORD).exists():
        write_json(run_dir / RECORD, {name: settings[name] for name in SHARED if name != "RUN_DIR"})


def recall_shared(run_dir, given):
    """Reads the shared settings of a run that are not given; a run of an older version has them in its `run.json`.

    A folder of packed images is left out where it is gone, as it may be attached elsewhere, and where the settings that
    are given ask for another one.

    Args:
        run_dir: path of the run's folder, which may be missing.
        given: dict name -> value.

    Returns:
        Dict name -> value, empty where nothing is recorded, and the name of the file.
    """
    run_dir = as_path(run_dir)
    for name in (RECORD, "run.json"):
        if not (run_dir / name).exists():
            continue
        content = read_json(run_dir / name)
        content = content if name == RECORD else content.get("settings", {})
        found = {key: content[key] for key in SHARED if key != "RUN_DIR" and content.get(key)}
        is_other = any(given.get(key, value) != value for key, value in found.items())
        if "PACKED_DIR" in found and (is_other or not resolve_path(found["PACKED_DIR"]).exists()):
            del found["PACKED_DIR"]
        return {key: value for key, value in found.items() if key not in given}, name
    return {}, ""


def find_runs(places):
    """Finds the folders of runs directly below some folders; the one that was worked on last comes first."""
    times = {}
    for place in filter(os.path.isdir, places):
        for name in (RECORD, "run.json"):
            for path in Path(place).glob(f"*/{name}"):
                if path.parent.name.startswith("part-"):  # an interrupted copy of `restore_attached`
                    continue
                times[path.parent] = max(path.stat().st_mtime, times.get(path.parent, 0))
    return sorted(times, key=times.get, reverse=True)


def restore_attached(place, attached=ATTACHED, name=None):
    """Copies the newest run in the attached output of an earlier session to a folder that can be written to.

    Args:
        place: path of the folder that gets the run.
        attached: path of the folder with what is attached.
        name: of the run; None for any.

    Returns:
        List with the path of the copy; empty where no run is attached.
    """
    found = [folder for folder in _find_records(attached) if name in (None, folder.name)]
    if not found:
        return []
    source = max(found, key=lambda folder: (folder / RECORD).stat().st_mtime)
    target, draft = Path(place) / source.name, Path(place) / f"part-{source.name}"
    if not target.exists():
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(source, draft)
        for path in (draft, *draft.rglob("*")):
            path.chmod(path.stat().st_mode | 0o600)  # of a read-only mount
        draft.rename(target)  # whole, or not under its name
    return [target]


def find_attached_packed(name, attached=ATTACHED):
    """Finds packed images of an earlier session by their folder's name; "" where none are attached."""
    found = [path for path in _walk(attached) if path.name == name and (path / "manifest.json").exists()]
    return str(found[0]) if found else ""


def hours_left():
    """Returns the hours of this Kaggle session that are left for training, 0.0 elsewhere.

    The session is as old as the machine's first process; half an hour is kept for the notebooks after the training.
    """
    if not os.environ.get("KAGGLE_KERNEL_RUN_TYPE"):
        return 0.0
    started = int(Path("/proc/1/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    age = float(Path("/proc/uptime").read_text().split()[0]) - started  # seconds
    return max(0.1, SESSION_HOURS - age / 3600 - 0.5)


def _find_records(attached):
    for folder in _walk(attached):
        try:
            if json.loads((folder / RECORD).read_text()).keys() >= {"DATA_DIR", "SPLIT"}:
                yield folder
        except (OSError, ValueError, AttributeError):  # no such file, or another program's
            continue


def _walk(attached):
    for place, folders, _ in os.walk(attached):
        folder = Path(place)
        yield folder
        deep = len(folder.relative_to(attached).parts) >= 8
        folders[:] = [] if deep else [name for name in folders if not name.startswith(("images", "."))]


def _shorten(path):
    return str(path.relative_to(ROOT)) if not is_remote(path) and path.is_relative_to(ROOT) else str(path)
