"""TFRecord shards of small gray films: writer and parser side by side, and the manifest that holds them together.

A packed study is one folder: `train-00000-of-00004.tfrecord`, ..., `index.csv` (a row a film, in the order of the
records) and `manifest.json`, written last. Everything in it is relative, so the folder can be moved or attached.
"""

import contextlib
import functools
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pandas as pd
import tensorflow as tf

from .files import as_path, hash_file, local_copy, local_draft, measure_file, read_csv, write_csv, write_text
from .film_files import FilmError, inspect_film
from .images import decode_film
from .labels import PATHOLOGIES
from .splits import assert_no_patient_overlap, hash_split

FORMAT = 1  # of the records and the manifest; a reader refuses any other
SUBSETS = ("train", "val", "test")
_MANIFEST_KEYS = {"format", "side", "classes", "split", "split_sha256", "index_sha256", "shards"}
_COLUMNS = ["subset", "image", "patient_id", "follow_up", "age", "sex", "view", *PATHOLOGIES]


@dataclass(frozen=True)
class PackedStudy:
    """A packed study that was checked on loading.

    Attributes:
        folder: path of the folder.
        side: pixels, of the square films in the shards.
        split_name: which split, one of `splits.SPLITS`.
        split_sha256: `splits.hash_split` of the films in it.
        index_sha256: of `index.csv`, in which the labels are.
        shards: dict subset -> list of dicts with `file`, `count`, `bytes`, `sha256`.
        index: DataFrame in the order of the records: `subset`, the metadata columns, 14 label columns.
        excluded: list of dicts `image`, `reason`: films that could not be read.
    """

    folder: os.PathLike
    side: int
    split_name: str
    split_sha256: str
    index_sha256: str
    shards: dict
    index: pd.DataFrame
    excluded: list

    def files(self, subset):
        """Paths of a subset's shards, as strings, in order."""
        return [str(self.folder / shard["file"]) for shard in self.shards[subset]]

    def rows(self, subset):
        """The index of one subset, in the order in which `make_eval_dataset` gives the films."""
        return self.index[self.index["subset"].eq(subset)].reset_index(drop=True)

    def labels(self, subset):
        """Labels of one subset: float32 array (films, 14) of 0 and 1, in the order of `rows`."""
        return self.rows(subset)[list(PATHOLOGIES)].to_numpy(np.float32)


def _encode(film, row):
    def of_bytes(*values):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))

    def of_ints(*values):
        return tf.train.Feature(int64_list=tf.train.Int64List(value=values))

    feature = {
        "film": of_bytes(film.tobytes()),
        "labels": of_ints(*(int(row[name]) for name in PATHOLOGIES)),
        "image": of_bytes(row["image"].encode()),
        "patient_id": of_ints(int(row["patient_id"])),
        "follow_up": of_ints(int(row["follow_up"])),
        "age": tf.train.Feature(float_list=tf.train.FloatList(value=[row["age"]])),  # years, NaN where unusable
        "sex": of_bytes(row["sex"].encode()),
        "view": of_bytes(row["view"].encode()),
    }
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString(deterministic=True)


def parse_records(serialized, side):
    """Parses a batch of records to films and labels. Runs inside `Dataset.map`.

    Args:
        serialized: string tensor (batch,).
        side: int, pixels, of the packed films.

    Returns:
        uint8 tensor (batch, side, side, 1) and float32 tensor (batch, 14).
    """
    spec = {
        "film": tf.io.FixedLenFeature([], tf.string),
        "labels": tf.io.FixedLenFeature([len(PATHOLOGIES)], tf.int64),
    }
    parsed = tf.io.parse_example(serialized, spec)
    films = tf.io.decode_raw(parsed["film"], tf.uint8, fixed_length=side * side)
    return tf.reshape(films, (-1, side, side, 1)), tf.cast(parsed["labels"], tf.float32)


@functools.lru_cache  # traced once a process, not once a call
def _make_decoder(side):
    @tf.function(input_signature=[tf.TensorSpec([], tf.string)])
    def decode(path):
        return decode_film(tf.io.read_file(path), side)

    return decode


def _measure_film(path):
    try:
        return measure_file(path)
    except OSError:  # reading it will fail too, and then say why
        return -1


def _read_film(path, decode):
    """Returns a uint8 array (side, side, 1), or the reason why there is none.

    A bucket that cannot be reached is no such reason but ends the packing, which can go on later.
    """
    try:
        with local_copy(path) as file:
            return _decode_file(file, decode)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _decode_file(path, decode):
    try:
        inspect_film(path)
        return decode(str(path)).numpy()
    except FilmError as error:
        return str(error)
    except tf.errors.InvalidArgumentError:
        return "the pixels cannot be decoded: the file is damaged or cut short"
    except tf.errors.OpError as error:
        return f"cannot be read: {error.message}"


def _plan_shards(rows, paths, shard_films, seed):
    """Deals the rows of each subset to shards at random, so that any few shards are a fair sample."""
    for subset in SUBSETS:
        part = rows[rows["split"].eq(subset)].sort_values("image")
        order = np.random.default_rng([seed, SUBSETS.index(subset)]).permutation(len(part))
        pieces = np.array_split(order, -(-len(part) // shard_films)) if len(part) else []
        for number, piece in enumerate(pieces):
            name = f"{subset}-{number:05d}-of-{len(pieces):05d}.tfrecord"
            yield subset, name, part.iloc[piece].assign(path=[str(paths[i]) for i in part["image"].iloc[piece]])


def _plan_key(rows, side, pool):
    """A hash of all that determines a shard's bytes, the size of the image files standing for their content."""
    described = rows.drop(columns="path").assign(n_bytes=[*pool.map(_measure_film, rows["path"])])
    text = f"format {FORMAT}, side {side}, TensorFlow image ops\n" + described.to_csv(index=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _write_shard(target, rows, decode, pool, bar):
    excluded = []
    with local_draft(target) as draft:
        with tf.io.TFRecordWriter(str(draft)) as writer:
            films = pool.map(lambda path: _read_film(path, decode), rows["path"])
            for row, film in zip(rows.to_dict("records"), films, strict=True):
                if bar:
                    bar.update(1)
                if isinstance(film, str):
                    excluded.append({"image": row["image"], "reason": film})
                else:
                    writer.write(_encode(film, row))
        receipt = {"file": target.name, "count": len(rows) - len(excluded), "bytes": measure_file(draft)}
        receipt |= {"sha256": hash_file(draft), "excluded": excluded}
    return receipt


def pack_study(rows, paths, folder, *, split_name, side=256, shard_films=512, seed=0, n_threads=None, progress=None):
    """Packs films into TFRecord shards, shard by shard; an interrupted run goes on where it stopped.

    A finished shard is recognized by the hash of what went into it, kept beside it until the manifest is there. The
    bytes do not depend on interruptions or threads. Films that cannot be read are left out and listed; they are tried
    again each time, and a shard is rewritten once one of them can be read.

    Args:
        rows: DataFrame with `image`, `patient_id`, `follow_up`, `age`, `sex`, `view`, 14 label columns and `split`
            ("train", "val" or "test").
        paths: dict image -> path of its file.
        folder: path to write to; made if missing.
        split_name: which split this is, kept in the manifest.
        side: pixels, of the square films to write.
        shard_films: films a shard at most; 512 films of 256 pixels are 33 MB.
        seed: of the order in which films are dealt to shards.
        n_threads: threads that read and decode; by default one a core.
        progress: callable such as `tqdm`, called with `total=` and `unit=`, returning an object with `update(n)` and
            `close()`.

    Returns:
        The `PackedStudy`.

    Raises:
        ValueError: `folder` holds a finished study of other films, another split or another side, or one patient is
            in two subsets of a split that is meant to be by patient.
        tf.errors.OpError: the bucket that `paths` are in cannot be reached.
    """
    folder = as_path(folder)
    _assert_split_by_patient(folder, split_name, rows["patient_id"], rows["split"])
    asked = {"format": FORMAT, "side": side, "classes": list(PATHOLOGIES), "split": split_name, "seed": seed}
    asked |= {"shard_films": shard_films, "asked_sha256": hash_split(rows["image"], rows["split"])}
    done = _finished_shards(folder, asked)
    folder.mkdir(parents=True, exist_ok=True)
    shards, index = [], []
    bar = progress(total=len(rows), unit="film") if progress else None
    decode = _make_decoder(side)
    with ThreadPoolExecutor(n_threads or os.cpu_count()) as pool:
        for subset, name, part in _plan_shards(rows, paths, shard_films, seed):
            key = _plan_key(part, side, pool)
            shard = done.get(name)
            if shard and shard["key"] == key and _is_intact(folder, shard) and not _any_repaired(part, shard, decode):
                if bar:
                    bar.update(len(part))
            else:
                shard = {"subset": subset, "key": key, **_write_shard(folder / name, part, decode, pool, bar)}
                write_text(folder / f"{name}.json", json.dumps(shard))
            shards.append(shard)
            left_out = {film["image"] for film in shard["excluded"]}
            index.append(part[~part["image"].isin(left_out)].assign(subset=subset))
    if bar:
        bar.close()
    index = pd.concat(index)[_COLUMNS]
    write_csv(folder / "index.csv", index, index=False)
    manifest = asked | {
        "split_sha256": hash_split(index["image"], index["subset"]),
        "counts": {subset: int(index["subset"].eq(subset).sum()) for subset in SUBSETS},
        "index_sha256": hash_file(folder / "index.csv"),
        "shards": shards,
    }
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1))
    _remove_leftovers(folder, {shard["file"] for shard in shards})
    return load_packed_study(folder)


def _finished_shards(folder, asked):
    """Shards that an earlier run finished, by file name, from the manifest and from the receipts beside them."""
    held = _read_manifest(folder) if (folder / "manifest.json").exists() else asked | {"shards": []}
    differing = [key for key in asked if held.get(key) != asked[key]]
    if differing:
        changes = [f"{key} was {held.get(key)}, now {asked[key]}" for key in differing if key != "asked_sha256"]
        changes += ["the films or their split are others than then"] if "asked_sha256" in differing else []
        raise ValueError(
            f"{folder} already holds another packed study ({'; '.join(changes)}). Delete that folder to pack anew, or "
            "set PACKED_DIR to another one; a run trained on the old one needs a new RUN_DIR too."
        )
    shards = {shard["file"]: shard for shard in held["shards"]}
    for path in folder.glob("*.tfrecord.json"):
        with contextlib.suppress(ValueError):  # a receipt that a power cut emptied: its shard is written anew
            shards[path.name.removesuffix(".json")] = json.loads(path.read_text(encoding="utf-8"))
    return shards


def _any_repaired(rows, shard, decode):
    """Whether a film that was left out of a shard can be read by now; a mended file may well keep its size."""
    left_out = {film["image"] for film in shard["excluded"]}
    return any(not isinstance(_read_film(path, decode), str) for path in rows["path"][rows["image"].isin(left_out)])


def _remove_leftovers(folder, kept):
    """Removes receipts, half-written files and the shards of an unfinished run with other settings."""
    for receipt in folder.glob("*.tfrecord.json"):
        shard = receipt.with_suffix("")
        if shard.name not in kept:  # without a receipt beside it a shard is not known to be ours, and stays
            shard.unlink(missing_ok=True)
        receipt.unlink()
    for draft in folder.glob("part-*.tfrecord*"):
        draft.unlink()


def _assert_split_by_patient(folder, split_name, patient_ids, subsets):
    if split_name == "leaky_images":  # the demonstration split leaks on purpose, and says so in its name
        return
    try:
        assert_no_patient_overlap(patient_ids, subsets)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}. Split by patient and pack into an empty folder.") from None


def _is_intact(folder, shard):
    path = folder / shard["file"]
    return path.exists() and measure_file(path) == shard["bytes"] and hash_file(path) == shard["sha256"]


def _read_manifest(folder):
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError("it holds no object")
        lacking = _MANIFEST_KEYS - manifest.keys()
        if lacking and manifest.get("format", FORMAT) == FORMAT:
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
        return manifest
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} holds no manifest.json: it is no packed study, or packing did not finish. "
            "Run 01_prepare_data.ipynb; it goes on where it stopped."
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{folder / 'manifest.json'} is damaged ({error}). Delete it and run 01_prepare_data.ipynb."
        ) from None


def load_packed_study(folder, classes=PATHOLOGIES):
    """Loads and checks a packed study: every shard's presence, size and SHA-256, the class order, the patients.

    A TFRecord file cut at the border of a record reads as a shorter file without any error, so sizes and hashes are
    compared before the first record is used. Hashing runs at about a gigabyte a second and core.

    Args:
        folder: path of the folder that `pack_study` wrote.
        classes: sequence of class names in the order that the caller will use.

    Returns:
        The `PackedStudy`.

    Raises:
        FileNotFoundError: no manifest, or a shard is missing.
        ValueError: a file differs from the manifest, the classes or the format differ, or one patient is in two
            subsets of a split that is meant to be by patient.
    """
    folder = as_path(folder)
    manifest = _read_manifest(folder)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{folder / 'manifest.json'} has record format {manifest['format']}, this code reads {FORMAT}. "
            "Delete that folder and run 01_prepare_data.ipynb."
        )
    if list(manifest["classes"]) != list(classes):
        raise ValueError(
            f"{folder / 'manifest.json'} has the classes {manifest['classes']}, asked for are {list(classes)}. "
            "Ask for the packed order, or delete that folder and run 01_prepare_data.ipynb."
        )
    missing = [shard["file"] for shard in manifest["shards"] if not (folder / shard["file"]).exists()]
    if missing:
        raise FileNotFoundError(f"{folder / missing[0]} is missing ({len(missing)} in all). Run 01_prepare_data.ipynb.")
    with ThreadPoolExecutor() as pool:  # hashlib releases the interpreter's lock
        intact = list(pool.map(lambda shard: _is_intact(folder, shard), manifest["shards"]))
    damaged = [shard["file"] for shard, ok in zip(manifest["shards"], intact, strict=True) if not ok]
    if damaged:
        raise ValueError(
            f"{folder / damaged[0]} does not match its size and SHA-256 in manifest.json ({len(damaged)} in all): "
            "cut short or altered. Run 01_prepare_data.ipynb; it rewrites damaged shards only."
        )
    if not (folder / "index.csv").exists() or hash_file(folder / "index.csv") != manifest["index_sha256"]:
        raise ValueError(f"{folder / 'index.csv'} is missing or altered. Run 01_prepare_data.ipynb.")
    text = {"subset": str, "image": str, "sex": str, "view": str}
    index = read_csv(folder / "index.csv", dtype=text, float_precision="round_trip")
    _assert_split_by_patient(folder, manifest["split"], index["patient_id"], index["subset"])
    return PackedStudy(
        folder=folder,
        side=manifest["side"],
        split_name=manifest["split"],
        split_sha256=manifest["split_sha256"],
        index_sha256=manifest["index_sha256"],
        shards={subset: [s for s in manifest["shards"] if s["subset"] == subset] for subset in SUBSETS},
        index=index,
        excluded=[film for shard in manifest["shards"] for film in shard["excluded"]],
    )
