"""The record of a training: what older versions left out, and which studies fit it."""

import json
from types import SimpleNamespace

import pytest

from helpers.training import read_run
from helpers.training.run_record import check_study


def test_older_records_are_completed_and_newer_ones_kept(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run\.json is missing\. Run 02_train_densenet121"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"side": 256}))
    assert read_run(tmp_path)["eval_size"] == 256, "what was measured then"
    assert read_run(tmp_path)["backbone"] == "densenet121"
    (tmp_path / "run.json").write_text(json.dumps({"side": 320, "eval_size": 256, "output_stride": 16}))
    assert read_run(tmp_path) == {"side": 320, "eval_size": 256, "output_stride": 16} | {
        "backbone": "densenet121",
        "blocks": (),
    }


@pytest.mark.parametrize(
    "packed, side, eval_size, fits",
    [
        (256, 256, 256, True),
        (320, 256, 256, True),  # scaled down to what the model knows
        (511, 256, 256, True),
        (512, 256, 256, False),  # would alias
        (224, 256, 256, False),  # would be enlarged
        (224, 224, 256, True),  # enlarged, as the images of its training were
    ],
)
def test_a_study_must_give_the_size_of_evaluation(packed, side, eval_size, fits):
    record = {
        "classes": ["Mass"],
        "split": {"name": "official", "sha256": "0" * 64},
        "side": side,
        "eval_size": eval_size,
    }
    study = SimpleNamespace(
        folder="packed", findings=("Mass",), split_name="official", split_sha256="0" * 64, side=packed
    )
    if fits:
        check_study("run", record, study)
        return
    with pytest.raises(
        ValueError, match=f"sees them at {eval_size}, but packed holds images of {packed}.* at 256 to 511"
    ):
        check_study("run", record, study)


def test_another_split_is_refused():
    record = {"classes": ["Mass"], "split": {"name": "official", "sha256": "0" * 64}, "side": 256, "eval_size": 256}
    study = SimpleNamespace(
        folder="packed", findings=("Mass",), split_name="leaky_images", split_sha256="1" * 64, side=256
    )
    with pytest.raises(ValueError, match=r"trained on split official \(0{12}\), but packed holds split leaky_images"):
        check_study("run", record, study)


@pytest.mark.parametrize("findings", [("Nodule", "Mass"), ("Mass",), ("Mass", "Node")])
def test_a_study_of_other_findings_or_another_order_is_refused(findings):
    record = {"classes": ["Mass", "Nodule"], "split": {"name": "official", "sha256": "0" * 64}, "side": 256}
    with pytest.raises(ValueError, match=f"answers for Mass, Nodule, but packed has labels of {', '.join(findings)}"):
        check_study("run", record, SimpleNamespace(folder="packed", findings=findings))
