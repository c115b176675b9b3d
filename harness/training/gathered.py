"""What a collecting phase has gathered, to be taken back where a forward runs out of memory halfway and has added to some of it already."""

from __future__ import annotations

import copy
from typing import Any

import torch


class Gathered:
    """A module's buffers, and the state of its phase (see `CollectPhase`; None: no state), as they were when they were saved last."""

    def __init__(self, module: torch.nn.Module, state: Any = None) -> None:
        self.module, self.state = module, state
        self._saved: tuple[dict[str, torch.Tensor], Any] | None = None

    def save(self) -> None:
        self._saved = None  # memory may run out here, too: what an earlier save has is older than what is there now
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        self._saved = buffers, copy.deepcopy(self.state.state_dict()) if self.state is not None else None

    def restore(self) -> None:
        if self._saved is None:
            return
        buffers, state = self._saved
        now = dict(self.module.named_buffers())
        for name, before in buffers.items():
            now[name].copy_(before)
        if self.state is not None:
            self.state.load_state_dict(state)
