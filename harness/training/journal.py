"""The log of a training: a JSON line per event in results/logs/ID.jsonl, and TensorBoard's files beside it, if wanted."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.records import write_atomically

STEPPED = "step"


class Journal:
    """Lines of an append-only file. With no path it does nothing, as in all processes but the first."""

    def __init__(self, path: Path | None = None, tensorboard: bool = False) -> None:
        self.path, self.tensorboard = path, tensorboard and path is not None
        self._writers: dict[int, Any] = {}  # of TensorBoard, by the phase's number
        self._begun = (0, 0)

    @property
    def is_kept(self) -> bool:
        return self.path is not None

    def go_on(self, phase: int, step: int) -> None:
        """Drops the lines after that step of that phase: they will be written again. (0, 0) begins anew."""
        if self.path is None:
            return
        kept = []
        if self.path.exists() and (phase, step) != (0, 0):
            for line in self.path.read_text(encoding="utf-8").splitlines():
                entry = _entry(line)
                if entry and (entry.get("phase_number", 0), entry.get(STEPPED, 0)) <= (phase, step):
                    kept.append(line + "\n")
        write_atomically(self.path, "".join(kept).encode())
        self._begun = (phase, step)

    def write(self, event: str, **content: Any) -> None:
        """A line. UserError where the file cannot be written."""
        if self.path is None:
            return
        self._append(json.dumps({"event": event, **_finite(content)}, ensure_ascii=False) + "\n")
        if self.tensorboard and STEPPED in content:
            writer = self._writer(content["phase_number"])
            for name, value in {**content, **content.get("terms", {})}.items():
                if isinstance(value, float) and math.isfinite(value):
                    writer.add_scalar(f"{content['phase']}/{name}", value, content[STEPPED])

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers = {}

    def _append(self, text: str) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {(error.strerror or str(error)).lower()}") from error

    def _writer(self, phase: int) -> Any:
        """TensorBoard's, with a folder per phase; in the one that goes on, what comes after the step it goes on from is void."""
        if phase not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            purge = self._begun[1] + 1 if phase == self._begun[0] else None
            folder = self.path.with_suffix(".tensorboard") / f"phase{phase}"
            self._writers[phase] = SummaryWriter(os.fspath(folder), purge_step=purge)
        return self._writers[phase]


def require_tensorboard() -> None:
    """UserError where the package is not installed."""
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise UserError("train.tensorboard: the package is not installed; pip install tensorboard") from None


def _entry(line: str) -> dict[str, Any] | None:
    """The line's content; None for one that was cut off."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _finite(value: Any) -> Any:
    """JSON has no numbers for infinity and NaN: they become words."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
