"""The tables of the model card: what notebooks 3 and 4 measured, in Markdown. What they did not is said so."""

import pandas as pd

from ..runtime.files import read_csv
from ..runtime.settings import read_json

NOT_MEASURED = "not measured"
_ATTRIBUTES = {"sex": "by sex", "age": "by age", "view": "by view", "images": "by images a patient"}


def format_interval(row, name="auc"):
    """Writes a value of a table's row with its interval, or a dash where nothing defines it."""
    value, low, high = (row[column] for column in (name, f"{name}_low", f"{name}_high"))
    return f"{value:.3f} ({low:.3f} to {high:.3f})" if value == value else "–"


def escape_cell(value):
    """Writes a value into a cell of a Markdown table: pipes and tags are escaped, ends of lines are spaces."""
    if value is None or value != value:
        return "–"
    return " ".join(str(value).replace("|", r"\|").replace("<", "&lt;").split())


def write_metrics(run_dir, run, aucs):
    """Writes what was measured for each finding on the test images; `aucs` is of `measured_aucs`."""
    has_thresholds = (run_dir / "thresholds.json").exists()
    points = read_json(run_dir / "thresholds.json")["pathologies"] if has_thresholds else {}
    error = _optional_csv(run_dir / "figures" / "03_calibration.csv")
    error = error.set_index("pathology").get("error Platt", pd.Series(dtype=float)) if len(error) else {}
    rows = []
    for name in [*run["classes"], "mean"]:
        row, point = aucs.loc[name], points.get(name, {})
        rates = [point.get(key) for key in ("threshold", "sensitivity_test", "specificity_test")]
        cells = [_decimals(value) for value in (*rates, error.get(name))]
        count = "" if name == "mean" else f"{row['n_pos']:,}"
        rows.append([plain_name(name), count, format_interval(row), _decimals(row["ap"]), *cells])
    columns = ["finding", "images with it", "AUC", "average precision", "threshold", "sensitivity", "specificity"]
    text = write_table(pd.DataFrame(rows, columns=[*columns, "calibration error"]))
    missing = [] if has_thresholds else [f"Thresholds: {NOT_MEASURED}, for lack of validation images or of notebook 3."]
    missing += [] if len(error) else [f"Calibration error: {NOT_MEASURED}."]
    return "\n\n".join([text, *missing])


def write_floors(run_dir):
    """Writes what is reached without looking at an image."""
    table = _optional_csv(run_dir / "figures" / "03_aucs.csv")
    means = {name: table[name].mean() for name in ("view only", "metadata only") if name in table}
    if not means:
        return f"What can be reached without looking at an image: {NOT_MEASURED}."
    said = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
    return f"Without a look at any image, the mean AUC is: {said} (metadata: age, sex, view, follow-up number)."


def write_radiologists(run_dir):
    """Writes the AUC against labels that radiologists gave; nothing where there are none."""
    table = _optional_csv(run_dir / "figures" / "03_radiologists.csv")
    if not len(table):
        return ""
    table = table.assign(AUC=[format_interval(row) for _, row in table.iterrows()])
    return f"Against radiologists' labels:\n\n{write_table(table[['finding', 'mapped to', 'n_pos', 'AUC']])}\n\n"


def write_subgroups(run_dir):
    """Writes the AUC of each finding in each subgroup, and the largest gaps."""
    table = _optional_csv(run_dir / "figures" / "03_subgroups_auc.csv")
    if not len(table):
        return f"By view, sex and age: {NOT_MEASURED}."
    table = table.assign(cell=[f"{format_interval(r)}{' *' * bool(r['small'])}" for _, r in table.iterrows()])
    texts = [
        "AUC with interval; a star marks a cell of too few patients with the finding, or images without, to lean on."
    ]
    for attribute, rows in table.groupby("attribute", sort=False):
        groups, findings = rows["group"].unique(), rows["pathology"].unique()
        cells = rows.pivot(index="pathology", columns="group", values="cell").loc[findings, groups]  # noqa: PD010
        images = rows.assign(images=rows["n_pos"] + rows["n_neg"]).groupby("group")["films"].first()
        cells.columns = [f"{group}, {images[group]:,} images" for group in groups]
        cells.index = pd.Index([plain_name(name) for name in findings], name=_ATTRIBUTES.get(attribute, attribute))
        texts.append(write_table(cells.reset_index()))
    return "\n\n".join([*texts, _gaps(run_dir)])


def _gaps(run_dir):
    gaps = _optional_csv(run_dir / "figures" / "03_gaps.csv")
    if "gap" not in gaps:
        return f"Gaps in sensitivity between groups: {NOT_MEASURED}."
    shown = gaps[gaps["gap_low"] > 0].sort_values("gap", ascending=False)
    said = f"Gaps in sensitivity between groups with an interval above 0: {len(shown)} of {gaps['gap'].notna().sum()}"
    if not len(shown):
        return f"{said}."
    top = shown.head(5)
    rows = top[["attribute", "highest", "lowest"]].assign(gap=[format_interval(r, "gap") for _, r in top.iterrows()])
    rows.insert(0, "finding", top["pathology"].map(plain_name))
    return f"{said}. The pairs were picked for their gap, so some are chance. The largest:\n\n{write_table(rows)}"


def write_localization(run_dir):
    """Writes how often heatmaps point into the boxes."""
    table = _optional_csv(run_dir / "localization.csv")
    if not len(table):
        return f"Heatmaps against boxes: {NOT_MEASURED}, for lack of boxes on images that were not trained on."
    columns = {"finding": table["pathology"].map(plain_name), "films": table["n_images"]}
    columns["hottest place in the box"] = [format_interval(row, "pointing") for _, row in table.iterrows()]
    for name, control in {
        "random weights": "random",
        "image's center": "center",
        "boxes of others": "location",
    }.items():
        if f"pointing_{control}" in table:
            columns[name] = table[f"pointing_{control}"].map(_decimals)
    said = "How often a class activation map is hottest inside the box, beside controls that learned nothing"
    return f"{said}:\n\n{write_table(pd.DataFrame(columns))}"


def _optional_csv(path):
    return read_csv(path) if path.exists() else pd.DataFrame()


def plain_name(name):
    """Returns a finding's name with spaces."""
    return name.replace("_", " ")


def _decimals(value):
    return None if value is None or value != value else f"{value:.3f}"


def write_pairs(values):
    """Writes a dict as a Markdown table of two columns."""
    return write_table(pd.DataFrame(values.items(), columns=["", "value"]))


def write_table(frame):
    """Writes a DataFrame, without its index, as a Markdown table."""
    rows = [frame.columns, ["---"] * len(frame.columns), *frame.itertuples(index=False, name=None)]
    return "\n".join("| " + " | ".join(map(escape_cell, row)) + " |" for row in rows)
