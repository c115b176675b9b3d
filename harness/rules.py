"""The contract as rules that can be run: each takes a method on a small backbone and raises Broken where it does not hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import timm
import torch
from torch import Tensor, nn

from harness import cost, device, models
from harness.data.cards import Card
from harness.data.dataset import ImageData
from harness.data.sources import Arrays
from harness.device.observe import Observer
from harness.spec import Recipe
from harness.training.engine import Training, run_phases
from harness.training.optimizers import make_criterion
from methods import Method, TrainPhase
from methods.core.noise import Noise
from methods.core.pooled import value_of

SIZE, CLASSES, IMAGES = 24, 7, 32
STEPS = 6
_SIZES = {"img_size": SIZE, "patch_size": 4, "embed_dim": 48, "depth": 12, "num_heads": 3, "num_classes": CLASSES}
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", {}),
    "average pooling": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 3}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
}
RECIPE = Recipe(
    batch_size=8,
    lr=1e-3,
    warmup_epochs=0,
    crop="none",
    auto_augment=None,
    color_jitter=0,
    random_erasing=0,
    mixup=0,
    cutmix=0,
)


class Broken(AssertionError):
    """A rule does not hold; the message says how."""


@dataclass
class Subject:
    """A method on a backbone, and what the rules look at. Expensive parts are made once."""

    method: Method
    backbone: str
    images: Tensor = field(
        default_factory=lambda: torch.randn(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    )

    @cached_property
    def vit(self) -> nn.Module:
        name, changes = BACKBONES[self.backbone]
        torch.manual_seed(0)
        return timm.create_model(name, **(_SIZES | changes)).eval()

    def sparse(self) -> nn.Module:
        torch.manual_seed(1)
        return self.method.sparsify(self.vit)

    def phases(self, sparse: nn.Module) -> Any:
        teacher = copy.deepcopy(self.vit) if self.method.uses_teacher else None
        return self.method.phases(sparse, make_criterion(RECIPE), teacher)

    def train(self) -> nn.Module:
        sparse = self.sparse()
        run_phases(sparse, self.phases(sparse), training())
        return sparse.eval()

    @cached_property
    def trained(self) -> nn.Module:
        """The model after a few steps: rules hold for trained models, not only for fresh ones."""
        return self.train()

    @cached_property
    def deployed(self) -> nn.Module:
        return self.method.deploy(self.trained)


Rule = Callable[[Subject], None]


def leaves_the_backbone_alone(subject: Subject) -> None:
    """sparsify works on a copy: the dense network is the teacher later."""
    before = models.state_digest(subject.vit.state_dict())
    kind, sparse = type(subject.vit), subject.sparse()
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.add_(1.0)
    _require(
        models.state_digest(subject.vit.state_dict()) == before,
        "sparsify shares parameters with the backbone, or changes them",
    )
    _require(type(subject.vit) is kind, "sparsify changes the backbone's class")


def keeps_parameter_names(subject: Subject) -> None:
    """timm's parameter names are kept, so that dense checkpoints and masks can be keyed by them."""
    missing = sorted(set(dict(subject.vit.named_parameters())) - set(dict(subject.sparse().named_parameters())))
    _require(not missing, f"sparse has no parameter {missing[:1]}, which the backbone has")


def maps_images_to_logits(subject: Subject) -> None:
    """[B, 3, H, W] to finite [B, classes], in eval mode, for both forms."""
    for form, model in (("sparse", subject.sparse().eval()), ("deployed", subject.deployed)):
        logits = _logits(model, subject.images)
        _require(isinstance(logits, Tensor), f"{form}: returns a {type(logits).__name__}, not logits")
        _require(
            logits.shape == (len(subject.images), CLASSES),
            f"{form}: logits of shape {tuple(logits.shape)}, not {(len(subject.images), CLASSES)}",
        )
        _require(bool(logits.isfinite().all()), f"{form}: logits that are not finite")


def trains_within_its_shares(subject: Subject) -> None:
    """The phases run in the engine; their shares sum to 1."""
    _require(subject.trained is not None, "no model came out of training")


def gradients_reach_what_is_trained(subject: Subject) -> None:
    """Every parameter of every group gets a gradient that is not zero, on some of a few batches."""
    sparse = subject.sparse()
    for phase in subject.phases(sparse):
        if not isinstance(phase, TrainPhase):
            continue
        names = {id(p): name for name, p in phase.objective.named_parameters()}
        groups = [p for group in phase.groups for p in group.parameters] if phase.groups is not None else (
            [p for p in phase.objective.parameters() if p.requires_grad])  # fmt: skip
        reached: set[int] = set()
        for step in range(3):
            phase.objective.train().zero_grad(set_to_none=True)
            terms = phase.objective(
                subject.images, torch.arange(len(subject.images)) % CLASSES, Noise(0, step, torch.arange(5))
            )
            _require(
                isinstance(terms, dict) and len(terms) > 0,
                f"phase {phase.name}: the objective must return named loss terms",
            )
            sum(map(value_of, terms.values())).backward()
            reached |= {id(p) for p in groups if p.grad is not None and bool(p.grad.any())}
        lost = [
            names.get(id(p), "a parameter that the objective does not hold") for p in groups if id(p) not in reached
        ]
        _require(
            not lost,
            f"phase {phase.name}: no gradient reaches {lost[0] if lost else ''}"
            + (f" and {len(lost) - 1} more" if len(lost) > 1 else ""),
        )


def shapes_are_final(subject: Subject) -> None:
    """Training changes no shape and adds no entry to the state dict."""
    fresh, trained = subject.sparse().state_dict(), subject.trained.state_dict()
    _require(
        fresh.keys() == trained.keys(),
        f"training adds or removes {sorted(fresh.keys() ^ trained.keys())[:1]} in the state dict",
    )
    changed = [name for name in fresh if fresh[name].shape != trained[name].shape]
    _require(not changed, f"training changes the shape of {changed[:1]}")


def checkpoint_round_trip(subject: Subject) -> None:
    """A state dict restores the model, strictly and completely."""
    other = subject.sparse()
    other.load_state_dict(copy.deepcopy(subject.trained.state_dict()))
    difference = _distance(_logits(other.eval(), subject.images), _logits(subject.trained, subject.images))
    _require(
        difference == 0,
        f"a model restored from the state dict differs by {difference:.2g} in its logits: it keeps state elsewhere",
    )


def deployed_equals_sparse(subject: Subject) -> None:
    """Deployment changes the work, not the predictions, and leaves the sparse model as it is."""
    before = models.state_digest(subject.trained.state_dict())
    difference = _distance(
        _logits(subject.method.deploy(subject.trained), subject.images), _logits(subject.trained, subject.images)
    )
    _require(difference < 1e-4, f"logits of the deployed model differ from the sparse model's by {difference:.2g}")
    _require(models.state_digest(subject.trained.state_dict()) == before, "deploy changes the sparse model")


def predictions_do_not_depend_on_the_batch(subject: Subject) -> None:
    """An image gets the same logits alone, in a batch, and at another place of it."""
    for form, model in (("sparse", subject.trained), ("deployed", subject.deployed)):
        together = _logits(model, subject.images)
        alone = torch.cat([_logits(model, image[None]) for image in subject.images])
        backwards = _logits(model, subject.images.flip(0)).flip(0)
        difference = max(_distance(alone, together), _distance(backwards, together))
        _require(difference < 1e-4, f"{form}: an image's logits change by {difference:.2g} with the batch it is in")


def report_is_consistent(subject: Subject) -> None:
    """One entry per block; counts within the tokens there are, and agreeing with the ids."""
    patches = subject.vit.patch_embed.num_patches
    most = patches + subject.vit.num_prefix_tokens
    for form, model in (("sparse", subject.trained), ("deployed", subject.deployed)):
        report = subject.method.report(model, subject.images)
        _require(
            len(report.blocks) == len(subject.vit.blocks),
            f"{form}: {len(report.blocks)} entries for {len(subject.vit.blocks)} blocks",
        )
        for index, block in enumerate(report.blocks):
            for kind in ("keys", "queries", "mlp"):
                counts = getattr(block, kind)
                _require(
                    counts.shape[0] in (1, len(subject.images)), f"{form}, block {index}: {kind} must be [B] or [1]"
                )
                _require(
                    bool(((counts >= 1) & (counts <= most)).all()),
                    f"{form}, block {index}: {kind} = {counts.tolist()} of {most} tokens",
                )
            if block.kept is not None:
                for ids, tokens in zip(block.kept, block.keys.expand(len(block.kept)), strict=True):
                    ids = ids[ids >= 0]
                    _require(len(ids) == len(ids.unique()), f"{form}, block {index}: a patch is kept twice")
                    _require(int(ids.max()) < patches, f"{form}, block {index}: a kept id beyond the {patches} patches")
                    _require(
                        len(ids) <= int(tokens), f"{form}, block {index}: {len(ids)} kept ids, but {int(tokens)} tokens"
                    )
        names = dict(model.named_parameters())
        for name, density in report.weight_density.items():
            _require(form != "sparse" or name in names, f"weight_density names {name}, which the model does not have")
            _require(0 <= density <= 1, f"density {density} of {name}")


def costs_can_be_counted(subject: Subject) -> None:
    """The trace knows every operation; the deployed model executes no more than dense and overhead together."""
    costs = cost.count(subject.method, subject.vit, subject.trained, subject.deployed, subject.images)
    report = subject.method.report(subject.trained, subject.images)
    extra = sum(float(overhead.macs.double().mean()) for overhead in report.overhead)
    claimed, executed, most = costs.theoretical.total, costs.executed.total, (costs.dense.total + extra) * 1.01
    _require(claimed > 0, "the report gives no work at all")
    _require(
        executed <= most, f"executes {executed:.4g} MACs, more than dense and reported overhead together ({most:.4g})"
    )
    _require(claimed <= most, f"claims {claimed:.4g} MACs, more than dense and overhead together ({most:.4g})")


def waits_for_the_device_once(subject: Subject) -> None:
    """A forward of the deployed model makes the host wait for nothing; once where the number of tokens depends on the image."""
    varies = cost.shapes_vary(subject.method.report(subject.deployed, subject.images))
    with torch.no_grad(), Observer() as seen:
        subject.deployed(subject.images)
    _require(
        len(seen.waits) <= varies,
        f"a forward waits for the device {len(seen.waits)} times ({', '.join(dict.fromkeys(seen.waits))})",
    )


def compiles_in_one_graph(subject: Subject) -> None:
    """torch.compile takes the deployed model without a graph break, where shapes are fixed, and it predicts the same."""
    if subject.backbone != "plain" or cost.shapes_vary(subject.method.report(subject.deployed, subject.images)):
        return  # breaks are in a method's code, so one backbone shows them
    torch.compiler.reset()
    try:
        compiled = _logits(torch.compile(subject.deployed, fullgraph=True, backend="eager"), subject.images)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise Broken(f"torch.compile breaks the graph: {str(error).splitlines()[0]}") from error
    distance = _distance(compiled, _logits(subject.deployed, subject.images))
    _require(distance <= 1e-4, f"compiled logits differ by {distance:.2g}")


def deterministic_by_seed(subject: Subject) -> None:
    """The same seed gives the same weights."""
    again = subject.train()
    _require(
        models.state_digest(again.state_dict()) == models.state_digest(subject.trained.state_dict()),
        "two trainings with one seed end with different weights",
    )


RULES: tuple[Rule, ...] = (
    leaves_the_backbone_alone, keeps_parameter_names, gradients_reach_what_is_trained, trains_within_its_shares, maps_images_to_logits,
    shapes_are_final, checkpoint_round_trip, deployed_equals_sparse, predictions_do_not_depend_on_the_batch, report_is_consistent,
    costs_can_be_counted, waits_for_the_device_once, compiles_in_one_graph, deterministic_by_seed,
)  # fmt: skip


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Broken(otherwise)


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def training(**changes: Any) -> Training:
    """A few steps on random images."""
    return Training(RECIPE, random_data(), device.plan("cpu", "float32"), seed=0, steps=STEPS, **changes)


def random_data() -> ImageData:
    """Random images: the rules are about the method, not about learning."""
    generator = torch.Generator().manual_seed(5)
    arrays = Arrays(
        torch.randint(0, 256, (IMAGES, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator),
        torch.arange(IMAGES) % CLASSES,
    )
    ids = torch.arange(IMAGES)
    card = Card(name="random", classes=CLASSES, image_size=SIZE)
    return ImageData(card, SIZE, CLASSES, "random", arrays, arrays, train_ids=ids, val_ids=ids[:0])
