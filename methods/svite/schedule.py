"""When connections are exchanged, and how many: schedules over the steps of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

FLOOR = 0.005  # the death rate at the end of the schedule


def death_rate(step: float, steps: int, initial: float, schedule: Literal["cosine", "linear", "constant"]) -> float:
    """The share of active connections that an update after `step` of `steps` drops. The cosine ends at FLOOR after all steps, not at
    zero after the last update, as in the official code (the paper's f_decay ends with the updates)."""
    if schedule == "constant":
        return initial
    left = (1 + math.cos(math.pi * step / steps)) / 2 if schedule == "cosine" else 1 - step / steps
    return FLOOR + (initial - FLOOR) * left


@dataclass(frozen=True)
class Updates:
    """frequency: steps between two updates, or a share of all steps (a float below 1). end: share of all steps from which on there
    are no more updates."""

    frequency: int | float
    end: float

    def interval(self, steps: int) -> int:
        """Steps between two updates."""
        return self.frequency if isinstance(self.frequency, int) else max(round(self.frequency * steps), 1)

    def due(self, done: int, steps: int) -> int:
        """How many updates should have been made after `done` steps; None is due at or after `end`."""
        last = math.ceil(self.end * steps) - 1  # the last step that may be followed by an update
        return min(done, last) // self.interval(steps)

    def is_open(self, done: int, steps: int) -> bool:
        """Whether an update may still be made after `done` steps."""
        return done < self.end * steps
