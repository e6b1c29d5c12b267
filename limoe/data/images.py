"""Encoded images to pixels: decode with Pillow, RGB, one square size."""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

# 64 Mi pixels are 200 MB as RGB, for each decoding thread; above that a few bytes of file could fill the memory.
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
"""What becomes of a picture, in words that others use; mean and standard deviation are of values from 0 to 1."""


class ImageError(ValueError):
    """An image that cannot be used; the message is the reason, to be reported with the example's key."""


def decode(content: bytes, *, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The image as uint8 RGB, resized to a square of `size` pixels.

    A plain resize as in the paper (section 4), bilinear with antialiasing. A JPEG at least twice as large is decoded at
    1/2, 1/4 or 1/8 of its size, never below `size`, which is faster. Transparent pixels are laid over black. Raises
    `ImageError` if the image does not decode or if its header claims more than `MAX_PIXELS`; then nothing was decoded.

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
    # Pillow's decoders raise a dozen kinds of exception on damaged bytes (OSError, SyntaxError, struct.error,
    # zlib.error, ...).
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
