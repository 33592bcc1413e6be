"""On JAX, a model and its optimizer can be used after a training, whatever ended it: they share no memory.

JAX deletes what a step or a prediction computes from. Keras's `fit` ends with the averages in the place of the weights,
so that a prediction would delete them for the optimizer, and a second `fit` would fail.
"""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
PROGRAM = """
import sys
import numpy as np
import resumable_run

packed, folder = sys.argv[1:]
for seconds in (0.01, 0):  # paused after the first step; then to the end
    options = resumable_run.OPTIONS | {"epochs": 1, "seconds": seconds}
    model, checkpoint, _ = resumable_run.run(packed, folder, options)
    assert bool(checkpoint.pause) == bool(seconds)
    images, labels = np.zeros((8, 40, 40, 1), "float32"), np.zeros((8, 14), "float32")
    model.predict(images, verbose=0)
    model.save(f"{folder}/model.keras")  # with the optimizer
    model.fit(images, labels, verbose=0)
print("usable")
"""


def test_model_and_optimizer_stay_usable_on_jax(packed, tmp_path):
    pytest.importorskip("jax")
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"KERAS_BACKEND": "jax", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths}
    command = [sys.executable, "-c", PROGRAM, str(packed.folder), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.endswith("usable\n"), done.stderr[-3000:]
