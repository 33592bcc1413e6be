"""Packing from files and from caches, in parts and in both encodings: the same images, the same bytes, nothing lost."""

import contextlib
import errno
import io
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow as tf
from folder_state import read_bytes, read_stamps
from made_images import make_png
from PIL import Image

from helpers.packing import (
    ImageError,
    decode_image,
    inspect_image,
    load_image_files,
    load_packed_study,
    pack,
    pack_study,
    parse_part,
    resolve_paths,
)
from helpers.packing.image_cache import load_image_cache, shrink_images
from helpers.packing.image_stream import BATCH, ImageFiles
from helpers.packing.records import ENCODINGS
from helpers.pipeline import Augmentation, make_eval_dataset, make_train_dataset
from helpers.runtime.files import local_draft
from helpers.runtime.settings import ROOT
from helpers.study import draw_image, list_images, load_metadata, load_study

pytestmark = pytest.mark.slow

SIDE = 16
SETTINGS = {"split_name": "official", "side": SIDE, "shard_images": 4}
UNREADABLE = ("00000005_000.png", "00000021_000.png", "00000040_000.png")
AS_THEY_ARE = Augmentation(min_area=1, max_stretch=1, rotation=0, translation=0, contrast=0, brightness=0)


@pytest.fixture(scope="module")
def noise(make_images, tmp_path_factory):
    """Rows and paths of 45 images at 20 pixels, three of them unreadable, one of those missing; never written to."""
    folder = tmp_path_factory.mktemp("packing") / "images"
    rows, paths = make_images(folder, train=25, val=11, test=9, side=20)
    for name, spoil in zip(UNREADABLE, (lambda data: data[:-60], lambda data: b"<html>", None), strict=True):
        path = folder / name
        path.write_bytes(spoil(path.read_bytes())) if spoil else path.unlink()
    return rows, paths


@pytest.fixture(scope="module")
def both(noise, tmp_path_factory):
    """`noise` packed from its files in one go, as dict encoding -> study of 13 shards; never written to by a test."""
    folder = tmp_path_factory.mktemp("packed")
    return {encoding: pack_study(*noise, folder / encoding, encoding=encoding, **SETTINGS) for encoding in ENCODINGS}


@pytest.fixture(scope="module")
def study(both):
    return both["raw"]


def read_images(study, subset, **options):
    return [(image, *labels) for images, labels, _ in make_eval_dataset(study, subset, 1, **options)
            for image, labels in zip(images.numpy(), labels.numpy()[:, None], strict=True)]  # fmt: skip


# Encodings


def test_images_and_labels_are_the_same_in_both_encodings(both):
    raw, png = both["raw"], both["png"]
    assert raw.index.equals(png.index) and raw.excluded == png.excluded and png.encoding == "png"
    sides = [make_train_dataset(study, SIDE, 5, seed=1, epochs=2) for study in (raw, png)]
    sides += [make_eval_dataset(study, "val", 4) for study in (raw, png)]
    for one, other in (sides[:2], sides[2:]):
        pairs = list(zip(one, other, strict=True))
        assert pairs and all(np.array_equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))
        assert one.element_spec == other.element_spec
    record = next(iter(tf.data.TFRecordDataset(png.files("val")))).numpy()
    assert b"\x89PNG" in record


def test_images_of_which_none_can_be_read_are_no_study(noise, tmp_path):
    rows, paths = noise
    bad = rows[rows["image"].isin(UNREADABLE)]
    with pytest.raises(
        ValueError, match=r"none of the 3 images can be read, for instance 000000\d\d_000\.png: .+\. Fetch"
    ):
        pack_study(bad, paths, tmp_path / "packed", **SETTINGS)
    assert not (tmp_path / "packed" / "manifest.json").exists()


def test_another_encoding_than_before_is_refused(noise, study):
    with pytest.raises(ValueError, match="encoding was raw, now png"):
        pack_study(*noise, study.folder, encoding="png", **SETTINGS)


# What images come from


def test_images_come_in_order_whatever_batch_a_bad_one_is_in(make_images, tmp_path):
    """Also where whole batches fail, and the first and the last image."""
    rows, paths = make_images(tmp_path / "images", train=4 * BATCH + 3, side=20)
    names = rows["image"].tolist()
    bad = {0, 7, 8, *range(BATCH, 2 * BATCH), 3 * BATCH - 1, len(names) - 1}
    for number in bad:
        paths[names[number]].write_bytes(b"")
    read = list(ImageFiles(paths, SIDE).read(names))
    assert len(read) == len(names)
    for number, (name, image) in enumerate(zip(names, read, strict=True)):
        if number in bad:
            assert image == "empty file; export or copy it again"
        else:
            assert image.data == decode_image(tf.constant(paths[name].read_bytes()), SIDE).numpy().tobytes()


def test_caches_give_the_bytes_that_files_give_and_need_them_no_more(noise, both, tmp_path):
    rows, paths = noise
    copies = shutil.copytree(next(iter(paths.values())).parent, tmp_path / "images")
    names, caches = sorted(paths, reverse=True), []
    for name, some in (("a", names[:30]), ("b", names[30:])):
        here = {image: copies / image for image in some}
        caches.append(shrink_images(here, tmp_path / "caches", name, side=SIDE))
        for path in here.values():
            path.unlink(missing_ok=True)
    assert [entry["image"] for cache in caches for entry in cache.excluded] == sorted(UNREADABLE, reverse=True)
    loaded = [load_image_cache(tmp_path / "caches", name) for name in "ba"]
    for encoding, some in (("raw", loaded), ("png", caches)):
        packed = pack_study(rows, some, tmp_path / encoding, encoding=encoding, **SETTINGS)
        assert read_bytes(packed.folder) == read_bytes(both[encoding].folder)
    (tmp_path / "png" / "index.csv").unlink()
    pack_study(rows, caches, tmp_path / "png", encoding="png", **SETTINGS)
    assert read_bytes(tmp_path / "png") == read_bytes(both["png"].folder)


def test_a_finished_cache_is_loaded_and_any_other_made_anew(noise, tmp_path, monkeypatch):
    paths = dict(list(noise[1].items())[:9])
    cache = shrink_images(paths, tmp_path, "one", side=SIDE)
    assert cache.pixels.shape == (8, SIDE, SIDE) and len(cache.images) == 8 and len(cache.facts["mode"]) == 8
    before = read_stamps(tmp_path)
    assert shrink_images(None, tmp_path, "one", side=SIDE) == cache == load_image_cache(tmp_path, "one")
    assert read_stamps(tmp_path) == before
    assert load_image_cache(tmp_path, "one", 20) is None and load_image_cache(tmp_path, "two") is None
    for path, content in ((cache.path, b"short"), (cache.path.with_suffix(".json"), b"{")):
        kept = path.read_bytes()
        path.write_bytes(kept[:-1] + b"?" if path == cache.path else content)
        assert load_image_cache(tmp_path, "one") is None
        with pytest.raises(FileNotFoundError, match=r"one\.npy is missing, unfinished, damaged or not of 16 pixels"):
            shrink_images(None, tmp_path, "one", side=SIDE)
        assert shrink_images(paths, tmp_path, "one", side=SIDE) == cache and path.read_bytes() == kept
    monkeypatch.setattr(ImageFiles, "read", lambda *_: iter(["no"]))  # ends amid the images
    with pytest.raises(ValueError, match="shorter"):
        shrink_images(paths, tmp_path, "one", side=20)
    assert load_image_cache(tmp_path, "one") is None and not list(tmp_path.glob("part-*"))


def test_caches_that_do_not_fit_are_refused(noise, tmp_path):
    rows, paths = noise
    names = list(paths)
    one = shrink_images({name: paths[name] for name in names[:20]}, tmp_path, "one", side=SIDE)
    two = shrink_images({name: paths[name] for name in names[19:-1]}, tmp_path, "two", side=SIDE)
    with pytest.raises(ValueError, match=r"two\.npy: 1 image is \(00000019_000\.png\) in another cache too"):
        pack_study(rows, [one, two], tmp_path / "packed", **SETTINGS)
    with pytest.raises(ValueError, match=r"25 images are .* in the rows, but there is no image"):
        pack_study(rows, [one], tmp_path / "packed", **SETTINGS)
    with pytest.raises(ValueError, match=r"one\.npy holds images of 16 pixels, but SIDE is 20"):
        pack_study(rows, [one], tmp_path / "packed", **SETTINGS | {"side": 20})
    with pytest.raises(ValueError, match="1 image is"):
        pack_study(rows, {name: paths[name] for name in names[1:]}, tmp_path / "packed", **SETTINGS)
    with pytest.raises(ValueError, match=r"gs://bucket/a lies in a bucket"):
        shrink_images(paths, "gs://bucket/a", "one", side=SIDE)
    assert not (tmp_path / "packed").exists()


# What the index says of the files


def make_blank(depth, color):
    """Returns a black PNG of 24 x 20 pixels of any kind, of which Pillow cannot write all."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    return make_png(24, 20, depth, color, raw=20 * bytes(1 + -(-24 * channels * depth // 8)))


def make_jpeg(mode):
    file = io.BytesIO()
    Image.new(mode, (24, 20)).save(file, "JPEG")
    return file.getvalue()


KINDS = {
    **{f"gray of {depth} bits": make_blank(depth, 0) for depth in (1, 2, 4, 8, 16)},
    **{f"palette of {depth} bits": make_blank(depth, 3) for depth in (1, 2, 4, 8)},
    **{f"color {color} of {depth} bits": make_blank(depth, color) for color in (2, 4, 6) for depth in (8, 16)},
    **{f"JPEG {mode}": make_jpeg(mode) for mode in ("L", "RGB")},
}


def test_the_index_says_of_every_kind_of_file_what_pillow_says(make_images, tmp_path):
    rows, paths = make_images(tmp_path / "images", train=len(KINDS) + 1)
    files = dict(zip(rows["image"], [*KINDS.values(), make_jpeg("CMYK")], strict=True))
    for image, data in files.items():
        paths[image].write_bytes(data)
    packed = pack_study(rows, paths, tmp_path / "packed", **SETTINGS)
    assert packed.excluded == [
        {
            "image": rows["image"].iloc[-1],
            "reason": "a JPEG in CMYK, the colors of printing, which no radiograph has; save it in gray",
        }
    ]
    with pytest.raises(ImageError):
        inspect_image(make_jpeg("CMYK"))
    for row in packed.index.to_dict("records"):
        header = inspect_image(files[row["image"]])
        assert (row["width"], row["height"]) == (24, 20) == (header["width"], header["height"])
        assert row["mode"] == header["mode"] and row["n_bytes"] == len(files[row["image"]])
    assert {"1", "L", "I;16", "P", "LA", "RGB", "RGBA"} == set(packed.index["mode"])
    assert packed.index["width"].dtype == packed.index["n_bytes"].dtype == np.int64
    kept = (packed.folder / "index.csv").read_bytes()
    (packed.folder / "index.csv").write_bytes(b"lost")
    pack_study(rows, paths, tmp_path / "packed", **SETTINGS)
    assert (packed.folder / "index.csv").read_bytes() == kept


# Parts


def test_a_part_is_written_as_a_fraction_and_anything_else_is_refused():
    assert [parse_part(text) for text in ("", "1/1", "3/8")] == [None, (1, 1), (3, 8)]
    for text in ("0/8", "9/8", "3", "3/", "-1/2", "a/b", 3):
        with pytest.raises(ValueError, match=r"PART is .*expected"):
            parse_part(text)


def test_two_that_pack_at_once_pack_what_one_packs(noise, study, tmp_path):
    packed = tmp_path / "packed"
    with ThreadPoolExecutor() as pool:
        parts = [pool.submit(pack_study, *noise, packed, part=(number, 2), **SETTINGS) for number in (1, 2)]
    assert [part.result() for part in parts] == [None, None]
    shards = sorted(path.name for path in packed.glob("*.tfrecord"))
    assert len(shards) == len(list(packed.glob("*.tfrecord.json"))) == sum(map(len, study.shards.values())) == 13
    assert len(list(packed.iterdir())) == 26  # no manifest yet, and no draft left
    before = read_stamps(packed)
    pack_study(*noise, packed, **SETTINGS)
    assert all(read_stamps(packed)[name] == before[name] for name in shards)
    assert read_bytes(packed) == read_bytes(study.folder)


@pytest.mark.filterwarnings("ignore:Another process packs into")
def test_of_two_that_pack_all_at_once_one_waits_and_both_have_it(noise, study, tmp_path):
    """What a killed process left half-written is removed; what a living one is writing is not."""
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "part-0-val-00000-of-00003.tfrecord").write_bytes(b"half")
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: pack_study(*noise, packed, **SETTINGS), range(4)))
    assert all(one.index.equals(study.index) for one in made) and read_bytes(packed) == read_bytes(study.folder)


def test_parts_from_folders_of_their_own_are_merged_and_what_is_lacking_or_damaged_is_packed(noise, study, tmp_path):
    for number, n_shards in ((1, 5), (3, 4)):
        folder = tmp_path / f"host{number}"
        pack_study(*noise, folder, part=(number, 3), **SETTINGS)
        assert len(list(folder.glob("*.tfrecord"))) == n_shards
        shutil.copytree(folder, tmp_path / "packed", dirs_exist_ok=True)
    damaged = next((tmp_path / "packed").glob("val*.tfrecord"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    kept = {name: stamp for name, stamp in read_stamps(tmp_path / "packed").items() if name.endswith(".tfrecord")}
    pack_study(*noise, tmp_path / "packed", **SETTINGS)
    after = read_stamps(tmp_path / "packed")
    assert {name for name in kept if kept[name] != after[name]} == {damaged.name} and len(kept) == 9
    assert read_bytes(tmp_path / "packed") == read_bytes(study.folder)


def test_a_part_of_a_finished_study_changes_nothing(noise, study):
    before = read_stamps(study.folder)
    assert pack_study(*noise, study.folder, part=(2, 5), **SETTINGS) is None
    assert read_stamps(study.folder) == before


# Reuse


@pytest.fixture(scope="module")
def attached(rows_and_paths, phantom_dir, tmp_path_factory):
    """A root below which `phantom_dir` lies packed with its label files, read-only, and foreign manifests."""
    root = tmp_path_factory.mktemp("attached")
    rows, images = rows_and_paths
    made = root / "made"
    pack_study(rows, images, made, split_name="official", side=48, shard_images=16, study=load_study(phantom_dir))
    folder = shutil.copytree(made, root / "input" / "somebody" / "packed")
    shutil.rmtree(made)
    for foreign, content in (("a", '{"manifest_version": 3}'), ("b", "no JSON"), ("c", "[1]")):
        (root / "input" / foreign).mkdir()
        (root / "input" / foreign / "manifest.json").write_text(content)
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield root / "input"
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)


def test_a_packed_study_carries_the_label_files_and_is_packed_again_without_a_write(
    attached, rows_and_paths, phantom_dir
):
    folder = attached / "somebody" / "packed"
    study = load_packed_study(folder)
    assert study.name == "phantom"
    copies = {path.name: path.read_bytes() for path in (folder / "study").iterdir()}
    originals = {path.name: path.read_bytes() for path in phantom_dir.iterdir() if path.is_file()}
    assert copies == originals and {"phantom.json", "BBox_List_2017.csv", "test_list.txt"} <= set(copies)
    rows, images = rows_and_paths
    before = read_stamps(folder)
    options = {"split_name": "official", "side": 48, "shard_images": 16}
    again = pack_study(rows, images, folder, study=load_study(phantom_dir), **options)
    assert read_stamps(folder) == before and again.index.equals(study.index)


def test_an_altered_copy_of_a_label_file_is_named_and_repaired(rows_and_paths, phantom_dir, attached, tmp_path):
    folder = shutil.copytree(attached / "somebody" / "packed", tmp_path / "packed")
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    copy = folder / "study" / "test_list.txt"
    copy.write_text("nobody.png")
    with pytest.raises(ValueError, match=r"study/test_list\.txt is missing or altered"):
        load_packed_study(folder)
    options = {"split_name": "official", "side": 48, "shard_images": 16}
    pack_study(*rows_and_paths, folder, study=load_study(phantom_dir), **options)
    assert copy.read_bytes() == (phantom_dir / "test_list.txt").read_bytes()


def test_an_attached_study_is_recognized_by_its_manifest(attached, tmp_path, phantom_dir):
    folder = attached / "somebody" / "packed"

    def resolve(data_dir, packed_dir="", root=attached, split="official"):
        return resolve_paths(data_dir, tmp_path / "run", packed_dir, split, "profile of a test", root)

    paths = resolve(tmp_path / "gone")
    assert (paths.packed, paths.study, paths.name) == (folder, folder / "study", "phantom")
    assert len(load_metadata(paths.study)) == 90
    paths = resolve(tmp_path / "gone", folder, root=tmp_path / "none")
    assert (paths.packed, paths.study, paths.name) == (folder, folder / "study", "phantom")
    paths = resolve(phantom_dir)  # the study is there: its own files count
    assert (paths.packed, paths.study, paths.name) == (folder, phantom_dir, "phantom")
    other = tmp_path / "other study"
    other.mkdir()
    assert resolve(other).packed == ROOT / "data" / "packed" / "other study-official-profile of a test"
    for paths in (resolve(tmp_path / "gone", root=None), resolve(tmp_path / "gone", split="random_patients")):
        assert (
            paths.study == tmp_path / "gone"
            and paths.name == "gone"
            and paths.packed.parent == ROOT / "data" / "packed"
        )
    second = tmp_path / "input" / "second"
    shutil.copytree(folder, second)
    os.symlink(folder, tmp_path / "input" / "first")  # links are not followed
    assert resolve(tmp_path / "gone", root=tmp_path / "input").packed == second
    shutil.copytree(folder, tmp_path / "input" / "third")
    with pytest.raises(ValueError, match=r"Several packed studies fit: .*second, .*third\. Set PACKED_DIR"):
        resolve(tmp_path / "gone", root=tmp_path / "input")


def test_files_of_images_are_the_originals_or_what_was_packed(attached, phantom_dir):
    study = load_packed_study(attached / "somebody" / "packed")
    images, names = list_images(phantom_dir), study.rows("test")["image"]
    assert load_image_files(study, "test", None, phantom_dir) == [images[name].read_bytes() for name in names]
    packed = load_image_files(study, "test", 5, study.folder / "study")
    assert len(packed) == 5
    rows = [decode_image(tf.constant(data), 48).numpy() for data in packed]
    assert np.array_equal(rows, [image for image, *_ in read_images(study, "test")[:5]])


def zone_plate(side):
    """Rings whose frequency grows outward to a quarter of a cycle a pixel, uint8 (side, side)."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    return np.rint(127.5 * (1 + np.cos(np.pi * (x**2 + y**2) / (2 * side)))).astype(np.uint8)


def test_a_study_of_320_pixels_serves_224_and_320_without_aliasing(make_images, tmp_path):
    rows, paths = make_images(tmp_path / "images", train=2)
    for path, image in zip(paths.values(), (draw_image(3, size=640)[0], zone_plate(640)), strict=True):
        Image.fromarray(image).save(path)
    at = {side: pack_study(rows, paths, tmp_path / str(side), split_name="official", side=side) for side in (224, 320)}

    def read(study, size):
        whole = np.stack([image for image, *_ in read_images(study, "train", image_size=size)])
        batches = make_train_dataset(study, size, 2, seed=0, epochs=1, strength=AS_THEY_ARE)
        crops, labels = next(iter(batches))
        order = np.argsort(labels.numpy().sum(axis=1) != study.labels("train").sum(axis=1)[0])
        return whole, crops.numpy()[order]

    def distance(a, b):
        return np.sqrt(((a - b) ** 2).mean(axis=(1, 2, 3)))

    direct, crops = read(at[224], 224)
    assert np.array_equal(direct, crops)
    whole, crops = read(at[320], 320)
    assert np.array_equal(whole, crops)
    skipping = distance(tf.image.resize(whole, (224, 224), "nearest").numpy(), direct)
    smoothed = distance(tf.image.resize(whole, (224, 224), antialias=True).numpy(), direct)
    for images in read(at[320], 224):
        assert (distance(images, direct) < 1.1 * smoothed).all() and (2 * distance(images, direct) < skipping).all()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a file on a disk that is always full")
def test_a_full_disk_ends_packing_with_the_remedy_and_keeps_finished_shards(noise, study, tmp_path, monkeypatch):
    """The third shard is written to a disk that is full; the two before it are not packed again."""
    n_drafts = 0

    @contextlib.contextmanager
    def draft_on_a_full_disk(path):
        nonlocal n_drafts
        n_drafts += path.suffix == ".tfrecord"
        with local_draft(path) as draft:
            if n_drafts == 3:
                draft.symlink_to("/dev/full")
            yield draft

    monkeypatch.setattr(pack, "local_draft", draft_on_a_full_disk)
    with pytest.raises(OSError, match="another PACKED_DIR") as error:
        pack_study(*noise, tmp_path, **SETTINGS)
    assert error.value.errno == errno.ENOSPC and str(tmp_path) in str(error.value)
    finished = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.tfrecord")}
    assert len(finished) == 2
    monkeypatch.undo()
    pack_study(*noise, tmp_path, **SETTINGS)
    assert all((tmp_path / name).stat().st_mtime_ns == stamp for name, stamp in finished.items())
    assert (tmp_path / "manifest.json").read_bytes() == (study.folder / "manifest.json").read_bytes()


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (64, 64), (41, 83)])
def test_a_box_in_pixels_of_the_image_lies_on_the_same_thing_when_packed(tmp_path, shape):
    pixels = np.full(shape, 40, np.uint8)
    pixels[10:30, 20:36] = 250
    (tmp_path / "study").mkdir()
    Image.fromarray(pixels).save(tmp_path / "study" / "a.png")
    (tmp_path / "study" / "labels.csv").write_text("image,split,Mass\na.png,test,1\n")
    (tmp_path / "study" / "boxes.csv").write_text("image,finding,x,y,width,height\na.png,Mass,20,10,16,20\n")
    study = load_study(tmp_path / "study")
    rows = study.rows.assign(split="test")
    packed = pack_study(rows, study.list_images(), tmp_path / "packed", split_name="official", side=96, study=study)
    (box,) = packed.load_boxes().itertuples()
    (image,) = [image for image, *_ in read_images(packed, "test")]
    scale = 96 / 1024
    y, x = np.nonzero(np.asarray(image)[..., 0] > 145)
    found = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])
    given = scale * np.array([box.x, box.y, box.x + box.width, box.y + box.height])
    assert np.abs(found - given).max() <= 1.0  # the pixels of the packed image are that coarse


def test_a_box_outside_its_image_is_refused(tmp_path):
    (tmp_path / "study").mkdir()
    Image.fromarray(np.zeros((40, 48), np.uint8)).save(tmp_path / "study" / "a.png")
    (tmp_path / "study" / "labels.csv").write_text("image,split,Mass\na.png,test,1\n")
    (tmp_path / "study" / "boxes.csv").write_text("image,finding,x,y,width,height\na.png,Mass,100,10,5,5\n")
    study = load_study(tmp_path / "study")
    rows = study.rows.assign(split="test")
    packed = pack_study(rows, study.list_images(), tmp_path / "packed", split_name="official", side=96, study=study)
    with pytest.raises(ValueError, match=r"box of a\.png begins at x 100, y 10, outside the image's 48 x 40 pixels"):
        packed.load_boxes()
