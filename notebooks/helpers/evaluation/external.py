"""The same model on another hospital's images: what it loses there, and what recalibration on some patients gives back.

"Here" are the test images of the model's own study, "there" the images of the other. Findings are compared where
`study.finding_names` says that their labels mean the same, or nearly; of several that make one finding on the other
side, the highest score counts. The patients here and there are others, so each side draws its own resamples, those of
`auc`. A side's `(y_true, y_score, groups)` is as there, and `method` and `sensitivity` as in `choose_thresholds`.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import logit

from ..runtime.files import as_path
from ..study.labels import read_header, read_table
from ..study.study import read_patients
from .auc import auc_table, bootstrap_auc
from .bootstrap import interval_around, percentile_interval, ratio
from .calibration import apply_platt, bootstrap_calibration_error, calibration_error, fit_platt
from .predictions import name_columns, read_predictions
from .thresholds import choose_thresholds, rates_table


@dataclass(frozen=True)
class External:
    """A model's answers on another study's images.

    Attributes:
        name: of the study.
        rows: DataFrame, one row an image: `image`, `patient_id`, `view` ("unknown" where it is), and a column of 1, 0
            and NaN (unknown) for each finding of that study.
        findings: that study's findings, names of columns of `rows`.
        probs: (n, the model's findings) probabilities.
        has_patients: whether it is known which images belong to one patient; if not, each is one of its own.
    """

    name: str
    rows: pd.DataFrame
    findings: tuple
    probs: np.ndarray
    has_patients: bool


def read_external(path, findings):
    """Reads a model's answers on another study from a CSV that holds that study's labels too.

    Args:
        path: path of the CSV: `image`, `prob_<Finding>` for each of the model's findings, `label_<Finding>` of 1, 0 or
            empty for each of the other study's, and, if known, `patient_id` and `view`.
        findings: the model's findings.

    Returns:
        An `External`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as of `read_predictions`, or there are no labels or other ones.
    """
    path = as_path(path)
    predictions = read_predictions(path, findings)
    header = read_header(path)
    labels = [column for column in header if column.startswith("label_")]
    if not labels:
        raise ValueError(f"{path} has no column label_..., of a finding that the other study has labels of")
    table = read_table(path, [*labels, *({"patient_id", "view"} & {*header})])
    values = table[labels].apply(pd.to_numeric, errors="coerce")
    wrong = [column for column in labels if not (values[column].isin([0, 1]) | table[column].eq("")).all()]
    if wrong:
        raise ValueError(f"{path}: {', '.join(wrong)} may hold 0, 1 and, where a label is unknown, nothing")
    rows = predictions[["image"]].assign(patient_id=np.arange(len(table)), view="unknown")
    if "view" in table:
        rows["view"] = (
            table["view"].str.upper().where(table["view"].str.upper().isin(["PA", "AP", "LATERAL"]), "unknown")
        )
    if "patient_id" in table:
        rows["patient_id"] = read_patients(path, table["patient_id"])
    names = [column.removeprefix("label_") for column in labels]
    rows = rows.join(values.set_axis(names, axis=1)).reset_index(drop=True)
    return External(
        path.stem, rows, tuple(names), predictions[name_columns(findings)[0]].to_numpy(), "patient_id" in table
    )


def compare_sites(matches, findings, here, val, external, *, share, method="youden", sensitivity=None,
                  n_resamples=1000, seed=0, level=0.95):  # fmt: skip
    """Compares a model here and there.

    Args:
        matches: list of `Match` of the model's findings, "ours", and the other study's, at least one.
        findings: the model's findings.
        here: tuple of the test images' table (`patient_id`, `view`, a column a finding) and their (n, findings)
            probabilities, which should be calibrated, as those of different findings are compared.
        val: the same of the validation images, on which thresholds are chosen; None where there are none.
        external: `External`, with probabilities calibrated as those here.
        share: of the patients there, to recalibrate on.
        method: see the module.
        sensitivity: see the module.
        n_resamples: see `auc`.
        seed: of all draws.
        level: see `auc`.

    Returns:
        Tuple of two DataFrames: that of `drop_table` with `theirs`, `is_same`, `note` of each match, and `ap_here` and
        `ap_there`, the share of AP among the images of known view; and that of `recalibration_table`.
    """
    names = [" or ".join(match.ours) for match in matches]

    def take(side, rows, probs):
        return pair_labels(matches, side, rows), pair_scores(matches, findings, probs), rows["patient_id"].to_numpy()

    sites = take("ours", *here), take("theirs", external.rows, external.probs)
    thresholds = np.full(len(matches), np.nan)
    if val is not None:
        thresholds = choose_thresholds(*take("ours", *val)[:2], method, sensitivity)
    draws = {"n_resamples": n_resamples, "seed": seed, "level": level}
    drops = drop_table(*sites, names, **draws)
    drops.insert(1, "theirs", [" or ".join(match.theirs) for match in matches])
    for where, rows in (("here", here[0]), ("there", external.rows)):
        drops[f"ap_{where}"] = rows["view"][rows["view"].isin(["AP", "PA"])].eq("AP").mean()
    drops["is_same"], drops["note"] = zip(*((match.is_same, match.note) for match in matches), strict=True)
    in_share = draw_share(sites[1][2], share, seed)
    return drops, recalibration_table(sites[1], names, thresholds, in_share, method, sensitivity, **draws)


def pair_labels(matches, side, rows):
    """Returns labels of the matches' `side`: (n, matches) float64, 1 where any of its is, 0 where none is, else NaN."""
    columns = []
    for match in matches:
        labels = rows[[*getattr(match, side)]].to_numpy("float64")
        columns.append(np.where((labels == 1).any(axis=1), 1, np.where((labels == 0).all(axis=1), 0, np.nan)))
    return np.stack(columns, axis=1)


def pair_scores(matches, findings, scores):
    """Returns the scores of matched findings, (n, matches), of several the highest: they should be calibrated."""
    return np.stack([scores[:, [findings.index(name) for name in m.ours]].max(axis=1) for m in matches], axis=1)


def drop_table(here, there, names, n_resamples=1000, seed=0, level=0.95):
    """Builds the table of AUCs here and there, and of what is lost.

    Both sides have the classes `names`. The draws here begin with `seed`, those there with the next one.

    Returns:
        DataFrame with a row a class: `finding`; of `here` and `there` `n_pos_`, `n_neg_`, `prevalence_` (of the images
        whose label is known), `auc_`, with `_low` and `_high`; `drop`, the AUC here less that there, with its interval.
    """
    table, samples = pd.DataFrame({"finding": list(names)}), []
    for number, (where, (y, score, groups)) in enumerate((("here", here), ("there", there))):
        part = auc_table(y, score, groups, names, n_resamples, seed + number, level).iloc[:-1]
        for name in ("n_pos", "n_neg"):
            table[f"{name}_{where}"] = part[name].to_numpy()
        table[f"prevalence_{where}"] = ratio(part["n_pos"], part["n_pos"] + part["n_neg"])
        for end in ("", "_low", "_high"):
            table[f"auc_{where}{end}"] = part[f"auc{end}"].to_numpy()
        samples.append(bootstrap_auc(y, score, groups, n_resamples, seed + number))
    table["drop"] = table["auc_here"] - table["auc_there"]
    table["drop_low"], table["drop_high"] = interval_around(table["drop"], samples[0] - samples[1], level, -1, 1)
    return table


def draw_share(groups, share, seed=0):
    """Draws a share of the patients at random, at least one: (n,) bool of their images."""
    patients = np.unique(groups)
    drawn = np.random.default_rng(seed).permutation(len(patients))[: max(1, round(share * len(patients)))]
    return np.isin(groups, patients[drawn])


def recalibration_table(there, names, thresholds, in_share, method="youden", sensitivity=None, n_resamples=1000, seed=0,
                        level=0.95):  # fmt: skip
    """Measures probabilities and thresholds on another study as they come, and after recalibration on a share of it.

    Platt scaling and thresholds are chosen where `in_share`, (n,) bool, is true, on images of whole patients; both
    versions are measured on the rest. `thresholds` are those that come, NaN where there is none.

    Returns:
        DataFrame with a row a class and version, "as it comes" and "recalibrated": `finding`, `version`, `n_pos_share`
        (positive images to recalibrate on); on the rest `n_pos_rest`, `prevalence_rest`, `mean_prob`, then with `_low`
        and `_high` the expected calibration `error`, `sensitivity` and `specificity`, and the `threshold` of these.
    """
    y, probs, groups = (np.asarray(values) for values in there)
    logits = logit(np.clip(probs, 1e-7, 1 - 1e-7))
    recalibrated = apply_platt(logits, *fit_platt(y[in_share], logits[in_share]))
    chosen = choose_thresholds(y[in_share], recalibrated[in_share], method, sensitivity)
    rest, bootstrap = ~in_share, {"n_resamples": n_resamples, "seed": seed}
    known = ~np.isnan(y[rest])
    tables = []
    for version, values, at in (("as it comes", probs, thresholds), ("recalibrated", recalibrated, chosen)):
        part = y[rest], values[rest]
        rates = rates_table(*part, at, groups[rest], names, level=level, **bootstrap)
        table = pd.DataFrame({"finding": list(names), "version": version})
        table["n_pos_share"], table["n_pos_rest"] = (y[in_share] == 1).sum(axis=0), (part[0] == 1).sum(axis=0)
        table["prevalence_rest"] = ratio(table["n_pos_rest"], known.sum(axis=0))
        table["mean_prob"] = ratio((part[1] * known).sum(axis=0), known.sum(axis=0))
        samples = bootstrap_calibration_error(*part, groups[rest], **bootstrap)
        table["error"] = calibration_error(*part)
        table["error_low"], table["error_high"] = percentile_interval(samples, level)
        measures = [f"{name}{end}" for name in ("sensitivity", "specificity") for end in ("", "_low", "_high")]
        tables.append(table.join(rates[["threshold", *measures]]))
    return pd.concat(tables, ignore_index=True)
