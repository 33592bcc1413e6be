"""The model card: a header that the Hub reads, the numbers of the run and no others, and what was not measured."""

import json
import re

import pandas as pd
import pytest
import yaml
from made_run import make_run, write_json

from helpers.export import fill_model_card
from helpers.export.model_card import TEMPLATE, hide_paths
from helpers.runtime.settings import ROOT
from helpers.study import PATHOLOGIES


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A synthetic run and its card; never written to by a test."""
    folder = make_run(tmp_path_factory.mktemp("made") / "run")
    return folder, fill_model_card(folder)


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "run")


def header_of(card):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


def section_of(card, name):
    return card.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


def rows_of(text):
    rows = [re.split(r" (?<!\\)\| ", line[2:-2]) for line in text.splitlines() if line.startswith("| ")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_header_has_what_the_hub_reads(made):
    header = header_of(fill_model_card(made[0], "cc-by-4.0"))
    assert header["license"] == "cc-by-4.0" and header["library_name"] == "keras"
    assert header["pipeline_tag"] == "image-classification" and header["metrics"] == ["roc_auc"]
    (index,) = header["model-index"]
    (result,) = index["results"]
    assert result["task"]["type"] == "image-classification"
    assert {"type", "name", "split"} <= set(result["dataset"]) and result["dataset"]["split"] == "test"


def test_a_card_without_test_images_says_what_was_measured(run_dir):
    aucs = pd.read_csv(run_dir / "aucs.csv")
    aucs.assign(split="val").drop_duplicates("pathology").to_csv(run_dir / "aucs.csv", index=False)
    card = fill_model_card(run_dir)
    assert header_of(card)["model-index"][0]["results"][0]["dataset"]["split"] == "val"
    assert "There are no test images: all is measured on the validation images" in card


def test_the_hubs_own_library_reads_the_header(made):
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub, which nothing else here does")
    data = hub.ModelCard(made[1]).data
    assert data.license == "apache-2.0" and len(data.eval_results) == 14  # the mean and 13 findings with an AUC


def test_scores_of_header_and_table_are_those_of_the_test_images(made):
    run_dir, card = made
    aucs = pd.read_csv(run_dir / "aucs.csv").query("split == 'test'").set_index("pathology")
    indexed = {m["name"]: m["value"] for m in header_of(card)["model-index"][0]["results"][0]["metrics"]}
    assert indexed["AUC, mean of the findings"] == pytest.approx(aucs.auc["mean"], abs=5e-5)
    assert len(indexed) == 14 and "AUC, Hernia" not in indexed
    table = rows_of(section_of(card, "Metrics"))
    for name in PATHOLOGIES[:-1]:
        row = aucs.loc[name]
        interval = f"{row.auc:.3f} ({row.auc_low:.3f} to {row.auc_high:.3f})"
        assert table[name.replace("_", " ")][:3] == [f"{row.n_pos:,.0f}", interval, f"{row.ap:.3f}"]
        assert indexed[f"AUC, {name.replace('_', ' ')}"] == pytest.approx(row.auc, abs=5e-5)
    assert table["Hernia"][1] == "–"


def test_thresholds_rates_and_calibration_are_those_of_their_files(made):
    table = rows_of(section_of(made[1], "Metrics"))
    assert table["Cardiomegaly"][3:] == ["0.110", "0.712", "0.623", "0.046"]
    assert table["Hernia"][4] == "–"


def test_what_was_chosen_on_few_validation_images_is_marked(made):
    text = section_of(made[1], "Metrics")
    table = rows_of(text)
    assert table["Pneumonia"][3:] == ["0.160 *", "0.712", "0.623", "0.046 *"]
    assert table["Fibrosis"][3] == "0.210" and text.count("fewer than 20 validation images") == 1


def test_subgroups_have_size_interval_and_star(made):
    run_dir, text = made[0], section_of(made[1], "Metrics by subgroup")
    table = pd.read_csv(run_dir / "figures" / "03_subgroups_auc.csv").set_index(["group", "pathology"])
    views = text.partition("| by view |")[2]
    assert views.startswith(" PA, 100 images | AP, 100 images |")
    cells = rows_of(views)["Pleural Thickening"]
    for cell, group in zip(cells, ("PA", "AP"), strict=True):
        row = table.loc[(group, "Pleural_Thickening")]
        assert cell == f"{row.auc:.3f} ({row.auc_low:.3f} to {row.auc_high:.3f})" + (" *" if group == "AP" else "")
    assert "| Edema | sex | F | M | 0.200 (0.050 to 0.300) |" in text and "| Mass | view" not in text


def test_names_split_seed_versions_and_patients_of_the_run(made):
    details = rows_of(section_of(made[1], "Model details"))
    assert details["Split"] == [f"official, SHA-256 `{'ab' * 32}`"]
    sizes = "train: 1,200 images of 600 patients; val: 100 images of 50 patients; test: 300 images of 60 patients"
    assert details["Images"] == [sizes] and details["EPOCHS"] == ["3"]
    assert details["Training"] == ["3 epochs, best 3, seed 7"] and "Keras 3.15.1" in details["Versions"][0]
    assert details["Patients in two subsets"][0].startswith("validation with test: 0")


def test_patients_in_validation_and_test_are_counted(run_dir):
    rows = pd.DataFrame({"patient_id": [1, 2, 2, 3, 3], "split": ["test", "test", "val", "test", "val"]})
    rows.to_csv(run_dir / "predictions.csv", index=False)
    details = rows_of(section_of(fill_model_card(run_dir), "Model details"))
    assert details["Patients in two subsets"][0].startswith("validation with test: 2")


def test_a_synthetic_run_says_so_in_tags_and_first_lines(made):
    card = made[1]
    assert "synthetic" in header_of(card)["tags"] and "datasets" not in header_of(card)
    assert card.partition("\n---\n\n")[2].startswith("> **Synthetic run.**")
    assert "trained on synthetic images" in header_of(card)["model-index"][0]["name"]


def test_a_real_run_names_its_data_and_their_terms(tmp_path):
    card = fill_model_card(make_run(tmp_path / "run", synthetic=False, study="nih"))
    assert "synthetic" not in header_of(card)["tags"] and "Synthetic run" not in card
    assert header_of(card)["datasets"] == ["alkzar90/NIH-Chest-X-ray-dataset"]
    assert "https://nihcc.app.box.com/v/ChestXray-NIHCC" in card and "Wang et al." in card


def test_start_weights_that_have_seen_the_test_images_are_marked_beside_the_score(run_dir):
    run = json.loads((run_dir / "run.json").read_text())
    start = {"source": "torchxrayvision, nih", "trained_on": ["NIH ChestX-ray14"], "seen_test_images": True}
    (run_dir / "run.json").write_text(json.dumps(run | {"weights": start, "backbone": "convnext_base"}))
    card = fill_model_card(run_dir)
    sentence = "Training began with weights (torchxrayvision, nih) that have seen images of NIH's official test list"
    assert f"on the test images. {sentence}" in section_of(card, "Metrics") and "their terms apply as well" in card
    assert sentence in header_of(card)["model-index"][0]["results"][0]["dataset"]["name"]
    details = rows_of(section_of(card, "Model details"))
    assert details["Architecture"][0].startswith("ConvNeXt-Base (Liu et al., CVPR 2022), global")
    (run_dir / "run.json").write_text(json.dumps(run | {"weights": start | {"seen_test_images": False}}))
    assert "official test list: scores" not in fill_model_card(run_dir)


@pytest.mark.parametrize(("name", "notebook"), [("run.json", "02_train"), ("aucs.csv", "03_evaluate")])
def test_a_missing_file_names_the_notebook_that_writes_it(run_dir, name, notebook):
    (run_dir / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing. Run {notebook}"):
        fill_model_card(run_dir)


OPTIONAL = {
    "thresholds.json": "Thresholds: not measured",
    "localization.csv": "Heatmaps compared with boxes: not measured",
    "exports/parity.json": "from Keras: not measured",
    "figures/03_calibration.csv": "Calibration error: not measured",
    "figures/03_aucs.csv": "without looking at an image: not measured",
    "figures/03_subgroups_auc.csv": "By view, sex and age: not measured",
    "figures/03_gaps.csv": "between groups: not measured",
}


def test_heatmaps_are_judged_beside_each_control(run_dir):
    table = pd.read_csv(run_dir / "localization.csv").assign(energy=0.2, energy_low=0.1, energy_high=0.3)
    for measure, (low, high) in {"pointing": ([0.1, -0.1], [0.2, 0.1]), "energy": ([-0.3, -0.1], [-0.1, 0.1])}.items():
        table[f"{measure}_minus_center_low"], table[f"{measure}_minus_center_high"] = low, high
    table.to_csv(run_dir / "localization.csv", index=False)
    section = section_of(fill_model_card(run_dir), "Localization")
    assert "| Mass | 0.200 (0.100 to 0.300) | better | worse |" in section
    assert "| mean | 0.200 (0.100 to 0.300) | not shown | not shown |" in section


def test_what_was_not_measured_is_reported_as_such(run_dir):
    before = fill_model_card(run_dir)
    assert "not measured" not in before
    for name, text in OPTIONAL.items():
        content = (run_dir / name).read_bytes()
        (run_dir / name).unlink()
        card = fill_model_card(run_dir)
        assert text in card and card.count("not measured") == 1
        (run_dir / name).write_bytes(content)
    assert fill_model_card(run_dir) == before


def test_only_figures_that_are_there_are_shown(made):
    assert re.findall(r"\]\((figures/.*?)\)", made[1]) == ["figures/03_aucs.png"]


def test_special_characters_stay_in_their_cell(tmp_path):
    card = fill_model_card(make_run(tmp_path / "run", study="a|b $x ${title} <i>: 'q'\n\"ü"))
    assert "| Study | a\\|b $x ${title} &lt;i>: 'q' \"ü (synthetic) |" in card
    header_of(card)


def test_a_broken_table_row_cannot_come_from_a_commit_with_a_pipe(run_dir):
    run = json.loads((run_dir / "run.json").read_text())
    run["runtime"]["commit"] = "x | y\nz"
    write_json(run_dir / "run.json", run)
    card = fill_model_card(run_dir)
    assert "| Commit | `x \\| y z` |" in card


def test_no_path_of_the_machine_is_published(made):
    card = made[1]
    assert "ada" not in card.replace("metadata", "") and "/device:CPU:0" in card


def test_every_table_has_rows_of_one_width(made):
    for block in re.findall(r"(?:^\|.*\n)+", made[1], re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block


def test_the_template_is_filled_to_the_last_field(made):
    fields = set(re.findall(r"(?<!\$)\$(\w+)", TEMPLATE.read_text()))
    card = made[1]
    assert len(fields) > 15 and not any(f"${field}" in card for field in fields)
    assert '"$PWD/saved_model' in card  # a doubled sign of the template


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/home/ada/x.h5", "(path)"),
        ("read '/data/ada/x' twice", "read '(path)' twice"),
        ("~ada/x and ~/y", "(path) and (path)"),
        (r"C:\Users\ada", "(path)"),
        ("gs://bucket/run", "(path)"),
        ("/device:CPU:0", "/device:CPU:0"),
        ("images/s, https://example.org/a/b, and/or", "images/s, https://example.org/a/b, and/or"),
        ("data/phantom", "data/phantom"),
    ],
)
def test_paths_are_distinguished_from_other_text(text, kept):
    assert hide_paths({"a": [text], "RUN_DIR": "x"}) == {"a": [kept]}


def test_the_claim_page_has_every_item_of_both_editions_and_counts_right():
    page = (ROOT / "docs" / "claim.md").read_text()
    rows = re.findall(r"^\| (\d+|–) \((\d+|–)\) \|[^|]*\| (.*?) \| .+ \|$", page, re.MULTILINE)
    assert [int(new) for new, _, _ in rows if new != "–"] == list(range(1, 45))
    assert sorted(int(old) for _, old, _ in rows if old != "–") == list(range(1, 43))
    states = [state for new, _, state in rows if new != "–"]
    kinds = ("answered", "partly", "not done", "not applicable")
    assert "Of 44 items: " + ", ".join(f"{states.count(kind)} {kind}" for kind in kinds) in page
    assert set(states) <= set(kinds)


def test_links_of_the_claim_page_lead_to_files_and_headings():
    for link in re.findall(r"\]\((?!http)([^)]+)\)", (ROOT / "docs" / "claim.md").read_text()):
        path, _, heading = link.partition("#")
        text = (ROOT / "docs" / path).read_text() if heading else (ROOT / "docs" / path).exists() and ""
        assert text is not False, link
        anchors = re.sub(r"[^\w\s-]", "", "\n".join(re.findall(r"^#+ (.*)$", text, re.MULTILINE))).lower()
        assert not heading or heading in anchors.replace(" ", "-").splitlines(), link


def test_a_run_on_chestmnist_claims_no_patients(tmp_path):
    folder = make_run(tmp_path / "run", synthetic=False, study="chestmnist")
    run = json.loads((folder / "run.json").read_text())
    run["split"] |= {"patients": {}}
    run["about"] = {"name": "ChestMNIST", "terms": "CC BY 4.0", "source": "https://medmnist.com", "labels": "NIH's."}
    write_json(folder / "run.json", run)
    for name in ("03_subgroups_auc", "03_gaps"):
        (folder / "figures" / f"{name}.csv").unlink()
    (folder / "figures" / "03_aucs.csv").write_text("pathology,auc\n")
    card = fill_model_card(folder)
    header, _, text = card.partition("\n---\n")
    assert "chestmnist" in header and "alkzar90" not in header
    assert "train: 1,200 images; val" in text and "resampled images" in text and "over images (no patient ids)" in text
    assert "Scores on this split do not compare" in text and "CC BY 4.0 <https://medmnist.com>" in text
    assert not re.search(r"\d patients|over patients|resampled patients", text)
    assert "By view, sex and age: not measured." in text and "where the study names them" in text


@pytest.mark.parametrize("about", [{}, {"name": "Ward 5", "labels": "By two radiologists."}])
def test_a_study_of_ones_own_is_not_called_nih_s(tmp_path, about):
    folder = make_run(tmp_path / "run", synthetic=False, study="ward")
    run = json.loads((folder / "run.json").read_text())
    write_json(folder / "run.json", run | {"about": about})
    card = fill_model_card(folder)
    assert "ChestX-ray14" not in card and "alkzar90" not in card and about.get("name", "ward") in card
    assert about.get("labels", "The study does not say where its labels come from.") in card


def test_the_card_says_what_another_hospital_s_images_gave(tmp_path):
    folder = make_run(tmp_path / "run", synthetic=False)
    assert "Nothing here was tested on images of another one" in fill_model_card(folder)
    row = "finding,auc_here,auc_there,drop,drop_low,drop_high\nNodule,0.8,0.7,0.1,0.02,0.18\n"
    (folder / "external.csv").write_text(row)
    card = fill_model_card(folder)
    assert "Nodule 0.800 here, 0.700 there (drop +0.100, +0.020 to +0.180)" in card
    assert "Nothing here was tested" not in card and "Labels are noisy" in card
