"""What turns gradients into steps: timm's optimizers over a phase's groups, learning rates, NVIDIA apex's kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import LayerNorm
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from harness.errors import UserError
from harness.spec import Recipe
from methods import Group, TrainPhase
from methods.core.registry import unknown

FUSED = {"fused_adamw": "torch's fused AdamW", "fused_adam": "NVIDIA apex's"}
APEX = "https://github.com/NVIDIA/apex"


class Criterion(nn.Module):
    """A classification loss that takes targets of one form: soft, shares of the classes as floats [B, classes], or
    labels, int64 [B]. ValueError for others, which torch may broadcast into a loss without meaning."""

    def __init__(self, loss: nn.Module, soft: bool) -> None:
        super().__init__()
        self.loss, self.soft = loss, soft

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        wanted = logits.shape if self.soft else logits.shape[:1]
        has_type = targets.is_floating_point() if self.soft else targets.dtype == torch.int64
        if targets.shape != wanted or not has_type:
            form = "shares of the classes, floats" if self.soft else "labels, int64"
            raise ValueError(
                f"the recipe's loss takes {form} {list(wanted)}, for logits {list(logits.shape)}; it was given targets "
                f"{targets.dtype} {list(targets.shape)}"
            )
        return self.loss(logits, targets)


def make_criterion(recipe: Recipe) -> nn.Module:
    """(logits, targets) to the classification loss: for mixed targets, smoothed ones, or plain ones."""
    if recipe.mixes:
        return Criterion(SoftTargetCrossEntropy(), soft=True)
    smoothing = recipe.label_smoothing
    return Criterion(LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss(), soft=False)


def check_recipe(recipe: Recipe, key: str, device: torch.device | None = None) -> None:
    """UserError for an optimizer that does not exist, or kernels that are not installed or not for this device."""
    known = [*FUSED, *list_optimizers()]
    if recipe.optimizer not in known:
        raise UserError(f"{key}: {unknown('optimizer', recipe.optimizer, known)}")
    wanted = []
    if recipe.optimizer == "fused_adam":
        wanted.append((f"{key}.optimizer: fused_adam", "write fused_adamw for torch's own fused AdamW"))
        _built(lambda: _fused_adam([torch.nn.Parameter(torch.zeros(1))], recipe), *wanted[-1])
    if recipe.norm == "fused_layer_norm":
        wanted.append((f"{key}.norm: fused_layer_norm", "write layer_norm for torch's own"))
        _built(lambda: _fused_layer_norm()((8,), eps=1e-6, elementwise_affine=True), *wanted[-1])
    if wanted and device is not None and device.type != "cuda":
        raise UserError(f"{wanted[0][0]}: NVIDIA apex's kernels need an NVIDIA GPU; {wanted[0][1]}")


def _built(make: Callable[[], Any], wanted_by: str, otherwise: str) -> None:
    """Tries to make something of NVIDIA apex, whose kernels are only looked for then. UserError where that fails: the package index
    has an `apex` that has nothing to do with it."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        raise UserError(f"{wanted_by} needs NVIDIA apex, which is not installed; build it from {APEX} "
                        f"(the package apex of the index is something else), or {otherwise}")  # fmt: skip
    try:
        make()
    except Exception as error:  # whatever another package of that name does
        where = spec.origin or "?"
        raise UserError(f"{wanted_by} needs NVIDIA apex, but the installed package apex ({where}) is not NVIDIA's or was built "
                        f"without its kernels ({type(error).__name__}); build it from {APEX}, or {otherwise}") from None  # fmt: skip


def _fused_adam(parameters: list[Any], recipe: Recipe) -> torch.optim.Optimizer:
    kind = importlib.import_module("apex.optimizers").FusedAdam
    return kind(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, adam_w_mode=True)


def _fused_layer_norm() -> type[nn.Module]:
    return importlib.import_module("apex.normalization").FusedLayerNorm


def make_optimizer(phase: TrainPhase, recipe: Recipe) -> torch.optim.Optimizer:
    """The optimizer over the phase's groups; an entry "frozen" in them is the share of the steps with rate 0. As in
    DeiT, one-dimensional parameters and the model's own exceptions get no weight decay."""
    trainable = [p for p in phase.objective.parameters() if p.requires_grad]
    groups = phase.groups if phase.groups is not None else [Group("all", trainable)]
    exempt = {id(p) for model in phase.objective.modules() if hasattr(model, "no_weight_decay")
              for name, p in model.named_parameters() if name in model.no_weight_decay()}  # fmt: skip
    parameters = []
    for group in groups:
        bare = [p for p in group.parameters if p.ndim <= 1 or id(p) in exempt]
        decayed = [p for p in group.parameters if p.ndim > 1 and id(p) not in exempt]
        for part, decay in ((bare, 0.0), (decayed, recipe.weight_decay)):
            if part:
                parameters.append({
                    "params": part, "weight_decay": decay, "lr": recipe.lr, "lr_scale": group.lr_scale, "frozen": group.frozen,
                })  # fmt: skip
    if recipe.optimizer == "fused_adam":
        return _fused_adam(parameters, recipe)
    if recipe.optimizer == "fused_adamw":
        return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    return create_optimizer_v2(parameters, opt=recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay)


class Schedule:
    """Learning rates as a function of the step: linear warm-up from 0, then cosine to recipe.min_lr; groups are scaled, and
    frozen at first."""

    def __init__(self, optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int, steps_per_epoch: int) -> None:
        self.optimizer, self.steps = optimizer, steps
        warmup = min(round(recipe.warmup_epochs * steps_per_epoch), steps // 2)
        self.cosine = CosineLRScheduler(
            optimizer, t_initial=steps - warmup + 1, lr_min=recipe.min_lr, warmup_t=warmup, warmup_lr_init=0.0,
            warmup_prefix=True, t_in_epochs=False,
        )  # fmt: skip

    def set(self, step: int) -> float:
        """Sets the rates for a step, counted from 0; the highest of them."""
        self.cosine.step_update(step + 1)
        for group in self.optimizer.param_groups:
            if step < group["frozen"] * self.steps:
                group["lr"] = 0.0
        return max(group["lr"] for group in self.optimizer.param_groups)


def fuse_norms(model: nn.Module, recipe: Recipe) -> None:
    """Lets the model's LayerNorms (not subclasses that do something else) use NVIDIA apex's kernel, where the recipe says so;
    weights and names stay."""
    if recipe.norm == "fused_layer_norm":
        _exchange(model, {nn.LayerNorm, LayerNorm}, _fused_layer_norm())


def restore_norms(model: nn.Module, recipe: Recipe) -> None:
    """torch's LayerNorms again: what is counted, timed and deployed has them."""
    if recipe.norm == "fused_layer_norm":
        _exchange(model, {_fused_layer_norm()}, nn.LayerNorm)


def _exchange(model: nn.Module, kinds: set[type[nn.Module]], new: type[nn.Module]) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) in kinds:
                other = new(tuple(child.normalized_shape), eps=child.eps, elementwise_affine=child.elementwise_affine)
                other.weight, other.bias = child.weight, child.bias
                setattr(module, name, other.train(child.training))
