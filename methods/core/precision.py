"""The precision of arithmetic that must not round to what autocast or a half-precision network would have."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32; a float64 tensor stays what it is, so that a float64 network computes in float64 throughout."""
    return x if x.dtype == torch.float64 else x.float()
