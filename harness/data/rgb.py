"""Pictures of any mode as 8-bit RGB: the one conversion that all readers share."""

from __future__ import annotations

import numpy as np
from PIL import Image

DEEP = 65535  # the largest value of 16 bits
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
SIXTEEN_IN_32 = ("PNG", "PPM")  # formats of at most 16 bits, whose pixels PIL hands over in mode I
CUT = "cut from 16 bits"  # a note in a picture's info
STEPS = {"La": ("LA", "RGB")}  # modes from which PIL has no direct way


class UnknownRange(ValueError):
    """The picture's mode does not say which value is white."""


def to_rgb(picture: Image.Image) -> Image.Image:
    """The picture as 8-bit RGB. 16-bit grey is scaled by its range, so that 65535 becomes 255. All else is what
    torchvision and timm do: PIL's conversion, by which palettes are looked up, CMYK is converted and transparency is
    left out. Of an animation or a file of many pages, the first.

    UnknownRange for floats and for 32-bit integers, whose white could be any number. ValueError where a picture that
    had more than one value has one colour afterwards: what it shows was lost on the way.
    """
    if is_cut(picture) and _is_black(picture):
        raise ValueError(
            "it has 16 bits per colour, of which 8 bits keep the upper half, and nothing is left of it: stretch its "
            "values to the whole range first"
        )
    if picture.mode in ("RGB", "L"):
        return picture.convert("RGB")
    found = _deep_to_rgb(picture) if _is_deep(picture) else _shallow_to_rgb(picture)
    if _is_one_colour(found) and not _is_one_colour(picture):
        raise ValueError(
            f"all of it would become one colour in 8-bit RGB, but it has more than one value in mode {picture.mode}; "
            f"{_advice(picture)}"
        )
    return found


def is_cut(picture: Image.Image) -> bool:
    """Whether the file has 16 bits per colour, which PIL cuts to their upper 8 where it decodes it. Known until then, and
    of pictures from `harness.data.folders.open_picture` afterwards, too."""
    return CUT in picture.info or any(";16" in str(tile.args) for tile in getattr(picture, "tile", ()))


def _is_black(picture: Image.Image) -> bool:
    colours = picture.convert("RGB")
    return not any(colours.getextrema()[band][1] for band in range(3))


def _is_deep(picture: Image.Image) -> bool:
    """Whether it is 16-bit grey. UnknownRange where nothing says how many bits count."""
    if picture.mode in SIXTEEN_BITS or (picture.mode == "I" and picture.format in SIXTEEN_IN_32):
        return True
    if picture.mode in ("I", "F"):
        kind = "floats" if picture.mode == "F" else "32-bit integers"
        raise UnknownRange(
            f"mode {picture.mode}: {kind}, of which nothing says how large white is; convert the images to 8 or 16 bits "
            "per channel"
        )
    return False


def _deep_to_rgb(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture).astype(np.int64)
    return Image.fromarray(((values * 255 + DEEP // 2) // DEEP).astype(np.uint8)).convert("RGB")


def _shallow_to_rgb(picture: Image.Image) -> Image.Image:
    for mode in STEPS.get(picture.mode, ("RGB",)):
        picture = picture.convert(mode)
    return picture


def _is_one_colour(picture: Image.Image) -> bool:
    if picture.mode in SIXTEEN_BITS:  # PIL knows no extrema of all of these
        values = np.asarray(picture)
        return bool(values.min() == values.max())
    extrema = picture.getextrema()
    bands = extrema if isinstance(extrema[0], tuple) else (extrema,)
    return all(low == high for low, high in bands)


def _advice(picture: Image.Image) -> str:
    if _is_deep(picture):
        values = np.asarray(picture)
        return f"its values are {values.min()} to {values.max()} of {DEEP}: stretch them to the whole range first"
    if "A" in picture.mode or "a" in picture.mode:
        return "what it shows is in its transparency, which is left out: put it on a background first"
    return "look at its palette or its conversion"
