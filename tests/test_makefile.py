"""What `make` takes on its command line, and which Python it sets the environment up with."""

import re
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


def dry_run(*words, **environment):
    """Returns what `make` would run, and its error."""
    environment = {"PATH": "/usr/bin:/bin"} | environment
    answer = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (answer.returncode == 0) == (not answer.stderr)
    return answer.stdout, answer.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["EPOCHS=3"], '`make run` takes DATA_DIR RUN_DIR PROFILE SET, not EPOCHS. .* go into SET="EPOCHS=3"'),
        (["prepare", "PART=3/8", "RUN_DIR=x"], 'not PART. .* go into SET="PART=3/8"'),
        (["evaluate", "PREDICTION=x.csv"], "takes PREDICTIONS DATA_DIR RUN_DIR PROFILE SET, not PREDICTION. Variables"),
        (["run", "PREDICTIONS=x.csv"], "not PREDICTIONS. Variables"),
        (["predict", "IMAGES=x", "EPOCHS=3"], "`make predict` takes IMAGES RUN_DIR OUT CLUSTER, not EPOCHS. Variables"),
        (["lint", "epochs=3"], "`make lint` takes no variable, not epochs. Variables"),
    ],
)
def test_variables_that_a_target_would_ignore_are_refused(words, said):
    printed, error = dry_run(*words)
    assert not printed and re.search(said, error) and error.count("\n") == 1


def test_variables_of_help_settings_and_environment_are_taken():
    assert "--set EPOCHS=3 " in dry_run("run", "SET=EPOCHS=3 SEED=1", "RUNTIME=jax", "ENV=x", "SHELL=/bin/sh")[0]
    assert "--seeds 2 " in dry_run("seeds", "SEEDS=2", EPOCHS="3", CUDA_VISIBLE_DEVICES="0")[0]
    assert '--data-dir "a"' in dry_run("run", DATA_DIR="a")[0]


def test_a_cluster_is_taken_from_the_command_line_alone_and_brings_ray():
    for target in ("prepare", "xvision", "predict"):
        assert "requirements/cluster.txt" in dry_run(target, "CLUSTER=auto", "ENV=x")[0]
        printed, _ = dry_run(target, "ENV=x", CLUSTER="the name of a machine")
        assert "cluster.txt" not in printed and "the name" not in printed


def test_the_commands_of_the_pages_are_taken():
    pages = [ROOT / name for name in ("Makefile", "README.md", "CONTRIBUTING.md", "data/README.md", "models/README.md")]
    text = "\n".join(page.read_text() for page in [*pages, *(ROOT / "docs").glob("*.md")])
    commands = re.findall(r"make ([a-z-]+)((?: +\[?[A-Z_]+=\S*)+)", re.sub(r'"[^"\n]*"', '""', text))
    commands = {(target, *re.findall(r"\b[A-Z_]+=", words)) for target, words in commands if "EPOCHS=3" not in words}
    assert len(commands) > 15
    for command in commands:
        dry_run(*command)
