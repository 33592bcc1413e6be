"""Fills the model card of a run, a page for the Hugging Face Hub, from the files that the notebooks wrote.

The fixed text is in `model_card_template.md`. Every number comes from a file of the run, and what was not measured is
reported as such.
"""

import re
from pathlib import Path
from string import Template

import numpy as np
import pandas as pd
import yaml

from ..evaluation.thresholds import FEW_POSITIVES
from ..runtime.files import as_path, read_csv, read_text
from ..runtime.settings import ROOT, read_json
from ..study.splits import name_unit
from ..training.backbones import BACKBONES
from ..training.provenance import flag_start
from ..training.run_record import describe_data

TEMPLATE = Path(__file__).with_name("model_card_template.md")
FIGURES = {  # charts only: none of them shows an image
    "figures/03_aucs.png": "AUC with interval for each finding, beside what needs no pixels",
    "figures/03_reliability.png": "Reliability, before and after Platt scaling",
    "figures/03_subgroups_auc.png": "AUC in subgroups",
    "figures/04_localization.png": "Pointing game and energy for each finding, beside the controls",
}
_EXPORTS = {
    "saved_model/saved_model.pb": "TensorFlow, with decoding and calibration inside",
    "exports/model.onnx": "ONNX",
    "exports/model.tflite": "LiteRT",
    "exports/model_int8.tflite": "LiteRT, weights of 8 bits",
    "model.weights.h5": "weights for Keras and for further training; returns logits",
}
_TAGS = "keras tensorflow chest-x-ray radiology medical-imaging multi-label-classification research-only"
_NOT_MEASURED = "not measured"

# What the card says of each kind of study. `type` is the data set's name on the Hub; of several copies of NIH's, this
# one has the original files.
_NIH = {
    "type": "alkzar90/NIH-Chest-X-ray-dataset",
    "name": "NIH ChestX-ray14",
    "banner": "",
    "source": "Frontal images of NIH ChestX-ray14 in the study folder “{study}”.",
    "labels": "Labels were mined from the reports of one hospital, not read from images.",
    "terms": "Images: NIH Clinical Center, <https://nihcc.app.box.com/v/ChestXray-NIHCC>; cite Wang et al., "
    "“ChestX-ray8”, CVPR 2017, and acknowledge the NIH Clinical Center as the provider.",
    "resampling": "patients, since images of one patient are alike",
    "factors": "Only what the study's\nlabel file contains could be measured: sex, age, view and images a patient. "
    "Skin color, origin, build, machine and\ndiagnosis by other means are unknown.",
    "study_caveats": """\
- **Labels are noisy.** Those of ChestX-ray14 were mined from reports. The model learned their errors and is scored
  with them; an image without a label may show something else.
- **One hospital.** Nothing here was tested on images of another one, where a lower score is to be expected. Measure it
  on images of your own before you rely on it, and choose thresholds again there.
""",
}
_OTHER = _NIH | {
    "source": "Images of the study folder “{study}”.",
    "study_caveats": """\
- **Labels are as good as their source.** The model learned their errors and is scored with them; an image without a
  label may show something else.
- **One data set.** Nothing here was tested on images of another hospital, where a lower score is to be expected.
  Measure it on images of your own before you rely on it, and choose thresholds again there.
- **Scores on this split do not compare** with those on other data sets or other splits.
""",
}
_NO_PATIENTS = {
    "resampling": "images, since the study has no patient ids: images of one patient are alike, so the intervals are "
    "too narrow",
    "factors": "Groups\nby sex, age or view are measured where the study names them.",
}
_SYNTHETIC = _NIH | {
    "type": "synthetic",
    "name": "Synthetic chest radiographs",
    "banner": "> **Synthetic run.** This model was trained and measured on synthetic images and has never seen a "
    "radiograph. Its numbers\n> show that the code works and say nothing about people.\n\n",
    "source": "Images drawn by a program, study “{study}”; findings are more frequent than in patients.",
    "labels": "Labels are those that the images were drawn from.",
    "terms": "The images were drawn; the weights contain nobody's data.",
    "study_caveats": "- **A synthetic run says nothing about people.** The images were drawn by a program.\n",
}

_EXTERNAL_CAVEAT = re.compile(r"- \*\*One (hospital|data set)\.\*\*[^*]*?\n(?=- |$)")  # replaced once that is measured
# An absolute path, a home or a bucket, at the start of a word. TensorFlow's names of devices look like paths.
_PATH = re.compile(
    r"(?<![^\s\"'=(,:;\[])(~\w*/|[A-Za-z]:\\|\\\\\w|gs://|/(?!device:|job:|physical_device:)[\w.-])[^\s\"',;)\]]*"
)


def hide_paths(content):
    """Removes folders, homes and buckets of the machine from the content of a JSON file.

    Args:
        content: what `json.loads` returns.

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
        run_dir: path of a run's folder; only what notebooks 2 and 3 write is needed.
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
    run, aucs = hide_paths(read_json(run_dir / "run.json")), measured_aucs(run_dir)
    split = run["split"]
    study, has_patients = _describe_study(run), bool(split["patients"])
    if (run_dir / "external.csv").exists():
        study |= {"study_caveats": _EXTERNAL_CAVEAT.sub(_write_external(run_dir), study["study_caveats"])}
    sizes = {subset: f"{n:,} images" for subset, n in split["films"].items()}
    if has_patients:
        sizes = {subset: f"{size} of {split['patients'].get(subset, 0):,} patients" for subset, size in sizes.items()}
    prevalence = {_plain(name): f"{share:.1%}" for name, share in run["prevalence"].items()}
    start = run.get("weights", {}).get("source", "random")
    if run["settings"].get("WEIGHTS") == "imagenet":  # of earlier versions, too
        start = "keras.applications"
    terms = f" Training began with weights of {start}; their terms apply as well."
    fields = study | {
        "unit": name_unit(has_patients),
        "title": title_of(run),
        "n_classes": len(run["classes"]),
        "classes": ", ".join(map(_plain, run["classes"])),
        "side": run["side"],
        "eval_size": run.get("eval_size", run["side"]),
        "details": _write_details(run_dir, run, sizes),
        "recipe": _write_pairs(run["settings"]),
        "exports": _write_exports(run_dir),
        "training_data": f"{study['source'].format(study=_cell(run['study']))} {study['labels']} Trained on "
        f"{sizes.get('train')}; the best epoch, thresholds and calibration were chosen on {sizes.get('val')}.\n\n"
        + _write_pairs(prevalence, "finding", "share of training images"),
        "evaluation_data": f"{sizes.get('test')}, split “{split['name']}”. {study['labels']}",
        "terms": study["terms"] + terms * (start != "random"),
        "mean_auc": f"Mean AUC {_interval(aucs.loc['mean'])} on the test images. {flag_start(run)}".strip(),
        "metrics": _write_metrics(run_dir, run, aucs),
        "floors": _write_floors(run_dir),
        "radiologists": _write_radiologists(run_dir),
        "figures": "".join(f"![{text}]({name})\n\n" for name, text in FIGURES.items() if (run_dir / name).exists()),
        "subgroups": _write_subgroups(run_dir),
        "localization": _write_localization(run_dir),
        "environment": _write_environment(run),
        "address": find_address(),
        "license_id": license_id,
    }
    return _write_header(run, aucs, study, license_id) + Template(read_text(TEMPLATE)).substitute(fields)


def _write_external(run_dir):
    """Returns the caveat in which the AUCs on another hospital's images stand, of `external.csv` of notebook 3."""
    drops = [
        f"{_plain(row.finding)} {row.auc_here:.3f} here, {row.auc_there:.3f} there "
        f"(drop {row.drop:+.3f}, {row.drop_low:+.3f} to {row.drop_high:+.3f})"
        for row in read_csv(run_dir / "external.csv").itertuples()
    ]
    return f"- **Another hospital's images** were measured: {'; '.join(drops)}. Choose thresholds again on your own.\n"


def _describe_study(run):
    """Returns what the card says of the run's study: a dict with the keys of `_NIH`."""
    if run["synthetic"]:
        return _SYNTHETIC
    about, is_nih = describe_data(run)
    study = _NIH
    if not is_nih:
        source = f" <{about['source']}>" if "source" in about else ""
        study = _OTHER | {
            "type": re.sub(r"\W+", "-", run["study"].casefold()).strip("-"),
            "name": about.get("name", run["study"]),
            "labels": about.get("labels", "The study does not say where its labels come from."),
            "terms": f"Images: {about.get('terms', 'the study does not name their terms.')}{source}",
        }
    return study | ({} if run["split"]["patients"] else _NO_PATIENTS)


def measured_aucs(run_dir):
    """Returns the rows of `aucs.csv` of the subset that was measured, the first in the file, by pathology."""
    aucs = read_csv(as_path(run_dir) / "aucs.csv")
    return aucs[aucs["split"].eq(aucs["split"].iloc[0])].set_index("pathology")


def title_of(run):
    """Returns the card's title for the content of a `run.json`."""
    what = f"{_name_network(run)} for {len(run['classes'])} findings on chest radiographs"
    return f"{what}, trained on synthetic images" if run["synthetic"] else what


def find_address():
    """Returns the repository's address from CITATION.cff."""
    return re.search(r"^repository-code: (\S+)$", read_text(ROOT / "CITATION.cff"), re.MULTILINE)[1]


def _name_network(run):
    known, blocks = _find_backbone(run), run.get("blocks") or ()
    return known.title if tuple(blocks) in ((), known.blocks) else f"{known.title} cut to blocks {_join(blocks)}"


def _find_backbone(run):
    return BACKBONES[run.get("backbone", "densenet121")]


def _join(values):
    return ", ".join(map(str, values))


def _write_header(run, aucs, study, license_id):
    scores = {"AUC, mean of the findings": aucs.loc["mean", "auc"]}
    scores |= {f"AUC, {_plain(name)}": aucs.loc[name, "auc"] for name in run["classes"]}
    metrics = [{"type": "roc_auc", "value": round(float(v), 4), "name": name} for name, v in scores.items() if v == v]
    name = " ".join(filter(None, [study["name"], flag_start(run)]))
    dataset = {"type": study["type"], "name": name, "config": run["split"]["name"]}
    dataset |= {"split": aucs["split"].iloc[0]}
    task = {"type": "image-classification", "name": "Multi-label classification of chest radiographs"}
    header = {
        "license": license_id,
        "library_name": "keras",
        "pipeline_tag": "image-classification",
        "tags": [*_TAGS.split(), _find_backbone(run).network.lower(), *["synthetic"] * run["synthetic"]],
        **({"datasets": [study["type"]]} if "/" in study["type"] else {}),
        "metrics": ["roc_auc"],
        "model-index": [{"name": title_of(run), "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}],
    }
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=1000)}---\n\n"


def _write_details(run_dir, run, sizes):
    split, runtime = run["split"], run["runtime"]
    rows = {
        "Architecture": f"{_name_network(run)} ({_find_backbone(run).paper}), global average pooling, one dense layer; "
        f"a cell of the last map covers {run['output_stride']} pixels",
        "Study": run["study"] + (" (synthetic)" if run["synthetic"] else ""),
        "Split": f"{split['name']}, SHA-256 `{split['sha256']}`",
        "Images": "; ".join(f"{name}: {size}" for name, size in sizes.items()),
        "Patients in two subsets": _write_shared_patients(run_dir, split),
        "Training": f"{run['epochs_run']} epochs, best {run['best_epoch'] + 1}, seed {run['seed']}",
        "Weights": f"SHA-256 `{run['weights_sha256']}`",
        "Versions": f"TensorFlow {runtime['tensorflow']}, Keras {runtime['keras']}, Python {runtime['python']}",
        "Commit": f"`{runtime['commit']}`",
    }
    return _write_pairs(rows)


def _write_shared_patients(run_dir, split):
    if not split["patients"]:
        return "unknown: the study has no patient ids"
    if split["name"] == "leaky_images":
        return "**many, on purpose: scores are flattered**"
    train = "train with others: none, or notebook 3 would have refused the split"
    if not (run_dir / "predictions.csv").exists():
        return train
    patients = read_csv(run_dir / "predictions.csv", usecols=["patient_id", "split"]).groupby("patient_id")["split"]
    return f"validation with test: {int(patients.nunique().gt(1).sum())}; {train}"


def _write_exports(run_dir):
    rows = [(f"`{n}`", what, "yes" if (run_dir / n).exists() else "not in this run") for n, what in _EXPORTS.items()]
    text = _write_table(pd.DataFrame(rows, columns=["file", "for", "there"]))
    if not (run_dir / "exports" / "parity.json").exists():
        return f"{text}\n\nDifferences of the exports from Keras: {_NOT_MEASURED}."
    parity = read_json(run_dir / "exports" / "parity.json")
    parity = pd.DataFrame([{"export": name, **row} for name, row in parity.items()])
    parity = parity.map(lambda value: f"{value:.3g}" if isinstance(value, float) else value)
    return f"{text}\n\nDifferences from Keras on the same images, from `exports/parity.json`:\n\n{_write_table(parity)}"


def _write_environment(run):
    runtime = run["runtime"] | {"devices": ", ".join(run["runtime"]["devices"])}
    times = {f"seconds, {name.replace('_', ' ')}": value for name, value in run["seconds"].items()}
    return _write_pairs(runtime | {"began": run["parts"][0]["began"], "sessions": len(run["parts"])} | times)


def _write_metrics(run_dir, run, aucs):
    """Writes what was measured for each finding on the test images."""
    has_thresholds = (run_dir / "thresholds.json").exists()
    points = read_json(run_dir / "thresholds.json")["pathologies"] if has_thresholds else {}
    error = _read_optional(run_dir / "figures" / "03_calibration.csv")
    error = dict(zip(error["pathology"], error["error Platt"], strict=True)) if "error Platt" in error else {}
    rows, few = [], [name for name, point in points.items() if point.get("n_pos_val", FEW_POSITIVES) < FEW_POSITIVES]
    for name in [*run["classes"], "mean"]:
        row, point = aucs.loc[name], points.get(name, {})
        rates = [point.get(key) for key in ("threshold", "sensitivity_test", "specificity_test")]
        count = "" if name == "mean" else f"{row['n_pos']:,}"
        cells = [_decimals(value) for value in (row["ap"], *rates, error.get(name))]
        if name in few:  # the threshold and the calibration error
            cells[1], cells[-1] = f"{cells[1]} *", f"{cells[-1]} *"
        rows.append([_plain(name), count, _interval(row), *cells])
    columns = ["finding", "images with it", "AUC", "average precision", "threshold", "sensitivity", "specificity"]
    text = [_write_table(pd.DataFrame(rows, columns=[*columns, "calibration error"]))]
    if aucs["split"].iloc[0] == "val":
        text.insert(0, "**There are no test images: all is measured on the validation images that chose the epoch.**")
    if few:
        text.append(
            f"\\* Chosen on fewer than {FEW_POSITIVES} validation images with the finding: this threshold and this "
            "calibration mean little."
        )
    if not has_thresholds:
        text.append(f"Thresholds: {_NOT_MEASURED}, for lack of validation images or of notebook 3.")
    if not error:
        text.append(f"Calibration error: {_NOT_MEASURED}.")
    return "\n\n".join(text)


def _write_floors(run_dir):
    """Writes the AUC that is reached without looking at an image."""
    table = _read_optional(run_dir / "figures" / "03_aucs.csv")
    means = [f"{name} {table[name].mean():.3f}" for name in ("view only", "metadata only") if name in table]
    if not means:
        return f"Mean AUC without looking at an image: {_NOT_MEASURED}."
    return f"Mean AUC without looking at an image: {', '.join(means)} (metadata: age, sex, view, follow-up number)."


def _write_radiologists(run_dir):
    """Writes the AUC with the labels of radiologists; nothing where there are none."""
    table = _read_optional(run_dir / "figures" / "03_radiologists.csv")
    if not len(table):
        return ""
    table = table.assign(AUC=[_interval(row) for _, row in table.iterrows()])
    return f"With radiologists' labels:\n\n{_write_table(table[['finding', 'mapped to', 'n_pos', 'AUC']])}\n\n"


def _write_subgroups(run_dir):
    """Writes the AUC of each finding in each subgroup, and the largest gaps."""
    table = _read_optional(run_dir / "figures" / "03_subgroups_auc.csv")
    if not len(table):
        return f"By view, sex and age: {_NOT_MEASURED}."
    table = table.assign(cell=[f"{_interval(r)}{' *' * bool(r['small'])}" for _, r in table.iterrows()])
    texts = ["AUC with interval; a star marks a cell with too few patients with the finding, or without it."]
    for attribute, rows in table.groupby("attribute", sort=False):
        groups, findings = rows["group"].unique(), rows["pathology"].unique()
        cells = rows.pivot(index="pathology", columns="group", values="cell").loc[findings, groups]  # noqa: PD010
        first = rows.drop_duplicates("group")
        cells.columns = [f"{g}, {n:,} images" for g, n in zip(groups, first["n_pos"] + first["n_neg"], strict=True)]
        name = {"images": "by images a patient"}.get(attribute, f"by {attribute}")
        texts.append(_write_table(cells.rename(index=_plain).rename_axis(name).reset_index()))
    gaps = _read_optional(run_dir / "figures" / "03_gaps.csv")
    if "gap" not in gaps:
        return "\n\n".join([*texts, f"Gaps in sensitivity between groups: {_NOT_MEASURED}."])
    shown = gaps[gaps["gap_low"] > 0].sort_values("gap", ascending=False)
    texts.append(f"Gaps in sensitivity with an interval above 0: {len(shown)} of {gaps['gap'].notna().sum()}.")
    if len(shown):
        top = shown.head(5)
        rows = top[["attribute", "highest", "lowest"]].assign(gap=[_interval(r, "gap") for _, r in top.iterrows()])
        rows.insert(0, "finding", top["pathology"].map(_plain))
        texts[-1] += f" The pairs were chosen by their gap, so some are chance. The largest:\n\n{_write_table(rows)}"
    return "\n\n".join(texts)


def _write_localization(run_dir):
    """Writes how often heatmaps point into the boxes."""
    table = _read_optional(run_dir / "localization.csv")
    if not len(table):
        return f"Heatmaps compared with boxes: {_NOT_MEASURED}, for lack of boxes on images outside training."
    columns = {"finding": table["pathology"].map(_plain), "images": table["n_images"]}
    columns["hottest place in the box"] = [_interval(row, "pointing") for _, row in table.iterrows()]
    controls = {"random": "random weights", "center": "image's center", "location": "boxes of others"}
    for control, name in controls.items():
        if f"pointing_{control}" in table:
            columns[name] = table[f"pointing_{control}"].map(_decimals)
    text = "How often a class activation map is hottest inside the box, beside controls that learned nothing"
    text = f"{text}:\n\n{_write_table(pd.DataFrame(columns))}"
    names = {control: name for control, name in controls.items() if f"energy_minus_{control}_low" in table}
    if not names:
        return text
    verdicts = {"finding": columns["finding"]}
    verdicts["share of the heat in the box"] = [_interval(row, "energy") for _, row in table.iterrows()]
    for measure, verb in (("pointing", "points"), ("energy", "heats")):
        for control, name in names.items():
            low, high = (table[f"{measure}_minus_{control}_{end}"] for end in ("low", "high"))
            verdicts[f"{verb} than {name}"] = np.select([low > 0, high < 0], ["better", "worse"], "not shown")
    about = "The share of its positive heat inside the box, and whether the intervals of the differences exclude 0"
    return f"{text}\n\n{about}:\n\n{_write_table(pd.DataFrame(verdicts))}"


def _read_optional(path):
    return read_csv(path) if path.exists() else pd.DataFrame()


def _interval(row, name="auc"):
    value, low, high = (row[column] for column in (name, f"{name}_low", f"{name}_high"))
    return f"{value:.3f} ({low:.3f} to {high:.3f})" if value == value else "–"


def _decimals(value):
    return None if value is None or value != value else f"{value:.3f}"


def _plain(name):
    return name.replace("_", " ")


def _cell(value):
    """Writes a cell of a Markdown table: pipes and tags are escaped, line breaks become spaces."""
    if value is None or value != value:
        return "–"
    return " ".join(str(value).replace("|", r"\|").replace("<", "&lt;").split())


def _write_pairs(values, *columns):
    return _write_table(pd.DataFrame(values.items(), columns=columns or ["", "value"]))


def _write_table(frame):
    rows = [frame.columns, ["---"] * len(frame.columns), *frame.itertuples(index=False, name=None)]
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in rows)
