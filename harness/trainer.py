"""The trained model of a cell: from memory, from its checkpoint, or by training it, from where an earlier run stopped."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness import device as devices
from harness import models
from harness.cells import Cell
from harness.cluster import Cluster, agreed
from harness.data.dataset import ImageData
from harness.device import Plan, execution
from harness.freshness import Maker, code_digest
from harness.identity import Identity
from harness.progress import Reporter
from harness.records import Store, write_atomically
from harness.training.artifacts import CHECKPOINT, Artifacts
from harness.training.engine import run_phases
from harness.training.journal import Journal
from harness.training.optimizers import fuse_norms, make_criterion, restore_norms
from harness.training.setup import Training, budget_steps
from harness.training.snapshots import Snapshots

REPORTED_IMAGES = 8  # on which the log says what the model keeps


@dataclass(frozen=True)
class Trained:
    """A cell's model in the form that trains, in eval mode, the one with averaged weights, if the recipe wants it, and the log of
    its phases."""

    sparse: nn.Module
    phases: list[dict[str, Any]]
    averaged: nn.Module | None = None
    unreadable: tuple[str, ...] = ()  # what was wrong with training images that others stood in for
    code: dict[str, str | None] = field(default_factory=dict)  # whose work it is: see freshness.Maker


class DenseFailed(RuntimeError):
    """The dense network that a cell starts from could not be trained."""


class Trainer:
    """Trains the cells of a run and keeps what later ones need. All processes of the cluster call it alike."""

    def __init__(
        self,
        identity: Identity,
        data: ImageData,
        plan: Plan,
        store: Store,
        reporter: Reporter,
        cluster: Cluster,
        fresh: bool,
        redo: bool = False,
    ) -> None:
        """redo: what other code has trained is trained again."""
        self.identity, self.data, self.plan, self.store = identity, data, plan, store
        self.reporter, self.cluster, self.fresh, self.redo = reporter, cluster, fresh, redo
        self.spec = identity.spec
        self._trained: dict[str, Trained] = {}

    def weights(self, cell: Cell, name: str) -> Trained:
        """The cell's trained model, whose checkpoint is there afterwards."""
        weights_id = self.identity.weights_id(cell)
        path = self.store.checkpoint(weights_id)
        is_there = self.cluster.share(path.exists)
        if is_there and weights_id in self._trained:
            return self._trained[weights_id]
        trained = self._load(cell, path) if is_there else None
        if trained is None:
            trained = self._train(cell, name)
            self.cluster.share(lambda: _write_checkpoint(path, trained))
        if self.cluster.is_first:
            self._snapshots(weights_id).remove()  # also those of a process killed between the two
        self._trained[weights_id] = trained
        return trained

    def untrained(self, cell: Cell, name: str) -> nn.Module | None:
        """The cell's model before its training, in the form that trains; None where it does not start from a dense network,
        or where that one's checkpoint is gone."""
        if cell.method.start != "dense":
            return None
        path = self.store.checkpoint(self.identity.weights_id(self.identity.dense_cell(cell)))
        if not self.cluster.share(path.exists):
            return None
        return self._sparse(cell, self._dense(cell, name).sparse).to(self.plan.device).eval()

    def forget_others(self, cell: Cell) -> None:
        """Keeps only the dense network of this seed in memory: it is start and teacher of the cells to come."""
        dense = self.identity.weights_id(self.identity.dense_cell(cell))
        self._trained = {key: value for key, value in self._trained.items() if key == dense}

    def build(self, seed: int, drop_path: float) -> nn.Module:
        """The backbone for this data, with random weights."""
        return models.build(self.spec.backbone, self.data.classes, self.data.image_size, seed, drop_path)

    def _load(self, cell: Cell, path: Path) -> Trained | None:
        """The model in a checkpoint; None where the file is damaged."""
        sparse, averaged = self._sparse(cell), None
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            sparse.load_state_dict(content["model"])
            if content.get("averaged") is not None:
                averaged = copy.deepcopy(sparse)
                averaged.load_state_dict(content["averaged"])
            phases, unreadable, problem = content["phases"], tuple(content["unreadable"]), ""
            code = self._unknown(cell) | content.get("code", {})
            if self.redo and not self.maker(cell, code_digest(self.identity.dense_cell(cell).method.name)).made(code):
                problem = "made by other code"
        except Exception as error:
            phases, unreadable, code, problem = [], (), {}, type(error).__name__
        if self.cluster.any(bool(problem)):
            self.reporter.say(
                f"checkpoint {path.name} cannot be used ({problem or 'in another process'}); training again"
            )
            return None
        on_device = [model.to(self.plan.device).eval() if model is not None else None for model in (sparse, averaged)]
        return Trained(on_device[0], phases, on_device[1], unreadable, code)

    def maker(self, cell: Cell, dense: str | None) -> Maker:
        """The code that trains the cell. dense: digest of the code that made the dense network which it begins with."""
        code = {"digest": code_digest(cell.method.name)} | ({"dense": dense} if self.identity.needs_dense(cell) else {})
        start = self.identity.dense_cell(cell)
        method = cell.method
        return Maker(method.name, method.revision, cell.settings, code, start.method.revision, start.settings)

    def _unknown(self, cell: Cell) -> dict[str, str | None]:
        """What checkpoints say that were made before digests were recorded."""
        return dict.fromkeys(self.maker(cell, None).code)

    def _train(self, cell: Cell, name: str) -> Trained:
        recipe, _ = self.identity.training_of(cell)
        if self.identity.is_dense(cell) and self.spec.dense.weights:
            return Trained(self._sparse(cell).to(self.plan.device).eval(), [], code=dict(self.maker(cell, None).code))
        start = self._dense(cell, name) if self.identity.needs_dense(cell) else None
        dense = start.sparse if start else None
        maker = self.maker(cell, start.code.get("digest") if start else None)
        sparse = self._sparse(cell, dense if cell.method.start == "dense" else None).to(self.plan.device)
        teacher = to_cpu(dense).to(self.plan.device) if self.identity.has_teacher(cell) else None
        self.reporter.begin(name, "training")
        self.data.forget_unreadable()
        fuse_norms(sparse, recipe)
        with execution.compiled_blocks(sparse, self.plan.compiled):
            phases = cell.method.phases(sparse, make_criterion(recipe), teacher)
            most = self.spec.budget.max_steps
            steps = sum(budget_steps(self.data, recipe, part, most) for part in self.identity.budgets_of(cell))
            training = self._training(cell, steps, self._reported(cell, sparse), maker)
            logs, averaged = run_phases(sparse, phases, training)
        for model in (sparse, averaged):
            if model is not None:
                restore_norms(model.eval(), recipe)
        unreadable = tuple(reason for _, reason in sorted(self.data.unreadable.items()))
        return Trained(sparse, [asdict(log) for log in logs], averaged, unreadable, dict(maker.code))

    def _training(self, cell: Cell, steps: int, reported: Callable[[], dict[str, float]], maker: Maker) -> Training:
        """Everything around the steps: where the state and the log are kept, which results of phases are there already."""
        weights_id, options = self.identity.weights_id(cell), self.spec.train
        snapshots = self._snapshots(weights_id)
        journal = Journal(self.store.log(weights_id), options.tensorboard) if self.cluster.is_first else Journal()
        artifacts = None if self.fresh else Artifacts(self.store.artifacts, self.identity.artifact_context(cell))
        return Training(
            self.identity.training_of(cell)[0], self.data, self.plan, cell.seed, steps, options, self.spec.data.max_unreadable,
            self.cluster, self.reporter.watch, self.reporter.say, journal, snapshots, artifacts,
            {phase: Path(file) for phase, file in cell.phases.items()}, reported,
            cell.method.convert_checkpoint, maker,
        )  # fmt: skip

    def _snapshots(self, weights_id: str) -> Snapshots:
        options = self.spec.train
        seconds = options.checkpoint_minutes * 60 if options.checkpoint_minutes else None
        return Snapshots(self.store.snapshots(weights_id), options.checkpoint_steps, seconds, options.keep)

    def _reported(self, cell: Cell, sparse: nn.Module) -> Callable[[], dict[str, float]]:
        """What the model keeps of a few images, for the log."""
        images: list[Tensor] = []

        def read() -> None:
            images.append(next(self.data.eval_batches("train", REPORTED_IMAGES, self.plan.device)).images)

        self.cluster.share(read)  # only the first process has a log; where it finds the data gone, all must know

        @torch.no_grad()
        def reported() -> dict[str, float]:
            report = cell.method.report(sparse.eval(), images[0])
            tokens = [float(block.keys.double().mean()) for block in report.blocks]
            density = list(report.weight_density.values())
            return {"kept_tokens": round(sum(tokens) / len(tokens), 3)} | (
                {"weight_density": round(sum(density) / len(density), 6)} if density else {}
            )

        return reported

    def _dense(self, cell: Cell, name: str) -> Trained:
        """The trained dense network of the cell's seed."""
        dense_cell = self.identity.dense_cell(cell)
        failure = self.cluster.share(lambda: self._failure_of(dense_cell))
        if failure is not None:
            raise agreed(DenseFailed(f"the dense network that it starts from failed ({failure})"))
        return self.weights(dense_cell, f"{name}, its dense network")

    def _failure_of(self, cell: Cell) -> str | None:
        """Why the cell failed; None where it did not, or where only timing it failed."""
        record_id = self.identity.record_id(cell)
        failures = self.store.failures(record_id)
        return failures[-1]["message"] if failures and self.store.read(record_id) is None else None

    def _sparse(self, cell: Cell, dense: nn.Module | None = None) -> nn.Module:
        """The cell's model in the form that trains, with initial weights: a function of the seed."""
        vit = self.build(cell.seed, self.identity.training_of(cell)[0].drop_path)
        if dense is not None:
            vit.load_state_dict(dense.state_dict())
        elif self.identity.is_dense(cell) and self.spec.dense.weights:
            models.load_weights(vit, self.spec.dense.weights, self.spec.backbone, self.identity.run.folder)
        torch.manual_seed(cell.seed + 1)
        sparse = cell.method.sparsify(vit)
        devices.set_attention(sparse, self.plan.fused_attention)
        return sparse


def to_cpu(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in eval mode."""
    return copy.deepcopy(model).cpu().eval()


def _write_checkpoint(path: Path, trained: Trained) -> None:
    content = {
        "format": CHECKPOINT,
        "model": trained.sparse.state_dict(),
        "phases": trained.phases,
        "unreadable": list(trained.unreadable),
        "code": trained.code,
    }
    if trained.averaged is not None:
        content["averaged"] = trained.averaged.state_dict()
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())
