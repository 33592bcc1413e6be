"""The network, its losses, and training that resumes exactly."""

from .batch_norm import StatisticsEstimator, fuse_batch_norm
from .checkpoints import CheckpointStore
from .cost import CHIPS, count_layers, estimate_cost
from .losses import make_loss
from .model import backbone_layers, build_classifier, load_classifier, predict_logits, set_output_bias
from .model_files import load_weights
from .optimizer import AdamW, scale_loss
from .provenance import describe_start, flag_start
from .resume import TrainingCheckpoint, fit_resumable
from .run_record import read_run
from .validation import ValidationAUC
