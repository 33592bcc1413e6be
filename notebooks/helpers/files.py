"""Writes files so that a reader never meets half of one."""

import os
from pathlib import Path


def write_text(path, text):
    """Writes text through a temporary name beside the file, which then takes its place at once.

    Args:
        path: path of the file; replaced if it exists.
        text: str, written as UTF-8.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
