"""Draws a healthy chest for a synthetic frontal radiograph: a body and its pose.

Everything is attenuation (`mu`, in units of one chest thickness of soft tissue) until synthetic_exposure.py turns it
into gray, because that is where findings add up in a real radiograph. Lengths are fractions of the image's width. In
the body's own frame `u` runs from -0.5 to 0.5 across (positive is the patient's left, the right of the image) and `v`
from 0 at the top to 1 at the bottom. Shapes and strengths were chosen by eye beside real radiographs; none is
measured.
"""

import math
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw

HILUM = (0.085, 0.43)
AIR = 0.93  # attenuation that the lung's air takes away where it is deepest


def draw_body(rng, course, view, sex, age):
    """Returns the patient's build as a namespace: from `rng` what stays, from `course` what a visit changes."""
    n = np.clip(rng.normal(size=28), -2, 2).astype(np.float32)  # a float64 scalar would make every image float64
    ap = view == "AP"
    visit = np.clip(course.normal(size=6), -2, 2).astype(np.float32)
    top = 0.69 + 0.035 * n[0] + 0.04 * visit[0] - 0.03 * ap  # the breath is deeper or shallower each time
    body = SimpleNamespace(
        ap=ap, female=sex == "F", age=age,
        apex=0.105 + 0.015 * n[1],
        # One half of the diaphragm may stand high, which an effusion looks like: but it is convex.
        dome=top + np.array([0.0, 0.02]) - 0.05 * np.maximum(np.array([-n[2], n[2]]) + 0.6 * visit[5], 0),
        curve=np.clip(2.6 + 0.7 * n[3] + 0.5 * visit[1] - 12 * (top - 0.69), 0.9, 5) * np.ones(2),  # flat when deep
        width=0.35 + 0.022 * n[4] - 0.008 * (sex == "F"),
        depth=1.0 + 0.07 * n[5] + 0.05 * visit[2],
        heart=np.array([0.096 + 0.013 * n[6], 0.195 + 0.021 * n[7]]) * (1.06 if ap else 1.0),
        heart_u=0.02 * n[9] + 0.015 * visit[3],
        heart_v=0.59 + 0.018 * n[8] - 0.03 * ap + 0.4 * (top - 0.69),
        motion=0.012 + 0.05 * course.random() ** 2,  # the diaphragm moves during the exposure, and its edge blurs
        lean=0.16 * visit[3],  # the patient is turned: more tissue before one lung
        knob=0.036 + 0.005 * n[8] + 0.0002 * (age - 50),
        mediastinum=0.05 + 0.006 * n[10] + 0.006 * ap,
        rib_start=0.055 + 0.012 * n[11], rib_gap=0.063 + 0.003 * n[12], rib_tilt=1.0 + 0.15 * n[13],
        rib_mu=0.16 + 0.04 * n[14],
        flank=0.445 + 0.035 * n[15] + 0.02 * ap, axilla=0.36 + 0.04 * n[16], shoulder=0.17 + 0.03 * n[17],
        collar=0.165 + 0.025 * n[18] - 0.015 * ap,
        breast=(0.21 + 0.02 * n[19], 0.62 + 0.045 * n[20]), breast_size=0.125 + 0.03 * n[21],
        fat=1.0 + 0.12 * n[22],
        vessel=1.05 + 0.25 * n[23] + 0.2 * visit[4],
        # Turn in radians, shift across and down, log size: how this patient stands, apart from each visit's chance.
        stance=np.array([0.05, 0.035, 0.04, 0.1]) * n[24:28],
        vessel_seed=int(rng.integers(2**31)), bubble=rng.random(5).tolist(),
    )  # fmt: skip
    return body


def ramp(x):
    """Returns 0 below -0.5, 1 above 0.5 and a smooth step between: an edge of width w is `ramp(distance / w)`."""
    t = np.clip(x + 0.5, 0, 1)
    step = -2 * t
    step += 3
    step *= t
    step *= t
    return step


def dome(x):
    """Returns the thickness of a ball across: 1 at x = 0 (a squared radius), 0 from 1 on."""
    return np.sqrt(np.clip(1 - x, 0, 1))


def _flare(t):
    """Returns the lung's half width, in units of the greatest one, from the apex (0) to the lateral angle (1)."""
    return np.sqrt(1 - (1 - t) ** 2.2)


class Chest:
    """A chest that is being drawn: coordinates of every pixel in the body's frame, and the attenuation so far.

    Attributes:
        u, v, a: float32 (size, size), place in the body; `a` is abs(u).
        lung, heart, torso: float32 (size, size), outlines in [0, 1].
        air, vessels: float32 (size, size), attenuation that air takes away and vessels add.
        mu: float32 (size, size), attenuation.
        pose, zoom: how points of the body's frame lie in the image, and how large it is, about 1.
        texture: numpy Generator of what stays between visits.
        inside, above: float32 (size, size), distance to the lateral chest wall and height above the diaphragm.
    """

    def __init__(self, body, rng, texture_seed, size):
        self.body, self.size = body, size
        self.texture = np.random.default_rng(texture_seed)
        stance = body.stance + rng.normal((0, 0, 0.01, -0.05), (0.05 + 0.02 * body.ap, 0.04, 0.045, 0.09))
        angle, shift = stance[0], np.clip(stance[1:3], -0.12, 0.12)
        zoom = np.exp(np.clip(stance[3], -0.32, 0.16) + rng.normal(0, 0.03, 2))  # across, down
        c, s = math.cos(angle), math.sin(angle)
        self.pose = np.array([[c, -s], [s, c]]) * zoom, shift
        self.zoom = float(np.sqrt(zoom.prod()))
        grid = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
        x, y = grid[None, :] - np.float32(shift[0]), grid[:, None] - np.float32(shift[1])
        self.u = ((c * x + s * y) / zoom[0]).astype(np.float32)
        self.v = ((c * y - s * x) / zoom[1] + 0.5).astype(np.float32)
        self.a = np.abs(self.u)
        self.above = self.by_side(body.dome) + self.by_side(body.curve) * (self.a - 0.17) ** 2 - self.v
        corner = self.by_side(body.dome + body.curve * (body.width - 0.17) ** 2)
        t = np.clip((self.v - body.apex) / (corner - body.apex), 0, 1)
        self.inside = body.width * _flare(t) - self.a

    def by_side(self, pair):
        """Returns the first of a pair on the patient's right and the second on the left, float32 (size, size)."""
        return np.where(self.u > 0, np.float32(pair[1]), np.float32(pair[0]))

    def to_canvas(self, points, scale):
        """Returns points (n, 2) of the body's frame as pixels of a canvas `scale` pixels wide."""
        turn, shift = self.pose
        return ((np.asarray(points) - (0, 0.5)) @ turn.T + shift + 0.5) * scale

    def strokes(self, lines, rings=()):
        """Draws thin things: lines (points, width, level) and rings (center, radius, width, level), level in [0, 1].

        Returns:
            float32 (size, size) in [0, 1].
        """
        scale = max(512, 2 * self.size)  # PIL does not smooth edges; reducing does
        canvas = Image.new("L", (scale, scale))
        draw = ImageDraw.Draw(canvas)
        path = np.concatenate([line[0] for line in lines] or [np.empty((0, 2))])
        path = self.to_canvas(path, scale).ravel().tolist()  # one turn for all
        end = 0
        for points, width, level in lines:
            start, end = end, end + 2 * len(points)
            pixels = max(1, round(width * self.zoom * scale))
            draw.line(path[start:end], fill=int(255 * level), width=pixels, joint="curve")
        for center, radius, width, level in rings:
            (x, y), r = self.to_canvas([center], scale)[0], radius * self.zoom * scale
            pixels = max(1, round(width * self.zoom * scale))
            draw.ellipse((x - r, y - r, x + r, y + r), outline=int(255 * level), width=pixels)
        return np.asarray(canvas.resize((self.size, self.size), Image.Resampling.BOX), np.float32) / 255

    def mottle(self, cells, rng):
        """Returns smooth random clouds, float32 (size, size), about zero mean and unit deviation."""
        clouds = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32) * 1.4)
        return np.asarray(clouds.resize((self.size, self.size), Image.Resampling.BICUBIC))

    def distance2(self, center, radii, tilt=0.0):
        """Returns the squared distance from a center in units of the radii, after turning by `tilt` radians."""
        x, y, c, s = self.u - center[0], self.v - center[1], math.cos(tilt), math.sin(tilt)
        if not tilt:
            return (x / radii[0]) ** 2 + (y / radii[1]) ** 2
        return ((c * x + s * y) / radii[0]) ** 2 + ((c * y - s * x) / radii[1]) ** 2

    def find_box(self, mask):
        """Returns (x, y, width, height) in pixels around where a mask is above 0.3 of its peak."""
        rows, cols = np.nonzero(mask >= 0.3 * mask.max())
        return float(cols.min()), float(rows.min()), float(np.ptp(cols) + 1), float(np.ptp(rows) + 1)

    def fill(self, share):
        """Replaces a share of the lung's air, (size, size) in [0, 1], by tissue or fluid; returns what was added."""
        share = np.clip(share, 0, 1)
        added = share * self.air
        self.mu += added - share * self.vessels  # vessels vanish among what is as dense as they are
        self.air, self.vessels = self.air - added, self.vessels - share * self.vessels
        return added

    def draw_normal(self):
        """Draws the chest without the findings that only add opacity."""
        b, u, v, a = self.body, self.u, self.v, self.a
        shoulder = -0.04 + (b.shoulder + 0.04) * ramp((a - 0.27) / 0.42)
        side = a - b.flank + 0.03 * ramp((0.8 - v) / 0.5) - 0.018 * b.female * np.exp(-(((v - b.breast[1]) / 0.1) ** 2))
        gap = ramp(side / 0.014) * ramp((v - b.axilla - 0.7 * side) / 0.03)
        if b.ap:  # arms hang beside the trunk
            gap = gap * (1 - 0.9 * ramp((a - b.flank - 0.05) / 0.03))
        torso = ramp((v - shoulder) / 0.02) * (1 - gap)
        mu = torso * b.fat * (0.42 + 0.95 * dome((a / 0.54) ** 2))
        mu *= 0.66 + 0.34 * ramp((v - 0.1 - 0.15 * a) / 0.3)  # neck and shoulders are thinner

        heart_u = u - b.heart_u
        heart_v = v - b.heart_v - 0.36 * np.maximum(u, -0.4 * u)  # the axis points down and to the patient's left
        heart2 = (heart_u / self.by_side(b.heart)) ** 2 + (heart_v / self.by_side((0.15, 0.155))) ** 2
        self.heart = ramp((1 - heart2) / 0.35)
        bulge = ramp((1 - self.distance2((0.03, 0.305), (b.knob + 0.02, 0.062))) / 0.6)
        trunk = ramp((1 - self.distance2((0.035, 0.43), (0.058, 0.1))) / 0.8)
        stem = 0.95 * ramp((b.mediastinum + 0.03 * (v - 0.3) - np.abs(u - 0.004)) / 0.035)
        middle = 1 - (1 - 0.97 * self.heart) * (1 - bulge) * (1 - 0.9 * trunk) * (1 - stem)

        medial = 0.04 + 0.05 * np.exp((b.apex - v) / 0.03)  # rounds the apex off
        self.lung = ramp(self.inside / 0.014) * ramp(self.above / b.motion) * ramp((a - medial) / 0.02)
        deep = 0.62 + 0.25 * ramp(self.inside / 0.16) + 0.13 * ramp((v - b.apex - 0.12) / 0.3)
        self.air = AIR * b.depth * self.lung * deep * (1 - 0.92 * middle)
        # Some lung lies behind the dome, so the belly turns bright only gradually.
        mu += 0.28 * torso * ramp(-self.above / 0.16 + 0.3) * ramp((0.5 - a) / 0.2)
        mu += 0.22 * middle * torso * (0.5 + 0.5 * dome(heart2 * 0.9))
        mu += torso * (self.draw_bones() + b.lean * u) - self.air
        if b.female:
            x, y = a - b.breast[0], v - b.breast[1]
            mu += 0.3 * dome(((x - 0.2 * y) ** 2 + y**2) / b.breast_size**2) * ramp((y + 0.03) / 0.2)
        windpipe = ramp((0.019 - np.abs(u + 0.004)) / 0.012) * ramp((0.37 - v) / 0.04)
        forks = self.strokes([([(0.0, 0.355), (side * 0.075, 0.43)], 0.024, 1.0) for side in (-1, 1)])
        mu -= 0.2 * windpipe + 0.1 * forks
        # The stomach's gas floats on its fluid, hence the flat lower border.
        if b.bubble[2] > 0.25:
            x, y = 0.22 * b.bubble[0], float(b.dome[1]) + 0.11 * b.bubble[3] - 0.01
            bubble2 = self.distance2((x, y), (0.035 + 0.05 * b.bubble[1], 0.025 + 0.03 * b.bubble[4]))
            mu -= 0.35 * ramp((1 - bubble2) / 0.5) * ramp((y + 0.012 - v) / 0.008)
        self.mu = mu
        self.torso = torso
        self.vessels = 0.18 * b.vessel * self.draw_vessels() * np.clip(self.air / AIR * 1.6, 0, 1)
        hila = ramp((1 - ((a - HILUM[0]) / 0.045) ** 2 - ((v - HILUM[1] - 0.12 * u) / 0.06) ** 2) / 1.5)
        self.mu += self.vessels + (0.4 + 0.6 * b.vessel) * 0.13 * hila * self.lung

    def draw_bones(self):
        """Returns the attenuation of spine, ribs, collar bones, shoulder blades and humeral heads."""
        b, u, v, a = self.body, self.u, self.v, self.a
        beat = np.cos(2 * np.pi * (v - 0.02) / (0.05 + 0.012 * v))
        bones = (0.2 + (0.05 + 0.0008 * b.age) * beat) * ramp((0.036 + 0.008 * v + 0.003 * beat - a) / 0.014)
        cage = (
            ramp((self.inside + 0.022) / 0.016)
            * ramp((a - 0.03) / 0.02)
            * (0.35 + 0.65 * ramp((self.above + 0.03) / 0.1))
        )

        def ribs(drop, half):
            reach = np.clip(v - b.rib_start - drop, 0, None)
            count = (np.sqrt(b.rib_gap**2 + 0.008 * reach) - b.rib_gap) / 0.004  # gaps widen downwards
            off = np.abs(count - np.round(count))
            return ramp((half - off) / 0.1) * (0.7 + 0.3 * ramp((off - half + 0.14) / 0.08)) * (reach > 0.5 * b.rib_gap)

        bones += b.rib_mu * cage * ribs(b.rib_tilt * (0.75 * a * a + 0.12 * a), 0.22)
        front = b.rib_tilt * (0.2 + 0.5 * (b.width - a))
        bones += 0.45 * b.rib_mu * cage * ribs(front, 0.2) * ramp((a - 0.13) / 0.1)
        collar = b.collar + 0.05 - 0.45 * a + 0.75 * a * a
        bones += 0.16 * ramp((0.014 - np.abs(v - collar)) / 0.009) * ramp((a - 0.04) / 0.02) * ramp((0.41 - a) / 0.04)
        edge = (0.265 if b.ap else 0.335) + 0.12 * (v - 0.3)  # raising the arms swings the blade off the lung
        blade = ramp((a - edge) / 0.012) * ramp((edge + 0.115 - a - 0.25 * (v - 0.2)) / 0.05)
        blade *= ramp((v - 0.17) / 0.05) * ramp((0.5 - v) / 0.1)
        bones += 0.13 * blade * (1 + 0.5 * ramp((0.012 - np.abs(a - edge - 0.008)) / 0.01))
        bones += 0.28 * dome(((a - 0.445) / 0.045) ** 2 + ((v - 0.2) / 0.05) ** 2)
        bones += 0.22 * ramp((0.024 - np.abs(a - 0.46 - 0.06 * (v - 0.2))) / 0.02) * ramp((v - 0.21) / 0.04)
        calcium = ramp(0.5 - np.abs(self.distance2((0.03, 0.305), (b.knob + 0.02, 0.062)) - 0.8) / 0.3) * (u > 0.06)
        return bones + 0.003 * max(0, b.age - 55) * calcium

    def draw_vessels(self):
        """Returns the branching vessels, (size, size) in [0, 1]; they fork five times outwards from each hilum."""
        b = self.body
        rng = np.random.default_rng(b.vessel_seed)
        side = np.repeat((-1.0, 1.0), 7)
        turn = np.tile(np.linspace(-1.25, 1.5, 7), 2) + rng.normal(0, 0.15, 14)
        start = np.stack([side * HILUM[0], HILUM[1] + 0.012 * side + 0.04 * np.sin(turn)], axis=1)
        lines = []
        for level in range(6):
            steps = [start]
            for _ in range(3):  # a wandering path, so that no branch is straight
                turn = turn + rng.normal(0, 0.13, len(side))
                length = 0.026 * 0.88**level * rng.uniform(0.6, 1.4, len(side))
                steps.append(steps[-1] + length[:, None] * np.stack([side * np.cos(turn), np.sin(turn)], axis=1))
            width = b.vessel * (0.012, 0.009, 0.0065, 0.0045, 0.003, 0.003)[level]
            lines.append([(path, width, 0.95 - 0.13 * level) for path in np.stack(steps, axis=1)])
            spread = rng.uniform(0.1, 0.6, (2, len(side))) * ((-1,), (1,))
            start, side = np.repeat(steps[-1], 2, axis=0), np.repeat(side, 2)
            turn = (turn + spread).T.ravel()
        return self.strokes([line for layer in reversed(lines) for line in layer])
