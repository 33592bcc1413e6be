"""The committed results are those of the notebooks and files beside them: executed copies, and tables in the pages."""

import base64
import io
import json
import re
import sys

import pandas as pd
import pytest
from PIL import Image
from test_layers import HELPERS

ROOT = HELPERS.parents[1]
sys.path += [str(ROOT / "scripts"), str(ROOT / "benchmarks" / "workers")]

from page_tables import SENTENCES, find_sentence, read_results, renew_sentence  # noqa: E402
from renew_page import replace_between  # noqa: E402
from renew_results import (  # noqa: E402
    BENCHMARK_BLOCKS,
    MAX_WIDTH,
    QUICK_RUN,
    REFERENCE,
    draw_benchmark_pages,
    draw_pages,
)

from helpers.study import PATHOLOGIES  # noqa: E402

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


@pytest.mark.parametrize("name", list(SENTENCES))
def test_the_numbers_in_a_sentence_are_those_of_the_files(name):
    text, results = (ROOT / name).read_text(encoding="utf-8"), read_results()
    for template in SENTENCES[name]:
        said, is_now = (find_sentence(page, template)[0] for page in (text, renew_sentence(text, template, results)))
        assert said == is_now, f"{name}: `python scripts/renew_results.py --pages-only` renews it"


def test_only_the_values_of_a_sentence_are_renewed():
    page = "Before, it takes 1.5 s\non an old machine: 12 %, not 1,200, or more.\n"
    sentence = "takes {run>seconds*0.5:.2f} s on {run>machine}: {share:.0%}, not {limit:,d}"
    renewed = renew_sentence(
        page, sentence, {"run": {"seconds": 4, "machine": "a new one, Python 3"}, "share": 0.5, "limit": 3400}
    )
    assert renewed == "Before, it takes 2.00 s\non a new one: 50%, not 3,400, or more.\n"
    with pytest.raises(ValueError, match="found 0 times: gives "):
        renew_sentence(page, "gives {share:.0%}", {"share": 1})
    with pytest.raises(ValueError, match="found 2 times"):
        renew_sentence(page + page, sentence, {})


def test_every_mark_in_a_page_is_renewed():
    drawn = {(path.resolve(), name) for path, name in PAGES} | {
        (ROOT / "docs" / page, name) for page, name in BENCHMARK_BLOCKS
    }
    pages = [
        ROOT / "README.md",
        *(ROOT / "docs").rglob("*.md"),
        ROOT / "data" / "README.md",
        ROOT / "models" / "README.md",
    ]
    found = {(path, name) for path in pages for name in re.findall(r"<!-- end of ([\w ]+) -->", path.read_text())}
    others = {(ROOT / "docs" / "runtime.md", "results"), (ROOT / "docs" / "runs" / "README.md", "runs")}
    assert found - others == drawn  # the others are of check_platforms.py and make_report.py


def test_the_checklist_counts_its_items():
    text = (ROOT / "docs" / "claim.md").read_text()
    rows = re.findall(r"^\| \d+ \([\d–]+\) \|.*?\| (answered|partly|not done|not applicable) \|", text, re.MULTILINE)
    counts = "{answered} answered, {partly} partly, {not done} not done, {not applicable} not applicable"
    counts = counts.format(
        **{state: rows.count(state) for state in ("answered", "partly", "not done", "not applicable")}
    )
    assert f"**Of {len(rows)} items: {counts}.**" in text


def test_published_values_have_their_source():
    for name in ("means", "aucs"):
        table = pd.read_csv(ROOT / "data" / f"published_{name}.csv", dtype=str)
        assert table[["split", "source", "checked", *(["start"] if name == "means" else [])]].notna().all(axis=None)
        assert table["checked"].isin(["at the source", "in a list", "second-hand", "no"]).all()
    by_finding = table.groupby("study")["pathology"].agg([set, "size"])
    assert (by_finding["set"] == set(PATHOLOGIES)).all() and (by_finding["size"] == 14).all()
    assert not table["split"].isin(["random_patients", "chestmnist"]).any(), (
        "another's random split would be compared with ours"
    )


def test_the_evaluation_of_a_published_model_gives_the_published_aucs():
    """Fourteen values that the project printed with four decimals, from the predictions that it published."""
    said = pd.read_csv(ROOT / "data" / "published_aucs.csv").query("study.str.contains('reproduce-chexnet')")
    ours = pd.read_csv(REFERENCE / "all" / "aucs.csv").set_index("pathology")["auc"]
    assert len(said) == 14
    assert (ours[said["pathology"]].to_numpy() - said["auc"].to_numpy()).__abs__().max() < 1e-4


@pytest.mark.slow
def test_what_a_page_says_of_a_benchmark_is_what_its_results_hold():
    for (page, name), drawn in draw_benchmark_pages().items():
        text = page.read_text()
        assert text == replace_between(text, name, drawn), f"{page.name}, {name}: `make results` renews it"


def test_marks_that_are_missing_are_named():
    with pytest.raises(ValueError, match="<!-- aucs -->"):
        replace_between("no marks", "aucs", "text")
