"""NIH's own label file, loaded and split once for all tests of a study."""

import pytest


@pytest.fixture(scope="session")
def nih_folder(shared_data):
    """Folder with NIH's label file, lists, boxes and radiologists' labels, without images."""
    return shared_data / "nih_metadata"


@pytest.fixture(scope="session")
def nih(nih_folder):
    """All rows of NIH's label file, with `subset` of the official split; never changed by a test."""
    from helpers.study import load_study, make_split

    metadata = load_study(nih_folder).rows
    metadata["subset"] = make_split(metadata)
    return metadata
