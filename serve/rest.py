"""The predict requests and answers of TensorFlow Serving's REST API, from JSON to NumPy and back, without a network.

Requests that are too large are refused early: values are counted before the JSON is parsed, and the sizes of images are
read from their headers before any of them is decoded.
"""

import binascii
import itertools
import json
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from helpers.export import check_images, measure_color
from helpers.packing import ImageError, decode_images, inspect_image

# The input of each signature. TensorFlow Serving's REST API refuses signatures without an input; this one answers them.
INPUTS = {"serving_default": "image_bytes", "explain": "image_bytes", "pixels": "pixels", "metadata": None}
_METHODS = {"serving_default": "predict", "explain": "explain", "pixels": "predict_pixels"}
_FORM = 'Send {"instances": [{"b64": "<base64 of a PNG or JPEG>"}]} as JSON in UTF-8'
_MIN_SIDE = 16  # pixels, of decoded images; the same limit as for encoded ones


class Limits(NamedTuple):
    """Limits of one request.

    Attributes:
        max_bytes: of its body.
        max_images: in it.
        max_pixels: of all its encoded images together; each of them has its own limit in `helpers.packing`.
        max_values: numbers and other values in its JSON; each takes a few hundred bytes of memory.
    """

    max_bytes: int = 2**25
    max_images: int = 64
    max_pixels: int = 2**27
    max_values: int = 2**21


class RequestError(Exception):
    """A request that is refused: the HTTP status, 400 to 499, and a sentence for the client."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


def answer_predict(model, body, limits):
    """Answers the body of a `:predict` request.

    Args:
        model: an `ExportedModel`.
        body: bytes or bytearray, JSON as TensorFlow Serving takes it, in the row format (`instances`) or the columnar
            one (`inputs`).
        limits: a `Limits`.

    Returns:
        bytes, JSON: `{"predictions": [...]}`, an object for each image, in the row format; `{"outputs": {...}}`, a list
        for each output, in the columnar one. Where an encoded image may not be what the model was trained on, also
        `"warnings"`, a list of sentences for each image, which TensorFlow Serving does not have.

    Raises:
        RequestError: the body is not such a request, exceeds the limits, or holds something that is not an image.
    """
    signature, by_row, value = _parse(body, limits)
    name = INPUTS[signature]
    if name is None:
        if by_row:
            raise RequestError(400, f'Signature "{signature}" has no inputs and no rows. Send "inputs": {{}}.')
        return _write("outputs", {key: _plain(np.asarray(fact)) for key, fact in model.facts.items()})
    items = _list_rows(value, name) if by_row else _list_column(value, name)
    if not items:
        raise RequestError(400, f"No values in '{'instances' if by_row else 'inputs'}'")
    if len(items) > limits.max_images:
        raise RequestError(413, f"{len(items)} images in one request; at most {limits.max_images} are allowed")
    predict = getattr(model, _METHODS[signature])
    images = _read_pixels(items) if name == "pixels" else _read_images(items, limits)
    try:
        answer = predict(images)
    except ValueError as error:  # names the images that the model could not decode
        raise RequestError(400, str(error)) from None
    answer = {key: _plain(array) for key, array in answer.items()}
    if len(answer) == 1:  # TensorFlow Serving omits the name of a single output
        (answer,) = answer.values()
    elif by_row:
        answer = [dict(zip(answer, row, strict=True)) for row in zip(*answer.values(), strict=True)]
    warnings = [] if name == "pixels" else _list_warnings(images)
    return _write("predictions" if by_row else "outputs", answer, **({"warnings": warnings} if any(warnings) else {}))


def _parse(body, limits):
    """Returns signature, whether by rows, and what is under `instances` or `inputs`."""
    if max(body.count(b",") + 1, body.count(b"[") + body.count(b"{")) > limits.max_values:
        raise RequestError(413, f"The JSON holds more than the {limits.max_values:,} values allowed")
    try:
        request = json.loads(body.decode("utf-8-sig"))  # with NaN and Infinity, as TensorFlow Serving reads it
    except RecursionError:
        raise RequestError(400, "JSON Parse error: nested too deeply") from None
    except ValueError as error:
        # Not its text: for bytes that are not UTF-8 it quotes the whole body.
        where = f" at offset: {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise RequestError(400, f"JSON Parse error: the body is not JSON in UTF-8{where}. {_FORM}") from None
    if not isinstance(request, dict):
        twice = ", but JSON in a JSON string: encode it once" * isinstance(request, str)
        raise RequestError(400, f"The body is not a JSON object{twice}. {_FORM}")
    signature = request.get("signature_name", "")
    if not isinstance(signature, str):
        raise RequestError(400, "'signature_name' key must be a string value.")
    signature = signature or "serving_default"
    if signature not in INPUTS:
        raise RequestError(400, f'Serving signature name: "{signature[:100]}" not found in signature def')
    found = [key for key in ("instances", "inputs") if key in request]
    if len(found) != 1:
        raise RequestError(400, "Expecting one of 'inputs' or 'instances' keys" + " and not both" * bool(found))
    return signature, found[0] == "instances", request[found[0]]


def _is_b64(value):
    return isinstance(value, dict) and list(value) == ["b64"] and isinstance(value["b64"], str)


def _list_rows(rows, name):
    """Returns the values of `instances`, given as they are or each under the name of the input."""
    if not isinstance(rows, list):
        raise RequestError(400, "Expecting 'instances' to be a list/array")
    named = [isinstance(row, dict) and not _is_b64(row) for row in rows]
    if not any(named):
        return rows
    if not all(named):
        raise RequestError(400, "'instances' must hold either objects or plain values, not a mix of both")
    for number, row in enumerate(rows):
        if list(row) != [name]:
            raise RequestError(400, f"Failed to process element: {number} of 'instances': must only have keys: {name}")
    return [row[name] for row in rows]


def _list_column(column, name):
    """Returns the values of `inputs`, given as a list or under the name of the input."""
    if isinstance(column, dict) and not _is_b64(column):
        if name not in column:
            raise RequestError(400, f"Missing named input: {name} in 'inputs' object.")
        column = column[name]
    if not isinstance(column, list):
        raise RequestError(400, f"Expecting a list of images for {name}: its first dimension is the batch")
    return column


def _read_images(items, limits):
    """Returns the bytes of encoded images; refuses bytes without the header of an image."""
    images, n_pixels = [], 0
    for number, item in enumerate(items):
        place = f"image_bytes, item {number} (from 0)"
        if _is_b64(item):
            try:
                images.append(_decode_base64(item["b64"]))
            except ValueError:
                how = "Send the standard alphabet (+ and /), without a prefix such as data:image/png;base64,"
                raise RequestError(400, f"{place}: Unable to base64 decode. {how}") from None
        elif isinstance(item, str):  # TensorFlow Serving takes text too; it gets a hint below
            images.append(item.encode("utf-8", "surrogatepass"))
        else:
            raise RequestError(400, f'{place}: not formatted correctly for base64 data: {{"b64": "<base64>"}}')
        try:
            header = inspect_image(images[-1])
        except ImageError as error:
            hint = "" if _is_b64(item) else '. Send {"b64": "<base64>"}'
            raise RequestError(400, f"{place}: {error}{hint}") from None
        n_pixels += header["width"] * header["height"]
    if n_pixels > limits.max_pixels:
        raise RequestError(413, f"The images have {n_pixels:,} pixels in all; at most {limits.max_pixels:,} a request")
    return images


def _decode_base64(text):
    """Decodes as TensorFlow Serving does: white space and missing padding are no errors, other characters are."""
    data = text.encode("ascii")  # a UnicodeEncodeError is a ValueError
    try:
        return binascii.a2b_base64(data, strict_mode=True)
    except binascii.Error:
        data = b"".join(data.split()).rstrip(b"=")
        return binascii.a2b_base64(data + b"=" * (-len(data) % 4), strict_mode=True)


def _read_pixels(items):
    """Returns float32 (n, height, width, 1) of nested lists."""
    values, shape = [items], []
    for _ in range(4):
        sizes = {len(value) if isinstance(value, list) else 0 for value in values}
        if len(sizes) != 1 or 0 in sizes:
            raise RequestError(400, "pixels: expecting lists of one shape, (n, height, width, 1)")
        shape += sizes
        values = list(itertools.chain.from_iterable(values))
    if shape[3] != 1 or min(shape[1:3]) < _MIN_SIDE:
        shape = ", ".join(map(str, shape))
        raise RequestError(400, f"pixels: shape ({shape}); expecting (n, height, width, 1), sides from {_MIN_SIDE}")
    if not set(map(type, values)) <= {int, float}:
        raise RequestError(400, "pixels: a JSON value is not of expected type: float")
    try:
        with np.errstate(over="raise"):
            return np.asarray(values, "float64").astype("float32").reshape(shape)
    except (OverflowError, FloatingPointError):
        raise RequestError(400, "pixels: cannot convert a JSON value to float without loss of precision") from None


def _plain(array):
    """Returns an array as nested lists, floats with as few digits as they need: 0.1, not 0.10000000149."""
    if array.dtype.kind == "f":
        array = array.astype("float32").astype(str).astype("float64")
    return array.tolist()


@tf.function(input_signature=[tf.TensorSpec((None,), tf.string)])
def _decode(images):
    return decode_images(images, 128)  # enough for the checks, which look at coarse shapes


def _list_warnings(images):
    """Returns for each encoded image the reasons why it may not be what the model was trained on."""
    squares = _decode(tf.constant(images)).numpy()
    found = check_images(squares, [measure_color(image) for image in images])
    return [[warning.reason for warning in of_image] for of_image in found]


def _write(key, value, **more):
    return json.dumps({key: value} | more, separators=(",", ":")).encode()
