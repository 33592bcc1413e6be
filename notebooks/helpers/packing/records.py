"""The records of packed studies: one image with its row, written and parsed side by side."""

import numpy as np
import tensorflow as tf

FORMAT = 2  # of records, index and manifest; a reader refuses any other
ENCODINGS = ("raw", "png")  # of the image in a record: its pixels as they are, or a PNG of them
_UNKNOWN = -1  # in the record, of a label that is NaN in tables and batches
_PNG_LEVEL = 4  # of compression, 0 to 9: higher ones take longer and save nothing, see benchmarks/packing.py


def encode_image(image, encoding):
    """Encodes a uint8 image (side, side, 1) as a scalar string tensor, or leaves it as it is if "raw"."""
    return tf.io.encode_png(image, compression=_PNG_LEVEL) if encoding == "png" else image


def encode_record(image, row, findings):
    """Encodes one image with its row as a `tf.train.Example`.

    Args:
        image: bytes, the image's pixels row by row, or a PNG of them.
        row: dict with `image`, `patient_id`, `follow_up`, `age` (years, NaN where unusable), `sex`, `view`, and for
            each finding 1, 0 or NaN (unknown).
        findings: their names, in the order of the labels.

    Returns:
        bytes, the same for the same image and row.
    """
    example = tf.train.Example()
    feature = example.features.feature  # filled in place: messages handed to a constructor are copied, images with them
    feature["film"].bytes_list.value.append(image)  # the key that packed studies have had from the beginning
    labels = (row[name] for name in findings)
    feature["labels"].int64_list.value.extend([_UNKNOWN if label != label else int(label) for label in labels])
    if isinstance(row["patient_id"], str):
        feature["patient_id"].bytes_list.value.append(row["patient_id"].encode())
    else:
        feature["patient_id"].int64_list.value.append(int(row["patient_id"]))
    feature["follow_up"].int64_list.value.append(int(row["follow_up"]))
    feature["age"].float_list.value.append(row["age"])
    for name in ("image", "sex", "view"):
        feature[name].bytes_list.value.append(row[name].encode())
    return example.SerializeToString(deterministic=True)


def parse_records(records, side, encoding, n_findings):
    """Parses a batch of records to images and labels. Runs inside `Dataset.map`.

    Args:
        records: string tensor (batch,).
        side: int, pixels, of the packed images.
        encoding: how the images are encoded, one of `ENCODINGS`.
        n_findings: int, labels in a record.

    Returns:
        uint8 tensor (batch, side, side, 1) and float32 tensor (batch, n_findings) of 1, 0 and NaN (unknown).
    """
    spec = {
        "film": tf.io.FixedLenFeature([], tf.string),
        "labels": tf.io.FixedLenFeature([n_findings], tf.int64),
    }
    parsed = tf.io.parse_example(records, spec)
    if encoding == "png":  # by a dataset: `tf.map_fn` takes twice as long; the pipelines read several batches at a time
        images = tf.data.Dataset.from_tensor_slices(parsed["film"])
        images = images.map(lambda data: tf.ensure_shape(tf.io.decode_png(data, channels=1), (side, side, 1)))
        images = images.batch(tf.size(records, out_type=tf.int64)).get_single_element()
    else:
        images = tf.io.decode_raw(parsed["film"], tf.uint8, fixed_length=side * side)
    labels = tf.cast(parsed["labels"], tf.float32)
    return tf.reshape(images, (-1, side, side, 1)), tf.where(labels < 0, np.float32("nan"), labels)
