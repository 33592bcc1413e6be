"""What a notebook runs on, its settings, and the files that it reads and writes."""

from .accelerator import Runtime, prepare_runtime
from .devices import Devices, connect_devices, describe_machine, describe_runtime, find_commit
from .files import (
    as_path,
    copy_file,
    hash_file,
    is_remote,
    local_copy,
    local_draft,
    only_os_errors,
    read_csv,
    read_text,
    remove_folder,
    write_csv,
    write_text,
)
from .settings import choose_settings, read_json, resolve_path, save_figure, write_json
