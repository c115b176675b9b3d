"""Recipes beyond the defaults: averaged weights, repeated augmentation, NVIDIA apex, torch.compile, TensorBoard; artifacts of phases."""

import importlib.util
import shutil
import sys
import textwrap

import pytest
import timm
import torch
import yaml
from conftest import bench, tiny_spec
from test_interruption import trainer_of
from torch import nn

import methods
from harness import cost, device, models
from harness.cells import load_run
from harness.data.order import COPY, Order
from harness.device import execution
from harness.errors import UserError
from harness.rules import RECIPE, random_data
from harness.training.artifacts import Artifacts
from harness.training.engine import run_phases
from harness.training.optimizers import check_recipe, fuse_norms, make_optimizer, restore_norms
from harness.training.setup import Training
from methods.core.objective import Classification

PLAN = device.plan("cpu", "float32")


def vit(**changes):
    torch.manual_seed(0)
    sizes = {"img_size": 24, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 7}
    return timm.create_model("vit_tiny_patch16_224", **(sizes | changes))


def train(model, recipe=RECIPE, hook=None, **changes):
    phase = methods.TrainPhase(name="train", objective=Classification(model, nn.CrossEntropyLoss()), after_step=hook)
    return run_phases(model, [phase], Training(recipe, random_data(), PLAN, 0, 6, **changes))


def test_averaged_weights_are_the_average_of_what_was_passed():
    """Span 0.5 of 6 steps: each step counts a third, and what was before two thirds."""
    model, average = vit(), vit().head.weight.detach().clone()

    def follow(step, steps):
        average.lerp_(model.head.weight.detach(), 1 / 3)

    _, averaged = train(model, RECIPE.model_copy(update={"ema": 0.5}), follow)
    torch.testing.assert_close(averaged.head.weight, average)
    assert not torch.allclose(averaged.head.weight, model.head.weight)
    assert train(vit())[1] is None


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_repeated_augmentation_shows_fewer_images_more_often(repeats):
    order = Order(torch.arange(60), 12, seed=3, repeats=repeats)
    keys = torch.cat([order.keys(step) for step in range(order.steps_per_epoch)])
    assert order.steps_per_epoch == 5
    assert len(keys.unique()) == len(keys) == 60
    assert (keys % COPY).bincount().unique().tolist() == ([repeats] if repeats == 1 else [0, repeats])
    assert not torch.equal(keys, torch.cat([order.keys(step) for step in range(5, 10)]))


# NVIDIA apex, which no test machine has: a package of that name stands for it.


@pytest.fixture
def apex(tmp_path, monkeypatch):
    """installed(text of apex/optimizers, of apex/normalization)."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
            del sys.modules[name]

    def installed(**files):
        (tmp_path / "apex").mkdir()
        (tmp_path / "apex" / "__init__.py").write_text("")
        for name, text in files.items():
            (tmp_path / "apex" / f"{name}.py").write_text(textwrap.dedent(text))
        importlib.invalidate_caches()

    forget()
    yield installed
    forget()


NVIDIA = {
    "optimizers": """
        import torch
        class FusedAdam(torch.optim.AdamW):
            def __init__(self, params, lr, weight_decay, adam_w_mode):
                assert adam_w_mode
                super().__init__(params, lr=lr, weight_decay=weight_decay)
        """,
    "normalization": """
        import torch
        class FusedLayerNorm(torch.nn.Module):
            used = 0
            def __init__(self, normalized_shape, eps, elementwise_affine):
                super().__init__()
                self.normalized_shape, self.eps, self.elementwise_affine = torch.Size(normalized_shape), eps, elementwise_affine
                self.weight = torch.nn.Parameter(torch.ones(normalized_shape))
                self.bias = torch.nn.Parameter(torch.zeros(normalized_shape))
            def forward(self, x):
                FusedLayerNorm.used += 1
                return torch.nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        """,
}
FUSED = RECIPE.model_copy(update={"optimizer": "fused_adam", "norm": "fused_layer_norm"})


def test_apex_is_used_where_it_is_installed(apex):
    apex(**NVIDIA)
    check_recipe(FUSED, "recipe")
    fused, plain = vit(), vit()
    names = list(fused.state_dict())
    fuse_norms(fused, FUSED)
    train(fused, FUSED)
    restore_norms(fused, FUSED)
    train(plain)
    import apex.normalization

    assert apex.normalization.FusedLayerNorm.used > 0
    assert list(fused.state_dict()) == names
    assert not any(isinstance(module, apex.normalization.FusedLayerNorm) for module in fused.modules())
    assert models.state_digest(fused.state_dict()) == models.state_digest(plain.state_dict())


def test_a_methods_own_norm_is_left_alone(apex):
    class Special(nn.LayerNorm):
        pass

    apex(**NVIDIA)
    model = vit()
    model.norm = Special(24)
    fuse_norms(model, FUSED)
    assert type(model.norm) is Special
    assert type(model.blocks[0].norm1).__name__ == "FusedLayerNorm"


@pytest.mark.parametrize("files", [{}, {"optimizers": "x = 1", "normalization": "x = 1"}])
def test_another_package_called_apex_is_recognised(apex, files):
    apex(**files)
    with pytest.raises(UserError, match=r"recipe.optimizer: fused_adam .*apex/__init__.py\) is not NVIDIA's") as told:
        check_recipe(FUSED, "recipe")
    assert "fused_adamw" in str(told.value)
    with pytest.raises(UserError, match=r"adapt.norm: fused_layer_norm .* is not NVIDIA's"):
        check_recipe(FUSED.model_copy(update={"optimizer": "adamw"}), "adapt")


@pytest.mark.skipif(importlib.util.find_spec("apex") is not None, reason="apex is installed")
def test_without_apex_a_line_says_what_to_do():
    with pytest.raises(
        UserError, match=r"not installed; build it from https://github.com/NVIDIA/apex .* write fused_adamw"
    ):
        check_recipe(FUSED, "recipe")


def test_torchs_fused_adamw_on_request():
    recipe = RECIPE.model_copy(update={"optimizer": "fused_adamw"})
    check_recipe(recipe, "recipe")
    phase = methods.TrainPhase(name="t", objective=Classification(vit(), nn.CrossEntropyLoss()))
    assert make_optimizer(phase, recipe).defaults["fused"]
    fused, plain = vit(), vit()
    train(fused, recipe)
    train(plain)
    torch.testing.assert_close(fused.state_dict(), plain.state_dict(), atol=1e-3, rtol=1e-3)


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("c++") is None, reason="no C++ compiler")
def test_compiled_training_learns_the_same_and_leaves_nothing_compiled():
    compiled, plain = vit(), vit()
    with execution.compiled_blocks(compiled, wanted=True):
        (log,), _ = train(compiled)
    (expected,), _ = train(plain)
    for one, other in zip(expected.curve, log.curve, strict=True):
        assert other["classification"] == pytest.approx(one["classification"], rel=1e-3)
    assert log.macs == expected.macs
    assert all(module._compiled_call_impl is None for module in compiled.modules())


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("c++") is None, reason="no C++ compiler")
def test_compiled_training_scores_the_same_heads():
    """The scores are taken inside of the compiled blocks, in some steps and not in others."""
    method = methods.create("svite", pruning_type="structured", atten_density=0.5, update_frequency=2)
    told = []
    for wanted in (True, False):
        torch.manual_seed(0)
        sparse = method.sparsify(vit())
        with execution.compiled_blocks(sparse, wanted=wanted):
            phases = method.phases(sparse, nn.CrossEntropyLoss())
            (log,), _ = run_phases(sparse, phases, Training(RECIPE, random_data(), PLAN, 0, 6))
        heads = [units.heads.tolist() for units in method.pattern.units(sparse)]
        told.append((heads, [(event["step"], event["regrown"]) for event in log.events]))
    assert told[0] == told[1]
    assert len(told[0][1]) == 2


def test_training_costs_three_forwards_and_the_teacher_one():
    (log,), _ = train(vit())
    forward = cost.dense_formula_holds(vit(), torch.zeros(1, 3, 24, 24))[2]
    # A backward pass takes two forwards, but for the patch embedding, whose input needs no gradient, and for fused attention, which
    # computes its weights again.
    assert 2.9 < log.macs / log.images / forward < 3.1
    taught = vit()
    phase = methods.TrainPhase(name="t", objective=Classification(taught, nn.CrossEntropyLoss(), vit()))
    (more,), _ = run_phases(taught, [phase], Training(RECIPE, random_data(), PLAN, 0, 6))
    assert (more.macs - log.macs) / log.images == pytest.approx(forward, rel=1e-6)
    assert log.peak_memory > 1e8
    assert log.device_hours == pytest.approx(log.seconds / 3600, abs=1e-6)


# What phases make, kept for other cells.


def train_stages(spec_file, plugin, results, seed=0):
    """Digest of the weights of `stages`, the logs of its phases, which were taken, and the id."""
    told = []
    run, trainer = trainer_of(spec_file, plugin, results, told.append)
    (cell,) = (cell for cell in run.cells() if cell.method.name == "stages" and cell.seed == seed)
    trained = trainer.weights(cell, "stages")
    taken = [line for line in told if "is taken from" in line]
    return models.state_digest(trained.sparse.state_dict()), trained.phases, taken, trainer.identity.weights_id(cell)


def test_phases_results_are_reused_and_charged(tmp_path, tiny_data, stages_file):
    """`stages` gives its first phase a key: another cell that would make the same takes it, another seed does not. Then the
    phase's result is given as a file."""
    content = tiny_spec(
        tiny_data, entries=[{"method": "stages"}], seeds=[0, 1], budget={"epochs": 1, "adapt_epochs": 3}
    )
    spec_file, results = tmp_path / "a.yaml", tmp_path / "r"
    spec_file.write_text(yaml.safe_dump(content))
    weights, paid, told, weights_id = train_stages(spec_file, stages_file, results)
    assert not told
    assert not train_stages(spec_file, stages_file, results, seed=1)[2]
    artifacts = sorted((results / "checkpoints" / "artifacts").iterdir())
    assert len(artifacts) == 2
    (results / "checkpoints" / f"{weights_id}.pt").unlink()
    again, charged, told, _ = train_stages(spec_file, stages_file, results)
    assert told == ["phase warm is taken from artifact warm"]
    assert again == weights
    assert (charged[0].pop("source"), paid[0].pop("source")) == ("artifact warm", None)
    assert charged[0] == paid[0]

    content["entries"] = [{"method": "stages", "phases": {"warm": "given.state"}}]
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"stages: phases.warm given.state: no such file"):
        train_stages(tmp_path / "b.yaml", stages_file, results)
    shutil.copy(artifacts[0], tmp_path / "given.state")
    _, _, told, other_id = train_stages(tmp_path / "b.yaml", stages_file, results)
    assert told == ["phase warm is taken from given.state"]
    assert other_id != weights_id


def test_a_phase_that_is_not_there_cannot_be_given(tmp_path):
    with pytest.raises(UserError, match="no phase 'prune'; it has train"):
        train(vit(), given={"prune": tmp_path / "x"})


def artifact_run(folder, **changes):
    model = vit()
    phase = methods.TrainPhase(name="warm", objective=Classification(model, nn.CrossEntropyLoss()), artifact="warm")
    recipe = RECIPE.model_copy(update={"ema": 0.5})
    training = Training(recipe, random_data(), PLAN, 0, 6, artifacts=Artifacts(folder, {"context": 1}), **changes)
    (log,), averaged = run_phases(model, [phase], training)
    return log, models.state_digest(model.state_dict()), models.state_digest(averaged.state_dict())


def test_an_artifact_has_the_averages_too_and_a_damaged_one_is_made_again(tmp_path):
    first, *digests = artifact_run(tmp_path)
    taken, *others = artifact_run(tmp_path)
    assert others == digests
    assert (first.source, taken.source) == (None, "artifact warm")
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    told = []
    again, *others = artifact_run(tmp_path, say=told.append)
    assert others == digests
    assert again.source is None
    assert told == [f"artifact {path.name} is damaged; making it again"]


def test_an_entry_that_differs_in_its_given_phases_is_a_row_of_its_own(tmp_path, tiny_data):
    (tmp_path / "given.state").write_bytes(b"x")
    entries = [{"method": "random"}, {"method": "random", "label": "given", "phases": {"prune": "given.state"}}]
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tiny_spec(tiny_data, entries=entries)))
    assert [cell.label for cell in load_run(tmp_path / "a.yaml").cells()][2:] == ["random", "given"]


# The log.


def test_tensorboard_needs_its_package(tmp_path, tiny_spec_file):
    if importlib.util.find_spec("tensorboard") is not None:
        pytest.skip("tensorboard is installed")
    done = bench("--spec", tiny_spec_file, "--set", "train.tensorboard=true", "--results", tmp_path)
    assert done.returncode == 2
    assert "pip install tensorboard" in done.stderr
