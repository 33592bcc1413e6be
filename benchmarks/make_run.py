"""How long does `make run` take, and which notebook how much of it, beside an earlier commit?

Each commit's notebooks run in a copy of their own, with this environment's packages, so installing is not part of it.
The first figure is the first one that a running notebook holds.

Usage: make_run.py [COMMIT ...]    by default 26af0da, the commit that later ones are compared with, and HEAD
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "notebooks"), str(ROOT / "scripts"), str(ROOT / "benchmarks" / "workers")]

from page_tables import write_table
from renew_page import renew_page

from helpers.runtime import NOTEBOOKS, describe_machine, read_json, write_json

RESULTS = ROOT / "benchmarks" / "results" / "make_run.json"
BEFORE = "26af0da"


def has_figure(folder):
    """Returns whether an executed notebook in a folder holds a figure."""
    return any('"image/png"' in path.read_text(errors="replace") for path in folder.glob("*.ipynb"))


def measure(commit):
    """Runs the notebooks of a commit; returns their seconds, by the clock and of the processor."""
    with tempfile.TemporaryDirectory() as copy:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), copy], check=True)
        subprocess.run(["git", "checkout", "--quiet", commit], cwd=copy, check=True)
        executed = Path(copy) / "models" / "densenet121" / "executed"
        before, started, first = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic(), None
        loads = []
        command = [sys.executable, "scripts/run_notebooks.py", *["--profile", "quick"]]
        run = subprocess.Popen(command, cwd=copy, env=os.environ | {"RUNTIME": "auto"}, stdout=subprocess.DEVNULL)
        while run.poll() is None:
            time.sleep(1)
            loads.append(os.getloadavg()[0])
            if first is None and has_figure(executed):
                first = time.monotonic() - started
        if run.returncode:
            sys.exit(f"{commit} ended with exit status {run.returncode}")
        wall, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        copies = {name: read_json(executed / f"{name}.ipynb")["metadata"]["papermill"] for name in NOTEBOOKS}
        record = read_json(executed.parent / "run.json")
        images = record["split"]["films"]["train"] * record["epochs_run"]
    return {
        "wanted_a_core": round(sum(loads) / len(loads), 1), "first_figure": round(first), "seconds": round(wall),
        "processor_seconds": round(processor), "images_trained": images,
        "notebooks": {name: round(copy["duration"]) for name, copy in copies.items()},
    }  # fmt: skip


def draw_page(results):
    """Returns the table of docs/speed.md, of the content of make_run.json."""
    names = {"first_figure": "first figure", "seconds": "`make run`", "processor_seconds": "its processor seconds"}
    rows = [[text, *(run[key] for run in results["runs"].values())] for key, text in names.items()]
    rows += [
        [f"notebook {int(name[:2])}", *(run["notebooks"][name] for run in results["runs"].values())]
        for name in NOTEBOOKS
    ]
    rows.append(["images trained on, all epochs", *(f"{run['images_trained']:,}" for run in results["runs"].values())])
    rows.append(["processes that wanted a core", *(run["wanted_a_core"] for run in results["runs"].values())])
    return f"{results['machine']}.\n\n{write_table(['seconds', *results['runs']], rows)}"


def main():
    """Measures the commits, and renews the table."""
    results = read_json(RESULTS) if RESULTS.exists() else {"runs": {}}
    for commit in sys.argv[1:] or [BEFORE, "HEAD"]:
        command = ["git", "rev-parse", "--short=7", commit]
        name = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
        results["runs"][name] = measure(name)
        results["machine"] = describe_machine()
        write_json(RESULTS, results)
        print(json.dumps(results["runs"][name], indent=1), flush=True)
    renew_page(ROOT / "docs" / "speed.md", "make run", draw_page(results))


if __name__ == "__main__":
    main()
