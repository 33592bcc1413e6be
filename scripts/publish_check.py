"""Gathers a run's release for the Hugging Face Hub and says, point by point, whether it is complete. Uploads nothing.

Usage: publish_check.py [--run-dir DIR] [--license ID] [--folder DIR --as-is]
"""

import argparse
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))

from helpers.export import gather_release, inspect_release
from helpers.runtime import resolve_path


def parse_arguments():
    """Returns the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", default="", help="the run to publish (default: models/densenet121)")
    parser.add_argument("--license", default="apache-2.0", help="license of the weights, by its name on the Hub")
    parser.add_argument("--folder", default="", help="where the release goes (default: hub in the run's folder)")
    parser.add_argument("--as-is", action="store_true", help="check the folder as it lies there, gather nothing")
    return parser.parse_args()


def main():
    """Gathers, checks and prints; exits with 1 where something is missing or wrong."""
    arguments = parse_arguments()
    run_dir = resolve_path(arguments.run_dir or "models/densenet121")
    folder = resolve_path(arguments.folder) if arguments.folder else run_dir / "hub"
    if not arguments.as_is:
        try:
            gather_release(run_dir, folder, arguments.license)
        except (FileNotFoundError, FileExistsError, ValueError) as error:
            sys.exit(str(error))
    elif not folder.is_dir():
        sys.exit(f"{folder} is not there. Leave out --as-is to gather it.")
    files = [path for path in folder.rglob("*") if path.is_file()]
    print(f"{folder}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.0f} MB\n")
    points = inspect_release(folder)
    for what, problems in points.items():
        print(f"{'not yet' if problems else 'ok':8}{what}")
        for problem in problems:
            print(f"{'':10}{problem}")
    if any(points.values()):
        sys.exit("\nNot ready to publish.")
    name = shlex.quote(f"YOUR_NAME/{run_dir.name}")
    print(f"\nReady. This uploads it, once you are logged in:\n\n  hf upload {name} {shlex.quote(str(folder))} .")


if __name__ == "__main__":
    main()
