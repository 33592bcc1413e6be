"""Reads and writes files on a local disk or in Google Cloud Storage, `gs://bucket/folder`.

`as_path` makes an object with the methods of pathlib.Path from either. The other functions handle the differences: a
bucket has no folders, an object in it appears whole or not at all but is renamed only by a copy, and many libraries can
open only a file on disk. Buckets are reached through TensorFlow's file system, with the credentials that tf.data uses;
nothing of it is imported for a local path.
"""

import contextlib
import hashlib
import os
import pathlib
import shutil
import tempfile
import uuid


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
    """Reads text in UTF-8 without a byte-order mark; line ends stay as they are."""
    return as_path(path).read_bytes().decode("utf-8-sig")


def write_csv(path, table, **options):
    """Writes a table by `DataFrame.to_csv` with its options, whole or not at all, see `local_draft`."""
    with local_draft(path) as draft:
        table.to_csv(draft, **options)


def read_csv(path, **options):
    """Reads a table by `pandas.read_csv` with its options."""
    import pandas as pd  # not above: this module is imported before the requirements are installed

    with local_copy(path) as copy:
        return pd.read_csv(copy, **options)


def copy_file(source, target):
    """Copies a file; the copy appears whole or not at all."""
    with local_copy(source) as copy, local_draft(target) as draft:
        shutil.copyfile(copy, draft)


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
