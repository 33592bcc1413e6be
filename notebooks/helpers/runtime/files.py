"""Where files lie and how they are written: on a local disk, or in Google Cloud Storage as `gs://bucket/folder`.

`as_path` makes of either an object with the methods of pathlib.Path, and the other functions are for what differs: a
bucket knows no folders, an object in it appears at once and whole but is renamed only by a copy, and many libraries
can open nothing but a file on disk. What lies in a bucket is reached through TensorFlow's own file system, with the
credentials with which tf.data reads it; nothing of that is imported for a local path.
"""

import contextlib
import hashlib
import os
import pathlib
import shutil
import tempfile
import uuid


def is_remote(path):
    """Whether a path, or its text, is one in Google Cloud Storage."""
    return os.fspath(path).startswith("gs://")


def as_path(path):
    """Makes a path object of a setting.

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
    """Gives a local file to write, for a `with` block; at its end that takes the place of `path`, at once and whole.

    A block that fails leaves `path` as it was.

    Args:
        path: path of the file; replaced if it exists. Its folder is made if missing.

    Yields:
        pathlib.Path with the same ending, by which libraries choose a format.

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
    # Two processes, also on two hosts, that write the same file never write the same draft.
    draft = path.with_name(f"part-{uuid.uuid4().hex[:12]}-{path.name}")
    try:
        yield draft
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)  # gives the space back
        raise


@contextlib.contextmanager
def only_os_errors(path):
    """Makes an OSError of what TensorFlow raises in a `with` block about a `path` in a bucket, to be handled as one."""
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
    """Gives a local file to read, for a `with` block: `path` itself, or a copy of what lies in a bucket.

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
    """Writes text in UTF-8, at once and whole, see `local_draft`."""
    with local_draft(path) as draft:
        draft.write_text(text, encoding="utf-8")


def read_text(path):
    """Reads text in UTF-8, skipping a byte-order mark and leaving ends of lines as they are."""
    return as_path(path).read_bytes().decode("utf-8-sig")


def write_csv(path, table, **options):
    """Writes a table by `DataFrame.to_csv` with its options, at once and whole, see `local_draft`."""
    with local_draft(path) as draft:
        table.to_csv(draft, **options)


def read_csv(path, **options):
    """Reads a table by `pandas.read_csv` with its options."""
    import pandas as pd  # not above: this room is there before the requirements are installed

    with local_copy(path) as copy:
        return pd.read_csv(copy, **options)


def copy_file(source, target):
    """Copies a file; the copy appears at once and whole."""
    with local_copy(source) as copy, local_draft(target) as draft:
        shutil.copyfile(copy, draft)


def remove_folder(path):
    """Deletes a folder with all that is in it; one that is not there is no error."""
    path = as_path(path)
    if is_remote(path):
        path.rmtree(missing_ok=True)
    elif path.exists():
        shutil.rmtree(path)


def measure_file(path):
    """Returns the bytes that a file has; FileNotFoundError if there is none."""
    status = as_path(path).stat()
    return status.length if is_remote(path) else status.st_size


def hash_file(path, algorithm="sha256"):
    """Returns the SHA-256 of a file, or another hash by its name in hashlib, in hexadecimal."""
    digest = hashlib.new(algorithm, usedforsecurity=False)  # MD5 is refused otherwise where a machine is set up so
    with as_path(path).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
