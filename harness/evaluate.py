"""Accuracy of a model on a split: one pass, every image counted once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from harness.cluster import ALONE, Cluster, agreed
from harness.data.dataset import ImageData
from harness.device import Plan


@dataclass(frozen=True)
class Evaluation:
    """top1, top5: shares of the images; loss: mean cross entropy; correct: bool [N], in the split's order."""

    top1: float
    top5: float
    loss: float
    correct: np.ndarray


@torch.inference_mode()
def evaluate(
    model: nn.Module, data: ImageData, which: str, plan: Plan, batch_size: int = 256, cluster: Cluster = ALONE
) -> Evaluation:
    """`model` (in eval mode, on the plan's device) on the split "test" or "val". Several processes share the images out, each
    image going to one of them, and all get the result."""
    first, fifth, losses = [], [], []
    for batch in data.eval_batches(which, batch_size, plan.device, cluster=cluster):
        with plan.autocast():
            logits = model(batch.images)
        logits = logits.float()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.targets[:, None]
        first.append(ranked[:, 0].cpu())
        fifth.append(ranked.any(dim=1).cpu())
        losses.append(nn.functional.cross_entropy(logits, batch.targets, reduction="none").cpu())
    correct, among_five, losses = (_whole(parts, data.size(which), cluster) for parts in (first, fifth, losses))
    correct, loss = correct.bool(), losses.mean().item()
    if not math.isfinite(loss):
        raise agreed(FloatingPointError(f"the model's loss on the {which} split is not a number"))
    return Evaluation(correct.double().mean().item(), among_five.mean().item(), loss, correct.numpy())


def _whole(parts: list[Tensor], size: int, cluster: Cluster) -> Tensor:
    """float64 [N] in the split's order, from every process's part."""
    whole = torch.zeros(size, dtype=torch.float64)
    if parts:  # a process may have no image
        whole[cluster.rank :: cluster.size] = torch.cat(parts).double()
    return cluster.total(whole)
