"""What a run would cost, before it starts: operations, memory, host CPUs and hours, on TPUs and on this machine.

Nothing here has run on a TPU. Operations are counted from the layers. Memory and traffic follow formulas that were
fitted to training steps that the TPU compiler compiled (benchmarks/results/tpu_check.json). Time is the larger of
arithmetic and traffic at the rates of Google's data sheets, so it is the least that a step can take.
"""

import bisect
import os
from dataclasses import dataclass

import keras
import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Chips:
    """One kind of TPU machine; figures of one core, of which XLA sees `n_cores`.

    Attributes:
        kind: what JAX calls such a device.
        n_cores: int.
        flops: float, peak bfloat16 operations per second of a core.
        bandwidth: float, bytes per second between a core and its high-bandwidth memory.
        memory: float, bytes of high-bandwidth memory of a core.
        host_cpus: int, virtual CPUs of the host machine; None where Google names no number.
    """

    kind: str
    n_cores: int
    flops: float
    bandwidth: float
    memory: float
    host_cpus: int | None


# Google's documentation, https://cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB and 819 GB/s a chip of one core,
# hosts of 24 and 224 virtual CPUs. https://cloud.google.com/tpu/docs/v3: 123 TFLOP/s, 32 GiB and 900 GB/s a chip of
# two cores, and no number of CPUs for their hosts.
CHIPS = {
    "v5e-1": Chips("TPU v5 lite", 1, 197e12, 819e9, 16e9, 24),
    "v5e-8": Chips("TPU v5 lite", 8, 197e12, 819e9, 16e9, 224),
    "v3-8": Chips("TPU v3", 8, 61.5e12, 450e9, 16 * 2**30, None),
}
STATE_BYTES = 16  # of a parameter: float32 of itself, of two moments of Adam, and of the average
PROGRAM_BYTES = 3e5  # of a layer
WORKING = 2  # times the largest map, beside what is kept
UPDATE_BYTES = 60  # of a parameter, read or written once a step, whatever the batch
TOUCHED = 12  # times each kept map is read or written in a step
JOINED = 19.2  # times, if it is a concatenation
MEMORY_ERROR = 0.25  # twice the largest of DenseNet-121, since no other backbone was compiled
SLOWDOWN = 3  # see `estimate_cost`


def count_layers(model, side):
    """Counts what the layers do for an image in the forward pass, from the shapes of their outputs.

    Args:
        model: keras.Model of one input (batch, height, width, channels) whose sides are not fixed.
        side: int, pixels.

    Returns:
        pandas.DataFrame, one row a layer: `flops`, two for each multiplication with its kernel (grouped and depthwise
        kernels hold the channels of one group only, so they count right); `positions` and `channels` of its output;
        `itemsize` in bytes, of its compute dtype; `kept`, whether the gradient needs the output and nothing cheap gives
        it again: that of a layer with a kernel, of an addition or a concatenation; and `joins`, whether it is the last.
    """
    layers = [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]
    outputs = keras.Model(model.inputs, [layer.output for layer in layers])
    rows = []
    shape = (1, side, side, model.input_shape[-1])
    for layer, (_, *sides, channels) in zip(layers, outputs.compute_output_shape(shape), strict=True):
        parts = layer.layers if isinstance(layer, keras.Model) else [layer]  # ConvNeXt's downsampling is a model
        kernels = [part.kernel for part in parts if hasattr(part, "kernel")]
        joins = isinstance(layer, keras.layers.Concatenate)
        rows.append(
            {
                "flops": 2.0 * np.prod(sides) * sum(np.prod(kernel.shape) for kernel in kernels),
                "positions": np.prod(sides, dtype=int),
                "channels": channels,
                "itemsize": 2 if "16" in layer.compute_dtype else 4,
                "kept": bool(kernels) or joins or isinstance(layer, keras.layers.Add),
                "joins": joins,
            }
        )
    return pd.DataFrame(rows, [layer.name for layer in layers])


def store_maps(layers, n_images):
    """Returns the bytes of each layer's output for a number of images in a TPU's memory, as a pandas.Series.

    Images and channels, one of them along 8 rows and the other along 128 columns, are padded to whole tiles
    (https://cloud.google.com/tpu/docs/performance-guide); the compiler takes the way that pads less.
    """

    def fill_rows(number):
        return np.where(number <= 4, 4, -(-number // 8) * 8)  # there are smaller tiles for few

    def fill_columns(number):
        return -(-number // 128) * 128

    channels = layers["channels"]
    tiles = np.minimum(fill_columns(channels) * fill_rows(n_images), fill_columns(n_images) * fill_rows(channels))
    return layers["positions"] * layers["itemsize"] * tiles


def estimate_step(layers, n_parameters, n_images, chips):
    """Estimates a training step with AdamW and averaged weights on one core.

    Memory is `STATE_BYTES` a parameter, `PROGRAM_BYTES` a layer, the maps that are kept, halfway between their own
    bytes and those of whole tiles (see `store_maps`), and `WORKING` times the largest map in whole tiles. Traffic is
    `UPDATE_BYTES` a parameter, `JOINED` times each concatenation and `TOUCHED` times each other map that is kept, in
    whole tiles. Arithmetic is three forward passes.

    The constants were fitted to steps of DenseNet-121 that were compiled. Memory is met within 13 %. With 16 images a
    core or more at 224 and 512 pixels, operations are met within 3 %, and traffic on v5e within 20 %; on v3 the
    estimate is 1.5 times the compiler's. With fewer images a core, or at 64 pixels, operations are up to 12 % and
    traffic up to twice what is estimated. Of a ConvNeXt of five blocks, operations are 5 % and traffic is 9 % more than
    estimated. Other backbones were not compiled.

    Args:
        layers: of `count_layers`.
        n_parameters: int, of the model.
        n_images: int, images a core.
        chips: `Chips`.

    Returns:
        Dict of floats: `bytes held`, `flops`, `bytes moved`, and `seconds`, the larger of the times that arithmetic and
        traffic take at their peak rates.
    """
    maps = store_maps(layers, n_images)
    kept, joined = maps[layers["kept"]].sum(), maps[layers["joins"]].sum()
    own = n_images * (layers["positions"] * layers["channels"] * layers["itemsize"])[layers["kept"]].sum()
    flops = 3 * layers["flops"].sum() * n_images
    moved = UPDATE_BYTES * n_parameters + JOINED * joined + TOUCHED * (kept - joined)
    state = STATE_BYTES * n_parameters + PROGRAM_BYTES * len(layers)
    return {
        "bytes held": state + (own + kept) / 2 + WORKING * maps.max(),
        "flops": flops,
        "bytes moved": moved,
        "seconds": max(flops / chips.flops, moved / chips.bandwidth),
    }


def estimate_cost(
    model,
    *,
    image_size,
    eval_size,
    batch_size,
    n_train,
    n_val,
    epochs,
    forward_per_second,
    augmented_per_second,
    n_replicas=1,
    kind=None,
):
    """Estimates a run on three TPU machines, and on this one from two rates measured here.

    Hours on TPUs are a range. At best, every step takes the time of `estimate_step`, and a forward pass a third of it.
    The other end is `SLOWDOWN` times that: ResNet-50 at 224 pixels on 2,048 cores of TPU v3, 16 images a core, was
    published with 1.05 million images a second (Ying et al., 2018, arXiv:1811.06992), 0.6 of this estimate's best.
    On this machine, hours are what the measured forward pass gives, a training step taken for three. Starting,
    compiling and writing are not in it, and epochs with a frozen backbone count as the others.

    Args:
        model: keras.Model, see `count_layers`.
        image_size: int, pixels of training crops.
        eval_size: int, pixels of validation images.
        batch_size: int, global.
        n_train: int, images of an epoch.
        n_val: int, images validated after each epoch.
        epochs: int.
        forward_per_second: float, images of `eval_size` that this machine predicts.
        augmented_per_second: float, training images that one CPU of this machine prepares.
        n_replicas: int, devices here that share a batch.
        kind: what JAX calls these devices; None asks it. TensorFlow does not say which TPU it has.

    Returns:
        pandas.DataFrame, one row a machine, of: operations of an image's training step in GFLOP and of the run in
        PFLOP; images and memory a core and the memory that it has, in GB; the largest BATCH_SIZE that fits; images/s
        and hours at best, here as measured; hours at `SLOWDOWN` times that; CPUs that prepare as many images, and
        those that the host has. NaN where it is not known.

    Raises:
        ValueError: this is such a TPU, and the batch takes more memory than it has, by more than the formula's error.
    """
    train, validate = count_layers(model, image_size), count_layers(model, eval_size)
    n_parameters = model.count_params()
    train_flops, validate_flops = 3 * train["flops"].sum(), validate["flops"].sum()
    kind = _find_kind() if kind is None else kind
    here = next((chips for chips in CHIPS.values() if chips.kind == kind), None)
    rows = {}
    for name in (*CHIPS, "this machine"):
        chips, n_cores = (CHIPS[name], CHIPS[name].n_cores) if name in CHIPS else (here, n_replicas)
        n_images = -(-batch_size // n_cores)
        rows[name] = {"GFLOP an image": 1e-9 * train_flops}
        rows[name] |= {"PFLOP a run": 1e-15 * epochs * (n_train * train_flops + n_val * validate_flops)}
        rows[name] |= {"images a core": n_images}
        rows[name] |= _estimate_memory(train, n_parameters, n_images, n_cores, chips) if chips else {}
        if name in CHIPS:
            seconds = [estimate_step(layers, n_parameters, n_images, chips)["seconds"] for layers in (train, validate)]
            rate, forward, n_cpus = batch_size / seconds[0], 3 * batch_size / seconds[1], chips.host_cpus
        else:
            rate, forward = forward_per_second * validate_flops / train_flops, forward_per_second
            n_cpus = os.cpu_count()
        hours = epochs * (n_train / rate + n_val / forward) / 3600
        rows[name] |= {"images/s at best": rate, "hours at best": hours}
        rows[name] |= {f"hours at {SLOWDOWN} times that": SLOWDOWN * hours} if name in CHIPS else {}
        rows[name] |= {"CPUs for best": rate / augmented_per_second, "CPUs it has": n_cpus}
    if here:
        _refuse_oversized(rows["this machine"], batch_size, image_size)
    return pd.DataFrame.from_dict(rows, orient="index")


def _find_kind():
    if keras.backend.backend() != "jax":
        return ""
    import jax

    return jax.local_devices()[0].device_kind


def _estimate_memory(layers, n_parameters, n_images, n_cores, chips):
    def hold(images):
        return estimate_step(layers, n_parameters, images, chips)["bytes held"]

    fits = bisect.bisect_right(range(1, 2**16), chips.memory, key=hold)
    memory = {"GB a core": 1e-9 * hold(n_images), "GB it has": 1e-9 * chips.memory}
    return memory | {"BATCH_SIZE that fits": fits * n_cores}


def _refuse_oversized(here, batch_size, image_size):
    if here["GB a core"] > (1 + MEMORY_ERROR) * here["GB it has"]:
        raise ValueError(
            f"BATCH_SIZE = {batch_size} takes about {here['GB a core']:.0f} GB a core at IMAGE_SIZE = {image_size}, "
            f"and this TPU has {here['GB it has']:.0f}. Set it to {here['BATCH_SIZE that fits']} or less."
        )
