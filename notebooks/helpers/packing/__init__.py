"""From image files to packed studies: decoding, DICOM, records, shards."""

from .decoding import decode_film, decode_films, decode_gray, fit_films, resize_film
from .dicom import decode_dicom, load_film
from .image_cache import FilmStore, load_film_store, shrink_films
from .image_files import FilmError, assert_film_decodes, inspect_film, looks_inverted
from .pack import pack_study, parse_part
from .packed import PackedStudy, find_packed_studies, load_packed_study, resolve_paths
from .packed_films import load_film_files
from .records import parse_records
