"""Runs the cells of a benchmark: trains, evaluates, counts and measures what has no record yet."""

from __future__ import annotations

import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import methods
from harness import cost, freshness, measuring, models, workers
from harness import device as devices
from harness.cells import Cell, Run
from harness.cluster import ALONE, Cluster, is_agreed
from harness.data.dataset import ImageData
from harness.device import execution
from harness.device.spinning import SpinLimit
from harness.errors import UserError
from harness.evaluate import Evaluation, evaluate
from harness.identity import Identity
from harness.latency import Conditions
from harness.packing import pack
from harness.progress import Reporter
from harness.records import RETRIED, Store, identify, provenance
from harness.summary import summary
from harness.tally import Tally, Totals
from harness.trainer import DenseFailed, Trained, Trainer, to_cpu
from harness.training.journal import require_tensorboard
from harness.training.optimizers import check_recipe
from harness.training.stepper import Diverged
from harness.untrained import evaluate_untrained
from methods.core.registry import loaded_plugins


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
        redo: bool = False,
        cluster: Cluster = ALONE,
        device: str | None = None,
    ) -> None:
        """device: of this process, where it is not the spec's. redo: what other code has made is made again."""
        self.run, self.spec, self.data, self.store, self.reporter = run, run.spec, data, store, reporter
        self.fresh, self.retry, self.remeasure, self.cluster = fresh, retry, remeasure, cluster
        self.redo, self.stale = redo, list[str]()  # the latter: rows that other code has made, and that were kept
        self.plan = devices.plan(device or self.spec.device, self.spec.dtype, self.spec.compile)
        self.identity = Identity(run, data, self.plan)
        self.trainer = Trainer(self.identity, data, self.plan, store, reporter, cluster, fresh, redo)
        self.scratch = tempfile.TemporaryDirectory(prefix="sparse-vit-bench-")
        self.spin_limit = SpinLimit()  # around training and evaluation; what is timed runs as it would be deployed

    def execute(self) -> int:
        """Cell by cell; a failed one does not stop the others. UserError where no cell could work."""
        self.cluster.share(self.store.prepare)
        self._check_what_all_need()
        cells, failed = self.run.cells(), 0
        with self.scratch:
            for number, cell in enumerate(cells, 1):
                name = f"[{number}/{len(cells)}] {cell.label}, seed {cell.seed}"
                try:
                    failed += not self._do(cell, name)
                finally:
                    self.trainer.forget_others(cell)
        if self.stale:
            self.reporter.say(freshness.closing(self.stale))
        return failed

    def _check_what_all_need(self) -> None:
        for key, recipe in (("recipe", self.spec.recipe), ("adapt", self.spec.adapt_recipe)):
            check_recipe(recipe, key, self.plan.device)
        if self.spec.compile:
            execution.require_compiler(self.plan.device)
        if self.spec.train.tensorboard:
            require_tensorboard()
        vit = self.trainer.build(0, 0.0)
        models.require_countable(vit, self.spec.backbone.name)
        _ = self.identity.context  # given dense weights are read here

    def _do(self, cell: Cell, name: str) -> bool:
        """Brings one cell's records up to date; False where it failed."""
        record_id = self.identity.record_id(cell)
        try:
            earlier = self.cluster.share(lambda: self._failed_before(record_id))
            if earlier is not None:
                self.reporter.done(f"{name}: failed before ({earlier}); --retry tries it again")
                return False
            record = self.cluster.share(lambda: self._present(cell, record_id))
            present = record is not None
            record = record or self._train_record(cell, record_id, name)
            self._note(cell, freshness.train_state(record))
            measured = self._measure(cell, record, name)
        except (UserError, DenseFailed) as error:  # nothing that trying again later would change by itself: no attempt
            self._only_if_agreed(error)
            self.reporter.done(f"{name}: FAILED ({error})")
            return False
        except Exception as error:
            reason, message = _reason(error), " ".join(str(error).split())[:500] or type(error).__name__
            self._only_if_agreed(error)
            if self.cluster.is_first:
                path = self._keep_failure(cell, record_id, reason, message)
                self.reporter.done(f"{name}: FAILED ({reason}: {message}); details in {path.name}")
            return False
        if self.cluster.is_first:
            self.store.forget_failures(record_id)
        verb = "present" if present and not measured else "measured" if present else "done"
        other = ", made by other code" if _row(cell) in self.stale else ""
        self.reporter.done(f"{name}: {verb}{other}, top-1 {record['top1']:.2%}")
        return True

    def _only_if_agreed(self, error: Exception) -> None:
        """Several processes go on after an error only together: where one has an error of its own, the others would wait for it.
        Then all end, nothing is noted, and the same command goes on."""
        if self.cluster.size > 1 and not is_agreed(error) and not isinstance(error, methods.Unsupported):
            raise error

    def _failed_before(self, record_id: str) -> str | None:
        """Why the cell failed in an earlier run, if there is no use in trying again."""
        if self.fresh or self.retry:
            self.store.forget_failures(record_id)
        failures = [failure for failure in self.store.failures(record_id) if failure["reason"] not in RETRIED]
        if self.redo:
            failures = [failure for failure in failures if freshness.failure_state(failure) != freshness.OTHER]
        return f"{failures[-1]['reason']}: {failures[-1]['message']}" if failures else None

    def _present(self, cell: Cell, record_id: str) -> dict[str, Any] | None:
        if self.fresh:  # then the same command without --fresh goes on where this one stops
            self.store.forget(record_id, self.identity.weights_id(cell))
        record = self.store.read(record_id)
        told = {"label": cell.label, "control": cell.control}  # a row may be renamed; what was measured stays
        if record is not None and any(record.get(key, False) != value for key, value in told.items()):
            record |= told
            self.store.write(record)
        is_stale = record is not None and freshness.train_state(record) == freshness.OTHER
        return None if is_stale and self.redo else record  # it is written over when the new one is done

    def _note(self, cell: Cell, state: str) -> None:
        """Remembers that something stays which other code has made."""
        if state == freshness.OTHER and _row(cell) not in self.stale:
            self.stale.append(_row(cell))

    def _keep_failure(self, cell: Cell, record_id: str, reason: str, message: str) -> Path:
        trace = traceback.format_exc().splitlines()[-12:]
        return self.store.fail(
            record_id,
            reason,
            message,
            label=cell.label,
            seed=cell.seed,
            traceback=trace,
            code=provenance() | {"digest": freshness.code_digest(cell.method.name)},
            **self.identity.method_of(cell),
        )

    def _train_record(self, cell: Cell, record_id: str, name: str) -> dict[str, Any]:
        if self.cluster.is_first:
            workers.start_server()  # it imports while this process trains
        with self.spin_limit:
            trained = self.trainer.weights(cell, name)
            self.reporter.begin(name, "evaluating")
            deployed = cell.method.deploy(trained.sparse)
            tally = self._tally(cell)
            results = {
                "test": self._evaluate(deployed, "test", tally),
                "val": self._evaluate(deployed, "val") if len(self.data.val_ids) else None,
                "ema": self._evaluate(cell.method.deploy(trained.averaged), "test")
                if trained.averaged is not None
                else None,
                "untrained": evaluate_untrained(
                    self.trainer, cell, name, trained, self._counted_images(), self._evaluate
                ),
            }
        totals = tally.whole(self.cluster) if tally else None
        return self.cluster.share(lambda: self._write_record(cell, record_id, trained, deployed, results, totals))

    def _tally(self, cell: Cell) -> Tally | None:
        """What is to be collected while the test split is evaluated; None where one image tells all."""
        if not cell.method.work_varies:
            return None
        vit = self.trainer.build(cell.seed, 0.0)
        return Tally(cell.method, vit, vit.patch_embed.img_size)

    def _evaluate(self, model: nn.Module, which: str, tally: Tally | None = None) -> Evaluation:
        return evaluate(model, self.data, which, self.plan, cluster=self.cluster, tally=tally)

    def _write_record(
        self,
        cell: Cell,
        record_id: str,
        trained: Trained,
        deployed: nn.Module,
        results: dict[str, Evaluation | None],
        totals: Totals | None,
    ) -> dict[str, Any]:
        images = self._counted_images()
        vit = self.trainer.build(cell.seed, 0.0)
        sparse, on_cpu = to_cpu(trained.sparse), to_cpu(deployed)
        report, theory = cell.method.report(sparse, images), totals.theory if totals else None
        test, val, averaged, before = results["test"], results["val"], results["ema"], results["untrained"]
        record = {
            "id": record_id, "kind": "train", "weights_id": self.identity.weights_id(cell), "label": cell.label, "seed": cell.seed,
            "control": cell.control, **self.identity.method_of(cell), "context": self.identity.context, "context_id": identify(self.identity.context),
            "top1": test.top1, "top5": test.top5, "loss": test.loss, "test_images": len(test.correct), "correct": pack(test.correct),
            "val_top1": val.top1 if val else None, "ema_top1": averaged.top1 if averaged else None,
            "untrained_top1": before.top1 if before else None, "untrained_correct": pack(before.correct) if before else None,
            "cost": cost.count(cell.method, vit, sparse, on_cpu, images, theory=theory).record(),
            "report": summary(report, vit.patch_embed.grid_size, totals), "phases": trained.phases,
            "unreadable": list(trained.unreadable),
            "weights_sha256": models.state_digest(trained.sparse.state_dict()),
            "where": devices.where(self.plan.device) | {"processes": self.cluster.size, "waiting": self.spin_limit.facts()},
            "code": provenance() | trained.code,
        }  # fmt: skip
        self.store.write(record)
        return record

    def _measure(self, cell: Cell, record: dict[str, Any], name: str) -> bool:
        """Makes the measure records that are missing; True where there were any."""
        measure, device = self.spec.measure, self.plan.device
        wanted = measuring.expand(measure, device, measure.seconds, measure.energy)
        keys = [measuring.key(record["weights_id"], device, conditions) for conditions in wanted]
        again = self.fresh or self.remeasure
        missing = self.cluster.share(lambda: [
            i for i, key in enumerate(keys)
            if again or not self._answers(cell, record, self.store.read(identify(key)), wanted[i])
        ])  # fmt: skip
        if not missing:
            return False
        with self.spin_limit:
            self.trainer.weights(cell, name)  # the checkpoint is there afterwards
        self.cluster.share(lambda: self._measure_missing(cell, record, name, keys, wanted, missing))
        return True

    def _measure_missing(
        self, cell: Cell, record: dict, name: str, keys: list[dict], wanted: list[Conditions], missing: list[int]
    ) -> None:
        device = self.plan.device
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
                "where": devices.where(device), "code": provenance() | self._timed_code(cell, record),
            })  # fmt: skip

    def _answers(self, cell: Cell, record: dict[str, Any], found: dict[str, Any] | None, asked: Conditions) -> bool:
        """Whether a measure record says what is asked. One that other code has made does not where such are made again."""
        if not measuring.answers(found, asked):
            return False
        state = freshness.measure_state(found, record)
        if state == freshness.OTHER and self.redo:
            return False
        self._note(cell, state)
        return True

    def _timed_code(self, cell: Cell, record: dict[str, Any]) -> dict[str, str | None]:
        """The code that deploys and times, and the one that trained the weights."""
        trained = record.get("code", {}).get("digest")
        return {"digest": freshness.code_digest(cell.method.name), "trained": trained}

    def _subject(self, cell: Cell, weights_id: str) -> measuring.Subject:
        return measuring.Subject(
            self.spec.backbone, self.data.classes, self.data.image_size, cell.seed, cell.method.name, cell.settings,
            self.store.checkpoint(weights_id), plugins=loaded_plugins(), code=freshness.code_digest(cell.method.name),
        )  # fmt: skip

    def _measured_images(self) -> Path:
        """A file with as many real images as the largest batch wants."""
        path = Path(self.scratch.name) / "images.pt"
        if not path.exists():
            count = max(measuring.TIMED, *self.spec.measure.batch_sizes)
            torch.save(next(self.data.eval_batches(self._held_out, count, torch.device("cpu"))).images, path)
        return path

    def _counted_images(self) -> Tensor:
        """The images that costs are counted on."""
        return next(self.data.eval_batches(self._held_out, self.spec.measure.images, torch.device("cpu"))).images

    @property
    def _held_out(self) -> str:
        """The split that costs are counted and timed on."""
        return "val" if len(self.data.val_ids) else "test"


def _row(cell: Cell) -> str:
    return f"{cell.label}, seed {cell.seed}"


def _reason(error: Exception) -> str:
    if execution.is_out_of_memory(error):
        return "memory"
    if isinstance(error, workers.Died) or "DataLoader worker" in str(error):
        return "crash"
    if isinstance(error, Diverged | FloatingPointError):
        return "divergence"
    return "unsupported" if isinstance(error, methods.Unsupported) else "error"
