"""The loss of ViTCoD's two trainings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from methods.core.noise import Noise
from methods.core.objective import Classification
from methods.core.pooled import Pooled, Term
from methods.vitcod.model import ViTCoDViT

OFFICIAL_BATCH = (
    64  # images per device in the authors' commands, on which the size of their reconstruction loss depends
)


class CodedObjective(Classification):
    """Classification, and how far decoded queries and keys are from the originals: `weight` times the sum over blocks of the norms of the whole
    tensors, not squared and not averaged, as in the official code. Such a norm grows with the square root of the images in it; it is scaled to 64
    of them, the authors' batch per device. The originals are not detached: they are pulled towards what can be coded, too."""

    def __init__(
        self, model: ViTCoDViT, criterion: nn.Module, teacher: nn.Module | None, reconstruction: float
    ) -> None:
        super().__init__(model, criterion, teacher)
        self.reconstruction = reconstruction

    def forward(self, images: Tensor, targets: Tensor, noise: Noise) -> dict[str, Term]:
        self.model.take_distances()  # what a forward that failed has left
        terms: dict[str, Term] = super().forward(images, targets, noise)
        distances = self.model.take_distances()
        if distances is not None and self.reconstruction:
            squares = distances.flatten()
            sums = torch.cat([squares, squares.new_full((1,), len(images))])
            terms["reconstruction"] = Pooled(sums, self._norms)
        return terms

    def _norms(self, sums: Tensor) -> Tensor:
        squares, images = sums[:-1], sums[-1]
        norms = squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()  # a norm of zero has no gradient
        return self.reconstruction * (OFFICIAL_BATCH / images).sqrt() * norms.sum()
