"""STTABT against the authors' numbers, and what must hold for any image, mask and backbone."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import methods
from methods.core.pooled import value_of
from methods.sttabt.approxnet import narrowed
from methods.sttabt.backtracking import occupancy, topk_sets
from methods.sttabt.counting import network_macs, update_macs
from methods.sttabt.model import masked_block
from methods.sttabt.observed import steps
from methods.sttabt.training import ConcreteObjective, Distillation

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
    wanted = {"factor": meta()["factor"]} | changes
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
    close(masks.scores, "eval_soft/score", atol=1e-6)
    close(masks.soft[:-1], "eval_soft/mask_in_soft")
    close(masks.soft[1:], "eval_soft/mask_out_soft")
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
        x = sparse.norm_pre(sparse._pos_embed(sparse.patch_embed(pixels())))
        hidden = [x]
        for index, block in enumerate(sparse.blocks):
            x = masked_block(block, x, used[index], used[index + 1])
            hidden.append(x)
        close(torch.stack(hidden), f"{run}/hidden_states")
        close(sparse.forward_head(sparse.masked_features(pixels(), used)), f"{run}/logits")


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
    objective = Distillation(sparse, prediction=200.0).train()
    terms = objective(pixels(), golden()["in/labels"], None)
    for ours, theirs in (("attention", "att"), ("hidden", "hid"), ("embedding", "emb"), ("prediction", "pred")):
        close(terms[ours], f"distill/loss_{theirs}")
    total = sum(terms.values())
    close(total, "distill/loss_total")
    total.backward()
    _compare_gradients(sparse, {f"approx_bert.{name}": value for name, value in under("distill/grad/").items()}, 10)
    assert all(p.grad is None for name, p in sparse.named_parameters() if not name.startswith(("approx.", "transfer.")))


@pytest.mark.parametrize("run", ["train_soft", "train_hard"])
def test_end_to_end_training_is_the_authors(run):
    _, sparse = official()
    teacher = official_vit()
    state = methods.create("sttabt").convert_checkpoint({"model": under("w_teacher/")})
    teacher.load_state_dict(state)
    objective = ConcreteObjective(sparse, _soft_cross_entropy, teacher, meta()["p_init"], 100.0, 1e-3, run == "train_hard").train()  # fmt: skip
    terms = {name: value_of(term) for name, term in objective(pixels(), golden()["in/soft_labels"], None).items()}
    close(terms["classification"], f"{run}/loss_ce")
    close(terms["ratio"], f"{run}/loss_ratio")
    close(terms["thresholds"].reshape(1), f"{run}/loss_reg")
    close(2 * terms["distillation"], f"{run}/loss_kl")
    total = sum(terms.values())
    close(total.reshape(1), f"{run}/loss_total")
    total.backward()
    close(sparse.p_logit.grad, f"{run}/grad_p_logit", rtol=1e-4)
    skipped = {name: value for name, value in under(f"{run}/grad/").items() if "key.bias" not in name}
    _compare_gradients(sparse, skipped, 10)


def _soft_cross_entropy(logits, targets):
    return (-targets * logits.log_softmax(-1)).sum(-1).mean()


def _compare_gradients(sparse, theirs, at_least):
    """Relative to the largest entry of each tensor. Queries, keys and values are one tensor here: their parts are looked up by filling in the others."""
    parameters = dict(sparse.named_parameters())
    compared = 0
    for name, value in theirs.items():
        kind = name.rsplit(".", 2)[-2]
        if ".attention.attention." in name:
            shown = {name.replace(f".{kind}.", f".{other}."): value if other == kind else torch.full_like(value, torch.nan) for other in ("query", "key", "value")}  # fmt: skip
        else:
            shown = {name: value}
        marker = {} if name.startswith("approx_bert.") else {"approx_bert.transfer_none": torch.zeros(1)}
        found = methods.create("sttabt").convert_checkpoint({"model": shown | marker})
        (ours,) = (key for key in found if key in parameters)
        expected, grad = found[ours], parameters[ours].grad
        there = ~expected.isnan()
        scale = float(value.abs().max())
        assert float((grad[there] - expected[there]).abs().max()) <= 2e-5 * scale + 1e-9, name
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
