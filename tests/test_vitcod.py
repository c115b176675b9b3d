"""ViTCoD against the authors' numbers, and what must hold for any mask, kernel and backbone."""

import argparse
import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import bench, tiny_spec, vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import methods
from harness import cost, modes, spec
from harness.device import plan
from harness.errors import UserError
from harness.latency import Conditions, compare
from harness.models import state_digest
from harness.rules import RECIPE, random_data
from harness.training.engine import run_phases
from harness.training.setup import Training
from methods.core import native
from methods.core.noise import Noise
from methods.core.operators import listed_attention, tiled_attention
from methods.core.pooled import value_of
from methods.core.tiling import listed, ordered, tiled
from methods.vitcod import deployed as deployed_form
from methods.vitcod import masks
from methods.vitcod.autoencoder import hidden_heads
from methods.vitcod.reorder import reorder
from methods.vitcod.simulator import simulate
from methods.vitcod.statistics import AverageAttention, HeadStatistics

pytestmark = pytest.mark.rounding

GOLDEN = Path(__file__).parent / "golden" / "vitcod"
SIZES = {"img_size": 32, "patch_size": 8, "num_classes": 5, "embed_dim": 32, "depth": 4, "num_heads": 4}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
CPU = torch.device("cpu")


@cache
def golden(name):
    """A file's arrays as tensors."""
    return {key: torch.as_tensor(value) for key, value in np.load(GOLDEN / f"{name}.npz").items()}


def under(case, prefix):
    return {key.removeprefix(prefix): value for key, value in case.items() if key.startswith(prefix)}


def vit(**changes):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **(SIZES | changes))


def images(count=4, seed=0, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def official(svd_type="mix_head_fc_qk", kept=None, **changes):
    """The method, and its network with the authors' weights and masks."""
    method = methods.create(
        "vitcod", sparsity=0.6, svd_type=svd_type, reconstruction=1e-4 / math.sqrt(64 / 2), **changes
    )
    sparse = method.sparsify(vit()).eval()
    state = under(golden("a_lowrank_seed0"), "w.")
    sparse.load_state_dict(sparse.state_dict() | {name: state[name] for name in sparse.state_dict() if name in state})
    for attention, mask in zip(sparse.attentions, [] if kept is None else kept, strict=False):
        attention.kept.copy_(mask)
    return method, sparse


def inside(sparse, x):
    """What every attention decodes and weighs, and its output."""
    found = []
    with torch.no_grad():
        for _, attention, tokens in sparse.walk(x):
            q, k, _ = attention.queries_keys_values(tokens)
            q_hat, k_hat = attention.decoded(q, k)
            found.append((tokens, q_hat, k_hat, attention.attention(q_hat, k_hat), attention(tokens)))
    return found


def objective_of(method, sparse):
    return method.phases(sparse, nn.CrossEntropyLoss())[-1].objective


def terms_of(objective, x, y):
    return {name: value_of(term) for name, term in objective.train()(x, y, Noise(0, 0, torch.arange(len(x)))).items()}


def random_kept(heads, tokens, density, seed=0):
    kept = torch.rand(heads, tokens, tokens, generator=torch.Generator().manual_seed(seed)) < density
    return kept | torch.eye(tokens, dtype=torch.bool)


# The authors' numbers ------------------------------------------------------------------------------------------------


def test_the_forward_is_the_official_one():
    case, (_, sparse) = golden("a_lowrank_seed0"), official()
    with torch.no_grad():
        torch.testing.assert_close(sparse(case["in.x"]), case["out.logits"], **CLOSE)
    for index, found in enumerate(inside(sparse, case["in.x"])):
        for value, key in zip(found, ("attn_in", "q_hat", "k_hat", "attn", "attn_out"), strict=True):
            torch.testing.assert_close(value, case[f"out.{key}.{index}"], **CLOSE)


def test_without_an_auto_encoder_and_with_one_for_queries():
    case = golden("a_lowrank_seed0")
    for svd_type, key in (("none", "noae"), ("mix_head_fc_q", "qonly")):
        _, sparse = official(svd_type)
        with torch.no_grad():
            torch.testing.assert_close(sparse(case["in.x"]), case[f"{key}.logits"], **CLOSE)
    _, sparse = official("none")
    for index in (0, 3):
        torch.testing.assert_close(inside(sparse, case["in.x"])[index][3], case[f"noae.attn.{index}"], **CLOSE)


def test_losses_and_gradients_are_the_official_ones():
    case, (method, sparse) = golden("a_lowrank_seed0"), official()
    sparse.train()(case["in.x"])
    norms = sparse.take_distances().sqrt().sum(dim=1)
    assert sparse.take_distances() is None
    torch.testing.assert_close(norms, case["out.recon_loss_per_layer"], rtol=1e-6, atol=0)
    terms = terms_of(objective_of(method, sparse), case["in.x"], case["in.y"].long())
    assert terms["reconstruction"].item() == pytest.approx(1e-4 * case["out.recon_loss"].item(), rel=1e-6)
    assert terms["classification"].item() == pytest.approx(case["out.ce"].item(), abs=1e-5)
    sum(terms.values()).backward()
    same_gradients(sparse, under(case, "out.grad."))


def same_gradients(sparse, expected):
    found = dict(sparse.named_parameters())
    assert len(expected) > 30
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].grad, gradient, rtol=1e-4, atol=1e-5)


def test_three_heads_are_coded_in_two():
    case = golden("a_attention_heads3")
    sparse = methods.create("vitcod", sparsity=0.5).sparsify(vit(img_size=(16, 32), embed_dim=24, num_heads=3)).eval()
    attention = sparse.attentions[0]
    attention.load_state_dict(attention.state_dict() | under(case, "w."))
    attention.train()  # in which distances are noted; there is no dropout
    torch.testing.assert_close(attention(case["in.x"]), case["out.y"], **CLOSE)
    assert attention.distances.sqrt().sum().item() == pytest.approx(case["out.recon_loss"].item(), rel=1e-6)


def averaged():
    return golden("b_masks_seed0")["avg_attn"]


def test_averaged_attention_is_the_official_one():
    _, sparse = official()
    statistics = AverageAttention(sparse)
    with torch.no_grad():
        for part in golden("b_masks_seed0")["in.x_train"].split(8):
            statistics(part, None)
    statistics.finish()
    torch.testing.assert_close(torch.stack([a.average for a in sparse.attentions]), averaged(), **CLOSE)


def test_masks_are_the_official_ones():
    case, compared = golden("b_masks_seed0"), 0
    for key, pruned in case.items():
        name, _, rest = key.partition(".")
        if not key.endswith(".mask") or name == "reorder":
            continue
        value = float(rest.removesuffix(".mask"))
        make = {"info": masks.info_masks, "ratio": masks.ratio_masks, "std": masks.std_masks}[name]
        kept = make(averaged(), value)
        empty = pruned.all(dim=-1)  # its softmax has no numbers there; here such a row keeps its largest entry
        assert name == "std" or not empty.any()
        assert torch.equal(~kept[~empty], pruned[~empty]), key
        assert (kept[empty].sum(dim=-1) == 1).all()
        compared += 1
    assert compared >= 14
    for key, counts in case.items():
        if key.endswith(".kept_before_cls"):
            cut = float(key.removeprefix("info.").removesuffix(".kept_before_cls"))
            assert torch.equal(masks.info_masks(averaged(), cut, prefix=0).sum(dim=-1), counts.long())
            sparsity = float(case[key.replace("kept_before_cls", "sparsity")])
            assert masks.sparsity_of(masks.info_masks(averaged(), cut)) == pytest.approx(sparsity)


def test_the_reordering_is_the_official_one():
    case, compared = golden("b_masks_seed0"), 0
    for key in case:
        if not key.startswith("reorder.") or not key.endswith(".num_global"):
            continue
        prefix = key.removesuffix(".num_global")
        cut, threshold = prefix.removeprefix("reorder.").rsplit(".thr", 1)
        pruned = case[f"info.{cut}.mask"]
        for block, head in np.ndindex(4, 4):
            found = reorder(~pruned[block, head], int(threshold))
            assert found.global_tokens == int(case[key][block, head])
            assert torch.equal(~found.kept, case[f"{prefix}.mask"][block, head].bool())
            assert torch.equal(found.label, case[f"{prefix}.new_label"][block, head].long())
            assert found.dense_kept == int(case[f"{prefix}.dense_nnz"][block, head])
            assert found.all_kept == int(case[f"{prefix}.total_nnz"][block, head])
            compared += 1
    assert compared >= 48


@pytest.mark.parametrize("cut", ["0.31", "0.58", "0.9"])
def test_training_under_masks_is_the_official_one(cut):
    case = under(golden("c_masked_seed0"), f"info{cut}.")
    data, kept = golden("a_lowrank_seed0"), ~golden("b_masks_seed0")[f"info.{cut}.mask"]
    method, sparse = official(kept=kept)
    for index, found in enumerate(inside(sparse, data["in.x"])):
        torch.testing.assert_close(found[3], case[f"attn.{index}"], **CLOSE)
    terms = terms_of(objective_of(method, sparse), data["in.x"], data["in.y"].long())
    assert terms["reconstruction"].item() == pytest.approx(1e-4 * case["recon_loss"].item(), rel=1e-6)
    sum(terms.values()).backward()
    same_gradients(sparse, under(case, "grad."))
    for svd_type, key in (("mix_head_fc_qk", "logits"), ("none", "noae_logits")):
        method, sparse = official(svd_type, kept)
        deployed = method.deploy(sparse)
        for model in (sparse, *(with_kernel(deployed, kernel) for kernel in ("fused", "plain", "listed"))):
            with torch.inference_mode():
                torch.testing.assert_close(model(data["in.x"]), case[key], **CLOSE)


def test_the_accelerators_cycles_by_hand():
    """Five tokens, two heads of 64 numbers, half of the heads coded; a layer whose first head has one global column and four entries beside it."""
    kept = torch.zeros(2, 5, 5, dtype=torch.bool)
    kept[:, :, 0] = True
    kept[:, 0, 1:] = True
    found = simulate([kept], width=64, rho=0.5)
    # 64 coded numbers, 1 of weights and 128 of values take a cycle each to load. Dense: 1 + 1 + 5 + 1; sparse: 4 + 1; values 5.
    assert found.loads == 8 + 5 + 5
    assert found.decoder == (6 + 4) * 1  # 64 numbers by 2,048 multipliers
    # Lines: 64 * 5 // 9 = 35 dense, 29 sparse. Scores: ceil(5 / 35) * 2 and ceil(4 / 29) * 2; values: ceil(5 * 64 / 1120), ceil(4 * 64 / 928).
    assert found.products == 2 + 1
    assert found.attention == 18
    # m = 256: projections 3 * 5 * (128 * 64 // 256) + 5 * 128 * 64 // 256 = 640; the MLP 2 * (4 * 5 * 128 * 128 // 512) = 1280. Loads:
    # 3 * 64 * 2 + 2 * (1 + 5 * 1) + 5 * 1 + 0 = 401.
    assert found.linear == 640 + 1280
    assert found.total == found.attention + found.linear


def test_the_accelerator_takes_any_mask():
    """What is divided by zero in the authors' script: no global column, nothing beside them, no mask at all."""
    for kept in (torch.eye(20, dtype=torch.bool), torch.ones(20, 20, dtype=torch.bool)):
        for heads in ("first", "all"):
            found = simulate([kept.expand(3, -1, -1)] * 2, 64, 2 / 3, heads)
            assert 0 < found.attention < found.total < math.inf
    uneven = torch.stack([torch.eye(20, dtype=torch.bool), torch.ones(20, 20, dtype=torch.bool)])
    assert simulate([uneven], 64, 0.5, "all").products > simulate([uneven], 64, 0.5, "first").products


# Masks ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    tokens=st.integers(3, 30),
    heads=st.integers(1, 3),
    prefix=st.integers(0, 2),
    seed=st.integers(0, 1000),
    cut=st.floats(0, 1),
)
def test_info_masks_keep_the_mass_that_was_asked_for(tokens, heads, prefix, seed, cut):
    average = (4 * torch.randn(1, heads, tokens, tokens, generator=torch.Generator().manual_seed(seed))).softmax(-1)
    kept = masks.info_masks(average, cut, prefix)
    assert kept[..., :prefix, :].all()
    assert kept[..., :, :prefix].all()
    mass = (average.double() * kept).sum(dim=-1)
    assert (mass >= min(cut, float(average.double().sum(dim=-1).min())) - 1e-9).all()
    counts = masks.info_masks(average, cut, 0).sum(dim=-1)
    smaller = torch.where(masks.info_masks(average, cut, 0), average, torch.inf).amin(dim=-1)
    larger = torch.where(masks.info_masks(average, cut, 0), -torch.inf, average).amax(dim=-1)
    assert ((smaller >= larger) | (counts == tokens)).all()


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), sparsity=st.floats(0.05, 0.9))
def test_the_cut_that_gives_a_sparsity(seed, sparsity):
    average = (3 * torch.randn(2, 2, 40, 40, generator=torch.Generator().manual_seed(seed))).softmax(-1)
    cut = masks.cut_for(average, sparsity)
    assert masks.sparsity_of(masks.info_masks(average, cut)) == pytest.approx(sparsity, abs=5e-3)


def test_what_cannot_be_is_told():
    average = torch.full((1, 1, 10, 10), 0.1)
    assert masks.info_masks(average, masks.cut_for(average, 0.0)).all()
    assert masks.info_masks(average, masks.cut_for(average, 0.9)).sum() == 100 - 72  # as near as it can be
    sharp = torch.rand(1, 2, 50, 50, generator=torch.Generator().manual_seed(0)) ** 40
    sharp = sharp / sharp.sum(dim=-1, keepdim=True)
    for sparsity in (0.0, 0.01, 0.5, 0.9):
        found = masks.sparsity_of(masks.info_masks(sharp, masks.cut_for(sharp, sparsity)))
        assert abs(found - sparsity) < 0.35
    with pytest.raises(
        methods.Unsupported, match=r"with 17 tokens, of which 1 are protected, at most 0\.8304 can be pruned"
    ):
        methods.create("vitcod", sparsity=0.9).sparsify(vit())


@settings(max_examples=20)
@given(tokens=st.integers(5, 60), sparsity=st.floats(0, 0.85), prefix=st.integers(0, 2), heads=st.integers(1, 3))
def test_the_made_up_pattern_is_as_sparse_as_asked_for(tokens, sparsity, prefix, heads):
    kept = masks.patterned_mask(tokens, heads, sparsity, prefix)
    assert kept.any(dim=-1).all()
    least = tokens**2 - (tokens - prefix) * (tokens - prefix - 1)
    expected = max(round((1 - sparsity) * tokens**2), least)
    assert all(abs(int(one.sum()) - expected) <= 2 * tokens * (sparsity > 0.7) for one in kept)


def test_random_masks_prune_what_they_say():
    torch.manual_seed(0)
    kept = masks.random_masks((2, 3, 80, 80), 0.8)
    assert kept[..., 0, :].all()
    assert kept[..., 0].all()
    assert (kept.sum(dim=(-2, -1)) == round(0.2 * 80**2)).all()
    assert kept[:, :, range(80), range(80)].all()
    assert not torch.equal(kept[0], kept[1])


# Kernels -------------------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(
    tokens=st.integers(2, 70), heads=st.integers(1, 4), width=st.sampled_from([1, 8, 16, 20, 32, 64, 80, 128]),
    density=st.floats(0.01, 1), batch=st.integers(1, 3), seed=st.integers(0, 1000),
)  # fmt: skip
def test_attention_over_lists_is_attention_under_the_mask(tokens, heads, width, density, batch, seed):
    kept = random_kept(heads, tokens, density, seed)
    qkv = 3 * torch.randn(batch, tokens, 3 * heads * width, generator=torch.Generator().manual_seed(seed))
    q, k, v = qkv.view(batch, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=kept).transpose(1, 2).flatten(2)
    torch.testing.assert_close(listed_attention(qkv, *listed(kept), heads), expected, atol=1e-4, rtol=1e-3)


@vectors
def test_attention_by_tiles_is_attention_under_the_mask():
    """On the CPU here, where it compiles to C++; a GPU is where it is used."""
    kept = random_kept(3, 70, 0.05)
    found = tiled(kept, 16)
    q, k, v = torch.randn(3, 2, 3, 70, 32, generator=torch.Generator().manual_seed(0))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=kept)
    mine = [
        x.gather(2, order[None, :, :, None].expand_as(x))
        for x, order in zip((q, k, v), (found.queries, found.keys, found.keys), strict=True)
    ]
    bias = torch.zeros(found.kept.shape).masked_fill(~found.kept, -torch.inf)
    out = tiled_attention(*mine, bias, found.counts, found.indices, 16, found.tiles)
    back = found.queries.argsort(dim=-1)[None, :, :, None].expand_as(out)
    torch.testing.assert_close(out.gather(2, back), expected, atol=1e-5, rtol=1e-4)


@settings(max_examples=20)
@given(
    tokens=st.integers(1, 60), size=st.sampled_from([4, 16, 32]), density=st.floats(0, 0.5), seed=st.integers(0, 1000)
)
def test_tiles_hold_every_entry_once(tokens, size, density, seed):
    kept = random_kept(2, tokens, density, seed)
    found = tiled(kept, size)
    for head in range(2):
        assert sorted(found.queries[head].tolist()) == sorted(found.keys[head].tolist()) == list(range(tokens))
        assert torch.equal(found.kept[head], kept[head][found.queries[head]][:, found.keys[head]])
        for row, count in enumerate(found.counts[head].tolist()):
            named = set(found.indices[head, row, :count].tolist())
            used = {int(key) // size for key in found.kept[head, row * size : (row + 1) * size].nonzero()[:, 1]}
            assert named == used
    assert found.tiles == int(found.counts.sum())


def test_orders_make_tiles_few():
    """Columns that all queries want, scattered, and queries that want two neighbourhoods by turns."""
    tokens = torch.arange(64)
    kept = (tokens[:, None] % 2 == tokens % 2) & (tokens % 4 < 2) | (tokens % 16 == 5)
    as_it_is = kept.view(4, 16, 4, 16).any(dim=3).any(dim=1).sum()
    rows, columns = ordered(kept.numpy(), 16)
    moved = kept[torch.from_numpy(rows)][:, torch.from_numpy(columns)].view(4, 16, 4, 16).any(dim=3).any(dim=1).sum()
    assert as_it_is == 16
    assert moved <= 8


def with_kernel(deployed, kernel):
    for attention in (block.attn for block in deployed.blocks):
        attention.use_kernel(kernel, CPU)
    return deployed


def untrained(changes=None, backbone=None, **settings_):
    """A method, its backbone, the form that trains with made-up masks and strong auto-encoders, and the form that ships."""
    method, dense = (
        methods.create("vitcod", **({"sparsity": 0.6} | settings_)),
        backbone or vit(**(changes or {})).eval(),
    )
    sparse = method.sparsify(dense).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sparse.named_parameters():
        if "coder" in name or "qkv" in name:
            parameter.data.normal_(0, 0.4, generator=generator)
    method.calibrate(sparse, images(), 0.7)
    return method, dense, sparse, method.deploy(sparse)


@pytest.mark.parametrize("svd_type", ["mix_head_fc_qk", "mix_head_fc_q", "mix_head_fc_k", "none"])
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"embed_dim": 60, "num_heads": 3}, {"global_pool": "avg", "class_token": False}, {"reg_tokens": 2}, {"qkv_bias": False},
        {"embed_dim": 28, "num_heads": 7}, {"img_size": 64, "patch_size": 4},
    ],
)  # fmt: skip
def test_deployed_predicts_the_same_with_every_kernel(svd_type, changes):
    _, _, sparse, deployed = untrained(changes, svd_type=svd_type)
    x = images(size=changes.get("img_size", 32))
    assert not [name for name, _ in deployed.named_parameters() if "coder" in name]
    assert deployed.blocks[0].attn.kernels(CPU) == ("fused", "plain", "listed")
    with torch.inference_mode():
        expected = sparse(x)
        for kernel in ("fused", "plain", "listed"):
            torch.testing.assert_close(with_kernel(deployed, kernel)(x), expected, **CLOSE)


def test_577_tokens():
    method, _, sparse, deployed = untrained(
        {"img_size": 96, "patch_size": 4, "depth": 1, "num_heads": 5, "embed_dim": 40}, sparsity=0.9
    )
    assert sparse.tokens == 577
    with torch.inference_mode():
        torch.testing.assert_close(
            with_kernel(deployed, "listed")(images(2, size=96)), sparse(images(2, size=96)), **CLOSE
        )
    kept = sparse.attentions[0].kept
    assert int((kept[1].sum(dim=0) == 577).sum()) == 24 + 1  # the generator's columns, and CLS
    assert "prunes 0.900" in " ".join(method.report(sparse, images(1, size=96)).remarks)


def test_normalised_queries_go_without_an_auto_encoder():
    backbone = vit(qk_norm=True)
    with pytest.raises(methods.Unsupported, match="svd_type: none works"):
        methods.create("vitcod", sparsity=0.6).sparsify(backbone)
    _, _, sparse, deployed = untrained(backbone=backbone.eval(), svd_type="none")
    with torch.inference_mode():
        torch.testing.assert_close(deployed(images()), sparse(images()), **CLOSE)


def test_the_fastest_kernel_is_taken_and_the_count_follows(monkeypatch):
    """The dense kernels are made slow: entries that are not kept are not computed then, and the row says so."""
    import time

    method, dense, sparse, deployed = untrained()
    costs = cost.count(method, dense, sparse, deployed, images(2)).record()
    assert costs["macs_executed"] == costs["macs_dense"]  # as it is deployed it computes all, under the mask
    coding = sum(float(extra.macs) for extra in method.report(sparse, images()).overhead)
    kind = type(deployed.blocks[0].attn)
    original = kind._dense

    def slow(self, qkv):
        time.sleep(0.003)
        return original(self, qkv)

    monkeypatch.setattr(kind, "_dense", slow)
    row = compare(dense, deployed, images(2), Conditions(2, "float32", seconds=0.01))
    assert row["deployed"]["kernels"] == {"17": "listed"}
    assert row["deployed"]["kernels_refused"] == {}
    assert row["deployed"]["macs_executed"] == pytest.approx(costs["macs_theoretical"] - coding)
    assert "macs_executed" not in row["dense"]

    def refuse(*arguments):
        raise native.NoKernel("a C++ compiler is needed")

    monkeypatch.setattr("methods.vitcod.deployed.listed_attention", refuse)
    row = compare(dense, deployed, images(2), Conditions(2, "float32", seconds=0.01))
    assert "listed" not in row["deployed"]["kernels"]["17"]
    assert row["deployed"]["kernels_refused"] == {"listed": "a C++ compiler is needed"}
    assert row["deployed"]["macs_executed"] == costs["macs_dense"]


def test_the_kernel_leaves_tiny_numbers_alone():
    """A library linked with -ffast-math would set the whole process to round them to zero."""
    native.listed_attention()
    assert float(np.float32(1e-40) * np.float32(1)) > 0
    assert (torch.tensor([1e-40]) * 1.0).item() > 0


def test_without_a_compiler_it_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "")
    with monkeypatch.context() as patched:
        patched.setenv("PATH", str(tmp_path))
        with pytest.raises(native.NoKernel, match="a C\\+\\+ compiler is needed"):
            native._library("listed_attention")
    wrong = tmp_path / "wrong.sh"
    wrong.write_text("#!/bin/sh\necho 'x: error: no such thing' >&2\nexit 1\n")
    wrong.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrong))
    with pytest.raises(native.NoKernel, match=r"cannot compile listed_attention\.cpp: x: error: no such thing"):
        native._library("listed_attention")
    assert [path.name for path in (tmp_path / "sparse-vit-bench").iterdir()] == []


@vectors
def test_compiled_models_have_the_kernel_too():
    _, _, sparse, deployed = untrained({"depth": 2})
    prepared = modes.prepare(with_kernel(deployed, "listed"), images(2), "float32", "compile")
    assert prepared.kernels["all"] in ("fused", "plain", "listed")
    assert prepared.refused == {}
    with torch.inference_mode():
        torch.testing.assert_close(prepared.forward(images(2)), sparse(images(2)), **CLOSE)


def test_deployed_where_it_was_trained():
    """On a GPU, too: folded biases are made on the weights' device, kernels' buffers where they are wanted."""
    for attention in untrained({"qkv_bias": False})[2].to("meta").attentions:
        deployed_form.fold(attention)
        assert attention.qkv.bias.device.type == "meta"
    attention = untrained()[3].blocks[0].attn
    assert attention.kept.device == CPU
    attention.use_kernel("listed", CPU)
    assert set(attention._buffers) == {"kept", "starts", "listed"}
    attention.use_kernel("fused", CPU)
    assert set(attention._buffers) == {"kept", "bias"}


def test_lists_take_float32_on_the_cpu_alone():
    starts, keys = listed(random_kept(2, 9, 0.5))
    with pytest.raises(native.NoKernel, match=r"qkv must be torch\.float32 on the CPU, not torch\.bfloat16 on cpu"):
        listed_attention(torch.zeros(1, 9, 48).bfloat16(), starts, keys, 2)
    with pytest.raises(native.NoKernel, match=r"starts must be torch\.int32"):
        listed_attention(torch.zeros(1, 9, 48), starts.long(), keys, 2)
    with pytest.raises(ValueError, match=r"lists for 18 queries of 2 heads do not fit qkv \[1, 8, 48\]"):
        listed_attention(torch.zeros(1, 8, 48), starts, keys, 2)
    deployed = untrained()[3].bfloat16()
    assert deployed.blocks[0].attn.kernels(CPU) == ("fused", "plain")


def test_an_empty_list_gives_zeros():
    starts, keys = torch.tensor([0, 1, 1], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    out = listed_attention(torch.ones(1, 2, 12), starts, keys, 1)
    assert out.tolist() == [[[1.0] * 4, [0.0] * 4]]


def test_rows_of_untrained_masks_say_so_and_name_no_keep_rate():
    from harness.survey import Case, subject_id

    case = Case(backbone={"name": "vit_tiny_patch16_224"})
    assert subject_id(case, methods.create("vitcod"), 0.7)["keep_rate"] is None
    method, _, sparse, _ = untrained()
    assert "made-up pattern" in method.report(sparse, images()).remarks[0]


# Training ------------------------------------------------------------------------------------------------------------


def trained(method, steps=16, **changes):
    torch.manual_seed(0)
    sparse = method.sparsify(vit(img_size=24, patch_size=4, depth=2, embed_dim=24, num_heads=3, num_classes=7))
    training = Training(
        RECIPE, random_data(), plan("cpu", "float32"), 0, steps, convert=method.convert_checkpoint, **changes
    )
    logs, _ = run_phases(sparse, method.phases(sparse, nn.CrossEntropyLoss()), training)
    return sparse, logs


@pytest.mark.parametrize("svd_type", ["mix_head_fc_qk", "mix_head_fc_q", "mix_head_fc_k", "none"])
@pytest.mark.parametrize("choice", ["info", "ratio", "std", "random"])
def test_all_phases(svd_type, choice):
    shares = {"basis_share": 0.1, "average_share": 0.1, "lowrank_share": 0.4, "finetune_share": 0.4}
    method = methods.create("vitcod", svd_type=svd_type, method=choice, sparsity=0.7, **shares)
    sparse, logs = trained(method)
    expected = ["basis", "lowrank"] if svd_type != "none" else []
    expected += ["average"] if choice != "random" else []
    assert [log.name for log in logs] == [*expected, "mask", "finetune"]
    kept = torch.stack([attention.kept for attention in sparse.attentions])
    assert kept.any(dim=-1).all()
    if choice == "info":
        assert masks.sparsity_of(kept) == pytest.approx(0.7, abs=0.02)
    elif choice != "std":
        assert masks.sparsity_of(kept) == pytest.approx(0.7, abs=0.12)
    (remark,) = method.report(sparse, images(1, size=24)).remarks
    assert remark.startswith("prunes 0.")
    reconstruction = [log.curve[-1].get("reconstruction") for log in logs if log.name in ("lowrank", "finetune")]
    assert all((value is not None and value > 0) == (svd_type != "none") for value in reconstruction)


def test_principal_components_keep_what_heads_share():
    """Queries that lie in two dimensions of four heads are decoded exactly; the error of others is what the spectrum leaves."""
    method = methods.create("vitcod", sparsity=0.6)
    sparse = method.sparsify(vit()).eval()
    attention = sparse.attentions[0]
    with torch.no_grad():
        heads = attention.qkv.weight[:32].view(4, 8, 32)
        heads[2], heads[3] = heads[0] + heads[1], heads[0] - 2 * heads[1]
    statistics = HeadStatistics(sparse)
    with torch.no_grad():
        statistics(images(8), None)
        statistics.finish()
    tokens = inside(sparse, images(8))[0][0]
    q, k, _ = attention.queries_keys_values(tokens)
    q_hat, k_hat = attention.decoded(q, k)
    torch.testing.assert_close(q_hat, q, atol=1e-4, rtol=1e-3)
    vectors = k.detach().transpose(0, 1).flatten(1).double()
    spectrum = torch.linalg.eigvalsh(torch.cov(vectors, correction=0))
    assert (k_hat - k).square().sum().item() == pytest.approx(spectrum[:2].sum().item() * vectors.shape[1], rel=1e-3)


def test_the_reconstruction_does_not_depend_on_micro_batches():
    curves = []
    for micro_batch in (None, 3):
        _, logs = trained(methods.create("vitcod", sparsity=0.7), options=spec.Training(micro_batch=micro_batch))
        curves.append([point["reconstruction"] for log in logs for point in log.curve if "reconstruction" in point])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


def test_given_masks_and_averages(tmp_path):
    sparse, _ = trained(methods.create("vitcod", sparsity=0.7))
    kept = torch.stack([attention.kept for attention in sparse.attentions])
    np.save(tmp_path / "mask.npy", ~kept.numpy())
    assert np.load(tmp_path / "mask.npy").mean() == pytest.approx(0.7, abs=0.02)
    np.save(tmp_path / "average.npy", torch.stack([attention.average for attention in sparse.attentions]).numpy())
    by_mask, logs = trained(methods.create("vitcod", mask_path=str(tmp_path / "mask.npy")))
    assert [log.name for log in logs] == ["basis", "lowrank", "mask", "finetune"]
    assert torch.equal(torch.stack([attention.kept for attention in by_mask.attentions]), kept)
    by_average, logs = trained(methods.create("vitcod", average_path=str(tmp_path / "average.npy"), sparsity=0.7))
    assert [log.name for log in logs] == ["basis", "lowrank", "mask", "finetune"]
    assert torch.equal(torch.stack([attention.kept for attention in by_average.attentions]), kept)


def save(path, array):
    np.save(path, array)
    return path


def wrong_files(tmp_path):
    empty = np.zeros((4, 4, 17, 17), bool)
    empty[2, 1, 5] = True
    (tmp_path / "text.npy").write_text("hello")
    return {
        "shape": (save(tmp_path / "a.npy", np.zeros((4, 4, 16, 17), bool)), r"shape \[4, 4, 16, 17\]; this network wants \[4, 4, 17, 17\]"),
        "empty row": (save(tmp_path / "b.npy", empty), "block 2, head 1: row 5 keeps no entry"),
        "numbers": (save(tmp_path / "c.npy", np.full((4, 4, 17, 17), 0.5)), "ones where an entry is pruned and zeros elsewhere"),
        "no array": (tmp_path / "text.npy", "not a .npy file of a mask"),
        "objects": (save(tmp_path / "d.npy", np.array([{}], dtype=object)), "not a .npy file of a mask"),
    }  # fmt: skip


@pytest.mark.parametrize("what", ["shape", "empty row", "numbers", "no array", "objects"])
def test_wrong_mask_files_are_told(what, tmp_path):
    path, message = wrong_files(tmp_path)[what]
    with pytest.raises(methods.Unsupported, match=message):
        methods.create("vitcod", mask_path=str(path)).sparsify(vit())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_path": "nowhere.npy"}, "mask_path nowhere.npy: no such file"),
        ({"average_path": "nowhere.npy"}, "average_path nowhere.npy: no such file"),
        ({"mask_sha256": "00"}, "mask_sha256 goes with mask_path"),
        ({"method": "ratio", "info_cut": 0.5}, "info_cut is for method: info"),
        ({"lowrank_share": 0}, "greater than 0"),
    ],
)
def test_wrong_settings_are_told(changes, message):
    with pytest.raises(ValueError, match=message):
        methods.create("vitcod", **changes)


def test_a_file_that_changed_is_another_setting(tmp_path):
    path = save(tmp_path / "mask.npy", np.zeros((4, 4, 17, 17), bool))
    first = methods.create("vitcod", mask_path=str(path)).settings
    save(path, np.ones((4, 4, 17, 17), bool))
    assert methods.create("vitcod", mask_path=str(path)).settings.mask_sha256 != first.mask_sha256
    with pytest.raises(ValueError, match="is not the one that mask_sha256"):
        methods.create("vitcod", mask_path=str(path), mask_sha256=first.mask_sha256)


def test_averages_must_be_attention(tmp_path):
    for array, message in (
        (np.full((4, 4, 17, 17), 0.5), "must sum to 1"),
        (np.zeros((4, 4, 17)), "this network wants"),
    ):
        path = save(tmp_path / "average.npy", array)
        with pytest.raises(methods.Unsupported, match=message):
            methods.create("vitcod", average_path=str(path), sparsity=0.6).sparsify(vit())


def test_the_authors_checkpoints_are_read(tmp_path):
    """Of the first training, and of the second with its masks in a file."""
    case = under(golden("a_lowrank_seed0"), "w.")
    content = {
        "model": {f"module.{name}": value for name, value in case.items()},
        "args": argparse.Namespace(svd_type="mix_head_fc_qk"),
    }
    content["model"]["module.blocks.0.attn.attention_sum"] = torch.zeros(4, 17, 17)
    method = methods.create("vitcod", sparsity=0.6)
    sparse = method.sparsify(vit()).eval()
    sparse.load_state_dict(method.convert_checkpoint(content))
    data = golden("a_lowrank_seed0")
    with torch.no_grad():
        torch.testing.assert_close(sparse(data["in.x"]), data["out.logits"], **CLOSE)
    assert method.report(sparse, data["in.x"]).remarks == ()
    path = save(tmp_path / "mask.npy", golden("b_masks_seed0")["info.0.58.mask"].numpy())
    method = methods.create("vitcod", mask_path=str(path))
    sparse = method.sparsify(vit()).eval()
    sparse.load_state_dict(method.convert_checkpoint(content))
    with torch.no_grad():
        torch.testing.assert_close(sparse(data["in.x"]), golden("c_masked_seed0")["info0.58.logits"], **CLOSE)
    plain = {name: value for name, value in content["model"].items() if "coder" not in name}
    with pytest.raises(ValueError, match="give its masks by mask_path"):
        methods.create("vitcod", sparsity=0.6, svd_type="none").convert_checkpoint({"model": plain})


def test_a_block_without_a_mask_among_others():
    """A file may leave a block alone; the record has all of them."""
    from harness.summary import summary

    kept = torch.stack([torch.ones(4, 17, 17, dtype=torch.bool), *(random_kept(4, 17, 0.2, seed) for seed in range(3))])
    method, sparse = official(kept=kept)
    sparse.masks_are.fill_(2)
    deployed = method.deploy(sparse)
    assert deployed.blocks[0].attn.kernels(CPU) == ("fused", "plain")
    found = summary(method.report(deployed, images()))
    assert found["attention"]["shape"] == [4, 4, 17, 17]
    assert len(found["estimates"]) == 3


def test_augmented_images_are_averaged_on_request():
    """The recipe's flips and crops; a share of the budget that is a batch at least."""
    found = {}
    for augmented in (False, True):
        method = methods.create("vitcod", svd_type="none", sparsity=0.7, average_augmented=augmented, average_share=0.5)
        training = Training(RECIPE.model_copy(update={"flip": 1.0}), random_data(), plan("cpu", "float32"), 0, 8)
        torch.manual_seed(0)
        sparse = method.sparsify(vit(img_size=24, patch_size=4, depth=2, embed_dim=24, num_heads=3, num_classes=7))
        logs, _ = run_phases(sparse, method.phases(sparse, nn.CrossEntropyLoss()), training)
        found[augmented] = torch.stack([attention.average for attention in sparse.attentions])
        average = next(log for log in logs if log.name == "average")
        assert (average.images, average.steps) == (32, 4)
        torch.testing.assert_close(found[augmented].sum(dim=-1), torch.ones(found[augmented].shape[:-1]))
    assert (found[True] - found[False]).abs().max() > 1e-4
    assert "average_augmented" not in methods.create("vitcod").settings.model_dump(mode="json")
    assert (
        methods.create("vitcod", average_augmented=True).settings.model_dump(mode="json")["average_augmented"] is True
    )


def test_averages_are_taken_of_what_was_before_the_masks():
    _, sparse = official(kept=random_kept(4, 17, 0.2).expand(4, -1, -1, -1))
    statistics = AverageAttention(sparse)
    with torch.no_grad():
        for part in golden("b_masks_seed0")["in.x_train"].split(8):
            statistics(part, None)
    statistics.finish()
    torch.testing.assert_close(torch.stack([a.average for a in sparse.attentions]), averaged(), **CLOSE)
    assert all(attention.masks and attention.encodes for attention in sparse.attentions)


def test_a_phase_starts_from_a_file(tmp_path):
    """Of the low-rank network of somebody else, masks are made and trained under."""
    method = methods.create("vitcod", sparsity=0.7)
    sparse, _ = trained(method)
    content = {
        "model": {
            name: value
            for name, value in sparse.state_dict().items()
            if not name.endswith(("kept", "average", "masks_are"))
        }
    }
    torch.save(content, tmp_path / "lowrank.pth")
    again, logs = trained(method, given={"lowrank": tmp_path / "lowrank.pth"})
    assert [(log.name, log.source, log.steps > 0) for log in logs if log.kind == "train"] == [
        ("lowrank", "lowrank.pth", False), ("finetune", None, True)
    ]  # fmt: skip
    assert state_digest(again.state_dict()) != state_digest(sparse.state_dict())
    assert masks.sparsity_of(torch.stack([a.kept for a in again.attentions])) == pytest.approx(0.7, abs=0.02)
    torch.save({"model": {"blocks.0.x": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not a checkpoint of this method"):
        trained(method, given={"lowrank": tmp_path / "other.pth"})


# Costs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "added", "coding", "saved"),
    [("tiny", 408, 8.78e6, 0.161), ("small", 1080, 24.5e6, 0.322), ("base", 3888, 92.6e6, 0.644)],
)
def test_costs_are_the_published_ones(size, added, coding, saved):
    """coding: of the auto-encoder, in the paper's FLOPs, biases included; saved: GMACs at 90 % sparsity."""
    dense = timm.create_model(f"deit_{size}_patch16_224").eval()
    method = methods.create("vitcod", sparsity=0.9)
    sparse = method.sparsify(dense).eval()
    assert sum(p.numel() for p in sparse.parameters()) - sum(p.numel() for p in dense.parameters()) == added
    heads, tokens = sparse.attentions[0].num_heads, 197
    overhead = sum(float(extra.macs) for extra in method.report(sparse, torch.zeros(1, 3, 224, 224)).overhead)
    biases = 12 * 2 * tokens * 64 * (hidden_heads(heads) + heads)
    assert 2 * overhead + biases == pytest.approx(coding, rel=2e-3)
    before = cost.theoretical_macs(dense, method.report(sparse, torch.zeros(1, 3, 224, 224)), (224, 224))
    method.calibrate(sparse, torch.zeros(1, 3, 224, 224), 0.7)
    after = cost.theoretical_macs(dense, method.report(sparse, torch.zeros(1, 3, 224, 224)), (224, 224))
    assert (before - after) / 1e9 == pytest.approx(saved, abs=6e-4)


def test_attention_is_counted_head_by_head():
    kept = torch.stack([random_kept(4, 17, density, seed=seed) for seed, density in enumerate((0.1, 0.3, 0.6, 1.0))])
    method, sparse = official(kept=kept)
    density = torch.stack([block.attention_density[0] for block in method.report(sparse, images()).blocks])
    assert torch.equal(density, kept.double().mean(dim=(2, 3)))
    saved = cost.theoretical_macs(
        vit(), methods.create("dense").report(vit(), images()), (32, 32)
    ) - cost.theoretical_macs(vit(), method.report(sparse, images()), (32, 32))
    coding = sum(float(extra.macs) for extra in method.report(sparse, images()).overhead)
    assert saved + coding == pytest.approx(float((~kept).sum()) * 2 * 8)


# As a command --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory, tiny_data):
    import yaml

    folder = tmp_path_factory.mktemp("vitcod")
    entries = [
        {
            "method": "vitcod",
            "settings": {
                "sparsity": 0.7,
                "average_share": 0.2,
                "basis_share": 0.2,
                "lowrank_share": 0.3,
                "finetune_share": 0.3,
            },
        }
    ]
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_spec(tiny_data, entries=entries)))
    done = bench("--spec", folder / "tiny.yaml", "--results", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_a_run_shows_estimates_and_draws_masks(results):
    folder, said = results
    records = [json.loads(path.read_text()) for path in (folder / "tiny").glob("*.json")]
    record = next(r for r in records if r["kind"] == "train" and r["method"] == "vitcod")
    assert [phase["name"] for phase in record["phases"]] == ["basis", "lowrank", "average", "mask", "finetune"]
    attention, first, every = record["report"]["estimates"]
    assert attention["cycles"] < first["cycles"] <= every["cycles"]
    assert first["microseconds"] == pytest.approx(first["cycles"] / 500, abs=1e-3)
    board = (folder / "leaderboard.md").read_text()
    assert "| estimated, not measured: µs per image | ViTCoD's accelerator, attention |" in board
    assert f"| {first['microseconds']:.2f} |" in board
    assert "ViTCoD's accelerator" in said
    assert "prunes 0.7" in said
    done = bench("visualize", record["id"], "--results", folder)
    assert done.returncode == 0, done.stderr
    drawn = {path.stem.removeprefix(record["id"] + "-") for path in (folder / "pictures").glob("*.png")}
    assert drawn == {"heads", "attention", "masks", "reordered", "split"}
    done = bench("masks", record["id"], "--output", folder / "mask.npy", "--results", folder)
    assert done.returncode == 0, done.stderr
    pruned = np.load(folder / "mask.npy")
    assert pruned.shape == (4, 2, 17, 17)
    assert 1 - pruned.mean() == pytest.approx(np.mean(record["report"]["attention_density"]), abs=1e-3)
    dense = next(r for r in records if r["kind"] == "train" and r["label"] == "dense")
    done = bench("masks", dense["id"], "--output", folder / "other.npy", "--results", folder)
    assert done.returncode == 2
    assert "no attention masks" in done.stderr
