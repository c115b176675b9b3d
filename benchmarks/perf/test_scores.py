"""Scores of evaluation: DynamicViT's predictor, and the dice of random removal at the same token counts."""

from __future__ import annotations

import pytest
import torch

from methods.core.noise import Noise, image_keys
from methods.dynamicvit.model import ScorePredictor

from . import ALIVE, BATCHES, WIDTH

pytestmark = pytest.mark.usefixtures("inference")


@pytest.mark.parametrize("patches", ALIVE[:-1])
@pytest.mark.parametrize("batch", BATCHES)
def test_predictor(timed, device, batch, patches):
    """Log-probabilities of keeping and dropping; the two probabilities sum to one."""
    predictor = ScorePredictor(WIDTH).to(device).eval()
    x = torch.randn(batch, patches, WIDTH, device=device)
    scores = timed(f"scores of {patches} patches, batch {batch}", predictor, x)
    torch.testing.assert_close(scores.exp().sum(dim=-1), torch.ones(batch, patches, device=device))


@pytest.mark.parametrize("patches", ALIVE[:-1])
@pytest.mark.parametrize("batch", BATCHES)
def test_dice(timed, device, batch, patches):
    """Counter-based numbers in (0, 1), the same for an image in any batch."""
    keys = torch.arange(batch, device=device)

    def scores(keys):
        return Noise(0, 0, keys).uniform("stage0", patches)

    got = timed(f"scores of {patches} patches, batch {batch}", scores, keys)
    assert got.shape == (batch, patches)
    assert 0 < got.min() < got.max() < 1
    assert torch.equal(got[-1:], scores(keys[-1:]))


@pytest.mark.parametrize("batch", BATCHES)
def test_image_keys(timed, device, batch):
    """What the dice know an image by, found once per forward."""
    pixels = torch.randn(batch, 3, 224, 224, device=device)
    keys = timed(f"keys of images, batch {batch}", image_keys, pixels)
    assert len(set(keys.tolist())) == batch
    assert torch.equal(keys[-1:], image_keys(pixels[-1:]))
