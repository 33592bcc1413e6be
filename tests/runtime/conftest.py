"""Sessions of notebook 00 in folders of the test's own, with a script that stands in for the six notebooks."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from notebook_cells import run_cells

from helpers.runtime import Session, session
from helpers.runtime.session import PLACES
from helpers.runtime.settings import ROOT, resolve_path

MADE = ROOT / "tests" / "support" / "made_notebook.py"


def make_command(self, name, settings):
    given = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, MADE, name, self.run_dir, resolve_path(settings["PACKED_DIR"]), *given]


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Places of a machine with Drive and Kaggle's folder; notebooks are stood in for."""
    monkeypatch.setattr(Session, "_command", make_command)
    monkeypatch.setattr(session, "ROOT", tmp_path / "clone")
    for name in ("machine", "drive", "kaggle"):
        (tmp_path / name).mkdir()
    return dict(zip(PLACES, (tmp_path / name / "runs" for name in ("machine", "drive", "kaggle")), strict=True))


@pytest.fixture
def start(places, tmp_path):
    """A function that starts a session on the synthetic study."""

    def start(keep_in="this machine", profile="quick", source="synthetic", **options):
        return Session(source, profile, keep_in, places=places, attached=tmp_path / "input", **options)

    return start


@pytest.fixture
def called(monkeypatch):
    """The names of the scripts that notebook 00 calls, for zip and report: they have tests of their own."""
    called = []

    def run(command, **_):  # as publish_check.py, which also fails where a run is not ready to publish
        called.append(Path(command[1]).name)
        return SimpleNamespace(stdout=f"{resolve_path(''.join(command[3:4]))}/model.zip\n", stderr="", returncode=1)

    monkeypatch.setattr(subprocess, "run", run)
    return called


@pytest.fixture
def shown():
    """The lines of progress that notebook 00 has shown."""
    return []


@pytest.fixture
def run_notebook(places, tmp_path, called, shown, monkeypatch):
    """A function that runs the cells of notebook 00 with some settings in its form; returns its global names."""
    defaults = (*Session.__init__.__defaults__[:3], places, str(tmp_path / "input"))
    monkeypatch.setattr(Session.__init__, "__defaults__", defaults)
    line = SimpleNamespace(update=lambda text: shown.append(text.data))
    monkeypatch.setattr("IPython.display.display", lambda *_, **__: line)
    return lambda **settings: run_cells("00_run_everything", settings)
