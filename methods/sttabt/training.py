"""STTABT's two trainings: the approximation network is distilled; then all is trained end to end under soft masks."""

from __future__ import annotations

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from methods.core.noise import Noise
from methods.core.objective import Frozen, logits_divergence
from methods.core.pooled import Pooled, Term
from methods.core.precision import wide
from methods.sttabt.approxnet import EPS
from methods.sttabt.model import BackTrackedViT
from methods.sttabt.observed import finished, steps

HIDDEN = 0.01  # weight of the hidden states' distances
DISTILLED = 0.5  # weight of the divergence from the teacher's logits


def attention_divergence(teacher: Tensor, approximation: Tensor) -> Tensor:
    """KL(teacher || approximation) of attention maps [B, H, N, N], mean over images, heads and queries."""
    return (teacher * ((teacher + EPS).log() - (approximation + EPS).log())).sum(dim=-1).mean()


class Distillation(nn.Module):
    """The approximation network imitates the network itself, frozen and dense: attention maps, hidden states at every block's input and the
    embedding (both through maps of their own), and, weighted by `prediction`, the class probabilities. Labels are not used."""

    def __init__(self, model: BackTrackedViT, prediction: float = 0.0) -> None:
        super().__init__()
        self.model, self.prediction = model, prediction

    def train(self, mode: bool = True) -> Distillation:
        """What is imitated is so in evaluation mode; the approximation network has nothing that knows modes."""
        return super().train(False)

    def forward(self, images: Tensor, targets: Tensor, noise: Noise) -> dict[str, Term]:
        model, transfer, originals = self.model, self.model.transfer, steps(self.model, images)
        attention, hidden = [], []
        for index, step in enumerate(steps(model.approx, images)):
            with torch.no_grad():
                original = next(originals)
            attention.append(attention_divergence(original.scores.softmax(dim=-1), step.scores.softmax(dim=-1)))
            hidden.append(_distance(transfer["hidden"][index](step.hidden), original.hidden))
            if index == 0:
                embedding = _distance(transfer["embedding"](step.hidden), original.hidden)
        terms = {
            "attention": torch.stack(attention).mean(),
            "hidden": HIDDEN * torch.stack(hidden).mean(),
            "embedding": embedding,
        }
        if self.prediction:
            with torch.no_grad():
                expected = wide(finished(model, original)).softmax(dim=-1)
            found = wide(finished(model.approx, step)).softmax(dim=-1)
            terms["prediction"] = self.prediction * F.mse_loss(found, expected)
        return terms


def _distance(narrow: Tensor, original: Tensor) -> Tensor:
    return F.mse_loss(wide(narrow), wide(original))


class ConcreteObjective(nn.Module):
    """Classification under the masks; how far occupancy is from sigmoid(p_init); how far thresholds are from p_init; and half the divergence from the dense
    teacher's logits, where there is one.

    The occupancy is a mean over all images of a step, tokens and the L sets that are written: soft ones, the first block's input not among them. hard:
    masks of zeros and ones in the forward, which pass no gradient to what chooses them (the authors train with soft ones).
    """

    def __init__(
        self, model: BackTrackedViT, criterion: nn.Module, teacher: nn.Module | None, p_init: float, ratio_weight: float, p_weight: float,
        hard: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.criterion, self.hard = model, criterion, hard
        self.teacher = Frozen(teacher) if teacher is not None else None
        self.p_init, self.ratio_weight, self.p_weight = p_init, ratio_weight, p_weight
        self.target = 1 / (1 + torch.tensor(-p_init, dtype=torch.float64).exp().item())

    def forward(self, images: Tensor, targets: Tensor, noise: Noise) -> dict[str, Term]:
        model = self.model
        masks = model.masks(images)
        used = masks.kept.to(masks.soft.dtype) if self.hard else masks.soft
        logits = model.forward_head(model.masked_features(images, used))
        written = masks.soft[1:].mean(dim=(0, 2))
        sums = torch.stack([written.sum(), written.new_tensor(float(len(images)))])
        terms: dict[str, Term] = {
            "classification": self.criterion(wide(logits), targets),
            "ratio": Pooled(sums, lambda sums: self.ratio_weight * (self.target - sums[0] / sums[1]) ** 2),
            "thresholds": self.p_weight * (model.p_logit - self.p_init).square().sum(),
        }
        if self.teacher is not None:
            with torch.no_grad():
                expected = self.teacher.model(images)
            terms["distillation"] = DISTILLED * logits_divergence(logits, expected)
        return terms


def trained_by_distillation(model: BackTrackedViT, prediction: float) -> list[nn.Parameter]:
    """What the first training's losses reach: all of the approximation network and the maps; where predictions are not imitated, not what comes after
    the last block's attention."""
    unreached = set() if prediction else _behind_the_last_map(model.approx)
    return [p for p in [*model.approx.parameters(), *model.transfer.parameters()] if id(p) not in unreached]


def trained_end_to_end(model: BackTrackedViT) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The network's and the approximation network's parameters that the second training moves. As in the official code their CLS tokens (and others of
    that kind) stay, positions move."""
    fixed = {"cls_token", "dist_token"}
    own = [
        p for name, p in model.named_parameters()
        if name.split(".")[0] not in {"approx", "transfer", "p_logit"} and name not in fixed
    ]  # fmt: skip
    unreached = _behind_the_last_map(model.approx)
    approx = [p for name, p in model.approx.named_parameters() if name not in fixed and id(p) not in unreached]
    return own, approx


def _behind_the_last_map(net: VisionTransformer) -> set[int]:
    """Parameters of what comes after the last block's queries and keys: no score depends on them."""
    last = net.blocks[-1]
    modules = [
        last.attn.proj,
        last.attn.norm,
        last.ls1,
        last.norm2,
        last.mlp,
        last.ls2,
        net.norm,
        net.fc_norm,
        net.head,
    ]
    modules += [net.head_dist] if hasattr(net, "head_dist") else []
    return {id(p) for module in modules for p in module.parameters()}
