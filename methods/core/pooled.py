"""What a training step computes over all its images, when these are spread over micro-batches and processes.

A loss that is a mean over images needs nothing of this. One that is not (a mean over the kept tokens of the whole batch, the
square of a batch's mean, the norm of a whole tensor) gives the sums that it is made of, and what to make of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pooled:
    """A loss term `value(sums)` that is no mean over images.

    sums: any shape, each entry a sum over the images at hand, differentiable. They are added up over all micro-batches and
        processes of the step before `value` is taken.
    value: maps the step's sums to the term, a scalar; differentiable in them, and a function of nothing else that is trained.

    The mean over kept tokens of `distance` [B, N], with `kept` [B, N] of zeros and ones:

        Pooled(torch.stack([(distance * kept).sum(), kept.sum()]), lambda sums: sums[0] / sums[1].clamp(min=1))
    """

    sums: Tensor
    value: Callable[[Tensor], Tensor]


Term = Union["Tensor", Pooled]


def value_of(term: Term) -> Tensor:
    """The term, a scalar, if the images at hand are all there are."""
    return term.value(term.sums) if isinstance(term, Pooled) else term


def total(tensor: Tensor) -> Tensor:
    """Sums the tensor over all processes, in place, so that all go on with the same; returns it. For what a method gathers
    outside of its loss: statistics of a collecting phase, averages taken in `after_step`. With one process it is as it was."""
    import torch  # importing methods needs no torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor
