"""Which batch-norm statistics do averaged weights need?

Training averages the weights over its last steps (the optimizer's moving average). The moving statistics of batch
normalization are those of the weights of the last steps, not of the average. After every epoch of the same training,
this measures the mean AUC on the held-out images of

  raw weights                    with their moving statistics: no averaging
  averaged, foreign statistics   averaged weights with the moving statistics of the raw ones
  averaged, averaged statistics  the moving statistics averaged over the steps as the weights are
  averaged, N batches            statistics estimated from N training batches, `StatisticsEstimator`

The settings are those of notebook 2's quick profile, read from the notebook. Held-out images are those of the
validation and of the test subset together: the validation images alone are too few to tell the ways apart.

Usage: averaged_statistics.py [--packed FOLDER] [--seeds 0 1 2] [--epochs N]
Writes benchmarks/results/averaged_statistics.json and docs/averaged_statistics.png.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT / "notebooks"), str(ROOT)]  # in place of this folder
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import matplotlib.pyplot as plt
import numpy as np
from benchmarks.tpu.recipe import load_recipe

from helpers.evaluation import roc_auc
from helpers.packing import load_packed_study
from helpers.pipeline import count_steps, make_eval_dataset, make_train_dataset
from helpers.runtime import describe_machine, write_json
from helpers.training import (
    StatisticsEstimator,
    build_classifier,
    fuse_batch_norm,
    make_loss,
    predict_logits,
    set_output_bias,
)  # fmt: skip
from helpers.training.validation import averaged_weights

RESULTS = ROOT / "benchmarks" / "results" / "averaged_statistics.json"
FIGURE = ROOT / "docs" / "averaged_statistics.png"
RAW, FOREIGN, AVERAGED = "raw weights", "averaged, foreign statistics", "averaged, averaged statistics"
N_BATCHES = (10,)


class MeasureWays(keras.callbacks.Callback):
    """Measures every way after each epoch.

    Args:
        make_train: function from a number of batches to a Dataset of so many training batches.
        sets: list of pairs of an evaluation Dataset and its labels.

    Attributes:
        aucs: dict way -> list of float, one an epoch.
    """

    def __init__(self, make_train, sets):
        super().__init__()
        self.make_train, self.sets = make_train, sets
        self.aucs, self.averages, self.estimators = {}, None, None

    def _list_statistics(self):
        layers = [layer for layer in self.model.layers if isinstance(layer, keras.layers.BatchNormalization)]
        return [v for layer in layers for v in (layer.moving_mean, layer.moving_variance)]

    def on_train_batch_end(self, batch, logs=None):
        """Averages the statistics as the optimizer averages the weights."""
        values = [np.array(variable) for variable in self._list_statistics()]
        if self.averages is None:
            self.averages = values
        momentum = self.model.optimizer.ema_momentum
        self.averages = [
            momentum * average + (1 - momentum) * value for average, value in zip(self.averages, values, strict=True)
        ]

    def _measure(self, way):
        logits = [predict_logits(self.model, dataset, len(labels)) for dataset, labels in self.sets]
        auc = roc_auc(np.concatenate([labels for _, labels in self.sets]), np.concatenate(logits)).mean()
        self.aucs.setdefault(way, []).append(round(float(auc), 5))

    def on_epoch_end(self, epoch, logs=None):
        """Measures all ways on the held-out images."""
        if self.estimators is None:
            self.estimators = {n: StatisticsEstimator(self.model, lambda n=n: self.make_train(n)) for n in N_BATCHES}
        self._measure(RAW)
        with averaged_weights(self.model):
            self._measure(FOREIGN)
            for variable, value in zip(self._list_statistics(), self.averages, strict=True):
                variable.assign(value)
            self._measure(AVERAGED)
        for n, estimator in self.estimators.items():
            started = time.perf_counter()
            with averaged_weights(self.model, estimator):
                seconds = time.perf_counter() - started
                self._measure(f"averaged, {n} batches")
            print(f"  {n} batches: {seconds:.1f} s", end="")
        print(f"\n  epoch {epoch + 1}:", {way: values[-1] for way, values in self.aucs.items()}, flush=True)


def train(study, recipe, seed):
    """Trains one seed; returns the AUCs of each way after each epoch."""
    batch_size = recipe["BATCH_SIZE"]
    steps = recipe["steps_per_epoch"] = count_steps(study, batch_size)

    def make_train(n=None):
        data = make_train_dataset(study, recipe["IMAGE_SIZE"], batch_size, seed=seed, epochs=recipe["EPOCHS"])
        return data if n is None else data.take(n)

    labels = study.labels("train")
    keras.utils.set_random_seed(seed)
    shape = {"output_stride": recipe["OUTPUT_STRIDE"], "batch_norm_momentum": recipe["BATCH_NORM_MOMENTUM"]}
    model = fuse_batch_norm(build_classifier(recipe["BACKBONE"], **shape))
    set_output_bias(model, labels.mean(axis=0))
    optimizer = recipe["make_optimizer"](recipe["LEARNING_RATE"], recipe["EPOCHS"])
    model.compile(optimizer, make_loss(recipe["LOSS"], labels), jit_compile=False)
    sets = [(make_eval_dataset(study, subset, batch_size), study.labels(subset)) for subset in ("val", "test")]
    ways = MeasureWays(make_train, sets)
    model.fit(make_train(), epochs=recipe["EPOCHS"], steps_per_epoch=steps, callbacks=[ways], shuffle=False, verbose=2)
    return ways.aucs


def draw(results):
    """Writes the figure: a panel for each seed, a line for each way."""
    seeds = results["seeds"]
    figure, axes = plt.subplots(1, len(seeds), figsize=(4 * len(seeds), 3.6), sharey=True, layout="constrained")
    for ax, (seed, aucs) in zip(np.atleast_1d(axes), seeds.items(), strict=True):
        for way, values in aucs.items():
            ax.plot(range(1, len(values) + 1), values, "o-", markersize=3, label=way)
        ax.set(xlabel="epoch", title=f"seed {seed}")
        ax.grid(alpha=0.3)
    np.atleast_1d(axes)[0].set_ylabel("mean AUC, held-out images")
    np.atleast_1d(axes)[-1].legend(loc="lower right", fontsize=8)
    figure.savefig(FIGURE, dpi=100)


def main():
    """Trains all seeds and writes what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packed", default=ROOT / "data" / "packed" / "phantom-official-quick")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="default: those of the quick profile")
    arguments = parser.parse_args()
    study, recipe = load_packed_study(arguments.packed), load_recipe("quick")
    recipe["EPOCHS"] = arguments.epochs or recipe["EPOCHS"]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"seeds": {}}
    for seed in arguments.seeds:
        print(f"seed {seed}", flush=True)
        results["seeds"][str(seed)] = train(study, recipe, seed)
        results["images"] = {subset: len(study.labels(subset)) for subset in ("train", "val", "test")}
        results["settings"] = {name: recipe[name] for name in ("EPOCHS", "BATCH_SIZE", "IMAGE_SIZE", "AVERAGING")}
        results["machine"] = describe_machine(keras)
        write_json(RESULTS, results)
    draw(results)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
