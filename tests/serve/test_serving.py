import base64
import contextlib
import io
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import pytest
from made_images import encode, make_png
from PIL import Image
from serve.rest import Limits, RequestError, answer_predict

from helpers.study import draw_image

httpx = pytest.importorskip("httpx", reason="needs httpx: pip install -r requirements/dev.txt")
pytest.importorskip("uvicorn", reason="needs uvicorn: pip install -r requirements/serve.txt")
psutil = pytest.importorskip("psutil")

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
MAX_BYTES, MAX_IMAGES, BODY_SECONDS = 4 * 2**20, 8, 2
DOCS = (ROOT / "docs" / "serving.md").read_text()


def draw_file(seed, size=128, kind="PNG"):
    return encode(draw_image(seed, ["Cardiomegaly"] if seed % 2 else [], size=size)[0], kind)


IMAGES = [draw_file(1), draw_file(2), draw_file(3, size=200, kind="JPEG")]


def b64(data):
    return {"b64": base64.b64encode(data).decode()}


ROWS = {"instances": [b64(image) for image in IMAGES]}


class Server:
    def __init__(self, folder, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, ROOT / "serve" / "app.py", "--model", folder, "--port", str(self.port)]
        command += ["--max-megabytes", "4", "--max-images", str(MAX_IMAGES), "--waiting", "4"]
        self.log = log
        with open(log, "wb") as file:
            # Another folder than the repository's: paths must not depend on it.
            self.process = subprocess.Popen(
                [*command, "--body-seconds", str(BODY_SECONDS)],
                stdout=file,
                stderr=file,
                cwd=log.parent,
                # As `make` sets the first; the second belongs to trainings and may name what is not installed.
                env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2", "KERAS_BACKEND": "none"},
            )
        self.base = f"http://127.0.0.1:{self.port}/v1/models/tiny"
        self.client = httpx.Client(timeout=60)
        for _ in range(1200):
            try:
                self.client.get(self.base)
                return
            except httpx.ConnectError:
                assert self.process.poll() is None, log.read_text()
                time.sleep(0.1)
        raise AssertionError(log.read_text())

    def ask(self, content, path=":predict", **options):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        return self.client.post(self.base + path, content=content, **options)

    def send_raw(self, data, *, read=True, half_closed=False):
        """Sends bytes that no HTTP client would, and returns what comes back until the server hangs up."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as link:
            link.sendall(data)
            if half_closed:
                link.shutdown(socket.SHUT_WR)
            answer = b""
            with contextlib.suppress(ConnectionResetError):  # it need not read what it has refused
                while read and (part := link.recv(65536)):
                    answer += part
            return answer


@pytest.fixture(scope="module")
def server(tiny_run, tmp_path_factory):
    server = Server(tiny_run / "saved_model", tmp_path_factory.mktemp("server") / "log.txt")
    yield server
    server.client.close()
    server.process.terminate()
    assert server.process.wait(20) is not None


@pytest.fixture(scope="module")
def expected(tiny_model):
    return tiny_model.predict(IMAGES)


def assert_refused(answer, status, part):
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json()) == ["error"]
    assert part in answer.json()["error"]
    assert len(answer.text) < 600


# The contract


@pytest.mark.parametrize(
    "items",
    [ROWS["instances"], [{"image_bytes": item} for item in ROWS["instances"]]],
    ids=["plain", "named"],
)
@pytest.mark.parametrize("extra", [{}, {"signature_name": "serving_default"}, {"signature_name": "", "other": None}])
def test_rows_are_answered_by_an_object_for_each_image(server, expected, items, extra):
    answer = server.ask({"instances": items} | extra)
    assert answer.status_code == 200
    predictions = answer.json()["predictions"]
    assert len(predictions) == len(IMAGES)
    for number, prediction in enumerate(predictions):
        assert prediction.keys() == expected.keys()
        for name, values in expected.items():
            if values.dtype == "float32":
                np.testing.assert_allclose(prediction[name], values[number], rtol=1e-5)
            else:
                assert prediction[name] == values[number].tolist()


@pytest.mark.parametrize("inputs", [ROWS["instances"], {"image_bytes": ROWS["instances"]}], ids=["plain", "named"])
def test_columns_are_answered_by_a_list_for_each_output(server, expected, inputs):
    answer = server.ask({"inputs": inputs}, "/versions/1:predict")
    assert answer.status_code == 200
    outputs = answer.json()["outputs"]
    assert outputs.keys() == expected.keys()
    np.testing.assert_allclose(outputs["probabilities"], expected["probabilities"], rtol=1e-5)
    assert outputs["top5_label"] == expected["top5_label"].tolist()


def test_images_that_are_no_upright_chest_are_warned_of(server):
    """Beside the predictions, a list for each image, and nothing at all where every image is ordinary."""
    upside_down = io.BytesIO()
    Image.open(io.BytesIO(IMAGES[1])).rotate(180).save(upside_down, "PNG")
    mixed = server.ask({"instances": [b64(IMAGES[1]), b64(upside_down.getvalue())]}).json()
    assert len(mixed["predictions"]) == 2 and mixed["warnings"][0] == []
    assert any("upside" in reason or "turn" in reason for reason in mixed["warnings"][1])
    assert "warnings" not in server.ask(ROWS).json()
    assert "warnings" in server.ask({"inputs": [b64(upside_down.getvalue())], "signature_name": "explain"}).json()


def test_numbers_have_the_digits_that_they_need(server):
    text = server.ask(ROWS).text
    assert max(map(len, re.findall(r"\d\.\d+", text))) <= 13


def test_the_explain_signature(server, tiny_model):
    expected = tiny_model.explain(IMAGES)
    predictions = server.ask(ROWS | {"signature_name": "explain"}).json()["predictions"]
    for name in ("maps", "heatmaps"):
        np.testing.assert_allclose([row[name] for row in predictions], expected[name], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal([row["films"] for row in predictions], expected["films"])


def test_the_pixels_signature(server, tiny_model):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 30, 1))
    expected = tiny_model.predict_pixels(pixels)["probabilities"]
    for form in ({"instances": pixels.tolist()}, {"inputs": {"pixels": (pixels / 1.0).tolist()}}):
        answer = server.ask(form | {"signature_name": "pixels"}).json()
        rows = answer.get("predictions") or [{"probabilities": row} for row in answer["outputs"]["probabilities"]]
        np.testing.assert_allclose([row["probabilities"] for row in rows], expected, rtol=1e-5)


def test_the_metadata_signature(server, tiny_model):
    outputs = server.ask({"signature_name": "metadata", "inputs": {}}).json()["outputs"]
    assert outputs["class_names"] == tiny_model.facts["class_names"]
    assert outputs["side"] == 64 and outputs["synthetic"] is True
    assert outputs["raw_thresholds"][0] == 0.3  # not 0.30000001192092896
    np.testing.assert_array_equal(np.float32(outputs["prevalence"]), np.float32(tiny_model.facts["prevalence"]))
    assert_refused(server.ask({"signature_name": "metadata", "instances": [1]}), 400, "no inputs")


def test_status_and_metadata(server):
    for path in ("", "/versions/1"):
        status = {"error_code": "OK", "error_message": ""}
        expected = {"model_version_status": [{"version": "1", "state": "AVAILABLE", "status": status}]}
        assert server.client.get(server.base + path).json() == expected
    for path in ("/metadata", "/versions/1/metadata"):
        answer = server.client.get(server.base + path).json()
        assert answer["model_spec"] == {"name": "tiny", "signature_name": "", "version": "1"}
        signatures = answer["metadata"]["signature_def"]["signature_def"]
        assert {"serving_default", "explain", "pixels", "metadata"} <= signatures.keys()
        given = signatures["serving_default"]
        assert given["method_name"] == "tensorflow/serving/predict"
        assert given["inputs"]["image_bytes"]["dtype"] == "DT_STRING"
        shape = given["inputs"]["image_bytes"]["tensor_shape"]
        assert shape == {"dim": [{"size": "-1", "name": ""}], "unknown_rank": False}


def run_documented(kind, server, folder):
    """Runs the first block of a kind in docs/serving.md that asks for a prediction, at the test's server."""
    blocks = re.findall(rf"```{kind}\n(.*?)```", DOCS, re.DOTALL)
    (block,) = [block for block in blocks if ":predict" in block and "docker" not in block]
    (folder / "image.png").write_bytes(IMAGES[0])
    block = block.replace("http://127.0.0.1:8501/v1/models/densenet121", server.base)
    command = {"sh": ["bash", "-c"], "python": [sys.executable, "-c"]}[kind]
    return subprocess.run([*command, block], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_the_documented_curl_command(server, expected, tmp_path):
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    answer = json.loads(run_documented("sh", server, tmp_path))
    assert answer["predictions"][0]["top5_label"] == expected["top5_label"][0].tolist()


def test_the_documented_program(server, expected, tmp_path):
    printed = run_documented("python", server, tmp_path)
    assert printed.split()[::2] == expected["top5_label"][0].tolist()


def test_the_documented_answer_has_the_outputs_of_the_model(expected):
    (block,) = [block for block in re.findall(r"```json\n(.*?)```", DOCS, re.DOTALL) if "predictions" in block]
    assert json.loads(block)["predictions"][0].keys() == expected.keys()


# What is refused

MALFORMED = {
    "nothing": (b"", "JSON Parse error"),
    "text": (b"image.png", "JSON Parse error"),
    "bytes": (IMAGES[0], 'Send {"instances"'),
    "a form": (
        b"--x\r\nContent-Disposition: form-data; name=image\r\n\r\n" + IMAGES[0] + b"\r\n--x--",
        "JSON Parse error",
    ),
    "JSON twice": (json.dumps(json.dumps(ROWS)).encode(), "encode it once"),
    "cut": (json.dumps(ROWS).encode()[:-9], "JSON Parse error"),
    "deep lists": (b'{"instances": ' + 100_000 * b"[", "nested too deeply"),
    "deep objects": (b'{"a":' * 100_000, "nested too deeply"),
    "no object": (b"[]", "not a JSON object"),
    "no input": ({}, "Expecting one of"),
    "both": (ROWS | {"inputs": ROWS["instances"]}, "not both"),
    "signature": (ROWS | {"signature_name": "classify"}, "not found in signature def"),
    "signature's type": (ROWS | {"signature_name": 7}, "must be a string"),
    "rows are an object": ({"instances": b64(IMAGES[0])}, "to be a list/array"),
    "no rows": ({"instances": []}, "No values"),
    "no column": ({"inputs": []}, "No values"),
    "a scalar": ({"inputs": b64(IMAGES[0])}, "first dimension is the batch"),
    "another input": ({"inputs": {"image": ROWS["instances"]}}, "Missing named input: image_bytes"),
    "another key": ({"instances": [{"image": b64(IMAGES[0])}]}, "must only have keys: image_bytes"),
    "a mix": ({"instances": [b64(IMAGES[0]), {"image_bytes": b64(IMAGES[0])}]}, "mix"),
    "nested images": ({"instances": [[b64(IMAGES[0])]]}, "item 0"),
    "null": ({"instances": [None]}, "item 0"),
    "base64": ({"instances": [b64(IMAGES[0]), {"b64": "!!!!"}]}, "item 1 (from 0): Unable to base64 decode"),
    "base64 with a prefix": (
        {"instances": [{"b64": "data:image/png;base64," + b64(IMAGES[0])["b64"]}]},
        "without a prefix",
    ),
    "base64 for addresses": ({"instances": [{"b64": "-_" + b64(IMAGES[0])["b64"]}]}, "standard alphabet"),
    "base64 of letters": ({"instances": [{"b64": "é"}]}, "Unable to base64 decode"),
    "one character": ({"instances": [{"b64": "A"}]}, "Unable to base64 decode"),
    "text as image": ({"instances": [base64.b64encode(IMAGES[0]).decode()]}, 'Send {"b64"'),
    "half a character": (b'{"instances": ["\\ud800"]}', "neither PNG nor JPEG"),
    "no image": ({"instances": [b64(IMAGES[0]), b64(b"GIF89a" + bytes(90))]}, "item 1 (from 0): neither PNG nor JPEG"),
    "empty image": ({"instances": [b64(b"")]}, "item 0 (from 0): empty file"),
    "cut images": (
        {"instances": [b64(data) for data in (IMAGES[0], IMAGES[1][:-80], IMAGES[2], IMAGES[0][:-1])]},
        "1, 3",
    ),
    "bomb": ({"instances": [b64(make_png(20_000, 20_000, raw=b""))]}, "item 0 (from 0): declares"),
    "tiny": ({"instances": [b64(draw_file(1, 64)), b64(make_png(3, 300))]}, "item 1 (from 0): 3 x 300"),
    "not UTF-8": (b'{"instances": ["\xff"]}', "JSON Parse error"),
    "many digits": (b'{"instances": [' + b"9" * 5000 + b"]}", "JSON Parse error"),
    "no pixels": ({"signature_name": "pixels", "instances": [[]]}, "pixels: "),
    "ragged": ({"signature_name": "pixels", "inputs": [[[[1]], [[1], [1]]]]}, "one shape"),
    "colors": ({"signature_name": "pixels", "inputs": np.ones((1, 20, 20, 3)).tolist()}, "(1, 20, 20, 3)"),
    "low pixels": ({"signature_name": "pixels", "inputs": np.ones((1, 20, 8, 1)).tolist()}, "sides from 16"),
    "text pixels": ({"signature_name": "pixels", "inputs": [[[["1"]] * 16] * 16]}, "expected type: float"),
    "true pixels": ({"signature_name": "pixels", "inputs": [[[[True]] * 16] * 16]}, "expected type: float"),
    "huge pixels": ({"signature_name": "pixels", "inputs": [[[[1e39]] * 16] * 16]}, "loss of precision"),
    "huger pixels": ({"signature_name": "pixels", "inputs": [[[[10**400]] * 16] * 16]}, "loss of precision"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_malformed_is_refused_with_a_reason(server, name):
    body, part = MALFORMED[name]
    assert_refused(server.ask(body), 400, part)


def test_what_is_too_much_is_refused(server):
    image = b64(IMAGES[0])
    assert_refused(server.ask({"instances": [image] * (MAX_IMAGES + 1)}), 413, f"at most {MAX_IMAGES}")
    large = b64(make_png(5700, 5700, raw=b""))
    assert_refused(server.ask({"instances": [large] * 5}), 413, "pixels in all")


def test_a_large_body_is_refused_with_its_length_without_and_with_a_false_one(server):
    assert_refused(server.ask(b" " * (MAX_BYTES + 1)), 413, "larger than")
    chunks = (bytes(2**16) for _ in range(MAX_BYTES // 2**16 + 1))
    assert_refused(server.client.post(server.base + ":predict", content=chunks), 413, "larger than")
    with pytest.raises(HTTPError) as refused:  # a client that reads no answer before it has sent all
        urlopen(server.base + ":predict", b" " * (7 * MAX_BYTES))
    assert refused.value.code == 413 and b"larger than" in refused.value.read()
    head = b"POST /v1/models/tiny:predict HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    for length in (b"99999999999999999999999", b"-1", b"1e3", b"7, 8"):
        answer = server.send_raw(head + b"Content-Length: " + length + b"\r\n\r\n{}")
        assert re.match(rb"HTTP/1.1 4\d\d ", answer), answer
    shorter = server.send_raw(head + b"Content-Length: 2\r\n\r\n" + json.dumps(ROWS).encode())
    assert shorter.startswith(b"HTTP/1.1 400 ") and b"JSON Parse error" in shorter


def test_a_body_that_does_not_arrive_times_out(server):
    began = time.monotonic()
    head = b"POST /v1/models/tiny:predict HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{"
    assert server.send_raw(head).startswith(b"HTTP/1.1 408 ")
    assert BODY_SECONDS <= time.monotonic() - began < BODY_SECONDS + 10


def test_bodies_are_taken_as_they_are(server):
    assert server.ask(b"\xef\xbb\xbf" + json.dumps(ROWS).encode()).status_code == 200
    spaced = base64.encodebytes(IMAGES[0]).decode().rstrip("=\n")
    assert server.ask({"instances": [{"b64": spaced}]}).status_code == 200
    assert_refused(server.ask(ROWS, headers={"Content-Encoding": "gzip"}), 415, "Content-Encoding")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/models/other:predict", 404),
        ("POST", "/v1/models/tiny/versions/2:predict", 404),
        ("POST", f"/v1/models/tiny/versions/{'9' * 5000}:predict", 400),
        ("POST", "/v1/models/tiny/labels/stable:predict", 400),
        ("POST", "/v1/models/tiny:classify", 400),
        ("POST", "/v1/models/tiny:explain", 400),
        ("POST", "/v1/models/tiny/../../etc:predict", 400),
        ("POST", "/v1/models/%00%ff:predict", 404),
        ("POST", "/predict", 404),
        ("GET", "/v1/models", 400),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/models/other/metadata", 404),
        ("GET", "/", 404),
        ("GET", "/docs", 404),
        ("GET", "/v1/models/tiny:predict", 405),
        ("PUT", "/v1/models/tiny:predict", 405),
        ("DELETE", "/v1/models/tiny", 405),
        ("POST", "/v1/models/tiny/metadata", 405),
        ("OPTIONS", "/v1/models/tiny:predict", 405),
    ],
)
def test_addresses(server, method, path, status):
    answer = server.client.request(method, f"http://127.0.0.1:{server.port}{path}")
    assert_refused(answer, status, "")
    assert ("allow" in answer.headers) == (status == 405)


def test_the_state_is_answered_to_probes_that_ask_for_the_headers_only(server):
    answer = server.client.head(server.base)
    assert answer.status_code == 200 and answer.content == b""
    assert answer.headers["content-length"] == str(len(server.client.get(server.base).content))
    assert_refused(server.client.post(server.base), 405, "use GET")


def test_a_client_that_closes_its_half_of_the_connection_gets_its_answer(server):
    """As `nc -N` and proxies do. One that hangs up within its body leaves no place occupied, see below."""
    body = json.dumps(ROWS).encode()
    head = b"POST /v1/models/tiny:predict HTTP/1.%d\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
    for version in (0, 1):
        answer = server.send_raw(head % (version, len(body)) + body, half_closed=True)
        assert answer.startswith(b"HTTP/1.1 200 ") and json.loads(answer.partition(b"\r\n\r\n")[2])["predictions"]
    began = time.monotonic()
    assert server.send_raw(head % (1, len(body)) + body[:-9], half_closed=True) == b""
    assert time.monotonic() - began < 1


def test_strange_requests_are_refused_in_json(server):
    for line in (b"BREW /v1/models/tiny", b"GET http://127.0.0.1/v1/models/tiny", b"OPTIONS *"):
        answer = server.send_raw(line + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 4") and b'{"error": "' in answer, answer


def test_random_requests_get_200_or_4xx(server):
    rng = random.Random(0)
    leaves = [None, True, 0, -1.5, 1e39, float("nan"), "", "b64", "\ud800", b64(IMAGES[0]), {"b64": 3}, {"b64": "AAAA"}]
    keys = ["instances", "inputs", "signature_name", "image_bytes", "pixels", "b64", ""]

    def draw(depth):
        kind = rng.random()
        if depth == 0 or kind < 0.3:
            return rng.choice(leaves)
        if kind < 0.6:
            return [draw(depth - 1) for _ in range(rng.randrange(4))]
        return {rng.choice(keys): draw(depth - 1) for _ in range(rng.randrange(3))}

    statuses = []
    for number in range(200):
        signature = rng.choice(["serving_default", "explain", "pixels", "metadata", ""])
        body = {"signature_name": signature, rng.choice(["instances", "inputs"]): draw(rng.randrange(1, 6))}
        if number % 3 == 0:
            data = bytearray(json.dumps(ROWS).encode())
            for place in rng.choices(range(60 if number % 2 else len(data)), k=3):
                data[place] = rng.randrange(256)
            body = bytes(data[: rng.choice([None, -1, 100])])
        answer = server.ask(body)
        statuses.append(answer.status_code)
        assert answer.status_code == 200 or 400 <= answer.status_code < 500, (body, answer.text)
    assert statuses.count(200) >= 3 and statuses.count(400) > 60


# Many at a time, and for long


def test_many_clients_at_a_time_are_answered_or_have_to_wait(server, expected):
    with ThreadPoolExecutor(32) as pool, httpx.Client(timeout=60, limits=httpx.Limits(max_connections=None)) as client:
        bodies = [json.dumps({"instances": [b64(IMAGES[number % 3])] * 4}) for number in range(96)]
        barrier = threading.Barrier(32)

        def ask(number):
            if number < 32:
                barrier.wait()
            return client.post(server.base + ":predict", content=bodies[number])

        answers = list(pool.map(ask, range(96)))
    assert {answer.status_code for answer in answers} == {200, 429}
    for number, answer in enumerate(answers):
        if answer.status_code == 429:
            assert answer.headers["retry-after"] == "1"
            assert "Too many requests" in answer.json()["error"]
        else:  # no answer is another client's
            labels = [row["top5_label"] for row in answer.json()["predictions"]]
            assert labels == [expected["top5_label"][number % 3].tolist()] * 4
    assert server.ask(ROWS).status_code == 200


def test_clients_that_hang_up_leave_nothing_behind(server):
    body = json.dumps(ROWS).encode()
    head = b"POST /v1/models/tiny:predict HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
    for _ in range(20):  # more than may wait, so that places which are not given back would be missed
        server.send_raw(head + body[:100], read=False)
        server.send_raw(head + body, read=False)
    deadline = time.monotonic() + 20
    while server.ask(ROWS).status_code == 429 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.ask(ROWS).status_code == 200


def test_memory_stays_flat_over_many_requests(server):
    process = psutil.Process(server.process.pid)
    bodies = [json.dumps({"instances": [b64(image)]}).encode() for image in IMAGES]
    bodies += [json.dumps({"instances": [b64(IMAGES[0][:-9])]}).encode(), b"{"]

    def ask_often(n):
        for number in range(n):
            status = server.ask(bodies[number % len(bodies)]).status_code
            assert status == (200 if number % len(bodies) < 3 else 400)
        return process.memory_info().rss

    before = ask_often(150)
    assert ask_often(400) - before < 8 * 2**20  # 400 of these images have 10 MB, their answers as much


def test_at_the_end_the_process_lives_and_has_written_nothing_of_images(server):
    assert server.process.poll() is None
    # What TensorFlow writes while it starts differs from machine to machine, and comes before any image.
    before, mark, after = server.log.read_text().partition("Serving on ")
    assert mark and "Traceback" not in before
    lines = after.splitlines()
    assert len(lines) == 2, lines
    assert lines[0].endswith(f"{server.port}/v1/models/tiny:predict, to this machine only.")
    assert "not for clinical use" in lines[1]


# Without a server


@pytest.mark.parametrize("values", [b"0," * 1000, b"[],[]," * 500, b"{}" * 1000, b"[" * 1001])
def test_values_are_counted_before_the_json_is_parsed(values):
    with pytest.raises(RequestError, match="more than the 1,000 values allowed") as caught:
        answer_predict(Stub(), b'{"instances": ' + values, Limits(max_values=1000))
    assert caught.value.status == 413


class Stub:
    explain = predict_pixels = None

    def predict(self, images):
        return {"score": np.float32([[np.nan, np.inf, -np.inf, 0.1, 1]] * len(images))}


def test_nan_and_infinity_are_written_as_tensorflow_serving_writes_them():
    body = json.dumps({"instances": [b64(IMAGES[0])]}).encode()
    assert answer_predict(Stub(), body, Limits()) == b'{"predictions":[[NaN,Infinity,-Infinity,0.1,1.0]]}'


def test_an_error_of_the_program_is_not_an_error_of_the_request():
    class Broken(Stub):
        def predict(self, images):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        answer_predict(Broken(), json.dumps(ROWS).encode(), Limits())
    with pytest.raises(RequestError, match="at most 2"):
        answer_predict(Stub(), json.dumps(ROWS).encode(), Limits(max_images=2))


def test_an_error_of_the_program_is_logged_by_its_place_only(tiny_model, caplog):
    from serve.app import make_app
    from starlette.testclient import TestClient

    class Broken(Stub):
        folder = tiny_model.folder

        def predict(self, images):
            raise RuntimeError(images)

    answer = TestClient(make_app(Broken(), "tiny")).post("/v1/models/tiny:predict", json=ROWS)
    assert answer.status_code == 500 and answer.json() == {"error": "Internal error"}
    assert "RuntimeError" in caplog.text and "in predict" in caplog.text
    assert "PNG" not in caplog.text


def test_a_missing_model_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    from serve import app

    monkeypatch.setattr(sys, "argv", ["app.py", "--model", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"(?s)is missing.*make run"):
        app.main()


def start(monkeypatch, *options):
    """Runs the program with a model that does nothing; returns what uvicorn is told instead of serving."""
    from serve import app

    told = {}
    model = SimpleNamespace(predict_pixels=lambda pixels: None, facts={"notice": ""})
    monkeypatch.setattr("helpers.export.ExportedModel", lambda *given: model)
    monkeypatch.setattr(app, "make_app", lambda *given, **limits: None)
    monkeypatch.setattr(app.uvicorn, "run", lambda _, **given: told.update(given))
    monkeypatch.setattr(sys, "argv", ["app.py", *options])
    app.main()
    return told


def test_an_idle_connection_outlives_the_pools_of_clients(monkeypatch):
    """After uvicorn's own 5 seconds, the next request of a `requests.Session` met a closed connection."""
    assert start(monkeypatch, "--port", "0")["timeout_keep_alive"] > 60


def test_the_address_that_is_printed_can_be_asked(monkeypatch, capsys):
    start(monkeypatch, "--host", "::1", "--port", "0")
    assert "http://[::1]:0/v1" in capsys.readouterr().out


def test_a_port_that_is_taken_is_refused_before_the_model_is_said_to_be_served(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port, reason in ((taken.getsockname()[1], "in use"), (99999, "must be 0-65535")):
            with pytest.raises(SystemExit, match=rf"port {port}: .*{reason}.*make serve PORT="):
                start(monkeypatch, "--port", str(port))
    assert capsys.readouterr().out == ""
