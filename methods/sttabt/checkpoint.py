"""The authors' checkpoints, which have Hugging Face's names, as state dicts of our models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

OUTSIDE = {
    "embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.", "layernorm.": "norm.",
}  # fmt: skip
INSIDE = {
    "layernorm_before.": "norm1.", "attention.output.dense.": "attn.proj.", "layernorm_after.": "norm2.", "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
}  # fmt: skip
DEAD = re.compile(r"encoder\.layer\.\d+\.(concrete_prop_p_logit|ltp)")  # left in files by code that is not used
QKV = ("query", "key", "value")


def converted(content: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict of both networks (a file of the second training) or of the approximation network alone (of the first). Names that are not known stay, so
    that loading tells of them."""
    state = {name.removeprefix("module."): value for name, value in content.get("model", content).items()}
    state = {name: value for name, value in state.items() if not DEAD.search(name)}
    if "p_logit" in state or "blocks.0.attn.qkv.weight" in state:
        return state  # one of our own
    if any(name.startswith("approx_bert.") for name in state):
        approx = _under(state, "approx_bert.")
        own = {name: value for name, value in state.items() if not name.startswith("approx_bert.")}
        return dict(_network(own)) | dict(_approximation(approx))
    if any(name.startswith("transfer_") for name in state):
        return dict(_approximation(state))
    return dict(_network(state))


def _approximation(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, value in _network(state):
        yield (name.replace("transfer_", "transfer.", 1) if name.startswith("transfer_") else f"approx.{name}"), value


def _network(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    thresholds: dict[int, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        head, _, rest = name.partition(".")
        if head not in ("bert", "vit"):
            yield (f"head.{rest}" if head == "classifier" else name), value
        elif not rest.startswith("encoder.layer."):
            yield _renamed(rest, OUTSIDE), value
        else:
            index, _, inside = rest.removeprefix("encoder.layer.").partition(".")
            kind, _, which = inside.removeprefix("attention.attention.").rpartition(".")
            if inside == "p_logit":
                thresholds[int(index)] = value.reshape(())
            elif kind in QKV:
                joined.setdefault(f"blocks.{index}.attn.qkv.{which}", {})[kind] = value
            else:
                yield f"blocks.{index}.{_renamed(inside, INSIDE)}", value
    for name, parts in joined.items():
        yield name, torch.cat([parts[kind] for kind in QKV])
    if thresholds:
        yield "p_logit", torch.stack([thresholds[index] for index in range(len(thresholds))])


def _renamed(name: str, names: dict[str, str]) -> str:
    return next((new + name.removeprefix(old) for old, new in names.items() if name.startswith(old)), name)


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
