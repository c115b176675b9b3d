"""Batches of images: augmented for training, plain for evaluation, the same for any number of workers."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from harness.data.cards import Card, check_sum, find_root, load_card
from harness.data.sources import (
    Arrays,
    Split,
    check_sum_of,
    class_names,
    count_classes,
    evaluation_transform,
    open_split,
)
from harness.errors import UserError
from harness.spec import Data, Recipe
from methods.core.noise import Noise


@dataclass
class Batch:
    """images float32 [B, 3, S, S], normalised; targets int64 [B], or float [B, classes] after mixing; ids int64 [B], the
    images' numbers in their split."""

    images: Tensor
    targets: Tensor
    ids: Tensor


@dataclass
class ImageData:
    """A data set, opened: the splits, what they are called in records, and how to normalise them."""

    card: Card
    image_size: int
    classes: int
    checksum: str
    train: Split
    test: Split
    train_ids: Tensor = field(repr=False)
    val_ids: Tensor = field(repr=False)
    workers: int = 0

    @property
    def identity(self) -> dict:
        """What enters the hash of a train record."""
        card = self.card
        return {
            "card": card.name, "checksum": self.checksum, "image_size": self.image_size, "classes": self.classes,
            "splits": card.splits.model_dump(), "val_fraction": card.val_fraction, "crop_pct": card.crop_pct, "mean": list(card.mean), "std": list(card.std),
        }  # fmt: skip

    @cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation on the 0..255 scale, [3, 1, 1]."""
        mean, std = torch.tensor(self.card.mean), torch.tensor(self.card.std)
        return mean[:, None, None] * 255, std[:, None, None] * 255

    def normalise(self, images: Tensor, device: torch.device) -> Tensor:
        """uint8 [B, 1 or 3, S, S] to float32 [B, 3, S, S] on the device."""
        mean, std = (value.to(device) for value in self.statistics)
        return (images.to(device, non_blocking=True).float() - mean) / std

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in the training split (one, where it is smaller than a batch)."""
        return max(len(self.train_ids) // batch_size, 1)

    def train_batches(
        self, recipe: Recipe, seed: int, first_step: int, last_step: int, device: torch.device
    ) -> Iterator[Batch]:
        """The batches of the steps first_step..last_step-1. Which images, and what is done to them, is a function of the
        seed, the epoch and the image alone."""
        order = _Order(self.train_ids, recipe.batch_size, self.steps_per_epoch(recipe.batch_size), seed)
        mixup, erase = self._mixup(recipe), None
        if recipe.random_erasing:
            erase = RandomErasing(recipe.random_erasing, mode="pixel", device=str(device))
        source = self._fast_batches if self._is_fast(recipe) else self._slow_batches
        for step, (images, labels, ids) in enumerate(
            source(order, recipe, seed, first_step, last_step, device), first_step
        ):
            images, labels, ids = images.to(device), labels.to(device), ids.to(device)
            if erase is not None or mixup is not None:
                _seed_everything(_seed(seed, step, 1))  # timm's erasing and mixing draw from the global generators
            if erase is not None:
                images = erase(images.contiguous())
            if mixup is not None:
                even = len(images) - len(images) % 2
                images, labels = mixup(images[:even], labels[:even])
                ids = ids[:even]
            yield Batch(images, labels, ids)

    def eval_batches(
        self, which: str, batch_size: int, device: torch.device, limit: int | None = None
    ) -> Iterator[Batch]:
        """The images of the split "train", "val" or "test" in order, not augmented; at most `limit`."""
        split = self.test if which == "test" else self.train
        ids = {"test": torch.arange(len(self.test.labels)), "val": self.val_ids, "train": self.train_ids}[which][:limit]
        if isinstance(split, Arrays):
            for part in ids.split(batch_size):
                yield Batch(
                    self.normalise(split.images[part], device).expand(-1, 3, -1, -1),
                    split.labels[part].to(device),
                    part,
                )
            return
        dataset = _Transformed(split.dataset, evaluation_transform(self.image_size, self.card.crop_pct))
        loader = DataLoader(dataset, batch_size, sampler=_Fixed([(0, int(i)) for i in ids]), num_workers=self.workers)
        for images, labels, part in loader:
            yield Batch(self.normalise(images, device), labels.to(device), part)

    def _is_fast(self, recipe: Recipe) -> bool:
        """Whether the recipe's augmentation can run on whole batches of decoded images."""
        if recipe.crop != "resized" and not isinstance(self.train, Arrays):
            raise UserError(f"recipe: crop {recipe.crop!r} is for images that fit into memory; use crop: resized")
        return recipe.crop != "resized"

    def _fast_batches(
        self, order: _Order, recipe: Recipe, seed: int, first: int, last: int, device: torch.device
    ) -> Iterator:
        for step in range(first, last):
            ids = order.batch(step)
            noise = Noise(seed, order.epoch(step), ids)
            images = self.train.images[ids]
            if recipe.crop == "pad" and recipe.crop_padding:
                images = _shift(images, noise.uniform("crop", 2), recipe.crop_padding)
            if recipe.flip:
                flipped = noise.uniform("flip") < recipe.flip
                images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
            yield self.normalise(images, device).expand(-1, 3, -1, -1), self.train.labels[ids], ids

    def _slow_batches(
        self, order: _Order, recipe: Recipe, seed: int, first: int, last: int, device: torch.device
    ) -> Iterator:
        dataset = _Pictures(self.train) if isinstance(self.train, Arrays) else self.train.dataset
        transform = _training_transform(recipe, self.image_size)
        loader = DataLoader(
            _Transformed(dataset, transform, seed), batch_sampler=order.sampler(first, last),
            num_workers=self.workers, pin_memory=device.type == "cuda",
        )  # fmt: skip
        for images, labels, ids in loader:
            yield self.normalise(images, device), labels, ids

    def _mixup(self, recipe: Recipe) -> Mixup | None:
        if not (recipe.mixup or recipe.cutmix):
            return None
        return Mixup(
            recipe.mixup, recipe.cutmix, prob=recipe.mixup_prob, switch_prob=recipe.mixup_switch_prob,
            label_smoothing=recipe.label_smoothing, num_classes=self.classes,
        )  # fmt: skip


def open_data(data: Data, spec_folder: Path, data_root: str | None = None, crop: str = "none") -> ImageData:
    """Opens the data of a spec, for training with that crop (see Recipe). UserError for a missing root, a bad checksum, a
    class-count mismatch."""
    card, card_file = load_card(data.card, spec_folder)
    root = find_root(card, card_file, data_root)
    size = data.image_size or card.image_size
    workers = min(data.workers, os.cpu_count() or 1)  # more would only wait for each other; results do not depend on it
    checksum = check_sum(card, root) if card.reader == "npz" else None
    names = class_names(card, root)
    train = open_split(card, root, "train", size, workers, as_files=crop == "resized")
    test = open_split(card, root, "test", size, workers)
    classes = count_classes(card, train.labels, test.labels, names)
    checksum = checksum or check_sum_of({"train": train, "test": test})
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))
    held_out = int(len(order) * card.val_fraction)
    return ImageData(
        card, size, classes, checksum, train, test, train_ids=order[held_out:].sort().values,
        val_ids=order[:held_out].sort().values, workers=workers,
    )  # fmt: skip


class _Order:
    """Which images every step sees: a permutation per epoch, a function of (seed, epoch)."""

    def __init__(self, ids: Tensor, batch_size: int, steps_per_epoch: int, seed: int) -> None:
        self.ids, self.batch_size, self.steps, self.seed = ids, batch_size, steps_per_epoch, seed
        self._epoch, self._shuffled = -1, ids

    def epoch(self, step: int) -> int:
        return step // self.steps

    def batch(self, step: int) -> Tensor:
        epoch, place = divmod(step, self.steps)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(_seed(self.seed, epoch, 2))
            self._epoch, self._shuffled = epoch, self.ids[torch.randperm(len(self.ids), generator=generator)]
        return self._shuffled[place * self.batch_size : (place + 1) * self.batch_size]

    def sampler(self, first: int, last: int) -> Sampler:
        return _Fixed(([(self.epoch(s), int(i)) for i in self.batch(s)] for s in range(first, last)), last - first)


class _Fixed(Sampler):
    """A given sequence of (epoch, number) pairs, or of lists of them."""

    def __init__(self, items, length: int | None = None) -> None:
        self.items, self.length = items, length if length is not None else len(items)

    def __iter__(self):
        return iter(self.items)

    def __len__(self) -> int:
        return self.length


class _Pictures(Dataset):
    """Decoded images as PIL images again, for transforms that need those."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays

    def __getitem__(self, index: int):
        pixels = self.arrays.images[index].expand(3, -1, -1).permute(1, 2, 0).numpy()
        return Image.fromarray(np.ascontiguousarray(pixels)), int(self.arrays.labels[index])


class _Transformed(Dataset):
    """(epoch, number) to (uint8 image, label, number); the transform's dice are seeded by (seed, epoch, number), so that
    workers and order do not matter."""

    def __init__(self, dataset, transform, seed: int = 0) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __getitem__(self, item: tuple[int, int]):
        epoch, index = item
        image, label = self.dataset[index]
        _seed_everything(_seed(self.seed, epoch, 3, index))
        return torch.as_tensor(self.transform(image.convert("RGB"))), int(label), index


def _training_transform(recipe: Recipe, image_size: int):
    """timm's training transform, ending in uint8 so that normalisation is the same everywhere."""
    return create_transform(
        image_size, is_training=True, hflip=recipe.flip, auto_augment=recipe.auto_augment or None,
        color_jitter=recipe.color_jitter or None, interpolation="bicubic", use_prefetcher=True,
    )  # fmt: skip


def _shift(images: Tensor, uniform: Tensor, padding: int) -> Tensor:
    """Random crops of the zero-padded images: uint8 [B, C, S, S], uniform [B, 2] in (0, 1)."""
    size = images.shape[-1]
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    offsets = (uniform * (2 * padding + 1)).long()
    rows = offsets[:, 0, None] + torch.arange(size)
    columns = offsets[:, 1, None] + torch.arange(size)
    batch = torch.arange(len(images))[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _seed(*parts: int) -> int:
    """A 31-bit seed that is a function of the parts."""
    state = np.random.SeedSequence([part & 0xFFFFFFFF for part in parts]).generate_state(1)[0]
    return int(state) & 0x7FFFFFFF
