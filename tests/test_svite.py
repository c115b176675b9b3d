"""SViTE, S2ViTE and SViTE+ against the authors' numbers, and what must hold for any mask."""

import argparse
import functools
import json
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from precision import as_near_as_the_authors, distance, exactly
from torch import nn
from torch.nn import functional as F

import methods
from harness import cost, spec
from harness.device import plan
from harness.errors import UserError
from harness.formula import theoretical_macs
from harness.models import state_digest
from harness.rules import RECIPE, random_data
from harness.training.engine import run_phases
from harness.training.setup import Training
from harness.verdict import not_skipped
from methods.core.distribution import fixed_erk
from methods.core.masking import mask_densities, masked_layers
from methods.core.noise import Noise
from methods.core.vit import embed
from methods.svite.criteria import Growth, by_sign, grow, survivors
from methods.svite.schedule import Updates, death_rate
from methods.svite.selector import temperature
from methods.svite.structured import heads_of, neurons_of, score_heads

pytestmark = pytest.mark.rounding

GOLDEN = Path(__file__).parent / "golden" / "svite"
SIZES = {"img_size": 32, "patch_size": 8, "num_classes": 5, "embed_dim": 32, "depth": 4, "num_heads": 4}


@cache
def golden(name):
    """A file's arrays as tensors."""
    return {key: torch.as_tensor(value) for key, value in np.load(GOLDEN / f"{name}.npz").items()}


def under(case, prefix):
    return {key.removeprefix(prefix + "/"): value for key, value in case.items() if key.startswith(prefix + "/")}


def vit(**changes):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **(SIZES | changes))


def keys():
    return Noise(0, 0, torch.arange(8))


class Learner:
    """A method's phase, stepped by hand: AdamW on all parameters, as in the golden cases."""

    def __init__(self, method, weights=None, masks=None, lr=1e-3, steps=1000):
        self.method, self.steps = method, steps
        self.model = method.sparsify(vit())
        if weights is not None:
            known = {f"module.{name}_{number}": mask for number, (name, mask) in enumerate((masks or {}).items())}
            masked = {
                name: weight * masks[name] if masks and name in masks else weight for name, weight in weights.items()
            }
            state = method.convert_checkpoint({"model": masked, "mask": known})
            self.model.load_state_dict(self.model.state_dict() | state)
        (self.phase,) = method.phases(self.model, nn.CrossEntropyLoss())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=0.05)

    def step(self, number, images, targets):
        """The loss, and what the method told."""
        self.phase.objective.train().zero_grad()
        self.phase.before_step(number, self.steps)
        loss = sum(self.phase.objective(images.float(), targets, keys()).values())
        loss.backward()
        self.optimizer.step()
        return loss.item(), self.phase.after_step(number, self.steps)

    def masks(self):
        return {name: layer.weight_mask.clone() for name, layer in masked_layers(self.model).items()}


def batch(size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 32, 32, generator=generator), torch.arange(size) % 5


# The authors' numbers -----------------------------------------------------------------------------------------------


def test_densities_are_the_official_ones():
    models = json.loads((GOLDEN / "erk_densities.json").read_text())["models"]
    compared = 0
    for name, by_density in models.items():
        with torch.device("meta"):
            parameters = dict(timm.create_model(name).named_parameters())
        for density, expected in by_density.items():
            shapes = {key: tuple(parameters[key].shape) for key in expected["per_layer"]}
            found = fixed_erk(shapes, float(density))
            assert found == pytest.approx(expected["per_layer"], rel=0, abs=1e-12)
            assert {key for key, share in found.items() if share == 1} == {
                key for key, share in expected["per_layer"].items() if share == 1
            }
            compared += 1
    assert compared == 18


def test_the_sparse_weights_are_the_official_ones():
    expected = json.loads((GOLDEN / "erk_densities.json").read_text())["models"]["deit_tiny_patch16_224"]["0.4"]
    sparse = methods.create("svite").sparsify(timm.create_model("deit_tiny_patch16_224"))
    assert list(masked_layers(sparse)) == list(expected["per_layer"])
    assert mask_densities(sparse) == pytest.approx(expected["per_layer"], abs=0.01)


def test_the_schedule_is_the_official_one():
    case = golden("death_rate_schedule")
    for initial, steps in ((0.5, 1000), (0.3, 1000), (0.5, 2000)):
        name = f"dr0_{initial}_T{steps}"
        for step, official in zip(case[f"{name}_steps"].tolist(), case[f"{name}_official"].tolist(), strict=True):
            if step <= steps:
                assert death_rate(step, steps, initial, "cosine") == pytest.approx(official, abs=1e-9)
    for size in ("tiny", "small", "base"):
        steps, frequency = (int(case[f"imagenet_{size}_{key}"]) for key in ("T", "freq"))
        found = case[f"imagenet_{size}_update_steps"].tolist()
        updates = Updates(frequency, 0.8)
        mine = [t for t in range(frequency, steps + 1, frequency) if updates.due(t, steps) > updates.due(t - 1, steps)]
        assert mine == found
        rates = [death_rate(t, steps, 0.5, "cosine") for t in found]
        assert rates == pytest.approx(case[f"imagenet_{size}_death_rate_closed_form"].tolist(), abs=1e-9)


def test_one_update_is_the_official_one():
    """A step and an update from the initial masks: masks bit for bit, weights to rounding."""
    case = golden("mask_update_1")
    method = methods.create("svite", density=0.5, update_frequency=1)
    learner = Learner(method, under(case, "init_dense"), under(case, "mask_init"))
    loss, told = learner.step(0, case["images"], case["targets"].long())
    assert loss == pytest.approx(float(case["loss"]), abs=1e-5)
    assert told["death_rate"] == pytest.approx(float(case["death_rate"]), abs=1e-9)
    assert told["dropped"] == int(case["dropped_total"])
    assert told["regrown"] == int(case["regrown_same_update_total"])
    expected, parameters = under(case, "mask_after"), dict(learner.model.named_parameters())
    assert learner.masks().keys() == expected.keys()
    for name, mask in learner.masks().items():
        assert torch.equal(mask, expected[name] != 0), name
        torch.testing.assert_close(parameters[name].detach(), case[f"weight_after/{name}"], rtol=0, atol=1e-5)
        torch.testing.assert_close(learner.phase.state.ever[name], case[f"fired/{name}"] != 0)


def test_an_update_alone_is_the_official_one():
    """From the authors' own weights and gradients."""
    case = golden("mask_update_1")
    method = methods.create("svite", density=0.5)
    learner = Learner(method, under(case, "weight_before"), under(case, "mask_before"))
    for name, layer in masked_layers(learner.model).items():
        layer.weight.grad = case[f"grad/{name}"]
    moved = method.pattern.renew(learner.model, float(case["death_rate"]), Growth("gradient"), None)
    assert moved.dropped == int(case["dropped_total"])
    for name, mask in learner.masks().items():
        assert torch.equal(mask, case[f"mask_after/{name}"] != 0), name


def test_eight_steps_are_the_official_ones():
    case = golden("trajectory")
    method = methods.create("svite", density=0.4, update_frequency=2)
    learner = Learner(method, under(case, "init_dense"), under(case, "mask_init"), lr=5e-3, steps=8)
    updated = []
    for step in range(8):
        loss, told = learner.step(step, case[f"images/{step}"], case[f"targets/{step}"].long())
        assert loss == pytest.approx(float(case["losses"][step]), abs=1e-5)
        if told:
            updated.append(step + 1)
            assert told["death_rate"] == pytest.approx(float(case["death_rates"][step]), abs=1e-9)
            for name, packed in under(case, f"mask_after_step{step + 1}").items():
                mask = learner.masks()[name]
                expected = np.unpackbits(packed.numpy(), count=mask.numel()).astype(bool)
                assert np.array_equal(mask.flatten().numpy(), expected), (step, name)
        assert sum(int(mask.sum()) for mask in learner.masks().values()) == int(case["total_nnz"][step])
    assert updated == case["update_steps"].tolist()
    for name, parameter in learner.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), case[f"final/{name}"], rtol=0, atol=1e-4)
    assert told is None
    assert int(learner.model.updates) == 3


def gradients(model, images, targets):
    """Of the classification loss by the names of the weights under masks."""
    logits = model.train()(images.to(model.head.weight.dtype))
    F.cross_entropy(logits, targets).backward()
    return {name: layer.weight.grad for name, layer in masked_layers(model).items()}


def structured_learner(case):
    method = methods.create(
        "svite", pruning_type="structured", atten_density=float(case["atten_density"]),
        other_density=float(case["other_density"]), update_frequency=int(case["steps"]),
    )  # fmt: skip
    weights, masks = under(case, "init_dense"), {}
    for index in range(4):
        heads, neurons = case[f"head_active_before/{index}"], case[f"neuron_active_before/{index}"]
        block = f"blocks.{index}."
        masks[block + "attn.qkv.weight"] = heads.repeat_interleave(8).repeat(3)[:, None].expand(96, 32)
        masks[block + "mlp.fc1.weight"] = neurons[:, None].expand(128, 32)
        masks[block + "mlp.fc2.weight"] = neurons[None, :].expand(32, 128)
    return Learner(method, weights, masks)


def test_heads_and_neurons_are_the_official_ones():
    case = golden("structured_update_1")
    learner = structured_learner(case)
    loss, told = learner.step(int(case["steps"]) - 1, case["images"], case["targets"].long())
    assert loss == pytest.approx(float(case["loss"]), abs=1e-5)
    assert told["death_rate"] == pytest.approx(float(case["death_rate"]), abs=1e-9)
    scores = learner.phase.objective.head_scores()
    start = structured_learner(case)  # before the step, whose gradients they are
    exact = exactly(partial(gradients, images=case["images"], targets=case["targets"].long()), start.model)
    for index, block in enumerate(learner.model.blocks):
        found = scores[index] / len(case["images"])
        torch.testing.assert_close(found[0], case[f"head_death_score/{index}"].float(), rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(found[1], case[f"head_growth_score/{index}"].float(), rtol=1e-4, atol=1e-9)
        direct = score_heads(*(case[f"attn_head_{kind}/{index}"] for kind in ("out", "out_grad"))) / len(case["images"])
        torch.testing.assert_close(direct[0], case[f"head_death_score/{index}"].float(), rtol=1e-4, atol=1e-9)
        assert torch.equal(heads_of(block.attn), case[f"head_active_after/{index}"])
        assert torch.equal(neurons_of(block.mlp), case[f"neuron_active_after/{index}"])
        for kind in ("attn.qkv", "mlp.fc1", "mlp.fc2"):
            name = f"blocks.{index}.{kind}.weight"
            found, gradient = learner.model.get_parameter(name), case[f"grad/{name}"]
            as_near_as_the_authors(found.grad, gradient, exact[name], 1e-6, name)
            rounding = distance(gradient, exact[name].value) + distance(found.grad, exact[name].value)
            allowed = 1e-5 + first_step_change(gradient, rounding, learner.optimizer)
            assert ((found.detach() - case[f"weight_after/{name}"]).abs() <= allowed).all(), name


def first_step_change(gradient, rounding, optimizer):
    """How far a weight's first step can move when its gradient g is known to `rounding`: Adam's is lr x g / (|g| + eps), whatever the size of g, so
    a gradient near 0 decides little. Of each weight; the step rises with g, so its ends are the interval's."""
    (group,) = optimizer.param_groups

    def step(g):
        return group["lr"] * g / (g.abs() + group["eps"])

    gradient = gradient.double()
    return torch.maximum(step(gradient + rounding) - step(gradient), step(gradient) - step(gradient - rounding))


class Given(Noise):
    """The authors' noise, as recorded."""

    def __init__(self, values):
        self.values = values

    def gumbel(self, name, *shape):
        assert shape == self.values.shape[1:]
        return self.values


def selecting(case, k, **changes):
    method = methods.create("svite", token_number=int(k), density=1.0, **changes)
    sparse = method.sparsify(vit())
    weights = {name: value for name, value in under(case, "param").items()}
    sparse.load_state_dict(sparse.state_dict() | method.convert_checkpoint({"model": weights}))
    return method, sparse


def test_selected_tokens_are_the_official_ones():
    case = golden("token_selector")
    for number in range(int(case["num_cases"])):
        one = under(case, f"case{number}")
        _, sparse = selecting(case, one["k"])
        sparse.eval()
        kept, weight = sparse.choose(case["tokens"], Given(one["gumbel_noise"]))
        assert torch.equal(kept.sort().values, one["kept_by_topk"])
        assert torch.equal(weight > 0.5, one["final_mask"] != 0)
        logits = sparse.forward_head(sparse.forward_features(case["images"], Given(one["gumbel_noise"])))
        torch.testing.assert_close(logits, one["logits"], rtol=0, atol=1e-5)
        quiet, _ = sparse.choose(case["tokens"], None)
        assert torch.equal(quiet.sort().values, one["kept_without_noise"])


def test_the_scorers_gradients_are_the_official_ones():
    case = golden("token_selector")
    one = under(case, "st")
    _, sparse = selecting(case, one["k"])
    sparse.train().temperature.fill_(float(one["tau"]))
    logits = sparse.forward_train(case["images"], Given(one["gumbel_noise"]))
    F.cross_entropy(logits, one["targets"]).backward()
    torch.testing.assert_close(logits.detach(), one["logits"], rtol=0, atol=1e-5)
    for name in ("gumbel.weight", "gumbel.bias", "cls_token", "pos_embed"):
        torch.testing.assert_close(sparse.get_parameter(name).grad, one[f"grad_{name}"], rtol=0, atol=1e-7)


def test_the_temperature_is_the_official_one():
    case = under(golden("token_selector"), "tau_schedule")
    total = int(case["total"])
    for version, ends in (("head_version", (10, 0.1)), ("before_jan2022_version", (0.1, 10))):
        found = [temperature(step, total, *ends) for step in case["iteration"].tolist()]
        assert found == pytest.approx(case[version].tolist(), abs=1e-9)


# Properties ---------------------------------------------------------------------------------------------------------

units = st.integers(1, 200)


@given(units, st.floats(0, 1), st.floats(0, 1), st.booleans(), st.integers(0, 2**31))
def test_an_update_keeps_the_number_of_active_units(count, density, rate, has_ties, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(count, generator=generator) < density
    score, growth = torch.rand(2, count, generator=generator)
    if has_ties:
        score, growth = (score * 3).round(), (growth * 2).round()  # many equal, many zero
    dropped = int(np.ceil(rate * int(mask.sum())))
    alive = survivors(score, mask, dropped)
    renewed = grow(growth, alive, int(mask.sum() - alive.sum()))
    assert int(renewed.sum()) == int(mask.sum())
    assert bool((alive <= mask).all())
    assert int(mask.sum() - alive.sum()) >= dropped
    assert bool((alive <= renewed).all())
    if alive.any() and (mask & ~alive).any():
        assert score[alive].min() > score[mask & ~alive].max()  # the lowest die
    grown, left = renewed & ~alive, ~renewed
    if grown.any() and left.any():
        assert growth[grown].min() >= growth[left].max()  # the highest grow


@given(st.floats(0.001, 1), st.integers(1, 400), st.floats(0.05, 1), st.booleans())
def test_no_update_at_or_after_the_end(frequency, steps, end, is_share):
    updates = Updates(frequency if is_share and frequency < 1 else max(int(frequency * 50), 1), end)
    interval, due = updates.interval(steps), [updates.due(done, steps) for done in range(steps + 1)]
    for done in range(1, steps + 1):
        expected = done % interval == 0 and done < end * steps
        assert (due[done] > due[done - 1]) == expected


@given(st.lists(st.lists(st.integers(1, 60), min_size=2, max_size=4), min_size=1, max_size=8), st.floats(0.01, 1))
def test_densities_make_up_the_whole(shapes, density):
    named = {str(number): tuple(shape) for number, shape in enumerate(shapes)}
    found = fixed_erk(named, density)
    sizes = {name: np.prod(shape) for name, shape in named.items()}
    assert all(0 < share <= 1 for share in found.values())
    whole = sum(found[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert whole == pytest.approx(density, rel=1e-9)


VARIANTS = {
    "weights": {"density": 0.5},
    "dense layers": {"sparse_init": "custom", "densities": {"*qkv.weight": 0.3, "head.weight": 0.6}},
    "random growth": {"density": 0.4, "growth": "random"},
    "momentum growth": {"density": 0.4, "growth": "momentum"},
    "SET": {"density": 0.4, "death": "SET"},
    "heads and neurons": {"pruning_type": "structured", "atten_density": 0.5, "other_density": 0.4},
    "random units": {"pruning_type": "structured", "atten_density": 0.5, "growth": "random"},
    "selector": {"density": 0.5, "token_number": 0.6},
    "selector, units": {"pruning_type": "structured", "token_number": 9, "mode": "gather"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_masks_hold_through_training(variant):
    """Ten steps with updates: numbers of active weights per layer stay, masks move, only masked weights are zero, and nothing but the
    weights of linear layers and convolutions is masked: no bias, no norm, no token, no scorer."""
    method = methods.create("svite", update_frequency=2, **VARIANTS[variant])
    learner = Learner(method, steps=10)
    before, moved, updates = learner.masks(), False, []
    for step in range(10):
        torch.manual_seed(step)
        _, told = learner.step(step, *batch(seed=step))
        after = learner.masks()
        for name, mask in after.items():
            assert mask.sum() == before[name].sum()
            moved |= not torch.equal(mask, before[name])
            weight = learner.model.get_parameter(name)
            assert not weight[~mask.expand_as(weight)].any()
        assert all(bool(after[name].all()) for name, mask in before.items() if mask.all())
        updates += [step + 1] if told else []
    assert moved
    assert updates == [2, 4, 6]  # 8 is 0.8 of the steps
    allowed = {name for name, p in learner.model.named_parameters() if p.ndim in (2, 4) and "gumbel" not in name}
    assert set(after) <= allowed
    others = [p for name, p in learner.model.named_parameters() if name not in after and not name.endswith("bias")]
    assert all(bool((p != 0).all()) for p in others)


def test_masks_are_applied_with_the_selector_on():
    """In the official code of the time, they were not: only the patch embedding was sparse."""
    method = methods.create("svite", density=0.5, token_number=0.7, update_frequency=2)
    learner = Learner(method, steps=10)
    for step in range(5):
        learner.step(step, *batch(seed=step))
    expected = fixed_erk({name: tuple(layer.weight.shape) for name, layer in masked_layers(learner.model).items()}, 0.5)
    assert len(expected) == 18
    for form in (learner.model, method.deploy(learner.model)):
        for name, density in expected.items():
            weight = form.get_parameter(name)
            assert (weight != 0).float().mean().item() == pytest.approx(density, abs=4 / weight.numel() ** 0.5)
        assert bool((form.gumbel.weight != 0).all())


def test_masks_that_never_moved_are_told():
    """A training shorter than the update frequency is static sparse training: the row says so."""
    images, _ = batch()
    for frequency, remarks in ((15000, 1), (2, 0)):
        method = methods.create("svite", density=0.5, update_frequency=frequency)
        learner = Learner(method, steps=10)
        for step in range(3):
            learner.step(step, *batch(seed=step))
        for form in (learner.model, method.deploy(learner.model)):
            found = method.report(form, images).remarks
            assert len(found) == remarks
            assert all("never moved: with update_frequency 15000" in line for line in found)


def test_averages_of_a_training_have_its_masks():
    method = methods.create("svite", density=0.4, update_frequency=2)
    sparse = method.sparsify(vit(img_size=24, patch_size=4, num_classes=7))
    training = Training(RECIPE.model_copy(update={"ema": 0.5}), random_data(), plan("cpu", "float32"), 0, 8)
    _, averaged = run_phases(sparse, method.phases(sparse, nn.CrossEntropyLoss()), training)
    deployed = method.deploy(averaged)
    for name, layer in masked_layers(sparse).items():
        mask, weight = layer.weight_mask, averaged.get_parameter(name)
        assert torch.equal(masked_layers(averaged)[name].weight_mask, mask)
        assert bool(weight[~mask].any()) or mask.all()  # masks moved, so the averages are dense; ...
        assert not deployed.get_parameter(name)[~mask].any()  # ... used, they are not


def test_a_skipped_step_postpones_its_update():
    learner = Learner(methods.create("svite", density=0.5, update_frequency=4), steps=20)
    told = {}
    for step in range(20):
        if step in (3, 4, 15):  # as the engine does with a step that is not finite: no hook after it
            learner.phase.before_step(step, 20)
            continue
        _, told[step + 1] = learner.step(step, *batch(seed=step))
    assert [step for step, said in told.items() if said] == [6, 8, 12]  # 16 is the end: too late to wait


def test_taps_are_open_only_where_an_update_wants_them():
    learner = Learner(methods.create("svite", pruning_type="structured", update_frequency=4), steps=20)
    scored = []
    for step in range(8):
        learner.step(step, *batch(seed=step))
        scored.append(learner.phase.objective.taps[0].grad is not None)
    assert scored == [False, False, False, True] * 2
    assert not any("tap" in name for name in learner.model.state_dict())


def test_a_dead_heads_constant_goes_into_the_projection():
    """Biases stay when heads die: the deployed network, which lacks the heads, must put out what they did."""
    method = methods.create("svite", pruning_type="structured", atten_density=0.5, other_density=0.3)
    sparse = method.sparsify(vit()).eval()
    for block in sparse.blocks:
        nn.init.normal_(block.attn.qkv.bias)
        nn.init.normal_(block.mlp.fc1.bias)
    deployed, (images, _) = method.deploy(sparse), batch()
    torch.testing.assert_close(deployed(images), sparse(images), rtol=0, atol=1e-5)
    assert [tuple(p.shape) for p in deployed.blocks[0].parameters() if p.ndim == 2] == [
        (48, 32), (32, 16), (38, 32), (32, 38),
    ]  # fmt: skip
    for form in (sparse, deployed):
        block = method.report(form, images).blocks[0]
        assert torch.equal(block.attention_density[0] > 0, heads_of(sparse.blocks[0].attn))
        assert int(block.active_neurons.sum()) == 38


def test_averages_are_masked_in_evaluation():
    """Weights that no step masks, as the averaged ones."""
    method = methods.create("svite", density=0.3)
    sparse, (images, _) = method.sparsify(vit()).eval(), batch()
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.add_(0.01)
    deployed = method.deploy(sparse)
    torch.testing.assert_close(deployed(images), sparse(images), rtol=0, atol=1e-5)
    share = sum(
        (layer.weight != 0).sum().item() for layer in deployed.modules() if isinstance(layer, nn.Linear | nn.Conv2d)
    )
    assert share / sum(mask.numel() for mask in Learner(method).masks().values()) == pytest.approx(0.3, abs=0.02)


def test_gathered_tokens_are_those_that_masking_keeps():
    """Where CLS is among the chosen, both modes keep the same tokens; the gathered network sees no others."""
    chosen = {}
    for mode in ("mask", "gather"):
        method = methods.create("svite", token_number=9, mode=mode)
        sparse = method.sparsify(vit()).eval()
        torch.manual_seed(2)
        nn.init.normal_(sparse.gumbel.weight)
        images, _ = batch()
        blocks = method.report(sparse, images).blocks
        chosen[mode] = [set(ids[ids >= 0].tolist()) for ids in blocks[0].kept], blocks[0].keys.tolist()
        assert method.deploy(sparse)(images).shape == (8, 5)
    for masked, gathered, count in zip(chosen["mask"][0], chosen["gather"][0], chosen["mask"][1], strict=True):
        assert count == len(masked) + 1
        assert gathered <= masked
        assert len(gathered) == 8
    assert chosen["gather"][1] == [9]
    assert set(chosen["mask"][1]) <= {9, 10}


def test_noise_in_evaluation_belongs_to_the_image():
    method = methods.create("svite", token_number=9, eval_noise=3)
    other = methods.create("svite", token_number=9, eval_noise=4)
    images, _ = batch()
    sparse, elsewhere = (m.sparsify(vit()).eval() for m in (method, other))
    elsewhere.load_state_dict(sparse.state_dict())
    torch.testing.assert_close(sparse(images)[3:5], sparse(images[3:5]), rtol=0, atol=1e-5)
    assert (sparse(images) - elsewhere(images)).abs().max() > 1e-4


def test_set_drops_from_both_sides():
    weight = torch.tensor([0.1, 0.2, 0.3, 0.9, -0.1, -0.2, -0.3, -0.9, 0.0, 0.0])
    alive = by_sign(weight, weight != 0, 0.5)
    assert weight[alive].tolist() == pytest.approx([0.3, 0.9, -0.3, -0.9])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"densities": {"head.weight": 0.5}}, "go together"),
        ({"sparse_init": "custom"}, "go together"),
        ({"pruning_type": "structured", "growth": "momentum"}, "gradient or random"),
        ({"update_frequency": 0}, "update_frequency"),
        ({"update_frequency": 1.0}, "update_frequency"),
        ({"update_frequency": 0.8}, "the first update would come at t_end 0.8 or later"),
        ({"redistribution": "momentum"}, "redistribution"),
        ({"densty": 0.5}, "did you mean 'density'"),
    ],
)
def test_wrong_settings_are_told(wrong, message):
    with pytest.raises(ValueError, match=message):
        methods.create("svite", **wrong)


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"pruning_type": "structured", "atten_density": 0.2}, {}, "block 0: no head of 4 would stay"),
        ({"pruning_type": "structured"}, {"scale_attn_norm": True}, "normalises its heads"),
        ({"token_number": 18}, {}, "18 of 17 tokens"),
        ({"token_number": 1}, {}, "1 of 17 tokens, of which 1 always stay"),
    ],
)
def test_what_cannot_be_done_is_refused(settings, changes, message):
    with pytest.raises(methods.Unsupported, match=message):
        methods.create("svite", **settings).sparsify(vit(**changes))


def test_a_pattern_that_no_weight_has_is_told():
    method = methods.create("svite", sparse_init="custom", densities={"blocks.*.attn.q.weight": 0.5})
    with pytest.raises(methods.Unsupported, match="no weight is called"):
        method.sparsify(vit())


def test_a_released_checkpoint_is_read():
    """Masks baked into the weights, names as under data-parallel training, averaged weights beside them."""
    method = methods.create("svite", density=0.5)
    sparse = method.sparsify(vit())
    weights = {f"module.{name}": p.detach().clone() for name, p in sparse.named_parameters()}
    state = method.convert_checkpoint({"model": weights, "model_ema": {}, "epoch": 3})
    other = methods.create("svite", density=0.9).sparsify(vit())
    other.load_state_dict(state)
    assert mask_densities(other) == pytest.approx(mask_densities(sparse), abs=1e-9)
    assert torch.equal(other.eval()(batch()[0]), sparse.eval()(batch()[0]))


def test_masks_that_were_never_applied_are_not_believed():
    """As in the released SViTE+ checkpoints: half of the mask is zero, the weights are not."""
    method = methods.create("svite", density=0.5, token_number=9)
    dense, sparse = vit(), method.sparsify(vit())
    weights = {name: p.detach() for name, p in dense.named_parameters()}
    weights |= {name: p.detach() for name, p in sparse.named_parameters() if "gumbel" in name}
    masks = {
        f"module.{name}_{n + 2}": layer.weight_mask.float()
        for n, (name, layer) in enumerate(masked_layers(sparse).items())
    }
    masks |= {"module.patch_embed.proj.weight_3": torch.ones(32, 1)}  # a shape that fits nothing
    sparse.load_state_dict(method.convert_checkpoint({"model": weights, "mask": masks}))
    assert min(mask_densities(sparse).values()) > 0.99
    for name, weight in weights.items():
        assert torch.equal(sparse.get_parameter(name), weight)
    (remark,) = method.report(sparse, batch()[0]).remarks
    assert "an imported checkpoint: by its weights, 1.000 dense" in remark


@pytest.mark.parametrize("has_masks", [True, False])
def test_a_structured_checkpoint_is_read(has_masks):
    """Heads and neurons in dictionaries of their own, as masks of whole weights."""
    method = methods.create("svite", pruning_type="structured", atten_density=0.5, other_density=0.4)
    trained = method.sparsify(vit()).eval()
    full = {name: layer.weight_mask.expand_as(layer.weight).float() for name, layer in masked_layers(trained).items()}
    content = {"model": {f"module.{name}": p.detach().clone() for name, p in trained.named_parameters()}}
    if has_masks:
        content["atten_mask"] = {f"module.{name}_mask": mask for name, mask in full.items() if "qkv" in name}
        content["other_mask"] = {f"module.{name}_mask": mask for name, mask in full.items() if "mlp" in name}
    other = method.sparsify(vit()).eval()
    other.load_state_dict(method.convert_checkpoint(content))
    for ours, theirs in zip(method.pattern.units(other), method.pattern.units(trained), strict=True):
        assert torch.equal(ours.heads, theirs.heads)
        assert torch.equal(ours.neurons, theirs.neurons)
    torch.testing.assert_close(method.deploy(other)(batch()[0]), trained(batch()[0]), rtol=0, atol=1e-5)


def test_our_own_state_dict_is_left_as_it_is():
    method = methods.create("svite", density=0.5)
    state = method.sparsify(vit()).state_dict()
    assert state_digest(method.convert_checkpoint({"model": state})) == state_digest(state)


def test_micro_batches_choose_the_same_heads():
    """Scores add up over them, and an attempt that ran out of memory leaves nothing behind."""
    method = methods.create("svite", pruning_type="structured", atten_density=0.5, update_frequency=2)
    found = []
    for micro_batch in (None, 3):
        torch.manual_seed(0)
        sparse = method.sparsify(vit(img_size=24, patch_size=4, num_classes=7))
        options = spec.Training(micro_batch=micro_batch)
        training = Training(RECIPE, random_data(), plan("cpu", "float32"), 0, 8, options=options)
        (log,), _ = run_phases(sparse, method.phases(sparse, nn.CrossEntropyLoss()), training)
        found.append(
            (torch.stack([u.heads for u in method.pattern.units(sparse)]), [event["regrown"] for event in log.events])
        )
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@torch.no_grad()
def _let_class_tokens_compete(sparse, images):
    """Gives the scorer weights under which the class token scores 0 and patches spread about evenly around it: it is among the best 9 of 17 tokens in
    some images and not in others, whatever network timm's initialisation made."""
    tokens, weight = embed(sparse, images), sparse.gumbel.weight.normal_()
    weight -= weight @ tokens[0, 0, :, None] * tokens[0, 0] / tokens[0, 0].square().sum()
    sparse.gumbel.bias.zero_()
    across = (tokens[:, 1:] @ weight[0]).mean(dim=(0, 1))
    mean = tokens[:, 1:].mean(dim=(0, 1))
    mean -= (mean @ tokens[0, 0]) / tokens[0, 0].square().sum() * tokens[0, 0]
    weight -= across * mean / mean.square().sum()


def test_zeroed_tokens_have_fixed_shapes():
    """In `mask` mode counts differ by one from image to image, but the work does not: such a network can be compiled, and captured."""
    method = methods.create("svite", token_number=9)
    sparse = method.sparsify(vit()).eval()
    images = batch(64)[0]
    _let_class_tokens_compete(sparse, images)
    report = method.report(sparse, images)
    assert len(set(report.blocks[0].keys.tolist())) == 2
    assert cost.varies(report)
    assert not cost.shapes_vary(report)


def test_a_released_checkpoint_stands_for_the_training(tmp_path):
    """As an entry's `phases: {train: FILE}`: the authors' file with its arguments, masks under running numbers, names of data-parallel
    training."""
    method = methods.create("svite", density=0.5)
    trained = method.sparsify(vit())
    with torch.no_grad():
        trained.head.weight[0] = 0.0  # active weights may be zero: the masks say which are
    content = {
        "model": {f"module.{name}": p.detach().clone() for name, p in trained.named_parameters()},
        "mask": {f"module.{name}_{n}": mask_of.weight_mask.float() for n, (name, mask_of) in enumerate(masked_layers(trained).items())},
        "args": argparse.Namespace(density=0.5),
    }  # fmt: skip
    torch.save(content, tmp_path / "authors.pth")
    torch.save({"model": {"x": 3}}, tmp_path / "other.pth")
    sparse = method.sparsify(vit())
    training = functools.partial(
        Training, RECIPE, random_data(), plan("cpu", "float32"), 0, 4, convert=method.convert_checkpoint
    )
    (log,), _ = run_phases(
        sparse,
        method.phases(sparse, nn.CrossEntropyLoss()),
        training(given={"train": tmp_path / "authors.pth"}),
    )
    assert (log.source, log.steps) == ("authors.pth", 0)
    trained.updates.fill_(-1)
    assert state_digest(sparse.state_dict()) == state_digest(trained.state_dict())
    with pytest.raises(UserError, match="not a checkpoint of this method"):
        run_phases(
            sparse, method.phases(sparse, nn.CrossEntropyLoss()), training(given={"train": tmp_path / "other.pth"})
        )


# Magnitude pruning ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", ["fixed_ERK", "uniform", "global"])
def test_magnitude_pruning_keeps_the_largest(spread):
    dense = vit()
    sparse = methods.create("magnitude", density=0.5, sparse_init=spread).sparsify(dense)
    parameters, layers = dict(dense.named_parameters()), masked_layers(sparse)
    masks = {name: layer.weight_mask for name, layer in layers.items()}
    of_all = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    assert of_all == pytest.approx(0.5, abs=1e-3)
    sizes = {name: parameters[name].detach().abs() for name in masks}
    if spread == "global":
        kept = torch.cat([size[masks[name]] for name, size in sizes.items()])
        lost = torch.cat([size[~masks[name]] for name, size in sizes.items()])
        assert kept.min() >= lost.max()
    else:
        expected = (
            fixed_erk({name: tuple(size.shape) for name, size in sizes.items()}, 0.5) if spread == "fixed_ERK" else None
        )
        for name, size in sizes.items():
            assert masks[name].all() or size[masks[name]].min() >= size[~masks[name]].max()
            assert masks[name].float().mean().item() == pytest.approx(expected[name] if expected else 0.5, abs=1e-2)


# Costs ---------------------------------------------------------------------------------------------------------------


@cache
def deit(size):
    return timm.create_model(f"deit_{size}_patch16_224").eval()


@pytest.mark.parametrize(
    ("size", "density"),
    [*((size, d) for size in ("tiny", "small") for d in (0.3, 0.4, 0.5, 0.6, 0.7)), ("base", 0.3), ("base", 0.6)],
)
def test_savings_are_the_papers(size, density):
    """Masks are drawn, so the numbers of weights are right to a thousandth or so."""
    expected = json.loads((GOLDEN / "flops_reference.json").read_text())[f"deit_{size}_patch16_224"]
    sparse = methods.create("svite", density=density).sparsify(deit(size))
    report = methods.create("svite").report(sparse, torch.zeros(1, 3, 224, 224))
    macs, row = theoretical_macs(deit(size), report, (224, 224)), expected["unstructured"][str(density)]
    assert 100 * (1 - macs / expected["dense_MACs"]) == pytest.approx(row["saving_pct"], abs=0.1)


@pytest.mark.parametrize(
    ("size", "other", "of_paper", "deployed", "macs"),
    [("tiny", 0.7, 4.21, 4.06, 0.8682), ("small", 0.6, 14.60, 14.01, 2.8983), ("base", 0.6, 56.81, 54.45, 11.0036)],
)
def test_heads_and_neurons_cost_what_the_paper_says(size, other, of_paper, deployed, macs):
    """As the paper counts, the projection whole; and as deployed, the dead heads' columns gone."""
    method = methods.create("svite", pruning_type="structured", atten_density=0.7, other_density=other)
    sparse = method.sparsify(deit(size)).eval()
    costs = cost.count(method, deit(size), sparse, method.deploy(sparse), torch.zeros(1, 3, 224, 224)).record()
    expected = json.loads((GOLDEN / "flops_reference.json").read_text())[f"deit_{size}_patch16_224"]
    row = expected["structured_compact"][f"{100 * other:.0f}"]
    assert (costs["macs_theoretical"], costs["params_theoretical"]) == (row["MACs"], row["params"])
    assert round(costs["params_theoretical"] / 1e6, 2) == of_paper
    assert round(costs["params"] / 1e6, 2) == deployed
    assert round(costs["macs_executed"] / 1e9, 4) == macs


def test_what_masks_but_does_not_skip_says_so():
    """Zeros in dense weights, tokens that are zero: the run is dense, whatever the theory."""
    for settings_, theory in (({"density": 0.5}, 0.6), ({"density": 1.0, "token_number": 0.5}, 0.6)):
        method, backbone = methods.create("svite", **settings_), vit()
        sparse = method.sparsify(backbone).eval()
        costs = cost.count(method, backbone, sparse, method.deploy(sparse), batch(2)[0]).record()
        scorer = 17 * 32 if "token_number" in settings_ else 0
        assert costs["macs_executed"] == costs["macs_dense"] + scorer
        assert costs["macs_theoretical"] < theory * costs["macs_dense"]
        said = not_skipped(costs["macs_dense"], costs["macs_theoretical"], costs["macs_executed"], costs["parts"])
        assert "masked, not skipped" in said
    assert costs["params_nonzero"] == costs["params"]
