"""What does HTTP cost? Latency, images per second and memory of `make serve`, compared with the model in this process.

Requests of one image of 1024 pixels, of batches of 32, and of 8 clients at a time, all through HTTP and JSON to
`serve/app.py` on this machine; then 1,000 requests while the server's memory is recorded. The synthetic image is a PNG
of 8 bits. Rounds alternate between server and process, so that other load on the machine affects both.

Usage: serving.py [--model models/densenet121/saved_model] [--requests 40]
"""

import argparse
import base64
import io
import json
import os
import platform
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))

import httpx
import numpy as np
import psutil
import tensorflow as tf
from PIL import Image

from helpers.export import ExportedModel
from helpers.study import draw_image

BATCH, CLIENTS, MEMORY_REQUESTS = 32, 8, 1000


def encode(seed):
    """Returns a synthetic image of 1024 pixels as a PNG."""
    file = io.BytesIO()
    Image.fromarray(draw_image(seed, ["Effusion"], size=1024)[0]).save(file, "PNG")
    return file.getvalue()


def write_request(images):
    """Returns the body of a request with these images."""
    return json.dumps({"instances": [{"b64": base64.b64encode(image).decode()} for image in images]}).encode()


def start_server(folder):
    """Starts the server on a free port; returns its process and the address for requests, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "serve" / "app.py", "--model", folder, "--name", "model", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/v1/models/model"
    while process.poll() is None:
        try:
            httpx.get(url)
            return process, url + ":predict"
        except httpx.TransportError:
            time.sleep(0.2)
    sys.exit("The server did not start.")


def time_call(function, *arguments):
    """Returns the seconds that a call takes."""
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def summarize(seconds):
    """Returns p50 and p95 in milliseconds."""
    p50, p95 = np.percentile(seconds, [50, 95]) * 1e3
    return {"p50_ms": round(p50, 2), "p95_ms": round(p95, 2)}


def measure(model, process, url, n_requests):
    """Returns all results as a dict."""
    images = [encode(seed) for seed in range(4)]
    one, many = write_request(images[:1]), write_request((images * BATCH)[:BATCH])
    with httpx.Client(timeout=600) as client:

        def ask(body):
            client.post(url, content=body).raise_for_status()

        for _ in range(3):
            ask(one), model.predict(images[:1])
        pairs = [(time_call(ask, one), time_call(model.predict, images[:1])) for _ in range(n_requests)]
        over_http, direct = np.transpose(pairs)
        ask(many), model.predict((images * BATCH)[:BATCH])
        batches = [(time_call(ask, many), time_call(model.predict, (images * BATCH)[:BATCH])) for _ in range(4)]
        batch_http, batch_direct = np.median(batches, axis=0)
        with ThreadPoolExecutor(CLIENTS) as pool:
            crowd = time_call(lambda: list(pool.map(ask, [one] * n_requests)))

        watched = psutil.Process(process.pid)
        for _ in range(100):
            ask(one)
        memory = [watched.memory_info().rss]
        for number in range(MEMORY_REQUESTS):
            ask(one)
            if number % 100 == 99:
                memory.append(watched.memory_info().rss)
    return {
        "image": f"PNG, 1024 x 1024, {len(images[0]):,} bytes",
        "requests": n_requests,
        "one_image": {
            "http": summarize(over_http),
            "in_process": summarize(direct),
            "ratio_of_p50": round(float(np.median(over_http) / np.median(direct)), 3),
        },
        f"images_per_second_in_batches_of_{BATCH}": {
            "http": round(BATCH / batch_http, 1),
            "in_process": round(BATCH / batch_direct, 1),
        },
        f"images_per_second_of_{CLIENTS}_clients": round(n_requests / crowd, 1),
        "memory": {
            "requests": MEMORY_REQUESTS,
            "mib_before": round(memory[0] / 2**20, 1),
            "mib_after": round(memory[-1] / 2**20, 1),
            "mib_every_100": [round(value / 2**20, 1) for value in memory],
        },
    }


def main():
    """Measures, prints, and writes benchmarks/results/serving.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=ROOT / "models" / "densenet121" / "saved_model", type=Path)
    parser.add_argument("--requests", default=40, type=int, help="single requests measured")
    arguments = parser.parse_args()
    if not (arguments.model / "saved_model.pb").is_file():
        sys.exit(f"{arguments.model} holds no SavedModel. `make run` exports one, or give another by --model.")
    process, url = start_server(arguments.model.resolve())
    try:
        model = ExportedModel(arguments.model)
        results = measure(model, process, url, arguments.requests)
    finally:
        process.terminate()
    machine = {"machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"}
    machine |= {"tensorflow": tf.__version__, "side": model.facts["side"], "weights": model.facts["weights_sha256"]}
    text = json.dumps(machine | results, indent=1)
    print(text)
    (ROOT / "benchmarks" / "results" / "serving.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
