"""Installation with pip, from wheels made here into an environment made here; no network."""

import json
import subprocess
import sys
import zipfile

import packaging
import pip
import pytest

from helpers.runtime.packages import find_version, list_missing
from helpers.runtime.settings import ROOT


def make_wheel(folder, name, version, *requires, module=None):
    folder.mkdir(exist_ok=True)
    plain = name.replace("-", "_")
    info = f"{plain}-{version}.dist-info"
    metadata = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in requires)]
    with zipfile.ZipFile(folder / f"{plain}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{module or plain}/__init__.py", f"__version__ = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", "\n".join(["Metadata-Version: 2.1", *metadata]) + "\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def platform(tmp_path_factory):
    """A function that runs code in an environment with `alpha` 1.0, pip and `packaging`."""
    folder = tmp_path_factory.mktemp("platform")
    wheels = folder / "wheels"
    make_wheel(wheels, "alpha", "1.0")
    make_wheel(wheels, "alpha", "2.0")
    make_wheel(wheels, "beta", "1.0", "alpha")
    make_wheel(wheels, "beta", "2.0", "alpha>=2")
    make_wheel(wheels, "libtpu", "0.0.5")
    make_wheel(wheels, "libtpu", "0.0.20")
    make_wheel(wheels, "libtpu", "0.0.99")
    make_wheel(wheels, "gamma", "1.0", "delta>=1", "keras")
    make_wheel(wheels, "delta", "1.0")
    needs = ["alpha>=2", "gamma", "numpy>=99", "libtpu~=0.0.14", "ghost; python_version < '3'", "more; extra == 'all'"]
    make_wheel(wheels, "tensorflow-tpu", "9.0", *needs, module="tensorflow")
    python = folder / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    site = next((folder / "env" / "lib").glob("python*/site-packages"))
    for real in (packaging, pip):
        (site / real.__name__).symlink_to(real.__path__[0])

    def run(code, cache=folder, build=("9.0", sys.version_info[:2])):
        places = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PYTHONPATH": str(ROOT / "notebooks")}
        places["XDG_CACHE_HOME"] = str(cache)
        imports = "import json, sys; from helpers.runtime import packages; from helpers.runtime.packages import *"
        made = f"TpuBuild({build[0]!r}, ({build[1]!r},), ('0.0.14', '0.0.31'), '0.0.20')"
        code = f"{imports}\npackages.TPU_BUILD = {made}\n{code}"
        answer = subprocess.run([python, "-c", code], env=places, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
        return json.loads(answer.stdout)

    run("print(json.dumps(install(['alpha==1.0'])))")
    return run


def test_what_the_notebooks_need_is_there_under_any_of_its_names():
    assert list_missing("tensorflow") == [] and find_version("tensorflow") and find_version("no-such-package") == ""


@pytest.mark.slow
def test_missing_requirements_are_listed_with_the_tensorflow_that_is_wanted(platform):
    names = platform("print(json.dumps([list_missing(), list_missing('tensorflow-cpu')]))")
    assert not any(need.startswith("tensorflow") for need in names[0])
    assert any(need.startswith("tensorflow-cpu>=") for need in names[1])
    assert not any(need.startswith(("jupyterlab", "papermill")) for need in names[0])  # for one's own machine only


@pytest.mark.slow
def test_an_install_keeps_the_versions_that_are_there_or_fails(platform):
    """Left to itself, pip installs the newest beta and upgrades alpha for it."""
    first, versions, error, kept = platform("""
try: install(["beta==2.0"])
except RuntimeError as failure: error = str(failure)
first = packages._freeze(())
install(["beta"])
print(json.dumps([first, [find_version("beta"), find_version("alpha")], error, packages._freeze(["beta"])]))
""")
    assert versions == ["1.0", "1.0"]
    assert error.startswith("pip could not install beta==2.0: ") and kept == first


OVERLAY = """
before = packages._freeze(())
first, second = [install_tensorflow_tpu() for _ in range(2)]
names = sorted(found.name for found in first.folder.iterdir() if found.suffix != ".dist-info")
same = packages._freeze(()) == before
print(json.dumps([names, first.installed, second.installed, str(first.libtpu), str(first.folder), same]))
"""


@pytest.mark.slow
def test_the_overlay_has_what_is_missing_and_changes_nothing(platform, tmp_path):
    names, first, second, libtpu, folder, same = platform(OVERLAY, tmp_path)
    # Of its needs, numpy and keras belong to the platform, alpha is there in some version, others are not for here.
    assert names == ["delta", "gamma", "libtpu", "tensorflow"]
    assert first == ["tensorflow-tpu==9.0", "libtpu==0.0.20", "gamma", "delta>=1"] and second == []
    assert libtpu == f"{folder}/libtpu/libtpu.so" and "libtpu-0.0.20" in folder
    assert [str(found) for found in tmp_path.iterdir()] == [folder]  # no half-filled folder beside it
    assert same


@pytest.mark.slow
@pytest.mark.parametrize(("version", "own"), [("0.0.20", False), ("0.0.5", True), ("0.0.99", True)])
def test_the_platforms_libtpu_is_used_where_it_is_known_to_work(platform, tmp_path, version, own):
    folder = tmp_path / "filled"  # by an earlier kernel: only the choice is tried
    code = f"""
install(["libtpu=={version}"], free=["libtpu"])
packages._fill_overlay = lambda folder, wanted: wanted
overlay = install_tensorflow_tpu()
print(json.dumps([str(overlay.libtpu), str(overlay.folder), overlay.installed]))
"""
    libtpu, folder, wanted = platform(code, folder)
    assert libtpu.startswith(folder) is own and libtpu.endswith("libtpu/libtpu.so")
    assert wanted == ["tensorflow-tpu==9.0", "libtpu==0.0.20"][: 1 + own]


@pytest.mark.slow
def test_an_overlay_that_cannot_be_filled_leaves_nothing_behind(platform, tmp_path):
    code = """
try: install_tensorflow_tpu()
except RuntimeError as error: print(json.dumps(str(error)))
"""
    failed = platform(code, tmp_path, ("8.0", sys.version_info[:2]))
    no_build = platform(code, tmp_path, ("9.0", (2, 7)))
    assert "could not install tensorflow-tpu==8.0" in failed and list(tmp_path.iterdir()) == []
    assert no_build.startswith("no known tensorflow-tpu for Python 3.")
