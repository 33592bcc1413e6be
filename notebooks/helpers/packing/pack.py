"""Packs images into the shards of a packed study: resumable, in parts on several hosts, the same bytes every time."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pandas as pd
import tensorflow as tf

from ..runtime.cluster import map_tasks, refuse_own_disk
from ..runtime.files import as_path, hash_file, local_draft, lock_folder, measure_file, write_text
from ..study.labels import COLUMNS, list_findings
from ..study.splits import SUBSETS, hash_split
from ..study.study import write_study_files
from ..study.study_folder import name_some
from .image_cache import CachedImages
from .image_stream import FACTS, ImageFiles
from .packed import assert_split_by_patient, list_intact, load_packed_study, read_index, read_manifest
from .records import FORMAT, encode_record


class _Plan(NamedTuple):
    """A shard to be: its subset, its file's name, the rows of its images, and the hash of all that goes into it."""

    subset: str
    file: str
    rows: pd.DataFrame
    key: str


def parse_part(text):
    """Reads which part of the shards a process packs.

    Args:
        text: "3/8" for the third of eight parts, "" for all of them.

    Returns:
        Tuple (3, 8), or None.

    Raises:
        ValueError: it is neither.
    """
    if not text:
        return None
    number, sign, n_parts = str(text).partition("/")
    if not (sign and number.isdecimal() and n_parts.isdecimal() and 1 <= int(number) <= int(n_parts)):
        raise ValueError(f'PART is {text!r}; expected "" for all shards, or "1/8" to "8/8" on eight hosts.')
    return int(number), int(n_parts)


def pack_study(
    rows,
    images,
    folder,
    *,
    split_name,
    side=256,
    shard_images=512,
    seed=0,
    progress=None,
    encoding="raw",
    part=None,
    cluster="",
    study=None,
):
    """Packs images into TFRecord shards, shard by shard; an interrupted run resumes where it stopped.

    A finished shard is recognized by the hash of what went into it, kept beside it until the manifest is there. The
    bytes depend neither on interruptions, threads and parts, nor on whether images come from files or from caches.
    Images that cannot be read are left out and listed; they are tried again each time, and a shard is rewritten once
    one of them can be read. Where a finished and intact study is asked for again, nothing is written.

    Several processes, also on several hosts, pack a `part` of the shards each, into one folder or into folders whose
    files are then copied together; a call without `part` afterwards checks them, packs what is lacking and writes index
    and manifest. On a Ray cluster each worker packs a shard at a time, but caches, which need no decoding, are packed
    here. Of two calls without `part`, one waits for the other, see `files.lock_folder`. Memory does not grow with the
    study's images, see `image_stream`.

    Args:
        rows: DataFrame with `image`, `patient_id`, `follow_up`, `age`, `sex`, `view`, a column of 1, 0 or NaN (unknown)
            for each finding, and `split` ("train", "val" or "test").
        images: dict image -> path of its file, or a list of `ImageCache`s at that side.
        folder: path to write to; made if missing.
        split_name: which split this is, kept in the manifest.
        side: pixels, of the square images to write.
        shard_images: images in a shard at most; 512 images of 256 pixels are 33 MB.
        seed: of the order in which images are dealt to shards.
        progress: callable such as `tqdm`, called with `total=` and `unit=`, returning an object with `update(n)` and
            `close()`.
        encoding: of the images, "raw" pixels or "png": smaller, and slower to read; see `benchmarks/packing.py`.
        part: tuple (i, n) to pack every n-th shard from the i-th, see `parse_part`; None for all, and for the manifest.
        cluster: "", "auto" or an address, see `runtime.cluster.map_tasks`; `images` and `folder` are then on a disk
            that all machines share, or in a bucket.
        study: the `Study` that the images are of: its name and what it is about are kept in the manifest, and its
            labels and boxes are written to `study/`; None for neither.

    Returns:
        The `PackedStudy`, or None after a part.

    Raises:
        ValueError: `folder` holds a finished study of other images, another split, side or encoding; one patient is in
            two subsets of a split that is meant to be by patient; rows have no image in `images`; or none can be read.
        OSError: the disk is full; finished shards stay.
        tf.errors.OpError: the bucket that the images' files are in cannot be reached.
        RuntimeError: the cluster fails, see `map_tasks`; finished shards stay.
    """
    folder = as_path(folder)
    findings = [*list_findings(rows)]
    rows = rows[[*COLUMNS, *findings, "split"]]  # in this order they are hashed
    assert_split_by_patient(folder, split_name, rows["patient_id"], rows["split"])
    make_source = ImageFiles if isinstance(images, dict) else CachedImages
    source = make_source(images, side, encoding=encoding)
    if lacking := source.lacking(rows["image"]):
        raise ValueError(f"{name_some(lacking)} in the rows, but there is no image: drop the rows, or add the images.")
    # Both are keys of the manifest, and go into the hash by which finished shards are recognized.
    settings = {"format": FORMAT, "side": side, "encoding": encoding, "classes": findings, "split": split_name}
    settings |= {"seed": seed, "shard_films": shard_images, "asked_sha256": hash_split(rows["image"], rows["split"])}
    busy = f"Another process packs into {folder}. This one waits until it ends; what it has packed is used."
    with lock_folder(folder, busy, shared=bool(part), wait=True) as alone:
        held = _read_held_manifest(folder, settings)
        plans = _plan_shards(rows, source, settings, part)
        bar = progress(total=sum(len(plan.rows) for plan in plans), unit="image") if progress else None
        shards = _find_current_shards(folder, plans, source, held, bar)
        cluster = cluster if isinstance(source, ImageFiles) else ""
        lacking = [plan for plan in plans if plan.file not in shards]
        tasks = ((plan, source.select(plan.rows["image"]) if cluster else source) for plan in lacking)
        for shard in map_tasks(_prepare_writing, tasks, folder, cluster=cluster):
            if cluster:
                _assert_disk_is_shared(folder, shard, source)
            shards[shard["file"]] = shard
            if bar:
                bar.update(shard["count"] + len(shard["excluded"]))
        if bar:
            bar.close()
        if part:
            return None
        left_out = [entry for plan in plans for entry in shards[plan.file]["excluded"]]
        if len(left_out) == len(rows):
            some = f", for instance {left_out[0]['image']}: {left_out[0]['reason']}" if left_out else ""
            raise ValueError(f"none of the {len(rows)} images can be read{some}. Fetch or unpack them again.")
        _write_manifest(folder, settings, plans, shards, study)
        _remove_leftovers(folder, {plan.file for plan in plans}, drafts=alone)
        return load_packed_study(folder)


def _read_held_manifest(folder, settings):
    """Returns the manifest in a folder, {} if there is none; ValueError if it is one of another study."""
    if not (folder / "manifest.json").exists():
        return {}
    held = read_manifest(folder)
    differing = ["format"] if held.get("format") != FORMAT else [k for k in settings if held.get(k) != settings[k]]
    if differing:
        changes = [f"{key} was {held.get(key)}, now {settings[key]}" for key in differing if key != "asked_sha256"]
        changes += ["it has other images or another split"] if "asked_sha256" in differing else []
        raise ValueError(
            f"{folder} already holds another packed study ({'; '.join(changes)}). Delete that folder to pack anew, or "
            "set PACKED_DIR to another one; a run trained on the old one needs a new RUN_DIR too."
        )
    return held


def _plan_shards(rows, source, settings, part):
    """Deals the rows of each subset to shards at random, so that any few shards are a fair sample; returns `_Plan`s."""
    dealt, (number, n_parts) = [], part or (1, 1)
    for subset in SUBSETS:
        of_subset = rows[rows["split"].eq(subset)].sort_values("image")
        order = np.random.default_rng([settings["seed"], SUBSETS.index(subset)]).permutation(len(of_subset))
        pieces = np.array_split(order, -(-len(of_subset) // settings["shard_films"])) if len(of_subset) else []
        for k, piece in enumerate(pieces):
            dealt.append((subset, f"{subset}-{k:05d}-of-{len(pieces):05d}.tfrecord", of_subset.iloc[piece]))
    dealt = dealt[number - 1 :: n_parts]
    n_bytes = iter(source.measure([image for *_, piece in dealt for image in piece["image"]]))
    plans = []
    for subset, file, piece in dealt:
        # The size of the image files stands for their content.
        described = piece.assign(n_bytes=list(itertools.islice(n_bytes, len(piece))))
        text = f"{json.dumps(settings)}, TensorFlow image ops\n" + described.to_csv(index=False)
        plans.append(_Plan(subset, file, piece, hashlib.sha256(text.encode()).hexdigest()))
    return plans


def _find_current_shards(folder, plans, source, held, bar):
    """Returns what earlier runs or other parts have packed and is intact: dict file name -> shard with its facts."""
    found = _list_shards(folder, held)
    planned = {plan.file: plan for plan in plans if plan.file in found and found[plan.file]["key"] == plan.key}
    current = {}
    for shard in list_intact(folder, [found[file] for file in planned]):
        plan, left_out = planned[shard["file"]], {entry["image"] for entry in shard["excluded"]}
        if any(not isinstance(source.read_one(image), str) for image in left_out):
            continue  # an image has been repaired; its file may well have kept its size
        if shard["facts"] is None:
            shard["facts"] = source.inspect(plan.rows["image"][~plan.rows["image"].isin(left_out)])
        current[shard["file"]] = shard
        if bar:
            bar.update(len(plan.rows))
    return current


def _list_shards(folder, held):
    """Shards that an earlier run finished, by file name, from the manifest and from the receipts beside them."""
    facts, shards = None, {}
    if (folder / "index.csv").exists() and held and hash_file(folder / "index.csv") == held["index_sha256"]:
        facts = iter(read_index(folder)[list(FACTS)].to_numpy(object).tolist())
    for shard in held.get("shards", []):
        shards[shard["file"]] = shard | {"facts": facts and list(itertools.islice(facts, shard["count"]))}
    for path in folder.glob("*.tfrecord.json"):
        with contextlib.suppress(ValueError):  # a receipt that a power cut emptied: its shard is written anew
            shards[path.name.removesuffix(".json")] = json.loads(path.read_text(encoding="utf-8"))
    return shards


def _prepare_writing(folder):
    """Returns the function from (plan, source of its images) to shards with their facts, for `map_tasks`."""
    return lambda tasks: _write_shards(folder, list(tasks))


def _write_shards(folder, tasks):
    """Writes shards and their receipts, and yields them.

    The images of all of them are one stream, which does not stop at a shard's end; a shard is hashed and put in its
    place while the next one is written.
    """
    if not tasks:
        return
    plans, source = [plan for plan, _ in tasks], tasks[0][1]  # in one process, that of all images
    images = iter(source.read(image for plan in plans for image in plan.rows["image"]))
    finishing = []

    def finish(draft, stack, shard):
        with stack:
            shard |= {"bytes": measure_file(draft), "sha256": hash_file(draft)}
        write_text(folder / f"{shard['file']}.json", json.dumps(shard))
        return shard

    with ThreadPoolExecutor(1) as finisher:
        for plan in plans:
            with contextlib.ExitStack() as stack:
                draft = stack.enter_context(local_draft(folder / plan.file))
                shard = _write_records(draft, plan, images)
                if finishing:
                    yield finishing.pop().result()
                finishing.append(finisher.submit(finish, draft, stack.pop_all(), shard))
        if finishing:
            yield finishing.pop().result()


def _write_records(draft, plan, images):
    """Writes the records of a shard; returns its entry, still without size and hash."""
    excluded, facts, findings = [], [], list_findings(plan.rows)
    with _open_writer(draft) as writer:
        for row, image in zip(plan.rows.to_dict("records"), images, strict=False):
            if isinstance(image, str):
                excluded.append({"image": row["image"], "reason": image})
            else:
                writer.write(encode_record(image.data, row, findings))
                facts.append([getattr(image, name) for name in FACTS])
    shard = {"subset": plan.subset, "key": plan.key, "file": plan.file, "count": len(facts)}
    return shard | {"excluded": excluded, "facts": facts}


def _assert_disk_is_shared(folder, shard, source):
    """Raises RuntimeError if the worker that packed a shard could not see the images, or if this machine lacks it."""
    for entry in shard["excluded"]:
        if not isinstance(source.read_one(entry["image"]), str):
            refuse_own_disk(entry["image"], entry["reason"])
    if not (folder / shard["file"]).exists():
        raise RuntimeError(
            f"{shard['file']} was packed by a worker, but is not in {folder} here: PACKED_DIR must be on a disk that "
            "all machines of the cluster share, or in a bucket."
        )


@contextlib.contextmanager
def _open_writer(draft):
    """Opens a TFRecord file for a `with` block; OSError with the remedy where the disk is full."""
    try:
        with tf.io.TFRecordWriter(str(draft)) as writer:
            yield writer
    except tf.errors.ResourceExhaustedError as error:
        if os.strerror(errno.ENOSPC) not in error.message:  # of memory, for one
            raise
        remedy = "full; finished shards stay. Make room or name another PACKED_DIR; RECORDS = 'png' takes less"
        raise OSError(errno.ENOSPC, remedy, str(draft.parent)) from error


def _write_manifest(folder, settings, plans, shards, study):
    """Writes the study's small files, the index, and last the manifest, unless they are there already."""
    files = write_study_files(study, folder / "study") if study else []
    index = []
    for plan in plans:
        left_out = {entry["image"] for entry in shards[plan.file]["excluded"]}
        kept = plan.rows[~plan.rows["image"].isin(left_out)].assign(subset=plan.subset)
        facts = pd.DataFrame(shards[plan.file]["facts"], columns=list(FACTS), index=kept.index)
        index.append(pd.concat([kept[["subset", *COLUMNS, *settings["classes"]]], facts], axis=1))
    index = pd.concat(index)
    unknown = [name for name in settings["classes"] if index[name].dtype.kind == "f"]
    index = index.astype(dict.fromkeys(unknown, "Int64"))  # 1, 0 and nothing, not 1.0
    text = index.to_csv(index=False)
    _write_if_other(folder / "index.csv", text)
    manifest = settings | {
        "name": study.folder.name if study else "",
        "has_patients": study.has_patients if study else True,
        "about": study.about if study else {},
        "split_sha256": hash_split(index["image"], index["subset"]),
        "counts": {subset: int(index["subset"].eq(subset).sum()) for subset in SUBSETS},
        "index_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "study_files": {name: hash_file(folder / "study" / name) for name in files},
        "shards": [{key: value for key, value in shards[plan.file].items() if key != "facts"} for plan in plans],
    }
    _write_if_other(folder / "manifest.json", json.dumps(manifest, indent=1))


def _write_if_other(path, text):
    if not path.exists() or path.read_bytes() != text.encode():
        write_text(path, text)


def _remove_leftovers(folder, kept, drafts):
    """Removes receipts, the shards of an unfinished run with other settings, and if asked half-written files.

    Where no lock was to be had, these may be what a process on another machine is writing.
    """
    for receipt in folder.glob("*.tfrecord.json"):
        shard = receipt.with_suffix("")
        if shard.name not in kept:  # without a receipt beside it a shard is not known to be ours, and stays
            shard.unlink(missing_ok=True)
        receipt.unlink(missing_ok=True)
    for draft in folder.glob("part-*.tfrecord*") if drafts else ():
        draft.unlink()
