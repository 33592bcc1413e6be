"""What the pages say of measured numbers, drawn from committed files as Markdown; renew_results.py writes it there.

Tables stand between marks in a page. Of a sentence the page keeps the words: `SENTENCES` repeats a part of it, with the
place in the results where a number stands.
"""

import json
import re
from pathlib import Path
from string import Formatter

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]

FORMATS = {
    "saved_model": "SavedModel",
    "model.onnx": "ONNX",
    "model.tflite": "LiteRT",
    "model_int8.tflite": "LiteRT, int8 weights",
}


def format_auc(row):
    """Returns an AUC with its interval, of a row with `auc`, `auc_low` and `auc_high`."""
    return f"{row['auc']:.3f} ({row['auc_low']:.3f} to {row['auc_high']:.3f})"


def format_lead(row, names=("difference", "low", "high")):
    """Returns a difference with its sign and its interval."""
    value, low, high = (row[name] for name in names)
    return f"{value:+.3f} ({low:+.3f} to {high:+.3f})"


def judge(low, high):
    """Returns what the interval of a difference shows."""
    return "better than" if low > 0 else "worse than" if high < 0 else "not shown to differ from"


def write_table(heads, rows):
    """Returns a Markdown table of cells, which are written as they are."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def draw_quick_run(aucs, floors, seeds, results, n_epochs):
    """Returns the table of mean AUCs of the documented run, and what else is reached on the same images.

    Args:
        aucs: DataFrame of the run's aucs.csv.
        floors: DataFrame of its floors.csv.
        seeds: dict of seeds.json: the same training with several seeds.
        results: dict of benchmarks/results, of which difficulty.json and learning.json are of the same study.
        n_epochs: int, epochs of the documented run.
    """
    aucs, spread = aucs[aucs["split"].eq("test")].set_index("pathology"), seeds["spread"]
    gradients, learning = results["difficulty"]["models"]["logistic, gradients"], results["learning"]
    gradients = gradients | {"auc": gradients["mean"]}
    shuffled = [row["mean_test_auc"] for row in learning["shuffled"]]
    means, count = floors[floors["pathology"].eq("mean")].set_index("floor"), f"{len(seeds['seeds'])} trainings"
    epochs = seeds["seeds"][0]["epochs_run"]
    of_seeds = "{mean:.3f}; {min:.3f} to {max:.3f}".format(**spread)
    rows = [
        [f"the documented run, {n_epochs} epochs", f"**{aucs.auc['mean']:.3f}**{format_auc(aucs.loc['mean'])[5:]}"],
        [f"{count} with different seeds, {epochs} epochs each: mean; range", of_seeds],
        ["no network: logistic regression on histograms of gradients", format_auc(gradients)],
        ["an untrained network's features, ridge regression", format_auc(means.loc["random network"])],
        ["age, sex, view and follow-up number, no image", format_auc(means.loc["metadata only"])],
        [
            f"shuffled training labels, {len(shuffled)} short trainings (one on true labels: "
            f"{learning['true labels']['mean_test_auc']:.3f}): mean; range",
            f"{learning['mean of shuffled']:.3f}; {min(shuffled):.3f} to {max(shuffled):.3f}",
        ],
    ]  # fmt: skip
    heads = ["predicted by", f"mean AUC, {seeds['images']} test images of {seeds['patients']} patients"]
    ahead = [name.replace("_", " ") for name, auc in aucs.auc.items() if gradients[name] > auc]
    place = 1 + sum(row["auc"] > seeds["seeds"][0]["auc"] for row in seeds["seeds"])
    text = f"The documented run's seed is {'the best' if place == 1 else f'number {place}'} of the {count}. "
    text += f"Gradients are ahead of the network on {', '.join(ahead) or 'no finding'}."
    return f"{write_table(heads, rows)}\n\n{text}"


def draw_heatmaps(localization, seeds):
    """Returns the table of the heatmaps' mean scores beside their controls, and where they lose, flattering or not."""
    table, heat = localization.set_index("pathology"), seeds["heatmaps"]
    mean, by_finding = table.loc["mean"], table.drop("mean")
    of = lambda name, spec: f"{mean[name]:{spec}} ({mean[f'{name}_low']:{spec}} to {mean[f'{name}_high']:{spec}})"  # noqa: E731
    ends = {name: [heat[name][end] for end in ("min", "max")] for name in ("pointing", "energy")}
    rows = [
        ["the documented run", of("pointing", ".0%"), of("energy", ".3f")],
        [
            f"{len(seeds['seeds'])} trainings with different seeds: range",
            "{:.0%} to {:.0%}".format(*ends["pointing"]),
            "{:.3f} to {:.3f}".format(*ends["energy"]),
        ],
    ]
    controls = {"random": "random weights", "center": "the image's center", "location": "the boxes of other patients"}
    rows += [[text, f"{mean[f'pointing_{c}']:.0%}", f"{mean[f'energy_{c}']:.3f}"] for c, text in controls.items()]
    heads = ["heatmap", "images with the hottest place in a box", "share of the heat in boxes"]
    verdicts = [
        f"{judge(mean[f'energy_minus_{c}_low'], mean[f'energy_minus_{c}_high'])} {controls[c]}"
        for c in ("center", "location")
    ]
    worse = by_finding.index[by_finding["pointing_minus_location_high"] < 0]
    text = f"By the share of the heat, the documented run is {verdicts[0]}, and {verdicts[1]}.\n"
    text += f"By the hottest place it is worse than these on {', '.join(worse).replace('_', ' ') or 'no finding'}."
    return f"{write_table(heads, rows)}\n\n{text}"


def draw_flaws(flaws):
    """Returns the table of what each flaw of the original adds, over divisions of the images."""
    rows = []
    for how, table in flaws.groupby("flaws", sort=False):
        table = table.set_index("figure")
        cells = []
        for name in ("accuracy", "auc"):
            row = table.loc[name]
            cell = format_lead(row)
            if "divisions" in row:
                ends = [f"{row[f'smallest{which}']:.3f} to {row[f'largest{which}']:.3f}" for which in ("", " without")]
                cell += f"; in {row['divisions']:.0f} divisions {ends[0]}, without the flaw {ends[1]}"
            cells.append(cell)
        rows.append([how.removeprefix("+ "), *cells])
    return write_table(["flaw", "gain in accuracy", "gain in AUC"], rows)


def draw_earlier(runs):
    """Returns the table of docs/earlier_runs.csv."""
    rows = []
    for row in runs.to_dict("records"):
        known = row["pointing"] == row["pointing"]  # not NaN
        heat = [f"{row['pointing']:.0%}", f"{row['energy']:.2f}, {row['energy_center']:.2f}"]
        cells = [row["began"], f"`{row['commit']}`", row["seed"], row["epochs"], format_auc(row)]
        rows.append(cells + (heat if known else ["not measured"] * 2))
    heads = ["began", "commit", "seed", "epochs", "mean AUC", "pointing", "energy, and of a blob at the center"]
    return write_table(heads, rows)


def draw_difficulty(results):
    """Returns the table of models that see no shape, of benchmarks/results/difficulty.json."""
    rows = []
    for name, model in results["models"].items():
        best = max(
            (value, finding) for finding, value in model.items() if finding not in ("mean", "auc_low", "auc_high")
        )
        rows.append([name, format_auc(model | {"auc": model["mean"]}), f"{best[1].replace('_', ' ')}, {best[0]:.3f}"])
    return write_table(["model", "mean AUC", "its best finding"], rows)


def draw_published_findings(published):
    """Returns the table of the studies in data/published_aucs.csv, with their mean over the findings."""
    studies = published.groupby("study", sort=False).agg(
        {"split": "first", "auc": "mean", "checked": "first", "source": "first"}
    )
    rows = [[f"[{study}]({row.source})", row.split, f"{row.auc:.3f}", row.checked] for study, row in studies.iterrows()]
    return write_table(["study", "split", "mean", "numbers read"], rows)


def draw_published(published):
    """Returns the table of rows of data/published_means.csv, which are of one split."""
    rows = []
    for row in published.fillna("").itertuples():
        model = f"[{row.model}]({row.source})" if row.source.startswith("http") else f"{row.model} ({row.source})"
        auc = f"{row.mean_auc:.3f}" + (f" ({row.low:.3f} to {row.high:.3f})" if row.low else "")
        pixels = f"{row.pixels:.0f}" if row.pixels else "not known"
        rows.append([model, pixels, row.start, auc, row.test_images_chose, row.checked])
    return write_table(["model", "pixels", "start", "mean AUC", "chosen on test images", "number read"], rows)


def draw_nodules(scores, study, leads=None):
    """Returns the table of the study of nodules: accuracy and AUC for each kind of features and classifier.

    `leads` are paired differences of the head from a logistic regression, of notebook 6's leads.csv.
    """
    counts, majority = study["counts"], next(row for row in study["scores"] if row["figure"] == "majority")
    synthetic = "synthetic " * (study["source"] == "phantom")
    rows = [["none: always the majority class", "", f"{majority['value']:.3f}", "0.5"]]
    for (features, classifier), measured in scores.groupby(["features", "classifier"], sort=False):
        figures = measured.set_index("figure")
        cells = ["{value:.3f} ({low:.3f} to {high:.3f})".format(**figures.loc[name]) for name in ("accuracy", "auc")]
        rows.append([features.replace("trained on phantom", "trained on the synthetic study"), classifier, *cells])
    about = (
        f"{counts['films']:,} {synthetic}images of {counts['patients']:,} patients, {counts['Nodule']:,} with a nodule."
    )
    text = f"{about}\n\n{write_table(['features', 'classifier', 'accuracy', 'AUC'], rows)}"
    if leads is not None:
        auc_leads = leads[leads["figure"].eq("auc")].to_dict("records")
        told = [
            f"{format_lead(row)} on {row['features'].replace('trained on phantom', 'trained on the synthetic study')}"
            for row in auc_leads
        ]
        text += f"\n\nThe 512x512 head's AUC less that of the logistic regression: {'; '.join(told)}."
    return text


def draw_saliency(study):
    """Returns how often each kind of saliency map points into a nodule, beside an untrained head, as a table."""
    rows = [
        [
            f"{row['method']} of the head",
            f"{row['pointing']:.0%} ({row['pointing_low']:.0%} to {row['pointing_high']:.0%})",
            f"{row['pointing_untrained']:.0%}; "
            + judge(row["pointing_minus_untrained_low"], row["pointing_minus_untrained_high"]).rsplit(" ", 1)[0],
        ]
        for row in study["saliency"]
    ]
    shares = study["saliency_by_finding"]
    ranked = sorted(shares, key=lambda name: (name != "Nodule", -shares[name]))[:4]  # Nodule, and the three highest
    rows += [[f"gradient of {name.replace('_', ' ')}, notebook 2's", f"{shares[name]:.0%}", ""] for name in ranked]
    rows.append(["none: the image's center", f"{study['saliency'][0]['pointing_center']:.0%}", ""])
    heads = ["map", f"points into a nodule, {study['saliency'][0]['n_images']} images", "with an untrained head"]
    return write_table(heads, rows)


def draw_parity(parity):
    """Returns the table of export formats: size, difference from Keras, speed."""
    rows = [
        [FORMATS[name], f"{row['bytes'] / 1e6:.0f}", f"{row['max_difference']:.0e}", f"{row['same_top5']:.1%}",
         f"{row['load_seconds']:.1f}", f"{row['p50_ms']:.0f}, {row['p95_ms']:.0f}", f"{row['images_per_second']:.0f}"]
        for name, row in parity.items()
    ]  # fmt: skip
    difference, latency = "largest difference of a probability from Keras", "one 1024 px PNG, ms: p50, p95"
    heads = ["format", "MB", difference, "same top 5", "load, s", latency, "images/s in batches of 32"]
    return write_table(heads, rows)


def _count(result):
    """Returns how often something was, with Wilson's interval in percent where it was not always."""
    low, high = result["interval"]
    return f"{result['count']} of {result['n']}" + ("" if result["count"] == result["n"] else f" ({low:g}–{high:g} %)")


def draw_gate(gate, what):
    """Returns the table of "false alarms" or "detections" of benchmarks/results/input_gate.json."""
    kinds = {"NIH": "NIH", "JSRT": "JSRT", "drawn": "synthetic"}
    rows = []
    for change, result in gate["images"]["NIH"][what].items():
        answer = "named" if "named" in result else "any"
        text = f"{change}: any warning" if what == "detections" and answer == "any" else change
        rows.append([text, *(_count(gate["images"][kind][what][change][answer]) for kind in kinds)])
    return write_table(["", *kinds.values()], rows)


def draw_gate_others(gate):
    """Returns the table of what the gate says of pictures that are no upright frontal chest radiographs."""
    rows = []
    for kind, answer in gate["drawn pictures"].items():
        for code, counts in answer.items():
            rows.append([f"synthetic: {kind}", f"`{code}`", _count(counts["named"]), _count(counts["any"])])
    screens, photographs = gate["screens by Matplotlib"], gate["photographs"]
    rows.append(
        ["plots, text and tables by Matplotlib", "`screenshot`", _count(screens["named"]), _count(screens["any"])]
    )
    named, warned = (photographs[f"turned gray: {name}"] for name in ("not_chest or screenshot", "any warning"))
    text = "photographs and pictures of scikit-learn, Matplotlib, scikit-image, turned gray"
    rows.append([text, "`not_chest` or `screenshot`", _count(named), _count(warned)])
    rows.append(["those with color, as JPEG", "`color`", _count(photographs["in color, as JPEG: color"]), ""])
    codes = ", ".join(warning["code"] for warning in gate["one extremity"])
    rows.append(["one real radiograph of a leg", "`not_chest`", "0 of 1", f"1 of 1: {codes}"])
    return write_table(["", "code", "named", "any warning"], rows)


def draw_synthetic(run, n_boxes):
    """Returns the size of the synthetic study of a run, of run.json, as a sentence."""
    images, patients = run["split"]["films"], run["split"]["patients"]
    return (
        f"{sum(images.values()):,} images of {sum(patients.values()):,} patients (`DATA_SEED` 0), of which "
        f"{images['test']:,} of "
        f"{patients['test']:,} patients are in the test list, with {n_boxes:,} boxes."
    )


def draw_counts(run, counts, floors):
    """Returns the table of images with each finding: synthetic, NIH's, and those in its lists.

    Args:
        run: dict of run.json of the documented run, whose training images are counted.
        counts: dict from a name to NIH's published counts, in all, on the first and on the second list.
        floors: DataFrame of docs/reference_evaluation/metadata_floors.csv, which has the test patients.
    """
    patients = floors[floors["floor"].eq("view only")].set_index("pathology")["n_pos_patients"]
    percent = lambda name: f"{100 * counts[name][0] / counts['images'][0]:.1f}"  # noqa: E731
    rows = []
    for name, share in run["prevalence"].items():
        n = [f"{count:,}" for count in (*counts[name], int(patients[name]))]
        rows.append([name, f"{100 * share:.0f}", percent(name), *n, counts.get(f"boxes of {name}", "–")[0]])
    rows.append(["*No Finding*", "", percent("No Finding"), *(f"{n:,}" for n in counts["No Finding"]), "", ""])
    both = [f"{n:,} ({of:,})" for n, of in zip(counts["images"], counts["patients"], strict=True)]
    rows.append(["all (patients)", "", "", *both, f"{counts['patients'][2]:,}", counts["boxes"][0]])
    lists = ["NIH images", "train + val list", "test list", "test patients", "boxes"]
    return write_table(["", "synthetic training images, %", "NIH, %", *lists], rows)


def draw_times(run, times):
    """Returns how long `make run` took, of times.json of renew_results.py."""
    whole, training = times["from_first_to_last"] / 60, times["seconds"]["02_train_densenet121"] / 60
    numbers, processor = run["settings"]["PRECISION"].removeprefix("mixed_"), run["runtime"]["processor"]
    return (
        f"The documented `make run` took {whole:.0f} minutes on {processor} ({times['machine_was']}), "
        f"{training:.0f} of them in notebook 2, which trained in {numbers}."
    )


# Sentences with numbers: in each page a part of a sentence. A field is the path of a value in `read_results`, with a
# factor where the page has another unit, and the format of a number; without a format it is a word.
SENTENCES = {
    "README.md": ["A run killed {resume>ours, TensorFlow>kills:d} times at random moments ended bit-identical"],
    "data/README.md": [
        "The view alone, no pixels, gives a mean test AUC of {floors>view only:.3f}; view, age, sex and follow-up "
        "number together {floors>metadata only:.3f}",
        "the mined labels of the test list find {mined>0>sensitivity:.0%}, {mined>1>sensitivity:.0%} and "
        "{mined>2>sensitivity:.0%} of the first three, at a specificity of {mined>0>specificity:.0%}, "
        "{mined>1>specificity:.0%} and {mined>2>specificity:.0%}",
        "a retrained CheXNet has a mean AUC of {drop>in the list:.3f} there, and of {drop>not in the list:.3f} outside",
    ],
    "docs/evaluate.md": [
        "reaches a mean AUC of {floors>view only:.3f} from the view alone, and {floors>metadata only:.3f} from age",
        "on {intervals>machine}: {intervals>bootstrap>all scores differ>seconds:.1f} seconds, "
        "{intervals>bootstrap>all scores differ>times_as_fast:.0f} times as fast as a loop over scikit-learn's",
        "mean AUC of {drop>all:.3f} on its own test images, and of {drop>in the list:.3f} on those in NIH's list",
    ],
    "docs/input_gate.md": [
        "By view: AP {input_gate>NIH by view>AP>any>count:d} of {input_gate>NIH by view>AP>any>n:d}, the inverted one; "
        "PA {input_gate>NIH by view>PA>any>count:d} of {input_gate>NIH by view>PA>any>n:d}.",
        "the other half has {input_gate>NIH by half>held out>any>count:d} of {input_gate>NIH by half>held out>any>n:d}",
        "without decoding: {input_gate>images a second>224:,.0f} images a second at 224 pixels",
    ],
    "docs/model_formats.md": [
        "reaches {predict>share_of_the_models_own:.0%} of the images per second that `serving_default` answers on "
        "files in memory, by the median of rounds ({predict>images_per_second>predict_folder:.0f} and "
        "{predict>images_per_second>model on files in memory:.0f} on {predict>machine};",
        "was wrong on {borders>wrong:d} of {borders>all:,d} pictures",
        "{full_size>model.onnx>max_difference:.3f} from the SavedModel's",
    ],
    "docs/recipe.md": [
        "a retrained CheXNet has {drop>all:.3f} on its own random test images, and {drop>in the list:.3f} on those",
    ],
    "docs/resume.md": [
        "a checkpoint has {resume>densenet121>ours>bytes*1e-6:.0f} MB",
        "written in {resume>densenet121>ours>write_seconds:.2f} s and read in "
        "{resume>densenet121>ours>read_seconds:.2f} s; `keras.callbacks.BackupAndRestore` takes "
        "{resume>densenet121>keras>write_seconds:.2f} s and {resume>densenet121>keras>read_seconds:.2f} s",
        "killed by SIGKILL {resume>ours, TensorFlow>kills:d} times",
        "no longer started after {resume>BackupAndRestore, TensorFlow>kills:d} kills",
    ],
    "docs/scale.md": [
        "takes {scale>stages>read metadata, find and match images>times_the_seconds:.0f} times as long as for a tenth",
    ],
    "docs/serving.md": [
        "takes {serving>one_image>http>p50_ms:.0f} ms, the model alone in the same process "
        "{serving>one_image>in_process>p50_ms:.0f} ms",
        "predicts {serving>images_per_second_in_batches_of_32>http:.0f} images a second, the process alone "
        "{serving>images_per_second_in_batches_of_32>in_process:.0f}",
    ],
    "docs/speed.md": [
        "| packing 1024 px PNG to 256 px shards | {packing>images_per_second>packing, raw:.0f} | "
        "{packing>ratios>packing / PNG decode alone:.0%} of PNG decoding alone",
        "the same to PNG records | {packing>images_per_second>packing, png:.0f} | "
        "{packing>ratios>packing, png / raw:.0%} of raw records; training batches then "
        "{packing>ratios>training batches, png / raw:.2f} times as many",
        "Packing takes {packing>peak_mib_of_packing>4,000 images:,d} MiB of memory",
    ],
    "docs/tpu.md": [
        "of `PROFILE=best` takes {tpu_check>jax>best>v5e-1>share of memory*100:.0f} % of the memory of one v5e chip",
        "The compiler makes {tpu_check>jax>best>v5e-8>all-reduces:d} sums over the cores of a step, of "
        "{tpu_check>jax>best>v5e-8>bytes summed*1e-6:.1f} MB in all",
        "takes {global_statistics>ours / Keras, synchronized>elapsed:.2f} times as long as with Keras's "
        "synchronized layer, which makes three sums where ours makes one, and "
        "{global_statistics>ours / Keras, local>elapsed:.2f} times as long",
    ],
    "docs/weights.md": [
        "give PyTorch's last map to {convert_weights>networks>torchvision densenet121>largest_difference:.0e}",
    ],
    "docs/xvision.md": [
        "{features>images_per_second>cache:.0f} images a second through VGG16 at 224 pixels",
        "takes {features>fine_tuning_over_head:.0f} times as long as one of the head on cached features",
    ],
    "models/README.md": ["model differed by up to {full_size>model.onnx>max_difference:.3f}"],
    "notebooks/03_evaluate.ipynb": [
        "alone reaches {floors>view only:.3f} in the mean and all metadata {floors>metadata only:.3f}",
    ],
    "notebooks/helpers/evaluation/floors.py": [
        "is {floors>view only:.3f} from the view and {floors>metadata only:.3f} from all four columns",
    ],
}


_NUMBER = r"([-+]?(?:\d[\d,]*)?\d(?:\.\d+)?(?:e[-+]?\d+)?(?: ?%)?)"


def read_results():
    """Returns what `SENTENCES` takes values from: files of benchmarks/results by name, and tables of the reference."""
    results = {path.stem: json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    tables = {
        name: pd.read_csv(ROOT / "docs" / "reference_evaluation" / f"{name}.csv")
        for name in ("metadata_floors", "drop", "mined_labels")
    }
    floors, gray = tables["metadata_floors"].query("pathology == 'mean'"), results["looks_inverted"]["without borders"]
    answers = [row[kind] for row in gray for kind in ("as they are", "inverted")]
    return results | {
        "floors": floors.set_index("floor")["auc"],
        "drop": tables["drop"].set_index("images")["auc"],
        "mined": {str(k): row for k, row in enumerate(tables["mined_labels"].to_dict("records"))},
        "full_size": results["predict"]["exports_beside_the_saved_model_on_full_size"],
        "borders": {
            "wrong": sum(answer["wrong"] for answer in answers),
            "all": sum(sum(answer[name] for name in ("right", "wrong", "no answer")) for answer in answers),
        },
    }


def find_sentence(page, template):
    """Finds the one place of a page where a sentence stands, whatever its values and line breaks: a `re.Match`."""
    pattern = ""
    for text, name, spec, _ in Formatter().parse(template):
        pattern += r"\s+".join(map(re.escape, re.split(r"\s+", text)))
        pattern += "" if name is None else _NUMBER if spec else r"([^.;:|]+?)"
    found = list(re.finditer(pattern, page))
    if len(found) != 1:
        raise ValueError(f"expected once, found {len(found)} times: {template}")
    return found[0]


def renew_sentence(page, template, results):
    """Returns the text of a page with today's values in a sentence, which it must have exactly once."""
    match = find_sentence(page, template)
    fields = [(name, spec) for _, name, spec, _ in Formatter().parse(template) if name is not None]
    for group in range(len(fields), 0, -1):  # from the end, so that earlier places stay where they are
        (name, spec), value = fields[group - 1], results
        path, _, factor = name.partition("*")
        for key in path.split(">"):
            value = value[key]
        value = value * float(factor) if factor else value if spec else value.partition(", Python")[0]
        page = page[: match.start(group)] + format(value, spec) + page[match.end(group) :]
    return page
