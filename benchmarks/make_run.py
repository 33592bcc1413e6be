"""How long does `make run` take, and which notebook how much of it, beside an earlier commit?

Each commit's notebooks run in a copy of their own, with this environment's packages, so installing is not part of it.
The first figure is the first one that a running notebook holds.

Usage: make_run.py [COMMIT[,NAME=VALUE...] ...]    with settings of the notebooks; by default 26af0da, the commit that
later ones are compared with, HEAD, and HEAD with as much to draw and to train as 26af0da has
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "notebooks"), str(ROOT / "scripts"), str(ROOT / "benchmarks" / "workers")]

from page_tables import write_table
from renew_page import renew_page

from helpers.runtime import NOTEBOOKS, describe_machine, read_json, write_json

RESULTS = ROOT / "benchmarks" / "results" / "make_run.json"
DEFAULT = "26af0da", "HEAD", "HEAD,SYNTHETIC_IMAGES=1800,EPOCHS=10,BATCH_SIZE=32"


def has_figure(folder):
    """Returns whether an executed notebook in a folder holds a figure."""
    return any('"image/png"' in path.read_text(errors="replace") for path in folder.glob("*.ipynb"))


def watch_kernels(run, seconds):
    """Notes the processor seconds of the kernels that a process runs, by process and notebook.

    A notebook that runs beside another has a parent of its own, which was told its name; the others come in order.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(run.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = process.parent().cmdline()
                if "ipykernel_launcher" in process.cmdline() and "ipykernel_launcher" not in parent:  # no fork of it
                    known = dict(seconds.keys())
                    told = [name for name in NOTEBOOKS if name in parent]
                    name = known.get(process.pid) or (told[0] if told else NOTEBOOKS[len(known)])
                    # with the processes that it has waited for
                    seconds[process.pid, name] = sum(process.cpu_times()[:4])


def measure(commit, settings=()):
    """Runs the notebooks of a commit; returns their seconds, by the clock and of the processor."""
    with tempfile.TemporaryDirectory() as copy:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), copy], check=True)
        subprocess.run(["git", "checkout", "--quiet", commit], cwd=copy, check=True)
        executed = Path(copy) / "models" / "densenet121" / "executed"
        started, first, loads, kernels = time.monotonic(), None, [], {}
        command = [sys.executable, "scripts/run_notebooks.py", "--profile", "quick", "--set", *settings]
        run = subprocess.Popen(command, cwd=copy, env=os.environ | {"RUNTIME": "auto"}, stdout=subprocess.DEVNULL)
        while run.poll() is None:
            time.sleep(1)
            loads.append(os.getloadavg()[0])
            watch_kernels(run, kernels)
            if first is None and has_figure(executed):
                first = round(time.monotonic() - started)
        if run.returncode:
            sys.exit(f"{commit} ended with exit status {run.returncode}")
        seconds = round(time.monotonic() - started)
        copies = [read_json(executed / f"{name}.ipynb")["metadata"]["papermill"]["duration"] for name in NOTEBOOKS]
        record = read_json(executed.parent / "run.json")
        images = record["split"]["films"]["train"] * record["epochs_run"]
    worked = {name: value for (_, name), value in kernels.items()}
    rows = {name: [round(copy), round(worked[name])] for name, copy in zip(NOTEBOOKS, copies, strict=True)}
    counts = {"wanted_a_core": round(sum(loads) / len(loads), 1), "images_trained": images}
    whole = [seconds, round(sum(kernels.values()))]
    return counts | {"first_figure": first, "make run": whole, "notebooks": rows}


def draw_page(results):
    """Returns the table of docs/speed.md, of the content of make_run.json."""
    runs = results["runs"]

    def format_cells(label, *pairs):
        return [label, *("–" if value is None else value for pair in pairs for value in pair)]

    heads = ["", *(f"{name}, {what}" for name in runs for what in ("by the clock", "processor"))]
    rows = [format_cells("seconds to the first figure", *([run["first_figure"], None] for run in runs.values()))]
    for name in NOTEBOOKS:
        rows.append(format_cells(f"notebook {int(name[:2])}", *(run["notebooks"][name] for run in runs.values())))
    rows.append(format_cells("all six", *(run["make run"] for run in runs.values())))
    notes = [
        f"{name} trained on {run['images_trained']:,} images in all its epochs, "
        + (
            f"while {run['wanted_a_core']} processes wanted a core"
            if run["wanted_a_core"]
            else "with nothing beside it"
        )
        for name, run in runs.items()
    ]
    return f"{results['machine']}; {'; '.join(notes)}.\n\n{write_table(heads, rows)}"


def main():
    """Measures the commits one after the other, and renews the table; results of earlier calls are replaced."""
    results = {"machine": describe_machine(), "runs": {}}
    for argument in sys.argv[1:] or DEFAULT:
        commit, *settings = argument.split(",")
        command = ["git", "rev-parse", "--short=7", commit]
        commit = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
        name = f"{commit} with {', '.join(settings)}" if settings else commit
        results["runs"][name] = measure(commit, settings)
        write_json(RESULTS, results)
        print(json.dumps(results["runs"][name], indent=1), flush=True)
    renew_page(ROOT / "docs" / "speed.md", "make run", draw_page(results))


if __name__ == "__main__":
    main()
