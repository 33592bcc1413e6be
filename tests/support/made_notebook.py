"""Stands in for scripts/run_notebooks.py in the tests of a session: writes what a notebook leaves, with a figure.

Usage: made_notebook.py NAME RUN_DIR PACKED_DIR [NAME=VALUE ...]; variables MADE_FAIL, MADE_REASON, MADE_UNFINISHED
"""

import base64
import json
import os
import sys
from pathlib import Path

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="  # one pixel
)
name, run_dir, packed, *settings = sys.argv[1:]
run_dir, packed, settings = Path(run_dir), Path(packed), dict(pair.split("=", 1) for pair in settings)
with open(run_dir / "executions.txt", "a") as file:
    file.write(f"{name} {settings.get('TIME_BUDGET', '')} {'START_OVER' * ('START_OVER' in settings)}\n")
figures, executed = run_dir / "figures", run_dir / "executed"
for folder in (figures, executed):
    folder.mkdir(parents=True, exist_ok=True)
for figure in ("03_aucs", "04_hits_and_misses", "05_new_film"):
    (figures / f"{figure}.png").write_bytes(PNG)
outputs = [{"data": {"image/png": base64.b64encode(PNG).decode()}}]
cells = [{"outputs": outputs}, {"outputs": [{"text": "x"}]}, {"outputs": outputs * 2}]
for number in (1, 3):  # as Papermill does after each cell
    (executed / f"{name}.running.ipynb").write_text(json.dumps({"cells": cells[:number]}))
    print(f"cell {number}", flush=True)
if os.environ.get("MADE_FAIL") == name:
    os.replace(executed / f"{name}.running.ipynb", executed / f"{name}.failed.ipynb")
    sys.exit(f"\n{name} failed in cell 3: {os.environ.get('MADE_REASON', 'ValueError')}: no")
if name.startswith("01"):
    (packed / "study").mkdir(parents=True, exist_ok=True)
    (packed / "study" / "labels.csv").write_text("labels")
    (packed / "manifest.json").write_text("{}")
    (run_dir / "settings.json").write_text('{"DATA_DIR": "x", "SPLIT": "official"}')
if name.startswith("02") and "MADE_UNFINISHED" in os.environ:
    (run_dir / "state").mkdir()
    (run_dir / "state" / "state.bin").touch()
    sys.exit(f"\n{name} failed in cell 21: SystemExit: No epoch of the whole network is finished yet.")
if name.startswith("02"):
    (run_dir / "run.json").write_text(json.dumps({"pause": "Training paused." * ("TIME_BUDGET" in settings)}))
if name.startswith("05"):
    (run_dir / "exports").mkdir(exist_ok=True)
    (run_dir / "exports" / "example.json").write_text(json.dumps({"top5": {"Mass": 0.5}}))
    (run_dir / "model.zip").write_bytes(b"zip")
os.replace(executed / f"{name}.running.ipynb", executed / f"{name}.ipynb")
