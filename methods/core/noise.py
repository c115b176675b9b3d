"""Random numbers that are a pure function of (seed, step, sample, name, position).

A generator's stream depends on everything drawn before it: on the batch's composition, the number of workers, the rank,
the device. A counter-based generator does not: the numbers of one image are the same in any batch, on any device, and
after any interruption. The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """An unsigned 64-bit constant as the int64 of the same bits: torch multiplies int64 modulo 2^64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)
KEY_PIXELS = 1024


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift (torch's >> keeps the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """Scrambles int64 values one by one; a bijection on 64 bits."""
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def _mix_number(value: int) -> int:
    """`mix` for a Python integer, without a tensor: no waiting, and torch.compile takes it for a constant."""
    low = (1 << 64) - 1
    value = (value + _GOLDEN) & low
    value = ((value ^ (value >> 30)) * _MIX1) & low
    value = ((value ^ (value >> 27)) * _MIX2) & low
    return _signed(value ^ (value >> 31))


@torch.compiler.assume_constant_result
def _name_number(name: str) -> int:
    return zlib.crc32(name.encode())


def image_keys(images: Tensor) -> Tensor:
    """A 64-bit key per image, from its pixels alone: int64 [B] for images [B, ...] of any float type.

    Looks at up to about KEY_PIXELS values, evenly spread, in steps of 2^-10: finer than the 256 levels of a picture,
    coarser than the last bits in which devices differ.
    """
    pixels = images.flatten(1)
    stride = max(pixels.shape[1] // KEY_PIXELS, 1)
    while math.gcd(stride, images.shape[-1]) > 2:  # or all samples would lie in a few columns
        stride += 1
    pixels = pixels[:, ::stride]
    values = (pixels.float() * 2**10).round().long()
    places = mix(torch.arange(values.shape[1], device=images.device))
    return mix((mix(values) * (places | 1)).sum(dim=1))


class Noise:
    """The random numbers of one training step (or of one evaluation) for a batch of samples.

    seed, step: integers; keys: int64 [B], what tells the samples apart (their numbers in the data set, or `image_keys`).
    """

    def __init__(self, seed: int, step: int, keys: Tensor) -> None:
        self.seed, self.step, self.keys = seed, step, keys

    def _bits(self, name: str, shape: tuple[int, ...]) -> Tensor:
        base = 0
        for part in (self.seed, self.step, _name_number(name)):
            base = _mix_number(base + part)
        rows = mix(self.keys + base)[:, None]
        return mix(rows + torch.arange(math.prod(shape), device=self.keys.device) * _GOLDEN).view(-1, *shape)

    def uniform(self, name: str, *shape: int) -> Tensor:
        """Uniform numbers in the open interval (0, 1), float32 [B, *shape]; `name` tells apart the uses in a step."""
        return (_shift(self._bits(name, shape), 41).float() + 0.5) * 2.0**-23

    def gumbel(self, name: str, *shape: int) -> Tensor:
        """Standard Gumbel noise, float32 [B, *shape]."""
        return -torch.log(-torch.log(self.uniform(name, *shape)))
