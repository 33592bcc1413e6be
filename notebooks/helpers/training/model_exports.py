"""What may be in an ONNX and a TFLite file, read without any of their packages."""

import itertools
import mmap
import struct
import zipfile

from .model_graphs import EXPORT_AGAIN
from .model_weights import refuse
from .protobuf_fields import Malformed, find, text, varints

_MAX_PARTS = 2**17  # operations, graphs and tensors
_MAX_APPENDED = 2**20  # bytes of the files at the end of a TFLite file; ours have 4,000
_MAX_DIRECTORY = 2**12  # bytes of the list of them; ours has 112


def check_onnx(path):
    """Checks an ONNX file: the standard operations only, all tensors inside and none larger than what is stored.

    Raises:
        ModelFileError: it uses another domain, whose operations are a library's own code, keeps tensors in other files,
            or is damaged.
    """
    with open(path, "rb") as file:
        model = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))  # closed with the last view of it
    try:
        _check_onnx(path, model)
    except (UnicodeDecodeError, Malformed) as error:
        refuse(path, f"it is no ONNX file, or damaged ({error})", "Fetch the file again")


def _check_onnx(path, model):
    graphs, nodes, tensors, n_parts = [], [], [], 0

    def add(parts, *found):
        nonlocal n_parts
        for part in itertools.chain(*found):  # counted one by one: a small file may hold millions
            n_parts += 1
            if n_parts > _MAX_PARTS:
                refuse(path, f"it has more than {_MAX_PARTS:,} operations and tensors", EXPORT_AGAIN)
            parts.append(part)

    def add_attribute(attribute):
        add(tensors, find(attribute, 5), find(attribute, 10))
        add(tensors, *(find(attribute, field, part) for field in (22, 23) for part in (1, 2)))
        add(graphs, find(attribute, 6), find(attribute, 11))

    _check_domains(path, find(model, 8, 1), find(model, 25, 9, 1), find(model, 25, 10))
    add(graphs, find(model, 7))
    if not graphs or any(True for _ in find(model, 20)):
        refuse(path, "it is no ONNX file of a trained model", EXPORT_AGAIN)
    add(nodes, find(model, 25, 7))  # of functions, whose attributes have defaults
    for attribute in find(model, 25, 11):
        add_attribute(attribute)
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            add(nodes, find(graph, 1))
            add(tensors, find(graph, 5), find(graph, 15, 1), find(graph, 15, 2))
            continue
        node = nodes.pop()
        _check_domains(path, find(node, 7))
        for attribute in find(node, 5):
            add_attribute(attribute)
    for tensor in tensors:
        _check_onnx_tensor(path, tensor)


def _check_domains(path, *names):
    for name in itertools.chain(*names):
        if text(name) not in ("", "ai.onnx", "ai.onnx.ml"):
            refuse(path, f"it uses the operations of {text(name)[:200]}", EXPORT_AGAIN)


def _check_onnx_tensor(path, tensor):
    if list(find(tensor, 13)) or any(place for place in find(tensor, 14)):
        refuse(path, "it keeps tensors in other files", "Have it saved as one file")
    n_numbers = 1
    for side in find(tensor, 1):  # written one by one, or packed
        for value in [side] if isinstance(side, int) else varints(side):
            n_numbers *= value
            if n_numbers > 2 * len(tensor):  # the smallest type has 4 bits
                refuse(path, f"a tensor declares {n_numbers:,} numbers in {len(tensor):,} bytes", EXPORT_AGAIN)


def check_tflite(path):
    """Checks a TFLite file: its identifier, and that it names no operation but the built-in ones.

    Others are an application's own code, and with all of TensorFlow installed they reach its operations, those on files
    among them. The rest of the model is checked by the interpreter itself; what is appended must unpack to little.

    Raises:
        ModelFileError: it has others, or is no such file.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[4:8] != b"TFL3":
            refuse(path, "it is no TFLite file", EXPORT_AGAIN)
        try:
            codes = _follow(data, _table_field(data, _follow(data, 0), 1))
            (n_codes,) = struct.unpack_from("<I", data, codes)
            if n_codes > 1000:
                refuse(path, f"it names {n_codes:,} operations", EXPORT_AGAIN)
            custom = any(_table_field(data, _follow(data, codes + 4 + 4 * index), 1) for index in range(n_codes))
        except struct.error as error:
            refuse(path, f"it is damaged ({error})", "Fetch the file again")
        tail = data[-42:]
    if custom:
        refuse(path, "it uses operations that are not built in", EXPORT_AGAIN)
    if zipfile.is_zipfile(path):  # files that go with the model are appended to it
        end = struct.unpack("<4s4H2LH", tail[-22:])
        if end[0] != b"PK\5\6" or end[5] > _MAX_DIRECTORY or tail[:4] == b"PK\6\7":  # zip64
            refuse(
                path, f"the directory of the archive at its end has more than {_MAX_DIRECTORY:,} bytes", EXPORT_AGAIN
            )
        try:
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(part.file_size for part in archive.infolist())
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            refuse(path, f"the archive at its end is damaged ({error})", "Fetch the file again")
        if unpacked > _MAX_APPENDED:
            refuse(path, f"the archive at its end unpacks to {unpacked:,} bytes", EXPORT_AGAIN)


def _follow(data, place):
    return place + struct.unpack_from("<I", data, place)[0]


def _table_field(data, table, field):
    """Returns where a field of a flatbuffer table lies; 0 where there is none."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if vtable < 0 or 4 + 2 * field >= struct.unpack_from("<H", data, vtable)[0]:
        return 0
    offset = struct.unpack_from("<H", data, vtable + 4 + 2 * field)[0]
    return table + offset if offset else 0
