"""Sentences of README and docs with measured numbers, and the files that the numbers come from.

A page keeps its own words. `gather_sentences` repeats a part of a sentence, with `{name:.1f}` where a number stands and
`{name}` where a word does, such as a machine's name. `renew_sentences` writes today's values into the page, and
tests/test_committed_results.py refuses a page that lacks the sentence or has other values. Tables, and text that is
written as a whole, stand between marks, see page_tables.py.
"""

import json
import re
from pathlib import Path
from statistics import median
from string import Formatter

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
_NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?: ?%)?"
_WORDS = r"[^.;:|]+?"


def find_sentence(page, template):
    """Finds the one place of a page where a sentence stands, whatever its values and line breaks: a `re.Match`."""
    pattern = ""
    for text, name, spec, _ in Formatter().parse(template):
        pattern += r"\s+".join(map(re.escape, re.split(r"\s+", text)))
        pattern += "" if name is None else f"({_NUMBER if spec else _WORDS})"
    found = list(re.finditer(pattern, page))
    if len(found) != 1:
        raise ValueError(f"expected once, found {len(found)} times: {template}")
    return found[0]


def renew_sentences(page, sentences):
    """Returns the text of a page with today's values in its sentences.

    Args:
        page: the text of a Markdown file.
        sentences: list of pairs of a template and a dict from its names to values.

    Raises:
        ValueError: the page does not have a sentence exactly once.
    """
    for template, values in sentences:
        match = find_sentence(page, template)
        fields = [(name, spec) for _, name, spec, _ in Formatter().parse(template) if name is not None]
        for group in range(len(fields), 0, -1):  # from the end, so that earlier places stay where they are
            name, spec = fields[group - 1]
            page = page[: match.start(group)] + format(values[name], spec) + page[match.end(group) :]
    return page


def gather_sentences():
    """Returns the sentences of each page: a dict from the page's path to pairs of a template and its values."""
    read = lambda name: json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())  # noqa: E731
    speed, scale = _gather_speed(read)
    return {
        "README.md": _gather_readme(read),
        "data/README.md": _gather_data(),
        "docs/evaluate.md": _gather_evaluate(read),
        "docs/recipe.md": _gather_recipe(read),
        "docs/resume.md": _gather_resume(read),
        "docs/input_gate.md": _gather_gate(read),
        "docs/speed.md": speed,
        "docs/scale.md": scale,
        "docs/model_formats.md": _gather_formats(read),
        "docs/serving.md": _gather_serving(read),
        "docs/tpu.md": _gather_tpu(read),
        "docs/weights.md": _gather_weights(read),
        "docs/xvision.md": _gather_xvision(read),
        "models/README.md": _gather_models(read),
        "notebooks/03_evaluate.ipynb": [
            ("alone reaches {view:.3f} in the mean and all metadata {all:.3f}", _name_floors()),
        ],
        "notebooks/helpers/evaluation/floors.py": [
            ("is {view:.3f} from the view and {all:.3f} from all four columns", _name_floors()),
        ],
    }


def _gather_readme(read):
    resume = read("resume")
    return [
        (
            "A run killed {kills:d} times at random moments ended bit-identical",
            {"kills": resume["ours, TensorFlow"]["kills"]},
        ),
    ]


def _name_floors():
    floors = pd.read_csv(ROOT / "docs" / "reference_evaluation" / "metadata_floors.csv")
    means = floors[floors["pathology"].eq("mean")].set_index("floor")["auc"]
    return {"view": means["view only"], "all": means["metadata only"]}


def _gather_data():
    floors, labels = _name_floors(), pd.read_csv(ROOT / "docs" / "reference_evaluation" / "mined_labels.csv")
    drop = _read_drop()
    found = {f"sensitivity_{k}": row["sensitivity"] for k, row in enumerate(labels.to_dict("records"))}
    found |= {f"specificity_{k}": row["specificity"] for k, row in enumerate(labels.to_dict("records"))}
    return [
        (
            "The view alone, no pixels, gives a mean test AUC of {view:.3f}; view, age, sex and follow-up "
            "number together "
            "{all:.3f}",
            floors,
        ),
        (
            "the mined labels of the test list find {sensitivity_0:.0%}, {sensitivity_1:.0%} and "
            "{sensitivity_2:.0%} of the "
            "first three, at a specificity of {specificity_0:.0%}, {specificity_1:.0%} and {specificity_2:.0%}",
            found,
        ),
        ("a retrained CheXNet has a mean AUC of {inside:.3f} there, and of {outside:.3f} outside", drop),
    ]


def _read_drop():
    drop = pd.read_csv(ROOT / "docs" / "reference_evaluation" / "drop.csv").set_index("images")["auc"]
    return {"own": drop["all"], "inside": drop["in the list"], "outside": drop["not in the list"]}


def _gather_evaluate(read):
    intervals = read("intervals")
    differ, tie = (intervals["bootstrap"][name] for name in ("all scores differ", "scores of three decimals"))
    return [
        ("reaches a mean AUC of {view:.3f} from the view alone, and {all:.3f} from age", _name_floors()),
        (
            "findings, on {machine}: {a:.1f} seconds where all scores differ, {b:.1f} where they tie at three "
            "decimals. That is {c:.0f} "
            "and {d:.0f} times as fast as a loop over scikit-learn's `roc_auc_score`, and equal to {e:.0e}",
            {
                "machine": intervals["machine"].partition(", Python")[0],
                "a": differ["seconds"],
                "b": tie["seconds"],
                "c": differ["times_as_fast"],
                "d": tie["times_as_fast"],
                "e": max(differ["largest_difference"], tie["largest_difference"]),
            },
        ),
        ("mean AUC of {own:.3f} on its own test images, and of {inside:.3f} on those in NIH's list", _read_drop()),
    ]


def _gather_recipe(read):
    seeds = read("averaged_statistics")["seeds"].values()
    ours, raw = "averaged, 10 batches", "raw weights"
    others = {"foreign": "averaged, foreign statistics", "mixed": "averaged, averaged statistics"}
    first = {name: [seed[way][0] for seed in seeds] for name, way in (others | {"ours": ours}).items()}
    last = [[way[-1] for way in seed.values()] for seed in seeds]
    ahead = [seed[raw][-1] - seed[ours][-1] for seed in seeds]
    values = {
        f"{name}_{end}": choose(values)
        for name, values in first.items()
        for end, choose in (("low", min), ("high", max))
    }
    values |= {"spread": max(max(ends) - min(ends) for ends in last), "ahead_low": min(ahead), "ahead_high": max(ahead)}
    return [
        (
            "{ours_low:.2f} to {ours_high:.2f} after one epoch, where foreign statistics give {foreign_low:.2f} to "
            "{foreign_high:.2f}, and averaging them with the weights gives {mixed_low:.2f} to {mixed_high:.2f} too.",
            values,
        ),
        (
            "all ways lie within {spread:.3f} of each other, and the raw weights are ahead of this one by "
            "{ahead_low:.3f} to "
            "{ahead_high:.3f}",
            values,
        ),
        (
            "a retrained CheXNet has {own:.3f} on its own random test images, and {inside:.3f} on those of "
            "them that are in "
            "the official list",
            _read_drop(),
        ),
    ]


def _gather_resume(read):
    resume = read("resume")
    ours, keras, step = (resume["densenet121"][name] for name in ("ours", "keras", "step"))
    return [
        (
            "a checkpoint has {mb:.0f} MB",
            {"mb": ours["bytes"] / 1e6},
        ),
        (
            "It is written in {write:.2f} s and read in {read:.2f} s, half the time of "
            "`keras.callbacks.BackupAndRestore` in "
            "the same run ({keras_write:.2f} s and {keras_read:.2f} s).",
            {
                "write": ours["write_seconds"],
                "read": ours["read_seconds"],
                "keras_write": keras["write_seconds"],
                "keras_read": keras["read_seconds"],
            },
        ),
        (
            "At the full profile's {steps:d} steps that is {share:.2f} % of the time on 2 cores, and 1 % where "
            "a step takes "
            "{seconds:.1f} s ({machine}).",
            {
                "steps": step["interval_steps"],
                "share": step["share_of_training_percent"],
                "seconds": step["step_seconds_at_which_it_is_one_percent"],
                "machine": "Intel Xeon, with other work on it" if "Xeon" in resume["machine"] else resume["machine"],
            },
        ),
        ("killed by SIGKILL {kills:d} times", resume["ours, TensorFlow"]),
        ("no longer started after {kills:d} kills", resume["BackupAndRestore, TensorFlow"]),
    ]


def _compare(ours, others):
    """Returns the median of the ratios within a round, as benchmarks/peers.py does."""
    return median(a / b for a, b in zip(ours, others, strict=True))


def _gather_speed(read):
    packing, peers, step, scale = (read(name) for name in ("packing", "peers", "training_step", "scale"))
    rates, ratios, memory = packing["images_per_second"], packing["ratios"], packing["peak_mib_of_packing"]
    files, shrunk = ([row["in_each_round"] for row in table.values()] for table in list(peers["ways"].values())[:2])
    ahead, ahead_shrunk = (sorted(_compare(rounds[0], other) for other in rounds[1:]) for rounds in (files, shrunk))
    large, small = step["sizes"].values()
    ours, pytorch = "TensorFlow, as notebook 2", "PyTorch, channels last"
    with_keras = large["ratios"][f"{ours} / TensorFlow, Keras's batch normalization"]
    with_pytorch = large["ratios"][f"{ours} / {pytorch}"]
    stages = scale["stages"]
    one_way = {
        "files": ahead[0],
        "best": ahead_shrunk[0],
        "second": ahead_shrunk[1],
        "last": ahead_shrunk[-1],
        "reading": median(shrunk[0]) / max(median(rounds) for rounds in files[1:]),
    }
    speed = [
        (
            "| packing 1024 px PNG to 256 px shards | {rate:.0f} | {share:.0%} of PNG decoding alone ({decode:.0f})",
            {
                "rate": rates["packing, raw"],
                "share": ratios["packing / PNG decode alone"],
                "decode": rates["PNG decode alone"],
            },
        ),
        (
            "the same to PNG records, {kb:.0f} kB an image in place of {raw_kb:.0f} | {rate:.0f} | {share:.0%} "
            "of raw records; "
            "training batches then {training:.2f} times as many, evaluation batches {evaluation:.2f} times",
            {
                "kb": packing["by_side"]["256 px, png"]["bytes"] / 1000,
                "raw_kb": packing["by_side"]["256 px, raw"]["bytes"] / 1000,
                "rate": rates["packing, png"],
                "share": ratios["packing, png / raw"],
                "training": ratios["training batches, png / raw"],
                "evaluation": ratios["evaluation batches, png / raw"],
            },
        ),
        (
            "Packing takes {gb:.1f} GB of memory, for 1,000 images as for 4,000. Its one Python thread needs "
            "{ms:.2f} ms an "
            "image, enough for some {cores:d} cores that decode.",
            {
                "gb": max(memory.values()) * 2**20 / 1e9,
                "ms": packing["python_microseconds_per_image"] / 1000,
                "cores": packing["cores_that_python_could_feed"],
            },
        ),
        (
            "ours is {files:.2f} times as fast as the best of seven ways; from images shrunk once, {best:.1f} "
            "times as fast as "
            "the best (albumentations on a mapped array), and {second:.1f} to {last:.1f} times as fast as the "
            "other five; "
            "{reading:.0f} times as fast as the best that reads files.",
            one_way,
        ),
        (
            "of DenseNet-121 at 224 pixels, 16 images: {rate:.1f} images a second, {share:.0%} of the operations",
            {"rate": large["speeds"][ours]["images_per_second"], "share": large["speeds"][ours]["share_of_that"]},
        ),
        (
            "and {keras:.2f} times as many images as with Keras's own batch normalization",
            {"keras": with_keras["speed"]},
        ),
        (
            "takes {pytorch:.1f} (ours is {speed:.2f} times as fast by the clock and {processor:.2f} by "
            "processor time). At 96 "
            "pixels, 32 images, PyTorch is ahead: {small_pytorch:.1f} against {small:.1f}.",
            {
                "pytorch": large["speeds"][pytorch]["images_per_second"],
                "speed": with_pytorch["speed"],
                "processor": with_pytorch["by_processor_time"],
                "small_pytorch": small["speeds"][pytorch]["images_per_second"],
                "small": small["speeds"][ours]["images_per_second"],
            },
        ),
        (
            "the search for copies and all intervals in {seconds:.0f} seconds",
            {"seconds": sum(stage["all"]["seconds"] for stage in stages.values())},
        ),
    ]
    speed += _gather_step(step)
    metadata = stages["read metadata, find and match images"]
    scaled = [
        (
            "No stage takes more than {mb:d} MB",
            {"mb": -(-round(max(s["all"]["mib_growth"] for s in stages.values())) // 10) * 10},
        ),
        ("takes {times:.0f} times as long as for a tenth", {"times": metadata["times_the_seconds"]}),
        ("the processor's cache: {seconds:.0f} seconds, which were left", {"seconds": metadata["all"]["seconds"]}),
        (
            "ours is {percent:.0f} % faster than the fastest of the others",
            {"percent": 100 * (one_way["files"] - 1)},
        ),
        ("Shrinking the images once gains far more: {reading:.0f} times as many", one_way),
    ]
    return speed, scaled


def _gather_step(step):
    """Returns the sentences of docs/speed.md on what a training step is made of, and what was tried."""
    profile = step["profile_on_one_thread"]
    ours, with_keras = (
        profile[name]["shares"] for name in ("TensorFlow, as notebook 2", "TensorFlow, Keras's batch normalization")
    )
    add = lambda shares, word: 100 * sum(share for name, share in shares.items() if word in name)  # noqa: E731
    tried = {  # in the table of what is not used: the experiment, and how the reason begins
        "8 steps an execution": ("8 steps an execution", "noise"),
        "uint8 to the device": ("uint8 to the device", "noise"),
        "no averages of the weights": ("no averaged weights", "noise"),
        "mixed bfloat16": ("mixed_bfloat16", "different"),
        "one thread between operations": ("1 thread between operations", "slower"),
        "oneDNN off": ("oneDNN off (TF_ENABLE_ONEDNN_OPTS=0)", "slower"),
    }
    small = step["sizes"]["96 pixels, 32 images"]["ratios"]["TensorFlow, as notebook 2 / PyTorch, channels last"]
    again = step["experiments"]["same again"]["speed"]
    return [
        ("take {share:.0f} % of a step on one thread", {"share": add(ours, "convolutions")}),
        (
            "Batch normalization took {keras:.0f} % of a step and now takes {ours:.0f} %.",
            {"keras": add(with_keras, "batch normalization"), "ours": add(ours, "batch normalization")},
        ),
        ("Clipping, AdamW and averaging take {share:.1f} % at 16 images per step", {"share": add(ours, "optimizer")}),
        (
            "is {elapsed:.0f} % faster by the clock and {processor:.0f} % by processor time.",
            {"elapsed": 100 * (1 - small["speed"]), "processor": 100 * (1 - small["by_processor_time"])},
        ),
        ("has a row for the same setting again, {again:.2f}: smaller", {"again": again}),
        *((f"| {name} | {{speed:.2f}} | {why}", step["experiments"][key]) for name, (key, why) in tried.items()),
    ]


def _gather_formats(read):
    predict, serving, gray, gate = (read(name) for name in ("predict", "serving", "looks_inverted", "input_gate"))
    kinds = [gate["images"][name] for name in ("NIH", "JSRT")]
    plain = [kind["false alarms"]["as they are"]["any"] for kind in kinds]
    changes = ("inverted", "turned 90°", "turned 180°", "turned 270°")
    named = [kind["detections"][change]["named"]["percent"] for kind in kinds for change in changes]
    rates, rounds = predict["images_per_second"], predict["share_in_each_round"]
    rows = [row[kind] for row in gray["without borders"] for kind in ("as they are", "inverted")]
    counts = {answer: sum(row[answer] for row in rows) for answer in ("right", "wrong", "no answer")}
    total = sum(counts.values())
    return [
        (
            "`make predict` reaches {share:.0%} of the images per second that `serving_default` answers on "
            "files in memory "
            "({ours:.0f} and {model:.0f}, on {machine}, where {busy:.1f} processes wanted a core before the "
            "rounds; {n:d} rounds "
            "of {low:.0%} to {high:.0%}), {processor:.0%} by processor time",
            {
                "share": predict["share_of_the_models_own"],
                "ours": rates["predict_folder"],
                "model": rates["model on files in memory"],
                "machine": predict["machine"].partition(", Python")[0],
                "busy": float(predict["busy"].split()[0]),
                "n": len(rounds),
                "low": min(rounds),
                "high": max(rounds),
                "processor": predict["share_by_the_processors_time"],
            },
        ),
        (
            "On {n:d} real radiographs it warned {false:d} times without cause, and named {low:.1f} to {high:.0f} % of",
            {
                "n": sum(result["n"] for result in plain),
                "false": sum(result["count"] for result in plain) - 1,  # one of NIH's is inverted in the file
                "low": min(named),
                "high": max(named),
            },
        ),
        (
            "A served request takes {ratio:.2f} times as long as asking in the process",
            {"ratio": serving["one_image"]["ratio_of_p50"]},
        ),
        (
            "which was wrong on {wrong:d} of {total:,d} pictures made of {images:d} real radiographs",
            {"wrong": counts["wrong"], "total": total, "images": gray["images"]},
        ),
        ("on {share:.1f} % there was no answer", {"share": 100 * counts["no answer"] / total}),
        (
            "on 48 real radiographs of 1024 pixels a probability was up to {difference:.3f} from the SavedModel's",
            {
                "difference": max(
                    predict["exports_beside_the_saved_model_on_full_size"][name]["max_difference"]
                    for name in ("model.onnx", "model.tflite")
                )
            },
        ),
    ]


def _gather_gate(read):
    gate = read("input_gate")
    views, halves, speed = gate["NIH by view"], gate["NIH by half"], gate["images a second"]
    tilted = gate["images"]["NIH"]["false alarms"]["tilted 10°"]["any"]["percent"]
    return [
        (
            "By view: AP {ap:d} of {n_ap:d}, the inverted one; PA {pa:d} of {n_pa:d}.",
            {
                "ap": views["AP"]["any"]["count"],
                "n_ap": views["AP"]["any"]["n"],
                "pa": views["PA"]["any"]["count"],
                "n_pa": views["PA"]["any"]["n"],
            },
        ),
        (
            "({chosen:d} of {n_chosen:d} images; the other half has {held:d} of {n_held:d}, the inverted one included)",
            {
                "chosen": halves["chosen on"]["any"]["count"],
                "n_chosen": halves["chosen on"]["any"]["n"],
                "held": halves["held out"]["any"]["count"],
                "n_held": halves["held out"]["any"]["n"],
            },
        ),
        (
            "without decoding: {a:,.0f} images a second at 64 pixels, {b:,.0f} at 256, {c:,.0f} at 224, "
            "{d:,.0f} at 512.",
            {"a": speed["64"], "b": speed["256"], "c": speed["224"], "d": speed["512"]},
        ),
        ("a tilt of 10° is warned of in {percent:.0f} % of NIH's images", {"percent": tilted}),
    ]


def _gather_serving(read):
    serving = read("serving")
    http, alone = (serving["one_image"][name] for name in ("http", "in_process"))
    batches, memory = serving["images_per_second_in_batches_of_32"], serving["memory"]
    return [
        (
            "a request takes {http:.0f} ms (p95 {http95:.0f}); the model alone, in the same process, takes "
            "{alone:.0f} ms (p95 "
            "{alone95:.0f}), so HTTP and JSON make it {ratio:.2f} times as long. In batches of 32 the server predicts "
            "{batch:.0f} images a second, the process alone {batch_alone:.0f}; 8 clients with one image each get "
            "{clients:.0f}. Over {requests:,d} requests the server's memory stayed at {mib:,.0f} MiB",
            {
                "http": http["p50_ms"],
                "http95": http["p95_ms"],
                "alone": alone["p50_ms"],
                "alone95": alone["p95_ms"],
                "ratio": serving["one_image"]["ratio_of_p50"],
                "batch": batches["http"],
                "batch_alone": batches["in_process"],
                "clients": serving["images_per_second_of_8_clients"],
                "requests": memory["requests"],
                "mib": int(memory["mib_before"]),
            },
        ),
    ]


def _gather_tpu(read):
    ratios, compiled = read("global_statistics"), read("tpu_check")["jax"]["best"]
    return [
        (
            "The batch of 48 of `PROFILE=best` takes {share:.0f} % of the memory of one v5e chip",
            {"share": 100 * compiled["v5e-1"]["share of memory"]},
        ),
        (
            "The compiler makes {sums:d} sums over the cores of a step, of {mb:.1f} MB in all",
            {"sums": compiled["v5e-8"]["all-reduces"], "mb": compiled["v5e-8"]["bytes summed"] / 1e6},
        ),
        (
            "takes {keras:.2f} times as long as with Keras's synchronized layer, which makes three sums where "
            "ours makes one, "
            "and {local:.2f} times as long as with statistics of each replica",
            {
                "keras": ratios["ours / Keras, synchronized"]["elapsed"],
                "local": ratios["ours / Keras, local"]["elapsed"],
            },
        ),
    ]


def _gather_weights(read):
    networks = read("convert_weights")["networks"].values()
    return [
        (
            "give PyTorch's last map to {difference:.0e}",
            {"difference": max(network["largest_difference"] for network in networks)},
        ),
    ]


def _gather_xvision(read):
    features = read("features")
    return [
        (
            "Measured on {machine}, where {busy:.1f} processes wanted a core before: {rate:.0f} images a "
            "second through VGG16 at 224 pixels",
            {
                "machine": features["machine"].partition(", tensorflow")[0],
                "busy": float(features["busy"].split()[0]),
                "rate": features["images_per_second"]["cache"],
            },
        ),
        ("was at least {share:.2f} of what", {"share": int(100 * min(features["share_in_each_round"])) / 100}),
        (
            "takes {times:.0f} times as long as one of the head on cached features",
            {"times": features["fine_tuning_over_head"]},
        ),
        ("features have {kb:.0f} kB in float16", {"kb": features["bytes_per_image"]["float16"] / 1000}),
    ]


def _gather_models(read):
    exports = read("predict")["exports_beside_the_saved_model_on_full_size"]
    return [
        (
            "the probabilities of the quick profile's model differed by up to {difference:.3f}",
            {"difference": max(exports[name]["max_difference"] for name in ("model.onnx", "model.tflite"))},
        ),
    ]
