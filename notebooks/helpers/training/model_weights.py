"""What may be in an HDF5 file of weights, read without Keras and without any weight; and how model files are refused.

HDF5 is a file system in a file. What Keras had to close in it since 2024: whole models with lambdas in the older `.h5`
(CVE-2025-9905), shapes without data (CVE-2026-0897) and data in other files (CVE-2026-1669).
"""

import contextlib
import io

_MAX_OBJECTS, _MAX_DEPTH, _MAX_ATTRIBUTES, _MAX_ATTRIBUTE_BYTES = 20_000, 32, 64, 2**20
_MAX_ALL_ATTRIBUTES = 20_000  # DenseNet-121 has 430
_SAVE_AGAIN = "Have it saved again by `model.save` or `model.save_weights` of Keras 3, or do not use it"


class ModelFileError(ValueError):
    """A model file that is not opened; the message names the file, what is wrong with it, and the remedy."""


def refuse(path, problem, remedy=_SAVE_AGAIN):
    """Raises the ModelFileError of a file."""
    raise ModelFileError(f"{path} is refused: {problem}. {remedy}.") from None


class Window(io.RawIOBase):
    """A stretch of a file, as a file. Keras stores weights uncompressed, so that HDF5 can be read where it lies."""

    def __init__(self, file, start, size):
        self._file, self._start, self._size, self._place = file, start, size, 0

    def readable(self):
        """Whether it can be read."""
        return True

    def seekable(self):
        """Whether its place can be moved."""
        return True

    def tell(self):
        """Returns the place."""
        return self._place

    def seek(self, offset, whence=io.SEEK_SET):
        """Moves the place and returns it."""
        self._place = max(0, offset + (0, self._place, self._size)[whence])
        return self._place

    def readinto(self, buffer):
        """Reads into a buffer and returns how many bytes."""
        self._file.seek(self._start + self._place)
        read = self._file.readinto(memoryview(buffer)[: max(0, self._size - self._place)])
        self._place += read
        return read


def check_hdf5(path):
    """Checks an HDF5 file of weights, in the layout of Keras 3 or in the older one of keras.applications.

    It may hold groups, attributes, and numbers that lie unpacked in the file itself. A shape cannot declare more than
    is stored, nothing is in another file, nothing is reached twice, and there is no type that could hold a pickle.

    Raises:
        ModelFileError: it holds anything else, a whole model with its configuration for instance, or is damaged.
    """
    with open(path, "rb") as file:
        size = file.seek(0, io.SEEK_END)
        check_stored_weights(path, Window(file, 0, size), size)


def check_stored_weights(path, file, size):
    """Checks an HDF5 file of weights that is open, and returns how many numbers are stored in it.

    Args:
        path: path of the file, for the message.
        file: the open file, a `Window` for instance.
        size: int, its bytes.
    """
    import h5py  # not above: a second, and not every model file needs it

    if file.read(8) != b"\x89HDF\r\n\x1a\n":
        refuse(path, "its weights are no HDF5 file")
    try:
        with contextlib.closing(h5py.File(file, "r")) as opened:
            return _walk_hdf5(path, h5py, opened.id, size)
    except ModelFileError:
        raise
    except Exception as error:  # HDF5 raises many kinds for a damaged file
        refuse(path, f"its weights cannot be read ({str(error)[:200]})", "Fetch the file again")


def _walk_hdf5(path, h5py, root, size):
    n_numbers, n_bytes, n_attributes, seen = 0, 0, 0, set()
    pending = [(h5py.h5g.open(root, b"/"), "/", 0)]
    while pending:
        item, name, depth = pending.pop()
        address = h5py.h5o.get_info(item).addr
        if address in seen or len(seen) >= _MAX_OBJECTS or depth > _MAX_DEPTH:
            refuse(path, f"{name} in its weights is linked twice, or is one of too many, or nested too deep")
        seen.add(address)
        n_attributes += _check_attributes(path, h5py, item, name)
        if n_attributes > _MAX_ALL_ATTRIBUTES:
            refuse(path, f"its weights have more than {_MAX_ALL_ATTRIBUTES:,} attributes")
        if isinstance(item, h5py.h5d.DatasetID):
            n_bytes += _check_dataset(path, h5py, item, name, size)
            n_numbers += item.get_space().get_simple_extent_npoints()
            if n_bytes > size:
                refuse(path, f"its weights declare more bytes than the {size:,} of the file")
            continue
        if not isinstance(item, h5py.h5g.GroupID):
            refuse(path, f"{name} in its weights is neither a group nor numbers")
        if item.get_num_objs() + len(pending) > _MAX_OBJECTS:
            refuse(path, f"its weights are more than {_MAX_OBJECTS:,} objects")
        for key in item:
            below = f"{name.rstrip('/')}/{key.decode('utf-8', 'replace')[:60]}"
            if item.links.get_info(key).type != h5py.h5l.TYPE_HARD:
                refuse(path, f"{below} in its weights is a link to another place or another file")
            pending.append((h5py.h5o.open(item, key), below, depth + 1))
    return n_numbers


def _check_attributes(path, h5py, item, name):
    """Returns how many there are."""
    n_attributes = h5py.h5a.get_num_attrs(item)
    if n_attributes > _MAX_ATTRIBUTES:
        refuse(path, f"{name} in its weights has {n_attributes:,} attributes")
    for index in range(n_attributes):
        attribute = h5py.h5a.open(item, index=index)
        if attribute.name == b"model_config":
            refuse(
                path,
                "it is a whole model in the format of Keras 2, which is loaded as a program",
                "Have its weights alone saved, by `model.save_weights`",
            )
        kind = attribute.get_type()
        n_bytes = attribute.get_space().get_simple_extent_npoints() * kind.get_size()
        plain = kind.get_class() in (h5py.h5t.STRING, h5py.h5t.INTEGER, h5py.h5t.FLOAT)
        if not plain or n_bytes > _MAX_ATTRIBUTE_BYTES:
            refuse(path, f"an attribute of {name} in its weights is neither text nor number, or is too large")
    return n_attributes


def _check_dataset(path, h5py, dataset, name, size):
    """Returns the bytes of a dataset, all of which are stored in the file."""
    kind, layout = dataset.get_type(), dataset.get_create_plist()
    if kind.get_class() not in (h5py.h5t.INTEGER, h5py.h5t.FLOAT) or kind.get_size() > 8:
        refuse(path, f"{name} in its weights is no array of plain numbers")
    if layout.get_external_count() or layout.get_layout() not in (h5py.h5d.CONTIGUOUS, h5py.h5d.COMPACT):
        refuse(path, f"{name} in its weights is put together from elsewhere, or in chunks")
    if layout.get_nfilters():
        refuse(path, f"{name} in its weights is packed")
    declared = dataset.get_space().get_simple_extent_npoints() * kind.get_size()
    start = dataset.get_offset()  # None if it has no place of its own: small ones lie in their header
    inside = start is not None and start + declared <= size
    if layout.get_layout() == h5py.h5d.COMPACT:
        inside = declared < 2**16
    if declared and not (inside and dataset.get_storage_size() >= declared):
        refuse(path, f"{name} in its weights declares {declared:,} bytes that the file does not hold")
    return declared
