"""Audits a study before anything is trained on it: counts, copies, formats, contradictions, patients in two parts.

All but counts and contradictions is of the packed images, since that is what a model sees.
"""

import itertools

import pandas as pd

from ..runtime.files import as_path
from .labels import PATHOLOGIES, has_patients
from .nih_counts import compare_counts, identify_study
from .splits import SUBSETS
from .tables import (
    age_table,
    band_table,
    count_together,
    finding_table,
    findings_per_image,
    subset_table,
    view_table,
)

FORMAT = 1  # of the report

_NAMES = list(PATHOLOGIES)
_BITS = {"1": 1, "L": 8, "LA": 8, "P": 8, "RGB": 8, "RGBA": 8, "CMYK": 8, "I": 32, "F": 32}  # a channel; I;16... are 16
_N_EXAMPLES = 5


def audit_study(study_dir, metadata, matched, study, duplicates):
    """Audits a study, from its label file to the packed images.

    Args:
        study_dir: path of the folder in NIH's layout.
        metadata: frame of `load_metadata`, all rows of the label file.
        matched: `StudyReport` of `match_images`.
        study: the `PackedStudy`.
        duplicates: pairs of `find_study_duplicates`.

    Returns:
        Dict that can be written as JSON, tables as lists of dicts, without NaN (None where a share is of nothing):
        `format`; `study`, `kind` (of `identify_study`), `labels` (the file), `split`, `split_sha256`, `index_sha256`,
        `side`; `rows`, `found`, `missing`, `extra` (counts), `missing_examples`, `extra_examples`, `unreadable`;
        `verdict`; and the tables `published`, `parts`, `findings`, `findings_per_image`, `patient_overlap`,
        `duplicates`, `duplicate_pairs` (the first 100), `census`, `oddities`, `cooccurrence`, `views`, `follow_up`,
        `images_per_patient` and `ages`, of the functions below.
    """
    rows = study.index
    report = {
        "format": FORMAT,
        "study": as_path(study_dir).name,
        "kind": identify_study(study_dir, metadata),
        "labels": metadata.attrs["source"],
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
    }
    published = compare_counts(study_dir, metadata, rows["image"])
    if report["kind"] != "nih":
        published["difference"] = None  # no fault, so nothing is claimed
    report["published"] = _plain(published)
    report["parts"] = _plain(subset_table(rows))
    report["findings"] = _plain(finding_table(rows))
    report["findings_per_image"] = _plain(findings_per_image(rows))
    report["patient_overlap"] = _plain(patient_overlap(rows))
    report["duplicates"] = _plain(count_duplicates(duplicates, rows))
    report["duplicate_pairs"] = _plain(duplicates.head(100))
    report["census"] = take_census(rows)
    report["oddities"] = find_oddities(metadata)
    report["cooccurrence"] = {name: row.to_dict() for name, row in count_together(rows).iterrows()}
    report["views"] = _plain(view_table(rows))
    report["follow_up"] = _plain(band_table(rows, rows["follow_up"]))
    n_images = rows.groupby("patient_id")["patient_id"].transform("size")
    report["images_per_patient"] = _plain(band_table(rows, n_images))
    report["ages"] = _plain(age_table(rows))
    if not has_patients(study_dir):
        _leave_out_patients(report)
    return report | {"verdict": judge(report)}


def _leave_out_patients(report):
    """Takes out what counts patients, where a study tells none: the numbers would be of images."""
    for table in ("parts", "findings", "duplicates", "duplicate_pairs"):
        for row in report[table]:
            for name in ("patients", "images_per_patient", "patient", "patient_a", "patient_b"):
                row.pop(name, None)
    report["published"] = [row for row in report["published"] if "patient" not in row["count"]]
    report["oddities"] = {name: report["oddities"][name] for name in ("missing", "converted")}
    report |= {table: [] for table in ("patient_overlap", "follow_up", "images_per_patient")}


def patient_overlap(rows):
    """Counts what each two parts of a split share.

    Args:
        rows: DataFrame with `subset` and `patient_id`.

    Returns:
        DataFrame of three rows: `a`, `b`, `patients` (int64, in both), and `images_of_b`, the share of b's images whose
        patient is in a: of ChestX-ray14's validation images 0.83, had a fifth of the images been drawn for validation.
    """
    table = []
    for a, b in itertools.combinations(SUBSETS, 2):
        patients = set(rows.loc[rows["subset"].eq(a), "patient_id"])
        others = rows.loc[rows["subset"].eq(b), "patient_id"]
        share = others.isin(patients).mean() if len(others) else 0.0
        table.append((a, b, len(patients & set(others)), share))
    return pd.DataFrame(table, columns=["a", "b", "patients", "images_of_b"])


def count_duplicates(pairs, rows):
    """Counts pairs of copies by kind, and whether they cross patients or parts.

    Args:
        pairs: DataFrame of `find_study_duplicates`.
        rows: DataFrame with `image` and the 14 labels.

    Returns:
        DataFrame of eight rows: `kind` ("exact", "near"), `patient` and `subset` ("same", "other"), `pairs` and `films`
        (int64, an image of several pairs counted once), and `labels_differ` (int64, pairs that do not have the same
        findings, of which at least one image is mislabeled where they are exact).
    """
    labels = rows.set_index("image")[_NAMES]
    differ = (labels.loc[pairs["image_a"]].to_numpy() != labels.loc[pairs["image_b"]].to_numpy()).any(axis=1)
    table = []
    for kind, patient, subset in itertools.product(("exact", "near"), ("same", "other"), ("same", "other")):
        chosen = pairs["kind"].eq(kind)
        chosen &= pairs["patient_a"].eq(pairs["patient_b"]).eq(patient == "same")
        chosen &= pairs["subset_a"].eq(pairs["subset_b"]).eq(subset == "same")
        images = {*pairs.loc[chosen, "image_a"], *pairs.loc[chosen, "image_b"]}
        table.append((kind, patient, subset, int(chosen.sum()), len(images), int(differ[chosen.to_numpy()].sum())))
    return pd.DataFrame(table, columns=["kind", "patient", "subset", "pairs", "films", "labels_differ"])


def take_census(rows):
    """Counts the image files by size, mode and depth.

    Args:
        rows: DataFrame with `image`, and of the files as distributed `width`, `height` (pixels), `mode` (Pillow's name,
            such as "L", "RGBA", "I;16") and `n_bytes`.

    Returns:
        Dict: `sizes`, `modes` and `depths`, lists of dicts with `films`, commonest first; `not_square` and `uncommon`,
        images that are not of the commonest size and mode, each a dict with `count` and five `examples`; `bytes` with
        `min`, `median`, `max`, `total`.
    """
    files = rows[["image", "width", "height", "mode"]].assign(bits=[_depth(mode) for mode in rows["mode"]])
    kinds = {"sizes": ["width", "height"], "modes": ["mode"], "depths": ["bits"]}
    census = {name: files.value_counts(columns).rename("films").reset_index() for name, columns in kinds.items()}
    common = [*census["sizes"].loc[0, ["width", "height"]], census["modes"].loc[0, "mode"]]
    odd = files[(files[["width", "height", "mode"]] != common).any(axis=1)]
    size = rows["n_bytes"].agg(["min", "median", "max", "sum"]).astype("int64").tolist()
    return {name: _plain(table) for name, table in census.items()} | {
        "not_square": _some(files[files["width"] != files["height"]]),
        "uncommon": _some(odd),
        "bytes": dict(zip(("min", "median", "max", "total"), size, strict=True)),
    }


def find_oddities(metadata):
    """Finds ages, sexes and numbers that contradict each other in a label file.

    Args:
        metadata: frame of `load_metadata`.

    Returns:
        Dict from what is odd to `count` (images, or patients where it says so) and up to five `examples`. A patient's
        age is followed in the order of `follow_up`. File names are NIH's, patient and number: 00000013_008.png.
    """
    ordered = metadata.sort_values(["patient_id", "follow_up", "image"], kind="stable")
    aged = ordered[ordered["age"].notna()]
    younger = aged.groupby("patient_id")["age"].diff() < 0
    sexes = ordered.groupby("patient_id")["sex"].transform("nunique")
    name = ordered["image"].str.extract(r"^(\d{8})_(\d{3})\.png$").apply(pd.to_numeric)
    known = name[0].notna()
    shown = ordered[["image", "patient_id", "follow_up", "age", "sex"]]
    return metadata.attrs["ages"] | {
        "younger than before": _some(shown.loc[aged.index[younger]]),
        "patients of two sexes": _some(shown[sexes > 1].drop_duplicates(["patient_id", "sex"]), "patient_id"),
        "follow-up number taken": _some(shown[ordered.duplicated(["patient_id", "follow_up"])]),
        "named after another patient": _some(shown[known & name[0].ne(ordered["patient_id"])]),
        "named with another number": _some(shown[known & name[1].ne(ordered["follow_up"])]),
    }


def judge(report):
    """Sums up an audit, a line a check.

    Args:
        report: dict of `audit_study`, of which it reads all but the tables of `study_tables`.

    Returns:
        List of dicts: `check`; `found` and `expected` (int, how many of what should not be; None for the first check of
        a study that is not compared with NIH's counts); `status`, "ok", "look" (the study may be used, but look at what
        was found), "wrong" (it must not be used as it is) or "not compared"; `detail` (str), which names some.
    """
    is_nih = report["kind"] == "nih"
    differing = [row for row in report["published"] if row["difference"]] if is_nih else []
    told = [f"{row['count']} ({row['part']}) {row['listed']:,}, not {row['published']:,}" for row in differing]
    compared = f"{len(report['published'])} compared" if is_nih else "only NIH's complete label file can be compared"
    verdict = [_line("counts other than NIH's", len(differing), "wrong", _join(told) if told else compared)]
    if not is_nih:
        verdict[0] |= {"found": None, "expected": None, "status": "not compared"}
    verdict += [
        _line("rows without an image", report["missing"], "look", _join(report["missing_examples"])),
        _line("images without a row", report["extra"], "look", _join(report["extra_examples"])),
        _line("images that cannot be read", len(report["unreadable"]), "look",
              _join([f"{film['image']}: {film['reason']}" for film in report["unreadable"]])),
    ]  # fmt: skip
    overlap = [row for row in report["patient_overlap"] if row["patients"]]
    told = [f"{row['patients']:,} in {row['a']} and {row['b']}" for row in overlap]
    status = "look" if report["split"] == "leaky_images" else "wrong"  # there it is the purpose
    verdict.append(_line("patients in two parts", sum(row["patients"] for row in overlap), status, _join(told)))
    if not report["patient_overlap"]:
        nothing = {"found": None, "expected": None, "status": "not compared", "detail": "the study has no patient ids"}
        verdict[-1] |= nothing
    for kind, subset in itertools.product(("exact", "near"), ("other", "same")):
        chosen = [row for row in report["duplicates"] if (row["kind"], row["subset"]) == (kind, subset)]
        n_pairs, differ = (sum(row[name] for row in chosen) for name in ("pairs", "labels_differ"))
        detail = f"{differ:,} with different findings" if n_pairs else ""
        if n_pairs and report["patient_overlap"]:
            detail = f"{sum(row['pairs'] for row in chosen if row['patient'] == 'other'):,} of two patients, {detail}"
        where = "across parts" if subset == "other" else "within a part"
        verdict.append(_line(f"{kind} copies {where}, pairs", n_pairs, "look", detail))
    for name, what in (("not_square", "images that are not square"), ("uncommon", "images of uncommon size or mode")):
        told = [f"{film['image']} {film['width']} x {film['height']} {film['mode']}"
                for film in report["census"][name]["examples"]]  # fmt: skip
        verdict.append(_line(what, report["census"][name]["count"], "look", _join(told)))
    for name, odd in report["oddities"].items():
        what = {"missing": "ages that are unusable", "converted": "ages in months, weeks or days"}.get(name, name)
        told = [f"{film['image']}: {film['text']!r}" if "text" in film else film["image"] for film in odd["examples"]]
        verdict.append(_line(what, odd["count"], "look", _join(told)))
    return verdict


def _line(check, found, status, detail=""):
    return {"check": check, "found": found, "expected": 0, "status": status if found else "ok", "detail": detail}


def _join(texts):
    return ", ".join(texts[:3]) + (", ..." if len(texts) > 3 else "")


def _depth(mode):
    return 16 if ";16" in mode else _BITS.get(mode, 8)


def _some(rows, counted="image"):
    """Counts rows, or distinct values of a column, and shows the first five."""
    return {"count": int(rows[counted].nunique()), "examples": _plain(rows.head(_N_EXAMPLES))}


def _plain(table):
    """Returns the rows as dicts of what JSON knows: NaN becomes None, and floats keep six digits."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [
        {k: round(v, 6) if isinstance(v, float) else getattr(v, "item", lambda v=v: v)() for k, v in row.items()}
        for row in rows
    ]
