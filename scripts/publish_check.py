"""Gathers a run's release for the Hugging Face Hub and checks, point by point, whether it is complete. Uploads nothing.

Usage: publish_check.py [--run-dir DIR] [--license ID]
"""

import argparse
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))

from helpers.export import check_release, gather_release
from helpers.runtime import resolve_path


def parse_arguments():
    """Returns the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", default="", help="the run to publish (default: models/densenet121)")
    parser.add_argument("--license", default="apache-2.0", help="license of the weights, by its name on the Hub")
    return parser.parse_args()


def main():
    """Gathers, checks and prints; exits with 1 where something is missing or wrong."""
    arguments = parse_arguments()
    run_dir = resolve_path(arguments.run_dir or "models/densenet121")
    try:
        folder = gather_release(run_dir, arguments.license)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    files = [path for path in folder.rglob("*") if path.is_file()]
    print(f"{folder}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.0f} MB\n")
    points = check_release(folder)
    for what, problems in points.items():
        print(f"{'not yet' if problems else 'ok':8}{what}")
        for problem in problems:
            print(f"{'':10}{problem}")
    if any(points.values()):
        sys.exit("\nNot ready to publish.")
    name = shlex.quote(f"YOUR_NAME/{run_dir.name}")
    print(f"\nReady. To upload it, log in and run:\n\n  hf upload {name} {shlex.quote(str(folder))} .")


if __name__ == "__main__":
    main()
