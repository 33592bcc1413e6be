"""The form of the notebooks: what every one of them must have, so that it runs anywhere and reads well."""

import ast
import json
import re
import subprocess
import sys

import pytest

from helpers.runtime.settings import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return request.param, json.loads(request.param.read_text())["cells"]


def code_of(cells):
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_there_are_notebooks_and_they_are_numbered():
    assert len(NOTEBOOKS) >= 4 and all(re.match(r"\d\d_[a-z0-9_]+$", path.stem) for path in NOTEBOOKS)


def test_notebooks_are_stamped_and_clean():
    command = [sys.executable, str(ROOT / "scripts" / "stamp_notebooks.py"), "--check"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


def test_begins_with_title_purpose_and_table(notebook):
    path, cells = notebook
    first = "".join(cells[0]["source"])
    assert first.startswith(f"# {int(path.stem[:2])}. ")
    assert all(f"| **{word}** |" in first for word in ("Reads", "Writes", "Takes"))
    assert "## Next" in "".join(cells[-1]["source"])


def test_has_one_parameters_cell_of_plain_settings(notebook):
    _, cells = notebook
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    body = ast.parse("".join(tagged[0]["source"])).body
    assert all(isinstance(node, ast.Assign) and node.targets[0].id.isupper() for node in body)
    assert all("#" in line for line in tagged[0]["source"])


def test_every_cell_is_python_without_shell_escapes(notebook):
    _, cells = notebook
    for code in code_of(cells):
        ast.parse(code)


def test_cells_are_short(notebook):
    _, cells = notebook
    hidden = ("# @title", "# The same cell")
    lengths = [len(code.splitlines()) for code in code_of(cells) if not code.startswith(hidden)]
    assert sorted(lengths)[len(lengths) // 2] <= 8 and max(lengths) <= 36


def test_definitions_and_pictures_do_not_hide_the_prose(notebook):
    _, cells = notebook
    n_markdown = sum(cell["cell_type"] == "markdown" for cell in cells)
    assert n_markdown >= len(code_of(cells)) / 2.5


def test_keeps_no_output_and_no_machine_path(notebook):
    path, cells = notebook
    assert not any(cell.get("outputs") for cell in cells)
    assert not re.search(r"/(home|root|Users|work)/", path.read_text())


def test_keras_is_imported_after_the_runtime_is_ready(notebook):
    _, cells = notebook
    code = code_of(cells)
    assert "prepare_runtime(RUNTIME)" in code[0] and not re.search(r"^import (keras|tensorflow)", code[0], re.MULTILINE)


def test_links_between_notebooks_resolve(notebook):
    path, cells = notebook
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (path.parent / link).exists(), link


@pytest.mark.parametrize("name", ["README.md", "data/README.md", "models/README.md"])
def test_links_of_the_pages_resolve(name):
    path = ROOT / name
    prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", prose):
        assert (path.parent / link).exists(), link
