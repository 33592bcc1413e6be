"""Gathers what a run gives away into one folder for the Hugging Face Hub, and checks such a folder before it goes out.

Only files on a list are taken, and a folder with any other is refused: predictions name patients' images, and a run's
folder holds paths of the machine. Nothing here uploads.
"""

import json
import os
import shutil
import zipfile

from ..runtime.files import as_path, hash_file, is_remote, remove_folder, write_text
from ..runtime.settings import ROOT, read_json, write_json
from .model_card import FIGURES, fill_model_card, hide_paths, measured_aucs, title_of
from .release_checks import CHECKS

_PLAIN = ("model.weights.h5", "exports/model.onnx", "exports/model.tflite", "exports/model_int8.tflite")
_TABLES = ("aucs.csv", "localization.csv", "exports/golden.png", *FIGURES)
_TEXTS = ("run.json", "thresholds.json", "exports/parity.json", "exports/golden.json")  # may name folders


def gather_release(run_dir, folder=None, license_id="apache-2.0"):
    """Gathers what a run has of a release, anew; what is missing is for `check_release` to say.

    Weights and models are hard links where the disk allows it, so they take no space twice.

    Args:
        run_dir: path of the run's folder, on a disk of this machine.
        folder: path of the folder to write; `hub` in the run's folder by default. An earlier release in it is replaced.
        license_id: license of the weights, by its name on the Hugging Face Hub.

    Returns:
        Path of the folder.

    Raises:
        FileNotFoundError: the run has no run.json or aucs.csv; names the notebook that writes it.
        FileExistsError: the folder holds something else than an earlier release.
        ValueError: the run lies in a bucket.
    """
    if is_remote(run_dir):
        raise ValueError(f"{run_dir} lies in a bucket. Copy it to a local folder and gather from there.")
    run_dir = as_path(run_dir)
    folder = as_path(folder or run_dir / "hub")
    card = fill_model_card(run_dir, license_id)
    is_ours = folder == run_dir / "hub" or not folder.exists() or (folder / "SHA256SUMS").exists()
    if not is_ours and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds other files than a release. Choose another folder, or empty it.")
    remove_folder(folder)
    write_text(folder / "README.md", card)
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    for name in filter(lambda name: (run_dir / name).exists(), _TEXTS):
        write_json(folder / name, hide_paths(read_json(run_dir / name)))
    saved_model = (path for path in (run_dir / "saved_model").rglob("*") if path.is_file())
    names = [*_PLAIN, *_TABLES, *(path.relative_to(run_dir).as_posix() for path in saved_model)]
    for name in filter(lambda name: (run_dir / name).exists(), names):
        _link(run_dir / name, folder / name)
    if (run_dir / "model.keras").exists():  # beside model.weights.h5, it lets Keras load the folder as a model
        with zipfile.ZipFile(run_dir / "model.keras") as archive:
            (folder / "config.json").write_bytes(archive.read("config.json"))
    write_json(folder / "metadata.json", _describe(run_dir))
    write_text(folder / "SHA256SUMS", write_sums(folder))
    return folder


def write_sums(folder):
    """Returns the SHA-256 of all files of a folder but SHA256SUMS, in the form that `sha256sum -c` reads."""
    files = sorted(path for path in as_path(folder).rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    return "".join(f"{hash_file(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)


def inspect_release(folder):
    """Checks a release point by point.

    Args:
        folder: path of a folder of `gather_release`.

    Returns:
        Dict from what is checked, in words, to the list of problems, each with its remedy.
    """
    folder = as_path(folder)
    problems = {}
    for what, check in CHECKS.items():
        try:
            problems[what] = check(folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            # A file that others lean on is missing or malformed; the release is not complete either way.
            name = error.filename if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            problems[what] = [f"cannot be checked: {name}. Gather anew: make publish-check"]
    return problems


def check_release(folder):
    """Returns the problems of a release, each with its remedy; an empty list if it is complete."""
    return [problem for problems in inspect_release(folder).values() for problem in problems]


def _link(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(source, target)


def _describe(run_dir):
    run = hide_paths(read_json(run_dir / "run.json"))
    mean = json.loads(measured_aucs(run_dir).loc["mean", ["auc", "auc_low", "auc_high"]].to_json())
    return {
        "name": title_of(run),
        "research_only": True,
        "synthetic": run["synthetic"],
        "task": "multi-label-image-classification",
        "classes": run["classes"],
        "input": {"encoded": "PNG or JPEG bytes", "pixels": [run["side"], run["side"], 1], "range": [0, 255]},
        "study": run["study"],
        "split": run["split"],
        "test": mean,
        "weights_sha256": run["weights_sha256"],
        "tensorflow_version": run["runtime"]["tensorflow"],
        "keras_version": run["runtime"]["keras"],  # under the name that Keras gives it in its own metadata.json
        "commit": run["runtime"]["commit"],
    }
