"""Whether a record was made by the code that is here: digests of methods' code, compared. No torch, and no plug-in is imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import methods
from harness import same_results
from harness.code_digest import digest_of, own_digest
from methods.core.registry import is_builtin, source_files

THIS, OTHER, UNRECORDED, ABSENT = "this", "other", "unrecorded", "absent"
WORST = (OTHER, UNRECORDED, ABSENT, THIS)  # what a row is of whose records one is
MARK = "§"
REDO = "--stale redo makes them again"

Code = Mapping[str, str | None]


@cache
def code_digest(method: str) -> str | None:
    """Of all code that a method runs on in `methods` and in its plug-in; None where it is not here. Kept from when it is first asked
    for: a run goes on with the code that it began with."""
    files = source_files(method)
    return digest_of(*files) if files else None


@cache
def plugin_part(method: str) -> dict[str, str]:
    """What tells versions of a plug-in apart in ids: the digest of its own files. Nothing for built-in methods, which have revisions."""
    files = () if is_builtin(method) else source_files(method)
    return {"plugin_code": own_digest(*files)} if files else {}


def state(method: str, revision: int, digest: str | None) -> str:
    """THIS code, or what gave the same results as it; OTHER code; UNRECORDED: a record without a digest; ABSENT: the method is not here."""
    if digest is None:
        return UNRECORDED
    if not source_files(method):
        return ABSENT
    return THIS if same_results.are_same(method, revision, digest, code_digest(method)) else OTHER


def worst(states: Iterable[str]) -> str:
    return min(states, key=WORST.index, default=UNRECORDED)


def train_state(record: Mapping[str, Any]) -> str:
    """Of a train record: of the method's code, and of the code that trained the dense network which it began with."""
    code = record.get("code", {})
    states = [state(record["method"], record["revision"], code.get("digest"))]
    if "dense" in code:
        states.append(state(methods.BASELINE[0], record["context"]["dense_revision"], code["dense"]))
    return worst(states)


def measure_state(record: Mapping[str, Any], method: str, revision: int, trained: Code | None = None) -> str:
    """Of a measure record: of the code that was timed, which must have held the very weights that are there now. trained: what
    the train record says of its code."""
    code = record.get("code", {})
    if trained is not None and not same_results.are_same(method, revision, code.get("trained"), trained.get("digest")):
        return OTHER
    return state(method, revision, code.get("digest"))


def failure_state(record: Mapping[str, Any]) -> str:
    """Of a failed attempt."""
    return state(record["method"], record["revision"], record.get("code", {}).get("digest"))


@dataclass(frozen=True)
class Maker:
    """The code that makes a trial's weights. code: its digest, and under "dense" that of the code which trained the dense network
    that it begins with, None where nobody knows."""

    method: str
    revision: int
    code: Code
    dense_revision: int = 1

    def made(self, saved: Code | None) -> bool:
        """Whether that may be used as this code's own: what says nothing of its code may."""
        names = {"digest": (self.method, self.revision), "dense": (methods.BASELINE[0], self.dense_revision)}
        return all(
            same_results.are_same(*names[part], (saved or {}).get(part), digest) for part, digest in self.code.items()
        )


def closing(kept: list[str]) -> str:
    """The line of a run that kept what other code has made."""
    return f"{len(kept)} {'row was' if len(kept) == 1 else 'rows were'} made by other code ({'; '.join(kept)}): {REDO}"


def mark(found: str) -> str:
    """What stands behind a row's label, or a time."""
    return f" {MARK}" if found == OTHER else ""


def public(found: str) -> str:
    """For CSV: this, other or unknown."""
    return found if found in (THIS, OTHER) else "unknown"


def notes(rows: Iterable[tuple[str, str, str]]) -> list[str]:
    """Lines under a table. rows: label, method and state, of each row or time."""
    rows = list(rows)
    others = list(dict.fromkeys(label for label, _, found in rows if found == OTHER))
    before = len({label for label, _, found in rows if found == UNRECORDED})
    absent = list(dict.fromkeys(method for _, method, found in rows if found == ABSENT))
    were = "row was" if before == 1 else "rows were"
    lines = {
        f"{MARK} made by other code than what is here: {', '.join(others)}; {REDO}": others,
        f"{before} {were} made before digests of code were recorded": before,
        f"made by code that is not here, so nobody knows whether it has changed: {', '.join(absent)}": absent,
    }
    return [line for line, is_needed in lines.items() if is_needed]
