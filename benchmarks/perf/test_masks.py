"""What dynamic sparse training adds to DeiT-B's training. Targets on two cores (`--threads 2`): an update at most 6 s, and under 1 % of the time
at the authors' 7,000 steps of 1,024 images between updates, masking after every step included."""

from __future__ import annotations

import pytest
import timm
import torch

import methods
from methods.core.masking import apply_masks, mask_densities, masked_layers
from methods.svite.criteria import Growth

METHOD = methods.create("svite", density=0.4)


@pytest.fixture(scope="module")
def sparse():
    """With gradients of all weights."""
    torch.manual_seed(0)
    model = METHOD.sparsify(timm.create_model("deit_base_patch16_224"))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


@torch.no_grad()
def test_update(timed, device, sparse):
    """Of all masks; the number of weights stays."""
    sparse.to(device)
    before = mask_densities(sparse)
    moved = timed("masks of DeiT-B", METHOD.pattern.renew, sparse, 0.3, Growth("gradient"), None)
    assert moved.dropped > 0
    assert mask_densities(sparse) == before


@torch.no_grad()
def test_masking(timed, device, sparse):
    """After every step."""
    timed("masks of DeiT-B", apply_masks, sparse.to(device))
    assert not any(bool(layer.weight[~layer.weight_mask].any()) for layer in masked_layers(sparse).values())


def test_two_images(timed, device, sparse):
    """Forward and backward: 1/512 of the authors' step."""
    images = torch.randn(2, 3, 224, 224, device=device)
    model = sparse.to(device).train()
    timed("forward and backward of DeiT-B, 2 images", lambda: model(images).sum().backward())
    assert bool(model.head.weight.grad.isfinite().all())
