"""Copies a finished run of `make run` into docs/quick_run, and renews what README and docs say of measured numbers.

What is copied: the executed notebooks, with figures small enough for a web page, and the files behind the tables.
Everything measured stands in the pages between `<!-- NAME -->` and `<!-- end of NAME -->` and is written from files by
page_tables.py, and so are numbers within sentences. tests/test_committed_results.py refuses pages that differ from the
files.

Usage: renew_results.py [--run-dir DIR] [--machine-was "otherwise idle"] | --pages-only
"""

import argparse
import base64
import importlib
import io
import json
import re
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pandas as pd
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path += [
    str(ROOT / "scripts"),
    str(ROOT),
    str(ROOT / "notebooks"),
    str(ROOT / "benchmarks"),
    str(ROOT / "benchmarks" / "workers"),
]

import page_tables
import reference_tables
from renew_page import renew_page

from helpers.study.counts import PUBLISHED

QUICK_RUN = ROOT / "docs" / "quick_run"
REFERENCE = ROOT / "docs" / "reference_evaluation"
EARLIER_RUNS = ROOT / "docs" / "earlier_runs.csv"
COPIED = {  # from the run's folder, under which name
    "aucs.csv": "aucs.csv",
    "floors.csv": "floors.csv",
    "history.csv": "history.csv",
    "localization.csv": "localization.csv",
    "exports/parity.json": "parity.json",
    "run.json": "run.json",
    "figures/01_synthetic_findings.png": "../synthetic_findings.png",
    "figures/03_aucs.png": "aucs.png",
    "figures/04_localization.png": "localization.png",
    "figures/04_classes.png": "classes.png",
    "figures/04_hits_and_misses.png": "hits_and_misses.png",
    "xvision-phantom/scores.csv": "xvision/scores.csv",
    "xvision-phantom/study.json": "xvision/study.json",
    "xvision-phantom/figures/06_leads.csv": "xvision/leads.csv",
    "xvision-phantom/figures/06_flaws.csv": "xvision/flaws.csv",
    "xvision-phantom/figures/06_scores.png": "xvision/scores.png",
    "xvision-phantom/figures/06_confusion_roc.png": "xvision/confusion_roc.png",
    "xvision-phantom/figures/06_saliency.png": "xvision/saliency.png",
}
COPIED_SEEDS = ("seeds.json", "seeds.csv", "seeds_localization.csv")
BENCHMARK_BLOCKS = {  # from a page in docs and the name of its marks to what writes it, from which results
    ("evaluate.md", "eval size"): ("eval_size", "draw_page", "eval_size"),
    ("scale.md", "scale"): ("scale", "draw_page", "scale"),
    ("scale.md", "growth"): ("scale", "draw_page", "growth"),
    ("scale.md", "peers"): ("peers", "draw_page", "peers"),
    ("speed.md", "make run"): ("make_run", "draw_page", "make_run"),
    ("speed.md", "input"): ("speed_page", "draw_input", "input_pipeline"),
    ("speed.md", "ways"): ("speed_page", "draw_ways", "input_pipeline"),
    ("speed.md", "results"): ("speed_page", "draw_results", "training_step"),
    ("speed.md", "gpu"): ("speed_page", "draw_gpu", "gpu_step"),
    ("tpu.md", "results"): ("benchmarks.tpu.page", "draw_tables", "tpu_check"),
}
MAX_WIDTH = 1000  # pixels, of a figure in an executed notebook: 10 inches at 100 dpi


def shrink_figure(png, kinds=("image/png", "image/jpeg")):
    """Returns the type and the base64 text of a figure of at most `MAX_WIDTH` pixels across, in the smaller of `kinds`.

    A PNG of 256 colors suits plots, a JPEG suits radiographs. `png` is base64 text too.
    """
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    if picture.width > MAX_WIDTH:
        picture = picture.resize((MAX_WIDTH, round(picture.height * MAX_WIDTH / picture.width)), Image.Resampling.BOX)
    forms = {"image/png": io.BytesIO(), "image/jpeg": io.BytesIO()}
    picture.quantize(256, dither=Image.Dither.NONE).save(forms["image/png"], "PNG", optimize=True)
    picture.save(forms["image/jpeg"], "JPEG", quality=80, optimize=True)
    kind, file = min(((kind, forms[kind]) for kind in kinds), key=lambda form: len(form[1].getvalue()))
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


def copy_run(run_dir, machine_was):
    """Copies the executed notebooks and the files behind the tables of a run into docs/quick_run.

    `machine_was` says whether other work ran beside it, which no file of a run knows; it is kept with the times.
    """
    run = json.loads((run_dir / "run.json").read_text())
    if not (run["synthetic"] and run["finished"]):
        sys.exit(f"{run_dir} is no finished run on the synthetic study; `make run` makes one")
    for source, target in COPIED.items():
        (QUICK_RUN / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run_dir / source, QUICK_RUN / target)
    executed = QUICK_RUN / "executed"
    executed.mkdir(exist_ok=True)
    seconds, clock = {}, []
    for path in sorted((ROOT / "notebooks").glob("0[1-9]_*.ipynb")):
        notebook = json.loads((run_dir / "executed" / path.name).read_text())
        timed = notebook["metadata"]["papermill"]
        seconds[path.stem] = round(timed["duration"], 1)
        clock += [datetime.fromisoformat(timed[name]) for name in ("start_time", "end_time")]
        text = clean_notebook(notebook)
        (executed / path.name).write_text(text, encoding="utf-8")
    times = {"machine_was": machine_was, "seconds": seconds}  # two notebooks may have run at a time
    times["from_first_to_last"] = round((max(clock) - min(clock)).total_seconds(), 1)
    (QUICK_RUN / "times.json").write_text(json.dumps(times, indent=1) + "\n")
    return [str(path.relative_to(ROOT)) for path in sorted(executed.glob("*.ipynb"))]


def list_earlier_runs():
    """Lists the documented runs before the one in docs/quick_run, newest first, as git recorded them: a DataFrame."""
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout  # noqa: E731
    rows, seen = [], {json.loads((QUICK_RUN / "run.json").read_text())["parts"][0]["began"]}
    for commit in git("log", "--format=%h", "--", "docs/quick_run/run.json").split():
        text = {
            name: git("show", f"{commit}:docs/quick_run/{name}")
            for name in ("run.json", "aucs.csv", "localization.csv")
        }
        run = json.loads(text["run.json"]) if text["run.json"] else {}
        began = run["parts"][0]["began"] if run.get("parts") else ""
        if not began or began in seen:  # committed again, as after another file was added
            continue
        seen.add(began)
        aucs = pd.read_csv(io.StringIO(text["aucs.csv"])).query("split == 'test'").set_index("pathology")
        located = (
            pd.read_csv(io.StringIO(text["localization.csv"])).set_index("pathology")
            if text["localization.csv"]
            else None
        )
        where = {} if located is None else located.loc["mean"]
        row = {
            "began": began[:10],
            "commit": run["runtime"]["commit"][:7],
            "seed": run["seed"],
            "epochs": run["epochs_run"],
        }
        row |= {name: round(aucs.loc["mean", name], 4) for name in ("auc", "auc_low", "auc_high")}
        rows.append(row | {name: where.get(name) for name in ("pointing", "energy", "energy_center")})
    return pd.DataFrame(rows).round(4)


def read_reference():
    """Returns the tables of docs/reference_evaluation: a dict from a name, or folder and name, to a DataFrame."""
    tables = {name: pd.read_csv(REFERENCE / f"{name}.csv") for name in ("drop", "metadata_floors")}
    names = ("aucs", "beside", "floors", "radiologists", "subgroups", "top")
    return tables | {
        (part, name): pd.read_csv(REFERENCE / part / f"{name}.csv") for part in reference_tables.PARTS for name in names
    }


def draw_pages():
    """Returns what stands between marks: a dict from (page, name) to text."""
    read = lambda name: json.loads((QUICK_RUN / name).read_text())  # noqa: E731
    study, jsrt = read("xvision/study.json"), ROOT / "docs" / "xvision_jsrt"
    jsrt_study = json.loads((jsrt / "study.json").read_text())
    results, seeds = page_tables.read_results(), read("seeds.json")
    gate, difficulty = results["input_gate"], results["difficulty"]
    gate_page, card = ROOT / "docs" / "input_gate.md", ROOT / "data" / "README.md"
    run, located = read("run.json"), pd.read_csv(QUICK_RUN / "localization.csv")
    readme, xvision, recipe = ROOT / "README.md", ROOT / "docs" / "xvision.md", ROOT / "docs" / "recipe.md"
    means, findings = (pd.read_csv(ROOT / "data" / f"published_{name}.csv") for name in ("means", "aucs"))
    leads = pd.read_csv(QUICK_RUN / "xvision" / "leads.csv")
    is_official = means["split"].eq("official")
    page, reference = REFERENCE / "README.md", read_reference()
    return {
        (readme, "real labels"): reference_tables.draw_real_labels(reference),
        (page, "findings"): reference_tables.draw_reference_findings(reference, findings),
        (page, "floors"): reference_tables.draw_reference_floors(reference),
        (page, "subgroups"): reference_tables.draw_subgroups(reference),
        (page, "radiologists"): reference_tables.draw_radiologists(reference),
        (page, "top"): reference_tables.draw_top(reference),
        (page, "drop"): reference_tables.draw_drop(reference["drop"]),
        (recipe, "published"): page_tables.draw_published(means[is_official]),
        (recipe, "other splits"): page_tables.draw_published(means[~is_official]),
        (readme, "quick run"): page_tables.draw_quick_run(
            pd.read_csv(QUICK_RUN / "aucs.csv"),
            pd.read_csv(QUICK_RUN / "floors.csv"),
            seeds,
            results,
            run["epochs_run"],
        ),
        (readme, "heatmaps"): page_tables.draw_heatmaps(located, seeds),
        (ROOT / "docs" / "earlier_runs.md", "runs"): page_tables.draw_earlier(pd.read_csv(EARLIER_RUNS)),
        (xvision, "scores"): page_tables.draw_nodules(pd.read_csv(QUICK_RUN / "xvision" / "scores.csv"), study, leads),
        (xvision, "saliency"): page_tables.draw_saliency(study),
        (xvision, "flaws"): page_tables.draw_flaws(pd.read_csv(QUICK_RUN / "xvision" / "flaws.csv")),
        (xvision, "jsrt"): page_tables.draw_nodules(pd.read_csv(jsrt / "scores.csv"), jsrt_study),
        (gate_page, "false alarms"): page_tables.draw_gate(gate, "false alarms"),
        (gate_page, "detections"): page_tables.draw_gate(gate, "detections"),
        (gate_page, "others"): page_tables.draw_gate_others(gate),
        (readme, "times"): page_tables.draw_times(run, read("times.json")),
        (card, "synthetic"): page_tables.draw_synthetic(run, int(located["n_boxes"].iloc[-1])),
        (card, "difficulty"): page_tables.draw_difficulty(difficulty),
        (card, "published"): page_tables.draw_published_findings(findings),
        (card, "counts"): page_tables.draw_counts(run, PUBLISHED, reference["metadata_floors"]),
        (ROOT / "docs" / "model_formats.md", "parity"): page_tables.draw_parity(read("parity.json")),
    }


def draw_benchmark_pages():
    """As `draw_pages`, for the pages that benchmarks write. Imports TensorFlow with them."""
    results = ROOT / "benchmarks" / "results"
    pages = {}
    for (page, name), (module, function, file) in BENCHMARK_BLOCKS.items():
        draw = getattr(importlib.import_module(module), function)
        pages[ROOT / "docs" / page, name] = draw(json.loads((results / f"{file}.json").read_text())).rstrip("\n")
    return pages


def renew_pages():
    """Writes what the files hold between the marks of the pages."""
    for (page, name), text in (draw_pages() | draw_benchmark_pages()).items():
        renew_page(page, name, text)
        print(f"{page.relative_to(ROOT)}: {name}")
    results = page_tables.read_results()
    for name, sentences in page_tables.SENTENCES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        for sentence in sentences:
            text = page_tables.renew_sentence(text, sentence, results)
        (ROOT / name).write_text(text, encoding="utf-8")
        print(f"{name}: {len(sentences)} sentences")


def main():
    """Copies the run, then renews the pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, default=ROOT / "models" / "densenet121", help="a finished default run")
    parser.add_argument(
        "--seeds-dir", type=Path, default=ROOT / "models" / "seeds", help="of `make seeds`; copied if it is there"
    )
    parser.add_argument("--pages-only", action="store_true", help="copy nothing, only renew the pages")
    parser.add_argument(
        "--machine-was", default="it was not noted whether other work ran beside it", help="idle or not"
    )
    arguments = parser.parse_args()
    if not arguments.pages_only:
        print("\n".join(copy_run(arguments.run_dir.resolve(), arguments.machine_was)))
        for name in COPIED_SEEDS if arguments.seeds_dir.is_dir() else ():
            shutil.copyfile(arguments.seeds_dir / name, QUICK_RUN / name)
        if len(runs := list_earlier_runs()):  # empty without git's history
            runs.to_csv(EARLIER_RUNS, index=False)
    renew_pages()


if __name__ == "__main__":
    main()
