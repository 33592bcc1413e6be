"""Installation with pip, from wheels made here into environments made here; no network."""

import json
import subprocess
import sys
import zipfile

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
    """An environment with `alpha` 1.0, `packaging` and a libtpu, and a function that runs code in it."""
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
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    import packaging

    # The one real package that the code asks for.
    site = next((folder / "env" / "lib").glob("python*/site-packages"))
    (site / "packaging").symlink_to(packaging.__path__[0])

    def run(code, **variables):
        places = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PYTHONPATH": str(ROOT / "notebooks")}
        code = (
            f"import json; from helpers.runtime.packages import *; from helpers.runtime.packages import _freeze\n{code}"
        )
        answer = subprocess.run([python, "-c", code], env=places | variables, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
        return json.loads(answer.stdout)

    run("print(json.dumps(install(['alpha==1.0'])))")
    return run


def freeze(platform):
    return platform("import importlib; print(json.dumps(sorted(_freeze(()).split())))")


def test_what_the_notebooks_need_is_there_under_any_of_its_names():
    assert list_missing("tensorflow") == [] and find_version("tensorflow") and find_version("no-such-package") == ""


def test_missing_requirements_are_listed_with_the_tensorflow_that_is_wanted(platform):
    names = platform("print(json.dumps([list_missing(), list_missing('tensorflow-cpu')]))")
    assert not any(need.startswith("tensorflow") for need in names[0])
    assert any(need.startswith("tensorflow-cpu>=") for need in names[1])
    assert not any(need.startswith(("jupyterlab", "papermill")) for need in names[0])  # for one's own machine only


def test_an_install_keeps_the_versions_that_are_there(platform):
    """Left to itself, pip takes the newest beta and raises alpha for it."""
    code = "install(['beta']); print(json.dumps([find_version('beta'), find_version('alpha')]))"
    assert platform(code) == ["1.0", "1.0"]


def test_an_install_that_would_change_a_version_fails_and_says_so(platform):
    before = freeze(platform)
    code = "try: install(['beta==2.0'])\nexcept RuntimeError as error: print(json.dumps(str(error)))"
    assert platform(code).startswith("pip could not install beta==2.0: ")
    assert freeze(platform) == before


OVERLAY = """
builds = [TpuBuild("9.0", (sys.version_info[:2],), ("0.0.14", "0.0.31"), "0.0.20")]
first, second = [install_tensorflow_tpu({cache!r}, builds) for _ in range(2)]
names = sorted(found.name for found in first.folder.iterdir() if found.suffix != ".dist-info")
print(json.dumps([names, first.installed, second.installed, str(first.libtpu), first.folder.name, str(first.folder)]))
"""


def test_the_overlay_has_what_is_missing_and_changes_nothing(platform, tmp_path):
    before = freeze(platform)
    names, first, second, libtpu, name, folder = platform(OVERLAY.format(cache=str(tmp_path)))
    # Of its needs, numpy and keras are the platform's own, alpha is there in some version, others are not for here.
    assert names == ["delta", "gamma", "libtpu", "tensorflow"]
    assert first == ["tensorflow-tpu==9.0", "libtpu==0.0.20", "gamma", "delta>=1"] and second == []
    assert libtpu == f"{folder}/libtpu/libtpu.so" and "libtpu-0.0.20" in name
    assert [found.name for found in tmp_path.iterdir()] == [name]  # no half-filled folder beside it
    assert freeze(platform) == before


@pytest.mark.parametrize(("version", "own"), [("0.0.20", False), ("0.0.5", True), ("0.0.99", True)])
def test_the_platforms_libtpu_is_taken_where_it_is_known_to_work(platform, tmp_path, version, own):
    platform(f"print(json.dumps(install(['libtpu=={version}'], free=['libtpu'])))")
    *_, libtpu, _, folder = platform(OVERLAY.format(cache=str(tmp_path)))
    assert libtpu.startswith(folder) is own and libtpu.endswith("libtpu/libtpu.so")


def test_an_overlay_that_cannot_be_filled_leaves_nothing_behind(platform, tmp_path):
    code = OVERLAY.format(cache=str(tmp_path)).replace('"9.0"', '"8.0"').replace("\n", "\n  ")
    code = f"try:\n  {code}\nexcept RuntimeError as error: print(json.dumps(str(error)))"
    assert "could not install tensorflow-tpu==8.0" in platform(code)
    assert list(tmp_path.iterdir()) == []


def test_no_build_for_this_python_is_said(platform):
    code = "try: install_tensorflow_tpu(builds=[])\nexcept RuntimeError as error: print(json.dumps(str(error)))"
    assert platform(code).startswith("no known tensorflow-tpu for Python 3.")
