"""Models for others: exported files, model card, release, folder prediction, input gate."""

from .exported import ExportedModel, compare_export, name_few_positives, open_export
from .folder import predict_folder
from .formats import export_model
from .input_gate import check_image, check_images, measure_color
from .model_card import fill_model_card
from .release import check_release, gather_release
