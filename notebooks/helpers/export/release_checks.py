"""What must hold for a release, one short check a point; each returns its problems, with what to do about them."""

import fnmatch
import re
import stat
from pathlib import Path

import yaml

from ..runtime.files import hash_file, read_text
from ..runtime.settings import ROOT, read_json
from .card_tables import format_interval, plain_name
from .model_card import FIGURES, NIH_DATASET, measured_aucs

REQUIRED = {  # and who writes it
    "README.md": "make publish-check",
    "LICENSE": "make publish-check",
    "metadata.json": "make publish-check",
    "SHA256SUMS": "make publish-check",
    "run.json": "02_train_densenet121",
    "model.weights.h5": "02_train_densenet121",
    "config.json": "02_train_densenet121",
    "aucs.csv": "03_evaluate",
    "thresholds.json": "03_evaluate",
    "localization.csv": "04_explain",
    "saved_model/saved_model.pb": "05_export_and_predict",
    "saved_model/variables/variables.index": "05_export_and_predict",
    "exports/model.onnx": "05_export_and_predict",
    "exports/model.tflite": "05_export_and_predict",
    "exports/model_int8.tflite": "05_export_and_predict",
    "exports/parity.json": "05_export_and_predict",
    "exports/golden.png": "05_export_and_predict",
    "exports/golden.json": "05_export_and_predict",
}
ALLOWED = (
    *REQUIRED,
    *FIGURES,
    "saved_model/fingerprint.pb",
    "saved_model/variables/variables.data-?????-of-?????",
)
LICENSES = (  # by their names on the Hub, https://huggingface.co/docs/hub/repositories-licenses
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "unlicense", "mpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "openrail", "other"),
)
SECTIONS = (
    *("Model details", "Intended use", "How to use", "Training data", "Evaluation data", "Metrics"),
    *("Metrics by subgroup", "Localization", "Caveats and recommendations", "License and citation"),
)
EXPORTS = ("model.onnx", "model.tflite", "model_int8.tflite", "golden.json")
LARGEST = 5 * 10**9  # bytes
_HOME = re.compile(rb"(/home/|/Users/|/root/|[A-Za-z]:\\\\?Users\\)[\w.-]+|gs://[\w.-]+")
_IMAGE = re.compile(r"\b\d{8}_\d{3}\.png\b")  # as NIH names them


def check_files(folder):
    """Every file that a release needs is there and not empty."""
    problems = []
    for name, writer in REQUIRED.items():
        remedy = writer if writer.startswith("make") else f"Run {writer}, then make publish-check"
        if not (folder / name).is_file():
            problems.append(f"missing: {name}. {remedy}")
        elif not (folder / name).stat().st_size:
            problems.append(f"empty: {name}. {remedy}")
    return problems


def check_header(folder):
    """The header is YAML with the keys that the Hub reads, and says what the run was."""
    try:
        header = read_header(folder)
    except ValueError as error:
        return [f"README.md: its header is no YAML between two lines of ---: {error}"]
    expected = {"library_name": "keras", "pipeline_tag": "image-classification", "metrics": ["roc_auc"]}
    problems = [
        f"README.md: {key} is {header.get(key)!r}, not {v!r}" for key, v in expected.items() if header.get(key) != v
    ]
    if header.get("license") not in LICENSES:
        problems.append(f"README.md: license {header.get('license')!r} is none of {', '.join(LICENSES)}")
    elif header["license"] == "other" and not {"license_name", "license_link"} <= set(header):
        problems.append("README.md: license “other” needs license_name and license_link in the header")
    synthetic = read_json(folder / "run.json")["synthetic"]
    if synthetic != ("synthetic" in header.get("tags", [])):
        problems.append(f"README.md: the run is {'' if synthetic else 'not '}synthetic, its tags say otherwise")
    if not synthetic and NIH_DATASET not in header.get("datasets", []):
        problems.append(f"README.md: datasets lacks {NIH_DATASET}")
    for entry in header.get("model-index") or [{}]:
        results = entry.get("results") or [{}]
        whole = all(r.get("task", {}).get("type") and {"type", "name"} <= set(r.get("dataset", {})) for r in results)
        measured = all(r.get("metrics") and all({"type", "value"} <= set(m) for m in r["metrics"]) for r in results)
        if not (entry.get("name") and whole and measured):
            problems.append("README.md: model-index needs name, and results with task, dataset and metrics")
    return problems


def check_card(folder):
    """The card has its sections, says what it is not for, and holds no placeholder."""
    card = read_text(folder / "README.md")
    problems = [f"README.md: section “{name}” is missing" for name in SECTIONS if f"\n## {name}\n" not in card]
    if "Research and teaching only, not for clinical use" not in card:
        problems.append("README.md: it does not say “Research and teaching only, not for clinical use”")
    if read_json(folder / "run.json")["synthetic"] and "Synthetic run" not in body_of(card)[:200]:
        problems.append("README.md: it does not begin by saying that the run is synthetic")
    if "OWNER/REPOSITORY" in card:
        problems.append("README.md: OWNER/REPOSITORY is left. make address REPOSITORY=https://github.com/you/fork")
    left = re.findall(r"\bTODO\b|\bFIXME\b|\{\{.*?\}\}|\[More Information Needed\]", card)
    return problems + [f"README.md: {word} is left. Fill it in" for word in dict.fromkeys(left)]


def check_numbers(folder):
    """The AUCs of card and header are those of aucs.csv, and the weights those of run.json."""
    remedy = "Gather anew: make publish-check"
    aucs, card = measured_aucs(folder), read_text(folder / "README.md")
    section = card.partition("\n## Metrics\n")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    said = {row[0]: row[2] for row in cells if len(row) > 2}
    problems = []
    for name, row in aucs.iterrows():
        in_card, in_file = said.get(plain_name(name)), format_interval(row)
        if in_card != in_file:
            problems.append(f"README.md: AUC of {name} is {in_card}, in aucs.csv {in_file}. {remedy}")
    metrics = read_header(folder)["model-index"][0]["results"][0]["metrics"]
    indexed = {metric["name"].removeprefix("AUC, "): metric["value"] for metric in metrics}
    for name, auc in aucs["auc"].dropna().items():
        value = indexed.get("mean of the findings" if name == "mean" else plain_name(name))
        if value is None or abs(value - auc) > 1e-4:
            problems.append(f"README.md: model-index has {value} for {name}, aucs.csv {auc:.4f}. {remedy}")
    weights = folder / "model.weights.h5"
    if weights.exists() and hash_file(weights) != read_json(folder / "run.json")["weights_sha256"]:
        problems.append("model.weights.h5 is not the file that run.json describes. Run 02_train_densenet121")
    for name in ("saved_model/saved_model.pb", *(f"exports/{name}" for name in EXPORTS)):  # each carries the hash
        told = read_json(folder / "run.json")["weights_sha256"].encode()
        if (folder / name).exists() and told not in (folder / name).read_bytes():
            problems.append(f"{name} is of other weights than run.json. Run 05_export_and_predict")
    return problems


def check_sums(folder):
    """SHA256SUMS lists every file with its hash."""
    lines = [line.partition("  ") for line in read_text(folder / "SHA256SUMS").splitlines()]
    sums = {name: digest for digest, _, name in lines}
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {"SHA256SUMS"}
    problems = [f"{name} is not in SHA256SUMS. Gather anew: make publish-check" for name in sorted(files - set(sums))]
    problems += [f"SHA256SUMS lists {name}, which is not there" for name in sorted(set(sums) - files)]
    altered = [name for name in sorted(files & set(sums)) if hash_file(folder / name) != sums[name]]
    return problems + [f"{name} was altered after it was gathered. make publish-check" for name in altered]


def check_extra(folder):
    """There is nothing but what belongs to a release: no pickle, program, hidden file, predictions or image."""
    problems = []
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()):
        name, status = path.relative_to(folder).as_posix(), path.lstat()
        if not any(fnmatch.fnmatchcase(name, allowed) for allowed in ALLOWED):
            problems.append(f"{name} does not belong into a release. Remove it")
        elif not stat.S_ISREG(status.st_mode):
            problems.append(f"{name} is no plain file. Replace it by what it points to")
        elif status.st_mode & 0o111:
            problems.append(f"{name} is executable. chmod -x")
        if status.st_size > LARGEST:
            problems.append(f"{name} has {status.st_size / 1e9:.1f} GB, more than {LARGEST / 1e9:.0f}. Leave it out")
    return problems


def check_privacy(folder):
    """No file names a folder of a person or of this machine, and none names images of patients."""
    own = [str(place).encode() for place in (Path.home(), ROOT) if len(place.parts) > 2]
    synthetic = read_json(folder / "run.json")["synthetic"]
    problems = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, content = path.relative_to(folder).as_posix(), path.read_bytes()
        found = [match.group() for match in _HOME.finditer(content)] + [place for place in own if place in content]
        if found:
            problems.append(f"{name} names a folder of a machine: {found[0].decode(errors='replace')}. Take it out")
        if path.suffix in (".csv", ".json", ".md"):
            text = content.decode(errors="replace")
            if (image := _IMAGE.search(text)) and not synthetic:
                problems.append(f"{name} names a patient's image, {image.group()}. Take it out")
            if path.suffix == ".csv" and "patient_id" in text.partition("\n")[0]:
                problems.append(f"{name} has a column patient_id. Take it out")
    return problems


def read_header(folder):
    """Returns the content of the card's header; ValueError where there is none to read."""
    match = re.match(r"---\n(.*?)\n---\n", read_text(folder / "README.md"), re.DOTALL)
    try:
        header = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    if not isinstance(header, dict):
        raise ValueError("there is none")
    return header


def body_of(card):
    """Returns a card without its header."""
    return re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL).lstrip()


CHECKS = {
    "every file is there": check_files,
    "the header is one that the Hub reads": check_header,
    "the card is filled": check_card,
    "its numbers are those of the run": check_numbers,
    "the hashes are right": check_sums,
    "nothing else is there": check_extra,
    "no path of a machine, no patient": check_privacy,
}
