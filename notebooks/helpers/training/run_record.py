"""The record of a training, `run.json` of notebook 2, and the studies that a trained model may be used on."""

from ..runtime.files import as_path
from ..runtime.settings import read_json
from ..study.readers.nih import NAME


def read_run(run_dir):
    """Reads `run.json`; what an older version did not record gets the value that it used.

    Args:
        run_dir: path of the folder that 02_train_densenet121 wrote.

    Returns:
        dict; among others `side`, at which the study of the training was packed, and `eval_size`, at which the model
        sees whole images, both in pixels.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = as_path(run_dir) / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. Run 02_train_densenet121.ipynb with this RUN_DIR.")
    record = read_json(path)
    defaults = {"backbone": "densenet121", "output_stride": 32, "blocks": (), "eval_size": record.get("side")}
    return defaults | record


def describe_data(run):
    """Returns what a run's study says of itself, see `study.Study`; earlier versions knew NIH's data set only.

    Args:
        run: content of `run.json`.

    Returns:
        Tuple of the dict, and whether it is NIH's data set.
    """
    about = run.get("about", {"name": NAME})
    return about, about.get("name") == NAME


def check_study(run_dir, record, study):
    """Checks that a study has findings and split of a training, and images from which its evaluation size can be made.

    Args:
        run_dir: path of the run's folder, for the message.
        record: dict of `read_run`.
        study: a `PackedStudy`.

    Raises:
        ValueError: the findings are others, or in another order; the split is another, so that test
            images may have been trained on; or the study is packed at another side than that of the training, at which
            its images would be enlarged or alias.
    """
    if list(record["classes"]) != list(study.findings):
        raise ValueError(
            f"The model in {run_dir} answers for {', '.join(record['classes'])}, but {study.folder} has labels of "
            f"{', '.join(study.findings)}. Use the DATA_DIR and PACKED_DIR of its training, or another RUN_DIR."
        )
    if record["split"]["sha256"] != study.split_sha256:
        raise ValueError(
            f"The model in {run_dir} was trained on split {record['split']['name']} "
            f"({record['split']['sha256'][:12]}), but {study.folder} holds split {study.split_name} "
            f"({study.split_sha256[:12]}). Use the SPLIT, PROFILE and PACKED_DIR of its training."
        )
    size = record["eval_size"]
    if study.side != record["side"] and not size <= study.side < 2 * size:
        raise ValueError(
            f"The model in {run_dir} was trained on images packed at {record['side']} pixels and sees them at {size}, "
            f"but {study.folder} holds images of {study.side}. Use the PROFILE and PACKED_DIR of its training, or pack "
            f"at {size} to {2 * size - 1} pixels."
        )
