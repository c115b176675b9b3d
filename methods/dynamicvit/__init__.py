"""DynamicViT: learned predictors remove tokens in stages (Rao et al., NeurIPS 2021, arXiv 2106.02034)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

import methods
from methods.core.vit import require_plain_vit
from methods.dynamicvit.losses import PruningObjective
from methods.dynamicvit.model import DynamicViT, make_dynamic


class PruningSettings(methods.Settings):
    """keep_rate: the paper's rho, the authors' base_rate: after stage s, int(N * rho^s) of the N patch tokens stay.
    pruning_loc: blocks before which tokens are removed, from 0; None: quarters of the depth (3, 6, 9 of 12).
    distill_weight, token_weight: 0.5 each. frozen: share of the training, from its start, in which the backbone's rate
    is 0 (5 of 30 epochs).
    """

    keep_rate: Annotated[float, Field(gt=0, le=1)] = 0.7
    pruning_loc: Annotated[tuple[int, ...], Field(min_length=1)] | None = None
    distill_weight: Annotated[float, Field(ge=0)] = 0.5
    token_weight: Annotated[float, Field(ge=0)] = 0.5
    frozen: Annotated[float, Field(ge=0, le=1)] = 5 / 30


class Settings(PruningSettings):
    """Those of token pruning, and: ratio_weight: lambda_ratio (2; the authors use 5 for DeiT-B). lr_scale: learning rate of
    the backbone relative to the predictors'. The recipe's rate is the backbone's, as it is for every method that starts
    from dense weights; the predictors learn 1 / lr_scale times as fast (1e-5 and 1e-3 in the paper).
    """

    ratio_weight: Annotated[float, Field(ge=0)] = 2.0
    lr_scale: Annotated[float, Field(gt=0)] = 0.01


@methods.register
class DynamicViTMethod(methods.Method):
    """DynamicViT: learned predictors remove tokens in stages (Rao et al., NeurIPS 2021, arXiv 2106.02034).

    Training hides dropped tokens from the attention, with straight-through Gumbel decisions; evaluation and the deployed
    model gather the best-scored tokens, the same number for every image. The backbone starts from dense weights, is
    frozen at first and then trains slowly; CLS token and position embedding never train (as in the official code).
    """

    name = "dynamicvit"
    uses_teacher = True
    work_varies = False  # other tokens, but as many for every image
    Settings = Settings
    behaviour = DynamicViT

    def sparsify(self, vit: nn.Module) -> DynamicViT:
        require_plain_vit(vit, self.name)
        return make_dynamic(vit, self.settings.keep_rate, self.settings.pruning_loc, self.behaviour)

    def report(self, module: DynamicViT, images: Tensor) -> methods.Report:
        overhead, patches = [], module.patch_embed.num_patches
        counts = (patches, *module.kept_counts)
        for stage, predictor in enumerate(module.score_predictor):
            macs = torch.tensor([predictor.macs(counts[stage])], dtype=torch.float64)
            overhead.append(methods.Overhead(f"score_predictor.{stage}", macs, block=module.pruning_loc[stage]))
        return methods.Report(blocks=module.block_reports(images), overhead=tuple(overhead))

    @property
    def ratio_weight(self) -> float:
        return self.settings.ratio_weight

    def phases(
        self, sparse: DynamicViT, criterion: nn.Module, teacher: nn.Module | None = None
    ) -> Sequence[methods.TrainPhase]:
        settings = self.settings
        objective = PruningObjective(
            sparse,
            criterion,
            teacher,
            settings.keep_rate,
            self.ratio_weight,
            settings.distill_weight,
            settings.token_weight,
        )
        never = {"cls_token", "pos_embed", "reg_token", "dist_token"}
        named = [(name, p) for name, p in sparse.named_parameters() if name not in never]
        new = [p for name, p in named if name.startswith("score_predictor.")]
        old = [p for name, p in named if not name.startswith("score_predictor.")]
        groups = [methods.Group("backbone", old, frozen=settings.frozen)]
        if new:
            groups.append(methods.Group("predictor", new, lr_scale=1 / settings.lr_scale))
        return [methods.TrainPhase(name="prune", objective=objective, groups=groups)]
