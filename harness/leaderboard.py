"""From records to ranked tables: a pure function of the results folder. No torch here."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import compare, counts, freshness, records, stats
from harness.speeds import Speed, Timing, chosen_kernels, column_names, executed, judge, speed_of
from harness.timedon import TimedOn, tables_of
from harness.words import counters_told

Record = dict[str, Any]
COUNTED = ("macs_dense", "macs_theoretical", "macs_executed", "params", "params_nonzero")


@dataclass
class Row(compare.Compared):
    """One method with its settings, over all seeds that were run."""

    label: str
    method: str
    settings: dict[str, Any]
    seeds: list[int]
    top1: float
    top1_interval: float | None
    top5: float
    macs_dense: float
    macs_theoretical: float
    macs_executed: float
    params: int
    params_nonzero: int
    pareto: bool = False
    speeds: dict[Timing, Speed] = field(default_factory=dict)
    verdict: str | None = None  # why it is slower than its formula
    remarks: list[str] = field(default_factory=list)  # the method's own, of any seed; which attention was chosen
    estimates: dict[str, tuple[float, str]] = field(
        default_factory=dict
    )  # microseconds that nobody measured; by whose model
    ema_top1: float | None = None  # of the averaged weights; None where a seed has none
    training_macs: float | None = None  # executed by the cell's own training, per seed; None where it was not counted
    device_hours: float | None = None
    numbers: dict[str, float] = field(default_factory=dict)  # what else the paper reports of its model
    numbers_error: dict[str, float] = field(default_factory=dict)  # standard errors over images
    macs_error: dict[str, float] = field(default_factory=dict)  # of theoretical, executed: over images
    macs_images: dict[str, int] = field(default_factory=dict)  # of the same, that they are means over
    old_images: int | None = None  # how few theory is a mean over, where it was counted by an earlier rule
    macs_authors: float | None = None  # as the authors' own counter has them, where they differ
    code: str = freshness.UNRECORDED  # whether the code that made it is the one that is here: see harness.freshness
    timing_code: dict[Timing, str] = field(default_factory=dict)  # the same of its times


@dataclass
class Table:
    """Rows that may be compared: same data, backbone, budget and recipe, timed on the same device."""

    benchmark: str
    context_id: str
    context: dict[str, Any]
    timed_on: TimedOn | None
    rows: list[Row]
    timings: list[Timing]


def tables(results: Path, benchmark: str | None = None) -> list[Table]:
    """All tables, in a fixed order: by benchmark and context, the newest way of timing first."""
    train: dict[tuple[str, str], list[Record]] = defaultdict(list)
    measured: dict[str, list[Record]] = defaultdict(list)
    for name, record in records.load_all(results):
        if benchmark is not None and name != benchmark:
            continue
        if record["kind"] == "train":
            train[name, record["context_id"]].append(record)
        elif record["kind"] == "measure":
            measured[name].append(record)
    result = []
    for (name, context_id), group in sorted(train.items()):
        timings = _timings_of(group, measured[name])
        result.extend(_table(name, context_id, group, timed, found) for timed, found in timings)
    return result


def _timings_of(group: list[Record], measures: list[Record]) -> list[tuple[TimedOn | None, list[Record]]]:
    """The measure records that belong to a group, by the table they are shown in."""
    weights = {record["weights_id"] for record in group}
    return tables_of(record for record in measures if record["weights_id"] in weights) or [(None, [])]


def _table(name: str, context_id: str, group: list[Record], timed: TimedOn | None, measures: list[Record]) -> Table:
    newest = defaultdict(int)
    for record in group:
        newest[_who(record)] = max(newest[_who(record)], record["revision"])
    by_row: dict[str, list[Record]] = defaultdict(list)
    for record in group:
        if record["revision"] == newest[_who(record)]:
            by_row[_who(record) + record.get("plugin_code", "")].append(record)
    others = _first(by_row, compare.is_reference), _first(by_row, compare.is_baseline)
    rows = [_row(found, others, measures) for found in by_row.values()]
    _tell_versions_apart(rows, [found[0].get("plugin_code") for found in by_row.values()])
    held_against = {
        id(row): [counts.comparable(record["cost"]) for record in found]  # labels may be given twice
        for row, found in zip(rows, by_row.values(), strict=True)
    }
    compare.correct(rows)
    points = [(_expected_run(row, held_against[id(row)]), row.top1) for row in rows]
    for row, best in zip(rows, stats.pareto(points), strict=True):
        row.pareto = best
    rows.sort(key=lambda row: (-row.top1, row.macs_executed, row.label))
    timings = sorted({timing for row in rows for timing in row.speeds})
    for row in rows:
        theory, parts = zip(*held_against[id(row)], strict=True)
        macs = (row.macs_dense, statistics.mean(theory), row.macs_executed)
        row.verdict = judge(macs, parts[0], row.speeds, column_names(timings))
        kernels = chosen_kernels(row.speeds, column_names(timings))
        row.remarks += [kernels] if kernels else []
    return Table(name, context_id, group[0]["context"], timed, rows, timings)


def _expected_run(row: Row, held_against: list[tuple[float, Any]]) -> float:
    """Multiply-adds that the row executes on the whole split: what ran on a few images, and by how much the formula gives
    more for the split than for these."""
    return row.macs_executed + row.macs_theoretical - statistics.mean(theory for theory, _ in held_against)


def _order(record: Record) -> tuple[int, str]:
    return record["seed"], record["id"]


def _who(record: Record) -> str:
    return json.dumps([record["method"], record["settings"], record.get("given")], sort_keys=True)


def _seeds(found: list[Record]) -> list[Record]:
    """A row's records in the order of their seeds; a seed counts once."""
    return list({record["seed"]: record for record in sorted(found, key=_order)}.values())


def _first(by_row: dict[str, list[Record]], is_it: Callable[[Record], bool]) -> list[Record] | None:
    """The records of the row that is it; None where there is none."""
    return next((_seeds(found) for found in by_row.values() if is_it(found[0])), None)


def _row(found: list[Record], others: tuple[list[Record] | None, list[Record] | None], measures: list[Record]) -> Row:
    """others: the records of dense+ and of dense."""
    found = _seeds(found)
    first = found[0]
    top1, interval = stats.mean_interval([record["top1"] for record in found])
    costs = {key: statistics.mean(record["cost"][key] for record in found) for key in COUNTED}
    row = Row(
        label=first["label"], method=first["method"], settings=first["settings"], seeds=[record["seed"] for record in found],
        top1=top1, top1_interval=interval, top5=statistics.mean(record["top5"] for record in found),
        macs_dense=costs["macs_dense"], macs_theoretical=costs["macs_theoretical"], macs_executed=costs["macs_executed"],
        params=round(costs["params"]), params_nonzero=round(costs["params_nonzero"]),
    )  # fmt: skip
    row.numbers = _means([record.get("report", {}).get("numbers", {}) for record in found])
    row.numbers_error = _means([record.get("report", {}).get("numbers_error", {}) for record in found])
    _counted(row, [record["cost"] for record in found])
    row.macs_authors = _mean([record.get("report", {}).get("authors", {}).get("macs") for record in found])
    said = [[*record.get("report", {}).get("remarks", []), *counters_told(record["cost"])] for record in found]
    row.remarks = list(dict.fromkeys(line for lines in said for line in lines))
    row.ema_top1 = _mean([record.get("ema_top1") for record in found])
    row.training_macs = _mean([_sum(record, "macs") for record in found])
    row.device_hours = _mean([_sum(record, "device_hours") for record in found])
    row.remarks += compare.compare(row, found, *others)
    row.code = freshness.worst(freshness.train_state(record) for record in found)
    row.speeds = _speeds(row, found, measures)
    row.timing_code = _timing_code(found, measures)
    row.macs_executed = executed(row.macs_executed, row.speeds.values())
    _estimate(row, [record.get("report", {}).get("estimates", []) for record in found])
    return row


def _counted(row: Row, costs: list[dict[str, Any]]) -> None:
    """Over which images the row's counts are means. Its seeds see the same images, so more seeds do not make the error smaller."""
    row.macs_error = _means([counts.errors(cost) for cost in costs])
    row.macs_images = {name: min(counts.images(cost)[name] for cost in costs) for name in counts.OF_IMAGES}
    row.old_images = min(filter(None, map(counts.old_images, costs)), default=None)


def _means(found: list[dict[str, float]]) -> dict[str, float]:
    """Of what all seeds have."""
    return {name: statistics.mean(one[name] for one in found) for name in found[0] if all(name in one for one in found)}


def _estimate(row: Row, found: list[list[dict[str, Any]]]) -> None:
    """Means of what all seeds have, and what to know of it."""
    for one in found[0]:
        same = [other["microseconds"] for estimates in found for other in estimates if other["name"] == one["name"]]
        if len(same) == len(found):
            row.estimates[one["name"]] = statistics.mean(same), one["note"]


def _sum(record: Record, key: str) -> float | None:
    """Over the phases of a cell; None where one does not say, or there was no training."""
    values = [phase.get(key) for phase in record.get("phases", [])]
    return sum(values) if values and None not in values else None


def _mean(values: list[float | None]) -> float | None:
    return statistics.mean(values) if None not in values else None


def _speeds(row: Row, found: list[Record], measures: list[Record]) -> dict[Timing, Speed]:
    weights = {record["weights_id"] for record in found}
    same: dict[Timing, list[Record]] = defaultdict(list)
    for record in measures:
        if record["weights_id"] in weights:
            same[Timing(record["dtype"], record["batch"], record["mode"])].append(record["latency"])
    theoretical = row.macs_dense / row.macs_theoretical
    return {timing: speed_of(latencies, theoretical) for timing, latencies in sorted(same.items())}


def _timing_code(found: list[Record], measures: list[Record]) -> dict[Timing, str]:
    """Whether the times of a row are of the code that is here, and of the weights that its records are about."""
    trained, states = {record["weights_id"]: record for record in found}, defaultdict(list)
    for record in measures:
        if (train := trained.get(record["weights_id"])) is not None:
            timing = Timing(record["dtype"], record["batch"], record["mode"])
            states[timing].append(freshness.measure_state(record, train))
    return {timing: freshness.worst(found) for timing, found in states.items()}


def _tell_versions_apart(rows: list[Row], codes: list[str | None]) -> None:
    """Rows of one label that are of several versions of a plug-in say which."""
    labels = [row.label for row in rows]
    for row, code in zip(rows, codes, strict=True):
        if code is not None and labels.count(row.label) > 1:
            row.label += f" (code {code[:6]})"
