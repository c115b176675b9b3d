"""A phase that trained nothing, or ended in weights that are no numbers, is a failure and not a result."""

import math

import pytest
import timm
import torch
from torch import nn

import methods
from harness import device, spec
from harness.rules import RECIPE, random_data
from harness.training.engine import run_phases
from harness.training.setup import Training
from harness.training.snapshots import Snapshots
from harness.training.stepper import Diverged

PLAN = device.plan("cpu", "float32")


def vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=24, patch_size=4, embed_dim=24, depth=1, num_heads=2, num_classes=7
    )


class Spoiled(nn.Module):
    """Classification times a number that depends on the step."""

    def __init__(self, model, factor=lambda step: 1.0):
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, images, targets, noise):
        return {
            "classification": nn.functional.cross_entropy(self.model(images).float(), targets) * self.factor(noise.step)
        }


def train(objective, steps=3, phases=None, **changes):
    phases = phases or [methods.TrainPhase(name="train", objective=objective)]
    training = Training(
        **({"recipe": RECIPE, "data": random_data(), "plan": PLAN, "seed": 0, "steps": steps} | changes)
    )
    return run_phases(objective.model, phases, training)[0]


NEVER = {
    "the loss is NaN": lambda step: math.nan,
    "the loss is infinite": lambda step: math.inf,
    "now this, now that": lambda step: (math.nan, -math.inf)[step % 2],
}


@pytest.mark.parametrize("factor", NEVER.values(), ids=NEVER)
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_fewer_steps_than_may_be_skipped_in_a_row(factor, steps):
    with pytest.raises(Diverged, match=rf"phase train: none of its {steps} steps had a finite loss and gradient"):
        train(Spoiled(vit(), factor), steps)


def test_a_gradient_that_is_never_finite():
    objective = Spoiled(vit())
    objective.model.head.weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(Diverged, match="none of its 3 steps"):
        train(objective)


def test_float16_that_overflows_in_every_step():
    with pytest.raises(Diverged, match="none of its 3 steps"):
        train(Spoiled(vit(), lambda step: 1e30), plan=device.plan("cpu", "float16"))


def test_a_second_phase_is_looked_at_by_itself():
    objective = Spoiled(vit(), lambda step: 1.0 if step < 3 else math.nan)
    phases = [methods.TrainPhase(name=name, objective=objective, share=0.5) for name in ("one", "two")]
    with pytest.raises(Diverged, match="phase two: none of its 3 steps"):
        train(objective, 6, phases)


def test_one_finite_step_is_a_training():
    (log,) = train(Spoiled(vit(), lambda step: 1.0 if step == 1 else math.nan), 4)
    assert (log.steps, log.skipped) == (4, 3)


@pytest.mark.parametrize("interrupted_at", [1, 3])
def test_a_phase_that_goes_on_counts_its_steps_before(tmp_path, interrupted_at):
    """Also where all steps were done before: its state was saved after the last one."""

    def once(step):
        if step == interrupted_at and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise KeyboardInterrupt
        return math.nan

    snapshots = Snapshots(tmp_path / "states", every_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train(Spoiled(vit(), once), 4, snapshots=snapshots)
    with pytest.raises(Diverged, match="none of its 4 steps"):
        train(Spoiled(vit(), once), 4, snapshots=snapshots)


@pytest.mark.parametrize("good", [0, 1])
def test_a_good_step_before_an_interruption_counts(tmp_path, good):
    def stopping(step):
        if step == 2 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise KeyboardInterrupt
        return 1.0 if step == good else math.nan

    snapshots = Snapshots(tmp_path / "states", every_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train(Spoiled(vit(), stopping), 4, snapshots=snapshots)
    (log,) = train(Spoiled(vit(), stopping), 4, snapshots=snapshots)
    assert (log.steps, log.skipped) == (4, 3)


SPOILING = {"NaN": math.nan, "infinite": math.inf}


@pytest.mark.parametrize("value", SPOILING.values(), ids=SPOILING)
@pytest.mark.parametrize("max_skipped", [0, 5])
def test_weights_that_the_last_step_spoiled(value, max_skipped):
    """Loss and gradient of that step were finite, and no step after it shows what became of the weights."""
    objective = Spoiled(vit())

    def spoil(step, steps):
        if step == steps - 1:
            with torch.no_grad():
                objective.model.head.bias[0] = value

    phase = methods.TrainPhase(name="train", objective=objective, after_step=spoil)
    with pytest.raises(Diverged, match=r"phase train: 1 of \d+ trained parameters are not finite at its end"):
        train(objective, 3, [phase], options=spec.Training(max_skipped=max_skipped))


def test_a_rate_that_makes_weights_infinite():
    recipe = RECIPE.model_copy(update={"lr": 1e38, "optimizer": "sgd", "weight_decay": 0.0})
    with pytest.raises(Diverged):
        train(Spoiled(vit(), lambda step: 1e3), 1, recipe=recipe)
