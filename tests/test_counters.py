"""The second counter, and what common counters say of the same model."""

import json

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import methods
from harness import cost, trace
from harness.costs_shown import cost_rows, show_costs
from harness.counters import compare_counters, reasons
from harness.device import set_attention
from harness.executed import CountersDisagree, executed, executed_macs
from harness.spec import Entry
from harness.words import counters_told
from methods.core import operators
from methods.core.operators import packed_attention

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit(**changes):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **(SMALL | changes)).eval()


class Model(nn.Module):
    """A model that calls a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def only_plain_sizes(x):
    """What a method's author may well write; under a trace a size is a tensor."""
    return x @ torch.ones({4: 4}[x.shape[-1]], 2)


def test_what_cannot_be_traced_is_counted_and_the_row_says_so():
    method, backbone = methods.create("dynamicvit"), vit()
    sparse = method.sparsify(backbone).eval()
    deployed = method.deploy(sparse)
    confirmed = cost.count(method, backbone, sparse, deployed, IMAGES)
    assert confirmed.record()["counters"] == ["dispatcher", "fvcore"]
    assert counters_told(confirmed.record()) == []

    class Untraced(type(deployed)):
        def forward(self, x):
            return {32: super().forward}[x.shape[-1]](x)

    deployed.__class__ = Untraced
    alone = cost.count(method, backbone, sparse, deployed, IMAGES)
    assert alone.executed == confirmed.executed
    record = json.loads(json.dumps(alone.record()))
    assert record["counters"] == ["dispatcher"]
    (line,) = counters_told(record)
    assert "without fvcore" in line
    assert record["only_one"] in line


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (only_plain_sizes, "tensor"),
        (lambda x: torch.einsum("bij,ij,jk->bk", x, x[0], x[0].T), "einsum"),
        (lambda x: x.hypot(x) @ x.mT, "no rule for aten::hypot"),
    ],
)
def test_the_reason_why_fvcore_did_not_count_is_told(function, reason):
    found = executed(Model(function), torch.ones(1, 3, 4))
    assert found.count.total == executed_macs(Model(function), torch.ones(1, 3, 4)) > 0
    assert reason in found.only


def test_without_traces_the_dispatcher_counts(monkeypatch):
    """As from Python 3.14 on."""

    def refuse(*arguments, **more):
        raise RuntimeError("no traces here\nat all")

    monkeypatch.setattr("fvcore.nn.jit_analysis._get_trace_graph", refuse)
    found = executed(vit(), IMAGES[:1])
    assert found.only == "RuntimeError: no traces here"
    assert found.count.total == executed_macs(vit(), IMAGES[:1])


def test_counters_that_disagree_are_an_error_with_both_numbers(monkeypatch):
    rules = trace.handlers

    def one_too_many(also=frozenset()):
        attention = rules(also)["aten::scaled_dot_product_attention"]
        return rules(also) | {
            "aten::scaled_dot_product_attention": lambda inputs, outputs: {
                name: macs + 1 for name, macs in attention(inputs, outputs).items()
            }
        }

    right = executed_macs(vit(), IMAGES[:1])
    monkeypatch.setattr(trace, "handlers", one_too_many)
    with pytest.raises(
        CountersDisagree, match=f"dispatcher counts {right:,.0f} .* {right + 4:,.0f}; .* in block 0"
    ) as e:
        executed(vit(), IMAGES[:1])
    assert "'attention'" in str(e.value)


x, y, w = torch.ones(2, 3, 4), torch.ones(5, 2, 4, 3), torch.ones(4, 6)
FORMS = {
    "a smaller left side": (lambda x: x @ y, 5 * 2 * 3 * 4 * 3),
    "a vector": (lambda x: x @ w[:, 0], 2 * 3 * 4),
    "batches in einsum": (lambda x: torch.einsum("bij,bkj->bik", x, x), 2 * 3 * 3 * 4),
    "a sum before": (lambda x: torch.einsum("bij,jk->ik", x, w), 3 * 4 * 6),
    "no sum": (lambda x: torch.einsum("bij,jk->bijk", x, w) @ w.T, 2 * 3 * 4 * 4 * 6),
    "einsum with a size of 1": (lambda x: torch.einsum("bqk,bkd->bqd", x[:, :, :1], x[:, :1]) @ w, 2 * 3 * 4 * 6),
    "einsum that repeats": (lambda x: torch.einsum("bij,bkj->bik", x, x[:1]), 2 * 3 * 3 * 4),
    "a layer with one output": (lambda x: F.linear(x, w[:, 0]), 2 * 3 * 4),
    "a layer of a matrix": (lambda x: F.linear(x, w.T), 2 * 3 * 4 * 6),
    "a sum of one": (lambda x: torch.einsum("bij->bi", x) @ x[0], 2 * 3 * 4),
}


@pytest.mark.parametrize("form", FORMS)
def test_both_count_products_in_every_form(form):
    function, macs = FORMS[form]
    run = trace.traced(Model(function), x)
    assert sum(run.values()) == executed_macs(Model(function), x) * len(x) == macs


def test_images_that_differ_are_counted_one_by_one():
    """The first two tokens, or all five."""

    def some(images):
        tokens = images[0] if images[0, 0, 0] > 0 else images[0, :2]
        return tokens @ tokens.T

    images = torch.ones(2, 5, 4) * torch.tensor([1.0, -1.0])[:, None, None]
    found = executed(Model(some), images)
    assert (found.count.total, found.only) == ((5 * 5 + 2 * 2) * 4 / 2, "")
    assert found.count.spread == (5 * 5 - 2 * 2) * 4 / 2


@pytest.mark.parametrize("fused", [True, False])
def test_common_counters_are_run_and_told_apart_by_operation(fused):
    model = vit()
    set_attention(model, fused)
    ours, torchs, fvcores = compare_counters(model, IMAGES)
    attention, norms = 4 * 3 * 17 * 17 * 8 * 2, 9 * 17 * 24 * 5
    assert ours["macs"] == executed_macs(model, IMAGES)
    assert ours["differs"] == {}
    for row in (torchs, fvcores):
        assert row["macs"] - ours["macs"] == sum(pair["theirs"] - pair["ours"] for pair in row["differs"].values())
    if fused:
        name = "scaled_dot_product_attention"
        assert fvcores["differs"][name] == {"theirs": 0, "ours": attention}
        assert list(torchs["differs"]) in (
            [],
            ["aten::_scaled_dot_product_flash_attention_for_cpu"],
        )  # by torch's version
    else:
        assert list(fvcores["differs"]) == ["layer_norm"]
        assert torchs["differs"] == {}
    assert fvcores["differs"]["layer_norm"] == {"theirs": norms, "ours": 0}


def test_common_counters_have_no_rule_for_our_operators():
    starts = torch.tensor([0, 3], dtype=torch.int32)
    model = Model(lambda x: packed_attention(x[0, :, None], x[0, :, None], x[0, :, None], starts, starts, [3], [3]))
    name = "sparse_vit_bench::packed_attention"
    for row in compare_counters(model, torch.ones(1, 3, 4))[1:]:
        assert row["differs"] == {name: {"theirs": 0, "ours": 3 * 3 * 8}}
        assert reasons(row) == [f"has no formula for {name}: 0.0000 missing"]


def test_what_fvcore_cannot_tell_apart_is_the_rest_of_the_difference():
    ours, _, fvcores = compare_counters(Model(lambda x: torch.addbmm(x[0, :, :1], x, x.mT)), torch.ones(1, 3, 4))
    assert (ours["macs"], fvcores["macs"]) == (3 * 4 * 3, 0)
    assert list(fvcores["differs"].values()) == [{"theirs": 0, "ours": 3 * 4 * 3}]
    untraced = compare_counters(Model(only_plain_sizes), torch.ones(1, 3, 4))[2]
    assert untraced["macs"] is None
    assert "tensor" in untraced["reason"]


def test_cost_shows_what_common_counters_say(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    entries = [Entry(method="dense")]
    backbone = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
    rows, _ = cost_rows("vit_tiny_patch16_224", backbone, entries, 32, counters=True)
    show_costs(rows, as_json=False)
    shown = capsys.readouterr().out
    assert "dense, counted by" in shown
    assert "has no formula for scaled_dot_product_attention" in shown
    assert "counts layer_norm, which is no matrix product" in shown
    show_costs(rows, as_json=True)
    dense = json.loads(capsys.readouterr().out)[0]
    assert dense["common_counters"][0]["macs"] == dense["macs_executed"]
    assert "common_counters" not in cost_rows("vit_tiny_patch16_224", backbone, entries, 32)[0]["dense"]


def test_fractions_are_no_disagreement():
    """fvcore's own count of a module is what its children leave, so it is off by a rounding."""

    @operators.counted(lambda x: x[0] / 3 + x[1] / 7)
    @torch.library.custom_op("tests::fractions", mutates_args=())
    def fractions(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @fractions.register_fake
    def _(x):
        return torch.empty_like(x)

    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), Model(fractions)), Model(fractions), Model(fractions))
    found = executed(model, torch.ones(1, 4))
    assert found.only == ""
    assert found.count.total == pytest.approx(16 + 3 * (1 / 3 + 4 / 7), abs=0.01)


def test_a_compiled_model_has_the_parts_of_the_model_inside():
    plain, wrapped = vit(), torch.compile(vit(), backend="eager")
    assert executed(wrapped, IMAGES[:1]).count.parts == executed(plain, IMAGES[:1]).count.parts


def test_cost_names_what_cannot_be_counted_and_goes_on(monkeypatch):
    method = methods.find("random")
    deploy = method.deploy

    def with_distances(self, sparse):
        deployed = deploy(self, sparse)
        deployed.head = Model(lambda x: torch.cdist(x, x))
        return deployed

    monkeypatch.setattr(method, "deploy", with_distances)
    entries = [Entry(method="random"), Entry(method="dense")]
    backbone = {"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3}
    rows, refused = cost_rows("vit_tiny_patch16_224", backbone, entries, 32)
    assert list(rows) == ["dense"]
    (line,) = refused
    assert line.startswith("random")
    assert "in head has no rule for counting multiply-adds" in line
