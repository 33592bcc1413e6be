"""From image files to packed studies: decoding, DICOM, records, shards."""

from .decoding import decode_gray, decode_image, decode_images, fit_images, resize_image
from .dicom import decode_dicom, load_image
from .image_cache import ImageCache, load_image_cache, shrink_images
from .image_files import ImageError, assert_image_decodes, inspect_image, looks_inverted
from .pack import pack_study, parse_part
from .packed import PackedStudy, find_packed_studies, load_image_files, load_packed_study, resolve_paths
from .records import parse_records
