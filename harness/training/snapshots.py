"""The state of a training that is under way, kept in files: whole or not there, checked when read, the last few kept."""

from __future__ import annotations

import hashlib
import io
import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.cluster import agreed
from harness.errors import UserError
from harness.records import write_atomically
from methods.core.contract import CollectPhase, Phase, TrainPhase
from methods.core.objective import Frozen

MAGIC = b"sparse-vit-bench state 1\n"


class Damaged(ValueError):
    """A file is not what was written; the message says which and how."""


def save_state(path: Path, content: dict[str, Any]) -> None:
    """Writes tensors and plain values so that the file is whole, with a checksum, or not there. UserError where it cannot be."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    payload = buffer.getbuffer()
    write_atomically(path, MAGIC, hashlib.sha256(payload).digest(), payload)


def read_state(path: Path) -> dict[str, Any]:
    """What was written, tensors on the CPU. Damaged where the file is not whole; OSError where it cannot be read."""
    content = path.read_bytes()
    start = len(MAGIC) + hashlib.sha256().digest_size
    payload = memoryview(content)[start:]
    if not content.startswith(MAGIC) or hashlib.sha256(payload).digest() != content[len(MAGIC) : start]:
        raise Damaged(f"{path}: not a whole file of this project (its checksum is wrong)")
    try:
        return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: the state holds something else than tensors and plain values: {first}") from None


@dataclass
class Snapshots:
    """Files step-N.state in a folder. every_steps, every_seconds: when the next one is due; None: not by that."""

    folder: Path
    every_steps: int | None = None
    every_seconds: float | None = 600.0
    keep: int = 2
    _last: float = field(default_factory=time.monotonic, init=False)
    _is_tried: bool = field(default=False, init=False)

    def is_due(self, step: int) -> bool:
        """Whether to save after that many steps."""
        by_steps = self.every_steps is not None and step % self.every_steps == 0
        return by_steps or (self.every_seconds is not None and time.monotonic() - self._last >= self.every_seconds)

    def save(self, number: int, content: dict[str, Any]) -> None:
        """number: grows from one to the next. UserError where it cannot be written; then the earlier ones are still there."""
        path = self.folder / f"step-{number:09d}.state"
        save_state(path, content)
        if not self._is_tried:  # what cannot be read would be missed only when it is needed
            try:
                read_state(path)
            except UserError:
                path.unlink()
                raise
            self._is_tried = True
        self._last = time.monotonic()
        for path in self._files()[self.keep :]:
            path.unlink(missing_ok=True)

    def newest(self) -> Iterator[tuple[Path, dict[str, Any] | None]]:
        """Files from the newest on with their content, None where it is damaged; such a file is removed."""
        for path in self._files():
            try:
                content = read_state(path)
            except Damaged:
                path.unlink()
                yield path, None
            else:
                yield path, content

    def remove(self) -> None:
        """When the training is done."""
        for path in (*self._files(), *self.folder.glob(".step-*")):  # the latter: of processes killed while writing
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.state"), reverse=True)


def state_of(model: nn.Module, phases: list[Phase]) -> dict[str, Any]:
    """What the phases and the model hold: weights and buffers, without teachers (which never change), and the phases' own states.
    Tensors that are shared are saved once."""
    return {
        "model": model.state_dict(),
        "phases": [
            {
                "module": _without_teachers(_module_of(phase)) if _module_of(phase) is not None else None,
                "state": phase.state.state_dict() if phase.state is not None else None,
            }
            for phase in phases
        ],
    }


def restore(model: nn.Module, phases: list[Phase], state: dict[str, Any]) -> None:
    """The opposite; phases beyond those saved are left as they are. UserError where the state is of something else."""
    try:
        model.load_state_dict(state["model"])
        for phase, saved in zip(phases, state["phases"], strict=False):
            module = _module_of(phase)
            if module is not None and saved["module"] is not None:
                missing, unexpected = module.load_state_dict(saved["module"], strict=False)
                lost = sorted(set(missing) - _teacher_keys(module)) + unexpected
                if lost:
                    raise KeyError(lost[0])
            if phase.state is not None and saved["state"] is not None:
                phase.state.load_state_dict(saved["state"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        first = " ".join(str(error).split())[:200]
        raise agreed(UserError(f"the saved state does not fit this model: {first}")) from None


def _module_of(phase: Phase) -> nn.Module | None:
    if isinstance(phase, TrainPhase):
        return phase.objective
    return phase.module if isinstance(phase, CollectPhase) else None


def _teacher_keys(module: nn.Module) -> set[str]:
    prefixes = [name + "." for name, inner in module.named_modules() if isinstance(inner, Frozen)]
    return {key for key in module.state_dict() if any(key.startswith(prefix) for prefix in prefixes)}


def _without_teachers(module: nn.Module) -> dict[str, Any]:
    left_out = _teacher_keys(module)
    return {key: value for key, value in module.state_dict().items() if key not in left_out}
