"""DynamicViT against its authors' code (golden numbers) and against its own rules."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.loss import SoftTargetCrossEntropy
from torch import nn

import methods
from methods.core.noise import Noise
from methods.core.pooled import value_of
from methods.core.pruning import stage_counts
from methods.dynamicvit.losses import PruningObjective, ratio_loss, token_loss
from methods.dynamicvit.model import ScorePredictor, masked_softmax

pytestmark = pytest.mark.rounding

GOLDEN = sorted((Path(__file__).parent / "golden" / "dynamicvit").glob("*.npz"))


class Case:
    """A golden file: the two networks it holds, and its arrays as tensors."""

    def __init__(self, path):
        self.arrays = {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(path).items()}
        self.places = [int(i) for i in self["meta/pruning_loc"]]
        self.method = methods.create(
            "dynamicvit", keep_rate=float(self["meta/rho"]), pruning_loc=self.places, ratio_weight=self.ratio_weight
        )
        self.sparse = self.method.sparsify(self.vit())
        self.sparse.load_state_dict(self.method.convert_checkpoint({"model": self.under("weights/")}))
        self.teacher = self.vit()
        self.teacher.load_state_dict(self.under("teacher_weights/"))

    def __getitem__(self, key):
        return self.arrays[key]

    def under(self, prefix):
        return {key.removeprefix(prefix): value for key, value in self.arrays.items() if key.startswith(prefix)}

    @property
    def ratio_weight(self):
        return float(next(v for k, v in self.arrays.items() if k.startswith("meta/") and "ratio_weight" in k))

    def vit(self):
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=32, num_classes=5,
            depth=int(self["meta/depth"]), num_heads=int(self["meta/num_heads"]),
        )  # fmt: skip

    def targets(self):
        return self.arrays.get("input/target_soft", self.arrays.get("input/target_hard"))

    def noise(self):
        """The recorded Gumbel noise in the place of ours."""
        recorded = self

        class Recorded:
            def gumbel(self, name, *shape):
                return recorded[f"train/{name}/gumbel"].view(-1, *shape)

        return Recorded()

    def objective(self):
        criterion = SoftTargetCrossEntropy() if "input/target_soft" in self.arrays else nn.CrossEntropyLoss()
        (phase,) = self.method.phases(self.sparse.train(), criterion, self.teacher)
        return phase.objective


@pytest.fixture(scope="module", params=GOLDEN, ids=lambda path: path.stem)
def case(request):
    return Case(request.param)


def test_there_are_golden_cases():
    assert GOLDEN


def test_evaluation_agrees_with_the_authors(case):
    sparse = case.sparse.eval()
    with torch.no_grad():
        logits = sparse(case["input/image"])
        deployed = case.method.deploy(sparse)(case["input/image"])
    torch.testing.assert_close(logits, case["eval/logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(deployed, logits, atol=1e-6, rtol=0)
    for stage, kept in enumerate(sparse.kept_patches(case["input/image"])):
        expected = case[f"eval/stage{stage}/keep_patch"]
        assert [set(row) for row in kept.tolist()] == [set(row) for row in expected.tolist()]
    report = case.method.report(sparse, case["input/image"])
    assert [int(block.keys[0]) for block in report.blocks] == [
        case[f"eval/block_out/{i}"].shape[1] for i in range(len(report.blocks))
    ]


def test_training_forward_agrees_with_the_authors(case):
    out = case.sparse.train().forward_train(case["input/image"], case.noise())
    torch.testing.assert_close(out.logits, case["train/logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(out.features, case["train/features"], atol=1e-5, rtol=0)
    for stage, decision in enumerate(out.decisions):
        assert torch.equal(decision > 0.5, case[f"train/stage{stage}/decision"] > 0.5)


def test_teacher_agrees_with_the_authors(case):
    with torch.no_grad():
        torch.testing.assert_close(case.teacher.eval()(case["input/image"]), case["teacher/logits"], atol=1e-5, rtol=0)


def test_losses_and_gradients_agree_with_the_authors(case):
    objective = case.objective()
    terms = {
        name: value_of(term) for name, term in objective(case["input/image"], case.targets(), case.noise()).items()
    }
    expected = {
        "classification": case["loss_mse/cls"],
        "ratio": case.ratio_weight * case["loss_mse/ratio_sum"] / len(case.places),
        "distillation": 0.5 * case["loss_mse/cls_kl"],
        "token": 0.5 * case["loss_mse/token"],
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value.to(terms[name].dtype).reshape(()), atol=0, rtol=2e-6, msg=name)
    total = sum(terms.values())
    torch.testing.assert_close(total, case["loss_mse/total"].to(total.dtype).reshape(()), atol=0, rtol=2e-6)
    total.backward()
    gradients = case.under("grad_mse/")
    assert gradients.keys() == dict(case.sparse.named_parameters()).keys()
    for name, parameter in case.sparse.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    case.sparse.zero_grad()


def test_masked_softmax_agrees_with_the_authors(case):
    weights = masked_softmax(case["unit/attn_logits"], case["unit/policy"])
    # Relative, since the weight of a masked key is about 1e-8 and must be that, not 0.
    torch.testing.assert_close(weights, case["unit/attn_probs"], atol=1e-12, rtol=1e-4)


@pytest.mark.parametrize(
    ("rate", "counts"),
    [(0.9, (176, 158, 142)), (0.8, (156, 125, 100)), (0.7, (137, 96, 67)), (0.6, (117, 70, 42)), (0.5, (98, 49, 24)), (0.25, (49, 12, 3))],
)  # fmt: skip
def test_kept_counts_are_the_published_ones(rate, counts):
    assert stage_counts(196, rate, 3) == counts


def small_vit(**changes):
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **(sizes | changes))


def images(count=2, size=16):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_masked_training_equals_removal_for_the_same_tokens():
    """With the evaluation's kept sets as decisions, hiding tokens and removing them differ by the softmax's eps alone."""
    sparse = methods.create("dynamicvit", keep_rate=0.6).sparsify(small_vit()).eval()
    batch = images(3)
    kept = sparse.kept_patches(batch)
    sparse.decide = lambda stage, patches, keep, noise: torch.zeros(3, 16, 1).scatter_(
        1, kept[stage].unsqueeze(-1), 1.0
    )
    with torch.no_grad():
        torch.testing.assert_close(sparse.forward_train(batch, None).logits, sparse(batch), atol=1e-4, rtol=0)


def test_keeping_everything_is_the_dense_network():
    vit = small_vit().eval()
    sparse = methods.create("dynamicvit", keep_rate=1.0).sparsify(vit).eval()
    with torch.no_grad():
        torch.testing.assert_close(sparse(images()), vit(images()), atol=1e-5, rtol=0)


def test_losing_every_token_gives_no_nan():
    predictor = ScorePredictor(24)
    assert predictor(torch.randn(2, 9, 24), torch.zeros(2, 9, 1)).isfinite().all()
    assert value_of(token_loss(torch.randn(2, 9, 24), torch.randn(2, 9, 24), torch.zeros(2, 9))) == 0
    sparse = methods.create("dynamicvit").sparsify(small_vit())
    sparse.decide = lambda stage, patches, keep, noise: torch.zeros_like(keep)
    assert sparse.forward_train(images(), None).logits.isfinite().all()


def test_larger_images_and_other_grids():
    sparse = methods.create("dynamicvit").sparsify(small_vit(img_size=(24, 16))).eval()
    assert sparse.kept_counts == stage_counts(24, 0.7, 3)
    batch = torch.randn(2, 3, 24, 16)
    assert sparse(batch).shape == (2, 5)
    assert len(set(sparse.kept_patches(batch)[0][0].tolist())) == sparse.kept_counts[0]


def test_groups_leave_tokens_and_positions_alone():
    method = methods.create("dynamicvit")
    sparse = method.sparsify(small_vit())
    (phase,) = method.phases(sparse, nn.CrossEntropyLoss())
    backbone, predictor = phase.groups
    assert (backbone.lr_scale, backbone.frozen, predictor.lr_scale, predictor.frozen) == (1.0, 5 / 30, 100.0, 0.0)
    trained = {id(p) for group in phase.groups for p in group.parameters}
    left = {name for name, p in sparse.named_parameters() if id(p) not in trained}
    assert left == {"cls_token", "pos_embed"}


def test_predictor_parameters_are_the_papers():
    assert sum(p.numel() for p in ScorePredictor(384).parameters()) * 3 == pytest.approx(0.724e6, rel=1e-3)


@given(rate=st.floats(0.5, 1.0), seed=st.integers(0, 2**31), step=st.integers(0, 2**31))
@settings(max_examples=25)
def test_random_training_keeps_the_planned_numbers(rate, seed, step):
    sparse = RANDOM_VITS.setdefault(
        round(rate, 1), methods.create("random", keep_rate=round(rate, 1)).sparsify(small_vit())
    )
    out = sparse.forward_train(images(3), Noise(seed, step, torch.arange(3)))
    assert [decision.sum(1).tolist() for decision in out.decisions] == [[count] * 3 for count in sparse.kept_counts]
    for earlier, later in zip(out.decisions, out.decisions[1:], strict=False):
        assert (later <= earlier).all()


RANDOM_VITS: dict = {}


def test_random_removal_is_per_image_and_repeatable():
    sparse = methods.create("random", keep_rate=0.5).sparsify(small_vit()).eval()
    batch = images(4)
    kept = sparse.kept_patches(batch)[0]
    assert torch.equal(kept[2:3], sparse.kept_patches(batch[2:3])[0])
    assert len({tuple(sorted(row)) for row in kept.tolist()}) > 1
    other = methods.create("random", keep_rate=0.5, seed=1).sparsify(small_vit()).eval()
    assert not torch.equal(kept, other.kept_patches(batch)[0])


def test_ratio_loss_is_zero_at_the_target():
    decisions = [torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0, 0.0]])]
    assert ratio_loss(decisions, 0.5) == 0
    assert ratio_loss(decisions, 1.0) > 0


def test_no_teacher_means_no_teacher_terms():
    sparse = methods.create("dynamicvit").sparsify(small_vit())
    objective = PruningObjective(sparse, nn.CrossEntropyLoss(), None, 0.7, 2.0, 0.5, 0.5)
    terms = objective(images(), torch.tensor([0, 1]), Noise(0, 0, torch.arange(2)))
    assert terms.keys() == {"classification", "ratio"}


@pytest.mark.parametrize(
    ("depth", "places"), [(2, (1,)), (3, (1, 2)), (4, (1, 2, 3)), (12, (3, 6, 9)), (16, (4, 8, 12)), (20, (5, 10, 15))]
)
def test_places_follow_the_depth(depth, places):
    sparse = methods.create("dynamicvit").sparsify(small_vit(depth=depth)).eval()
    assert sparse.pruning_loc == places
    assert sparse(images()).shape == (2, 5)


@pytest.mark.parametrize("places", [[0], [4], [2, 1], [1, 1]])
def test_places_that_do_not_fit_are_refused(places):
    with pytest.raises(methods.Unsupported, match="pruning_loc"):
        methods.create("dynamicvit", pruning_loc=places).sparsify(small_vit())
