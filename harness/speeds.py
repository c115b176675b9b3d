"""Latency as tables show it: the medians of records, their marks, and how columns are called. No torch here."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from harness.verdict import REALISED_LIMIT, Parts, not_skipped, verdict

NOISY = 1.25  # a cell whose 90th percentile is so many times its median is marked
OTHERS = 0.2  # and one during which other processes kept more than so many cores busy


@dataclass(frozen=True, order=True)
class Timing:
    """What a latency column is about; batch: as asked for."""

    dtype: str
    batch: int
    mode: str


@dataclass
class Speed:
    """One row's latency under one column's conditions; medians over the seeds. batch: the one measured, smaller than the
    column's where memory ran out. unavailable: why there are no numbers."""

    unavailable: str | None = None
    batch: int = 0
    milliseconds: float = 0.0  # of the median call
    mean_milliseconds: float = 0.0  # over the batches that were timed
    speed_up: float = 0.0
    realised: float = 0.0
    warm: bool = True
    noisy: bool = False
    half_width: float = 0.0
    peak_bytes: int | None = None
    joules: float | None = None
    operations: tuple[int, int] | None = None
    macs: float | None = (
        None  # that ran, where attention kernels of the method's own were chosen by measuring; None: as counted elsewhere
    )
    kernels: str = ""  # those of the deployed model's attention, and why others could not be tried
    parts: Mapping[str, float] | None = None  # of macs
    counted_once: bool = False  # macs and parts are the dispatcher's alone

    @property
    def images_per_second(self) -> float:
        return self.batch / self.mean_milliseconds * 1e3

    def numbers(self, timing: Timing) -> dict[str, Any]:
        """For CSV: milliseconds, bytes, joules per image."""
        where = {"dtype": timing.dtype, "mode": timing.mode, "batch": timing.batch}
        if self.unavailable:
            return where | {"unavailable": self.unavailable}
        return where | {
            "measured_batch": self.batch, "ms": self.milliseconds, "mean_ms": self.mean_milliseconds,
            "images_per_second": self.images_per_second, "speed_up": self.speed_up, "half_width": self.half_width,
            "realised": self.realised,
            "warm": self.warm, "noisy": self.noisy, "peak_bytes": self.peak_bytes, "joules": self.joules, "measured_macs": self.macs,
        }  # fmt: skip


REFUSED = "could not be tried"
ALONE = ", counted without fvcore"


def speed_of(latencies: list[dict[str, Any]], theoretical: float) -> Speed:
    """One cell of a table from the latency rows of its records; theoretical: the speed-up by multiply-adds, where a
    record does not have that of the images it timed."""
    measured = [row for row in latencies if "unavailable" not in row]
    if not measured:
        return Speed(unavailable=latencies[0]["unavailable"])
    measured = [row for row in measured if row["batch"] == min(other["batch"] for other in measured)]
    both = [row[name] for row in measured for name in ("dense", "deployed")]
    deployed = [row["deployed"] for row in measured]
    speed_up = statistics.median(row["speed_up"] for row in measured)
    operations = (measured[0]["dense"]["operations"], measured[0]["deployed"]["operations"])
    joules = [row["joules_per_image"] for row in deployed if "joules_per_image" in row]
    macs = [row["macs_executed"] for row in deployed if "macs_executed" in row]
    return Speed(
        batch=min(row["batch"] for row in measured),
        milliseconds=statistics.median(row["p50_ms"] for row in deployed),
        mean_milliseconds=statistics.median(row.get("mean_ms", row["p50_ms"]) for row in deployed),
        speed_up=speed_up, realised=statistics.median(
            row["speed_up"] / row.get("theoretical_speed_up", theoretical) for row in measured
        ), warm=all(row["warm"] for row in both),
        noisy=any(row["noise"] > NOISY for row in both) or any(_was_disturbed(row) for row in measured), peak_bytes=max((row["peak_bytes"] for row in deployed if row["peak_bytes"]), default=None),
        half_width=statistics.median((row["speed_up_interval"][1] - row["speed_up_interval"][0]) / 2 for row in measured),
        joules=statistics.median(joules) if joules else None,
        operations=operations if None not in operations else None, macs=statistics.mean(macs) if macs else None,
        kernels=_kernels(deployed), parts=next((row["parts_executed"] for row in deployed if "parts_executed" in row), None),
        counted_once=any("only_one" in row for row in deployed),
    )  # fmt: skip


def absences(cells: Iterable[tuple[str, Timing, Speed]], names: Mapping[Timing, str]) -> list[str]:
    """A line for every column and reason for which there are no numbers. cells: with their rows' labels."""
    labels: dict[str, None] = {}
    missing: dict[tuple[str, str], list[str]] = {}
    for label, timing, speed in cells:
        labels[label] = None
        if speed.unavailable:
            missing.setdefault((names[timing], speed.unavailable), []).append(label)
    return [
        f"{column}, {'all rows' if set(own) == set(labels) else ', '.join(own)}: n/a, {reason}"
        for (column, reason), own in missing.items()
    ]


def _was_disturbed(row: dict[str, Any]) -> bool:
    conditions = row.get("conditions", {})
    return conditions.get("others_cores", 0.0) > OTHERS or conditions.get("throttled_seconds", 0.0) > 0


def judge(
    macs: tuple[float, float, float],
    parts: Mapping[str, Parts],
    speeds: Mapping[Timing, Speed],
    names: Mapping[Timing, str],
) -> str | None:
    """A row's verdict. macs: dense, theoretical, executed; names: how the columns are called."""
    measured = {names[timing]: speed for timing, speed in speeds.items() if speed.unavailable is None}
    most = max(
        (speed for speed in measured.values() if speed.macs is not None), key=lambda speed: speed.macs, default=None
    )
    if most is not None and most.parts is not None:
        parts = {**parts, "executed": most.parts}
    low = next((speed for speed in measured.values() if speed.realised < REALISED_LIMIT), None)
    realised = {name: speed.realised for name, speed in measured.items()}
    return verdict(not_skipped(*macs, parts), realised, low.operations if low else None)


def _kernels(deployed: list[dict[str, Any]]) -> str:
    names = sorted(
        {name for row in deployed for names in row.get("kernels", {}).values() for name in names.split(" and ")}
    )
    refused = dict.fromkeys(
        f"{name} {REFUSED}: {why}" for row in deployed for name, why in row.get("kernels_refused", {}).items()
    )
    return "; ".join([" and ".join(names), *refused])


def executed(counted: float, speeds: Iterable[Speed]) -> float:
    """Multiply-adds that run: as counted, or, where what runs was chosen by measuring, the most that ran."""
    return max((speed.macs for speed in speeds if speed.macs is not None), default=counted)


def chosen_kernels(speeds: Mapping[Timing, Speed], names: Mapping[Timing, str]) -> str | None:
    """A line that says which attention was chosen where there was a choice besides the dense kernels, or what could not be tried."""
    found = [
        f"{speed.kernels} at {names[timing]}"
        + (f" ({speed.macs / 1e9:.4f} GMACs run{ALONE * speed.counted_once})" if speed.macs is not None else "")
        for timing, speed in speeds.items()
        if speed.macs is not None or REFUSED in (speed.kernels or "")
    ]
    return f"attention chosen by measuring: {', '.join(found)}" if found else None


def column_names(timings: Iterable[Timing]) -> dict[Timing, str]:
    """ "batch 8", with dtype and mode where the columns differ in them."""
    timings = list(timings)
    several = {part: len({getattr(timing, part) for timing in timings}) > 1 for part in ("dtype", "mode")}
    return {
        timing: " ".join([f"batch {timing.batch}", *(getattr(timing, part) for part in several if several[part])])
        for timing in timings
    }


def marks(speed: Speed, timing: Timing) -> str:
    """What to know before trusting a time."""
    found = ["?"] if not speed.warm else []
    found += ["~"] if speed.noisy else []
    found += [f"(b{speed.batch})"] if speed.batch != timing.batch else []
    return "".join(f" {mark}" for mark in found)
