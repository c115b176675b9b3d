"""What determines a result: the ids under which records and checkpoints are kept."""

from __future__ import annotations

import hashlib
from functools import cache, cached_property
from typing import Any

import methods
from harness import freshness, models
from harness.cells import Cell, Run
from harness.data.dataset import ImageData
from harness.device import Plan
from harness.records import ENGINE_REVISION, identify
from harness.spec import Recipe


class Identity:
    """Answers, for the cells of one run: which record, which weights, trained from what, with which recipe."""

    def __init__(self, run: Run, data: ImageData, plan: Plan) -> None:
        self.run, self.spec, self.data, self.plan = run, run.spec, data, plan

    @cached_property
    def context(self) -> dict[str, Any]:
        """What all rows of a table have in common, so that they may be compared."""
        spec = self.spec
        return self._setting | {
            "budget": spec.budget.model_dump(), "recipe": spec.recipe.model_dump(), "adapt": spec.adapt_recipe.model_dump(),
            "distill": spec.distill, "images": spec.measure.images, "dense_revision": methods.find(methods.BASELINE[0]).revision,
        }  # fmt: skip

    @cached_property
    def _setting(self) -> dict[str, Any]:
        return {
            "data": self.data.identity, "backbone": self.spec.backbone.model_dump(), "dense_weights": self.dense_weights,
            "plan": self.plan.identity, "engine": ENGINE_REVISION,
        }  # fmt: skip

    @cached_property
    def dense_weights(self) -> str | None:
        """What tells given dense weights from others; None where the dense network is trained here."""
        weights, backbone = self.spec.dense.weights, self.spec.backbone
        if weights is None:
            return None
        model = models.build(backbone, self.data.classes, self.data.image_size, seed=0)
        return models.load_weights(model, weights, backbone, self.run.folder)

    def record_id(self, cell: Cell) -> str:
        """The id of the cell's train record."""
        content = {"context": self.context, "weights_id": self.weights_id(cell)}
        return identify(content | self.method_of(cell) | {"seed": cell.seed})

    def weights_id(self, cell: Cell) -> str:
        """What determines the cell's weights; a checkpoint is kept under it. Unlike the record's id it leaves out what only
        matters to other cells, so that one dense network serves many benchmarks."""
        recipe, epochs = self.training_of(cell)
        content = self._setting | self.method_of(cell) | {
            "recipe": recipe.model_dump(), "epochs": epochs, "max_steps": self.spec.budget.max_steps, "seed": cell.seed,
        }  # fmt: skip
        if self.needs_dense(cell):
            content |= {"dense": self.weights_id(self.dense_cell(cell)), "teacher": self.has_teacher(cell)}
        return identify(content)

    def artifact_context(self, cell: Cell) -> dict[str, Any]:
        """What decides the result of a phase besides the method's own key for it."""
        recipe, epochs = self.training_of(cell)
        dense = self.weights_id(self.dense_cell(cell)) if self.needs_dense(cell) else None
        return self._setting | {
            "recipe": recipe.model_dump(), "epochs": epochs, "max_steps": self.spec.budget.max_steps, "seed": cell.seed,
            "dense": dense, "teacher": self.has_teacher(cell), "method": cell.method.name, "revision": cell.method.revision,
            "given": _digests(cell), **freshness.plugin_part(cell.method.name),
        }  # fmt: skip

    def method_of(self, cell: Cell) -> dict[str, Any]:
        """The part of an id, and of a record, that says which method it is; of a plug-in, in which version of its code."""
        given = {"given": _digests(cell)} if cell.phases else {}
        return {"method": cell.method.name, "settings": cell.settings, "revision": cell.method.revision, **given} | (
            freshness.plugin_part(cell.method.name)
        )

    def dense_cell(self, cell: Cell) -> Cell:
        """The dense network of the cell's seed."""
        name, settings = methods.BASELINE
        return Cell("dense", methods.create(name, **settings), cell.seed)

    def is_dense(self, cell: Cell) -> bool:
        """Whether the cell is that dense network itself."""
        return self.method_of(cell) == self.method_of(self.dense_cell(cell))

    def has_teacher(self, cell: Cell) -> bool:
        """Whether the cell learns from the dense network's outputs."""
        if self.is_dense(cell) or self.spec.distill == "none":
            return False
        return cell.method.uses_teacher or self.spec.distill == "all"

    def needs_dense(self, cell: Cell) -> bool:
        """Whether the trained dense network is needed to train the cell."""
        return cell.method.start == "dense" or self.has_teacher(cell)

    def training_of(self, cell: Cell) -> tuple[Recipe, float]:
        """The recipe and the epochs that the cell may spend: what starts from scratch gets the dense budget as well."""
        recipe = self.spec.adapt_recipe if cell.method.start == "dense" else self.spec.recipe
        return recipe, sum(self.budgets_of(cell))

    def budgets_of(self, cell: Cell) -> tuple[float, ...]:
        """These epochs, budget by budget, since each has its limit in steps."""
        budget = self.spec.budget
        if cell.method.start == "dense":
            return (budget.adapt_epochs,)
        return (budget.epochs,) if self.is_dense(cell) else (budget.epochs, budget.adapt_epochs)


def _digests(cell: Cell) -> dict[str, str]:
    """What tells the files given for phases from others."""
    return {phase: _file_digest(file) for phase, file in sorted(cell.phases.items())}


@cache
def _file_digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
