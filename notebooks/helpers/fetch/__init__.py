"""Where a study comes from: Kaggle, NIH Box, Hugging Face, ChestMNIST, Open-i."""

from .chestmnist import fetch_chestmnist, list_chestmnist_file, plan_chestmnist
from .openi import fetch_openi
from .sources import download_with_kagglehub, find_attached_study, link_study, list_remote_study
from .streaming import fetch_study, list_cached_images, plan_fetch
