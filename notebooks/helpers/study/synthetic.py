"""Writes a study of synthetic chest radiographs in NIH ChestX-ray14's own layout.

The study needs no download and nobody's data, and every step that runs on it runs on the real one. It imitates what
matters for evaluation: several images of one patient, an official test list of other patients with more images each,
findings that occur together, portable (AP) images of sicker patients, boxes for eight findings in the test list only.
Findings are more frequent than in NIH's study on purpose, because a thousand images must hold enough of each.
"""

import csv
import io
import json
import os
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..runtime.files import as_path, lock_folder
from .labels import BOX_FRAME, PATHOLOGIES
from .synthetic_findings import draw_image

SYNTHETIC_VERSION = 2  # raise it with every change that alters a pixel or a label

# Share of images with each finding.
PREVALENCE = {
    "Atelectasis": 0.14, "Cardiomegaly": 0.08, "Effusion": 0.16, "Infiltration": 0.18, "Mass": 0.10,
    "Nodule": 0.11, "Pneumonia": 0.06, "Pneumothorax": 0.10, "Consolidation": 0.09, "Edema": 0.07,
    "Emphysema": 0.07, "Fibrosis": 0.07, "Pleural_Thickening": 0.08, "Hernia": 0.06,
}  # fmt: skip

# How much likelier the second finding is where the first one is present.
COMPANY = {
    ("Effusion", "Atelectasis"): 4, ("Cardiomegaly", "Edema"): 5, ("Cardiomegaly", "Effusion"): 2,
    ("Consolidation", "Pneumonia"): 5, ("Emphysema", "Pneumothorax"): 4, ("Infiltration", "Edema"): 3,
    ("Infiltration", "Pneumonia"): 3, ("Infiltration", "Atelectasis"): 2, ("Infiltration", "Effusion"): 2,
    ("Infiltration", "Nodule"): 2, ("Infiltration", "Consolidation"): 2, ("Mass", "Nodule"): 3,
    ("Fibrosis", "Pleural_Thickening"): 3, ("Effusion", "Pleural_Thickening"): 2,
}  # fmt: skip

# The one planted confounder, the view: log odds that each finding adds to those of a portable (AP) image; sicker
# patients, who have more findings, add to them too. Age and sex tell nothing, nor does the exposure but by the view.
PORTABLE = {
    "Edema": 1.6, "Effusion": 0.5, "Consolidation": 0.6, "Pneumonia": 0.6, "Infiltration": 0.4,
    "Hernia": -1.0, "Emphysema": -0.5, "Fibrosis": -0.8, "Nodule": -0.4, "Mass": -0.3,
}  # fmt: skip

# Images a patient. NIH has 3.1 and 9.2; a small study needs more patients than that leaves.
VISITS = {"train_val": 1.9, "test": 3.6}
TEST_SHARE = 0.22  # of the images; 25,596 of 112,120 in NIH's lists is 0.228
PERSISTENCE = 0.75  # chance that a finding is still there at the next visit

FIRST_NODULE_PATIENT = 50_000_001  # of `plan_nodule_study`

# The findings that NIH's radiologists boxed, under the names in BBox_List_2017.csv.
BOXED = {name: name for name in PATHOLOGIES[:8]} | {"Infiltration": "Infiltrate"}

ENTRY_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
BOX_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"

OUR_FILES = ("Data_Entry_2017_v2020.csv", "BBox_List_2017.csv", "train_val_list.txt", "test_list.txt")
MARK, OPEN_MARK = "phantom.json", "phantom.json.part"


def plan_synthetic_study(n_images=1000, seed=0):
    """Draws the patients, visits and findings of a study, without a pixel.

    Args:
        n_images: number of images, at least 1. From 300 on, every finding is in both lists, in several patients.
        seed: int, 0 or more.

    Returns:
        A list of dicts, one an image in file order: `image` (file name), `patient`, `visit`, `age` (years), `sex`,
        `view`, `findings` (tuple of names in the order of `PATHOLOGIES`) and `split` ("train_val" or "test").
    """
    rng = np.random.default_rng([10, seed])  # the images' own streams begin with smaller numbers
    n_test = round(TEST_SHARE * n_images)
    patients = []  # pairs of split and number of visits
    for split, left in (("train_val", n_images - n_test), ("test", n_test)):
        while left:
            patients.append((split, min(left, int(rng.geometric(1 / VISITS[split])))))
            left -= patients[-1][1]
    patients = [patients[i] for i in rng.permutation(len(patients))]
    images = []
    for patient, (split, n_visits) in enumerate(patients, start=1):
        for visit in range(n_visits):
            images.append(
                {"image": f"{patient:08d}_{visit:03d}.png", "patient": patient, "visit": visit, "split": split}
            )
    present = np.zeros((len(images), len(PATHOLOGIES)), bool)
    sickness = rng.normal(0, 0.8, len(patients))
    owner = np.array([image["patient"] - 1 for image in images])
    for split in ("train_val", "test"):
        _spread_findings(present, owner, sickness, np.array([image["split"] == split for image in images]), rng)
    _draw_patients(images, present, owner, sickness, rng)
    return images


def plan_nodule_study(n_images=400, seed=0):
    """Draws the patients of a study with nodules only, without a pixel: two images of each, 40 % with a nodule.

    View, sex and age do not depend on the nodule, so that only the nodule separates the two classes. The patients'
    numbers begin where no study of `plan_synthetic_study` has any: with any seeds, they are other patients.

    Args:
        n_images: number of images, at least 1; if it is odd, the last patient has a single image.
        seed: int, 0 or more.

    Returns:
        A list of dicts as of `plan_synthetic_study`; every image is in the test list, which is where boxes are.
    """
    rng = np.random.default_rng([13, seed])
    images = []
    for number in range(-(-n_images // 2)):
        patient = {
            "patient": FIRST_NODULE_PATIENT + number, "sex": str(rng.choice(["F", "M"])),
            "age": int(rng.integers(25, 85)), "findings": ("Nodule",) if number % 5 in (1, 3) else (),
        }  # fmt: skip
        for visit in range(2):
            image = f"{patient['patient']:08d}_{visit:03d}.png"
            view = "AP" if rng.random() < 0.4 else "PA"
            images.append(patient | {"image": image, "visit": visit, "view": view, "split": "test"})
    return images[:n_images]


def _spread_findings(present, owner, sickness, in_split, rng):
    """Marks in `present` (images, 14) who has what within one split: exactly the wanted number of images of each."""
    rows_of = {int(p): np.flatnonzero(in_split & (owner == p)) for p in np.unique(owner[in_split])}
    order = sorted(range(len(PATHOLOGIES)), key=lambda k: -sum(a == PATHOLOGIES[k] for a, _ in COMPANY))
    for k in order:
        boost = np.ones(len(PATHOLOGIES))
        for (first, second), factor in COMPANY.items():
            if second == PATHOLOGIES[k]:
                boost[PATHOLOGIES.index(first)] = factor
        # Company attracts, up to a point: without the second factor a few images would gather everything.
        affinity = np.minimum(np.where(present, boost, 1.0).prod(axis=1), 8) * 0.5 ** np.clip(
            present.sum(axis=1) - 1, 0, None
        )
        # Perturbing log weights with Gumbel noise and sorting draws without replacement by weight.
        keys = {p: sickness[p] + np.log(affinity[rows].mean()) + rng.gumbel() for p, rows in rows_of.items()}
        wanted = max(3, round(PREVALENCE[PATHOLOGIES[k]] * int(in_split.sum())))
        for n_carriers, p in enumerate(sorted(keys, key=keys.get, reverse=True)):
            if wanted <= 0:
                break
            rows = rows_of[p]
            onset = rng.choice(len(rows), p=affinity[rows] / affinity[rows].sum())
            lasts = onset + rng.geometric(1 - PERSISTENCE)
            # The first three carriers leave room for each other, so that no one patient is all of a finding.
            room = max(1, wanted - (2 - n_carriers)) if n_carriers < 3 else wanted
            chosen = rows[onset : min(lasts, onset + room)]
            present[chosen, k] = True
            wanted -= len(chosen)


def _draw_patients(images, present, owner, sickness, rng):
    """Adds findings, age, sex and view to the images."""
    start = np.clip(rng.normal(48, 15, len(sickness)), 8, 88).astype(int)
    sex = np.where(rng.random(len(sickness)) < 0.565, "M", "F")  # 56.5 % of NIH's images are of men
    tilt = present @ np.array([PORTABLE.get(name, 0.0) for name in PATHOLOGIES])
    bedside = rng.random(len(images)) < 1 / (1 + np.exp(0.9 - 0.35 * sickness[owner] - tilt))
    years = np.cumsum(rng.random(len(images)) < 0.25)
    for i, image in enumerate(images):
        age = start[owner[i]] + years[i] - years[i - image["visit"]]
        image |= {
            "age": int(age), "sex": str(sex[owner[i]]), "view": "AP" if bedside[i] else "PA",
            "findings": tuple(name for name, here in zip(PATHOLOGIES, present[i], strict=True) if here),
        }  # fmt: skip


def _mislabel(images, label_noise, seed):
    """Returns the findings that the CSV claims, one set an image; added ones balance dropped ones in number."""
    rng = np.random.default_rng([11, seed])
    drop, add = rng.random((2, len(images), len(PATHOLOGIES)))
    claims = []
    for i, image in enumerate(images):
        claim = set()
        for k, name in enumerate(PATHOLOGIES):
            odds = PREVALENCE[name] / (1 - PREVALENCE[name])
            if drop[i, k] >= label_noise if name in image["findings"] else add[i, k] < label_noise * odds:
                claim.add(name)
        claims.append(claim)
    return claims


def write_synthetic_study(
    study_dir,
    n_images=1000,
    size=256,
    seed=0,
    label_noise=0.0,
    *,
    plan=plan_synthetic_study,
    n_workers=None,
    progress=None,
):
    """Writes a synthetic study: images, metadata, official lists and boxes, each in NIH's format.

    A complete study is left as it is; an interrupted one is written again. The bytes depend only on `n_images`,
    `size`, `seed`, `label_noise` and `plan`, and the pixels not on `label_noise`. With more than one process a script
    must call this under `if __name__ == "__main__":`; a notebook need not.

    Args:
        study_dir: path of the study's folder, made if absent.
        n_images: number of images; 300 or more for every finding in both lists.
        size: pixels a side, at least 32. NIH's images have 1024.
        seed: int, 0 or more.
        label_noise: in [0, 1), the probability that the CSV misses a finding that is in the image; as many are
            added at random to other images. Boxes are kept only where the CSV still names the finding.
        plan: `plan_synthetic_study`, or `plan_nodule_study` for nodules only.
        n_workers: processes; by default one a core, or one in all for a small study.
        progress: wraps the list of patients as they are drawn, for instance `tqdm`.

    Returns:
        A dict: `n_images`, `n_patients`, `n_test_images`, `n_boxes` and `written`, False for a study found complete.

    Raises:
        ValueError: if the folder holds a study of other settings.
        FileExistsError: if the folder holds files that no synthetic study has put there.
    """
    study_dir = as_path(study_dir)
    settings = {
        "version": SYNTHETIC_VERSION, "n_images": n_images, "size": size, "seed": seed,
        "label_noise": float(label_noise),
    }  # fmt: skip
    if plan is not plan_synthetic_study:
        settings["plan"] = plan.__name__
    busy = f"Another process writes the synthetic study in {study_dir}. This one waits until it ends."
    with lock_folder(study_dir, busy, wait=True):
        if (study_dir / MARK).exists():
            found = json.loads((study_dir / MARK).read_text(encoding="utf-8"))
            if found["settings"] != settings:
                raise ValueError(
                    f"{study_dir} holds a synthetic study with {found['settings']}, not {settings}: "
                    "delete that folder or name another one"
                )
            return found["summary"] | {"written": False}
        _claim_folder(study_dir, settings)
        return _write_study(study_dir, settings, plan, n_workers, progress) | {"written": True}


def _write_study(study_dir, settings, plan, n_workers, progress):
    """Writes the study into its claimed folder; returns the counts of `write_synthetic_study`."""
    n_images, seed = settings["n_images"], settings["seed"]
    images = plan(n_images, seed)
    claims = _mislabel(images, settings["label_noise"], seed)
    by_patient = {}
    for image in images:
        by_patient.setdefault(image["patient"], []).append(image)
    jobs = [(str(study_dir / "images"), seed, settings["size"], group) for group in by_patient.values()]
    shown = progress(jobs) if progress else jobs
    if n_workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        n_workers = min(cores, 1 + n_images // 100)  # a process takes a second to start
    boxes = {}
    if n_workers == 1:
        for job in shown:
            boxes |= _write_patient(job)
    else:
        # "spawn", because a fork of a process in which TensorFlow has started its threads can hang.
        with ProcessPoolExecutor(n_workers, mp_context=get_context("spawn")) as pool:
            for _, result in zip(shown, pool.map(_write_patient, jobs, chunksize=4), strict=True):
                boxes |= result

    n_boxes = _write_tables(study_dir, images, claims, boxes, seed)
    summary = {
        "n_images": n_images, "n_patients": len(jobs), "n_boxes": n_boxes,
        "n_test_images": sum(image["split"] == "test" for image in images),
    }  # fmt: skip
    (study_dir / OPEN_MARK).write_text(json.dumps({"settings": settings, "summary": summary}, indent=2) + "\n")
    (study_dir / OPEN_MARK).replace(study_dir / MARK)
    return summary


def _claim_folder(study_dir, settings):
    """Makes the folder ours: empty, or emptied of our own unfinished study; raises FileExistsError otherwise."""
    images = study_dir / "images"
    # Real NIH files bear the very same names, so names prove nothing: only the mark of a study begun does.
    ours = (study_dir / OPEN_MARK).exists()
    paths = [path for path in (*study_dir.glob("*"), *images.glob("*")) if path not in (images, study_dir / OPEN_MARK)]
    paths = [path for path in paths if not path.name.startswith(".")]  # .DS_Store and the like: not in the way
    foreign = [
        str(path.relative_to(study_dir))
        for path in paths
        if not ours or not (path.name in OUR_FILES or re.fullmatch(r"\d{8}_\d{3}\.png", path.name))
    ]
    if foreign:
        raise FileExistsError(
            f"{study_dir} holds {len(foreign)} files that no synthetic study has put there, "
            f"such as {', '.join(sorted(foreign)[:3])}: name another folder"
        )
    images.mkdir(parents=True, exist_ok=True)
    (study_dir / OPEN_MARK).write_text(json.dumps({"settings": settings}, indent=2) + "\n")
    for path in paths:
        path.unlink()


def _write_patient(job):
    """Writes the images of one patient; returns {(image, finding): boxes in the 1024 frame}."""
    images_dir, seed, size, images = job
    stamp = PngInfo()
    stamp.add_text("Comment", f"synthetic radiograph, phantom version {SYNTHETIC_VERSION}, no patient")
    found = {}
    for image in images:
        pixels, boxes = draw_image(
            (seed, image["patient"]), image["findings"], image["view"], image["sex"], image["age"], size, image["visit"]
        )
        with (as_path(images_dir) / image["image"]).open("wb") as file:
            Image.fromarray(pixels).save(file, format="PNG", pnginfo=stamp, compress_level=3)
        scale = BOX_FRAME / size
        for name in BOXED.keys() & boxes.keys():
            found[image["image"], name] = [tuple(scale * x for x in box) for box in boxes[name]]
    return found


def _write_tables(study_dir, images, claims, boxes, seed):
    """Writes metadata, lists and boxes; returns the number of boxes."""
    rng = np.random.default_rng([12, seed])
    # Width, height and pixel spacing, in mm, that are common in NIH's file.
    shapes = ((2992, 2991, 0.143), (2500, 2048, 0.168), (2048, 2500, 0.171), (3056, 2544, 0.139))
    lines = [ENTRY_HEADER]
    for image, claim in zip(images, claims, strict=True):
        # Portable detectors lie across or upright; the fixed one of PA images is nearly square.
        width, height, spacing = shapes[rng.integers(1, 4) if image["view"] == "AP" else rng.integers(0, 3)]
        labels = "|".join(sorted(claim)) or "No Finding"
        row = (image["image"], labels, image["visit"], image["patient"], image["age"], image["sex"], image["view"])
        lines.append(",".join(map(str, (*row, width, height, spacing, spacing))))
    (study_dir / OUR_FILES[0]).write_bytes(("\n".join(lines) + "\n").encode())
    for split in ("train_val", "test"):
        names = [image["image"] for image in images if image["split"] == split]
        (study_dir / f"{split}_list.txt").write_text("\n".join(names))  # no newline at the end, as in NIH's lists
    rows = [
        (image["image"], BOXED[name], *box)
        for name in BOXED
        for image, claim in zip(images, claims, strict=True)
        if image["split"] == "test" and name in claim
        for box in boxes.get((image["image"], name), [])
    ]
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows)
    (study_dir / OUR_FILES[1]).write_bytes(f"{BOX_HEADER}\n{table.getvalue()}".encode())
    return len(rows)
