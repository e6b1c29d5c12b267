"""Images: formats, colour modes, sizes, and everything that must be refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from limoe.data.images import MAX_PIXELS, ImageError, decode


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(width=64, height=48):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def png_header(width, height):
    """A PNG that ends right after its header: what it claims costs nothing to write."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return start + struct.pack(">I", 4) + b"IDAT" + b"abcd" + struct.pack(">I", zlib.crc32(b"IDATabcd"))


def test_an_image_of_the_right_size_keeps_every_pixel():
    image = photo(32, 32)
    np.testing.assert_array_equal(decode(encoded(image), size=32), np.asarray(image))


def test_the_whole_image_is_resized_to_a_square():
    wide = Image.new("RGB", (80, 20), (255, 0, 0))
    wide.paste((0, 0, 255), (40, 0, 80, 20))
    image = decode(encoded(wide), size=16)
    assert image.shape == (16, 16, 3) and image.dtype == np.uint8
    assert image[8, 0].tolist() == [255, 0, 0] and image[8, 15].tolist() == [0, 0, 255]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_every_format_of_the_layout_decodes(kind):
    grey = Image.new("RGB", (30, 40), (120, 130, 140))
    np.testing.assert_allclose(decode(encoded(grey, kind), size=8), np.broadcast_to([120, 130, 140], (8, 8, 3)), atol=3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_colour_mode_becomes_rgb(mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    image = decode(encoded(Image.new("RGB", (9, 9), (255, 255, 255)).convert(mode), kind), size=4)
    np.testing.assert_allclose(image, 255, atol=1)


def test_transparent_pixels_are_black():
    image = decode(encoded(Image.new("RGBA", (9, 9), (255, 255, 255, 0))), size=9)
    assert image.max() == 0


def test_a_large_jpeg_is_close_to_what_the_full_decoding_gives():
    smooth = photo(8, 6).resize((640, 480), Image.Resampling.BICUBIC)
    content = encoded(smooth, "JPEG", quality=95)
    full = Image.open(io.BytesIO(content)).resize((100, 100), Image.Resampling.BILINEAR)
    # Decoding at half the size replaces one box filter by another: within 4 of 255 on a smooth image.
    np.testing.assert_allclose(decode(content, size=100).astype(int), np.asarray(full).astype(int), atol=4)


@pytest.mark.parametrize("side", [10_000, 60_000, 2**31 - 1])
def test_an_absurdly_large_image_is_refused_by_its_header(side):
    assert side * side > MAX_PIXELS
    with pytest.raises(ImageError, match="too large"):
        decode(png_header(side, side), size=8)


def test_the_reason_names_the_size_that_the_header_claims():
    with pytest.raises(ImageError, match="too large: 8200 x 8200 pixels"):
        decode(png_header(8200, 8200), size=8)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no image",
        encoded(photo(), "JPEG")[:400],
        encoded(photo())[:-40],
        png_header(16, 16),
        encoded(photo(), "GIF"),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ],
    ids=["empty", "text", "cut jpeg", "cut png", "header only", "gif", "eps"],
)
def test_what_does_not_decode_is_refused(content):
    with pytest.raises(ImageError, match="does not decode"):
        decode(content, size=8)


def test_damaged_bytes_decode_or_are_refused_but_raise_nothing_else():
    rng = np.random.default_rng(1)
    for kind in ("JPEG", "PNG", "WEBP"):
        whole = encoded(photo(), kind)
        for _ in range(100):
            content = bytearray(whole)
            for at in rng.integers(0, len(content), 3):
                content[at] = rng.integers(256)
            try:
                assert decode(bytes(content), size=8).shape == (8, 8, 3)
            except ImageError:
                continue
