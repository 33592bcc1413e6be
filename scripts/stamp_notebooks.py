"""Keeps what all notebooks share in one place: the fetch cell, the badges, clean metadata.

The repository's address is `repository-code` in CITATION.cff. `make address REPOSITORY=https://github.com/you/fork`
writes it there, into every notebook and its executed copy, and into the README; `make lint` compares.

Usage: stamp_notebooks.py [--check | --address URL]
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CITATION = ROOT / "CITATION.cff"
BADGES = re.compile(r"^(<!-- badges -->|\[!\[Open in Colab\].*)$", re.MULTILINE)
ADDRESS = re.compile(r"^repository-code: (\S+)$", re.MULTILINE)

FETCH = """\
# The same cell opens every notebook. Where helpers/ is beside the notebook, it only prepares the runtime.
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = "{address}"
RUNTIME = os.environ.get("RUNTIME") or "auto"  # or "tf-tpu", "jax", "gpu", "cpu"
if not Path("helpers").is_dir():  # Colab and Kaggle open a notebook without its neighbors
    if "/OWNER/" in REPOSITORY:
        raise RuntimeError("Set REPOSITORY to the address that you opened this notebook from.")
    clone = Path(REPOSITORY.rsplit("/", 1)[1])
    command = ["git", "clone", "--depth=1", REPOSITORY, str(clone)]
    if not clone.is_dir() and subprocess.run(command).returncode:
        raise RuntimeError("git could not fetch it. On Kaggle: Settings > Internet on. Then run this cell again.")
    os.chdir(clone / "notebooks")
sys.path.insert(0, os.getcwd())
from helpers.runtime import prepare_runtime  # chooses the Keras backend, so it comes before any import of Keras

runtime = prepare_runtime(RUNTIME)
print(runtime)"""

METADATA = {
    "accelerator": "TPU",
    "colab": {"provenance": []},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def _badges(name, address, executed=False):
    path = address.removeprefix("https://github.com/")
    colab = f"https://colab.research.google.com/github/{path}/blob/main/notebooks/{name}"
    kaggle = f"https://kaggle.com/kernels/welcome?src={address}/blob/main/notebooks/{name}"
    copy = f" [As executed, with every figure]({address}/blob/main/docs/quick_run/executed/{name})" if executed else ""
    return (
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab}) "
        f"[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]({kaggle}){copy}"
    )


def stamp(name, notebook, address):
    """Returns the notebook (a dict) with this address's fetch cell and badges, without outputs."""
    notebook["metadata"] = METADATA
    for number, cell in enumerate(notebook["cells"]):
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            text = BADGES.sub(_badges(name, address, executed=name[:2] != "00"), text)
            cell = {"cell_type": "markdown", "metadata": {}, "source": text}
        else:
            text = FETCH.format(address=address) if text.startswith(("# <fetch>", FETCH[:40])) else text
            kept = {"tags": cell["metadata"]["tags"]} if cell["metadata"].get("tags") else {}
            if text.startswith("# @title"):
                kept["cellView"] = "form"
            cell = {"cell_type": "code", "execution_count": None, "metadata": kept, "outputs": [], "source": text}
        cell["id"] = f"cell-{number:02d}"
        cell["source"] = cell["source"].splitlines(keepends=True)
        notebook["cells"][number] = dict(sorted(cell.items()))
    return {"cells": notebook["cells"], "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}


def main():
    """Stamps or checks; exits with 1 where a check finds a file that would change."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail where something would change")
    parser.add_argument("--address", help="the repository's new address, https://github.com/owner/name")
    arguments = parser.parse_args()
    old = ADDRESS.search(CITATION.read_text())[1]
    new = (arguments.address or old).removesuffix("/").removesuffix(".git")
    if not re.fullmatch(r"https://[^/]+/[^/]+/[^/]+", new):
        sys.exit(f"{new} is no address of the form https://github.com/owner/name")
    wanted = {CITATION: CITATION.read_text().replace(old, new)}
    readme = ROOT / "README.md"
    wanted[readme] = BADGES.sub(_badges("00_run_everything.ipynb", new), readme.read_text().replace(old, new))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = stamp(path.name, json.loads(path.read_text()), new)
        wanted[path] = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    for path in sorted((ROOT / "docs" / "quick_run" / "executed").glob("*.ipynb")):
        wanted[path] = path.read_text().replace(old, new)
    stale = [path for path, text in wanted.items() if path.read_text() != text]
    if arguments.check and stale:
        sys.exit("Run scripts/stamp_notebooks.py: " + ", ".join(str(path.relative_to(ROOT)) for path in stale))
    for path in stale:
        path.write_text(wanted[path])


if __name__ == "__main__":
    main()
