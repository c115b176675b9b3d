"""Spends a phase's share of the budget: steps of gradient training, or a pass over the data that collects statistics."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from harness.cluster import ALONE, agreed
from harness.data.dataset import Batch
from harness.data.order import seed_of
from harness.data.readable import DataLost
from harness.errors import UserError
from harness.halving import Halving, NotEnoughMemory
from harness.training.counting import counted, training_macs
from harness.training.gathered import Gathered
from harness.training.optimizers import Schedule, make_optimizer
from harness.training.setup import PhaseLog, Progress
from harness.training.stepper import Diverged, Outcome, Stepper
from methods import CollectPhase, TrainPhase

if TYPE_CHECKING:
    from harness.training.engine import Run

EVENTS = 1000  # at most, per phase, in a record; the log has all
CURVE_POINTS = 100  # at most, per phase, in a record
LOG_LINES = 1000  # per phase, where the spec does not say otherwise
REPORTS = 20  # log lines per phase that also say what the model keeps
WATCH_SECONDS = 1.0  # at least this often, somebody is told how it goes


class CollectRun:
    """One pass that collects statistics under way."""

    def __init__(
        self, run: Run, phase: CollectPhase, first: int, last: int, log: PhaseLog, settle: Callable[[], None]
    ) -> None:
        self.run, self.phase, self.first, self.log, self.settle = run, phase, first, log, settle
        self.training = run.training
        self.shared = self.training.cluster if phase.divided else ALONE
        steps = max(last - first, 1 if phase.share else 0)  # statistics of nothing help nobody
        self.wanted = min(steps * self.training.recipe.batch_size, self.training.data.size("train"))
        self.halving = Halving(self.training.plan.device, f"phase {phase.name}", partial(_divide, self))

    @torch.no_grad()
    def go(self, saved: dict[str, Any] | None) -> None:
        """saved: not None where an earlier run was in this phase; what it gathered is in the module already."""
        training, log, shared = self.training, self.log, self.shared
        if saved is not None and shared.size > 1:
            raise agreed(
                UserError(f"phase {self.phase.name} was interrupted with one process; go on with one until it is done")
            )
        module = self.phase.module.to(training.plan.device).eval()
        steps = math.ceil(self.wanted / training.recipe.batch_size)
        batches, of_all = self._augmented(steps) if self.phase.augmented else self._in_order()
        for _ in range(self._turns(steps)):  # the same in all processes
            # What other processes have gathered is only known at the end: with several, a collection begins anew.
            self.run.pause(log.steps, self.first + log.steps, self._state if shared.size == 1 else None)
            torch.manual_seed(seed_of(training.seed, self.first, 8, log.steps))
            batch, lost = None, ""
            try:
                batch = next(batches, None)
            except DataLost as error:
                lost = str(error)
            self.run.damage.look(self._write, lost)
            training.cluster.raise_any(self._see(module, batch) if batch is not None else None)
            log.steps, log.images = log.steps + 1, min(log.images + of_all, self.wanted)
            training.watch(Progress(self.phase.name, log.steps, steps, None, None))

    def _turns(self, steps: int) -> int:
        """How many batches are left for this process."""
        if self.phase.augmented:
            return steps - self.log.steps
        size, left = self._size, self.wanted - self.log.images
        return math.ceil(math.ceil(left / self.shared.size) / size)

    @property
    def _size(self) -> int:
        return -(-self.training.recipe.batch_size // self.shared.size)

    def _in_order(self) -> tuple[Iterator[Batch], int]:
        """Batches of images as they are, and how many images a turn of all processes takes."""
        training, shared = self.training, self.shared
        batches = training.data.eval_batches(
            "train", self._size, training.plan.device, self.wanted, shared, skip=self.log.images
        )
        return batches, self._size * shared.size

    def _augmented(self, steps: int) -> tuple[Iterator[Batch], int]:
        """The same of training's images; what is mixed there is not mixed here: maps of two images at once mean little."""
        training, first = self.training, self.first
        recipe = training.recipe.model_copy(update={"mixup": 0.0, "cutmix": 0.0})
        batches = training.data.train_batches(
            recipe, training.seed, first + self.log.steps, first + steps, training.plan.device, self.shared
        )
        return batches, recipe.batch_size

    def _see(self, module: torch.nn.Module, batch: Batch) -> NotEnoughMemory | None:
        """Shows the module a batch, in parts where memory runs out; the error where not even one image fits, for all processes to
        be told of."""
        gathered = Gathered(module, self.phase.state)

        def call(part: Batch) -> list[float] | None:
            gathered.save()
            macs = [] if self.log.macs is None else None
            with counted(module, macs), self.training.plan.autocast():
                module(part.images, part.targets)
            return macs

        try:
            for part, macs in self.halving.over([batch], call, undo=gathered.restore):
                if macs:
                    passes = self.training.cluster.size / self.shared.size
                    self.log.macs = macs[-1] / len(part.images) * self.wanted * passes
        except NotEnoughMemory as error:
            return error
        return None

    def _write(self, event: str, **content: Any) -> None:
        self.training.journal.write(event, phase=self.phase.name, phase_number=self.run.number, **content)

    def _state(self) -> dict[str, Any]:
        self.settle()
        return {}


class TrainRun:
    """One phase of gradient training under way."""

    def __init__(
        self, run: Run, phase: TrainPhase, first: int, last: int, log: PhaseLog, settle: Callable[[], None]
    ) -> None:
        self.run, self.phase, self.first, self.log, self.settle = run, phase, first, log, settle
        self.training, self.steps = run.training, last - first
        if self.steps < 1:
            raise agreed(UserError(f"the budget gives phase {phase.name!r} no step; raise budget.adapt_epochs"))
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
        if training.options.micro_batch:
            log.micro_batch = training.options.micro_batch

    def go(self, saved: dict[str, Any] | None) -> None:
        """saved: the state of this phase in an earlier run."""
        training, log = self.training, self.log
        if saved is not None:
            self._restore(saved)
        elif training.recipe.ema:
            self.run.average()
        else:
            self.run.ema = None
        self._began = self._told = time.perf_counter()
        self._told_images, self._before = log.images, log.seconds
        batches = training.data.train_batches(
            training.recipe, training.seed, self.first + log.steps, self.first + self.steps, training.plan.device,
            training.cluster,
        )  # fmt: skip
        for step in range(log.steps, self.steps):
            self.run.pause(step, self.first + step, self._state)
            batch = self._next(batches)
            self._step(step, batch)
            if log.macs is None:  # every step costs what the first one does; it has shown how many images fit
                macs = training_macs(self.objective, batch, training.plan, self.stepper.micro_batch)
                log.macs = macs * batch.of * self.steps
        self._require_trained()
        self.objective.eval()

    def _require_trained(self) -> None:
        """Diverged where no step changed the weights, in all runs of this phase together, or the last ones spoiled
        them."""
        log, wrong = self.log, ""
        spoiled = sum(not bool(p.detach().isfinite().all()) for p in self.stepper.parameters)
        if log.skipped + log.overflowed >= log.steps:
            wrong = f"none of its {log.steps} steps had a finite loss and gradient, so it trained nothing"
        elif spoiled:
            wrong = f"{spoiled} of {len(self.stepper.parameters)} trained parameters are not finite at its end"
        if wrong:
            raise agreed(Diverged(f"phase {self.phase.name}: {wrong}"))

    def _next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch. UserError where data has gone, or too much is damaged, in any process."""
        started, lost, batch = time.perf_counter(), "", None
        try:
            batch = next(batches)
        except DataLost as error:
            lost = str(error)
        self.log.data_wait_seconds = round(self.log.data_wait_seconds + time.perf_counter() - started, 4)
        self.run.damage.look(self._write, lost)
        return batch

    def _write(self, event: str, **content: Any) -> None:
        self.training.journal.write(event, phase=self.phase.name, phase_number=self.run.number, **content)

    def _step(self, step: int, batch: Batch) -> None:
        rate = self.schedule.set(step)
        self._hook(self.phase.before_step, step)
        before = self.stepper.micro_batch
        outcome = self.stepper.step(batch, self.first + step)
        if self.stepper.micro_batch != before:
            _divide(self, self.stepper.micro_batch)
        if outcome.skipped:
            self._skipped(step, outcome)
        elif outcome.overflowed:
            self.log.overflowed += 1
        else:
            self.in_a_row = 0
            self._note(step, self._hook(self.phase.after_step, step))
            if self.run.ema:  # after the hook, which may mask weights
                self.run.ema.decay = max(1 - 1 / max(self.training.recipe.ema * self.steps, 1.0), 0.0)
                self.run.ema.update(self.run.model)
        self.log.steps, self.log.images = step + 1, self.log.images + batch.of
        self._tell(step, outcome, rate)

    def _hook(self, hook: Callable[[int, int], Any] | None, step: int) -> Any:
        if hook is None:
            return None
        torch.manual_seed(seed_of(self.training.seed, self.first + step, 6))  # the same in all processes
        return hook(step, self.steps)

    def _note(self, step: int, told: dict[str, Any] | None) -> None:
        """Keeps what a hook tells of this step, for the log and the record."""
        if told:
            if len(self.log.events) < EVENTS:
                self.log.events.append({"step": step + 1, **told})
            self._write("told", step=step + 1, told=told)

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

    def _state(self) -> dict[str, Any]:
        """The state after the steps that are done."""
        self.settle()
        return {
            "optimizer": self.optimizer.state_dict(), "scaler": self.stepper.scaler.state_dict(),
            "micro_batch": self.stepper.micro_batch, "in_a_row": self.in_a_row,
        }  # fmt: skip

    def _restore(self, saved: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(saved["optimizer"])
        self.stepper.scaler.load_state_dict(saved["scaler"])
        sizes = [size for size in (saved["micro_batch"], self.stepper.micro_batch) if size]
        self.stepper.micro_batch = self.log.micro_batch = min(sizes, default=None)
        self.in_a_row = saved["in_a_row"]


def _divide(run: CollectRun | TrainRun, most: int) -> None:
    """Tells that from now on the phase takes at most that many images at once."""
    run.log.micro_batch = most
    run.training.say(f"phase {run.phase.name}: out of memory: {most} images at a time from now on")
    run._write("memory", micro_batch=most)


def _short(value: float) -> float | str:
    return float(f"{value:.5g}") if math.isfinite(value) else str(value)
