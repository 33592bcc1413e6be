"""Works through tasks: in this process, or on the machines of a Ray cluster.

Ray schedules, repeats what was lost, and carries what the tasks need; it is imported only where a cluster is asked for.
"""

import collections
import contextlib
import os
import sys
import uuid
from pathlib import Path

_RETRIES = 4  # of a task whose worker or machine is gone
_AHEAD = 2  # tasks a core that are handed to Ray before the oldest has ended: they bound what results take of memory
# What a worker needs of this process's environment; a task has one core, so that threads would only disturb each other.
_INHERITED = ("KERAS_BACKEND", "JAX_ENABLE_X64", "TF_CPP_MIN_LOG_LEVEL")
_ONE_THREAD = {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}

_prepared = {}  # in a worker: the function of the call that it works for


def map_tasks(prepare, tasks, *shared, cluster=""):
    """Yields the results of tasks in their order: the same in this process as on a cluster.

    Without a cluster, all tasks go through one call of a function, which may read ahead from one task into the next.
    On a cluster each goes through a call of its own, on one core. A task whose worker or machine is lost is repeated
    elsewhere, so it must not matter whether it is done once, twice or in part. Workers get this code from here, and
    must have the same Python, Ray and packages.

    Args:
        prepare: function of one of the helpers' modules. Called with `shared`, once in this process or once in each
            worker, it returns a function from an iterable of tasks to an iterable of their results in order.
        tasks: iterable of objects that can be pickled, such as what is known of a shard; taken as work goes on.
        *shared: what all tasks need; on a cluster, sent to each machine once.
        cluster: "" for this process; "auto" for the Ray cluster that this machine belongs to, or its address.

    Yields:
        Results, however many a task has.

    Raises:
        RuntimeError: Ray is not installed, the cluster cannot be reached, has too little memory for a task, or has lost
            it too often; in one sentence.
        Exception: what a task has raised, as in this process.
    """
    if not cluster:
        yield from prepare(*shared)(iter(tasks))
        return
    ray = _connect(cluster)
    work = ray.remote(max_retries=_RETRIES, num_cpus=1)(_work)
    # In a tuple, Ray leaves it a reference: a worker fetches it once, not with every task.
    call = uuid.uuid4().hex, (ray.put((prepare, shared)),)
    running = collections.deque()
    try:
        for number, task in enumerate(tasks):
            running.append((number, work.remote(call, task)))
            while len(running) > max(1, _AHEAD * ray.cluster_resources().get("CPU", 0)):
                yield from _fetch(ray, *running.popleft())
        while running:
            yield from _fetch(ray, *running.popleft())
    finally:
        for _, reference in running:  # of a call that ends early
            with contextlib.suppress(Exception):
                ray.cancel(reference, force=True)


def refuse_own_disk(path, reason):
    """Raises RuntimeError: a file is here, but not where a worker has looked for it."""
    raise RuntimeError(
        f"{path} can be read here, but not on all machines of the cluster ({reason}): images must be on a disk that "
        "they share, or in a bucket."
    )


def _connect(address):
    """Connects this process to a Ray cluster, unless it is, and returns the module `ray`."""
    os.environ.setdefault("RAY_task_oom_retries", str(_RETRIES))  # read at Ray's import; without it, for ever
    try:
        import ray
    except ImportError:
        raise RuntimeError(
            "CLUSTER needs Ray: `pip install -r requirements/cluster.txt` here and on all machines of the cluster."
        ) from None
    if ray.is_initialized():
        return ray
    environment = {name: os.environ[name] for name in _INHERITED if name in os.environ} | _ONE_THREAD
    code = str(Path(__file__).resolve().parents[1])
    try:
        ray.init(
            address,
            runtime_env={"py_modules": [code], "env_vars": environment},
            log_to_driver=False,  # TensorFlow's start-up messages of every worker
            logging_level="error",
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        version = ".".join(map(str, sys.version_info[:3]))
        raise RuntimeError(
            f"CLUSTER is {address!r}, but no Ray cluster answers there ({_first_sentence(error)}): start one with `ray "
            f"start --head`, with Ray {ray.__version__} on Python {version} as here."
        ) from error
    return ray


def _work(call, task):
    """Does one task in a worker; returns the list of its results."""
    import ray

    key, (reference,) = call
    if key not in _prepared:
        prepare, shared = ray.get(reference)
        _prepared.clear()  # what another call needed
        _prepared[key] = prepare(*shared)
    return list(_prepared[key](iter([task])))


def _fetch(ray, number, reference):
    """Returns the results of a task, or raises what is the matter."""
    kept = "What is finished stays, and the same command goes on from there."
    memory = f"Give its machines more memory, or fewer cores to Ray (`ray start --num-cpus`). {kept}"
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, MemoryError):
            raise RuntimeError(f"A worker had too little memory for task {number + 1} of this work. {memory}") from None
        if not isinstance(error.cause, ray.exceptions.RayError):  # which says that a worker cannot even begin
            raise error.cause from None
        raise RuntimeError(
            f"A worker cannot do task {number + 1} of this work: {_first_sentence(error.cause)}."
        ) from None
    except ray.exceptions.OutOfMemoryError:
        raise RuntimeError(
            f"A machine's memory was full each time that task {number + 1} of this work was tried. {memory}"
        ) from None
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as error:
        raise RuntimeError(
            f"The process or the machine of task {number + 1} of this work was lost each time that it was tried "
            f"({_first_sentence(error)}), most often for want of memory. {memory}"
        ) from None
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"Ray gave up task {number + 1} of this work: {_first_sentence(error)}. {kept}") from None


def _first_sentence(error):
    """Returns how an error of Ray begins, whose text goes on for a page."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).split(". ")[0].rstrip(".")
