"""A web server on this machine that serves files from memory, with ranges, and fails as a test wants it to."""

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FaultyServer(ThreadingHTTPServer):
    """Serves `files`, path to bytes; `faults`, path to a list of functions of the handler, are used up one a request.

    `asked` is the list of (path, Range, If-Range) of all requests, `agents` the set of their user agents.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.faults, self.etags, self.asked, self.agents = {}, {}, {}, [], set()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        super().__exit__(*error)

    def handle_error(self, request, client_address):
        pass  # clients that hang up are part of the tests


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        path = self.path
        self.server.asked.append((path, self.headers.get("Range"), self.headers.get("If-Range")))
        self.server.agents.add(self.headers.get("User-Agent"))
        faults = self.server.faults.get(path)
        if faults:
            return faults.pop(0)(self)
        return self.serve()

    def serve(self, cut=None, shift=0, ignore_range=False, no_length=False, kind="application/octet-stream"):
        """Sends the file or the range asked for, hanging up after `cut` bytes."""
        data = self.server.files.get(self.path)
        if data is None:
            return self.answer(404, b"<html>no</html>", kind="text/html")
        etag = self.server.etags.get(self.path, '"1"')
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        headers = {"ETag": etag} if etag else {}
        status = 200
        if match and not ignore_range and self.headers.get("If-Range") in (None, etag):
            start = int(match[1])
            if start >= len(data):
                return self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            status, total = 206, len(data)
            data = data[start:]
            headers["Content-Range"] = f"bytes {start + shift}-{total - 1}/{total}"
        self.answer(status, data, headers, cut, no_length, kind)

    def answer(self, status, data, headers=None, cut=None, no_length=False, kind="application/octet-stream"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Transfer-Encoding", "chunked") if no_length else self.send_header("Content-Length", len(data))
        self.end_headers()
        if no_length:
            for start in range(0, len(data), 1000):
                if cut is not None and start >= cut:
                    break
                block = data[start : start + 1000]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(block), block))
            else:
                self.wfile.write(b"0\r\n\r\n")
        else:
            self.wfile.write(data[:cut])
        if cut is not None:
            self.close_connection = True


def cut_after(n, **options):
    return lambda handler: handler.serve(cut=n, **options)


def answer(status, data=b"busy", **options):
    return lambda handler: handler.answer(status, data, **options)


def serve(**options):
    return lambda handler: handler.serve(**options)
