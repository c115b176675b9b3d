"""Runs a method's phases within a budget, and goes on where an interrupted run stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from harness import spec
from harness.cluster import ALONE, Cluster, agreed
from harness.data.dataset import Batch, ImageData
from harness.data.order import seed_of
from harness.data.readable import DataLost
from harness.device import Plan, execution
from harness.errors import UserError
from harness.spec import Recipe
from harness.training.artifacts import Artifacts, read_given
from harness.training.counting import counted
from harness.training.interruption import Interruption
from harness.training.journal import Journal
from harness.training.optimizers import Schedule, make_optimizer
from harness.training.snapshots import Snapshots, read_state, restore, save_state, state_of
from harness.training.stepper import Diverged, Outcome, Stepper
from methods import CollectPhase, TrainPhase, TransformPhase
from methods.core.contract import Phase

CURVE_POINTS = 100  # at most, per phase, in a record
LOG_LINES = 1000  # per phase, where the spec does not say otherwise
REPORTS = 20  # log lines per phase that also say what the model keeps
WATCH_SECONDS = 1.0  # at least this often, somebody is told how it goes


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
    """For the record: what a phase did and cost, over all processes and interruptions.

    images, macs: multiply-adds that they cost, forward and backward, teacher and collecting passes included; seconds,
    device_hours; data_wait_seconds: of the first process, for the next batch; peak_memory: bytes on the device (on the CPU: of
    the whole process); skipped: steps without an update since the loss was not finite; overflowed: since float16's scale was too
    large; micro_batch: images at once, where a step was divided; curve: points [step, learning rate, loss terms by name].
    source: an artifact or a file that the phase's result was taken from.
    """

    name: str
    kind: str
    steps: int = 0
    images: int = 0
    macs: float | None = None  # None: not counted yet
    seconds: float = 0.0
    device_hours: float = 0.0
    data_wait_seconds: float = 0.0
    peak_memory: int | None = None
    skipped: int = 0
    overflowed: int = 0
    micro_batch: int | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)
    source: str | None = None


@dataclass
class Training:
    """What a cell's phases share. steps: the budget. options: how often to save, when to give up. reported: what the model keeps
    just now, by name, for the log. given: files that phases' results are taken from, by the phase's name."""

    recipe: Recipe
    data: ImageData
    plan: Plan
    seed: int
    steps: int
    options: spec.Training = field(default_factory=spec.Training)
    max_unreadable: int = spec.Data.model_fields["max_unreadable"].default
    cluster: Cluster = ALONE
    watch: Watch = lambda progress: None
    say: Callable[[str], None] = lambda line: None
    journal: Journal = field(default_factory=Journal)
    snapshots: Snapshots | None = None
    artifacts: Artifacts | None = None
    given: dict[str, Path] = field(default_factory=dict)
    reported: Callable[[], dict[str, float]] = dict


def budget_steps(data: ImageData, recipe: Recipe, epochs: float, max_steps: int | None) -> int:
    """A budget in optimizer steps."""
    steps = max(round(epochs * data.steps_per_epoch(recipe.batch_size)), 1)
    return min(steps, max_steps) if max_steps else steps


def run_phases(
    model: nn.Module, phases: Sequence[Phase], training: Training
) -> tuple[list[PhaseLog], nn.Module | None]:
    """Spends the budget on the phases, by their shares, and trains `model` (which they hold) in place: their logs, and the model with
    averaged weights, if the recipe wants one. ValueError where the shares do not sum to 1; Diverged, NotEnoughMemory, UserError;
    KeyboardInterrupt after the state has been saved."""
    total = sum(phase.share for phase in phases)
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        raise ValueError(f"the shares of the phases {[phase.name for phase in phases]} sum to {total}, not to 1")
    unknown = next((name for name in training.given if name not in {phase.name for phase in phases}), None)
    if unknown is not None:
        raise UserError(
            f"phases: the method has no phase {unknown!r}; it has {', '.join(phase.name for phase in phases)}"
        )
    with Interruption() as interruption:
        run = _Run(model, list(phases), training, interruption)
        try:
            run.go()
        finally:
            training.journal.close()
    return run.logs, run.ema.module if run.ema else None


class _Run:
    """The phases of one cell under way. Position: the phase's number, and the steps done in it."""

    def __init__(self, model: nn.Module, phases: list[Phase], training: Training, interruption: Interruption) -> None:
        self.model, self.phases, self.training, self.interruption = model, phases, training, interruption
        self.logs: list[PhaseLog] = []
        self.ema: ModelEmaV3 | None = None
        self.number = 0
        self._saved_phase: dict[str, Any] | None = None  # of the phase that an earlier run was in

    def go(self) -> None:
        self._resume()
        bounds = _bounds(self.phases, self.training.steps)
        while self.number < len(self.phases):
            phase = self.phases[self.number]
            if not self._take(phase):
                self._spend(phase, *bounds[self.number])
                self._offer()
            self.number += 1
            if self.number < len(self.phases) and self.training.snapshots:
                self._save(bounds[self.number][0], None)

    def _spend(self, phase: Phase, first: int, last: int) -> None:
        """Runs one phase: steps first..last-1 of the budget."""
        training, device = self.training, self.training.plan.device
        if self._saved_phase is None:
            self.logs.append(PhaseLog(phase.name, phase.kind))
        log, before, started = self.logs[-1], self.logs[-1].seconds, execution.clock(device)
        execution.reset_peak_memory(device)

        def settle() -> None:
            log.seconds = round(before + execution.clock(device) - started, 3)
            log.device_hours = round(log.seconds * training.cluster.size / 3600, 6)
            log.peak_memory = max(execution.peak_memory(device) or 0, log.peak_memory or 0) or None

        training.journal.write("phase", phase=phase.name, phase_number=self.number, kind=phase.kind)
        if isinstance(phase, TrainPhase):
            _TrainRun(self, phase, first, last, log, settle).go(self._saved_phase)
        elif isinstance(phase, CollectPhase):
            self._collect(phase, first, last, log, settle)
        elif isinstance(phase, TransformPhase):
            phase.apply()
            log.macs = 0.0
        self._saved_phase = None
        settle()

    @torch.no_grad()
    def _collect(self, phase: CollectPhase, first: int, last: int, log: PhaseLog, settle: Callable[[], None]) -> None:
        training, cluster = self.training, self.training.cluster
        module = phase.module.to(training.plan.device).eval()
        wanted = min((last - first) * training.recipe.batch_size, len(training.data.train_ids))
        steps = math.ceil(wanted / training.recipe.batch_size)
        shared = cluster if phase.divided else ALONE
        batches = training.data.eval_batches(
            "train",
            -(-training.recipe.batch_size // shared.size),
            training.plan.device,
            wanted,
            shared,
            skip=log.images,
        )
        for batch in batches:
            self._stop_if_asked(lambda: self._save(first + log.steps, {}) if shared.size == 1 else None)
            macs = [] if log.macs is None else None
            with counted(macs), training.plan.autocast():
                module(batch.images, batch.targets)
            if macs:
                log.macs = macs[-1] / len(batch.images) * wanted * (cluster.size / shared.size)
            log.steps, log.images = log.steps + 1, min(log.images + len(batch.images) * shared.size, wanted)
            training.watch(Progress(phase.name, log.steps, steps, None, None))
            # What other processes have gathered is only known at the end: with several, an interrupted collection begins anew.
            if shared.size == 1 and training.snapshots and log.steps < steps and training.snapshots.is_due(log.steps):
                settle()
                self._save(first + log.steps, {})
        if phase.finish:
            phase.finish()

    def _stop_if_asked(self, save: Callable[[], None]) -> None:
        """Between two steps: saves and stops, if any process was asked to."""
        if self.training.cluster.any(self.interruption.asked is not None):
            if self.training.snapshots:
                save()
            self.interruption.stop()

    # What is saved, and how a run goes on from it.

    def _save(self, step: int, phase_state: dict[str, Any] | None) -> None:
        """step: of the budget, done so far. phase_state: of the phase under way; None between two phases."""
        if not self.training.cluster.is_first:
            return
        content = state_of(self.model, self.phases) | {
            "position": [self.number, phase_state is not None], "logs": [asdict(log) for log in self.logs],
            "current": phase_state, "ema": self.ema.module.state_dict() if self.ema else None,
            "unreadable": dict(self.training.data.unreadable),
        }  # fmt: skip
        self.training.snapshots.save(step * 2 + (phase_state is None), content)

    def _resume(self) -> None:
        training = self.training
        found = training.cluster.share(self._newest) if training.snapshots else None
        if found is None:
            training.journal.go_on(0, 0)
            return
        content = read_state(training.snapshots.folder / found)
        self.number, is_inside = content["position"]
        self.logs = [PhaseLog(**log) for log in content["logs"]]
        restore(self.model, self.phases, content)
        training.data.unreadable |= content["unreadable"]
        if content["ema"] is not None:
            self.ema = self._average(content["ema"])
        self._saved_phase = content["current"] if is_inside else None
        done = self.logs[-1].steps if is_inside else 0
        training.journal.go_on(self.number, done)
        training.say(f"going on with phase {self.phases[self.number].name} after step {done}")

    def _newest(self) -> str | None:
        """The newest whole snapshot; what is damaged is told."""
        for path, content in self.training.snapshots.newest():
            if content is not None:
                return path.name
            self.training.say(f"snapshot {path.name} is damaged; going on from the one before")
        return None

    def _average(self, state: dict[str, Any] | None = None) -> ModelEmaV3:
        ema = ModelEmaV3(self.model, exclude_buffers=True)
        if state is not None:
            ema.module.load_state_dict(state)
        return ema

    # Results of phases that need not be run.

    def _take(self, phase: Phase) -> bool:
        """Takes the phase's result from a given file or from another cell's artifact; its cost is charged all the same."""
        training, log = self.training, PhaseLog(phase.name, phase.kind)
        if self._saved_phase is not None:
            return False
        if phase.name in training.given:
            path = training.given[phase.name]
            content, source = read_given(path, phase.name), path.name
        else:
            path = self._artifact()
            if path is None or not training.cluster.share(path.exists):
                return False
            content, source = read_state(path), f"artifact {phase.artifact}"
        restore(self.model, self.phases, content)
        self.logs.append(
            replace(PhaseLog(**content["log"]) if "log" in content else log, name=phase.name, source=source)
        )
        training.say(f"phase {phase.name} is taken from {source}")
        return True

    def _offer(self) -> None:
        path = self._artifact()
        if path is not None and self.training.cluster.is_first:
            state = state_of(self.model, self.phases[: self.number + 1])
            save_state(path, state | {"log": asdict(self.logs[-1])})

    def _artifact(self) -> Path | None:
        """Where the result of this phase is kept for other cells; None where it, or a phase before it, has no key."""
        phases = self.phases[: self.number + 1]
        if self.training.artifacts is None or any(phase.artifact is None for phase in phases):
            return None
        return self.training.artifacts.path([[phase.kind, phase.name, phase.share, phase.artifact] for phase in phases])


class _TrainRun:
    """One phase of gradient training under way."""

    def __init__(
        self, run: _Run, phase: TrainPhase, first: int, last: int, log: PhaseLog, settle: Callable[[], None]
    ) -> None:
        self.run, self.phase, self.first, self.log, self.settle = run, phase, first, log, settle
        self.training, self.steps = run.training, last - first
        if self.steps < 1:
            raise UserError(f"the budget gives phase {phase.name!r} no step; raise budget.adapt_epochs")
        recipe, training = self.training.recipe, self.training
        if 1 < training.cluster.size > min(recipe.batch_size, len(training.data.train_ids)) // 2:
            raise agreed(
                UserError(f"recipe.batch_size {recipe.batch_size} is too small for {training.cluster.size} processes")
            )
        self.objective = phase.objective.to(training.plan.device).train()
        self.optimizer = make_optimizer(phase, recipe)
        self.schedule = Schedule(self.optimizer, recipe, self.steps, training.data.steps_per_epoch(recipe.batch_size))
        self.stepper = Stepper(
            phase,
            self.optimizer,
            training.plan,
            training.seed,
            recipe.clip_grad,
            training.options.micro_batch,
            training.cluster,
        )
        self.in_a_row = 0

    def go(self, saved: dict[str, Any] | None) -> None:
        training, log = self.training, self.log
        if saved is not None:
            self._restore(saved)
        elif training.recipe.ema:
            self.run.ema = self.run._average()
        self._began = self._told = time.perf_counter()
        self._told_images, self._before, self._known = log.images, log.seconds, 0
        batches = training.data.train_batches(
            training.recipe,
            training.seed,
            self.first + log.steps,
            self.first + self.steps,
            training.plan.device,
            training.cluster,
        )
        for step in range(log.steps, self.steps):
            batch = self._next(batches)
            self._step(step, batch)
            if training.snapshots and step + 1 < self.steps and training.snapshots.is_due(step + 1):
                self.save()
        self.objective.eval()

    def _next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch. UserError where data has gone, or too much is damaged, in any process; stops here if asked to."""
        self.run._stop_if_asked(self.save)
        training, cluster, started, lost, batch = self.training, self.training.cluster, time.perf_counter(), "", None
        try:
            batch = next(batches)
        except DataLost as error:
            lost = str(error)
        self.log.data_wait_seconds = round(self.log.data_wait_seconds + time.perf_counter() - started, 4)
        losses, more = cluster.sums([float(bool(lost)), len(training.data.unreadable) - self._known])
        if losses:
            raise agreed(UserError(lost or "another process has lost its data"))
        if more:
            self._count_unreadable()
        return batch

    def _count_unreadable(self) -> None:
        """Names damaged images that are new. UserError where they are too many."""
        training, unreadable = self.training, self.training.data.unreadable
        for theirs in training.cluster.gather(unreadable):
            unreadable |= theirs
        for number, reason in list(unreadable.items())[self._known :]:
            training.say(f"{reason}; another image is taken instead")
            self._write("unreadable", image=number, reason=reason)
        self._known = len(unreadable)
        if self._known > training.max_unreadable:
            raise agreed(UserError(f"{self._known} training images cannot be read, more than data.max_unreadable ({training.max_unreadable}): "
                                   f"{next(iter(unreadable.values()))}"))  # fmt: skip

    def _write(self, event: str, **content: Any) -> None:
        self.training.journal.write(event, phase=self.phase.name, phase_number=self.run.number, **content)

    def _step(self, step: int, batch: Batch) -> None:
        rate = self.schedule.set(step)
        self._hook(self.phase.before_step, step)
        before = self.stepper.micro_batch
        macs = [] if self.log.macs is None else None
        outcome = self.stepper.step(batch, self.first + step, macs)
        if macs:  # a step costs what the first one does
            self.log.macs = macs[-1] / len(batch.images) * batch.of * self.steps
        if self.stepper.micro_batch != before:
            self._divided()
        if outcome.skipped:
            self._skipped(step, outcome)
        elif outcome.overflowed:
            self.log.overflowed += 1
        else:
            self.in_a_row = 0
            if self.run.ema:
                self.run.ema.decay = max(1 - 1 / max(self.training.recipe.ema * self.steps, 1.0), 0.0)
                self.run.ema.update(self.run.model)
            self._hook(self.phase.after_step, step)
        self.log.steps, self.log.images = step + 1, self.log.images + batch.of
        self._tell(step, outcome, rate)

    def _hook(self, hook: Callable[[int, int], None] | None, step: int) -> None:
        if hook is not None:
            torch.manual_seed(seed_of(self.training.seed, self.first + step, 6))  # the same in all processes
            hook(step, self.steps)

    def _divided(self) -> None:
        self.log.micro_batch = self.stepper.micro_batch
        line = f"out of memory: {self.log.micro_batch} images at a time from now on"
        self.training.say(f"phase {self.phase.name}: {line}")
        self._write("memory", micro_batch=self.log.micro_batch)

    def _skipped(self, step: int, outcome: Outcome) -> None:
        """Counts a step whose loss or gradient was not finite. Diverged after too many in a row."""
        self.log.skipped, self.in_a_row = self.log.skipped + 1, self.in_a_row + 1
        what = (
            f"the loss is not a number ({outcome.terms})"
            if not math.isfinite(outcome.loss)
            else "the gradient is not finite"
        )
        self._write("skipped", step=step + 1, reason=what)
        if self.in_a_row > self.training.options.max_skipped:
            raise agreed(Diverged(f"phase {self.phase.name}, step {step + 1}: {what}, {self.in_a_row} steps in a row"))

    def _tell(self, step: int, outcome: Outcome, rate: float) -> None:
        """The curve for the record, lines for the log, and whoever watches."""
        log, training, now = self.log, self.training, time.perf_counter()
        is_last = step == self.steps - 1
        is_point = is_last or step % max(math.ceil(self.steps / CURVE_POINTS), 1) == 0
        every = training.options.log_steps or max(self.steps // LOG_LINES, 1)
        speed = (log.images - self._told_images) / max(now - self._told, 1e-9)
        if is_point:
            terms = {name: _short(value) for name, value in outcome.terms.items()}
            log.curve.append({"step": step + 1, "lr": _short(rate), **terms})
        if training.journal.is_kept and (is_last or step % every == 0):
            wait = log.data_wait_seconds / max(self._before + now - self._began, 1e-9)
            self._write(
                "step", step=step + 1, loss=outcome.loss, terms=outcome.terms, lr=rate, gradient_norm=outcome.norm,
                images_per_second=round(speed, 1), data_wait=round(wait, 4), **self._kept(step, every),
            )  # fmt: skip
        if is_point or now - self._told >= WATCH_SECONDS:
            training.watch(Progress(self.phase.name, step + 1, self.steps, outcome.loss, speed))
        if now - self._told >= WATCH_SECONDS:
            self._told, self._told_images = now, log.images

    def _kept(self, step: int, every: int) -> dict[str, float]:
        """What the model keeps just now, for some of the log's lines."""
        line, lines = step // every, max(self.steps // every, 1)
        if step < self.steps - 1 and line % max(lines // REPORTS, 1):
            return {}
        kept = self.training.reported()
        self.objective.train()  # what a model keeps is asked in evaluation mode
        return kept

    def save(self) -> None:
        """The state after the steps that are done."""
        self.settle()
        self.run._save(self.first + self.log.steps, {
            "optimizer": self.optimizer.state_dict(), "scaler": self.stepper.scaler.state_dict(),
            "micro_batch": self.stepper.micro_batch, "in_a_row": self.in_a_row,
        })  # fmt: skip

    def _restore(self, saved: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(saved["optimizer"])
        self.stepper.scaler.load_state_dict(saved["scaler"])
        self.stepper.micro_batch, self.in_a_row = saved["micro_batch"], saved["in_a_row"]


def _bounds(phases: Sequence[Phase], steps: int) -> list[tuple[int, int]]:
    """The first step of each phase, and the one after its last."""
    bounds, spent = [], 0.0
    for phase in phases:
        first, spent = round(spent * steps), spent + phase.share
        bounds.append((first, round(spent * steps)))
    return bounds


def _short(value: float) -> float | str:
    return float(f"{value:.5g}") if math.isfinite(value) else str(value)
