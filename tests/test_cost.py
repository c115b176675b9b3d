"""Counting: the published numbers, fused or not, and nothing missed silently."""

import json

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import methods
from harness import cost
from harness.costs_shown import cost_rows
from harness.device import set_attention
from harness.executed import executed, executed_macs
from harness.formula import block_macs, theoretical, theoretical_macs
from harness.operations import UncountedOperation
from harness.spec import Entry
from methods.core import operators
from methods.core.operators import packed_attention
from methods.core.vit import embed

TABLE = {  # GMACs, matrix products and convolutions, with the predictors: 0.9, 0.8, 0.7, 0.6, 0.5
    "deit_tiny_patch16_224": (1.2537, (1.0915, 0.9319, 0.8012, 0.6901, 0.6016)),
    "deit_small_patch16_224": (4.5989, (4.0407, 3.4631, 2.9809, 2.5647, 2.2291)),
    "deit_base_patch16_224": (17.5638, (15.5124, 13.3231, 11.4758, 9.8676, 8.5613)),
}
RATES = [0.9, 0.8, 0.7, 0.6, 0.5]


def vit(**changes):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **(sizes | changes)).eval()


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("backbone", TABLE)
def test_the_published_numbers(backbone):
    dense, sparse = TABLE[backbone]
    entries = [Entry(method="dense"), Entry(method="dynamicvit", settings={"keep_rate": RATES})]
    rows, refused = cost_rows(backbone, {}, entries, None)
    assert not refused
    assert list(rows) == ["dense", *(f"dynamicvit keep_rate={rate}" for rate in RATES)]
    rows = list(rows.values())
    assert [round(row["macs_dense"] / 1e9, 4) for row in rows] == [dense] * 6
    assert [round(row["macs_theoretical"] / 1e9, 4) for row in rows] == [dense, *sparse]
    assert all(row["macs_executed"] == row["macs_theoretical"] for row in rows)
    assert [row["settings"].get("keep_rate") for row in rows] == [None, *RATES]
    json.dumps(rows)


@pytest.mark.parametrize("method", ["dense", "dynamicvit", "random"])
def test_fused_and_plain_attention_count_the_same(method):
    counted, chosen, backbone = [], methods.create(method), vit()
    for fused in (True, False):
        deployed = chosen.deploy(chosen.sparsify(backbone))
        set_attention(deployed, fused)
        counted.append(executed_macs(deployed, IMAGES))
    assert counted[0] == counted[1]


@pytest.mark.parametrize("method", ["dense", "dynamicvit", "random"])
def test_torchs_own_counter_agrees(method):
    chosen, backbone = methods.create(method), vit()
    deployed = chosen.deploy(chosen.sparsify(backbone))
    set_attention(deployed, False)  # torch's counter does not see every fused kernel
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        deployed(IMAGES[:1])
    assert counter.get_total_flops() / 2 == executed_macs(deployed, IMAGES[:1])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"reg_tokens": 4, "img_size": 48}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_tiny_patch16_224", {"mlp_ratio": 2.5, "qkv_bias": False, "qk_norm": True, "init_values": 1e-4}),
    ],
)
def test_formula_and_trace_agree_on_other_backbones(name, changes):
    backbone = timm.create_model(
        name, **{"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 3} | changes
    ).eval()
    images = torch.randn(1, 3, *backbone.patch_embed.img_size)
    agrees, formula, traced = cost.dense_formula_holds(backbone, images, tolerance=0)
    assert agrees, (formula, traced)


def test_a_backbone_with_unknown_parts_is_noticed():
    backbone = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, class_token=False, global_pool="map"
    ).eval()
    assert not cost.dense_formula_holds(backbone, IMAGES)[0]


def test_masking_without_skipping_shows_no_saving():
    """What many repositories ship: dropped tokens are multiplied by zero and computed all the same."""

    class Masked(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            x = embed(self.model, images)
            keep = torch.ones(1, x.shape[1], 1)
            keep[:, 9:] = 0
            for block in self.model.blocks:
                x = block(x) * keep
            return self.model.forward_head(self.model.norm(x))

    method, backbone = methods.create("dynamicvit", keep_rate=0.5), vit()
    sparse = method.sparsify(backbone)
    costs = cost.count(method, backbone, sparse, Masked(sparse).eval(), IMAGES)
    assert costs.executed.total == costs.dense.total
    assert costs.theoretical.total < 0.7 * costs.dense.total


def test_an_uncounted_operation_is_an_error_that_names_it():
    class Solver(nn.Module):
        def forward(self, x):
            return torch.linalg.solve(x @ x.transpose(-1, -2) + torch.eye(x.shape[-2]), x)

    model = nn.Sequential(nn.Identity(), Solver())
    with pytest.raises(UncountedOperation, match=r"aten::_linalg_solve_ex in 1 "):
        executed_macs(model, torch.randn(1, 3, 4, 4))


def test_the_formula_follows_the_report():
    """Half the heads, a quarter of the attention entries of the rest, half of one weight, fewer queries and MLP tokens."""
    backbone = vit()
    tokens = torch.tensor([17])
    entry = methods.BlockReport(
        keys=tokens,
        queries=torch.tensor([5]),
        mlp=torch.tensor([3, 5]),
        active_heads=torch.tensor([True, False, False]),
        attention_density=torch.tensor([[0.25, 0.9, 0.9]]),
    )
    report = methods.Report((entry,) * 4, weight_density={"blocks.1.mlp.fc1.weight": 0.5})
    parts = {key: float(macs.mean()) for key, macs in block_macs(backbone.blocks[0], report, 0).items()}
    assert parts["projections"] == pytest.approx((5 * 24 * 24 + 2 * 17 * 24 * 24 + 5 * 24 * 24) / 3)
    assert parts["attention"] == pytest.approx(5 * 17 * 2 * 24 * 0.25 / 3)
    assert parts["mlp"] == pytest.approx(4 * 2 * 24 * 96)
    assert float(block_macs(backbone.blocks[1], report, 1)["mlp"].mean()) == pytest.approx(4 * 1.5 * 24 * 96)


def test_overhead_is_part_of_the_theory():
    backbone = vit()
    tokens = torch.tensor([17])
    blocks = (methods.BlockReport(tokens, tokens, tokens),) * 4
    extra = methods.Overhead("x", torch.tensor([10.0, 30.0], dtype=torch.float64))
    plain = theoretical_macs(backbone, methods.Report(blocks), (32, 32))
    assert theoretical_macs(backbone, methods.Report(blocks, overhead=(extra,)), (32, 32)) == plain + 20


def test_a_refusal_gives_its_reason():
    rows, refused = cost_rows(
        "deit_tiny_patch16_224", {}, [Entry(method="dynamicvit", settings={"keep_rate": 0.01})], None
    )
    assert rows == {}
    assert "leaves no token of 196" in refused[0]


def test_fused_attention_counts_in_every_form():
    """Masked, causal, grouped and called by the kernel's own name: n * m * (d + e) per query head."""
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 6)
    few = torch.randn(2, 2, 7, 8)
    attention = torch.nn.functional.scaled_dot_product_attention
    mask = torch.rand(5, 7) > 0.3
    forms = {
        "plain": (lambda x: attention(x, k, v), 2 * 4 * 5 * 7 * 14),
        "masked": (lambda x: attention(x, k, v, attn_mask=mask), 2 * 4 * 5 * 7 * 14),
        "causal": (lambda x: attention(x, x, x, is_causal=True), 2 * 4 * 5 * 5 * 16),
        "grouped": (lambda x: attention(x, few, few, enable_gqa=True), 2 * 4 * 5 * 7 * 16),
        "by name": (
            lambda x: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x)[0], 2 * 4 * 5 * 5 * 16,
        ),
    }  # fmt: skip
    for name, (call, macs) in forms.items():

        class Model(nn.Module):
            def forward(self, x, call=call):
                return call(x)

        assert executed_macs(Model(), q) * len(q) == macs, name


class Packed(nn.Module):
    """Two images of 3 and 5 tokens, one after the other."""

    lengths = (3, 5)

    def forward(self, x):
        q = x.view(-1, 2, 4)
        starts = torch.tensor([0, 3, 8], dtype=torch.int32)
        return packed_attention(q, q, q, starts, starts, list(self.lengths), list(self.lengths))


def test_operators_of_our_own_are_counted_by_their_rule():
    x = torch.randn(8, 8)
    assert executed_macs(Packed(), x) * len(x) == (3 * 3 + 5 * 5) * 2 * (4 + 4)
    q = x.view(-1, 2, 4).transpose(0, 1)
    alone = [torch.nn.functional.scaled_dot_product_attention(part, part, part) for part in q.split((3, 5), dim=1)]
    assert torch.allclose(Packed()(x), torch.cat(alone, dim=1).transpose(0, 1), atol=1e-6)


def test_an_operator_of_our_own_without_a_rule_is_an_error(monkeypatch):
    monkeypatch.delitem(operators.RULES, "sparse_vit_bench::packed_attention")
    with pytest.raises(UncountedOperation, match="sparse_vit_bench::packed_attention in Packed"):
        executed_macs(Packed(), torch.randn(8, 8))


def test_norms_softmax_and_gelu_on_request():
    """fvcore's published convention counts LayerNorm at 5 per element: 4.6083 for DeiT-S, 2.9876 with DynamicViT 0.7."""
    entries = [Entry(method="dense"), Entry(method="dynamicvit")]
    rows = list(cost_rows("deit_small_patch16_224", {}, entries, None, ["layernorm"])[0].values())
    assert [round(row["macs_executed"] / 1e9, 4) for row in rows] == [4.6083, 2.9876]
    assert [row["macs_theoretical"] for row in rows] == [None, None]
    assert "layernorm 5 per element" in rows[0]["convention"]
    small = executed(vit(), IMAGES[:1], ["softmax", "gelu", "layernorm"]).count
    plain = executed(vit(), IMAGES[:1]).count
    assert small.total - plain.total == 4 * (3 * 17 * 17 * 5 + 17 * 96 * 8) + (2 * 4 + 1) * 17 * 24 * 5
    assert small.parts["norms"] == (2 * 4 + 1) * 17 * 24 * 5
    assert small.parts["projections"] == plain.parts["projections"]


def test_parts_and_blocks_add_up_and_agree_with_the_formula():
    method, backbone = methods.create("dynamicvit", keep_rate=0.5), vit()
    sparse = method.sparsify(backbone)
    costs = cost.count(method, backbone, sparse, method.deploy(sparse), IMAGES)
    for count in (costs.dense, costs.theoretical, costs.executed):
        assert sum(count.parts.values()) == pytest.approx(count.total)
        inside = sum(sum(block.values()) for block in count.blocks)
        assert inside + count.parts["embedding"] + count.parts["head"] == pytest.approx(count.total)
        assert count.spread == 0
    assert costs.executed.parts == pytest.approx(costs.theoretical.parts)
    for run, theory in zip(costs.executed.blocks, costs.theoretical.blocks, strict=True):
        assert run == pytest.approx(theory)
    assert [block.get("overhead", 0) > 0 for block in costs.executed.blocks] == [False, True, True, True]


def test_the_spread_is_that_of_the_images():
    backbone, tokens = vit(), torch.tensor([5, 17])
    block = methods.BlockReport(tokens, tokens, tokens)
    count = theoretical(backbone, methods.Report((block,) * 4), (32, 32))
    each = [
        theoretical(backbone, methods.Report((methods.BlockReport(t, t, t),) * 4), (32, 32)).total
        for t in tokens.split(1)
    ]
    assert count.total == pytest.approx(sum(each) / 2)
    assert count.spread == pytest.approx(abs(each[0] - each[1]) / 2)
