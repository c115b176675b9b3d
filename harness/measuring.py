"""Measures one method's deployed model in a process of its own: what to build there, and what to do when memory runs out."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import methods
from harness import cost, freshness, latency, models, spec, summary, workers
from harness import device as devices
from harness.device import allocator
from harness.device.execution import is_out_of_memory, release
from harness.errors import UserError
from harness.executed import executed_macs
from harness.formula import theoretical_macs
from harness.latency import Conditions
from harness.records import MEASURE_REVISION
from harness.words import counters_told

Row = dict[str, Any]
TIMED = 8  # images that a measurement goes through at most, in whole batches, where a batch is smaller
CALIBRATED = 8  # images on which an untrained model is set to keep a share


@dataclass(frozen=True)
class Subject:
    """What it takes to build a method's models again elsewhere: the dense network once, and from it the method's.

    weights: a checkpoint of the form that trains; None: random weights, and where costs depend on the image, a model that
    the method has set to keep about `keep_rate` of it. plugins: files with further methods. code: the digest that the method's code
    had when the run began; None: it is not asked for.
    """

    backbone: spec.Backbone
    classes: int | None
    image_size: int | None
    seed: int
    method: str
    settings: dict[str, Any]
    weights: Path | None = None
    keep_rate: float = 0.7
    plugins: tuple[str, ...] = ()
    code: str | None = None

    def dense(self) -> nn.Module:
        """The dense network."""
        return models.build(self.backbone, self.classes, self.image_size, self.seed).eval()

    def sparsify(self, dense: nn.Module, images: Tensor) -> tuple[methods.Method, nn.Module]:
        """The method, and the form that trains; `images` [B, 3, H, W] are what untrained models are set on. UserError
        where the method's code is not the run's."""
        for path in self.plugins:
            methods.load_plugin(path)
        method = methods.create(self.method, **self.settings)
        if self.code not in (None, freshness.code_digest(self.method)):  # each process reads the files again
            raise UserError(f"{self.method}'s code changed while this ran; start it again")
        torch.manual_seed(self.seed + 1)
        sparse = method.sparsify(dense)
        if self.weights is not None:
            sparse.load_state_dict(torch.load(self.weights, map_location="cpu", weights_only=True)["model"])
        else:
            method.calibrate(sparse.eval(), images, self.keep_rate)
        return method, sparse.eval()


@dataclass(frozen=True)
class Job:
    """A subject and the conditions to measure it under. images: a file with a tensor [B, 3, H, W]; None: random ones.
    count: images over which costs are counted, 0 for none. threads: of the CPU."""

    subject: Subject
    conditions: tuple[Conditions, ...]
    device: str
    images: Path | None = None
    count: int = 0
    threads: int | None = None


def expand(chosen: spec.Conditions, device: torch.device, seconds: float, energy: bool) -> list[Conditions]:
    """Every batch size in every dtype and mode."""
    auto = "bfloat16" if device.type == "cuda" else "float32"
    dtypes = dict.fromkeys(auto if dtype == "auto" else dtype for dtype in chosen.dtypes)
    return [
        Conditions(batch, dtype, mode, seconds, energy)
        for dtype in dtypes for batch in dict.fromkeys(chosen.batch_sizes) for mode in dict.fromkeys(chosen.modes)
    ]  # fmt: skip


def key(weights_id: str, device: torch.device, conditions: Conditions) -> dict[str, Any]:
    """What determines a measure record's id: what was timed, on what, how, and by which rule."""
    return {
        "weights_id": weights_id, "device": devices.name(device), "driver": devices.driver(device),
        "torch": str(torch.__version__), "dtype": conditions.dtype, "mode": conditions.mode, "batch": conditions.batch,
        "measure_revision": MEASURE_REVISION,
    }  # fmt: skip


def answers(record: dict[str, Any] | None, conditions: Conditions) -> bool:
    """Whether a measure record is there and says what is asked: as long a measurement, and energy if it is wanted."""
    if record is None:
        return False
    row = record["latency"]
    return "unavailable" in row or (
        row["seconds"] >= conditions.seconds
        and not (conditions.energy and "energy" not in row and "idle_watts" not in row)
    )


def measure(job: Job) -> Iterator[tuple[int, Row]]:
    """(number of the conditions, latency row) as they are measured; before them (-1, costs, if asked for). Where memory runs
    out the batch is halved, and the row says for which batch it is. What fails does not stop the conditions after it, which
    get a fresh process; the first error is raised at the end. An error in building or counting is raised at once."""
    left, told, errors = dict(enumerate(job.conditions)), False, list[Exception]()
    while left:
        part, numbers = dataclasses.replace(job, conditions=tuple(left.values())), list(left)
        is_built, before = False, len(left)
        try:
            for number, row in workers.results_of(_measure_here, part):
                is_built |= number < 0
                if number >= 0:
                    del left[numbers[number]]
                    yield numbers[number], row
                elif row and not told:
                    told = True
                    yield number, row
        except Exception as error:
            if not is_built or not left:
                raise
            first = next(iter(left))
            if isinstance(error, workers.Died) and error.killed and left[first].batch > 1:
                left[first] = dataclasses.replace(left[first], batch=left[first].batch // 2)
                continue
            errors.append(error)
            del left[first]
        if len(left) == before:
            raise RuntimeError("the measuring process ended without a result")
    if errors:
        raise errors[0]


def _measure_here(job: Job) -> Iterator[tuple[int, Row]]:
    warnings.filterwarnings("ignore")
    allocator.keep_memory()  # before anything large is allocated: what is mapped by then stays mapped
    if job.threads:
        torch.set_num_threads(job.threads)
    dense = job.subject.dense()
    sample = _images(job, dense, max(job.count, CALIBRATED), seed=1)
    method, sparse = job.subject.sparsify(dense, sample[:CALIBRATED])
    deployed = method.deploy(sparse)
    costs = {}
    if job.count:
        models.require_countable(dense, job.subject.backbone.name)
        costs = cost.count(method, dense, sparse, deployed, sample[: job.count]).record()
        report = method.report(sparse, sample[: job.count])
        costs["remarks"], costs["numbers"] = [*report.remarks, *counters_told(costs)], summary.numbers(report)
        costs["numbers_error"] = summary.numbers_error(report)
    yield -1, costs
    report = method.report(sparse, sample)
    images = _images(job, dense, max(TIMED, *(conditions.batch for conditions in job.conditions)), seed=0)
    in_theory = functools.cache(lambda count: _speed_up_in_theory(method, dense, sparse, _of_size(images, count)))
    device = torch.device(job.device)
    for number, conditions in enumerate(job.conditions):
        if cost.shapes_vary(report) and conditions.mode == "cudagraph":
            reason = "CUDA graphs need fixed shapes, and this method's depend on the image"
            yield number, {"batch": conditions.batch, "unavailable": reason}
            continue
        row = _halving(dense, deployed, images, conditions, device, cost.varies(report))
        if row.get("varies"):
            row["theoretical_speed_up"] = in_theory(row["batch"] * row["inputs"])
        yield number, row
        if "unavailable" in row and device.type == "cuda":
            return  # a capture that failed may have left the device in a bad state: the rest gets a fresh process


def _halving(
    dense: nn.Module, deployed: nn.Module, images: Tensor, conditions: Conditions, device: torch.device, varies: bool
) -> Row:
    batch = conditions.batch
    while True:
        release(device)
        try:
            timed = _of_size(images, max(batch, TIMED // batch * batch))
            first, *others = (part.to(device) for part in timed.split(batch))
            return latency.compare(dense, deployed, first, conditions, others, varies)
        except Exception as error:
            if not is_out_of_memory(error) or batch == 1:
                raise
        batch //= 2


def _speed_up_in_theory(method: methods.Method, dense: nn.Module, sparse: nn.Module, images: Tensor) -> float:
    """By multiply-adds, means over the very images that are timed; in parts, since a report sees all images at once."""
    size = images.shape[-2:]
    macs = [len(part) * theoretical_macs(dense, method.report(sparse, part), size) for part in images.split(TIMED)]
    return round(executed_macs(dense, images[:1]) * len(images) / sum(macs), 4)


def _images(job: Job, dense: nn.Module, count: int, seed: int) -> Tensor:
    """The job's images, or random ones of the network's size: a function of the count and the seed."""
    if job.images is not None:
        return _of_size(torch.load(job.images, weights_only=True), count)
    return torch.randn(count, 3, *dense.patch_embed.img_size, generator=torch.Generator().manual_seed(seed))


def _of_size(images: Tensor, count: int) -> Tensor:
    """That many images, repeated where there are too few."""
    return images.repeat(-(-count // len(images)), 1, 1, 1)[:count].contiguous()
