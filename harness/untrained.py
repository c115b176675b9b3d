"""A cell's model before its training: what its training must not fall below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from harness.cells import Cell
from harness.cluster import Cluster, is_agreed
from harness.evaluate import Evaluation
from harness.formula import theoretical_macs
from harness.trainer import Trained, Trainer, to_cpu

SAME_COST = 1.02  # an untrained model that costs more than this times the trained one does not prune as much yet


def evaluate_untrained(
    trainer: Trainer,
    cell: Cell,
    name: str,
    trained: Trained,
    images: Tensor,
    evaluate: Callable[[nn.Module, str], Evaluation],
) -> Evaluation | None:
    """The accuracy of the cell's deployed model off the shelf: the dense network after the method's surgery alone.

    It is a function of the dense weights and the seed, so that a resumed run finds the same. images [B, 3, H, W]: on which
    both models' costs are compared. None where the cell does not train, does not start from a dense network, prunes only
    while it trains (the comparison would be with a denser network), or cannot be deployed untrained.
    """
    if not any(phase["kind"] == "train" and phase["steps"] for phase in trained.phases):
        return None
    sparse = trainer.untrained(cell, name)
    if sparse is None:
        return None
    deployed, is_usable = None, False
    try:
        is_usable = _prunes_as_much(trainer, cell, sparse, trained.sparse, images)
        deployed = cell.method.deploy(sparse)
    except Exception:  # whatever a method does wrong here: this extra number must not cost the cell
        is_usable = False
    if trainer.cluster.any(not is_usable):
        return None
    return _evaluated(lambda: evaluate(deployed, "test"), trainer.cluster)


def _prunes_as_much(trainer: Trainer, cell: Cell, before: nn.Module, after: nn.Module, images: Tensor) -> bool:
    vit = trainer.build(cell.seed, 0.0)
    reports = [cell.method.report(to_cpu(model), images) for model in (before, after)]
    costs = [theoretical_macs(vit, report, images.shape[-2:]) for report in reports]
    return costs[0] <= SAME_COST * costs[1]


def _evaluated(evaluate: Callable[[], Any], cluster: Cluster) -> Evaluation | None:
    try:
        return evaluate()
    except Exception as error:
        if cluster.size > 1 and not is_agreed(error):  # the others would wait for this process
            raise
        return None
