"""Images: formats, colour modes, sizes, and everything that must be refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from limoe.config.presets import preset
from limoe.config.settings import override
from limoe.data import images
from limoe.data.images import MAX_PIXELS, ImageError, Preprocess, augmented, decode, prepare, preprocess_of


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
    np.testing.assert_array_equal(decode(encoded(image), Preprocess(32)), np.asarray(image))


def test_the_whole_image_is_resized_to_a_square():
    wide = Image.new("RGB", (80, 20), (255, 0, 0))
    wide.paste((0, 0, 255), (40, 0, 80, 20))
    image = decode(encoded(wide), Preprocess(16))
    assert image.shape == (16, 16, 3) and image.dtype == np.uint8
    assert image[8, 0].tolist() == [255, 0, 0] and image[8, 15].tolist() == [0, 0, 255]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_every_format_of_the_layout_decodes(kind):
    grey = Image.new("RGB", (30, 40), (120, 130, 140))
    off = np.abs(decode(encoded(grey, kind), Preprocess(8)).astype(int) - [120, 130, 140])
    assert off.max() <= (3 if kind in ("JPEG", "WEBP") else 0), "JPEG and WebP round in another colour space"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_colour_mode_becomes_rgb(mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    image = decode(encoded(Image.new("RGB", (9, 9), (255, 255, 255)).convert(mode), kind), Preprocess(4))
    np.testing.assert_allclose(image, 255, atol=1)


@pytest.mark.parametrize(("ground", "value"), [("white", 255), ("grey", 128), ("black", 0)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("size", [9, 3])
def test_a_black_drawing_on_transparent_ground_shows_on_the_background(ground, value, mode, size):
    drawing = Image.new("RGBA", (9, 9), (255, 0, 0, 0))  # a colour under full transparency must not bleed in
    drawing.paste((0, 0, 0, 255), (3, 3, 6, 6))
    seen = decode(encoded(drawing.convert(mode)), Preprocess(size, background=ground))
    assert (seen.max(axis=2) == seen.min(axis=2)).all()
    assert seen[size // 2, size // 2, 0] <= (0 if size == 9 else value / 2), "a small square takes from around it"
    assert seen[0, 0, 0] == value if size == 9 else seen[0, 0, 0] >= value * 0.9


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(kind, orientation):
    upright = Image.new("RGB", (64, 32), (255, 0, 0))
    upright.paste((0, 0, 255), (0, 0, 16, 16))
    turn = images._TURNS.get(orientation)
    back = {
        Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
        Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
    }
    stored = upright if turn is None else upright.transpose(back.get(turn, turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    content = encoded(stored, kind, exif=exif, **options)
    for resize in ("squash", "crop", "whole"):
        want, seen = (decode(one, Preprocess(10, resize)) for one in (encoded(upright, kind, **options), content))
        np.testing.assert_allclose(seen.astype(int), want.astype(int), atol=0 if kind != "JPEG" else 8)
    if kind == "JPEG":
        damaged = content.replace(b"II*\0", b"II*\1").replace(b"MM\0*", b"MM\1*")
        assert decode(damaged, Preprocess(10)).shape == (10, 10, 3)


def test_sixteen_bits_of_grey_keep_their_contrast():
    steps = np.linspace(0, 2**16 - 1, 64).astype(np.uint16).reshape(8, 8)
    seen = decode(encoded(Image.fromarray(steps)), Preprocess(8))
    np.testing.assert_array_equal(seen[:, :, 0], steps // 256)
    wide = prepare(Image.fromarray(steps.astype(np.int32)), Preprocess(8))
    np.testing.assert_array_equal(wide, seen)


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("P", (8, 8), number) for number in range(2)]
    for frame in frames:
        frame.putpalette([255, 0, 0, 0, 255, 0])
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(content, Preprocess(4))[0, 0].tolist() == [255, 0, 0]


def test_the_centre_or_the_whole_or_a_random_part():
    wide = Image.new("RGB", (80, 20), (255, 0, 0))
    wide.paste((0, 255, 0), (30, 0, 50, 20))
    # The filter reaches one pixel over the cut, as if the whole had been resized and then cut.
    assert (decode(encoded(wide), Preprocess(4, "crop"))[:, 1:3] == (0, 255, 0)).all()
    assert (decode(encoded(wide), Preprocess(4))[:, 0] == (255, 0, 0)).all()
    whole = decode(encoded(wide), Preprocess(4, "whole"))
    assert whole.shape == (8, 32, 3), "the short side becomes twice the size"
    assert decode(encoded(wide), Preprocess(64, "whole")).shape == (20, 80, 3), "nothing is enlarged"
    # Columns from 0 on, so that what is seen says where it was.
    ramp = np.broadcast_to(np.arange(0, 128, 2, dtype=np.uint8)[None, :, None], (64, 64, 3))
    parts = [augmented(ramp, draws, Preprocess(16)) for draws in np.random.default_rng(0).random((40, 5))]
    areas = [abs(int(part[0, -1, 0]) - int(part[0, 0, 0])) for part in parts]
    assert all(part.shape == (16, 16, 3) for part in parts) and len({part.tobytes() for part in parts}) > 30
    assert min(areas) > 128 * 0.5**0.5 * (3 / 4) ** 0.5 - 16 and max(areas) < 128
    mirrored = [part[0, 0, 0] > part[0, -1, 0] for part in parts]
    assert 10 < sum(mirrored) < 30


def test_only_training_crops_at_random():
    config = override(preset("tiny"), ["data.preprocess=augment", "interpolation=bicubic", "background=grey"])
    assert preprocess_of(config) == Preprocess(48, "crop", "bicubic", "grey")
    assert preprocess_of(config, training=True).resize == "whole"
    assert preprocess_of(preset("tiny"), training=True) == Preprocess(48) == preprocess_of(preset("tiny"))


def test_the_filter_is_the_one_that_was_chosen():
    content = encoded(photo())
    for name, kind in (("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)):
        wanted = np.asarray(photo().resize((20, 20), kind))
        np.testing.assert_array_equal(decode(content, Preprocess(20, interpolation=name)), wanted)


def test_what_decoding_would_take_is_bounded(monkeypatch):
    """4 bytes a pixel, and copies: those of a transparent palette are three times as many as of RGB."""
    monkeypatch.setattr(images, "MAX_BYTES", 4 * 64 * 48)
    assert decode(encoded(photo()), Preprocess(8)).shape == (8, 8, 3)
    for mode in ("L", "RGBA", "P"):
        with pytest.raises(ImageError, match=r"too large: decoding takes \d+ bytes, the limit is 12288"):
            decode(encoded(photo().convert(mode)), Preprocess(8))
    assert decode(encoded(photo(512, 384), "JPEG"), Preprocess(8)).shape == (8, 8, 3), "it is decoded smaller"


def test_a_large_jpeg_is_close_to_what_the_full_decoding_gives():
    smooth = photo(8, 6).resize((640, 480), Image.Resampling.BICUBIC)
    content = encoded(smooth, "JPEG", quality=95)
    full = Image.open(io.BytesIO(content)).resize((100, 100), Image.Resampling.BILINEAR)
    # Decoding at half the size replaces one box filter by another: within 4 of 255 on a smooth image.
    np.testing.assert_allclose(decode(content, Preprocess(100)).astype(int), np.asarray(full).astype(int), atol=4)


@pytest.mark.parametrize("side", [10_000, 60_000, 2**31 - 1])
def test_an_absurdly_large_image_is_refused_by_its_header(side):
    assert side * side > MAX_PIXELS
    with pytest.raises(ImageError, match="too large"):
        decode(png_header(side, side), Preprocess(8))


def test_the_reason_names_the_size_that_the_header_claims():
    with pytest.raises(ImageError, match="too large: 8200 x 8200 pixels"):
        decode(png_header(8200, 8200), Preprocess(8))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no image",
        encoded(photo(), "JPEG")[:400],
        encoded(photo())[:-40],
        png_header(16, 16),
    ],
    ids=["empty", "text", "cut jpeg", "cut png", "header only"],
)
def test_what_does_not_decode_is_refused(content):
    with pytest.raises(ImageError, match="does not decode"):
        decode(content, Preprocess(8))


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (encoded(photo(), "TIFF"), "TIFF"),
        (b"\0\0\0\x20ftypavif" + bytes(20), "AVIF"),
        (b"\0\0\0\x20ftypheic" + bytes(20), "HEIC"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "EPS"),
        (b"\n <svg xmlns='a'/>", "SVG"),
        (b"<!DOCTYPE html><html>", "HTML"),
    ],
)
def test_other_formats_are_refused_by_name(content, name):
    with pytest.raises(ImageError, match=f"does not decode: it is {name}, and only JPEG, PNG, WEBP, BMP, GIF are read"):
        decode(content, Preprocess(8))


def test_damaged_bytes_decode_or_are_refused_but_raise_nothing_else():
    rng = np.random.default_rng(1)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        whole = encoded(photo(), kind)
        for _ in range(100):
            content = bytearray(whole)
            for at in rng.integers(0, len(content), 3):
                content[at] = rng.integers(256)
            try:
                assert decode(bytes(content), Preprocess(8)).shape == (8, 8, 3)
            except ImageError:
                continue
