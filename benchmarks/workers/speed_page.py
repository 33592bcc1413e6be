"""Draws what `training_step.py`, `gpu_step.py` and `input_pipeline.py` found as the tables of docs/speed.md."""


def draw_table(head, rows):
    """Returns a Markdown table; all columns but the first are numbers."""
    lines = [" | ".join(head), " | ".join(["---"] + ["---:"] * (len(head) - 1))]
    return "".join(f"| {line} |\n" for line in lines + [" | ".join(map(str, row)) for row in rows])


def draw_speeds(sizes):
    """Returns a table for each size: rates of a step, and the ratios of notebook 2's to the others."""
    heads = ["step", "images/s", "processor seconds an image", "GFLOP/s", "matrix product, GFLOP/s", "share of that"]
    heads.append("notebook 2's is so many times as fast (by processor time)")
    text = ""
    for size, found in sizes.items():
        rows = []
        for name, speed in found["speeds"].items():
            ratio = next((r for pair, r in found["ratios"].items() if pair.endswith(f"/ {name}")), None)
            times = f"{ratio['speed']:.2f} ({ratio['by_processor_time']:.2f})" if ratio else ""
            columns = ("images_per_second", "cpu_seconds_per_image", "gigaflops", "matrix_product_gigaflops")
            rates = [f"{speed[column]:,.0f}" if speed[column] >= 1000 else speed[column] for column in columns]
            rows.append([name, *rates, f"{speed['share_of_that']:.0%}", times])
        text += f"\n{size}, {found['gigaflop_per_image']} GFLOP an image:\n\n{draw_table(heads, rows)}"
    return text


def draw_gpu(results):
    """Returns the table of a step on a GPU as Markdown."""
    found = next(iter(results["sizes"].values()))
    text = f"{found['device']}, {results['machine']}; {'; '.join(found['versions'])}; nothing else ran on it. XLA took "
    return text + f"{found['compiled_in_seconds']:.0f} s to compile the step.\n{draw_speeds(results['sizes'])}".rstrip()


def draw_results(results):
    """Returns the tables of speeds, of the profile and of the experiments as Markdown."""
    text = f"{results['machine']}; {'; '.join(results['versions'])}. {results['busy']}.\n"
    text += draw_speeds(results["sizes"])
    profile = dict(results["profile_on_one_thread"])
    text += f"\nWhere the time goes, {profile.pop('size')}, one thread:\n\n"
    columns = {name: found for name, found in profile.items() if isinstance(found, dict)}
    parts = next(iter(columns.values()))["shares"]
    rows = [[part, *(f"{found['shares'][part]:.1%}" for found in columns.values())] for part in parts]
    rows.append(["seconds a step", *(f"{found['seconds']:.2f}" for found in columns.values())])
    text += draw_table(["part of the step", *columns], rows)
    if experiments := dict(results.get("experiments", {})):
        text += f"\nOther settings, {experiments.pop('size')}. {experiments.pop('busy')}.\n\n"
        rows = [
            [name, found["speed"], found["by_processor_time"]] if isinstance(found, dict) else [name, found, ""]
            for name, found in experiments.items()
        ]
        text += draw_table(["compared with notebook 2's step", "times as fast", "by processor time"], rows)
    return text


def draw_input(results):
    """Returns the rates at which images reach the model as a Markdown table."""
    rates = results["images_per_second"]
    rows = []
    for name, rate in rates.items():
        pairs = {
            pair.partition(" / ")[2]: ratio for pair, ratio in results["ratios"].items() if pair.startswith(f"{name} /")
        }
        words = [f"{ratio:.2g} times {other}" for other, ratio in pairs.items()]
        rows.append([name, f"{rate:,.0f}", "; ".join(words)])
    head = f"{results['machine']}; {results['images']}.\n\n"
    return head + draw_table(["", "images/s", "medians of the ratios within a round"], rows)


def draw_ways(results):
    """Returns the ways to augment as Markdown tables, one for each size."""
    text = ""
    for size, ways in results["ways_to_augment"].items():
        head = ["way", "images/s", "times OpenCV", "processor µs an image", "beside a busy thread", "share kept"]
        columns = ("times_opencv", "processor_us_per_image", "images_per_second_beside_busy_python", "share_kept")
        rows = []
        for name, found in ways.items():
            times, work, beside, kept = (found[column] for column in columns)
            rows.append([name, f"{found['images_per_second']:,.0f}", f"{times:.2f}", f"{work:,.0f}", f"{beside:,.0f}"])
            rows[-1].append(f"{kept:.2f}")
        text += f"{size[0].upper()}{size[1:]} pixels:\n\n{draw_table(head, rows)}\n"
    return text
