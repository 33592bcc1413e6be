"""Reads and writes files on a local disk or in Google Cloud Storage, `gs://bucket/folder`.

`as_path` makes an object with the methods of pathlib.Path from either. The other functions handle the differences: a
bucket has no folders, an object in it appears whole or not at all but is renamed only by a copy, and many libraries can
open only a file on disk. Buckets are reached through TensorFlow's file system, with the credentials that tf.data uses;
nothing of it is imported for a local path.
"""

import codecs
import contextlib
import hashlib
import os
import pathlib
import shutil
import tempfile
import uuid
import warnings


def is_remote(path):
    """Returns whether a path, or its text, is in Google Cloud Storage."""
    return os.fspath(path).startswith("gs://")


def as_path(path):
    """Makes a path object from a setting.

    Args:
        path: text or path object.

    Returns:
        A pathlib.Path, or for `gs://` an `etils.epath.Path`, which has the same methods.
    """
    if not is_remote(path):
        return pathlib.Path(path)
    from etils import epath

    return epath.Path(path)


@contextlib.contextmanager
def local_draft(path):
    """Gives a local file to write in a `with` block; at its end the file replaces `path` in one step.

    If the block fails, `path` stays as it was.

    Args:
        path: path of the file; replaced if it exists. Its folder is made if missing.

    Yields:
        pathlib.Path with the same extension, by which libraries choose a format.

    Raises:
        OSError: the file cannot be written.
    """
    path = as_path(path)
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            draft = pathlib.Path(folder) / path.name
            yield draft
            with only_os_errors(path):
                path.write_bytes(draft.read_bytes())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes, also on several hosts, that write the same file never share a draft.
    draft = path.with_name(f"part-{uuid.uuid4().hex[:12]}-{path.name}")
    try:
        yield draft
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def only_os_errors(path):
    """Turns TensorFlow's errors about a `path` in a bucket, raised in a `with` block, into OSError."""
    if not is_remote(path):
        yield
        return
    import tensorflow as tf

    try:
        yield
    except tf.errors.OpError as error:
        raise OSError(f"{path}: {error.message}") from error


@contextlib.contextmanager
def local_copy(path):
    """Gives a local file to read in a `with` block: `path` itself, or a copy of the file in a bucket.

    Args:
        path: path of a file.

    Yields:
        pathlib.Path of a file with the same name.

    Raises:
        FileNotFoundError: there is no such file in the bucket.
    """
    path = as_path(path)
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / path.name
        copy.write_bytes(path.read_bytes())
        yield copy


def write_text(path, text):
    """Writes text in UTF-8, whole or not at all, see `local_draft`."""
    with local_draft(path) as draft:
        draft.write_text(text, encoding="utf-8")


def read_text(path):
    """Reads text in UTF-8 or UTF-16 without its byte-order mark; line ends stay as they are.

    Args:
        path: path of the file.

    Returns:
        str.

    Raises:
        ValueError: the file is in another encoding, which nothing in it names, or is no text.
    """
    content = as_path(path).read_bytes()
    is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # as PowerShell and some editors write
    try:
        text = content.decode("utf-16" if is_wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not text in UTF-8 (byte {error.start + 1:,}). Save it in UTF-8; on the command line, "
            "`iconv -f CP1252 -t UTF-8 OLD > NEW` converts a file of Windows."
        ) from None
    if "\0" in text:
        raise ValueError(f"{path} is no text, or was cut off by a crash: it has zero bytes. Fetch or save it again.")
    return text


def write_csv(path, table, **options):
    """Writes a table by `DataFrame.to_csv` with its options, whole or not at all, see `local_draft`."""
    with local_draft(path) as draft:
        table.to_csv(draft, **options)


def read_csv(path, **options):
    """Reads a table by `pandas.read_csv` with its options."""
    import pandas as pd  # not above: this module is imported before the requirements are installed

    with local_copy(path) as copy:
        return pd.read_csv(copy, **options)


@contextlib.contextmanager
def lock_folder(folder, busy="", *, shared=False, wait=False):
    """Keeps other processes out of a folder for a `with` block, as far as they ask; the folder is made if missing.

    The kernel releases the lock when the process ends, however it ends. In a bucket, and on disks without locks, such
    as some that machines share, nobody is kept out.

    Args:
        folder: path of the folder.
        busy: sentence with a remedy, for where another process holds the lock.
        shared: whether all who ask for a shared lock may enter together.
        wait: whether to wait for the other process, with `busy` as a warning, rather than to fail.

    Yields:
        bool, whether the lock is held.

    Raises:
        RuntimeError: with `busy`; another process holds the lock, and `wait` is False.
    """
    folder = as_path(folder)
    if is_remote(folder):
        yield False
        return
    import fcntl  # not above: not every system has it

    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)  # the folder itself: a lock file could not be removed without a race
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    held = True
    try:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise RuntimeError(busy) from None
            if busy:
                warnings.warn(busy, stacklevel=3)
            fcntl.flock(handle, kind)
        except OSError:
            held = False
        yield held
    finally:
        os.close(handle)


def copy_file(source, target):
    """Copies a file; the copy appears whole or not at all."""
    with local_copy(source) as copy, local_draft(target) as draft:
        shutil.copyfile(copy, draft)


def note_files(paths):
    """Notes when files were written, for `remove_unchanged` after a notebook has written them anew.

    Args:
        paths: path objects; missing ones are left out.

    Returns:
        Dict from path to time.
    """
    return {path: _time_of(path) for path in paths if path.exists()}


def remove_unchanged(noted):
    """Deletes the files of `note_files` that have not been written since: the new results do not have them."""
    for path, time in noted.items():
        if path.exists() and _time_of(path) == time:
            path.unlink()


def _time_of(path):
    status = path.stat()
    return status.mtime if is_remote(path) else status.st_mtime_ns


def remove_folder(path):
    """Deletes a folder with its content; a missing one is no error."""
    path = as_path(path)
    if is_remote(path):
        path.rmtree(missing_ok=True)
    elif path.exists():
        shutil.rmtree(path)


def measure_file(path):
    """Returns the size of a file in bytes; FileNotFoundError if there is none."""
    status = as_path(path).stat()
    return status.length if is_remote(path) else status.st_size


def hash_file(path, algorithm="sha256"):
    """Returns the SHA-256 of a file, or another hash by its name in hashlib, in hexadecimal."""
    digest = hashlib.new(algorithm, usedforsecurity=False)  # or some machines refuse MD5
    with as_path(path).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
