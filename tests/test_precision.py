"""The yardstick of the golden tests: a float64 run and how far rounding moves it."""

from __future__ import annotations

import pytest
import torch
from precision import Exact, as_near_as_the_authors, exactly
from torch import nn


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def test_what_is_no_number_holds_to_nothing():
    with pytest.raises(AssertionError, match="without numbers"):
        exactly(lambda one: {"x": one.weight / 0 * 0}, model())


def test_a_run_in_float32_is_no_yardstick():
    with pytest.raises(AssertionError, match="not a float64 run"):
        exactly(lambda one: {"x": one.weight.float()}, model())


def test_a_sensitive_rule_has_a_wide_spread_and_a_plain_one_a_narrow_one():
    images = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain = exactly(lambda one: {"x": one(images)}, model())["x"]
    steep = exactly(lambda one: {"x": one(images) * 1e6}, model())["x"]
    assert 0 < plain.spread < 1e-6
    assert steep.spread == pytest.approx(plain.spread * 1e6)


def test_both_must_be_near():
    exact = Exact(torch.zeros(3, dtype=torch.float64), spread=1e-6)
    near, far = torch.full((3,), 3e-6), torch.full((3,), 1e-4)
    as_near_as_the_authors(near, near, exact, stated=1e-6)
    for ours, theirs in ((far, near), (near, far), (near * float("nan"), near)):
        with pytest.raises(AssertionError, match="from float64, allowed"):
            as_near_as_the_authors(ours, theirs, exact, stated=1e-6)
