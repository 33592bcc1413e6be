"""Checkpoint files that survive kills, full disks and dropped mounts: whole or missing, checked on reading."""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import socket
import tempfile
import warnings
from pathlib import Path

import numpy as np

from ..runtime.files import as_path, is_remote, local_draft, only_os_errors

NEWEST, PREVIOUS = "state.bin", "state.previous.bin"
_DIGEST_BYTES = 32  # the SHA-256 at the start of the file
_locks = {}  # of this process, by path: a notebook cell that is run again finds its own lock


class CheckpointStore:
    """Keeps the newest two checkpoints of a run in a folder, and if asked, copies of them in a second one.

    A checkpoint is one file: the SHA-256 of all that follows, then an NPZ archive of arrays with a JSON text among
    them. It is written to a temporary name, flushed to the disk and renamed, and the one before it is kept, so that a
    kill at any moment leaves a good one.

    Args:
        folder: path of the folder that stays, such as `RUN_DIR/state`; may be on a mounted Drive or in a bucket.
        local: path of a folder on the machine's own disk to write to first, in a subfolder for this run; None writes
            to `folder` only, or, if that is in a bucket, to the system's temporary folder first. A mount that drops
            then costs a warning, not the run.
        writes: whether this process writes; of several hosts, one does.

    Raises:
        RuntimeError: another process has opened the folder.
    """

    def __init__(self, folder, local=None, writes=True):
        folder = as_path(folder)
        local = local or (tempfile.gettempdir() if is_remote(folder) else None)
        name = f"state-{hashlib.sha256(os.fspath(folder).encode()).hexdigest()[:16]}"
        self.folders = ([Path(local) / name] if local and writes else []) + [folder]
        self.writes = writes
        self._last_written = {}  # digest by folder: what must be there before the next write
        if writes:
            for path in self.folders:
                _lock(path)

    def close(self):
        """Releases the folder for other processes."""
        for path in self.folders:
            if file := _locks.pop(path / "lock", None):
                file.close()

    def clear(self):
        """Deletes every checkpoint."""
        for path in self.folders:
            for name in (NEWEST, PREVIOUS, NEWEST + ".part"):
                (path / name).unlink(missing_ok=True)
        self._last_written.clear()

    def write(self, arrays, meta):
        """Writes a checkpoint.

        Args:
            arrays: dict name -> numpy array.
            meta: dict of JSON values; `serial`, a count of the writes, decides which of two checkpoints is newer, and
                `run` tells the checkpoints of one run from those of another.

        Raises:
            OSError: it cannot be written, as on a full disk. The earlier checkpoints are still there. Where there is a
                local folder, a failing copy is a warning.
            RuntimeError: another process has written to the folder since.
        """
        if not self.writes:
            return
        buffer = io.BytesIO()
        np.savez(buffer, meta=np.array(json.dumps(meta)), **arrays)
        content = buffer.getbuffer()
        digest = hashlib.sha256(content).digest()
        for path in self.folders:
            try:
                with only_os_errors(path):
                    self._write_to(path, digest, content)
            except OSError as error:
                message = _explain(error, path, len(content) + _DIGEST_BYTES)
                if path is self.folders[0]:
                    raise OSError(error.errno, message) from None
                message += f" Training continues with the checkpoints in {self.folders[0]}."
                warnings.warn(message, stacklevel=2)

    def _write_to(self, folder, digest, content):
        folder.mkdir(parents=True, exist_ok=True)
        newest, part = folder / NEWEST, folder / (NEWEST + ".part")
        expected = self._last_written.get(folder)
        if expected and newest.exists() and _read_digest(newest) != expected:
            raise RuntimeError(f"Another process writes to {folder}. Stop one of the two, or use another RUN_DIR.")
        is_good = expected is not None and newest.exists()  # a damaged one must not replace the one before
        if is_remote(folder):
            if is_good:
                newest.replace(folder / PREVIOUS)
            with local_draft(newest) as draft:
                draft.write_bytes(digest + content)
        else:
            try:
                with open(part, "wb") as file:
                    file.write(digest)
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    part.unlink()  # frees the space
                raise
            if is_good:
                os.replace(newest, folder / PREVIOUS)
            os.replace(part, newest)
            _flush_folder(folder)
        self._last_written[folder] = digest

    def read(self):
        """Reads the newest good checkpoint of all folders; warns of each damaged or missing one that it skips.

        Returns:
            The dicts `arrays` and `meta` as they were written; None and None if no checkpoint was ever written.

        Raises:
            ValueError: there are checkpoints, but none is good; or the folder that stays is empty and the local one is
                not.
        """
        good, found, self._last_written = [], [], {}
        for folder in self.folders:
            for name in (NEWEST, PREVIOUS):
                path = folder / name
                if not path.exists():
                    if name == NEWEST and (folder / PREVIOUS).exists():
                        warnings.warn(f"{path} is missing; the checkpoint before it is read.", stacklevel=2)
                    continue
                found.append(path)
                if checkpoint := _read_good(path):
                    digest, arrays, meta = checkpoint
                    good.append((folder, arrays, meta))
                    if name == NEWEST:
                        self._last_written[folder] = digest
                        break  # the one before is older
                else:
                    warnings.warn(f"{path} is damaged and is skipped.", stacklevel=2)
        if not found:
            return None, None
        if not good:
            places = " and ".join(map(str, self.folders))
            raise ValueError(f"Every checkpoint in {places} is damaged. Set START_OVER = True to begin anew.")
        kept = [meta for folder, _, meta in good if folder == self.folders[-1]]
        if not kept and not any(path.parent == self.folders[-1] for path in found):
            raise ValueError(
                f"{self.folders[-1]} holds no checkpoint, but {self.folders[0]} holds one of the same run. Mount the "
                "missing drive, or set START_OVER = True to begin anew."
            )
        if kept:  # those of an earlier run do not count
            good = [entry for entry in good if entry[2].get("run") == kept[0].get("run")]
        _, arrays, meta = max(good, key=lambda entry: entry[2]["serial"])
        return arrays, meta


def _read_good(path):
    """Returns digest, arrays and meta of a checkpoint, or None if it is damaged."""
    content = path.read_bytes()
    digest, content = content[:_DIGEST_BYTES], memoryview(content)[_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        arrays = dict(archive)
    return digest, arrays, json.loads(str(arrays.pop("meta")))


def _read_digest(path):
    with path.open("rb") as file:
        return file.read(_DIGEST_BYTES)


def _flush_folder(folder):
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError:
        pass  # some mounted drives cannot flush a folder
    finally:
        os.close(number)


def _explain(error, folder, size):
    try:
        free = f"{shutil.disk_usage(folder).free:,} are free there"
    except OSError:
        free = "the folder cannot be reached"
    return f"{folder / NEWEST} cannot be written ({error.strerror or error}): it takes {size:,} bytes, {free}."


def _lock(folder):
    """Takes the folder for this process. The kernel releases the lock when the process ends, however it ends."""
    path = folder / "lock"
    if is_remote(folder) or path in _locks:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+")  # noqa: SIM115, it stays open as long as the lock is held
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise RuntimeError(
            f"Another process ({holder}) trains in {folder.parent}. Let it end or stop it (in Jupyter, shut its kernel "
            "down), or use another RUN_DIR."
        ) from None
    except OSError:  # some mounted drives have no locks; the digests still show that another process writes
        file.close()
        return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _locks[path] = file
