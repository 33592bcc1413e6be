"""Checkpoint files: whole or missing, checked on reading, one writer, copies that outlive a dropped mount."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest

from helpers.training import CheckpointStore
from helpers.training.checkpoints import NEWEST, PREVIOUS

ARRAYS = {"a": np.arange(1000, dtype="float32"), "b": np.array([3], "uint32")}


def write(store, serial):
    store.write(ARRAYS | {"serial": np.array(serial)}, {"serial": serial})


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "state")
    yield store
    store.close()


def test_what_is_written_is_read_back_exactly(store):
    assert store.read() == (None, None)
    store.write(ARRAYS, {"serial": 1, "loss": 0.1 + 0.2, "none": None, "nan": float("inf")})
    arrays, meta = store.read()
    assert meta == {"serial": 1, "loss": 0.1 + 0.2, "none": None, "nan": float("inf")}
    assert {name: (array.dtype, array.tobytes()) for name, array in arrays.items()} == {
        name: (array.dtype, array.tobytes()) for name, array in ARRAYS.items()
    }


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [truncate, flip_a_bit, empty, os.unlink])
def test_the_checkpoint_before_is_used_where_the_newest_is_bad(store, spoil):
    write(store, 1)
    write(store, 2)
    spoil(store.folders[0] / NEWEST)
    with pytest.warns(UserWarning, match=r"state.bin is (damaged|missing)"):
        assert store.read()[1]["serial"] == 1
    write(store, 3)
    assert store.read()[1]["serial"] == 3


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_without_any_good_checkpoint_reading_is_refused(store):
    write(store, 1)
    write(store, 2)
    for name in (NEWEST, PREVIOUS):
        flip_a_bit(store.folders[0] / name)
    with pytest.raises(ValueError, match=r"Every checkpoint in .*START_OVER = True"):
        store.read()
    store.clear()
    assert store.read() == (None, None)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a file on a disk that is always full")
def test_a_full_disk_is_named_with_path_and_bytes_and_costs_no_checkpoint(store):
    write(store, 1)
    write(store, 2)
    (store.folders[0] / (NEWEST + ".part")).symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"state.bin cannot be written \(No space left.*takes [\d,]+ bytes") as error:
        write(store, 3)
    assert error.value.errno == errno.ENOSPC
    assert store.read()[1]["serial"] == 2
    write(store, 3)  # the failed attempt is gone, and with space again writing works
    assert store.read()[1]["serial"] == 3 and (store.folders[0] / PREVIOUS).exists()


def test_copies_take_over_where_the_machine_is_new(tmp_path):
    first = CheckpointStore(tmp_path / "drive", local=tmp_path / "disk")
    write(first, 1)
    write(first, 2)
    first.close()
    second = CheckpointStore(tmp_path / "drive", local=tmp_path / "another disk")
    assert second.read()[1]["serial"] == 2
    write(second, 3)
    assert second.folders[0].parent == tmp_path / "another disk" and len(second.folders) == 2
    assert (second.folders[0] / NEWEST).read_bytes() == (tmp_path / "drive" / NEWEST).read_bytes()
    second.close()


def test_a_dropped_mount_costs_a_warning_and_no_checkpoint(tmp_path):
    drive = tmp_path / "drive"
    store = CheckpointStore(drive, local=tmp_path / "disk")
    write(store, 1)
    drive.rename(tmp_path / "gone")
    drive.write_bytes(b"")  # what was a folder can no longer be entered
    with pytest.warns(UserWarning, match=r"drive.*cannot be written.*continues with the checkpoints in .*disk"):
        write(store, 2)
    drive.unlink()
    (tmp_path / "gone").rename(drive)
    assert store.read()[1]["serial"] == 2  # the local one is newer than the copy
    write(store, 3)
    store.close()
    again = CheckpointStore(drive)
    assert again.read()[1]["serial"] == 3
    again.close()


OPEN = """
import sys, types
sys.path.insert(0, "notebooks")
import helpers  # not helpers.training, whose import takes seconds for TensorFlow
sys.modules["helpers.training"] = package = types.ModuleType("helpers.training")
package.__path__ = [helpers.__path__[0] + "/training"]
from helpers.training.checkpoints import CheckpointStore
CheckpointStore(sys.argv[1])
print("open", flush=True)
sys.stdin.read()
"""


def open_elsewhere(folder, root):
    command = [sys.executable, "-c", OPEN, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, cwd=root)


def test_a_second_process_is_refused_until_the_first_ends(tmp_path, request):
    root = request.config.rootpath
    first = open_elsewhere(tmp_path / "run" / "state", root)
    assert first.stdout.readline() == "open\n"
    with pytest.raises(RuntimeError, match=rf"Another process \(process {first.pid} on .*\) trains in {tmp_path}/run"):
        CheckpointStore(tmp_path / "run" / "state")
    first.kill()  # the lock goes with the process
    first.wait()
    store = CheckpointStore(tmp_path / "run" / "state")
    assert CheckpointStore(tmp_path / "run" / "state").read() == (None, None)  # a cell that is run again
    second = open_elsewhere(tmp_path / "run" / "state", root)
    assert second.wait(60) == 1 and f"process {os.getpid()} on" in second.stderr.read()
    store.close()
    third = open_elsewhere(tmp_path / "run" / "state", root)
    assert third.communicate("")[0] == "open\n"


def test_a_second_writer_is_noticed_where_locks_are_unknown(store, tmp_path):
    """As on a Drive that two machines have mounted: what was written last is not what this process wrote."""
    write(store, 1)
    elsewhere = CheckpointStore(tmp_path / "elsewhere")
    write(elsewhere, 9)
    elsewhere.close()
    (store.folders[0] / NEWEST).write_bytes((tmp_path / "elsewhere" / NEWEST).read_bytes())
    with pytest.raises(RuntimeError, match="Another process writes to"):
        write(store, 2)
    assert store.read()[1]["serial"] == 9


def test_an_empty_mount_is_not_taken_for_a_new_run(tmp_path):
    """The folder that stays is empty, as with a Drive that is not mounted: the local one neither wins nor is lost."""
    store = CheckpointStore(tmp_path / "drive", local=tmp_path / "disk")
    write(store, 8)
    (tmp_path / "drive" / NEWEST).unlink()
    with pytest.raises(ValueError, match=r"drive holds no checkpoint, but .*disk.* holds one of the same run"):
        store.read()
    assert (store.folders[0] / NEWEST).exists()
    store.clear()
    assert store.read() == (None, None)
    store.close()


def test_a_local_checkpoint_of_an_earlier_run_does_not_replace_a_newer_run(tmp_path):
    """The second run was begun without the local folder, in which the first one's later checkpoint still lies."""
    first = CheckpointStore(tmp_path / "drive", local=tmp_path / "disk")
    first.write(ARRAYS, {"serial": 9, "run": "first"})
    first.close()
    second = CheckpointStore(tmp_path / "drive")
    second.clear()
    second.write(ARRAYS, {"serial": 1, "run": "second"})
    second.close()
    both = CheckpointStore(tmp_path / "drive", local=tmp_path / "disk")
    assert both.read()[1] == {"serial": 1, "run": "second"}
    both.close()


def test_the_newest_good_checkpoint_counts_wherever_it_is(tmp_path):
    """The Drive dropped out early, and the local newest is damaged: the local one before is newer than the Drive's."""
    store = CheckpointStore(tmp_path / "drive", local=tmp_path / "disk")
    write(store, 1)
    old = (tmp_path / "drive" / NEWEST).read_bytes()
    write(store, 2)
    write(store, 3)
    (tmp_path / "drive" / NEWEST).write_bytes(old)
    (tmp_path / "drive" / PREVIOUS).unlink()
    flip_a_bit(store.folders[0] / NEWEST)
    with pytest.warns(UserWarning, match="damaged"):
        assert store.read()[1]["serial"] == 2
    store.close()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_damaged_checkpoint_never_replaces_the_one_before(store):
    write(store, 1)
    write(store, 2)
    flip_a_bit(store.folders[0] / NEWEST)
    store.read()
    write(store, 3)
    flip_a_bit(store.folders[0] / NEWEST)
    assert store.read()[1]["serial"] == 1


def test_one_local_folder_serves_several_runs(tmp_path):
    first, second = (CheckpointStore(tmp_path / name, local=tmp_path / "disk") for name in ("a", "b"))
    write(first, 7)
    assert second.read() == (None, None)
    first.close()
    second.close()


def test_a_host_that_does_not_write_reads_what_the_other_wrote(store):
    write(store, 1)
    reader = CheckpointStore(store.folders[0], writes=False)
    write(reader, 2)
    assert reader.read()[1]["serial"] == 1
