"""The one door through which model files come in: they are programs, and are looked at before anything opens them.

Whoever can change a file between the look and the loading is not kept out, so keep models where others cannot write.
"""

import contextlib
import hashlib
import tempfile
from pathlib import Path

from ..runtime.files import as_path, hash_file, is_remote, local_copy, measure_file
from .model_archives import check_keras
from .model_exports import check_onnx, check_tflite
from .model_graphs import check_saved_model
from .model_weights import ModelFileError, check_hdf5, refuse

MAX_BYTES = 2**31  # VGG16 with its optimizer's state has 1.7 GB
_CHECKS = {".keras": check_keras, ".h5": check_hdf5, ".hdf5": check_hdf5, ".onnx": check_onnx, ".tflite": check_tflite}
_PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".bin", ".joblib", ".dill", ".npy", ".npz", ".mar"}


def check_model_file(path, *, sha256=None, max_bytes=MAX_BYTES):
    """Looks at a model file without loading it: no class is made, no weight read, no operation run.

    Args:
        path: path of a `.keras`, `.weights.h5` (or other `.h5` with weights alone), `.onnx` or `.tflite` file, or of a
            SavedModel's folder.
        sha256: its hash in hexadecimal, see `hash_model`; None for any. Compared before anything else but the size.
            A model of known hash is looked at all the same.
        max_bytes: int, the most that the file, or all files of the folder, may have.

    Returns:
        The path, as it was given.

    Raises:
        FileNotFoundError: there is no such file.
        ModelFileError: it is not the expected one, is of another kind, is damaged, or holds what could do anything but
            compute; the message says which, and what to do.
    """
    with _looked_at(path, sha256, max_bytes):
        return path


def load_model(path, *, sha256=None):
    """Loads a whole model after `check_model_file`.

    Args:
        path: path of a `.keras` file or of a SavedModel's folder.
        sha256: see `check_model_file`.

    Returns:
        A keras.Model, not compiled; of a SavedModel, what `tf.saved_model.load` gives.

    Raises:
        FileNotFoundError: there is no such file.
        ModelFileError: see `check_model_file`; or its parts do not fit each other; or it is of a kind that is not
            loaded here.
    """
    with _looked_at(path, sha256, MAX_BYTES) as copy:
        with _only_model_file_errors(path):
            if copy.is_dir():
                import tensorflow as tf  # not above: only a SavedModel needs it

                return tf.saved_model.load(str(copy))
            if copy.suffix == ".keras":
                import keras  # not above: checking needs none

                return keras.models.load_model(copy, compile=False, safe_mode=True)
        remedy = "Use `load_weights` for weights; for ONNX and TFLite their own runtimes, after `check_model_file`"
        refuse(path, "it is no model that Keras or TensorFlow loads as a whole", remedy)


def load_weights(model, path, *, sha256=None):
    """Loads weights into a model after `check_model_file`.

    Args:
        model: a built keras.Model; receives the weights.
        path: path of a `.weights.h5`, or of an `.h5` in the older layout of keras.applications.
        sha256: see `check_model_file`.

    Raises:
        FileNotFoundError: there is no such file.
        ModelFileError: see `check_model_file`; or the weights are those of another model.
    """
    with _looked_at(path, sha256, MAX_BYTES) as copy:
        if copy.suffix not in (".h5", ".hdf5"):
            refuse(path, "it is no file of weights alone", "Use `load_model`")
        with _only_model_file_errors(path):
            model.load_weights(copy)


def hash_model(path):
    r"""Returns the SHA-256 of a model, in hexadecimal.

    Args:
        path: path of a file, whose own hash it is, or of a folder, where it is that of a list of its files: a line each
            with the hash of the file, two spaces and its path in the folder, in the order of the paths' bytes. Inside
            the folder, `find . -type f -printf '%P\n' | LC_ALL=C sort | xargs sha256sum | sha256sum` gives the same.
    """
    path = as_path(path)
    if not path.is_dir():
        return hash_file(path)
    names = sorted((file.relative_to(path).as_posix() for file in _walk(path)), key=str.encode)
    lines = "".join(f"{hash_file(path / name)}  {name}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def _walk(folder):
    for item in folder.iterdir():
        if not is_remote(item) and (item.is_symlink() or not (item.is_dir() or item.is_file())):
            refuse(item, "a model's folder holds plain files, and no links or devices")
        if item.is_dir():
            yield from _walk(item)
        else:
            yield item


@contextlib.contextmanager
def _looked_at(path, sha256, max_bytes):
    """Gives a local file or folder that passed every check: what is loaded from a bucket is the copy looked at."""
    given = as_path(path)
    if not given.exists():
        raise FileNotFoundError(f"{path} is missing. Give the path of a model file or of a SavedModel's folder.")
    if not (given.is_file() or given.is_dir()):
        refuse(path, "it is neither a file nor a folder", "Give the path of a model file or of a SavedModel's folder")
    size = sum(map(measure_file, _walk(given))) if given.is_dir() else measure_file(given)
    if not 0 < size <= max_bytes:
        refuse(path, f"it has {size:,} bytes, and 1 to {max_bytes:,} are allowed", "Fetch the file again")
    with _local(given) as copy:
        if sha256 is not None and (found := hash_model(copy)) != sha256.lower():
            refuse(path, f"its SHA-256 is {found}, expected was {sha256}", "Fetch it again from whom the hash is")
        if copy.is_dir():
            check_saved_model(copy)
        elif copy.suffix.lower() in _PICKLES:
            refuse(path, f"{copy.suffix} files are or may be pickles, which run code when they are opened")
        elif copy.suffix not in _CHECKS:
            refuse(path, f"{copy.suffix or 'a file without an ending'} is no kind of model file that is known here")
        else:
            _CHECKS[copy.suffix](copy)
        yield copy


@contextlib.contextmanager
def _local(path):
    if not (is_remote(path) and path.is_dir()):
        with local_copy(path) as copy:
            yield copy
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in _walk(path):
            copy = Path(folder, file.relative_to(path))
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
        yield Path(folder)


@contextlib.contextmanager
def _only_model_file_errors(path):
    try:
        yield
    except ModelFileError:
        raise
    except Exception as error:  # Keras and TensorFlow raise many kinds when parts do not fit
        remedy = "Use the file with the model and the versions that it was saved with"
        raise ModelFileError(f"{path} cannot be loaded: {str(error)[:500]}. {remedy}.") from error
