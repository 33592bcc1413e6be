"""Stands in for the Hugging Face Hub on this machine, as far as an upload of small files needs it."""

import base64
import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def serve_hub(token):
    """Gives a server with `url` and `files`, a dict from the path of an uploaded file to its bytes.

    Args:
        token: the only one that may write; others get status 401.
    """

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Authorization") != f"Bearer {token}":
                return self.answer({"error": "Invalid username or password."}, 401)
            if self.path.endswith("/preupload/main"):
                files = [
                    entry | {"uploadMode": "regular", "shouldIgnore": False} for entry in json.loads(body)["files"]
                ]
                return self.answer({"files": files})
            if self.path.endswith("/commit/main"):
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                return self.answer({"commitUrl": f"{server.url}/ada/model/commit/1", "commitOid": "1"})
            return self.answer({"url": f"{server.url}/ada/model", "errors": [], "warnings": []})

        def do_GET(self):
            self.answer({"sha": "0", "id": "ada/model"})

        def answer(self, content, status=200):
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.files = f"http://127.0.0.1:{server.server_address[1]}", {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
