"""Gathers what a run publishes into one folder for the Hugging Face Hub, and checks that folder. Uploads nothing.

Only listed files are taken: predictions name patients' images, and a run's folder holds paths of the machine.
"""

import json
import os
import re
import shutil
import zipfile
from pathlib import Path

from ..runtime.files import as_path, hash_file, is_remote, remove_folder, write_text
from ..runtime.settings import ROOT, read_json, write_json
from .model_card import FIGURES, fill_model_card, hide_paths, measured_aucs, title_of

_WRITERS = {
    "02_train_densenet121": ("run.json", "model.weights.h5", "config.json"),
    "03_evaluate": ("aucs.csv", "thresholds.json"),
    "04_explain": ("localization.csv",),
    "05_export_and_predict": (
        *("saved_model/saved_model.pb", "saved_model/variables/variables.index"),
        *("exports/model.onnx", "exports/model.tflite", "exports/model_int8.tflite"),
        *("exports/parity.json", "exports/golden.png", "exports/golden.json"),
    ),
}
REQUIRED = {name: writer for writer, names in _WRITERS.items() for name in names}
_OPTIONAL = (*FIGURES, "saved_model/fingerprint.pb")
_WITH_HASH = (  # files that carry the hash of the weights
    *("saved_model/saved_model.pb", "exports/model.onnx", "exports/model.tflite", "exports/model_int8.tflite"),
    "exports/golden.json",
)
LICENSES = (  # by their names on the Hub, https://huggingface.co/docs/hub/repositories-licenses
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "unlicense", "mpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "openrail"),
)
_HOME = re.compile(rb"(/home/|/Users/|/root/|[A-Za-z]:\\\\?Users\\)[\w.-]+|gs://[\w.-]+")
_IMAGE = re.compile(r"\b\d{8}_\d{3}\.png\b")  # as NIH names them


def gather_release(run_dir, license_id="apache-2.0"):
    """Gathers the files of a release from a run into its folder `hub`, which is replaced.

    Weights and models are hard links where the disk allows it, so that they take no space twice.

    Args:
        run_dir: path of the run's folder, on a local disk.
        license_id: license of the weights, one of `LICENSES`.

    Returns:
        Path of the folder `hub`.

    Raises:
        FileNotFoundError: run.json or aucs.csv is missing; names the notebook that writes it.
        ValueError: the run lies in a bucket, or the license is not known.
    """
    if is_remote(run_dir):
        raise ValueError(f"{run_dir} lies in a bucket. Copy it to a local folder and gather from there.")
    if license_id not in LICENSES:
        raise ValueError(f"unknown license {license_id!r}; expected one of {', '.join(LICENSES)}")
    run_dir = as_path(run_dir)
    card, hub = fill_model_card(run_dir, license_id), run_dir / "hub"
    folder = run_dir / "part-hub"  # replaces an older one only when it is complete
    remove_folder(folder)
    write_text(folder / "README.md", card)
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    variables = (run_dir / "saved_model" / "variables").glob("variables.data-?????-of-?????")
    names = [*REQUIRED, *_OPTIONAL, *(path.relative_to(run_dir).as_posix() for path in variables)]
    for name in names:
        if (run_dir / name).is_file():
            (_copy_json if name.endswith(".json") else _link)(run_dir / name, folder / name)
    if (run_dir / "model.keras").exists():  # beside model.weights.h5, config.json lets Keras load the folder as a model
        with zipfile.ZipFile(run_dir / "model.keras") as archive:
            (folder / "config.json").write_bytes(archive.read("config.json"))
    write_json(folder / "metadata.json", _describe(run_dir))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = "".join(f"{hash_file(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)
    write_text(folder / "SHA256SUMS", sums)  # for `sha256sum -c`
    remove_folder(hub)
    return folder.rename(hub)


def _copy_json(source, target):
    write_json(target, hide_paths(read_json(source)))


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
        "keras_version": run["runtime"]["keras"],  # the name that Keras uses in its own metadata.json
        "commit": run["runtime"]["commit"],
    }


def check_release(folder):
    """Checks a release for what gathering cannot ensure.

    Args:
        folder: path of a folder of `gather_release`.

    Returns:
        Dict from what is checked, in words, to the list of problems, each with its remedy.
    """
    folder = as_path(folder)
    return {
        "every file is there": _find_missing(folder),
        "all files are of the same weights": _find_other_weights(folder),
        "the card names the repository": _find_placeholder(folder),
        "no file names a folder of this machine or a patient": _find_private(folder),
    }


def _find_missing(folder):
    names = [name for name in REQUIRED if not (folder / name).is_file() or not (folder / name).stat().st_size]
    return [f"missing or empty: {name}. Run {REQUIRED[name]}, then make publish-check" for name in names]


def _find_other_weights(folder):
    expected = read_json(folder / "run.json")["weights_sha256"]
    weights, problems = folder / "model.weights.h5", []
    if weights.exists() and hash_file(weights) != expected:
        problems.append("model.weights.h5 is not the file that run.json describes. Run 02_train_densenet121")
    others = [n for n in _WITH_HASH if (folder / n).exists() and expected.encode() not in (folder / n).read_bytes()]
    return problems + [f"{name} is of other weights than run.json. Run 05_export_and_predict" for name in others]


def _find_placeholder(folder):
    if "OWNER/REPOSITORY" not in (folder / "README.md").read_text(encoding="utf-8"):
        return []
    return ["README.md: OWNER/REPOSITORY is left. make address REPOSITORY=https://github.com/you/fork"]


def _find_private(folder):
    own = [str(place).encode() for place in (Path.home(), ROOT) if len(place.parts) > 2]
    synthetic = read_json(folder / "run.json")["synthetic"]
    problems = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, content = path.relative_to(folder).as_posix(), path.read_bytes()
        found = [match.group() for match in _HOME.finditer(content)] + [place for place in own if place in content]
        if found:
            problems.append(f"{name} names a folder of a machine: {found[0].decode(errors='replace')}. Remove it")
        if path.suffix in (".csv", ".json", ".md"):
            text = content.decode(errors="replace")
            if (image := _IMAGE.search(text)) and not synthetic:
                problems.append(f"{name} names a patient's image, {image.group()}. Remove it")
            if path.suffix == ".csv" and "patient_id" in text.partition("\n")[0]:
                problems.append(f"{name} has a column patient_id. Remove it")
    return problems
