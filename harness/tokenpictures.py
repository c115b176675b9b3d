"""Draws which patches entered each block, over the images themselves: dropped ones are dark, and a line goes around what is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from harness.packing import unsqueeze

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DARK = 1 / 3  # of an image's brightness where a patch was dropped
PATCH = 16  # pixels of a patch in a picture, at least
MOST = 8  # images in a picture
GREY = 0.75  # where there are no images


def kept_patches(record: dict[str, Any]) -> np.ndarray:
    """bool [blocks, images, rows, columns] of a record that has them."""
    found = record["report"]["kept_patches"]
    bits = np.unpackbits(unsqueeze(found["bits"], np.uint8), count=int(np.prod(found["shape"])))
    return bits.reshape(found["shape"]).astype(bool)


def has_dropped(record: dict[str, Any]) -> bool:
    return "kept_patches" in record["report"] and not kept_patches(record).all()


def paint(figure: Figure, record: dict[str, Any]) -> None:
    """A line per image: itself, and what entered each block. record["photos"]: float [images, H, W, 3] in 0..1, or None for grey ones."""
    kept, photos = kept_patches(record)[:, :MOST], record.get("photos")
    blocks, images = kept.shape[:2]
    figure.set_size_inches(max(1.0 * (blocks + 1), 4.0), 1.0 * images + 0.6)
    axes = figure.subplots(images, blocks + 1, squeeze=False)
    for line, row in enumerate(axes):
        photo = _enlarged(None if photos is None else photos[line], kept.shape[2:])
        row[0].imshow(photo)
        for block in range(blocks):
            row[block + 1].imshow(shaded(photo, kept[block, line]))
            if line == 0:
                row[block + 1].set_title(f"block {block}", fontsize=6)
        for one in row:
            one.set(xticks=[], yticks=[])
    axes[0][0].set_title("image", fontsize=6)


def shaded(photo: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """A photo [H, W, 3] with the patches that are not kept [rows, columns] dark, and white pixels where kept ones end."""
    tall, wide = photo.shape[0] // kept.shape[0], photo.shape[1] // kept.shape[1]
    mask = kept.repeat(tall, axis=0).repeat(wide, axis=1)
    outside = np.pad(mask, 1, constant_values=True)
    inner = outside[:-2, 1:-1] & outside[2:, 1:-1] & outside[1:-1, :-2] & outside[1:-1, 2:]
    edge = mask & ~inner
    found = np.where(mask[..., None], photo, photo * DARK)
    return np.where(edge[..., None], 1.0, found)


def _enlarged(photo: np.ndarray | None, grid: tuple[int, ...]) -> np.ndarray:
    """So that each patch has a whole number of pixels, PATCH or more."""
    if photo is None:
        return np.full((grid[0] * PATCH, grid[1] * PATCH, 3), GREY)
    times = -(-PATCH * grid[0] // photo.shape[0])
    photo = photo.repeat(times, axis=0).repeat(times, axis=1)
    return photo[: photo.shape[0] // grid[0] * grid[0], : photo.shape[1] // grid[1] * grid[1]]
