"""The second study: nodules against normal images, on cached features."""

from .cohorts import (
    Cohort,
    cohort_of_files,
    load_folder_cohort,
    load_jsrt_cohort,
    load_nih_cohort,
    load_openi_cohort,
    make_cohort_dataset,
    read_cohort_images,
)
from .cross_validation import Fold, compare_scores, make_folds, score_table
from .features import (
    Backbone,
    FeatureCache,
    build_backbone,
    load_feature_cache,
    load_trained_backbone,
    write_feature_cache,
)
from .heads import XVISION, HeadTrainer, LogisticHead, build_head, join_head, pool_features, predict_head, take_features
from .openi import OPENI_VIEWS, OpeniReport, find_frontal, label_openi, load_openi_images, match_openi_images
from .openi_fetch import fetch_openi, read_search_pages, search_openi
from .openi_reports import read_openi_reports
