"""Runs a method's phases within a budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

from harness.data.dataset import ImageData
from harness.device import Plan, execution
from harness.errors import UserError
from harness.spec import Recipe
from methods import CollectPhase, Group, TrainPhase, TransformPhase
from methods.core.contract import Phase
from methods.core.noise import Noise

CURVE_POINTS = 100  # at most, per phase, in a record
WATCH_SECONDS = 1.0  # at least this often, somebody is told how it goes


class Diverged(RuntimeError):
    """The loss stopped being a number."""


@dataclass
class Progress:
    """What a training step reports to whoever watches."""

    phase: str
    step: int
    steps: int
    loss: float | None
    images_per_second: float | None


Watch = Callable[[Progress], None]


@dataclass
class PhaseLog:
    """For the record: what a phase did and cost. curve holds [step, learning rate, loss terms by name] points."""

    name: str
    kind: str
    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    peak_memory: int | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)


def make_criterion(recipe: Recipe) -> nn.Module:
    """(logits, targets) to the classification loss: for mixed targets, smoothed ones, or plain ones."""
    if recipe.mixup or recipe.cutmix:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(recipe.label_smoothing) if recipe.label_smoothing else nn.CrossEntropyLoss()


def budget_steps(data: ImageData, recipe: Recipe, epochs: float, max_steps: int | None) -> int:
    """A budget in optimizer steps."""
    steps = max(round(epochs * data.steps_per_epoch(recipe.batch_size)), 1)
    return min(steps, max_steps) if max_steps else steps


def run_phases(
    phases: Sequence[Phase], steps: int, recipe: Recipe, data: ImageData, plan: Plan, seed: int, watch: Watch
) -> list[PhaseLog]:
    """Spends `steps` steps on the phases, by their shares. ValueError where the shares do not sum to 1; Diverged."""
    total = sum(phase.share for phase in phases)
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        raise ValueError(f"the shares of the phases {[phase.name for phase in phases]} sum to {total}, not to 1")
    logs, spent = [], 0.0
    for phase in phases:
        first, spent = round(spent * steps), spent + phase.share
        last = round(spent * steps)
        log, started = PhaseLog(phase.name, phase.kind), execution.clock(plan.device)
        execution.reset_peak_memory(plan.device)
        if isinstance(phase, TrainPhase):
            _train(phase, first, last, recipe, data, plan, seed, watch, log)
        elif isinstance(phase, CollectPhase):
            _collect(phase, (last - first) * recipe.batch_size, recipe, data, plan, watch, log)
        elif isinstance(phase, TransformPhase):
            phase.apply()
        log.seconds = round(execution.clock(plan.device) - started, 3)
        log.peak_memory = execution.peak_memory(plan.device)
        logs.append(log)
    return logs


def _train(
    phase: TrainPhase,
    first: int,
    last: int,
    recipe: Recipe,
    data: ImageData,
    plan: Plan,
    seed: int,
    watch: Watch,
    log: PhaseLog,
) -> None:
    """Steps first..last-1 of the budget: the data goes on where the phase before stopped, the schedule is the phase's own."""
    steps = last - first
    if steps < 1:
        raise UserError(f"the budget gives phase {phase.name!r} no step; raise budget.adapt_epochs")
    objective = phase.objective.to(plan.device).train()
    optimizer = make_optimizer(phase, recipe)
    warmup = min(round(recipe.warmup_epochs * data.steps_per_epoch(recipe.batch_size)), steps // 2)
    schedule = CosineLRScheduler(
        optimizer, t_initial=steps - warmup + 1, lr_min=recipe.min_lr, warmup_t=warmup, warmup_lr_init=0.0, warmup_prefix=True,
        t_in_epochs=False,
    )  # fmt: skip
    every, started = max(math.ceil(steps / CURVE_POINTS), 1), execution.clock(plan.device)
    told = started
    for step, batch in enumerate(data.train_batches(recipe, seed, first, last, plan.device)):
        schedule.step_update(step + 1)
        for group in optimizer.param_groups:
            if step < group["frozen"] * steps:
                group["lr"] = 0.0
        if phase.before_step:
            phase.before_step(step, steps)
        torch.manual_seed(_step_seed(seed, first + step))
        with plan.autocast():
            terms = objective(batch.images, batch.targets, Noise(seed, first + step, batch.ids.to(plan.device)))
        loss = sum(terms.values())
        objective.zero_grad(set_to_none=True)
        loss.backward()
        if recipe.clip_grad:
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, recipe.clip_grad)
        optimizer.step()
        if phase.after_step:
            phase.after_step(step, steps)
        log.steps, log.images = step + 1, log.images + len(batch.images)
        point = step % every == 0 or step == steps - 1
        if point or time.perf_counter() - told > WATCH_SECONDS:
            named = {name: float(value.detach()) for name, value in terms.items()}
            if not all(map(math.isfinite, named.values())):
                raise Diverged(f"phase {phase.name}, step {step + 1}: the loss is not a number ({named})")
            if point:
                top = max(group["lr"] for group in optimizer.param_groups)
                log.curve.append(
                    {"step": step + 1, "lr": _short(top), **{name: _short(value) for name, value in named.items()}}
                )
            told = execution.clock(plan.device)
            rate = log.images / (told - started)
            watch(Progress(phase.name, step + 1, steps, sum(named.values()), rate))
    objective.eval()


def make_optimizer(phase: TrainPhase, recipe: Recipe) -> torch.optim.Optimizer:
    """timm's optimizer over the phase's groups; an entry "frozen" in them is the share of the steps with rate 0. As in
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
    return create_optimizer_v2(parameters, opt=recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay)


@torch.no_grad()
def _collect(
    phase: CollectPhase, images: int, recipe: Recipe, data: ImageData, plan: Plan, watch: Watch, log: PhaseLog
) -> None:
    module = phase.module.to(plan.device).eval()
    wanted = min(images, len(data.train_ids))
    steps = math.ceil(wanted / recipe.batch_size)
    for batch in data.eval_batches("train", recipe.batch_size, plan.device, limit=wanted):
        with plan.autocast():
            module(batch.images, batch.targets)
        log.steps, log.images = log.steps + 1, log.images + len(batch.images)
        watch(Progress(phase.name, log.steps, steps, None, None))
    if phase.finish:
        phase.finish()


def _step_seed(seed: int, step: int) -> int:
    """Seeds torch's global generator (drop path, dropout) as a function of (seed, step)."""
    return (seed * 1_000_003 + step * 2 + 1) & 0x7FFFFFFF


def _short(value: float) -> float:
    return float(f"{value:.5g}")
