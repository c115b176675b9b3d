"""Losses that several methods share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.core.noise import Noise
from methods.core.precision import wide


class Frozen(nn.Module):
    """Holds a teacher so that it is never trained: evaluation mode and no gradients, whatever its owner is set to."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)


def logits_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) between class distributions, temperature 1: logits [B, classes] to the mean over B."""
    return F.kl_div(
        wide(student).log_softmax(-1), wide(teacher).log_softmax(-1), reduction="batchmean", log_target=True
    )


class Classification(nn.Module):
    """Classification loss and, where there is a teacher, `weight` times the divergence from its logits."""

    def __init__(self, model: nn.Module, criterion: nn.Module, teacher: nn.Module | None = None, weight: float = 0.5):
        super().__init__()
        self.model, self.criterion, self.weight = model, criterion, weight
        self.teacher = Frozen(teacher) if teacher is not None else None

    def logits(self, images: Tensor, noise: Noise) -> Tensor:
        """The model's, [B, classes]."""
        return self.model(images)

    def forward(self, images: Tensor, targets: Tensor, noise: Noise) -> dict[str, Tensor]:
        logits = self.logits(images, noise)
        terms = {"classification": self.criterion(wide(logits), targets)}
        if self.teacher is not None:
            with torch.no_grad():
                expected = self.teacher.model(images)
            terms["distillation"] = self.weight * logits_divergence(logits, expected)
        return terms
