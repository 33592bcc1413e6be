"""Connects Keras to the devices of the chosen runtime, and describes what a notebook ran on."""

import contextlib
import functools
import hashlib
import os
import platform
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from .launchers import find_launch
from .packages import find_cache
from .settings import ROOT

# Left to themselves, a TPU multiplies float32 as bfloat16 (docs/tpu.md), and a recent GPU as TensorFloat-32: what is
# measured there would not be what the exported model answers on a CPU. Products of bfloat16 stay as fast as they are.
EXACT = "highest"


@dataclass(frozen=True)
class Devices:
    """How the work is spread over devices and processes.

    Attributes:
        name: "TPUStrategy", "MirroredStrategy", "DataParallel" or "one device".
        n_replicas: number of devices that each take a share of a batch, over all hosts.
        host: number of this process.
        n_hosts: number of processes.
        strategy: tf.distribute.Strategy; None on JAX.
    """

    name: str
    n_replicas: int
    host: int = 0
    n_hosts: int = 1
    strategy: object = field(default=None, repr=False, compare=False)

    @property
    def is_chief(self):
        """Whether this process is the one that writes files."""
        return self.host == 0

    def scope(self):
        """Returns the context to build, compile and load models in."""
        return self.strategy.scope() if self.strategy else contextlib.nullcontext()

    def divide(self, batch_size):
        """Returns how many images of a batch one device takes.

        Raises:
            ValueError: the devices cannot share it equally.
        """
        if batch_size % self.n_replicas:
            raise ValueError(
                f"BATCH_SIZE is {batch_size}, which {self.n_replicas} devices cannot share equally. Take a multiple of "
                f"{self.n_replicas}."
            )
        return batch_size // self.n_replicas

    def agree(self, flag):
        """Returns the first host's flag on all hosts, bool; every host must call it at the same point."""
        if self.n_hosts == 1:
            return bool(flag)
        from jax.experimental import multihost_utils

        return bool(multihost_utils.broadcast_one_to_all(int(flag)))

    def wait(self):
        """Waits until every host has called it."""
        self.agree(False)


def connect_devices(runtime, replicas=0):
    """Connects to the devices; it can be called again.

    On JAX every device takes an equal share, so each batch must be divisible by their number. Processes that were
    started together, by Slurm's srun, Open MPI, on the hosts of a TPU slice, or with Keras's variables
    KERAS_DISTRIBUTION_JOB_ADDRESSES, _NUM_PROCESSES and _PROCESS_ID, find each other, and each reads its own share of
    the data: Keras does not divide it here.

    Args:
        runtime: `Runtime` of this kernel.
        replicas: int, logical devices into which the CPU is divided, to try a run on several devices without having
            them: it is no faster. 0 takes the devices that there are.

    Returns:
        A `Devices`.

    Raises:
        ValueError: `replicas` is negative, or is asked for on something else than a CPU.
        RuntimeError: TensorFlow or JAX has started with another number of devices; or this process is one of several
            that cannot find each other, and would overwrite each other's results.
    """
    launch = find_launch()
    if launch.n_processes > 1 and runtime.name != "jax":
        _refuse_apart(launch, "they find each other on JAX only")
    if replicas < 0 or (replicas and (runtime.name not in ("cpu", "jax") or runtime.chips)):
        raise ValueError(
            f"REPLICAS is {replicas}, but it divides a CPU into logical devices, and this runs on: {runtime.name}. Set "
            "REPLICAS = 0, or RUNTIME = 'cpu' and restart the kernel."
        )
    if runtime.name == "jax":
        return _connect_jax(replicas, launch)
    import tensorflow as tf

    tf.config.experimental.enable_tensor_float_32_execution(False)  # see EXACT
    if replicas > 1:
        strategy = _connect_cpus(replicas)
        return Devices("MirroredStrategy", strategy.num_replicas_in_sync, strategy=strategy)

    if runtime.name == "tf-tpu":
        strategy = _connect_tpu()
        return Devices("TPUStrategy", strategy.num_replicas_in_sync, strategy=strategy)
    if runtime.name == "gpu" and len(tf.config.list_physical_devices("GPU")) > 1:
        strategy = _connect_gpus()
        return Devices("MirroredStrategy", strategy.num_replicas_in_sync, strategy=strategy)
    return Devices("one device", 1, strategy=tf.distribute.get_strategy())


@functools.cache  # starting the TPU a second time would discard what it holds
def _connect_tpu():
    import tensorflow as tf

    resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu="local")
    tf.config.experimental_connect_to_cluster(resolver)
    tf.tpu.experimental.initialize_tpu_system(resolver)
    return tf.distribute.TPUStrategy(resolver)


@functools.cache
def _connect_gpus():
    import tensorflow as tf

    return tf.distribute.MirroredStrategy()


@functools.cache
def _connect_cpus(replicas):
    import tensorflow as tf

    cpu, *_ = tf.config.list_physical_devices("CPU")
    try:
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
    except RuntimeError as error:
        raise RuntimeError(_started_before("TensorFlow", replicas)) from error
    return tf.distribute.MirroredStrategy([f"CPU:{number}" for number in range(replicas)])


def _started_before(library, replicas):
    return f"{library} has started: too late to divide the CPU into REPLICAS = {replicas}. Restart the kernel."


def _refuse_apart(launch, why):
    raise RuntimeError(
        f"{launch.name} has started {launch.n_processes} processes, but {why}: each would train alone and overwrite "
        "what the others write. Set RUNTIME = 'jax' and start them by Slurm's srun, by Open MPI 4, on the hosts of a "
        "TPU slice or with Keras's variables KERAS_DISTRIBUTION_...; or start one."
    )


def _connect_jax(replicas, launch):
    import jax
    import keras
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):  # TensorFlow already uses the GPU and has its share of the memory
        tf.config.set_visible_devices([], "GPU")  # or TensorFlow takes the memory that JAX needs
    jax.config.update("jax_default_matmul_precision", EXACT)
    _keep_compiled(jax)
    if launch.n_processes > 1 and not jax.distributed.is_initialized():
        jax.config.update("jax_cpu_collectives_implementation", "gloo")  # without it processes on CPUs cannot add
        try:
            keras.distribution.initialize()  # what the variables do not say, JAX finds out
        except (ValueError, RuntimeError) as error:
            _refuse_apart(launch, f"JAX does not find the others ({error})")
    if replicas:
        with contextlib.suppress(RuntimeError):  # JAX has started; the next lines tell whether with as many
            jax.config.update("jax_num_cpu_devices", replicas)
        if (jax.default_backend(), jax.local_device_count()) != ("cpu", replicas):
            raise RuntimeError(_started_before("JAX", replicas))
    if launch.n_processes not in (1, jax.process_count()):
        _refuse_apart(launch, f"JAX finds {jax.process_count()}")
    if jax.device_count() == 1:
        # Beside a distribution over one device, Keras leaves some variables outside it, so that XLA compiles the step
        # three times; and it does not send the next batch while the device computes.
        return Devices("one device", 1)
    keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
    return Devices("DataParallel", jax.device_count(), jax.process_index(), jax.process_count())


def _keep_compiled(jax):
    # XLA takes minutes for DenseNet-121, each time a kernel is restarted and in each notebook. What it made for one
    # processor may not run on another, and a home can be that of several machines.
    if not jax.config.jax_compilation_cache_dir:
        able = _find_in_cpuinfo("flags|Features|isa") or platform.processor()
        name = f"jax-compiled-{hashlib.sha256(able.encode()).hexdigest()[:8]}"
        jax.config.update("jax_compilation_cache_dir", str(find_cache() / name))


def choose_precision(runtime):
    """Chooses the dtype policy in which this machine trains fastest; call it after `connect_devices`.

    It has 16 bits where the hardware has instructions for them. Elsewhere they are slower than float32, by CUDA's table
    of throughputs even on most GPUs before compute capability 7.0; P100, 6.0, is as fast and has twice the room.

    Args:
        runtime: `Runtime` of this kernel.

    Returns:
        "mixed_bfloat16" on TPUs, on Nvidia's GPUs from compute capability 8.0 on, and for TensorFlow on CPUs with
        AVX-512 BF16 or AMX; "mixed_float16" on Nvidia's GPUs from 7.0 on, such as T4, and of 6.0; else "float32".
    """
    has_tpu, capabilities, flags = runtime.name == "tf-tpu", [], ""
    if runtime.name == "jax":
        import jax

        has_tpu = jax.default_backend() == "tpu"
        found = [str(getattr(device, "compute_capability", "")) for device in jax.local_devices()]
        capabilities = [tuple(map(int, text.split("."))) for text in found if re.fullmatch(r"\d+\.\d+", text)]
    elif runtime.name == "gpu":
        import tensorflow as tf

        gpus = [tf.config.experimental.get_device_details(gpu) for gpu in tf.config.list_physical_devices("GPU")]
        capabilities = [tuple(gpu["compute_capability"]) for gpu in gpus if "compute_capability" in gpu]
    elif runtime.name == "cpu":
        flags = _find_in_cpuinfo("flags")
    return pick_precision(has_tpu, capabilities, flags)


def pick_precision(has_tpu, capabilities, cpu_flags):
    """Picks the dtype policy for some hardware, see `choose_precision`.

    Args:
        has_tpu: whether it is a TPU.
        capabilities: list of the compute capabilities of GPUs, such as (7, 5).
        cpu_flags: names of the CPU's features, separated by spaces; empty where TensorFlow does not use it.

    Returns:
        Name of the policy.
    """
    if has_tpu or {"avx512_bf16", "amx_bf16"} & {*cpu_flags.split()}:
        return "mixed_bfloat16"
    if not capabilities or any(found < (7, 0) and found != (6, 0) for found in capabilities):
        return "float32"
    return "mixed_bfloat16" if min(capabilities) >= (8, 0) else "mixed_float16"


def describe_runtime(runtime=None, devices=None):
    """Describes what this notebook runs on.

    Args:
        runtime: `Runtime` of this kernel, if there is one.
        devices: `Devices` that it is connected to, if it is.

    Returns:
        Dict of versions, backend, devices such as "TPU v5 lite", processor and commit; of the runtime and of how the
        work is spread where these are given.
    """
    import keras
    import tensorflow as tf

    report = {
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "backend": keras.backend.backend(),
        "devices": _list_devices(connected=devices is not None),
        "processor": _find_processor(),
        "platform": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        "commit": find_commit(),
    }
    if report["backend"] == "jax":
        import jax

        report["jax"] = jax.__version__
    if runtime:
        report |= {"runtime": runtime.name, "why": runtime.why}
    if devices:
        report |= {"strategy": devices.name, "n_replicas": devices.n_replicas, "n_hosts": devices.n_hosts}
    return report


def describe_machine(*libraries):
    """Names the machine that a benchmark ran on.

    Args:
        *libraries: imported modules whose versions matter.

    Returns:
        Text such as "AMD EPYC, 2 cores, Python 3.11.7, tensorflow 2.21.0".
    """
    versions = [f"{library.__name__} {library.__version__}" for library in libraries]
    return ", ".join([_find_processor(), f"Python {platform.python_version()}", *versions])


def _find_processor():
    name = _find_in_cpuinfo("model name") or platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _find_in_cpuinfo(name):
    info = Path("/proc/cpuinfo")
    found = re.search(rf"^(?:{name})\s*:\s*(.+)", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1] if found else ""


def _list_devices(connected):
    import keras
    import tensorflow as tf

    if keras.backend.backend() != "jax":
        gpus = [tf.config.experimental.get_device_details(gpu) for gpu in tf.config.list_physical_devices("GPU")]
        names = [gpu.get("device_name", "GPU") for gpu in gpus]
        return names or [device.name for kind in ("TPU", "CPU") for device in tf.config.list_logical_devices(kind)]
    import jax

    # Asking JAX starts it, and after that the processes can no longer find each other.
    return [device.device_kind for device in jax.devices()] if connected or find_launch().n_processes == 1 else []


def find_commit():
    """Returns the repository's commit, with `-dirty` where files differ from it; "unknown" outside a clone."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
