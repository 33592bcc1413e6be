"""Fills the model card of a run, a page for the Hugging Face Hub, from the files that the notebooks left.

What the card says in words is in `model_card_template.md`, to be read and edited there; this room fills in what the
run says. No number comes from anywhere else, and what was not measured is said so.
"""

import re
from string import Template

import pandas as pd
import yaml

from ..runtime.files import as_path, read_csv, read_text
from ..runtime.settings import ROOT, read_json
from ..study.splits import CHESTMNIST, name_unit
from .card_tables import (
    NOT_MEASURED,
    escape_cell,
    format_interval,
    plain_name,
    write_floors,
    write_localization,
    write_metrics,
    write_pairs,
    write_radiologists,
    write_subgroups,
    write_table,
)

TEMPLATE = ROOT / "notebooks" / "helpers" / "model_card_template.md"
FIGURES = {  # charts only: none of them shows an image
    "figures/03_aucs.png": "AUC with interval for each finding, beside what needs no pixels",
    "figures/03_reliability.png": "Reliability, as given and after Platt scaling",
    "figures/03_subgroups_auc.png": "AUC in subgroups",
    "figures/04_localization.png": "Pointing game and energy for each finding, beside the controls",
}
EXPORTS = {
    "saved_model/saved_model.pb": "TensorFlow, with decoding and calibration inside",
    "exports/model.onnx": "ONNX",
    "exports/model.tflite": "LiteRT",
    "exports/model_int8.tflite": "LiteRT, weights of 8 bits",
    "model.weights.h5": "weights for Keras and for further training; gives logits",
}
NIH_DATASET = "alkzar90/NIH-Chest-X-ray-dataset"  # of several copies on the Hub, the one that has NIH's own files
RECIPE = (
    *("PROFILE", "RECIPE", "WEIGHTS", "PRECISION", "IMAGE_SIZE", "OUTPUT_STRIDE", "BLOCKS", "BATCH_SIZE", "EPOCHS"),
    *("FROZEN_EPOCHS", "OPTIMIZER", "LEARNING_RATE", "SCHEDULE", "LOSS", "AVERAGING", "BATCH_NORM_MOMENTUM"),
    *("WEIGHT_DECAY", "HORIZONTAL_FLIP", "PATIENCE", "SEED"),
)
_DENSENET121 = (6, 12, 24, 16)  # as in model.py, which needs Keras

# An absolute path, a home or a bucket, at the start of a word. TensorFlow's names of devices look like paths.
_PATH = re.compile(
    r"(?<![^\s\"'=(,:;\[])(~\w*/|[A-Za-z]:\\|\\\\\w|gs://|/(?!device:|job:|physical_device:)[\w.-])[^\s\"',;)\]]*"
)


def hide_paths(content):
    """Takes what tells of the machine out of the content of a JSON file: folders, homes, buckets.

    Args:
        content: what `json.loads` gives.

    Returns:
        The same without entries whose name ends in `_DIR`, and with "(path)" for each absolute path in a text.
    """
    if isinstance(content, dict):
        return {key: hide_paths(value) for key, value in content.items() if not key.endswith("_DIR")}
    if isinstance(content, list):
        return [hide_paths(value) for value in content]
    return _PATH.sub("(path)", content) if isinstance(content, str) else content


def fill_model_card(run_dir, license_id="apache-2.0"):
    """Fills the template of the model card for one run.

    Args:
        run_dir: path of a run's folder, with what notebooks 2 and 3 leave; more of it is told as far as it is there.
        license_id: license of the weights, by its name on the Hugging Face Hub.

    Returns:
        The card in Markdown, with a YAML header for the Hub.

    Raises:
        FileNotFoundError: run.json or aucs.csv is missing; names the notebook that writes it.
    """
    run_dir = as_path(run_dir)
    for name, notebook in {"run.json": "02_train_densenet121", "aucs.csv": "03_evaluate"}.items():
        if not (run_dir / name).exists():
            raise FileNotFoundError(f"{run_dir / name} is missing. Run {notebook} for this run.")
    run = hide_paths(read_json(run_dir / "run.json"))
    aucs = measured_aucs(run_dir)
    fields = {
        "banner": _BANNER if run["synthetic"] else "",
        "study_caveats": _write_caveats(run),
        "factors": _NO_FACTORS if _is_chestmnist(run) else _FACTORS,
        "resampling": "images, since the study does not tell its patients: those of one patient are alike, so they are "
        "too narrow"
        if _is_chestmnist(run)
        else "patients, since images of one patient are alike",
        "unit": name_unit(run["split"]["name"]),
        "title": title_of(run),
        "n_classes": len(run["classes"]),
        "classes": ", ".join(plain_name(name) for name in run["classes"]),
        "side": run["side"],
        "details": _details(run_dir, run),
        "recipe": write_pairs({name: run["settings"][name] for name in RECIPE if name in run["settings"]}),
        "exports": _exports(run_dir),
        **_data_fields(run),
        "mean_auc": f"Mean AUC {format_interval(aucs.loc['mean'])} on the test images.",
        "metrics": write_metrics(run_dir, run, aucs),
        "floors": write_floors(run_dir),
        "radiologists": write_radiologists(run_dir),
        "figures": "".join(f"![{text}]({name})\n\n" for name, text in FIGURES.items() if (run_dir / name).exists()),
        "subgroups": write_subgroups(run_dir),
        "localization": write_localization(run_dir),
        "environment": _environment(run),
        "address": find_address(),
        "license_id": license_id,
    }
    return _header(run, aucs, license_id) + Template(read_text(TEMPLATE)).substitute(fields)


def measured_aucs(folder):
    """Returns the rows of `aucs.csv` of the part that was measured, the first in the file, by pathology."""
    aucs = read_csv(as_path(folder) / "aucs.csv")
    return aucs[aucs["split"].eq(aucs["split"].iloc[0])].set_index("pathology")


def title_of(run):
    """Returns the card's title for the content of a `run.json`."""
    what = f"{_name_network(run)} for {len(run['classes'])} findings on chest radiographs"
    return f"{what}, trained on synthetic images" if run["synthetic"] else what


def _name_network(run):
    blocks = run.get("blocks", _DENSENET121)
    return "DenseNet-121" if tuple(blocks) == _DENSENET121 else f"DenseNet of blocks {', '.join(map(str, blocks))}"


def find_address():
    """Returns the repository's address, as CITATION.cff gives it."""
    return re.search(r"^repository-code: (\S+)$", read_text(ROOT / "CITATION.cff"), re.MULTILINE)[1]


_BANNER = (
    "> **Synthetic run.** This model was trained and measured on synthetic images and has never seen a radiograph. Its "
    "numbers\n> show that the code works and say nothing about people.\n\n"
)
_SYNTHETIC_CAVEAT = "- **A synthetic run says nothing about people.** The images were drawn by a program.\n"
_FACTORS = (
    "Only what the study's label\nfile tells could be measured: sex, age, view and images a patient. Skin color, "
    "origin, build, machine and diagnosis by\nother means are unknown."
)
_NO_FACTORS = "ChestMNIST\ntells none of this, so nothing could be measured by group."
_CHESTMNIST_CAVEAT = """\
- **A split of its own.** Scores on ChestMNIST's random split do not compare with those on NIH's official test list,
  which are lower, nor with other random splits. Its images have no patient ids, so intervals are over images, and floors
  and subgroups by view, sex and age were not measured.
"""
_REAL_CAVEATS = """\
- **Labels are noisy.** Those of ChestX-ray14 were mined from reports. The model learned their errors and is scored
  against them; an image without a label may show something else.
- **One hospital.** Nothing here was tested on images of another one, where a lower score is to be expected. Measure it
  on images of your own before you believe it, and choose thresholds anew there.
"""


def _is_chestmnist(run):
    return run["split"]["name"] == CHESTMNIST


def _write_caveats(run):
    if run["synthetic"]:
        return _SYNTHETIC_CAVEAT
    return _REAL_CAVEATS + _CHESTMNIST_CAVEAT * _is_chestmnist(run)


def _header(run, aucs, license_id):
    values = aucs["auc"].dropna().drop("mean", errors="ignore")
    scores = {"AUC, mean of the findings": aucs.loc["mean", "auc"]} | {
        f"AUC, {plain_name(n)}": v for n, v in values.items()
    }
    metrics = [{"type": "roc_auc", "value": round(float(v), 4), "name": name} for name, v in scores.items() if v == v]
    name, dataset = ("NIH ChestX-ray14", NIH_DATASET)
    if run["synthetic"] or _is_chestmnist(run):
        name, dataset = (
            ("Synthetic chest radiographs", "synthetic") if run["synthetic"] else ("ChestMNIST", "chestmnist")
        )
    part = {"type": dataset, "name": name, "config": run["split"]["name"], "split": "test"}
    task = {"type": "image-classification", "name": "Multi-label classification of chest radiographs"}
    tags = "keras tensorflow densenet chest-x-ray radiology medical-imaging multi-label-classification research-only"
    header = {
        "license": license_id,
        "library_name": "keras",
        "pipeline_tag": "image-classification",
        "tags": tags.split() + ["synthetic"] * run["synthetic"],
        **({"datasets": [NIH_DATASET]} if dataset == NIH_DATASET else {}),
        "metrics": ["roc_auc"],
        "model-index": [
            {"name": title_of(run), "results": [{"task": task, "dataset": part, "metrics": metrics}]},
        ],
    }
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=1000)}---\n\n"


def _details(run_dir, run):
    split, runtime = run["split"], run["runtime"]
    counts = {part: f"{split['films'][part]:,} / {split['patients'].get(part, 0):,}" for part in split["films"]}
    if _is_chestmnist(run):
        counts = {part: f"{n:,} / unknown" for part, n in split["films"].items()}
    rows = {
        "Architecture": f"{_name_network(run)} (Huang et al., CVPR 2017), global average pooling, one dense layer; "
        f"a cell of the last map covers {run['output_stride']} pixels",
        "Study": run["study"] + (" (synthetic)" if run["synthetic"] else ""),
        "Split": f"{split['name']}, SHA-256 `{split['sha256']}`",
        "Images / patients": ", ".join(f"{part} {count}" for part, count in counts.items()),
        "Patients in two parts": _shared_patients(run_dir, split["name"]),
        "Training": f"{run['epochs_run']} epochs, best {run['best_epoch'] + 1}, seed {run['seed']}",
        "Weights": f"SHA-256 `{run['weights_sha256']}`",
        "Versions": f"TensorFlow {runtime['tensorflow']}, Keras {runtime['keras']}, Python {runtime['python']}",
        "Commit": f"`{runtime['commit']}`",
    }
    return write_pairs(rows)


def _shared_patients(run_dir, split_name):
    if split_name == CHESTMNIST:
        return "not known here: ChestMNIST has no patient ids; its makers split by patient"
    if split_name == "leaky_images":
        return "**many, on purpose: scores are flattered**"
    said = "train with others: none, or notebook 3 would have refused the split"
    if not (run_dir / "predictions.csv").exists():
        return said
    parts = read_csv(run_dir / "predictions.csv", usecols=["patient_id", "split"]).groupby("split")["patient_id"]
    n_parts = parts.unique().explode().value_counts()
    return f"validation with test: {int(n_parts.gt(1).sum())}; {said}"


def _exports(run_dir):
    rows = [(f"`{n}`", what, "yes" if (run_dir / n).exists() else "not in this run") for n, what in EXPORTS.items()]
    text = write_table(pd.DataFrame(rows, columns=["file", "for", "there"]))
    if not (run_dir / "exports" / "parity.json").exists():
        return f"{text}\n\nHow far the exports are from Keras: {NOT_MEASURED}."
    parity = {
        name: row for name, row in read_json(run_dir / "exports" / "parity.json").items() if isinstance(row, dict)
    }
    table = pd.DataFrame(parity.values(), index=pd.Index(parity, name="export")).reset_index()
    table = table.map(lambda value: f"{value:.3g}" if isinstance(value, float) else value)
    return (
        f"{text}\n\nHow far they are from Keras on the same images, by `exports/parity.json`:\n\n{write_table(table)}"
    )


def _environment(run):
    runtime = run["runtime"] | {"devices": ", ".join(run["runtime"]["devices"])}
    times = {f"seconds, {name.replace('_', ' ')}": value for name, value in run["seconds"].items()}
    return write_pairs(runtime | {"began": run["parts"][0]["began"], "parts": len(run["parts"])} | times)


def _data_fields(run):
    images, patients = run["split"]["films"], run["split"]["patients"]
    share = pd.Series(run["prevalence"], name="share of training images").map("{:.1%}".format)
    common = write_table(
        share.rename_axis("finding").reset_index().assign(finding=lambda t: t["finding"].map(plain_name))
    )
    size = {part: f"{images[part]:,} images of {patients.get(part, 0):,} patients" for part in images}
    if _is_chestmnist(run):
        size = {part: f"{images[part]:,} images" for part in images}
    if run["synthetic"]:
        source = f"Images drawn by a program, study “{escape_cell(run['study'])}”, with findings raised in prevalence."
        terms = "The images were drawn; nobody's data is in the weights."
        labels = "Labels are those that the images were drawn from."
    else:
        source = f"Frontal images of NIH ChestX-ray14 in the study folder “{escape_cell(run['study'])}”."
        terms = (
            "Images: NIH Clinical Center, <https://nihcc.app.box.com/v/ChestXray-NIHCC>; cite Wang et al., "
            "“ChestX-ray8”, CVPR 2017, and acknowledge the NIH Clinical Center as the provider."
        )
        labels = "Labels were mined from the reports of one hospital, not read from images."
    if _is_chestmnist(run):
        source = (
            f"Images of ChestMNIST, which are NIH ChestX-ray14's in small, in the folder “{escape_cell(run['study'])}”."
        )
        terms = f"ChestMNIST: CC BY 4.0; cite Yang et al., MedMNIST v2, Scientific Data 2023. {terms}"
    if run["settings"].get("WEIGHTS") == "imagenet":
        terms += " Training began with ImageNet weights of keras.applications; mind their terms as well."
    return {
        "training_data": f"{source} {labels} Trained on {size.get('train')}; the best epoch, thresholds and "
        f"calibration were chosen on {size.get('val')}.\n\n{common}",
        "evaluation_data": f"{size.get('test')}, split “{run['split']['name']}”. {labels}",
        "terms": terms,
    }
