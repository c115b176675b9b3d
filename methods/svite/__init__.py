"""SViTE: dynamic sparse training of weights, or of heads and neurons (Chen et al., NeurIPS 2021, arXiv 2106.04533)."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import pydantic
import torch
from pydantic import Field
from torch import Tensor, nn

import methods
from methods.core import distribution
from methods.core.vit import dense_report, require_plain_vit
from methods.core.watching import remembered
from methods.svite import schedule
from methods.svite.checkpoint import converted
from methods.svite.criteria import Growth
from methods.svite.pattern import Pattern, Units
from methods.svite.selector import SelectingViT, add_selector, temperature
from methods.svite.structured import Structured
from methods.svite.training import DynamicSparseTraining, SparseObjective
from methods.svite.unstructured import Unstructured

ROUNDING = 0.05  # heads may be that far from their density before the row says so
Density = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(gt=0, strict=True)]  # 1.0 is a share, not a count


class Settings(methods.Settings):
    """Names and defaults are those of the authors' commands, where these have them.

    pruning_type: "unstructured" (SViTE) or "structured" (S2ViTE: their structure_new).
    sparse_init: how dense each layer is. fixed_ERK (RigL's), uniform, or custom: `densities`, by pattern of the weight's name.
    density: 1 - sparsity, of all weights of linear layers and convolutions.
    atten_density, other_density: structured only: the shares of heads and of MLP neurons that stay in every block, rounded down.
    death: magnitude, or SET; heads always die by their Taylor score. growth: gradient, random or momentum. redistribution: none, the only one that
        the official code has: each layer keeps its number of weights.
    death_rate: alpha, of the first update; decay_schedule: cosine (to 0.005 at the end of the training), linear, or constant.
    update_frequency: steps between two updates, or, below 1, a share of the training's steps: the authors' 15,000 (DeiT-T and S) and 7,000
        (DeiT-B) are about 0.01. t_end: share of the steps from which on there are no more updates.
    token_number: SViTE+: so many tokens go on, CLS included; with a point (0.95), a share of all. None: no selector.
    mode: what becomes of the others: "mask" (zeros: the authors' accuracy path) or "gather" (dropped).
    tau: temperature of the selector's softmax at the training's beginning and end. (Before 2022 the official code had the two exchanged, and the
        paper's runs, if they used it, as well.)
    eval_noise: a seed for Gumbel noise in evaluation, which the official code has without one; None: no noise.
    """

    pruning_type: Literal["unstructured", "structured"] = "unstructured"
    sparse_init: Literal["fixed_ERK", "uniform", "custom"] = "fixed_ERK"
    density: Density = 0.4
    densities: dict[str, Density] | None = None
    atten_density: Density = 0.7
    other_density: Density = 0.6
    death: Literal["magnitude", "SET"] = "magnitude"
    growth: Literal["gradient", "random", "momentum"] = "gradient"
    redistribution: Literal["none"] = "none"
    death_rate: Density = 0.5
    decay_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    update_frequency: Count | Annotated[float, Field(gt=0, lt=1)] = 15000
    t_end: Density = 0.8
    token_number: Count | Density | None = None
    mode: Literal["mask", "gather"] = "mask"
    tau: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (10.0, 0.1)
    eval_noise: int | None = None

    @pydantic.model_validator(mode="after")
    def _fit_together(self) -> Settings:
        if (self.sparse_init == "custom") != (self.densities is not None):
            raise ValueError("sparse_init: custom and densities: {PATTERN: DENSITY} go together")
        if isinstance(self.update_frequency, float) and self.update_frequency >= self.t_end:
            raise ValueError(
                f"update_frequency {self.update_frequency}: the first update would come at t_end {self.t_end} or later"
            )
        if self.pruning_type == "structured" and (self.death, self.growth) not in {
            ("magnitude", "gradient"),
            ("magnitude", "random"),
        }:
            raise ValueError(
                "pruning_type structured: heads and neurons have death: magnitude, and growth: gradient or random"
            )
        return self


@methods.register
class SViTE(methods.Method):
    """SViTE: dynamic sparse training of weights, or of heads and neurons (Chen et al., NeurIPS 2021, arXiv 2106.04533).

    Trains from scratch under masks; now and then the least important connections are dropped, and as many grow where the gradient is large.
    With pruning_type="structured" it is S2ViTE, with token_number SViTE+.

    The published SViTE+ numbers (80.18 % with 5 % fewer tokens and half the weights of DeiT-S) may come from nearly dense networks: in the
    official code of the time, the selector shifted the running numbers by which masks are found, so that those of all blocks were made but never
    applied. Here masks belong to their layers, and a test trains with both. Averaged weights are masked here; there they are not.
    """

    name = "svite"
    start = "scratch"
    Settings = Settings

    @property
    def work_varies(self) -> bool:
        """Masked tokens are k or k + 1, see `SelectingViT`."""
        return self.settings.token_number is not None and self.settings.mode == "mask"

    @property
    def pattern(self) -> Pattern:
        settings = self.settings
        if settings.pruning_type == "structured":
            return Structured(settings.atten_density, settings.other_density)
        if settings.sparse_init == "custom":
            return Unstructured(partial(distribution.custom, densities=settings.densities), settings.death)
        return Unstructured(
            partial(distribution.SPREADS[settings.sparse_init], density=settings.density), settings.death
        )

    def sparsify(self, vit: nn.Module) -> nn.Module:
        require_plain_vit(vit, self.name)
        settings = self.settings
        if settings.token_number is None:
            sparse = copy.deepcopy(vit)
        else:
            sparse = add_selector(
                vit, settings.token_number, settings.mode == "gather", settings.eval_noise, settings.tau[0]
            )
        self.pattern.mask(sparse)
        sparse.register_buffer("updates", torch.tensor(0))  # made so far; -1: not known, of an imported checkpoint
        return sparse

    def deploy(self, sparse: nn.Module) -> nn.Module:
        return self.pattern.deploy(sparse).eval().requires_grad_(False)

    def report(self, module: nn.Module, images: Tensor) -> methods.Report:
        is_selecting = isinstance(module, SelectingViT)
        return self._report(module, module.block_reports(images) if is_selecting else dense_report(module).blocks)

    @contextlib.contextmanager
    def reporting(self, module: nn.Module) -> Iterator[Callable[[Tensor], methods.Report]]:
        if not isinstance(module, SelectingViT):
            yield partial(self.report, module)
            return
        with remembered(module, "choose") as chosen:
            yield lambda images: self._report(module, module.blocks_of(*chosen[0]))

    def _report(self, module: nn.Module, blocks: Sequence[methods.BlockReport]) -> methods.Report:
        density, units = self.pattern.density(module), self.pattern.units(module)
        overhead = ()
        if isinstance(module, SelectingViT):
            tokens = module.patch_embed.num_patches + module.num_prefix_tokens
            overhead = (methods.Overhead("gumbel", torch.tensor([tokens * module.embed_dim], dtype=torch.float64)),)
        return methods.Report(
            tuple(map(_with_units, blocks, units)), density, overhead, tuple(self._remarks(module, density, units)),
            fixed_shapes=isinstance(module, SelectingViT) and not module.gathers,
        )  # fmt: skip

    def _remarks(self, module: nn.Module, density: dict[str, float], units: list[Units]) -> Iterator[str]:
        updates, settings = int(module.updates), self.settings
        sparse = [share for name, share in density.items() if name.endswith(".weight")]
        if updates < 0:
            yield f"an imported checkpoint: by its weights, {sum(sparse) / len(sparse):.3f} dense (the layers' mean)"
        elif updates == 0 and min(sparse) < 1:
            yield (f"its masks never moved: with update_frequency {settings.update_frequency}, no update fell before t_end ({settings.t_end:g} of the "
                   "steps)")  # fmt: skip
        heads, neurons = units[0].heads, units[0].neurons
        if heads is not None and abs(float(heads.double().mean()) - settings.atten_density) > ROUNDING:
            yield (f"keeps {int(heads.sum())} of {len(heads)} heads ({settings.atten_density:g} rounded down) and {int(neurons.sum())} of "
                   f"{len(neurons)} neurons in a block")  # fmt: skip

    def phases(
        self, sparse: nn.Module, criterion: nn.Module, teacher: nn.Module | None = None
    ) -> Sequence[methods.TrainPhase]:
        settings = self.settings
        objective = SparseObjective(sparse, criterion, teacher)
        training = DynamicSparseTraining(
            objective, self.pattern, Growth(settings.growth), schedule.Updates(settings.update_frequency, settings.t_end),
            partial(schedule.death_rate, initial=settings.death_rate, schedule=settings.decay_schedule),
            partial(temperature, start=settings.tau[0], end=settings.tau[1]) if settings.token_number is not None else None,
        )  # fmt: skip
        # The scorer's bias moves no choice: its gradient is zero, since a softmax does not see what all have in common.
        trained = [p for name, p in sparse.named_parameters() if name != "gumbel.bias"]
        return [methods.TrainPhase(
            name="train", objective=objective, groups=[methods.Group("all", trained)], before_step=training.before_step,
            after_step=training.after_step, state=training,
        )]  # fmt: skip

    def convert_checkpoint(self, state_dict: dict[str, Any]) -> dict[str, Tensor]:
        """The authors' checkpoint: weights of `model`, as they are, and masks that fit them (see `methods.svite.checkpoint`)."""
        return converted(state_dict, self.settings.pruning_type == "structured")


def _with_units(block: methods.BlockReport, units: Units) -> methods.BlockReport:
    """The block's entry with its heads and neurons."""
    density = units.heads.double()[None] if units.heads is not None else None
    return replace(block, attention_density=density, active_neurons=units.neurons)
