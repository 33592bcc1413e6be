"""Predicts a folder of images, PNG, JPEG and DICOM mixed, into one CSV; continues an interrupted call."""

import contextlib
import io
import os
import stat
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import tensorflow as tf

from ..packing.decoding import decode_image
from ..packing.dicom import load_image
from ..packing.image_files import ImageError
from ..runtime.cluster import map_tasks, refuse_own_disk
from ..runtime.files import lock_folder, read_text, write_text
from ..runtime.settings import read_json, write_json
from ..study.study_folder import walk_folders
from ..training.model_files import hash_model
from .input_gate import check_images, measure_color


def list_files(images, without=()):
    """Lists all files of a folder, and of the folders in it: what is no image is to be reported, not skipped.

    Listed as well, so that they are reported, are folders that cannot be opened or are not entered, see `walk_folders`.

    Args:
        images: path of a folder on a local disk, or of one image.
        without: paths of files that are left out, such as those that are about to be written.

    Returns:
        List of (name, path), sorted. The name is the path relative to the folder, with slashes; names with a backslash
        or with characters that cannot be printed (line breaks, bytes that are not text) are escaped as in Python.

    Raises:
        FileNotFoundError: the folder does not exist, or holds no file.
    """
    images = Path(images)
    if images.is_file():
        return [(_escape(images.name), images)]
    found, errors = [], []
    for folder, closed, names in walk_folders(images, onerror=errors.append):
        found += [Path(folder, name) for name in (*closed, *names)]
    left_out = {Path(path).resolve() for path in without}
    names = {path.name for path in left_out}
    found = {path for path in found if path.name not in names or path.resolve() not in left_out}
    found |= {Path(error.filename) for error in errors}
    if not images.exists() or not found:
        fault = "holds no image" if images.exists() else "is missing"
        raise FileNotFoundError(f"{images} {fault}. Give a folder with .png, .jpg, .jpeg or .dcm files, or one file.")
    return sorted((_escape(path.relative_to(images).as_posix()), path) for path in found)


def _escape(name):
    """Returns a name that takes one line of UTF-8; different names stay different."""
    return name if name.isprintable() and "\\" not in name else name.encode("unicode_escape").decode()


def predict_folder(model, images, out, *, batch_size=32, progress=None, cluster=""):
    """Predicts all images of a folder, or the rest of them after an interrupted call.

    Threads read and decode images two batches ahead of the model. The rows of a batch are written as soon as it is
    predicted. An image whose file changed its size or time is predicted again; rows of files that no longer exist
    stay. Of two processes that predict one folder, one waits for the other.

    Args:
        model: an `ExportedModel`.
        images: path of a folder on a local disk, or of one image.
        out: path of the CSV to write, on a local disk. One row an image: `file` (see `list_files`), `bytes`,
            `modified` (UTC), `findings` (those above their thresholds, with "|"), `warnings`, then `prob_<Pathology>`
            (calibrated) and `threshold_<Pathology>`. Beside it are written `<out>_model.json`, which describes the
            model and the folder, and `<out>_unreadable.csv`, the files that cannot be read, with reasons.
        batch_size: int, images a step.
        progress: callable such as `tqdm`.
        cluster: "", "auto" or an address, see `runtime.cluster.map_tasks`; images and model are then on a disk that all
            machines share.

    Returns:
        A namespace: `out`, `unreadable_csv` (path or None); counts `images`, `predicted` (in this call), `earlier`;
        `unreadable` and `warned`, DataFrames with `file` and `reason`, of this call.

    Raises:
        FileNotFoundError: see `list_files`.
        ValueError: `out` holds predictions of another model or folder, or is another file; or the side of the model's
            images is too small for the input gate.
        OSError: `out` cannot be written.
        RuntimeError: the cluster fails, see `map_tasks`; the rows that are written stay.
    """
    out = Path(out)
    unreadable_csv, note = out.with_name(f"{out.stem}_unreadable.csv"), out.with_name(f"{out.stem}_model.json")
    files = list_files(images, without=(out, unreadable_csv, note))
    folder = Path(images) if Path(images).is_dir() else Path(images).parent
    busy = f"Another process predicts the images in {folder}. This one waits until it ends."
    with lock_folder(folder, busy, wait=True):
        return _predict_files(model, files, images, (out, unreadable_csv, note), batch_size, progress, cluster)


def _predict_files(model, files, images, beside, batch_size, progress, cluster):
    """Does what `predict_folder` says, for listed files; `beside` are the paths of what is written."""
    out, unreadable_csv, note = beside
    table = _open_table(model, images, out, note)
    status = {name: _measure(path) for name, path in files}
    found = zip(table["file"], zip(table["bytes"], table["modified"], strict=True), strict=True)
    same = [status.get(name, known) == known for name, known in found]
    kept = table[np.array(same, dtype=bool)]
    done = set(kept["file"])
    todo = [(name, path) for name, path in files if name not in done]
    write_text(out, kept.to_csv(index=False, lineterminator="\n"))
    unreadable, warned = [], []
    with contextlib.ExitStack() as stack:
        bar = progress(total=len(files), initial=len(files) - len(todo), unit="image") if progress else None
        if bar:
            stack.callback(bar.close)
        file = stack.enter_context(out.open("a", encoding="utf-8", newline=""))
        batches = (todo[start : start + batch_size] for start in range(0, len(todo), batch_size))
        n_threads, paths = 1 if cluster else os.cpu_count(), dict(files)
        results = map_tasks(_prepare_predicting, batches, model, n_threads, cluster=cluster)
        stack.callback(results.close)  # at an interrupt, too
        for rows, failed in results:
            for name, reason in failed if cluster else ():
                if not _read(paths[name], model.facts["side"]).reason:
                    refuse_own_disk(paths[name], reason)
            unreadable += failed
            if len(rows):
                rows.insert(1, "bytes", [status[name][0] for name in rows["file"]])
                rows.insert(2, "modified", [status[name][1] for name in rows["file"]])
                rows.to_csv(file, index=False, header=False, lineterminator="\n")
                file.flush()
                warned += rows.loc[rows["warnings"].ne(""), ["file", "warnings"]].itertuples(index=False, name=None)
            if bar:
                bar.update(len(rows) + len(failed))
    columns = ["file", "reason"]
    failures = pd.DataFrame(unreadable, columns=columns)
    if len(failures):
        write_text(unreadable_csv, failures.to_csv(index=False))
    else:
        unreadable_csv.unlink(missing_ok=True)
    return SimpleNamespace(
        out=out,
        unreadable_csv=unreadable_csv if len(failures) else None,
        images=len(files),
        predicted=len(todo) - len(failures),
        earlier=len(files) - len(todo),
        unreadable=failures,
        warned=pd.DataFrame(warned, columns=columns),
    )


def _measure(path):
    """Returns (bytes, modified) of a file as in the CSV, empty if there is no such file."""
    try:
        status = path.stat()
    except OSError:  # such as a link to nothing, which `_read` reports
        return "", ""
    return str(status.st_size), str(np.datetime64(status.st_mtime_ns, "ns"))


def _open_table(model, images, out, note):
    """Returns the rows that an earlier call wrote to `out`, as text, without an incomplete last line.

    The model must be the same, and so must the folder: two may have images of one name and size.
    """
    names = model.facts["class_names"]
    columns = ["file", "bytes", "modified", "findings", "warnings"]
    columns += [f"{kind}_{name}" for kind in ("prob", "threshold") for name in names]
    same = {"model_sha256": hash_model(model.folder), "images": os.fspath(Path(images).resolve())}
    if not out.exists():
        write_json(note, same | model.facts)
        return pd.DataFrame(columns=columns)
    try:
        recorded, text = read_json(note), read_text(out)
        table = pd.read_csv(io.StringIO(text[: text.rfind("\n") + 1]), dtype=str, keep_default_na=False)
        if list(table) == columns and all(recorded[key] == value for key, value in same.items()):
            return table
    except (FileNotFoundError, ValueError, LookupError, TypeError):  # the note or the CSV is missing or malformed
        pass
    raise ValueError(f"{out} is not a CSV of this model and this folder. Choose another file, or remove it.")


def _prepare_predicting(model, n_threads):
    """Returns the function from batches of (name, path) to rows and (name, reason) of what cannot be read."""

    def predict(batches):
        with contextlib.ExitStack() as stack:
            pool = ThreadPoolExecutor(n_threads)
            stack.callback(pool.shutdown, cancel_futures=True)  # an interrupt does not wait for images not yet read
            for batch in _read_ahead(pool, batches, model.facts["side"]):
                readable = [(name, image) for name, image in batch if not image.reason]
                failed = [(name, image.reason) for name, image in batch if image.reason]
                yield _predict(model, readable) if readable else (), failed

    return predict


def _read_ahead(pool, batches, side):
    """Yields batches of (name, result of `_read`), while the next two are being read."""
    ahead = deque()
    for batch in batches:
        ahead.append([(name, pool.submit(_read, path, side)) for name, path in batch])
        if len(ahead) > 2:
            yield [(name, future.result()) for name, future in ahead.popleft()]
    while ahead:
        yield [(name, future.result()) for name, future in ahead.popleft()]


_decode = tf.function(decode_image)  # traced once a side; threads run a graph in parallel


def _read(path, side):
    """Returns a namespace with `image` (uint8), `notes` and `color`; or with the `reason` why it cannot be read."""
    try:
        _check_plain(path)
        data, notes = load_image(path)
        image = _decode(tf.constant(data), side).numpy()
        return SimpleNamespace(image=image, notes=notes, color=measure_color(data), reason="")
    except tf.errors.InvalidArgumentError:  # the header is valid, the pixels are not
        return SimpleNamespace(reason="damaged or cut short: its pixels cannot be decoded; export or copy it again")
    except (ImageError, OSError) as error:
        return SimpleNamespace(reason=str(error) if isinstance(error, ImageError) else error.strerror or str(error))
    except Exception as error:  # one strange file must not stop the others
        return SimpleNamespace(reason=f"cannot be read ({type(error).__name__})")  # its message might name a patient


def _check_plain(path):
    """Raises ImageError or OSError unless the path is a plain file: reading a pipe would never end."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        os.scandir(path).close()
        hidden = path.name.startswith(".")
        raise ImageError(
            "a hidden folder, which is not entered; rename it if it holds images"
            if hidden
            else "a link to a folder that it lies in, which is not entered"
        )
    if not stat.S_ISREG(mode):
        raise ImageError("not a plain file but a pipe or a device; copy its content into a file")


def _predict(model, batch):
    names, images = zip(*batch, strict=True)
    squares = np.stack([image.image for image in images])
    answer = model.predict_pixels(squares)
    gate = check_images(squares, [image.color for image in images])
    classes = np.array(model.facts["class_names"])
    rows = {
        "file": names,
        "findings": ["|".join(classes[above]) for above in answer["above_threshold"]],
        "warnings": [
            "; ".join([*image.notes, *(warning.reason for warning in found)])
            for image, found in zip(images, gate, strict=True)
        ],
    }
    rows |= {f"prob_{name}": answer["probabilities"][:, k].round(6) for k, name in enumerate(classes)}
    rows |= {
        f"threshold_{name}": round(value, 6) for name, value in zip(classes, model.facts["thresholds"], strict=True)
    }
    return pd.DataFrame(rows)
