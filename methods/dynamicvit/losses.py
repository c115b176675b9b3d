"""DynamicViT's four losses (section 3.4, eq. 12-17)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from methods.core.noise import Noise
from methods.core.objective import Frozen, logits_divergence
from methods.core.pooled import Pooled, Term
from methods.core.precision import wide
from methods.dynamicvit.model import DynamicViT


def ratio_loss(decisions: list[Tensor], keep_rate: float) -> Tensor:
    """Squared distance of each image's kept share from rho^s, mean over images and stages. decisions: S x [B, N]."""
    terms = [((kept.mean(dim=1) - keep_rate**stage) ** 2).mean() for stage, kept in enumerate(decisions, start=1)]
    return torch.stack(terms).mean()


def token_loss(student: Tensor, teacher: Tensor, mask: Tensor, weight: float = 1.0) -> Pooled:
    """`weight` times the mean squared distance of the kept tokens' features, over the kept tokens of all images and over
    channels (the paper's eq. 15 does not divide by the channels, the code does). Features [B, N, C], mask [B, N]; 0 where
    nothing is kept."""
    per_token = wide(student - teacher).pow(2).mean(dim=-1)
    kept = (mask.detach() > 0.5).to(per_token.dtype)
    sums = torch.stack([(per_token * kept).sum(), kept.sum()])
    return Pooled(sums, lambda sums: weight * (sums[0] / sums[1].clamp(min=1.0)))


class PruningObjective(nn.Module):
    """Classification + ratio_weight * ratio + 0.5 * divergence from the teacher + 0.5 * token distance.

    The token loss is a mean over the kept tokens of the whole batch, the others are means over images.
    """

    def __init__(
        self,
        model: DynamicViT,
        criterion: nn.Module,
        teacher: nn.Module | None,
        keep_rate: float,
        ratio_weight: float,
        distill_weight: float,
        token_weight: float,
    ) -> None:
        super().__init__()
        self.model, self.criterion = model, criterion
        self.teacher = Frozen(teacher) if teacher is not None else None
        self.keep_rate, self.ratio_weight = keep_rate, ratio_weight
        self.distill_weight, self.token_weight = distill_weight, token_weight

    def forward(self, images: Tensor, targets: Tensor, noise: Noise) -> dict[str, Term]:
        out = self.model.forward_train(images, noise)
        terms = {"classification": self.criterion(wide(out.logits), targets)}
        if self.ratio_weight:
            terms["ratio"] = self.ratio_weight * ratio_loss(out.decisions, self.keep_rate)
        if self.teacher is not None:
            with torch.no_grad():
                features = self.teacher.model.forward_features(images)
                logits = self.teacher.model.forward_head(features)
            patches = features[:, self.model.num_prefix_tokens :]
            terms["distillation"] = self.distill_weight * logits_divergence(out.logits, logits)
            terms["token"] = token_loss(out.features, patches, out.decisions[-1], self.token_weight)
        return terms
