"""Stands in for what Colab and Kaggle have: Drive, secrets and downloads; attached data that cannot be written.

What `google.colab` raises, and when, is that of https://github.com/googlecolab/colabtools, `google/colab/`.
"""

import contextlib
import errno
import os
import shutil
import sys
import types
from pathlib import Path


class SecretNotFoundError(Exception):
    """As Colab's, of a secret that is not there."""


class NotebookAccessError(Exception):
    """As Colab's, of a secret that this notebook may not read."""


class Colab:
    """The modules of `google.colab`.

    Args:
        drive: path of the folder that appears when Drive is mounted.
        secrets: dict name -> value; None for one that the notebook may not read.
        allows: whether the user allows the access to Drive.

    Attributes:
        downloads: list of what the browser has saved: name and content of each file.
    """

    def __init__(self, drive, secrets=None, allows=True):
        self.drive, self.secrets, self.allows, self.downloads = Path(drive), secrets or {}, allows, []

    def list_modules(self):
        """Returns a dict of modules by their names, for `sys.modules`."""
        names = {"drive": {"mount": self._mount}, "userdata": {"get": self._get}, "files": {"download": self._download}}
        names["output"] = {"register_callback": lambda name, function: None}  # JAX imports it where it finds Colab
        modules = {name: types.SimpleNamespace(**functions) for name, functions in names.items()}
        return {"google.colab": types.SimpleNamespace(**modules)} | {f"google.colab.{k}": m for k, m in modules.items()}

    def _mount(self, mountpoint, force_remount=False):
        if not self.allows:
            raise ValueError("mount failed")
        self.drive.mkdir(parents=True, exist_ok=True)
        print(f"Mounted at {mountpoint}")

    def _get(self, key):
        if key not in self.secrets:
            raise SecretNotFoundError(f"Secret {key} does not exist.")
        if self.secrets[key] is None:
            raise NotebookAccessError(f"Notebook does not have access to secret {key}")
        return self.secrets[key]

    def _download(self, filename):
        if not os.path.exists(filename):
            raise FileNotFoundError(f"Cannot find file: {filename}")
        self.downloads.append((Path(filename).name, Path(filename).read_bytes()))


_hooks, _read_only = [], []
_CHANGED = dict.fromkeys(("os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.utime", "os.truncate"), slice(1))
_CHANGED |= {"os.rename": slice(2), "os.symlink": slice(1, 2), "os.link": slice(1, 2)}  # of an event's arguments


@contextlib.contextmanager
def read_only(folder):
    """Refuses, in this process and in a `with` block, to change anything below a folder, also for root."""
    if _refuse_changes not in _hooks:
        sys.addaudithook(_refuse_changes)  # cannot be removed
        _hooks.append(_refuse_changes)
    for path in (folder, *Path(folder).rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    _read_only.append(str(folder))
    try:
        yield
    finally:
        _read_only.pop()
        for path in (folder, *Path(folder).rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)


def _refuse_changes(event, arguments):
    if not _read_only:
        return
    if event == "open":
        path, _, flags = arguments
        changed = [path] if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else []
    else:
        changed = arguments[_CHANGED.get(event, slice(0))]
    for path in changed:
        if isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(tuple(_read_only)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))


@contextlib.contextmanager
def dropping(folder, number=errno.ENOTCONN):
    """Breaks, in a `with` block, copies into a folder in the middle, as a mount that drops or a disk that fills."""
    copyfile = shutil.copyfile

    def break_off(source, target, **options):
        if not Path(target).is_relative_to(folder):
            return copyfile(source, target, **options)
        content = Path(source).read_bytes()
        Path(target).write_bytes(content[: len(content) // 2])
        raise OSError(number, os.strerror(number), str(target))

    shutil.copyfile = break_off
    try:
        yield
    finally:
        shutil.copyfile = copyfile
