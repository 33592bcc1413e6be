"""A folder of images into one CSV: every kind of file, what cannot be read, what is interrupted, strange names."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from made_images import encode, make_png

from helpers.export import ExportedModel, predict_folder
from helpers.export.folder import _escape, list_files
from helpers.packing import load_image
from helpers.study import draw_image

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))
pytestmark = pytest.mark.slow
IMAGES = [draw_image(seed, size=96)[0] for seed in range(6)]


def read(path):
    return pd.read_csv(path, keep_default_na=False, dtype={"file": str})


def write(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def dicom(image, **elements):
    pytest.importorskip("pydicom", reason="needs pydicom, see requirements.txt")
    from made_dicom import make_dicom

    return make_dicom(image, **elements)


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Model:
    """A model that counts the images it predicts and may break down at a later batch, or call a function first."""

    def __init__(self, model, *, fails_at=None, before=None):
        self.model, self.facts, self.folder, self.fails_at = model, model.facts, model.folder, fails_at
        self.sizes, self.before = [], before

    def predict_pixels(self, pixels):
        if len(self.sizes) == self.fails_at:
            raise RuntimeError("out of memory")
        if self.before:
            self.before(len(self.sizes))
        self.sizes.append(len(pixels))
        return self.model.predict_pixels(pixels)


@pytest.fixture
def ten(tmp_path):
    """A folder of ten images."""
    return write(tmp_path / "ten", {f"{k}.png": encode(np.roll(IMAGES[k % 6], k, 1)) for k in range(10)})


def assert_same_rows(out, undisturbed):
    one, other = (read(path).sort_values("file", ignore_index=True) for path in (out, undisturbed))
    pd.testing.assert_frame_equal(one, other, rtol=0, atol=2e-6)  # batches of other sizes round differently
    assert one["file"].is_unique and len(out.read_text().splitlines()) == len(one) + 1


# Images


def test_rows_say_what_the_model_says_of_each_file(tiny_model, tmp_path):
    files = {
        "gray.png": encode(IMAGES[0]),
        "UPPER.PNG": encode(IMAGES[1]),
        "a/image.jpg": encode(IMAGES[2], "JPEG"),
        "a/image.jpeg": encode(IMAGES[2][:, 8:], "JPEG"),
        "a/b c/deep.png": encode(IMAGES[3].astype(np.uint16) * 257),
        "a/b c/rgb.png": encode(np.stack([IMAGES[4]] * 3, -1)),
    }
    files |= {f"other/image{ending}": encode(IMAGES[5]) for ending in (".IMA", ".dic", ".v2", ".png~", ".png.part")}
    others = {
        "notes.txt": b"Dear",
        "labels.csv": b"a,b",
        ".DS_Store": b"x",
        "a.zip": b"PK\3\4",
        "b.png.gz": b"\x1f\x8b\0",
    }
    others |= {"c.heic": b"\0\0\0\x18ftypheic", ".hidden/image.png": encode(IMAGES[0])}
    out = tmp_path / "new" / "out.csv"
    done = predict_folder(tiny_model, write(tmp_path / "images", files | others), out, batch_size=4)
    assert (done.images, done.predicted, done.earlier) == (18, 11, 0)
    unread = dict(done.unreadable.to_numpy().tolist())
    assert {name if name != ".hidden" else ".hidden/image.png" for name in unread} == set(others)
    assert "hidden folder, which is not entered; rename it" in unread[".hidden"]
    assert "a zip archive; unpack it" in unread["a.zip"] and "a gzip archive; unpack it" in unread["b.png.gz"]
    assert "if it is an image, save it as PNG" in unread["c.heic"]
    rows = read(out)
    assert list(rows["file"]) == sorted(files)
    names = tiny_model.facts["class_names"]
    assert list(rows) == ["file", "bytes", "modified", "findings", "warnings"] + [
        f"{kind}_{name}" for kind in ("prob", "threshold") for name in names
    ]
    for row in rows.to_dict("records"):
        expected = tiny_model.predict([files[row["file"]]])
        probs = [row[f"prob_{name}"] for name in names]
        np.testing.assert_allclose(probs, expected["probabilities"][0], rtol=0, atol=2e-6)
        above = np.array(names)[expected["above_threshold"][0]]
        assert list(filter(None, row["findings"].split("|"))) == list(above)
        assert row["bytes"] == len(files[row["file"]])
        thresholds = [row[f"threshold_{name}"] for name in names]
        np.testing.assert_allclose(thresholds, tiny_model.facts["thresholds"], rtol=0, atol=1e-6)
    assert rows["prob_Edema"].nunique() == 7
    about = json.loads((out.parent / "out_model.json").read_text())
    assert about["notice"] == tiny_model.facts["notice"]


def test_dicom_is_read_by_any_name_and_names_nobody(tiny_model, tmp_path):
    data = dicom(IMAGES[0], PatientName="Zebulon^Quagmire", PatientID="PID-7741903", PhotometricInterpretation=None)
    names = {"PatientName": "Zebulon^Quagmire", "PatientID": "PID-7741903", "StudyDescription": "Quagmire followup"}
    files = {
        "image.dcm": dicom(IMAGES[0], **names),
        "series/IM0001": dicom(IMAGES[1], **names),
        "series/1.2.840.113619.2.55": dicom(IMAGES[2], **names),
        "lateral.DCM": dicom(IMAGES[3], ViewPosition="LL", **names),
        "broken.dcm": data,
    }
    out = tmp_path / "out" / "images.csv"
    done = predict_folder(tiny_model, write(tmp_path / "images", files), out)
    rows = read(out).set_index("file")
    assert list(done.unreadable["file"]) == ["broken.dcm"]
    assert set(rows.index) == set(files) - {"broken.dcm"}
    for name, row in rows.iterrows():
        expected = tiny_model.predict([load_image(files[name])[0]])["probabilities"][0]
        np.testing.assert_allclose(row.filter(like="prob_").astype(float), expected, rtol=0, atol=2e-6)
    assert "the view is LL" in rows.loc["lateral.DCM", "warnings"]
    written = b"".join(snapshot(out.parent).values())
    assert not re.search(b"zebulon|quagmire|7741903", written, re.IGNORECASE)


def test_linked_folders_are_followed_and_never_in_circles(tmp_path):
    image = encode(IMAGES[0])
    elsewhere = write(tmp_path / "elsewhere", {"images/b.png": image, "c.png": image})
    folder = write(tmp_path / "images", {"images_001/a.png": image})
    (folder / "images_002").symlink_to(elsewhere / "images")  # as a fetch from Kaggle's mount makes them
    (folder / "c.png").symlink_to(elsewhere / "c.png")
    (elsewhere / "images" / "back").symlink_to(folder)
    (folder / "images_001" / "root").symlink_to("/")
    names = [name for name, _ in list_files(folder)]
    assert names == ["c.png", "images_001/a.png", "images_001/root", "images_002/b.png", "images_002/back"]
    (tmp_path / "link").symlink_to(elsewhere / "images")
    assert list_files(tmp_path / "link")[0][0] == "b.png"


def test_what_is_written_into_the_folder_is_not_read(tiny_model, ten):
    for _ in range(2):
        done = predict_folder(tiny_model, ten, ten / "out.csv")
        assert (done.images, len(done.unreadable)) == (10, 0)


def test_an_image_of_fewer_bits_is_scaled_noted_and_warned_of(tiny_model, tmp_path):
    files = {"12 bits.png": encode(IMAGES[0].astype(np.uint16) * 16), "8 bits.png": encode(IMAGES[0] // 4)}
    done = predict_folder(
        tiny_model, write(tmp_path / "images", files | {"good.png": encode(IMAGES[0])}), tmp_path / "o"
    )
    rows = read(done.out).set_index("file")
    assert rows.loc["12 bits.png", "warnings"] == "of the 16 bits of a pixel only 12 are used: scaled by these"
    assert "leaves gray levels unused" in rows.loc["8 bits.png", "warnings"]
    probs = rows.filter(like="prob_").astype(float)
    np.testing.assert_allclose(probs.loc["12 bits.png"], probs.loc["good.png"], atol=0.01)


def test_an_inverted_image_is_warned_of_and_predicted_all_the_same(tiny_model, tmp_path):
    clear, inverted = draw_image(3, size=128)[0], 255 - draw_image(3, size=128)[0]
    folder = write(tmp_path / "images", {"clear.png": encode(clear), "inverted.png": encode(inverted)})
    done = predict_folder(tiny_model, folder, tmp_path / "out.csv")
    rows = read(done.out).set_index("file")
    assert rows.loc["clear.png", "warnings"] == ""
    assert "looks inverted" in rows.loc["inverted.png", "warnings"]
    assert rows.loc["inverted.png", "prob_Edema"] > 0
    assert done.warned.values.tolist() == [["inverted.png", rows.loc["inverted.png", "warnings"]]]


def test_one_image_is_a_folder_of_one(tiny_model, ten):
    done = predict_folder(tiny_model, ten / "3.png", ten / "out.csv")
    assert list(read(done.out)["file"]) == ["3.png"]


def test_progress_counts_every_file(tiny_model, ten, tmp_path):
    calls = []

    def progress(total, initial, unit):
        calls.append((total, initial, unit))
        return SimpleNamespace(update=calls.append, close=lambda: calls.append("closed"))

    (ten / "bad.png").write_bytes(b"no image")
    predict_folder(tiny_model, ten, tmp_path / "out.csv", batch_size=4, progress=progress)
    assert calls == [(11, 0, "image"), 4, 4, 3, "closed"]
    predict_folder(tiny_model, ten, tmp_path / "out.csv", batch_size=4, progress=progress)
    assert calls[5:] == [(11, 10, "image"), 1, "closed"]


# What cannot be read


def test_what_cannot_be_read_is_listed_and_the_rest_done(tiny_model, tmp_path, monkeypatch):
    image = encode(IMAGES[0])
    bad = {
        "cut.png": (image[:2000], "cut short"),
        "cut.jpg": (encode(IMAGES[0], "JPEG")[:800], "cut short"),
        "text.png": (b"Dear colleague, the image is attached.", "neither PNG nor JPEG"),
        "empty.jpg": (b"", "empty file"),
        "bomb.png": (make_png(20_000, 20_000), "declares"),
        "header.png": (image[:20], "broken header"),
        "tiny.png": (encode(IMAGES[0][:8, :8]), "a side is below 16"),
        "scan.tif": (encode(IMAGES[0], "TIFF"), "neither PNG nor JPEG"),
        "README": (b"no image", "neither PNG nor JPEG"),
        "image.dcm": (bytes(128) + b"DICM", "needs pydicom: pip install"),
    }
    monkeypatch.setitem(sys.modules, "pydicom", None)
    folder = write(tmp_path / "images", {name: data for name, (data, _) in bad.items()} | {"z.png": image})
    write(folder, {"folder.png/inside.png": image})
    reasons_of_links = {"folder.png/up": "a link to a folder that it lies in"}
    (folder / "folder.png" / "up").symlink_to(folder)
    (folder / "link.png").symlink_to(folder / "gone.png")
    reasons = {name: reason for name, (_, reason) in bad.items()}
    reasons |= {"link.png": "No such file"} | reasons_of_links
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.png")
        reasons["pipe.png"] = "a pipe"
    done = predict_folder(tiny_model, folder, tmp_path / "out.csv", batch_size=3)
    assert set(read(done.out)["file"]) == {"z.png", "folder.png/inside.png"}
    listed = read(done.unreadable_csv)
    pd.testing.assert_frame_equal(listed, done.unreadable)
    assert set(listed["file"]) == set(reasons)
    for row in listed.itertuples():
        assert reasons[row.file] in row.reason
        assert str(tmp_path) not in row.reason
    assert (done.images, done.predicted) == (len(reasons) + 2, 2)

    for name in reasons:  # repaired
        (folder / name).unlink()
    done = predict_folder(tiny_model, folder, tmp_path / "out.csv")
    assert done.unreadable_csv is None
    assert not (tmp_path / "out_unreadable.csv").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_listed(tiny_model, ten, tmp_path):
    write(ten, {"locked/1.png": b""})
    (ten / "3.png").chmod(0)
    (ten / "locked").chmod(0)
    try:
        done = predict_folder(tiny_model, ten, tmp_path / "out.csv")
    finally:
        (ten / "locked").chmod(0o700)
    assert done.unreadable.values.tolist() == [["3.png", "Permission denied"], ["locked", "Permission denied"]]
    assert done.predicted == 9


def test_a_file_that_breaks_its_reader_does_not_end_the_rest(tiny_model, ten, tmp_path, monkeypatch):
    def read_image(path):
        if path.name == "4.png":
            raise RuntimeError("Zebulon^Quagmire")
        return load_image(path)

    monkeypatch.setattr("helpers.export.folder.load_image", read_image)
    done = predict_folder(tiny_model, ten, tmp_path / "out.csv")
    assert done.unreadable.values.tolist() == [["4.png", "cannot be read (RuntimeError)"]]
    assert done.predicted == 9


def test_nothing_readable_is_no_error(tiny_model, tmp_path):
    done = predict_folder(tiny_model, write(tmp_path / "images", {"a.png": b"x", "b.png": b""}), tmp_path / "out.csv")
    assert (done.predicted, len(done.unreadable), len(read(done.out))) == (0, 2, 0)


# Resuming


@pytest.fixture
def undisturbed(tiny_model, ten, tmp_path):
    return predict_folder(tiny_model, ten, tmp_path / "undisturbed.csv", batch_size=3).out


def test_an_interrupted_run_continues_where_it_was(tiny_model, ten, tmp_path, undisturbed):
    out = tmp_path / "out.csv"
    with pytest.raises(RuntimeError, match="out of memory"):
        predict_folder(Model(tiny_model, fails_at=1), ten, out, batch_size=3)
    assert len(read(out)) == 3
    rest = Model(tiny_model)
    done = predict_folder(rest, ten, out, batch_size=3)
    assert (done.predicted, done.earlier, sum(rest.sizes)) == (7, 3, 7)
    assert_same_rows(out, undisturbed)
    again = Model(tiny_model)
    assert predict_folder(again, ten, out).earlier == 10
    assert again.sizes == []
    assert_same_rows(out, undisturbed)


def test_a_killed_process_continues_where_it_was(tiny_model, ten, tmp_path, undisturbed):
    """What is on the disk before the third batch is all that a process leaves that is killed there."""
    out, left = tmp_path / "out.csv", tmp_path / "left.csv"
    killed = Model(tiny_model, before=lambda batch: batch == 2 and shutil.copyfile(out, left))
    predict_folder(killed, ten, out, batch_size=3)
    left.replace(out)
    rest = Model(tiny_model)
    done = predict_folder(rest, ten, out, batch_size=3)
    assert (done.earlier, sum(rest.sizes)) == (6, 4)
    assert_same_rows(out, undisturbed)


@pytest.mark.filterwarnings("ignore:Another process predicts")
def test_of_two_at_once_one_waits_and_no_row_is_lost_or_twice(tiny_model, ten, tmp_path, undisturbed):
    out, models = tmp_path / "out.csv", [Model(tiny_model), Model(tiny_model)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda model: predict_folder(model, ten, out, batch_size=3), models))
    assert sorted(sum(model.sizes) for model in models) == [0, 10]
    assert_same_rows(out, undisturbed)


@pytest.mark.parametrize("kept", [1, 200, -1, -2, -150])
def test_a_line_cut_short_is_predicted_again(tiny_model, ten, tmp_path, undisturbed, kept):
    out = tmp_path / "undisturbed.csv"
    whole = out.read_bytes()
    (tmp_path / "whole.csv").write_bytes(whole)
    header = whole.index(b"\n") + 1
    out.write_bytes(whole[: kept if kept < 0 else header + kept])
    lines = out.read_bytes().count(b"\n") - 1
    model = Model(tiny_model)
    assert predict_folder(model, ten, out).earlier == lines
    assert sum(model.sizes) == 10 - lines
    assert_same_rows(out, tmp_path / "whole.csv")


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_changed_image_is_predicted_anew(tiny_model, ten, tmp_path, undisturbed, change):
    before = read(undisturbed).set_index("file")
    path = ten / "4.png"
    if change == "size":
        path.write_bytes(encode(IMAGES[0][::-1]))
    else:
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    model = Model(tiny_model)
    predict_folder(model, ten, undisturbed)
    after = read(undisturbed).set_index("file")
    assert model.sizes == [1]
    assert after.index.is_unique
    assert set(after.index) == set(before.index)
    others = before.index.drop("4.png")
    pd.testing.assert_frame_equal(after.loc[others], before.loc[others])
    assert (after.loc["4.png", "prob_Edema"] != before.loc["4.png", "prob_Edema"]) == (change == "size")


def test_new_images_are_added(tiny_model, ten, undisturbed):
    before = undisturbed.read_bytes()
    (ten / "new.png").write_bytes(encode(IMAGES[2]))
    (ten / "0.png").unlink()
    done = predict_folder(tiny_model, ten, undisturbed)
    assert (done.images, done.predicted, done.earlier) == (10, 1, 9)
    assert undisturbed.read_bytes().startswith(before)


def test_a_csv_of_another_model_folder_or_origin_is_refused_and_kept(tiny_model, ten, tmp_path, undisturbed):
    out = tmp_path / "undisturbed.csv"
    other = Model(tiny_model)
    other.folder = write(tmp_path / "other", {"saved_model.pb": b"another"})
    note = tmp_path / "undisturbed_model.json"
    cases = [
        (other, ten, {}),
        (tiny_model, write(tmp_path / "elsewhere", {"0.png": encode(IMAGES[0])}), {}),
        (tiny_model, ten, {out: b"name,age\nx,3\n"}),
        (tiny_model, ten, {out: b""}),
        (tiny_model, ten, {out: b"\xff\xfe\x00nothing"}),
        (tiny_model, ten, {note: b"{"}),
        (tiny_model, ten, {note: b"[]"}),
        (tiny_model, ten, {note: None}),
    ]
    good = {path: path.read_bytes() for path in (out, note)}
    for model, images, changed in cases:
        for path, data in (good | changed).items():
            path.unlink() if data is None else path.write_bytes(data)
        before = {path: path.read_bytes() for path in (out, note) if path.exists()}
        with pytest.raises(ValueError, match=r"undisturbed.csv is not a CSV of this model and this folder. Choose"):
            predict_folder(model, images, out)
        assert {path: path.read_bytes() for path in (out, note) if path.exists()} == before


# Names


def test_names_that_are_no_plain_text_do_not_break_the_csv(tiny_model, tmp_path):
    names = ['a, "b".png', "ö ü 肺.png", "=1+1.png", " .png", "'.png", "NA", "007", "a\\nb.png"]
    if os.name == "posix":
        names += ["a\nb.png", "a\r\nb.png", "tab\t.png", "\x1b[31m.png", os.fsdecode(b"raw\xff.png"), "d\ne/image.png"]
    folder = tmp_path / "images"
    try:
        write(folder, {name: encode(np.roll(IMAGES[k % 6], k, 0)) for k, name in enumerate(names)})
    except OSError as error:
        pytest.skip(f"this disk takes no such names: {error}")
    listed = list_files(folder)
    assert len({name for name, _ in listed}) == len(names)
    assert {path.relative_to(folder).as_posix() for _, path in listed} == set(names)
    whole, out = tmp_path / "whole.csv", tmp_path / "out.csv"
    predict_folder(tiny_model, folder, whole, batch_size=2)
    assert len(whole.read_text().splitlines()) == len(names) + 1
    with pytest.raises(RuntimeError):
        predict_folder(Model(tiny_model, fails_at=3), folder, out, batch_size=2)
    rest = Model(tiny_model)
    done = predict_folder(rest, folder, out, batch_size=2)
    assert (done.earlier, sum(rest.sizes)) == (6, len(names) - 6)
    assert_same_rows(out, whole)
    assert list(read(whole)["file"]) == [name for name, _ in listed]

    write(folder, dict.fromkeys(names, b""))
    bad = predict_folder(tiny_model, folder, tmp_path / "bad.csv")
    assert list(read(bad.unreadable_csv)["file"]) == [name for name, _ in listed]


def test_escaped_names_stay_apart_and_can_be_undone():
    names = ["a\nb", "a\\nb", "a\\\nb", "a\\\\nb", "肺\n", "\udcff", "\\udcff", "ÿ"]
    escaped = [_escape(name) for name in names]
    assert len(set(escaped)) == len(names)
    undone = [name.encode().decode("unicode_escape") if "\\" in name else name for name in escaped]
    assert undone == names


# The command


@pytest.fixture
def command(monkeypatch, tiny_model):
    """The command, run in this process; returns what it exits with."""
    monkeypatch.syspath_prepend(ROOT / "scripts")  # a benchmark is called predict too
    import predict

    def open_once(folder):
        return tiny_model if folder == tiny_model.folder else ExportedModel(folder)

    monkeypatch.setattr(predict, "ExportedModel", open_once)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, arguments)])
        try:
            predict.main()
        except SystemExit as error:
            return error.code
        return 0

    return run


def test_the_command_prints_a_summary(command, tiny_model, ten, capsys):
    write(ten, {"bad.png": b"x", "color.png": encode(np.stack([IMAGES[0], IMAGES[1], IMAGES[2]], -1))})
    run_dir = tiny_model.folder.parent
    out = ten.parent / "new" / "images.csv"
    assert command(ten, "--run-dir", run_dir, "--out", out) == 0
    printed = capsys.readouterr().out
    for part in ("11 images predicted now, 0 before", str(out), "color.png: The file is in color", "bad.png: neither"):
        assert part in printed
    assert tiny_model.facts["notice"] in printed
    assert command(ten, "--run-dir", run_dir, "--out", out) == 0
    assert "0 images predicted now, 11 before" in capsys.readouterr().out


def test_the_command_ends_with_a_sentence(command, tiny_model, ten, tmp_path):
    run = ("--run-dir", tiny_model.folder.parent)
    (tmp_path / "nothing").mkdir()
    foreign = write(tmp_path, {"foreign.csv": b"a,b\n"}) / "foreign.csv"
    assert "make predict IMAGES=folder" in command("", *run)
    assert re.fullmatch(r".*gone is missing\. Give a folder .*", command(tmp_path / "gone", *run, "--out", "x.csv"))
    assert "holds no image. Give a folder" in command(tmp_path / "nothing", *run, "--out", tmp_path / "x.csv")
    assert "saved_model is missing" in command(ten, "--run-dir", tmp_path / "none")
    assert "Choose another file" in command(ten, *run, "--out", foreign)
    assert "Choose another file" in command(ten, *run, "--out", tmp_path / "nothing")  # a folder
    assert "foreign.csv" in command(ten, *run, "--out", foreign / "out.csv")  # below a file
    assert foreign.read_bytes() == b"a,b\n"


def test_make_predict_passes_its_settings_on():
    printed = subprocess.run(
        ["make", "-n", "-o", ".venv/run", "predict", "IMAGES=my images", "OUT=a b.csv", "RUN_DIR=run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    assert 'scripts/predict.py "my images" --run-dir "run" --out "a b.csv"' in printed
