"""A bucket to test with: an emulator of Google Cloud Storage, which TensorFlow uses like the real one.

TensorFlow's file system has Google's addresses built in, but respects the environment's proxies and certificates. So
a proxy on this machine answers for www.googleapis.com and storage.googleapis.com, with a certificate made for the
test, and passes every request to gcp-storage-emulator.
"""

import contextlib
import functools
import http.server
import shutil
import ssl
import subprocess
import threading

HOSTS = ("www.googleapis.com", "storage.googleapis.com")


def _make_certificate(folder):
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=emulator"]
    command += ["-addext", "subjectAltName=" + ",".join(f"DNS:{host}" for host in HOSTS)]
    command += ["-keyout", folder / "key.pem", "-out", folder / "certificate.pem"]
    subprocess.run(command, check=True, capture_output=True)


def why_not():
    """Returns why there can be no bucket here, "" if there can."""
    try:
        import gcp_storage_emulator  # noqa: F401
    except ImportError:
        return "needs gcp-storage-emulator, see requirements/dev.txt"
    return "" if shutil.which("openssl") else "needs openssl to make a certificate"


@contextlib.contextmanager
def serve_bucket(folder, name="bucket"):
    """Serves an empty bucket from this process, in memory.

    Args:
        folder: pathlib.Path of an existing folder for the certificate.
        name: of the bucket.

    Yields:
        A dict of the environment variables that direct TensorFlow there, and the list of requests so far, pairs of
        method and address, which grows.
    """
    import gcp_storage_emulator.server as emulator

    _make_certificate(folder)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    requests, one_at_a_time = [], threading.Lock()  # the emulator's storage is made for one thread

    class Proxy(emulator.RequestHandler):
        protocol_version = "HTTP/1.1"  # with 1.0, every upload would wait a second

        def do_CONNECT(self):
            self.send_response(200)
            self.end_headers()
            self.connection = tls.wrap_socket(self.connection, server_side=True)
            self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", 0)
            self.handle_one_request()
            self.close_connection = True

        def parse_request(self):
            is_whole = super().parse_request()
            if is_whole and self.command != "CONNECT":
                # The emulator continues an upload at an http address, and so it comes here whole.
                self.path = "/" + self.path.removeprefix("http://").partition("/")[2]
                if "Transfer-Encoding" in self.headers:  # it counts where both are given, but not for the emulator
                    del self.headers["Content-Length"]
                requests.append((self.command, self.path))
            return is_whole

        def finish(self):
            super().finish()
            self.connection.close()

    for method in ("GET", "POST", "PUT", "DELETE"):

        def handle(self, respond=getattr(emulator.RequestHandler, f"do_{method}")):
            with one_at_a_time:
                respond(self)

        setattr(Proxy, f"do_{method}", handle)

    read = emulator._read_data

    def read_data(handler, query):
        """Also accepts an empty upload, with which TensorFlow marks a folder and on which the emulator fails."""
        data = read(handler, query)
        return b"" if data is None and query.get("uploadType") == ["media"] else data

    storage = emulator.create_server("localhost", 0, in_memory=True, default_bucket=name)._storage
    server = http.server.ThreadingHTTPServer(("localhost", 0), functools.partial(Proxy, storage))
    server.daemon_threads = True
    emulator._read_data = read_data
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://localhost:{server.server_address[1]}"
    environment = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), address)
    environment |= {"no_proxy": "", "NO_PROXY": "", "CURL_CA_BUNDLE": str(folder / "certificate.pem")}
    # No credentials are sought: the emulator asks for none.
    environment |= {"NO_GCE_CHECK": "true", "GOOGLE_APPLICATION_CREDENTIALS": "", "CLOUDSDK_CONFIG": str(folder)}
    try:
        yield environment, requests
    finally:
        emulator._read_data = read
        server.shutdown()
        thread.join()
        server.server_close()
