"""The choice of what to run on, and the notebook cell that fetches the helpers."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from helpers.runtime import accelerator
from helpers.runtime.accelerator import BACKENDS, Runtime, choose_runtime, list_choices, prepare_runtime
from helpers.runtime.probes import Trial
from helpers.runtime.settings import ROOT

YES, NO = Trial(True, "it computed"), Trial(False, "it did not")
WAYS = ("tensorflow", "tensorflow-tpu", "jax", "gpu")


def allow(*working):
    """Returns a stand-in for `try_way`, and the list of the ways it was called with."""
    tried = []

    def attempt(way):
        tried.append(way)
        return YES if way in (*working, "cpu") else NO

    return attempt, tried


@pytest.mark.parametrize(
    ("choice", "chips", "working", "name", "tried"),
    [
        ("auto", 8, ["tensorflow", "tensorflow-tpu", "jax"], "tf-tpu", ["tensorflow"]),
        ("auto", 8, ["tensorflow-tpu", "jax"], "tf-tpu", ["tensorflow", "tensorflow-tpu"]),
        ("auto", 1, ["jax"], "jax", ["tensorflow", "tensorflow-tpu", "jax"]),
        ("auto", 8, ["gpu"], "cpu", ["tensorflow", "tensorflow-tpu", "jax", "cpu"]),
        ("auto", 0, ["tensorflow-tpu", "jax", "gpu"], "gpu", ["gpu"]),
        ("auto", 0, ["jax"], "cpu", ["gpu", "jax-gpu", "cpu"]),
        ("auto", 0, ["jax", "jax-gpu"], "jax", ["gpu", "jax-gpu"]),
        ("tf-tpu", 8, ["tensorflow-tpu", "jax"], "tf-tpu", ["tensorflow", "tensorflow-tpu"]),
        ("jax", 8, ["tensorflow", "jax"], "jax", ["jax"]),
        ("jax", 0, ["jax", "gpu"], "jax", ["jax"]),
        ("gpu", 8, ["tensorflow", "gpu"], "gpu", ["gpu"]),
        ("cpu", 8, ["tensorflow", "jax", "gpu"], "cpu", ["cpu"]),
    ],
)
def test_the_first_that_works_is_chosen_and_no_more_are_tried(choice, chips, working, name, tried):
    attempt, seen = allow(*working)
    assert choose_runtime(list_choices(choice, ""), chips, attempt)[0] == name
    assert seen == tried


@pytest.mark.parametrize(
    ("choice", "chips", "working", "said"),
    [
        ("tf-tpu", 8, ["jax", "gpu"], "it did not; it did not"),
        ("tf-tpu", 0, WAYS, "no TPU chip was found.*accelerator"),
        ("jax", 8, ["tensorflow", "tensorflow-tpu", "gpu"], "it did not"),
        ("gpu", 0, ["jax"], "it did not.*accelerator"),
    ],
)
def test_a_forced_choice_that_cannot_work_is_an_error_with_the_reason(choice, chips, working, said):
    with pytest.raises(RuntimeError, match=f"RUNTIME = '{choice}' cannot work here: {said}"):
        choose_runtime(list_choices(choice, ""), chips, allow(*working)[0])


def test_the_reason_names_what_failed_before():
    _, why, _ = choose_runtime(list_choices("auto", ""), 8, allow("jax")[0])
    assert why == "it did not; it computed"  # what is said twice is kept once
    assert choose_runtime(list_choices("auto", ""), 0, allow("gpu")[0])[1] == "no TPU was found; it computed"
    assert choose_runtime(list_choices("auto", ""), 0, allow()[0])[1] == "no TPU was found; it did not; it computed"


@pytest.mark.parametrize(
    ("choice", "keras_backend", "names"),
    [
        ("auto", "", list(BACKENDS)),
        ("auto", "jax", ["jax"]),
        ("auto", "tensorflow", ["tf-tpu", "gpu", "cpu"]),
        ("jax", "jax", ["jax"]),
        ("gpu", "tensorflow", ["gpu"]),
    ],
)
def test_the_variable_of_keras_limits_the_choice(choice, keras_backend, names):
    assert list_choices(choice, keras_backend) == names


@pytest.mark.parametrize(
    ("choice", "keras_backend", "said"),
    [
        ("jax", "tensorflow", "RUNTIME is 'jax', but KERAS_BACKEND is 'tensorflow'"),
        ("cpu", "jax", "RUNTIME is 'cpu', but KERAS_BACKEND is 'jax'"),
        ("auto", "torch", "KERAS_BACKEND is 'torch'.*Unset it"),
        ("tpu", "", "RUNTIME is 'tpu', expected one of auto, tf-tpu, jax, gpu, cpu"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(choice, keras_backend, said):
    with pytest.raises(ValueError, match=said):
        list_choices(choice, keras_backend)


def run(code, **variables):
    """Runs code in a new kernel, where no backend is chosen; returns the lines that it prints."""
    kept = {name: text for name, text in os.environ.items() if name not in ("KERAS_BACKEND", "RUNTIME")}
    code = "import os; from helpers.runtime import prepare_runtime\n" + code
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "notebooks", env=kept | variables, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip().splitlines()


@pytest.mark.slow
def test_a_kernel_without_accelerators_is_prepared_once_for_the_cpu(tmp_path):
    text, same, variables, error = run(f"""
first = prepare_runtime("auto", root={str(tmp_path)!r})
print(first)
print(prepare_runtime("auto") is first, prepare_runtime("cpu") is first)
print(os.environ["KERAS_BACKEND"], os.environ["CUDA_VISIBLE_DEVICES"])
try: prepare_runtime("jax")
except RuntimeError as error: print(error)
""")
    assert "Found: no TPU, no GPU, Python 3" in text and "because no TPU was found; this machine shows no GPU." in text
    assert "choose one as the accelerator" in text
    assert (same, variables) == ("True True", "tensorflow -1")
    assert error == "This kernel is prepared for cpu. Restart it for RUNTIME = 'jax'."


@pytest.mark.slow
def test_chips_that_nothing_drives_end_on_the_cpu_with_every_reason(tmp_path):
    """KERAS_BACKEND excludes JAX and the cache is not a folder, so that neither takes its minutes."""
    (tmp_path / "dev").mkdir()
    for number in range(4):
        (tmp_path / "dev" / f"accel{number}").touch()
    (tmp_path / "cache").touch()
    code = f"print(prepare_runtime('auto', root={str(tmp_path)!r}))"
    [text] = run(code, KERAS_BACKEND="tensorflow", XDG_CACHE_HOME=str(tmp_path / "cache"), PIP_NO_INDEX="1")
    assert "Found: 4 TPU chips" in text and "Chosen: Keras on TensorFlow with the CPU" in text
    assert re.search(r"as installed does not drive the TPU \(exit status 1: \w+Error: ", text)
    assert "File exists" in text and "Unset KERAS_BACKEND to have JAX tried as well." in text


@pytest.mark.slow
def test_a_gpu_that_neither_library_drives_ends_on_the_cpu_with_both_reasons(tmp_path):
    pytest.importorskip("jax")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    [text] = run(f"print(prepare_runtime('auto', root={str(tmp_path)!r}))", CUDA_VISIBLE_DEVICES="-1")
    assert "Found: a GPU" in text and "Chosen: Keras on TensorFlow with the CPU" in text
    assert re.search(r"does not drive the GPU \(.*JAX \S+ computed on 1 CPU device, not on the GPU", text)


@pytest.mark.slow
def test_keras_runs_on_jax_where_jax_was_chosen():
    pytest.importorskip("jax")
    code = "runtime = prepare_runtime('jax'); import jax, keras; "
    code += "print(keras.backend.backend(), jax.numpy.zeros(1, float).dtype, runtime)"
    [text] = run(code, JAX_ENABLE_X64="1")
    assert re.match("jax float32 Found.*because RUNTIME asks for it; JAX .* computed on", text)


@pytest.fixture
def kernel(monkeypatch):
    """This process as a kernel that nothing was chosen for; what is chosen is undone afterwards."""
    monkeypatch.setattr(accelerator, "_prepared", None)
    monkeypatch.delitem(sys.modules, "keras", raising=False)
    for name in ("KERAS_BACKEND", "CUDA_VISIBLE_DEVICES", "JAX_ENABLE_X64", "TPU_LOAD_LIBRARY", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.setenv(name, "")
    return monkeypatch


@pytest.mark.parametrize(
    ("choice", "variable", "reason"),
    [("jax", "", "RUNTIME asks for it; it computed"), ("auto", "jax", "KERAS_BACKEND asks for it; it computed")],
)
def test_the_reason_names_who_forced_the_choice(kernel, tmp_path, choice, variable, reason):
    kernel.setattr(accelerator, "try_way", lambda way, chips, root: YES)
    kernel.setenv("KERAS_BACKEND", variable)
    runtime = prepare_runtime(choice, root=tmp_path)
    assert (runtime.name, runtime.why, os.environ["KERAS_BACKEND"]) == ("jax", reason, "jax")
    assert runtime.installed == ()  # all is there


def test_a_forced_gpu_that_is_missing_is_an_error(kernel, tmp_path):
    with pytest.raises(RuntimeError, match=r"^RUNTIME = 'gpu' cannot work here: this machine shows no GPU."):
        prepare_runtime("gpu", root=tmp_path)


def test_another_backend_than_the_imported_one_is_refused(kernel):
    kernel.setitem(sys.modules, "keras", SimpleNamespace(backend=SimpleNamespace(backend=lambda: "tensorflow")))
    with pytest.raises(RuntimeError, match=r"already imported with another backend than jax. Restart the kernel."):
        prepare_runtime("jax")


@pytest.mark.parametrize(("name", "value"), [("floatx", "float16"), ("image_data_format", "channels_first")])
def test_what_keras_json_sets_for_other_programs_is_refused_with_its_remedies(kernel, tmp_path, name, value):
    kernel.setattr(accelerator, "try_way", lambda way, chips, root: YES)
    usual = {"backend": "torch", "floatx": "float32", "epsilon": 1e-07, "image_data_format": "channels_last"}
    kernel.setenv("KERAS_HOME", str(tmp_path))
    (tmp_path / "keras.json").write_text(json.dumps(usual | {name: value}))
    with pytest.raises(RuntimeError, match=rf'keras.json sets "{name}" to "{value}" .* need "{usual[name]}": change'):
        prepare_runtime("cpu", root=tmp_path)
    for content in (json.dumps(usual), "{"):
        (tmp_path / "keras.json").write_text(content)
        kernel.setattr(accelerator, "_prepared", None)
        assert prepare_runtime("cpu", root=tmp_path).name == "cpu"


def test_the_paragraph_names_the_first_of_many_installed():
    runtime = Runtime("jax", "jax", 8, "8 TPU chips", "it computed", "Do that.", tuple("abcdef"))
    said = "Found: 8 TPU chips. Chosen: Keras on JAX, tf.data on the host, because it computed."
    assert str(runtime) == f"{said} Installed: a, b, c, d and 2 more. Do that."


def test_the_runtime_package_needs_only_the_standard_library():
    """It is imported before anything is installed, and before a Keras backend is chosen."""
    code = "from helpers.runtime import check_settings, prepare_runtime, read_csv; print(check_settings({}))"
    answer = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT / "notebooks", capture_output=True, text=True)
    assert answer.stdout == "{}\n", answer.stderr


@pytest.mark.slow
def test_fetch_cell_clones_the_repository_where_a_notebook_comes_alone(tmp_path):
    """The cell as it stands in the notebooks, with a local clone URL, in an empty folder."""
    notebook = json.loads((ROOT / "notebooks" / "01_prepare_data.ipynb").read_text())
    cell = next("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code")
    source = tmp_path / "source" / "chest"
    subprocess.run(["git", "init", "-q", source], check=True)
    for name in ("requirements.txt", "notebooks/helpers"):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, target)
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "-C", source, "add", "."], check=True)
    subprocess.run(["git", "-C", source, *identity, "commit", "-qm", "all"], check=True)
    code = re.sub(r'REPOSITORY = ".*"', f'REPOSITORY = "{source}"', cell) + "\nprint(os.getcwd(), sys.path[0])"
    empty = tmp_path / "empty"
    empty.mkdir()
    forced = os.environ | {"RUNTIME": "cpu"}  # whatever the machine has
    for _ in range(2):  # the second time the clone is there
        answer = subprocess.run([sys.executable, "-c", code], cwd=empty, capture_output=True, text=True, env=forced)
        assert answer.stdout.split()[-2:] == [str(empty / "chest" / "notebooks")] * 2, answer.stderr
        assert "Chosen: Keras on TensorFlow with the CPU, because RUNTIME asks for it." in answer.stdout


def test_fetch_cell_without_an_address_says_what_to_set(tmp_path):
    notebook = json.loads((ROOT / "notebooks" / "01_prepare_data.ipynb").read_text())
    cell = next("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code")
    code = re.sub(r'REPOSITORY = ".*"', 'REPOSITORY = "https://github.com/OWNER/REPOSITORY"', cell)
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode != 0 and "Set REPOSITORY" in answer.stderr


@pytest.mark.slow
def test_a_new_address_reaches_notebooks_badges_and_citation(tmp_path):
    for name in ("CITATION.cff", "README.md", "notebooks", "scripts"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    stamp = [sys.executable, str(tmp_path / "scripts" / "stamp_notebooks.py")]
    subprocess.run([*stamp, "--address", "https://github.com/jane/cxr/"], check=True)
    citation = (ROOT / "CITATION.cff").read_text()
    old = re.search(r"^repository-code: https://github.com/(\S+)$", citation, re.MULTILINE)[1]
    for path in [tmp_path / "CITATION.cff", tmp_path / "README.md", *(tmp_path / "notebooks").glob("*.ipynb")]:
        assert "jane/cxr" in path.read_text() and old not in path.read_text(), path
    assert subprocess.run([*stamp, "--check"]).returncode == 0
    assert subprocess.run([*stamp, "--address", "cxr"], capture_output=True).returncode != 0
