"""Rules about a method's models: each takes a subject and raises Broken where it does not hold."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from torch import Tensor, nn

from harness import cost, models
from harness.device.observe import Observer
from harness.rules.subject import CLASSES, Broken, Subject, require
from harness.tally import values


def leaves_the_backbone_alone(subject: Subject) -> None:
    """sparsify works on a copy: the dense network is the teacher later."""
    before = models.state_digest(subject.vit.state_dict())
    kind, sparse = type(subject.vit), subject.sparse()
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.add_(1.0)
    require(
        models.state_digest(subject.vit.state_dict()) == before,
        "sparsify shares parameters with the backbone, or changes them",
    )
    require(type(subject.vit) is kind, "sparsify changes the backbone's class")


def keeps_parameter_names(subject: Subject) -> None:
    """timm's parameter names are kept, so that dense checkpoints and masks can be keyed by them."""
    missing = sorted(set(dict(subject.vit.named_parameters())) - set(dict(subject.sparse().named_parameters())))
    require(not missing, f"sparse has no parameter {missing[:1]}, which the backbone has")


def maps_images_to_logits(subject: Subject) -> None:
    """[B, 3, H, W] to finite [B, classes], in eval mode, for both forms."""
    for form, model in (("sparse", subject.sparse().eval()), ("deployed", subject.deployed)):
        logits = _logits(model, subject.images)
        require(isinstance(logits, Tensor), f"{form}: returns a {type(logits).__name__}, not logits")
        require(
            logits.shape == (len(subject.images), CLASSES),
            f"{form}: logits of shape {tuple(logits.shape)}, not {(len(subject.images), CLASSES)}",
        )
        require(bool(logits.isfinite().all()), f"{form}: logits that are not finite")


def shapes_are_final(subject: Subject) -> None:
    """Training changes no shape and adds no entry to the state dict."""
    fresh, trained = subject.sparse().state_dict(), subject.trained.state_dict()
    require(
        fresh.keys() == trained.keys(),
        f"training adds or removes {sorted(fresh.keys() ^ trained.keys())[:1]} in the state dict",
    )
    changed = [name for name in fresh if fresh[name].shape != trained[name].shape]
    require(not changed, f"training changes the shape of {changed[:1]}")


def checkpoint_round_trip(subject: Subject) -> None:
    """A state dict restores the model, strictly and completely."""
    other = subject.sparse()
    other.load_state_dict(copy.deepcopy(subject.trained.state_dict()))
    difference = _distance(_logits(other.eval(), subject.images), _logits(subject.trained, subject.images))
    require(
        difference == 0,
        f"a model restored from the state dict differs by {difference:.2g} in its logits: it keeps state elsewhere",
    )


def deployed_equals_sparse(subject: Subject) -> None:
    """Deployment changes the work, not the predictions, and leaves the sparse model as it is."""
    before = models.state_digest(subject.trained.state_dict())
    difference = _distance(
        _logits(subject.method.deploy(subject.trained), subject.images), _logits(subject.trained, subject.images)
    )
    require(difference < 1e-4, f"logits of the deployed model differ from the sparse model's by {difference:.2g}")
    require(models.state_digest(subject.trained.state_dict()) == before, "deploy changes the sparse model")


def deployed_can_be_saved(subject: Subject) -> None:
    """What ships is in the state dict: saved as torch.save does it, it is loaded, strictly, into the deployed form of
    an untrained model of other weights, which then predicts and reports the same."""
    torch.manual_seed(2)  # six steps move little: what decides (thresholds, say) must differ so much that it is seen
    deployed = subject.method.deploy(_with_other_weights(subject.trained))
    other = subject.method.deploy(subject.method.sparsify(_with_other_weights(subject.vit)))
    file = io.BytesIO()
    torch.save(deployed.state_dict(), file)
    file.seek(0)
    try:
        other.load_state_dict(torch.load(file, weights_only=True))
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise Broken(f"the deployed state dict cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    difference = _distance(_logits(other, subject.images), _logits(deployed, subject.images))
    require(
        difference == 0,
        f"a deployed model restored from its state dict differs by {difference:.2g} in its logits: it keeps state apart",
    )
    kept, restored = (_kept(subject, model) for model in (deployed, other))
    wrong = next((name for name in kept.keys() | restored.keys() if kept.get(name) != restored.get(name)), None)
    require(wrong is None, f"a deployed model restored from its state dict reports other {wrong} than before")


def _with_other_weights(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return other


def _kept(subject: Subject, model: nn.Module) -> dict[str, Any]:
    """The numbers of a model's report, by name."""
    report = subject.method.report(model, subject.images)
    found: dict[str, Any] = {f"density of {name}": density for name, density in report.weight_density.items()}
    for index, block in enumerate(report.blocks):
        for kind in ("keys", "queries", "mlp", "active_heads", "attention_density", "active_neurons"):
            value = getattr(block, kind)
            found[f"{kind} of block {index}"] = None if value is None else value.tolist()
    return found | {f"overhead of {overhead.name}": overhead.macs.tolist() for overhead in report.overhead}


def predictions_do_not_depend_on_the_batch(subject: Subject) -> None:
    """An image gets the same logits alone, in a batch, and at another place of it."""
    for form, model in (("sparse", subject.trained), ("deployed", subject.deployed)):
        together = _logits(model, subject.images)
        alone = torch.cat([_logits(model, image[None]) for image in subject.images])
        backwards = _logits(model, subject.images.flip(0)).flip(0)
        difference = max(_distance(alone, together), _distance(backwards, together))
        require(difference < 1e-4, f"{form}: an image's logits change by {difference:.2g} with the batch it is in")


def report_is_consistent(subject: Subject) -> None:
    """One entry per block; counts within the tokens there are, and agreeing with the ids."""
    patches = subject.vit.patch_embed.num_patches
    most = patches + subject.vit.num_prefix_tokens
    for form, model in (("sparse", subject.trained), ("deployed", subject.deployed)):
        report = subject.method.report(model, subject.images)
        require(
            len(report.blocks) == len(subject.vit.blocks),
            f"{form}: {len(report.blocks)} entries for {len(subject.vit.blocks)} blocks",
        )
        for index, block in enumerate(report.blocks):
            for kind in ("keys", "queries", "mlp"):
                counts = getattr(block, kind)
                require(
                    counts.shape[0] in (1, len(subject.images)), f"{form}, block {index}: {kind} must be [B] or [1]"
                )
                require(
                    bool(((counts >= 1) & (counts <= most)).all()),
                    f"{form}, block {index}: {kind} = {counts.tolist()} of {most} tokens",
                )
            if block.kept is not None:
                for ids, tokens in zip(block.kept, block.keys.expand(len(block.kept)), strict=True):
                    ids = ids[ids >= 0]
                    require(len(ids) == len(ids.unique()), f"{form}, block {index}: a patch is kept twice")
                    require(
                        bool((ids < patches).all()), f"{form}, block {index}: a kept id beyond the {patches} patches"
                    )
                    require(
                        len(ids) <= int(tokens), f"{form}, block {index}: {len(ids)} kept ids, but {int(tokens)} tokens"
                    )
        names = dict(model.named_parameters())
        for name, density in report.weight_density.items():
            require(form != "sparse" or name in names, f"weight_density names {name}, which the model does not have")
            require(0 <= density <= 1, f"density {density} of {name}")


def evaluation_reports_the_same(subject: Subject) -> None:
    """What a prediction tells of its images is their report; where the method says that all images take the same, its reports say so."""
    method, deployed, images = subject.method, subject.deployed, subject.images
    with torch.no_grad(), method.reporting(deployed) as reported:
        deployed(images.flip(0))
        logits = deployed(images)
        found = values(reported(images))
    told = values(method.report(deployed, images))
    require(
        found.keys() == told.keys(),
        f"reporting says {sorted(found.keys() ^ told.keys())[:1]}, report does not, or the other way round",
    )
    wrong = [
        place
        for place in told
        if found[place].shape != told[place].shape or not torch.allclose(found[place], told[place])
    ]
    require(not wrong, f"reporting and report differ in {wrong[:1]}")
    require(torch.equal(logits, _logits(deployed, images)), "reporting changes the predictions")
    varying = [place for place, value in told.items() if not torch.equal(value, value[:1].expand_as(value))]
    require(method.work_varies or not varying, f"work_varies is False, but images differ in {varying[:1]}")


def costs_can_be_counted(subject: Subject) -> None:
    """Every operation has a rule, both counters agree; the deployed model executes no more than dense and overhead together."""
    costs = cost.count(subject.method, subject.vit, subject.trained, subject.deployed, subject.images)
    report = subject.method.report(subject.trained, subject.images)
    extra = sum(float(overhead.macs.double().mean()) for overhead in report.overhead)
    claimed, executed, most = costs.theoretical.total, costs.executed.total, (costs.dense.total + extra) * 1.01
    require(claimed > 0, "the report gives no work at all")
    require(
        executed <= most, f"executes {executed:.4g} MACs, more than dense and reported overhead together ({most:.4g})"
    )
    require(claimed <= most, f"claims {claimed:.4g} MACs, more than dense and overhead together ({most:.4g})")


def waits_for_the_device_once(subject: Subject) -> None:
    """A forward of the deployed model makes the host wait for nothing; once where the number of tokens depends on the image."""
    varies = cost.shapes_vary(subject.method.report(subject.deployed, subject.images))
    with torch.no_grad(), Observer() as seen:
        subject.deployed(subject.images)
    require(
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
    require(distance <= 1e-4, f"compiled logits differ by {distance:.2g}")


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
