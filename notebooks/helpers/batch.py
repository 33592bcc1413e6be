"""Predicts a folder of films, PNG, JPEG and DICOM mixed, into one CSV that is written as it goes."""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import tensorflow as tf

from .files import read_text, write_text
from .film_files import FilmError, load_film
from .images import decode_film
from .input_gate import check_films, measure_color
from .model_files import hash_model
from .settings import read_json, write_json

ENDINGS = {".png", ".jpg", ".jpeg", ".dcm", ".dicom", ""}  # archives often export DICOM without any


def list_films(images):
    """Lists the files of a folder, and of the folders in it, that may be films; hidden ones are left out.

    Args:
        images: path of a folder on a local disk, or of one film.

    Returns:
        List of (name, path), sorted; the name is the path below the folder, with slashes.

    Raises:
        FileNotFoundError: there is no such folder, or nothing in it that may be a film.
    """
    images = Path(images)
    if images.is_file():
        return [(images.name, images)]
    found = []
    for folder, folders, names in os.walk(images):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    films = sorted((path.relative_to(images).as_posix(), path) for path in found if path.suffix.lower() in ENDINGS)
    if not films:
        raise FileNotFoundError(
            f"{images} holds no film. Give a folder with .png, .jpg, .jpeg or .dcm files, or one file."
        )
    return films


def predict_folder(model, images, out, *, batch_size=32, n_workers=None, progress=None):
    """Predicts all films of a folder, beginning where an earlier call was interrupted.

    Films are read and decoded by threads, two batches ahead of the model. After each batch its rows are in the CSV.
    A film whose file has another size than when it was predicted is predicted anew.

    Args:
        model: an `ExportedModel`.
        images: path of a folder on a local disk, or of one film.
        out: path of the CSV to write, on a local disk: a row a film with `file`, `bytes`, `findings` (those above
            their thresholds), `warnings`, then `prob_<Pathology>` (calibrated) and `threshold_<Pathology>`. Beside it
            go `<out>.json`, what the model is, and `<out>_unreadable.csv`, the files that are no films, with reasons.
        batch_size: films a step.
        n_workers: int, threads that read; None for twice as many as there are cores.
        progress: callable such as `tqdm`, called with `total=`, `initial=` and `unit=`, returning an object with
            `update(n)` and `close()`.

    Returns:
        A namespace: `out`, `unreadable_csv` (path or None); counts `films`, `predicted` (now), `earlier`; `unreadable`
        and `warned`, DataFrames with `file` and `reason`, of this call.

    Raises:
        FileNotFoundError: see `list_films`.
        ValueError: `out` holds predictions of another model, or is no such CSV.
    """
    films, out = list_films(images), Path(out)
    table = _open_table(model, out)
    sizes = {name: path.stat().st_size for name, path in films}
    same = [sizes.get(name, size) == size for name, size in zip(table["file"], table["bytes"], strict=True)]
    kept = table[np.array(same, dtype=bool)]
    done = set(kept["file"])
    todo = [(name, path) for name, path in films if name not in done]
    write_text(out, kept.to_csv(index=False))
    bar = progress(total=len(films), initial=len(films) - len(todo), unit="film") if progress else None
    unreadable, warned = [], []
    with ThreadPoolExecutor(n_workers or 2 * os.cpu_count()) as pool, out.open("a", encoding="utf-8") as file:
        for batch in _read_ahead(pool, todo, batch_size, model.facts["side"]):
            unreadable += [(name, film.reason) for name, film in batch if film.reason]
            readable = [(name, film) for name, film in batch if not film.reason]
            if readable:
                rows = _predict(model, readable, sizes)
                rows.to_csv(file, index=False, header=False)
                file.flush()
                warned += rows.loc[rows["warnings"].ne(""), ["file", "warnings"]].itertuples(index=False, name=None)
            if bar:
                bar.update(len(batch))
    if bar:
        bar.close()
    columns = ["file", "reason"]
    failures, path = pd.DataFrame(unreadable, columns=columns), out.with_name(f"{out.stem}_unreadable.csv")
    if len(failures):
        write_text(path, failures.to_csv(index=False))
    else:
        path.unlink(missing_ok=True)
    return SimpleNamespace(
        out=out,
        unreadable_csv=path if len(failures) else None,
        films=len(films),
        predicted=len(todo) - len(failures),
        earlier=len(films) - len(todo),
        unreadable=failures,
        warned=pd.DataFrame(warned, columns=columns),
    )


def _open_table(model, out):
    """Returns what an earlier call left in `out`, without a line that was cut short; the model must be the same."""
    names = model.facts["class_names"]
    columns = ["file", "bytes", "findings", "warnings"]
    columns += [f"{kind}_{name}" for kind in ("prob", "threshold") for name in names]
    about, note = {"model_sha256": hash_model(model.folder)} | model.facts, out.with_suffix(".json")
    if not out.exists():
        write_json(note, about)
        return pd.DataFrame(columns=columns)
    told = read_json(note) if note.exists() else {}
    lines = read_text(out).rpartition("\n")[0]
    if told.get("model_sha256") != about["model_sha256"] or lines.split("\n", 1)[0] != ",".join(columns):
        raise ValueError(f"{out} is not from this model, or not from here. Choose another file, or remove it.")
    return pd.read_csv(out, nrows=lines.count("\n"), keep_default_na=False, dtype={"file": str})


def _read_ahead(pool, todo, batch_size, side):
    """Yields batches of (name, what `_read` gives), while the next two are being read."""
    batches = (todo[start : start + batch_size] for start in range(0, len(todo), batch_size))
    ahead = deque()
    for batch in batches:
        ahead.append([(name, pool.submit(_read, path, side)) for name, path in batch])
        if len(ahead) > 2:
            yield [(name, future.result()) for name, future in ahead.popleft()]
    while ahead:
        yield [(name, future.result()) for name, future in ahead.popleft()]


_decode = tf.function(decode_film)  # traced once a side; threads do not wait for each other in a graph


def _read(path, side):
    """Returns a namespace with `film` (uint8), `notes` and `color`, or with the `reason` why it is none."""
    try:
        data, notes = load_film(path)
        film = _decode(tf.constant(data), side).numpy()
        return SimpleNamespace(film=film, notes=notes, color=measure_color(data), reason="")
    except tf.errors.InvalidArgumentError:  # the header is fine, what follows is not
        return SimpleNamespace(reason="damaged or cut short: its pixels cannot be decoded")
    except (FilmError, OSError) as error:
        return SimpleNamespace(reason=str(error) if isinstance(error, FilmError) else error.strerror or str(error))


def _predict(model, batch, sizes):
    names, films = zip(*batch, strict=True)
    squares = np.stack([film.film for film in films])
    answer = model.predict_pixels(squares)
    gate = check_films(squares, [film.color for film in films])
    classes = np.array(model.facts["class_names"])
    rows = {
        "file": names,
        "bytes": [sizes[name] for name in names],
        "findings": [" ".join(classes[above]) for above in answer["above_threshold"]],
        "warnings": [
            "; ".join([*film.notes, *(warning.reason for warning in found)])
            for film, found in zip(films, gate, strict=True)
        ],
    }
    rows |= {f"prob_{name}": answer["probabilities"][:, k].round(6) for k, name in enumerate(classes)}
    rows |= {
        f"threshold_{name}": round(value, 6) for name, value in zip(classes, model.facts["thresholds"], strict=True)
    }
    return pd.DataFrame(rows)
