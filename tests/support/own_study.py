"""A study of one's own for tests: a few findings with names of their own, unknown labels, PNG, JPEG and DICOM files."""

import io

import numpy as np
import pandas as pd
from made_dicom import make_dicom
from PIL import Image

FINDINGS = ("Pleural effusion (any)", "Heart too large", "Nodule")
_DRAWN = ("Effusion", "Cardiomegaly", "Nodule")  # what the synthetic study calls them


def write_own_study(folder, *, n_images=90, side=64, with_patients=True, unknown=0.15, seed=0):
    """Writes `labels.csv`, `boxes.csv`, `study.json` and images of three formats; returns the table of labels.

    Args:
        folder: path of the folder, made if missing.
        n_images: images to draw.
        side: pixels; images are this wide and three quarters as high.
        with_patients: whether there are patients, views, sexes and ages; without them only images and labels.
        unknown: share of labels that are left empty.
        seed: of the drawing.

    Returns:
        DataFrame as in labels.csv.
    """
    from helpers.study import draw_image

    rng = np.random.default_rng(seed)
    (folder / "ward").mkdir(parents=True)
    rows, boxes = [], []
    for number in range(n_images):
        present = rng.random(len(FINDINGS)) < 0.4
        found = tuple(name for name, here in zip(_DRAWN, present, strict=True) if here)
        pixels, drawn = draw_image(seed * 1000 + number, findings=found, view="PA", sex="M", age=50, size=side)
        image = Image.fromarray(pixels).crop((0, side // 8, side, side - side // 8))
        name = f"ward/{number:03d}{('.png', '.jpg', '.dcm')[number % 3]}"
        if name.endswith(".dcm"):
            (folder / name).write_bytes(make_dicom(np.asarray(image)))
        else:
            file = io.BytesIO()
            image.save(file, "PNG" if name.endswith(".png") else "JPEG")
            (folder / name).write_bytes(file.getvalue())
        labels = [None if rng.random() < unknown else int(here) for here in present]
        rows.append([name, f"P{number // 2:03d}", ("PA", "AP")[number % 2], "F", 40 + number % 30, *labels])
        for x, y, width, height in drawn.get("Nodule", ()):
            boxes.append([name, "Nodule", x, max(0, y - side // 8), width, height])
    columns = ["image", "patient_id", "view", "sex", "age", *FINDINGS]
    table = pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(FINDINGS, "Int64"))
    if not with_patients:
        table = table.drop(columns=columns[1:5])
    table.to_csv(folder / "labels.csv", index=False)
    pd.DataFrame(boxes, columns=["image", "finding", "x", "y", "width", "height"]).to_csv(
        folder / "boxes.csv", index=False
    )
    (folder / "study.json").write_text(
        '{"name": "Ward 5", "labels": "By one radiologist.", "terms": "Not for others."}'
    )
    return table
