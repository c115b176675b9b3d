"""STTABT against the authors' numbers, and what must hold for any image, mask and backbone."""

import json
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from precision import Exact, as_near_as_the_authors, exactly
from timm.layers import RmsNorm, SwiGLUPacked

import methods
from harness import cost, spec
from harness.cells import load_run
from harness.device import plan
from harness.device.observe import Observer
from harness.latency import Conditions, compare
from harness.rules import RECIPE, random_data
from harness.training.artifacts import Artifacts
from harness.training.engine import run_phases
from harness.training.optimizers import make_criterion
from harness.training.setup import Training
from methods.core import native, operators
from methods.core.operators import packed_attention, scored_attention
from methods.core.pooled import value_of
from methods.sttabt import backtracking
from methods.sttabt.approxnet import narrowed, rated
from methods.sttabt.backtracking import concrete_mask, concrete_masks, concrete_sets, logit, occupancy, topk_sets
from methods.sttabt.counting import network_macs, update_macs
from methods.sttabt.deployed import Plan
from methods.sttabt.manual import manual_schedule
from methods.sttabt.model import masked_block
from methods.sttabt.observed import steps
from methods.sttabt.training import ConcreteObjective, Distillation

pytestmark = pytest.mark.rounding

GOLDEN = Path(__file__).parent / "golden" / "sttabt"
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SIZES = {"img_size": 24, "patch_size": 4, "num_classes": 7, "embed_dim": 48, "depth": 4, "num_heads": 3}


@cache
def golden():
    return {key: torch.as_tensor(value) for key, value in np.load(GOLDEN / "case_a.npz").items()}


@cache
def meta():
    return json.loads(bytes(golden()["meta_json"].numpy()).decode())


def under(prefix):
    return {key.removeprefix(prefix): value for key, value in golden().items() if key.startswith(prefix)}


def official_vit():
    facts = meta()
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=facts["image"], patch_size=facts["patch"], num_classes=facts["classes"],
        embed_dim=facts["hidden"], depth=facts["layers"], num_heads=facts["heads"], mlp_ratio=facts["mlp"] / facts["hidden"],
    ).eval()  # fmt: skip


def official(**changes):
    """The method, and its network with the authors' weights, by way of their checkpoint."""
    wanted = ({} if changes.get("attention") == "actual" else {"factor": meta()["factor"]}) | changes
    if wanted.get("variant", "concrete") == "concrete":
        wanted["p_logit"] = meta()["p_init"]
    method = methods.create("sttabt", **wanted)
    sparse = method.sparsify(official_vit())
    state = method.convert_checkpoint({"model": under("w/")})
    sparse.load_state_dict({name: value for name, value in state.items() if name in sparse.state_dict()})
    return method, sparse.eval()


def pixels():
    return golden()["in/pixel_values"]


def close(found, key, **tolerance):
    torch.testing.assert_close(found, golden()[key], **(CLOSE | tolerance), check_dtype=False)


# The authors' numbers.


def test_the_narrow_network_begins_as_the_authors_do():
    vit = official_vit()
    state = methods.create("sttabt").convert_checkpoint({"model": under("w/")})
    vit.load_state_dict({name: state[name] for name in vit.state_dict()})
    theirs = {"transfer_none": torch.zeros(1)} | {f"bert.{name}": value for name, value in under("w_interp/").items()}
    expected = methods.create("sttabt").convert_checkpoint({"model": theirs})
    found = narrowed(vit, meta()["factor"]).state_dict()
    names = [name for name in expected if name.startswith("approx.")]
    assert len(names) > 50
    for name in names:
        assert torch.equal(found[name.removeprefix("approx.")], expected[name]), name


def test_scores_and_masks_are_the_authors():
    _, sparse = official()
    with torch.no_grad():
        walked = torch.stack([step.scores for step in steps(sparse.approx, pixels())])
        masks = sparse.masks(pixels())
    close(walked, "eval_soft/approx_scores_raw")
    close(walked.softmax(dim=-1), "eval_soft/approx_probs")
    exact, case = exactly(_soft_run, sparse), golden()
    theirs = torch.cat([case["eval_soft/mask_in_soft"], case["eval_soft/mask_out_soft"][-1:]])
    as_near_as_the_authors(masks.scores, case["eval_soft/score"], exact["scores"], 1e-6, "scores")
    as_near_as_the_authors(masks.soft, theirs, exact["soft"], 1e-5, "soft masks")
    assert torch.equal(masks.kept[:-1].float(), golden()["eval_hard/mask_in_hard"])
    assert torch.equal(masks.kept[1:].float(), golden()["eval_hard/mask_out_hard"])


@pytest.mark.parametrize("run", ["eval_soft", "eval_hard"])
@pytest.mark.parametrize("fused", [True, False])
def test_masked_forwards_are_the_authors(run, fused):
    _, sparse = official()
    for block in sparse.blocks:
        block.attn.fused_attn = fused
    with torch.no_grad():
        masks = sparse.masks(pixels())
        used = masks.soft if run == "eval_soft" else masks.kept.float()
        close(sparse.forward_head(sparse.masked_features(pixels(), used)), f"{run}/logits")
        hidden = _hidden(sparse, used)
        if run == "eval_hard":
            close(hidden, "eval_hard/hidden_states")
        else:
            exact = exactly(_soft_run, sparse)["hidden"]
            as_near_as_the_authors(hidden, golden()["eval_soft/hidden_states"], exact, 1e-5, "hidden states")


def _hidden(sparse, used):
    """At every block's input and after the last one, under masks."""
    x = sparse.norm_pre(sparse._pos_embed(sparse.patch_embed(pixels().to(used.dtype))))
    hidden = [x]
    for index, block in enumerate(sparse.blocks):
        x = masked_block(block, x, used[index], used[index + 1])
        hidden.append(x)
    return torch.stack(hidden)


@torch.no_grad()
def _soft_run(sparse):
    """Soft masks are steep: rounding in the approximation network's scores comes out up to 20 times larger (temperature 0.1), and all blocks see it."""
    masks = sparse.masks(pixels().to(sparse.p_logit.dtype))
    return {"scores": masks.scores, "soft": masks.soft, "hidden": _hidden(sparse, masks.soft)}


def test_dropped_tokens_give_the_authors_logits():
    method, sparse = official()
    deployed = method.deploy(sparse)
    with torch.no_grad():
        close(sparse(pixels()), "eval_hard/logits")
        close(deployed(pixels()), "eval_hard/logits")
        close(sparse.forward_head(sparse.norm(_dense(sparse))), "dense/logits")


def _dense(sparse):
    x = sparse.norm_pre(sparse._pos_embed(sparse.patch_embed(pixels())))
    for block in sparse.blocks:
        x = block(x)
    return x


def test_occupancy_is_reported_both_ways():
    method, sparse = official()
    report = method.report(sparse, pixels())
    close(report.numbers["occupancy"].mean(), "eval_hard/occupancy_metric")
    close(report.numbers["occupancy of the loss"].mean(), "eval_soft/occupancy_loss")
    each = torch.stack([block.keys for block in report.blocks] + [torch.ones(len(pixels()))]) / meta()["tokens"]
    close(each, "eval_hard/token_occupies")


def test_distillation_is_the_authors():
    _, sparse = official()
    terms = _distilling(sparse)
    for ours, theirs in (("attention", "att"), ("hidden", "hid"), ("embedding", "emb"), ("prediction", "pred")):
        close(terms[ours], f"distill/loss_{theirs}")
    close(sum(terms.values()), "distill/loss_total")
    theirs = {f"approx_bert.{name}": value for name, value in under("distill/grad/").items()}
    _compare_gradients(sparse, _distilling, theirs, 10)
    assert all(p.grad is None for name, p in sparse.named_parameters() if not name.startswith(("approx.", "transfer.")))


def _distilling(sparse):
    """The loss's terms."""
    objective = Distillation(sparse, prediction=200.0).train()
    return objective(pixels().to(sparse.p_logit.dtype), golden()["in/labels"], None)


@pytest.mark.parametrize("run", ["train_soft", "train_hard"])
def test_end_to_end_training_is_the_authors(run):
    _, sparse = official()
    training = partial(_training_end_to_end, hard=run == "train_hard")
    terms = training(sparse)
    close(terms["classification"], f"{run}/loss_ce")
    close(terms["ratio"], f"{run}/loss_ratio")
    close(terms["thresholds"].reshape(1), f"{run}/loss_reg")
    close(2 * terms["distillation"], f"{run}/loss_kl")
    close(sum(terms.values()).reshape(1), f"{run}/loss_total")
    theirs = {name: value for name, value in under(f"{run}/grad/").items() if "key.bias" not in name}
    _compare_gradients(sparse, training, theirs, 10)
    close(sparse.p_logit.grad, f"{run}/grad_p_logit", rtol=1e-4)


def _training_end_to_end(sparse, hard):
    """The loss's terms."""
    dtype, teacher = sparse.p_logit.dtype, official_vit()
    teacher.load_state_dict(methods.create("sttabt").convert_checkpoint({"model": under("w_teacher/")}))
    objective = ConcreteObjective(sparse, _soft_cross_entropy, teacher.to(dtype), meta()["p_init"], 100.0, 1e-3, hard)
    terms = objective.train()(pixels().to(dtype), golden()["in/soft_labels"], None)
    return {name: value_of(term) for name, term in terms.items()}


def _soft_cross_entropy(logits, targets):
    return (-targets * logits.log_softmax(-1)).sum(-1).mean()


def _gradients(sparse, terms_of):
    """Of the sum of the terms, by parameter."""
    sparse.zero_grad()
    sum(terms_of(sparse).values()).sum().backward()
    return {name: p.grad.clone() for name, p in sparse.named_parameters() if p.grad is not None}


def _compare_gradients(sparse, terms_of, theirs, at_least):
    """Relative to the largest entry of each tensor. Queries, keys and values are one tensor here: their parts are looked up by filling in the others."""
    found_gradients, exact = _gradients(sparse, terms_of), exactly(partial(_gradients, terms_of=terms_of), sparse)
    compared = 0
    for name, value in theirs.items():
        kind = name.rsplit(".", 2)[-2]
        if ".attention.attention." in name:
            shown = {name.replace(f".{kind}.", f".{other}."): value if other == kind else torch.full_like(value, torch.nan) for other in ("query", "key", "value")}  # fmt: skip
        else:
            shown = {name: value}
        marker = {} if name.startswith("approx_bert.") else {"approx_bert.transfer_none": torch.zeros(1)}
        found = methods.create("sttabt").convert_checkpoint({"model": shown | marker})
        (ours,) = (key for key in found if key in found_gradients)
        there = ~found[ours].isnan()
        part = Exact(exact[ours].value[there], exact[ours].spread)
        stated = 2e-5 * float(value.abs().max()) + 1e-9
        as_near_as_the_authors(found_gradients[ours][there], found[ours][there], part, stated, name)
        compared += 1
    assert compared >= at_least


@pytest.mark.parametrize(("attention", "key"), [("approx", "topk"), ("actual", "topk_actual")])
def test_top_k_sets_are_the_authors(attention, key):
    method, sparse = official(variant="topk", attention=attention)
    sparse.keep = golden()["topk/ks"].tolist()
    with torch.no_grad():
        sets, impacts = topk_sets(sparse.ratings(pixels()), sparse.keep, 1)
        assert torch.equal(sets[:-1].float(), golden()[f"{key}/mask_in"])
        close(sparse(pixels()), f"{key}/logits")
        close(method.deploy(sparse)(pixels()), f"{key}/logits")
        if key == "topk":
            close(impacts, "topk/impact_in")
            close(occupancy(sets), "topk/occupancy")


def test_the_authors_count_is_theirs():
    method, sparse = official()
    facts, case = meta(), golden()
    with torch.no_grad():
        shares = sparse.choose(pixels()).double().mean(dim=2)
    width, hidden, heads = facts["hidden"], facts["mlp"], facts["heads"]
    narrow = (width // facts["factor"], hidden // facts["factor"])
    everything = torch.ones_like(shares)

    def total(tokens, patch):
        sizes = {"tokens": tokens, "heads": heads, "patch": patch}
        own = network_macs(shares, width=width, hidden=hidden, **sizes)
        approx = network_macs(everything, width=narrow[0], hidden=narrow[1], **sizes)
        return own + approx + update_macs(shares, tokens, heads), approx

    found, approx = total(17, 8)
    assert found.tolist() == case["eval_hard/flops_seq17_patch8"].tolist()
    assert approx[0] == case["eval_hard/flops_seq17_patch8_approx"]
    dense = network_macs(everything, 17, width, hidden, heads, 8)
    assert dense[0] == case["eval_hard/flops_seq17_patch8_dense_main"]
    close(total(192, 16)[0].mean() / 1e9, "eval_hard/flops_code_gflops", rtol=1e-9)
    assert method.report(sparse, pixels()).authors.macs.tolist() == found.tolist()


# What must hold for any network, image and mask.


def network(seed=0, **changes):
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", **(SIZES | changes)).eval()


def images(count=4, seed=0, size=24):
    """Of very different contrast, so that images differ in what they keep."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator) * torch.linspace(0.05, 3, count)[:, None, None, None]


def models(vit=None, keep_rate=0.5, x=None, **settings):
    method = methods.create("sttabt", **settings)
    torch.manual_seed(1)
    sparse = method.sparsify(vit if vit is not None else network()).eval()
    method.calibrate(sparse, images() if x is None else x, keep_rate)
    return method, sparse, method.deploy(sparse)


ratings_of = st.integers(2, 12).flatmap(
    lambda tokens: st.tuples(st.just(tokens), st.integers(1, 5), st.integers(1, 3), st.integers(0, 10**6))
)


def ratings(tokens, blocks, count, seed, outputs):
    generator = torch.Generator().manual_seed(seed)
    sizes = [tokens] * (blocks - 1) + [min(outputs, tokens)]
    return [torch.rand(count, rows, tokens, generator=generator).softmax(-1) for rows in sizes]


@settings(max_examples=60)
@given(ratings_of, st.sampled_from([1, 2]), st.floats(-8, 8))
def test_each_set_holds_the_next_and_the_output(sizes, outputs, threshold):
    tokens, blocks, count, seed = sizes
    outputs = min(outputs, tokens)
    found = ratings(tokens, blocks, count, seed, outputs)
    kept = concrete_masks(found, torch.full((blocks,), threshold), outputs).kept
    sets, impacts = topk_sets(found, [0.3] * blocks, outputs)
    for chosen in (kept, sets):
        assert chosen.shape == (blocks + 1, count, tokens)
        assert bool((chosen[:-1] | ~chosen[1:]).all())
        assert chosen[-1].sum(dim=1).tolist() == [outputs] * count
        assert bool(chosen[:, :, :outputs].all())
    assert bool((sets[:-1].sum(dim=2) >= backtracking.token_count(0.3, tokens)).all())
    torch.testing.assert_close(impacts.sum(dim=2), torch.ones(blocks, count), atol=1e-4, rtol=0)


@settings(max_examples=60)
@given(ratings_of, st.sampled_from([1, 2]), st.lists(st.floats(-8, 8), min_size=5, max_size=5), st.booleans())
def test_the_kernel_walks_as_torch_does(sizes, outputs, thresholds, spoilt):
    tokens, blocks, count, seed = sizes
    outputs = min(outputs, tokens)
    found = ratings(tokens, blocks, count, seed, outputs)
    if spoilt:
        found[seed % blocks][0, 0, seed % tokens] = torch.nan
    logits = torch.tensor(thresholds[:blocks])
    native.walk_back()  # there is one here
    kept, masks = concrete_sets(found, logits, outputs), concrete_masks(found, logits, outputs)
    may_differ = (masks.soft - 0.5).abs() < 1e-4
    assert bool(((kept == masks.kept) | may_differ).all())


def test_a_walk_through_ratings_that_do_not_fit_is_refused():
    found = ratings(5, 3, 2, 0, outputs=1)
    for wrong, logits, outputs in (
        (found[:2], torch.zeros(2), 1),
        (found, torch.zeros(2), 1),
        (found, torch.zeros(3), 2),
        ([torch.rand(1, 2, 1)], torch.zeros(1), 2),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            concrete_sets(wrong, logits, outputs)


@settings(max_examples=100)
@given(st.floats(0.01, 1), st.floats(-6, 6))
def test_a_mask_is_hard_where_its_score_says(score, threshold):
    keep = torch.tensor(threshold).sigmoid()
    mask = concrete_mask(torch.tensor([score]), logit(keep))
    if abs(score - (1 - keep)) > 1e-4:
        assert bool(mask >= 0.5) == bool(score >= 1 - keep)


def test_occupancy_falls_with_the_threshold():
    _, sparse, _ = models()
    found = []
    with torch.no_grad():
        for threshold in (3.0, 1.0, 0.0, -1.0, -3.0, -9.0):
            sparse.p_logit.fill_(threshold)
            found.append(float(occupancy(sparse.choose(images())).mean()))
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]


@pytest.mark.parametrize("changes", [{}, {"reg_tokens": 3}, {"qk_norm": True}, {"init_values": 0.3}])
def test_all_tokens_kept_is_dense(changes):
    vit = network(**changes)
    _, sparse, deployed = models(vit, keep_rate=1.0, p_logit=10.0)
    with torch.no_grad():
        assert bool(sparse.choose(images()).all(dim=2)[:-1].all())
        for model in (sparse, deployed):
            torch.testing.assert_close(model(images()), vit(images()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings_", [{}, {"variant": "topk", "ks": 0.2}, {"factor": 2}])
def test_images_that_keep_very_different_numbers_share_a_batch(settings_):
    method, sparse, deployed = models(keep_rate=0.4, x=images(8), **settings_)
    x = images(8)
    counts = torch.stack([block.queries for block in method.report(sparse, x).blocks])
    if not settings_:
        assert counts.max() > 2 * counts[:-1].min()
    with torch.no_grad():
        together = deployed(x)
        torch.testing.assert_close(together, sparse(x), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together, torch.cat([deployed(one[None]) for one in x]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings_", [{}, {"variant": "topk"}, {"variant": "topk", "attention": "actual"}, {"variant": "manual"}])  # fmt: skip
def test_what_is_executed_is_what_the_formula_says(settings_):
    vit = network()
    method, sparse, deployed = models(vit, **settings_)
    costs = cost.count(method, vit, sparse, deployed, images())
    assert costs.executed.total == pytest.approx(costs.theoretical.total, rel=1e-9)
    if settings_.get("variant") != "manual":
        with torch.no_grad(), Observer() as seen:
            deployed(images())
        assert len(seen.waits) == 1


@settings(max_examples=40)
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 4), st.integers(1, 128), st.booleans(), st.sampled_from([1, 2]), st.integers(0, 999))  # fmt: skip
def test_rated_attention_is_torchs(count, tokens, heads, width, uniform, sharpness, seed):
    qkv = sharpness * torch.randn(count, tokens, 3, heads, width, generator=torch.Generator().manual_seed(seed))
    qkv[:, :, 1] += 3 * (sharpness - 1)  # keys far from 0
    q, k, v = qkv.double().permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q * width**-0.5) @ k.transpose(-2, -1)
    out, rating = scored_attention(qkv.flatten(2), heads, uniform)
    expected = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2).float()
    torch.testing.assert_close(
        out, expected, atol=(1e-5, 5e-5)[sharpness - 1], rtol=1e-5
    )  # large scores are rounded more
    scores = scores - scores.mean(dim=-1, keepdim=True)  # before `rated` rounds them
    expected = rated(scores, "uniform" if uniform else "probabilities").float()
    torch.testing.assert_close(rating, expected, atol=5e-6, rtol=0)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5),
    st.integers(1, 128),
    st.sampled_from([0, -5]),
    st.integers(0, 999),
)
def test_packed_attention_is_each_images_own(lengths, width, offset, seed):
    queries, keys = [a for a, _ in lengths], [b for _, b in lengths]
    torch.manual_seed(seed)
    q = torch.randn(sum(queries), 2, width)
    k, v = torch.randn(sum(keys), 2, 2, width).unbind(1)
    k = k + offset * q[0].sign() * width**-0.5  # the first query's scores are below 0, where the padding's would be 0
    starts = [torch.tensor([0, *sizes]).cumsum(0).int() for sizes in (queries, keys)]
    found = packed_attention(q, k, v, *starts, queries, keys)
    assert torch.equal(found, operators._packed_natively(q, k, v, *starts))  # and not what stands in for it
    for ours, one_q, one_k, one_v in zip(found.split(queries), q.split(queries), k.split(keys), v.split(keys), strict=True):  # fmt: skip
        weights = torch.einsum("qhd,khd->hqk", one_q, one_k) * width**-0.5
        torch.testing.assert_close(ours, torch.einsum("hqk,khd->qhd", weights.softmax(-1), one_v), **CLOSE)


def test_without_a_compiler_torch_does_it(monkeypatch):
    _, _, deployed = models()
    for block in deployed.approx.blocks:
        assert block.attn.kernels(torch.device("cpu")) == ("plain", "scored")
    with torch.no_grad():
        expected = deployed(images())
        for block in deployed.approx.blocks[:-1]:
            block.attn.use_kernel("scored", torch.device("cpu"))
        torch.testing.assert_close(deployed(images()), expected, atol=1e-4, rtol=1e-4)

    def none():
        raise native.NoKernel("no compiler")

    monkeypatch.setattr(native, "packed_attention", none)
    monkeypatch.setattr(native, "scored_attention", none)
    monkeypatch.setattr(native, "walk_back", none)
    with torch.no_grad():
        for block in deployed.approx.blocks:
            block.attn.use_kernel("plain", torch.device("cpu"))
        torch.testing.assert_close(deployed(images()), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(native.NoKernel, match="no compiler"):
        scored_attention(torch.zeros(1, 2, 24), 2, True)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 4))
@settings(max_examples=30)
def test_a_plan_names_the_rows_that_go_on(drops, blocks):
    first = np.array([10 - drop for drop in drops])
    counts = np.stack([np.maximum(first - step, 1) for step in range(blocks + 1)])
    plan = Plan(counts, 10, torch.device("cpu"))
    rows = torch.arange(len(drops) * 10)[plan.entering]
    for index in range(blocks):
        rows = rows[plan.written[index]]
        expected = [image * 10 + place for image, count in enumerate(counts[index + 1]) for place in range(count)]
        assert rows.tolist() == expected
        assert plan.starts[index + 1].tolist() == [0, *counts[index + 1].cumsum()]


@pytest.mark.parametrize("settings_", [{}, {"variant": "topk", "attention": "actual"}, {"variant": "manual"}])
def test_every_variant_can_be_timed(settings_):
    vit = network()
    _, _, deployed = models(vit, **settings_)
    row = compare(vit, deployed, images(), Conditions(4, "float32", "eager", seconds=0.01))
    assert row["speed_up"] > 0
    assert "macs_executed" not in row["deployed"]  # no kernel executes more than another
    row = compare(vit, deployed, images(2), Conditions(2, "bfloat16", "eager", seconds=0.01))
    assert row["speed_up"] > 0


def test_masks_stay_float32_under_autocast():
    _, sparse, _ = models(x=images())
    sparse.train()
    objective = ConcreteObjective(sparse, torch.nn.CrossEntropyLoss(), None, -0.5, 100.0, 1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        masks = sparse.masks(images())
        terms = objective(images(), torch.arange(4), None)
    assert masks.soft.dtype == masks.scores.dtype == torch.float32
    sum(value_of(term) for term in terms.values()).backward()
    assert all(p.grad.isfinite().all() for p in sparse.parameters() if p.grad is not None)


@pytest.mark.parametrize("variant", ["concrete", "topk"])
def test_sets_are_the_same_under_autocast(variant):
    torch.manual_seed(0)
    found = [torch.rand(4, 60, 60).softmax(-1) for _ in range(5)] + [torch.rand(4, 1, 60).softmax(-1)]

    def sets():
        if variant == "topk":
            return topk_sets(found, [0.3] * 6, 1)[0]
        return concrete_sets(found, torch.full((6,), -0.4), 1)

    expected = sets()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sets(), expected)


def test_the_thresholds_loss_is_its_formula():
    """In the golden case the thresholds are where they began."""
    _, sparse, _ = models(p_logit=-0.5)
    moved = torch.tensor([-0.5, -0.1, -1.0, 0.7])
    with torch.no_grad():
        sparse.p_logit.copy_(moved)
    objective = ConcreteObjective(sparse, torch.nn.CrossEntropyLoss(), None, -0.5, 100.0, 1e-3).train()
    terms = objective(images(), torch.arange(4), None)
    assert float(terms["thresholds"]) == pytest.approx(1e-3 * (0.4**2 + 0.5**2 + 1.2**2), rel=1e-5)
    occupied = sparse.masks(images()).soft[1:].mean()
    target = torch.tensor(-0.5).sigmoid()
    assert float(value_of(terms["ratio"])) == pytest.approx(float(100 * (target - occupied) ** 2), rel=1e-4)


@pytest.mark.parametrize("changes", [{"qkv_bias": False}, {"proj_bias": False}, {"depth": 1}, {"norm_layer": RmsNorm}])
def test_other_networks(changes):
    method, sparse, deployed = models(network(**changes))
    with torch.no_grad():
        torch.testing.assert_close(deployed(images()), sparse(images()), atol=1e-4, rtol=1e-4)
    assert len(method.report(deployed, images()).blocks) == len(sparse.blocks)


def test_what_is_no_number_reaches_the_logits_of_its_image_alone():
    for variant in ({}, {"variant": "topk"}):
        _, _, deployed = models(**variant)
        for kernel in ("plain", "scored"):
            for block in deployed.approx.blocks:
                block.attn.use_kernel(kernel, torch.device("cpu"))
            for bad in (0, 3):
                x = images()
                with torch.no_grad():
                    expected = deployed(x)
                    x[bad, 0, 5, 5] = torch.nan
                    found = deployed(x)
                assert bool(found[bad].isnan().all())
                others = [image for image in range(4) if image != bad]
                torch.testing.assert_close(found[others], expected[others], atol=1e-4, rtol=1e-4)


def test_numbers_that_are_none_show_in_the_kernels():
    qkv = torch.randn(1, 20, 3 * 2 * 8)
    qkv[0, 3, 20] = torch.nan  # a key
    for standardised in (True, False):
        out, rating = scored_attention(qkv, 2, standardised)
        assert bool(rating.isnan().all())
        assert bool(out[..., :8].isnan().all())
        assert bool(out[..., 8:].isfinite().all())  # the other head's
    starts = torch.tensor([0, 20], dtype=torch.int32)
    q, k, v = (part[0].reshape(20, 2, 8) for part in qkv.split(16, dim=2))
    out = packed_attention(q, k, v, starts, starts, [20], [20])
    assert bool(out[:, 0].isnan().all())
    assert bool(out[:, 1].isfinite().all())
    k = k.nan_to_num(0.0)
    k[4, 1], q[2, 1] = torch.inf, torch.nan
    out = packed_attention(q, k, v, starts, starts, [20], [20])
    assert bool(out[2, 1].isnan().all())
    assert bool(out[:, 0].isfinite().all())


def test_packed_attention_refuses_what_it_would_misread():
    q = torch.randn(5, 2, 8)
    starts = torch.tensor([0, 5], dtype=torch.int32)
    for arguments, said in (
        ((q, q, q.bfloat16(), starts, starts), "v must be torch.float32"),
        ((q, q, q, starts.long(), starts), "q_starts must be torch.int32"),
        ((q, q, q, starts, starts + 1), "starts do not fit 5 queries and 5 keys"),
        ((q, q, q, starts, torch.zeros_like(starts)), "queries need keys"),
        ((q, q, q, torch.tensor([0, 5, 2]).int(), torch.tensor([0, 2, 5]).int()), "not fall"),
        ((q, q, q, torch.tensor([-1, 5]).int(), starts), "begin at 0"),
    ):
        with pytest.raises(ValueError, match=said):
            packed_attention(*arguments, [5], [5])


def test_manual_top_k_is_its_description():
    """Written once more, with masks and one image at a time, from the specification."""
    vit = network()
    _, sparse, _ = models(vit, variant="manual", occupancy=0.4)
    shares = manual_schedule(0.4, 4)
    assert shares[0] == pytest.approx(0.6)
    assert shares[-1] == pytest.approx(0.5 * 0.4 - 0.1 * 0.4)
    with torch.no_grad():
        for one in images():
            x = vit._pos_embed(vit.patch_embed(one[None]))[0]
            alive = list(range(37))
            for index, block in enumerate(vit.blocks):
                y = block.norm1(x)
                q, k, v = block.attn.qkv(y).view(37, 3, 3, 16).permute(1, 2, 0, 3)
                asking = sorted({0, *alive}) if index == 3 else alive
                weights = ((q[:, asking] * 0.25) @ k[:, alive].transpose(-2, -1)).softmax(-1)
                out = block.attn.proj((weights @ v[:, alive]).transpose(0, 1).flatten(1))
                wanted = weights.mean(dim=(0, 1))
                best = [alive[i] for i in wanted.topk(max(1, int(shares[index] * 37))).indices] if index < 3 else [0]
                x = x.clone()
                for token in best:
                    x[token] += out[asking.index(token)]
                x[best] = x[best] + block.mlp(block.norm2(x[best]))
                alive = sorted(best)
            torch.testing.assert_close(sparse(one[None]), vit.forward_head(vit.norm(x[None])), atol=1e-4, rtol=1e-4)


# Training, sweeps, files, costs.


class Small:
    """The method's training on random images."""

    def __init__(self, steps=6, **settings):
        self.method = methods.create("sttabt", approx_epochs=1, epochs=1, **settings)
        self.vit = network(img_size=24, patch_size=4)
        torch.manual_seed(1)
        self.sparse = self.method.sparsify(self.vit)
        self.steps = steps

    def train(self, **changes):
        phases = self.method.phases(self.sparse, make_criterion(RECIPE), network(3))
        training = Training(RECIPE, random_data(), plan("cpu", "float32"), seed=0, steps=self.steps, **changes)
        return run_phases(self.sparse, phases, training)[0]


def test_one_approximation_network_serves_a_sweep(tmp_path):
    artifacts = Artifacts(tmp_path, {"seed": 0})
    first, second, third = Small(p_logit=-0.5), Small(p_logit=-2.0), Small(variant="topk", ks=0.3)
    logs = [one.train(artifacts=artifacts) for one in (first, second, third)]
    assert logs[0][0].source is None
    assert "artifact" in logs[1][0].source
    assert "artifact" in logs[2][0].source
    assert logs[1][0].macs == logs[0][0].macs > 0  # charged all the same
    assert float(second.sparse.p_logit.mean()) == pytest.approx(-2.0, abs=0.1)
    assert float(first.sparse.p_logit.mean()) == pytest.approx(-0.5, abs=0.1)
    moved = Small(p_logit=-0.5, factor=8)
    assert moved.train(artifacts=artifacts)[0].source is None


def test_the_network_itself_does_not_move_while_it_is_imitated():
    one = Small(variant="topk")
    before = {name: value.clone() for name, value in one.sparse.state_dict().items()}
    one.train()
    moved = {
        name.split(".")[0] for name, value in one.sparse.state_dict().items() if not torch.equal(value, before[name])
    }
    assert moved == {"approx", "transfer"}


def test_class_tokens_never_move_and_positions_do():
    one = Small()
    before = {name: value.clone() for name, value in one.sparse.state_dict().items()}
    cls_after_distilling = None

    def look(progress):
        nonlocal cls_after_distilling
        if progress.phase == "concrete" and cls_after_distilling is None:
            cls_after_distilling = one.sparse.approx.cls_token.detach().clone()

    one.train(watch=look)
    assert torch.equal(one.sparse.cls_token, before["cls_token"])
    assert torch.equal(one.sparse.approx.cls_token, cls_after_distilling)
    assert not torch.equal(one.sparse.pos_embed, before["pos_embed"])


def test_the_authors_files_can_be_given(tmp_path):
    """Of the approximation network alone, and of both."""
    theirs = under("w/")
    small = {
        name.removeprefix("approx_bert."): value for name, value in theirs.items() if name.startswith("approx_bert.")
    }
    method, expected = official()
    for phase, content in (("approx", small), ("concrete", theirs)):
        path = tmp_path / f"{phase}.pth"
        torch.save({"model": content}, path)
        sparse = method.sparsify(official_vit())
        backbone = sparse.blocks[0].attn.qkv.weight.detach().clone()
        training = Training(
            RECIPE, random_data(), plan("cpu", "float32"), seed=0, steps=4, given={phase: path}, convert=method.convert_checkpoint,
        )  # fmt: skip
        phases = method.phases(sparse, make_criterion(RECIPE))
        if phase == "approx":
            run_phases(
                sparse, [*phases[:1], methods.TransformPhase(name="rest", apply=lambda: None, share=0.4)], training
            )
            assert torch.equal(sparse.blocks[0].attn.qkv.weight, backbone)
        else:
            training.given["approx"] = tmp_path / "approx.pth"
            run_phases(sparse, phases, training)
            assert torch.equal(sparse.blocks[0].attn.qkv.weight, expected.blocks[0].attn.qkv.weight)
        torch.testing.assert_close(sparse.approx.state_dict(), expected.approx.state_dict())


def test_a_file_of_both_networks_gives_the_approximation_network_alone(tmp_path):
    """Where it is given for the phase that makes that."""
    torch.save({"model": under("w/")}, tmp_path / "both.pth")
    method, expected = official()
    sparse = method.sparsify(official_vit())
    before = {name: value.clone() for name, value in sparse.state_dict().items()}
    training = Training(
        RECIPE, random_data(), plan("cpu", "float32"), seed=0, steps=4, given={"approx": tmp_path / "both.pth"}, convert=method.convert_checkpoint,
    )  # fmt: skip
    rest = methods.TransformPhase(name="rest", apply=lambda: None, share=0.4)
    run_phases(sparse, [*method.phases(sparse, make_criterion(RECIPE))[:1], rest], training)
    for name, value in sparse.state_dict().items():
        own = name.split(".")[0] in ("approx", "transfer")
        assert torch.equal(value, expected.state_dict()[name] if own else before[name]), name


def test_a_given_file_must_have_what_the_phase_trains(tmp_path):
    path = tmp_path / "partial.pth"
    torch.save({"model": {"transfer_embedding.weight": torch.zeros(32, 16)}}, path)
    method, _ = official()
    sparse = method.sparsify(official_vit())
    training = Training(
        RECIPE, random_data(), plan("cpu", "float32"), seed=0, steps=4, given={"approx": path}, convert=method.convert_checkpoint,
    )  # fmt: skip
    with pytest.raises(Exception, match="does not fit this model: it has no approx"):
        run_phases(sparse, method.phases(sparse, make_criterion(RECIPE)), training)


@pytest.mark.parametrize(("factor", "expected"), [(4, 0.351), (8, 0.113)])
def test_published_costs_of_deit_small(factor, expected):
    vit = timm.create_model("deit_small_patch16_224").eval()
    method = methods.create("sttabt", factor=factor)
    torch.manual_seed(0)
    sparse = method.sparsify(vit).eval()
    report = method.report(sparse, torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)))
    assert float(report.authors.parts["approximation"]) / 1e9 == pytest.approx(expected, abs=5e-4)
    own = sum(float(extra.macs) for extra in report.overhead) / 1e9
    assert own == pytest.approx({4: 0.3383, 8: 0.1090}[factor], abs=1e-4)


@pytest.mark.parametrize(
    ("tokens", "dense", "approx", "together"), [(192, 4.454, 0.351, 4.832), (197, 4.580, 0.363, 4.970)]
)
def test_the_closed_form_gives_the_authors_numbers(tokens, dense, approx, together):
    shares = torch.ones(13, 1)
    found = network_macs(shares, tokens, 384, 1536, 6, 16), network_macs(shares, tokens, 96, 384, 6, 16)
    assert float(found[0]) / 1e9 == pytest.approx(dense, abs=6e-4)
    assert float(found[1]) / 1e9 == pytest.approx(approx, abs=6e-4)
    assert float(sum(found) + update_macs(shares, tokens, 6)) / 1e9 == pytest.approx(together, abs=1.1e-3)


def test_wrong_settings_and_networks_are_told():
    for wrong, said in (
        ({"ks": 0.2}, "ks is for variant: topk"),
        ({"variant": "manual", "p_logit": 0.0}, "p_logit is for variant: concrete"),
        ({"variant": "concrete", "attention": "actual"}, "attention is for variant: topk"),
        ({"factor": 0}, "factor"),
        ({"variant": "manual", "factor": 8}, "factor is for the approximation network, and here is none"),
        ({"variant": "topk", "p_lr": 2.0}, "p_lr is for variant: concrete"),
    ):
        with pytest.raises(ValueError, match=said):
            methods.create("sttabt", **wrong)
    with pytest.raises(methods.Unsupported, match=r"factor 5 does not divide.*1, 2, 4, 8, 16 do"):
        methods.create("sttabt", factor=5).sparsify(network())
    with pytest.raises(methods.Unsupported, match="average pooling reads all tokens"):
        methods.create("sttabt").sparsify(network(class_token=False, global_pool="avg"))
    with pytest.raises(methods.Unsupported, match="patch_drop_rate 0"):
        methods.create("sttabt").sparsify(network(patch_drop_rate=0.5))
    with pytest.raises(methods.Unsupported, match="plain Mlp"):
        methods.create("sttabt").sparsify(network(mlp_layer=SwiGLUPacked))


def test_the_official_sweep_is_one_line():
    run = spec.SPEC_FOLDER / "imagenet-sttabt-small.yaml"
    labels = [cell.label for cell in load_run(run, only=["sttabt"]).cells()]
    assert [label for label in labels if label.startswith("STTABT") and "," not in label] == [
        f"STTABT {p}" for p in (-3.0, -2.0, -1.5, -1.25, -1.0, -0.5, 0.0, 0.5, 1.0)
    ]
