"""The module that all notebooks share: one room a file, imported as `from helpers import make_train_dataset`.

Names are looked up on first use, so that `import helpers` costs nothing and the Keras backend can still be chosen.
"""

from importlib import import_module

_ROOMS = {
    "labels": "PATHOLOGIES SPLITS assert_no_patient_overlap hash_split list_images load_boxes load_metadata "
    "load_official_lists make_split match_images",
    "statistics": "auc_table average_precision bootstrap_auc choose_thresholds confusion_at fit_platt "
    "percentile_interval precision_recall_curve roc_auc roc_curve top_k_recall",
    "phantom": "PHANTOM_VERSION draw_film write_phantom_study",
    "images": "FilmError decode_gray decode_film inspect_film resize_film",
    "records": "PackedStudy load_packed_study pack_study parse_records",
    "pipeline": "Augmentation augment make_eval_dataset make_train_dataset",
    "model": "backbone_layers build_densenet121 load_densenet121 predict_logits set_output_bias",
    "training": "AsymmetricLoss TrainingState ValidationAUC WeightedBinaryCrossentropy averaged_weights make_loss",
    "runtime": "choose_settings describe_runtime find_commit make_strategy prepare_runtime resolve_path resolve_paths "
    "save_figure "
    "write_json",
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names.split()}

__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'helpers' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__():
    return __all__
