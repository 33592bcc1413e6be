"""Scores heatmaps against the radiologists' boxes, beside controls that saw no image. NumPy, SciPy and pandas only.

A heatmap is an (h, w) array of finite numbers, larger for more suspicious, whose cells cover the square image evenly.
Boxes refer to a frame of 1024x1024 whatever the size of the image on disk. A finding is a pair of image and pathology
with at least one box. Predicted boxes, IoU and IoBB follow Wang et al. (CVPR 2017) as far as that describes them. It
leaves open how intensities are scaled to [0, 255]: here 0, where evidence for a finding begins, is 0, and each map's
maximum is 255, so that no evidence against the finding lies in a predicted box.

How a map is scored stands in `score_maps` and `_score`; what the controls are, in `center_prior` and `location_prior`;
how scores become rows of localization.csv, which notebook 4 writes, in `localization_table`.
"""

import itertools

import numpy as np
import pandas as pd
from scipy import ndimage

from ..study.labels import BOX_FRAME
from .auc import with_mean
from .bootstrap import bootstrap_ratio, interval_around

IOU_LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
IOBB_LEVELS = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.9)  # tenths, and those of Wang's table 4

_HEAT_LEVELS = (60, 180)  # of 255, as in Wang et al.
# Cells a side on which regions are drawn; boxes stay exact. On NIH's boxes 512 cells move the mean IoU, IoBB and energy
# by 0.002 or less and take ten times as long.
_GRID = 128
_CHUNK = 128  # maps at once: 17 MB an array
_FLAT = 1e-6  # a range that float32 rounding alone can give, relative to the largest value
_IN_PLANE = np.stack([np.zeros((3, 3)), ndimage.generate_binary_structure(2, 1), np.zeros((3, 3))])
_FIGURES = ("pointing", "energy")
_SCORES = (
    *("n_boxes", "area", "reachable", *_FIGURES, "iou", "iobb", "n_predicted"),
    *(f"iou_{level:g}" for level in IOU_LEVELS),
    *(f"iobb_{level:g}" for level in IOBB_LEVELS),
)


def boxed_findings(boxes, rows):
    """Lists the findings that have boxes: those for which `score_maps` needs a heatmap.

    Args:
        boxes: DataFrame of `load_boxes`.
        rows: DataFrame with `image` and `patient_id`; boxes of other images, such as those not downloaded, are left
            out.

    Returns:
        DataFrame, one row a finding in the order of `boxes`: `image`, `patient_id`, `pathology`.
    """
    pairs = boxes[["image", "pathology"]].drop_duplicates()
    return pairs.merge(rows[["image", "patient_id"]], on="image")[["image", "patient_id", "pathology"]]


def score_maps(maps, findings, boxes, centers=None):
    """Scores one heatmap for each finding.

    Predicted boxes enclose the connected regions (cells that share an edge) of the map's positive part, scaled to
    [0, 255], above 60 and, separately, above 180; both sets count. Between the centers of its cells a map is
    interpolated bilinearly. A constant map (up to float32 rounding) predicts no box and points nowhere; it scores what
    a random point would. A map that is nowhere positive predicts no box either.

    Args:
        maps: (n, h, w) heatmaps; they may be negative.
        findings: DataFrame of `boxed_findings`, n rows.
        boxes: DataFrame of `load_boxes`; boxes of other findings are ignored.
        centers: of maps that were interpolated from coarser ones, where the centers of those cells lie along either
            side, see `list_centers`; None for maps as they were computed.

    Returns:
        DataFrame, one row a finding: `image`, `patient_id`, `pathology`, and as float64

        - `n_boxes`; `area`, the share of the image that they cover; `n_predicted`, the number of predicted boxes;
        - `pointing`: 1 where the map's maximum lies in a box, else 0 (the pointing game, Zhang et al., ECCV 2016,
          without its margin of 15 pixels); of tied maxima, the share that does; for a constant map, `area`;
        - `reachable`: 1 where the center of some cell, as computed, lies in a box, else 0. Interpolated maps have their
          maximum at such a center (to half a pixel), so this bounds `pointing`: coarse maps miss small boxes whatever
          they show;
        - `energy`: share of the map's positive part in the boxes (Wang et al., Score-CAM, CVPR workshops 2020);
          `area` where nothing is positive, as a map that says nothing should not look worse than chance;
        - `iou`, `iobb`: intersection over union and over the predicted box's area with the best predicted box (one for
          each measure), mean over the finding's boxes; 0 without predicted boxes;
        - `iou_0.1` to `iou_0.7`, `iobb_0.1` to `iobb_0.9`: number of the finding's boxes for which that is larger.

    Raises:
        ValueError: if a map is not finite or a finding has no box; names pathology and image.
    """
    maps = np.asarray(maps, dtype="float64")
    all_corners, rows_of = _corners(boxes), boxes.groupby(["image", "pathology"]).indices
    pairs = list(zip(findings["image"], findings["pathology"], strict=True))
    for pair, heat in zip(pairs, maps, strict=True):
        if not np.isfinite(heat).all():
            raise ValueError(f"the map of {pair[1]} in {pair[0]} holds {heat[~np.isfinite(heat)][0]}")
        if pair not in rows_of:
            raise ValueError(f"there is no box of {pair[1]} in {pair[0]}; list the findings with boxed_findings")
    rows = []
    for start in range(0, len(maps), _CHUNK):
        chunk = maps[start : start + _CHUNK]
        corners = [all_corners[rows_of[pair]] for pair in pairs[start : start + _CHUNK]]
        flat = np.ptp(chunk, axis=(1, 2)) <= _FLAT * np.abs(chunk).max(axis=(1, 2))
        fine = _upsample(chunk)
        rows += map(_score, chunk, fine, flat, _predict_boxes(fine, flat), corners, itertools.repeat(centers))
    scores = pd.DataFrame(rows, columns=list(_SCORES), dtype="float64")
    return pd.concat([findings[["image", "patient_id", "pathology"]].reset_index(drop=True), scores], axis=1)


def center_prior(shape):
    """Makes the control that points to the image's center: a Gaussian, (h, w) float64 in (0, 1], of all images.

    Its standard deviation is 0.2 of the side. Of 0.1 to 0.4, this finds the most of NIH's boxes at an IoU above 0.1: a
    control should be a strong one.
    """
    # Whole numbers keep the four middle cells of an even map exactly equal.
    y, x = ((2 * np.arange(size) + 1 - size) / (2 * size) for size in shape)
    return np.exp(-(y[:, None] ** 2 + x**2) / (2 * 0.2**2))


def location_prior(findings, boxes, shape=(64, 64)):
    """Makes the control that knows where boxes of the same finding lie on other patients' images, nothing of this one.

    Args:
        findings: DataFrame of `boxed_findings`, n rows.
        boxes: DataFrame of `load_boxes`.
        shape: (h, w) of the maps.

    Returns:
        (n, h, w) float64: how many boxes of the finding's pathology cover a cell, over the other patients in
        `findings`; 0 throughout where there is no other.
    """
    known = findings.merge(boxes, on=["image", "pathology"])
    cover = np.array([_cover(box[None], shape) for box in _corners(known)]).reshape(-1, *shape)
    patient, pathology = known["patient_id"].to_numpy(), known["pathology"].to_numpy()
    pairs = zip(findings["patient_id"], findings["pathology"], strict=True)
    maps = [cover[(pathology == name) & (patient != own)].sum(axis=0) for own, name in pairs]
    return np.array(maps).reshape(-1, *shape)


def localization_table(scores, controls=None, n_resamples=1000, seed=0, level=0.95):
    """Builds the table of localization figures with patient-wise bootstrap intervals, model beside controls.

    Args:
        scores: DataFrame of `score_maps`.
        controls: dict from a control's name to its DataFrame of `score_maps` for the same findings in the same order,
            or for a part of them with some of each pathology; the model's lead over it is then that on this part.
        n_resamples: see `auc`.
        seed: see `auc`.
        level: see `auc`.

    Returns:
        DataFrame with a row a pathology that has boxes, sorted by name, and a last row `mean`; no row at all without
        boxes. `pathology`, `n_boxes`, `n_images`, `n_patients`; for `pointing` and `energy` the mean over images with
        `_low` and `_high` and, for each control, say center, `pointing_center` and the model's lead
        `pointing_minus_center` with `_low` and `_high`, whose resamples draw the same patients for both; means over
        images of `area`, `reachable`, `iou`, `iobb` and `n_predicted`; and `iou_...`, `iobb_...`, the shares of the
        boxes that are found. In the row `mean` the counts are totals and all else means over the pathologies, which
        weigh the same.

    Raises:
        ValueError: if a control was scored on other findings.
    """
    controls = dict(controls or {})
    names = sorted(set(scores["pathology"]))
    own = {}  # for each control, the model's scores of its findings
    for name, control in controls.items():
        keys = pd.MultiIndex.from_frame(control[["image", "pathology"]])
        own[name] = scores[pd.MultiIndex.from_frame(scores[["image", "pathology"]]).isin(keys)]
        if not np.array_equal(control[["image", "pathology"]].to_numpy(), own[name][["image", "pathology"]].to_numpy()):
            raise ValueError(f"control {name!r} has other findings, or another order of them, than the scores")
        if lacking := [finding for finding in names if finding not in set(control["pathology"])]:
            raise ValueError(f"control {name!r} has no {lacking[0]}")

    def mark_classes(table):
        return (table["pathology"].to_numpy(object)[:, None] == np.array(names, object)).astype("float64")

    of_class = mark_classes(scores)

    def estimate(table, figure, weights=1.0):
        of_class = mark_classes(table)
        weights = np.broadcast_to(weights, len(table))
        return with_mean(table[figure].to_numpy() @ of_class / (weights @ of_class))

    def resample(table, figure):
        of_class = mark_classes(table)
        parts = of_class * table[figure].to_numpy()[:, None], of_class
        return with_mean(bootstrap_ratio(*parts, table["patient_id"], n_resamples, seed))

    n_patients = [scores["patient_id"][scores["pathology"] == name].nunique() for name in names]
    counts = {"n_boxes": scores["n_boxes"] @ of_class, "n_images": of_class.sum(axis=0), "n_patients": n_patients}
    columns = {"pathology": [*names, "mean"]}
    columns |= {name: np.append(count, np.sum(count)).astype("int64") for name, count in counts.items()}
    for figure in _FIGURES:
        value = estimate(scores, figure)
        low, high = interval_around(value, resample(scores, figure), level, 0, 1)
        columns |= {figure: value, f"{figure}_low": low, f"{figure}_high": high}
        for name, control in controls.items():
            other, lead = estimate(control, figure), f"{figure}_minus_{name}"
            difference = estimate(own[name], figure) - other
            samples = resample(own[name], figure) - resample(control, figure)
            low, high = interval_around(difference, samples, level, -1, 1)
            columns |= {f"{figure}_{name}": other, lead: difference, f"{lead}_low": low, f"{lead}_high": high}
    for name in (name for name in _SCORES if name not in columns):
        columns[name] = estimate(scores, name, scores["n_boxes"] if name.startswith(("iou_", "iobb_")) else 1.0)
    return pd.DataFrame(columns)[: len(names) + 1 if names else 0]


def _corners(boxes):
    """Returns (n, 4) left, top, right and bottom as shares of the image's side."""
    low = boxes[["x", "y"]].to_numpy("float64")
    return np.clip(np.hstack([low, low + boxes[["width", "height"]].to_numpy("float64")]) / BOX_FRAME, 0, 1)


def _cover(corners, shape):
    """Computes which share of each cell of an (h, w) grid one of the boxes covers; of several, the largest."""
    (x, y), (h, w) = (corners[:, [axis, axis + 2]] for axis in (0, 1)), shape
    parts = []
    for ends, size in ((y, h), (x, w)):
        low, high, cell = ends[:, :1] * size, ends[:, 1:] * size, np.arange(size)
        parts.append(np.clip(np.minimum(high, cell + 1) - np.maximum(low, cell), 0, 1))
    return (parts[0][:, :, None] * parts[1][:, None, :]).max(axis=0)


def _contain(corners, shape):
    """Finds the cells of an (h, w) grid whose center lies in one of the boxes: (h, w) bool."""
    y, x = ((np.arange(size) + 0.5) / size for size in shape)
    left, top, right, bottom = corners.T[:, :, None]
    return (((top <= y) & (y < bottom))[:, :, None] & ((left <= x) & (x < right))[:, None, :]).any(axis=0)


def _upsample(maps):
    """Interpolates (n, h, w) maps bilinearly between the centers of their cells, constant beyond the outermost."""
    factors = [max(_GRID, size) / size for size in maps.shape[1:]]
    return ndimage.zoom(maps, (1, *factors), order=1, mode="nearest", grid_mode=True)


def _predict_boxes(fine, flat):
    """Draws boxes around the hot regions of (n, h, w) maps: a list of n arrays (boxes, 4) of corners."""
    high = fine.max(axis=(1, 2))
    scaled = 255 * fine / np.where(flat | (high <= 0), np.inf, high)[:, None, None]
    found = [[] for _ in fine]
    for level in _HEAT_LEVELS:
        # One call for all maps: the structure does not join cells of different maps.
        regions, _ = ndimage.label(scaled > level, _IN_PLANE)
        for which, rows, cells in ndimage.find_objects(regions):
            found[which.start].append((cells.start, rows.start, cells.stop, rows.stop))
    h, w = fine.shape[1:]
    return [np.array(boxes, dtype="float64").reshape(-1, 4) / (w, h, w, h) for boxes in found]


def _reach(corners, shape, centers):
    """Finds whether a center lies in one of the boxes, to half a pixel of the (h, w) map."""
    inside = []
    for axis, size in ((1, shape[0]), (0, shape[1])):
        low, high = corners[:, axis, None] - 0.5 / size, corners[:, axis + 2, None] + 0.5 / size
        inside.append(((low <= centers) & (centers < high)).any(axis=1))
    return (inside[0] & inside[1]).any()


def _score(heat, fine, flat, predicted, corners, centers):
    """Computes one map's figures, in the order of `_SCORES`."""
    cover, hit = _cover(corners, fine.shape), _contain(corners, heat.shape)
    reachable = hit.any() if centers is None else _reach(corners, heat.shape, centers)
    area, positive = cover.mean(), np.maximum(fine, 0)
    # The maximum of a bilinear interpolation lies at a center of the map's own cells: no search on the fine grid.
    pointing = area if flat else hit[heat == heat.max()].mean()
    energy = (positive * cover).sum() / positive.sum() if positive.any() else area

    iou, iobb = _overlap(predicted, corners)
    best_iou, best_iobb = iou.max(axis=0, initial=0), iobb.max(axis=0, initial=0)
    return (
        *(len(corners), area, reachable, pointing, energy, best_iou.mean(), best_iobb.mean(), len(predicted)),
        *((best_iou > level).sum() for level in IOU_LEVELS),
        *((best_iobb > level).sum() for level in IOBB_LEVELS),
    )


def _overlap(predicted, corners):
    """Computes (predicted, boxes) intersection over union and over the predicted box's area."""
    low = np.maximum(predicted[:, None, :2], corners[:, :2])
    high = np.minimum(predicted[:, None, 2:], corners[:, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=-1)
    ours, theirs = ((boxes[:, 2:] - boxes[:, :2]).prod(axis=-1) for boxes in (predicted, corners))
    return shared / (ours[:, None] + theirs - shared), shared / ours[:, None]
