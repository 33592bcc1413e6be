"""Which Python `make` sets the environment up with."""

import subprocess

import pytest

from helpers.runtime.settings import ROOT


@pytest.mark.parametrize(
    ("fails", "taken"),
    [
        ([], "python3.13"),
        (["python3.13"], "python3.12"),  # such as a shim of pyenv for a version that is not chosen
        (["python3.13", "python3.12", "python3.11"], "python3"),
    ],
)
def test_the_newest_python_that_works_is_taken(tmp_path, fails, taken):
    for name in ("python3.13", "python3.12", "python3.11", "python3"):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {127 * (name in fails)}\n")
        (tmp_path / name).chmod(0o755)
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    command = ["make", "--dry-run", f"ENV={tmp_path}/env", f"{tmp_path}/env/run"]
    printed = subprocess.run(command, cwd=ROOT, env=path, capture_output=True, text=True, check=True).stdout
    assert f"\n{taken} -m venv {tmp_path}/env\n" in printed
    named = subprocess.run([*command, "PYTHON=other"], cwd=ROOT, env=path, capture_output=True, text=True, check=True)
    assert f"\nother -m venv {tmp_path}/env\n" in named.stdout
