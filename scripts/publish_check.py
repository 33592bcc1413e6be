"""Gathers a run's release for the Hugging Face Hub and checks, point by point, whether it is complete.

Uploads it only where a name on the Hub is given, with the user's own token, and only if it is complete.

Usage: publish_check.py [--run-dir DIR] [--license ID] [--zip] [--upload YOUR_NAME/MODEL]
"""

import argparse
import shlex
import shutil
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
    parser.add_argument("--zip", action="store_true", help="also write it to model.zip in the run's folder")
    parser.add_argument("--upload", default="", metavar="YOUR_NAME/MODEL", help="upload it to this model on the Hub")
    return parser.parse_args()


def zip_release(folder, path):
    """Writes a folder as a zip, which replaces an older one only when it is whole."""
    draft = Path(shutil.make_archive(path.parent / f"part-{path.stem}", "zip", folder))
    draft.replace(path)
    return path


def upload_release(folder, name):
    """Uploads a folder to a model on the Hub, made if missing; returns its address.

    The token is that of `hf auth login`, or in HF_TOKEN. Exits with one sentence where the Hub refuses.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
    except ModuleNotFoundError:
        sys.exit("The upload needs huggingface_hub: pip install huggingface_hub")
    api, login = HfApi(), "Get a token that may write at https://huggingface.co/settings/tokens, then `hf auth login`."
    try:
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a release")
    except LocalTokenNotFoundError:
        sys.exit(f"There is no token for the Hub. {login}")
    except HfHubHTTPError as error:
        status = error.response.status_code
        refused = status in (401, 403)
        sys.exit(f"The Hub refuses the upload to {name} ({status}). {login if refused else 'Try again later.'}")
    return f"{api.endpoint}/{name}"


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
    if arguments.zip:
        print(f"{zip_release(folder, run_dir / 'model.zip')}\n")
    points = check_release(folder)
    for what, problems in points.items():
        print(f"{'not yet' if problems else 'ok':8}{what}")
        for problem in problems:
            print(f"{'':10}{problem}")
    if any(points.values()):
        sys.exit("\nNot ready to publish.")
    if arguments.upload:
        print(f"\nUploaded: {upload_release(folder, arguments.upload)}")
        return
    name = shlex.quote(f"YOUR_NAME/{run_dir.name}")
    print(f"\nReady. To upload it, log in and run:\n\n  hf upload {name} {shlex.quote(str(folder))} .")


if __name__ == "__main__":
    main()
