"""Tries the choice of the runtime in environments like those of Colab, Kaggle and a TPU VM; writes docs/runtime.md.

It needs PyPI, python3.12 and python3.13 on the path, 20 GB of disk and a quarter of an hour. It uses no TPU: device
files in a folder stand for the chips, so everything up to the first use of a chip is tried.

Usage: check_platforms.py [FOLDER]
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks" / "workers"))

from renew_page import renew_page

PAGE = ROOT / "docs" / "runtime.md"
OTHERS = "scipy matplotlib pillow tqdm opencv-python-headless"
COMMON = f"keras==3.13.2 numpy==2.1.3 pandas==2.2.3 scikit-learn==1.6.1 {OTHERS}"
PLATFORMS = {  # the first two as seen in 2026-08; the third has a libtpu that tensorflow-tpu aborts with
    "Kaggle TPU": ("3.12", f"{COMMON} tensorflow-cpu==2.20.0 jax==0.6.2 libtpu==0.0.17"),
    "Colab TPU": ("3.13", f"{COMMON} jax==0.7.2 libtpu==0.0.21.1"),
    "newer TPU VM": ("3.12", f"keras==3.15.1 jax==0.10.2 libtpu==0.0.42.1 pandas scikit-learn {OTHERS}"),
}
LIBTPUS = ["0.0.13", "0.0.14", "0.0.17", "0.0.20", "0.0.24", "0.0.30", "0.0.31", "0.0.32", "0.0.40"]

CHOOSE = """
import sys; sys.path.insert(0, {helpers!r})
from helpers.runtime import prepare_runtime
try: print(prepare_runtime({choice!r}, root={root!r}))
except RuntimeError as error: print(error)
"""
# The kernel as it is when the overlay is chosen, and a fit in it.
FIT = """
import json, os, sys; sys.path.insert(0, {helpers!r})
from helpers.runtime.packages import install_tensorflow_tpu
overlay = install_tensorflow_tpu()
sys.path.insert(0, str(overlay.folder))
os.environ |= {{"TPU_LIBRARY_PATH": str(overlay.libtpu), "KERAS_BACKEND": "tensorflow"}}
import keras, numpy, tensorflow as tf
from keras import layers
model = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(1)])
model.compile("adam", "mse", jit_compile=False)
data = tf.data.Dataset.from_tensors((numpy.ones((4, 8, 8, 3), "float32"), numpy.ones((4, 1), "float32"))).repeat(3)
loss = model.fit(data, verbose=0).history["loss"][-1]
loaded = any("libtpu.so" in line for line in open("/proc/self/maps"))
inside = tf.__file__.startswith(str(overlay.folder))
assert inside and loaded and loss == loss, (inside, loaded, loss)
print(f"TensorFlow {{tf.__version__}} of the folder with NumPy {{numpy.__version__}}, Keras {{keras.__version__}}")
"""
LOAD = """
import sys; sys.path.insert(0, {helpers!r})
from helpers.runtime.packages import install, install_tensorflow_tpu
from helpers.runtime.probes import probe
overlay = install_tensorflow_tpu()
install(["libtpu=={version}"], "--no-deps", "--target", {folder!r}, free=("libtpu",))
code = '''import json, tensorflow as tf
loaded = any("libtpu.so" in line for line in open("/proc/self/maps"))
print(json.dumps({{"platform": tf.__version__, "devices": int(loaded)}}))'''
places = {{"PYTHONPATH": str(overlay.folder), "TPU_LIBRARY_PATH": {folder!r} + "/libtpu/libtpu.so"}}
answer, reason = probe(code, places)
print("loads" if answer and answer["devices"] else "**no**: " + (reason or "not loaded"))
"""


def run(python, code, cache, **values):
    """Returns the last line that code prints in an environment, and the seconds it took."""
    variables = {name: text for name, text in os.environ.items() if name not in ("KERAS_BACKEND", "PYTHONPATH")}
    variables |= {"XDG_CACHE_HOME": str(cache), "TPU_SKIP_MDS_QUERY": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
    started = time.monotonic()
    code = code.format(helpers=str(ROOT / "notebooks"), **values)
    answer = subprocess.run([python, "-c", code], env=variables, capture_output=True, text=True)
    if answer.returncode:
        sys.exit(answer.stderr)
    return answer.stdout.strip().splitlines()[-1], time.monotonic() - started


def make_environment(home, version, packages):
    """Makes an environment with a platform's packages, once; returns its Python."""
    python = home / "bin" / "python"
    if not python.exists():
        subprocess.run([f"python{version}", "-m", "venv", home], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages.split()], check=True)
    return str(python)


def freeze(python):
    """Returns the packages of an environment as a dict from name to version."""
    command = [python, "-m", "pip", "list", "--format=json"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {package["name"]: package["version"] for package in json.loads(listed)}


def shorten(text):
    """Returns the paragraph without what was found, and without the last line of each reason's error."""
    return re.sub(r" \(exit status \d+: .*?\)(?=[;.])", "", text[max(0, text.find("Chosen:")) :])


def check_platform(name, folder, root):
    """Returns the rows of the page for one platform, and its Python."""
    version, packages = PLATFORMS[name]
    home = folder / name.replace(" ", "-")
    python = make_environment(home, version, packages)
    before, rows = freeze(python), []
    cases = [("auto", CHOOSE), ("auto", CHOOSE), ("tf-tpu", CHOOSE), ("jax", CHOOSE), ("fit in the overlay", FIT)]
    for number, (choice, code) in enumerate(cases):
        text, seconds = run(python, code, home / "cache", choice=choice, root=str(root))
        what = f"`{choice}`, again" if number == 1 else choice if code is FIT else f"`{choice}`"
        if number == 1 and "Installed:" not in text:
            text = f"{text.partition('Chosen: ')[2].partition(',')[0]}, nothing installed"
        rows.append(f"| {name} | {what} | {seconds:.0f} | {shorten(text)} |")
    after = freeze(python)
    changed = {package: after.get(package) for package in before if after.get(package) != before[package]}
    added = ", ".join(f"{package} {after[package]}" for package in sorted(after.keys() - before.keys())) or "nothing"
    rows.append(f"| {name} | packages of the platform changed | | {changed or 'none'}; added: {added} |")
    return rows, python


def main():
    """Makes the environments in a folder, tries everything, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="where to make them (default: a temporary one)")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        root = folder / "root"
        for number in range(8):
            (root / "dev" / "vfio").mkdir(parents=True, exist_ok=True)
            (root / "dev" / "vfio" / str(number)).touch()
        rows, pairs = [], []
        for name in PLATFORMS:
            found, python = check_platform(name, folder, root)
            rows += found
            print("\n".join(found), flush=True)
        cache = Path(python).parents[1] / "cache"
        for version in LIBTPUS:
            text, _ = run(python, LOAD, cache, version=version, folder=f"{folder}/{version}")
            pairs.append(f"| {version} | {text} |")
            print(pairs[-1], flush=True)
    version = PLATFORMS[name][0]
    date = datetime.now(UTC).date()
    platforms = [
        f"- {name}: Python {python}, {needs.replace('==', ' ')}" for name, (python, needs) in PLATFORMS.items()
    ]
    results = f"""\
Of {date}, {platform.system()}, {os.cpu_count()} cores. **No TPU was available**: device files in a folder stood for
eight chips, so every "does not drive the TPU" below is the right answer, and the way to it is what was tried. The
paragraph also says what was found, and gives each reason with the last line of its error; both are left out here.

{chr(10).join(platforms)}

| platform | `RUNTIME` | seconds | outcome |
|---|---|---|---|
{chr(10).join(rows)}

The import of the known tensorflow-tpu with a given libtpu, in a process of its own (Python {version}):

| libtpu | import |
|---|---|
{chr(10).join(pairs)}"""
    renew_page(PAGE, "results", results)


if __name__ == "__main__":
    main()
