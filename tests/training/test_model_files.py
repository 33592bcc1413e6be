"""Model files from strangers: every known attack is built here in a harmless form, and none is opened.

What an attack would run creates a file, `marker`, which has to be missing afterwards.
"""

import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from helpers.training import ModelFileError, build_densenet121, check_model_file, hash_model, load_model, load_weights
from helpers.training import model_files as room

HELPERS = Path(room.__file__).parents[2]


def build_small():
    """Returns a model of the kinds of layers that DenseNet-121 and VGG16 have."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    images = keras.Input((32, 32, 1))
    x = layers.Rescaling([0.1, 0.2, 0.3], [0.0, 0.1, 0.2])(layers.Concatenate()([images] * 3))
    x = layers.Conv2D(4, 3, use_bias=False)(layers.ZeroPadding2D(1)(x))
    x = layers.Activation("relu")(layers.BatchNormalization()(x))
    x = layers.AveragePooling2D(2)(layers.MaxPooling2D()(x))
    x = layers.Concatenate()([layers.GlobalAveragePooling2D()(x), layers.Flatten()(x)])
    logits = layers.Dense(3, kernel_initializer="he_normal", kernel_regularizer="l2")(layers.Dropout(0.3)(x))
    model = keras.Model(images, logits)
    model.compile(keras.optimizers.AdamW(), "binary_crossentropy")
    return model


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 1)).astype("float32")


@pytest.fixture(scope="module")
def model():
    return build_small()


@pytest.fixture(scope="module")
def good(tmp_path_factory, model):
    """A folder with the same small model in every format that is loaded; never written to by a test."""
    folder = tmp_path_factory.mktemp("models")
    model.save(folder / "good.keras")
    model.save_weights(folder / "good.weights.h5")
    model.export(folder / "saved_model", verbose=False)
    return folder


def read_members(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_members(path, members, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def with_layer(good, path, layer):
    """Writes the good archive with one more layer in its configuration."""
    members = read_members(good / "good.keras")
    config = json.loads(members["config.json"])
    config["config"]["layers"].append(layer)
    return write_members(path, members | {"config.json": json.dumps(config)})


def with_weights(good, path, write):
    """Writes the good archive with other weights, and returns its path."""
    with h5py.File(path.with_suffix(".h5"), "w") as file:
        write(file)
    return write_members(
        path, read_members(good / "good.keras") | {"model.weights.h5": path.with_suffix(".h5").read_bytes()}
    )


def describe(name, module="keras.layers", config=None, **more):
    return {"module": module, "class_name": name, "config": config or {}, "registered_name": None, **more}


def touch(marker):
    return f"touch {marker}"


CONFIGS = {
    "lambda layer (CVE-2024-3660)": lambda marker: describe(
        "Lambda", config={"function": {"class_name": "__lambda__", "config": {"value": touch(marker)}}}
    ),
    "os.system (CVE-2025-1550)": lambda marker: {
        "module": "os",
        "class_name": "function",
        "config": "system",
        "registered_name": "system",
        "inbound_nodes": [{"args": [touch(marker)], "kwargs": {}}],
    },
    "safe mode switched off (CVE-2025-9906)": lambda marker: {
        "module": "keras.config",
        "class_name": "function",
        "config": "enable_unsafe_deserialization",
        "registered_name": "enable_unsafe_deserialization",
        "inbound_nodes": [{"args": [], "kwargs": {}}],
    },
    "vocabulary from a file (CVE-2025-12058)": lambda marker: describe(
        "StringLookup", config={"vocabulary": str(marker)}
    ),
    "a pickle (CVE-2025-49655)": lambda marker: describe("TorchModuleWrapper", config={"module": "gASVAA=="}),
    "graph of another folder (CVE-2026-1462)": lambda marker: describe("TFSMLayer", config={"filepath": str(marker)}),
    "class of a package of the caller": lambda marker: describe("Dense", registered_name="mine>Dense"),
    "class without a module, as in Keras 2": lambda marker: {"class_name": "Dense", "config": {"units": 3}},
    "function in a harmless layer": lambda marker: describe(
        "Activation", config={"activation": describe("function", "builtins", "relu")}
    ),
    "compiled model inside the model": lambda marker: describe(
        "Functional", "keras.src.models.functional", compile_config={"loss": describe("Mine", "mine")}
    ),
    "layer of 4 GB that has no weights": lambda marker: describe(
        "Dense", config={"units": 2**15}, build_config={"input_shape": [None, 2**15]}
    ),
    "layer of unknown size": lambda marker: describe("Dense", config={"units": 3}),
    "layer of a size that is no number": lambda marker: describe(
        "Dense", config={"units": "3"}, build_config={"input_shape": [None, 3]}
    ),
}


@pytest.mark.parametrize("attack", CONFIGS)
def test_configuration_that_names_anything_unknown_is_refused(attack, good, tmp_path):
    path = with_layer(good, tmp_path / "model.keras", CONFIGS[attack](tmp_path / "marker"))
    with pytest.raises(ModelFileError, match=r"model\.keras is refused: config\.json .*\. \w.*\.$"):
        load_model(path)
    assert not (tmp_path / "marker").exists()


def external(file, tmp_path):
    file.create_dataset("secret", (4,), "f4", external=[(str(tmp_path / "secret"), 0, 16)])


def virtual(file, tmp_path):
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "data", (4,))
    file.create_virtual_dataset("secret", layout)


def linked_twice(file, tmp_path):
    file.create_group("a")["again"] = file["/"]


def same_data_twice(file, tmp_path):
    file["a"] = np.ones(8, "f4")
    file["b"] = file["a"]


def with_attribute(name, value):
    def write(file, tmp_path):
        file.attrs[name] = value

    return write


def with_link(link):
    def write(file, tmp_path):
        file["weights"] = link

    return write


def with_dataset(*arguments, **options):
    def write(file, tmp_path):
        file.create_dataset("weights", *arguments, **options)

    return write


def nested(file, tmp_path):
    file.create_group("/".join("a" * 40))


def crowded(file, tmp_path):
    for number in range(20_001):
        file.create_group(str(number))


HDF5 = {
    "data in another file (CVE-2026-1669)": (external, "elsewhere"),
    "data of another HDF5 file": (virtual, "elsewhere"),
    "link to another file": (with_link(h5py.ExternalLink("other.h5", "/")), "is a link"),
    "link to another place": (with_link(h5py.SoftLink("/")), "is a link"),
    "circle": (linked_twice, "linked twice"),
    "the same data under two names": (same_data_twice, "linked twice"),
    "shape without data (CVE-2026-0897)": (with_dataset((10**6, 10**6), "f4"), "declares 4,000,000,000,000 bytes"),
    "shape of packed zeros": (with_dataset((2**14, 2**10), "f4", chunks=(2**10, 2**10), compression="gzip"), "chunks"),
    "pickle among the weights": (with_dataset(data=np.void(b"\x80\x04.")), "plain numbers"),
    "text among the weights": (
        with_dataset(data=["cos\nsystem\n(S'true'\ntR."], dtype=h5py.string_dtype()),
        "plain numbers",
    ),
    "references": (with_dataset((2,), h5py.ref_dtype), "plain numbers"),
    "complex numbers": (with_dataset((2,), "c8"), "plain numbers"),
    "pickle in an attribute": (with_attribute("state", np.void(b"\x80\x04.")), "neither text nor number"),
    "whole model of Keras 2 (CVE-2025-9905)": (
        with_attribute("model_config", '{"class_name": "Lambda"}'),
        "whole model",
    ),
    "nesting": (nested, "nested too deep"),
    "20,001 groups": (crowded, "20,000"),
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
    archive = with_weights(good, tmp_path / "bad.keras", lambda file: write(file, tmp_path))
    with pytest.raises(ModelFileError, match=rf"bad\.keras is refused: .*{reason}"):
        load_model(archive)


def test_a_lambda_in_the_older_format_is_refused(tmp_path):
    """Keras itself warns that it writes this one, and may or may not refuse to read it."""
    marker = tmp_path / "marker"
    command = f"touch {marker}"
    layer = keras.layers.Lambda(lambda x: (os.system(command), x)[1], output_shape=(2,))
    keras.Sequential([keras.Input((2,)), layer]).save(tmp_path / "model.h5")
    marker.unlink(missing_ok=True)  # building the model ran the lambda
    with pytest.raises(ModelFileError, match=r"whole model in the format of Keras 2.*Have its weights alone saved"):
        load_model(tmp_path / "model.h5")
    (tmp_path / "model.h5").rename(tmp_path / "model.keras")
    with pytest.raises(ModelFileError, match="does not end as a zip archive"):
        load_model(tmp_path / "model.keras")
    assert not marker.exists()


def overlapping(data, path):
    """Lets the directory give the place of the first member for all of them."""
    start = data.index(b"PK\1\2")
    while (start := data.find(b"PK\1\2", start)) >= 0:
        data = data[: start + 42] + bytes(4) + data[start + 46 :]
        start += 4
    return data


def two_tales(data, path):
    return data.replace(b"metadata.json", b"metadota.json", 1)


def encrypted(data, path):
    start = data.index(b"PK\1\2")
    return data[: start + 8] + b"\1" + data[start + 9 :]


def link(data, path):
    start = data.index(b"PK\1\2")
    return data[: start + 38] + struct.pack("<L", 0o120777 << 16) + data[start + 42 :]


ZIPS = {
    "bytes in front": lambda data, path: b"#!/bin/sh\n" + data,
    "bytes behind": lambda data, path: data + b"hidden",
    "bytes in between": lambda data, path: data[: data.index(b"PK\1\2")] + b"hidden" + data[data.index(b"PK\1\2") :],
    "members that overlap": overlapping,
    "two tales of a name": two_tales,
    "encrypted": encrypted,
    "a link": link,
    "no archive": lambda data, path: b"PK\3\4" + bytes(60),
    "a pickle": lambda data, path: b"cos\nsystem\n(S'touch marker'\ntR." + bytes(60),
    "one byte": lambda data, path: b"P",
}


@pytest.mark.parametrize("attack", ZIPS)
def test_an_archive_that_keras_did_not_write_so_is_refused(attack, good, tmp_path):
    path = tmp_path / "bad.keras"
    path.write_bytes(ZIPS[attack]((good / "good.keras").read_bytes(), path))
    with pytest.raises(ModelFileError, match=r"bad\.keras is refused: "):
        load_model(path)


def test_one_wrong_bit_of_a_weight_is_found_by_the_checksum(model, good, tmp_path):
    data = bytearray((good / "good.keras").read_bytes())
    data[data.index(model.layers[-1].get_weights()[0].tobytes())] ^= 1
    (tmp_path / "bad.keras").write_bytes(data)
    with pytest.raises(ModelFileError, match="its checksum does not fit"):
        check_model_file(tmp_path / "bad.keras")


def test_members_are_those_of_keras_and_stored_as_they_are(good, tmp_path):
    members = read_members(good / "good.keras")
    assert check_model_file(write_members(tmp_path / "same.keras", members))
    for names in (("assets/x",), ("../../evil",), ("/etc/evil",), ("model.weights.npz",), ("a", "b")):
        with pytest.raises(ModelFileError, match="zip directory is not that"):
            load_model(write_members(tmp_path / "more.keras", members | dict.fromkeys(names, b"x")))
    weights = members.pop("model.weights.h5")
    for name in ("../model.weights.h5", "model.weights.npz", "Config.json"):
        path = write_members(tmp_path / "other.keras", members | {name: weights})
        if name == "Config.json":  # the same length: two files of one name, of which readers take one or the other
            path.write_bytes(path.read_bytes().replace(b"Config.json", b"config.json"))
        with pytest.raises(ModelFileError, match="it holds"):
            load_model(path)
    bomb = {"config.json": b"{}", "metadata.json": b"{}", "model.weights.h5": bytes(10**7)}
    with pytest.raises(ModelFileError, match="compressed"):
        load_model(write_members(tmp_path / "bomb.keras", bomb, compression=zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"[" * 10**6, "cannot be read"),
        (b'{"a":' * 50 + b"1" + b"}" * 50, "nested more than 32"),
        (b"[]", "no model"),
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b" " * (2**21 + 1), "more than the 2,097,152 allowed"),
    ],
)
def test_a_configuration_that_is_no_plain_json_is_refused(text, reason, good, tmp_path):
    path = write_members(tmp_path / "bad.keras", read_members(good / "good.keras") | {"config.json": text})
    with pytest.raises(ModelFileError, match=reason):
        load_model(path)


def write_graph(folder, function, *, assets=()):
    module = tf.Module()
    module.call = function
    module.assets = list(assets)
    tf.saved_model.save(module, str(folder), signatures={"serving_default": function.get_concrete_function()})
    return folder


TEXT = tf.TensorSpec([], tf.string)
GRAPHS = {
    "WriteFile": lambda x: (tf.io.write_file("marker", x), x)[1],
    "ReadFile": tf.io.read_file,
    "MatchingFiles": tf.io.matching_files,
    "EagerPyFunc": lambda x: tf.py_function(lambda y: y, [x], tf.string),
    "PyFuncStateless": lambda x: tf.numpy_function(lambda y: y, [x], tf.string, stateful=False),
    "PrintV2": lambda x: (tf.print(x, output_stream="file://marker"), x)[1],
    "TextLineDataset": lambda x: next(iter(tf.data.TextLineDataset(x).batch(9))),
    "SaveV2": lambda x: (tf.raw_ops.SaveV2(prefix=x, tensor_names=["a"], shape_and_slices=[""], tensors=[x]), x)[1],
    "RestoreV2": lambda x: tf.raw_ops.RestoreV2(
        prefix=x, tensor_names=["a"], shape_and_slices=[""], dtypes=[tf.string]
    ),
    "ImmutableConst": lambda x: tf.raw_ops.ImmutableConst(dtype=tf.float32, shape=[1], memory_region_name="marker"),
}


@pytest.mark.parametrize("op", GRAPHS)
def test_a_graph_that_reaches_outside_is_refused(op, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_graph(tmp_path / "graph", tf.function(GRAPHS[op], input_signature=[TEXT]))
    reason = "restores" if op in ("SaveV2", "RestoreV2") else f"its graph uses .*{op}"
    with pytest.raises(ModelFileError, match=rf"graph is refused: .*{reason}"):
        load_model(folder)
    assert not (tmp_path / "marker").exists()


def test_an_operation_deep_in_a_condition_is_found(tmp_path):
    def call(x):
        return tf.cond(tf.strings.length(x) > 3, lambda: tf.io.read_file(x), lambda: x)

    with pytest.raises(ModelFileError, match="ReadFile"):
        load_model(write_graph(tmp_path / "graph", tf.function(call, input_signature=[TEXT])))


def test_assets_and_files_that_do_not_belong_are_refused(good, tmp_path):
    import shutil

    (tmp_path / "words.txt").write_text("a\n")
    table = tf.function(lambda x: x, input_signature=[TEXT])
    folder = write_graph(tmp_path / "graph", table, assets=[tf.saved_model.Asset(str(tmp_path / "words.txt"))])
    with pytest.raises(ModelFileError, match="words"):
        load_model(folder)
    (folder / "assets" / "words.txt").unlink()
    with pytest.raises(ModelFileError, match="brings assets"):
        load_model(folder)
    for number, plant in enumerate(
        (
            lambda copy: (copy / "saved_model.pbtxt").write_text(""),
            lambda copy: (copy / "code.py").write_text(""),
            lambda copy: (copy / "variables" / "more").symlink_to("/etc/hostname"),
            lambda copy: os.mkfifo(copy / "variables" / "variables.data-00001-of-00002"),
            lambda copy: (copy / "saved_model.pb").unlink(),
            lambda copy: (copy / "saved_model.pb").write_bytes(b""),
            lambda copy: (copy / "saved_model.pb").write_bytes(bytes(2**24 + 1)),
        )
    ):
        copy = shutil.copytree(good / "saved_model", tmp_path / str(number))
        plant(copy)
        with pytest.raises(ModelFileError, match="is refused"):
            load_model(copy)


def test_every_allowed_operation_is_one_of_tensorflow():
    from helpers.training.model_graphs import _ALLOWED

    assert len(_ALLOWED) > 250
    assert [name for name in sorted(_ALLOWED) if not hasattr(tf.raw_ops, name)] == []


def test_good_files_are_loaded_and_compute_the_same(model, good, images):
    expected = model(images).numpy()
    loaded = load_model(good / "good.keras")
    assert np.array_equal(loaded(images), expected) and not loaded.compiled
    assert np.allclose(load_model(str(good / "saved_model")).serve(images), expected, atol=1e-5)
    other = build_small()
    other.set_weights([0 * weight for weight in other.get_weights()])
    load_weights(other, good / "good.weights.h5")
    assert np.array_equal(other(images), expected)
    for name in ("good.keras", "good.weights.h5", "saved_model"):
        assert check_model_file(good / name) == good / name


def test_densenet121_as_a_whole_is_accepted(tmp_path):
    built = build_densenet121(output_stride=16)
    built.save(tmp_path / "model.keras")
    assert check_model_file(tmp_path / "model.keras")


def test_an_exported_graph_that_decodes_images_and_uses_tf_data_is_accepted(tmp_path):
    from helpers.packing import decode_image

    def call(x):
        data = tf.data.Dataset.from_tensors(x).map(lambda one: decode_image(one, 16)).ignore_errors().batch(1)
        return data.reduce(tf.zeros([], tf.int64), lambda total, batch: total + tf.size(batch, tf.int64))

    image = tf.io.encode_png(np.full((20, 20, 1), 7, np.uint8))
    loaded = load_model(write_graph(tmp_path / "graph", tf.function(call, input_signature=[TEXT])))
    assert loaded.call(image) == 256
    assert loaded.call("no image") == 0


def test_weights_of_another_model_and_damaged_parts_are_model_file_errors(good):
    other = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    with pytest.raises(ModelFileError, match=r"good\.weights\.h5 cannot be loaded"):
        load_weights(other, good / "good.weights.h5")
    with pytest.raises(ModelFileError, match="Use `load_weights`"):
        load_model(good / "good.weights.h5")
    with pytest.raises(ModelFileError, match="Use `load_model`"):
        load_weights(other, good / "good.keras")


def test_weights_given_by_the_user_are_looked_at_before_keras_applications_opens_them(tmp_path):
    (tmp_path / "notop.h5").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ModelFileError, match="no HDF5 file"):
        build_densenet121(tmp_path / "notop.h5")


def test_hash_and_size_are_compared_first(good, tmp_path):
    for name in ("good.keras", "saved_model"):
        right = hash_model(good / name)
        assert check_model_file(good / name, sha256=right.upper())
        with pytest.raises(ModelFileError, match=f"its SHA-256 is {right}, expected was 00"):
            load_model(good / name, sha256="00" * 32)
        with pytest.raises(ModelFileError, match="1 to 999 are allowed"):
            check_model_file(good / name, sha256="00" * 32, max_bytes=999)
    (tmp_path / "bad.keras").write_bytes(b"anything")
    with pytest.raises(ModelFileError, match="SHA-256"):
        load_model(tmp_path / "bad.keras", sha256="00" * 32)
    (tmp_path / "bad.keras").write_bytes(b"")
    with pytest.raises(ModelFileError, match="0 bytes"):
        load_model(tmp_path / "bad.keras")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.keras is missing\. Give"):
        load_model(tmp_path / "nowhere.keras")
    if os.path.exists("/dev/zero"):
        (tmp_path / "endless.keras").symlink_to("/dev/zero")
        with pytest.raises(ModelFileError, match="neither a file nor a folder"):
            load_model(tmp_path / "endless.keras")


def test_hash_of_a_folder_is_that_of_the_shell(good):
    command = r"find . -type f -printf '%P\n' | LC_ALL=C sort | xargs sha256sum | sha256sum"
    answer = subprocess.run(command, shell=True, cwd=good / "saved_model", capture_output=True, text=True)
    if answer.returncode or not answer.stdout:
        pytest.skip("needs GNU find and sha256sum")
    assert answer.stdout.split()[0] == hash_model(good / "saved_model")


@pytest.mark.parametrize("ending", [".pkl", ".pt", ".joblib", ".npz", ".PKL", ".exe", ".pb", ""])
def test_pickles_and_unknown_kinds_are_refused(ending, tmp_path):
    path = tmp_path / f"model{ending}"
    path.write_bytes(b"cos\nsystem\n(S'touch marker'\ntR.")
    with pytest.raises(ModelFileError, match=r"pickles|no kind of model file"):
        load_model(path)


def test_onnx_files_are_looked_at_with_all_their_parts(tmp_path):
    onnx = pytest.importorskip("onnx")
    make = onnx.helper

    def write(nodes, initializers=(), domain="", name="model.onnx"):
        value = make.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
        graph = make.make_graph(nodes, "graph", [value], [value], list(initializers))
        built = make.make_model(graph, opset_imports=[make.make_opsetid(domain, 17)])
        (tmp_path / name).write_bytes(built.SerializeToString())
        return tmp_path / name

    relu = make.make_node("Relu", ["x"], ["y"])
    weights = onnx.numpy_helper.from_array(np.ones((4, 4), "float32"), "w")
    path = write([relu], [weights])
    assert check_model_file(path) == path
    with pytest.raises(ModelFileError, match="own runtimes"):
        load_model(path)
    outside = onnx.TensorProto(name="w", dims=[4], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="../../etc/passwd")
    bomb = onnx.TensorProto(name="w", dims=[2**20, 2**20], data_type=1, raw_data=b"0000")
    inner = make.make_graph([make.make_node("Relu", ["x"], ["y"], domain="evil")], "inner", [], [])
    hidden = make.make_node("If", ["x"], ["y"], then_branch=inner)
    deep = make.make_node("Constant", [], ["y"], value=outside)
    for nodes, initializers, domain, reason in (
        ([relu], [outside], "", "other files"),
        ([deep], [], "", "other files"),
        ([relu], [bomb], "", "declares 1,048,576"),
        ([make.make_node("Relu", ["x"], ["y"], domain="com.evil")], [], "", "com.evil"),
        ([hidden], [], "", "operations of evil"),
        ([relu], [], "ai.onnx.contrib", "ai.onnx.contrib"),
    ):
        with pytest.raises(ModelFileError, match=reason):
            check_model_file(write(nodes, initializers, domain, "bad.onnx"))
    data = path.read_bytes()
    for broken in (data[:-3], b"\x00" * 50, data[: len(data) // 2], b"\x08" + b"\xff" * 20, b"\x3d0000"):
        (tmp_path / "bad.onnx").write_bytes(broken)
        with pytest.raises(ModelFileError, match="no ONNX file"):
            check_model_file(tmp_path / "bad.onnx")


def test_tflite_files_use_only_built_in_operations(tmp_path):
    def write(function, allowed, name):
        concrete = tf.function(function, input_signature=[tf.TensorSpec([2], tf.float32)]).get_concrete_function()
        converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete])
        converter.target_spec.supported_ops = allowed
        (tmp_path / name).write_bytes(converter.convert())
        return tmp_path / name

    path = write(lambda x: tf.nn.relu(x) + 1, [tf.lite.OpsSet.TFLITE_BUILTINS], "model.tflite")
    assert check_model_file(path) == path
    both = [tf.lite.OpsSet.TFLITE_BUILTINS, tf.lite.OpsSet.SELECT_TF_OPS]
    with pytest.raises(ModelFileError, match="not built in"):
        check_model_file(write(lambda x: tf.io.read_file(tf.strings.as_string(x[0])), both, "flex.tflite"))
    data = path.read_bytes()
    for broken in (data[:7], data[:30], b"\xff" * 4 + data[4:], data[:4] + b"XXXX" + data[8:]):
        (tmp_path / "bad.tflite").write_bytes(broken)
        with pytest.raises(ModelFileError, match=r"damaged|no TFLite file"):
            check_model_file(tmp_path / "bad.tflite")


@pytest.mark.parametrize("name", ["good.keras", "good.weights.h5", "saved_model"])
def test_no_damage_raises_anything_but_model_file_errors(name, model, good, tmp_path):
    """Cuts files and flips bytes, most of them where the structure is. What passes is loaded too, but for graphs."""
    import shutil

    rng = np.random.default_rng(3)
    copy = tmp_path / name
    shutil.copytree(good / name, copy) if (good / name).is_dir() else shutil.copy(good / name, copy)
    file = copy / "saved_model.pb" if copy.is_dir() else copy
    data = file.read_bytes()
    n_refused = 0
    for turn in range(60):
        broken = bytearray(data[: rng.integers(1, len(data))] if turn % 4 == 0 else data)
        for place in rng.integers(0, min(len(broken), (len(data), 3000)[turn % 2]), 1 + turn % 5):
            broken[place] = rng.integers(256)
        file.write_bytes(bytes(broken))
        try:
            check_model_file(copy)
            if name == "good.weights.h5":
                load_weights(keras.models.clone_model(model), copy)
            elif name == "good.keras":
                load_model(copy)
        except ModelFileError as error:
            assert name in str(error)
            n_refused += 1
    assert n_refused >= 15


def measure_check(path):
    """Checks a file in a fresh process: MiB added to its largest memory, seconds of the processor, what was said."""
    code = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
import h5py
from helpers.training import check_model_file
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    said = str(check_model_file(sys.argv[2]))
except ValueError as error:
    said = str(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, time.process_time() - began)
print("tensorflow" in sys.modules or "keras" in sys.modules)
print(said)
"""
    command = [sys.executable, "-c", code, str(HELPERS), str(path)]
    spent, heavy, said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n", 2)
    return *map(float, spent.split()), heavy == "True", said


@pytest.mark.skipif(sys.platform != "linux", reason="other systems measure memory in other units")
def test_attacks_are_refused_in_a_second_in_little_memory_and_without_keras(good, tmp_path):
    zeros = {"config.json": b"{}", "metadata.json": b"{}", "model.weights.h5": bytes(2 * 10**8)}
    with h5py.File(tmp_path / "shape.weights.h5", "w") as file:
        file.create_dataset("bomb", (10**6, 10**6), "f4", chunks=(1000, 1000), compression="gzip")
    with h5py.File(tmp_path / "crowd.weights.h5", "w") as file:
        crowded(file, tmp_path)
    members = read_members(good / "good.keras")
    crowd = {"config.json": b'{"a":[' + b"{}," * (2**19) + b"{}]}"}
    node = b"\n\1a\x12\2If"
    graph = b"\n" + varint(len(node)) + node
    main = graph * 2**17
    body = b"\x12" + varint(len(main)) + main + b":\2\n\0"
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / "saved_model.pb").write_bytes(b"\x12" + varint(len(body)) + body)
    functions = field(1, field(1, field(1, b"f")) + field(3, b"\n\1a\x12\4NoOp") * 2**16) * 16
    (tmp_path / "functions").mkdir()
    (tmp_path / "functions" / "saved_model.pb").write_bytes(field(2, field(2, field(2, functions)) + b":\2\n\0"))
    inputs = field(2, field(1, b"\n\1a\x12\4NoOp" + b"\x1a\1b" * 2**16) * 32)
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs" / "saved_model.pb").write_bytes(field(2, inputs + b":\2\n\0"))
    branches = field(11, field(1, b'"\1a') * 2**16) * 32
    (tmp_path / "branches.onnx").write_bytes(field(7, field(1, field(5, branches))))
    with h5py.File(tmp_path / "attributes.weights.h5", "w") as file:
        for k in range(400):
            file.create_group(str(k)).attrs.update({str(n): np.int8(n) for n in range(60)})
    with h5py.File(tmp_path / "lambda.h5", "w") as file:
        file.attrs["model_config"] = json.dumps(describe("Lambda"))
    with h5py.File(tmp_path / "declared.weights.h5", "w") as file:
        file.create_dataset("bomb", (10**6, 10**6), "f4")
    named = [attack for attack in CONFIGS if "CVE" in attack]
    attacks = [
        with_layer(good, tmp_path / f"attack{k}.keras", CONFIGS[attack](tmp_path / "marker"))
        for k, attack in enumerate(named)
    ]
    for path, reason in (
        *((path, "config.json") for path in attacks),
        (tmp_path / "lambda.h5", "whole model"),
        (tmp_path / "declared.weights.h5", "declares 4,000,000,000,000"),
        (tmp_path / "functions", "65,536 operations"),
        (tmp_path / "inputs", "131,072 inputs"),
        (tmp_path / "branches.onnx", "131,072 operations"),
        (tmp_path / "attributes.weights.h5", "20,000 attributes"),
        (write_members(tmp_path / "zip.keras", zeros, compression=zipfile.ZIP_DEFLATED), "compressed"),
        (write_members(tmp_path / "json.keras", members | crowd), None),
        (tmp_path / "shape.weights.h5", "chunks"),
        (tmp_path / "crowd.weights.h5", "20,000"),
        (tmp_path / "graph", "65,536 operations"),
    ):
        grown, seconds, heavy, said = measure_check(path)
        assert reason is None or reason in said, (path, said)
        assert grown < 100 and seconds < 1, (path, grown, seconds)
        assert not heavy


def field(number, data):
    """Returns a field of a protobuf message that has a length."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(number):
    data = b""
    while number > 127:
        data += bytes([number & 127 | 128])
        number >>= 7
    return data + bytes([number])
