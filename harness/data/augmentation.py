"""What is done to training images: timm's transforms, with dice that are a function of (seed, epoch, image)."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from harness.data.order import COPY, Order, seed_everything, seed_of
from harness.data.readable import Readable, Sample, read_sample
from harness.data.sources import Arrays
from harness.spec import Recipe
from methods.core.noise import Noise


class Planned(Sampler):
    """The (epoch, key) pairs of the steps first..last-1, a list per step."""

    def __init__(self, order: Order, first: int, last: int) -> None:
        self.order, self.first, self.last = order, first, last

    def __iter__(self):
        return self.order.parts(self.first, self.last)

    def __len__(self) -> int:
        return self.last - self.first


class Pictures(Dataset):
    """Decoded images as PIL images again, for transforms that need those."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        pixels = self.arrays.images[index].expand(3, -1, -1).permute(1, 2, 0).numpy()
        return Image.fromarray(np.ascontiguousarray(pixels)), int(self.arrays.labels[index])


class Keyed(Dataset):
    """(epoch, key) to a sample; the transform's dice are seeded by (seed, epoch, key), so that workers and order do not matter."""

    def __init__(self, readable: Readable, transform: Callable[[Image.Image], Any], seed: int = 0) -> None:
        self.readable, self.transform, self.seed = readable, transform, seed

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        epoch, key = item
        copy, index = divmod(key, COPY)

        def transformed(picture: Image.Image) -> Any:
            seed_everything(seed_of(self.seed, epoch, 3, index, *([copy] if copy else [])))
            return self.transform(picture)

        return read_sample(self.readable, key, index, transformed)


def leave_signals(_: int) -> None:
    """In a process that decodes: a signal to the whole group is the parent's business, which saves its state first. Without a
    parent these processes end by themselves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def training_transform(recipe: Recipe, image_size: int) -> Callable[[Image.Image], Any]:
    """timm's training transform, ending in uint8 so that normalisation is the same everywhere."""
    return create_transform(
        image_size, is_training=True, hflip=recipe.flip, auto_augment=recipe.auto_augment or None,
        color_jitter=recipe.color_jitter or None, interpolation="bicubic", use_prefetcher=True,
    )  # fmt: skip


def eraser(recipe: Recipe, device: torch.device) -> Callable[[Tensor, Tensor, int, int], Tensor] | None:
    """timm's random erasing as a function of (images [B, 3, S, S], keys [B] on the host, seed, epoch), in place; None for none.
    Whether and where an image loses a box is a function of (seed, epoch, key)."""
    if not recipe.random_erasing:
        return None
    erase = RandomErasing(1.0, mode="pixel", device=str(device))

    def erase_some(images: Tensor, keys: Tensor, seed: int, epoch: int) -> Tensor:
        chosen = Noise(seed, epoch, keys).uniform("erase") < recipe.random_erasing
        for place in chosen.nonzero().flatten().tolist():
            copy, index = divmod(int(keys[place]), COPY)
            seed_everything(seed_of(seed, epoch, 4, index, copy))
            images[place] = erase(images[place])
        return images

    return erase_some


def shift(images: Tensor, uniform: Tensor, padding: int) -> Tensor:
    """Random crops of the zero-padded images: uint8 [B, C, S, S], uniform [B, 2] in (0, 1)."""
    size, device = images.shape[-1], images.device
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    offsets = (uniform * (2 * padding + 1)).long()
    rows = offsets[:, 0, None] + torch.arange(size, device=device)
    columns = offsets[:, 1, None] + torch.arange(size, device=device)
    batch = torch.arange(len(images), device=device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
