"""Files that cannot be read: a damaged picture is replaced by another one, data that has gone away is an error."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from harness.data.labels import whole
from harness.data.rgb import UnknownRange, to_rgb
from harness.data.shards import Shards
from harness.errors import UserError

DAMAGED = (SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class DataLost(UserError):
    """A file that was there when the data was opened is not there any more."""


class Readable:
    """A map-style dataset of (picture, label) in which damaged pictures are replaced.

    ids: int64 [N], sorted, the images that may take another one's place; None: no image may, a damaged one is an error.
    """

    def __init__(self, dataset: Any, ids: Tensor | None) -> None:
        self.dataset, self.ids = dataset, ids

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Image.Image, int, str | None]:
        """(RGB picture, label, what is wrong with image `index` if the picture is another one's). The next readable image of `ids`
        takes its place, so what a damaged image becomes depends on nothing else. DataLost; UserError where none is
        left, and at once for a label that is no whole number and a mode of unknown range: all other images may be like
        that."""
        wrong, tried = None, index
        for _ in range(1 if self.ids is None else len(self.ids) + 1):
            try:
                picture, label = self.dataset[tried]
                return to_rgb(picture), whole(label, self.name(tried)), wrong
            except UnknownRange as error:
                raise UserError(f"{self.name(tried)}: {error}") from None
            except (OSError, *DAMAGED) as error:
                if isinstance(error, OSError) and error.errno is not None:  # the system's error, not PIL's
                    raise DataLost(
                        f"{self.name(tried)}: {(error.strerror or str(error)).lower()}; the data must stay where it is"
                    ) from None
                wrong = wrong or f"{self.name(index)}: {' '.join(str(error).split())[:200] or type(error).__name__}"
                tried = self._next(tried)
        raise UserError(f"no readable image: {wrong}")

    def name(self, index: int) -> str:
        """The image's file, as far as its reader tells."""
        reader = getattr(self.dataset, "reader", self.dataset)
        samples = getattr(reader, "samples", None)
        if samples is not None:
            return str(Path(samples[index][0]))
        if isinstance(self.dataset, Shards):
            return self.dataset.names[index]
        return f"image {index}"

    def _next(self, index: int) -> int:
        if self.ids is None:
            return index
        place = int(torch.searchsorted(self.ids, index, right=True))
        return int(self.ids[place % len(self.ids)])


@dataclass
class Sample:
    """An image: uint8 [3, S, S], its label and key. wrong: what is wrong with its file, where another image stands in its
    place; lost: why there is none at all."""

    image: Tensor
    label: int
    key: int
    wrong: str | None = None
    lost: str | None = None


def read_sample(readable: Readable, key: int, index: int, transform: Callable[[Image.Image], Any]) -> Sample:
    """The image of that number, transformed. What goes wrong comes as a value: an error in a process that decodes would lose
    its one clear line on the way."""
    try:
        picture, label, wrong = readable.read(index)
    except UserError as error:
        return Sample(torch.empty(0, dtype=torch.uint8), -1, key, lost=str(error))
    return Sample(torch.as_tensor(transform(picture)), label, key, wrong)


@dataclass
class Samples:
    """A batch of them: images uint8 [B, 3, S, S], labels and keys int64 [B], what is wrong by key, and the reason if one is lost."""

    images: Tensor
    labels: Tensor
    keys: Tensor
    wrong: dict[int, str] = field(default_factory=dict)
    lost: str | None = None

    def pin_memory(self) -> Samples:
        """For the loader: copies to a GPU need not wait."""
        self.images, self.labels = self.images.pin_memory(), self.labels.pin_memory()
        return self


def collate(samples: list[Sample]) -> Samples:
    lost = next((sample.lost for sample in samples if sample.lost), None)
    images = torch.empty(0, dtype=torch.uint8) if lost else torch.stack([sample.image for sample in samples])
    labels, keys = (torch.tensor([getattr(sample, name) for sample in samples]) for name in ("label", "key"))
    return Samples(images, labels, keys, {sample.key: sample.wrong for sample in samples if sample.wrong}, lost)
