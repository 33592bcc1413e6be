"""How often is a MONOCHROME1 tag obeyed or overruled wrongly, where collimators leave borders?

`looks_inverted` may overrule the tag. It is asked about real radiographs as they are and inverted, with borders of 0 to
20 % of the side on one to four sides: white, as unexposed film is shown, also with markers, black, as shutters are, and
light gray with noise. Beside it stands the same measure on the whole image, borders included, for every eighth
radiograph.

Usage: looks_inverted.py [--data ../shared/data] [--step 1]    takes six minutes on one core, with every radiograph
"""

import argparse
import itertools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))

import numpy as np
from PIL import Image

from helpers.packing import image_files
from helpers.runtime import write_json

RESULTS = ROOT / "benchmarks" / "results" / "looks_inverted.json"
NEGATIVES = {"00017625_000.png"}  # NIH's archive has it as a negative: air is white, and the heart dark
SIDE = 128  # pixels of the radiographs; the measure shrinks them to 64
BORDERS = {  # gray level, deviation, and whether a dark marker lies in the upper corners
    **{"white": (255, 0, False), "white with markers": (255, 0, True)},
    **{"black": (0, 0, False), "light gray with noise": (235, 8, False)},
}
MARKER = slice(2, 9), slice(2, 10)  # rows and columns, pixels
SHARES = (0.05, 0.1, 0.15, 0.2)  # of the side of the image with its border
SIDES = [sides for n in range(1, 5) for sides in itertools.combinations(range(4), n)]


def read_images(folder):
    """Returns the radiographs of a folder but for `NEGATIVES`, uint8 (height, width), the longer side `SIDE` pixels."""
    images = []
    for path in sorted(path for path in folder.glob("*.png") if path.name not in NEGATIVES):
        with Image.open(path) as image:
            gray = image.convert("L")
            gray.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
            images.append(np.asarray(gray))
    return images


def add_border(image, share, sides, level, noise, is_marked, rng):
    """Returns an image with a border on some sides: 0 left, 1 right, 2 top, 3 bottom."""
    left, right, top, bottom = (share * (side in sides) for side in range(4))
    height, width = image.shape
    shape = round(height / (1 - top - bottom)), round(width / (1 - left - right))
    whole = np.clip(rng.normal(level, noise, shape), 0, 255).astype("uint8")
    if is_marked:
        whole[MARKER] = whole[:, ::-1][MARKER] = 40
    y, x = round(shape[0] * top), round(shape[1] * left)
    whole[y : y + height, x : x + width] = image
    return whole


def count_answers(images):
    """Returns how many answers are right, wrong and missing on images as they are, and on the same inverted."""
    counts = {}
    for name, is_inverted in (("as they are", False), ("inverted", True)):
        answers = [image_files.looks_inverted(255 - image if is_inverted else image) for image in images]
        wrong, none = answers.count(not is_inverted), answers.count(None)
        counts[name] = {"right": len(answers) - wrong - none, "wrong": wrong, "no answer": none}
    return counts


def measure(images):
    """Returns a row for each kind of border, share and number of sides."""
    rng = np.random.default_rng(0)
    rows = [{"border": "none", "share": 0, "sides": 0, "n": len(images), **count_answers(images)}]
    for (kind, border), share, n in itertools.product(BORDERS.items(), SHARES, range(1, 5)):
        sets = [sides for sides in SIDES if len(sides) == n]
        made = [add_border(image, share, sides, *border, rng) for sides in sets for image in images]
        rows.append({"border": kind, "share": share, "sides": n, "n": len(made), **count_answers(made)})
    return rows


def main():
    """Measures and writes benchmarks/results/looks_inverted.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--step", type=int, default=1, help="take every n-th radiograph")
    options = parser.parse_args()
    folders = [options.data / name for name in ("nih_sample/images", "jsrt/images")]
    images = [image for folder in folders for image in read_images(folder)][:: options.step]
    if not images:
        sys.exit(f"no radiographs in {folders[0]} and {folders[1]}: name the folder that holds them with --data")
    results = {"images": len(images), "without borders": measure(images)}
    image_files._cut_borders = lambda small: small
    results["whole image"] = measure(images[::8])
    write_json(RESULTS, results)
    for name in ("without borders", "whole image"):
        total = {key: sum(row[way][key] for row in results[name] for way in ("as they are", "inverted"))
                 for key in ("right", "wrong", "no answer")}  # fmt: skip
        print(name, total, "worst:", max(results[name], key=lambda row: row["inverted"]["wrong"] / row["n"]))


if __name__ == "__main__":
    main()
