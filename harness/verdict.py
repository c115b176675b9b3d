"""Says in one line why a method is not as fast as its formula: what is not skipped, or where the time goes. No torch here."""

from __future__ import annotations

from collections.abc import Mapping

REALISED_LIMIT = 0.8  # of the theoretical speed-up; a row below it gets a line
SKIPPED_LIMIT = 1.02  # of the theoretical multiply-adds; more executed than this counts as not skipped

Parts = Mapping[str, float]


def not_skipped(dense: float, theoretical: float, executed: float, parts: Mapping[str, Parts]) -> str | None:
    """What the formula saves and the run does not; None where it skips what it should. parts: theoretical and executed
    multiply-adds by part of the network."""
    if executed <= SKIPPED_LIMIT * theoretical:
        return None
    theory, run = parts.get("theoretical", {}), parts.get("executed", {})
    if executed - run.get("overhead", 0.0) >= 0.999 * dense:
        return f"executes as many multiply-adds as dense, overhead aside ({executed / 1e9:.4f} G, theory {theoretical / 1e9:.4f}): masked, not skipped"
    more = {
        name: (macs, theory.get(name, 0.0))
        for name, macs in run.items()
        if macs > SKIPPED_LIMIT * theory.get(name, 0.0)
    }
    listed = ", ".join(f"{name} ({a / 1e9:.4f} G run, {b / 1e9:.4f} in theory)" for name, (a, b) in more.items())
    return f"does not skip all: {listed or f'{executed / 1e9:.4f} G run, {theoretical / 1e9:.4f} in theory'}"


def verdict(unskipped: str | None, realised: Mapping[str, float], operations: tuple[int, int] | None) -> str | None:
    """The line for a row: what `not_skipped` says, or, where less than REALISED_LIMIT was realised although everything is
    skipped, where the time goes. realised: by the conditions' name; operations: of the dense and the deployed forward."""
    low = {name: share for name, share in realised.items() if share < REALISED_LIMIT}
    shares = ", ".join(f"{share:.2f} at {name}" for name, share in low.items())
    if unskipped:
        return unskipped + (f"; realised {shares}" if low else "")
    if not low:
        return None
    count = f" ({operations[1]} operations a forward, dense {operations[0]})" if operations else ""
    return f"realised {shares}: all that is counted is skipped, so the reason is not in the multiply-adds{count}"
