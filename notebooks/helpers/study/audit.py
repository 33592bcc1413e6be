"""Audits a study before anything is trained on it: counts, copies, formats, contradictions, patients in two subsets.

Counts beside NIH's and contradictions are of the whole label file; all else is of the packed images, since these are
what a model sees.
"""

import itertools

import numpy as np
import pandas as pd

from . import counts
from .duplicates import read_images
from .labels import list_findings
from .splits import SUBSETS

FORMAT = 2  # of the report
LEAST_LEVELS = 128  # gray levels, half of them; 551 real radiographs span 130 or more, see docs/input_gate.md

_SAMPLED_SIDE = 32  # places down and across at which the gray levels of a packed image are measured


def audit_study(source, matched, study, duplicates):
    """Audits a study, from its label file to the packed images.

    Args:
        source: the `Study`, with all rows of the label file.
        matched: `StudyReport` of `match_images`.
        study: the `PackedStudy`.
        duplicates: pairs of `find_study_duplicates`.

    Returns:
        Dict that can be written as JSON, tables as lists of dicts, without NaN (None where a share is of nothing):
        `format`; `study`, `kind` (the layout; of NIH's that of `identify_study`), `labels` (the file), `about`,
        `split`, `split_sha256`, `index_sha256`, `side`; `rows`, `found`, `missing`, `extra` (counts),
        `missing_examples`, `extra_examples`, `unreadable`;
        `narrow` (of `count_narrow`); `strays` (images with boxes and without a row); `limits` (of `list_limits`);
        `verdict`; and the tables `published`, `parts`, `findings`, `findings_per_image`, `patient_overlap`,
        `duplicates`, `duplicate_pairs` (the first 100), `census`, `oddities`, `cooccurrence`, `views`, `follow_up`,
        `images_per_patient` and `ages`, of the functions below and in `counts`. Where the study has no patient ids,
        what counts patients is left out.
    """
    rows, metadata, boxes = study.index, source.rows, source.boxes
    kind, published = source.kind, pd.DataFrame()
    if kind == "nih":
        kind = counts.identify_study(source.folder, metadata)
        published = counts.compare_counts(source.folder, metadata, rows["image"])
        if kind != "nih":
            published["difference"] = None  # it is no fault there
    n_images = rows.groupby("patient_id")["patient_id"].transform("size")
    tables = {
        "published": published,
        "parts": counts.subset_table(rows),
        "findings": counts.finding_table(rows),
        "findings_per_image": counts.findings_per_image(rows),
        "patient_overlap": patient_overlap(rows),
        "duplicates": count_duplicates(duplicates, rows),
        "duplicate_pairs": duplicates.head(100),
        "views": counts.view_table(rows),
        "follow_up": counts.band_table(rows, rows["follow_up"]).head(None if rows["follow_up"].any() else 0),
        "images_per_patient": counts.band_table(rows, n_images),
        "ages": counts.age_table(rows),
    }
    oddities = find_oddities(metadata) if source.has_patients else {}
    if not source.has_patients:
        of_patients = ["patients", "images_per_patient", "patient", "patient_a", "patient_b"]
        tables = {name: table.drop(columns=of_patients, errors="ignore") for name, table in tables.items()}
        tables |= {name: pd.DataFrame() for name in ("patient_overlap", "follow_up", "images_per_patient")}
    report = {
        "format": FORMAT,
        "study": source.folder.name,
        "kind": kind,
        "labels": source.source,
        "about": source.about,
        "split": study.split_name,
        "split_sha256": study.split_sha256,
        "index_sha256": study.index_sha256,
        "side": study.side,
        "rows": matched.n_rows,
        "found": matched.n_found,
        "missing": matched.n_missing,
        "extra": matched.n_extra,
        "missing_examples": list(matched.missing),
        "extra_examples": list(matched.extra),
        "unreadable": study.excluded,
        "strays": _count_some(boxes.loc[~boxes["image"].isin(metadata["image"]), ["image"]].drop_duplicates()),
        "limits": list_limits(rows, boxes),
        **{name: _to_json(table) for name, table in tables.items()},
        "census": take_census(rows),
        "narrow": count_narrow(study),
        "oddities": oddities,
        "cooccurrence": {name: row.to_dict() for name, row in counts.count_together(rows).iterrows()},
    }
    return report | {"verdict": judge(report)}


def patient_overlap(rows):
    """Counts the patients that each two subsets of a split share.

    Args:
        rows: DataFrame with `subset` and `patient_id`.

    Returns:
        DataFrame of three rows: `a`, `b`, `patients` (int64, in both), and `images_of_b`, the share of b's images whose
        patient is in a. Had a fifth of ChestX-ray14's images been drawn at random for validation, 0.83 of them would
        be of a patient in train.
    """
    table = []
    for a, b in itertools.combinations(SUBSETS, 2):
        patients = set(rows.loc[rows["subset"].eq(a), "patient_id"])
        others = rows.loc[rows["subset"].eq(b), "patient_id"]
        share = others.isin(patients).mean() if len(others) else 0.0
        table.append((a, b, len(patients & set(others)), share))
    return pd.DataFrame(table, columns=["a", "b", "patients", "images_of_b"])


def count_duplicates(pairs, rows):
    """Counts pairs of copies by kind, and whether they cross patients or subsets.

    Args:
        pairs: DataFrame of `find_study_duplicates`.
        rows: DataFrame with `image` and a column of labels for each finding.

    Returns:
        DataFrame of eight rows: `kind` ("exact", "near"), `patient` and `subset` ("same", "other"), `pairs` and
        `images` (int64, an image of several pairs counted once), and `labels_differ` (int64, pairs with different
        findings; of an exact pair at least one image is then mislabeled).
    """
    labels = rows.set_index("image")[[*list_findings(rows)]]
    labels_a, labels_b = (labels.loc[pairs[name]].to_numpy("float32") for name in ("image_a", "image_b"))
    differ = (np.abs(labels_a - labels_b) > 0).any(axis=1)  # an unknown label differs from none
    table = []
    for kind, patient, subset in itertools.product(("exact", "near"), ("same", "other"), ("same", "other")):
        chosen = pairs["kind"].eq(kind)
        chosen &= pairs["patient_a"].eq(pairs["patient_b"]).eq(patient == "same")
        chosen &= pairs["subset_a"].eq(pairs["subset_b"]).eq(subset == "same")
        images = {*pairs.loc[chosen, "image_a"], *pairs.loc[chosen, "image_b"]}
        table.append((kind, patient, subset, int(chosen.sum()), len(images), int(differ[chosen.to_numpy()].sum())))
    return pd.DataFrame(table, columns=["kind", "patient", "subset", "pairs", "images", "labels_differ"])


def take_census(rows):
    """Counts the image files by size and mode.

    Args:
        rows: DataFrame with `image`, and of the files as distributed `width`, `height` (pixels), `mode` (Pillow's name,
            such as "L", "RGBA", "I;16") and `n_bytes`.

    Returns:
        Dict: `sizes` and `modes`, lists of dicts with `images`, the most common first; `not_square` and `uncommon`,
        images that are not of the most common size and mode, each a dict with `count` and five `examples`; `bytes` with
        `min`, `median`, `max`, `sum`.
    """
    files = rows[["image", "width", "height", "mode"]]
    kinds = {"sizes": ["width", "height"], "modes": ["mode"]}
    census = {name: files.value_counts(columns).rename("images").reset_index() for name, columns in kinds.items()}
    common = [*census["sizes"].loc[0, ["width", "height"]], census["modes"].loc[0, "mode"]]
    return {name: _to_json(table) for name, table in census.items()} | {
        "not_square": _count_some(files[files["width"] != files["height"]]),
        "uncommon": _count_some(files[(files[["width", "height", "mode"]] != common).any(axis=1)]),
        "bytes": rows["n_bytes"].agg(["min", "median", "max", "sum"]).astype("int64").to_dict(),
    }


def measure_levels(images):
    """Measures how many gray levels images span, without the darkest and the brightest hundredth of the pixels.

    Args:
        images: array (n, height, width), gray levels.

    Returns:
        Array (n,) of the same type, gray levels.
    """
    pixels = images.reshape(len(images), -1)
    ends = pixels.shape[1] // 100, pixels.shape[1] - 1 - pixels.shape[1] // 100
    ordered = np.partition(pixels, ends, axis=1)
    return ordered[:, ends[1]] - ordered[:, ends[0]]


def count_narrow(study):
    """Counts the packed images that leave more than half of the gray levels unused, such as 12 bits saved as 16.

    Args:
        study: the `PackedStudy`.

    Returns:
        Dict of `count` and up to five `examples`, each with `image` and `levels`, of `measure_levels`.
    """
    step = max(1, study.side // _SAMPLED_SIDE)
    levels = [measure_levels(images[:, ::step, ::step, 0]) for images in read_images(study)]
    levels = np.concatenate([np.empty(0, "uint8"), *levels])
    rows = study.index[["image"]].head(len(levels)).assign(levels=levels)
    return _count_some(rows[rows["levels"] < LEAST_LEVELS])


def find_oddities(metadata):
    """Finds ages, sexes and numbers that contradict each other in a label file.

    Args:
        metadata: DataFrame of `Study.rows`.

    Returns:
        Dict from what is odd to `count` (images, or patients where it says so) and up to five `examples`. A patient's
        ages are compared in the order of `follow_up`. File names are NIH's, patient and number: 00000013_008.png.
    """
    ordered = metadata.sort_values(["patient_id", "follow_up", "image"], kind="stable")
    aged = ordered[ordered["age"].notna()]
    younger = aged.groupby("patient_id")["age"].diff() < 0
    sexes = ordered.groupby("patient_id")["sex"].transform("nunique")
    name = ordered["image"].str.extract(r"^(\d{8})_(\d{3})\.png$").apply(pd.to_numeric)
    known = name[0].notna()
    shown = ordered[["image", "patient_id", "follow_up", "age", "sex"]]
    return metadata.attrs.get("ages", {}) | {
        "younger than before": _count_some(shown.loc[aged.index[younger]]),
        "patients of two sexes": _count_some(shown[sexes > 1].drop_duplicates(["patient_id", "sex"]), "patient_id"),
        "follow-up number taken": _count_some(shown[ordered.duplicated(["patient_id", "follow_up"])]),
        "named after another patient": _count_some(shown[known & name[0].ne(ordered["patient_id"])]),
        "named with another number": _count_some(shown[known & name[1].ne(ordered["follow_up"])]),
    }


def list_limits(rows, boxes):
    """Lists what the later notebooks cannot do with a study.

    Args:
        rows: DataFrame of the packed images with `image`, `subset` and a column of labels for each finding.
        boxes: DataFrame of `Study.boxes`.

    Returns:
        List of sentences; empty if they can do everything.
    """
    limits = []
    effects = {
        "train": ("notebook 2 has nothing to train on", "cannot be learned"),
        "val": ("notebook 2 keeps the last epoch, and notebook 3 has no thresholds, which notebook 5 needs",
                "have no AUC in training and a threshold of 0.5"),
        "test": ("notebooks 3 and 4 take validation images, on which scores are too high", "have no test AUC"),
    }  # fmt: skip
    for subset, (if_empty, if_alike) in effects.items():
        labels = rows.loc[rows["subset"].eq(subset), [*list_findings(rows)]]
        alike = [name for name in labels if labels[name].nunique() < 2]
        if labels.empty:
            limits.append(f"No image is in {subset}: {if_empty}.")
        elif alike:
            every = len(alike) == len(labels.columns) > 1
            which = f"all {len(alike)} findings" if every else ", ".join(alike)
            limits.append(f"Of {which}, the images in {subset} are all alike: they {if_alike}.")
    if not boxes["image"].isin(rows.loc[rows["subset"].isin(["val", "test"]), "image"]).any():
        limits.append("No image in val or test has a box: notebook 4 shows heatmaps and cannot score them.")
    return limits


def judge(report):
    """Sums up an audit in one line for each check.

    Args:
        report: dict of `audit_study` without its verdict.

    Returns:
        List of dicts: `check`; `found` and `expected` (int, how many of what should not be; None where nothing could be
        compared); `status`, "ok", "look" (the study may be used, but look at what was found), "wrong" (it must not be
        used as it is) or "not compared"; `detail` (str), which names some.
    """
    lines = []

    def add(check, found, examples=(), status="look", detail=""):
        detail = detail or ", ".join(examples[:3]) + (", ..." if len(examples) > 3 else "")
        status = status if found else "not compared" if found is None else "ok"
        expected = None if found is None else 0
        lines.append({"check": check, "found": found, "expected": expected, "status": status, "detail": detail})

    if report["kind"] == "nih":
        wrong = [row for row in report["published"] if row["difference"]]
        texts = [f"{row['count']} ({row['part']}) {row['listed']:,}, not {row['published']:,}" for row in wrong]
        detail = "" if wrong else f"{len(report['published'])} compared"
        add("counts other than NIH's", len(wrong), texts, "wrong", detail)
    else:
        add("counts other than NIH's", None, detail="only NIH's complete label file can be compared")
    add("rows without an image", report["missing"], report["missing_examples"])
    add("images without a row", report["extra"], report["extra_examples"])
    strays = report["strays"]
    add("images with boxes and without a row", strays["count"], [row["image"] for row in strays["examples"]])
    unreadable = [f"{image['image']}: {image['reason']}" for image in report["unreadable"]]
    add("images that cannot be read", len(unreadable), unreadable)
    if report["patient_overlap"]:
        overlap = [row for row in report["patient_overlap"] if row["patients"]]
        texts = [f"{row['patients']:,} in {row['a']} and {row['b']}" for row in overlap]
        status = "look" if report["split"] == "leaky_images" else "wrong"  # there it is the purpose
        add("patients in two subsets", sum(row["patients"] for row in overlap), texts, status)
    else:
        add("patients in two subsets", None, detail="the study has no patient ids")
    for kind, subset in itertools.product(("exact", "near"), ("other", "same")):
        chosen = [row for row in report["duplicates"] if (row["kind"], row["subset"]) == (kind, subset)]
        n_pairs, differ = (sum(row[name] for row in chosen) for name in ("pairs", "labels_differ"))
        detail = f"{differ:,} with different findings" if n_pairs else ""
        if n_pairs and report["patient_overlap"]:
            detail = f"{sum(row['pairs'] for row in chosen if row['patient'] == 'other'):,} of two patients, {detail}"
        where = "across subsets" if subset == "other" else "within a subset"
        add(f"{kind} copies {where}, pairs", n_pairs, detail=detail)
    for name, check in (("not_square", "images that are not square"), ("uncommon", "images of uncommon size or mode")):
        odd = report["census"][name]
        add(check, odd["count"], ["{image} {width} x {height} {mode}".format(**image) for image in odd["examples"]])
    narrow = report["narrow"]
    texts = ["{image} {levels} of 256".format(**image) for image in narrow["examples"]]
    add("images that use less than half of the gray levels", narrow["count"], texts)
    checks = {"missing": "ages that are unusable", "converted": "ages in months, weeks or days"}
    add("limits for later notebooks", len(report["limits"]), detail=" ".join(report["limits"]))
    for name, odd in report["oddities"].items():
        texts = [f"{row['image']}: {row['text']!r}" if "text" in row else row["image"] for row in odd["examples"]]
        add(checks.get(name, name), odd["count"], texts)
    return lines


def _count_some(rows, counted="image"):
    """Counts rows, or distinct values of a column, and shows the first five."""
    return {"count": int(rows[counted].nunique()), "examples": _to_json(rows.head())}


def _to_json(table):
    """Returns the rows as dicts of what JSON knows: NaN becomes None, and floats keep six digits."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [
        {k: round(v, 6) if isinstance(v, float) else getattr(v, "item", lambda v=v: v)() for k, v in row.items()}
        for row in rows
    ]
