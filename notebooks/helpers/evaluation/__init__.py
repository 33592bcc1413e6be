"""How good scores and heatmaps are, and how sure that is."""

from .auc import (
    auc_table,
    average_precision,
    bootstrap_auc,
    bootstrap_ratio,
    delong,
    delong_test,
    difference_table,
    percentile_interval,
    precision_recall_curve,
    roc_auc,
    roc_curve,
    shuffled_auc,
)
from .calibration import (
    apply_platt,
    bootstrap_calibration_error,
    calibration_error,
    choose_thresholds,
    confusion_at,
    fit_platt,
    rates_table,
    reliability_curve,
    top_k_hits,
    top_k_recall,
)
from .floors import METADATA_COLUMNS, measure_leakage, predict_without_pixels
from .heatmaps import build_activation_model, explain_images, grad_cam, make_shifts, resize_maps
from .leaderboard import add_to_leaderboard, gather_scores
from .localization import boxed_findings, center_prior, check_boxes, localization_table, location_prior, score_maps
from .predictions import CONTRACT, LABELS, PROBS, JoinReport, join_predictions, load_predictions, read_predictions
from .saliency import gradient_map, occlusion_map, smooth_grad, smooth_maps
from .subgroups import gap_table, list_subgroups, subgroup_table
