"""What may be in a `.keras` archive, read without Keras.

Its configuration can name far more than a classifier needs, and Keras has had to close that one by one since 2024:
lambdas (CVE-2024-3660), any function by its name (CVE-2025-1550, CVE-2025-9906), pickles (CVE-2025-49655), files read
as a vocabulary (CVE-2025-12058), graphs in other folders (CVE-2026-1462). So nothing is looked for here that is known
to be bad: what is not known to be needed is refused.
"""

import io
import json
import math
import stat
import struct
import zipfile
import zlib

from .model_weights import Window, check_stored_weights, refuse

MAX_CONFIG_BYTES = 2**21  # DenseNet-121 has 0.4 MB; parsed, the worst that fits into this takes some 50 MB
_MEMBERS = {"config.json": MAX_CONFIG_BYTES, "metadata.json": 2**16, "model.weights.h5": None}
_MAX_DEPTH = 32

# The classes of a functional DenseNet, VGG16 or small head. None of them opens a file, calls a function by its name
# or takes anything but numbers, strings and further classes of this list.
_CLASSES = {
    "keras": "DTypePolicy Sequential",
    "keras.src.models.functional": "Functional",
    "keras.layers": "Activation Add AveragePooling2D BatchNormalization Concatenate Conv2D Dense Dropout Flatten "
    "GlobalAveragePooling2D GlobalMaxPooling2D InputLayer MaxPooling2D Multiply ReLU Rescaling Softmax "
    "SpatialDropout2D ZeroPadding2D",
    "keras.initializers": "Constant GlorotNormal GlorotUniform HeNormal HeUniform LecunNormal LecunUniform Ones "
    "RandomNormal RandomUniform TruncatedNormal VarianceScaling Zeros",
    "keras.regularizers": "L1 L1L2 L2",
}
_ALLOWED = {(module, name) for module, names in _CLASSES.items() for name in names.split()}


def check_keras(path):
    """Checks a `.keras` archive: the zip as such, every class in its configuration, the HDF5 file of its weights.

    Its three members have to be as Keras writes them: stored one after the other, uncompressed, with nothing before,
    between or after them. That leaves no room for a zip bomb, nor for two readers of the zip that see different files.

    Raises:
        ModelFileError: the archive holds anything that a classifier of this project does not need, or is damaged.
    """
    with open(path, "rb") as file:
        members = _read_members(path, file)
        for name, (start, size, checksum) in members.items():
            limit = _MEMBERS[name]
            if limit and size > limit:
                refuse(path, f"{name} has {size:,} bytes, more than the {limit:,} allowed")
            window, found = Window(file, start, size), 0
            while block := window.read(2**20):
                found = zlib.crc32(block, found)
            if found != checksum:
                refuse(path, f"{name} is damaged: its checksum does not fit", "Fetch the file again")
        config = Window(file, *members["config.json"][:2]).read()
        n_parameters = _check_config(path, config)
        start, size, _ = members["model.weights.h5"]
        n_stored = check_stored_weights(path, Window(file, start, size), size)
    if n_parameters > n_stored:
        refuse(path, f"config.json asks for {n_parameters:,} parameters, but only {n_stored:,} numbers are stored")


def _read_members(path, file):
    """Returns start, size and checksum of each member."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 42))
    tail = file.read()
    end = struct.unpack("<4s4H2LH", tail[-22:]) if len(tail) == 42 else (b"",)
    if end[0] != b"PK\5\6":
        refuse(path, "it does not end as a zip archive of Keras does: cut short, or no such archive")
    *places, n_here, n_all, directory_size, directory_start, n_comment = end[1:]
    whole = directory_start + directory_size + 22 == size and not (any(places) or n_comment or directory_size > 2**12)
    if not whole or n_here != n_all or n_all != len(_MEMBERS) or tail[:4] == b"PK\6\7":
        refuse(path, f"its zip directory is not that of the {len(_MEMBERS)} files that Keras writes")
    try:
        with zipfile.ZipFile(file) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    except Exception as error:  # zipfile raises many kinds for a damaged directory
        refuse(path, f"its zip directory cannot be read ({error})")
    if sorted(info.filename for info in infos) != sorted(_MEMBERS):
        names = ", ".join(repr(info.filename[:60]) for info in infos)
        refuse(path, f"it holds {names} where Keras writes {', '.join(_MEMBERS)}")
    members, place = {}, 0
    for info in infos:
        link = stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG)
        if info.compress_type or info.flag_bits or link or info.compress_size != info.file_size:
            refuse(path, f"{info.filename} is compressed, encrypted or a link, and Keras stores plain files")
        start = _check_local_header(path, file, info) if info.header_offset == place else None
        if start is None:
            refuse(path, f"{info.filename} does not follow on what is before it: something is hidden or overlaps")
        members[info.filename] = start, info.file_size, info.CRC
        place = start + info.file_size
    if place != directory_start:
        refuse(path, "something is hidden between its files and its zip directory")
    return members


def _check_local_header(path, file, info):
    """Compares the two places in which a zip describes a member, and returns where its data starts."""
    file.seek(info.header_offset)
    header = file.read(30)
    fields = struct.unpack("<4s5H3L2H", header) if len(header) == 30 else [b""] * 11
    signature, _, flags, method, _, _, checksum, stored, plain, n_name, n_extra = fields
    if signature == b"PK\3\4":
        name, extra = file.read(n_name), file.read(n_extra)
        if stored == plain == 2**32 - 1 and len(extra) == 20 and extra[:4] == b"\1\0\x10\0":  # zip64
            plain, stored = struct.unpack("<2Q", extra[4:])
        expected = (0, 0, info.CRC, info.file_size, info.file_size, info.filename.encode())
        if (flags, method, checksum, stored, plain, name) == expected:
            return info.header_offset + 30 + n_name + n_extra
    refuse(path, f"the zip says one thing about {info.filename} in its directory and another in front of its data")


def _check_config(path, text):
    """Checks every class that a config.json names, and returns how many parameters it will make Keras allocate."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        refuse(path, f"config.json cannot be read ({error})")
    if not isinstance(config, dict):
        refuse(path, "config.json describes no model")
    config.pop("compile_config", None)  # `compile=False` skips this one, and no other
    n_parameters, pending = 0, [(config, 0)]
    while pending:
        item, depth = pending.pop()
        if depth > _MAX_DEPTH:
            refuse(path, f"config.json is nested more than {_MAX_DEPTH} deep")
        if isinstance(item, dict):
            if not item.keys().isdisjoint(("class_name", "module", "registered_name")):
                n_parameters += _check_class(path, item)
            pending += [(value, depth + 1) for value in item.values()]
        elif isinstance(item, list):
            pending += [(value, depth + 1) for value in item]
    return n_parameters


def _check_class(path, item):
    name, module, registered = (item.get(key) for key in ("class_name", "module", "registered_name"))
    if name == "__keras_tensor__" and module is registered is None:
        return 0
    known = isinstance(name, str) and isinstance(module, str) and (module, name) in _ALLOWED
    if not known or registered not in (None, name):
        shown = f"{str(module)[:60]}.{str(name)[:60]}" + (f" ({str(registered)[:60]})" if registered else "")
        refuse(
            path,
            f"config.json names {shown}, which no model of this project needs and which may run code or open files",
            "Build the model with `build_densenet121` and take only the weights, by `load_weights`",
        )
    if name not in ("Dense", "Conv2D", "BatchNormalization"):
        return 0
    try:
        return _count_parameters(name, item["config"], item["build_config"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        refuse(path, f"config.json describes a {name} whose size cannot be told")


def _count_parameters(name, config, build_config):
    """Counts what a layer allocates when it is built: Keras does so before it looks whether the weights are there."""
    if set(build_config) != {"input_shape"} or config.get("lora_rank") is not None:
        raise ValueError("not a plain layer")
    shape = build_config["input_shape"]
    if name == "BatchNormalization":
        axis = config["axis"]
        return 4 * _whole(shape[axis[0] if isinstance(axis, list) else axis])
    if name == "Dense":
        return (_whole(shape[-1]) + 1) * _whole(config["units"])
    channels = _whole(shape[1 if config["data_format"] == "channels_first" else -1])
    kernel = math.prod(_whole(side) for side in config["kernel_size"])
    return (kernel * (channels // _whole(config["groups"])) + bool(config["use_bias"])) * _whole(config["filters"])


def _whole(number):
    if type(number) is not int or number < 1:
        raise ValueError(f"{number!r} is no size")
    return number
