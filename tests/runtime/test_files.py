"""Tests of runtime.files on a local disk: nothing half-written, and nothing of the cloud where there is none."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from threading import Timer

import pandas as pd
import pytest

from helpers.runtime.files import (
    as_path,
    copy_file,
    hash_file,
    is_remote,
    local_copy,
    local_draft,
    lock_folder,
    measure_file,
    note_files,
    read_csv,
    read_text,
    remove_folder,
    remove_unchanged,
    write_csv,
    write_text,
)
from helpers.runtime.settings import ROOT


def test_a_local_path_is_one_of_pathlib_and_is_read_where_it_lies(tmp_path):
    assert as_path(str(tmp_path)) == tmp_path and type(as_path("a")) is type(Path("a"))
    assert not is_remote(tmp_path) and not is_remote("data/gs:/b") and is_remote("gs://bucket/b")
    (tmp_path / "a").write_text("1")
    with local_copy(str(tmp_path / "a")) as file:
        assert file == tmp_path / "a"


def test_a_draft_keeps_the_ending_and_takes_the_place_of_the_file_at_the_end(tmp_path):
    path = tmp_path / "new" / "a.weights.h5"
    for content in (b"old", b"new"):
        with local_draft(path) as draft:
            assert draft.name.endswith(".weights.h5") and draft.parent == path.parent
            draft.write_bytes(content)
            assert path.exists() == (content == b"new") and (content == b"old" or path.read_bytes() == b"old")
        assert path.read_bytes() == content and [*path.parent.iterdir()] == [path]


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt), local_draft(tmp_path / "a") as draft:
        draft.write_text("half")
        raise KeyboardInterrupt
    assert read_text(tmp_path / "a") == "old" and [*tmp_path.iterdir()] == [tmp_path / "a"]


def test_text_keeps_its_line_ends_and_loses_its_mark(tmp_path):
    (tmp_path / "a").write_bytes("\ufeffa\r\nb\n".encode())
    assert read_text(tmp_path / "a") == "a\r\nb\n"
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "b")


def test_a_folder_is_for_one_or_for_all_who_share_it(tmp_path):
    folder = tmp_path / "new"
    with lock_folder(folder, "busy") as held:
        assert held and folder.is_dir()
        for shared in (False, True):
            with pytest.raises(RuntimeError, match="busy"), lock_folder(folder, "busy", shared=shared):
                pass
    with (
        lock_folder(folder, "busy", shared=True),
        lock_folder(folder, "busy", shared=True),
        pytest.raises(RuntimeError, match="busy"),
        lock_folder(folder, "busy"),
    ):
        pass
    assert list(folder.iterdir()) == []


def test_one_that_waits_says_so_and_goes_on_when_the_other_has_died(tmp_path):
    code = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT / "notebooks")!r})
from helpers.runtime.files import lock_folder
with lock_folder({str(tmp_path)!r}):
    print("held", flush=True)
    time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    Timer(0.3, other.kill).start()
    with pytest.warns(UserWarning, match="waits"), lock_folder(tmp_path, "waits", wait=True) as held:
        assert held and other.wait() < 0


def test_tables_are_as_pandas_writes_and_reads_them(tmp_path):
    table = pd.DataFrame({"run": ["007", "ä"], "auc": [0.1 + 0.2, float("nan")]})
    write_csv(tmp_path / "a.csv", table, index=False)
    table.to_csv(tmp_path / "b.csv", index=False)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    pd.testing.assert_frame_equal(read_csv(tmp_path / "a.csv", dtype={"run": str}), table)


def test_files_are_copied_measured_hashed_and_removed(tmp_path):
    content = bytes(range(256)) * 10_000  # more than one block
    (tmp_path / "a").write_bytes(content)
    copy_file(tmp_path / "a", tmp_path / "folder" / "b")
    assert (tmp_path / "folder" / "b").read_bytes() == content
    assert measure_file(tmp_path / "a") == len(content)
    assert hash_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    remove_folder(tmp_path / "folder")
    remove_folder(tmp_path / "folder")
    assert [*tmp_path.iterdir()] == [tmp_path / "a"]


def test_only_what_was_not_written_again_is_removed(tmp_path):
    old, same, new, missing = (tmp_path / name for name in ("old", "same", "new", "missing"))
    for path in (old, same):
        write_text(path, "1")
        os.utime(path, (1e9, 1e9))
    noted = note_files([old, same, missing])
    for path in (same, new, missing):
        write_text(path, "1")
    remove_unchanged(noted)
    remove_unchanged(noted)
    assert {*tmp_path.iterdir()} == {same, new, missing}


@pytest.mark.slow
def test_local_paths_and_names_in_a_bucket_load_no_tensorflow(phantom_dir):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "notebooks")!r})
from helpers.runtime import resolve_path
from helpers.study import load_metadata
load_metadata({str(phantom_dir)!r})
assert "etils" not in sys.modules
assert str(resolve_path("gs://bucket/run") / "a") == "gs://bucket/run/a"
assert "tensorflow" not in sys.modules and "keras" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
