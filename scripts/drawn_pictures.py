"""Draws pictures other than frontal chest radiographs: laterals, other body parts, pages and plots, noise, scenes.

The input gate (helpers/export/input_gate.py) is fitted to such pictures, and measured on others of them. Shapes and
strengths were chosen by eye, without real pictures. Each function takes a NumPy generator and a side in pixels, and
returns uint8 (side, side).
"""

import cv2
import numpy as np
from scipy import ndimage

from helpers.study.synthetic_anatomy import dome, ramp


def mottle(rng, side, cells):
    """Returns smooth random clouds, float32 (side, side), about zero mean and unit deviation."""
    return cv2.resize(rng.normal(size=(cells, cells)).astype("float32"), (side, side), interpolation=cv2.INTER_CUBIC)


def _make_grid(side):
    """Returns x from -0.5 to 0.5 and y from 0 to 1, each (side, side)."""
    middle = (np.arange(side) + 0.5) / side
    return np.meshgrid(middle - 0.5, middle)


def _expose(mu, rng):
    """Turns attenuation into gray, with scatter, blur and noise."""
    side = len(mu)
    gray = 1 - np.exp(-((np.clip(mu, 0, None) / rng.uniform(0.75, 1.2)) ** rng.uniform(1.1, 1.8)))
    veil = rng.uniform(0, 0.2)
    gray = (1 - veil) * gray + veil * 0.5 * (mu > 0.02)
    gray = ndimage.gaussian_filter(gray, side / 256 * rng.uniform(0.3, 1)) + 0.01 * rng.normal(size=gray.shape)
    return np.clip(255 * gray, 0, 255).astype("uint8")


def draw_lateral(rng, side):
    """Draws a lateral chest: the patient faces the right of the picture."""
    x, y = _make_grid(side)

    def vary(deviation):
        return rng.normal(0, deviation)

    x = x / (1 + vary(0.06)) + vary(0.02) + vary(0.06) * (y - 0.5)
    y = y / (1 + vary(0.05)) + vary(0.02)
    front = 0.30 + vary(0.02) - 0.22 * ramp((0.22 - y) / 0.3) + 0.04 * np.sin(3 * y)
    back = -0.36 + vary(0.02) + 0.10 * ramp((0.12 - y) / 0.25) + 0.03 * np.cos(5 * y)
    middle, half = (front + back) / 2, (front - back) / 2
    torso = ramp(np.minimum(front - x, x - back) / 0.02)
    mu = torso * (0.5 + 0.75 * dome(((x - middle) / half) ** 2)) * (0.8 + 0.25 * ramp((y - 0.7) / 0.3))
    if rng.random() < 0.5:  # a breast
        mu += 0.5 * dome(((x - front - 0.02) / 0.09) ** 2 + ((y - 0.55 - vary(0.03)) / 0.12) ** 2)

    dome_v = 0.70 + vary(0.03) + 0.22 * np.clip((middle - x) / 0.4, -0.3, 1) + 0.04 * ((x - 0.05) / 0.2) ** 2
    top = 0.10 + vary(0.015) + 0.6 * np.clip(np.abs(x - middle) - 0.08, 0, None)
    lung = ramp(np.minimum(front - 0.045 - 0.02 * ramp((0.3 - y) / 0.3) - x, x - back - 0.045) / 0.03)
    lung *= ramp((y - top) / 0.05) * ramp((dome_v - y) / 0.02)
    heart_x, heart_y = 0.10 + vary(0.02), 0.585 + vary(0.02)
    heart2 = ((x - heart_x - 0.3 * (y - heart_y)) / (0.14 + vary(0.015))) ** 2
    heart = ramp((1 - heart2 - ((y - heart_y) / (0.155 + vary(0.015))) ** 2) / 0.35)
    hilum = ramp(1 - (x / 0.06) ** 2 - ((y - 0.42) / 0.06) ** 2)
    ring = np.abs(np.hypot((x + 0.02) / 0.1, (y - 0.33) / 0.09) - 1)
    arch = ramp((1 - ring / 0.28) / 0.8) * ramp((0.38 - y) / 0.06)
    clear = np.clip(1 - 0.85 * heart - (0.35 * hilum + 0.3 * arch) * (1 - heart), 0, 1)
    mu -= (0.75 + vary(0.05)) * lung * clear * (0.75 + 0.25 * ramp((y - 0.4) / 0.4))

    beat = 0.85 + 0.15 * np.cos(2 * np.pi * y / (0.075 + vary(0.004)))
    spine_x = back + 0.13 + vary(0.01) - 0.05 * np.sin(np.pi * np.clip(y, 0, 1))
    spine = ramp((0.045 + 0.012 * y - np.abs(x - spine_x)) / 0.02) * beat
    # Towards the diaphragm the spine turns darker, since less soft tissue lies beside it.
    mu += torso * spine * rng.uniform(0.25, 0.5) * (1.1 - 0.5 * ramp((y - 0.45) / 0.5) * lung)
    sternum = ramp((0.015 - np.abs(x - front + 0.03)) / 0.012) * ramp((y - 0.2) / 0.04) * ramp((0.55 - y) / 0.05)
    ribs = (y + 0.35 * (x - back) - 0.4 * (x - back) ** 2) / (0.07 + vary(0.003))
    mu += 0.3 * torso * sternum + 0.08 * torso * lung * (np.cos(2 * np.pi * ribs) > 0.3)
    if rng.random() < 0.8:  # an arm, raised
        angle = rng.uniform(-0.05, 0.5)
        off = np.abs((x - middle - 0.02) * np.cos(angle) - (0.16 - y) * np.sin(angle))
        mu += 0.5 * ramp((0.08 - off) / 0.02) * ramp((0.17 - y) / 0.06)
        mu += 0.3 * ramp((0.03 - off) / 0.02) * ramp((0.19 - y) / 0.05)
    if rng.random() < 0.35:  # the stomach's gas
        mu -= 0.25 * ramp((1 - ((x - 0.1) / 0.08) ** 2 - ((y - dome_v - 0.07) / 0.04) ** 2) / 0.5)
    mu *= 1 + 0.05 * mottle(rng, side, 8)
    return _expose(mu + 0.2 * (rng.random() < 0.15), rng)


def _add_limb(mu, x, y, start, end, widths, bone, soft):
    """Returns mu with a tapered limb and the shaft of its bone."""
    (x0, y0), (x1, y1) = start, end
    dx, dy = x1 - x0, y1 - y0
    along = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy), 0, 1)
    off = np.hypot(x - x0 - along * dx, y - y0 - along * dy)
    width = widths[0] + (widths[1] - widths[0]) * along
    shaft = width * bone * (1 + 0.6 * (2 * np.abs(along - 0.5)) ** 4)
    shell = ramp((shaft - off) / 0.012) * (0.45 + 0.4 * ramp((off - 0.6 * shaft) / 0.01))
    return np.maximum(mu, soft * dome((off / width) ** 2)) + 0.9 * shell * (soft + 0.2)


def draw_extremity(rng, side):
    """Draws a shaft, a hand, a bent joint, a skull, or a pelvis or abdomen, in any of eight orientations."""
    x, y = _make_grid(side)
    mu = np.zeros((side, side))
    kind = rng.integers(5)
    if kind == 0:
        for _ in range(rng.integers(1, 3)):
            center, lean, width = rng.uniform(-0.25, 0.25), rng.normal(0, 0.1), rng.uniform(0.12, 0.25)
            ends = (center - lean, -0.1), (center + lean, rng.uniform(0.7, 1.2))
            widths = width, width * rng.uniform(0.5, 1)
            mu = _add_limb(mu, x, y, *ends, widths, rng.uniform(0.2, 0.4), rng.uniform(0.5, 1))
    elif kind == 1:
        mu = np.maximum(mu, 0.5 * dome((x / 0.2) ** 2 + ((y - 0.72) / 0.22) ** 2))
        mu = _add_limb(mu, x, y, (0, 0.8), (0, 1.2), (0.13, 0.13), 0.3, 0.5)
        for finger in range(-2, 3):
            angle, length = finger * rng.uniform(0.18, 0.3), rng.uniform(0.4, 0.6)
            start = 0.15 * np.sin(angle), 0.7
            end = start[0] + length * np.sin(angle), 0.7 - length * np.cos(angle)
            mu = _add_limb(mu, x, y, start, end, (0.05, 0.035), 0.5, 0.5)
    elif kind == 2:
        angle, width, center = rng.normal(0, 0.4), rng.uniform(0.14, 0.24), (rng.normal(0, 0.05), 0.5)
        bend = angle + rng.normal(0, 0.4)
        upper, lower = (center[0] + 0.8 * np.sin(angle), -0.3), (center[0] - 0.8 * np.sin(bend), 1.3)
        mu = _add_limb(mu, x, y, center, upper, (width, 1.2 * width), 0.4, 0.8)
        mu = _add_limb(mu, x, y, center, lower, (width, 0.8 * width), 0.4, 0.8)
    elif kind == 3:
        radius = np.hypot((x - rng.normal(0, 0.03)) / rng.uniform(0.28, 0.38), (y - 0.42) / rng.uniform(0.33, 0.42))
        mu = 0.7 * dome(radius**2) + 0.8 * ramp((0.06 - np.abs(radius - 0.95)) / 0.05)
        mu = np.maximum(mu, 0.6 * ramp((0.16 - np.abs(x)) / 0.03) * ramp((y - 0.5) / 0.1))
        mu -= 0.25 * ramp((1 - ((np.abs(x) - 0.12) / 0.07) ** 2 - ((y - 0.5) / 0.06) ** 2) / 0.4)
        mu += 0.2 * mottle(rng, side, 6) * (radius < 1)
    else:
        mu = 0.9 * dome((x / rng.uniform(0.5, 0.75)) ** 2)
        mu += 0.25 * ramp((0.06 - np.abs(x)) / 0.02) * ramp((rng.uniform(0.5, 1.1) - y) / 0.1)
        if rng.random() < 0.6:
            hip = rng.uniform(0.45, 0.7)
            mu += 0.3 * ramp((1 - ((np.abs(x) - 0.22) / 0.16) ** 2 - ((y - hip) / 0.17) ** 2) / 0.5)
            mu += 0.35 * dome(((np.abs(x) - 0.3) / 0.08) ** 2 + ((y - hip - 0.27) / 0.09) ** 2)
        for _ in range(rng.integers(0, 9)):  # gas
            u, v = rng.uniform(-0.35, 0.35), rng.uniform(0.05, 0.9)
            gas2 = ((x - u) / rng.uniform(0.02, 0.1)) ** 2 + ((y - v) / rng.uniform(0.02, 0.08)) ** 2
            mu -= 0.3 * ramp((1 - gas2) / 0.6)
    image = np.rot90(_expose(mu * rng.uniform(0.8, 1.6), rng), rng.integers(4))
    return np.ascontiguousarray(image[:, ::-1] if rng.random() < 0.5 else image)


def draw_page(rng, side):
    """Draws a page of text, windows or a plot at four times the side, and shrinks it."""
    big, font = 4 * side, cv2.FONT_HERSHEY_SIMPLEX
    page = np.full((big, big), rng.integers(200, 256), "uint8")
    ink = int(rng.integers(0, 90))

    def write(n_letters, place, scale, level):
        cv2.putText(page, "".join(rng.choice(list("abcdefghijklmnop   "), n_letters)), place, font, scale, level, 1, 16)

    def spots():
        return [int(spot) for spot in rng.integers(0, big, 2)]

    kind = rng.integers(3)
    if kind == 0:
        height = int(rng.integers(big // 32, big // 10))
        for y in range(height, big - height, int(1.4 * height)):
            if rng.random() < 0.85:
                write(int(rng.integers(4, 60)), (int(rng.integers(4, 20)), y), height / 30, ink)
    elif kind == 1:
        for _ in range(rng.integers(3, 14)):
            x, y = spots()
            width, height = (int(extent) for extent in rng.integers(12, int(0.7 * big), 2))
            filled = -1 if rng.random() < 0.7 else 2
            cv2.rectangle(page, (x, y), (x + width, y + height), int(rng.integers(0, 256)), filled)
        for _ in range(rng.integers(2, 12)):
            write(int(rng.integers(3, 20)), spots(), rng.uniform(0.3, 1), int(rng.integers(0, 256)))
    else:
        cv2.rectangle(page, (big // 10, big // 12), (big - big // 20, big - big // 10), ink, 1)
        x = np.linspace(0.1 * big, 0.95 * big, 60)
        for _ in range(rng.integers(1, 5)):
            y = big / 2 + rng.normal(0, 0.05 * big) + np.cumsum(rng.normal(0, 0.02 * big, 60))
            cv2.polylines(page, [np.stack([x, y], 1).astype("int32")], False, int(rng.integers(0, 200)), 2, 16)
        if rng.random() < 0.5:
            for left in np.linspace(0.13 * big, 0.85 * big, 8).astype(int).tolist():
                top = int(rng.integers(big // 10, int(0.85 * big)))
                cv2.rectangle(page, (left, top), (left + big // 32, int(0.9 * big)), int(rng.integers(0, 230)), -1)
    page = cv2.resize(page, (side, side), interpolation=cv2.INTER_AREA)
    return 255 - page if rng.random() < 0.35 else page


def draw_noise(rng, side):
    """Draws noise of any color, from white to clouds, over a gradient in any direction."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1
    noise = np.fft.rfft2(rng.normal(size=(side, side))) * frequency ** -rng.uniform(0, 2.2)
    noise = np.fft.irfft2(noise, (side, side))
    x, y = _make_grid(side)
    angle = rng.uniform(0, 2 * np.pi)
    slope = rng.uniform(0, 8) * (np.cos(angle) * x + np.sin(angle) * (y - 0.5))
    gray = rng.uniform(0.2, 1) * noise / noise.std() + slope
    return np.clip(rng.normal(128, 25) + rng.uniform(15, 60) * gray, 0, 255).astype("uint8")


def draw_scene(rng, side):
    """Draws textured polygons and ellipses before one another, as things in a photograph are."""
    scene = draw_noise(rng, side).astype("float32")
    for _ in range(rng.integers(2, 14)):
        shape = np.zeros((side, side), "uint8")
        if rng.random() < 0.5:
            center, radii = rng.integers(0, side, 2).tolist(), rng.integers(3, side // 2, 2).tolist()
            cv2.ellipse(shape, center, radii, rng.uniform(0, 360), 0, 360, 1, -1)
        else:
            corners = rng.integers(-side // 8, side + side // 8, (rng.integers(3, 6), 2))
            cv2.fillPoly(shape, [corners.astype("int32")], 1)
        shape = ndimage.gaussian_filter(shape.astype("float32"), rng.uniform(0.2, 2))
        surface = rng.uniform(0, 255) + rng.uniform(0.1, 0.6) * (draw_noise(rng, side) - 128.0)
        scene += shape * (surface - scene)
    return np.clip(scene, 0, 255).astype("uint8")
