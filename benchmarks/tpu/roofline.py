"""How fast training could be on each TPU machine at best, and whether its host could keep up."""

import json
import re
from pathlib import Path

from helpers.training import CHIPS

RESULTS = Path(__file__).resolve().parents[1] / "results"
HOST_SIDE = 224  # pixels, of the images that `read_host_speed` is about


def compute_roofline(name, step, images_per_second_per_cpu):
    """Computes how fast a machine could train at best, and how many CPUs could keep up.

    Args:
        name: of the machine, in `CHIPS`.
        step: dict with `batch` (global), `flops` and `bytes moved` of one core in one step.
        images_per_second_per_cpu: float, how many images one virtual CPU of a host augments.

    Returns:
        Dict. `compute` and `memory` are images per second at peak arithmetic and at peak bandwidth; the smaller `binds`
        and is the `best`. `cpus for best` keep up with that, `cpus for peak` with peak arithmetic, in case the compiler
        counts bytes that stay on the chip.
    """
    compute = step["batch"] * CHIPS[name].flops / step["flops"]
    memory = step["batch"] * CHIPS[name].bandwidth / step["bytes moved"]
    best = min(compute, memory)
    return {
        "compute": compute,
        "memory": memory,
        "binds": "compute" if compute < memory else "memory",
        "best": best,
        "cpus for best": best / images_per_second_per_cpu,
        "cpus for peak": compute / images_per_second_per_cpu,
    }


def read_host_speed():
    """Returns images per second that one core augments, from the committed benchmark."""
    bench = json.loads((RESULTS / "input_pipeline.json").read_text(encoding="utf-8"))
    n_cores = int(re.search(r"(\d+) cores", bench["machine"])[1])
    return (
        bench["ways_to_augment"]["packed at 256, crops of 224"]["crops resized (ours)"]["images_per_second"] / n_cores
    )
