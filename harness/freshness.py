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
EARLIER = "earlier"  # version of a plug-in: other code, whose records have other ids, so that it is not made again
WORST = (OTHER, EARLIER, UNRECORDED, ABSENT, THIS)  # what a row is of whose records one is
MARK = "§"
REDO = "--stale redo makes them again"
DELETE = "delete its records to drop the row"

Code = Mapping[str, str | None]
Record = Mapping[str, Any]


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


def _state(method: str, digest: str | None, plugin_code: str | None = None) -> str:
    """THIS very code; OTHER code; EARLIER: another version of a plug-in than is here; UNRECORDED: a record without a digest;
    ABSENT: the method is not here."""
    if digest is None:
        return UNRECORDED
    if not source_files(method):
        return ABSENT
    if digest == code_digest(method):
        return THIS
    return OTHER if plugin_code in (None, plugin_part(method).get("plugin_code")) else EARLIER


def _result_state(
    method: str, revision: int, settings: Mapping[str, Any], digest: str | None, plugin_code: str | None = None
) -> str:
    """The same of results, which are of THIS code where they are of what gave the same with these settings."""
    found = _state(method, digest, plugin_code)
    is_same = found == OTHER and same_results.are_same(method, revision, digest, code_digest(method), settings)
    return THIS if is_same else found


def worst(states: Iterable[str]) -> str:
    return min(states, key=WORST.index, default=UNRECORDED)


def train_state(record: Record) -> str:
    """Of a train record: of the method's code, and of the code that trained the dense network which it began with."""
    code, (dense, settings) = record.get("code", {}), methods.BASELINE
    states = [failure_state(record)]
    if "dense" in code:
        found = _state(dense, code["dense"])
        if found == OTHER:
            whole = methods.create(dense, **settings).settings.model_dump(mode="json")
            found = _result_state(dense, record["context"]["dense_revision"], whole, code["dense"])
        states.append(found)
    return worst(states)


def failure_state(record: Record) -> str:
    """Of the method's code alone, in a train record or of a failed attempt."""
    digest = record.get("code", {}).get("digest")
    return _result_state(record["method"], record["revision"], record["settings"], digest, record.get("plugin_code"))


def measure_state(record: Record, train: Record) -> str:
    """Of a measure record: of the very code that was timed (the same results may take another time), which must have held the
    weights that are there now. train: the record of these."""
    code, trained = record.get("code", {}), train.get("code", {}).get("digest")
    method, revision, settings = (train[key] for key in ("method", "revision", "settings"))
    found = _state(method, code.get("digest"), train.get("plugin_code"))
    if found != EARLIER and not same_results.are_same(method, revision, code.get("trained"), trained, settings):
        return OTHER
    return found


def survey_state(record: Record) -> str:
    """Of a survey's measure record: of the very code that was timed."""
    facts = record["survey"]
    return _state(facts["method"], record.get("code", {}).get("digest"), facts.get("plugin_code"))


@dataclass(frozen=True)
class Maker:
    """The code that makes a trial's weights. code: its digest, and under "dense" that of the code which trained the dense network
    that it begins with, None where nobody knows."""

    method: str
    revision: int
    settings: Mapping[str, Any]
    code: Code
    dense_revision: int
    dense_settings: Mapping[str, Any]

    def made(self, saved: Code | None) -> bool:
        """Whether that may be used as this code's own: what says nothing of its code may."""
        names = {
            "digest": (self.method, self.revision, self.settings),
            "dense": (methods.BASELINE[0], self.dense_revision, self.dense_settings),
        }

        def is_made(part: str, digest: str | None) -> bool:
            method, revision, settings = names[part]
            return same_results.are_same(method, revision, (saved or {}).get(part), digest, settings)

        return all(is_made(part, digest) for part, digest in self.code.items())


def closing(kept: list[str]) -> str:
    """The line of a run that kept what other code has made."""
    return f"{len(kept)} {'row was' if len(kept) == 1 else 'rows were'} made by other code ({'; '.join(kept)}): {REDO}"


def mark(found: str) -> str:
    """What stands behind a row's label, or a time."""
    return f" {MARK}" if found in (OTHER, EARLIER) else ""


def public(found: str) -> str:
    """For CSV: this, other or unknown."""
    if found == EARLIER:
        return OTHER
    return found if found in (THIS, OTHER) else "unknown"


def notes(rows: Iterable[tuple[str, str, str]]) -> list[str]:
    """Lines under a table. rows: label, method and state, of each row or time."""
    rows = list(rows)
    others, earlier = (
        list(dict.fromkeys(label for label, _, found in rows if found == which)) for which in (OTHER, EARLIER)
    )
    before = len({label for label, _, found in rows if found == UNRECORDED})
    absent = list(dict.fromkeys(method for _, method, found in rows if found == ABSENT))
    were = "row was" if before == 1 else "rows were"
    lines = {
        f"{MARK} made by other code than what is here: {', '.join(others)}; {REDO}": others,
        f"{MARK} made by an earlier version of the plug-in: {', '.join(earlier)}; {DELETE}": earlier,
        f"{before} {were} made before digests of code were recorded": before,
        f"made by code that is not here, so nobody knows whether it has changed: {', '.join(absent)}": absent,
    }
    return [line for line, is_needed in lines.items() if is_needed]
