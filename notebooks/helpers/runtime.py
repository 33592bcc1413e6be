"""Where a notebook runs: missing packages, accelerator, settings, paths, and the record of what was done with what."""

import glob
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

from .files import write_text

ROOT = Path(__file__).resolve().parents[2]  # of the repository


def prepare_runtime(backend="tensorflow"):
    """Readies a kernel before Keras is imported: installs what is missing and chooses the Keras backend.

    Installed packages are never up- or downgraded: on Colab and Kaggle they are tuned to the machine.

    Args:
        backend: value for `KERAS_BACKEND` where the variable is not set.

    Returns:
        List of the requirements that were installed, empty where all were there.

    Raises:
        RuntimeError: Keras was imported before, with another backend.
        subprocess.CalledProcessError: pip failed.
    """
    chosen = os.environ.setdefault("KERAS_BACKEND", backend)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if "keras" in sys.modules and sys.modules["keras"].backend.backend() != chosen:
        raise RuntimeError(f"Keras was already imported with another backend than {chosen}. Restart the kernel.")
    lines = [line.partition("#") for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()]
    wanted = [need.strip() for need, _, why in lines if need.strip() and not why.strip().startswith("local")]
    missing = [need for need in wanted if not _is_installed(re.match(r"[\w.-]+", need)[0])]
    if missing:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)
    return missing


def _is_installed(name):
    # One import package comes under several names, by platform and build.
    families = [
        ["tensorflow", "tensorflow-cpu", "tensorflow-tpu"],
        ["opencv-python-headless", "opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless"],
    ]
    for candidate in next((family for family in families if name in family), [name]):
        try:
            importlib.metadata.version(candidate)
            return True
        except importlib.metadata.PackageNotFoundError:
            continue
    return False


def make_strategy():
    """Chooses how TensorFlow spreads the work: `TPUStrategy`, `MirroredStrategy` over several GPUs, or the default.

    A TPU is looked for only where the machine shows a chip: the tensorflow-tpu package lists a TPU system device on
    any machine, and asking for a TPU that is not there takes minutes. Where there is a chip that TensorFlow cannot use,
    as with the CPU build that today's Kaggle image carries, a warning says so and the default is taken.

    Returns:
        A tf.distribute.Strategy.
    """
    import tensorflow as tf

    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        try:
            resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu="local")
            tf.config.experimental_connect_to_cluster(resolver)
            tf.tpu.experimental.initialize_tpu_system(resolver)
            return tf.distribute.TPUStrategy(resolver)
        except (tf.errors.OpError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0][:200]
            warnings.warn(f"There is a TPU, but TensorFlow {tf.__version__} cannot use it: {reason}", stacklevel=2)
    if len(tf.config.list_physical_devices("GPU")) > 1:
        return tf.distribute.MirroredStrategy()
    return tf.distribute.get_strategy()


def describe_runtime():
    """Returns a dict of what this notebook runs on: versions, backend, devices, processor, commit."""
    import keras
    import tensorflow as tf

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        cpu = found[1] if found else cpu
    devices = [d for kind in ("TPU", "GPU", "CPU") for d in tf.config.list_logical_devices(kind)]
    return {
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "backend": keras.backend.backend(),
        "devices": [device.name for device in devices],
        "processor": f"{cpu}, {os.cpu_count()} cores",
        "platform": platform.platform(),
        "commit": find_commit(),
    }


def find_commit():
    """Returns the repository's commit, with `-dirty` where files differ from it; "unknown" outside a clone."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def choose_settings(settings, *choices):
    """Picks the values of settings that differ by profile or recipe, such as `SIDE = {"quick": 88, "full": 256}`.

    Args:
        settings: dict name -> value, such as `globals()`; of it, names in capitals with a dict as value are looked at.
        *choices: the choices made, such as "quick" and "ours". Dicts may be nested.

    Returns:
        Dict of those names to their chosen values.

    Raises:
        ValueError: a setting has no value for any of the choices.
    """
    chosen = {}
    for name, value in settings.items():
        if not name.isupper() or not isinstance(value, dict):
            continue
        while isinstance(value, dict):
            keys = [choice for choice in choices if choice in value]
            if not keys:
                raise ValueError(f"{name} has values for {list(value)}, but chosen are {list(choices)}.")
            value = value[keys[0]]
        chosen[name] = value
    return chosen


def resolve_path(path):
    """Returns a setting as an absolute pathlib.Path: relative ones start at the repository's root, `~` is home."""
    return (ROOT / Path(path).expanduser()).resolve()


def resolve_paths(data_dir, run_dir, packed_dir, split, profile):
    """Turns the path settings of the notebooks into paths; relative ones are relative to the repository's root.

    Args:
        data_dir: folder of a study in NIH layout; only the synthetic study is ever written to.
        run_dir: folder of one training run; made if missing.
        packed_dir: folder of the packed study; empty for `data/packed/<study>-<split>-<profile>`.
        split: name of the split.
        profile: name of the profile.

    Returns:
        A namespace with pathlib.Paths `study`, `packed`, `run`.
    """
    study = resolve_path(data_dir)
    packed = Path(packed_dir).expanduser() if packed_dir else Path("data/packed") / f"{study.name}-{split}-{profile}"
    run = resolve_path(run_dir)
    run.mkdir(parents=True, exist_ok=True)
    return SimpleNamespace(study=study, packed=resolve_path(packed), run=run)


def write_json(path, content):
    """Writes JSON, see `files.write_text`; what cannot be written leaves the file as it was."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def save_figure(figure, run_dir, name, table=None):
    """Writes `figures/<name>.png` and, beside it, the CSV of the numbers that it shows.

    Args:
        figure: matplotlib figure.
        run_dir: pathlib.Path.
        name: file name without its ending.
        table: pandas.DataFrame behind the figure; None where the figure shows films.
    """
    folder = Path(run_dir) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")
    if table is not None:
        table.to_csv(folder / f"{name}.csv", index=False)
