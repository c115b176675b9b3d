"""What a row's accuracy is compared with, by which test, and whether anything is claimed. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

import methods
from harness import stats
from harness.packing import unpack

Record = dict[str, Any]
Standing = Literal["reference", "control", "untrained", "trained"]
SAME_COST = 1e-3  # a row whose formula differs from dense by less prunes nothing
FAR_ABOVE = 0.01  # a sparse row so much more accurate than what it is compared with is doubted


@dataclass(kw_only=True)
class Compared:
    """How a row compares. Only trained rows and off-the-shelf rows without randomness are tested."""

    standing: Standing = "trained"
    compared_with: Literal["dense+", "dense"] = "dense+"
    difference: float | None = None  # of top-1, over the common seeds, as a share
    difference_interval: tuple[float, float] | None = None  # 95 %, not adjusted; None with fewer than MIN_SEEDS
    p_value: float | None = None  # adjusted by Holm's method; None where nothing is claimed
    test: str | None = None  # how the interval was made, see stats.Difference
    freedom: float | None = None  # Student's degrees of freedom

    @property
    def is_reference(self) -> bool:
        return self.standing == "reference"


def is_reference(record: Record) -> bool:
    """Whether this is dense+."""
    return _is_row(record, methods.REFERENCE)


def is_baseline(record: Record) -> bool:
    """Whether this is dense, which every method starts from."""
    return _is_row(record, methods.BASELINE) and not is_reference(record)


def _is_row(record: Record, named: tuple[str, dict[str, Any]]) -> bool:
    name, settings = named
    return record["method"] == name and settings.items() <= record["settings"].items() and "given" not in record


def standing_of(record: Record) -> Standing:
    """What a record's row is: a control is the baseline, what a spec calls one, and what prunes nothing; untrained is what
    took no training step of its own."""
    if is_reference(record):
        return "reference"
    ratio = record["cost"]["macs_theoretical"] / record["cost"]["macs_dense"]
    if is_baseline(record) or record.get("control") or abs(ratio - 1) <= SAME_COST:
        return "control"
    return "trained" if _was_trained(record) else "untrained"


def _was_trained(record: Record) -> bool:
    phases = record.get("phases")
    return phases is None or any(one.get("kind", "train") == "train" and one.get("steps", 1) for one in phases)


def compare(
    row: Compared, found: list[Record], reference: list[Record] | None, baseline: list[Record] | None
) -> list[str]:
    """Fills in the comparison of a row's records with those of dense+, or of dense for a row off the shelf: p-values before
    `correct`. Returns what is odd about it, in lines."""
    row.standing = standing_of(found[0])
    odd = _worse_than_before(found)
    if row.is_reference:
        return odd
    if row.standing == "untrained" and baseline and _is_fixed(found, baseline):
        row.compared_with = "dense"
        table = _differences(found, baseline)[:1]
        _fill(row, stats.mcnemar(table[0]))
    else:
        table = _differences(found, reference or [])
        if len(table):
            row.difference = float(table.mean())
        if len(table) >= stats.MIN_SEEDS and table.shape[1] > 1:
            _fill(row, stats.crossed(table))
            row.p_value = row.p_value if row.standing == "trained" else None
    return [*odd, *_far_above(row, found[0], table)]


def _fill(row: Compared, result: stats.Difference) -> None:
    row.difference, row.difference_interval, row.p_value = result.mean, result.interval, result.p_value
    row.test, row.freedom = result.test, result.freedom


def _is_fixed(found: list[Record], baseline: list[Record]) -> bool:
    """Whether only the test images are left to chance: given dense weights, and the same answers for every seed."""
    given = all(record["context"].get("dense_weights") for record in found)
    same = all(len({record["correct"] for record in group}) == 1 for group in (found, baseline))
    return given and same and bool({r["seed"] for r in found} & {r["seed"] for r in baseline})


def _differences(found: list[Record], others: list[Record]) -> np.ndarray:
    """Which images were won (1) and lost (-1), over the seeds that both have: int8 [seeds, images]."""
    theirs = {record["seed"]: record for record in others}
    pairs = [(_correct(ours), _correct(theirs[ours["seed"]])) for ours in found if ours["seed"] in theirs]
    return np.array([ours.astype(np.int8) - other for ours, other in pairs], dtype=np.int8)


def _correct(record: Record, key: str = "correct") -> np.ndarray:
    return unpack(record[key], record["test_images"])


def _worse_than_before(found: list[Record]) -> list[str]:
    """A line for a row whose training made it worse, beyond chance."""
    known = [record for record in found if record.get("untrained_correct")]
    if not known or known[0]["test_images"] < 2:
        return []
    table = np.array([_correct(one).astype(np.int8) - _correct(one, "untrained_correct") for one in known])
    interval = stats.crossed(table).interval if len(table) >= stats.MIN_SEEDS else stats.of_these_networks(table)
    if interval[1] >= 0:
        return []
    before, after = (100 * np.mean([one[key] for one in known]) for key in ("untrained_top1", "top1"))
    return [
        f"training made it worse: top-1 {before:.2f} % before (off the shelf), {after:.2f} % after, more than chance "
        "allows; usually the learning rate is wrong"
    ]


def _far_above(row: Compared, record: Record, table: np.ndarray) -> list[str]:
    """A line for a sparse row that is better than its reference by more than chance allows, and by much."""
    is_sparse = record["cost"]["macs_theoretical"] < (1 - SAME_COST) * record["cost"]["macs_dense"]
    if not is_sparse or row.difference is None or row.difference <= FAR_ABOVE or table.shape[1] < 2:
        return []
    if (row.difference_interval or stats.of_these_networks(table))[0] <= 0:
        return []
    return [
        f"sparse, but {100 * row.difference:.2f} points above {row.compared_with}, more than chance allows; usually the "
        "keep rate or density is not what it says, or the reference had too little training"
    ]


def correct(rows: Sequence[Compared]) -> None:
    """Holm's adjustment of the p-values of a table: over its trained rows, and over its off-the-shelf rows."""
    for test in ("crossed", "mcnemar"):
        tested = [row for row in rows if row.test == test and row.p_value is not None]
        for row, adjusted in zip(tested, stats.holm([row.p_value for row in tested]), strict=True):
            row.p_value = adjusted
