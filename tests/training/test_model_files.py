"""Model files that could run code or reach other files: each attack is built in a harmless form and must be refused.

What an attack would run creates a file, `marker`, which must be missing afterwards.
"""

import os
import shutil
import subprocess

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from helpers.training import build_classifier, load_weights
from helpers.training.model_files import ModelFileError, check_model_file, hash_model, load_model, record_hashes

pytestmark = pytest.mark.slow


def build_small():
    layers = keras.layers
    images = keras.Input((8, 8, 1))
    x = layers.Rescaling([0.1, 0.2, 0.3])(layers.Concatenate()([images] * 3))
    x = layers.Activation("relu")(layers.BatchNormalization()(layers.Conv2D(4, 3)(x)))
    logits = layers.Dense(3, kernel_initializer="he_normal", kernel_regularizer="l2")(layers.Flatten()(x))
    model = keras.Model(images, logits)
    model.compile(keras.optimizers.AdamW(), keras.losses.BinaryCrossentropy(), ["accuracy"])
    return model


@pytest.fixture(scope="module")
def model():
    return build_small()


@pytest.fixture(scope="module")
def good(tmp_path_factory, model):
    """A folder with the same small model in every format that is loaded; never written to by a test."""
    folder = tmp_path_factory.mktemp("models")
    model.save_weights(folder / "good.weights.h5")
    weights = tf.Module()
    weights.variables_in_order = [variable.value for variable in model.variables]
    call = tf.function(model.__call__, input_signature=[tf.TensorSpec([None, 8, 8, 1])])
    tf.saved_model.save(weights, str(folder / "saved_model"), signatures={"serving_default": call})
    return folder


def external(file, tmp_path):
    file.create_dataset("secret", (4,), "f4", external=[(str(tmp_path / "secret"), 0, 16)])


def virtual(file, tmp_path):
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "data", (4,))
    file.create_virtual_dataset("secret", layout)


def with_link(link):
    def write(file, tmp_path):
        file.create_group("layers")["weights"] = link

    return write


def with_dataset(*arguments, **options):
    def write(file, tmp_path):
        file.create_dataset("layers/weights", *arguments, **options)

    return write


def whole_model(file, tmp_path):
    file.attrs["model_config"] = '{"class_name": "Lambda"}'


HDF5 = {
    "data in another file (CVE-2026-1669)": (external, "another file"),
    "data of another HDF5 file": (virtual, "another file"),
    "link to another file": (with_link(h5py.ExternalLink("other.h5", "/")), "is a link"),
    "link to another place": (with_link(h5py.SoftLink("/")), "is a link"),
    "shape without data (CVE-2026-0897)": (with_dataset((10**6, 10**6), "f4"), "declares 4,000,000,000,000 bytes"),
    "shape of packed zeros": (
        with_dataset((2**14, 2**10), "f4", chunks=(2**10, 2**10), compression="gzip"),
        "declares",
    ),
    "pickle among the weights": (with_dataset(data=np.void(b"\x80\x04.")), "not numbers"),
    "text among the weights": (with_dataset(data=["cos\nsystem\n"], dtype=h5py.string_dtype()), "not numbers"),
    "references": (with_dataset((2,), h5py.ref_dtype), "not numbers"),
    "whole model of Keras 2 (CVE-2025-9905)": (whole_model, "whole model"),
}


@pytest.mark.parametrize("attack", HDF5)
def test_weights_that_are_more_than_numbers_in_the_file_are_refused(attack, model, good, tmp_path):
    write, reason = HDF5[attack]
    (tmp_path / "secret").write_bytes(16 * b"s")
    bad = tmp_path / "bad.weights.h5"
    with h5py.File(bad, "w") as file:
        write(file, tmp_path)
    with pytest.raises(ModelFileError, match=rf"bad\.weights\.h5 is refused: .*{reason}"):
        load_weights(model, bad)


def write_graph(folder, function, *, assets=()):
    module = tf.Module()
    module.assets = list(assets)
    call = tf.function(function, input_signature=[tf.TensorSpec([], tf.string)])
    tf.saved_model.save(module, str(folder), signatures={"serving_default": call})
    return folder


def reach_outside(x):
    tf.io.write_file("marker", x)
    tf.raw_ops.ImmutableConst(dtype=tf.float32, shape=[1], memory_region_name="marker")
    tf.numpy_function(lambda y: y, [x], tf.string, stateful=False)
    return {"y": tf.py_function(lambda y: y, [x], tf.string), "z": tf.io.matching_files(x)}


def read_in_a_branch(x):
    return {"y": tf.cond(tf.strings.length(x) > 3, lambda: tf.io.read_file(x), lambda: x)}


def save(x):
    tf.raw_ops.SaveV2(prefix=x, tensor_names=["a"], shape_and_slices=[""], tensors=[x])
    return {"y": x}


def restore(x):
    return {"y": tf.raw_ops.RestoreV2(prefix=x, tensor_names=["a"], shape_and_slices=[""], dtypes=[tf.string])[0]}


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (reach_outside, "EagerPyFunc, ImmutableConst, MatchingFiles, PyFuncStateless, WriteFile"),
        (read_in_a_branch, "ReadFile"),
        (save, "saves or restores its variables can be called"),
        (restore, "saves or restores its variables can be called"),
    ],
)
def test_a_graph_that_reaches_outside_is_refused(function, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_graph(tmp_path / "graph", function)
    with pytest.raises(ModelFileError, match=rf"graph is refused: .*{reason}"):
        load_model(folder)
    assert not (tmp_path / "marker").exists()


def test_assets_and_files_that_do_not_belong_are_refused(good, tmp_path):
    (tmp_path / "words.txt").write_text("a\n")
    asset = tf.saved_model.Asset(str(tmp_path / "words.txt"))
    folder = write_graph(tmp_path / "graph", lambda x: {"y": x}, assets=[asset])
    with pytest.raises(ModelFileError, match="words"):
        load_model(folder)
    (folder / "assets" / "words.txt").unlink()
    with pytest.raises(ModelFileError, match="brings assets"):
        load_model(folder)
    for number, plant in enumerate((
        lambda copy: (copy / "code.py").write_text(""),
        lambda copy: (copy / "variables" / "more").symlink_to("/etc/hostname"),
        lambda copy: (copy / "saved_model.pb").unlink(),
        lambda copy: (copy / "saved_model.pb").write_bytes(b""),
        lambda copy: (copy / "saved_model.pb").write_bytes((copy / "saved_model.pb").read_bytes()[:-99]),
    )):  # fmt: skip
        copy = shutil.copytree(good / "saved_model", tmp_path / str(number))
        plant(copy)
        with pytest.raises(ModelFileError, match="is refused"):
            load_model(copy)


def test_links_of_a_hugging_face_cache_are_followed_and_no_others(good, model, tmp_path):
    cache = tmp_path / "models--someone--chest"
    folder = cache / "snapshots" / "0123abc" / "saved_model"
    (cache / "blobs").mkdir(parents=True)
    for number, file in enumerate(path for path in (good / "saved_model").rglob("*") if path.is_file()):
        link = folder / file.relative_to(good / "saved_model")
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, cache / "blobs" / f"{number:064x}")
        link.symlink_to(os.path.relpath(cache / "blobs" / f"{number:064x}", link.parent))
    assert hash_model(folder) == hash_model(good / "saved_model")
    images = np.zeros((1, 8, 8, 1), "float32")
    (answer,) = load_model(folder).signatures["serving_default"](tf.constant(images)).values()
    assert np.allclose(answer, model(images), atol=1e-5)

    (tmp_path / "linked").symlink_to(folder)
    check_model_file(tmp_path / "linked")

    blob = (folder / "saved_model.pb").resolve()
    moved = blob.rename(tmp_path / "elsewhere")
    blob.symlink_to(moved)  # out of the cache, by way of it
    with pytest.raises(ModelFileError, match=r"saved_model.pb is a link to another place; copy the model .*`cp -rL`"):
        load_model(folder)
    copy = tmp_path / "copy"  # the remedy
    subprocess.run(["cp", "-rL", folder, copy], check=True)
    load_model(copy)


def test_every_allowed_operation_is_one_of_tensorflow():
    from helpers.training.model_files import _OPS

    assert [name for name in _OPS.split() if not hasattr(tf.raw_ops, name)] == []


@pytest.mark.parametrize("name", ["lr=[1e-3,1e-4]", "a\\b", "run?", "run{1}"])
def test_a_saved_model_is_opened_where_its_path_reads_as_a_pattern(model, good, tmp_path, name):
    """TensorFlow reads the variables from all files that fit the path, such as none, or a neighbor's too."""
    shutil.copytree(good / "saved_model", tmp_path / "run1")
    copy = shutil.copytree(good / "saved_model", tmp_path / name)
    images = np.ones((1, 8, 8, 1), "float32")
    (answer,) = load_model(copy).signatures["serving_default"](tf.constant(images)).values()
    assert np.allclose(answer, model(images), atol=1e-5)


def test_good_files_are_loaded_and_compute_the_same(model, good, tiny_run):
    images = np.random.default_rng(0).uniform(0, 255, (2, 8, 8, 1)).astype("float32")
    expected = model(images).numpy()
    (answer,) = load_model(str(good / "saved_model")).signatures["serving_default"](tf.constant(images)).values()
    assert np.allclose(answer, expected, atol=1e-5)
    other = build_small()
    other.set_weights([0 * weight for weight in other.get_weights()])
    load_weights(other, good / "good.weights.h5")
    assert np.array_equal(other(images), expected)
    for path in (good / "good.weights.h5", tiny_run / "saved_model"):
        assert check_model_file(path) == path


def test_a_file_for_another_purpose_is_refused(good, tmp_path):
    other = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    with pytest.raises(ModelFileError, match=r"good\.weights\.h5 is refused: .*(layer|object|variable)"):
        load_weights(other, good / "good.weights.h5")
    with pytest.raises(ModelFileError, match="Use `load_weights`"):
        load_model(good / "good.weights.h5")
    with pytest.raises(ModelFileError, match="Use `load_model`"):
        load_weights(other, good / "saved_model")
    (tmp_path / "notop.h5").write_bytes(b"cos\nsystem\n(S'true'\ntR.")  # which keras.applications would open
    with pytest.raises(ModelFileError, match=r"notop\.h5 is refused"):
        build_classifier(weights=tmp_path / "notop.h5", blocks=[1, 1, 1, 1])
    for suffix in (".keras", ".pkl", ".pt", ".npz", ".exe", ".pb", ""):
        path = tmp_path / f"model{suffix}"
        path.write_bytes(b"cos\nsystem\n(S'touch marker'\ntR.")
        with pytest.raises(ModelFileError, match="not a known kind of model file"):
            load_model(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere is missing\. Give"):
        load_model(tmp_path / "nowhere")


def test_the_hash_is_compared_before_anything_is_opened(good, tmp_path):
    for name in ("good.weights.h5", "saved_model"):
        right = hash_model(good / name)
        assert check_model_file(good / name, sha256=right.upper())
        with pytest.raises(ModelFileError, match=f"its SHA-256 is {right}, expected was 00"):
            check_model_file(good / name, sha256="00" * 32)
    (tmp_path / "bad.h5").write_bytes(b"anything")
    with pytest.raises(ModelFileError, match="SHA-256"):
        check_model_file(tmp_path / "bad.h5", sha256="00" * 32)
    command = r"find . -type f -printf '%P\n' | LC_ALL=C sort | xargs sha256sum | sha256sum"
    answer = subprocess.run(command, shell=True, cwd=good / "saved_model", capture_output=True, text=True)
    if answer.returncode == 0 and answer.stdout:  # GNU find and sha256sum
        assert answer.stdout.split()[0] == hash_model(good / "saved_model")


@pytest.mark.parametrize("name", ["model.onnx", "model.tflite"])
def test_formats_that_cannot_be_checked_are_opened_only_with_a_known_hash(name, tmp_path):
    path = tmp_path / "exports" / name
    path.parent.mkdir()
    path.write_bytes(b"a model")
    with pytest.raises(ModelFileError, match=r"SHA-256 is neither given nor in .*SHA256SUMS\. Give its `sha256`"):
        check_model_file(path)
    assert check_model_file(path, sha256=hash_model(path)) == path
    (tmp_path / "SHA256SUMS").write_text(f"{hash_model(path)}  exports/{name}\n")  # of a published folder
    assert check_model_file(path) == path
    record_hashes([path])
    (path.parent / "other.onnx").write_bytes(b"another")
    record_hashes([path.parent / "other.onnx"])
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=path.parent, check=True)
    path.write_bytes(b"A model")
    with pytest.raises(ModelFileError, match="expected was"):
        check_model_file(path)
    with pytest.raises(ModelFileError, match="Use `load_weights` or `open_export`"):
        load_model(path, sha256=hash_model(path))


@pytest.mark.parametrize("name", ["good.weights.h5", "saved_model"])
def test_no_damage_raises_anything_but_model_file_errors(name, model, good, tmp_path):
    """Cuts files and flips bytes, most of them where the structure is. What passes is loaded too, except graphs."""
    rng, other = np.random.default_rng(3), keras.models.clone_model(model)
    copy = tmp_path / name
    shutil.copytree(good / name, copy) if (good / name).is_dir() else shutil.copy(good / name, copy)
    file = copy / "saved_model.pb" if copy.is_dir() else copy
    data = file.read_bytes()
    n_refused = 0
    for turn in range(24):
        broken = bytearray(data[: rng.integers(1, len(data))] if turn % 4 == 0 else data)
        for place in rng.integers(0, min(len(broken), (len(data), 3000)[turn % 2]), 1 + turn % 5):
            broken[place] = rng.integers(256)
        file.write_bytes(bytes(broken))
        try:
            check_model_file(copy)
            if name == "good.weights.h5":
                load_weights(other, copy)
        except ModelFileError as error:
            assert name in str(error)
            n_refused += 1
    assert n_refused >= 6
