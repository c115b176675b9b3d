"""Latency without training: many backbones, devices and conditions in minutes, with random weights.

A survey is a list of cases in order of value; what has a record is not measured again, so that any half hour on a GPU goes
on where the last one ended.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt

import methods
from harness.cells import baseline_entries, expand, plug_in
from harness.errors import UserError
from harness.freshness import plugin_part
from harness.spec import Backbone, Conditions, Entry, Positive, Share, is_survey
from harness.yamlfile import Strict, read, validate
from methods.core.registry import unknown

SEED = 0


class Case(Conditions):
    """A backbone and the conditions to time it under. image_size: None takes the backbone's own."""

    backbone: Backbone = Backbone()
    image_size: PositiveInt | None = None


class Survey(Strict):
    """cases: in order of value, one after the other with all its conditions. entries: rows besides dense; none: every method with its defaults. seconds: timed time per model
    and conditions, at least. keep_rate: what methods whose counts depend on the image are set to keep. images: random ones over
    which such counts are averaged."""

    title: str = ""
    plugins: list[str] = []
    cases: Annotated[list[Case], Field(min_length=1)]
    entries: list[Entry] = []
    seconds: Positive = 10.0
    energy: bool = False
    keep_rate: Annotated[Share, Field(gt=0)] = 0.7
    images: PositiveInt = 8
    device: str = "auto"


@dataclass(frozen=True)
class Plan:
    """A survey by its name, with the rows to be timed."""

    name: str
    survey: Survey
    rows: tuple[tuple[str, methods.Method], ...]


def load_survey(path: Path) -> Survey:
    """A survey file, its plug-ins loaded. UserError for whatever is wrong in it."""
    content, lines = read(path, "survey")
    if not is_survey(content):
        raise UserError(f"survey {path}: has no cases, so it is a benchmark; say bench.py --spec {path.stem}")
    survey = validate(Survey, content, str(path), lines)
    for plugin in survey.plugins:
        plug_in(path.parent / plugin)
    return survey


def change(survey: Survey, source: str, conditions: dict[str, Any], others: dict[str, Any]) -> Survey:
    """With other conditions in every case, and other values of the survey's own keys; None leaves a key as it is."""
    content = survey.model_dump() | {key: value for key, value in others.items() if value is not None}
    chosen = {key: value for key, value in conditions.items() if value is not None}
    content["cases"] = [case | chosen for case in content["cases"]]
    return validate(Survey, content, source)


def only_backbone(survey: Survey, name: str) -> Survey:
    """The cases of one backbone. UserError where there are none."""
    cases = [case for case in survey.cases if case.backbone.name == name]
    if not cases:
        raise UserError(
            f"--backbone: {unknown('case', name, dict.fromkeys(case.backbone.name for case in survey.cases))}"
        )
    return survey.model_copy(update={"cases": cases})


def plan(name: str, survey: Survey, entries: Iterable[Entry]) -> Plan:
    """The rows: dense, and the entries' sweeps. dense+ is dense as far as time goes."""
    rows: list[tuple[str, methods.Method]] = []
    for entry in (baseline_entries()[0], *entries):
        for label, method in expand(entry):
            if not any(method.name == m.name and method.settings == m.settings for _, m in rows):
                if any(label == other for other, _ in rows):
                    raise UserError(f"{name}: two rows are called {label!r}; give one of the entries another label")
                rows.append((label, method))
    return Plan(name, survey, tuple(rows))


class TimeBudget:
    """Whether there is time for another measurement, judging by the longest so far."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds, self._longest = seconds, 0.0
        self._started = self._last = time.monotonic()

    def start(self) -> None:
        """A measurement begins."""
        self._last = time.monotonic()

    def note(self) -> None:
        """A measurement has ended, and the next one may begin."""
        now = time.monotonic()
        self._longest, self._last = max(self._longest, now - self._last), now

    @property
    def is_spent(self) -> bool:
        return self.seconds is not None and time.monotonic() - self._started + self._longest > self.seconds


def seconds_of(text: str) -> float:
    """90, 90s, 25m or 1.5h. UserError for anything else."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1.0)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"--time-budget {text!r}: must be a time like 90s, 25m or 1h")
    return seconds


def subject_id(case: Case, method: methods.Method, keep_rate: float) -> dict[str, Any]:
    """What tells a surveyed model from others: it stands where a trained model's weights do. The keep rate belongs to it only
    where a method can be set to one."""
    adapts = type(method).calibrate is not methods.Method.calibrate and method.keeps_as_told
    return {
        "untrained": SEED, "backbone": case.backbone.model_dump(), "image_size": case.image_size, "method": method.name,
        "settings": method.settings.model_dump(mode="json"), "revision": method.revision, "keep_rate": keep_rate if adapts else None,
        **plugin_part(method.name),
    }  # fmt: skip
