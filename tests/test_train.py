"""The engine: phases of every kind, learning rates, repeatability."""

import copy
import itertools

import pytest
import timm
import torch
import yaml
from conftest import tiny_spec
from test_interruption import trainer_of
from torch import nn

import methods
from harness import device
from harness.errors import UserError
from harness.rules import RECIPE, random_data
from harness.spec import Recipe
from harness.training.engine import run_phases
from harness.training.optimizers import make_criterion, make_optimizer
from harness.training.setup import Training, budget_steps
from harness.training.stepper import Diverged
from methods.core.objective import Classification

PLAN = device.plan("cpu", "float32")


def vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=24, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=7
    )


def run(phases, steps=6, recipe=RECIPE, seed=0, watch=lambda progress: None):
    return train(phases, random_data(), steps=steps, recipe=recipe, seed=seed, watch=watch)


def train(phases, data, **changes):
    """The logs of the phases."""
    model = next((phase.objective for phase in phases if isinstance(phase, methods.TrainPhase)), nn.Identity())
    logs, _ = run_phases(
        model, phases, Training(data=data, plan=PLAN, **({"recipe": RECIPE, "seed": 0, "steps": 6} | changes))
    )
    return logs


def train_phase(model, **changes):
    return methods.TrainPhase(name="train", objective=Classification(model, nn.CrossEntropyLoss()), **changes)


def test_phases_of_all_kinds_share_the_budget():
    model, seen, done = vit(), [], []

    class Count(nn.Module):
        def forward(self, images, targets):
            seen.append(len(images))

    phases = [
        train_phase(model, share=0.5, before_step=lambda step, steps: done.append((step, steps))),
        methods.CollectPhase(name="collect", module=Count(), share=0.5, finish=lambda: done.append("finished")),
        methods.TransformPhase(name="change", apply=lambda: done.append("changed")),
    ]
    logs = run(phases, steps=8)
    assert done == [(0, 4), (1, 4), (2, 4), (3, 4), "finished", "changed"]
    assert seen == [8, 8, 8, 8]
    assert [(log.kind, log.steps, log.images) for log in logs] == [
        ("train", 4, 32),
        ("collect", 4, 32),
        ("transform", 0, 0),
    ]


def test_a_second_train_phase_goes_on_with_therandom_data():
    class Remember(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.ids = nn.Parameter(torch.zeros(1)), {}

        def forward(self, images, targets, noise):
            if len(images) == RECIPE.batch_size:  # not the few images by which multiply-adds are counted
                self.ids[noise.step] = noise.keys.tolist()
            return {"loss": self.weight.sum()}

    whole, halves = Remember(), [Remember(), Remember()]
    run([methods.TrainPhase(name="a", objective=whole)], steps=8)
    run([methods.TrainPhase(name=str(i), objective=half, share=0.5) for i, half in enumerate(halves)], steps=8)
    assert halves[0].ids | halves[1].ids == whole.ids


def test_the_learning_rate_warms_up_and_falls_and_groups_scale_and_freeze_it():
    model, rates = vit(), []
    body, head = [p for n, p in model.named_parameters() if not n.startswith("head")], list(model.head.parameters())
    groups = [methods.Group("body", body, lr_scale=0.1, frozen=0.5), methods.Group("head", head)]
    before = copy.deepcopy(model.state_dict())
    halfway = {}
    recipe = RECIPE.model_copy(update={"lr": 0.01, "warmup_epochs": 1.0, "min_lr": 0.0})

    def watch(progress):
        rates.append(progress)
        if progress.step == 8:
            halfway.update(copy.deepcopy(model.state_dict()))

    (log,) = run([train_phase(model, groups=groups)], steps=16, recipe=recipe, watch=watch)
    curve = [point["lr"] for point in log.curve]
    assert curve[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01], rel=0.05)
    assert all(a > b for a, b in itertools.pairwise(curve[3:]))
    assert 0 < curve[-1] < 2e-4
    same = {name: torch.equal(before[name], halfway[name]) for name in before}
    assert not same["head.weight"]
    assert same["blocks.0.attn.qkv.weight"]
    assert not torch.equal(before["blocks.0.attn.qkv.weight"], model.state_dict()["blocks.0.attn.qkv.weight"])


def test_weight_decay_spares_biases_norms_and_tokens():
    optimizer = make_optimizer(train_phase(vit()), RECIPE)
    bare = [p for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]]
    decayed = [p for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]]
    assert all(p.ndim <= 1 or p.shape[0] == 1 for p in bare)
    assert len(decayed) == 2 * 4 + 2
    assert len(bare) + len(decayed) == len(list(vit().parameters()))


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_one_seed_one_result(optimizer):
    ends = []
    for seed in (0, 0, 1):
        model = timm.create_model("vit_tiny_patch16_224", img_size=24, patch_size=4, embed_dim=24, depth=2, num_heads=2,
                                  num_classes=7, drop_path_rate=0.3, proj_drop_rate=0.1)  # fmt: skip
        model.load_state_dict(vit().state_dict())
        torch.manual_seed(len(ends))  # what ran before must not matter
        run([train_phase(model)], recipe=RECIPE.model_copy(update={"optimizer": optimizer}), seed=seed)
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not all(torch.equal(ends[0][name], ends[2][name]) for name in ends[0])


def test_training_learns():
    """Seven classes of brightness."""
    data = random_data()
    data.train.images[:] = (data.train.labels * 36).byte()[:, None, None, None]
    recipe = RECIPE.model_copy(update={"lr": 0.003, "label_smoothing": 0.0})
    (log,) = train([train_phase(vit())], data, recipe=recipe, steps=160)
    losses = [point["classification"] for point in log.curve]
    assert losses[-1] < 0.5 * losses[0]


def test_a_loss_that_is_no_number_ends_the_run():
    model = vit()
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(Diverged, match=r"phase train, step 6: the loss is not a number .*, 6 steps in a row"):
        run([train_phase(model)])


def test_budgets_in_steps():
    data = random_data()
    assert budget_steps(data, RECIPE, 2.5, None) == 10
    assert budget_steps(data, RECIPE, 2.5, 3) == 3
    assert budget_steps(data, RECIPE, 0.01, None) == 1


def test_a_limit_in_steps_is_the_same_for_all(tmp_path, tiny_data, toy_file):
    """Each budget has it: what starts from scratch gets both, as dense and what follows it do together."""
    entries = [{"method": "svite", "settings": {"update_frequency": 1}}]
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tiny_spec(tiny_data, entries=entries, budget={"max_steps": 2})))
    run_, trainer = trainer_of(tmp_path / "a.yaml", toy_file, tmp_path / "r")
    cells = {cell.label: cell for cell in run_.cells()}
    steps = {label: trainer.weights(cell, label).phases[0]["steps"] for label, cell in cells.items()}
    assert steps == {"dense": 2, "dense+": 2, "svite update_frequency=1": 4, "toy": 2}


def test_the_criterion_follows_the_recipe():
    logits, targets = torch.randn(4, 7), torch.tensor([0, 1, 2, 3])
    mixed = torch.nn.functional.one_hot(targets, 7).float()
    plain = make_criterion(RECIPE.model_copy(update={"label_smoothing": 0.0}))(logits, targets)
    assert make_criterion(Recipe())(logits, mixed) == pytest.approx(float(plain), rel=1e-5)
    assert make_criterion(RECIPE)(logits, targets) != plain


def test_the_teacher_stays_as_it_is_and_pulls():
    teacher, student = vit(), vit()
    with torch.no_grad():
        teacher.head.bias[3] += 5
    objective = Classification(student, nn.CrossEntropyLoss(), teacher)
    before = copy.deepcopy(teacher.state_dict())
    (log,) = run([methods.TrainPhase(name="t", objective=objective)], steps=10)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not objective.train().teacher.model.training
    assert log.curve[-1]["distillation"] < log.curve[0]["distillation"]


@pytest.mark.parametrize(
    ("name", "message"), [("tpu", "must be auto"), ("mps", "only cpu and cuda"), ("cuda:99", "CUDA devices")]
)
def test_devices_that_are_not_there(name, message):
    with pytest.raises(UserError, match=message):
        device.plan(name, "auto")
