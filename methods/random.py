"""Random token removal: what every token-pruning method must beat."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import methods
from methods.core.noise import Noise, image_keys
from methods.dynamicvit import DynamicViTMethod, PruningSettings
from methods.dynamicvit.model import DynamicViT


class Settings(PruningSettings):
    """DynamicViT's places, rates and losses, but for the ratio loss: the numbers are exact.
    seed: which random tokens evaluation removes."""

    seed: int = 0


class RandomViT(DynamicViT):
    """Modifies DynamicViT: the scores are random numbers. In evaluation they are a function of the image's pixels, so an
    image loses the same tokens in any batch; in training of the seed, the step and the image."""

    seed: int

    def add_predictors(self) -> None:
        self.score_predictor = nn.ModuleList()

    def look(self, images: Tensor) -> Tensor:
        return image_keys(images)

    def keep_scores(self, stage: int, patches: Tensor, seen: Tensor) -> Tensor:
        return Noise(self.seed, 0, seen).uniform(f"stage{stage}", patches.shape[1])

    def decide(self, stage: int, patches: Tensor, keep: Tensor, noise: Noise) -> Tensor:
        scores = noise.uniform(f"stage{stage}", patches.shape[1]) * keep.squeeze(-1)
        chosen = scores.topk(self.kept_counts[stage], dim=1).indices
        return torch.zeros_like(scores).scatter_(1, chosen, 1.0).unsqueeze(-1)


@methods.register
class RandomMethod(DynamicViTMethod):
    """Random token removal: DynamicViT's places, rates, losses and training, with dice in place of the predictors."""

    name = "random"
    Settings = Settings
    behaviour = RandomViT

    def sparsify(self, vit: nn.Module) -> RandomViT:
        sparse = super().sparsify(vit)
        sparse.seed = self.settings.seed
        return sparse

    @property
    def ratio_weight(self) -> float:
        return 0.0
