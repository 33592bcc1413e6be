"""The module that all notebooks share: one room a file, imported as `from helpers import make_train_dataset`.

Names are looked up on first use, so that `import helpers` costs nothing and the Keras backend can still be chosen.
"""

from importlib import import_module

_ROOMS = {
    "files": "as_path copy_file hash_file is_remote local_copy local_draft only_os_errors read_csv read_text "
    "remove_folder write_csv write_text",
    "labels": "ADJUDICATED BOX_FRAME NODULE_CLASSES PATHOLOGIES has_patients list_images load_adjudicated load_boxes "
    "load_metadata load_official_lists match_images",
    "splits": "CHESTMNIST SPLITS assert_no_patient_overlap hash_split make_split name_unit",
    "statistics": "auc_table average_precision bootstrap_auc bootstrap_ratio delong delong_test difference_table "
    "percentile_interval precision_recall_curve roc_auc roc_curve shuffled_auc",
    "calibration": "apply_platt bootstrap_calibration_error calibration_error choose_thresholds confusion_at fit_platt "
    "rates_table reliability_curve top_k_hits top_k_recall",
    "localization": "boxed_findings center_prior check_boxes localization_table location_prior score_maps",
    "cross_validation": "Fold compare_scores make_folds score_table",
    "shortcuts": "METADATA_COLUMNS measure_leakage predict_without_pixels",
    "duplicates": "FilmHashes find_duplicates find_study_duplicates hash_films",
    "nih_counts": "PUBLISHED compare_counts tell_study",
    "study_tables": "age_table band_table count_together finding_table findings_per_film part_table view_table",
    "audit": "audit_study count_duplicates find_oddities judge patient_overlap take_census",
    "phantom": "PHANTOM_VERSION draw_film plan_nodule_study plan_phantom_study write_phantom_study",
    "images": "decode_film decode_films decode_gray fit_films resize_film",
    "film_files": "FilmError assert_film_decodes inspect_film looks_inverted",
    "dicom": "decode_dicom load_film",
    "input_gate": "FilmWarning check_film check_films measure_color",
    "downloads": "DownloadError download_file open_session",
    "archives": "ArchiveError unpack_archive",
    "sources": "download_with_kagglehub find_attached_study link_study list_remote_study",
    "fetch_plan": "plan_fetch",
    "streaming": "fetch_study list_stored_films",
    "chestmnist": "fetch_chestmnist list_chestmnist_file plan_chestmnist write_chestmnist_study",
    "openi_reports": "read_openi_reports",
    "openi_fetch": "fetch_openi read_search_pages search_openi",
    "openi": "OPENI_VIEWS OpeniReport find_frontal label_openi load_openi_films match_openi_films",
    "records": "parse_records",
    "packed": "PackedStudy find_packed_studies load_packed_study",
    "packed_films": "load_film_files",
    "packing": "pack_study parse_part",
    "film_stores": "FilmStore load_film_store shrink_films",
    "pipeline": "Augmentation augment count_steps list_batch make_eval_dataset make_train_dataset order_films "
    "shift_films",
    "model": "DENSENET121 backbone_layers build_densenet121 load_densenet121 predict_logits set_output_bias",
    "batch_norm": "fuse_batch_norm",
    "model_files": "ModelFileError check_model_file hash_model load_model load_weights",
    "losses": "AsymmetricLoss WeightedBinaryCrossentropy make_loss",
    "checkpoints": "StateStore",
    "validation": "ValidationAUC averaged_weights",
    "training": "TrainingState fit_from_state",
    "cohorts": "Cohort cohort_of_files load_folder_cohort load_jsrt_cohort load_nih_cohort load_openi_cohort "
    "make_cohort_dataset read_cohort_films",
    "features": "Backbone FeatureBank build_backbone load_feature_bank load_trained_backbone write_feature_bank",
    "heads": "XVISION HeadTrainer LogisticHead build_head join_head pool_codes predict_head take_codes",
    "subgroups": "gap_table list_subgroups subgroup_table",
    "explain": "build_activation_model explain_films grad_cam make_shifts resize_maps",
    "saliency": "gradient_map occlusion_map smooth_grad smooth_maps",
    "export": "describe_export export_model",
    "exported": "ExportedModel compare_export open_export",
    "batch": "list_films predict_folder",
    "predictions": "CONTRACT LABELS PROBS JoinReport join_predictions load_predictions read_predictions",
    "leaderboard": "add_to_leaderboard gather_scores",
    "card": "fill_model_card",
    "release": "check_release gather_release inspect_release",
    "settings": "choose_settings read_json resolve_path resolve_paths save_figure write_json",
    "runtime": "Runtime prepare_runtime",
    "devices": "Devices connect_devices describe_machine describe_runtime find_commit",
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names.split()}

__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'helpers' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__():
    return __all__
