"""Runs the cells of a benchmark: trains, evaluates, counts and measures what has no record yet."""

from __future__ import annotations

import copy
import io
import tempfile
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.optim import list_optimizers
from torch import nn

import methods
from harness import cost, measuring, models, workers
from harness import device as devices
from harness.cells import Cell, Run
from harness.data.dataset import ImageData
from harness.device import execution
from harness.errors import UserError
from harness.evaluate import evaluate
from harness.identity import Identity
from harness.packing import pack
from harness.progress import Reporter
from harness.records import MEASURE_REVISION, RETRIED, Store, identify, provenance, source_digest, write_atomically
from harness.train import Diverged, budget_steps, make_criterion, run_phases
from methods.core.registry import loaded_plugins, unknown


@dataclass(frozen=True)
class Trained:
    """A cell's model in the form that trains, in eval mode, and the log of its phases."""

    sparse: nn.Module
    phases: list[dict[str, Any]]


class DenseFailed(RuntimeError):
    """The dense network that a cell starts from could not be trained."""


class Runner:
    """One run of a benchmark: `execute` does all cells and returns how many failed."""

    def __init__(
        self,
        run: Run,
        data: ImageData,
        store: Store,
        reporter: Reporter,
        fresh: bool = False,
        retry: bool = False,
        remeasure: bool = False,
    ) -> None:
        self.run, self.spec, self.data, self.store, self.reporter = run, run.spec, data, store, reporter
        self.fresh, self.retry, self.remeasure = fresh, retry, remeasure
        self.plan = devices.plan(self.spec.device, self.spec.dtype)
        self.identity = Identity(run, data, self.plan)
        self.trained: dict[str, Trained] = {}
        self.scratch = tempfile.TemporaryDirectory(prefix="sparse-vit-bench-")

    def execute(self) -> int:
        """Cell by cell; a failed one does not stop the others. UserError where no cell could work."""
        self.store.prepare()
        self._check_what_all_need()
        cells, failed = self.run.cells(), 0
        with self.scratch:
            for number, cell in enumerate(cells, 1):
                name = f"[{number}/{len(cells)}] {cell.label}, seed {cell.seed}"
                try:
                    failed += not self._do(cell, name)
                finally:
                    self._forget_others(cell)
        return failed

    def _check_what_all_need(self) -> None:
        for key, recipe in (("recipe", self.spec.recipe), ("adapt", self.spec.adapt_recipe)):
            if recipe.optimizer not in list_optimizers():
                raise UserError(f"{key}: {unknown('optimizer', recipe.optimizer, list_optimizers())}")
        vit = self._build(0, 0.0)
        models.require_countable(vit, self.spec.backbone.name)
        _ = self.identity.context  # given dense weights are read here

    def _do(self, cell: Cell, name: str) -> bool:
        """Brings one cell's records up to date; False where it failed."""
        record_id = self.identity.record_id(cell)
        try:
            if self.fresh or self.retry:
                self.store.forget_failures(record_id)
            earlier = [failure for failure in self.store.failures(record_id) if failure["reason"] not in RETRIED]
            if earlier:
                self.reporter.done(
                    f"{name}: failed before ({earlier[-1]['reason']}: {earlier[-1]['message']}); --retry tries it again"
                )
                return False
            record = None if self.fresh else self.store.read(record_id)
            present = record is not None
            if present and record["label"] != cell.label:  # a row may be renamed; what was measured stays
                record["label"] = cell.label
                self.store.write(record)
            record = record or self._train_record(cell, record_id, name)
            measured = self._measure(cell, record, name)
        except (UserError, DenseFailed) as error:  # nothing that trying again later would change by itself: no attempt
            self.reporter.done(f"{name}: FAILED ({error})")
            return False
        except Exception as error:
            reason, message = _reason(error), " ".join(str(error).split())[:500] or type(error).__name__
            trace = traceback.format_exc().splitlines()[-12:]
            path = self.store.fail(
                record_id,
                reason,
                message,
                label=cell.label,
                seed=cell.seed,
                traceback=trace,
                **self.identity.method_of(cell),
            )
            self.reporter.done(f"{name}: FAILED ({reason}: {message}); details in {path.name}")
            return False
        self.store.forget_failures(record_id)
        verb = "present" if present and not measured else "measured" if present else "done"
        self.reporter.done(f"{name}: {verb}, top-1 {record['top1']:.2%}")
        return True

    def _train_record(self, cell: Cell, record_id: str, name: str) -> dict[str, Any]:
        workers.start_server()  # it imports while this process trains
        trained = self._weights(cell, name, self.fresh)
        self.reporter.begin(name, "evaluating")
        deployed = cell.method.deploy(trained.sparse)
        test = evaluate(deployed, self.data, "test", self.plan)
        val = evaluate(deployed, self.data, "val", self.plan) if len(self.data.val_ids) else None
        images = next(self.data.eval_batches(self._held_out, self.spec.measure.images, torch.device("cpu"))).images
        vit = self._build(cell.seed, 0.0)
        sparse, on_cpu = _to_cpu(trained.sparse), _to_cpu(deployed)
        record = {
            "id": record_id, "kind": "train", "weights_id": self.identity.weights_id(cell), "label": cell.label, "seed": cell.seed,
            **self.identity.method_of(cell), "context": self.identity.context, "context_id": identify(self.identity.context),
            "top1": test.top1, "top5": test.top5, "loss": test.loss, "test_images": len(test.correct), "correct": pack(test.correct),
            "val_top1": val.top1 if val else None, "cost": cost.count(cell.method, vit, sparse, on_cpu, images).record(),
            "report": _summary(cell.method.report(sparse, images)), "phases": trained.phases,
            "weights_sha256": models.state_digest(trained.sparse.state_dict()),
            "where": devices.where(self.plan.device), "code": provenance() | {"method": source_digest(type(cell.method))},
        }  # fmt: skip
        self.store.write(record)
        return record

    def _weights(self, cell: Cell, name: str, fresh: bool = False) -> Trained:
        """The cell's trained model: from memory, from its checkpoint, or by training it now."""
        weights_id = self.identity.weights_id(cell)
        path = self.store.checkpoint(weights_id)
        if weights_id in self.trained and path.exists():
            return self.trained[weights_id]
        trained = self._load(cell, path) if path.exists() and not fresh else None
        if trained is None:
            trained = self._train(cell, name)
            buffer = io.BytesIO()
            torch.save({"model": trained.sparse.state_dict(), "phases": trained.phases}, buffer)
            write_atomically(path, buffer.getvalue())
        self.trained[weights_id] = trained
        return trained

    def _load(self, cell: Cell, path: Path) -> Trained | None:
        """The model in a checkpoint; None where the file is damaged."""
        sparse = self._sparse(cell)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            sparse.load_state_dict(content["model"])
        except Exception as error:
            self.reporter.say(f"checkpoint {path.name} cannot be used ({type(error).__name__}); training again")
            return None
        return Trained(sparse.to(self.plan.device).eval(), content["phases"])

    def _train(self, cell: Cell, name: str) -> Trained:
        recipe, epochs = self.identity.training_of(cell)
        if self.identity.is_dense(cell) and self.spec.dense.weights:
            return Trained(self._sparse(cell).to(self.plan.device).eval(), [])
        if self.identity.needs_dense(cell):
            dense = self._dense(cell, name)
        sparse = self._sparse(cell, dense if cell.method.start == "dense" else None)
        teacher = _to_cpu(dense).to(self.plan.device) if self.identity.has_teacher(cell) else None
        self.reporter.begin(name, "training")
        sparse = sparse.to(self.plan.device)
        phases = cell.method.phases(sparse, make_criterion(recipe), teacher)
        steps = budget_steps(self.data, recipe, epochs, self.spec.budget.max_steps)
        logs = run_phases(phases, steps, recipe, self.data, self.plan, cell.seed, self.reporter.watch)
        return Trained(sparse.eval(), [asdict(log) for log in logs])

    def _dense(self, cell: Cell, name: str) -> nn.Module:
        """The trained dense network of the cell's seed."""
        dense_cell = self.identity.dense_cell(cell)
        failures = self.store.failures(self.identity.record_id(dense_cell))
        if failures and self.store.read(self.identity.record_id(dense_cell)) is None:  # or only timing it failed
            raise DenseFailed(f"the dense network that it starts from failed ({failures[-1]['message']})")
        return self._weights(dense_cell, f"{name}, its dense network").sparse

    def _sparse(self, cell: Cell, dense: nn.Module | None = None) -> nn.Module:
        """The cell's model in the form that trains, with initial weights: a function of the seed."""
        vit = self._build(cell.seed, self.identity.training_of(cell)[0].drop_path)
        if dense is not None:
            vit.load_state_dict(dense.state_dict())
        elif self.identity.is_dense(cell) and self.spec.dense.weights:
            models.load_weights(vit, self.spec.dense.weights, self.spec.backbone, self.run.folder)
        torch.manual_seed(cell.seed + 1)
        sparse = cell.method.sparsify(vit)
        devices.set_attention(sparse, self.plan.fused_attention)
        return sparse

    def _build(self, seed: int, drop_path: float) -> nn.Module:
        return models.build(self.spec.backbone, self.data.classes, self.data.image_size, seed, drop_path)

    def _measure(self, cell: Cell, record: dict[str, Any], name: str) -> bool:
        """Makes the measure records that are missing; True where there were any."""
        measure, device = self.spec.measure, self.plan.device
        wanted = measuring.expand(measure, device, measure.seconds, measure.energy)
        keys = [
            {
                "weights_id": record["weights_id"], "device": devices.name(device), "driver": devices.driver(device),
                "dtype": conditions.dtype, "mode": conditions.mode, "batch": conditions.batch, "measure_revision": MEASURE_REVISION,
            }
            for conditions in wanted
        ]  # fmt: skip
        again = self.fresh or self.remeasure
        missing = [
            i for i, key in enumerate(keys)
            if again or not measuring.answers(self.store.read(identify(key)), wanted[i])
        ]  # fmt: skip
        if not missing:
            return False
        self._weights(cell, name)  # the checkpoint is there afterwards
        execution.release(device)
        job = measuring.Job(
            self._subject(cell, record["weights_id"]), tuple(wanted[i] for i in missing), str(device),
            self._measured_images(), threads=torch.get_num_threads(),
        )  # fmt: skip
        self.reporter.begin(name, f"measuring, {len(missing)} conditions")
        for number, row in measuring.measure(job):
            if number < 0:
                continue
            key = keys[missing[number]]
            self.store.write({
                "id": identify(key), "kind": "measure", **key, "images": "real", "label": cell.label, "latency": row,
                "where": devices.where(device), "code": provenance(),
            })  # fmt: skip
        return True

    def _subject(self, cell: Cell, weights_id: str) -> measuring.Subject:
        return measuring.Subject(
            self.spec.backbone, self.data.classes, self.data.image_size, cell.seed, cell.method.name, cell.settings,
            self.store.checkpoint(weights_id), plugins=loaded_plugins(),
        )  # fmt: skip

    def _measured_images(self) -> Path:
        """A file with as many real images as the largest batch wants."""
        path = Path(self.scratch.name) / "images.pt"
        if not path.exists():
            count = max(self.spec.measure.batch_sizes)
            torch.save(next(self.data.eval_batches(self._held_out, count, torch.device("cpu"))).images, path)
        return path

    @property
    def _held_out(self) -> str:
        """The split that costs are counted and timed on."""
        return "val" if len(self.data.val_ids) else "test"

    def _forget_others(self, cell: Cell) -> None:
        """Keeps only the dense network of this seed in memory: it is start and teacher of the cells to come."""
        dense = self.identity.weights_id(self.identity.dense_cell(cell))
        self.trained = {key: value for key, value in self.trained.items() if key == dense}


def _to_cpu(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).cpu().eval()


def _summary(report: methods.Report) -> dict[str, Any]:
    """The report in a record: means over the images, a number per block."""

    def mean(tensor: torch.Tensor) -> float:
        return round(float(tensor.double().mean()), 3)

    return {
        "tokens": {
            kind: [mean(getattr(block, kind)) for block in report.blocks] for kind in ("keys", "queries", "mlp")
        },
        "attention_density": [mean(block.attention_density) if block.attention_density is not None else 1.0 for block in report.blocks],
        "weight_density": {name: round(density, 6) for name, density in report.weight_density.items()},
        "overhead_macs": {extra.name: mean(extra.macs) for extra in report.overhead},
    }  # fmt: skip


def _reason(error: Exception) -> str:
    if execution.is_out_of_memory(error):
        return "memory"
    if isinstance(error, workers.Died):
        return "crash"
    if isinstance(error, Diverged | FloatingPointError):
        return "divergence"
    return "unsupported" if isinstance(error, methods.Unsupported) else "error"
