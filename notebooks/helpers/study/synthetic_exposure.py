"""Takes the synthetic radiograph: lines and devices on the chest, shadows before it, exposure, borders, letters.

None of it knows the findings. Only the view decides: a portable (AP) image is duller and has more lines.
Devices and borders were drawn beside real radiographs; how often each is there was chosen by eye.
"""

import numpy as np
from scipy import ndimage

from .synthetic_anatomy import Chest, ramp

# Share of PA and of AP images with each device.
DEVICES = {"leads": (0.08, 0.6), "line": (0.06, 0.4), "tube": (0.02, 0.25), "pacemaker": (0.04, 0.04)}


def expose(chest: Chest, rng):
    """Turns attenuation into gray: devices, shadows, scatter, characteristic curve, blur, noise, borders, letters.

    Args:
        chest: a chest that is drawn.
        rng: the image's own numpy Generator.

    Returns:
        uint8 (size, size).
    """
    size, ap = chest.size, chest.body.ap
    texture = 0.035 * chest.mottle(7, chest.texture) + 0.02 * chest.mottle(40, chest.texture)
    # Clothes, folds of skin, the blanket: broad shadows that every visit casts anew.
    shadow = 0.09 * chest.mottle(3, rng) + 0.06 * chest.mottle(5, rng) + _draw_folds(chest, rng)
    mu = chest.mu + chest.torso * (texture + shadow) + _draw_devices(chest, rng)
    exposure, gamma = np.exp(np.clip(rng.normal(0, 0.16), -0.35, 0.35)), 1.6 + 0.2 * rng.normal() - 0.15 * ap
    gray = 1 - np.exp(-((np.clip(mu, 0.0, None) / exposure) ** np.clip(gamma, 1.0, 2.2)))
    veil = rng.uniform(0.04, 0.2) + 0.1 * ap  # scattered radiation, more without a grid
    gray = (1 - veil) * gray + veil * (0.55 + 0.2 * rng.normal()) * chest.torso
    black, white = rng.uniform(0, 0.12), rng.uniform(0.8, 1.0)
    gray = black + (white - black) * gray
    gray = ndimage.gaussian_filter(gray, size / 256 * rng.uniform(0.3, 0.7) * (1.3 if ap else 1))
    grain = rng.normal(size=(size, size)).astype(np.float32)
    coarse = chest.mottle(size // 3, rng)  # what scaling and compression leave of the noise
    loud = rng.random() ** 2
    gray += ((0.007 + 0.006 * ap + 0.012 * loud) * grain + 0.015 * loud * coarse) * (0.4 + chest.torso)
    _draw_borders(gray, rng)
    _draw_letter(gray, rng)
    return np.clip(255 * gray, 0, 255).astype(np.uint8)


def _draw_folds(chest, rng):
    """Returns folds of skin, seams and the edges of cloth, in attenuation: sharp on one side, fading on the other."""
    folds = 0
    for _ in range(rng.poisson(2.5)):
        turn, at = rng.uniform(0, 2 * np.pi), rng.uniform(-0.3, 0.3)
        u, v = chest.u - rng.uniform(-0.3, 0.3), chest.v - rng.uniform(0.2, 0.75)
        along, across = np.cos(turn) * u + np.sin(turn) * v, np.cos(turn) * v - np.sin(turn) * u
        across = across - rng.normal(0, 1.0) * along**2
        band = (
            (across > 0)
            * np.exp(-across / rng.uniform(0.015, 0.12))
            * ramp((rng.uniform(0.1, 0.4) - abs(along - at)) / 0.1)
        )
        folds = folds + rng.uniform(0.06, 0.22) * rng.choice((-1, 1), p=(0.3, 0.7)) * band
    return folds


def _draw_devices(chest, rng):
    """Returns electrodes, lines, tubes and pacemakers, in attenuation."""
    here = {name: rng.random() < shares[int(chest.body.ap)] for name, shares in DEVICES.items()}
    lines, rings, way = [], [], np.linspace(0, 1, 12)[:, None]
    if here["leads"]:
        for side in rng.choice((-1, 1, 1), rng.integers(2, 5)):
            spot = np.array((side * rng.uniform(0.1, 0.33), rng.uniform(0.18, 0.68)))
            sag = 0.05 * np.sin(3 * way) * rng.normal(size=2)
            end = (rng.uniform(-0.3, 0.45), rng.choice((-0.05, 1.05)))
            lines.append((spot * (1 - way) + way * end + sag, 0.004, 0.7))
            rings.append((spot, rng.uniform(0.012, 0.02), 0.006, 1.0))
    if here["line"]:  # a central venous catheter, from the neck or the arm to the heart
        side = rng.choice((-1, 1))
        start = (side * rng.uniform(0.08, 0.4), rng.uniform(0.0, 0.2))
        bend = np.array((side * rng.uniform(0.02, 0.12), 0.2))
        tip = (-rng.uniform(0.02, 0.06), rng.uniform(0.38, 0.52))
        curve = (1 - way) ** 2 * start + 2 * way * (1 - way) * bend + way**2 * tip
        lines.append((curve, 0.006, 0.6))
    if here["tube"]:
        depth = rng.uniform(0.3, 0.95)  # a short one ends in the windpipe, a long one in the stomach
        drift = np.concatenate(
            [0.004 + 0.02 * rng.normal() * way + 0.12 * np.clip(depth * way - 0.65, 0, 1), depth * way], 1
        )
        lines.append((drift, 0.01, 0.5))
    if here["pacemaker"]:
        side = rng.choice((-1, 1))
        spot = np.array((side * rng.uniform(0.2, 0.27), rng.uniform(0.2, 0.27)))
        turn = np.linspace(0, 2 * np.pi, 9)[:, None]
        body = spot + (0.035, 0.028) * np.concatenate([np.cos(turn), np.sin(turn)], 1)
        lines += [(body, 0.02, 1.0), (spot + np.array([(-0.02, 0), (0.02, 0)]), 0.04, 1.0)]
        lines.append((spot * (1 - way) + way * (0.06, 0.6) + (0, -0.08) * np.sin(np.pi * way), 0.005, 0.8))
    return 0.4 * chest.strokes(lines, rings) if lines else 0


def _draw_borders(gray, rng):
    """Draws collimation, in place: dark or bright strips along some of the four sides."""
    size = len(gray)
    for turn in range(4):
        if rng.random() < 0.25:
            view = np.rot90(gray, turn)  # a view: writing into it writes into `gray`
            width = rng.uniform(0.01, 0.07) + rng.uniform(-0.02, 0.02) * np.linspace(-1, 1, size)
            strip = np.arange(size)[:, None] < size * width
            view[strip] = rng.choice((0.0, 0.03, 1.0), p=(0.5, 0.35, 0.15))


def _draw_letter(gray, rng):
    """Draws a side marker L or R, in place, somewhere near the upper border or beside the trunk."""
    size = len(gray)
    if rng.random() < 0.15:
        return
    left = rng.random() < 0.7
    x = rng.uniform(0.85, 0.94) if left else rng.uniform(0.03, 0.1)
    x, y = int(size * x), int(size * rng.uniform(0.02, 0.2))
    thick, tall = max(1, size // 90), max(3, int(size * rng.uniform(0.03, 0.05)))
    bright = rng.uniform(0.85, 1.0)
    gray[y : y + tall, x : x + thick] = bright
    if left:
        gray[y + tall - thick : y + tall, x : x + 2 * tall // 3] = bright
        return
    wide = max(2, tall // 2)
    gray[y : y + thick, x : x + wide] = gray[y + tall // 2 : y + tall // 2 + thick, x : x + wide] = bright
    gray[y : y + tall // 2, x + wide - thick : x + wide] = bright
    for step in range(tall // 2):
        at = x + thick + step * wide // max(1, tall // 2)
        gray[y + tall // 2 + step, at : at + thick] = bright
