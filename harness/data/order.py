"""Which images a step sees, and the dice of everything done to them: functions of (seed, epoch, image) or (seed, step)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

COPY = 1 << 40  # the keys of an image's copies lie so far apart


@dataclass
class Order:
    """A permutation of the images per epoch, a function of (seed, epoch).

    ids: int64 [N], the images' numbers; repeats: how often an epoch shows each of the images that it shows, differently
    augmented (repeated augmentation, Hoffer et al. 2020: an epoch has as many steps, and sees N / repeats images).
    even: leave out a batch's last image where their number is odd, since mixing pairs them. part: from a whole step's keys
    to those of this process.
    """

    ids: Tensor
    batch_size: int
    seed: int
    repeats: int = 1
    even: bool = False
    part: Callable[[Tensor], Tensor] = lambda keys: keys
    _epoch: int = field(default=-1, init=False)
    _keys: Tensor | None = field(default=None, init=False)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the split (one, where it is smaller than a batch)."""
        return max(len(self.ids) // self.batch_size, 1)

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def keys(self, step: int) -> Tensor:
        """int64 [B]: the step's images as id + COPY * (number of the copy), over all processes."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch, 2))
            shuffled = self.ids[torch.randperm(len(self.ids), generator=generator)]
            copies = torch.arange(self.repeats).repeat(len(shuffled)) * COPY
            self._epoch, self._keys = epoch, (shuffled.repeat_interleave(self.repeats) + copies)[: len(shuffled)]
        keys = self._keys[place * self.batch_size : (place + 1) * self.batch_size]
        return keys[: len(keys) - len(keys) % 2] if self.even and len(keys) > 1 else keys

    def parts(self, first: int, last: int) -> Iterator[list[tuple[int, int]]]:
        """For the steps first..last-1, this process's (epoch, key) pairs."""
        for step in range(first, last):
            yield [(self.epoch(step), int(key)) for key in self.part(self.keys(step))]


def seed_everything(seed: int) -> None:
    """timm's transforms draw from the global generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def seed_of(*parts: int) -> int:
    """A 31-bit seed that is a function of the parts."""
    state = np.random.SeedSequence([part & 0xFFFFFFFF for part in parts]).generate_state(1)[0]
    return int(state) & 0x7FFFFFFF
