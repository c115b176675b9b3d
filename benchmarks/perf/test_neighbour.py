"""Training beside a process that keeps a core busy: what limiting how long threads spin is worth (`--threads 2`)."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import timm
import torch
from torch import nn

from harness.device.spinning import INTERVAL, SpinLimit

NOTICED = 3 * INTERVAL  # seconds after which a neighbour has certainly been seen
IMAGES = 128


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Processes that compute without end."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


@pytest.mark.parametrize("limited", [False, True], ids=["spinning", "limited"])
@pytest.mark.parametrize("processes", [0, 1], ids=["alone", "beside-one"])
def test_training_beside_a_busy_process(timed, device, processes, limited):
    if torch.get_num_threads() < 2 or device.type != "cpu":
        pytest.skip("needs two threads on the CPU: --threads 2 --device cpu")
    model = timm.create_model("vit_tiny_patch16_224", img_size=28, patch_size=4, embed_dim=64, depth=4, num_heads=2)
    optimizer = torch.optim.AdamW(model.parameters())
    images, targets = torch.randn(IMAGES, 3, 28, 28), torch.randint(0, 10, (IMAGES,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), targets).backward()
        optimizer.step()

    with busy(processes), SpinLimit() if limited else contextlib.nullcontext():
        time.sleep(NOTICED)
        timed(f"a training step of {IMAGES} images, {'beside one busy process' if processes else 'alone'}", step)
