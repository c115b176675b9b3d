"""What a cell's phases share, and what they tell: the setting of a training, its log, its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import spec
from harness.cluster import ALONE, Cluster
from harness.data.dataset import ImageData
from harness.device import Plan
from harness.freshness import Maker
from harness.spec import Recipe
from harness.training.artifacts import Artifacts
from harness.training.journal import Journal
from harness.training.snapshots import Snapshots


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
    large; micro_batch: images at once, where a step was divided; curve: points [step, learning rate, loss terms by name]; events: what
    the method told of some steps.
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
    events: list[dict[str, Any]] = field(default_factory=list)
    source: str | None = None


@dataclass
class Training:
    """What a cell's phases share. steps: the budget. options: how often to save, when to give up. reported: what the model keeps
    just now, by name, for the log. given: files that phases' results are taken from, by the phase's name; convert: what makes a state dict of
    an authors' checkpoint among them. maker: the code that trains; what other code has begun or made is not gone on with."""

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
    convert: Callable[[dict[str, Any]], dict[str, Any]] = lambda content: content.get("model", content)
    maker: Maker | None = None


def budget_steps(data: ImageData, recipe: Recipe, epochs: float, max_steps: int | None) -> int:
    """A budget in optimizer steps."""
    steps = max(round(epochs * data.steps_per_epoch(recipe.batch_size)), 1)
    return min(steps, max_steps) if max_steps else steps
