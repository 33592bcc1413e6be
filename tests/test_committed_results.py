"""The committed results are those of the notebooks and files beside them: executed copies, and tables in the pages."""

import base64
import io
import json
import re
import sys

import pytest
from PIL import Image
from test_layers import HELPERS

ROOT = HELPERS.parents[1]
sys.path += [str(ROOT / "scripts"), str(ROOT / "benchmarks" / "workers")]

from renew_page import replace_between  # noqa: E402
from renew_results import MAX_WIDTH, QUICK_RUN, draw_benchmark_pages, draw_pages  # noqa: E402

NOTEBOOKS = sorted((ROOT / "notebooks").glob("0[1-9]*.ipynb"))  # notebook 00 shows the figures of the others
PAGES = draw_pages()
RENEW = "`make run` and `make results` renew it"


def read_code(path):
    """Returns the sources of a notebook's code cells, without the settings that papermill adds."""
    cells = json.loads(path.read_text())["cells"]
    return [
        "".join(cell["source"])
        for cell in cells
        if cell["cell_type"] == "code" and "injected-parameters" not in cell["metadata"].get("tags", [])
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_an_executed_copy_has_the_code_of_its_notebook(path):
    copy = QUICK_RUN / "executed" / path.name
    assert read_code(copy) == read_code(path), f"{copy} was executed from other code: {RENEW}"
    head = "".join(json.loads(path.read_text())["cells"][0]["source"])
    assert f"docs/quick_run/executed/{path.name}" in head, "its head does not link the executed copy"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_an_executed_copy_is_whole_and_fit_for_a_web_page(path):
    copy = QUICK_RUN / "executed" / path.name
    text = copy.read_text()
    assert len(text.encode()) < 1_000_000
    assert not re.findall(r'(?<![\w.:/])/(?:home|root|tmp|work|Users)/[^"\s]*', text), "paths of a machine"
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(cell["execution_count"] for cell in cells) and not [o for o in outputs if o["output_type"] == "error"]
    figures = [text for output in outputs for kind, text in output.get("data", {}).items() if kind.startswith("image/")]
    assert figures, "no figure in it"
    assert max(Image.open(io.BytesIO(base64.b64decode(text))).width for text in figures) <= MAX_WIDTH


@pytest.mark.parametrize("page, name", list(PAGES), ids=lambda value: getattr(value, "name", value))
def test_what_a_page_says_is_what_the_files_hold(page, name):
    text = page.read_text()
    assert text == replace_between(text, name, PAGES[page, name]), f"{page.name}, {name}: {RENEW}"


@pytest.mark.slow
def test_what_a_page_says_of_a_benchmark_is_what_its_results_hold():
    for (page, name), drawn in draw_benchmark_pages().items():
        text = page.read_text()
        assert text == replace_between(text, name, drawn), f"{page.name}, {name}: `make results` renews it"


def test_marks_that_are_missing_are_named():
    with pytest.raises(ValueError, match="<!-- aucs -->"):
        replace_between("no marks", "aucs", "text")
