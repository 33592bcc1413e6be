"""What a folder holds, to compare it before and after."""


def read_bytes(folder):
    """Returns a dict from the relative path of each file to its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_stamps(folder):
    """Returns what changes where a file is written anew, even with the same bytes."""
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*")}
