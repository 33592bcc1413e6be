"""`python -m helpers.export RUN_DIR FORMAT ...` writes exported models; Keras must run on TensorFlow."""

import sys

from .formats import write_formats

write_formats(sys.argv[1], sys.argv[2:])
