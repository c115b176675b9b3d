"""Tables of surveys: how fast untrained models are, from the records alone. No torch here."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import counts, freshness, records
from harness.speeds import Speed, Timing, chosen_kernels, column_names, executed, judge, speed_of
from harness.timedon import TimedOn, machine, tables_of
from harness.words import numbers_told

Record = dict[str, Any]


@dataclass
class Line:
    """A method under one set of conditions. macs: dense, theoretical, executed; errors: standard errors of the last two over images. of_products, of_copies: shares of the device's
    measured limits that it reaches (multiply-adds executed; weights read once); None where those were not measured."""

    label: str
    macs: tuple[float, float, float]
    timing: Timing
    speed: Speed
    of_products: float | None = None
    of_copies: float | None = None
    errors: tuple[float, float] = (0.0, 0.0)
    method: str = ""
    code: str = freshness.UNRECORDED  # whether the code that was timed is the one that is here: see harness.freshness

    @property
    def images_per_second(self) -> float:
        return self.speed.images_per_second


@dataclass
class SurveyTable:
    """Lines that may be compared: one backbone on one device, timed by one rule under one version of torch. limits:
    rooflines by dtype; verdicts: by label."""

    benchmark: str
    backbone: dict[str, Any]
    image_size: int | None
    timed_on: TimedOn
    limits: dict[str, Record]
    lines: list[Line]
    verdicts: dict[str, str]

    @property
    def names(self) -> dict[Timing, str]:
        return column_names({line.timing for line in self.lines})


def surveys(results: Path, benchmark: str | None = None) -> list[SurveyTable]:
    """All of them, in a fixed order: by benchmark and backbone, the newest way of timing first."""
    found: dict[str, list[Record]] = defaultdict(list)
    limits: dict[str, dict[str, Record]] = defaultdict(dict)
    for name, record in records.load_all(results):
        if benchmark is not None and name != benchmark:
            continue
        if record["kind"] == "roofline" and record["gemm_tflops"]:
            limits[_machine(name, record)][record["dtype"]] = record
        elif record["kind"] == "measure" and "survey" in record:
            survey = record["survey"]
            found[json.dumps([name, survey["backbone"], survey["image_size"]], sort_keys=True)].append(record)
    return [
        _table(json.loads(subject), timed, own, limits[_machine(json.loads(subject)[0], own[0])])
        for subject, same in sorted(found.items()) for timed, own in tables_of(_newest(same))
    ]  # fmt: skip


def _machine(name: str, record: Record) -> str:
    """What a device's limits hold for."""
    return json.dumps([name, machine(record)])


def _newest(found: list[Record]) -> list[Record]:
    """Without what an older revision of a method has left."""

    def who(record: Record) -> str:
        survey = record["survey"]
        parts = [survey["method"], survey["settings"], survey["keep_rate"], record["device"], record["driver"]]
        return json.dumps(parts, sort_keys=True)

    newest: dict[str, int] = {}
    for record in found:
        newest[who(record)] = max(newest.get(who(record), 0), record["survey"]["revision"])
    return [record for record in found if record["survey"]["revision"] == newest[who(record)]]


def _name(record: Record) -> str:
    rate = record["survey"]["keep_rate"]
    return record["label"] + (f" (set to keep {rate:g})" if rate is not None else "")


def _table(subject: list[Any], timed: TimedOn, found: list[Record], limits: dict[str, Record]) -> SurveyTable:
    table = SurveyTable(*subject, timed, limits, [], {})
    by_method: dict[str, list[Record]] = defaultdict(list)
    for record in _told_apart(found):
        table.lines.append(_line(record, table.limits))
        by_method[_name(record)].append(record)
    table.lines.sort(key=_order)
    for label, same in sorted(by_method.items()):
        own = [line for line in table.lines if line.label == label]
        speeds = {line.timing: line.speed for line in own}
        macs = (*own[0].macs[:2], executed(same[0]["survey"]["macs_executed"], speeds.values()))
        lines = [
            judge(macs, same[0]["survey"]["parts"], speeds, table.names),
            numbers_told(*(same[0]["survey"].get(key, {}) for key in ("numbers", "numbers_error"))),
            _few(same[0]["survey"]),
            chosen_kernels(speeds, table.names),
            *dict.fromkeys(line for record in same for line in record["survey"].get("remarks", [])),
        ]
        table.verdicts |= {label: "; ".join(filter(None, lines))} if any(lines) else {}
    return table


def _told_apart(found: list[Record]) -> list[Record]:
    """Records of several versions of a plug-in say in their labels which."""
    versions: dict[str, set[str | None]] = defaultdict(set)
    for record in found:
        versions[_name(record)].add(record["survey"].get("plugin_code"))
    return [
        record | {"label": f"{record['label']} (code {record['survey']['plugin_code'][:6]})"}
        if len(versions[_name(record)]) > 1 and record["survey"].get("plugin_code")
        else record
        for record in found
    ]


def _line(record: Record, limits: dict[str, Record]) -> Line:
    facts, timing = record["survey"], Timing(record["dtype"], record["batch"], record["mode"])
    macs = (facts["macs_dense"], facts["macs_theoretical"], facts["macs_executed"])
    speed = speed_of([record["latency"]], macs[0] / macs[1])
    line = Line(_name(record), (*macs[:2], executed(macs[2], [speed])), timing, speed, method=facts["method"])
    line.errors = tuple(counts.errors(facts)[name] for name in counts.OF_IMAGES)
    line.code = freshness.survey_state(record)
    limit = limits.get(timing.dtype)
    if limit and not line.speed.unavailable:
        seconds = line.speed.mean_milliseconds / 1e3
        line.of_products = 2 * line.macs[2] * line.speed.batch / seconds / (limit["gemm_tflops"] * 1e12)
        line.of_copies = record["latency"]["deployed"]["weights_bytes"] / seconds / (limit["copy_gbs"] * 1e9)
    return line


def _few(facts: dict[str, Any]) -> str:
    over = max(counts.images(facts).values())
    return f"theory and run are means over {over} random images" if over > 1 else ""


def _order(line: Line) -> tuple:
    """By conditions; within them the slower speed-up first, dense at the top."""
    return line.timing, line.label != "dense", line.speed.speed_up, line.label
