"""Notebooks on images of one's own: other findings, unknown labels, with and without patients."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from chain import DENSENET, name_folders, run_chain
from own_study import FINDINGS, write_own_study

from helpers.export import fill_model_card
from helpers.export.formats import describe_export
from helpers.packing import load_packed_study
from helpers.training import load_classifier

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[True, False], ids=["patients", "images-only"])
def own(request, tmp_path_factory):
    """A run on such a study; the export, which sees no patients, only of the one that has them."""
    folder, with_patients = tmp_path_factory.mktemp("own"), request.param
    table = write_own_study(folder / "study", with_patients=with_patients)
    settings = name_folders(folder / "study", folder / "run", folder / "packed") | {"SPLIT": "random_patients"}
    run_chain(DENSENET[: 4 + with_patients], settings, draw=False)
    packed = load_packed_study(folder / "packed")
    return SimpleNamespace(run=folder / "run", packed=packed, table=table, with_patients=with_patients)


def test_notebooks_run_on_labels_of_ones_own(own):
    assert own.packed.findings == FINDINGS and own.packed.has_patients == own.with_patients
    known = own.packed.index.set_index("image")[list(FINDINGS)].astype("Int64")
    pd.testing.assert_frame_equal(known.sort_index(), own.table.set_index("image")[list(FINDINGS)].sort_index())

    run = json.loads((own.run / "run.json").read_text())
    assert run["classes"] == list(FINDINGS) and bool(run["split"]["patients"]) == own.with_patients
    train = own.packed.rows("train")[list(FINDINGS)]
    assert np.allclose(list(run["prevalence"].values()), train.mean(), atol=1e-6)  # of the known labels
    predictions = pd.read_csv(own.run / "predictions.csv").set_index("image")
    assert predictions[f"label_{FINDINGS[0]}"].isna().any()
    aucs = pd.read_csv(own.run / "aucs.csv").set_index("pathology")
    test = predictions[predictions["split"].eq("test")]
    for name in FINDINGS:
        assert aucs.loc[name, "n_pos"].max() == test[f"label_{name}"].eq(1).sum()
        assert aucs.loc[name, "n_neg"].max() == test[f"label_{name}"].eq(0).sum()
    localization = pd.read_csv(own.run / "localization.csv")
    assert localization["pathology"].tolist() == ["Nodule", "mean"]
    card = fill_model_card(own.run)
    assert "Ward 5" in card and "By one radiologist." in card and "Not for others." in card
    notice = describe_export(own.run)["notice"]
    assert "Weights trained on Ward 5: Not for others." in notice and "Wang" not in notice
    assert "ChestX-ray14" not in card and ("no patient ids" in card) != own.with_patients


def test_a_model_of_other_findings_is_refused(own, tmp_path):
    run = json.loads((own.run / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(run | {"classes": ["Edema", *FINDINGS[1:]]}))
    with pytest.raises(ValueError, match=r"answers for Edema, .* has labels of Pleural effusion"):
        load_classifier(tmp_path, own.packed)
