"""Accuracy of a model on a split: one pass, every image counted once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

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
def evaluate(model: nn.Module, data: ImageData, which: str, plan: Plan, batch_size: int = 256) -> Evaluation:
    """`model` (in eval mode, on the plan's device) on the split "test" or "val"."""
    first, fifth, losses = [], [], []
    for batch in data.eval_batches(which, batch_size, plan.device):
        with plan.autocast():
            logits = model(batch.images)
        logits = logits.float()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.targets[:, None]
        first.append(ranked[:, 0].cpu())
        fifth.append(ranked.any(dim=1).cpu())
        losses.append(nn.functional.cross_entropy(logits, batch.targets, reduction="none").cpu())
    correct, loss = torch.cat(first), torch.cat(losses).double().mean().item()
    if not math.isfinite(loss):
        raise FloatingPointError(f"the model's loss on the {which} split is not a number")
    return Evaluation(correct.double().mean().item(), torch.cat(fifth).double().mean().item(), loss, correct.numpy())
