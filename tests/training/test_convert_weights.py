"""Weights from PyTorch: the file that is written, and the features of the network that is built on it."""

import importlib.util
import subprocess
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from helpers.runtime import read_json
from helpers.runtime.settings import ROOT
from helpers.training import describe_start

PEERS = ROOT / ".venv" / "peers" / "bin" / "python"


def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


convert_weights = load_script(ROOT / "scripts" / "convert_weights.py")


def test_one_channel_of_torchxrayvision_becomes_three_with_the_same_border():
    """With an offset left over, the padded border would differ."""
    from helpers.training import build_classifier

    rng = np.random.default_rng(0)
    kernel, gray = rng.standard_normal((7, 7, 1, 4)), rng.uniform(0, 255, (1, 32, 32, 1)).astype("float32")
    model = build_classifier(blocks=[1, 1, 1, 1])
    scaled = keras.Model(model.input, model.get_layer("preprocessing").output)(gray)
    pad = [(0, 0), (3, 3), (3, 3), (0, 0)]
    ours = keras.ops.conv(np.pad(scaled, pad), convert_weights._spread_kernel(kernel).astype("float32"), 2, "valid")
    theirs = keras.ops.conv(np.pad(2048 * gray / 255 - 1024, pad), kernel.astype("float32"), 2, "valid")
    assert np.allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_a_file_has_its_layers_in_order_and_its_record(tmp_path, monkeypatch):
    monkeypatch.setitem(
        convert_weights.CONVERTERS, "small", lambda arrays: [("b", [arrays["w"]]), ("a", [arrays["w"].T])]
    )
    weight = SimpleNamespace(detach=lambda: SimpleNamespace(cpu=lambda: SimpleNamespace(numpy=lambda: np.ones((2, 3)))))
    record = {"source": "here", "trained_on": ["ImageNet"], "seen_test_images": False}
    convert_weights.write_weights(tmp_path / "a.h5", SimpleNamespace(state_dict=lambda: {"w": weight}), "small", record)
    assert {"backbone": "small", **record}.items() <= describe_start(tmp_path / "a.h5").items()
    inputs = keras.Input((2,))
    model = keras.Model(inputs, keras.layers.Dense(2, use_bias=False)(keras.layers.Dense(3, use_bias=False)(inputs)))
    model.load_weights(tmp_path / "a.h5")
    assert [weights.shape for weights in model.get_weights()] == [(2, 3), (3, 2)] and (
        model.get_weights()[0] == 1
    ).all()


@pytest.mark.slow
def test_converted_densenets_compute_the_features_of_pytorch():
    """ConvNeXt-Base, too large for a test, is in the committed results."""
    needed = "import h5py, torch, torchvision, torchxrayvision"
    if not PEERS.exists() or subprocess.run([PEERS, "-c", needed], capture_output=True, check=False).returncode:
        pytest.skip(f"needs PyTorch in {PEERS.relative_to(ROOT)}: make .venv/peers/ready")
    benchmark = load_script(ROOT / "benchmarks" / "convert_weights.py")
    rows, _ = benchmark.compare(PEERS, ["torchvision densenet121", "torchxrayvision densenet121"], 64)
    assert len(rows) == 2 and all(row["largest_difference"] < 1e-4 < 0.1 < row["rms"] for row in rows.values())


def test_committed_results_show_features_equal_to_1e_4():
    report = read_json(ROOT / "benchmarks" / "results" / "convert_weights.json")
    assert {name.split()[0] for name in report["networks"]} == {"torchvision", "torchxrayvision"}
    assert len(report["networks"]) == 3
    assert all(row["largest_difference"] < 1e-4 for row in report["networks"].values())
