"""Image files for the tests, well formed and not."""

import io
import struct
import zlib

from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def encode(pixels, kind="PNG", mode=None, **options):
    """Returns the bytes of an image file of an array (or of what Pillow makes of it in another mode)."""
    image = Image.fromarray(pixels)
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


def _chunk(name, content):
    checksum = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def make_png(width, height, depth=8, color=0, raw=b""):
    """Returns a well-formed PNG file with any declared size and kind of pixels, whatever pixel data it holds."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    palette = _chunk(b"PLTE", bytes(6)) if color == 3 else b""
    data = _chunk(b"IDAT", zlib.compress(raw))
    return SIGNATURE + _chunk(b"IHDR", header) + palette + data + _chunk(b"IEND", b"")


def flip_bit(data, place):
    return data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]
