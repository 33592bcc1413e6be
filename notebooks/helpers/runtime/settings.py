"""Settings of a notebook, its paths, JSON files and figures."""

import json
import os
import re
from pathlib import Path

from .files import as_path, is_remote, local_draft, read_text, write_csv, write_text

ROOT = Path(__file__).resolve().parents[3]  # the repository's root


# Every setting of the notebooks: its type, and what is allowed: an interval, some choices, or None for everything. A
# Path may not be empty; it stays text. PROFILE and RECIPE come first: the values of others depend on them.
SETTINGS = {
    "PROFILE": (str, ("quick", "full", "best")),
    "RECIPE": (str, ("ours", "original")),
    "RUNTIME": (str, ("auto", "tf-tpu", "jax", "gpu", "cpu")),
    **dict.fromkeys(("DATA_DIR", "RUN_DIR", "FEATURES_DIR", "WEIGHTS", "BACKBONE_WEIGHTS"), (Path, None)),
    **dict.fromkeys(("PACKED_DIR", "CHECKPOINT_DIR", "SOURCE_DIR", "PREDICTIONS", "COMPARE", "IMAGE"), (str, None)),
    **dict.fromkeys(("ARCHIVES", "MIRROR", "PART", "CLUSTER", "LAYER", "BACKBONE_LAYER"), (str, None)),
    **dict.fromkeys(("EXTERNAL", "FINDING"), (str, None)),
    **dict.fromkeys(("MODELS", "FINDINGS", "BACKBONES"), ([str], None)),
    **dict.fromkeys(("STREAM", "START_OVER", "HORIZONTAL_FLIP"), (bool, None)),
    "LEAKAGE_DEMO": (bool, None),
    **dict.fromkeys(("DATA_SEED", "SEED"), (int, "[0, 2147483647]")),
    **dict.fromkeys(("SIDE", "IMAGE_SIZE", "FEATURE_SIDE"), (int, "[32, inf)")),  # DenseNet halves an image five times
    **dict.fromkeys(("CHESTMNIST_IMAGES", "PARITY_IMAGES", "REFERENCE", "RANDOM_IMAGES", "MAPS"), (int, "[0, inf)")),
    **dict.fromkeys(("REPLICAS", "EVAL_SIZE", "FROZEN_EPOCHS"), (int, "[0, inf)")),
    **dict.fromkeys(("SHARD_IMAGES", "SYNTHETIC_IMAGES", "NODULE_IMAGES", "BATCH_SIZE"), (int, "[1, inf)")),
    **dict.fromkeys(("EPOCHS", "HEAD_EPOCHS", "STEPS_PER_EXECUTION", "SAVE_STEPS"), (int, "[1, inf)")),
    **dict.fromkeys(("RANDOM_NETWORKS", "REPEATS"), (int, "[1, inf)")),
    "FOLDS": (int, "[2, inf)"),
    "RESAMPLES": (int, "[100, inf)"),  # an interval needs at least as many
    **dict.fromkeys(("WEIGHT_DECAY", "TIME_BUDGET"), (float, "[0, inf)")),
    "LEARNING_RATE": (float, "(0, inf)"),
    **dict.fromkeys(("VAL_SHARE", "EXTERNAL_SHARE", "LEVEL"), (float, "(0, 1)")),
    **dict.fromkeys(("SYNTHETIC_LABEL_NOISE", "LABEL_SMOOTHING"), (float, "[0, 1)")),
    **dict.fromkeys(("AVERAGING", "BATCH_NORM_MOMENTUM"), (float, "[0, 1)")),
    **dict.fromkeys(("SENSITIVITY", "TOLERANCE", "MIN_AREA"), (float, "(0, 1]")),
    "ERASING": (float, "[0, 1]"),
    "FETCH": (str, ("folder", "kaggle", "kagglehub", "nih_box", "hugging_face", "chestmnist")),
    "CHESTMNIST_SIDE": (int, (64, 128, 224)),
    "SPLIT": (str, ("official", "random_patients", "leaky_images")),
    "UNCERTAIN": (str, ("ignore", "zeros", "ones")),
    "RECORDS": (str, ("raw", "png")),
    "BACKBONE": (str, ("densenet121", "densenet169", "densenet201", "convnext_base", "efficientnetv2_s")),
    "WEIGHTS_SEEN": (str, ("", "yes", "no", "unknown")),
    "PRECISION": (str, ("auto", "float32", "mixed_bfloat16", "mixed_float16")),
    "OUTPUT_STRIDE": (int, (16, 32)),
    "BLOCKS": ([int], "[1, inf)"),
    "SCHEDULE": (str, ("cosine", "plateau")),
    "LOSS": (str, ("weighted_bce", "bce", "focal", "asymmetric")),
    "VERBOSE": (int, (0, 1, 2)),
    "VIEWS": (int, (1, 9, 25, 49)),  # squares of odd numbers
    "OPERATING_POINT": (str, ("youden", "f1", "sensitivity")),
    "HEATMAP": (str, ("cam", "grad-cam")),
    "FORMATS": ([str], ("saved_model", "onnx", "litert")),
    "SOURCE": (str, ("phantom", "packed", "folder", "openi")),
    "DATA": (str, ("synthetic", "ChestMNIST", "one NIH archive", "attached", "all of NIH")),
    "KEEP_IN": (str, ("this machine", "Drive", "Kaggle output")),
    "HOURS_LEFT": (float, "[0, inf)"),
    "SET": (str, None),
}
_KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number with a decimal point",
    str: "text",
    Path: "a path",
}
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def check_settings(settings):
    """Chooses, converts and checks settings. A notebook calls it before anything is read, written or deleted.

    Args:
        settings: dict name -> value, such as `globals()`; names that are not in `SETTINGS` are left out. A value that
            differs by profile or recipe is a dict, which may be nested, such as `{"quick": 88, "full": 256}`.

    Returns:
        Dict name -> value, chosen by PROFILE and RECIPE.

    Raises:
        ValueError: a value is not what `SETTINGS` says, or there is none for this profile or recipe.
    """
    checked = {}
    for name in SETTINGS:
        if name not in settings:
            continue
        value, choices = settings[name], [checked[key] for key in ("PROFILE", "RECIPE") if key in checked]
        while isinstance(value, dict):
            keys = [choice for choice in choices if choice in value]
            if not keys:
                raise ValueError(f"{name} has values for {list(value)}, but chosen are {choices}.")
            value = value[keys[0]]
        checked[name] = check_setting(name, value)
    return checked


def check_setting(name, value):
    """Converts a setting to its type and checks it.

    Args:
        name: one of `SETTINGS`.
        value: a value of Python, or text as in a form or on a command line: "no" is False, "2e2" is 200.

    Returns:
        A bool, int, float or str, or a list of ints or of strings.

    Raises:
        ValueError: it has another type, or is out of range; the message names the setting and what is expected.
    """
    kind, allowed = SETTINGS[name]
    several = isinstance(kind, list)
    kind = kind[0] if several else kind
    try:
        if not several:
            return _convert(value, kind, allowed)
        # Names of files may hold spaces.
        items = re.split(r"[\s,]+" if allowed else ",", value or "") if isinstance(value, str | None) else value
        return [_convert(item, kind, allowed) for item in items if str(item).strip()]
    except (ValueError, TypeError, OverflowError, KeyError):
        expected = (
            f"one of {', '.join(str(c) or '(empty)' for c in allowed)}" if isinstance(allowed, tuple) else _KINDS[kind]
        )
        expected += f" in {allowed}" if isinstance(allowed, str) else ""
        text = f"{name} is {value!r}; expected {expected}{', or several with commas' * several}."
        raise ValueError(text) from None


def _convert(value, kind, allowed):
    if kind is bool:
        return _WORDS[str(value).strip().lower()]
    if kind in (str, Path):
        value = "" if value is None else os.fspath(value) if isinstance(value, os.PathLike) else value
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise TypeError
        converted = str(value).strip()
        if kind is Path and not converted:
            raise ValueError
    else:
        converted = float(value)
        if isinstance(value, bool) or (kind is int and converted != int(converted)):
            raise ValueError
        converted = kind(converted)
    if not _is_allowed(converted, allowed):
        raise ValueError
    return converted


def _is_allowed(value, allowed):
    if not isinstance(allowed, str):
        return allowed is None or value in allowed
    low, high = map(float, allowed[1:-1].split(","))
    return low < value < high or (value == low and allowed[0] == "[") or (value == high and allowed[-1] == "]")


def resolve_path(path):
    """Returns a setting as an absolute path: relative ones start at the repository's root, `~` is home.

    A path in a bucket, `gs://`, is absolute as it is, see `files.as_path`. A link to a file keeps its name, which says
    what it is: in a Hugging Face cache, a model's file is a link to one without an ending.
    """
    if is_remote(path):
        return as_path(path)
    path = Path(os.path.abspath(ROOT / Path(path).expanduser()))
    return path if path.is_file() else path.resolve()


def read_json(path):
    """Returns the content of a JSON file."""
    return json.loads(read_text(path))


def write_json(path, content):
    """Writes JSON, see `files.write_text`; if the content cannot be written, the file stays as it was."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def save_figure(figure, run_dir, name, table=None):
    """Writes `figures/<name>.png` and, beside it, the CSV of the numbers that it shows.

    Args:
        figure: matplotlib figure.
        run_dir: path of the run's folder.
        name: file name without its extension.
        table: pandas.DataFrame behind the figure; None where the figure shows images.
    """
    folder = as_path(run_dir) / "figures"
    with local_draft(folder / f"{name}.png") as draft:
        figure.savefig(draft, dpi=150, bbox_inches="tight")
    if table is not None:
        write_csv(folder / f"{name}.csv", table, index=False)
