"""What a notebook runs on, its settings, and the files that it reads and writes.

Nothing but the standard library is imported here: a notebook imports this package before it installs anything.
"""

from .accelerator import prepare_runtime
from .devices import choose_precision, connect_devices, describe_machine, describe_runtime, find_commit
from .files import (
    copy_file,
    hash_file,
    is_remote,
    local_draft,
    lock_folder,
    note_files,
    read_csv,
    remove_unchanged,
    write_csv,
    write_text,
)
from .launchers import find_launch
from .progress import TrainingClock, describe_left
from .session import NOTEBOOKS, Session
from .settings import SETTINGS, check_setting, check_settings, read_json, resolve_path, save_figure, write_json
from .shared import MACHINE, SHARED, hours_left, read_form, recall_shared, record_shared, share_settings
