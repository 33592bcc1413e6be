"""What do batch-norm statistics of the global batch cost under several replicas?

Notebook 2's quick training step, taken in turns, on two logical devices of this CPU under
`tf.distribute.MirroredStrategy`:

  ours              `BatchNormalization` of helpers.training: one mean over the replicas for each layer
  Keras, synchronized   three sums over the replicas for each layer
  Keras, local      statistics of each replica: what is saved is then not what was measured

Usage: global_statistics.py [--rounds 5] [--blocks 6 12 24 16]
Writes benchmarks/results/global_statistics.json. On a TPU the sums go between chips, see docs/tpu.md.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from helpers.runtime import connect_devices, describe_machine, write_json

RESULTS = ROOT / "benchmarks" / "results" / "global_statistics.json"
REPLICAS, SIDE, BATCH_SIZE = 2, 80, 32
WAYS = ("ours", "Keras, synchronized", "Keras, local")


def make_step(strategy, way, blocks):
    """Returns a function that takes one training step in a way."""
    import keras
    import tensorflow as tf

    from helpers.training import build_classifier, fuse_batch_norm

    def synchronize(layer):
        config = layer.get_config()
        if type(layer) is keras.layers.BatchNormalization:
            config |= {"synchronized": True}
        return type(layer).from_config(config)

    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = build_classifier(output_stride=16, blocks=blocks)
        if way == "ours":
            model = fuse_batch_norm(model)
        if way == "Keras, synchronized":
            model = keras.models.clone_model(model, clone_function=synchronize)
        model.compile(
            keras.optimizers.AdamW(1e-4), keras.losses.BinaryCrossentropy(from_logits=True), jit_compile=False
        )
        model.optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, (BATCH_SIZE, SIDE, SIDE, 1)).astype("float32")
    labels = (rng.random((BATCH_SIZE, 14)) < 0.1).astype("float32")
    data = strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensors((images, labels)))
    batch = next(iter(data))
    step = tf.function(lambda: strategy.run(model.train_step, args=(batch,)))
    return lambda: step()


def main():
    """Measures the ways in turns and writes medians and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", type=int, nargs=4, default=[6, 12, 24, 16])
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    devices = connect_devices(SimpleNamespace(name="cpu", chips=0), REPLICAS)
    import keras
    import tensorflow as tf

    steps = {way: make_step(devices.strategy, way, arguments.blocks) for way in WAYS}
    seconds, cpu = ({way: [] for way in WAYS} for _ in range(2))
    for number in range(arguments.rounds + 1):  # the first traces
        for way, step in steps.items():
            began = time.perf_counter(), time.process_time()
            step()
            if number:
                seconds[way].append(time.perf_counter() - began[0])
                cpu[way].append(time.process_time() - began[1])

    def compare(times, way):
        return round(float(np.median(np.divide(times["ours"], times[way]))), 3)

    results = {
        "machine": describe_machine(tf, keras),
        "load_before": round(load, 1),
        "replicas": REPLICAS,
        "batch": BATCH_SIZE,
        "side": SIDE,
        "blocks": arguments.blocks,
        "seconds_a_step": {way: round(float(np.median(times)), 3) for way, times in seconds.items()},
        "ours / Keras, synchronized": {"elapsed": compare(seconds, WAYS[1]), "processor": compare(cpu, WAYS[1])},
        "ours / Keras, local": {"elapsed": compare(seconds, WAYS[2]), "processor": compare(cpu, WAYS[2])},
    }
    print(json.dumps(results, indent=1))
    write_json(RESULTS, results)


if __name__ == "__main__":
    main()
