"""What a phase made, kept for other cells that would make the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.models import read_state as read_weights
from harness.records import identify
from harness.training.snapshots import MAGIC, Damaged, read_state


@dataclass(frozen=True)
class Artifacts:
    """Files in a folder. context: everything outside of the method's own keys that decides what a phase makes."""

    folder: Path
    context: dict[str, Any]

    def path(self, chain: list[list[Any]]) -> Path:
        """The file of what the last of these phases makes: kind, name, share and key of each."""
        return self.folder / f"{identify(self.context | {'phases': chain})}.state"


def read_given(path: Path, phase: str) -> dict[str, Any]:
    """A state from an artifact or a snapshot, or the weights in a checkpoint. UserError for other files."""
    try:
        with open(path, "rb") as file:
            is_ours = file.read(len(MAGIC)) == MAGIC
        if is_ours:
            content = read_state(path)
            return {key: content[key] for key in ("model", "phases", "log") if key in content}
    except (OSError, Damaged) as error:
        raise UserError(f"phases.{phase}: {getattr(error, 'strerror', None) or error}: {path}") from None
    return {"model": read_weights(path), "phases": []}
