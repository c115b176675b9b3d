"""Runs a method's phases within a budget, and goes on where an interrupted run stopped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from harness.cluster import agreed
from harness.data.order import seed_of
from harness.device import execution
from harness.errors import UserError
from harness.training.artifacts import read_given
from harness.training.damage import Damage
from harness.training.interruption import Interruption
from harness.training.setup import PhaseLog, Training
from harness.training.snapshots import Damaged, read_state, restore, save_state, state_of
from harness.training.spending import CollectRun, TrainRun
from methods import CollectPhase, TrainPhase
from methods.core.contract import Phase


def run_phases(
    model: nn.Module, phases: Sequence[Phase], training: Training
) -> tuple[list[PhaseLog], nn.Module | None]:
    """Spends the budget on the phases, by their shares, and trains `model` (which they hold) in place: their logs, and the model with
    averaged weights, if the recipe wants one. ValueError where the shares do not sum to 1; Diverged, NotEnoughMemory, UserError;
    KeyboardInterrupt after the state has been saved."""
    total = sum(phase.share for phase in phases)
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        raise agreed(
            ValueError(f"the shares of the phases {[phase.name for phase in phases]} sum to {total}, not to 1")
        )
    unknown = next((name for name in training.given if name not in {phase.name for phase in phases}), None)
    if unknown is not None:
        raise agreed(
            UserError(
                f"phases: the method has no phase {unknown!r}; it has {', '.join(phase.name for phase in phases)}"
            )
        )
    with Interruption() as interruption:
        run = Run(model, list(phases), training, interruption)
        try:
            run.go()
        finally:
            training.journal.close()
    return run.logs, run.ema.module if run.ema else None


class Run:
    """The phases of one cell under way. Position: the phase's number, and the steps done in it."""

    def __init__(self, model: nn.Module, phases: list[Phase], training: Training, interruption: Interruption) -> None:
        self.model, self.phases, self.training, self.interruption = model, phases, training, interruption
        self.logs: list[PhaseLog] = []
        self.ema: ModelEmaV3 | None = None
        self.damage = Damage(training)
        self.number = 0
        self._saved_steps = 0  # of the phase under way
        self._inside: dict[str, Any] | None = None  # the state of the phase that an earlier run was in

    def go(self) -> None:
        self._resume()
        bounds = _bounds(self.phases, self.training.steps)
        while self.number < len(self.phases):
            phase = self.phases[self.number]
            if not self._take(phase):
                self._spend(phase, *bounds[self.number])
                self._offer()
            self.number, self._saved_steps = self.number + 1, 0
            is_asked = self.training.cluster.any(self.interruption.asked is not None)
            if self.training.snapshots and (is_asked or self.number < len(self.phases)):
                self._save(bounds[self.number - 1][1], None)
            if is_asked:
                self._stop()

    def pause(self, steps: int, of_budget: int, state: Callable[[], dict[str, Any]] | None) -> None:
        """Between two steps of a phase, of which `steps` are done: saves if it is time, and stops if any process was asked to.
        state: of the phase; None where it cannot be saved in between."""
        training, snapshots = self.training, self.training.snapshots
        is_due = snapshots is not None and steps != self._saved_steps and snapshots.is_due(steps)
        asked, due = training.cluster.sums([self.interruption.asked is not None, is_due and training.cluster.is_first])
        if snapshots and state is not None and (due or (asked and steps)):
            self._save(of_budget, state())
            self._saved_steps = steps
        if asked:
            self._stop()

    def average(self, state: dict[str, Any] | None = None) -> None:
        """Begins to average the weights, or goes on with what was averaged."""
        self.ema = ModelEmaV3(self.model, exclude_buffers=True)
        if state is not None:
            self.ema.module.load_state_dict(state)

    def _spend(self, phase: Phase, first: int, last: int) -> None:
        """Runs one phase: steps first..last-1 of the budget."""
        training, device, inside = self.training, self.training.plan.device, self._inside
        if inside is None:
            self.logs.append(PhaseLog(phase.name, phase.kind))
        log, started = self.logs[-1], execution.clock(device)
        seconds, hours = log.seconds, log.device_hours
        execution.reset_peak_memory(device)

        def settle() -> None:
            passed = execution.clock(device) - started
            log.seconds = round(seconds + passed, 3)
            log.device_hours = round(hours + passed * training.cluster.size / 3600, 6)
            log.peak_memory = max(execution.peak_memory(device) or 0, log.peak_memory or 0) or None

        self._make_same()
        training.journal.write("phase", phase=phase.name, phase_number=self.number, kind=phase.kind)
        if isinstance(phase, TrainPhase):
            TrainRun(self, phase, first, last, log, settle).go(inside)
        else:
            self.ema = None  # averages of what the model was before
            if isinstance(phase, CollectPhase):
                CollectRun(self, phase, first, last, log, settle).go(inside)
            torch.manual_seed(seed_of(training.seed, first, 7))  # the same in all processes and after an interruption
            finish = phase.finish if isinstance(phase, CollectPhase) else phase.apply
            with torch.no_grad():
                if finish is not None:
                    finish()
            log.macs = log.macs or 0.0
            self._make_same()
        self._inside = None
        settle()

    def _make_same(self) -> None:
        """All processes go on with the first one's weights and buffers."""
        state = state_of(self.model, self.phases)
        holders = [state["model"], *(phase["module"] or {} for phase in state["phases"])]
        tensors = {value.data_ptr(): value for holder in holders for value in holder.values() if value.numel()}
        self.training.cluster.make_same(tensors.values())

    def _stop(self) -> None:
        self.training.cluster.sums([0.0])  # nobody leaves before the first process has saved
        self.interruption.stop()

    # What is saved, and how a run goes on from it.

    def _save(self, step: int, inside: dict[str, Any] | None) -> None:
        """step: of the budget, done so far. inside: the state of the phase under way; None between two phases. All processes
        call it, so that they agree on what becomes of an error."""
        self.training.cluster.share(lambda: self._write(step, inside))

    def _write(self, step: int, inside: dict[str, Any] | None) -> None:
        content = state_of(self.model, self.phases) | {
            "position": [self.number, inside is not None], "logs": [asdict(log) for log in self.logs], "inside": inside,
            "ema": self._averaged(), "unreadable": dict(self.training.data.unreadable), "code": self._code(),
        }  # fmt: skip
        self.training.snapshots.save(step * 2 + (inside is None), content)

    def _averaged(self) -> dict[str, Any] | None:
        return self.ema.module.state_dict() if self.ema else None

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
        self.damage.known = len(training.data.unreadable)
        if content["ema"] is not None:
            self.average(content["ema"])
        self._inside = content["inside"] if is_inside else None
        done = self._saved_steps = self.logs[-1].steps if is_inside else 0
        training.journal.go_on(self.number, done)
        where = self.phases[self.number].name if self.number < len(self.phases) else None
        training.say(f"going on with phase {where} after step {done}" if where else "going on after the last phase")

    def _newest(self) -> str | None:
        """The newest whole snapshot of this code; what is damaged is told, and removed, and so is what other code has begun."""
        for path, content in self.training.snapshots.newest():
            if content is not None and self._is_ours(content):
                return path.name
            if content is not None:
                self.training.say("the method's code has changed since this training was interrupted; it begins anew")
                self.training.snapshots.remove()
                return None
            self.training.say(f"snapshot {path.name} is damaged; going on from the one before")
        return None

    # Results of phases that need not be run.

    def _take(self, phase: Phase) -> bool:
        """Takes the phase's result from a given file or from another cell's artifact; its cost is charged all the same."""
        training, log = self.training, PhaseLog(phase.name, phase.kind)
        if self._inside is not None:
            return False
        if phase.name in training.given:
            path = training.given[phase.name]
            try:
                content, source = read_given(path, phase.name, training.convert), path.name
            except UserError as error:
                raise agreed(error) from None  # all processes read the same file
        else:
            path = self._artifact()
            if path is None or not training.cluster.share(lambda: self._is_whole(path)):
                return False
            content, source = read_state(path), f"artifact {phase.artifact}"
        if phase.name in training.given and isinstance(phase, TrainPhase) and phase.makes is not None:
            content["model"] = self._parts(phase, content["model"])
        restore(self.model, self.phases, content)
        self.ema = None
        if content.get("ema") is not None:
            self.average(content["ema"])
        log = PhaseLog(**content["log"]) if "log" in content else log
        self.logs.append(replace(log, name=phase.name, source=source))
        training.say(f"phase {phase.name} is taken from {source}")
        return True

    def _parts(self, phase: TrainPhase, given: dict[str, Any]) -> dict[str, Any]:
        """The model's state with the modules that the phase makes from a given file, which need not have more, and whose others are not wanted."""
        own = self.model.state_dict()
        wanted = [name for name in own if name.split(".")[0] in phase.makes]
        lost = next((name for name in wanted if name not in given), None)
        if lost is not None:
            raise agreed(UserError(f"phases.{phase.name}: the file does not fit this model: it has no {lost}"))
        return own | {name: given[name] for name in wanted}

    def _is_whole(self, path: Path) -> bool:
        """Whether the artifact is there and can be used."""
        try:
            content = read_state(path)
        except FileNotFoundError:
            return False
        except Damaged:
            self.training.say(f"artifact {path.name} is damaged; making it again")
            return False
        if not self._is_ours(content):
            self.training.say(f"artifact {path.name} was made by other code; making it again")
            return False
        return True

    def _is_ours(self, content: dict[str, Any]) -> bool:
        """Whether the code that is here may go on with a snapshot or an artifact."""
        maker = self.training.maker
        return maker is None or maker.made(content.get("code"))

    def _code(self) -> dict[str, str | None]:
        return dict(self.training.maker.code) if self.training.maker else {}

    def _offer(self) -> None:
        path = self._artifact()
        if path is not None:
            state = state_of(self.model, self.phases[: self.number + 1])
            content = state | {"log": asdict(self.logs[-1]), "ema": self._averaged(), "code": self._code()}
            self.training.cluster.share(lambda: save_state(path, content))

    def _artifact(self) -> Path | None:
        """Where the result of this phase is kept for other cells; None where it, or a phase before it, has no key."""
        phases = self.phases[: self.number + 1]
        if self.training.artifacts is None or any(phase.artifact is None for phase in phases):
            return None
        return self.training.artifacts.path([[phase.kind, phase.name, phase.share, phase.artifact] for phase in phases])


def _bounds(phases: Sequence[Phase], steps: int) -> list[tuple[int, int]]:
    """The first step of each phase, and the one after its last."""
    bounds, spent = [], 0.0
    for phase in phases:
        first, spent = round(spent * steps), spent + phase.share
        bounds.append((first, round(spent * steps)))
    return bounds
