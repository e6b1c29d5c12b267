"""Scenes of the embedded world: their contents, and how they become pixels.

Every shape is a signed distance, negative inside, in units of the object's half side. So one rule draws all shapes with
smooth edges: a shape covers the share `1/2 - distance in pixels` of a pixel, clipped to 0..1.
"""

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

_Number = TypeVar("_Number", float, np.ndarray)


@dataclass(frozen=True)
class Thing:
    """An object of a scene. Lengths are shares of the image's side, angles radians; x grows right, y downwards."""

    shape: str
    colour: str
    texture: str
    size: str
    x: float
    y: float
    half_side: float
    angle: float
    rgb: tuple[float, float, float]
    light_second_tone: bool
    texture_angle: float
    texture_period: float
    texture_phase: tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """Everything that determines an image and its caption.

    `place` is one of nine places of a single thing ("" for two things). `relation` is the direction from the second
    thing to the first: "left", "right", "above" or "below" ("" for one thing). `complete` asks for a caption without
    omissions.
    """

    things: tuple[Thing, ...]
    background: str
    background_angle: float
    place: str
    relation: str
    complete: bool
    grain_seed: int
    wording_seed: int


def _circle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.hypot(u, v) - 1


def _box(u: np.ndarray, v: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _box(u, v, 0.86, 0.86)


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # The centroid of an upright triangle is below the middle of its height.
    v = v - 0.22
    return np.maximum(v, np.abs(u) * math.sin(math.pi / 3) - v / 2) - 0.6


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # By symmetry, map every point to one half of one point of the star. It has a single edge, tip to inner corner.
    tenth = math.pi / 5
    tip, inner = 1.12, 0.5
    turn = np.arctan2(u, -v)
    turn = np.abs(turn - 2 * tenth * np.round(turn / (2 * tenth)))
    radius = np.hypot(u, v)
    along, across = radius * np.cos(turn), radius * np.sin(turn)
    edge = (inner * math.cos(tenth) - tip, inner * math.sin(tenth))
    return ((along - tip) * edge[1] - across * edge[0]) / math.hypot(*edge)


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.minimum(_box(u, v, 1.0, 0.36), _box(u, v, 0.36, 1.0))


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(u, v) - 0.72) - 0.28


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # A square on its corner, with a disc on each of its two upper sides.
    half = 0.56
    u = np.abs(u)
    v = v - 0.15
    diagonal = math.sqrt(0.5)
    block = np.maximum(np.abs(u + v), np.abs(u - v)) * diagonal - half
    return np.minimum(block, np.hypot(u - half * diagonal, v + half * diagonal) - half)


def _crescent(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.hypot(u, v) - 1, 0.77 - np.hypot(u - 0.53, v))


_DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
    "crescent": _crescent,
}


def _stripes(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.abs(p - np.round(p)) - 0.25


def _dots(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.hypot(p - np.round(p), q - np.round(q)) - 0.32


def _checks(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    across, down = np.abs(p - np.round(p)) - 0.25, np.abs(q - np.round(q)) - 0.25
    return np.where(across * down > 0, 1, -1) * np.minimum(np.abs(across), np.abs(down))


# Signed distance to the second tone, in periods of the texture. A solid texture has no second tone.
_SECOND_TONES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray] | None] = {
    "solid": None,
    "striped": _stripes,
    "dotted": _dots,
    "checkered": _checks,
}

SHAPES: tuple[str, ...] = tuple(_DISTANCES)
TEXTURES: tuple[str, ...] = tuple(_SECOND_TONES)
# Hue in degrees, saturation, value.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0, 0.88, 0.86),
    "orange": (28, 0.92, 0.98),
    "yellow": (55, 0.85, 0.98),
    "green": (125, 0.80, 0.64),
    "cyan": (181, 0.75, 0.85),
    "blue": (224, 0.85, 0.86),
    "purple": (275, 0.70, 0.68),
    "pink": (330, 0.45, 1.0),
}
# RGB from one side of the image to the other.
BACKGROUNDS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "white": ((242, 242, 242), (236, 236, 236)),
    "grey": ((140, 140, 140), (126, 126, 126)),
    "black": ((18, 18, 20), (30, 30, 32)),
    "cream": ((236, 224, 192), (226, 212, 178)),
    "gradient": ((226, 226, 226), (40, 40, 44)),
}
LIGHT_BACKGROUNDS: tuple[str, ...] = ("white", "cream")


def rgb_of(
    colour: str, *, hue_shift: float = 0.0, saturation_scale: float = 1.0, value_scale: float = 1.0
) -> tuple[float, float, float]:
    """Compute the RGB of a named colour, 0..255, with its hue shifted by degrees and saturation and value scaled.

    >>> [round(channel) for channel in rgb_of("red")]
    [219, 26, 26]
    """
    hue, saturation, value = COLOURS[colour]
    channels = colorsys.hsv_to_rgb(
        (hue + hue_shift) / 360 % 1, min(1.0, saturation * saturation_scale), min(1.0, value * value_scale)
    )
    red, green, blue = (255 * channel for channel in channels)
    return red, green, blue


def second_tone(rgb: tuple[float, float, float], *, light: bool) -> tuple[float, float, float]:
    """Compute the second tone of a texture: the object's colour mixed with white or black."""
    red, green, blue = rgb
    if light:
        return 0.22 * red + 0.78 * 255, 0.22 * green + 0.78 * 255, 0.22 * blue + 0.78 * 255
    return 0.3 * red, 0.3 * green, 0.3 * blue


def turned(x: _Number, y: _Number, angle: float) -> tuple[_Number, _Number]:
    """Turn a point, or arrays of points, about the origin."""
    sine, cosine = math.sin(angle), math.cos(angle)
    return x * cosine + y * sine, y * cosine - x * sine


def _covered(distance_in_pixels: np.ndarray) -> np.ndarray:
    return np.clip(0.5 - distance_in_pixels, 0, 1)[..., None]


def _draw(image: np.ndarray, thing: Thing, x: np.ndarray, y: np.ndarray) -> None:
    side = image.shape[0]
    # Draw only the pixels near the object: every shape fits into a circle of 1.25 half sides.
    reach = 1.25 * thing.half_side
    left, right = (int(min(max(side * edge, 0), side)) for edge in (thing.x - reach, thing.x + reach + 1 / side))
    top, bottom = (int(min(max(side * edge, 0), side)) for edge in (thing.y - reach, thing.y + reach + 1 / side))
    dx, dy = x[:, left:right] - thing.x, y[top:bottom] - thing.y
    u, v = turned(dx / thing.half_side, dy / thing.half_side, thing.angle)
    inside = _covered(_DISTANCES[thing.shape](u, v) * (thing.half_side * side))
    surface = np.array(thing.rgb, np.float32)
    tone = _SECOND_TONES[thing.texture]
    if tone is not None:
        p, q = turned(dx / thing.texture_period, dy / thing.texture_period, thing.texture_angle)
        share = _covered(tone(p + thing.texture_phase[0], q + thing.texture_phase[1]) * (thing.texture_period * side))
        second = np.array(second_tone(thing.rgb, light=thing.light_second_tone), np.float32)
        surface = surface + share * (second - surface)
    part = image[top:bottom, left:right]
    part += inside * (surface - part)


def render(scene: Scene, *, image_size: int) -> np.ndarray:
    """Draw a scene as RGB, uint8 `[image_size, image_size, 3]`; the same bytes for the same scene.

    Raises ValueError for an image that is too small to show a texture (under 16 pixels).
    """
    if image_size < 16:
        raise ValueError(f"image_size is {image_size}; textures need at least 16 pixels, 64 are the default")
    centres = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size
    x, y = centres[None, :], centres[:, None]
    start, end = (np.array(rgb, np.float32) for rgb in BACKGROUNDS[scene.background])
    along = (x - 0.5) * math.cos(scene.background_angle) + (y - 0.5) * math.sin(scene.background_angle)
    image = start + np.clip(0.5 + along, 0, 1)[..., None] * (end - start)
    for thing in scene.things:
        _draw(image, thing, x, y)
    grain = np.random.Generator(np.random.Philox(scene.grain_seed)).integers(
        -7, 8, (image_size, image_size, 1), dtype=np.int8
    )
    return np.clip(image + grain + 0.5, 0, 255).astype(np.uint8)
