"""The network, its losses, and training that resumes exactly."""

from .batch_norm import fuse_batch_norm
from .checkpoints import CheckpointStore
from .losses import make_loss
from .model import backbone_layers, build_classifier, load_classifier, predict_logits, set_output_bias
from .model_files import load_weights
from .resume import TrainingCheckpoint, fit_resumable
from .validation import ValidationAUC
