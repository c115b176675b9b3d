"""Pieces of a training step: DynamicViT's masked softmax, forward and backward, and its Gumbel noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from methods.core.noise import Noise
from methods.dynamicvit.model import masked_softmax

from . import ALIVE, HEADS, PATCHES


def hard_softmax(logits: Tensor, policy: Tensor) -> Tensor:
    """Minus infinity at the dropped keys: gives no gradient to the policy, and does not let a dropped token see itself."""
    return logits.masked_fill(policy.transpose(1, 2).unsqueeze(1) == 0, -math.inf).softmax(dim=-1)


def full_softmax(logits: Tensor, policy: Tensor) -> Tensor:
    """Every key: what a dense network trains with."""
    return logits.softmax(dim=-1)


SOFTMAXES = {"masked": masked_softmax, "hard": hard_softmax, "full": full_softmax}


@pytest.mark.parametrize("softmax", SOFTMAXES)
@pytest.mark.parametrize("batch", [8])
def test_softmax(timed, device, batch, softmax):
    """CLS and the 137 patches after the first stage stay, of 197 tokens."""
    logits = torch.randn(batch, HEADS, 1 + PATCHES, 1 + PATCHES, device=device, requires_grad=True)
    kept = torch.arange(1 + PATCHES, device=device) <= ALIVE[1]
    policy = kept.float().view(1, -1, 1).repeat(batch, 1, 1).requires_grad_()
    above = torch.randn_like(logits)

    def step():
        logits.grad = policy.grad = None
        weights = SOFTMAXES[softmax](logits, policy)
        weights.backward(above)
        return weights.detach()

    weights = timed(f"softmax of training, forward and backward, batch {batch}", step)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(batch, HEADS, 1 + PATCHES, device=device))
    assert (weights[..., kept, :][..., ~kept].amax() < 1e-6) == (softmax != "full")
    assert logits.grad.abs().sum() > 0
    assert (policy.grad is not None) == (softmax == "masked")


def by_counter(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    return Noise(0, 0, keys).gumbel("stage0", *shape)


def by_generator(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """torch's own stream: depends on all that was drawn before."""
    return -torch.log(-torch.log(torch.rand(len(keys), *shape, device=keys.device)))


def by_exponential(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """As torch.nn.functional.gumbel_softmax does it."""
    return -torch.empty(len(keys), *shape, device=keys.device).exponential_().log()


NOISES = {"counter": by_counter, "generator": by_generator, "exponential": by_exponential}


@pytest.mark.parametrize("source", NOISES)
@pytest.mark.parametrize("batch", [8, 128])
def test_gumbel(timed, device, batch, source):
    """Two numbers per patch; their mean must be Euler's constant, to four standard errors."""
    keys, shape = torch.arange(batch, device=device), (PATCHES, 2)
    noise = timed(f"Gumbel noise of {PATCHES} patches, batch {batch}", NOISES[source], keys, shape)
    assert noise.shape == (batch, *shape)
    assert abs(float(noise.mean()) - 0.57722) < 4 * math.pi / math.sqrt(6 * noise.numel())
    if source == "counter":
        torch.testing.assert_close(noise[-1:], by_counter(keys[-1:], shape))
