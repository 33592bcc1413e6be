"""Where a study comes from: Kaggle, NIH Box, Hugging Face, ChestMNIST."""

from .archives import ArchiveError, unpack_archive
from .chestmnist import fetch_chestmnist, list_chestmnist_file, plan_chestmnist, write_chestmnist_study
from .downloads import DownloadError, download_file, open_session
from .plan import plan_fetch
from .sources import download_with_kagglehub, find_attached_study, link_study, list_remote_study
from .streaming import fetch_study, list_cached_images
