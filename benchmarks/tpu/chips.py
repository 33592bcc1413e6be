"""The TPU machines: Google's figures, and how fast training could be on each at best."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass(frozen=True)
class Chips:
    """One kind of TPU machine; figures of one core, of which XLA sees `n_cores`.

    Attributes:
        topology: its name for the compiler.
        n_cores: int.
        flops: float, peak bfloat16 operations per second of a core.
        bandwidth: float, bytes per second between a core and its high-bandwidth memory.
        memory: float, bytes of high-bandwidth memory of a core.
        host_cpus: int, virtual CPUs of the host machine; None where Google names no number.
    """

    topology: str
    n_cores: int
    flops: float
    bandwidth: float
    memory: float
    host_cpus: int | None


# Google's documentation, https://cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB and 819 GB/s a chip of one core,
# hosts of 24 and 224 virtual CPUs. https://cloud.google.com/tpu/docs/v3: 123 TFLOP/s, 32 GiB and 900 GB/s a chip of
# two cores, and no number of CPUs for their hosts.
CHIPS = {
    "v5e-1": Chips("v5e:1x1", 1, 197e12, 819e9, 16e9, 24),
    "v5e-8": Chips("v5e:2x4", 8, 197e12, 819e9, 16e9, 224),
    "v3-8": Chips("v3:2x2", 8, 61.5e12, 450e9, 16 * 2**30, None),
}


def compute_roofline(steps, images_per_second_per_cpu):
    """Computes how fast each machine could train at best, and whether its host could keep up.

    Args:
        steps: dict name in `CHIPS` -> dict with `batch` (global), `flops` and `bytes moved` of one core in one step.
        images_per_second_per_cpu: float, how many images one virtual CPU of a host augments.

    Returns:
        List of dicts, one a machine. `compute` and `memory` are images per second at peak arithmetic and at peak
        bandwidth; the smaller `binds` and is the `best`. `cpus for best` keep up with that, `cpus for peak` with peak
        arithmetic, in case the compiler counts bytes that stay on the chip.
    """
    rows = []
    for name, step in steps.items():
        chips = CHIPS[name]
        compute = step["batch"] * chips.flops / step["flops"]
        memory = step["batch"] * chips.bandwidth / step["bytes moved"]
        best = min(compute, memory)
        rows.append(
            {
                "machine": name,
                "compute": compute,
                "memory": memory,
                "binds": "compute" if compute < memory else "memory",
                "best": best,
                "cpus for best": best / images_per_second_per_cpu,
                "cpus for peak": compute / images_per_second_per_cpu,
                "cpus": chips.host_cpus,
            }
        )
    return rows


def read_host_speed():
    """Returns images per second that one core augments, from the committed benchmark."""
    bench = json.loads((RESULTS / "input_pipeline.json").read_text(encoding="utf-8"))
    n_cores = int(re.search(r"(\d+) cores", bench["machine"])[1])
    return bench["images_per_second"]["training batches"] / n_cores
