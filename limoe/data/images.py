"""Decoding of images with Pillow, to RGB of one square size."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from limoe.config.schema import Config

# Refused by the header. Without a limit, a file of a few bytes could fill the memory.
MAX_PIXELS = 64 * 2**20
# What a decoding thread may take: Pillow holds 4 bytes a pixel, a conversion as many again, and so does a resize of
# transparent pixels. A large JPEG is decoded smaller, and needs less.
MAX_BYTES = 640 * 2**20
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
# First bytes of what is found in data sets and is not read.
_OTHERS = {
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\0\0\1\0": "ICO",
    b"%!PS": "EPS",
    b"%PDF": "PDF",
    b"<svg": "SVG",
    b"<?xml": "SVG or other XML",
    b"<!DOCTYPE": "HTML",
    b"<html": "HTML",
}
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF"}
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_BACKGROUNDS = {"white": (255, 255, 255), "grey": (128, 128, 128), "black": (0, 0, 0)}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What puts a picture upright, by its EXIF orientation."""
# Share of the area that a random crop keeps at least, and its most extreme proportions.
_LEAST_AREA, _MOST_RATIO = 0.5, 4 / 3


class ImageError(ValueError):
    """An image that cannot be used. The message is the reason, reported with the example's key."""


@dataclass(frozen=True)
class Preprocess:
    """What becomes of a picture: RGB over `background`, and resized with antialiasing to a square of `size` pixels.

    `squash` takes the whole picture (paper, section 4), `crop` its central square. `whole` keeps the proportions and
    makes the short side at most `2 * size`, for `augmented`. Raises ValueError for a size below one pixel.

    >>> Preprocess(8).resize
    'squash'
    """

    size: int
    resize: Literal["squash", "crop", "whole"] = "squash"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    background: Literal["white", "grey", "black"] = "white"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size {self.size} must be at least 1 pixel")

    def described(self) -> dict[str, Any]:
        """Describe it in the terms of model cards. Mean and std are those of pixel values from 0 to 1."""
        return {
            "size": [self.size, self.size],
            "mode": "RGB",
            "background": list(_BACKGROUNDS[self.background]),
            "resize": self.resize,
            "interpolation": self.interpolation,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
        }


def preprocess_of(config: Config, *, training: bool = False) -> Preprocess:
    """Choose what becomes of the pictures of a run. Only `training` crops at random; all else then cuts the centre.

    >>> from limoe.config.presets import preset
    >>> preprocess_of(preset("b16"))
    Preprocess(size=224, resize='squash', interpolation='bilinear', background='white')
    """
    data, chosen = config.data, config.data.preprocess
    resize = chosen if chosen != "augment" else "whole" if training else "crop"
    return Preprocess(config.model.image_size, resize, data.interpolation, data.background)


def decode(content: bytes, preprocess: Preprocess) -> UInt8[np.ndarray, "H W 3"]:
    """Decode an image, the first frame of several, and prepare it: uint8 RGB, a square unless it is kept whole.

    For speed, a JPEG at least twice as large is decoded at 1/2, 1/4 or 1/8 of its size, never below what is wanted.
    Raises `ImageError` if the image does not decode, or before decoding if its header claims more than `MAX_PIXELS` or
    decoding would take more than `MAX_BYTES`.

    >>> file = io.BytesIO()
    >>> Image.new("RGB", (40, 30), (255, 0, 0)).save(file, "PNG")
    >>> image = decode(file.getvalue(), Preprocess(8))
    >>> image.shape, image[0, 0].tolist()
    ((8, 8, 3), [255, 0, 0])
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(f"the image is too large: {width} x {height} pixels, the limit is {MAX_PIXELS}")
            least = preprocess.size * (2 if preprocess.resize == "whole" else 1)
            image.draft("RGB", (least, least))
            return prepare(image, preprocess)
    except (ImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"the image is too large: {error}") from error
    except UnidentifiedImageError as error:
        known = _format_of(content)
        what = f"it is {known}, and only {', '.join(FORMATS)} are read" if known else f"none of {', '.join(FORMATS)}"
        raise ImageError(f"the image does not decode: {what}") from error
    # For damaged bytes, Pillow's decoders raise a dozen types (OSError, SyntaxError, struct.error, zlib.error, ...).
    except Exception as error:
        raise ImageError(f"the image does not decode: {type(error).__name__}: {error}") from error


def _format_of(content: bytes) -> str:
    """Name a format that is not read, by its first bytes; "" if it is not known."""
    if content[4:8] == b"ftyp":
        return _BRANDS.get(content[8:12], "a video or HEIF")
    start = content[:64].lstrip()
    return next((name for first, name in _OTHERS.items() if content.startswith(first) or start.startswith(first)), "")


def prepare(image: Image.Image, preprocess: Preprocess) -> UInt8[np.ndarray, "H W 3"]:
    """Turn an opened image upright, convert it to RGB over the background and resize it, as `decode` does.

    >>> prepare(Image.new("L", (3, 5), 7), Preprocess(2))[0, 0].tolist()
    [7, 7, 7]
    """
    clear = image.has_transparency_data and not image.mode.startswith("I")
    copies = (image.mode not in ("RGB", "RGBA")) + clear
    if (needed := 4 * image.width * image.height * (1 + copies)) > MAX_BYTES:
        raise ImageError(f"the image is too large: decoding takes {needed} bytes, the limit is {MAX_BYTES}")
    pixels = _resized(_in_colour(image, "RGBA" if clear else "RGB"), preprocess)
    if clear:
        ground = Image.new("RGBA", pixels.size, (*_BACKGROUNDS[preprocess.background], 255))
        pixels = Image.alpha_composite(ground, pixels).convert("RGB")
    # The small picture is turned: a square that was cut from the middle, or the whole, is the same either way.
    turn = _TURNS.get(_orientation(image))
    return np.asarray(pixels if turn is None else pixels.transpose(turn))


def _in_colour(image: Image.Image, mode: Literal["RGB", "RGBA"]) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to white
        high = np.clip(np.asarray(image), 0, 2**16 - 1) >> 8
        image = Image.fromarray(high.astype(np.uint8))
    return image if image.mode == mode else image.convert(mode)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, TypeError, LookupError, OSError, struct.error):
        return 1  # damaged EXIF data say nothing about the picture


def _resized(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    (width, height), size, box = image.size, (preprocess.size, preprocess.size), None
    short = min(width, height)
    if preprocess.resize == "crop":
        left, top = (width - short) / 2, (height - short) / 2
        box = (left, top, left + short, top + short)
    elif preprocess.resize == "whole":
        share = min(1.0, 2 * preprocess.size / short)
        size = (max(1, round(width * share)), max(1, round(height * share)))
    if image.size == size:
        return image
    return image.resize(size, _FILTERS[preprocess.interpolation], box)


def augmented(
    picture: UInt8[np.ndarray, "H W 3"], draws: np.ndarray, preprocess: Preprocess
) -> UInt8[np.ndarray, "size size 3"]:
    """Cut a random part of a `whole` picture, mirror it or not, and resize it to a square of `size` pixels.

    `draws` are five numbers from 0 to 1: area (half of the picture up to all of it), proportions (3:4 to 4:3), two for
    the place, and one above 0.5 if it is mirrored.

    >>> picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    >>> augmented(picture, np.array([1, 0.5, 0, 0, 0.9]), Preprocess(2))[:, :, 0].tolist()
    [[3, 0], [9, 6]]
    """
    area, proportions, across, down, mirrored = draws.tolist()
    height, width = picture.shape[:2]
    side = (height * width * (_LEAST_AREA + (1 - _LEAST_AREA) * area)) ** 0.5
    ratio = _MOST_RATIO ** (proportions - 0.5)
    cut_width, cut_height = min(width, side * ratio), min(height, side / ratio)
    left, top = (width - cut_width) * across, (height - cut_height) * down
    box = (left, top, left + cut_width, top + cut_height)
    cut = Image.fromarray(picture).resize((preprocess.size, preprocess.size), _FILTERS[preprocess.interpolation], box)
    return np.asarray(cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored > 0.5 else cut)
