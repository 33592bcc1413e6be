"""The tables of docs/tpu.md, every figure from the committed results."""

from benchmarks.tpu.recipe import SIZES
from benchmarks.tpu.roofline import HOST_SIDE, compute_roofline, read_host_speed

from helpers.training import CHIPS


def draw_tables(results):
    """Returns the tables as Markdown.

    Args:
        results: dict, content of benchmarks/results/tpu_check.json.
    """
    title = f"Compiled, not run: no TPU was available. {results['date']}, {results['machine']}."
    return "\n".join([title, "", *_list_checks(results), "", *_list_compiled(results), *_list_roofline(results)])


def _list_checks(results):
    lines = ["| check | found | seconds, all in all |", "|---|---|---:|"]
    if "graph" in results:
        graph = results["graph"]
        lines += [
            f"| TensorFlow's train step against TensorBoard's {graph['known']} TPU ops | {graph['ops']:,} ops of "
            f"{graph['kinds']} kinds; outside the list {len(graph['outside'])}, of dynamic shape "
            f"{len(graph['dynamic'])}, calls to the host {len(graph['host'])}; a planted RandomRotation shows as "
            f"{', '.join(graph['planted rotation found by'])} | {graph['part seconds']:.0f} |"
        ]
    if "jit" in results:
        lines += [
            "| that step compiled by XLA for this CPU, and one step run | `jit_compile` stays on; with a planted "
            f"RandomRotation Keras turns it off | {results['jit']['part seconds']:.0f} |"
        ]
    names = {"mirrored": "`MirroredStrategy`, TensorFlow", "parallel": "`DataParallel`, JAX"}
    for part in (part for part in names if part in results):
        found = results[part]
        largest = ", ".join(f"{key} {value:.1e}" for key, value in found["largest differences"].items())
        lines += [
            f"| {found['devices']} logical CPUs under {names[part]}, against one | largest differences: {largest} | "
            f"{found['part seconds']:.0f} |"
        ]
    if "precision" in results:
        cycles = results["precision"]["cycles"]
        found = "; ".join(f"{name} {number:,}" for name, number in cycles.items())
        seconds = results["precision"]["part seconds"]
        lines += [f"| cycles of a convolution on v5e, by type and JAX's precision | {found} | {seconds:.0f} |"]
    return lines


def _list_compiled(results):
    lines = [
        "| train step of | size | machine | images a core | CPU seconds to compile | memory a core | of what it has | "
        "operations a core | bytes moved a core | sums over the cores |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for part, backend in (("jax", "Keras on JAX"), ("stablehlo", "Keras on TensorFlow")):
        for size in SIZES:
            by_chips = results.get(part, {}).get(size, {})
            for name in (name for name in CHIPS if name in by_chips):
                found = by_chips[name]
                sums = (
                    f"{found['all-reduces']} of {found['bytes summed'] / 1e6:.1f} MB"
                    if found.get("all-reduces")
                    else ""
                )
                lines += [
                    f"| {backend} | {found['side']} px, batch {found['batch']} | {name} | "
                    f"{found['batch'] // found.get('cores', 1)} | {found['compile cpu seconds']:.0f} | "
                    f"{found['bytes held'] / 2**20:,.0f} MiB | {found['share of memory']:.1%} | "
                    f"{found['flops'] / 1e9:,.0f} G | {found['bytes moved'] / 1e9:.1f} GB | {sums} |"
                ]
    return lines


def _list_roofline(results):
    lines = [
        "",
        "| size | machine | images/s at peak arithmetic | at peak bandwidth | at best | what binds | "
        "host: CPUs that keep up with the best | with peak arithmetic | CPUs it has |",
        "|---|---|---:|---:|---:|---|---:|---:|---:|",
    ]
    host = read_host_speed()
    for size in (size for size in SIZES if not SIZES[size]):
        by_chips = results.get("jax", {}).get(size, {})
        for name in (name for name in CHIPS if name in by_chips):
            side = by_chips[name]["side"]
            row = compute_roofline(name, by_chips[name], host * (HOST_SIDE / side) ** 2)
            lines += [
                f"| {side} px | {name} | {row['compute']:,.0f} | {row['memory']:,.0f} | {row['best']:,.0f} | "
                f"{row['binds']} | {row['cpus for best']:.1f} | {row['cpus for peak']:.1f} | "
                f"{CHIPS[name].host_cpus or 'not documented'} |"
            ]
    note = f"One core of the machine of `input_pipeline.json` augments {host:,.0f} images/s of {HOST_SIDE} px"
    return [*lines, "", f"{note}; other sizes are taken to need time in proportion to their pixels."]
