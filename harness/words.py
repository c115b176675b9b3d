"""How tables and notes put numbers into words. No torch here."""

from __future__ import annotations

from collections.abc import Mapping


def numbers_told(numbers: Mapping[str, float]) -> str:
    """What else a paper reports of its model, in a line; empty where there is nothing."""
    return ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())
