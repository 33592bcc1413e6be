"""Reads messages in the encoding of protobuf field by field, so that nothing is built of what is only passed by."""

_MAX_FIELDS = 2**17


class Malformed(ValueError):
    """Bytes that are no such message."""


def text(value):
    """Returns the text of a field."""
    if isinstance(value, int):
        raise Malformed("a number where text belongs")
    return bytes(value).decode()


def find(message, number, *below):
    """Yields the values of a field of a protobuf message; with further numbers, of fields in what it holds."""
    for found, value in fields(message):
        if found == number and below:
            yield from find(value, *below)
        elif found == number:
            yield value


def fields(message):
    """Yields number and value of each field of a protobuf message: an int, or a memoryview of what has a length."""
    if isinstance(message, int):
        raise Malformed("a number where a message belongs")
    place, end, n_fields = 0, len(message), 0
    while place < end:
        key, place = _varint(message, place)
        n_fields += 1
        if n_fields > _MAX_FIELDS or key >> 32:
            raise Malformed(f"more than {_MAX_FIELDS:,} fields in one message, or one with too high a number")
        kind = key & 7
        if kind == 0:
            value, place = _varint(message, place)
        elif kind in (1, 5):
            value, place = 0, place + (8 if kind == 1 else 4)
        elif kind == 2:
            size, place = _varint(message, place)
            value, place = message[place : place + size], place + size
        else:
            raise Malformed("a field of an unknown kind")
        if place > end:
            raise Malformed("cut short")
        yield key >> 3, value


def _varint(message, place):
    value = shift = 0
    while True:
        if place >= len(message):
            raise Malformed("cut short")
        byte = message[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
        if shift > 63:
            raise Malformed("a number without an end")


def varints(packed):
    """Yields the numbers of a packed field."""
    place = 0
    while place < len(packed):
        value, place = _varint(packed, place)
        yield value
