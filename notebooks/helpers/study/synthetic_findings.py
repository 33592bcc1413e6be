"""Draws the 14 findings into a synthetic chest, and with them the whole chest.

A finding changes the body before it is drawn (a large heart, a high diaphragm), or adds to the attenuation afterwards
(fluid instead of air, a nodule on top), or both. `case` holds its name, its own random stream `rng`, its `severity` in
[0, 1] and its `side` (-1 the patient's right, 1 the left). Each pattern is the textbook's, drawn by eye.
"""

from types import SimpleNamespace

import numpy as np

from .labels import PATHOLOGIES
from .synthetic_anatomy import Chest, dome, draw_body, ramp
from .synthetic_exposure import expose

MILDEST = 0.2  # severity of the mildest case, in [0, 1]; raise it to make every finding easier to see


def draw_image(seed, findings=(), view="PA", sex="F", age=60, size=256, visit=0):
    """Draws one image and says where its findings are.

    Every part of the image has its own random stream, so the same seed with other findings keeps the anatomy,
    the pose, the exposure and the noise, and another visit keeps the anatomy and the site of each finding.

    Args:
        seed: int or sequence of ints, the patient.
        findings: names from `PATHOLOGIES`, in any order.
        view: "PA" (standing, sharp, heart small) or "AP" (portable, lying, dull, heart large).
        sex: "F" or "M".
        age: years, 0 to 120.
        size: pixels a side, at least 32.
        visit: follow-up number, 0 or more: pose, exposure and severity differ between visits.

    Returns:
        A pair. The image, uint8 of shape (size, size), dark where much radiation arrives. And a dict from each
        finding to a list of boxes (x, y, width, height) in pixels of this image, float, origin at the top left.

    Raises:
        ValueError: if a finding, the view or the sex is unknown, or the size is below 32.
    """
    unknown = sorted(set(findings) - set(PATHOLOGIES))
    if unknown or view not in ("PA", "AP") or sex not in ("F", "M") or size < 32:
        raise ValueError(
            f"cannot draw unknown {unknown}, view {view!r} (PA, AP), sex {sex!r} (F, M), size {size} (>= 32)"
        )
    seed = [int(part) for part in np.atleast_1d(seed)]
    body = draw_body(np.random.default_rng([0, *seed]), np.random.default_rng([6, *seed, visit]), view, sex, age)
    cases = []
    for k, name in enumerate(PATHOLOGIES):
        if name in findings:
            rng = np.random.default_rng([1, *seed, k])
            course = np.random.default_rng([2, *seed, k, visit])
            severity = MILDEST + (1 - MILDEST) * (0.75 * rng.random() + 0.25 * course.random())
            cases.append(SimpleNamespace(name=name, rng=rng, severity=severity, side=int(rng.choice((-1, 1)))))
            if name in RESHAPE:
                RESHAPE[name](body, cases[-1])
    chest = Chest(body, np.random.default_rng([3, *seed, visit]), [4, *seed], size)
    chest.draw_normal()
    boxes = {case.name: [chest.find_box(mask) for mask in PAINT[case.name](chest, case)] for case in cases}
    return expose(chest, np.random.default_rng([5, *seed, visit])), boxes


# Findings that change the shape of the chest.


def _reshape_atelectasis(body, case):
    body.dome[int(case.side > 0)] -= 0.01 + 0.03 * case.severity


def _reshape_cardiomegaly(body, case):
    ratio = 0.5 + 0.13 * case.severity  # cardiothoracic ratio; 0.5 is the usual limit in a PA image
    body.heart *= ratio * 2 * body.width / body.heart.sum()
    body.heart_v -= 0.01


def _reshape_emphysema(body, case):
    body.dome += 0.01 + 0.03 * case.severity
    body.curve *= 0.75 - 0.35 * case.severity
    body.heart *= 0.96 - 0.1 * case.severity
    body.vessel *= 0.75 - 0.2 * case.severity


def _reshape_fibrosis(body, case):
    body.dome -= 0.01 + 0.02 * case.severity


RESHAPE = {
    "Atelectasis": _reshape_atelectasis,
    "Cardiomegaly": _reshape_cardiomegaly,
    "Emphysema": _reshape_emphysema,
    "Fibrosis": _reshape_fibrosis,
}

# Findings drawn into the chest: each adds to `chest.mu` and returns one mask for each box.


def _place(chest, rng, side, high=0.24, low=0.62):
    """Returns a place (u, v) within one lung, away from its border."""
    low = max(high, min(low, float(chest.body.dome[int(side > 0)]) - 0.04))
    v = rng.uniform(high, low)
    reach = chest.body.width * float(np.sqrt(np.clip((v - chest.body.apex) / 0.4, 0.1, 1)))
    return side * rng.uniform(0.11, max(0.13, 0.85 * reach)), v


def _paint_atelectasis(chest, case):
    rng, mask = case.rng, 0
    u, v = _place(chest, rng, case.side, 0.4, 0.7)
    tilt = rng.normal(0, 0.6)
    for k in range(rng.integers(1, 4)):
        center = (u + rng.normal(0, 0.02), v - 0.045 * k)
        radii = (rng.uniform(0.07, 0.12), 0.011 + 0.006 * case.severity)
        mask = np.maximum(mask, ramp((1 - chest.distance2(center, radii, tilt + rng.normal(0, 0.1))) / 0.8))
    chest.mu += (0.35 + 0.2 * case.severity) * mask * chest.lung
    return [mask * chest.lung]


def _paint_cardiomegaly(chest, case):
    return [chest.heart]


def _paint_effusion(chest, case):
    height = 0.015 + 0.1 * case.severity
    half = chest.u * case.side > 0
    # The fluid's upper border climbs towards the chest wall.
    surface = chest.body.dome[int(case.side > 0)] + 0.05 - height - 2.6 * np.clip(chest.a - 0.14, 0, None) ** 2
    return [chest.fill(0.95 * half * ramp((chest.v - surface) / 0.06))]


def _paint_infiltration(chest, case):
    rng, masks = case.rng, []
    for side in (-1, 1) if rng.random() < 0.5 else (case.side,):
        patches = 0
        u, v = _place(chest, rng, side, 0.3, 0.6)
        for _ in range(rng.integers(5, 10)):
            center = (u + rng.normal(0, 0.05), v + rng.normal(0, 0.06))
            radius = rng.uniform(0.018, 0.04)
            patch = np.exp(-1.5 * chest.distance2(center, (radius, radius * rng.uniform(0.6, 1.4)), rng.uniform(0, 3)))
            patches = 1 - (1 - patches) * (1 - (0.45 + 0.25 * case.severity) * patch)
        masks.append(chest.fill(patches * (1 + 0.2 * chest.mottle(40, rng))))
    return masks


def _paint_mass(chest, case):
    rng = case.rng
    radius = 0.055 + 0.045 * case.severity
    r2 = chest.distance2(_place(chest, rng, case.side), (radius, radius * rng.uniform(0.8, 1.2)), rng.uniform(0, 3))
    r2 = r2 * (1 + 0.14 * chest.mottle(14, rng))
    mask = dome(r2) * (chest.inside > -0.01)
    chest.mu += 0.65 * mask
    return [mask]


def _paint_nodule(chest, case):
    rng, masks = case.rng, []
    for _ in range(rng.integers(1, 4)):
        radius = 0.028 + 0.014 * case.severity * rng.uniform(0.6, 1)
        place = _place(chest, rng, rng.choice((-1, 1)))
        masks.append(dome(chest.distance2(place, (radius, radius * rng.uniform(0.85, 1.15)))))
        chest.mu += (0.5 + 0.15 * case.severity) * masks[-1]
    return masks


def _paint_pneumonia(chest, case):
    rng = case.rng
    center = np.array(_place(chest, rng, case.side, 0.34, 0.6))
    radius = 0.085 + 0.04 * case.severity
    cloud = 0.5 * chest.mottle(9, rng) + 0.3 * chest.mottle(22, rng)
    r2 = chest.distance2(center, (radius, radius * rng.uniform(0.7, 1.3)), rng.uniform(0, 3)) * np.exp(0.35 * cloud)
    # Bronchi stay full of air and show as dark branches that run out from the hilum.
    root = center + (np.array((case.side * 0.09, 0.44)) - center) * min(1, 1.1 * radius / 0.12)
    lines = []
    for turn in rng.uniform(-1.1, 1.1, 6):
        c, s = np.cos(turn), np.sin(turn)
        out = np.array([[c, -s], [s, c]]) @ (center - root)
        way = np.linspace(0, 1, 6)[:, None]
        lines.append((root + way * 1.5 * out + 0.01 * rng.normal(size=(6, 2)).cumsum(0) * way, 0.011, 1.0))
    mask = np.exp(-(np.clip(r2, 0, None) ** 1.3))
    return [chest.fill((0.7 + 0.25 * case.severity) * mask * (1 - 0.5 * chest.strokes(lines)))]


def _paint_pneumothorax(chest, case):
    b = chest.body
    half = (chest.u * case.side > 0) * np.clip(3 * chest.air, 0, 1)  # air rises above the fluid of an effusion
    rim = 0.02 + 0.05 * case.severity
    # Distance from the collapsed lung's surface: the free air is widest at the apex, where the patient sits up.
    off = chest.inside - rim - (0.35 + 0.6 * case.severity) * np.clip(b.apex + 0.22 - chest.v, 0, None)
    free = half * chest.lung * ramp(-off / 0.012) * ramp((chest.above - 0.02) / 0.05)
    collapsed = half * chest.lung * ramp(off / 0.012)
    chest.mu += (
        free * (-chest.vessels - 0.12 - 0.08 * case.severity) + (0.04 + 0.1 * case.severity) * collapsed * chest.air
    )
    chest.mu += 0.2 * half * chest.lung * ramp(0.5 - np.abs(off) / 0.012) * ramp((chest.above - 0.02) / 0.05)
    return [free]


def _paint_consolidation(chest, case):
    rng = case.rng
    half = chest.u * case.side > 0
    # A lobe or a segment, with a sharp fissure for a border.
    tilt, at = rng.normal(0, 0.3), rng.uniform(0.34, 0.56)
    border = chest.v - at - tilt * (chest.a - 0.2)
    up = rng.random() < 0.5
    depth = rng.uniform(0.12, 0.24)
    lobe = ramp((-border if up else border) / 0.01) * ramp((depth - np.abs(border)) / 0.1)
    density = (0.5 + 0.3 * case.severity) * (1 + 0.06 * chest.mottle(12, rng))
    return [chest.fill(density * half * lobe)]


def _paint_edema(chest, case):
    rng, haze = case.rng, 0
    for side in (-1, 1):
        wing = chest.distance2((side * 0.13, 0.46), (0.12, 0.19), 0.15 * side)
        haze = haze + np.exp(-(wing**1.5))
    # Full vessels with blurred walls, and septa that reach the pleura (Kerley's lines).
    lines = []
    for side in (-1, 1):
        for turn in rng.uniform(-1.3, 1.4, 11):
            way = np.linspace(0, 1, 7)[:, None]
            bend = 0.018 * rng.normal(size=(7, 2)).cumsum(0) * way
            tip = np.array((side * np.cos(turn), np.sin(turn))) * rng.uniform(0.16, 0.26)
            lines.append((np.array((side * 0.09, 0.44)) + way * tip + bend, rng.uniform(0.01, 0.015), 0.8))
        for v in rng.uniform(0.3, float(chest.body.dome[0]), 9):
            end = side * (chest.body.width - 0.01)
            lines.append((np.array([(end - side * 0.055, v - 0.01), (end, v)]), 0.008, 1.0))
    added = chest.fill((0.06 + 0.16 * case.severity) * haze * (1 + 0.25 * chest.mottle(20, rng)))
    chest.fill((0.2 + 0.15 * case.severity) * chest.strokes(lines) * chest.lung)
    return [added]


def _paint_emphysema(chest, case):
    rng = case.rng
    # Bullae: round, without vessels, with a thin wall.
    rings = []
    for _ in range(rng.integers(2, 6)):
        center, radius = _place(chest, rng, rng.choice((-1, 1)), 0.2, 0.6), rng.uniform(0.035, 0.07)
        hole = ramp((1 - chest.distance2(center, (radius, radius))) / 0.3) * chest.lung
        chest.mu -= hole * (0.9 * chest.vessels + 0.1)
        chest.vessels = chest.vessels * (1 - 0.9 * hole)
        rings.append((center, radius, 0.007, 0.8))
    chest.mu += 0.3 * chest.strokes([], rings) * chest.lung
    return [chest.lung]


def _paint_fibrosis(chest, case):
    rng, lines = case.rng, []
    # Short thickened septa in every direction, dense at the bases and under the pleura: a reticular pattern.
    count = int(200 + 200 * case.severity)
    v = chest.body.apex + (float(chest.body.dome.mean()) - chest.body.apex) * rng.beta(3, 1.3, count)
    u = rng.choice((-1, 1), count) * (chest.body.width - 0.25 * rng.beta(1, 2.2, count))
    turn = rng.uniform(0, np.pi, count)
    step = rng.uniform(0.008, 0.02, count) * np.stack([np.cos(turn), np.sin(turn)])
    bend = rng.normal(0, 0.006, (2, count))
    for k in range(count):
        middle = np.array((u[k], v[k]))
        lines.append((np.stack([middle - step[:, k], middle + bend[:, k], middle + step[:, k]]), 0.006, 1.0))
    low = ramp((chest.v - chest.by_side(chest.body.dome) + 0.2) / 0.3)
    zone = np.clip(low * np.exp(-np.clip(chest.inside, 0, None) / 0.12), 0, 1)
    net = chest.strokes(lines) * chest.lung
    return [chest.fill((0.2 + 0.18 * case.severity) * net + 0.05 * zone * (1 + 0.3 * chest.mottle(30, rng)))]


def _paint_pleural_thickening(chest, case):
    rng, b = case.rng, chest.body
    half = 1.0 if rng.random() < 0.25 else chest.u * case.side > 0
    # A stretch of the wall with an uneven surface, or the cap over the apex, or both.
    middle, reach, kind = rng.uniform(0.3, 0.62), rng.uniform(0.22, 0.42), rng.random()
    thick = (0.035 + 0.025 * case.severity) * ramp((reach / 2 - np.abs(chest.v - middle)) / 0.08) * (kind < 0.8)
    thick = thick + (0.045 + 0.035 * case.severity) * ramp((b.apex + 0.09 - chest.v) / 0.06) * (kind > 0.55)
    thick = thick * (1 + 0.45 * chest.mottle(13, rng))
    return [chest.fill(0.9 * half * ramp((thick - chest.inside) / 0.01 - 0.5))]


def _paint_hernia(chest, case):
    rng, b = case.rng, chest.body
    radius = 0.055 + 0.035 * case.severity
    center = (rng.uniform(-0.1, 0.12), float(b.dome[1]) - rng.uniform(0.5, 1.6) * radius)
    r2 = chest.distance2(center, (radius * rng.uniform(1.0, 1.25), radius))
    pouch = ramp((1 - r2) / 0.3)
    level = center[1] + radius * rng.uniform(-0.3, 0.2)
    gas = ramp((0.78 - r2) / 0.25) * ramp((level - chest.v) / 0.01)
    chest.fill(0.7 * pouch * (1 - gas))
    # Gas takes a share of what the rays must pass, so that it shows through a dense heart as well.
    chest.mu = (chest.mu + 0.12 * pouch * (1 - gas)) * (1 - (0.25 + 0.2 * case.severity) * gas)
    return [pouch]


PAINT = {
    "Atelectasis": _paint_atelectasis,
    "Cardiomegaly": _paint_cardiomegaly,
    "Effusion": _paint_effusion,
    "Infiltration": _paint_infiltration,
    "Mass": _paint_mass,
    "Nodule": _paint_nodule,
    "Pneumonia": _paint_pneumonia,
    "Pneumothorax": _paint_pneumothorax,
    "Consolidation": _paint_consolidation,
    "Edema": _paint_edema,
    "Emphysema": _paint_emphysema,
    "Fibrosis": _paint_fibrosis,
    "Pleural_Thickening": _paint_pleural_thickening,
    "Hernia": _paint_hernia,
}
