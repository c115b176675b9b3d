"""A deployed model is all in its state dict: saved, and loaded into the deployed form of an untrained model."""

import copy
import io

import pytest
import timm
import torch
from safetensors.torch import load, save
from torch import nn

import methods

SIZES = {"img_size": 24, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
IMAGES = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def sparse_of(method, seed):
    torch.manual_seed(seed)
    return method.sparsify(timm.create_model("vit_tiny_patch16_224", **SIZES)).eval()


def calibrated(method, seed=1):
    """As if trained: other weights, thresholds and masks than a fresh one has."""
    sparse = sparse_of(method, seed)
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        method.calibrate(sparse, IMAGES, 0.6)
    return sparse


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def restored(method, state):
    other = method.deploy(sparse_of(method, seed=2))
    other.load_state_dict(state)
    return other


METHODS = {
    "dense": ("dense", {}),
    "magnitude": ("magnitude", {"sparse_init": "global"}),
    "random": ("random", {}),
    "dynamicvit": ("dynamicvit", {}),
    "svite": ("svite", {}),
    "svite, structured": ("svite", {"pruning_type": "structured"}),
    "svite+": ("svite", {"token_number": 0.7}),
    "sttabt": ("sttabt", {}),
    "sttabt, topk": ("sttabt", {"variant": "topk"}),
    "vitcod": ("vitcod", {"sparsity": 0.7}),
    "vitcod, no code": ("vitcod", {"sparsity": 0.7, "svd_type": "none"}),
}


@pytest.mark.parametrize(("name", "settings"), METHODS.values(), ids=METHODS)
@torch.no_grad()
def test_predictions_and_densities_come_back(name, settings):
    method = methods.create(name, **settings)
    deployed = method.deploy(calibrated(method))
    other = restored(method, through_a_file(deployed.state_dict()))
    assert torch.equal(other(IMAGES), deployed(IMAGES))
    assert method.report(other, IMAGES).weight_density == method.report(deployed, IMAGES).weight_density


@pytest.mark.parametrize(("name", "settings"), METHODS.values(), ids=METHODS)
@torch.no_grad()
def test_safetensors_hold_it_too(name, settings):
    """Tensors alone, each with a name."""
    method = methods.create(name, **settings)
    deployed = method.deploy(calibrated(method))
    state = {key: value.clone().contiguous() for key, value in deployed.state_dict().items()}
    assert torch.equal(restored(method, load(save(state)))(IMAGES), deployed(IMAGES))


@pytest.mark.parametrize("kernel", ["fused", "plain", "listed"])
@torch.no_grad()
def test_fixed_masks_come_back_for_every_kernel(kernel):
    """What a kernel needs is made of the mask that is loaded, in the model that loads."""
    method = methods.create("vitcod", sparsity=0.7)
    deployed = method.deploy(calibrated(method))
    other = method.deploy(calibrated(method, seed=3))
    for attention in other.attentions:
        attention.use_kernel(kernel, torch.device("cpu"))
    other.load_state_dict(through_a_file(deployed.state_dict()))
    assert all(attention.kernel == kernel for attention in other.attentions)
    torch.testing.assert_close(other(IMAGES), deployed(IMAGES), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_mask_that_is_no_longer_worth_a_kernel():
    """A model with lists loads a mask that keeps everything: no list is shorter then."""
    method = methods.create("vitcod", sparsity=0.7)
    everything, other = method.deploy(sparse_of(method, 1)), method.deploy(calibrated(method))
    for attention in other.attentions:
        attention.use_kernel("listed", torch.device("cpu"))
    other.load_state_dict(everything.state_dict())
    assert {attention.kernel for attention in other.attentions} == {"fused"}
    assert all(attention.bias is None for attention in other.attentions)
    assert torch.equal(other(IMAGES), everything(IMAGES))


@torch.no_grad()
def test_thresholds_stay_float32_on_the_cpu_and_come_back():
    method = methods.create("sttabt")
    deployed = method.deploy(calibrated(method))
    thresholds = deployed.p_logit.clone()
    half = copy.deepcopy(deployed).to(torch.bfloat16)
    assert half.p_logit.dtype == torch.float32
    assert torch.equal(half.p_logit, thresholds)
    assert copy.deepcopy(deployed).to("meta").p_logit.device.type == "cpu"
    other = restored(method, through_a_file(half.state_dict()))
    assert torch.equal(other.p_logit, thresholds)
    assert "p_logit" in dict(other.named_buffers())


def imported(method, heads, neurons):
    """A network as a checkpoint of the authors' may be: with so many heads and neurons in each block, which differ."""
    sparse = sparse_of(method, 1)
    for block, kept, active in zip(sparse.blocks, heads, neurons, strict=True):
        mask = torch.zeros(3, block.attn.num_heads, block.attn.head_dim, dtype=torch.bool)
        mask[:, :kept] = True
        block.attn.qkv.weight_mask.copy_(mask.flatten()[:, None])
        block.mlp.fc1.weight_mask.copy_((torch.arange(192) < active)[:, None])
        block.mlp.fc2.weight_mask.copy_((torch.arange(192) < active)[None, :])
    return sparse


@pytest.mark.parametrize(
    ("heads", "neurons"), [((1, 2, 3, 2), (10, 100, 192, 1)), ((3, 3, 3, 3), (192,) * 4), ((1, 1, 1, 1), (115,) * 4)]
)
@torch.no_grad()
def test_numbers_of_heads_that_the_settings_do_not_say(heads, neurons):
    method = methods.create("svite", pruning_type="structured")
    deployed = method.deploy(imported(method, heads, neurons))
    other = restored(method, through_a_file(deployed.state_dict()))
    assert torch.equal(other(IMAGES), deployed(IMAGES))
    assert [block.attn.num_heads for block in other.blocks] == list(heads)
    assert [int(block.active_neurons.sum()) for block in method.report(other, IMAGES).blocks] == list(neurons)
    assert [block.mlp.fc1.out_features for block in other.blocks] == list(neurons)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("blocks.0.mlp.fc1.weight", (115, 40)), ("blocks.0.attn.proj.weight", (40, 32)), ("head.weight", (9, 48))],
)
def test_another_network_is_still_refused(name, shape):
    """Only the side that was cut may differ."""
    method = methods.create("svite", pruning_type="structured")
    state = method.deploy(calibrated(method)).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        restored(method, state | {name: torch.zeros(shape)})


@torch.no_grad()
def test_a_weight_that_is_on_counts_though_it_is_zero():
    """As one that has just grown: the density is the mask's, before and after."""
    method = methods.create("svite", density=0.5)
    sparse = calibrated(method)
    layer = sparse.blocks[0].mlp.fc1
    layer.weight.zero_()
    expected = method.report(sparse, IMAGES).weight_density
    other = restored(method, through_a_file(method.deploy(sparse).state_dict()))
    assert method.report(other, IMAGES).weight_density == expected
    assert expected["blocks.0.mlp.fc1.weight"] == pytest.approx(float(layer.weight_mask.double().mean()))
    assert isinstance(other.blocks[0].mlp.fc1, nn.Linear)
