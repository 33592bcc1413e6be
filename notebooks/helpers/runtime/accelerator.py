"""Chooses what a notebook runs on before Keras is imported: TPU, GPU or CPU, with TensorFlow or JAX."""

import importlib
import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from .packages import find_version, install, list_missing
from .probes import ask_metadata, find_tpu_chips, shows_gpu, try_way

BACKENDS = {"tf-tpu": "tensorflow", "jax": "jax", "gpu": "tensorflow", "cpu": "tensorflow"}
LABELS = {
    "tf-tpu": "Keras on TensorFlow with TPUStrategy",
    "jax": "Keras on JAX, tf.data on the host",
    "gpu": "Keras on TensorFlow with the GPU",
    "cpu": "Keras on TensorFlow with the CPU",
}
# What each name may stand for, see `probes.try_way`; and the order of "auto", beside a TPU and elsewhere.
WAYS = {"tf-tpu": ("tensorflow", "tensorflow-tpu"), "jax": ("jax",), "gpu": ("gpu",), "cpu": ("cpu",)}
ON_TPU = {"tensorflow": "tf-tpu", "tensorflow-tpu": "tf-tpu", "jax": "jax", "cpu": "cpu"}
ELSEWHERE = {"gpu": "gpu", "jax-gpu": "jax", "cpu": "cpu"}
KERAS_JSON = {"floatx": "float32", "image_data_format": "channels_last", "epsilon": 1e-7}  # what the networks need
GET_ACCELERATOR = (
    "For a TPU or a GPU choose one as the accelerator (Colab: Runtime > Change runtime type; Kaggle: Settings > "
    "Accelerator) and start again."
)


@dataclass(frozen=True)
class Runtime:
    """What was chosen to run on; `str` gives a paragraph for the reader of a notebook.

    Attributes:
        name: "tf-tpu", "jax", "gpu" or "cpu".
        backend: Keras backend, "tensorflow" or "jax".
        chips: number of TPU chips that the machine shows.
        found: what the machine has.
        why: reason of the choice.
        other: how to get another one.
        installed: tuple of the requirements that were installed.
    """

    name: str
    backend: str
    chips: int
    found: str
    why: str
    other: str
    installed: tuple = ()

    def __str__(self):
        """Returns what was found, what was chosen and why, and how to get another one."""
        more = f" and {len(self.installed) - 4} more" if len(self.installed) > 4 else ""
        installed = f" Installed: {', '.join(self.installed[:4])}{more}." if self.installed else ""
        return f"Found: {self.found}. Chosen: {LABELS[self.name]}, because {self.why}.{installed} {self.other}"


_prepared = None  # (choice, Runtime) of this kernel; once the kernel holds the TPU, no probe can use it


def prepare_runtime(choice="auto", root="/"):
    """Prepares a kernel before Keras is imported: installs what is missing and chooses what to run on.

    Installed packages are never up- or downgraded: on Colab and Kaggle they are tuned to the machine. The order on a
    TPU host is: TensorFlow as installed, if it drives the TPU; a tensorflow-tpu known to fit, in a folder of its own;
    Keras on JAX. Elsewhere the GPUs come first, if TensorFlow drives them, or else JAX. The CPU comes last. Each is
    first tried in a process of its own.

    Args:
        choice: "auto", or "tf-tpu", "jax", "gpu" or "cpu" for only that one. The environment variable `KERAS_BACKEND`
            limits "auto" to what runs on that backend.
        root: folder that holds `dev` and `sys`; other than "/" only in tests.

    Returns:
        A `Runtime`; the same one when called again.

    Raises:
        ValueError: no such choice, or `KERAS_BACKEND` contradicts it.
        RuntimeError: the choice cannot work here, Keras or TensorFlow was imported too early, this kernel was prepared
            for another choice, pip failed, or keras.json holds values for other programs.
    """
    global _prepared
    if _prepared and choice in (_prepared[0], _prepared[1].name):
        return _prepared[1]
    if _prepared:
        raise RuntimeError(f"This kernel is prepared for {_prepared[1].name}. Restart it for RUNTIME = {choice!r}.")
    _refuse_keras_json()
    keras_backend = os.environ.get("KERAS_BACKEND", "")
    choices = list_choices(choice, keras_backend)
    if len(choices) == 1:
        _refuse_imported(BACKENDS[choices[0]])
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    chips = find_tpu_chips(root)
    if not chips or ask_metadata("") is None:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or libtpu waits minutes for it
    found = _describe_machine(chips, root)
    installed = install(list_missing())

    def attempt(way):
        trial = try_way(way, chips, root)
        installed.extend(trial.installed)
        return trial

    name, why, trial = choose_runtime(choices, chips, attempt)
    _refuse_imported(BACKENDS[name], trial.overlay)
    if not trial.overlay:  # beside a TPU, TensorFlow only reads the data: the build for the CPU is half the download
        installed += install(list_missing("tensorflow-cpu" if chips else "tensorflow"))
    # With 64 bits JAX would train another model from the same seed.
    os.environ.update(trial.environment, KERAS_BACKEND=BACKENDS[name], JAX_ENABLE_X64="0")
    if trial.overlay:
        sys.path.insert(0, trial.overlay)
        importlib.invalidate_caches()
    if name == "jax" and chips:
        _import_tensorflow_without_tpu()
    if len(choices) == 1:
        asks = f"{'KERAS_BACKEND' if choice == 'auto' else 'RUNTIME'} asks for it"
        why = f"{asks}; {why}" if why else asks
    other = _advise(name, chips, forced=len(choices) == 1, without_jax=keras_backend == "tensorflow")
    _prepared = choice, Runtime(name, BACKENDS[name], chips, found, why, other, tuple(installed))
    return _prepared[1]


def list_choices(choice, keras_backend):
    """Limits the choice to the backend that `KERAS_BACKEND` names.

    Args:
        choice: "auto" or the name of a runtime.
        keras_backend: value of `KERAS_BACKEND`, empty where it is not set.

    Returns:
        List of the names that may be chosen; a single one is forced.

    Raises:
        ValueError: no such choice, or the two contradict each other.
    """
    if choice not in ("auto", *BACKENDS):
        raise ValueError(f"RUNTIME is {choice!r}, expected one of auto, {', '.join(BACKENDS)}.")
    if keras_backend not in ("", *BACKENDS.values()):
        raise ValueError(f"KERAS_BACKEND is {keras_backend!r}, but the notebooks run on tensorflow or jax. Unset it.")
    names = [name for name in BACKENDS if choice in ("auto", name) and keras_backend in ("", BACKENDS[name])]
    if not names:
        raise ValueError(f"RUNTIME is {choice!r}, but KERAS_BACKEND is {keras_backend!r}. Unset one of the two.")
    return names


def choose_runtime(choices, chips, attempt):
    """Chooses the first that works, in the order for this machine.

    Args:
        choices: names from `list_choices`.
        chips: number of TPU chips.
        attempt: function from a way, see `probes.try_way`, to a `Trial`; called only until one works.

    Returns:
        Name, reason and `Trial` of the choice.

    Raises:
        RuntimeError: there is a single choice, and it cannot work here.
    """
    if choices == ["tf-tpu"] and not chips:
        raise RuntimeError(f"RUNTIME = 'tf-tpu' cannot work here: no TPU chip was found. {GET_ACCELERATOR}")
    order, failed = dict.fromkeys(WAYS[choices[0]], choices[0]), []
    if len(choices) > 1:
        order, failed = (ON_TPU, []) if chips else (ELSEWHERE, ["no TPU was found"])
    for way, name in order.items():
        if name in choices:
            trial = attempt(way)
            if trial.works:
                return name, "; ".join(filter(None, dict.fromkeys([*failed, trial.text]))), trial
            failed.append(trial.text)
    remedy = GET_ACCELERATOR if choices == ["gpu"] else "RUNTIME = 'auto' takes what works."
    raise RuntimeError(f"RUNTIME = {choices[0]!r} cannot work here: {'; '.join(failed)}. {remedy}")


def _refuse_keras_json():
    path = Path(os.environ.get("KERAS_HOME", "~/.keras"), "keras.json").expanduser()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # Keras passes over a damaged one, too
        return
    for name, needed in KERAS_JSON.items():
        if found.get(name, needed) != needed:
            raise RuntimeError(
                f'{path} sets "{name}" to {json.dumps(found[name])} for all programs with Keras, and these notebooks '
                f"need {json.dumps(needed)}: change it there, or set the variable KERAS_HOME to another folder."
            )


def _refuse_imported(backend, overlay=""):
    if "keras" in sys.modules and sys.modules["keras"].backend.backend() != backend:
        raise RuntimeError(f"Keras was already imported with another backend than {backend}. Restart the kernel.")
    if overlay and "tensorflow" in sys.modules:
        raise RuntimeError("TensorFlow was already imported, but another build is needed for TPUs. Restart the kernel.")


def _import_tensorflow_without_tpu():
    # A build for TPUs takes the chips at its import, or aborts with a libtpu that it does not know. The variable is
    # deleted after that import, because JAX obeys it too.
    os.environ["TPU_LOAD_LIBRARY"] = "0"
    importlib.import_module("tensorflow")
    del os.environ["TPU_LOAD_LIBRARY"]


def _describe_machine(chips, root):
    # From package metadata: whether a package can be imported is not known yet.
    accelerator = f"{chips} TPU chip{'s' * (chips > 1)}" if chips else "a GPU" if shows_gpu(root) else "no TPU, no GPU"
    versions = {"TensorFlow": "tensorflow", "Keras": "keras", "JAX": "jax", "libtpu": "libtpu"}
    known = [f"{label} {find_version(name) or 'not installed'}" for label, name in versions.items()]
    return ", ".join([accelerator, f"Python {platform.python_version()}", *known])


def _advise(name, chips, forced, without_jax):
    if name == "tf-tpu":
        return "For Keras on JAX set RUNTIME = 'jax' and restart the kernel."
    if name == "jax" and chips:
        return "For TensorFlow's TPUStrategy set RUNTIME = 'tf-tpu' and restart the kernel."
    if forced:
        return "RUNTIME = 'auto' takes the best that works."
    if name == "cpu" and chips:
        jax = " Unset KERAS_BACKEND to have JAX tried as well." if without_jax else ""
        return f"For the TPU shut down other kernels, which may hold it, and restart this one.{jax}"
    return GET_ACCELERATOR if name == "cpu" else "For the CPU set RUNTIME = 'cpu' and restart the kernel."
