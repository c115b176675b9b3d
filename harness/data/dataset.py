"""Batches of images: augmented for training, plain for evaluation, the same for any number of workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor
from torch.utils.data import DataLoader

from harness.cluster import ALONE, Cluster
from harness.data.augmentation import Keyed, Pictures, Planned, eraser, leave_signals, shift, training_transform
from harness.data.cards import Card, check_sum, find_root, load_card
from harness.data.order import COPY, Order, seed_everything, seed_of
from harness.data.readable import DataLost, Readable, collate
from harness.data.sources import (
    Arrays,
    Split,
    check_sum_of,
    class_names,
    count_classes,
    evaluation_transform,
    open_split,
    require_bright,
)
from harness.errors import UserError
from harness.hidden import left_out
from harness.spec import Data, Recipe
from methods.core.noise import Noise

PREFETCHED = 4  # batches that every decoding process has ready


@dataclass
class Batch:
    """images float32 [B, 3, S, S], normalised; targets int64 [B], or float [B, classes] after mixing; keys int64 [B], what tells
    the images apart (their numbers in the split, plus COPY times the number of the copy); of: images in the whole step, over
    all processes (0 outside of training)."""

    images: Tensor
    targets: Tensor
    keys: Tensor
    of: int = 0

    def split(self, size: int) -> list[Batch]:
        """Batches of at most that many images, as equal as possible."""
        count = -(-len(self.images) // size)
        if count == 1:
            return [self]
        parts = zip(*(part.tensor_split(count) for part in (self.images, self.targets, self.keys)), strict=True)
        return [Batch(*part, of=self.of) for part in parts]


@dataclass
class ImageData:
    """A data set, opened: the splits, what they are called in records, and how to normalise them. unreadable: what is wrong
    with damaged training images that were met so far, by number; others stood in for them."""

    card: Card
    image_size: int
    classes: int
    checksum: str
    train: Split
    test: Split
    train_ids: Tensor = field(repr=False)
    val_ids: Tensor = field(repr=False)
    workers: int = 0
    unreadable: dict[int, str] = field(default_factory=dict, repr=False)

    def forget_unreadable(self) -> None:
        """Before another training: what it meets is its own."""
        self.unreadable = dict(getattr(self.train, "unreadable", {}))

    @property
    def left_out(self) -> str | None:
        """A line that says which hidden files and folders are not read; None where there are none."""
        return left_out(self.train.left_out | self.test.left_out)

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

    def size(self, which: str) -> int:
        """Images in the split "train", "val" or "test"."""
        return {"test": len(self.test.labels), "val": len(self.val_ids), "train": len(self.train_ids)}[which]

    def order(self, recipe: Recipe, seed: int, cluster: Cluster = ALONE) -> Order:
        """Which images every training step sees."""
        return Order(self.train_ids, recipe.batch_size, seed, recipe.repeats, recipe.mixes, cluster.part)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in the training split (one, where it is smaller than a batch)."""
        return Order(self.train_ids, batch_size, seed=0).steps_per_epoch

    def train_batches(
        self,
        recipe: Recipe,
        seed: int,
        first_step: int,
        last_step: int,
        device: torch.device,
        cluster: Cluster = ALONE,
    ) -> Iterator[Batch]:
        """This process's share of the batches of the steps first_step..last_step-1. Which images, and what is done to them, is a
        function of the seed, the epoch and the image alone, what is mixed a function of the seed and the step. DataLost where
        a file has gone; damaged images are replaced and noted in `unreadable`."""
        order = self.order(recipe, seed, cluster)
        mixup, erase = self._mixup(recipe), eraser(recipe, device)
        source = self._fast_batches if self._is_fast(recipe) else self._slow_batches
        for step, (images, labels, keys) in enumerate(
            source(order, recipe, seed, first_step, last_step, device), first_step
        ):
            images, labels = images.to(device), labels.to(device, non_blocking=True)
            if erase is not None:
                images = erase(images.contiguous(), keys, seed, order.epoch(step))
            if mixup is not None:
                seed_everything(seed_of(seed, step, 1))  # timm's mixing draws from the global generators
                images, labels = mixup(images, labels) if len(images) > 1 else (images, self._alone(labels, recipe))
            yield Batch(images, labels, keys.to(device, non_blocking=True), of=len(order.keys(step)))

    def eval_batches(
        self,
        which: str,
        batch_size: int,
        device: torch.device,
        limit: int | None = None,
        cluster: Cluster = ALONE,
        skip: int = 0,
    ) -> Iterator[Batch]:
        """The images of the split "train", "val" or "test" in order, not augmented; at most `limit`, and without the first `skip`.
        Of several processes, this one's: every size-th. DataLost where a file cannot be read: the others know nothing of it, so whoever asks
        for batches in several processes catches it and tells them (`Cluster.raise_any`)."""
        split = self.test if which == "test" else self.train
        ids = {"test": torch.arange(len(self.test.labels)), "val": self.val_ids, "train": self.train_ids}[which][:limit]
        ids = ids[skip:][cluster.rank :: cluster.size]
        if isinstance(split, Arrays):
            for part in ids.split(batch_size) if len(ids) else ():  # a process may have no image
                yield Batch(
                    self.normalise(split.images[part], device).expand(-1, 3, -1, -1),
                    split.labels[part].to(device),
                    part,
                )
            return
        readable = Readable(split.dataset, self.train_ids if which == "train" else None)
        transform = evaluation_transform(self.image_size, self.card.crop_pct)
        loader = DataLoader(
            Keyed(readable, transform), batch_size, sampler=[(0, int(i)) for i in ids], num_workers=self.workers,
            collate_fn=collate, worker_init_fn=leave_signals,
        )  # fmt: skip
        for samples in loader:
            if samples.lost:
                raise DataLost(f"the {which} split: {samples.lost}")
            if which == "train":
                self.unreadable |= {key % COPY: wrong for key, wrong in samples.wrong.items()}
            yield Batch(self.normalise(samples.images, device), samples.labels.to(device), samples.keys)

    def _is_fast(self, recipe: Recipe) -> bool:
        """Whether the recipe's augmentation can run on whole batches of decoded images."""
        if recipe.crop != "resized" and not isinstance(self.train, Arrays):
            raise UserError(f"recipe: crop {recipe.crop!r} is for images that fit into memory; use crop: resized")
        return recipe.crop != "resized"

    def _fast_batches(
        self, order: Order, recipe: Recipe, seed: int, first: int, last: int, device: torch.device
    ) -> Iterator:
        """Decoded images lie on the device, and a batch is cropped and flipped there at once."""
        held, labels = self.train.images.to(device), self.train.labels.to(device)
        for step in range(first, last):
            keys = order.part(order.keys(step))
            noise = Noise(seed, order.epoch(step), keys.to(device))
            ids = (keys % COPY).to(device)
            images = held[ids]
            if recipe.crop == "pad" and recipe.crop_padding:
                images = shift(images, noise.uniform("crop", 2), recipe.crop_padding)
            if recipe.flip:
                flipped = noise.uniform("flip") < recipe.flip
                images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
            yield self.normalise(images, device).expand(-1, 3, -1, -1), labels[ids], keys

    def _slow_batches(
        self, order: Order, recipe: Recipe, seed: int, first: int, last: int, device: torch.device
    ) -> Iterator:
        """Pictures are decoded and transformed by other processes."""
        dataset = Pictures(self.train) if isinstance(self.train, Arrays) else self.train.dataset
        keyed = Keyed(Readable(dataset, self.train_ids), training_transform(recipe, self.image_size), seed)
        loader = DataLoader(
            keyed, batch_sampler=Planned(order, first, last), num_workers=self.workers, collate_fn=collate,
            pin_memory=device.type == "cuda", prefetch_factor=PREFETCHED if self.workers else None, worker_init_fn=leave_signals,
        )  # fmt: skip
        for samples in loader:
            if samples.lost:
                raise DataLost(f"the train split: {samples.lost}")
            self.unreadable |= {key % COPY: wrong for key, wrong in samples.wrong.items()}
            yield self.normalise(samples.images, device), samples.labels, samples.keys

    def _mixup(self, recipe: Recipe) -> Mixup | None:
        if not recipe.mixes:
            return None
        return Mixup(
            recipe.mixup, recipe.cutmix, prob=recipe.mixup_prob, switch_prob=recipe.mixup_switch_prob,
            label_smoothing=recipe.label_smoothing, num_classes=self.classes,
        )  # fmt: skip

    def _alone(self, labels: Tensor, recipe: Recipe) -> Tensor:
        """Targets [B, classes] of images that have none to be mixed with: what mixing gives an image with itself."""
        return mixup_target(labels, self.classes, lam=1.0, smoothing=recipe.label_smoothing)


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
    for which, split in (("train", train), ("test", test)):
        require_bright(card, split, which)
    checksum = checksum or check_sum_of({"train": train, "test": test})
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))
    held_out = int(len(order) * card.val_fraction)
    return ImageData(
        card, size, classes, checksum, train, test, train_ids=order[held_out:].sort().values,
        val_ids=order[:held_out].sort().values, workers=workers, unreadable=dict(getattr(train, "unreadable", {})),
    )  # fmt: skip
