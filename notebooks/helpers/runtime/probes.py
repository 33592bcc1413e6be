"""What works on this machine: TPU chips and GPUs that it shows, and whether TensorFlow or JAX can compute with them."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

from .packages import find_libtpu, find_version, install, install_tensorflow_tpu, list_missing

GOOGLE, CHIP_IDS = "0x1ae0", {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}  # PCI; TPU v3 to 7
# A first import from a slow disk and the start of a TPU take about a minute together; a libtpu that waits for a
# metadata server that is not there takes many.
PROBE_LIMIT = 120  # seconds

# Each computes something, so that a driver that only pretends is found out, and ends with one line of JSON.
TENSORFLOW_PROBE = """
import json, tensorflow as tf
resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu="local")
tf.config.experimental_connect_to_cluster(resolver)
tf.tpu.experimental.initialize_tpu_system(resolver)
strategy = tf.distribute.TPUStrategy(resolver)
strategy.run(tf.function(lambda: tf.reduce_sum(tf.ones((8, 128)))))
print(json.dumps({"platform": "tpu", "devices": strategy.num_replicas_in_sync}))
"""
JAX_PROBE = """
import json, jax
jax.numpy.ones((8, 128)).sum().block_until_ready()
print(json.dumps({"platform": jax.default_backend(), "devices": jax.device_count()}))
"""
GPU_PROBE = """
import json, tensorflow as tf
gpus = tf.config.list_physical_devices("GPU")
for number in range(len(gpus)):
    with tf.device(f"/GPU:{number}"):
        tf.matmul(tf.ones((8, 8)), tf.ones((8, 8))).numpy()
print(json.dumps({"platform": "gpu" if gpus else "cpu", "devices": len(gpus)}))
"""


@dataclass(frozen=True)
class Finding:
    """Answer to whether something works here.

    Attributes:
        works: whether it does.
        said: what was seen, or why not.
        environment: dict of the variables that it needs.
        overlay: folder of packages that it needs first on the path; empty for none.
        installed: tuple of the requirements that were installed to find out.
    """

    works: bool
    said: str
    environment: dict = field(default_factory=dict)
    overlay: str = ""
    installed: tuple = ()


def find_tpu_chips(root="/"):
    """Counts the TPU chips that the machine shows, without loading anything.

    A container may hide any of the three signs, so one is enough. A TPU_SYSTEM device of TensorFlow is none: the
    tensorflow-tpu package lists one on any machine.

    Args:
        root: folder that holds `dev` and `sys`.

    Returns:
        Number of chips.
    """
    chips = 0
    for device in Path(root, "sys/bus/pci/devices").glob("*"):
        with contextlib.suppress(OSError):
            vendor, number = [(device / name).read_text().strip() for name in ("vendor", "device")]
            chips += vendor == GOOGLE and number in CHIP_IDS
    if chips or shows_gpu(root):  # what is handed through to virtual machines, GPUs too, is in /dev/vfio
        return chips
    # Not /dev/accel*: where other makers' accelerators live, /dev/accel is a folder.
    return _count(root, "dev/accel[0-9]*") or _count(root, "dev/vfio/[0-9]*")


def shows_gpu(root="/"):
    """Returns whether the machine shows a GPU that TensorFlow has builds for (Nvidia, also under WSL, and AMD)."""
    return any(_count(root, pattern) for pattern in ("dev/nvidia[0-9]*", "dev/dxg", "dev/kfd"))


def has_metadata_server(address="169.254.169.254"):
    """Returns whether the server answers that tells virtual machines of Google's what they are.

    Args:
        address: of the host, with a port or not; other clouds have another server at this one.
    """
    connection = http.client.HTTPConnection(address, timeout=2)  # seconds; it is on the same host
    try:
        connection.request("GET", "/computeMetadata/v1/", headers={"Metadata-Flavor": "Google"})
        return connection.getresponse().headers.get("Metadata-Flavor") == "Google"
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _count(root, pattern):
    return len(list(Path(root).glob(pattern)))


def find_out(question, chips, root="/"):
    """Tries whether one way of computing works here, after installing what it lacks.

    Args:
        question: "tensorflow" (drives the TPU as it is), "tensorflow-tpu" (does, in an overlay folder), "jax" (drives
            the TPU where there is one, or anything elsewhere), "gpu" (TensorFlow does) or "cpu".
        chips: number of TPU chips.
        root: folder that holds `dev`.

    Returns:
        A `Finding`. What cannot be installed does not work.
    """
    try:
        return {
            "tensorflow": _find_tensorflow,
            "tensorflow-tpu": _find_overlay,
            "jax": lambda: _find_jax(chips),
            "gpu": lambda: _find_gpu(root),
            "cpu": _find_cpu,
        }[question]()
    except (RuntimeError, OSError) as error:  # of pip; no room, or no right to write
        return Finding(False, str(error))


def _find_tensorflow():
    version = find_version("tensorflow")
    if not version:
        return Finding(False, "TensorFlow is not installed")
    library = os.environ.get("TPU_LIBRARY_PATH") or find_libtpu()  # without a path TensorFlow finds none
    environment = {"TPU_LIBRARY_PATH": str(library)} if library else {}
    answer, reason = probe(TENSORFLOW_PROBE, environment)
    if answer:
        return Finding(True, f"TensorFlow {version} computed on {answer['devices']} TPU cores", environment)
    return Finding(False, f"TensorFlow {version} as installed does not drive the TPU ({reason})")


def _find_overlay():
    overlay = install_tensorflow_tpu()
    paths = [str(overlay.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "TPU_LIBRARY_PATH": str(overlay.libtpu)}
    answer, reason = probe(TENSORFLOW_PROBE, environment)
    name = overlay.folder.name
    if answer:
        said = f"{name} computed on {answer['devices']} TPU cores"
        return Finding(True, said, environment, str(overlay.folder), overlay.installed)
    return Finding(False, f"{name}, in a folder of its own that is not used now, does not drive it either ({reason})")


def _find_jax(chips):
    installed = [] if find_version("jax") else install(["jax[tpu]" if chips else "jax"])
    # Left to itself, JAX takes the CPU where the TPU fails, and keeps the reason to itself.
    environment = {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS") or "tpu,cpu"} if chips else {}
    answer, reason = probe(JAX_PROBE, {**environment, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
    name = f"JAX {find_version('jax')}"
    if answer and (answer["platform"] == "tpu" or not chips):
        devices = f"{answer['devices']} {answer['platform'].upper()} device{'s' * (answer['devices'] > 1)}"
        return Finding(True, f"{name} computed on {devices}", environment, installed=tuple(installed))
    reason = f"it sees only {answer['platform'].upper()}" if answer else reason
    said = f"{name} does not {'drive the TPU' if chips else 'work'} ({reason})"
    return Finding(False, said, installed=tuple(installed))


def _find_gpu(root):
    if not shows_gpu(root):
        return Finding(False, "this machine shows no GPU")
    installed = install(list_missing("tensorflow"))
    answer, reason = probe(GPU_PROBE)
    if answer and answer["devices"]:
        devices = f"{answer['devices']} GPU{'s' * (answer['devices'] > 1)}"
        return Finding(True, f"TensorFlow computed on {devices}", installed=tuple(installed))
    reason = reason or "it lists none; its CUDA libraries may be missing, or it is a build for the CPU"
    said = f"TensorFlow {find_version('tensorflow')} does not drive the GPU ({reason})"
    return Finding(False, said, installed=tuple(installed))


def _find_cpu():
    # Neither a GPU nor a TPU is to be touched, nor a libtpu that would abort the interpreter.
    return Finding(True, "", {"CUDA_VISIBLE_DEVICES": "-1", "TPU_LOAD_LIBRARY": "0"})


def probe(code, environment=None, limit=PROBE_LIMIT):
    """Runs code in another interpreter: a wrong library aborts the one that loads it, a missing server hangs it.

    Args:
        code: Python that prints a JSON object as its last line.
        environment: dict of variables beside those of this process.
        limit: seconds.

    Returns:
        The object and an empty str, or None and what went wrong. Nothing that was started is left running.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=output,  # files, as a pipe stays open for as long as any grandchild has it
            stderr=errors,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        try:
            status = child.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _kill(child)
        said = [_read(file) for file in (output, errors)]
    last = find_reason(said[1])
    if status is None:
        return None, f"no answer within {limit} s" + (f"; last words: {last}" if last else "")
    if status:
        end = f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return None, f"{end}: {last}" if last else end
    try:
        answer = json.loads(said[0].strip().splitlines()[-1])
        return {"platform": str(answer["platform"]), "devices": int(answer["devices"])}, ""
    except (IndexError, ValueError, KeyError, TypeError):
        return None, f"it answered {said[0][-80:]!r}"


def _kill(child):
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL) if hasattr(os, "killpg") else child.kill()
    child.wait()


def _read(file):
    file.seek(0)
    return file.read().decode(errors="replace")


def find_reason(errors):
    """Returns the last line of an error stream that says why, without its time stamp; empty where there is none."""
    noise = re.compile(r"\s|$|[IWE] |[IWE]\d{4}|@|\*\*\*|<|Traceback|Thread |Extension modules|Fatal Python|===")
    telling = re.compile(r"F |F\d{4}|\w*(Error|Exception): .*[^:]$|\w+ failure")
    lines = [re.sub(r"^\S+ [\d:.]+: ([IWEF]) \S+\] ", r"\1 ", line) for line in errors.splitlines()]
    lines = [re.sub(r"^[\w.]+\.(\w+: )", r"\1", line).strip() for line in lines if not noise.match(line)]
    reason = ([line for line in lines if telling.match(line)] or lines or [""])[-1].removeprefix("F ")
    return textwrap.shorten(reason, 160, placeholder=" ...")
