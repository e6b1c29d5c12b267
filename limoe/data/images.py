"""Decoding of images with Pillow, to RGB of one square size."""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

# 64 Mi pixels are 200 MB of RGB in each decoding thread. Without a limit, a file of a few bytes could fill the memory.
MAX_PIXELS = 64 * 2**20
FORMATS = ("JPEG", "PNG", "WEBP")
PREPROCESS = {
    "mode": "RGB",
    "background": [0, 0, 0],
    "resize": "squash",
    "interpolation": "bilinear",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}
"""The preprocessing of images, in the terms of model cards. Mean and std are those of pixel values from 0 to 1."""


class ImageError(ValueError):
    """An image that cannot be used. The message is the reason, reported with the example's key."""


def decode(content: bytes, *, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Decode an image to uint8 RGB and resize it to a square of `size` pixels.

    The resize is bilinear with antialiasing (paper, section 4). For speed, a JPEG at least twice as large is decoded at
    1/2, 1/4 or 1/8 of its size, never below `size`. Transparent pixels are drawn over black. Raises `ImageError` if the
    image does not decode, or before decoding if its header claims more than `MAX_PIXELS`.

    >>> file = io.BytesIO()
    >>> Image.new("RGB", (40, 30), (255, 0, 0)).save(file, "PNG")
    >>> image = decode(file.getvalue(), size=8)
    >>> image.shape, image[0, 0].tolist()
    ((8, 8, 3), [255, 0, 0])
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(f"the image is too large: {width} x {height} pixels, the limit is {MAX_PIXELS}")
            image.draft("RGB", (size, size))
            return to_square(image, size=size)
    except (ImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"the image is too large: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"the image does not decode: it is none of {', '.join(FORMATS)}") from error
    # For damaged bytes, Pillow's decoders raise a dozen types (OSError, SyntaxError, struct.error, zlib.error, ...).
    except Exception as error:
        raise ImageError(f"the image does not decode: {type(error).__name__}: {error}") from error


def to_square(image: Image.Image, *, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Convert an opened image to RGB and resize it as `decode` does.

    >>> to_square(Image.new("L", (3, 5), 7), size=2)[0, 0].tolist()
    [7, 7, 7]
    """
    pixels = image if image.mode == "RGB" else _to_rgb(image)
    if pixels.size != (size, size):
        pixels = pixels.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(pixels)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image).convert("RGB")
    return image.convert("RGB")
