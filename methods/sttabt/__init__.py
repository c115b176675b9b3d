"""STTABT: tokens chosen by attention back-tracking through an approximation network (Lee et al., ICLR 2023, openreview VV0hSE8AxCw)."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import pydantic
import torch
from pydantic import Field
from timm.layers import Mlp
from timm.models import VisionTransformer
from torch import Tensor, nn

import methods
from methods.core.vit import heads_width, replace_attention, require_plain_vit, specialise
from methods.core.watching import remembered
from methods.sttabt.approxnet import narrowed, transfer_maps
from methods.sttabt.backtracking import concrete_masks, concrete_sets, occupancy
from methods.sttabt.checkpoint import converted
from methods.sttabt.counting import authors_macs
from methods.sttabt.deployed import PackedAttention, PackedViT
from methods.sttabt.manual import AskedAttention, LeavingAttention, ManualViT, manual_schedule
from methods.sttabt.model import BackTrackedViT, MaskedAttention
from methods.sttabt.training import (
    ConcreteObjective,
    Distillation,
    trained_by_distillation,
    trained_end_to_end,
)

Epochs = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]


OWNERS = {
    "p_logit": "concrete", "lambda_mask": "concrete", "lambda_p": "concrete", "p_lr": "concrete", "score_lr": "concrete", "ks": "topk", "attention": "topk",
    "occupancy": "manual",
}  # fmt: skip
OF_APPROX = {"factor", "approx_epochs", "epochs", "prediction", "approx_lr"}


class Settings(methods.Settings):
    """variant: "concrete" (the paper's: soft masks, trained end to end), "topk" (a fixed share of the tokens per block, walking back; nothing but the
        approximation network is trained) or "manual" (the authors' forward baseline: each block leaves the tokens that are attended to most).
    factor: the approximation network's width is the network's divided by it.
    p_logit: of concrete: one number per operating point; the share of tokens that the training aims at is its sigmoid. Thresholds start there.
    ks: of topk: the share of tokens that a block takes besides those that deeper ones need, from 1 on their number. attention: what topk looks at:
        "approx" or "actual", the network's own by a dense pass (an upper bound, which saves nothing).
    occupancy: of manual: the mean share of tokens it aims at.
    approx_epochs, epochs: of the approximation network's training and of what comes after. Here they are the budget's division: 30 to 20.
    lambda_mask, lambda_p: weights of the occupancy's squared distance from its aim, and of the thresholds' from p_logit. prediction: weight of the
        class probabilities' distance in distillation: 0 for DeiT, 200 for LV-ViT.
    approx_lr: the rate of distillation, relative to the recipe's, which is the second training's (1e-4 and 1e-5 in the paper). p_lr: of the
        thresholds, score_lr: of the approximation network in the second training, likewise (1 and 1 in the paper).
    """

    variant: Literal["concrete", "topk", "manual"] = "concrete"
    factor: Annotated[int, Field(ge=1)] = 4
    p_logit: Annotated[float, Field(ge=-10, le=10)] = -0.5
    ks: Annotated[float, Field(gt=0)] = 0.4
    attention: Literal["approx", "actual"] = "approx"
    occupancy: Annotated[float, Field(gt=0, lt=1)] = 0.6
    approx_epochs: Epochs = 30
    epochs: Epochs = 20
    lambda_mask: Weight = 100.0
    lambda_p: Weight = 1e-3
    prediction: Weight = 0.0
    approx_lr: Annotated[float, Field(gt=0)] = 10.0
    p_lr: Annotated[float, Field(gt=0)] = 1.0
    score_lr: Annotated[float, Field(gt=0)] = 1.0

    @pydantic.model_validator(mode="after")
    def _of_the_variant(self) -> Settings:
        changed = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        for name in changed:
            variant = OWNERS.get(name, self.variant)
            if variant != self.variant:
                raise ValueError(f"{name} is for variant: {variant}, not {self.variant}")
            if name in OF_APPROX and not self.has_approx:
                raise ValueError(f"{name} is for the approximation network, and here is none")
        return self

    @property
    def has_approx(self) -> bool:
        """Whether there is an approximation network."""
        return self.variant == "concrete" or (self.variant == "topk" and self.attention == "approx")


@methods.register
class STTABT(methods.Method):
    """STTABT: tokens chosen by attention back-tracking through an approximation network (Lee et al., ICLR 2023).

    Phases: `approx` (a narrow copy of the network learns its attention maps; one serves all operating points), `thresholds` (they are set to p_logit) and
    `concrete` (everything is trained end to end under soft masks). Evaluation walks back from CLS through the narrow network's attention and keeps, for
    every block, the tokens that deeper ones need, a number of its own for every image. The official code multiplies by masks; the deployed network here
    computes kept tokens alone.
    """

    name = "sttabt"
    uses_teacher = True
    Settings = Settings

    @property
    def work_varies(self) -> bool:
        return self.settings.variant != "manual"

    @property
    def keeps_as_told(self) -> bool:
        return self.settings.variant == "concrete"

    def sparsify(self, vit: nn.Module) -> BackTrackedViT | ManualViT:
        require_plain_vit(vit, self.name, pools=("token", "avg"))
        if vit.global_pool == "avg":
            raise methods.Unsupported("sttabt: average pooling reads all tokens of the last block, so walking back from them every block needs all: nothing "
                                      "could be left out; use a network with a class token")  # fmt: skip
        if self.settings.variant == "manual":
            return self._manual(vit)
        if not isinstance(vit.patch_drop, nn.Identity):
            raise methods.Unsupported(
                "sttabt: patches that are dropped at random would not be the same in both networks; use patch_drop_rate 0"
            )
        if any(not isinstance(block.mlp, Mlp) for block in vit.blocks):
            raise methods.Unsupported("sttabt: only timm's plain Mlp can be masked between its layers")
        sparse = specialise(vit, BackTrackedViT)
        replace_attention(sparse, MaskedAttention)
        sparse.outputs = outputs_of(vit)
        concrete = self.settings.variant == "concrete"
        sparse.keep = None if concrete else [self.settings.ks] * len(vit.blocks)
        sparse.approx = narrowed(vit, self.settings.factor) if self.settings.has_approx else None
        if sparse.approx is not None:
            for block in sparse.approx.blocks:
                block.attn.kind = "uniform" if concrete else "probabilities"
            sparse.transfer = transfer_maps(vit, self.settings.factor)
            sparse.p_logit = nn.Parameter(torch.full((len(vit.blocks),), self.settings.p_logit))
        return sparse

    def _manual(self, vit: VisionTransformer) -> ManualViT:
        sparse = specialise(vit, ManualViT)
        replace_attention(sparse, LeavingAttention)
        sparse.blocks[-1].attn.__class__ = AskedAttention
        sparse.outputs = outputs_of(vit)
        tokens = vit.patch_embed.num_patches + vit.num_prefix_tokens
        shares = manual_schedule(self.settings.occupancy, len(vit.blocks))
        counts = [max(1, int(share * tokens)) for share in shares[:-1]]
        sparse.counts = [min([*counts[: index + 1], tokens]) for index in range(len(counts))]
        return sparse

    def deploy(self, sparse: BackTrackedViT | ManualViT) -> PackedViT | ManualViT:
        deployed = copy.deepcopy(sparse).eval().requires_grad_(False)
        if isinstance(deployed, ManualViT):
            return deployed
        deployed.__class__ = _packed(type(sparse))
        replace_attention(deployed, PackedAttention)
        for block in deployed.blocks:
            block.attn.split()
        if deployed.approx is not None:
            thresholds = deployed.p_logit.detach().float().cpu()
            del deployed.transfer, deployed.p_logit
            deployed.register_buffer("p_logit", thresholds)
            deployed.approx.drop_what_chooses_nothing()
        return deployed

    @torch.no_grad()
    def calibrate(self, sparse: BackTrackedViT | ManualViT, images: Tensor, keep_rate: float) -> None:
        """Concrete masks: one threshold for all blocks, found by bisection, under which the blocks keep that share of all tokens."""
        if self.settings.variant != "concrete":
            return
        ratings, (low, high) = sparse.ratings(images), (-15.0, 15.0)
        for _ in range(12):  # more would end at the very score of some token, where rounding decides
            sparse.p_logit.fill_((low + high) / 2)
            kept = concrete_sets(ratings, sparse.p_logit, sparse.outputs)[:-1].double().mean()
            low, high = (low, (low + high) / 2) if kept > keep_rate else ((low + high) / 2, high)

    @torch.no_grad()
    def report(self, module: BackTrackedViT | ManualViT, images: Tensor) -> methods.Report:
        if isinstance(module, ManualViT):
            blocks = module.block_reports(images)
            shares = torch.tensor([*(int(block.keys) for block in blocks), module.outputs]) / (
                module.patch_embed.num_patches + module.num_prefix_tokens
            )
            return methods.Report(blocks, numbers={"occupancy": shares.mean()[None]})
        with self.reporting(module) as reported:
            module.choose(images)
            return reported(images)

    @contextlib.contextmanager
    def reporting(self, module: BackTrackedViT | ManualViT) -> Iterator[Callable[[Tensor], methods.Report]]:
        if isinstance(module, ManualViT):
            yield partial(self.report, module)
            return
        is_concrete = module.keep is None

        def soft_occupancy(ratings: Sequence[Tensor]) -> Tensor:
            soft = concrete_masks(ratings, module.p_logit, module.outputs).soft
            return soft[1:].double().mean(dim=(0, 2)).cpu()

        asked = remembered(module, "ratings", soft_occupancy) if is_concrete else contextlib.nullcontext()
        with remembered(module, "choose", Tensor.cpu) as kept, asked as soft:
            yield lambda images: self._report(module, kept[0], soft[0] if is_concrete else None)

    def _report(self, module: BackTrackedViT, kept: Tensor, soft: Tensor | None) -> methods.Report:
        """kept bool [L + 1, B, N]; soft [B]: the occupancy by soft masks, where masks are concrete."""
        tokens, prefix = kept.shape[2], module.num_prefix_tokens
        counts = kept.sum(dim=2)
        blocks = tuple(
            methods.BlockReport(
                keys=counts[index],
                queries=counts[index + 1],
                mlp=counts[index + 1],
                kept=_numbers(kept[index, :, prefix:]),
            )
            for index in range(len(module.blocks))
        )
        numbers, authors = {"occupancy": occupancy(kept)}, None
        if soft is not None:
            numbers["occupancy of the loss"] = soft
            authors = authors_macs(module, kept)
        overhead = tuple(self._overhead(module, tokens))
        return methods.Report(blocks, overhead=overhead, numbers=numbers, authors=authors)

    def _overhead(self, module: BackTrackedViT, tokens: int) -> Iterator[methods.Overhead]:
        """What choosing costs: the attention that is asked, and the walk through it."""
        if module.approx is not None:
            yield methods.Overhead("approx", _one(module.approx.macs(module.outputs)))
        else:
            yield methods.Overhead("dense pass", _one(dense_pass_macs(module)))
        yield methods.Overhead("back-tracking", _one((len(module.blocks) - 1) * tokens**2 + module.outputs * tokens))

    def phases(
        self, sparse: BackTrackedViT | ManualViT, criterion: nn.Module, teacher: nn.Module | None = None
    ) -> Sequence[methods.TrainPhase | methods.TransformPhase]:
        settings = self.settings
        if not settings.has_approx:
            return [methods.TransformPhase(name="untrained", apply=_nothing, share=1.0)]
        share = settings.approx_epochs / (settings.approx_epochs + settings.epochs)
        learned = trained_by_distillation(sparse, settings.prediction)
        approx = methods.TrainPhase(
            name="approx", objective=Distillation(sparse, settings.prediction), share=share,
            groups=[methods.Group("approx", learned, lr_scale=settings.approx_lr)],
            artifact=f"factor={settings.factor} approx_lr={settings.approx_lr} prediction={settings.prediction}",
            makes=("approx", "transfer"),
        )  # fmt: skip
        if settings.variant == "topk":
            return [approx, methods.TransformPhase(name="untrained", apply=_nothing, share=1 - share)]
        objective = ConcreteObjective(
            sparse, criterion, teacher, settings.p_logit, settings.lambda_mask, settings.lambda_p
        )
        own, scoring = trained_end_to_end(sparse)
        groups = [
            methods.Group("network", own),
            methods.Group("approx", scoring, lr_scale=settings.score_lr),
            methods.Group("thresholds", [sparse.p_logit], lr_scale=settings.p_lr),
        ]
        return [
            approx, methods.TransformPhase(name="thresholds", apply=lambda: sparse.p_logit.fill_(settings.p_logit)),
            methods.TrainPhase(name="concrete", objective=objective, share=1 - share, groups=groups),
        ]  # fmt: skip

    def convert_checkpoint(self, state_dict: dict[str, Any]) -> dict[str, Tensor]:
        """The authors' checkpoint, of an approximation network alone or of both networks."""
        return converted(state_dict)


def outputs_of(vit: VisionTransformer) -> int:
    """How many tokens the classifiers read: CLS, and a distilled network's second one."""
    return 2 if hasattr(vit, "head_dist") else 1


def dense_pass_macs(vit: VisionTransformer) -> float:
    """Multiply-adds per image of `methods.sttabt.observed.steps`."""
    patches, total = vit.patch_embed.num_patches, 0.0
    tokens = patches + vit.num_prefix_tokens
    for index, block in enumerate(vit.blocks):
        weights = sum(layer.weight.numel() for layer in block.modules() if isinstance(layer, nn.Linear))
        is_last = index == len(vit.blocks) - 1
        maps = tokens**2 * heads_width(block.attn)
        total += tokens * 3 * heads_width(block.attn) * vit.embed_dim + maps if is_last else tokens * weights + 2 * maps
    return patches * vit.patch_embed.proj.weight.numel() + total


def _packed(kind: type) -> type:
    """PackedViT, with the specialities that the sparse network's class has."""
    return PackedViT if kind is BackTrackedViT else type(PackedViT.__name__, (PackedViT, *kind.__bases__), {})


def _numbers(kept: Tensor) -> Tensor:
    """Which patches are kept, bool [B, n], as their numbers [B, most], -1 behind an image's last."""
    counts = kept.sum(dim=1)
    order = kept.int().argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
    return order.masked_fill(torch.arange(order.shape[1]) >= counts[:, None], -1)


def _one(macs: float) -> Tensor:
    return torch.tensor([macs], dtype=torch.float64)


def _nothing() -> None:
    """Of a variant that trains nothing (more)."""
