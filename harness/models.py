"""Builds backbones and rebuilds the models of cells from their weights."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from harness import cost
from harness.errors import UserError
from harness.spec import Backbone
from harness.words import first_line
from methods.core.registry import unknown


def build(
    backbone: Backbone, classes: int | None, image_size: int | None, seed: int, drop_path: float = 0.0
) -> nn.Module:
    """The backbone with random weights, a function of the seed. UserError for a name or an argument that timm lacks."""
    chosen = {"num_classes": classes, "img_size": image_size, "drop_path_rate": drop_path or None}
    kwargs = {key: value for key, value in chosen.items() if value is not None} | backbone.kwargs
    if not timm.is_model(backbone.name):
        raise UserError(unknown("backbone", backbone.name, timm.list_models()))
    torch.manual_seed(seed)
    try:
        return timm.create_model(backbone.name, **kwargs)
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        raise UserError(f"backbone {backbone.name} with {kwargs}: {first_line(error)}") from None


def require_vit(model: nn.Module, name: str) -> None:
    """UserError unless the model is a vision transformer."""
    if not isinstance(model, VisionTransformer):
        raise UserError(f"backbone {name}: a {type(model).__name__}; only timm's VisionTransformer is supported yet")


def require_countable(model: nn.Module, name: str) -> None:
    """UserError unless the model is a vision transformer for RGB images whose multiply-adds the formula knows."""
    require_vit(model, name)
    images = torch.zeros(1, 3, *model.patch_embed.img_size)
    try:
        agrees, formula, run = cost.dense_formula_holds(model, images)
    except (RuntimeError, AttributeError) as error:
        raise UserError(f"backbone {name}: cannot be counted: {first_line(error)}") from None
    if not agrees:
        raise UserError(f"backbone {name}: the formula gives {formula:.4g} multiply-adds and running it {run:.4g}: it has parts "
                        "that the formula does not know")  # fmt: skip


def load_weights(model: nn.Module, weights: str, backbone: Backbone, folder: Path) -> str:
    """Loads dense weights, timm's or a file's, and returns what tells them from others. UserError where it fails."""
    if weights == "timm":
        expected = (model.pretrained_cfg or {}).get("num_classes")
        if expected != model.num_classes:
            raise UserError(f"dense.weights: timm's {backbone.name} has {expected} classes, the data has {model.num_classes}; "
                            "train the dense network (weights: null) or give a file")  # fmt: skip
        try:
            size = model.patch_embed.img_size  # timm resamples the position embedding for other sizes
            pretrained = timm.create_model(backbone.name, pretrained=True, **({"img_size": size} | backbone.kwargs))
            model.load_state_dict(pretrained.state_dict())
        except Exception as error:  # the hub's client raises errors of many kinds
            raise UserError(f"dense.weights: timm's weights for {backbone.name} cannot be loaded ({first_line(error)}); "
                            "check the network, or give a file") from None  # fmt: skip
    else:
        path = next((p for p in (Path(weights), folder / weights) if p.is_file()), None)
        if path is None:
            raise UserError(f"dense.weights {weights}: no such file (and not the word timm)")
        try:
            model.load_state_dict(checkpoint_filter_fn(read_state(path), model))
        except UserError:
            raise
        except RuntimeError as error:
            raise UserError(f"dense.weights {weights}: does not fit {backbone.name}: {first_line(error, 2)}") from None
    return f"{weights if weights == 'timm' else 'file'}:{state_digest(model.state_dict())}"


def read_state(path: Path) -> dict[str, Any]:
    """The state dict in a .safetensors or torch file, bare or under the key "model" or "state_dict"."""
    content = read_checkpoint(path)
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), dict):
            return content[key]
    return content


def read_checkpoint(path: Path) -> dict[str, Any]:
    """All that is in a .safetensors or torch file: tensors, plain values, and the arguments that DeiT's script saves. UserError for other
    files."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: not a readable checkpoint ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return content


def state_digest(state: dict[str, Any]) -> str:
    """SHA-256 over names, shapes and values of a state dict; the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
