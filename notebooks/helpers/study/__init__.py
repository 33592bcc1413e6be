"""What a study holds: labels, splits, an audit, duplicates, and the synthetic study."""

from .audit import audit_study, count_duplicates, find_oddities, judge, patient_overlap, take_census
from .duplicates import ImageHashes, find_duplicates, find_study_duplicates, hash_images
from .labels import (
    ADJUDICATED,
    BOX_FRAME,
    NODULE_CLASSES,
    PATHOLOGIES,
    has_patients,
    list_images,
    load_adjudicated,
    load_boxes,
    load_metadata,
    load_official_lists,
    match_images,
)
from .nih_counts import PUBLISHED, compare_counts, identify_study
from .splits import CHESTMNIST, SPLITS, assert_no_patient_overlap, hash_split, make_split, name_unit
from .synthetic import SYNTHETIC_VERSION, draw_image, plan_nodule_study, plan_synthetic_study, write_synthetic_study
from .tables import age_table, band_table, count_together, finding_table, findings_per_image, subset_table, view_table
