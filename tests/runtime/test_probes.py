"""Chips and GPUs in folders that stand for a machine's devices, and probes in real processes."""

import http.server
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from helpers.runtime.probes import ask_metadata, find_reason, find_tpu_chips, probe, shows_gpu


def make_root(folder, *files, pci=()):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    for number, (vendor, device) in enumerate(pci):
        place = folder / "sys" / "bus" / "pci" / "devices" / f"0000:00:0{number}.0"
        place.mkdir(parents=True)
        (place / "vendor").write_text(vendor + "\n")
        (place / "device").write_text(device + "\n")
    return folder


@pytest.mark.parametrize(
    ("files", "pci", "n_chips"),
    [
        ([], [], 0),
        (["dev/accel0", "dev/accel1", "dev/accel2", "dev/accel3"], [], 4),
        (["dev/vfio/0", "dev/vfio/vfio"], [], 1),
        (["dev/vfio/vfio"], [], 0),  # the module is loaded, nothing uses it
        (["dev/accel/accel0"], [], 0),  # another maker's accelerator
        (["dev/vfio/0"], [("0x1ae0", "0x0063")] * 8, 8),
        ([], [("0x1ae0", "0x0042"), ("0x10de", "0x0063")], 0),  # Google's network card, another maker's number
    ],
)
def test_chips_are_counted_by_device_files_or_pci(tmp_path, files, pci, n_chips):
    assert find_tpu_chips(make_root(tmp_path, *files, pci=pci)) == n_chips


@pytest.mark.parametrize(("file", "shown"), [("dev/nvidia0", True), ("dev/kfd", True), ("dev/nvidiactl", False)])
def test_gpus_are_seen_by_their_device_files(tmp_path, file, shown):
    assert shows_gpu(make_root(tmp_path, file)) is shown


def test_a_probe_that_works_gives_its_last_line_and_sees_its_variables():
    code = 'import json, os; print("chatter"); print(json.dumps({"platform": os.environ["PLACE"], "devices": 8}))'
    assert probe(code, {"PLACE": "tpu"}) == ({"platform": "tpu", "devices": 8}, "")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os, sys; print('no symbol', file=sys.stderr, flush=True); os.abort()", "by SIGABRT: no symbol"),
        ("raise OSError('libtpu.so is missing')", "exit status 1: OSError: libtpu.so is missing"),
        ("print('garbage')", "it answered 'garbage"),
        ("print('{\"devices\": 1}')", "it answered"),
        ("pass", "it answered ''"),
    ],
)
def test_a_probe_that_fails_gives_a_reason_and_this_process_survives(code, reason):
    answer, text = probe(code)
    assert answer is None and reason in text


@pytest.mark.slow
def test_a_probe_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    note = tmp_path / "pid"
    code = f"""
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path({str(note)!r}).write_text(str(child.pid))
print("waiting for metadata", file=sys.stderr, flush=True)
time.sleep(600)
"""
    started = time.monotonic()
    answer, text = probe(code, limit=3)
    assert answer is None and text == "no answer within 3 s; last words: waiting for metadata"
    assert time.monotonic() - started < 20
    assert not is_running(int(note.read_text()))


@pytest.mark.slow
def test_a_probe_that_is_interrupted_leaves_nothing_running(tmp_path):
    """As by the stop button of a notebook."""
    note = tmp_path / "pid"
    inner = f"import os, pathlib, time; pathlib.Path({str(note)!r}).write_text(str(os.getpid())); time.sleep(600)"
    listen = (
        "signal.signal(signal.SIGINT, signal.default_int_handler)"  # which a job in the background inherits ignored
    )
    call = f"from helpers.runtime.probes import probe; probe({inner!r})"
    code = f"import signal, sys; {listen}; sys.path[:0] = {sys.path!r}; {call}"
    outer = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    outer.send_signal(signal.SIGINT)
    assert outer.wait(30) != 0
    assert not is_running(int(note.read_text()))


def is_running(pid):
    # A killed process without a parent stays in the table for a moment, as a zombie or not at all.
    for _ in range(50):
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return False
        except (ProcessLookupError, FileNotFoundError):
            return False
        time.sleep(0.1)
    return True


def test_the_reason_is_the_line_that_gives_it():
    abort = """2026-11-23 00:07:57.8: I tensorflow/core/util/port.cc:153] oneDNN custom operations are on.
2026-11-23 00:07:58.4: F external/xla/tpu_init_fns.inc:128] TpuExecutable_Free not available in this library.
Fatal Python error: Aborted

Thread 0x00007f0 (most recent call first):
  File "a.py", line 1 in <module>
"""
    assert find_reason(abort) == "TpuExecutable_Free not available in this library."
    trace = "Traceback (most recent call last):\n  File 'a'\na.b.NotFoundError: TPUs not found\n<none>\n\n [[op]]"
    assert find_reason(trace) == "NotFoundError: TPUs not found"
    assert find_reason("") == ""
    assert len(find_reason("ValueError: " + "very long " * 100)) <= 160


class Metadata(http.server.BaseHTTPRequestHandler):
    flavor = "Google"

    def do_GET(self):
        self.send_response(200)
        self.send_header("Metadata-Flavor", self.flavor)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(("flavor", "found"), [("Google", True), ("other", False)])
def test_only_a_metadata_server_of_google_counts(flavor, found):
    handler = type("Handler", (Metadata,), {"flavor": flavor})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        assert (ask_metadata("", address) is not None) is found
    assert ask_metadata("", address) is None  # nobody there any more
