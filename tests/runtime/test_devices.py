"""How the work is spread over devices and processes, and how that is described."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.runtime import choose_precision, connect_devices, describe_runtime
from helpers.runtime.accelerator import Runtime
from helpers.runtime.devices import pick_precision
from helpers.runtime.settings import ROOT

RUNTIME = Runtime("cpu", "tensorflow", 0, "a CPU", "it works", "")
FIT = """
import json, logging
from helpers.runtime import connect_devices, describe_runtime
from helpers.runtime.accelerator import Runtime
runtime = Runtime("jax", "jax", 0, "CPUs", "it works", "")
early = describe_runtime(runtime)
devices = [connect_devices(runtime) for _ in range(2)][-1]
import keras, numpy as np
keras.utils.set_random_seed(3)
rng = np.random.default_rng(7)
x, y = rng.normal(size=(8, 4)).astype("float32"), rng.normal(size=(8, 1)).astype("float32")
mine = slice(devices.host * 8 // devices.n_hosts, (devices.host + 1) * 8 // devices.n_hosts)
with devices.scope():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
initial = model.get_weights()[0].ravel().tolist()
import jax
jax.config.update("jax_log_compiles", True)
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("jax").addHandler(handler)
model.fit(x[mine], y[mine], batch_size=8 // devices.n_hosts, epochs=2, shuffle=False, verbose=0)
spread = str(model.weights[0].value.sharding.num_devices)
report = describe_runtime(runtime, devices)

hits = []
jax.monitoring.register_event_listener(lambda event, **kwargs: hits.append(event.endswith("cache_hits")))
multiply, square = jax.jit(lambda x: x @ x), jax.numpy.ones((8, 8))
for _ in range(2):
    multiply(square)
    jax.clear_caches()  # as if by the next kernel
print(json.dumps([devices.name, devices.n_replicas, devices.host, devices.n_hosts, devices.is_chief,
                  model.get_weights()[0].ravel().tolist(), spread, report, early["devices"], initial,
                  sum(line.startswith("Finished tracing") and "train_step" in line for line in said),
                  sum(hits), "HIGHEST" in multiply.lower(square).as_text()]))
"""


def test_one_device_computes_in_its_scope():
    devices = connect_devices(RUNTIME)
    assert (devices.n_replicas, devices.host, devices.n_hosts, devices.is_chief) == (1, 0, 1, True)
    with devices.scope():
        import keras

        layer = keras.layers.Dense(2)
        assert np.asarray(layer(np.ones((1, 3), "float32"))).shape == (1, 2)


@pytest.mark.parametrize(
    ("has_tpu", "capabilities", "cpu_flags", "policy"),
    [
        (True, [], "", "mixed_bfloat16"),
        (False, [(9, 0)], "", "mixed_bfloat16"),
        (False, [(8, 0), (8, 6)], "", "mixed_bfloat16"),
        (False, [(7, 5), (7, 5)], "", "mixed_float16"),  # two T4
        (False, [(8, 0), (7, 5)], "", "mixed_float16"),  # all must have it
        (False, [(6, 0)], "", "mixed_float16"),  # P100
        (False, [(6, 1)], "", "float32"),  # GTX 1080
        (False, [], "avx2 avx512f avx512_bf16", "mixed_bfloat16"),
        (False, [], "avx512f amx_bf16 amx_tile", "mixed_bfloat16"),
        (False, [], "avx2 avx512f avx512_vnni", "float32"),
        (False, [], "", "float32"),
    ],
)
def test_sixteen_bits_are_chosen_where_the_hardware_has_them(has_tpu, capabilities, cpu_flags, policy):
    assert pick_precision(has_tpu, capabilities, cpu_flags) == policy


def test_the_features_of_this_cpu_decide_on_tensorflow_only():
    """JAX gains nothing from bfloat16 on a CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    has_bfloat16 = any("avx512_bf16" in line.split() or "amx_bf16" in line.split() for line in lines)
    assert choose_precision(RUNTIME) == ("mixed_bfloat16" if has_bfloat16 else "float32")
    assert choose_precision(dataclasses.replace(RUNTIME, name="tf-tpu")) == "mixed_bfloat16"
    assert choose_precision(dataclasses.replace(RUNTIME, name="jax")) == "float32"


def test_float32_is_not_rounded_to_less_on_accelerators():
    """On a CPU nothing rounds it, so what TensorFlow is told is asked for; JAX below."""
    import tensorflow as tf

    connect_devices(RUNTIME)
    assert not tf.config.experimental.tensor_float_32_execution_enabled()


def test_runtime_report_names_what_a_reader_needs():
    report = describe_runtime()
    assert {"python", "tensorflow", "keras", "backend", "devices", "processor", "commit"} <= set(report)
    assert json.loads(json.dumps(report)) == report and report["devices"]
    full = describe_runtime(RUNTIME, connect_devices(RUNTIME))
    assert set(full) - set(report) == {"runtime", "why", "strategy", "n_replicas", "n_hosts"}
    assert full["runtime"] == "cpu" and full["n_hosts"] == 1 and json.loads(json.dumps(full)) == full


def start(n_devices, **variables):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={n_devices}"
    variables |= {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", FIT],
        cwd=ROOT / "notebooks",
        env=os.environ | variables | {"KERAS_BACKEND": "jax"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(processes):
    try:
        answers = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), answers[0][1] + answers[-1][1]
    return [json.loads(output.splitlines()[-1]) for output, _ in answers]


@pytest.mark.slow
def test_jax_spreads_a_step_over_devices_and_over_processes_with_the_same_result(tmp_path):
    """A fit on 1, on 4 and on 2 times 2 devices, each process with its own half of the batch, beside one in NumPy.

    The step is traced once: for DenseNet-121 on an accelerator XLA takes a minute or more each time. What is compiled
    is kept for the next kernel, and multiplies without rounding to less, which JAX left to itself would allow.
    The two find each other as processes of Open MPI; test_resume.py has Keras's variables, test_hosts.py has srun.
    """
    jax = pytest.importorskip("jax")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    pair = {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1", "JAX_COORDINATOR_PORT": port}
    pair |= {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    kept = {"JAX_COMPILATION_CACHE_DIR": "", "XDG_CACHE_HOME": str(tmp_path)}
    one = finish([start(1, **kept)])[0]
    four = finish([start(4)])[0]
    hosts = finish([start(2, **pair, OMPI_COMM_WORLD_RANK=str(number)) for number in range(2)])
    assert one[:5] == ["one device", 1, 0, 1, True] and four[:5] == ["DataParallel", 4, 0, 1, True]
    assert [host[:5] for host in hosts] == [["DataParallel", 4, 0, 2, True], ["DataParallel", 4, 1, 2, False]]
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(8, 4)).astype("float32"), rng.normal(size=(8, 1)).astype("float32")
    for _, n_devices, _, _, _, weights, spread, _, _, initial, traced, _, is_exact in (one, four, *hosts):
        kernel, bias = np.reshape(initial, (4, 1)), 0.0
        for _ in range(2):  # epochs of one batch, whose loss is the mean of the squared errors
            error = x @ kernel + bias - y
            kernel, bias = kernel - 0.1 * 2 / 8 * x.T @ error, bias - 0.1 * 2 * error.mean()
        np.testing.assert_allclose(weights, kernel[:, 0], rtol=1e-4)
        assert (spread, traced, is_exact) == (str(n_devices), 1, True)
    assert four[7]["backend"] == "jax" and len(four[7]["devices"]) == 4 and four[7]["n_replicas"] == 4
    assert len(four[8]) == 4 and hosts[0][8] == []  # asking earlier would keep processes from finding each other
    assert one[11] == 1 and list(tmp_path.glob("jax-compiled-*/*"))
    assert "HIGHEST" not in jax.jit(lambda x: x @ x).lower(jax.numpy.ones((8, 8))).as_text()
