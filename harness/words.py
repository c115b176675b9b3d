"""How tables and notes put numbers into words. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LONGEST = 200  # characters of another library's message that are shown

TOLD = 0.005  # a standard error above this share of its count is shown


def numbers_told(numbers: Mapping[str, float], errors: Mapping[str, float] | None = None) -> str:
    """What else a paper reports of its model, in a line, with the standard errors that change a digit of it; empty where there is
    nothing."""
    texts = {name: f" ± {error:.3f}" for name, error in (errors or {}).items() if round(error, 3)}
    return ", ".join(f"{name} {value:.3f}{texts.get(name, '')}" for name, value in numbers.items())


def macs_told(macs: float, error: float = 0.0) -> str:
    """A count in GMACs, with its standard error where that is more than 0.5 %."""
    return f"{macs / 1e9:.4f}" + (f" ± {error / 1e9:.2g}" if error > TOLD * macs else "")


def counters_told(cost: Mapping[str, Any]) -> list[str]:
    """A line where only one of the two counters could count what a record's model executes."""
    only = cost.get("only_one")
    return [f"what it executes was counted by torch's dispatcher alone, without fvcore: {only}"] if only else []


def first_line(error: BaseException, lines: int = 1) -> str:
    """The first lines of an error's message that say something; its kind where none does."""
    text = [line.strip() for line in str(error).strip().split("\n") if line.strip()]
    words = " ".join(text[:lines]) or type(error).__name__
    return words if len(words) <= LONGEST else words[:LONGEST] + " ..."
