"""What timings in one table have in common: device, torch version, and the rule they were taken by. No torch here."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from harness.records import MEASURE_REVISION

Record = dict[str, Any]
TimedOn = dict[str, Any]  # device, driver, torch (None where a record does not say), measure_revision

MENDED = {  # by which revision of measuring, and what was so before it
    4: "not all images were timed equally often, and where they differ in the work they take, "
    "the speed-up is that of the median calls",
}


def machine(record: Record) -> dict[str, Any]:
    """Device, driver and torch's version, which were not in the key of records up to revision 3."""
    torch = record.get("torch") or record.get("where", {}).get("packages", {}).get("torch")
    return {"device": record["device"], "driver": record["driver"], "torch": torch}


def tables_of(measures: Iterable[Record]) -> list[tuple[TimedOn, list[Record]]]:
    """The records of each table, the newest rule and version first."""
    same: dict[str, list[Record]] = defaultdict(list)
    for record in measures:
        same[json.dumps(machine(record) | {"measure_revision": record["measure_revision"]})].append(record)
    return sorted(((json.loads(key), found) for key, found in same.items()), key=lambda one: _order(one[0]))


def _order(timed: TimedOn) -> tuple[Any, ...]:
    version = tuple(-int(number) for number in re.findall(r"\d+", timed["torch"] or ""))
    return -timed["measure_revision"], version, timed["device"], timed["driver"], timed["torch"] or ""


def told(timed: TimedOn) -> str:
    """ "Timed on DEVICE, torch 2.14.1", and by which rule, where that is not today's."""
    torch = f"torch {timed['torch']}" if timed["torch"] else "an unknown version of torch"
    before = "; ".join(text for revision, text in MENDED.items() if timed["measure_revision"] < revision)
    rule = f" (by an older rule: {before})" if is_old(timed) else ""
    return f"Timed on {', '.join(filter(None, (timed['device'], timed['driver'], torch)))}{rule}"


def is_old(timed: TimedOn | None) -> bool:
    """Whether these were timed by an older rule than today's."""
    return timed is not None and timed["measure_revision"] < MEASURE_REVISION
