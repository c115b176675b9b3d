"""What the training engine costs: the default benchmark's dense network through it, and through a loop that does nothing else.

    .venv/bin/python -m pytest benchmarks/perf/test_loop.py --benchmark-enable --threads 2 -s

shows the ratio of interleaved rounds, which should be 0.97 at least, and the share of the time that is spent waiting for data.
"""

from __future__ import annotations

import statistics
import time
from functools import cache

import torch
from torch import nn

import methods
from harness import device as devices
from harness import models
from harness.cells import load_run
from harness.data.dataset import ImageData, open_data
from harness.spec import Recipe, find_spec
from harness.training.engine import run_phases
from harness.training.optimizers import Schedule, make_criterion, make_optimizer
from harness.training.setup import Training

STEPS, ROUNDS = 60, 7


@cache
def opened() -> tuple[Recipe, ImageData]:
    run = load_run(find_spec("quick"))
    return run.spec.recipe, open_data(run.spec.data, run.folder, crop=run.spec.recipe.crop)


def network(device: torch.device) -> tuple[nn.Module, methods.TrainPhase]:
    recipe, data = opened()
    vit = models.build(load_run(find_spec("quick")).spec.backbone, data.classes, data.image_size, seed=0)
    devices.set_attention(vit, fused=device.type == "cuda")
    method = methods.create("dense")
    sparse = method.sparsify(vit).to(device)
    return sparse, method.phases(sparse, make_criterion(recipe))[0]


def engine(device: torch.device, steps: int) -> tuple[nn.Module, float]:
    """The trained network, and the share of the time that was spent waiting for data."""
    recipe, data = opened()
    model, phase = network(device)
    (log,), _ = run_phases(model, [phase], Training(recipe, data, devices.plan(str(device), "auto"), 0, steps))
    return model, log.data_wait_seconds / log.seconds


def bare(device: torch.device, steps: int) -> tuple[nn.Module, float]:
    """The same steps with nothing around them."""
    recipe, data = opened()
    model, phase = network(device)
    plan, criterion = devices.plan(str(device), "auto"), make_criterion(recipe)
    model.train()
    optimizer = make_optimizer(phase, recipe)
    schedule = Schedule(optimizer, recipe, steps, data.steps_per_epoch(recipe.batch_size))
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for step, batch in enumerate(data.train_batches(recipe, 0, 0, steps, device)):
        schedule.set(step)
        with plan.autocast():
            loss = criterion(model(batch.images).float(), batch.targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, recipe.clip_grad)
        optimizer.step()
    return model.eval(), 0.0


def test_engine_against_bare_loop(benchmark, device, capsys):
    """Rounds in turns; both must end with the same weights."""
    rounds, steps = (ROUNDS, STEPS) if benchmark.enabled else (1, 2)
    seconds: dict[str, list[float]] = {"engine": [], "bare": []}
    ends, waits = {}, []

    def turn() -> None:
        for name, loop in (
            (("engine", engine), ("bare", bare)) if len(waits) % 2 else (("bare", bare), ("engine", engine))
        ):
            started = time.perf_counter()
            model, wait = loop(device, steps)
            seconds[name].append(time.perf_counter() - started)
            ends[name] = models.state_digest(model.state_dict())
            if name == "engine":
                waits.append(wait)

    benchmark.group = f"{STEPS} training steps by the engine and by a bare loop"
    benchmark.pedantic(turn, rounds=rounds, warmup_rounds=1 if benchmark.enabled else 0)
    assert ends["engine"] == ends["bare"]
    ratios = [plain / ours for plain, ours in zip(seconds["bare"], seconds["engine"], strict=True)]
    benchmark.extra_info |= {"steps_per_second_share": statistics.median(ratios), "data_wait": statistics.median(waits)}
    if benchmark.enabled:
        with capsys.disabled():
            print(f"\nengine / bare loop, steps per second: {statistics.median(ratios):.3f} (median of {len(ratios)} rounds, "
                  f"{min(ratios):.3f} to {max(ratios):.3f}); waiting for data: {statistics.median(waits):.2%}")  # fmt: skip
