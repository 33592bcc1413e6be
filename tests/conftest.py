"""What the tests share: the path to the helpers, real films where they are, a small study packed once."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


@pytest.fixture(scope="session")
def shared_data():
    """Folder with real films and metadata beside the repository; tests that need it skip where it is missing."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs real films in {folder}, which are not part of the repository")
    return folder


@pytest.fixture(scope="session")
def phantom_dir(tmp_path_factory):
    """A synthetic study of 90 films at 64 pixels; never written to by a test."""
    from helpers import write_phantom_study

    folder = tmp_path_factory.mktemp("studies") / "phantom"
    write_phantom_study(folder, n_images=90, size=64, seed=5, n_workers=1)
    return folder


@pytest.fixture(scope="session")
def films_and_paths(phantom_dir):
    """The rows of `phantom_dir` with their official split, and the paths of its films."""
    from helpers import list_images, load_metadata, make_split, match_images

    images = list_images(phantom_dir)
    films, _ = match_images(load_metadata(phantom_dir), images)
    films["split"] = make_split(films, phantom_dir, val_share=0.15)
    return films, images


@pytest.fixture(scope="session")
def packed(films_and_paths, tmp_path_factory):
    """`phantom_dir` packed at 48 pixels in shards of 16 films; never written to by a test."""
    from helpers import pack_study

    films, images = films_and_paths
    return pack_study(films, images, tmp_path_factory.mktemp("packed"), split_name="official", side=48, shard_films=16)
