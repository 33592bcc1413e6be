"""Installs with pip what a notebook needs: missing requirements, and TensorFlow for TPUs in a folder of its own.

The platform's own packages are never changed: Colab and Kaggle tune them to the machine.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from .settings import ROOT

FAMILIES = (  # one import package has several names, by platform and build
    ("tensorflow", "tensorflow-cpu", "tensorflow-tpu"),
    ("libtpu", "libtpu-nightly"),
)
PLATFORM_OWN = {"numpy", "jax", "jaxlib", "keras"}  # a second copy of these beside the platform's breaks both
VERSION = re.compile(r"\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+[\w.]+)?")  # what pip takes as a constraint


class TpuBuild(NamedTuple):
    """A release of tensorflow-tpu and what it works with."""

    tensorflow: str
    pythons: tuple  # with wheels, and tried
    libtpu: tuple  # oldest and newest that it loads; with any other the import aborts the interpreter
    own_libtpu: str  # installed beside it where the platform's libtpu is not in that range


# Measured by importing, on machines without a TPU: see docs/runtime.md. There is no later release of tensorflow-tpu,
# and its own requirement, libtpu~=0.0.14, lets pip choose one with which it aborts.
TPU_BUILD = TpuBuild("2.20.0", ((3, 11), (3, 12), (3, 13)), ("0.0.14", "0.0.31"), "0.0.20")


class Overlay(NamedTuple):
    """A folder of packages that goes first on the path, so that the platform's packages stay as they are."""

    folder: Path
    libtpu: Path  # the library for TensorFlow to load; it finds none by itself
    installed: tuple


def find_version(name):
    """Returns the installed version of a package under any of its names; empty where there is none."""
    for candidate in next((family for family in FAMILIES if name in family), (name,)):
        try:
            return importlib.metadata.version(candidate)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def list_missing(tensorflow=""):
    """Lists the requirements of requirements.txt that are not installed in any version.

    Args:
        tensorflow: name of the TensorFlow package to install; empty to leave it out.

    Returns:
        List of requirements.
    """
    lines = [line.partition("#") for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()]
    wanted = [need.strip() for need, _, why in lines if need.strip() and not why.strip().startswith("local")]
    missing = [need for need in wanted if not find_version(re.match(r"[\w.-]+", need)[0])]
    return [re.sub("^tensorflow", tensorflow, need) for need in missing if tensorflow or need[:10] != "tensorflow"]


def install(requirements, *options, free=()):
    """Installs with pip; installed packages keep their version, or pip fails.

    Args:
        requirements: list of str; nothing happens where it is empty.
        *options: further options of `pip install`.
        free: names of packages whose version may differ from the installed one, as they go into another folder.

    Returns:
        The requirements.

    Raises:
        RuntimeError: pip failed; with its last error.
    """
    if not requirements:
        return []
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text(_freeze(free), encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command += ["-c", str(constraints), *options, *requirements]
        answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if answer.returncode:
        lines = [line.strip() for line in answer.stdout.splitlines() if line.strip()] or ["no output"]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        reason = errors[-1].removeprefix("ERROR: ")
        raise RuntimeError(f"pip could not install {', '.join(requirements)}: {reason}{explain_offline()}")
    importlib.invalidate_caches()
    return list(requirements)


def explain_offline():
    """Returns the click that switches Kaggle's internet on, to end a sentence with; "" elsewhere."""
    is_kaggle = os.environ.get("KAGGLE_KERNEL_RUN_TYPE")
    return "; on Kaggle, the internet must be on: Settings > Internet on" if is_kaggle else ""


def _freeze(free):
    # Of several with one name, the first on sys.path is imported.
    versions = {}
    for found in importlib.metadata.distributions():
        versions.setdefault(_plain(found.metadata["Name"] or ""), found.version)
    kept = {name: v for name, v in versions.items() if name and name not in free and VERSION.fullmatch(v or "")}
    return "".join(f"{name}=={version}\n" for name, version in kept.items())


def _plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def find_cache():
    """Returns the path of the user's folder for what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def install_tensorflow_tpu():
    """Installs a tensorflow-tpu that fits this Python and this libtpu into a folder of its own, once.

    The folder is in the user's cache, which Kaggle does not keep as output.

    Returns:
        An `Overlay`; `installed` is empty where the folder existed.

    Raises:
        RuntimeError: there is none for this Python, or pip failed; nothing is left behind.
    """
    python, build = sys.version_info[:2], TPU_BUILD
    if python not in build.pythons:
        raise RuntimeError(f"no known tensorflow-tpu for Python {python[0]}.{python[1]}")
    libtpu = find_version("libtpu")
    fits = libtpu and _numbers(build.libtpu[0]) <= _numbers(libtpu) <= _numbers(build.libtpu[1])
    wanted = [f"tensorflow-tpu=={build.tensorflow}"] + ([] if fits else [f"libtpu=={build.own_libtpu}"])
    folder = find_cache() / "-".join([*wanted, f"python{python[0]}.{python[1]}"]).replace("==", "-")
    installed = () if folder.is_dir() else tuple(_fill_overlay(folder, wanted))
    return Overlay(folder, find_libtpu() if fits else folder / "libtpu" / "libtpu.so", installed)


def find_libtpu():
    """Returns the path of the installed libtpu's library, without importing it; None where there is none."""
    found = importlib.util.find_spec("libtpu")
    return Path(found.origin).with_name("libtpu.so") if found and found.origin else None


def _numbers(version):
    return [int(number) for number in re.findall(r"\d+", version)]


def _fill_overlay(folder, wanted):
    # Under a temporary name until it is complete: two kernels may do this at once, or one may be interrupted.
    folder.parent.mkdir(parents=True, exist_ok=True)
    part, installed = Path(tempfile.mkdtemp(prefix="part-", dir=folder.parent)), []
    try:
        while wanted:
            installed += install(wanted, "--no-deps", "--target", str(part), free=("tensorflow-tpu", "libtpu"))
            wanted = _list_missing_in(part)
        try:
            part.replace(folder)
        except OSError:
            if not folder.is_dir():  # otherwise the other kernel was faster
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return installed


def _list_missing_in(part):
    # Without PLATFORM_OWN: they are installed, or an overlay cannot replace them.
    from packaging.requirements import Requirement  # Keras and Matplotlib bring it

    there = list(importlib.metadata.distributions(path=[str(part)]))
    names = {_plain(found.metadata["Name"]) for found in there} | PLATFORM_OWN
    needs = [Requirement(line) for found in there for line in found.requires or []]
    missing = {
        _plain(need.name): f"{need.name}{need.specifier}"
        for need in needs
        if _plain(need.name) not in names
        and not find_version(_plain(need.name))
        and (need.marker is None or need.marker.evaluate({"extra": ""}))
    }
    return sorted(missing.values())
