"""Attention kernels: timm's Attention, projections included, with its plain and its fused kernel."""

from __future__ import annotations

import pytest
import torch
from timm.layers import Attention

from harness.device import set_attention

from . import ALIVE, BATCHES, HEADS, WIDTH

pytestmark = pytest.mark.usefixtures("inference")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("kernel", ["plain", "fused"])
@pytest.mark.parametrize("tokens", [1 + patches for patches in ALIVE])
@pytest.mark.parametrize("batch", BATCHES)
def test_attention(timed, device, dtype, batch, tokens, kernel):
    """Both must agree; the one that is not timed is the other's reference."""
    attention = Attention(WIDTH, num_heads=HEADS, qkv_bias=True).to(device, dtype).eval()
    x = torch.randn(batch, tokens, WIDTH, device=device, dtype=dtype)
    set_attention(attention, kernel == "fused")
    got = timed(f"attention among {tokens} tokens, batch {batch}, {dtype}", attention, x)
    set_attention(attention, kernel != "fused")
    torch.testing.assert_close(got, attention(x), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
