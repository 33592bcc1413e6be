"""Reading one image: every pixel format that radiographs come in, letterboxing, and files that are refused unread."""

import io
import resource
import sys
import tracemalloc

import numpy as np
import pytest
import tensorflow as tf
from made_images import SIGNATURE, encode, flip_bit, make_png
from PIL import Image

from helpers.packing import load_image
from helpers.packing.decoding import decode_gray, decode_image, decode_images, fit_images, resize_image
from helpers.packing.image_files import MAX_PIXELS, ImageError, assert_image_decodes, count_held_bits, inspect_image


def draw_image(height, width, seed=0):
    """Returns a smooth gray gradient with some noise, using the full range."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 200, height)[:, None] + np.linspace(0, 45, width)[None]
    image = np.clip(slope + rng.integers(0, 11, (height, width)), 0, 255).astype(np.uint8)
    image[0, :2] = 0, 255
    return image


def decode(data):
    return decode_gray(tf.constant(data)).numpy()[..., 0]


def fit(image, side):
    return resize_image(tf.constant(image[..., None]), side).numpy()[..., 0]


def wide_rgb(gray):
    """Returns a PNG of 16 bits a color, which Pillow cannot write."""
    rows = (b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in gray)
    return make_png(gray.shape[1], gray.shape[0], 16, 2, b"".join(rows))


IMAGE = draw_image(40, 40)
OPAQUE = np.full_like(IMAGE, 255)
LOSSLESS = {
    "gray": encode(IMAGE),
    "16-bit gray": encode(IMAGE.astype(np.uint16) * 257),
    "RGB": encode(np.stack([IMAGE] * 3, -1)),
    "RGBA": encode(np.stack([IMAGE] * 3 + [OPAQUE], -1)),
    "palette": encode(IMAGE, mode="P"),
    "gray and alpha": encode(np.stack([IMAGE, OPAQUE], -1)),
    "16-bit RGB": wide_rgb(IMAGE.astype(np.uint16) * 257),
}


def test_every_lossless_pixel_format_gives_the_gray_image():
    for kind, data in LOSSLESS.items():
        np.testing.assert_array_equal(decode(data), IMAGE, err_msg=kind)
    np.testing.assert_array_equal(decode(encode(IMAGE > 120)), (IMAGE > 120) * np.uint8(255))
    with_alpha = encode(np.stack([IMAGE] * 3 + [IMAGE], -1))  # is ignored
    np.testing.assert_array_equal(decode(with_alpha), IMAGE)


@pytest.mark.parametrize("bits", range(8, 17))
def test_the_bits_that_a_pixel_holds_become_the_whole_range(bits):
    """Detectors of 10 to 15 bits, whose programs write 16 as they are."""
    top = 2**bits - 1
    stored = np.rint(IMAGE / 255 * top).astype(np.uint16)
    for data in (encode(stored), wide_rgb(stored)):
        np.testing.assert_array_equal(decode(data), IMAGE)
        assert count_held_bits(data) == bits
    assert load_image(encode(stored))[1] == (
        [f"of the 16 bits of a pixel only {bits} are used: scaled by these"] if bits < 16 else []
    )


def test_files_of_other_depths_hold_what_they_declare():
    for data in (encode(IMAGE // 9), encode(IMAGE, "JPEG"), b"", encode(IMAGE.astype(np.uint16))[:90]):
        assert count_held_bits(data) == 16


def test_a_palette_out_of_order_is_looked_up():
    indexes = (IMAGE // 16).astype(np.uint8)
    image = Image.fromarray(indexes, "L").convert("P")
    image.putpalette([level for index in range(16) for level in [255 - 17 * index] * 3])
    for bits in (4, 8):
        file = io.BytesIO()
        image.save(file, "PNG", bits=bits)
        np.testing.assert_array_equal(decode(file.getvalue()), 255 - 17 * indexes)


def test_jpeg_is_close():
    smooth = np.linspace(0, 255, 64).astype(np.uint8)[:, None].repeat(64, 1)
    for mode in ("L", "RGB"):
        difference = decode(encode(smooth, "JPEG", mode, quality=95)).astype(int) - smooth
        assert np.abs(difference).max() <= 4
        assert np.abs(difference).mean() < 1


@pytest.mark.slow
def test_decoding_is_the_same_eagerly_in_a_function_and_in_a_dataset():
    wide = draw_image(30, 44)
    images = [*LOSSLESS.values(), encode(IMAGE, "JPEG"), encode(wide), encode(wide.T.copy()), encode(IMAGE > 99)]
    eager = [decode_image(tf.constant(data), 32).numpy() for data in images]
    traced = tf.function(lambda data: decode_image(data, 32), input_signature=[tf.TensorSpec([], tf.string)])
    mapped = tf.data.Dataset.from_tensor_slices(images).map(lambda data: decode_image(data, 32))
    assert mapped.element_spec == tf.TensorSpec((32, 32, 1), tf.uint8)
    for one, data, three in zip(eager, images, mapped, strict=True):
        np.testing.assert_array_equal(traced(tf.constant(data)).numpy(), one)
        np.testing.assert_array_equal(three.numpy(), one)


def test_shrinking_averages_areas():
    image = np.random.default_rng(3).integers(0, 256, (192, 192), dtype=np.uint8)
    blocks = image.reshape(64, 3, 64, 3).mean((1, 3))
    difference = fit(image, 64) - blocks
    assert np.abs(difference).max() <= 0.5 + 1e-3  # rounding to whole gray levels and nothing else


@pytest.mark.parametrize("side", [1, 7, 64])
def test_a_quarter_of_the_side_is_the_rounded_mean_of_sixteen_pixels(side):
    """The way that most images take, with sums of bits side by side: no carry from one into the other."""
    rng = np.random.default_rng(side)
    images = [rng.integers(0, 256, (4 * side, 4 * side)), np.full((4 * side, 4 * side), 255)]
    images += [
        np.kron(rng.integers(0, 2, (side, side)) * 255, np.ones((4, 4), int)),
        rng.integers(0, 2, images[0].shape),
    ]
    for image in images:
        expected = np.rint(image.reshape(side, 4, side, 4).mean(axis=(1, 3)))  # halves to even, as TensorFlow rounds
        np.testing.assert_array_equal(fit(image.astype(np.uint8), side), expected)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(64, 64), (16, 16), (64, 50), (None, 64), (None, None)])
def test_resizing_builds_whatever_is_known_of_the_shape_and_gives_the_same(shape):
    original = np.random.default_rng(1).integers(0, 256, [n or 64 for n in shape], dtype=np.uint8)
    resize = tf.function(lambda image: resize_image(image, 16), input_signature=[tf.TensorSpec((*shape, 1), tf.uint8)])
    np.testing.assert_array_equal(resize(original[..., None])[..., 0], fit(original, 16))


def test_an_image_of_the_right_size_stays_as_it_is():
    np.testing.assert_array_equal(fit(IMAGE, 40), IMAGE)


@pytest.mark.parametrize("upright", [True, False])
def test_an_image_that_is_not_square_is_letterboxed(upright):
    """Anatomy is neither cut (all four corners are there) nor squeezed (a disk stays a disk)."""
    y, x = np.mgrid[:96, :64]
    image = np.full((96, 64), 60, np.uint8)
    image[(y - 48) ** 2 + (x - 32) ** 2 <= 20**2] = 200
    image[:8, :8], image[:8, -8:], image[-8:, :8], image[-8:, -8:] = 110, 130, 150, 170
    fitted = fit(image if upright else image.T.copy(), 48)
    fitted = fitted if upright else fitted.T

    assert (fitted[:, :8] == 0).all() and (fitted[:, -8:] == 0).all()
    inside = fitted[:, 8:-8]
    assert (inside > 0).all()
    corners = inside[1, 1], inside[1, -2], inside[-2, 1], inside[-2, -2]
    assert corners == (110, 130, 150, 170)
    disk = inside > 180
    assert abs(int(disk.any(0).sum()) - int(disk.any(1).sum())) <= 1
    assert abs(int(disk.any(0).sum()) - 20) <= 1


def test_odd_padding_is_all_there():
    fitted = fit(np.full((20, 27), 90, np.uint8), 27)
    assert fitted.shape == (27, 27)
    assert (fitted == 90).all(1).sum() == 20
    assert (fitted == 0).all(1).sum() == 7


def test_an_extremely_narrow_image_keeps_at_least_one_pixel():
    fitted = fit(np.full((2000, 16), 90, np.uint8), 32)
    assert (fitted == 90).all(0).sum() == 1
    assert (fitted == 0).all(0).sum() == 31


def test_enlarging_keeps_gray_levels_and_places():
    image = np.zeros((20, 20), np.uint8)
    image[:10] = 200
    fitted = fit(image, 64)
    assert (fitted[:30] == 200).all() and (fitted[-30:] == 0).all()
    assert (np.diff(fitted.astype(int), axis=0) <= 0).all()
    slope = fit(np.linspace(0, 255, 20).astype(np.uint8)[None].repeat(20, 0), 64)
    assert abs(slope.mean() - 127.5) < 1 and (np.diff(slope.astype(int), axis=1) >= 0).all()
    assert len(np.unique(slope)) > 50  # levels between those of the 20 columns: interpolated, not repeated


def test_real_images_decode_to_what_pillow_says(shared_data):
    paths = sorted((shared_data / "nih_original" / "images_001" / "images").glob("*.png"))
    gray = [path for path in paths if path.read_bytes()[25] == 0][:2]
    rgba = [path for path in paths if path.read_bytes()[25] == 6][:1]
    assert len(gray) == 2 and len(rgba) == 1
    for path in gray + rgba:
        with Image.open(path) as image:
            channels = np.asarray(image)
        expected = channels if channels.ndim == 2 else channels[..., 0]
        if channels.ndim == 3:
            assert (channels[..., :3] == expected[..., None]).all()
        np.testing.assert_array_equal(decode(path.read_bytes()), expected)
        shrunk = fit(expected, 256) - expected.reshape(256, 4, 256, 4).mean((1, 3))
        assert np.abs(shrunk).max() <= 0.5 + 1e-3


def test_inspect_image_names_the_pixel_format():
    modes = {"gray": "L", "16-bit gray": "I;16", "RGB": "RGB", "RGBA": "RGBA", "palette": "P", "gray and alpha": "LA"}
    for kind, mode in modes.items():
        assert inspect_image(LOSSLESS[kind]) == {"format": "PNG", "width": 40, "height": 40, "mode": mode}


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_images_whose_pixels_are_cut_short_are_refused(kind):
    data = encode(draw_image(200, 200), kind)
    assert_image_decodes(data)
    inspect_image(data[: len(data) // 2])  # the header is whole
    with pytest.raises(ImageError, match="damaged or cut short"):
        assert_image_decodes(data[: len(data) // 2])


def test_inspect_image_reports_width_height_and_format():
    image = draw_image(30, 50)
    assert inspect_image(encode(image, "JPEG")) == {"format": "JPEG", "width": 50, "height": 30, "mode": "L"}
    assert inspect_image(encode(image))["width"] == 50


GOOD = encode(IMAGE)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><html><body>Please sign in</body></html>", "neither PNG nor JPEG"),
        (b"\0" * 2000, "neither PNG nor JPEG"),
        (encode(IMAGE, "GIF"), "neither PNG nor JPEG"),
        (encode(IMAGE, "BMP"), "neither PNG nor JPEG"),
        (encode(IMAGE[:1, :1]), "1 x 1 pixels: a side is below 16"),
        (encode(IMAGE[:15]), "40 x 15 pixels: a side is below 16"),
        (make_png(20_000, 20_000), "more than the 33,554,432 "),
        (make_png(10_000, 10_000), "more than the 33,554,432 "),
        (make_png(5_793, 5_793), "5793 x 5793 pixels, more than the 33,554,432 "),
        (GOOD[:20], "broken header"),
        (GOOD[:29], "broken header"),
        (GOOD[:8], "broken header"),
        (GOOD[:19] + b"\x07" + GOOD[20:], "broken header"),  # the checksum of the header does not fit
        (encode(IMAGE, "JPEG")[:30], "broken header"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_inspect_image_refuses_other_files_and_says_why(data, reason):
    with pytest.raises(ImageError, match=reason):
        inspect_image(data)


def test_the_smallest_and_the_largest_image_are_accepted():
    assert inspect_image(encode(IMAGE[:16, :16]))["width"] == 16
    assert inspect_image(make_png(8192, 4096))["width"] * 4096 == MAX_PIXELS


def test_a_decompression_bomb_is_refused_without_room_for_its_pixels():
    bomb = make_png(20_000, 20_000, raw=b"")
    assert len(bomb) < 100
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match="declares"):
            inspect_image(bomb)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5_000_000  # the pixels would take 400 MB


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_an_image_error_even_where_warnings_are_errors():
    with pytest.raises(ImageError, match="declares"):
        inspect_image(make_png(10_000, 10_000))


def test_no_damage_to_a_file_raises_anything_but_the_errors_of_images():
    rng = np.random.default_rng(7)
    for data in (GOOD, LOSSLESS["palette"], encode(IMAGE, "JPEG")):
        for _ in range(60):
            broken = bytearray(data[: rng.integers(1, len(data) + 1)])
            for place in rng.integers(0, min(len(broken), 60), 3):
                broken[place] = rng.integers(256)
            try:
                inspect_image(bytes(broken))
            except ImageError as error:
                assert str(error)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_cut_short_cannot_be_decoded(kind):
    data = encode(draw_image(128, 128), kind)
    for share in (0.3, 0.6, 0.9, 0.97):
        with pytest.raises(tf.errors.InvalidArgumentError):
            decode(data[: int(share * len(data))])


@pytest.mark.parametrize("data", [b"", b"\x89PNG", b"\xff\xd8", b"nonsense", b"\x89PNG" + 21 * b"\x10"])
def test_bytes_too_short_for_a_header_are_an_error_eagerly_and_in_a_dataset(data):
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode(data)
    with pytest.raises(tf.errors.InvalidArgumentError):
        list(tf.data.Dataset.from_tensors(data).map(decode_gray))


def test_a_png_without_its_end_or_with_one_flipped_bit_cannot_be_decoded():
    data = encode(draw_image(128, 128))
    for broken in (data[:-12], data[:-1], flip_bit(data, len(data) // 2)):
        with pytest.raises(tf.errors.InvalidArgumentError):
            decode(broken)


# Batches in a graph, as the exported model reads them.


@pytest.fixture(scope="module")
def batch():
    """The graph of `decode_images` at 24 pixels."""
    return tf.function(lambda data: decode_images(data, 24), input_signature=[tf.TensorSpec([None], tf.string)])


@pytest.mark.slow
def test_batch_of_files_is_decoded_as_each_alone(batch):
    files = [
        *LOSSLESS.values(),
        encode(draw_image(30, 50)),
        encode(draw_image(90, 20), "JPEG"),
        encode(draw_image(16, 16)),
    ]
    images = batch(tf.constant(files)).numpy()
    assert images.shape == (len(files), 24, 24, 1) and images.dtype == np.uint8
    for image, data in zip(images, files, strict=True):
        assert (image == decode_image(data, 24).numpy()).all()
    assert batch(tf.constant([], tf.string)).shape == (0, 24, 24, 1)


BAD = {
    "empty": b"",
    "text": b"not an image",
    "GIF": encode(IMAGE, "GIF"),
    "BMP": encode(IMAGE, "BMP"),
    "signature alone": SIGNATURE,
    "cut PNG": encode(IMAGE)[:-200],
    "cut JPEG": encode(IMAGE, "JPEG")[:200],
    "too small": encode(IMAGE[:8]),
    "bomb": make_png(20_000, 20_000),
    "negative width": make_png(2**31 + 16, 16),
}


@pytest.mark.slow
@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_batch_names_its_bad_items(batch, data):
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"image_bytes, item 1, 3 \(from 0\): no complete PNG"):
        batch(tf.constant([encode(IMAGE), data, encode(IMAGE), data]))


@pytest.mark.slow
def test_bomb_in_a_batch_is_refused_unread(batch):
    """400 megapixels of one bit in 50 kB: decoding them would take 400 MB."""
    bomb = make_png(20_000, 20_000, depth=1, raw=bytes(2501 * 20_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(tf.errors.InvalidArgumentError, match="item 0"):
        batch(tf.constant([bomb]))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1 if sys.platform == "darwin" else 1024) < 100e6


@pytest.mark.parametrize("shape", [(40, 40), (41, 23), (23, 41), (100, 64), (17, 24), (24, 24), (24, 9)])
def test_matrix_products_fit_images_as_resizing_does(shape):
    """Larger, smaller, wide and high images: equal but for single gray levels where an average lies at a half."""
    image = draw_image(*shape)
    fitted = fit_images(tf.cast(image[None, ..., None], tf.float32), 24).numpy()[0, ..., 0]
    difference = np.abs(fitted - fit(image, 24))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.06
    if max(shape) == 24:
        assert (difference == 0).all()
