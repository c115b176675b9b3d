"""Code that was shown to give the same results: methods/same_results.yaml, which only `bench.py check --same-results` writes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, NonNegativeInt, PositiveInt

from harness.code_digest import PACKAGE
from harness.records import identify, write_atomically
from harness.yamlfile import Strict, read, validate

FILE = PACKAGE / "same_results.yaml"
HEAD = """# Pairs of versions of a method's code that gave the same weights, logits, counts and reports to the bit, by method and revision,
# with the settings under `rows` and no others.
# Written by `python bench.py check --same-results METHOD`, and by nothing else: a line is its evidence.
"""
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Evidence(Strict):
    """Two digests and what was compared. commits: of the old and the new code, "-dirty" where files differed from it; rows: settings
    by label, and nothing is said of others; events: of training steps (after_step), by the same labels; results: SHA-256 of all that was equal."""

    digests: Annotated[list[Digest], Field(min_length=2, max_length=2)]
    commits: Annotated[list[str], Field(min_length=2, max_length=2)]
    date: str
    versions: dict[str, str]
    rows: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    events: dict[str, NonNegativeInt]
    backbones: Annotated[list[str], Field(min_length=1)]
    results: Digest


class Listed(Strict):
    methods: dict[str, dict[PositiveInt, list[Evidence]]] = {}


def are_same(method: str, revision: int, one: str | None, other: str | None, settings: Mapping[str, Any]) -> bool:
    """Whether two versions of a method's code give the same results with these settings (all of them, as records have them): one
    digest, or linked by pairs that were compared with exactly these. An unknown one (None) contradicts nothing."""
    return None in (one, other) or one == other or other in _linked(method, revision, one, identify(dict(settings)))


@cache
def _linked(method: str, revision: int, digest: str, settings: str) -> frozenset[str]:
    """All digests that chains of pairs lead to. settings: what identifies them."""
    pairs = [
        set(evidence.digests) for evidence in listed().methods.get(method, {}).get(revision, [])
        if settings in map(identify, evidence.rows.values())
    ]  # fmt: skip
    found = {digest}
    while more := [pair for pair in pairs if pair & found and not pair <= found]:
        found |= set().union(*more)
    return frozenset(found)


@cache
def listed() -> Listed:
    """The file's content. UserError where it is malformed."""
    return _read(FILE)


def _read(path: Path) -> Listed:
    if not path.exists():
        return Listed()
    content, lines = read(path, "list of same results")
    return validate(Listed, content, str(path), lines)


def add(method: str, revision: int, evidence: Evidence) -> bool:
    """Writes a pair down; False where these two are linked already with all its settings."""
    if all(are_same(method, revision, *evidence.digests, settings) for settings in evidence.rows.values()):
        return False
    found = _read(FILE).model_dump()
    found["methods"].setdefault(method, {}).setdefault(revision, []).append(evidence.model_dump())
    text = yaml.safe_dump(found, sort_keys=True, width=120)
    write_atomically(FILE, (HEAD + text).encode())
    listed.cache_clear(), _linked.cache_clear()
    return True
