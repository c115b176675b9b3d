"""Carries a survey out: one process per case and method, a record per conditions."""

from __future__ import annotations

from typing import Any

import torch

from harness import device as devices
from harness import freshness, measuring, models, roofline, workers
from harness.errors import UserError
from harness.latency import Conditions
from harness.progress import Reporter
from harness.records import Store, identify, provenance
from harness.survey import SEED, Case, Plan, TimeBudget, subject_id
from methods import Method, Unsupported
from methods.core.registry import loaded_plugins


class Surveyor:
    """`execute` measures what has no record yet and returns how many rows failed; `left` says how many conditions the time
    budget did not reach."""

    def __init__(
        self,
        plan: Plan,
        store: Store,
        reporter: Reporter,
        budget: TimeBudget,
        remeasure: bool = False,
        redo: bool = False,
    ) -> None:
        """redo: what other code has measured is measured again."""
        self.plan, self.survey, self.store, self.reporter = plan, plan.survey, store, reporter
        self.budget, self.remeasure, self.redo = budget, remeasure, redo
        self.stale: list[str] = []  # rows that other code has measured, and that were kept
        self.device = devices.find(self.survey.device)
        self.left = 0

    def execute(self, with_roofline: bool = False) -> int:
        for case in self.survey.cases:  # wrong use is told at once; on no device, building costs nothing
            with torch.device("meta"):
                models.require_vit(models.build(case.backbone, None, case.image_size, SEED), case.backbone.name)
        self.store.prepare()
        workers.start_server()
        if with_roofline:
            self._roofline()
        failed = 0
        jobs = [(case, label, method) for case in self.survey.cases for label, method in self.plan.rows]
        for number, (case, label, method) in enumerate(jobs, 1):
            name = f"[{number}/{len(jobs)}] {case.backbone.name}{f' at {case.image_size}' if case.image_size else ''}, {label}"
            try:
                failed += not self._do(case, label, method, name)
            except Exception as error:  # one row must not stop the others
                reason = "unsupported" if isinstance(error, Unsupported) else type(error).__name__
                told = "" if isinstance(error, UserError) else f"{reason}: "
                self.reporter.done(f"{name}: FAILED ({told}{' '.join(str(error).split())[:300]})")
                failed += 1
        if self.stale:
            self.reporter.say(freshness.closing(self.stale))
        return failed

    def _do(self, case: Case, label: str, method: Method, name: str) -> bool:
        wanted = measuring.expand(case, self.device, self.survey.seconds, self.survey.energy)
        subject = subject_id(case, method, self.survey.keep_rate)
        keys = [measuring.key(identify(subject), self.device, conditions) for conditions in wanted]
        missing = [
            i for i, key in enumerate(keys)
            if self.remeasure or not self._answers(self.store.read(identify(key)), wanted[i], name)
        ]  # fmt: skip
        if not missing:
            self.reporter.done(f"{name}: present{', made by other code' if name in self.stale else ''}")
            return True
        if self.budget.is_spent:
            self.left += len(missing)
            return True
        self.budget.start()
        self.reporter.begin(name, f"measuring, {len(missing)} conditions")
        job = measuring.Job(
            measuring.Subject(
                case.backbone, None, case.image_size, SEED, method.name, subject["settings"], keep_rate=self.survey.keep_rate,
                plugins=loaded_plugins(), code=freshness.code_digest(method.name),
            ),
            tuple(wanted[i] for i in missing), str(self.device), count=self.survey.images, threads=torch.get_num_threads(),
        )  # fmt: skip
        done, facts = [], {}
        results = measuring.measure(job)
        for number, row in results:
            if number < 0:
                facts = row
                continue
            self._write(keys[missing[number]], label, subject, facts, row)
            self.budget.note()
            done.append(_told(wanted[missing[number]], row))
            if self.budget.is_spent and len(done) < len(missing):
                results.close()
                self.left += len(missing) - len(done)
                break
        self.reporter.done(f"{name}: {'; '.join(done)}")
        return True

    def _answers(self, found: dict[str, Any] | None, asked: Conditions, name: str) -> bool:
        """Whether a record says what is asked. One that other code has made does not where such are made again."""
        if not measuring.answers(found, asked):
            return False
        is_other = freshness.survey_state(found) == freshness.OTHER
        if is_other and not self.redo and name not in self.stale:
            self.stale.append(name)
        return not (is_other and self.redo)

    def _write(
        self, key: dict[str, Any], label: str, subject: dict[str, Any], facts: dict[str, Any], row: dict[str, Any]
    ) -> None:
        self.store.write({
            "id": identify(key), "kind": "measure", **key, "images": "synthetic", "label": label, "survey": subject | facts,
            "latency": row, "where": devices.where(self.device),
            "code": provenance() | {"digest": freshness.code_digest(subject["method"])},
        })  # fmt: skip

    def _roofline(self) -> None:
        """The device's own limits in every dtype of the survey, once."""
        dtypes = {c.dtype for case in self.survey.cases for c in measuring.expand(case, self.device, 1.0, False)}
        for dtype in sorted(dtypes):
            key = roofline.key(self.device, dtype)
            if not self.remeasure and self.store.read(identify(key)) is not None:
                continue
            self.reporter.begin("roofline", dtype)
            for row in workers.results_of(roofline.measure, (str(self.device), dtype, torch.get_num_threads())):
                self.store.write(
                    {"id": identify(key), **key, **row, "where": devices.where(self.device), "code": provenance()}
                )
                self.reporter.done(f"roofline, {dtype}: {row.get('unavailable') or _limits(row)}")


def _limits(row: dict[str, Any]) -> str:
    return f"products {row['gemm_tflops']:.3g} TFLOP/s, copies {row['copy_gbs']:.3g} GB/s"


def _told(conditions: Conditions, row: dict[str, Any]) -> str:
    where = f"batch {conditions.batch} {conditions.dtype} {conditions.mode}"
    if "unavailable" in row:
        return f"{where} n/a"
    return f"{where} {row['deployed']['p50_ms']:.2f} ms, {row['speed_up']:.2f}x"
