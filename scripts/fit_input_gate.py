"""Fits the linear model of the input gate to synthetic pictures and writes notebooks/helpers/export/input_gate.json.

Chests come from the synthetic study in all eight combinations of quarter turns and inversion; laterals, other body
parts, pages, noise and scenes from drawn_pictures.py. All are zoomed, shifted, tilted, cropped and exposed at random,
since real radiographs vary more than synthetic ones. No real picture is read. About three minutes on one core.

Usage: fit_input_gate.py [--images 800] [--seed 0]
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))

import cv2
import numpy as np
from drawn_pictures import draw_extremity, draw_lateral, draw_noise, draw_page, draw_scene, mottle
from sklearn.linear_model import LogisticRegression

from helpers.export.input_gate import KINDS, image_features
from helpers.study.synthetic import draw_image, plan_synthetic_study

SIDE = 96
REPEATS = 3  # versions of each synthetic chest
OTHERS = ((draw_extremity, 1.5), (draw_page, 0.75), (draw_noise, 0.75), (draw_scene, 1.5))  # and how many a chest
STRENGTH = 0.003  # inverse of the penalty; 0.0003 to 0.03 gave similar results on held-out synthetic images


def vary(image, rng):
    """Returns an image as another X-ray machine might have taken it, uint8 of the same shape.

    Args:
        image: uint8 (side, side).
        rng: NumPy generator.
    """
    side = len(image)
    if rng.random() < 0.5:  # the model must not depend on the side of the heart
        image = image[:, ::-1]
    zoom, squeeze, angle = np.exp(rng.normal(0, 0.12)), np.exp(rng.normal(0, 0.07)), rng.normal(0, 0.07)
    turn = zoom * np.array([[squeeze * np.cos(angle), -np.sin(angle)], [squeeze * np.sin(angle), np.cos(angle)]])
    shift = side / 2 - turn @ (side / 2, side / 2) + rng.normal(0, 0.04 * side, 2)
    border = cv2.BORDER_CONSTANT if rng.random() < 0.3 else cv2.BORDER_REPLICATE
    matrix = np.column_stack([turn, shift])
    level = 255 if rng.random() < 0.3 else 0
    moved = cv2.warpAffine(np.ascontiguousarray(image), matrix, (side, side), borderMode=border, borderValue=level)
    gray = (moved.astype("float32") / 255) ** np.exp(rng.normal(0, 0.35))
    if rng.random() < 0.5:
        gray *= 1 + 0.25 * mottle(rng, side, int(rng.integers(2, 4)))
    if rng.random() < 0.6:
        low, high = rng.uniform(-0.1, 0.3), rng.uniform(0.7, 1.1)
        gray = low + (high - low) * gray
    gray += rng.normal(0, rng.uniform(0, 0.04), gray.shape)
    for _ in range(rng.poisson(0.5)):  # collimators
        strip = np.rot90(gray, rng.integers(4))[: int(rng.uniform(0.02, 0.2) * side)]
        strip[:] = rng.choice([0, 1, rng.random()])
    for _ in range(rng.poisson(0.5)):  # name plates
        (y, x), size = rng.integers(0, side, 2), int(rng.uniform(0.03, 0.1) * side)
        gray[y : y + size, x : x + 2 * size] = rng.integers(2)
    return np.clip(255 * gray, 0, 255).astype("uint8")


def draw_examples(n_images, seed):
    """Draws pictures of all kinds.

    Args:
        n_images: int, number of different chests.
        seed: int.

    Returns:
        Features, float32 (n, 384), and the index of each picture's kind in `KINDS`, int (n,).
    """
    rng = np.random.default_rng([20, seed])
    chests = []
    for image in plan_synthetic_study(n_images, seed):
        person = (seed, image["patient"]), image["findings"], image["view"], image["sex"], image["age"]
        pixels = draw_image(*person, SIDE, image["visit"])[0]
        chests += [vary(pixels, rng) for _ in range(REPEATS)]
    chests = np.array(chests)
    groups = [np.rot90(images, turns, (1, 2)) for images in (chests, 255 - chests) for turns in range(4)]
    groups.append(np.array([vary(draw_lateral(rng, SIDE), rng) for _ in range(round(1.5 * n_images))]))
    others = [draw(rng, SIDE) for draw, share in OTHERS for _ in range(round(share * n_images))]
    groups.append(np.array([vary(picture, rng) if rng.random() < 0.7 else picture for picture in others]))
    features = np.concatenate([image_features(np.ascontiguousarray(group)) for group in groups])
    return features, np.repeat(np.arange(len(KINDS)), [len(group) for group in groups])


def main():
    """Fits, measures on other synthetic pictures, and writes the weights."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    features, kinds = draw_examples(options.images, options.seed)
    model = LogisticRegression(C=STRENGTH, max_iter=400).fit(features, kinds)
    features, kinds = draw_examples(options.images // 4, options.seed + 1)
    right = model.predict(features) == kinds
    recall = {kind: round(float(right[kinds == place].mean()), 3) for place, kind in enumerate(KINDS)}
    rows = np.column_stack([model.coef_, model.intercept_]).astype("float64").round(4).tolist()
    text = {"fitted": {"images": options.images, "seed": options.seed, "recall_on_other_drawn_pictures": recall}}
    lines = [f'  "{kind}": {json.dumps(row)}' for kind, row in zip(KINDS, rows, strict=True)]
    path = ROOT / "notebooks" / "helpers" / "export" / "input_gate.json"
    path.write_text(json.dumps(text)[:-1] + ',\n "weights": {\n' + ",\n".join(lines) + "\n }\n}\n")
    print(f"{path.relative_to(ROOT)}: {recall}")


if __name__ == "__main__":
    main()
