"""Predicts a folder of images, PNG, JPEG and DICOM mixed, with an exported model. Continues an interrupted run.

Usage: predict.py IMAGES [--run-dir DIR] [--out FILE] [--cluster auto|ADDRESS]
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))
os.environ["KERAS_BACKEND"] = "tensorflow"  # exported models need no other, whatever else is trained here

from tqdm import tqdm

from helpers.evaluation import FEW_POSITIVES
from helpers.export import ExportedModel, name_few_positives, predict_folder
from helpers.runtime import resolve_path


def parse_arguments():
    """Returns the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", help="a folder of images, searched with its subfolders, or one image")
    parser.add_argument("--run-dir", default="", help="run whose saved_model predicts (default: models/densenet121)")
    parser.add_argument("--out", default="", help="CSV to write (default: predicted/<name of IMAGES>.csv in the run)")
    parser.add_argument("--cluster", default="", help="Ray cluster that shares the work: auto, or its address")
    return parser.parse_args()


def main():
    """Predicts and prints a summary."""
    sys.stdout.reconfigure(errors="backslashreplace")  # names of folders may hold any bytes
    arguments = parse_arguments()
    if not arguments.images:
        sys.exit("No images given: make predict IMAGES=folder")
    run_dir, images = resolve_path(arguments.run_dir or "models/densenet121"), resolve_path(arguments.images)
    out = resolve_path(arguments.out) if arguments.out else run_dir / "predicted" / f"{images.name}.csv"
    try:
        model = ExportedModel(run_dir / "saved_model")
        done = predict_folder(model, images, out, progress=tqdm, cluster=arguments.cluster)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command continues from here.")
    print(f"\n{done.predicted:,} images predicted now, {done.earlier:,} before: {done.out}")
    if len(done.warned):
        print(f"{len(done.warned):,} with warnings, in the column of that name, such as\n")
        for image in done.warned.head(5).itertuples():
            print(f"  {image.file}: {image.reason}")
    if len(done.unreadable):
        print(f"\n{len(done.unreadable):,} could not be read: {done.unreadable_csv}\n")
        for image in done.unreadable.head(5).itertuples():
            print(f"  {image.file}: {image.reason}")
    if few := name_few_positives(model.facts):
        names = ", ".join(name.replace("_", " ") for name in few)
        print(f"\nThreshold and calibration were chosen on fewer than {FEW_POSITIVES} images with the finding: {names}")
    print(f"\n{model.facts['notice']}")


if __name__ == "__main__":
    main()
