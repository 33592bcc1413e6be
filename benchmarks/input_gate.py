"""How often does the input gate warn of real chest radiographs, and how often of unusual input?

False alarms are counted on real and synthetic frontal images, unchanged and slightly tilted, cropped or padded;
detections on the same images inverted and turned, on synthetic laterals and other pictures, and on the pictures
that come with Python packages. The limit of the evidence is chosen on half of NIH's patients, by the parity of a hash
of their number, and the other half is reported as well. Then images per second on one core.

Usage: input_gate.py [--data ../shared/data] [--pictures FOLDER ...] [--images 200]
`--pictures` names further folders of photographs, for instance scikit-image's data. Missing data are skipped with a
message; without real radiographs only the synthetic ones are measured.
"""

import argparse
import io
import json
import os
import platform
import sys
import tempfile
import time
import zlib
from pathlib import Path

for library in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{library}_NUM_THREADS"] = "1"  # read when NumPy is imported

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))
sys.path.append(str(ROOT / "scripts"))

import cv2
import numpy as np
import pandas as pd
from drawn_pictures import draw_extremity, draw_lateral, draw_noise, draw_page, draw_scene
from fit_input_gate import vary
from PIL import Image
from scipy.stats import binomtest

from helpers.export import check_images, input_gate, measure_color
from helpers.export.input_gate import CODES
from helpers.study import write_synthetic_study

SIDE, SEED = 256, 4321  # no seed that the model was fitted with
TARGET = 0.01  # share of false alarms allowed on the half on which the limit is chosen
GRID = np.arange(0, 4.1, 0.5)


def rate(hits):
    """Returns hits of n, the share and Wilson's 95 % interval, in percent."""
    n, count = len(hits), int(np.sum(hits))
    low, high = binomtest(count, n).proportion_ci(method="wilson")
    return {"n": n, "count": count, "percent": round(100 * count / n, 1),
            "interval": [round(100 * low, 1), round(100 * high, 1)]}  # fmt: skip


def fit(gray, side=SIDE):
    """Fits a gray picture, uint8 (height, width), into a square with black padding, as `resize_image` does."""
    scale = side / max(gray.shape)
    size = [max(1, round(extent * scale)) for extent in gray.shape]
    small = cv2.resize(gray, size[::-1], interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    square = np.zeros((side, side), "uint8")
    top, left = ((side - extent) // 2 for extent in size)
    square[top : top + size[0], left : left + size[1]] = small
    return square


def read_images(paths, side=SIDE):
    """Returns images of PNGs whose channels are equal, uint8 (n, side, side)."""
    images = []
    for path in paths:
        pixels = np.asarray(Image.open(path))
        images.append(fit(np.ascontiguousarray(pixels if pixels.ndim == 2 else pixels[..., 0]), side))
    return np.array(images)


def tilt(images, degrees):
    """Returns images turned by a few degrees, corners black."""
    side = images.shape[1]
    matrix = cv2.getRotationMatrix2D(((side - 1) / 2, (side - 1) / 2), degrees, 1)
    return np.array([cv2.warpAffine(image, matrix, (side, side)) for image in images])


def crop(images, share):
    """Returns the middle of images, this share of the side, at the same size."""
    side = images.shape[1]
    cut = round(side * (1 - share) / 2)
    return np.array([fit(np.ascontiguousarray(image[cut : side - cut, cut : side - cut]), side) for image in images])


def pad(images):
    """Returns images squeezed to three quarters of the width between black bars."""
    side = images.shape[1]
    return np.array(
        [fit(cv2.resize(image, (3 * side // 4, side), interpolation=cv2.INTER_AREA), side) for image in images]
    )


def find_codes(images):
    """Returns a set of codes for each image."""
    return [{warning.code for warning in warnings} for warnings in check_images(np.ascontiguousarray(images))]


def alarms(images):
    """Returns the rate of any warning and of each code that came up."""
    codes = find_codes(images)
    found = {code: rate([code in image for image in codes]) for code in CODES if any(code in image for image in codes)}
    return {"any": rate([bool(image) for image in codes])} | found


def detections(images, *wanted):
    """Returns the rate of any warning and, where codes are wanted, of all of them together."""
    codes = find_codes(images)
    named = {"named": rate([image >= set(wanted) for image in codes])} if wanted else {}
    return {"any": rate([bool(image) for image in codes])} | named


def choose_limit(images):
    """Returns the smallest limit of the grid with few false alarms of each code that rests on the evidence."""
    for limit in GRID:
        input_gate.MAX_EVIDENCE = float(limit)
        found = alarms(images)
        if all(found[code]["percent"] <= 100 * TARGET for code in found.keys() - {"any"}):
            return float(limit)
    return None


def measure_extremes(images):
    """Returns the ends of what the limits of emptiness and flatness are compared with."""
    small, flat = input_gate._shrink(images)
    return {
        "least contrast": round(float(input_gate._measure_contrast(small).min())),
        "largest flat share": round(float(flat.max()), 2),
    }


def draw_images(n_images):
    """Returns images of a synthetic study, read from its files, uint8 (n, side, side)."""
    with tempfile.TemporaryDirectory() as folder:
        write_synthetic_study(Path(folder) / "study", n_images=n_images, size=SIDE, seed=SEED, n_workers=1)
        return read_images(sorted((Path(folder) / "study" / "images").glob("*.png")))


def plot_screens(n_screens):
    """Returns screens drawn by another hand than the model's: plots, pages of text and tables by Matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rng, screens = np.random.default_rng(SEED), []
    words = Path(__file__).read_text().split()
    for number in range(n_screens):
        with plt.style.context("dark_background" if number % 4 == 3 else "default"):
            figure, axes = plt.subplots(figsize=rng.uniform(4, 9, 2), dpi=80)
            if number % 3 == 0:
                axes.plot(np.cumsum(rng.normal(size=(80, 3)), axis=0))
                axes.set_title(" ".join(words[:5]))
            elif number % 3 == 1:
                axes.axis("off")
                text = "\n".join(" ".join(rng.choice(words, 9)) for _ in range(40))
                axes.text(0, 1, text, va="top", size=rng.uniform(5, 11))
            else:
                axes.bar(range(9), rng.random(9), color=str(rng.uniform(0.1, 0.8)))
                axes.table(rng.integers(0, 999, (4, 9)), loc="top")
            figure.canvas.draw()
            screens.append(fit(np.asarray(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("L"))))
            plt.close(figure)
    return np.array(screens)


def find_pictures(folders):
    """Returns paths of pictures that come with packages, and those in further folders."""
    import matplotlib
    import sklearn

    folders = [*map(Path, folders), Path(sklearn.__path__[0], "datasets", "images")]
    folders.append(Path(matplotlib.get_data_path()) / "sample_data")
    return [p for folder in folders for p in sorted(folder.glob("*")) if p.suffix in (".png", ".jpg")]


def measure_pictures(paths):
    """Returns what is warned of in photographs, by gray levels alone and by the color of the file."""
    codes, colors, grays = [], [], []
    for path in paths:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
        codes += find_codes(fit(np.asarray(rgb.convert("L")))[None])
        file = io.BytesIO()
        rgb.save(file, "JPEG", quality=90)
        colors.append(measure_color(file.getvalue()))
        file = io.BytesIO()
        rgb.convert("L").convert("RGB").save(file, "JPEG", quality=90)
        grays.append(measure_color(file.getvalue()))
    colorful = np.array([np.ptp(np.asarray(Image.open(p).convert("RGB")), axis=-1).mean() > 1 for p in paths])
    limit = input_gate.MAX_COLOR
    return {
        "pictures": [path.name for path in paths],
        "turned gray: any warning": rate([bool(found) for found in codes]),
        "turned gray: not warned of": [p.name for p, found in zip(paths, codes, strict=True) if not found],
        "turned gray: not_chest or screenshot": rate([bool(found & {"not_chest", "screenshot"}) for found in codes]),
        "in color, as JPEG: color": rate(np.array(colors)[colorful] > limit),
        "gray as RGB, as JPEG: color": rate(np.array(grays) > limit),
        "largest color of gray as RGB": round(max(grays), 2),
    }


def measure_speed(images):
    """Returns images a second on one core, the median of five runs, for sides of 64 to 512 pixels."""
    speeds = {}
    for side in (64, 224, 256, 512):
        batch = np.array([fit(image, side) for image in images[:200]])
        seconds = []
        for _ in range(5):
            start = time.process_time()
            check_images(batch)
            seconds.append(time.process_time() - start)
        speeds[str(side)] = round(len(batch) / float(np.median(seconds)), -2)
    return speeds


def measure_images(images):
    """Returns false alarms on images as they are and hardly changed, and detections on what was done to them."""
    rng = np.random.default_rng(SEED)
    small = fit_all(images, 64)
    return {
        "false alarms": {
            "as they are": alarms(images), "at 64 pixels": alarms(small), "mirrored": alarms(images[:, :, ::-1]),
            "tilted 5°": alarms(tilt(images, 5)), "tilted 10°": alarms(tilt(images, 10)),
            "tilted 10° the other way": alarms(tilt(images, -10)), "middle 85 %": alarms(crop(images, 0.85)),
            "middle 70 %": alarms(crop(images, 0.7)), "narrower, between bars": alarms(pad(images)),
        },
        "detections": {
            "inverted": detections(255 - images, "inverted"),
            "turned 90°": detections(np.rot90(images, 1, (1, 2)), "rotated"),
            "turned 180°": detections(np.rot90(images, 2, (1, 2)), "rotated"),
            "turned 270°": detections(np.rot90(images, 3, (1, 2)), "rotated"),
            "inverted and turned 90°": detections(np.rot90(255 - images, 1, (1, 2)), "inverted", "rotated"),
            "middle 40 %": detections(crop(images, 0.4)),
            "a corner, 40 %": detections(fit_all(images[:, :102, :102], SIDE)),
            "darkened to an eighth": detections(images // 8, "empty"),
            "black with a letter": detections(label_blank(images, rng), "empty"),
        },
    }  # fmt: skip


def fit_all(images, side):
    """Returns images at another side."""
    return np.array([fit(np.ascontiguousarray(image), side) for image in images])


def label_blank(images, rng):
    """Returns empty images of the same number with a bright letter and a little noise."""
    blank = np.clip(rng.normal(4, 2, (len(images), SIDE, SIDE)), 0, 255).astype("uint8")
    for image in blank:
        cv2.putText(image, "L", rng.integers(30, SIDE - 30, 2).tolist(), cv2.FONT_HERSHEY_SIMPLEX, 0.6, 240, 1)
    return blank


def main():
    """Measures and writes benchmarks/results/input_gate.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--pictures", type=Path, nargs="*", default=[])
    parser.add_argument("--images", type=int, default=200, help="how many images and pictures are drawn of each kind")
    options = parser.parse_args()
    limit, results = input_gate.MAX_EVIDENCE, {"limits": {}, "images": {}}
    results["limits"] = {name: getattr(input_gate, name) for name in dir(input_gate) if name.startswith("M")}

    groups, names = {"drawn": draw_images(options.images)}, {}
    for name, folder in (("NIH", "nih_sample/images"), ("NIH originals", "nih_original/images_001/images"),
                         ("JSRT", "jsrt/images")):  # fmt: skip
        names[name] = sorted((options.data / folder).glob("*.png"))
        if names[name]:
            groups[name] = read_images(names[name], 512 if name == "NIH originals" else SIDE)
        else:
            print(f"left out, no images in {options.data / folder}")
    table = options.data / "nih_metadata" / "Data_Entry_2017_v2020.csv"
    if "NIH" in groups:
        images, files = groups["NIH"], [path.name for path in names["NIH"]]
        second = np.array([zlib.crc32(name[:8].encode()) % 2 == 1 for name in files])
        results["chosen limit of evidence"] = choose_limit(images[~second])
        input_gate.MAX_EVIDENCE = limit
        results["NIH by half"] = {"chosen on": alarms(images[~second]), "held out": alarms(images[second])}
        warned = zip(files, check_images(images), strict=True)
        results["NIH images warned of"] = {name: [w.code for w in found] for name, found in warned if found}
        if table.exists():
            view = pd.read_csv(table, index_col=0).loc[files, "View Position"].to_numpy()
            results["NIH by view"] = {name: alarms(images[view == name]) for name in ("AP", "PA")}
        else:
            print(f"left out the views, no {table}")
    results["extremes"] = {name: measure_extremes(images) for name, images in groups.items()}
    for name, images in groups.items():
        results["images"][name] = alarms(images) if name == "NIH originals" else measure_images(images)
        print(name, json.dumps(results["images"][name], ensure_ascii=False)[:400])

    rng = np.random.default_rng(SEED)
    drawn = {}
    for draw, code in ((draw_lateral, "lateral"), (draw_extremity, "not_chest"), (draw_page, "screenshot"),
                       (draw_noise, "not_chest"), (draw_scene, "not_chest")):  # fmt: skip
        pictures = np.array([draw(rng, SIDE) for _ in range(options.images)])
        drawn[draw.__name__.removeprefix("draw_")] = {code: detections(pictures, code)}
        if draw is draw_lateral:
            varied = np.array([vary(picture, rng) for picture in pictures])
            drawn["lateral, varied"] = {code: detections(varied, code)}
    results["drawn pictures"] = drawn
    results["screens by Matplotlib"] = detections(plot_screens(60), "screenshot")
    results["photographs"] = measure_pictures(find_pictures(options.pictures))
    results["one extremity"] = read_extremity(options.data / "dicom" / "RG3_J2KR.dcm")
    results["images a second"] = measure_speed(groups.get("NIH", groups["drawn"]))
    results["machine"] = f"one of {os.cpu_count()} cores, Python {platform.python_version()}, numpy {np.__version__}"
    path = ROOT / "benchmarks" / "results" / "input_gate.json"
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")


def read_extremity(path):
    """Returns the warnings for a radiograph of a leg, or None where file or decoder is missing."""
    try:
        import pydicom

        dataset = pydicom.dcmread(path)
        pixels = dataset.pixel_array.astype("float32")
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        print(f"left out the extremity: {error}")
        return None
    low, high = np.percentile(pixels, (0.5, 99.5))
    gray = np.clip(255 * (pixels - low) / (high - low), 0, 255).astype("uint8")
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        gray = 255 - gray
    return [warning._asdict() for warning in check_images(fit(gray)[None])[0]]


if __name__ == "__main__":
    main()
