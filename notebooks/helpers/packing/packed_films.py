"""Images of a packed study as files: the originals where they are, else PNGs of what was packed."""

import tensorflow as tf

from ..study.labels import list_images


def load_image_files(study, subset, n_images, study_dir):
    """Loads the files of the first images of a subset.

    Where one of them is not in `study_dir`, as with a packed study attached alone, all are PNGs of the images
    as packed, which every function that shrinks images to the packed side leaves as they are.

    Args:
        study: a `PackedStudy`.
        subset: "train", "val" or "test".
        n_films: int, or None for all.
        study_dir: folder of the study in NIH's layout, with or without images.

    Returns:
        List of bytes, PNG or JPEG, in the order of `study.rows(subset)`.
    """
    names = study.rows(subset)["image"].head(n_images)
    try:
        images = list_images(study_dir)
    except FileNotFoundError:
        images = {}
    if images.keys() >= set(names):
        return [images[name].read_bytes() for name in names]
    records = tf.data.TFRecordDataset(study.files(subset)).take(len(names)).batch(1)
    rows = records.map(lambda record: tf.io.encode_png(study.parse(record)[0][0]), tf.data.AUTOTUNE)
    return list(rows.as_numpy_iterator())
