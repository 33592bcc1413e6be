"""Trains on TensorFlow as notebook 2 does and answers commands: a process of `training_step.py`.

Usage: keras_step.py SETUP, a JSON object of `side`, `batch` and of what differs from the setup below. It reads a
command a line, [name, arguments...] in JSON, and answers with a line of JSON; first with what the step is.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "notebooks"), str(ROOT)]
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from benchmarks.tpu import recipe as notebook_2

from helpers.training import count_layers

SETUP = {
    "recipe": {"PRECISION": "float32"},  # settings of notebook 2 that differ from its full profile
    "fused": True,  # False: batch normalization as Keras has it
    "jit_compile": False,
    "steps_per_execution": 1,
    "images": "float32",  # or "uint8", cast within the step; or "packed": read, shuffled and augmented
    "layout": "channels_last",
    "threads": None,  # [within an operation, between operations]
}
BATCH_NORM = "batch normalization with ReLU, forward", "batch normalization, gradient"
PARTS = {  # by kind of operation; what has the optimizer's name is the optimizer's, whatever its kind
    "convolutions, forward": "Conv2D",
    "convolutions, gradient of weights": "Conv2DBackpropFilter",
    "convolutions, gradient of maps": "Conv2DBackpropInput",
    BATCH_NORM[0]: "FusedBatchNormEx FusedBatchNormV3 Relu",
    BATCH_NORM[1]: "FusedBatchNormGradV3",
    "ReLU, gradient": "ReluGrad",
    "joining maps, cutting and adding up their gradients": "ConcatV2 Slice Pad AddN",
    "pooling": "AvgPool AvgPoolGrad MaxPool MaxPoolGrad",
}
OPTIMIZER = "optimizer: AdamW, averaged weights"
REST = "all else"


def build_model(setup):
    """Returns the compiled network, and the operations of an image's forward pass."""
    recipe = notebook_2.load_recipe("full") | setup["recipe"]
    if setup["layout"] == "channels_last":
        model = notebook_2.build_model(recipe, fused=setup["fused"], jit_compile=setup["jit_compile"])
        forward = count_layers(model, setup["side"])["flops"].sum()
    else:  # the bare network of keras.applications: preprocessing is written for maps with their channels last
        keras.config.set_image_data_format(setup["layout"])
        shape = (3, setup["side"], setup["side"])
        model = keras.applications.DenseNet121(weights=None, input_shape=shape, classes=14, classifier_activation=None)
        loss = keras.losses.BinaryCrossentropy(from_logits=True)
        model.compile(recipe["make_optimizer"](1e-3, 10), loss, jit_compile=setup["jit_compile"])
        forward = 0
    model.steps_per_execution = setup["steps_per_execution"]
    return model, int(forward)


def open_batches(setup, folder):
    """Returns an endless iterator of batches: one random batch again and again, or the repository's own input."""
    side, batch = setup["side"], setup["batch"]
    if setup["images"] == "packed":
        from helpers.packing import pack_study
        from helpers.pipeline import make_train_dataset
        from helpers.study import list_images, load_study, make_split, match_images, write_synthetic_study

        write_synthetic_study(folder / "study", 12 * batch, side * 8 // 7, n_workers=1)
        images = list_images(folder / "study")
        rows, _ = match_images(load_study(folder / "study").rows, images)
        rows["split"] = make_split(rows)
        study = pack_study(rows, images, folder / "packed", split_name="official", side=side * 8 // 7)
        return iter(make_train_dataset(study, side, batch, seed=0, epochs=100_000))
    rng = np.random.default_rng(0)
    shape = (batch, side, side, 1) if setup["layout"] == "channels_last" else (batch, 3, side, side)
    images = rng.integers(0, 256, shape).astype(setup["images"])
    labels = rng.integers(0, 2, (batch, 14)).astype("float32")
    return iter(tf.data.Dataset.from_tensors((images, labels)).repeat().prefetch(2))


def time_steps(model, batches, calls):
    """Returns the seconds of a step, and those of the processor, of all threads."""
    steps = calls * model.steps_per_execution
    started, worked = time.perf_counter(), time.process_time()
    for _ in range(calls):
        logs = model.train_function(batches)
    loss = float(logs["loss"])
    seconds = {"seconds": (time.perf_counter() - started) / steps, "cpu": (time.process_time() - worked) / steps}
    return seconds | {"loss": loss}


def measure_peak(sizes=(1024, 2048, 4096), times=3):
    """Returns the most operations a second that a product of two square float32 matrices reaches."""
    best = 0.0
    for size in sizes:
        matrix = tf.random.normal((size, size))
        for _ in range(times):
            started = time.perf_counter()
            tf.linalg.matmul(matrix, matrix).numpy()
            best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def find_part(name, kind):
    """Returns the part of the step that an operation belongs to, by its name and kind."""
    if "adam" in name:
        return OPTIMIZER
    kind = kind.removeprefix("_Mkl").removeprefix("Native").removeprefix("_")
    part = next((part for part, kinds in PARTS.items() if kind in kinds.split()), REST)
    if part == REST and "bn_" in name:  # of Keras's own, which is made of sums and products
        return BATCH_NORM[name.startswith("gradient_tape") or "/gradient_tape" in name]
    return part


def find_own_times(events):
    """Yields the events of a thread with their durations in ps, less those of the events within them."""
    running = []  # [event, end, own time], each within the one before
    for event in sorted(events, key=lambda event: (event.offset_ps, -event.duration_ps)):
        while running and running[-1][1] <= event.offset_ps:
            done = running.pop()
            yield done[0], done[2]
        if running:
            running[-1][2] -= event.duration_ps
        running.append([event, event.offset_ps + event.duration_ps, event.duration_ps])
    for event, _, own in running:
        yield event, own


def profile(model, batches, calls):
    """Returns the share of each part of the step in the time of all operations. Right where there is one thread."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    with tempfile.TemporaryDirectory() as folder:
        with tf.profiler.experimental.Profile(folder):
            time_steps(model, batches, calls)
        space = xplane_pb2.XSpace.FromString(next(Path(folder).rglob("*.xplane.pb")).read_bytes())
    plane = next(plane for plane in space.planes if plane.name == "/host:CPU")
    threads = []
    for line in plane.lines:
        threads.append(dict.fromkeys([*PARTS, OPTIMIZER, REST], 0.0))
        for event, duration in find_own_times(line.events):
            name, _, kind = plane.event_metadata[event.metadata_id].name.rpartition(":")
            if name and "Eager" not in name:  # what is left are the runtime's own events
                threads[-1][find_part(name, kind)] += duration * 1e-12
    seconds = max(threads, key=lambda parts: parts["convolutions, forward"])  # of the others, one waits for the step
    whole = sum(seconds.values())
    return {"seconds": whole / calls, "shares": {part: round(taken / whole, 4) for part, taken in seconds.items()}}


def main():
    """Builds, takes the first step, which traces, and answers until there is no more to read."""
    setup = SETUP | json.loads(sys.argv[1])
    if setup["threads"]:
        tf.config.threading.set_intra_op_parallelism_threads(setup["threads"][0])
        tf.config.threading.set_inter_op_parallelism_threads(setup["threads"][1])
    with tempfile.TemporaryDirectory() as folder:
        model, forward = build_model(setup)
        batches = open_batches(setup, Path(folder))
        model.make_train_function()
        time_steps(model, batches, 1)
        versions = f"tensorflow {tf.__version__}, keras {keras.__version__}"
        print(json.dumps({"forward": forward, "versions": versions}), flush=True)
        commands = {
            "steps": lambda calls: time_steps(model, batches, calls),
            "peak": measure_peak,
            "profile": lambda calls: profile(model, batches, calls),
        }
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            print(json.dumps(commands[name](*arguments)), flush=True)


if __name__ == "__main__":
    main()
