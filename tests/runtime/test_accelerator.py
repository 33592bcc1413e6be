"""What is chosen to run on, and the cell that fetches the helpers."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from helpers.runtime.accelerator import BACKENDS, Runtime, choose_runtime, list_choices, prepare_runtime
from helpers.runtime.probes import Finding
from helpers.runtime.settings import ROOT

YES, NO = Finding(True, "it computed"), Finding(False, "it did not")
QUESTIONS = ("tensorflow", "tensorflow-tpu", "jax", "gpu")


def answer_with(*working):
    """Returns a function that answers, and the list of what it was asked."""
    asked = []

    def ask(question):
        asked.append(question)
        return YES if question in (*working, "cpu") else NO

    return ask, asked


@pytest.mark.parametrize(
    ("choice", "chips", "working", "name", "asked"),
    [
        ("auto", 8, ["tensorflow", "tensorflow-tpu", "jax"], "tf-tpu", ["tensorflow"]),
        ("auto", 8, ["tensorflow-tpu", "jax"], "tf-tpu", ["tensorflow", "tensorflow-tpu"]),
        ("auto", 1, ["jax"], "jax", ["tensorflow", "tensorflow-tpu", "jax"]),
        ("auto", 8, ["gpu"], "cpu", ["tensorflow", "tensorflow-tpu", "jax", "cpu"]),
        ("auto", 0, ["tensorflow-tpu", "jax", "gpu"], "gpu", ["gpu"]),
        ("auto", 0, ["jax"], "cpu", ["gpu", "cpu"]),
        ("tf-tpu", 8, ["tensorflow-tpu", "jax"], "tf-tpu", ["tensorflow", "tensorflow-tpu"]),
        ("jax", 8, ["tensorflow", "jax"], "jax", ["jax"]),
        ("jax", 0, ["jax", "gpu"], "jax", ["jax"]),
        ("gpu", 8, ["tensorflow", "gpu"], "gpu", ["gpu"]),
        ("cpu", 8, ["tensorflow", "jax", "gpu"], "cpu", ["cpu"]),
    ],
)
def test_the_first_that_works_is_chosen_and_no_more_is_asked(choice, chips, working, name, asked):
    ask, seen = answer_with(*working)
    assert choose_runtime(list_choices(choice, ""), chips, ask)[0] == name
    assert seen == asked


@pytest.mark.parametrize(
    ("choice", "chips", "working", "said"),
    [
        ("tf-tpu", 8, ["jax", "gpu"], "it did not; it did not"),
        ("tf-tpu", 0, QUESTIONS, "no TPU chip was found.*accelerator"),
        ("jax", 8, ["tensorflow", "tensorflow-tpu", "gpu"], "it did not"),
        ("gpu", 0, ["jax"], "it did not.*accelerator"),
    ],
)
def test_a_forced_choice_that_cannot_work_is_an_error_with_the_reason(choice, chips, working, said):
    with pytest.raises(RuntimeError, match=f"RUNTIME = '{choice}' cannot work here: {said}"):
        choose_runtime(list_choices(choice, ""), chips, answer_with(*working)[0])


def test_the_reason_tells_what_was_tried_in_vain():
    _, why, _ = choose_runtime(list_choices("auto", ""), 8, answer_with("jax")[0])
    assert why == "it did not; it did not; it computed"
    assert choose_runtime(list_choices("auto", ""), 0, answer_with("gpu")[0])[1] == "no TPU was found; it computed"


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
    """Runs code in a fresh kernel, where no backend is chosen; returns its last line, or what it raised."""
    kept = {name: text for name, text in os.environ.items() if name not in ("KERAS_BACKEND", "RUNTIME")}
    code = "from helpers.runtime import prepare_runtime\n" + code
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "notebooks", env=kept | variables, capture_output=True, text=True
    )
    return (answer.stderr if answer.returncode else answer.stdout).strip().splitlines()[-1]


def test_a_machine_without_accelerators_takes_the_cpu_and_says_how_to_get_one(tmp_path):
    said = run(f"print(prepare_runtime('auto', root={str(tmp_path)!r}))")
    assert "Found: no TPU, no GPU, Python 3" in said and "because no TPU was found; this machine shows no GPU." in said
    assert "choose one as the accelerator" in said


def test_chips_that_nothing_drives_end_on_the_cpu_with_every_reason(tmp_path):
    """KERAS_BACKEND keeps JAX out and the cache is no folder, so that neither takes its minutes."""
    (tmp_path / "dev").mkdir()
    for number in range(4):
        (tmp_path / "dev" / f"accel{number}").touch()
    (tmp_path / "cache").touch()
    code = f"print(prepare_runtime('auto', root={str(tmp_path)!r}))"
    said = run(code, KERAS_BACKEND="tensorflow", XDG_CACHE_HOME=str(tmp_path / "cache"), PIP_NO_INDEX="1")
    assert "Found: 4 TPU chips" in said and "Chosen: Keras on TensorFlow with the CPU" in said
    assert re.search(r"as installed does not drive the TPU \(exit status 1: \w+Error: ", said)
    assert "File exists" in said and "Unset KERAS_BACKEND to have JAX tried as well." in said


def test_a_forced_gpu_that_is_not_there_is_an_error(tmp_path):
    said = run(f"prepare_runtime('gpu', root={str(tmp_path)!r})")
    assert said.startswith("RuntimeError: RUNTIME = 'gpu' cannot work here: this machine shows no GPU.")


def test_jax_is_chosen_by_either_variable_and_keras_then_runs_on_it(tmp_path):
    pytest.importorskip("jax")
    code = "runtime = prepare_runtime({!r}); import keras; print(keras.backend.backend(), runtime)"
    assert re.match("jax Found.*because RUNTIME asks for it; JAX .* computed on", run(code.format("jax")))
    assert re.match("jax Found.*because KERAS_BACKEND asks for it;", run(code.format("auto"), KERAS_BACKEND="jax"))


def test_a_kernel_is_readied_once():
    """Again, it gives the same without trying anything; another choice needs another kernel."""
    assert run("first = prepare_runtime('cpu'); print(prepare_runtime('cpu') is first)") == "True"
    said = run("prepare_runtime('cpu'); prepare_runtime('jax')")
    assert said == "RuntimeError: This kernel is readied for cpu. Restart it for RUNTIME = 'jax'."


def test_a_notebooks_kernel_gets_the_variables_that_keep_off_what_was_not_chosen():
    code = "import os; prepare_runtime('cpu'); print(*map(os.environ.get, ['KERAS_BACKEND', 'CUDA_VISIBLE_DEVICES']))"
    assert run(code) == "tensorflow -1"


def test_another_backend_than_the_imported_one_is_refused():
    code = "import os; os.environ['KERAS_BACKEND'] = 'tensorflow'; import keras; del os.environ['KERAS_BACKEND']"
    said = run(f"{code}; prepare_runtime('jax')")
    assert said.endswith("Keras was already imported with another backend than jax. Restart the kernel.")


def test_the_paragraph_names_the_first_of_many_installed():
    runtime = Runtime("jax", "jax", 8, "8 TPU chips", "it computed", "Do that.", tuple("abcdef"))
    said = "Found: 8 TPU chips. Chosen: Keras on JAX, tf.data on the host, because it computed."
    assert str(runtime) == f"{said} Installed: a, b, c, d and 2 more. Do that."


def test_nothing_is_installed_where_all_is_there(monkeypatch):
    monkeypatch.setattr("helpers.runtime.accelerator._prepared", None)
    assert prepare_runtime().installed == ()


def test_importing_the_helpers_imports_neither_keras_nor_tensorflow():
    code = (
        "import sys; from helpers.runtime import choose_settings, prepare_runtime; "
        "print(sorted({'keras', 'tensorflow', 'jax'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "notebooks", capture_output=True, text=True)
    assert answer.stdout.strip() == "[]", answer.stderr


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
    for _ in range(2):  # the second time the clone is there
        forced = os.environ | {"RUNTIME": "cpu"}  # what the machine has is not the question
        answer = subprocess.run([sys.executable, "-c", code], cwd=empty, capture_output=True, text=True, env=forced)
        assert answer.stdout.split()[-2:] == [str(empty / "chest" / "notebooks")] * 2, answer.stderr
        assert "Chosen: Keras on TensorFlow with the CPU, because RUNTIME asks for it." in answer.stdout


def test_fetch_cell_without_an_address_says_what_to_set(tmp_path):
    notebook = json.loads((ROOT / "notebooks" / "01_prepare_data.ipynb").read_text())
    cell = next("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code")
    code = re.sub(r'REPOSITORY = ".*"', 'REPOSITORY = "https://github.com/OWNER/REPOSITORY"', cell)
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode != 0 and "Set REPOSITORY" in answer.stderr


def test_a_new_address_reaches_notebooks_badges_and_citation(tmp_path):
    for name in ("CITATION.cff", "README.md", "notebooks", "scripts"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    stamp = [sys.executable, str(tmp_path / "scripts" / "stamp_notebooks.py")]
    subprocess.run([*stamp, "--address", "https://github.com/jane/cxr/"], check=True)
    old = re.search(r"^repository-code: https://github.com/(\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[
        1
    ]
    for path in [tmp_path / "CITATION.cff", tmp_path / "README.md", *(tmp_path / "notebooks").glob("*.ipynb")]:
        assert "jane/cxr" in path.read_text() and old not in path.read_text(), path
    assert subprocess.run([*stamp, "--check"]).returncode == 0
    assert subprocess.run([*stamp, "--address", "cxr"], capture_output=True).returncode != 0
