"""Executes the notebooks in order, keeps the executed copies in RUN_DIR/executed, and shows the results on one screen.

Usage: run_notebooks.py [--only NOTEBOOK ...] [--data-dir DIR] [--run-dir DIR] [--profile quick|full]
    [--set NAME=VALUE ...]
"""

import argparse
import ast
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import papermill

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))

from helpers.runtime import copy_file, is_remote, read_csv, resolve_path

NOTEBOOKS = [
    *("01_prepare_data", "02_train_densenet121", "03_evaluate", "04_explain", "05_export_and_predict"),
    "06_xvision_vgg16_nodules",
]


def parse_arguments():
    """Returns the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=NOTEBOOKS, metavar="NOTEBOOK", help="execute these, in their order"
    )
    parser.add_argument("--data-dir", default="data/phantom", help="study in NIH layout (default: the synthetic one)")
    parser.add_argument(
        "--run-dir", default="", help="where results go (default: models/densenet121, or models/<name of PREDICTIONS>)"
    )
    parser.add_argument("--profile", default="quick", choices=["quick", "full"])
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the notebooks")
    return parser.parse_args()


@contextlib.contextmanager
def kernel_messages_to(path):
    """Sends what kernels write to the error stream, TensorFlow's start-up messages mostly, to a file."""
    own = os.dup(2)
    with open(path, "wb") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(own, 2)
            os.close(own)


def list_settings():
    """Returns the names of all settings of the notebooks but those that have options of their own."""
    names = {name for notebook in NOTEBOOKS for name in papermill.inspect_notebook(str(find_notebook(notebook)))}
    return names - {"DATA_DIR", "RUN_DIR", "PROFILE"}


def parse_setting(pair, known):
    """Returns name and value of "NAME=VALUE"; a value that is no Python literal is a string. Exits on unknown names."""
    name, sign, text = pair.partition("=")
    if not sign or name not in known:
        sys.exit(f"{pair}: expected NAME=VALUE with one of the settings {', '.join(sorted(known))}")
    try:
        return name, ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return name, text


def find_notebook(name):
    """Returns the path of a notebook of the repository."""
    return ROOT / "notebooks" / f"{name}.ipynb"


def call(function, path, *arguments):
    """Calls a function of a path and more; of one in a bucket in a process of its own, and returns what it returns.

    Only TensorFlow reaches a bucket, and a process that has loaded it may hold the TPU until it ends: this one lives
    as long as all the notebooks.
    """
    if not is_remote(path):
        return function(path, *arguments)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, path, *arguments).result()


def name_copy(name, settings):
    """Returns how the executed copy of a notebook is called: hosts that pack a part each do not share one."""
    part = str(settings.get("PART", "")) if name == NOTEBOOKS[0] else ""
    return f"{name}.part-{part.replace('/', '-of-')}" if part else name


def upload_copy(executed_dir, name, folder):
    """Copies what executing a notebook has left in a local folder to one in a bucket, under the name of the copy."""
    for ending in (".ipynb", ".log", ".failed.ipynb", ".failed.log"):
        if (folder / (name + ending)).exists():
            copy_file(folder / (name + ending), executed_dir / (name + ending))
        elif "failed" in ending:  # of an earlier attempt
            (executed_dir / (name + ending)).unlink(missing_ok=True)


def execute(name, folder, settings):
    """Executes one notebook with those of the settings that it has; returns its error where it fails, else None.

    A failed copy goes under a name of its own, so that it never takes the place of one that succeeded.
    """
    source, target = find_notebook(name), folder / f"{name_copy(name, settings)}.ipynb"
    attempt = target.with_suffix(".failed.ipynb")
    known = papermill.inspect_notebook(str(source))
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"{name} ...", flush=True)
    started = time.monotonic()
    try:
        with kernel_messages_to(attempt.with_suffix(".log")):
            papermill.execute_notebook(
                str(source),
                str(attempt),
                {key: value for key, value in settings.items() if key in known},
                cwd=str(ROOT / "notebooks"),
                kernel_name="python3",
                progress_bar=False,
                stdout_file=sys.stdout,
            )
    except papermill.PapermillExecutionError as error:
        return f"{name} failed in cell {error.exec_count}: {error.ename}: {error.evalue}"
    os.replace(attempt, target)
    os.replace(attempt.with_suffix(".log"), target.with_suffix(".log"))
    print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    return None


def execute_into(executed_dir, name, settings):
    """Executes one notebook and keeps the executed copy in a folder, local or in a bucket. Exits where it fails."""
    if is_remote(executed_dir):  # Papermill saves after every cell, and would write the whole object each time
        with tempfile.TemporaryDirectory() as folder:
            error = execute(name, Path(folder), settings)
            call(upload_copy, executed_dir, name_copy(name, settings), Path(folder))
    else:
        error = execute(name, executed_dir, settings)
    if error:
        sys.exit(f"\n{error}\nSee {executed_dir / name_copy(name, settings)}.failed.ipynb")


def read_pause(run_dir):
    """Returns why training paused before its end, "" where it did not."""
    return json.loads((run_dir / "run.json").read_text())["pause"]


def show_scores(run_dir):
    """Prints the table of AUCs of the part that was measured."""
    aucs = read_csv(run_dir / "aucs.csv")
    part = aucs["split"].iloc[0]
    table = aucs[aucs["split"].eq(part)]
    predictions = read_csv(run_dir / "predictions.csv", usecols=["patient_id", "split"]).query("split == @part")
    of = (
        f"of {predictions['patient_id'].nunique():,} patients"
        if table["n_pos_patients"].notna().any()
        else "(no patient ids)"
    )
    print(f"{part}: {len(predictions):,} images {of}\n")
    print(f"{'':20}{'AUC':>7}   {'95 % interval':15}{'positives':>9}")
    for row in table.itertuples():
        interval = f"{row.auc_low:.3f} to {row.auc_high:.3f}" if row.auc == row.auc else "one class only"
        count = "" if row.pathology == "mean" else f"{row.n_pos:,}"
        print(f"{row.pathology:20}{row.auc:7.3f}   {interval:15}{count:>9}".replace("    nan", "      -"))


def show_nodules(folder):
    """Prints what the study of nodules found, for the features that it chose."""
    study = json.loads((folder / "study.json").read_text())
    scores = {row["figure"]: row for row in study["scores"]}
    accuracy, majority, backbone = scores["accuracy"], scores["majority"], study["backbone"]
    print(
        f"\nNodules ({study['source']}, {study['counts']['films']:,} images), on {backbone['backbone']} features "
        f"({backbone['weights']}): accuracy {accuracy['value']:.3f} ({accuracy['low']:.3f} to {accuracy['high']:.3f}), "
        f"always the majority class {majority['value']:.3f}. "
        "Of the features tried, these had the best AUC on the same images."
    )


def show_results(run_dir):
    """Prints the table of AUCs, where the heatmaps point, the top 5 of one image, nodules, and where everything lies."""
    run = json.loads((run_dir / "run.json").read_text())
    example = json.loads((run_dir / "exports" / "example.json").read_text())
    study = json.loads((run_dir / "data_report.json").read_text())
    localization = read_csv(run_dir / "localization.csv").set_index("pathology")
    print(
        f"\n{study['found']:,} of {study['rows']:,} images found, {study['missing']:,} missing, "
        f"{len(study['unreadable']):,} unreadable"
    )
    print(f"Study {run['study']}, split {run['split']['name']} ({run['split']['sha256'][:12]})")
    show_scores(run_dir)
    if len(localization):
        mean = localization.loc["mean"]
        print(
            f"\nHeatmaps point into the box on {mean['pointing']:.0%} of the images with boxes, those of random weights "
            f"on {mean['pointing_random']:.0%}, the image's center on {mean['pointing_center']:.0%}"
        )
    print(f"\nTop 5 of {example['film']} (labels: {', '.join(example['labels']) or 'none'})")
    for name, prob in example["top5"].items():
        print(f"  {name:20}{prob:.3f}")
    for folder in sorted(path.parent for path in run_dir.glob("xvision-*/study.json")):
        show_nodules(folder)
    places = {"figures": "figures", "notebooks": "executed", "model": "saved_model", "card": "model_card.md"}
    print("\n" + "\n".join(f"{what:11}{run_dir / name}" for what, name in places.items()))
    if run["synthetic"]:
        print("\nThese images are drawn: the numbers show that everything works, and nothing about real radiographs.")
    print("Research only, not for clinical use.")


def main():
    """Runs the notebooks, then shows the results."""
    arguments = parse_arguments()
    os.environ["TQDM_MININTERVAL"] = "5"  # seconds; a bar that nobody watches should not fill the notebook
    known = list_settings()
    settings = dict(parse_setting(pair, known) for pair in arguments.set)
    chosen = arguments.run_dir or f"models/{Path(str(settings.get('PREDICTIONS') or 'densenet121')).stem}"
    settings |= {"DATA_DIR": arguments.data_dir, "RUN_DIR": chosen, "PROFILE": arguments.profile, "VERBOSE": 2}
    run_dir = resolve_path(chosen)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kernel hears of either, and writes its state
    for name in (name for name in NOTEBOOKS if not arguments.only or name in arguments.only):
        try:
            execute_into(run_dir / "executed", name, settings)
        except KeyboardInterrupt:
            sys.exit(f"\n{name} was interrupted. Give the same command again to go on.")
        if name == NOTEBOOKS[0] and settings.get("PART"):  # it has said how to go on
            return
        if name == "02_train_densenet121" and (pause := call(read_pause, run_dir)):
            sys.exit(f"\n{pause}")
    if not arguments.only:
        call(show_results, run_dir)
    elif "03_evaluate" in arguments.only:
        call(show_scores, run_dir)
        print(f"\nfigures    {run_dir / 'figures'}\nnotebook   {run_dir / 'executed'}")
    elif "06_xvision_vgg16_nodules" in arguments.only:
        folder = run_dir / f"xvision-{settings.get('SOURCE', 'phantom')}"
        call(show_nodules, folder)
        print(f"\nfigures    {folder / 'figures'}\nnotebook   {run_dir / 'executed'}")


if __name__ == "__main__":
    main()
