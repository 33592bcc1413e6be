"""The study of nodules: images with a nodule against normal ones, classified by cached features."""

from .cohorts import load_folder_cohort, load_jsrt_cohort, load_nih_cohort, load_openi_cohort, read_cohort_images
from .cross_validation import compare_scores, make_folds, score_table
from .features import build_backbone, load_feature_cache, load_trained_backbone, write_feature_cache
from .heads import XVISION, HeadTrainer, LogisticHead, build_head, join_head, pool_features
from .openi_files import fetch_openi, read_openi_reports
