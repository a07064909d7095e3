"""Placeholders for the images of models: a landscape that depends on a text, and a banner.

The banner says that no model ran, so that nobody takes the image for a model's.
"""

from __future__ import annotations

import colorsys
import hashlib
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from comfy_emulator.nodes.pixels import FloatArray, from_picture, to_picture

_HILLS = 4
_SMALLEST_TEXT = 7
_SMALLEST_DETAIL = 9
_TITLES: Sequence[Sequence[str]] = (
    ("EMULATOR \N{MIDDLE DOT} no model ran",),
    ("EMULATOR", "no model ran"),
    ("no model ran",),
    ("no model", "ran"),
    ("no", "model", "ran"),
)
_BAND = (12, 12, 20, 178)
_TITLE_COLOUR = (255, 214, 92)
_DETAIL_COLOUR = (236, 236, 240)

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def seeded(key: str) -> np.random.Generator:
    """Return a generator of random numbers that depend on a text only."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))


def landscape(key: str, width: int, height: int, moment: float = 0.0) -> FloatArray:
    """Draw hills under a sun: (height, width, 3), values 0 to 1.

    Args:
        key: the text that the image depends on.
        width: in pixels.
        height: in pixels.
        moment: seconds since the start of a video, in which the hills drift.
    """
    random = seeded(key)
    hue = random.random()
    rows, columns = _pixel_centres(height)[:, np.newaxis], _pixel_centres(width)[np.newaxis, :]
    picture = _sky(rows, columns, hue)
    picture = _with_sun(picture, rows, columns, width / height, hue, random)
    for layer in range(_HILLS):
        picture = _with_hill(picture, rows, columns, layer, hue, random, moment)
    return picture


def _pixel_centres(count: int) -> FloatArray:
    """Return the centres of `count` pixels, from 0 to 1."""
    return ((np.arange(count) + 0.5) / count).astype(np.float32)


def _colour(hue: float, saturation: float, value: float) -> FloatArray:
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), dtype=np.float32)


def _sky(rows: FloatArray, columns: FloatArray, hue: float) -> FloatArray:
    top, bottom = _colour(hue, 0.55, 0.55), _colour(hue + 0.12, 0.35, 0.98)
    share = (np.sqrt(rows) * 0.9 + columns * 0.1)[..., np.newaxis]
    sky: FloatArray = top * (1 - share) + bottom * share
    return sky


def _with_sun(
    picture: FloatArray, rows: FloatArray, columns: FloatArray, aspect: float, hue: float, random: np.random.Generator
) -> FloatArray:
    x, y, radius = random.uniform(0.15, 0.85), random.uniform(0.12, 0.35), random.uniform(0.06, 0.12)
    distance = np.hypot((columns - x) * aspect, rows - y)
    disc = np.clip((radius - distance) * 60, 0, 1)
    glow = 0.35 * np.exp(-((distance / (radius * 3)) ** 2))
    share = np.maximum(disc, glow).astype(np.float32)[..., np.newaxis]
    lit: FloatArray = picture * (1 - share) + _colour(hue + 0.14, 0.18, 1.0) * share
    return lit


def _with_hill(
    picture: FloatArray,
    rows: FloatArray,
    columns: FloatArray,
    layer: int,
    hue: float,
    random: np.random.Generator,
    moment: float,
) -> FloatArray:
    """Add a ridge that is nearer and darker than the one before."""
    nearness = layer / (_HILLS - 1)
    ridge = np.full_like(columns, 0.45 + 0.13 * layer)
    for wave in range(1, 4):
        length, phase = random.uniform(0.7, 1.6) * wave, random.uniform(0, 2 * math.pi)
        drift = moment * (0.15 + 0.45 * nearness)
        ridge += np.float32(0.075 / wave) * np.sin(2 * math.pi * length * columns + np.float32(phase + drift))
    share = np.clip((rows - ridge) * picture.shape[0] * 0.7, 0, 1)[..., np.newaxis]
    colour = _colour(hue + 0.05 + 0.12 * nearness, 0.35 + 0.35 * nearness, 0.78 - 0.5 * nearness)
    hill: FloatArray = picture * (1 - share) + colour * share
    return hill


@dataclass(frozen=True)
class _Line:
    text: str
    font: _Font
    height: int
    colour: tuple[int, int, int]


def with_banner(image: FloatArray, details: Sequence[str] = ()) -> FloatArray:
    """Return an image (height, width, 3) with a banner at its bottom that says that no model ran.

    Args:
        image: the image.
        details: further lines, shortened to the width; the last ones are omitted if they do not fit.

    Returns:
        A new image, or the same one if no wording fits (below about 32 pixels).
    """
    height, width = image.shape[:2]
    lines = _layout(width, height, details)
    if not lines:
        return image
    margin = _margin(width)
    band = sum(line.height for line in lines) + 2 * margin
    picture = to_picture(image).convert("RGBA")
    overlay = Image.new("RGBA", (width, band))
    draw = ImageDraw.Draw(overlay)
    draw.rectangle((0, 0, width, band), fill=_BAND)
    top = margin
    for line in lines:
        draw.text((margin, top), line.text, font=line.font, fill=line.colour)
        top += line.height
    picture.alpha_composite(overlay, (0, height - band))
    return from_picture(picture.convert("RGB"))


def _margin(width: int) -> int:
    return max(1, width // 40)


def _layout(width: int, height: int, details: Sequence[str]) -> list[_Line]:
    """Return the lines that fit: the title, then details."""
    text_width = width - 2 * _margin(width)
    lines = _title(text_width, height)
    if not lines:
        return []
    size = round(lines[0].height * 0.58)
    free = height // 2 - 2 * _margin(width) - sum(line.height for line in lines)
    if size < _SMALLEST_DETAIL:
        return lines
    font, line_height = _font(size), _line_height(size)
    for text in details[: max(0, free // line_height)]:
        lines.append(_Line(_shortened(_printable(text), font, text_width), font, line_height, _DETAIL_COLOUR))
    return lines


def _title(text_width: int, height: int) -> list[_Line]:
    for texts in _TITLES:
        for size in (max(_SMALLEST_TEXT, min(text_width // 13, height // 10, 12 + text_width // 40)), _SMALLEST_TEXT):
            font = _font(size)
            fits = all(font.getlength(text) <= text_width for text in texts)
            if fits and len(texts) * _line_height(size) <= height - 2:
                return [_Line(text, font, _line_height(size), _TITLE_COLOUR) for text in texts]
    return []


def _line_height(size: int) -> int:
    return math.ceil(size * 1.3)


@lru_cache(maxsize=32)
def _font(size: int) -> _Font:
    return ImageFont.load_default(size)


def _printable(text: str) -> str:
    """Return a text on one line in ASCII, because Pillow's font has little more; other letters become `?`."""
    plain = unicodedata.normalize("NFKD", " ".join(text.split()))
    kept = "".join(letter for letter in plain if not unicodedata.combining(letter) and letter != "\N{MIDDLE DOT}")
    return kept.encode("ascii", "replace").decode()


def _shortened(text: str, font: _Font, text_width: int) -> str:
    if font.getlength(text) <= text_width:
        return text
    while text and font.getlength(text + "...") > text_width:
        text = text[:-1]
    return text + "..."
