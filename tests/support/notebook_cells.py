"""Runs the code cells of a notebook in this process, without Jupyter: TensorFlow is imported once for all of them."""

import ast
import contextlib
import json
import os
import sys
import warnings
from pathlib import Path

from helpers.runtime import MACHINE, SHARED, accelerator
from helpers.runtime.settings import ROOT


@contextlib.contextmanager
def _as_in_a_kernel(draw):
    """Undoes, at the end, what a notebook changes in its process; `draw` is whether figures are rendered."""
    import keras
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    place, path, environment, prepared = os.getcwd(), sys.path[:], dict(os.environ), accelerator._prepared
    savefig = Figure.savefig
    Figure.savefig = savefig if draw else lambda self, file, **_: Path(file).touch()
    plt.switch_backend("agg")
    keras.utils.clear_session()  # so that layers are named as in a new process
    os.environ["RUNTIME"] = "jax" if keras.backend.backend() == "jax" else "cpu"
    os.chdir(ROOT / "notebooks")
    accelerator._prepared = None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")
            yield
    finally:
        Figure.savefig = savefig
        accelerator._prepared = prepared
        os.chdir(place)
        sys.path[:] = path
        for key in os.environ.keys() - environment.keys():
            del os.environ[key]
        os.environ.update({key: value for key, value in environment.items() if os.environ.get(key) != value})
        plt.close("all")
        keras.config.set_dtype_policy("float32")


def _execute(source, title, names):
    """Executes a cell and prints what its last expression gives, as Jupyter shows it."""
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), title, "exec"), names)
    value = eval(compile(ast.Expression(last.value), title, "eval"), names) if last else None
    if value is not None:
        print(repr(value))


def run_cells(name, settings, *, draw=True, until=None):
    """Executes a notebook's code cells, with those of the settings that it has.

    Args:
        name: of the notebook, without its ending.
        settings: dict of settings, which take the place of those in the cell tagged `parameters`.
        draw: whether figures are rendered; otherwise their files are empty, which saves half of the time of notebook 3.
        until: text in the last cell to execute; None for all.

    Returns:
        Dict of the notebook's global names at its end.

    Raises:
        RuntimeError: the notebook ended itself with a message.
        Exception: as raised by a cell.
    """
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names = {"__name__": "__main__", "display": lambda *values: print(*map(repr, values), sep="\n")}
    with _as_in_a_kernel(draw):
        for number, cell in enumerate(cells):
            source = "".join(cell["source"])
            try:
                _execute(source, f"{name}, code cell {number}", names)
            except SystemExit as end:
                if end.code:
                    raise RuntimeError(end.code) from end
                break
            if "parameters" in cell["metadata"].get("tags", []):
                names |= {key: value for key, value in settings.items() if key in {*names, *SHARED, *MACHINE}}
            if until and until in source:
                break
    return names
