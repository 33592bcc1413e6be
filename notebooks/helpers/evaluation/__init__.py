"""How good scores and heatmaps are, and how certain that is."""

from .auc import auc_table, bootstrap_auc, delong_test, difference_table, roc_auc, shuffled_auc, with_mean
from .bootstrap import bootstrap_ratio, interval_around, percentile_interval
from .calibration import apply_platt, bootstrap_calibration_error, calibration_error, fit_platt, reliability_curve
from .external import External, compare_sites, read_external
from .floors import measure_leakage, predict_by_ridge, predict_without_pixels
from .heatmaps import build_activation_model, explain_images, grad_cam, list_centers, make_shifts, resize_maps
from .localization import boxed_findings, center_prior, localization_table, location_prior, score_maps
from .predictions import (
    add_to_leaderboard,
    assert_no_labels,
    gather_scores,
    join_predictions,
    load_predictions,
    name_columns,
    read_predictions,
)
from .saliency import gradient_map, occlusion_map, smooth_grad, smooth_maps
from .subgroups import gap_table, list_subgroups, subgroup_table
from .thresholds import FEW_POSITIVES, choose_thresholds, confusion_at, rates_table, top_k_hits
