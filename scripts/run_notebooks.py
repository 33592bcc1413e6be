"""Executes the notebooks, keeps the executed copies in RUN_DIR/executed, and shows the results on one screen.

On a CPU, two of those after the training run at a time.

Usage: run_notebooks.py [--only NOTEBOOK ...] [--data-dir DIR] [--run-dir DIR] [--profile quick|full|best]
    [--set NAME=VALUE ...] [--end-with-parent]
"""

import argparse
import ast
import contextlib
import difflib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import papermill
import psutil
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))

from helpers.runtime import (
    MACHINE,
    NOTEBOOKS,
    SETTINGS,
    SHARED,
    TrainingClock,
    check_setting,
    check_settings,
    copy_file,
    describe_left,
    find_launch,
    is_remote,
    lock_folder,
    read_csv,
    read_form,
    recall_shared,
    resolve_path,
)
from helpers.runtime.probes import find_tpu_chips, shows_gpu

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "1073741824"}  # bytes
TRAIN = NOTEBOOKS[1]
MEMORY_OF_TWO = 6 * 2**30  # bytes; in the quick profile a notebook takes up to 2.2 GB
# After the training, in an order in which two at a time take the least time; each with those whose files it reads.
AFTER_TRAINING = {
    "04_explain": (),
    "03_evaluate": (),
    "06_xvision_vgg16_nodules": (),
    "05_export_and_predict": ("03_evaluate", "04_explain"),
}
FORM = {"DATA", "KEEP_IN", "HOURS_LEFT", "SET"}  # of notebook 00 alone
OPTIONS = {"DATA_DIR": "--data-dir", "RUN_DIR": "--run-dir", "PROFILE": "--profile", "RUNTIME": "the environment"}


class KernelManager(AsyncKernelManager):
    """Starts kernels with this process's Python: the `python3` on Jupyter's paths may belong to another environment."""

    @property
    def kernel_spec(self):
        """What starts a kernel."""
        return KernelSpec(**get_kernel_dict())


class BarsOnly:
    """A stream that prints the bars of progress, and leaves TensorFlow's messages to the executed notebook."""

    def write(self, text):
        """Prints a text that holds a bar of tqdm."""
        if "%|" in text:
            sys.stdout.write(text)

    def flush(self):
        """Shows what is printed."""
        sys.stdout.flush()


def parse_arguments():
    """Returns the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=NOTEBOOKS, metavar="NOTEBOOK", help="execute these, in their order"
    )
    parser.add_argument("--end-with-parent", action="store_true", help="end when the standard input is closed")
    parser.add_argument("--beside-others", action="store_true", help=argparse.SUPPRESS)  # the parent has the folder
    add_options(parser, "where results go (default: models/densenet121, or models/<name of PREDICTIONS>)")
    return parser.parse_args()


def add_options(parser, run_dir):
    """Adds the options of study, folder, profile and settings to a parser; `run_dir` explains the folder."""
    recalled = "default: that of the run, if it is not new, else"
    parser.add_argument("--data-dir", default="", help=f"folder of the study ({recalled} the synthetic one)")
    parser.add_argument("--run-dir", default="", help=run_dir)
    parser.add_argument("--profile", default="", metavar="quick|full|best", help=f"{recalled} quick")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the notebooks")


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


def read_settings(arguments, run_dir):
    """Returns the settings on the command line, converted and checked; exits where one is unknown or wrong.

    Exits, too, where a launcher has started several processes, unless they are to train together or pack a part each.
    Of the settings that notebooks share, those that are not given are the ones that the run in RUN_DIR has recorded.
    """
    settings = {"VERBOSE": 2, "RUN_DIR": run_dir} | dict(map(parse_setting, arguments.set))
    given = {"DATA_DIR": arguments.data_dir, "PROFILE": arguments.profile}
    settings |= {name: value for name, value in given.items() if value}
    try:
        check_setting("RUNTIME", os.environ.get("RUNTIME") or "auto")
        settings = check_settings(settings)
        recalled, source = call(recall_shared, resolve_path(run_dir), settings)
        settings = check_settings(SHARED | recalled | settings)
    except ValueError as error:
        sys.exit(str(error))
    launch, trains_only = find_launch(), getattr(arguments, "only", None) == [NOTEBOOKS[1]]
    if launch.n_processes > 1 and not (trains_only or settings.get("PART")):
        sys.exit(
            f"{launch.name} has started {launch.n_processes} processes of this command, which would overwrite each "
            "other's results: only notebook 2 runs on several hosts, by `make train`. Start this one once."
        )
    if recalled:
        words = ", ".join(f"{name}={value}" for name, value in recalled.items())
        print(f"{words}, as in {resolve_path(run_dir) / source}", flush=True)
    return settings


def parse_setting(pair):
    """Returns name and value of "NAME=VALUE", where a string or a list may be written as in Python."""
    name, sign, text = pair.partition("=")
    known = SETTINGS.keys() - OPTIONS.keys() - FORM
    if name in OPTIONS:
        sys.exit(f"{pair}: expected not in SET, but as `make run {pair}`, or by {OPTIONS[name]}.")
    if not sign:
        sys.exit(f"{pair}: expected NAME=VALUE, without spaces around the =")
    if name not in known:
        close = difflib.get_close_matches(name.upper(), known, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"Known are {', '.join(sorted(known))}."
        sys.exit(f"{pair}: expected NAME=VALUE, but {name} is no setting of the notebooks. {hint}")
    with contextlib.suppress(ValueError, SyntaxError):
        value = ast.literal_eval(text)
        return name, value if value is None or isinstance(value, str | list) else text
    return name, text


def read_parameters(notebook):
    """Returns the settings of a notebook, also the shared ones; those that differ by profile are dicts."""
    return read_form(find_notebook(notebook)) | SHARED | MACHINE


def find_notebook(name):
    """Returns the path of a notebook of the repository."""
    return ROOT / "notebooks" / f"{name}.ipynb"


def call(function, path, *arguments):
    """Calls a function with a path and more; with a path in a bucket, in a process of its own. Returns its result.

    Only TensorFlow reaches a bucket, and a process that has loaded it may hold the TPU until it ends. This process
    lives until the last notebook has ended, so it must not load TensorFlow.
    """
    if not is_remote(path):
        return function(path, *arguments)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, path, *arguments).result()


def name_copy(name, settings):
    """Returns the name of the executed copy of a notebook: hosts that train together or pack parts share none."""
    if name == NOTEBOOKS[1] and find_launch().number:
        return f"{name}.host-{find_launch().number}"
    part = str(settings.get("PART", "")) if name == NOTEBOOKS[0] else ""
    return f"{name}.part-{part.replace('/', '-of-')}" if part else name


def upload_copy(executed_dir, name, folder):
    """Copies the executed notebook and its log from a local folder to one in a bucket."""
    for ending in (".ipynb", ".log", ".failed.ipynb", ".failed.log"):
        if (folder / (name + ending)).exists():
            copy_file(folder / (name + ending), executed_dir / (name + ending))
        elif "failed" in ending:  # of an earlier attempt
            (executed_dir / (name + ending)).unlink(missing_ok=True)


def move_copy(folder, name, old, new):
    """Renames an executed notebook and its log; `old` and `new` follow its name: ".running", ".failed" or ""."""
    for ending in (".ipynb", ".log"):
        os.replace(folder / f"{name}{old}{ending}", folder / f"{name}{new}{ending}")


def escape(path):
    """Returns a path in which Papermill, which formats paths with the settings, finds no braces to fill."""
    return str(path).replace("{", "{{").replace("}", "}}")


@contextlib.contextmanager
def epochs_reported(name, settings):
    """Prints after each epoch of a training, in a `with` block, how long the others will take."""
    run_dir, ended = resolve_path(settings.get("RUN_DIR", "")), threading.Event()
    if name != TRAIN or is_remote(run_dir):
        yield
        return
    clock = TrainingClock(run_dir / "history.csv", name, settings)

    def report():
        while not ended.wait(1):
            shown, left = clock.n_ended, clock.estimate()
            if left and clock.n_ended > shown:
                print(f"{clock.n_ended} of {clock.n_epochs} epochs: {describe_left(left)}", flush=True)

    threading.Thread(target=report, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def execute(name, folder, settings):
    """Executes one notebook with those of the settings that it has; returns its error where it fails, else None.

    The copy is called NAME.running.ipynb until the notebook ends, and keeps that name where the process is killed.
    After an error it is called NAME.failed.ipynb. So neither replaces the copy of a run that succeeded.
    """
    source, copy = find_notebook(name), name_copy(name, settings)
    known = read_parameters(name)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (*folder.glob(f"{copy}.failed.*"), *folder.glob(f"{copy}.running.*")):  # of an earlier attempt
        stale.unlink()
    lost = "\nIf another process of this run was lost, give the same command again to all of them: it resumes."
    together = lost if find_launch().n_processes > 1 else ""
    print(f"{name} ...", flush=True)
    started = time.monotonic()
    try:
        with kernel_messages_to(folder / f"{copy}.running.log"), epochs_reported(name, settings):
            papermill.execute_notebook(
                escape(source),
                escape(folder / f"{copy}.running.ipynb"),
                {key: value for key, value in settings.items() if key in known},
                cwd=str(ROOT / "notebooks"),
                kernel_name="python3",
                kernel_manager_class=KernelManager,
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=BarsOnly(),
            )
    except papermill.PapermillExecutionError as error:
        move_copy(folder, copy, ".running", ".failed")
        return f"{name} failed in cell {error.exec_count}: {error.ename}: {error.evalue}{together}"
    except RuntimeError as error:
        if "died" not in str(error):  # Jupyter's words for a kernel that is gone
            raise
        move_copy(folder, copy, ".running", ".failed")
        return (
            f"{name}: its process was killed, most often because memory ran out. Close other programs, then give the "
            "same command again to resume. If it happens again, take a machine with more memory, or a smaller "
            f"BATCH_SIZE and another RUN_DIR.{together}"
        )
    move_copy(folder, copy, ".running", "")
    print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    return None


def execute_into(executed_dir, name, settings, beside_others=False):
    """Executes one notebook and keeps the executed copy in a folder, local or in a bucket. Exits where it fails.

    `beside_others` is for a child of a process that keeps all others out of the folder.
    """
    if is_remote(executed_dir):  # Papermill saves after every cell, and would write the whole object each time
        with tempfile.TemporaryDirectory() as folder:
            error = execute(name, Path(folder), settings)
            call(upload_copy, executed_dir, name_copy(name, settings), Path(folder))
    else:
        several = find_launch().n_processes > 1 or name_copy(name, settings) != name  # they have copies of their own
        with contextlib.nullcontext() if beside_others else folder_kept(executed_dir, several):
            error = execute(name, executed_dir, settings)
    if error:
        sys.exit(f"\n{error}\nSee {executed_dir / name_copy(name, settings)}.failed.ipynb")


@contextlib.contextmanager
def folder_kept(executed_dir, shared=False):
    """Keeps other processes from executing notebooks into a folder, in a `with` block; exits where one does."""
    busy = f"Another process executes notebooks into {executed_dir}. Let it end, or choose another RUN_DIR."
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock_folder(executed_dir, busy, shared=shared))
        except RuntimeError as error:
            sys.exit(f"\n{error}")
        yield


def can_run_two(run_dir):
    """Returns whether two notebooks can run at a time: on a CPU with cores and memory; an accelerator takes one."""
    apart = find_launch().n_processes > 1 or is_remote(run_dir)
    room = (os.cpu_count() or 1) > 1 and psutil.virtual_memory().available > MEMORY_OF_TWO
    return room and not (apart or find_tpu_chips() or shows_gpu())


def execute_two_at_a_time(names, words):
    """Executes notebooks that follow the training, each in a process of its own; prints their lines as they come.

    Args:
        names: list of notebooks, in the order of `AFTER_TRAINING`.
        words: list of the command line's options for all of them.

    Raises:
        SystemExit: one has failed. The others that were running have gone on to their end.
        KeyboardInterrupt: the others have been interrupted, too.
    """
    running, results, interrupted = {}, {}, threading.Event()

    def execute_one(name):
        failed = [needed for needed in AFTER_TRAINING[name] if needed in results and results[needed].result()]
        if failed or interrupted.is_set():
            return f"{name} was not executed"
        command = [sys.executable, __file__, "--only", name, "--beside-others", "--end-with-parent", *words]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        # A session of its own: Ctrl-C reaches it once, by its input.
        reading = {"text": True, "errors": "replace", "start_new_session": True}
        running[name] = process = subprocess.Popen(command, **streams, **reading)
        if interrupted.is_set():
            process.stdin.close()
        for line in process.stdout:  # a bar's, too
            if line.strip():
                print(f"{name[:2]} | {line.rstrip()}", flush=True)
        status = process.wait()
        return status and f"{name} " + ("was killed" if status < 0 else "has failed, see above")

    with ThreadPoolExecutor(2) as pool:
        try:
            for name in names:
                results[name] = pool.submit(execute_one, name)
            errors = [error for result in results.values() if (error := result.result())]
        except KeyboardInterrupt:
            interrupted.set()
            for process in list(running.values()):
                process.stdin.close()
            raise
    if errors:
        sys.exit("\n" + "; ".join(errors) + ". Give the same command again to resume.")


def read_pause(run_dir):
    """Returns why training paused before its end, "" where it did not."""
    number = find_launch().number  # hosts other than the first have records of their own
    folder = run_dir / f"host-{number}" if number else run_dir
    return json.loads((folder / "run.json").read_text())["pause"]


def show_scores(run_dir):
    """Prints the table of AUCs of the subset that was measured."""
    aucs = read_csv(run_dir / "aucs.csv")
    subset = aucs["split"].iloc[0]
    table = aucs[aucs["split"].eq(subset)]
    predictions = read_csv(run_dir / "predictions.csv", usecols=["patient_id", "split"]).query("split == @subset")
    of = (
        f"of {predictions['patient_id'].nunique():,} patients"
        if table["n_pos_patients"].notna().any()
        else "(no patient ids)"
    )
    print(f"{subset}: {len(predictions):,} images {of}\n")
    for notice in json.loads((run_dir / "source.json").read_text()).get("notices", []):
        print(notice + "\n")
    print(f"{'':20}{'AUC':>7}   {'95 % interval':15}{'positives':>9}")
    for row in table.itertuples():
        interval = f"{row.auc_low:.3f} to {row.auc_high:.3f}" if row.auc == row.auc else "one class only"
        count = "" if row.pathology == "mean" else f"{row.n_pos:,}"
        print(f"{row.pathology:20}{row.auc:7.3f}   {interval:15}{count:>9}".replace("    nan", "      -"))


def show_nodules(folder):
    """Prints the results of notebook 6, with the features that scored best."""
    study = json.loads((folder / "study.json").read_text())
    scores = {row["figure"]: row for row in study["scores"]}
    accuracy, majority, backbone = scores["accuracy"], scores["majority"], study["backbone"]
    print(
        f"\n{study['classes'][1]} ({study['source']}, {study['counts']['films']:,} images), on {backbone['backbone']} "
        f"features ({backbone['weights']}): accuracy {accuracy['value']:.3f} ({accuracy['low']:.3f} to "
        f"{accuracy['high']:.3f}), always the majority class {majority['value']:.3f}. "
        "Of the features tried, these had the best AUC on the same images."
    )


def show_results(run_dir):
    """Prints the AUCs, where the heatmaps point, the top 5 of one image, the nodules, and where the files are."""
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
            f"\nHeatmaps point into the box on {mean['pointing']:.0%} of the images with boxes, those of random "
            f"weights on {mean['pointing_random']:.0%}, the image's center on {mean['pointing_center']:.0%}"
        )
    print(f"\nTop 5 of {example['film']} (labels: {', '.join(example['labels']) or 'none'})")
    for name, prob in example["top5"].items():
        print(f"  {name:20}{prob:.3f}")
    for folder in sorted(path.parent for path in run_dir.glob("xvision-*/study.json")):
        show_nodules(folder)
    places = {"figures": "figures", "notebooks": "executed", "model": "saved_model", "card": "model_card.md"}
    print("\n" + "\n".join(f"{what:11}{run_dir / name}" for what, name in places.items()))
    if run["synthetic"]:
        print("\nThese images are synthetic: the numbers show that everything works, nothing about real radiographs.")
    print("Research only, not for clinical use.")


def end_with_parent():
    """Waits until the process that started this one has ended, then interrupts this one."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGINT)


def main():
    """Runs the notebooks, then shows the results."""
    arguments = parse_arguments()
    os.environ["TQDM_MININTERVAL"] = "5"  # seconds; a progress bar should not fill the executed notebook
    for name, value in MALLOC.items():  # of the GNU library: asking the system for each array anew takes a quarter
        os.environ.setdefault(name, value)  # of the time in which an image is drawn
    predictions = dict(map(parse_setting, arguments.set)).get("PREDICTIONS")
    settings = read_settings(arguments, arguments.run_dir or f"models/{Path(predictions or 'densenet121').stem}")
    run_dir = resolve_path(settings["RUN_DIR"])
    if not arguments.only and (settings.get("PREDICTIONS") or settings.get("MODELS") or settings.get("VIEWS", 1) > 1):
        sys.exit(
            "PREDICTIONS, MODELS and VIEWS go with `make evaluate` and another RUN_DIR: a run measures its own model."
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the kernel gets either, and writes a checkpoint
    if arguments.end_with_parent:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
        threading.Thread(target=end_with_parent, daemon=True).start()
    names = arguments.only or NOTEBOOKS
    later = [name for name in AFTER_TRAINING if name in names]
    two = len(later) > 1 and can_run_two(run_dir)
    for name in (name for name in NOTEBOOKS if name in names and not (two and name in later)):
        try:
            execute_into(run_dir / "executed", name, settings, arguments.beside_others)
        except KeyboardInterrupt:
            sys.exit(f"\n{name} was interrupted. Give the same command again to resume.")
        if name == NOTEBOOKS[0] and settings.get("PART"):  # it has printed what to do next
            return
        if name == TRAIN and (pause := call(read_pause, run_dir)):
            if not arguments.end_with_parent:
                sys.exit(f"\n{pause}")
            print(pause, flush=True)  # notebook 00 exports what there is
    if two:
        shared = [f"{name}={settings[name]}" for name in SHARED if name not in OPTIONS]
        words = ["--data-dir", settings["DATA_DIR"], "--run-dir", settings["RUN_DIR"], "--profile", settings["PROFILE"]]
        try:
            with folder_kept(run_dir / "executed"):
                execute_two_at_a_time(later, [*words, "--set", *shared, *arguments.set])
        except KeyboardInterrupt:
            sys.exit("\nThe notebooks were interrupted. Give the same command again to resume.")
    if arguments.beside_others:
        return
    if not arguments.only:
        call(show_results, run_dir)
    elif "03_evaluate" in arguments.only:
        call(show_scores, run_dir)
        print(f"\nfigures    {run_dir / 'figures'}\nnotebook   {run_dir / 'executed'}")
    elif "06_xvision_vgg16_nodules" in arguments.only:
        source = settings.get("SOURCE", "phantom")
        folder = Path(settings.get("SOURCE_DIR") or settings["DATA_DIR"]).name if source == "folder" else source
        folder = run_dir / f"xvision-{folder}"
        call(show_nodules, folder)
        print(f"\nfigures    {folder / 'figures'}\nnotebook   {run_dir / 'executed'}")


if __name__ == "__main__":
    main()
