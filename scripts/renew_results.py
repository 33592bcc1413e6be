"""Copies a finished run of `make run` into docs/quick_run, and renews what README and docs say of measured numbers.

What is copied: the executed notebooks, with figures small enough for a web page, and the files behind the tables.
Everything measured stands in the pages between `<!-- NAME -->` and `<!-- end of NAME -->` and is written from files;
tests/test_committed_results.py refuses pages that differ from them.

Usage: renew_results.py [--run-dir DIR | --pages-only]
"""

import argparse
import base64
import io
import json
import re
import shutil
import sys
from pathlib import Path

import pandas as pd
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "workers")]

from renew_page import renew_page

QUICK_RUN = ROOT / "docs" / "quick_run"
COPIED = {  # from the run's folder, under which name
    "aucs.csv": "aucs.csv",
    "floors.csv": "floors.csv",
    "history.csv": "history.csv",
    "localization.csv": "localization.csv",
    "exports/parity.json": "parity.json",
    "run.json": "run.json",
    "figures/03_aucs.png": "aucs.png",
    "figures/04_localization.png": "localization.png",
    "figures/04_classes.png": "classes.png",
    "figures/04_hits_and_misses.png": "hits_and_misses.png",
    "xvision-phantom/scores.csv": "xvision/scores.csv",
    "xvision-phantom/study.json": "xvision/study.json",
    "xvision-phantom/figures/06_flaws.csv": "xvision/flaws.csv",
    "xvision-phantom/figures/06_scores.png": "xvision/scores.png",
    "xvision-phantom/figures/06_confusion_roc.png": "xvision/confusion_roc.png",
    "xvision-phantom/figures/06_saliency.png": "xvision/saliency.png",
}
MAX_WIDTH = 1000  # pixels, of a figure in an executed notebook: 10 inches at 100 dpi
FORMATS = {
    "saved_model": "SavedModel",
    "model.onnx": "ONNX",
    "model.tflite": "LiteRT",
    "model_int8.tflite": "LiteRT, int8 weights",
}


def shrink_figure(png):
    """Returns the type and the base64 text of a figure of at most `MAX_WIDTH` pixels across, the smaller of two forms.

    A PNG of 256 colors suits plots, a JPEG suits radiographs. `png` is base64 text too.
    """
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    if picture.width > MAX_WIDTH:
        picture = picture.resize((MAX_WIDTH, round(picture.height * MAX_WIDTH / picture.width)), Image.Resampling.BOX)
    forms = {"image/png": io.BytesIO(), "image/jpeg": io.BytesIO()}
    picture.quantize(256, dither=Image.Dither.NONE).save(forms["image/png"], "PNG", optimize=True)
    picture.save(forms["image/jpeg"], "JPEG", quality=80, optimize=True)
    kind, file = min(forms.items(), key=lambda form: len(form[1].getvalue()))
    return kind, base64.b64encode(file.getvalue()).decode()


def clean_notebook(notebook):
    """Removes from an executed notebook (a dict) what is of one machine, and shrinks its figures."""
    notebook["metadata"].pop("papermill", None)
    for cell in notebook["cells"]:
        cell["metadata"] = {key: cell["metadata"][key] for key in ("tags", "cellView") if cell["metadata"].get(key)}
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                kind, text = shrink_figure(data.pop("image/png"))
                data[kind] = text
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    return re.sub(re.escape(str(ROOT)) + "/?", "", text) + "\n"


def copy_run(run_dir):
    """Copies the executed notebooks and the files behind the tables of a run into docs/quick_run."""
    run = json.loads((run_dir / "run.json").read_text())
    if not (run["synthetic"] and run["finished"]):
        sys.exit(f"{run_dir} is no finished run on the synthetic study; `make run` makes one")
    for source, target in COPIED.items():
        (QUICK_RUN / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run_dir / source, QUICK_RUN / target)
    executed = QUICK_RUN / "executed"
    executed.mkdir(exist_ok=True)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text = clean_notebook(json.loads((run_dir / "executed" / path.name).read_text()))
        (executed / path.name).write_text(text, encoding="utf-8")
    return [str(path.relative_to(ROOT)) for path in sorted(executed.glob("*.ipynb"))]


def draw_aucs(aucs, run):
    """Returns what a run was and its mean AUC on the test images, as text."""
    machine, split = run["runtime"], run["split"]
    mean = aucs[aucs["split"].eq("test")].set_index("pathology").loc["mean"]
    return (
        f"Mean AUC **{mean.auc:.3f}** ({mean.auc_low:.3f} to {mean.auc_high:.3f}, 95 % interval over patients) on "
        f"{split['films']['test']:,} test images of\n{split['patients']['test']:,} patients, after "
        f"{run['epochs_run']} epochs from random weights on {split['films']['train']:,} images of other patients, in\n"
        f"{run['seconds']['wall_clock'] / 60:.0f} minutes on {machine['processor']}, without a GPU; TensorFlow "
        f"{machine['tensorflow']}, Keras {machine['keras']}. All 14 findings:"
    )


def draw_floors(floors):
    """Returns what is reached without a trained network, as sentences."""
    names = {
        "thumbnail": "a ridge regression on 16 x 16 pixels",
        "random network": "one on the features of an untrained network",
        "metadata only": "age, sex, view and follow-up number",
        "view only": "the view alone",
    }
    mean = floors[floors["pathology"].eq("mean")].set_index("floor")
    found = [
        f"{text} {mean.auc[name]:.3f} ({mean.auc_low[name]:.3f} to {mean.auc_high[name]:.3f})"
        for name, text in names.items()
    ]
    by_finding = floors[floors["pathology"].ne("mean")].groupby("pathology")["difference"].min()
    beaten = by_finding[by_finding <= 0]
    text = "**Floors**, the mean AUC without a trained network: " + "; ".join(found) + ". "
    if len(beaten):
        listed = ", ".join(name.replace("_", " ") for name in beaten.index)
        text += f"On {len(beaten)} of {len(by_finding)} findings ({listed}) one of them is as good as the network."
    return text.strip()


def draw_real_labels(chexnet, published):
    """Returns the table of what has been measured on real labels.

    Args:
        chexnet: DataFrame of docs/chexnet/aucs.csv. The floors are held by tests/evaluation/test_floors.py.
        published: DataFrame of data/published_means.csv, of which those checked at their source are counted.
    """
    mean = chexnet.set_index("pathology").loc["mean"]
    small = published[published["model"].str.startswith("DenseNet-121") & published["pixels"].eq(224)]
    small = small.loc[small["checked"].eq("at the source"), "mean_auc"]
    rows = [
        "| a retrained CheXNet of another project, on 5,213 images of the list | "
        f"{mean.auc:.3f} ({mean.auc_low:.3f} to {mean.auc_high:.3f}) | [docs/evaluate.md](docs/evaluate.md) |",
        "| the view alone (AP or PA), no pixels | 0.575 | the same |",
        "| age, sex, view and follow-up number, no pixels | 0.629 | the same |",
        f"| DenseNet-121 at 224 pixels, {len(small)} models of others | {small.min():.3f} to {small.max():.3f} | "
        "[docs/recipe.md](docs/recipe.md) |",
    ]
    return "\n".join(["| on NIH's official test list | mean AUC | from |", "|---|---|---|", *rows])


def draw_published(published):
    """Returns the table of data/published_means.csv: mean AUCs that others report on the official test list."""
    lines = ["| model | pixels | start | mean AUC | chosen on test images | number read |", "|---|---|---|---|---|---|"]
    for row in published.fillna("").itertuples():
        model = f"[{row.model}]({row.source})" if row.source else row.model
        auc = f"{row.mean_auc:.3f}" + (f" ({row.low:.3f} to {row.high:.3f})" if row.low else "")
        cells = (model, f"{row.pixels:.0f}" if row.pixels else "", row.start, auc, row.test_images_chose, row.checked)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_heatmaps(localization):
    """Returns what the heatmaps' scores say, flattering or not, as text."""
    mean = localization.set_index("pathology").loc["mean"]
    share = {name: f"{mean[f'pointing_{name}']:.0%}" for name in ("low", "high", "random", "center", "location")}
    low, high = mean["energy_minus_center_low"], mean["energy_minus_center_high"]
    verdict = "better than" if low > 0 else "worse than" if high < 0 else "not shown to differ from"
    return (
        "**Heatmaps**, mean of eight findings. Pointing: the hottest place lies in the box on "
        f"{mean['pointing']:.0%} of the\nimages ({share['low']} to {share['high']}); with random weights on "
        f"{share['random']}, at the image's center on {share['center']}, at the\n"
        f"place where such boxes lie in other patients on {share['location']}. Energy: "
        f"{mean['energy']:.2f} of the heat lies inside the box,\nwhich is {verdict} a blob at the center "
        f"({mean['energy_center']:.2f}); the map of other patients' boxes has {mean['energy_location']:.2f}."
    )


def draw_nodules(scores, study):
    """Returns the table of the study of nodules: accuracy and AUC for each kind of features and classifier."""
    counts, majority = study["counts"], next(row for row in study["scores"] if row["figure"] == "majority")
    lines = ["| features | classifier | accuracy | AUC |", "|---|---|---|---|"]
    lines.append(f"| none: always the majority class | | {majority['value']:.3f} | 0.5 |")
    for (features, classifier), rows in scores.groupby(["features", "classifier"], sort=False):
        figures = rows.set_index("figure")
        cells = [
            f"{figures.loc[name, 'value']:.3f} ({figures.loc[name, 'low']:.3f} to {figures.loc[name, 'high']:.3f})"
            for name in ("accuracy", "auc")
        ]
        lines.append(f"| {features} | {classifier} | {cells[0]} | {cells[1]} |")
    about = f"{counts['films']:,} images of {counts['patients']:,} patients, {counts['Nodule']:,} with a nodule."
    return f"{about}\n\n" + "\n".join(lines)


def draw_saliency(study):
    """Returns how often each kind of saliency map points into a nodule, beside its controls, as sentences."""
    rows = study["saliency"]
    shares = [
        f"{row['method']} on {row['pointing']:.0%} ({row['pointing_low']:.0%} to {row['pointing_high']:.0%}), with an "
        f"untrained head on {row['pointing_untrained']:.0%}"
        for row in rows
    ]
    text = f"Saliency maps of {rows[0]['n_images']} test images with nodules point into one: {'; '.join(shares)}; the "
    text += f"image's center on {rows[0]['pointing_center']:.0%}."
    if by_finding := study["saliency_by_finding"]:
        others = [f"{name.replace('_', ' ')} {share:.0%}" for name, share in by_finding.items() if name != "Nodule"]
        text += f" The gradients of notebook 2's own logits point there as well: Nodule {by_finding['Nodule']:.0%}, "
        text += f"{', '.join(others[:3])}, and of all others at most {others[3].rpartition(' ')[2]}."
    return text


def draw_parity(parity):
    """Returns the table of export formats: size, difference from Keras, speed."""
    lines = [
        "| format | MB | largest difference of a probability from Keras | same top 5 | load, s | "
        "one 1024 px PNG, ms: p50, p95 | images/s in batches of 32 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in parity.items():
        lines.append(
            f"| {FORMATS[name]} | {row['bytes'] / 1e6:.0f} | {row['max_difference']:.0e} | {row['same_top5']:.1%} | "
            f"{row['load_seconds']:.1f} | {row['p50_ms']:.0f}, {row['p95_ms']:.0f} | {row['images_per_second']:.0f} |"
        )
    return "\n".join(lines)


def draw_pages():
    """Returns what stands between marks: a dict from (page, name) to text."""
    read = lambda name: json.loads((QUICK_RUN / name).read_text())  # noqa: E731
    study, jsrt = read("xvision/study.json"), ROOT / "docs" / "xvision_jsrt"
    jsrt_study = json.loads((jsrt / "study.json").read_text())
    readme, xvision = ROOT / "README.md", ROOT / "docs" / "xvision.md"
    published = pd.read_csv(ROOT / "data" / "published_means.csv")
    return {
        (readme, "quick run"): draw_aucs(pd.read_csv(QUICK_RUN / "aucs.csv"), read("run.json")),
        (readme, "real labels"): draw_real_labels(pd.read_csv(ROOT / "docs" / "chexnet" / "aucs.csv"), published),
        (ROOT / "docs" / "recipe.md", "published"): draw_published(published),
        (readme, "floors"): draw_floors(pd.read_csv(QUICK_RUN / "floors.csv")),
        (readme, "heatmaps"): draw_heatmaps(pd.read_csv(QUICK_RUN / "localization.csv")),
        (readme, "xvision"): draw_nodules(pd.read_csv(QUICK_RUN / "xvision" / "scores.csv"), study),
        (xvision, "saliency"): draw_saliency(study),
        (xvision, "jsrt"): draw_nodules(pd.read_csv(jsrt / "scores.csv"), jsrt_study),
        (ROOT / "docs" / "model_formats.md", "parity"): draw_parity(read("parity.json")),
    }


def draw_benchmark_pages():
    """As `draw_pages`, for the pages that benchmarks write. Imports TensorFlow with them."""
    import eval_size
    import peers
    import scale
    import speed_page
    from benchmarks.tpu.page import draw_tables

    results = ROOT / "benchmarks" / "results"
    pages = {
        ("evaluate.md", "eval size"): (eval_size.draw_page, "eval_size"),
        ("scale.md", "scale"): (scale.draw_page, "scale"),
        ("scale.md", "peers"): (peers.draw_page, "peers"),
        ("speed.md", "input"): (speed_page.draw_input, "input_pipeline"),
        ("speed.md", "ways"): (speed_page.draw_ways, "input_pipeline"),
        ("speed.md", "results"): (speed_page.draw_results, "training_step"),
        ("tpu.md", "results"): (draw_tables, "tpu_check"),
    }
    return {
        (ROOT / "docs" / page, name): draw(json.loads((results / f"{file}.json").read_text())).rstrip("\n")
        for (page, name), (draw, file) in pages.items()
    }


def main():
    """Copies the run, then renews the pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, default=ROOT / "models" / "densenet121", help="a finished default run")
    parser.add_argument("--pages-only", action="store_true", help="copy nothing, only renew the pages")
    arguments = parser.parse_args()
    if not arguments.pages_only:
        print("\n".join(copy_run(arguments.run_dir.resolve())))
    for (page, name), text in (draw_pages() | draw_benchmark_pages()).items():
        renew_page(page, name, text)
        print(f"{page.relative_to(ROOT)}: {name}")


if __name__ == "__main__":
    main()
