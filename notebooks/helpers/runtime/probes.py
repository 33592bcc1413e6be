"""Finds the TPU chips and GPUs of this machine, and tries whether TensorFlow or JAX can compute on them."""

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
NO_GPU = "this machine shows no GPU"

# Each computes something, since a device may be listed and not work, and ends with one line of JSON.
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
class Trial:
    """Result of trying one way to compute.

    Attributes:
        works: whether it works here.
        text: what was seen, or why it does not work.
        environment: dict of the variables that it needs.
        overlay: folder of packages that it needs first on the path; empty for none.
        installed: tuple of the requirements that were installed to try it.
    """

    works: bool
    text: str
    environment: dict = field(default_factory=dict)
    overlay: str = ""
    installed: tuple = ()


def find_tpu_chips(root="/"):
    """Counts the TPU chips that the machine shows, without loading anything.

    A container may hide PCI devices or device files, so either is enough. A TPU_SYSTEM device of TensorFlow proves
    nothing: the tensorflow-tpu package lists one on any machine.

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
    if chips or shows_gpu(root):  # /dev/vfio also holds other devices that a virtual machine may use, such as GPUs
        return chips
    # Not /dev/accel*: other makers' accelerators are in a folder /dev/accel.
    return _count(root, "dev/accel[0-9]*") or _count(root, "dev/vfio/[0-9]*")


def shows_gpu(root="/"):
    """Returns whether the machine shows a GPU that TensorFlow has builds for (Nvidia, also under WSL, and AMD)."""
    return any(_count(root, pattern) for pattern in ("dev/nvidia[0-9]*", "dev/dxg", "dev/kfd"))


def ask_metadata(key, address="169.254.169.254"):
    """Returns what the metadata server of Google's virtual machines answers for a key; None without that server.

    Args:
        key: such as "instance/attributes/agent-worker-number"; "" for a check whether it is there.
        address: host, with or without a port; other clouds have another server at the same address.

    Returns:
        str, empty if the server has no such key; or None.
    """
    connection = http.client.HTTPConnection(address, timeout=2)  # seconds; it is on the same host
    try:
        connection.request("GET", f"/computeMetadata/v1/{key}", headers={"Metadata-Flavor": "Google"})
        answer = connection.getresponse()
        if answer.headers.get("Metadata-Flavor") != "Google":
            return None
        return answer.read().decode() if answer.status == 200 else ""
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _count(root, pattern):
    return len(list(Path(root).glob(pattern)))


def try_way(way, chips, root="/"):
    """Tries whether one way to compute works here, after installing what it needs.

    Args:
        way: "tensorflow" (drives the TPU as it is), "tensorflow-tpu" (does, in an overlay folder), "jax" (drives the
            TPU where there is one, or anything elsewhere), "gpu" (TensorFlow does), "jax-gpu" (JAX does, as installed)
            or "cpu".
        chips: number of TPU chips.
        root: folder that holds `dev`.

    Returns:
        A `Trial`. What cannot be installed does not work.
    """
    try:
        if way == "tensorflow":
            return _try_tensorflow()
        if way == "tensorflow-tpu":
            return _try_overlay()
        if way == "jax":
            return _try_jax(chips)
        if way == "gpu":
            return _try_gpu(root)
        if way == "jax-gpu":
            return _try_jax_gpu(root)
    except (RuntimeError, OSError) as error:  # of pip; no room, or no right to write
        return Trial(False, str(error))
    # On the CPU neither a GPU nor a TPU may be touched, nor a libtpu that would abort the interpreter.
    return Trial(True, "", {"CUDA_VISIBLE_DEVICES": "-1", "TPU_LOAD_LIBRARY": "0"})


def _try_tensorflow():
    version = find_version("tensorflow")
    if not version:
        return Trial(False, "TensorFlow is not installed")
    library = os.environ.get("TPU_LIBRARY_PATH") or find_libtpu()  # without a path TensorFlow finds none
    environment = {"TPU_LIBRARY_PATH": str(library)} if library else {}
    answer, reason = probe(TENSORFLOW_PROBE, environment)
    if answer:
        return Trial(True, f"TensorFlow {version} computed on {answer['devices']} TPU cores", environment)
    return Trial(False, f"TensorFlow {version} as installed does not drive the TPU ({reason})")


def _try_overlay():
    overlay = install_tensorflow_tpu()
    paths = [str(overlay.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "TPU_LIBRARY_PATH": str(overlay.libtpu)}
    answer, reason = probe(TENSORFLOW_PROBE, environment)
    name = overlay.folder.name
    if answer:
        text = f"{name} computed on {answer['devices']} TPU cores"
        return Trial(True, text, environment, str(overlay.folder), overlay.installed)
    return Trial(False, f"{name}, in a folder of its own that is not used now, does not drive it either ({reason})")


def _try_jax(chips, wanted=""):
    installed = () if find_version("jax") else tuple(install(["jax[tpu]" if chips else "jax"]))
    # Left to itself, JAX takes the CPU where the TPU fails, and does not report the reason.
    environment = {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS") or "tpu,cpu"} if chips else {}
    answer, reason = probe(JAX_PROBE, {**environment, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
    name = f"JAX {find_version('jax')}"
    if answer and (answer["platform"] == "tpu" or not chips):
        devices = f"{answer['devices']} {answer['platform'].upper()} device{'s' * (answer['devices'] > 1)}"
        text = f"{name} computed on {devices}"
        if wanted and answer["platform"] != wanted:
            return Trial(False, f"{text}, not on the {wanted.upper()}")
        return Trial(True, text, environment, installed=installed)
    reason = f"it sees only {answer['platform'].upper()}" if answer else reason
    return Trial(False, f"{name} does not {'drive the TPU' if chips else 'work'} ({reason})", installed=installed)


def _try_gpu(root):
    if not shows_gpu(root):
        return Trial(False, NO_GPU)
    installed = tuple(install(list_missing("tensorflow")))
    answer, reason = probe(GPU_PROBE)
    if answer and answer["devices"]:
        text = f"TensorFlow computed on {answer['devices']} GPU{'s' * (answer['devices'] > 1)}"
        return Trial(True, text, installed=installed)
    reason = reason or "it lists none; its CUDA libraries may be missing, or it is a build for the CPU"
    text = f"TensorFlow {find_version('tensorflow')} does not drive the GPU ({reason})"
    return Trial(False, text, installed=installed)


def _try_jax_gpu(root):
    if not shows_gpu(root):
        return Trial(False, NO_GPU)
    if not find_version("jax"):
        return Trial(False, "JAX is not installed")
    return _try_jax(chips=0, wanted="gpu")


def probe(code, environment=None, limit=PROBE_LIMIT):
    """Runs code in another interpreter, since a wrong library aborts it and a missing server hangs it.

    Args:
        code: Python that prints a JSON object as its last line.
        environment: dict of variables in addition to those of this process.
        limit: seconds.

    Returns:
        The object and an empty str, or None and the reason. Nothing that was started is left running.
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
        printed, trace = [_read(file) for file in (output, errors)]
    last = find_reason(trace)
    if status is None:
        return None, f"no answer within {limit} s" + (f"; last words: {last}" if last else "")
    if status:
        end = f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return None, f"{end}: {last}" if last else end
    try:
        answer = json.loads(printed.strip().splitlines()[-1])
        return {"platform": str(answer["platform"]), "devices": int(answer["devices"])}, ""
    except (IndexError, ValueError, KeyError, TypeError):
        return None, f"it answered {printed[-80:]!r}"


def _kill(child):
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL) if hasattr(os, "killpg") else child.kill()
    child.wait()


def _read(file):
    file.seek(0)
    return file.read().decode(errors="replace")


def find_reason(errors):
    """Returns the last line of an error stream that gives the reason, without its time stamp; empty for none."""
    noise = re.compile(r"\s|$|[IWE] |[IWE]\d{4}|@|\*\*\*|<|Traceback|Thread |Extension modules|Fatal Python|===")
    telling = re.compile(r"F |F\d{4}|\w*(Error|Exception): .*[^:]$|\w+ failure")
    lines = [re.sub(r"^\S+ [\d:.]+: ([IWEF]) \S+\] ", r"\1 ", line) for line in errors.splitlines()]
    lines = [re.sub(r"^[\w.]+\.(\w+: )", r"\1", line).strip() for line in lines if not noise.match(line)]
    reason = ([line for line in lines if telling.match(line)] or lines or [""])[-1].removeprefix("F ")
    return textwrap.shorten(reason, 160, placeholder=" ...")
