"""Counting the multiply-adds of DeiT-S, dense and with DynamicViT, as it runs and by formula. On the CPU, as it always is."""

from __future__ import annotations

import pytest
import timm
import torch

import methods
from harness.executed import executed, executed_macs
from harness.formula import theoretical_macs

GMACS = {"dense": 4.5989, "dynamicvit": 2.9809}


@pytest.fixture(scope="module")
def deit() -> torch.nn.Module:
    return timm.create_model("deit_small_patch16_224").eval()


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randn(1, 3, 224, 224)


@pytest.mark.parametrize("name", GMACS)
@pytest.mark.benchmark(group="count by running")
def test_dispatcher(benchmark, deit, image, name):
    """harness.executed.executed_macs on the deployed model."""
    method = methods.create(name)
    macs = benchmark(executed_macs, method.deploy(method.sparsify(deit)), image)
    assert round(macs / 1e9, 4) == GMACS[name]


@pytest.mark.parametrize("name", GMACS)
@pytest.mark.benchmark(group="count by running")
def test_both_counters(benchmark, deit, image, name):
    """harness.executed.executed: by the dispatcher, and by fvcore's trace, which must agree."""
    method = methods.create(name)
    run = benchmark(executed, method.deploy(method.sparsify(deit)), image)
    assert (round(run.count.total / 1e9, 4), run.only) == (GMACS[name], "")


@pytest.mark.parametrize("name", GMACS)
@pytest.mark.benchmark(group="count by formula")
def test_formula(benchmark, deit, image, name):
    """harness.formula.theoretical_macs on the sparse model's report, which is made before."""
    method = methods.create(name)
    report = method.report(method.sparsify(deit).eval(), image)
    macs = benchmark(theoretical_macs, deit, report, (224, 224))
    assert round(macs / 1e9, 4) == GMACS[name]
