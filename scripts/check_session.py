"""Runs notebook 00 to its end in environments like Colab's and Kaggle's, killed and resumed twice, or in JupyterLab.

Stand-ins are what tests/support/platforms.py has of `google.colab`, a Drive that is mounted and drops, and /kaggle with
input that cannot be written. It needs root on a machine of its own without /content and /kaggle, PyPI, python3.12 and
python3.13 on the PATH; for `lab` a Chromium and the packages jupyterlab and playwright in this environment.

Usage: check_session.py kaggle|colab|lab FOLDER [--set "NAME=VALUE ..."] [--python PYTHON]
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import psutil
from check_platforms import ROOT, freeze, make_environment
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError

ADDRESS = "https://example.org/you/chest"  # git takes it for this repository
PACKAGES = "numpy==2.1.3 pandas==2.2.3 scikit-learn==1.6.1 keras==3.13.2 scipy matplotlib pillow tqdm ipykernel"
PLATFORMS = {  # Python, packages, runtime, form, where the notebook lies, what a new machine does not have any more
    "kaggle": ("3.12", f"{PACKAGES} tensorflow-cpu==2.20.0 jax==0.6.2", "auto", "Kaggle output", "/kaggle/working"),
    "colab": ("3.13", f"{PACKAGES} jax==0.7.2", "jax", "Drive", "/content"),
}
SHORT = (
    "SYNTHETIC_IMAGES=300 EPOCHS=4 SAVE_STEPS=2 RESAMPLES=200 VIEWS=1 RANDOM_IMAGES=2 REFERENCE=16 PARITY_IMAGES=16 "
    "TOLERANCE=1e-3 NODULE_IMAGES=60 MAPS=2 FOLDS=2 HEAD_EPOCHS=2 LEAKAGE_DEMO=False"
)
PORT = 8899  # of JupyterLab
STARTUP = """
import sys
from pathlib import Path
sys.path.append({support!r})
from platforms import Colab
sys.modules.update(Colab("/content/drive/MyDrive").list_modules())
"""


def open_notebook(settings, **form):
    """Returns notebook 00 with an address and with choices in its form."""
    notebook = nbformat.read(ROOT / "notebooks" / "00_run_everything.ipynb", 4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("https://github.com/OWNER/REPOSITORY", ADDRESS)
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += "".join(f"\n{name} = {value!r}" for name, value in (form | {"SET": settings}).items())
    return notebook


def make_variables(folder, name, runtime):
    """Returns the environment of a kernel on the platform."""
    (folder / "gitconfig").write_text(f'[url "file://{ROOT}"]\n\tinsteadOf = {ADDRESS}\n[safe]\n\tdirectory = *\n')
    startup = folder / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True, exist_ok=True)
    variables = {"GIT_CONFIG_GLOBAL": str(folder / "gitconfig"), "IPYTHONDIR": str(folder / "ipython")}
    variables |= {"RUNTIME": runtime, "TF_CPP_MIN_LOG_LEVEL": "2"}
    if name == "kaggle":
        return variables | {"KAGGLE_KERNEL_RUN_TYPE": "Batch"}
    (startup / "colab.py").write_text(STARTUP.format(support=str(ROOT / "tests" / "support")))
    return variables


def kill_when(is_time, manager, stop):
    """Kills a kernel and all that it has started, as a machine that is taken away, as soon as it is time."""
    while not stop.wait(1):
        if is_time():
            kernel = psutil.Process(manager.provisioner.pid)
            for process in [*kernel.children(recursive=True), kernel]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            return


def execute(notebook, python, place, variables, is_time=None):
    """Executes a notebook with an environment's Python; returns whether it came to its end."""

    class KernelManager(AsyncKernelManager):
        @property
        def kernel_spec(self):
            argv = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=argv, language="python", env=variables)

    manager, stop = KernelManager(), threading.Event()
    client = NotebookClient(notebook, km=manager, timeout=None, resources={"metadata": {"path": str(place)}})
    if is_time:
        threading.Thread(target=kill_when, args=(is_time, manager, stop), daemon=True).start()
    try:
        client.execute()
    except DeadKernelError:
        return False
    finally:
        stop.set()
    return True


def count_epochs(run):
    """Returns the number of epochs that a run's history has."""
    history = run / "history.csv"
    return len(history.read_text().splitlines()) - 1 if history.exists() else 0


def mount(*arguments):
    """Mounts as the program of that name does."""
    subprocess.run(["mount", *arguments], check=True)


def unmount(folder):
    """Removes all mounts from a folder."""
    while subprocess.run(["umount", "-l", folder], capture_output=True).returncode == 0:
        pass


def renew_machine(name, folder, attempt):
    """Makes the platform's folders as a new session finds them: Drive, or the attached output, is what is left."""
    place, drive = Path(PLATFORMS[name][4]), folder / "drive"
    if name == "colab":
        unmount("/content/drive")
        shutil.rmtree(place, ignore_errors=True)
        for path in (place / "drive", drive / "MyDrive"):
            path.mkdir(parents=True, exist_ok=True)
        mount("--bind", str(drive), "/content/drive")
        return
    kept, attached = folder / "output" / "version-1", Path("/kaggle/input/version-1")
    place.mkdir(parents=True, exist_ok=True)
    attached.mkdir(parents=True, exist_ok=True)
    if attempt == 2:  # the next version, with the output of the first attached; before that, the same session goes on
        shutil.copytree(place, kept, ignore=shutil.ignore_patterns("chest"))
        mount("--bind", "-o", "ro", str(kept), str(attached))
        shutil.rmtree(place)
        shutil.rmtree("/kaggle/tmp", ignore_errors=True)
        place.mkdir()


def drop_drive(run):
    """Makes Drive unwritable for a while once the training has begun, as a mount that drops."""
    while count_epochs(run) < 1:
        time.sleep(1)
    mount("-t", "tmpfs", "-o", "ro,size=1m", "none", "/content/drive")
    time.sleep(20)
    subprocess.run(["umount", "-l", "/content/drive"], check=True)


def check_platform(name, folder, settings):
    """Runs notebook 00 on one platform, kills it twice, and checks what it leaves."""
    version, packages, runtime, keep_in, place = PLATFORMS[name]
    root = Path("/", Path(place).parts[1])
    if root.exists():
        sys.exit(f"{root} is there already: this is to run on a machine of its own.")
    python = make_environment(folder / "env", version, packages)
    before, variables = freeze(python), make_variables(folder, name, runtime)
    run = Path({"kaggle": "/kaggle/working/chest-xray", "colab": "/content/drive/MyDrive/chest-xray"}[name])
    run /= "synthetic-quick"
    times = [
        lambda: count_epochs(run) >= 2,
        lambda: (run / "executed" / "05_export_and_predict.running.ipynb").exists(),
    ]
    for attempt, is_time in enumerate([*times, None]):
        renew_machine(name, folder, attempt)
        drop = threading.Thread(target=drop_drive, args=(run,), daemon=True)
        if name == "colab" and attempt == 0:
            drop.start()
        notebook, started = open_notebook(settings, KEEP_IN=keep_in), time.monotonic()
        ended = execute(notebook, python, place, variables, is_time)
        nbformat.write(notebook, folder / f"attempt-{attempt}.ipynb")
        print(
            f"{name}, attempt {attempt}: {'ended' if ended else 'killed'}, {time.monotonic() - started:.0f} s",
            flush=True,
        )
        assert ended == (is_time is None)
        if drop.ident:
            drop.join()
    after = freeze(python)
    changed = {package for package in before if after.get(package) != before[package]}
    assert not changed, f"packages of the platform changed, so that its kernel must be restarted: {changed}"
    check_end(notebook, run)
    for folder in ("/content/drive", "/kaggle/input/version-1"):
        unmount(folder)
    shutil.rmtree(root)
    print("installed:", ", ".join(sorted(f"{package} {after[package]}" for package in after.keys() - before.keys())))


def check_end(notebook, run):
    """Checks that the notebook ends with what it promises: figures, top 5, zip and report."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    text = "\n".join(str(output.get("text", "") or output.get("data", {}).get("text/plain", "")) for output in outputs)
    record = json.loads((run / "run.json").read_text())
    aucs, report = (run / "aucs.csv").read_text(), json.loads((run / "report" / "report.json").read_text())
    assert record["finished"] and record["interruptions"] >= 1, "the training was to be interrupted"
    assert len(figures) >= 6 and "model.zip" in text and (run / "model.zip").stat().st_size > 1e6
    assert (
        "mean" in aucs
        and report["aucs"]
        and len(json.loads((run / "exports" / "example.json").read_text())["top5"]) == 5
    )
    print(
        f"{len(figures)} figures at the end, {record['interruptions']} interruptions of {record['epochs_run']} epochs"
    )


def check_lab(folder, settings, python):
    """Runs notebook 00 in JupyterLab in a browser, as a person would, and keeps pictures of what is seen."""
    missing = [name for name in ("jupyterlab", "playwright") if not importlib.util.find_spec(name)]
    missing += ["the program chromium"] * (shutil.which("chromium") is None)
    if missing:
        sys.exit(f"Skipped: a run in a browser needs {' and '.join(missing)}.")
    from playwright.sync_api import sync_playwright

    clone, kernel = folder / "clone", folder / "jupyter" / "kernels" / "python3"
    shutil.rmtree(clone, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    nbformat.write(open_notebook(settings), clone / "notebooks" / "00_run_everything.ipynb")
    kernel.mkdir(parents=True, exist_ok=True)
    argv = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={PORT}"]
    command += ["--IdentityProvider.token=", f"--notebook-dir={clone / 'notebooks'}"]
    settings_file = folder / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    settings_file.parent.mkdir(parents=True, exist_ok=True)
    settings_file.write_text('{"windowingMode": "none"}')  # so that what is out of sight can be read, too
    variables = os.environ | {"JUPYTER_PATH": str(folder / "jupyter"), "TF_CPP_MIN_LOG_LEVEL": "2"}
    variables["JUPYTERLAB_SETTINGS_DIR"] = str(folder / "settings")
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=variables, stdout=log, stderr=log)
    try:
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1300, "height": 1000})
            open_when_ready(page, f"http://127.0.0.1:{PORT}/lab/tree/00_run_everything.ipynb")
            watch_notebook(page, folder)
    finally:
        server.terminate()
        server.wait()


def open_when_ready(page, address):
    """Opens an address as soon as the server answers, and waits for the notebook."""
    for _ in range(60):
        with contextlib.suppress(Exception):
            page.goto(address)
            break
        time.sleep(1)
    page.locator(".jp-Notebook h1").wait_for(timeout=120_000)


def watch_notebook(page, folder):
    """Runs all cells, takes a picture at each line of progress that is new, and checks what is seen at the end."""
    page.locator(".jp-Notebook .cm-content", has_text='KEEP_IN = "this machine"').first.scroll_into_view_if_needed()
    page.screenshot(path=folder / "form.png")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    outputs, seen, started = page.locator(".jp-OutputArea"), set(), time.monotonic()
    while time.monotonic() - started < 3600:
        time.sleep(3)
        text = "\n".join(outputs.all_inner_texts())
        assert "Error" not in text, text[-2000:]
        for line in (line for line in text.splitlines() if " of 6, " in line):
            kind = line.partition(":")[0], "left" in line, "%" in line
            if kind not in seen:
                seen.add(kind)
                print(f"{time.monotonic() - started:.0f} s: {line}", flush=True)
                outputs.filter(has_text=" of 6, ").last.locator(
                    ".jp-OutputArea-child"
                ).last.scroll_into_view_if_needed()
                page.screenshot(path=folder / f"seen-{len(seen):02d}.png")
        if "model.zip" in text and "report" in text:
            break
    print(page.locator(".jp-OutputArea img").count(), "figures")
    for name, text in {"results": "Look at the results", "end": "Take the model away"}.items():
        page.locator(".jp-Notebook h2", has_text=text).scroll_into_view_if_needed()
        page.mouse.wheel(0, 500)
        time.sleep(2)
        page.screenshot(path=folder / f"{name}.png")


def main():
    """Runs one of the checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=[*PLATFORMS, "lab"])
    parser.add_argument("folder", type=Path, help="for environments, kept output and executed notebooks")
    parser.add_argument("--set", default=SHORT, help="settings of the notebooks")
    parser.add_argument("--python", default=sys.executable, help="of the kernel in JupyterLab")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.what == "lab":
        check_lab(folder, arguments.set, arguments.python)
    else:
        check_platform(arguments.what, folder, arguments.set)


if __name__ == "__main__":
    main()
