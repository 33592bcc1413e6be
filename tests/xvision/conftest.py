"""What the tests of the nodule study share: a small folder of synthetic images, half of them with a nodule."""

import pytest


@pytest.fixture(scope="session")
def nodule_dir(tmp_path_factory):
    """A synthetic study of 21 images at 48 pixels in 11 patients; never written to by a test."""
    from helpers.study import plan_nodule_study, write_synthetic_study

    folder = tmp_path_factory.mktemp("studies") / "nodules"
    write_synthetic_study(folder, n_images=21, size=48, plan=plan_nodule_study, n_workers=1)
    return folder
