"""Makes a run's report: report.json, a page and its figure, small enough to commit and without a path or a patient.

In `docs/runs` it becomes a row of the table there. Notebook 00 writes it into the run's folder.

Usage: make_report.py [--run-dir DIR] [--name NAME] [--out FOLDER]
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("notebooks", "scripts", "benchmarks/workers")]

from page_tables import format_auc, write_table
from renew_page import renew_page

from helpers.export.model_card import hide_paths
from helpers.runtime import NOTEBOOKS, read_csv, read_json, resolve_path, write_json, write_text
from helpers.study import name_unit

RUNS = ROOT / "docs" / "runs"
COPIED = ("study", "synthetic", "split", "weights", "weights_sha256", "index_sha256", "settings", "runtime", "backbone")
COUNTED = ("side", "eval_size", "batch_size", "epochs_run", "best_epoch", "best_val_auc", "seconds", "interruptions")


def gather_report(run_dir):
    """Gathers what a reader needs to judge a run, from the files that the notebooks wrote.

    Args:
        run_dir: path of the run's folder.

    Returns:
        dict: the record of the training without paths; `notebooks`, seconds of each; `aucs`, a row a finding and `mean`
        with intervals; `heatmaps`, the mean row of localization.csv, or None.

    Raises:
        FileNotFoundError: a file is missing; names the notebook that writes it.
        ValueError: the training has not ended.
    """
    for name, notebook in {"run.json": "02_train_densenet121", "aucs.csv": "03_evaluate"}.items():
        if not (run_dir / name).exists():
            raise FileNotFoundError(f"{run_dir / name} is missing. Run {notebook} with this RUN_DIR.")
    run = read_json(run_dir / "run.json")
    if not run["finished"]:
        raise ValueError(f"{run_dir}: {run['pause'] or 'the training has not ended.'}")
    aucs = read_csv(run_dir / "aucs.csv")
    aucs = aucs[aucs["split"].eq(aucs["split"].iloc[0])]
    report = {name: run[name] for name in (*COPIED, *COUNTED) if name in run}
    copies = {name: run_dir / "executed" / f"{name}.ipynb" for name in NOTEBOOKS}
    report["notebooks"] = {name: read_duration(path) for name, path in copies.items() if path.exists()}
    report["aucs"] = json.loads(aucs.to_json(orient="records"))
    located = read_csv(run_dir / "localization.csv") if (run_dir / "localization.csv").exists() else []
    report["heatmaps"] = json.loads(located.iloc[-1].to_json()) if len(located) else None
    return hide_paths(report)


def read_duration(path):
    """Returns the seconds that an executed notebook took; None where it does not say."""
    seconds = read_json(path)["metadata"].get("papermill", {}).get("duration")
    return seconds and round(seconds)


def draw_page(name, report):
    """Returns the page of a report, in Markdown."""
    mean, runtime, split, heat = report["aucs"][-1], report["runtime"], report["split"], report["heatmaps"]
    findings = [row for row in report["aucs"] if row["auc"] is not None]
    rows = [(row["pathology"].replace("_", " "), row["n_pos"], format_auc(row)) for row in findings]
    synthetic = ", synthetic: its numbers say nothing of real radiographs" * report["synthetic"]
    images = ", ".join(f"{number:,} {subset}" for subset, number in split["films"].items())
    unit = name_unit(bool(split["patients"]))
    versions = f"Python {runtime['python']}, TensorFlow {runtime['tensorflow']}, Keras {runtime['keras']}"
    minutes = report["seconds"]["wall_clock"] / 60
    facts = {
        "study": f"{report['study']}{synthetic}",
        "split": f"{split['name']} ({split['sha256'][:12]}), {images}",
        "start": report["weights"]["source"],
        "machine": name_machine(runtime),
        "software": f"{versions} on {runtime['backend']}, commit {runtime['commit']}",
        "weights": report["weights_sha256"],
        "training": f"{report['epochs_run']} epochs, {minutes:,.0f} minutes, {report['interruptions']} interruptions",
        "notebooks": ", ".join(f"{key[:2]} {value:,} s" for key, value in report["notebooks"].items() if value),
    }
    parts = [
        f"# {name}",
        f"Mean AUC **{format_auc(mean)}** on the {mean['split']} images, 95 % interval over {unit}. Research only.",
        write_table(["", ""], facts.items()),
        "![AUC of each finding](aucs.png)",
        write_table(["finding", "images with it", "AUC"], rows),
    ]
    if heat:
        parts.append(f"Heatmaps point into the box on {heat['pointing']:.0%} of {heat['n_images']:,} images.")
    return "\n\n".join(parts) + "\n"


def name_machine(runtime):
    """Returns the processor and what computed, such as "..., 96 cores, TPU v5 lite, jax x 8"."""
    names = dict.fromkeys(name.removeprefix("/device:").partition(":")[0] for name in runtime["devices"])
    accelerators = [name for name in names if name.lower() != "cpu"]
    return ", ".join([runtime["processor"], *accelerators, f"{runtime['runtime']} x {runtime['n_replicas']}"])


def draw_runs(folder=RUNS):
    """Returns the table of all reports in a folder: real images first, by study and split, then by the mean AUC."""
    rows = []
    for path in folder.glob("*/report.json"):
        report, name = read_json(path), path.parent.name
        mean, split = report["aucs"][-1], report["split"]
        study = f"{report['study']}{' (synthetic)' * report['synthetic']}"
        cells = (
            f"[{name}]({name}/README.md)",
            study,
            f"{split['name']}, {split['films'][mean['split']]:,} {mean['split']} images",
            format_auc(mean),
            f"{report['epochs_run']} epochs, {report['seconds']['wall_clock'] / 60:,.0f} minutes",
            name_machine(report["runtime"]),
        )
        rows.append(((report["synthetic"], study, split["name"], -mean["auc"], name), cells))
    header = ["run", "study", "split", "mean AUC", "training", "machine"]
    return write_table(header, [cells for _, cells in sorted(rows)]) if rows else "No run has been reported yet."


def write_report(run_dir, folder, name):
    """Writes a run's report into a folder."""
    report = gather_report(run_dir)
    write_json(folder / "report.json", report)
    write_text(folder / "README.md", draw_page(name, report))
    if (run_dir / "figures" / "03_aucs.png").exists():
        shutil.copyfile(run_dir / "figures" / "03_aucs.png", folder / "aucs.png")


def main():
    """Writes the report, and the table of runs where it is added to docs/runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", default="", help="a finished run (default: models/densenet121)")
    parser.add_argument("--name", default="", help="of its folder in docs/runs, such as nih-full-v5e8-2027-01")
    parser.add_argument("--out", default="", help="another folder, in place of docs/runs/NAME")
    arguments = parser.parse_args()
    run_dir = resolve_path(arguments.run_dir or "models/densenet121")
    name = arguments.name or run_dir.name
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        sys.exit(f"NAME is {name!r}; expected small letters, digits and dashes, such as nih-full-v5e8")
    folder = resolve_path(arguments.out) if arguments.out else RUNS / name
    try:
        write_report(run_dir, folder, name)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    print(folder / "README.md")
    if not arguments.out:
        renew_page(RUNS / "README.md", "runs", draw_runs(RUNS))


if __name__ == "__main__":
    main()
