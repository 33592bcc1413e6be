"""`make seeds` with the notebooks in one process, shortened, which can end itself at a checkpoint as a kill would.

Usage: seeds_run.py KILL_IN ...; the folder of the seed to be killed in, such as seed-1, then what train_seeds.py takes.
"""

import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def execute_here(executed_dir, name, settings):
    """Executes a notebook in this process, in place of `run_notebooks.execute_into`; leaves an empty copy."""
    from chain import run_chain

    run_chain([name], settings, draw=False)
    executed_dir.mkdir(exist_ok=True)
    (executed_dir / f"{name}.ipynb").touch()


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / name) for name in ("notebooks", "scripts", "tests/support")]
    os.environ |= {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    import run_notebooks
    import train_seeds

    from helpers.training import CheckpointStore

    write, kill_in = CheckpointStore.write, sys.argv.pop(1)

    def write_and_die(self, *arguments, **options):
        result = write(self, *arguments, **options)
        if self.folders[-1].parent.name == kill_in:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    CheckpointStore.write = write_and_die
    run_notebooks.execute_into = execute_here
    train_seeds.main()
