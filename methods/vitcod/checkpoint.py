"""The authors' checkpoints as state dicts of our models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods.vitcod.masks import read_masks
from methods.vitcod.model import DECIDED, EVERYTHING

COLLECTED = ("attention_sum", "num_attention")  # left in files by their collection of attention maps


def converted(content: dict[str, Any], mask_path: str | None) -> dict[str, Tensor]:
    """Their names are timm's, with the auto-encoder's layers beside qkv; their masks are in files of their own, so that a checkpoint from training
    under masks needs mask_path. Names that the model does not have stay, so that loading tells of them."""
    state = {name.removeprefix("module."): value for name, value in content.get("model", content).items()}
    state = {name: value for name, value in state.items() if not name.endswith(COLLECTED)}
    if "masks_are" in state:
        return state  # one of our own
    blocks = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    kept = _given(mask_path) if mask_path else _everything(state, blocks)
    for index in range(blocks):
        state[f"blocks.{index}.attn.kept"] = kept[index]
        state[f"blocks.{index}.attn.average"] = torch.zeros(kept.shape[1:])
    return state | {"masks_are": torch.tensor(DECIDED if mask_path else EVERYTHING)}


def _given(mask_path: str) -> Tensor:
    return read_masks(Path(mask_path), np.load(mask_path, mmap_mode="r", allow_pickle=False).shape)


def _everything(state: dict[str, Tensor], blocks: int) -> Tensor:
    """Masks [L, H, N, N] that keep everything. ValueError where the file does not say how many heads there are."""
    coder = next((value for name, value in state.items() if ".attn.encoder_" in name and value.ndim == 2), None)
    if coder is None:
        raise ValueError("it has no auto-encoder; with svd_type none, give its masks by mask_path")
    tokens = state["pos_embed"].shape[1]
    return torch.ones(blocks, coder.shape[1], tokens, tokens, dtype=torch.bool)
