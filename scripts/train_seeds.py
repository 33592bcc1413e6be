"""Trains or resumes several seeds one after the other, evaluates each and their average, and reports the spread.

Usage: train_seeds.py [--seeds 5] [--data-dir DIR] [--run-dir DIR] [--profile PROFILE] [--set NAME=VALUE ...]

Notebook 1 packs the study, notebook 2 trains in RUN_DIR/seed-0, seed-1, ..., notebook 3 evaluates each, and the mean
of their logits over VIEWS shifted views of an image, and notebook 4 scores each one's heatmaps. The same command given
again resumes; what is finished stays.
"""

import argparse
import json
import os
import signal
import sys
import textwrap
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import run_notebooks
from run_notebooks import add_options, call, read_parameters, read_pause, read_settings

from helpers.runtime import check_settings, read_csv, read_json, resolve_path, save_figure, write_csv, write_json

PREPARE, TRAIN, EVALUATE, EXPLAIN = run_notebooks.NOTEBOOKS[:4]
VIEWS = 9
# Settings of notebook 2 in which runs may differ and still be the same training, and the one in which seeds do.
FREE = ("SEED", "START_OVER", "SAVE_STEPS", "TIME_BUDGET", "VERBOSE")
REFUSED = {
    "SEED": "the seeds are 0 to SEEDS - 1",
    "START_OVER": "finished seeds are kept; delete a seed's folder to train it again",
    "PART": "`make prepare` packs in parts",
    **dict.fromkeys(("MODELS", "PREDICTIONS", "COMPARE"), "`make evaluate` takes it"),
}


def parse_arguments():
    """Returns the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many (default: 5)")
    add_options(parser, "where results go (default: models/seeds)")
    return parser.parse_args()


def look_at_seed(folder):
    """Returns what run.json of a folder says, {} where there is none, and which notebooks were executed into it."""
    record = read_json(folder / "run.json") if (folder / "run.json").exists() else {}
    return record, {name for name in (EVALUATE, EXPLAIN) if (folder / "executed" / f"{name}.ipynb").exists()}


def name_differences(record, settings):
    """Returns which settings a seed was trained with that are others now, "" where none is."""
    wanted = check_settings(read_parameters(TRAIN) | settings)
    names = [name for name in read_parameters(TRAIN) if name not in FREE and not name.endswith("_DIR")]
    now, then = json.loads(json.dumps(wanted)), record["settings"]
    return ", ".join(f"{name} {then.get(name)} (now {now[name]})" for name in names if then.get(name) != now[name])


def train_seeds(run_dir, seeds, settings):
    """Runs what is still to be run, with settings of any notebook; returns the folder of the average.

    Exits where training pauses, a notebook fails, or a seed that was trained before has other settings.
    """

    def run(notebook, folder, **more):
        run_notebooks.execute_into(folder / "executed", notebook, settings | {"RUN_DIR": str(folder)} | more)

    folders = [run_dir / f"seed-{seed}" for seed in range(seeds)]
    found = [call(look_at_seed, folder) for folder in folders]
    begun = next((record["settings"] for record, _ in found if record), {})
    if settings.get("PRECISION", "auto") == "auto" and "PRECISION" in begun:  # all seeds in that of the first
        settings["PRECISION"] = begun["PRECISION"]
    for folder, (record, _) in zip(folders, found, strict=True):
        if record and (others := name_differences(record, settings)):
            sys.exit(f"{folder} was trained with {others}. Give the settings that it has, or choose another RUN_DIR.")
    finished, is_new = [record.get("finished", False) for record, _ in found], False
    budget, views = settings.pop("TIME_BUDGET", 0), settings.pop("VIEWS", VIEWS)
    stop_at = time.monotonic() + 3600 * budget
    if not all(finished):
        run(PREPARE, run_dir)
    for seed, folder in enumerate(folders):
        if not finished[seed]:
            hours_left = (stop_at - time.monotonic()) / 3600 if budget else 0
            if budget and hours_left <= 0:
                sys.exit(f"\nTIME_BUDGET ran out before seed {seed}. Give the same command again to resume.")
            run(TRAIN, folder, SEED=seed, TIME_BUDGET=hours_left)
            if pause := call(read_pause, folder):
                sys.exit(f"\nSeed {seed}: {pause}")
            if settings.get("PRECISION", "auto") == "auto":  # it may have been resumed in another than this machine's
                settings["PRECISION"] = call(look_at_seed, folder)[0]["settings"]["PRECISION"]
        done = found[seed][1] if finished[seed] else ()
        if EVALUATE not in done:
            run(EVALUATE, folder)
            is_new = True
        if EXPLAIN not in done:
            run(EXPLAIN, folder)
    average = run_dir / f"average-{seeds}-seeds-{views}-views"  # notebook 3 refuses a folder with another average
    if is_new or EVALUATE not in call(look_at_seed, average)[1]:
        run(EVALUATE, average, MODELS=list(map(str, folders)), VIEWS=views)
    return average


def measure(run_dir, seeds, average, bootstrap):
    """Measures the seeds and their average on the test images.

    Args:
        run_dir: path of the folder with the seeds' folders.
        seeds: how many.
        average: path of the folder of their average.
        bootstrap: dict with `n_resamples`, `seed` and `level`, as of notebook 3.

    Returns:
        Tuple `(table, rows)`. The table has a row a finding and a last row `mean`: `pathology`, `n_pos`, the AUC of
        each seed (`seed_0`, ...), their `mean`, `sd` (n - 1), `min` and `max`; `low` and `high`, the interval over
        patients of that mean; `one_view`, the AUC of the mean of all seeds' logits; `average`, that over all views
        too, with its interval; and `gain`, the average's AUC less `mean`, with its interval. Rows are the test images.
        Each resample draws the same patients for all models.
    """
    import numpy as np
    import pandas as pd
    from scipy.special import logit

    from helpers.evaluation import bootstrap_auc, interval_around, roc_auc, with_mean

    def load(folder):
        rows = read_csv(folder / "predictions.csv")
        return rows[rows["split"].eq("test")].sort_values("image", ignore_index=True)

    tables = [load(run_dir / f"seed-{seed}") for seed in range(seeds)] + [load(average)]
    rows = tables[-1]
    findings = [name.removeprefix("prob_") for name in rows if name.startswith("prob_")]
    of_probs, of_labels = ([f"{kind}_{name}" for name in findings] for kind in ("prob", "label"))
    keys = ["image", "patient_id", *of_labels]
    for seed, table in enumerate(tables[:-1]):
        if not table[keys].equals(rows[keys]):
            sys.exit(f"seed-{seed} was measured on other images than {average.name}: all need the same packed study.")
    y, probs = rows[of_labels].to_numpy(), [table[of_probs].to_numpy() for table in tables]
    draws = (rows["patient_id"], bootstrap["n_resamples"], bootstrap["seed"])
    samples = np.array([with_mean(bootstrap_auc(y, scores, *draws)) for scores in probs])
    aucs = np.array([with_mean(roc_auc(y, scores)) for scores in probs])
    single, single_samples = aucs[:-1].mean(axis=0), samples[:-1].mean(axis=0)
    n_pos = (y == 1).sum(axis=0)
    result = pd.DataFrame({"pathology": [*findings, "mean"], "n_pos": [*n_pos, n_pos.sum()]})
    result = result.assign(**{f"seed_{seed}": aucs[seed] for seed in range(seeds)})
    result["mean"], result["sd"] = single, aucs[:-1].std(axis=0, ddof=1) if seeds > 1 else np.nan
    result["min"], result["max"] = aucs[:-1].min(axis=0), aucs[:-1].max(axis=0)
    result["low"], result["high"] = interval_around(single, single_samples, bootstrap["level"], 0, 1)
    result["one_view"] = with_mean(roc_auc(y, np.mean(logit(probs[:-1]), axis=0)))
    gain, gain_samples = aucs[-1] - single, samples[-1] - single_samples
    for name, value, drawn, lowest in (("average", aucs[-1], samples[-1], 0), ("gain", gain, gain_samples, -1)):
        low, high = interval_around(value, drawn, bootstrap["level"], lowest, 1)
        result = result.assign(**{name: value, f"{name}_low": low, f"{name}_high": high})
    return result, rows


def measure_heatmaps(run_dir, seeds):
    """Returns the seeds' localization.csv, one below the other; no rows without boxes, or if FINDINGS are some only."""
    import pandas as pd

    paths = [run_dir / f"seed-{seed}" / "localization.csv" for seed in range(seeds)]
    if not all(path.exists() for path in paths):
        return pd.DataFrame(columns=["pathology", "seed"])
    return pd.concat([read_csv(path).assign(seed=seed) for seed, path in enumerate(paths)], ignore_index=True)


def summarize_heatmaps(table):
    """Returns {measure: the mean over findings of each seed, their mean, sd and extremes, and the controls' mean}."""
    means = table[table["pathology"].eq("mean")]
    result = {}
    for name in ("pointing", "energy") if len(means) else ():
        values = means[name].to_numpy()
        result[name] = {"seeds": values.tolist(), "mean": values.mean(), "min": values.min(), "max": values.max()}
        result[name]["sd"] = values.std(ddof=1) if len(values) > 1 else None
        result[name] |= {control: means[f"{name}_{control}"].mean() for control in ("random", "center", "location")}
    return result


def draw_figure(table, seeds, title, unit):
    """Returns a figure with a line a finding: each seed's AUC, and that of the average with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")  # without pyplot, so that no window is looked for
    ax = figure.subplots()
    y = range(len(table))[::-1]
    for seed in range(seeds):
        ax.plot(table[f"seed_{seed}"], y, "|", color="C0", markersize=9, label="" if seed else "each seed, one view")
    ax.hlines(y, table["average_low"], table["average_high"], color="C1", linewidth=1.5, alpha=0.6)
    ax.plot(table["average"], y, "o", color="C1", markersize=5, label=f"average, with its interval over {unit}")
    ax.set_yticks(y, [name.replace("_", " ") for name in table["pathology"]])
    ax.set(xlabel="AUC", title=title)
    ax.grid(axis="x", alpha=0.3)
    ax.legend(loc="lower left", fontsize=8)
    return figure


def report(run_dir, seeds, average, bootstrap):
    """Writes seeds.json, seeds.csv and figures/seeds.png; returns the screen that sums them up."""
    from helpers.study import name_unit

    table, rows = measure(run_dir, seeds, average, bootstrap)
    records = [read_json(run_dir / f"seed-{seed}" / "run.json") for seed in range(seeds)]
    first, source = records[0], read_json(average / "source.json")
    mean = json.loads(table.iloc[-1].to_json())
    kept = ("seed", "best_epoch", "best_val_auc", "epochs_run", "weights_sha256")
    together = ("one_view", "average", "average_low", "average_high", "gain", "gain_low", "gain_high")
    summary = {name: first[name] for name in ("study", "synthetic", "split")}
    has_patients = bool(first["split"]["patients"])
    summary |= {"images": len(rows), "patients": rows["patient_id"].nunique() if has_patients else None}
    summary |= {"bootstrap": bootstrap}
    summary["notices"] = source.get("notices", [])  # of weights that have seen test images
    summary["seeds"] = [
        {name: record[name] for name in kept} | {"auc": mean[f"seed_{seed}"]} for seed, record in enumerate(records)
    ]
    summary["spread"] = {name: mean[name] for name in ("mean", "sd", "min", "max", "low", "high")}
    summary["average"] = {"folder": average.name, "views": source["views"]} | {name: mean[name] for name in together}
    heatmaps = measure_heatmaps(run_dir, seeds)
    summary["heatmaps"] = summarize_heatmaps(heatmaps)
    summary["settings"] = {name: value for name, value in first["settings"].items() if name not in FREE}
    write_csv(run_dir / "seeds.csv", table, index=False)
    write_csv(run_dir / "seeds_localization.csv", heatmaps, index=False)
    write_json(run_dir / "seeds.json", summary)
    title = "".join(f"{textwrap.fill(notice)}\n" for notice in summary["notices"])
    title += f"{first['study']}, split “{first['split']['name']}”, test: {seeds} seeds"
    save_figure(draw_figure(table, seeds, title, name_unit(has_patients)), run_dir, "seeds")
    return describe(run_dir, table, summary)


def describe(run_dir, table, summary):
    """Returns the screen: what one model scores, how much that depends on the seed, what the average gains."""
    from helpers.study import name_unit

    names = ["mean", "sd", "min", "max", "low", "high", "average", "average_low", "average_high", "gain"]
    mean, average, seeds = table.iloc[-1], summary["average"], len(summary["seeds"])
    lines = [
        "",
        *summary["notices"],
        f"{run_dir}, test: {summary['images']:,} images. One model: mean AUC of {seeds} seeds, standard deviation,",
        f"min and max over trainings. average: all seeds and {average['views']} views. gain: average less mean.",
        f"low and high: intervals over {name_unit(bool(summary['split']['patients']))}.\n",
        table.set_index("pathology")[names].rename_axis(None).to_string(float_format="{:.3f}".format, na_rep="-"),
        f"\nGain of the mean {mean['gain']:+.4f} ({mean['gain_low']:+.4f} to {mean['gain_high']:+.4f}), "
        f"of the seeds alone, at one view, {mean['one_view'] - mean['mean']:+.4f}.",
        *(
            f"Heatmaps, {name}: mean {found['mean']:.3f} ({found['min']:.3f} to {found['max']:.3f} over the seeds); "
            f"random weights {found['random']:.3f}, the center {found['center']:.3f}."
            for name, found in summary["heatmaps"].items()
        ),
        f"\ntable      {run_dir / 'seeds.csv'}\nfigure     {run_dir / 'figures' / 'seeds.png'}",
        f"average    {run_dir / average['folder']}",
    ]
    if summary["synthetic"]:
        lines.append("These images are synthetic: the numbers say nothing about real radiographs.")
    return "\n".join([*lines, "Research only, not for clinical use."])


def main():
    """Runs what is left to run, then reports."""
    arguments = parse_arguments()
    os.environ["TQDM_MININTERVAL"] = "5"  # seconds; a progress bar should not fill the executed notebook
    settings = read_settings(arguments, arguments.run_dir or "models/seeds")
    for name in REFUSED.keys() & settings.keys():
        sys.exit(f"{name} is no setting of `make seeds`: {REFUSED[name]}.")
    if arguments.seeds < 1:
        sys.exit(f"SEEDS is {arguments.seeds}; it must be at least 1.")
    run_dir = resolve_path(settings.pop("RUN_DIR"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the kernel gets either, and writes a checkpoint
    try:
        average = train_seeds(run_dir, arguments.seeds, dict(settings))
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. Give the same command again to resume.")
    chosen = read_parameters(EVALUATE) | settings
    bootstrap = {
        "n_resamples": chosen["RESAMPLES"],
        "seed": read_parameters(EVALUATE)["SEED"],
        "level": chosen["LEVEL"],
    }
    print(call(report, run_dir, arguments.seeds, average, bootstrap))


if __name__ == "__main__":
    main()
