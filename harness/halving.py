"""Batches that do not fit into memory are halved until they do; what is done already is not done again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from harness.device.execution import is_out_of_memory, release


class NotEnoughMemory(MemoryError):
    """What does not fit, however it is divided."""


class Divisible(Protocol):
    """A batch: `images` [B, ...], and `split`, which makes batches of at most that many images."""

    images: Tensor

    def split(self, size: int) -> list[Divisible]: ...


Part = TypeVar("Part", bound=Divisible)
Result = TypeVar("Result")


class Halving:
    """most: images at once, from when memory ran out for the first time; None before. Processes that work on batches of their own
    divide them by themselves: nothing here communicates."""

    def __init__(self, device: torch.device, what: str, told: Callable[[int], None] | None = None) -> None:
        """what: needs the memory, for the error's line. told: called with `most` whenever it falls."""
        self.device, self.what, self.told, self.most = device, what, told, None

    def over(
        self, batches: Iterable[Part], call: Callable[[Part], Result], undo: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[Part, Result]]:
        """Each part of each batch, in order, with what `call` made of it. undo: takes back what a call that ran out of memory did
        before. NotEnoughMemory where a single image does not fit."""
        for batch in batches:
            left = [batch]
            while left:
                part = left.pop(0)
                if self.most and len(part.images) > self.most:
                    left = part.split(self.most) + left
                    continue
                results = self._try(part, call)
                if results is None:
                    undo()
                    left.insert(0, part)
                    self._halve(len(part.images))
                else:
                    yield part, results[0]

    def _try(self, part: Part, call: Callable[[Part], Result]) -> tuple[Result] | None:
        """None where memory ran out; the error is gone afterwards, and with it the tensors that its frames hold."""
        try:
            return (call(part),)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _halve(self, images: int) -> None:
        release(self.device)
        if images == 1:
            raise NotEnoughMemory(f"{self.what}: not even one image at a time fits into memory")
        self.most = -(-images // 2)
        if self.told is not None:
            self.told(self.most)
