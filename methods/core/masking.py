"""Weights under masks: what methods share that set weights to zero, once or again and again during training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MaskedLinear(nn.Linear):
    """Modifies nn.Linear: evaluation uses weight x `weight_mask` (bool, of a shape that broadcasts to the weight's).

    Training uses the weight as it is: whoever trains masks it after every step (`apply_masks`), so gradients reach masked
    weights too, which growing them back needs. Averages of weights, which no step masks, are masked here all the same.
    """

    weight_mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight if self.training else self.weight * self.weight_mask, self.bias)


class MaskedConv2d(nn.Conv2d):
    """Modifies nn.Conv2d as `MaskedLinear` does nn.Linear."""

    weight_mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight if self.training else self.weight * self.weight_mask, self.bias)


Masked = MaskedLinear | MaskedConv2d
_MASKED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: MaskedLinear, nn.Conv2d: MaskedConv2d}
_PLAIN = {masked: plain for plain, masked in _MASKED.items()}


def maskable(model: nn.Module, is_wanted: Callable[[str], bool] = lambda name: True) -> dict[str, nn.Module]:
    """The linear layers and convolutions of a model by the names of their weights, in the model's order. is_wanted: of a name."""
    layers = {f"{name}.weight": layer for name, layer in model.named_modules() if type(layer) in _MASKED}
    return {name: layer for name, layer in layers.items() if is_wanted(name)}


def mask_layer(layer: nn.Module, mask: Tensor) -> None:
    """Puts the layer's weight under a mask (bool, broadcastable to the weight), a buffer of the layer."""
    layer.__class__ = _MASKED[type(layer)]
    layer.register_buffer("weight_mask", mask.to(layer.weight.device))
    _apply(layer)


def masked_layers(model: nn.Module) -> dict[str, Masked]:
    """The layers under masks by the names of their weights."""
    return {f"{name}.weight": layer for name, layer in model.named_modules() if type(layer) in _PLAIN}


def apply_masks(model: nn.Module) -> None:
    """Sets all masked weights to zero, in place."""
    for layer in masked_layers(model).values():
        _apply(layer)


def mask_densities(model: nn.Module) -> dict[str, float]:
    """The share of weights that the mask keeps, by the weight's name; where masks were baked, the share that they
    kept."""
    masks = {name: layer.weight_mask.double().mean() for name, layer in masked_layers(model).items()}
    baked = {
        f"{name}.weight": layer.weights_kept.double() / layer.weight.numel()
        for name, layer in model.named_modules()
        if hasattr(layer, "weights_kept")
    }
    return {name: float(share) for name, share in (masks | baked).items()}


def bake(model: nn.Module) -> None:
    """Masks the weights for good: plain layers again, with zeros in their weights and no mask. How many each kept is in
    a buffer, `weights_kept`: a weight that is on may be zero, too, so the weights do not say it, and a state dict
    should."""
    for layer in masked_layers(model).values():
        _apply(layer)
        kept = layer.weight_mask.sum() * (layer.weight.numel() // layer.weight_mask.numel())
        del layer.weight_mask
        layer.register_buffer("weights_kept", kept.long())
        layer.__class__ = _PLAIN[type(layer)]


@torch.no_grad()
def _apply(layer: nn.Module) -> None:
    layer.weight.mul_(layer.weight_mask)
