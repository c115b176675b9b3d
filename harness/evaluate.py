"""Accuracy of a model on a split, and what it keeps of its images: one pass, every image counted once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from harness.cluster import ALONE, Cluster, agreed
from harness.data.dataset import Batch, ImageData
from harness.data.readable import DataLost
from harness.device import Plan
from harness.halving import Halving, NotEnoughMemory
from harness.tally import Tally
from methods import Report

Answers = tuple[Tensor, Tensor, Tensor]  # of each image: first guess right, one of five right, loss; [B] each


@dataclass(frozen=True)
class Evaluation:
    """top1, top5: shares of the images; loss: mean cross entropy; correct: bool [N], in the split's order."""

    top1: float
    top5: float
    loss: float
    correct: np.ndarray


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    data: ImageData,
    which: str,
    plan: Plan,
    batch_size: int = 256,
    cluster: Cluster = ALONE,
    tally: Tally | None = None,
) -> Evaluation:
    """`model` (in eval mode, on the plan's device) on the split "test" or "val". Several processes share the images out, each
    image going to one of them, and all get the result, or the same error: DataLost, or NotEnoughMemory where one image alone does not fit.
    tally: gets what the model kept of this process's images."""
    answers, problem = list[Answers](), None
    try:
        batches = data.eval_batches(which, batch_size, plan.device, cluster=cluster)
        answers += _look(model, batches, plan, which, tally)
    except (DataLost, NotEnoughMemory) as error:
        problem = error
    cluster.raise_any(problem)  # only here do processes wait for each other: they need not have equally many batches
    columns = zip(*answers, strict=True) if answers else ([], [], [])  # a process may have no image
    correct, among_five, losses = (_whole(list(parts), data.size(which), cluster) for parts in columns)
    correct, loss = correct.bool(), losses.mean().item()
    if not math.isfinite(loss):
        raise agreed(FloatingPointError(f"the model's loss on the {which} split is not a number"))
    return Evaluation(correct.double().mean().item(), among_five.mean().item(), loss, correct.numpy())


def _look(model: nn.Module, batches: Iterable[Batch], plan: Plan, which: str, tally: Tally | None) -> Iterator[Answers]:
    """Part by part, and what was kept of it into the tally."""
    with contextlib.nullcontext() if tally is None else tally.method.reporting(model) as reported:

        def call(part: Batch) -> tuple[Answers, Report | None]:
            with plan.autocast():
                logits = model(part.images)
                report = None if tally is None else reported(part.images)
            return _answers(logits.float(), part.targets), report

        for part, (answer, report) in Halving(plan.device, f"evaluating on the {which} split").over(batches, call):
            if report is not None:
                tally.add(report, len(part.images))
            yield answer


def _answers(logits: Tensor, targets: Tensor) -> Answers:
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    return ranked[:, 0].cpu(), ranked.any(dim=1).cpu(), losses.cpu()


def _whole(parts: list[Tensor], size: int, cluster: Cluster) -> Tensor:
    """float64 [N] in the split's order, from every process's part."""
    whole = torch.zeros(size, dtype=torch.float64)
    if parts:  # a process may have no image
        whole[cluster.rank :: cluster.size] = torch.cat(parts).double()
    return cluster.total(whole)
