"""Validates model files before they are loaded: a model file is a program.

What this project wrote is known by its SHA-256: `run.json` has that of the weights, `SHA256SUMS` in the folder of the
exports has theirs. Besides, each format is checked for what could run code or reach other files:

- weights (`.h5`) hold numbers only, all in this one file;
- a SavedModel uses only the operations that this project's export uses;
- ONNX and LiteRT files are opened only if their SHA-256 is given or recorded;
- no other file is opened, not even a `.keras` file, whose configuration may name code.

A record beside a file shows that the file is whole and the one that was exported. It does not protect against somebody
who can write to the folder. The checks limit neither what a model computes nor how much memory it takes.
"""

import contextlib
import hashlib
import itertools
import os
import re
import tempfile
from pathlib import Path

from ..runtime.files import as_path, hash_file, is_remote, local_copy, read_text, write_text

_EXPORTS = (".onnx", ".tflite")
_WEIGHTS = (".h5", ".hdf5")
_VARIABLES = r"variables(/variables\.(index|data-\d{5}-of-\d{5}))?"
_SAVED_MODEL_FILES = re.compile(rf"(saved_model|fingerprint)\.pb|assets|{_VARIABLES}")
_CHECKPOINT_OPS = {"SaveV2", "MergeV2Checkpoints", "ShardedFilename", "RestoreV2"}
# The operations of the export and of the usual networks. None reaches files, processes or the network.
_OPS = (
    "Abs AddV2 All Any ArgMax Assert AssignVariableOp AsString AvgPool BatchDatasetV2 BatchMatMulV2 BiasAdd Bitcast "
    "BitwiseAnd Cast Ceil ConcatenateDataset ConcatV2 Const Conv2D DatasetToSingleElement DecodeImage DecodePng "
    "DecodeRaw DepthwiseConv2dNative DisableCopyOnRead EnsureShape Equal Erf Erfc Exp ExpandDims ExtractJpegShape "
    "Fill Floor FloorDiv FusedBatchNormV3 GatherV2 Greater GreaterEqual Identity IdentityN If IgnoreErrorsDataset "
    "IsFinite Less LessEqual LogicalAnd LogicalNot LogicalOr MatMul Max Maximum MaxPool Mean Min Minimum Mul Neg "
    "NoOp NotEqual OnesLike Pack Pad ParallelMapDatasetV2 PartitionedCall Placeholder Prod Range RangeDataset "
    "ReadVariableOp RealDiv ReduceJoin Relu Relu6 Reshape ResizeArea ResizeBilinear RewriteDataset RightShift Round "
    "Rsqrt ScatterNd Select SelectV2 Shape Sigmoid Size Slice Softmax Softplus Split Sqrt Square SquaredDifference "
    "Squeeze StatefulPartitionedCall StatelessIf StatelessWhile StaticRegexFullMatch StopGradient StridedSlice "
    "StringJoin Sub Substr Sum Tanh TensorDataset TensorSliceDataset TopKV2 Transpose Unpack VarHandleOp Where "
    "While ZerosLike ZipDataset"
)


class ModelFileError(ValueError):
    """A model file that is not opened. The message names the file, the problem and the remedy."""


def check_model_file(path, *, sha256=None):
    """Checks a model file without loading it.

    Args:
        path: path of an `.h5` (weights only), `.onnx` or `.tflite` file, or of a SavedModel's folder.
        sha256: its hash in hexadecimal, see `hash_model`; None for any that passes the other checks.

    Returns:
        The path, as given.

    Raises:
        FileNotFoundError: there is no such file.
        ModelFileError: the file is damaged, of another kind or not the expected one, or could do more than compute.
    """
    with _checked(path, sha256):
        return path


def load_model(path, *, sha256=None):
    """Loads a SavedModel after `check_model_file`.

    Args:
        path: path of a SavedModel's folder.
        sha256: see `check_model_file`.

    Returns:
        What `tf.saved_model.load` returns.

    Raises:
        FileNotFoundError: there is no such file.
        ModelFileError: see `check_model_file`; or the file cannot be loaded.
    """
    with _checked(path, sha256) as copy:
        if not copy.is_dir():
            raise _refusal(path, "it is not a SavedModel", "Use `load_weights` or `open_export`")
        import tensorflow as tf

        if not set("[*?\\") & set(str(copy)) - {os.sep}:
            return tf.saved_model.load(str(copy))
        with tempfile.TemporaryDirectory() as folder:  # TensorFlow takes such a path for a pattern
            link = Path(folder, "model")
            link.symlink_to(copy.resolve())
            return tf.saved_model.load(str(link))


def load_weights(model, path):
    """Loads weights into a model after `check_model_file`.

    Args:
        model: a built keras.Model; receives the weights.
        path: path of a `.weights.h5` file, or of an `.h5` file in the layout of keras.applications.

    Raises:
        FileNotFoundError: there is no such file.
        ModelFileError: see `check_model_file`; or the weights are those of another model.
    """
    with _checked(path, None) as copy:
        if copy.suffix not in _WEIGHTS:
            raise _refusal(path, "it is not a file of weights", "Use `load_model`")
        try:
            _check_layers(copy, model)
            model.load_weights(copy)
        except ValueError as error:
            problem = f"it does not fit the network {model.name}: {' '.join(str(error).split())[:400].rstrip('. ')}"
            raise _refusal(path, problem, "Choose the BACKBONE that it was made for, or another file") from error


def hash_model(path):
    r"""Returns the SHA-256 of a model file, or of a SavedModel's folder, in hexadecimal.

    For a folder it is the hash of the list of its files. In the folder, this prints the same:
    `find . -type f -printf '%P\n' | LC_ALL=C sort | xargs sha256sum | sha256sum`.
    """
    path = as_path(path)
    if not path.is_dir():
        return hash_file(path)
    names = sorted((file.relative_to(path).as_posix() for file in _list_files(path)), key=str.encode)
    return hashlib.sha256("".join(f"{hash_file(path / name)}  {name}\n" for name in names).encode()).hexdigest()


def record_hashes(paths):
    """Records the SHA-256 of exported files in `SHA256SUMS` beside them, in the format of `sha256sum`."""
    for path in map(as_path, paths):
        known = _read_record(path.parent) | {path.name: hash_file(path)}
        write_text(path.parent / "SHA256SUMS", "".join(f"{known[name]}  {name}\n" for name in sorted(known)))


def _find_hash(path):
    """Returns the recorded SHA-256 of a file, also from the record of a published folder; None if there is none."""
    for folder in (path.parent, path.parent.parent):
        if digest := _read_record(folder).get(path.relative_to(folder).as_posix()):
            return digest
    return None


def _read_record(folder):
    """Returns a dict from file name to SHA-256."""
    record = folder / "SHA256SUMS"
    lines = read_text(record).splitlines() if record.exists() else []
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _list_files(folder):
    for item in folder.iterdir():
        yield from _list_files(item) if item.is_dir() else [item]


def _refusal(path, problem, remedy="Export or save the model again, or do not use the file"):
    return ModelFileError(f"{path} is refused: {problem}. {remedy}.")


@contextlib.contextmanager
def _checked(path, sha256):
    """Yields a local file or folder that passed the checks; errors in the `with` block become ModelFileErrors."""
    given = as_path(path)
    if not (given.is_file() or given.is_dir()):
        raise FileNotFoundError(f"{path} is missing. Give the path of a model file or of a SavedModel's folder.")
    expected = sha256 or (_find_hash(given) if given.suffix in _EXPORTS else None)
    try:
        with _local(given) as copy:
            if expected and (found := hash_model(copy)) != expected.lower():
                raise _refusal(path, f"its SHA-256 is {found}, expected was {expected}", "Fetch or export it again")
            if copy.is_dir():
                _check_saved_model(copy)
            elif copy.suffix in _WEIGHTS:
                _check_weights(copy)
            elif copy.suffix not in _EXPORTS:
                raise ValueError(f"{copy.suffix or 'a file without a suffix'} is not a known kind of model file")
            elif not expected:
                remedy = "Give its `sha256`, or export it by 05_export_and_predict.ipynb"
                raise _refusal(path, f"its SHA-256 is neither given nor in {given.parent / 'SHA256SUMS'}", remedy)
            yield copy
    except ModelFileError:
        raise
    except Exception as error:  # h5py, zipfile, protobuf, Keras and TensorFlow raise many kinds for damaged files
        raise _refusal(path, str(error)[:500] or type(error).__name__) from error


@contextlib.contextmanager
def _local(path):
    if not (is_remote(path) and path.is_dir()):
        with local_copy(path) as copy:
            yield copy
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in _list_files(path):
            copy = Path(folder, file.relative_to(path))
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
        yield Path(folder)


def _check_weights(file):
    """Raises a ValueError unless an HDF5 file holds only numbers, all of them in the file itself."""
    import h5py

    def find_link(name, link):  # what a visitor returns ends the visit
        return None if isinstance(link, h5py.HardLink) else f"{name} in its weights is a link"

    def find_problem(name, item):
        if not isinstance(item, h5py.Dataset):
            return None
        if item.external or item.is_virtual:
            return f"{name} in its weights lies in another file"
        if item.dtype.kind not in "biuf":
            return f"{name} in its weights has type {item.dtype}, not numbers"
        if item.nbytes > item.id.get_storage_size():
            return f"{name} in its weights declares {item.nbytes:,} bytes, more than are stored"
        return None

    with h5py.File(file, "r") as opened:
        if "model_config" in opened.attrs:
            raise ValueError("it is a whole model in the format of Keras 2; have its weights saved by `save_weights`")
        if problem := opened.visititems_links(find_link) or opened.visititems(find_problem):
            raise ValueError(problem)


def _check_layers(file, model):
    """Raises a ValueError that names the first layer in which weights in the layout of keras.applications differ."""
    import h5py

    with h5py.File(file, "r") as opened:
        if "layer_names" not in opened.attrs:  # the layout of Keras 3, where Keras names such a layer
            return
        groups = {name: opened[name] for name in _decode(opened.attrs["layer_names"])}
        found = {
            name: [group[weight].shape for weight in _decode(group.attrs["weight_names"])]
            for name, group in groups.items()
            if len(group.attrs["weight_names"])
        }
    expected = {
        layer.name: [tuple(weight.shape) for weight in layer.weights] for layer in model.layers if layer.weights
    }
    for theirs, ours in itertools.zip_longest(found, expected):
        if found.get(theirs) != expected.get(ours):
            raise ValueError(
                f"where the network has {ours or 'no more layers'} with weights of {expected.get(ours, [])}, "
                f"the file has {theirs or 'no more layers'} with {found.get(theirs, [])}"
            )


def _decode(names):
    return [name.decode() if isinstance(name, bytes) else name for name in names]


def _is_hub_link(file):
    """Whether a link is one of a Hugging Face cache: below `snapshots`, to a file that lies in `blobs` beside it."""
    snapshots = [folder for folder in file.parent.resolve().parents if folder.name == "snapshots"]
    return file.is_file() and file.resolve().parent in [folder.parent / "blobs" for folder in snapshots]


def _check_saved_model(folder):
    """Raises a ValueError if a SavedModel brings other files, or operations that are not in `_OPS`.

    Saving and restoring its variables is allowed only in the two functions that its saver names, and nothing else may
    call them.
    """
    from tensorflow.core.protobuf import saved_model_pb2

    for file in folder.rglob("*"):
        name = file.relative_to(folder).as_posix()
        if not _SAVED_MODEL_FILES.fullmatch(name):
            raise ValueError(f"{name} does not belong to a SavedModel without assets")
        if file.is_symlink() and not _is_hub_link(file):
            raise ValueError(f"{name} is a link to another place; copy the model with its files, as `cp -rL` does")
    metas = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes()).meta_graphs
    if len(metas) != 1:
        raise ValueError(f"it holds {len(metas)} graphs, not one")
    meta = metas[0]
    if meta.asset_file_def or any(node.HasField("asset") for node in meta.object_graph_def.nodes):
        raise ValueError("it brings assets, files that are read when it is loaded")
    saver = {name.split(":")[0] for name in (meta.saver_def.save_tensor_name, meta.saver_def.restore_op_name)}
    functions = [(function.signature.name, function.node_def) for function in meta.graph_def.library.function]
    nodes = [(True, node) for node in meta.graph_def.node] + [(False, n) for _, body in functions for n in body]
    unknown = {node.op for in_main, node in nodes} - set(_OPS.split()) - _CHECKPOINT_OPS
    touching = {name for name, body in functions if any(node.op in _CHECKPOINT_OPS for node in body)}
    if unknown or any(node.op in _CHECKPOINT_OPS for in_main, node in nodes if in_main):
        shown = ", ".join(sorted(unknown)[:5]) or "SaveV2 or RestoreV2 outside of its functions"
        raise ValueError(f"its graph uses {shown}; only what the export needs is allowed (_OPS in {__name__})")
    outputs = {info.name for signature in meta.signature_def.values() for info in signature.outputs.values()}
    used = outputs.union(*(node.input for in_main, node in nodes if in_main))
    exposed = touching & set(meta.object_graph_def.concrete_functions)
    for in_main, node in nodes:
        raw = b"" if in_main and node.name in saver else node.SerializeToString()
        exposed |= {name for name in touching if name.encode() in raw}
    if exposed or saver & {name.lstrip("^").split(":")[0] for name in used}:
        raise ValueError("what saves or restores its variables can be called as if it were the model")
