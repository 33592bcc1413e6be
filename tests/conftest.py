"""Shared by the tests: the path to the helpers, real radiographs if available, and a small study packed once."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "notebooks"), str(ROOT / "tests" / "support"), str(ROOT)]
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# What the tests compile on JAX they run a few times: quickly compiled is enough, and some compile the same again.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
# TensorFlow reads these when it is imported; otherwise it would try for minutes to reach a bucket that is gone.
os.environ |= {"GCS_RETRY_CONFIG_MAX_RETRIES": "2", "GCS_RETRY_CONFIG_INIT_DELAY_TIME_US": "1000"}

# Longest first: a worker takes whole files, and would run the last chain of notebooks alone.
SLOW_FILES = (
    "device_chains",
    "resume",
    "remote_files",
    "chains",
    "hosts",
    "backbones",
    "end_to_end",
    "cluster",
    "fetch_chains",
    "seeds",
    "replicas",
    "tpu_check",
    "own_study",
    "export",
    "devices",
    "serving",
)


def pytest_collection_modifyitems(items):
    """Sorts the slow files to the front; `make test` keeps xdist from sorting by the number of tests."""
    order = {f"test_{name}.py": number for number, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(autouse=True)
def same_draws_each_time():
    """Gives a test the same random weights in every run: some make a network that cannot learn."""
    if "keras" in sys.modules:
        sys.modules["keras"].utils.set_random_seed(0)


@pytest.fixture(scope="session")
def shared_data():
    """Folder with real radiographs and metadata beside the repository; tests that need it skip if it is missing."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs real radiographs in {folder}, which are not part of the repository")
    return folder


@pytest.fixture(scope="session")
def phantom_dir(tmp_path_factory):
    """A synthetic study of 90 images at 64 pixels; never written to by a test."""
    from helpers.study import write_synthetic_study

    folder = tmp_path_factory.mktemp("studies") / "phantom"
    write_synthetic_study(folder, n_images=90, size=64, seed=5, n_workers=1)
    return folder


@pytest.fixture(scope="session")
def rows_and_paths(phantom_dir):
    """The rows of `phantom_dir` with their official split, and the paths of its images."""
    from helpers.study import load_study, make_split, match_images

    study = load_study(phantom_dir)
    paths = study.list_images()
    rows, _ = match_images(study.rows, paths)
    rows["split"] = make_split(rows, val_share=0.15)
    return rows, paths


@pytest.fixture(scope="session")
def packed(rows_and_paths, tmp_path_factory):
    """`phantom_dir` packed at 48 pixels in shards of 16 images; never written to by a test."""
    from helpers.packing import pack_study

    rows, paths = rows_and_paths
    return pack_study(rows, paths, tmp_path_factory.mktemp("packed"), split_name="official", side=48, shard_images=16)


@pytest.fixture(scope="session")
def make_images():
    """A function that writes images of noise; the labels of each are its number in binary."""
    import numpy as np
    import pandas as pd
    from PIL import Image

    from helpers.study import PATHOLOGIES

    def make(folder, *, train=0, val=0, test=0, side=16):
        """Returns the rows (with `split`) and the paths; image i has bit k of i as its label k, and its own patient."""
        folder.mkdir(parents=True)
        rng = np.random.default_rng(11)
        numbers = np.arange(train + val + test)
        names = [f"{number:08d}_000.png" for number in numbers]
        for name in names:
            Image.fromarray(rng.integers(0, 256, (side, side), dtype=np.uint8)).save(folder / name)
        columns = {
            "image": names,
            "patient_id": numbers + 1,
            "follow_up": numbers % 3,
            "age": np.where(numbers % 5 == 4, np.nan, numbers * 7 / 365.25),
            "sex": np.where(numbers % 2, "M", "F"),
            "view": np.where(numbers % 4, "PA", "AP"),
        }
        bits = {name: (numbers >> k & 1).astype("uint8") for k, name in enumerate(PATHOLOGIES)}
        rows = pd.DataFrame(columns | bits)
        # By a fixed shuffle, so that a subset is not a run of names.
        rows["split"] = rng.permutation(["train"] * train + ["val"] * val + ["test"] * test)
        return rows, {name: folder / name for name in names}

    return make


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A run's folder with seeded weights of a small network, exported as a SavedModel; never written to by a test."""
    from seeded_run import write_seeded_run

    from helpers.export.formats import write_formats

    folder = write_seeded_run(tmp_path_factory.mktemp("models") / "tiny", blocks=(1, 1, 1, 1))
    write_formats(folder, ["saved_model"])
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_run):
    """The SavedModel of `tiny_run`, opened."""
    from helpers.export import ExportedModel

    return ExportedModel(tiny_run / "saved_model")
