"""Where the weights that training starts from come from, and whether they have seen the test images."""

import json

from ..runtime.files import as_path, hash_file, local_copy

_SEEN = {"no": False, "yes": True, "unknown": None}
_TEST_LIST = "NIH's official test list"


def describe_start(weights, seen=""):
    """Describes the weights that training starts from, for `weights` in `run.json`.

    Args:
        weights: "none", "imagenet", or the path of a weights file.
        seen: "no", "yes" or "unknown": whether a file without a record of its own has seen images of NIH's official
            test list. `scripts/convert_weights.py` writes the record into the file, and then this is not used.

    Returns:
        dict with `source` (str), `trained_on` (list of data sets; None if unknown), `seen_test_images` (bool; None if
        unknown), for a file also `file` (its name) and `file_sha256`, and what else its record says.

    Raises:
        ValueError: the file has no record and `seen` does not say what is needed.
    """
    if weights == "none":
        return {"source": "random", "trained_on": [], "seen_test_images": False}
    if weights == "imagenet":
        return {"source": "keras.applications", "trained_on": ["ImageNet"], "seen_test_images": False}
    path = as_path(weights)
    record = _read_record(path)
    if record is None:
        if seen not in _SEEN:
            raise ValueError(
                f"{path} does not say what it was trained on: set WEIGHTS_SEEN to {', '.join(map(repr, _SEEN))} for "
                f"whether it has seen images of {_TEST_LIST}."
            )
        record = {"source": path.name, "trained_on": None, "seen_test_images": _SEEN[seen]}
    return record | {"file": path.name, "file_sha256": hash_file(path)}


def _read_record(path):
    import h5py

    with local_copy(path) as file, h5py.File(file, "r") as opened:
        return json.loads(opened.attrs["provenance"]) if "provenance" in opened.attrs else None


def flag_start(run):
    """Returns what must stand beside a score of a run whose start weights have seen test images.

    Args:
        run: content of `run.json`.

    Returns:
        A sentence; "" if the weights have not seen them.
    """
    given = run.get("settings", {}).get("WEIGHTS", "none")
    old = {
        "source": str(given).rsplit("/", 1)[-1],
        "seen_test_images": False if given in ("none", "imagenet") else None,
    }
    start = run.get("weights", old)  # runs of earlier versions have no record
    if start["seen_test_images"] is False:
        return ""
    have, are = ("may have", "may be") if start["seen_test_images"] is None else ("have", "are")
    return (
        f"Training began with weights ({start['source']}) that {have} seen images of {_TEST_LIST}: "
        f"scores on them {are} too high."
    )
