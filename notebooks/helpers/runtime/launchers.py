"""Notices whether this process is one of several that a launcher such as srun has started."""

import os
from typing import NamedTuple

from .probes import ask_metadata, find_tpu_chips

# By launcher, the variables with the number of processes and with that of this one. Not SLURM_NTASKS: a job has it too,
# where srun was not used.
_VARIABLES = {
    "Keras's variables": ("KERAS_DISTRIBUTION_NUM_PROCESSES", "KERAS_DISTRIBUTION_PROCESS_ID"),
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "MPI": ("PMI_SIZE", "PMI_RANK"),  # MPICH's and Intel's
}


class Launch(NamedTuple):
    """How a process was started.

    Attributes:
        name: of the launcher; "" for a process of its own.
        n_processes: how many processes were started together.
        number: of this one, from 0.
    """

    name: str = ""
    n_processes: int = 1
    number: int = 0


def find_launch(root="/"):
    """Returns the `Launch` of this process, from the variables of launchers and, on a TPU, of the slice's hosts.

    Args:
        root: folder that holds `dev`, where TPU chips are looked for.
    """
    for name, (count, number) in _VARIABLES.items():
        if int(os.environ.get(count) or 1) > 1:
            return Launch(name, int(os.environ[count]), int(os.environ.get(number) or 0))
    if not find_tpu_chips(root):
        return Launch()
    hosts, number = os.environ.get("TPU_WORKER_HOSTNAMES"), os.environ.get("TPU_WORKER_ID")  # as Kubernetes sets them
    if not hosts and not os.environ.get("TPU_SKIP_MDS_QUERY"):
        hosts = ask_metadata("instance/attributes/worker-network-endpoints")
        number = ask_metadata("instance/attributes/agent-worker-number")
    n_hosts = len((hosts or "").split(","))
    return Launch("the TPU slice", n_hosts, int(number or 0)) if n_hosts > 1 else Launch()
