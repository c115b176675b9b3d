"""Rules about how a method trains: interrupted or not, in one piece or many, alone or together."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import distributed

import methods
from harness import models, spec, workers
from harness.cluster import Cluster
from harness.rules.subject import CLASSES, RECIPE, STEPS, Broken, Subject, require
from harness.training.setup import PhaseLog, Progress
from harness.training.snapshots import Snapshots
from methods import TrainPhase
from methods.core.noise import Noise
from methods.core.pooled import value_of
from methods.core.registry import loaded_plugins

SAME = 1e-4  # two loss curves agree to this, relative to values over 1


def trains_within_its_shares(subject: Subject) -> None:
    """The phases run in the engine; their shares sum to 1."""
    require(subject.trained is not None, "no model came out of training")


def gradients_reach_what_is_trained(subject: Subject) -> None:
    """Every parameter of every group gets a gradient that is not zero, on some of a few batches."""
    sparse = subject.sparse()
    for phase in subject.phases(sparse):
        if not isinstance(phase, TrainPhase):
            continue
        names = {id(p): name for name, p in phase.objective.named_parameters()}
        groups = [p for group in phase.groups for p in group.parameters] if phase.groups is not None else (
            [p for p in phase.objective.parameters() if p.requires_grad])  # fmt: skip
        reached: set[int] = set()
        for step in range(3):
            phase.objective.train().zero_grad(set_to_none=True)
            terms = phase.objective(
                subject.images, torch.arange(len(subject.images)) % CLASSES, Noise(0, step, torch.arange(5))
            )
            require(
                isinstance(terms, dict) and len(terms) > 0,
                f"phase {phase.name}: the objective must return named loss terms",
            )
            sum(map(value_of, terms.values())).backward()
            reached |= {id(p) for p in groups if p.grad is not None and bool(p.grad.any())}
        lost = [
            names.get(id(p), "a parameter that the objective does not hold") for p in groups if id(p) not in reached
        ]
        require(
            not lost,
            f"phase {phase.name}: no gradient reaches {lost[0] if lost else ''}"
            + (f" and {len(lost) - 1} more" if len(lost) > 1 else ""),
        )


def deterministic_by_seed(subject: Subject) -> None:
    """The same seed gives the same weights."""
    again, _ = subject.run()
    require(
        models.state_digest(again.state_dict()) == models.state_digest(subject.trained.state_dict()),
        "two trainings with one seed end with different weights",
    )


def goes_on_after_an_interruption(subject: Subject) -> None:
    """Training that is interrupted after every step, and goes on with new objects each time, ends with the same weights: a phase
    keeps its state in the objective, in buffers, or in `state`."""
    if subject.backbone != "plain":
        return  # where a method keeps its state does not depend on the backbone
    expected = models.state_digest(subject.trained.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        snapshots = Snapshots(Path(folder), every_steps=1)
        for _ in range(2 * STEPS + 5):
            try:
                again = dataclasses.replace(subject, method=methods.create(subject.method.name, **_settings(subject)))
                sparse, logs = again.run(snapshots=snapshots, watch=_stop_at_the_second())
            except _Stopped:
                continue
            ended = models.state_digest(sparse.state_dict())
            require(
                ended == expected, "training that was interrupted ends with other weights: it keeps state elsewhere"
            )
            require(
                [log.events for log in logs] == [log.events for log in subject.logs],
                "training that was interrupted tells of other events: hooks keep state elsewhere",
            )
            return
    raise Broken("training that is interrupted after every second step does not come to an end")


def can_be_divided(subject: Subject) -> None:
    """A step in micro-batches is the same step: what is no mean over images is `Pooled`, and a forward changes nothing."""
    if subject.backbone == "plain" and _is_divisible(subject):
        _, logs = subject.run(options=spec.Training(micro_batch=RECIPE.batch_size // 4 + 1))
        _require_same_curve(_curve(subject.logs), _curve(logs), "in micro-batches")


def two_processes_equal_one(subject: Subject) -> None:
    """Two processes that share every step's images out learn what one learns."""
    if subject.backbone == "plain" and _is_divisible(subject):
        method = subject.method
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as threads:
            tasks = [
                (method.name, _settings(subject), loaded_plugins(), rank, f"{folder}/meeting") for rank in range(2)
            ]
            ended = list(threads.map(lambda task: list(workers.results_of(_together, task)), tasks))
        (*curve, digest), (*other_curve, other_digest) = ended
        require(curve == other_curve, "two processes that train together do not agree on their losses")
        require(
            digest == other_digest, "two processes that train together end with different weights, masks or buffers"
        )
        _require_same_curve(_curve(subject.logs), curve, "in two processes")


def _together(task: tuple[str, dict[str, Any], tuple[str, ...], int, str]) -> Iterator[list[float] | str]:
    """The loss curve of one of two processes, and the digest of its model."""
    name, settings, plugins, rank, meeting = task
    torch.set_num_threads(1)
    for path in plugins:
        methods.load_plugin(path)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        sparse, logs = Subject(methods.create(name, **settings), "plain").run(cluster=Cluster(rank, 2))
        yield from _curve(logs)
        yield models.state_digest(sparse.state_dict())
    finally:
        distributed.destroy_process_group()


def _settings(subject: Subject) -> dict[str, Any]:
    return subject.method.settings.model_dump()


class _Stopped(Exception):
    pass


def _stop_at_the_second() -> Any:
    """A watcher that interrupts the second step it sees: the first one has been saved by then."""
    seen: list[Progress] = []

    def watch(progress: Progress) -> None:
        seen.append(progress)
        if len(seen) == 2:
            raise _Stopped

    return watch


def _is_divisible(subject: Subject) -> bool:
    return all(phase.divisible for phase in subject.phases(subject.sparse()) if isinstance(phase, TrainPhase))


def _curve(logs: list[PhaseLog]) -> list[list[float]]:
    """Loss terms of all steps."""
    return [
        [value for name, value in point.items() if name not in ("step", "lr")] for log in logs for point in log.curve
    ]


def _require_same_curve(whole: list[list[float]], divided: list[list[float]], how: str) -> None:
    require(len(whole) == len(divided), f"{how}, training takes another number of steps")
    for step, (one, other) in enumerate(zip(whole, divided, strict=True), 1):
        for a, b in zip(one, other, strict=True):
            distance = abs(a - b) / max(abs(a), 1.0)
            require(
                math.isfinite(distance) and distance <= SAME,
                f"{how}, a loss of step {step} is {b:.6g} instead of {a:.6g}: see methods.Pooled",
            )
