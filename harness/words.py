"""How tables and notes put numbers into words. No torch here."""

from __future__ import annotations

from collections.abc import Mapping

TOLD = 0.005  # a standard error above this share of its count is shown


def numbers_told(numbers: Mapping[str, float], errors: Mapping[str, float] | None = None) -> str:
    """What else a paper reports of its model, in a line, with the standard errors that change a digit of it; empty where there is
    nothing."""
    texts = {name: f" ± {error:.3f}" for name, error in (errors or {}).items() if round(error, 3)}
    return ", ".join(f"{name} {value:.3f}{texts.get(name, '')}" for name, value in numbers.items())


def macs_told(macs: float, error: float = 0.0) -> str:
    """A count in GMACs, with its standard error where that is more than 0.5 %."""
    return f"{macs / 1e9:.4f}" + (f" ± {error / 1e9:.2g}" if error > TOLD * macs else "")
