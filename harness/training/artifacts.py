"""What a phase made, kept for other cells that would make the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.models import read_checkpoint
from harness.records import identify
from harness.training.snapshots import MAGIC, Damaged, read_state

CHECKPOINT = "sparse-vit-bench checkpoint 1"  # tells a cell's trained model from the authors' files


@dataclass(frozen=True)
class Artifacts:
    """Files in a folder. context: everything outside of the method's own keys that decides what a phase makes."""

    folder: Path
    context: dict[str, Any]

    def path(self, chain: list[list[Any]]) -> Path:
        """The file of what the last of these phases makes: kind, name, share and key of each."""
        return self.folder / f"{identify(self.context | {'phases': chain})}.state"


def read_given(path: Path, phase: str, convert: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """A state from an artifact or a snapshot, or the weights in a checkpoint: of an earlier run, or the authors', which `convert` knows to
    read. UserError for other files."""
    try:
        with open(path, "rb") as file:
            is_ours = file.read(len(MAGIC)) == MAGIC
        if is_ours:
            content = read_state(path)
            return {key: content[key] for key in ("model", "phases", "log") if key in content}
    except (OSError, Damaged) as error:
        raise UserError(f"phases.{phase}: {getattr(error, 'strerror', None) or error}: {path}") from None
    content = read_checkpoint(path)
    if isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    try:
        return {"model": content["model"] if content.get("format") == CHECKPOINT else convert(content), "phases": []}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"phases.{phase}: {path}: not a checkpoint of this method ({type(error).__name__}: {error})"
        ) from None
