"""Packed studies: what is in them, and that neither interruption nor damage goes unnoticed or costs finished work."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from folder_state import read_bytes, read_stamps
from made_images import encode, flip_bit, make_png

from helpers.packing import decode_image, image_stream, load_packed_study, pack_study
from helpers.pipeline import make_eval_dataset
from helpers.study import PATHOLOGIES
from helpers.study.splits import hash_split

SIDE = 16
METADATA = ["image", "patient_id", "follow_up", "age", "sex", "view"]
REMEDY = "01_prepare_data.ipynb"


@pytest.fixture(scope="module")
def noise(make_images, tmp_path_factory):
    """Rows and paths of 32 images at 20 pixels: 17 train, 8 val, 7 test; never written to by a test."""
    return make_images(tmp_path_factory.mktemp("records") / "images", train=17, val=8, test=7, side=20)


def pack(noise, folder, **changes):
    rows, paths = noise
    return pack_study(rows, paths, folder, **{"split_name": "official", "side": SIDE, "shard_images": 4} | changes)


@pytest.fixture(scope="module")
def study(noise, tmp_path_factory):
    """`noise` packed without any trouble: 5 train shards, 2 val, 2 test; never written to by a test."""
    return pack(noise, tmp_path_factory.mktemp("records") / "packed")


@pytest.fixture
def copy(study, tmp_path):
    """A copy of the packed study, to be damaged."""
    return shutil.copytree(study.folder, tmp_path / "copy")


def read_records(files):
    return [record.numpy() for record in tf.data.TFRecordDataset([str(file) for file in files])]


def read_examples(files):
    return [tf.train.Example.FromString(record).features.feature for record in read_records(files)]


class Bar:
    """A progress bar that counts, and that interrupts at a given image."""

    def __init__(self, stop_at=None):
        self.stop_at, self.count, self.total, self.closed = stop_at, 0, None, False

    def __call__(self, total, unit):
        self.total = total
        return self

    def update(self, n):
        self.count += n
        if self.stop_at is not None and self.count >= self.stop_at:
            raise KeyboardInterrupt

    def close(self):
        self.closed = True


# What is packed


def test_records_hold_the_pixels_and_the_row_of_their_image_in_the_order_of_the_index(noise, study):
    rows, paths = noise[0].set_index("image"), noise[1]
    n_without_age = 0
    for subset in ("train", "val", "test"):
        index, labels = study.rows(subset), study.labels(subset)
        assert sorted(index["image"]) == sorted(rows.index[rows["split"] == subset])
        examples = read_examples(study.files(subset))
        assert len(examples) == len(index) > 0
        for features, name, label in zip(examples, index["image"], labels, strict=True):
            assert set(features) == {"film", "labels", "image", "patient_id", "follow_up", "age", "sex", "view"}
            assert features["image"].bytes_list.value[0].decode() == name
            image = np.frombuffer(features["film"].bytes_list.value[0], np.uint8).reshape(SIDE, SIDE, 1)
            np.testing.assert_array_equal(image, decode_image(tf.constant(paths[name].read_bytes()), SIDE))
            assert features["labels"].int64_list.value == label.tolist()
            row = rows.loc[name]
            assert row["split"] == subset
            assert features["patient_id"].int64_list.value == [row["patient_id"]]
            assert features["follow_up"].int64_list.value == [row["follow_up"]]
            assert features["sex"].bytes_list.value == [row["sex"].encode()]
            assert features["view"].bytes_list.value == [row["view"].encode()]
            assert features["labels"].int64_list.value == [row[name] for name in PATHOLOGIES]
            (age,) = features["age"].float_list.value
            n_without_age += math.isnan(age)
            assert math.isnan(age) == math.isnan(row["age"])
            assert math.isnan(age) or age == np.float32(row["age"])
    assert n_without_age == 6


def test_the_index_holds_the_rows_exactly_and_survives_loading(noise, study):
    expected = noise[0].rename(columns={"split": "subset"})
    index = study.index.sort_values("image", ignore_index=True)[expected.columns]
    pd.testing.assert_frame_equal(index, expected, check_dtype=False, check_exact=True)
    pd.testing.assert_frame_equal(load_packed_study(study.folder).index, study.index, check_exact=True)
    assert list(study.index["subset"].unique()) == ["train", "val", "test"]


def test_the_manifest_counts_and_hashes_what_is_there(noise, study):
    rows = noise[0]
    manifest = json.loads((study.folder / "manifest.json").read_text())
    assert manifest["counts"] == {"train": 17, "val": 8, "test": 7}
    assert manifest["classes"] == list(PATHOLOGIES)
    assert manifest["split_sha256"] == study.split_sha256 == hash_split(rows["image"], rows["split"])
    assert [len(study.shards[subset]) for subset in ("train", "val", "test")] == [5, 2, 2]
    for shard in manifest["shards"]:
        content = (study.folder / shard["file"]).read_bytes()
        assert shard["bytes"] == len(content)
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()
        assert shard["count"] == len(read_records([study.folder / shard["file"]])) <= 4
    named = {shard["file"] for shard in manifest["shards"]}
    assert {path.name for path in study.folder.iterdir()} == named | {"manifest.json", "index.csv"}
    assert study.excluded == []


def test_packed_bytes_and_keys_are_those_of_earlier_studies(study):
    """Shards and manifest that were packed before go on being read, and are not packed anew."""
    for subset, sha256 in {"train": "04f9c9d2accb6062", "val": "88ba74635bd834b3", "test": "c92908b6f130c7f6"}.items():
        content = b"".join(Path(file).read_bytes() for file in study.files(subset))
        assert hashlib.sha256(content).hexdigest().startswith(sha256)
    manifest = json.loads((study.folder / "manifest.json").read_text())
    keys = (
        "about asked_sha256 classes counts encoding format has_patients index_sha256 name seed shard_films shards side"
    )
    assert sorted(manifest) == [*keys.split(), "split", "split_sha256", "study_files"]
    assert sorted(manifest["shards"][0]) == ["bytes", "count", "excluded", "file", "key", "sha256", "subset"]
    facts = ["width", "height", "mode", "n_bytes"]
    assert list(study.index) == ["subset", *METADATA, *PATHOLOGIES, *facts]


@pytest.mark.slow
def test_images_are_dealt_to_shards_at_random_and_the_seed_decides(noise, study, tmp_path):
    assert study.rows("train")["image"].tolist() != sorted(study.rows("train")["image"])
    other = pack(noise, tmp_path / "other", seed=1)
    assert other.rows("train")["image"].tolist() != study.rows("train")["image"].tolist()
    assert set(other.rows("train")["image"]) == set(study.rows("train")["image"])


@pytest.mark.slow
def test_bytes_depend_neither_on_threads_nor_on_the_order_of_the_rows(noise, study, tmp_path, monkeypatch):
    rows, paths = noise
    shuffled = rows.sample(frac=1, random_state=3)
    for name, n_threads, some_rows in (("one", 1, rows), ("five", 5, shuffled)):
        monkeypatch.setattr(image_stream, "count_cores", lambda n=n_threads: n)
        pack((some_rows, paths), tmp_path / name)
        assert read_bytes(tmp_path / name) == read_bytes(study.folder)


def test_packing_again_writes_no_shard_and_changes_no_byte(noise, study, copy):
    before = read_stamps(copy)
    bar = Bar()
    pack(noise, copy, progress=bar)
    after = read_stamps(copy)
    assert {name for name in before if before[name] != after[name]} <= {"manifest.json", "index.csv"}
    assert read_bytes(copy) == read_bytes(study.folder)
    assert bar.count == bar.total == 32 and bar.closed


def test_a_packed_study_can_be_moved(study, copy, tmp_path):
    moved = copy.rename(tmp_path / "elsewhere")
    loaded = load_packed_study(moved)
    assert read_records(loaded.files("val")) == read_records(study.files("val"))
    assert all(file.startswith(str(moved)) for file in loaded.files("train"))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"train": 9, "val": 3}, {"test": 5}])
def test_a_subset_without_any_image_is_empty(make_images, tmp_path, sizes):
    loaded = pack(make_images(tmp_path / "images", **sizes), tmp_path / "packed")
    for subset in ("train", "val", "test"):
        n = sizes.get(subset, 0)
        assert len(loaded.rows(subset)) == n
        assert loaded.labels(subset).shape == (n, 14)
        assert loaded.labels(subset).dtype == np.float32
        batches = list(make_eval_dataset(loaded, subset, 2))
        assert len(batches) == -(-n // 2)


# Interruptions


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [1, 11, 27])
def test_an_interrupted_run_is_resumed_and_ends_in_the_same_bytes(noise, study, tmp_path, stop_at):
    folder = tmp_path / "packed"
    with pytest.raises(KeyboardInterrupt):
        pack(noise, folder, progress=Bar(stop_at))
    with pytest.raises(FileNotFoundError, match=r"packing did not finish.*resumes where it stopped"):
        load_packed_study(folder)
    finished = {name: stamp for name, stamp in read_stamps(folder).items() if name.endswith(".tfrecord")}
    # Progress counts a shard once it is in its place, so that of image `stop_at` is the last one that is finished.
    sizes = [shard["count"] for subset in ("train", "val", "test") for shard in study.shards[subset]]
    assert len(finished) == int((np.cumsum(sizes) < stop_at).sum()) + 1

    bar = Bar()
    loaded = pack(noise, folder, progress=bar)
    after = read_stamps(folder)
    assert {name: after[name] for name in finished} == finished
    assert read_bytes(folder) == read_bytes(study.folder)
    assert bar.count == bar.total == len(loaded.index) == 32


@pytest.mark.slow
def test_receipts_that_a_power_cut_destroyed_cost_their_shard_only(noise, study, tmp_path):
    folder = tmp_path / "packed"
    with pytest.raises(KeyboardInterrupt):
        pack(noise, folder, progress=Bar(11))
    first, second, third = sorted(folder.glob("*.tfrecord.json"))
    second.write_bytes(b"")
    third.write_text('{"file": "train-0')
    before = read_stamps(folder)
    pack(noise, folder)
    after = read_stamps(folder)
    assert after[first.stem] == before[first.stem]
    assert after[second.stem] != before[second.stem]
    assert read_bytes(folder) == read_bytes(study.folder)


@pytest.mark.slow
def test_an_unfinished_run_with_other_settings_leaves_nothing_behind(noise, study, tmp_path):
    folder = tmp_path / "packed"
    with pytest.raises(KeyboardInterrupt):
        pack(noise, folder, progress=Bar(14), shard_images=3, side=20)
    foreign = folder / "train-00000-of-00099.tfrecord"  # nothing says that this one is ours
    foreign.write_bytes(b"not ours")
    pack(noise, folder)
    assert read_bytes(folder) == read_bytes(study.folder) | {foreign.name: b"not ours"}


# Images that cannot be read


GRAY = np.random.default_rng(4).integers(0, 256, (40, 40), dtype=np.uint8)
READABLE = {
    "16-bit": encode(GRAY.astype(np.uint16) * 257),
    "palette": encode(GRAY, mode="P"),
    "RGBA": encode(np.stack([GRAY] * 3 + [np.full_like(GRAY, 255)], -1)),
    "JPEG": encode(GRAY, "JPEG"),
    "not square": encode(GRAY[:30]),
}
UNREADABLE = {
    "cut short": (encode(GRAY)[:-200], "damaged or cut short"),
    "flipped bit": (flip_bit(encode(GRAY), 900), "damaged or cut short"),
    "HTML": (b"<html><body>404 Not Found</body></html>", "neither PNG nor JPEG"),
    "pixel": (encode(GRAY[:1, :1]), "1 x 1 pixels"),
    "bomb": (make_png(20_000, 20_000), "declares"),
    "header": (encode(GRAY)[:24], "broken header"),
    "empty": (b"", "empty file"),
}


@pytest.fixture
def odd_images(noise, tmp_path):
    """Rows and paths in which unusual and unreadable files stand in for images; and name -> kind."""
    rows, paths = noise
    folder = tmp_path / "odd"
    shutil.copytree(paths[rows["image"][0]].parent, folder)
    kinds = dict(zip(rows["image"], [*READABLE, *UNREADABLE], strict=False))
    for image, kind in kinds.items():
        (folder / image).write_bytes(READABLE[kind] if kind in READABLE else UNREADABLE[kind][0])
    return rows, {image: folder / image for image in rows["image"]}, kinds


@pytest.mark.slow
def test_unreadable_images_are_left_out_with_a_reason_and_the_others_are_packed(odd_images, tmp_path):
    rows, paths, kinds = odd_images
    loaded = pack((rows, paths), tmp_path / "packed")
    reasons = {entry["image"]: entry["reason"] for entry in loaded.excluded}
    unreadable = {image: kind for image, kind in kinds.items() if kind in UNREADABLE}
    assert len(loaded.excluded) == len(reasons) == len(unreadable) == 7
    for image, kind in unreadable.items():
        assert UNREADABLE[kind][1] in reasons[image]
    assert set(loaded.index["image"]) == set(rows["image"]) - set(unreadable)

    packed = {
        features["image"].bytes_list.value[0].decode(): features["film"].bytes_list.value[0]
        for subset in ("train", "val", "test")
        for features in read_examples(loaded.files(subset))
    }
    assert set(packed) == set(loaded.index["image"])
    for image, kind in kinds.items():
        if kind in READABLE:
            assert packed[image] == decode_image(tf.constant(READABLE[kind]), SIDE).numpy().tobytes()
    kept = rows[~rows["image"].isin(unreadable)]
    assert loaded.split_sha256 == hash_split(kept["image"], kept["split"])
    assert sum(json.loads((loaded.folder / "manifest.json").read_text())["counts"].values()) == len(kept)
    for subset in ("train", "val", "test"):
        assert sum(shard["count"] for shard in loaded.shards[subset]) == len(loaded.rows(subset))
    assert len(read_records(loaded.files("train"))) == len(loaded.rows("train"))


@pytest.mark.slow
def test_an_image_that_vanished_is_listed_too(noise, tmp_path):
    rows, paths = noise
    missing = rows["image"][3]
    loaded = pack((rows, paths | {missing: tmp_path / "nowhere.png"}), tmp_path / "packed")
    assert [entry["image"] for entry in loaded.excluded] == [missing]
    assert "cannot be read: No such file" in loaded.excluded[0]["reason"]


@pytest.mark.slow
def test_a_shard_of_unreadable_images_only_is_empty_and_harmless(noise, study, tmp_path):
    rows, paths = noise
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"<html>")
    lost = study.rows("test")["image"][:4].tolist()  # the first of the test shards
    loaded = pack((rows, paths | dict.fromkeys(lost, broken)), tmp_path / "packed")
    assert [shard["count"] for shard in loaded.shards["test"]] == [0, 3]
    assert len(loaded.rows("test")) == len(read_records(loaded.files("test"))) == 3
    assert read_records(loaded.files("train")) == read_records(study.files("train"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cut short", "flipped bit"])
def test_a_repaired_image_is_picked_up_and_only_its_shard_is_rewritten(noise, study, tmp_path, kind):
    """Also where the repaired file has the size of the broken one, as after a transfer that flipped a bit."""
    rows, paths = noise
    image = study.rows("train")["image"][5]
    repaired = paths[image].read_bytes()
    file = tmp_path / "image.png"
    file.write_bytes(repaired[:-60] if kind == "cut short" else flip_bit(repaired, len(repaired) // 2))
    paths = paths | {image: file}
    folder = tmp_path / "packed"
    assert [entry["image"] for entry in pack((rows, paths), folder).excluded] == [image]
    before = read_stamps(folder)
    assert [entry["image"] for entry in pack((rows, paths), folder).excluded] == [image]
    again = read_stamps(folder)
    shards = {name for name in before if name.endswith(".tfrecord")}
    assert all(before[name] == again[name] for name in shards)

    file.write_bytes(repaired)
    assert pack((rows, paths), folder).excluded == []
    after = read_stamps(folder)
    assert {name for name in shards if before[name] != after[name]} == {study.shards["train"][1]["file"]}
    assert read_bytes(folder) == read_bytes(study.folder)


@pytest.mark.slow
def test_corrected_labels_are_picked_up_and_only_their_shard_is_rewritten(noise, study, copy):
    rows, paths = noise
    image = study.rows("train")["image"][6]
    corrected = rows.copy()
    corrected.loc[corrected["image"] == image, "Hernia"] = 1
    before = read_stamps(copy)
    loaded = pack((corrected, paths), copy)
    after = read_stamps(copy)
    changed = {name for name in before if name.endswith(".tfrecord") and before[name] != after[name]}
    assert changed == {study.shards["train"][1]["file"]}
    assert loaded.rows("train")["Hernia"][6] == 1 and study.rows("train")["Hernia"][6] == 0


# Damage


def damage(folder, study, how):
    """Damages one shard and returns its path."""
    path = folder / study.shards["train"][2]["file"]
    if how == "flipped bit":
        content = path.read_bytes()
        path.write_bytes(flip_bit(content, len(content) // 2))
    elif how == "cut at the border of a record":
        records = read_records([path])
        with tf.io.TFRecordWriter(str(path)) as writer:
            for record in records[:2]:
                writer.write(record)
        assert len(read_records([path])) == 2  # reads without any error
    else:
        path.unlink()
    return path


@pytest.mark.slow
@pytest.mark.parametrize("how", ["flipped bit", "cut at the border of a record", "missing"])
def test_a_damaged_shard_is_named_and_packing_again_repairs_it_alone(noise, study, copy, how):
    path = damage(copy, study, how)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_packed_study(copy)
    assert isinstance(error.value, FileNotFoundError) == (how == "missing")
    assert str(path) in str(error.value) and REMEDY in str(error.value)

    before = read_stamps(copy)
    pack(noise, copy)
    after = read_stamps(copy)
    assert {name for name in after if name.endswith(".tfrecord") and before.get(name) != after[name]} == {path.name}
    assert read_bytes(copy) == read_bytes(study.folder)


@pytest.mark.slow
@pytest.mark.parametrize("missing", [True, False])
def test_an_altered_or_missing_index_is_named_and_repaired(noise, study, copy, missing):
    path = copy / "index.csv"
    if missing:
        path.unlink()
    else:
        path.write_text(path.read_text().replace("PA", "AP", 1))
    with pytest.raises(ValueError, match=rf"index\.csv is missing or altered.*{REMEDY}"):
        load_packed_study(copy)
    before = read_stamps(copy)
    pack(noise, copy)
    after = read_stamps(copy)
    assert all(before[name] == after[name] for name in before if name.endswith(".tfrecord"))
    assert read_bytes(copy) == read_bytes(study.folder)


@pytest.mark.slow
def test_a_missing_manifest_is_named_and_written_anew(noise, study, copy):
    (copy / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=rf"no manifest\.json.*{REMEDY}"):
        load_packed_study(copy)
    with pytest.raises(FileNotFoundError, match=rf"no manifest\.json.*{REMEDY}"):
        load_packed_study(copy / "nowhere")
    pack(noise, copy)
    assert read_bytes(copy) == read_bytes(study.folder)


def test_a_damaged_manifest_is_named_and_so_is_the_remedy_which_works(noise, study, copy):
    path = copy / "manifest.json"
    for content in ("", "{", '{"format": 2, "side"', "[]", "null", "{}", '{"format": 2, "side": 16}'):
        path.write_text(content)
        for use in (load_packed_study, lambda folder: pack(noise, folder)):
            with pytest.raises(ValueError, match=rf"manifest\.json is damaged .*Delete it and run {REMEDY}") as error:
                use(copy)
            assert str(path) in str(error.value)
    path.unlink()
    pack(noise, copy)
    assert read_bytes(copy) == read_bytes(study.folder)


def change_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


@pytest.mark.slow
def test_another_format_is_refused_with_a_remedy_that_works(noise, study, copy):
    path = change_manifest(copy, format=1)
    with pytest.raises(
        ValueError, match=r"has record format 1, this code reads 2\. Delete that folder and run"
    ) as error:
        load_packed_study(copy)
    assert str(path) in str(error.value)
    with pytest.raises(ValueError, match=r"format was 1, now 2\). Delete that folder"):
        pack(noise, copy)
    shutil.rmtree(copy)
    pack(noise, copy)
    assert read_bytes(copy) == read_bytes(study.folder)


def test_another_order_of_the_classes_is_refused(copy):
    swapped = [PATHOLOGIES[1], PATHOLOGIES[0], *PATHOLOGIES[2:]]
    for classes in (swapped, PATHOLOGIES[:13]):
        change_manifest(copy, classes=classes)
        with pytest.raises(ValueError, match=r"manifest\.json names the findings .*Atelectasis") as error:
            load_packed_study(copy)
        assert str(copy) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"side": 20}, "side"),
        ({"seed": 1}, "seed"),
        ({"shard_images": 5}, "shard_films"),
        ({"split_name": "random_patients"}, "split"),
        ({"rows": lambda rows: rows[3:]}, "asked_sha256"),
        ({"rows": lambda rows: rows.assign(split=rows["split"].to_numpy()[::-1])}, "asked_sha256"),
    ],
)
def test_another_study_into_the_same_folder_is_refused_and_nothing_changes(noise, copy, changes, named):
    rows, paths = noise
    if "rows" in changes:
        rows, changes = changes["rows"](rows), {}
    before = read_bytes(copy), read_stamps(copy)
    change = "it has other images or another split" if named == "asked_sha256" else f"{named} was .*, now "
    with pytest.raises(ValueError, match=rf"already holds another packed study \({change}.*PACKED_DIR") as error:
        pack((rows, paths), copy, **changes)
    assert str(copy) in str(error.value)
    assert (read_bytes(copy), read_stamps(copy)) == before


@pytest.mark.slow
def test_a_patient_in_two_subsets_is_refused_except_for_the_leaky_split(noise, tmp_path):
    rows, paths = noise
    leaky = rows.copy()
    one = leaky.index[leaky["split"] == "train"][0]
    other = leaky.index[leaky["split"] == "val"][0]
    leaky.loc[[one, other], "patient_id"] = 77
    folder = tmp_path / "leaky"
    for split_name in ("official", "random_patients"):
        with pytest.raises(ValueError, match=r"more than one subset: 77 \(train\+val\)"):
            pack((leaky, paths), folder, split_name=split_name)
        assert not folder.exists()  # refused before the work, not after it
    assert pack((leaky, paths), folder, split_name="leaky_images").split_name == "leaky_images"

    change_manifest(folder, split="official")
    with pytest.raises(ValueError, match=r"more than one subset: 77 \(train\+val\)") as error:
        load_packed_study(folder)
    assert str(folder) in str(error.value)
