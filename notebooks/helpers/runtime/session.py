"""Runs all notebooks in one session, for notebook 00: each in a process of its own, with its figures as they come.

`scripts/run_notebooks.py` executes each notebook, as for `make run`. This process never holds the TPU, which belongs to
one process at a time.
"""

import contextlib
import os
import shutil
import sys
import time
from pathlib import Path

from .files import copy_file, write_text
from .packages import find_version, install
from .progress import TrainingClock, describe_left, follow
from .settings import ROOT, SETTINGS, check_setting, read_json, resolve_path, write_json
from .shared import ATTACHED, PLACES, SHARED, find_attached_packed, hours_left, restore_attached

NOTEBOOKS = (
    *("01_prepare_data", "02_train_densenet121", "03_evaluate", "04_explain", "05_export_and_predict"),
    "06_xvision_vgg16_nodules",
)
PREPARE, TRAIN, *_, LAST = NOTEBOOKS
SOURCES = {  # what notebook 00 offers: settings of notebook 1, images in all
    "synthetic": ({"DATA_DIR": "data/phantom"}, 4_000),
    "ChestMNIST": ({"DATA_DIR": "data/chestmnist", "FETCH": "chestmnist"}, 112_120),
    "one NIH archive": ({"DATA_DIR": "data/nih-archive-1", "FETCH": "nih_box", "ARCHIVES": "1"}, 4_999),
    "attached": ({"DATA_DIR": "data/attached", "FETCH": "kaggle"}, 112_120),
    "all of NIH": ({"DATA_DIR": "data/nih", "FETCH": "nih_box"}, 112_120),
}
IMAGE_BYTES = {"quick": 88**2, "full": 256**2, "best": 608**2 // 2}  # of a packed image
RUN_BYTES = 600_000_000  # of everything else in a run's folder, see models/README.md
RESERVE_HOURS = 0.5  # for the notebooks after the training
KAGGLE_BYTES = 20_000_000_000  # that Kaggle keeps of /kaggle/working
REMEDY = {
    "this machine": "Free some space, or choose another profile.",
    "Drive": "On Colab, run the cell that mounts Drive again and allow the access to Drive. If Drive is full, delete "
    "something at https://drive.google.com/settings/storage and empty its bin. Then run all cells again.",
    "Kaggle output": "On Kaggle, choose a smaller profile or fewer images, or delete what else /kaggle/working holds; "
    "elsewhere choose KEEP_IN = “this machine”.",
}
UNFINISHED = "No epoch of the whole network is finished yet"  # as notebook 2 says
FREE = ("TIME_BUDGET", "VERBOSE", "RUN_DIR", "PACKED_DIR")  # a notebook that was run with others is done all the same


class Session:
    """The six notebooks on one study, in one run folder that later sessions find again.

    Args:
        source: one of `SOURCES`.
        profile: "quick", "full" or "best".
        keep_in: one of `PLACES`, where the run's folder and the packed images stay.
        hours: hours that the session has left; 0 for what Kaggle's limit leaves, elsewhere no limit.
        more: settings of the notebooks as in `make run SET="EPOCHS=3"`, with spaces between them.
        runtime: name of the runtime that was chosen, for all notebooks.
        places: dict like `PLACES`.
        attached: folder below which the output of earlier sessions is attached.

    Attributes:
        run_dir: path of the run's folder.
        settings: dict of the notebooks' settings.
        stop_at: time, as of `time.time()`, at which the session ends; None without a limit.

    Raises:
        FileNotFoundError: there is no such place on this machine, or nothing is attached.
        OSError: the place has too little space, or cannot be written.
    """

    def __init__(self, source, profile, keep_in, hours=0.0, more="", runtime="auto", places=PLACES, attached=ATTACHED):
        place, name = Path(places[keep_in]), f"{source.replace(' ', '-').lower()}-{profile}"
        chosen, n_images = SOURCES[source]
        self._keep_in, self._attached = keep_in, str(attached)
        if not os.path.isdir(place.parent):  # nor where a mount does not answer
            raise FileNotFoundError(f"KEEP_IN = “{keep_in}”: there is no {place.parent} here. {REMEDY[keep_in]}")
        self.run_dir, self.kept = place / name, place / "packed" / name
        with self._explain_errors():
            write_text(place / "write-test", "")
            (place / "write-test").unlink(missing_ok=True)
            if not self.run_dir.exists():
                restore_attached(place, attached, name)
        packed = self.kept
        if keep_in == "Drive":  # slow to read from in every epoch
            packed = ROOT / "data" / "packed" / name
        elif not (packed / "manifest.json").exists() and (found := find_attached_packed(name, attached)):
            packed = Path(found)
        self._check_space(keep_in, n_images * IMAGE_BYTES[profile], packed)
        self.settings = SHARED | chosen | {"PROFILE": profile, "RUN_DIR": str(self.run_dir), "PACKED_DIR": str(packed)}
        if keep_in == "Kaggle output" and source != "synthetic":  # not to be kept; notebook 1 draws data/phantom only
            self.settings["DATA_DIR"] = f"/kaggle/tmp/{Path(chosen['DATA_DIR']).name}"
        self.settings |= _parse_settings(more)
        hours = hours or (left + RESERVE_HOURS if (left := hours_left()) else 0)
        self.stop_at = time.time() + 3600 * hours if hours else None
        self.runtime = runtime
        self._record = self.run_dir / "session.json"
        self._clock = self._seconds = None
        if source == "attached" and self.settings["FETCH"] == "kaggle" and not self._is_done(PREPARE):
            _check_attached(attached)

    @contextlib.contextmanager
    def _explain_errors(self):
        """Says what to do where the place for the results cannot be written."""
        try:
            yield
        except OSError as error:
            text = f"{self.run_dir.parent} cannot be written ({error.strerror or error}). {REMEDY[self._keep_in]}"
            raise OSError(error.errno, text) from error

    def _check_space(self, keep_in, image_bytes, packed):
        if (packed / "manifest.json").exists():
            return
        place = self.run_dir.parent
        free = shutil.disk_usage(place).free
        if keep_in == "Kaggle output":
            free = min(free, max(0, KAGGLE_BYTES - _measure(place.parent)))
        if free < image_bytes + RUN_BYTES:
            raise OSError(
                f"{place} has {free / 1e9:.1f} GB free, and packed images and results take about "
                f"{(image_bytes + RUN_BYTES) / 1e9:.1f}. {REMEDY[keep_in]}"
            )

    def list_states(self):
        """Returns a dict notebook -> "done", "to resume" or "to do", in their order, and the seconds that it took."""
        states, is_current = {}, True
        for name in NOTEBOOKS:
            is_current = is_current and self._is_done(name)
            begun = name == TRAIN and (self.run_dir / "state" / "state.bin").exists()
            state = "done" if is_current else "to resume" if begun else "to do"
            states[name] = state, self._read_record().get(name, {}).get("seconds")
        return states

    def _is_done(self, name):
        if not self._find_last(name).get("done"):
            return False
        if name == PREPARE:
            return any((Path(place) / "manifest.json").exists() for place in (self.settings["PACKED_DIR"], self.kept))
        return name != TRAIN or not self.find_pause()

    def _find_last(self, name):
        """Returns what is recorded of a notebook's last execution with the same settings, {} for none."""
        last = self._read_record().get(name, {})
        shared = {name: value for name, value in SHARED.items() if name not in FREE}
        # A setting that an earlier version did not have was the default.
        is_same = bool(last) and shared | last.get("settings", {}) == self._list_fixed()
        return {"done": True} | last if is_same else {}

    def _has_begun_anew(self):
        """Returns whether training with these settings has written a checkpoint since it was first started."""
        state, last = self.run_dir / "state" / "state.bin", self._find_last(TRAIN)
        return state.exists() and state.stat().st_mtime > last.get("began", float("inf"))

    def _list_fixed(self):
        return {name: value for name, value in self.settings.items() if name not in FREE}

    def _read_record(self):
        return read_json(self._record) if self._record.exists() else {}

    def find_pause(self):
        """Returns why training stopped before its end; "" where it did not, or has not begun."""
        if self.has_model():
            return read_json(self.run_dir / "run.json").get("pause", "")
        return "Training has not finished an epoch yet." if (self.run_dir / "state" / "state.bin").exists() else ""

    def has_model(self):
        """Returns whether there is a model, of the whole training or of a part of it."""
        return (self.run_dir / "run.json").exists()

    def must_wait(self, name):
        """Returns whether a notebook waits for the end of the training: the second study, and all without a model."""
        return name not in (PREPARE, TRAIN) and bool(self.find_pause()) and (name == LAST or not self.has_model())

    def count_hours(self):
        """Returns the hours that are left; None without a limit."""
        return None if self.stop_at is None else (self.stop_at - time.time()) / 3600

    def run(self, name):
        """Executes a notebook, or resumes it; ends early only if the notebook does.

        Args:
            name: one of `NOTEBOOKS`.

        Yields:
            Tuple (seconds since the start, the last line that the notebook printed, list of its new figures as bytes of
            PNG), about every second.

        Raises:
            RuntimeError: the notebook failed; says in which cell and why.
            OSError: the place for the results cannot be written.
        """
        if not find_version("papermill"):
            install(["papermill>=2.6", "ipykernel>=6.29"])
        settings, packed = dict(self.settings), resolve_path(self.settings["PACKED_DIR"])
        if name == TRAIN and self.stop_at:
            left = self.count_hours()
            settings["TIME_BUDGET"] = round(max(0.01, left - min(RESERVE_HOURS, 0.25 * left)), 3)  # the rest: 03 to 05
        if name == TRAIN and self._has_begun_anew():
            settings.pop("START_OVER", None)  # or it would delete at each start what the last one has trained
        record, later = self._read_record(), NOTEBOOKS[NOTEBOOKS.index(name) :]  # these will be of other results
        record |= {key: record[key] | {"done": False} for key in later if key in record}
        last = self._find_last(name)  # what other settings took says nothing of these
        self._seconds = last.get("seconds")
        record[name] = {"began": time.time()} | last | {"settings": self._list_fixed(), "done": False}
        self._clock = TrainingClock(self.run_dir / "history.csv", name, settings) if name == TRAIN else None
        with self._explain_errors():
            write_json(self._record, record)
            # Notebook 1 refuses other images in its folder; and what is complete there is what was asked for.
            is_missing = packed != self.kept and not (packed / "manifest.json").exists()
            if name != PREPARE and is_missing and (self.kept / "manifest.json").exists():
                copy_packed(self.kept, packed)
        started = time.monotonic()
        try:
            yield from follow(self._command(name, settings), self.run_dir / "executed" / name, self.runtime)
        except RuntimeError as error:
            if name == TRAIN and UNFINISHED in str(error):  # the time ran out before there was a model
                return
            if "OSError: " in str(error):
                raise RuntimeError(f"{error}\n{REMEDY[self._keep_in]}") from None
            raise
        done = {"settings": self._list_fixed(), "seconds": round(time.monotonic() - started), "done": True}
        with self._explain_errors():
            if name == PREPARE and packed != self.kept and not str(packed).startswith(self._attached):
                copy_packed(packed, self.kept)
            write_json(self._record, record | {name: record[name] | done})

    def describe_time_left(self, seconds):
        """Estimates how long the notebook that runs still takes.

        Training by its own epochs, as far as they ended in this session; others by their last time with these settings.

        Args:
            seconds: since its start.

        Returns:
            str, such as "about 3 min left" or "time left unknown".
        """
        if self._clock is None:
            left = (self._seconds or 0.0) - seconds
        else:
            left = self._clock.estimate() or 0.0
            left = min(left, self.stop_at - time.time()) if self.stop_at else left
        return describe_left(left if left > 0 else None)

    def _command(self, name, settings):
        given = {"--data-dir": settings.pop("DATA_DIR"), "--run-dir": settings.pop("RUN_DIR")}
        given["--profile"] = settings.pop("PROFILE")
        command = [sys.executable, str(ROOT / "scripts" / "run_notebooks.py"), "--only", name, "--end-with-parent"]
        command += [word for pair in given.items() for word in pair]
        return [*command, "--set", *(f"{name}={value}" for name, value in settings.items())]


def _parse_settings(text):
    """Returns the settings in a text such as "EPOCHS=3 SEED=1"; raises ValueError, before anything is touched."""
    settings = {}
    for pair in text.split():
        name, equals, value = pair.partition("=")
        if name in ("RUN_DIR", "PROFILE"):
            raise ValueError(f"SET holds {name}, which the form's own fields decide: leave it out of SET.")
        if not equals or name not in SETTINGS:
            raise ValueError(f"SET holds {pair!r}, which is no NAME=VALUE of a setting of the six notebooks.")
        check_setting(name, value)
        settings[name] = value
    return settings


def copy_packed(source, target):
    """Copies a packed study, the manifest last, without the files that are there with the same size.

    Another study in the target is deleted first: its shards may have the same sizes.
    """
    manifests = [Path(folder) / "manifest.json" for folder in (source, target)]
    if manifests[1].exists() and manifests[1].read_bytes() != manifests[0].read_bytes():
        shutil.rmtree(target)
    files = sorted(
        (path for path in Path(source).rglob("*") if path.is_file()), key=lambda p: p.name == "manifest.json"
    )
    for path in files:
        copy = Path(target) / path.relative_to(source)
        if path.name == "manifest.json" or not copy.exists() or copy.stat().st_size != path.stat().st_size:
            copy_file(path, copy)


def _check_attached(attached):
    if not os.path.isdir(attached) or not os.listdir(attached):
        raise FileNotFoundError(
            f"DATA = “attached”, but nothing is attached in {attached}. On Kaggle, attach nih-chest-xrays/data by “Add "
            "Input”, then run all cells again; elsewhere choose another DATA, such as “one NIH archive”."
        )


def _measure(folder):
    """Returns the bytes of all files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
