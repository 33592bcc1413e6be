"""Draws the 14 findings into a synthetic chest, and with them the whole chest.

A finding changes the body before it is drawn (a large heart, a high diaphragm), or adds to the attenuation afterwards
(fluid instead of air, a nodule on top), or both. `case` holds its name, its own random stream `rng`, its `severity` in
[0, 1] and its `side` (-1 the patient's right, 1 the left). Each pattern is the textbook's, drawn by eye.
"""

from types import SimpleNamespace

import numpy as np

from .labels import PATHOLOGIES
from .synthetic_anatomy import Chest, dome, draw_body, ramp

MILDEST = 0.0  # severity of the mildest case, in [0, 1]; raise it to make every finding easier to see


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
    body = draw_body(np.random.default_rng([0, *seed]), view, sex, age)
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
    return chest.expose(np.random.default_rng([5, *seed, visit])), boxes


# Findings that change the shape of the chest.


def _reshape_atelectasis(body, case):
    body.dome[int(case.side > 0)] -= 0.025 + 0.045 * case.severity


def _reshape_cardiomegaly(body, case):
    ratio = 0.55 + 0.12 * case.severity  # cardiothoracic ratio; 0.5 is the usual limit in a PA image
    body.heart *= ratio * 2 * body.width / body.heart.sum()
    body.heart_v -= 0.01


def _reshape_emphysema(body, case):
    body.dome += 0.035 + 0.045 * case.severity
    body.curve *= 0.6 - 0.35 * case.severity
    body.width += 0.012 * case.severity
    body.depth *= 1.02 + 0.09 * case.severity
    body.heart *= 0.92 - 0.16 * case.severity
    body.vessel = 0.65 - 0.3 * case.severity


def _reshape_fibrosis(body, case):
    body.dome -= 0.01 + 0.03 * case.severity
    body.width -= 0.008 * case.severity


RESHAPE = {
    "Atelectasis": _reshape_atelectasis,
    "Cardiomegaly": _reshape_cardiomegaly,
    "Emphysema": _reshape_emphysema,
    "Fibrosis": _reshape_fibrosis,
}

# Findings drawn into the chest: each adds to `chest.mu` and returns one mask for each box.


def _paint_atelectasis(chest, case):
    rng, b, mask = case.rng, chest.body, 0
    top = b.dome[int(case.side > 0)]
    for k in range(2 + int(case.severity > 0.5)):
        center = (case.side * rng.uniform(0.17, 0.24), top - 0.035 - 0.05 * k + rng.normal(0, 0.006))
        r2 = chest.distance2(
            center, (rng.uniform(0.09, 0.13), 0.011 + 0.006 * case.severity), case.side * rng.normal(0.1, 0.12)
        )
        mask = np.maximum(mask, ramp((1 - r2) / 0.8))
    chest.mu += (0.35 + 0.2 * case.severity) * mask * chest.lung
    return [mask * chest.lung]


def _paint_cardiomegaly(chest, case):
    return [chest.heart]


def _paint_effusion(chest, case):
    height = 0.035 + 0.165 * case.severity
    half = chest.u * case.side > 0
    # The fluid's upper border climbs towards the chest wall.
    surface = chest.body.dome[int(case.side > 0)] + 0.05 - height - 2.2 * np.clip(chest.a - 0.14, 0, None) ** 2
    return [chest.fill(0.95 * half * ramp((chest.v - surface) / 0.06))]


def _paint_infiltration(chest, case):
    clouds, masks = chest.mottle(11, case.rng) + 0.5 * chest.mottle(24, case.rng), []
    for side in (-1, 1):
        zone = np.exp(-1.2 * chest.distance2((side * 0.2, case.rng.uniform(0.45, 0.55)), (0.13, 0.15)))
        masks.append(chest.fill((0.4 + 0.35 * case.severity) * zone * ramp((clouds + 0.4) / 2.2)))
    return masks


def _paint_mass(chest, case):
    rng = case.rng
    center = (case.side * rng.uniform(0.14, 0.25), rng.uniform(0.27, 0.6))
    radius = 0.06 + 0.05 * case.severity
    r2 = chest.distance2(center, (radius, radius * rng.uniform(0.85, 1.1))) * (1 + 0.12 * chest.mottle(14, rng))
    mask = dome(r2) * (chest.inside > -0.01)
    chest.mu += 0.62 * mask
    return [mask]


def _paint_nodule(chest, case):
    rng, masks = case.rng, []
    for _ in range(rng.integers(1, 4)):
        side, radius = rng.choice((-1, 1)), 0.022 + 0.016 * case.severity * rng.uniform(0.6, 1)
        v = rng.uniform(0.24, 0.62)
        center = (side * rng.uniform(0.15, 0.2 + 0.1 * ramp((v - 0.35) / 0.3)), v)
        masks.append(dome(chest.distance2(center, (radius, radius * rng.uniform(0.85, 1.15)))))
        chest.mu += (0.5 + 0.15 * case.severity) * masks[-1]
    return masks


def _paint_pneumonia(chest, case):
    rng = case.rng
    center = np.array([case.side * rng.uniform(0.17, 0.24), rng.uniform(0.48, 0.6)])
    radius = 0.11 + 0.05 * case.severity
    r2 = chest.distance2(center, (radius, radius * 0.9)) + 0.22 * chest.mottle(12, rng) + 0.12 * chest.mottle(36, rng)
    turns = rng.uniform(0, 2 * np.pi, 18)
    rays = np.stack([np.cos(turns), np.sin(turns)], axis=1) * radius
    streaks = chest.strokes([([center + 0.6 * ray, center + 1.5 * ray], 0.005, 1.0) for ray in rays])
    bronchi = chest.strokes([([(case.side * 0.1, 0.44), center, center + 0.7 * ray], 0.007, 1.0) for ray in rays[:4]])
    mask = ramp((0.9 - r2) / 1.3)
    return [chest.fill((0.75 + 0.2 * case.severity) * mask * (1 - 0.25 * bronchi) + 0.15 * streaks)]


def _paint_pneumothorax(chest, case):
    b = chest.body
    half = (chest.u * case.side > 0) * np.clip(3 * chest.air, 0, 1)  # air rises above the fluid of an effusion
    rim = 0.015 + 0.06 * case.severity
    # Distance from the collapsed lung's surface: the free air is widest at the apex, where the patient sits up.
    off = chest.inside - rim - (0.35 + 0.6 * case.severity) * np.clip(b.apex + 0.22 - chest.v, 0, None)
    free = half * chest.lung * ramp(-off / 0.012) * ramp((chest.above - 0.02) / 0.05)
    collapsed = half * chest.lung * ramp(off / 0.012)
    chest.mu += (
        free * (-chest.vessels - 0.1 - 0.1 * case.severity) + (0.04 + 0.12 * case.severity) * collapsed * chest.air
    )
    chest.mu += 0.16 * half * chest.lung * ramp(0.5 - np.abs(off) / 0.009) * ramp((chest.above - 0.02) / 0.05)
    return [free]


def _paint_consolidation(chest, case):
    rng = case.rng
    half = chest.u * case.side > 0
    border = chest.v - (rng.uniform(0.36, 0.44) + rng.uniform(-0.25, 0.1) * (chest.a - 0.2))
    lobe = ramp(-border / 0.01) if rng.random() < 0.75 else ramp((border - 0.1) / 0.01)
    density = (0.72 + 0.22 * case.severity) * (1 + 0.05 * chest.mottle(12, rng))
    return [chest.fill(density * half * lobe)]


def _paint_edema(chest, case):
    haze = 0
    for side in (-1, 1):
        wing = chest.distance2((side * 0.13, 0.46), (0.12, 0.19), 0.15 * side)
        haze = haze + np.exp(-(wing**1.5))
    clouds = 1 + 0.15 * chest.mottle(20, case.rng)
    kerley = [
        ([(side * (chest.body.width - 0.05), v), (side * (chest.body.width - 0.012), v + 0.004)], 0.004, 1.0)
        for side in (-1, 1) for v in chest.body.dome[0] - 0.005 - 0.018 * np.arange(7)
    ]  # fmt: skip
    added = chest.fill((0.28 + 0.4 * case.severity) * haze * clouds)
    chest.fill(0.4 * chest.strokes(kerley))
    return [added]


def _paint_emphysema(chest, case):
    return [chest.lung]


def _paint_fibrosis(chest, case):
    # The zero lines of smooth noise form a net, much as thickened septa do.
    net = ramp(0.6 - np.minimum(np.abs(chest.mottle(44, case.rng)), np.abs(chest.mottle(62, case.rng))) / 0.5)
    net = net * ramp(0.5 + chest.mottle(14, case.rng) / 3)
    low = ramp((chest.v - chest.by_side(chest.body.dome) + 0.2) / 0.3)
    rim = np.exp(-np.clip(chest.inside, 0, None) / 0.07)
    zone = np.clip(0.3 * low + 1.1 * low * rim + 0.35 * rim, 0, 1)
    return [chest.fill(zone * (0.14 + 0.22 * case.severity + (0.32 + 0.3 * case.severity) * net))]


def _paint_pleural_thickening(chest, case):
    rng, b = case.rng, chest.body
    half = 1.0 if rng.random() < 0.25 else chest.u * case.side > 0
    # A stretch of the wall, and the cap over the apex.
    middle, reach = rng.uniform(0.35, 0.62), rng.uniform(0.22, 0.45)
    stretch = ramp((reach / 2 - np.abs(chest.v - middle)) / 0.08)
    thick = (0.022 + 0.02 * case.severity) * stretch * (1 + 0.25 * chest.mottle(9, rng))
    thick += (0.035 + 0.03 * case.severity) * ramp((b.apex + 0.09 - chest.v) / 0.06)
    return [chest.fill(0.9 * half * ramp((thick - chest.inside) / 0.01 - 0.5))]


def _paint_hernia(chest, case):
    rng, b = case.rng, chest.body
    radius = 0.06 + 0.04 * case.severity
    center = (rng.uniform(-0.02, 0.06), float(b.dome[1]) - 0.03 - 0.4 * radius)
    r2 = chest.distance2(center, (radius * rng.uniform(1.0, 1.25), radius))
    pouch = ramp((1 - r2) / 0.3)
    level = center[1] + radius * rng.uniform(-0.45, 0.15)
    gas = ramp((0.78 - r2) / 0.25) * ramp((level - chest.v) / 0.01)
    chest.mu += (0.2 + 0.2 * case.severity) * pouch * (1 - gas) - (0.25 + 0.35 * case.severity) * gas
    chest.fill(0.7 * pouch * (1 - gas))
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
