"""What a study holds: labels, splits, an audit, duplicates; and the synthetic study."""

from .audit import audit_study
from .duplicates import ImageHashes, find_duplicates, find_study_duplicates, hash_images
from .finding_names import match_findings
from .labels import (
    ADJUDICATED,
    BOX_FRAME,
    PATHOLOGIES,
    load_adjudicated,
    load_boxes,
    load_metadata,
)
from .readers import load_study
from .readers.openi import read_openi_reports
from .splits import assert_no_patient_overlap, hash_split, make_split, name_unit
from .study_folder import list_images, load_official_lists, match_images
from .synthetic import plan_nodule_study, plan_synthetic_study, write_synthetic_study
from .synthetic_findings import draw_image
