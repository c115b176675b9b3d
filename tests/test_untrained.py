"""A model's accuracy before its training: what a row must not fall below."""

import numpy as np
import pytest
import torch
import yaml
from conftest import TOY, tiny_spec, written
from test_interruption import trainer_of

from harness.evaluate import evaluate
from harness.untrained import evaluate_untrained

EARLY = TOY.replace("toy", "early").replace("Toy", "Early")  # prunes from the beginning
LATE = (  # prunes only once its training begins: what is there before is dense
    TOY.replace("toy", "late")
    .replace("Toy", "Late")
    .replace("    def report", "    def phases(self, sparse, criterion, teacher=None):\n        plan = lambda: sparse.plan_pruning(self.settings.keep_rate, None)\n"
             "        start = methods.TransformPhase(name='start', apply=plan)\n"
             "        return [start, *super().phases(sparse, criterion, teacher)]\n\n    def report")
    .replace("        sparse.plan_pruning(self.settings.keep_rate, None)\n        return", "        sparse.plan_pruning(1.0, None)\n        return")
)  # fmt: skip


@pytest.fixture(scope="module")
def cells(tmp_path_factory, tiny_data):
    """What trains them, and a cell of each kind by its method's name."""
    folder = tmp_path_factory.mktemp("untrained")
    plugins = [written(folder, name, text) for name, text in (("late", LATE), ("early", EARLY))]
    manual = {"method": "sttabt", "settings": {"variant": "manual"}}
    entries = [{"method": name} for name in ("early", "late", "random")] + [manual]
    content = tiny_spec(tiny_data, entries=entries, plugins=[str(plugin) for plugin in plugins])
    (folder / "kinds.yaml").write_text(yaml.safe_dump(content))
    run, trainer = trainer_of(folder / "kinds.yaml", plugins[0], folder / "results")
    return trainer, {cell.method.name: cell for cell in reversed(run.cells())}  # of dense and dense+ the first


def evaluation(trainer):
    return lambda model, split: evaluate(model, trainer.data, split, trainer.plan)


def untrained(trainer, cell):
    trained = trainer.weights(cell, cell.label)
    images = next(trainer.data.eval_batches("val", 4, torch.device("cpu"))).images
    return evaluate_untrained(trainer, cell, cell.label, trained, images, evaluation(trainer))


def test_it_is_the_dense_network_after_surgery(cells):
    trainer, by_name = cells
    found = untrained(trainer, by_name["early"])
    dense = trainer.untrained(by_name["early"], "")
    assert np.array_equal(found.correct, evaluation(trainer)(by_name["early"].method.deploy(dense), "test").correct)
    start = trainer.weights(by_name["dense"], "").sparse
    assert all((a == b).all() for a, b in zip(dense.parameters(), start.parameters(), strict=True))
    trained = trainer.weights(by_name["early"], "")
    assert any((a != b).any() for a, b in zip(dense.parameters(), trained.sparse.parameters(), strict=True))
    again = untrained(trainer, by_name["early"])
    assert np.array_equal(found.correct, again.correct)
    assert found.loss == again.loss


def test_what_has_no_such_state_has_no_number(cells):
    trainer, by_name = cells
    assert untrained(trainer, by_name["random"]) is not None
    assert untrained(trainer, by_name["late"]) is None  # it would be compared with a denser network
    assert untrained(trainer, by_name["dense"]) is None  # from scratch
    assert untrained(trainer, by_name["sttabt"]) is None  # the manual variant has no training


@pytest.mark.parametrize("where", ["deploy", "report", "forward"])
def test_a_method_that_cannot_be_deployed_untrained_keeps_its_row(cells, monkeypatch, where):
    trainer, by_name = cells
    cell = by_name["random"]
    trained = trainer.weights(cell, cell.label)

    def refuse(*_, **__):
        raise RuntimeError("not calibrated yet")

    if where != "forward":
        monkeypatch.setattr(type(cell.method), where, refuse)
    images = next(trainer.data.eval_batches("val", 4, torch.device("cpu"))).images
    evaluated = refuse if where == "forward" else evaluation(trainer)
    assert evaluate_untrained(trainer, cell, cell.label, trained, images, evaluated) is None


def test_without_the_dense_checkpoint_nothing_is_trained_for_it(cells):
    trainer, by_name = cells
    cell = by_name["random"]
    trainer.weights(cell, cell.label)
    path = trainer.store.checkpoint(trainer.identity.weights_id(trainer.identity.dense_cell(cell)))
    kept = path.read_bytes()
    path.unlink()
    try:
        assert untrained(trainer, cell) is None
        assert not path.exists()
    finally:
        path.write_bytes(kept)
