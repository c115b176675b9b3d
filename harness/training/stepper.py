"""One step: gradients of a batch that may come in pieces and be spread over processes, and what to do when something goes wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from harness.cluster import ALONE, Cluster, agreed
from harness.data.dataset import Batch
from harness.data.order import seed_of
from harness.device import Plan
from harness.device.execution import is_out_of_memory, release
from harness.errors import UserError
from harness.halving import NotEnoughMemory
from methods import TrainPhase
from methods.core.noise import Noise
from methods.core.pooled import Pooled, Term, value_of

Result = TypeVar("Result")
SMALLEST_SCALE = 1.0  # of float16's gradient scaler: gradients that overflow at it are not the scale's fault


class Diverged(RuntimeError):
    """The loss stopped being a number."""


@dataclass
class Outcome:
    """What a step did. terms: the loss by name, over all images of the step; norm: of the gradient; skipped: the loss or the
    gradient was not finite, so the weights stayed; overflowed: float16's scale was too large, so it was lowered instead."""

    terms: dict[str, float]
    norm: float
    skipped: bool = False
    overflowed: bool = False

    @property
    def loss(self) -> float:
        return sum(self.terms.values())


class _NewlyPooled(Exception):
    """A loss had no pooled terms at first, and has one now."""


class Stepper:
    """Makes a phase's steps. micro_batch: images at once in this process; smaller from when memory ran out."""

    def __init__(
        self,
        phase: TrainPhase,
        optimizer: torch.optim.Optimizer,
        plan: Plan,
        seed: int,
        clip_grad: float | None = None,
        micro_batch: int | None = None,
        cluster: Cluster = ALONE,
    ) -> None:
        self.phase, self.optimizer, self.plan, self.seed, self.cluster = phase, optimizer, plan, seed, cluster
        self.clip_grad, self.micro_batch = clip_grad, micro_batch
        self.scaler = torch.amp.GradScaler(plan.device.type, enabled=plan.dtype == "float16")
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._is_pooled: bool | None = None  # whether the loss has terms that are no means; None: not yet known
        self.needs_all = not phase.divisible or any(isinstance(m, _BatchNorm) for m in phase.objective.modules())
        if self.needs_all and (micro_batch or cluster.size > 1):
            raise agreed(UserError(f"phase {phase.name}: its loss needs all images of a step at once, so it takes one process and no "
                                   "train.micro_batch"))  # fmt: skip

    def step(self, batch: Batch, number: int) -> Outcome:
        """The gradient of a step's images, of which `batch` is this process's part, and the optimizer's step. number: of the step
        in the budget. NotEnoughMemory where no smaller micro-batch helps."""
        while (terms := self._gradients(batch, number)) is None:
            self._halve(len(batch.images))
        self.cluster.sum_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        outcome = Outcome(terms, self._clip())
        if not math.isfinite(outcome.loss):
            outcome.skipped = True
        elif not math.isfinite(outcome.norm):
            outcome.overflowed = self.scaler.is_enabled() and self.scaler.get_scale() > SMALLEST_SCALE
            outcome.skipped = not outcome.overflowed
        else:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return outcome

    def _gradients(self, batch: Batch, number: int) -> dict[str, float] | None:
        """Adds up gradients in the parameters; the loss's terms. None where a process, and so all, ran out of memory."""
        self.phase.objective.zero_grad(set_to_none=True)
        parts = batch.split(self.micro_batch or len(batch.images))
        held, whole = None, dict[str, Tensor]()
        if self._is_pooled is not False and (len(parts) > 1 or self.cluster.size > 1):
            # The sums over all images decide the gradient of each, so they are needed before it.
            looked = _unless_out_of_memory(lambda: self._sums(parts, number))
            if self.cluster.any(looked is None):
                return None
            held, sums = looked
            self._is_pooled = bool(sums)
            whole = {name: self.cluster.total(value) for name, value in sums.items()}
        try:
            shares = _unless_out_of_memory(lambda: self._backward(parts, number, held, whole))
        except _NewlyPooled:  # in all processes: they have the same loss
            self._is_pooled = None
            return self._gradients(batch, number)
        if self.cluster.any(shares is None):
            return None
        return dict(zip(shares, self.cluster.sums(shares.values()), strict=True))

    def _sums(self, parts: list[Batch], number: int) -> tuple[dict[str, Term] | None, dict[str, Tensor]]:
        """The terms of the only part, to go on with, and the sums of pooled terms over this process's parts."""
        held, sums = None, dict[str, Tensor]()
        for index, part in enumerate(parts):
            with torch.set_grad_enabled(len(parts) == 1):
                terms = self._forward(part, number, index)
            pooled = {name: term.sums.detach() for name, term in terms.items() if isinstance(term, Pooled)}
            sums = {name: sums[name] + value if index else value for name, value in pooled.items()}
            held = terms if len(parts) == 1 else None
            if not pooled:
                break
        return held, sums

    def _backward(
        self, parts: list[Batch], number: int, held: dict[str, Term] | None, whole: dict[str, Tensor]
    ) -> dict[str, float]:
        """Adds up gradients. This process's share of every term: they sum to the term over all processes. whole: the step's sums of
        pooled terms, where these parts are not all of it; held: the terms of the only part."""
        shares: dict[str, Tensor] = {}
        slopes: dict[str, Tensor] = {}
        for index, part in enumerate(parts):
            terms = held or self._forward(part, number, index)
            held, losses = None, []
            for name, term in terms.items():
                if isinstance(term, Pooled) and name not in whole and (len(parts) > 1 or self.cluster.size > 1):
                    raise _NewlyPooled(name)
                if name not in whole:
                    loss = value_of(term) * (len(part.images) / part.of)
                    shares[name] = shares.get(name, 0) + loss.detach()
                else:
                    if name not in slopes:
                        slopes[name], value = _slope(term, whole[name])
                        shares[name] = value / self.cluster.size
                    loss = (
                        slopes[name] * term.sums
                    ).sum()  # has the gradient that value(whole) has through these images
                losses.append(loss)
            self.scaler.scale(sum(losses)).backward()
        return dict(zip(shares, torch.stack([share.double() for share in shares.values()]).tolist(), strict=True))

    def _forward(self, part: Batch, number: int, index: int) -> dict[str, Term]:
        torch.manual_seed(seed_of(self.seed, number, 5, self.cluster.rank, index))  # for drop path and dropout
        with self.plan.autocast():
            return self.phase.objective(part.images, part.targets, Noise(self.seed, number, part.keys))

    def _clip(self) -> float:
        """The gradient's norm, before it is clipped."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = get_total_norm(gradients)
        if self.clip_grad:
            clip_grads_with_norm_(self.parameters, self.clip_grad, norm)
        return float(norm)

    def _halve(self, images: int) -> None:
        self.phase.objective.zero_grad(set_to_none=True)
        release(self.plan.device)
        now = max(self.cluster.gather(min(self.micro_batch or images, images)))  # shares differ in size
        if self.needs_all:
            raise agreed(NotEnoughMemory(f"phase {self.phase.name}: a step of {images} images does not fit into memory, and its loss "
                                         "needs them together; lower recipe.batch_size"))  # fmt: skip
        if now == 1:
            raise agreed(NotEnoughMemory(f"phase {self.phase.name}: not even one image at a time fits into memory"))
        self.micro_batch = -(-now // 2)


def _slope(term: Pooled, whole: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of value(sums) at the whole step's sums, and the value."""
    with torch.enable_grad():
        sums = whole.detach().requires_grad_()
        value = term.value(sums)
        (slope,) = torch.autograd.grad(value, sums)
    return slope, value.detach()


def _unless_out_of_memory(call: Callable[[], Result]) -> Result | None:
    try:
        return call()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
