"""The second study: images with one finding against normal ones, classified by cached features."""

from .cohorts import load_cohort, read_cohort_images
from .cross_validation import compare_scores, make_folds, score_table
from .features import build_backbone, load_feature_cache, load_trained_backbone, write_feature_cache
from .heads import XVISION, HeadTrainer, LogisticHead, build_head, join_head, pool_features
