"""From image files to packed studies: decoding, DICOM, records, shards."""

from .decoding import decode_image, decode_images
from .dicom import load_image
from .image_files import ImageError, assert_image_decodes, inspect_image
from .pack import pack_study, parse_part
from .packed import load_image_files, load_packed_study, resolve_paths
