"""Tests of evaluation.localization against pixel counting, loops and known answers."""

import warnings

import numpy as np
import pandas as pd
import pytest
from drawn_scores import resample_rows

from helpers.evaluation.localization import (
    BOX_FRAME,
    IOBB_LEVELS,
    IOU_LEVELS,
    boxed_findings,
    center_prior,
    localization_table,
    location_prior,
    score_maps,
)

COLUMNS = ["image", "pathology", "x", "y", "width", "height"]


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def make_boxes(*rows):
    """Boxes given as (image, pathology, x, y, width, height) in pixels of the frame."""
    return pd.DataFrame(rows, columns=COLUMNS).astype(dict.fromkeys(COLUMNS[2:], "float64"))


def make_images(boxes):
    """Each image is a patient of its own."""
    images = sorted(set(boxes["image"]))
    return pd.DataFrame({"image": images, "patient_id": np.arange(len(images)) + 1})


def score(heat, *corners, pathology="Mass"):
    """Scores one map against boxes given as (x, y, width, height) in pixels of the frame."""
    boxes = make_boxes(*(("a.png", pathology, *box) for box in corners))
    return score_maps(np.asarray(heat)[None], boxed_findings(boxes, make_images(boxes)), boxes).iloc[0]


def blob(x, y, size=32, spread=60.0):
    """A map with one bump at (x, y) of the frame."""
    at = (np.arange(size) + 0.5) * BOX_FRAME / size
    return np.exp(-((at[:, None] - y) ** 2 + (at - x) ** 2) / (2 * spread**2))


def draw_study(n_images=14, n_patients=5, seed=0):
    """Random boxes of three pathologies, one to three a finding, and their images: several of a patient."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n_images):
        for name in ("Mass", "Nodule", "Atelectasis"):
            for _ in range(rng.integers(0, 4)):
                low = rng.uniform(0, 700, 2)
                rows.append((f"{i:02d}.png", name, *low, *rng.uniform(40, 320, 2)))
    boxes = make_boxes(*rows)
    images = make_images(boxes)
    return boxes, images.assign(patient_id=rng.integers(0, n_patients, len(images)) * 10 + 3)


def test_a_blob_in_the_box_and_one_beside_it():
    box = (600, 200, 200, 300)
    inside, outside = score(blob(700, 350, spread=90), box), score(blob(250, 350, spread=90), box)
    assert (inside["pointing"], outside["pointing"]) == (1, 0)
    assert inside["energy"] > 0.6
    assert outside["energy"] < 0.01
    assert inside["iou"] > 0.1 > outside["iou"]
    assert (inside["iobb_0.9"], outside["iobb_0.1"]) == (1, 0)  # the box at level 180 fits in
    assert inside["n_predicted"] == outside["n_predicted"] == 2
    assert inside["area"] == pytest.approx(200 * 300 / 1024**2)
    # x runs to the right and y downwards.
    assert score(blob(350, 700), box)["pointing"] == 0


@pytest.mark.parametrize("row", [0, 3, 7])
@pytest.mark.parametrize("column", [0, 4, 7])
def test_a_hot_cell_points_to_its_center(row, column):
    heat = np.zeros((8, 8))
    heat[row, column] = 1
    x, y = 128 * column + 64, 128 * row + 64  # Half a cell of the grid of 128 is 4 pixels of the frame.
    assert score(heat, (x - 4, y - 4, 8, 8))["pointing"] == 1
    for dx, dy in ((8, 0), (-8, 0), (0, 8), (0, -8)):
        assert score(heat, (x - 4 + dx, y - 4 + dy, 8, 8))["pointing"] == 0
    # What is drawn is aligned as well: bilinear flanks cross 60 and 180 of 255 at 195/255 and 75/255 of a cell, and at
    # the border the outermost half cell is as hot as its center.
    assert score(heat, (0, 0, 1024, 1024))["n_predicted"] == 2
    for level in (60, 180):
        reach = 128 * (1 - level / 255)
        ends = [(c - reach if c > 64 else 0, c + reach if c < 960 else 1024) for c in (x, y)]
        (left, right), (top, bottom) = ends
        found = score(heat, (left, top, right - left, bottom - top))
        assert found["iou"] > 0.85  # Exact but for cells of 8 pixels.


def test_coordinates_refer_to_the_frame_whatever_the_size_of_the_map():
    box = (600, 200, 200, 300)
    results = [score(blob(700, 350, size, spread=150), box) for size in (16, 50, 128, 256)]
    for result in results:
        assert result["pointing"] == 1
        assert result["area"] == pytest.approx(200 * 300 / 1024**2)
        assert result["energy"] == pytest.approx(results[-1]["energy"], abs=0.03)
        assert result["iou"] == pytest.approx(results[-1]["iou"], abs=0.03)
    # A map finer than the grid loses nothing.
    fine = np.zeros((512, 512))
    fine[101, 300] = 1
    assert score(fine, (600, 202, 2, 2))[["pointing", "energy", "iou"]].tolist() == [1, 1, 1]
    wide = np.zeros((4, 16))
    wide[1, 12] = 1
    assert score(wide, (64 * 12, 256, 64, 256))["pointing"] == 1
    assert score(wide, (256, 64 * 12, 256, 64))["pointing"] == 0


def test_iou_and_iobb_by_counting_pixels():
    rng = np.random.default_rng(3)
    pixels = np.zeros((128, 128))
    for _ in range(20):
        # A map of rectangles on the grid, apart from each other: every one is predicted at both levels.
        quarters = [(x, y) for x in (0, 64) for y in (0, 64)]
        drawn, heat = [], pixels.copy()
        for x, y in quarters[: rng.integers(1, 5)]:
            left, top = (int(v) for v in rng.integers(2, 30, 2))
            width, height = (int(v) for v in rng.integers(3, 30, 2))
            mask = pixels.astype(bool)
            mask[y + top : y + top + height, x + left : x + left + width] = True
            drawn.append(mask)
            heat[mask] = 1
        truths, corners = [], []
        for _ in range(rng.integers(1, 4)):
            left, top, width, height = (int(v) for v in rng.integers(1, 64, 4))
            mask = pixels.astype(bool)
            mask[top : top + height, left : left + width] = True
            truths.append(mask)
            corners.append((8 * left, 8 * top, 8 * width, 8 * height))
        result = score(heat, *corners)
        shared = np.array([[(p & t).sum() for t in truths] for p in drawn])
        iou = shared / np.array([[(p | t).sum() for t in truths] for p in drawn])
        iobb = shared / np.array([[p.sum()] for p in drawn])
        assert result["n_boxes"] == len(truths)
        assert result["n_predicted"] == 2 * len(drawn)
        assert result["iou"] == pytest.approx(iou.max(axis=0).mean())
        assert result["iobb"] == pytest.approx(iobb.max(axis=0).mean())
        for level in IOU_LEVELS:
            assert result[f"iou_{level}"] == (iou.max(axis=0) > level).sum()
        for level in IOBB_LEVELS:
            assert result[f"iobb_{level}"] == (iobb.max(axis=0) > level).sum()
        union = np.any(truths, axis=0)
        assert result["area"] == pytest.approx(union.mean())
        assert result["energy"] == pytest.approx(heat[union].sum() / heat.sum())
        assert result["pointing"] == pytest.approx((heat * union).sum() / heat.sum())  # Tied maxima share the point.


def test_predicted_boxes_follow_both_levels():
    heat = np.zeros((128, 128))
    heat[16:80, 16:80] = 100  # Above 60 of 255.
    heat[32:48, 32:48] = 255  # Above 180.
    heat[100:110, 100:110] = 50  # Above neither.
    against = heat.copy()
    against[80:96, 16:80] = -900  # Evidence against the finding changes nothing, and is in no box.
    for scaled in (heat, 0.001 * heat, against):
        outer, inner = score(scaled, (128, 128, 512, 512)), score(scaled, (256, 256, 128, 128))
        assert outer["n_predicted"] == inner["n_predicted"] == 2
        assert outer["iou"] == inner["iou"] == 1


def test_several_boxes_of_one_finding():
    boxes = [(100, 100, 200, 200), (700, 600, 200, 300)]
    result = score(blob(800, 750), *boxes)
    assert (result["n_boxes"], result["pointing"]) == (2, 1)
    assert result["area"] == pytest.approx((200 * 200 + 200 * 300) / 1024**2)
    assert (result["iobb_0.25"], result["iou_0.1"]) == (1, 1)  # One of two.
    alone = score(blob(800, 750), boxes[1])
    assert result["iou"] == pytest.approx(alone["iou"] / 2)
    assert result["energy"] == pytest.approx(alone["energy"], abs=1e-4)
    # A box that is listed twice covers no more of the image.
    twice = score(blob(800, 750), boxes[1], boxes[1])
    assert (twice["energy"], twice["area"], twice["n_boxes"]) == (alone["energy"], alone["area"], 2)


def test_a_perfect_map_gives_all_hits():
    heat = np.zeros((128, 128))
    heat[10:30, 40:90] = 1
    heat[100:110, 5:20] = 1
    result = score(heat, (320, 80, 400, 160), (40, 800, 120, 80))
    assert (result[["pointing", "reachable", "energy", "iou", "iobb"]] == 1).all()
    assert (result[[f"iou_{level}" for level in IOU_LEVELS]] == 2).all()
    assert (result[[f"iobb_{level}" for level in IOBB_LEVELS]] == 2).all()


@pytest.mark.parametrize("value", [0, 3, -3, 0.1])
def test_a_constant_map_scores_what_a_random_point_would(value):
    box = (100, 100, 300, 251)
    rng = np.random.default_rng(0)
    noise = 1e-7 * rng.uniform(-1, 1, (7, 7)) * value  # float32 rounding
    for heat in (np.full((7, 7), value), np.full((7, 7), np.float32(value)), value + noise):
        result = score(heat, box)
        area = 300 * 251 / 1024**2
        assert result[["area", "pointing", "energy"]].tolist() == pytest.approx([area] * 3)
        assert (result[["n_predicted", "iou", "iobb", "iou_0.1", "iobb_0.1"]] == 0).all()


def test_negative_maps():
    box = (600, 200, 200, 300)
    positive, negative = score(blob(700, 350), box), score(blob(700, 350) - 5, box)
    assert negative["pointing"] == 1
    assert positive["iou"] > 0 == negative["iou"] == negative["n_predicted"]  # Nothing is positive.
    assert negative["energy"] == negative["area"]
    # Only the positive part counts.
    mixed = np.where(np.arange(128) < 64, 1.0, -1.0) * np.ones((128, 1))
    assert score(mixed, (0, 0, 256, 1024))["energy"] == pytest.approx(0.5)


def test_energy_of_a_uniform_map_is_the_area_share():
    for box in [(13.7, 20.2, 311.1, 97.3), (900, 900, 124, 124), (0, 0, 1024, 1024)]:
        heat = np.full((7, 7), 2.0)
        heat[3, 3] += 1e-4  # Not constant, so that the general way is taken.
        assert score(heat, box)["energy"] == pytest.approx(box[2] * box[3] / 1024**2, rel=1e-3)


def test_reachable_bounds_pointing():
    between = (1024 / 7 - 30, 1024 / 7 - 30, 60, 60)  # around a corner of cells of 146 pixels
    boxes = make_boxes(*((f"{number}.png", "Mass", *between) for number in range(49)))
    maps = np.eye(49).reshape(49, 7, 7)  # one hot cell each
    scores = score_maps(maps, boxed_findings(boxes, make_images(boxes)), boxes)
    assert not scores[["pointing", "reachable"]].to_numpy().any()
    assert score(maps[0], (40, 40, 60, 60))["reachable"] == 1
    # Drawn finer the cells are as few: what can be reached depends on where their centers were.
    fine = np.repeat(np.repeat(maps[:1], 8, axis=1), 8, axis=2)
    findings, middles = boxed_findings(boxes[:1], make_images(boxes[:1])), (np.arange(7) + 0.5) / 7
    assert score_maps(fine, findings, boxes[:1])["reachable"][0] == 1
    assert score_maps(fine, findings, boxes[:1], middles)["reachable"][0] == 0
    assert score_maps(fine, findings, boxes[:1], [0.05, 1 / 7])["reachable"][0] == 1


def test_center_prior():
    for shape in [(7, 7), (8, 8), (16, 10)]:
        prior = center_prior(shape)
        np.testing.assert_array_equal(prior, prior[::-1])
        np.testing.assert_array_equal(prior, prior[:, ::-1])
        assert prior.shape == shape
        assert 0 < prior.min() < prior.max() <= 1
    at = (np.arange(9) + 0.5) / 9 - 0.5
    np.testing.assert_allclose(center_prior((9, 9))[4], np.exp(-(at**2) / (2 * 0.2**2)))
    centered, aside = (462, 462, 100, 100), (562, 562, 100, 100)
    for size in (7, 8):
        expected = 1 if size == 7 else 0
        assert score(center_prior((size, size)), centered)["pointing"] == expected
        assert score(center_prior((size, size)), aside)["pointing"] == (0 if size == 7 else 0.25)


def test_location_prior_counts_the_boxes_of_other_patients():
    boxes, images = draw_study()
    findings = boxed_findings(boxes, images)
    maps = location_prior(findings, boxes, (32, 32))
    assert maps.shape == (len(findings), 32, 32)
    patient_of = dict(zip(images["image"], images["patient_id"], strict=True))
    for (_, patient, pathology), heat in zip(findings.itertuples(index=False), maps, strict=True):
        fine = np.zeros((1024, 1024))
        for box in boxes.itertuples():
            if box.pathology == pathology and patient_of[box.image] != patient:
                left, top = round(box.x), round(box.y)
                fine[top : round(box.y + box.height), left : round(box.x + box.width)] += 1
        np.testing.assert_allclose(heat, fine.reshape(32, 32, 32, 32).mean(axis=(1, 3)), atol=0.25)
        assert heat.mean() == pytest.approx(fine.mean(), rel=0.01)
    # A patient without company learns nothing, and scores as chance.
    alone = make_boxes(("a.png", "Mass", 10, 10, 100, 100))
    findings = boxed_findings(alone, make_images(alone))
    prior = location_prior(findings, alone)
    assert not prior.any()
    assert score_maps(prior, findings, alone)["pointing"][0] == pytest.approx(100 * 100 / 1024**2)


def test_boxed_findings():
    boxes = make_boxes(
        ("b.png", "Mass", 0, 0, 9, 9),
        ("b.png", "Mass", 20, 0, 9, 9),
        ("c.png", "Mass", 0, 0, 9, 9),
        ("a.png", "Nodule", 0, 0, 9, 9),
        ("b.png", "Nodule", 0, 0, 9, 9),
    )
    images = pd.DataFrame({"image": ["a.png", "b.png", "d.png"], "patient_id": [7, 8, 9], "age": [1, 2, 3]})
    findings = boxed_findings(boxes, images)
    assert findings.to_numpy().tolist() == [["b.png", 8, "Mass"], ["a.png", 7, "Nodule"], ["b.png", 8, "Nodule"]]
    maps = np.stack([blob(5, 5), blob(5, 5), blob(500, 5)])
    scores = score_maps(maps, findings.set_axis([4, 1, 2]), boxes)
    assert scores["n_boxes"].tolist() == [2, 1, 1]
    assert scores[["image", "patient_id", "pathology"]].equals(findings)


def test_malformed_maps_are_refused():
    boxes = make_boxes(("a.png", "Mass", 0, 0, 9, 9), ("b.png", "Nodule", 0, 0, 9, 9))
    findings = boxed_findings(boxes, make_images(boxes))
    maps = np.zeros((2, 7, 7))
    with pytest.raises(ValueError, match=r"no box of Nodule in b\.png"):
        score_maps(maps, findings, boxes[:1])
    for value in (np.nan, np.inf):
        maps[1, 2, 3] = value
        with pytest.raises(ValueError, match=rf"map of Nodule in b\.png holds {value}"):
            score_maps(maps, findings, boxes)


def scored_study(seed=0):
    boxes, images = draw_study(seed=seed)
    findings = boxed_findings(boxes, images)
    rng = np.random.default_rng(seed)
    maps = location_prior(findings, boxes, (14, 14)) + rng.normal(size=(len(findings), 14, 14))
    random = score_maps(rng.normal(size=(len(findings), 14, 14)), findings, boxes)
    center = score_maps(np.broadcast_to(center_prior((14, 14)), maps.shape), findings, boxes)
    return boxes, score_maps(maps, findings, boxes), {"random": random, "center": center}


def test_table_values_and_intervals_by_a_plain_loop():
    boxes, scores, controls = scored_study()
    table = localization_table(scores, controls, n_resamples=60, seed=4, level=0.9)
    names = ["Atelectasis", "Mass", "Nodule"]  # sorted by name
    assert table["pathology"].tolist() == [*names, "mean"]
    table = table.set_index("pathology")
    for name in names:
        of_name = scores[scores["pathology"] == name]
        row = table.loc[name]
        assert row["n_boxes"] == (boxes["pathology"] == name).sum()
        assert (row["n_images"], row["n_patients"]) == (len(of_name), of_name["patient_id"].nunique())
        for column in ("pointing", "energy", "area", "iou", "iobb", "reachable", "n_predicted"):
            assert row[column] == pytest.approx(of_name[column].mean())
        for column in ("iou_0.1", "iou_0.7", "iobb_0.1", "iobb_0.75"):
            assert row[column] == pytest.approx(of_name[column].sum() / row["n_boxes"])
        other = controls["random"][scores["pathology"] == name]["energy"].mean()
        assert row["energy_random"] == pytest.approx(other)
        assert row["energy_minus_random"] == pytest.approx(row["energy"] - other)
    means = table.drop(columns=["n_boxes", "n_images", "n_patients"])
    shares = [name for name in means if not name.endswith(("low", "high"))]
    np.testing.assert_allclose(means.loc["mean", shares], means.loc[names, shares].mean())
    assert table.loc["mean", "n_boxes"] == len(boxes)
    assert {str(table[name].dtype) for name in ("n_boxes", "n_images", "n_patients")} == {"int64"}

    resamples = resample_rows(scores["patient_id"].to_numpy(), 60, 4)
    inside = np.array([scores["pathology"].eq(name) for name in names])
    for column in ("pointing", "energy", "pointing_minus_center", "energy_minus_random"):
        figure, _, name = column.partition("_minus_")
        values = (scores[figure] - (controls[name][figure] if name else 0)).to_numpy()
        samples = []
        for rows in resamples:
            held = [values[rows][mask[rows]] for mask in inside]
            means = [part.mean() if len(part) else np.nan for part in held]
            samples.append([*means, np.nanmean(means)])
        low, high = np.nanquantile(samples, [0.05, 0.95], axis=0)
        np.testing.assert_allclose(table[f"{column}_low"], np.minimum(low, table[column]), atol=1e-8)
        np.testing.assert_allclose(table[f"{column}_high"], np.maximum(high, table[column]), atol=1e-8)
        assert (table[f"{column}_low"] < table[f"{column}_high"]).all()


def test_table_pairs_model_and_control():
    _, scores, controls = scored_study(1)
    same = localization_table(scores, {"itself": scores}, n_resamples=50)
    np.testing.assert_allclose(same[["energy_minus_itself_low", "energy_minus_itself_high"]], 0, atol=1e-8)
    assert (same["energy_high"] - same["energy_low"]).min() > 0.01
    plain = localization_table(scores, n_resamples=50)
    pd.testing.assert_frame_equal(plain, same[plain.columns])
    assert not [name for name in plain if "minus" in name]
    columns = [name for name in localization_table(scores, controls, n_resamples=2) if "minus" in name]
    leads = [f"{figure}_minus_{name}" for figure in ("pointing", "energy") for name in ("random", "center")]
    assert columns == [f"{lead}{end}" for lead in leads for end in ("", "_low", "_high")]
    with pytest.raises(ValueError, match="'random' has other findings"):
        localization_table(scores, {"random": controls["random"][::-1]})


def test_a_control_may_be_scored_on_a_part_of_the_findings():
    """Its lead is that on this part, with the same patients drawn for both; the model's own figures stay whole."""
    _, scores, controls = scored_study(1)
    part = np.sort(np.concatenate([rows[::2] for rows in scores.groupby("pathology").indices.values()]))
    table = localization_table(scores, {"random": controls["random"].iloc[part]}, n_resamples=50)
    whole = localization_table(scores, n_resamples=50)
    pd.testing.assert_frame_equal(table[whole.columns], whole)
    own = localization_table(scores.iloc[part], {"random": controls["random"].iloc[part]}, n_resamples=50)
    columns = [name for name in table if "random" in name]
    pd.testing.assert_frame_equal(table[columns], own[columns])
    with pytest.raises(ValueError, match="'random' has no Mass"):
        localization_table(scores, {"random": controls["random"][scores["pathology"] != "Mass"]})
    with pytest.raises(ValueError, match="'random' has other findings"):
        localization_table(scores.iloc[part], controls)


def test_a_study_without_boxes_gives_empty_tables():
    boxes, full, controls = scored_study(2)
    none = boxes.iloc[:0]
    findings = boxed_findings(none, pd.DataFrame({"image": ["a.png"], "patient_id": [1]}))
    assert list(findings.columns) == ["image", "patient_id", "pathology"]
    assert location_prior(findings, none, (7, 9)).shape == (0, 7, 9)
    for maps in (np.zeros((0, 7, 7)), []):
        scores = score_maps(maps, findings, none)
        assert len(scores) == 0
        assert list(scores.columns) == list(full.columns)
        table = localization_table(scores, dict.fromkeys(controls, scores), n_resamples=10)
        assert len(table) == 0
        assert list(table.columns) == list(localization_table(full, controls, n_resamples=2).columns)


def test_phantom_boxes_are_found_by_their_own_masks(phantom_dir):
    from helpers.study.labels import load_boxes, load_metadata

    boxes, images = load_boxes(phantom_dir), load_metadata(phantom_dir)
    findings = boxed_findings(boxes, images)
    assert 0 < len(findings) <= len(boxes)
    centers = (np.arange(128) + 0.5) * 8
    maps = np.zeros((len(findings), 128, 128))
    for heat, (image, _, pathology) in zip(maps, findings.itertuples(index=False), strict=True):
        for box in boxes[(boxes["image"] == image) & (boxes["pathology"] == pathology)].itertuples():
            rows, columns = (
                abs(centers - c) < s / 2
                for c, s in ((box.y + box.height / 2, box.height), (box.x + box.width / 2, box.width))
            )
            heat[np.ix_(rows, columns)] = 1
    last = localization_table(score_maps(maps, findings, boxes), n_resamples=10).iloc[-1]
    # Overlapping boxes of one finding merge to one region, so that not every predicted box is a phantom's.
    assert last["pointing"] == 1
    assert last[["energy", "iobb_0.5"]].min() > 0.9


def test_real_boxes(shared_data):
    from helpers.study.labels import load_boxes

    folder = shared_data / "nih_metadata"
    if not (folder / "BBox_List_2017.csv").is_file():
        pytest.skip(f"needs NIH's box list in {folder}")
    boxes = load_boxes(folder)
    listed = pd.read_csv(folder / "Data_Entry_2017_v2020.csv", usecols=["Image Index", "Patient ID"])
    images = listed.set_axis(["image", "patient_id"], axis=1)
    findings = boxed_findings(boxes, images)
    assert (len(boxes), len(findings), findings["image"].nunique()) == (984, 984, 880)
    few = findings.groupby("pathology").head(12).reset_index(drop=True)
    maps = np.broadcast_to(center_prior((7, 7)), (len(few), 7, 7))
    scores, location = (score_maps(x, few, boxes) for x in (maps, location_prior(few, boxes)))
    table = localization_table(location, {"center": scores}, n_resamples=50).set_index("pathology")
    assert table.index.tolist()[-1] == "mean"
    assert table["n_boxes"].tolist() == [12] * 8 + [96]
    # The heart is where it always is; a nodule is not.
    assert table.loc["Cardiomegaly", "pointing"] > 0.8 > 0.3 > table.loc["Nodule", "pointing"]
    assert table.loc["mean", "energy_minus_center_low"] > 0
