"""Where start weights come from: what is recorded, what is asked for, and the sentence beside a score."""

import json

import h5py
import pytest

from helpers.runtime import hash_file
from helpers.training import describe_start, flag_start


@pytest.fixture
def plain(tmp_path):
    """A weights file that says nothing of itself."""
    with h5py.File(tmp_path / "start.h5", "w") as file:
        file.create_dataset("weight", data=[1.0])
    return tmp_path / "start.h5"


def test_a_random_start_and_imagenet_have_seen_no_test_image():
    assert describe_start("none") == {"source": "random", "trained_on": [], "seen_test_images": False}
    assert describe_start("imagenet")["trained_on"] == ["ImageNet"]
    assert not flag_start({"weights": describe_start("none")}) and not flag_start(
        {"weights": describe_start("imagenet")}
    )


def test_a_file_without_a_record_is_asked_about(plain):
    with pytest.raises(ValueError, match=r"start\.h5 does not say .*: set WEIGHTS_SEEN to 'no', 'yes', 'unknown'"):
        describe_start(plain)
    found = describe_start(plain, "no")
    assert found["file_sha256"] == hash_file(plain) and found["source"] == found["file"] == "start.h5"
    assert flag_start({"weights": found}) == ""
    assert "(start.h5) that have seen images of NIH's official test list: scores on them are too high" in flag_start({
        "weights": describe_start(plain, "yes")
    })  # fmt: skip
    assert "may have seen" in flag_start({"weights": describe_start(plain, "unknown")})


def test_a_files_own_record_counts(plain):
    record = {"source": "torchxrayvision 1.5, nih", "trained_on": ["NIH ChestX-ray14"], "seen_test_images": True}
    with h5py.File(plain, "a") as file:
        file.attrs["provenance"] = json.dumps(record)
    found = describe_start(plain, "no")
    assert record.items() <= found.items() and "(torchxrayvision 1.5, nih) that have seen" in flag_start(
        {"weights": found}
    )


@pytest.mark.parametrize(("setting", "flagged"), [("none", False), ("imagenet", False), ("/data/start.h5", True)])
def test_runs_of_earlier_versions_are_judged_by_their_setting(setting, flagged):
    sentence = flag_start({"settings": {"WEIGHTS": setting}})
    assert bool(sentence) == flagged and "/data" not in sentence
    assert not flag_start({})
