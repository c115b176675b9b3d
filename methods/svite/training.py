"""Dynamic sparse training: what happens around each step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from methods.core.masking import apply_masks, masked_layers
from methods.core.noise import Noise
from methods.core.objective import Classification
from methods.core.pooled import total
from methods.svite.criteria import Growth
from methods.svite.pattern import Pattern
from methods.svite.schedule import Updates
from methods.svite.selector import SelectingViT
from methods.svite.structured import HeadTap


class SparseObjective(Classification):
    """Classification loss of a model whose heads are scored in the backward pass, where `open_taps` says so."""

    def __init__(self, model: VisionTransformer, criterion: nn.Module, teacher: nn.Module | None = None) -> None:
        super().__init__(model, criterion, teacher)
        # Here and not in the model, whose parameters they are not; as parameters, they are cleared and moved as gradients are.
        taps = [
            nn.Parameter(torch.zeros(2, block.attn.num_heads))
            for block in model.blocks
            if isinstance(block.attn.norm, HeadTap)
        ]
        self.taps = nn.ParameterList(taps)

    def logits(self, images: Tensor, noise: Noise) -> Tensor:
        return self.model.forward_train(images, noise) if isinstance(self.model, SelectingViT) else self.model(images)

    def open_taps(self, is_open: bool) -> None:
        """Whether the next backward passes score the heads: it takes time, and only an update wants the scores."""
        for block, tap in zip(self.model.blocks, self.taps, strict=False):
            block.attn.norm.__dict__["tap"] = tap if is_open else None  # not a parameter of the model

    def head_scores(self) -> list[Tensor] | None:
        """[2, H] per block: sums over all images of the last step, in all processes. None where no heads are masked."""
        return [total(tap.grad.clone()) for tap in self.taps] or None


@dataclass
class DynamicSparseTraining:
    """The hooks of a phase, and what they remember: how many updates were due (the model has the number, too, for its report; asking a GPU for it in
    every step would wait), which weights were ever active, running means.

    The order in a step is the official code's: gradients of all weights (masked ones too), the optimizer's step on all of them, masks; then,
    where one is due, an update by these gradients, and masks again. A step that was skipped has no gradients to go by: its update waits for
    the next step, up to the end of the updates.
    """

    objective: SparseObjective
    pattern: Pattern
    growth: Growth
    updates: Updates
    rate: Callable[[int, int], float]  # of step and steps
    temperature: Callable[[int, int], float] | None = None

    def __post_init__(self) -> None:
        self.model = self.objective.model
        self.made = 0
        self.ever = {name: _full(layer) for name, layer in masked_layers(self.model).items()}

    def before_step(self, step: int, steps: int) -> None:
        if self.temperature is not None:
            self.model.temperature.fill_(self.temperature(step, steps))
        self.objective.open_taps(self._is_due(step + 1, steps))

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> dict[str, Any] | None:
        """Masks the weights; an update's statistics, where there was one."""
        done = step + 1
        apply_masks(self.model)
        self.growth.watch(masked_layers(self.model))
        if not self._is_due(done, steps):
            return None
        self.made = self.updates.due(done, steps)
        self.model.updates.fill_(self.made)
        rate = self.rate(done, steps)
        moved = self.pattern.renew(self.model, rate, self.growth, self.objective.head_scores())
        apply_masks(self.model)
        return {
            "update": self.made,
            "death_rate": rate,
            "dropped": moved.dropped,
            "regrown": moved.regrown,
        } | self._explored()

    def _is_due(self, done: int, steps: int) -> bool:
        return self.updates.due(done, steps) > self.made and self.updates.is_open(done, steps)

    def _explored(self) -> dict[str, Any]:
        """The in-time over-parameterisation: the share of weights that have been active so far, beside the share that is."""
        layers = masked_layers(self.model)
        for name, layer in layers.items():
            self.ever[name] = self.ever[name].to(layer.weight.device) | _full(layer)
        sizes = [layer.weight.numel() for layer in layers.values()]
        shares = {
            "density": [float(layer.weight_mask.double().mean()) for layer in layers.values()],
            "explored": [float(self.ever[name].double().mean()) for name in layers],
        }
        names = {"layers": list(layers)} if self.made == 1 else {}  # once is enough
        of_all = {
            key: sum(n * share for n, share in zip(sizes, found, strict=True)) / sum(sizes)
            for key, found in shares.items()
        }
        by_layer = {"layer_explored": [round(share, 4) for share in shares["explored"]]}
        return {key: round(share, 6) for key, share in of_all.items()} | by_layer | names

    def state_dict(self) -> dict[str, Any]:
        return {"made": self.made, "ever": dict(self.ever), "growth": self.growth.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.made, self.ever = state["made"], dict(state["ever"])
        self.growth.load_state_dict(state["growth"])


def _full(layer: nn.Module) -> Tensor:
    """The mask in the weight's shape."""
    return layer.weight_mask.expand_as(layer.weight).clone()
