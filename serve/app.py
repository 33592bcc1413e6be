"""Serves an exported model over HTTP as TensorFlow Serving's REST API does, without TensorFlow Serving.

Usage: python serve/app.py --model models/densenet121/saved_model [--port 8501] [--host 127.0.0.1] [--name densenet121]

Requests and answers are those of TensorFlow Serving, so the same clients work; see docs/serving.md. No image, file name
or address of a client is written anywhere.
"""

import argparse
import asyncio
import json
import logging
import math
import os
import re
import socket
import sys
import traceback
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["KERAS_BACKEND"] = "tensorflow"  # exported models need no other, whatever else is trained here
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

try:
    import anyio
    import h11
    import uvicorn
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ModuleNotFoundError as error:
    remedy = "`make serve` installs what serving needs, or pip install -r requirements/serve.txt"
    raise ModuleNotFoundError(f"{error.name} is not installed: {remedy}", name=error.name) from None

from serve.rest import Limits, RequestError, answer_predict

VERSION = "1"
_DISCARDED = 8  # a body up to this many times too large is received and dropped, so that its sender can read the 413
_PATH = re.compile(
    r"/v1/models(?:/(?P<name>[^/:]+))?(?:/versions/(?P<version>\d{1,18})|/labels/(?P<label>[^/:]+))?"
    r"(?::(?P<verb>predict|classify|regress)|/(?P<metadata>metadata))?",
    re.IGNORECASE,
)
_KEPT_SECONDS = 75  # an idle connection stays open: clients reuse theirs for up to a minute
_log = logging.getLogger("serve")


class Protocol(H11Protocol):
    """HTTP/1.1 of uvicorn, also for a client that closes its half of the connection after its request, as `nc -N`."""

    def eof_received(self):
        """Returns whether the connection stays open: only until the answer to a whole request is sent."""
        is_due = self.conn.their_state in (h11.DONE, h11.MUST_CLOSE) and not self.cycle.response_complete
        if is_due:
            self.cycle.keep_alive = False
        return is_due


def make_app(model, name, *, limits=Limits(), waiting=16, body_seconds=30):
    """Builds the web application.

    Args:
        model: an `ExportedModel`.
        name: text, the model's name in addresses.
        limits: a `rest.Limits`.
        waiting: int, requests that may wait or be received beside the two that are computed; more get a 429 at once, so
            memory for bodies is at most (2 + waiting) * `limits.max_bytes`.
        body_seconds: float, seconds that a client has to send a body.

    Returns:
        An ASGI application.
    """
    slots = min(2, os.cpu_count() or 1)  # each request uses all cores most of the time
    description = json.dumps(_describe(model, name)).encode()
    status = {"version": VERSION, "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    status = json.dumps({"model_version_status": [status]}).encode()
    limiter = None  # made later: it needs the event loop
    present = 0

    def read_address(request):
        """Returns the parts of a path; raises RequestError unless they are those of this model."""
        path = request.scope["path"]  # without percent signs
        parts = _PATH.fullmatch(path)
        if parts is None or (parts["name"] is None and (parts["verb"] or parts["metadata"])):
            known = path.lower().startswith("/v1/")
            raise RequestError(400 if known else 404, f"Malformed request: {request.method}. Try /v1/models/{name}")
        if parts["name"] is None:
            raise RequestError(400, "Missing model name in request.")
        if parts["label"]:
            raise RequestError(400, "Unrecognized servable version label: there are none here")
        if parts["name"] != name or int(parts["version"] or VERSION) != int(VERSION):
            raise RequestError(404, f"Servable not found for request. Here is {name}, version {VERSION}")
        return parts

    async def read_body(request):
        """Returns the body as a bytearray; never keeps more of it than allowed, whatever its header claims."""
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise RequestError(415, "Content-Encoding is not supported: send the JSON as it is")
        declared = request.headers.get("content-length", "0")
        size = int(declared[:20]) if declared.isdecimal() else math.inf
        body, received = bytearray(), 0
        too_large = RequestError(413, f"The body is larger than the {limits.max_bytes:,} bytes allowed")
        if size > limits.max_bytes * (1 if "expect" in request.headers else _DISCARDED):
            raise too_large
        try:
            async with asyncio.timeout(body_seconds):
                async for part in request.stream():  # to its end: a client reads no answer before
                    received += len(part)
                    if received > limits.max_bytes * _DISCARDED:
                        raise too_large
                    if max(size, received) > limits.max_bytes:
                        body.clear()
                    else:
                        body += part
        except TimeoutError:
            raise RequestError(408, f"The body did not arrive within {body_seconds} seconds") from None
        if received > limits.max_bytes:
            raise too_large
        return body

    async def predict(request):
        nonlocal limiter, present
        limiter = limiter or anyio.CapacityLimiter(slots)
        if present >= slots + waiting:
            raise RequestError(429, "Too many requests at a time. Try again in a second")
        present += 1
        try:
            body = await read_body(request)
            return await anyio.to_thread.run_sync(answer_predict, model, body, limits, limiter=limiter)
        finally:
            present -= 1

    async def respond(request):
        try:
            parts = read_address(request)
            allowed = ("POST",) if parts["verb"] else ("GET", "HEAD")
            if request.method not in allowed:
                error = RequestError(405, f"{request.method} is not allowed here: use {allowed[0]}")
                return _refuse(error, ", ".join(allowed))
            if parts["verb"] and parts["verb"].lower() != "predict":
                raise RequestError(400, "The model has signatures for predict only")
            if parts["verb"]:
                return _send(await predict(request))
            return _send(description if parts["metadata"] else status)
        except RequestError as error:
            return _refuse(error)
        except ClientDisconnect:
            return _refuse(RequestError(499, "The client has gone"))  # nobody reads it
        except Exception as error:
            # Only the place: the message of an error may quote the request.
            _log.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
            return _send(b'{"error": "Internal error"}', 500)

    async def app(scope, receive, send):
        response = await respond(Request(scope, receive))
        await response(scope, receive, send)

    return app


def _send(body, status=200, headers=None):
    return Response(body, status, headers, media_type="application/json")


def _refuse(error, allowed=None):
    headers = {"Retry-After": "1"} if error.status == 429 else {"Allow": allowed} if allowed else {}
    if error.status in (408, 413, 429):
        headers["Connection"] = "close"  # the rest of the body is not read
    return _send(json.dumps({"error": str(error)}).encode(), error.status, headers)


def _describe(model, name):
    """Returns TensorFlow Serving's description of a model's signatures, as plain values."""
    from google.protobuf.json_format import MessageToDict
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    written = SavedModel.FromString((model.folder / "saved_model.pb").read_bytes())
    signatures = {
        key: MessageToDict(signature, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        for key, signature in written.meta_graphs[0].signature_def.items()
    }
    return {
        "model_spec": {"name": name, "signature_name": "", "version": VERSION},
        "metadata": {"signature_def": {"signature_def": signatures}},
    }


def parse_arguments():
    """Returns the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/densenet121/saved_model", help="folder of the SavedModel")
    parser.add_argument("--sha256", help="the hash that the model must have")
    parser.add_argument("--name", help="the model's name in addresses (default: that of the run's folder)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8501)
    parser.add_argument("--max-megabytes", type=int, default=32, help="largest body of a request")
    parser.add_argument("--max-images", type=int, default=Limits().max_images, help="most images in a request")
    parser.add_argument("--waiting", type=int, default=16, help="requests that may wait")
    parser.add_argument("--body-seconds", type=float, default=30, help="time to send a body")
    return parser.parse_args()


def check_address(host, port):
    """Raises OSError or OverflowError unless a server can listen there."""
    family, *_, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    socket.create_server((address[0], port), family=family).close()


def main():
    """Loads the model, runs it once, and serves it until it is interrupted."""
    from helpers.export import ExportedModel

    arguments = parse_arguments()
    folder = Path(arguments.model).resolve()
    name = arguments.name or (folder.parent.name if folder.name == "saved_model" else folder.name)
    if not re.fullmatch(r"[\w.-]+", name):
        sys.exit(f"{name!r} cannot be part of an address. Give the model another name with --name.")
    try:  # before the model, which takes seconds
        check_address(arguments.host, arguments.port)
    except (OSError, OverflowError) as error:
        sys.exit(f"Cannot listen on {arguments.host}, port {arguments.port}: {error}. Try make serve PORT=8502.")
    try:
        model = ExportedModel(folder, arguments.sha256)
    except (OSError, ValueError) as error:
        sys.exit(f"{error}\n`make run` trains a model and exports one to models/densenet121/saved_model.")
    model.predict_pixels([[[[0.0]] * 64] * 64])  # the first call is slow
    limits = Limits(max_bytes=arguments.max_megabytes * 2**20, max_images=arguments.max_images)
    app = make_app(model, name, limits=limits, waiting=arguments.waiting, body_seconds=arguments.body_seconds)
    reach = "this machine only" if arguments.host in ("127.0.0.1", "::1", "localhost") else "THE NETWORK, to anybody"
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    print(f"Serving on http://{host}:{arguments.port}/v1/models/{name}:predict, to {reach}.", flush=True)
    print(model.facts["notice"], flush=True)
    # Always h11, so that limits do not depend on what is installed. The access log would record requests.
    uvicorn.run(
        app, host=arguments.host, port=arguments.port, http=Protocol, ws="none", lifespan="off", access_log=False,
        log_level="error", server_header=False, timeout_keep_alive=_KEPT_SECONDS,
    )  # fmt: skip


if __name__ == "__main__":
    main()
