"""A training that is killed, and goes on, ends as if nothing had happened."""

import os
import random
import signal
import threading
import time

import pytest
import torch
import yaml
from conftest import tiny_spec

from harness import models, records, workers
from harness.cells import load_run
from harness.cluster import ALONE
from harness.data.dataset import open_data
from harness.device import plan
from harness.identity import Identity
from harness.progress import Reporter
from harness.records import Store
from harness.trainer import Trainer
from harness.training import engine, stepper


def trainer_of(spec_file, plugin, results, say=lambda line: None):
    """The run of a spec, and what trains its cells."""
    run = load_run(spec_file, plugins=[plugin])
    data = open_data(run.spec.data, run.folder, crop=run.spec.recipe.crop)
    device = plan("cpu", "float32")
    store = Store(results, run.name)
    reporter = Reporter(quiet=True)
    reporter.say = say
    return run, Trainer(Identity(run, data, device), data, device, store, reporter, ALONE, False)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(event: int) -> None:
    """Makes this process die at that event: a step, the beginning of a phase, or a moment of writing a file (half of it
    written, all of it but under another name, done)."""
    left = [event]

    def tick():
        left[0] -= 1
        if left[0] == 0:
            kill()

    def before(owner, name, halfway=None):
        original = getattr(owner, name)

        def wrapped(*arguments, **named):
            if halfway is not None:
                halfway(*arguments)
            tick()
            return original(*arguments, **named)

        setattr(owner, name, wrapped)

    def write_half(path, data):
        if left[0] == 1:  # the kill follows: what it leaves behind must not be taken for a file
            content = b"".join(bytes(piece) for piece in data)
            (path.parent / f".{path.name}.half").write_bytes(content[: len(content) // 2])

    before(stepper.Stepper, "step")
    before(engine.Run, "_spend")
    before(records, "_write", write_half)
    before(records.os, "replace")
    before(records, "_sync_folder")


def training(task):
    """Digests of all cells' weights, once the process comes to an end."""
    spec_file, plugin, results, event = task
    torch.set_num_threads(1)
    if event:
        killed_at(event)
    run, trainer = trainer_of(spec_file, plugin, results)
    digests = {}
    for cell in run.cells():
        trained = trainer.weights(cell, cell.label)
        digests[cell.label] = models.state_digest(trained.sparse.state_dict())
        if trained.averaged is not None:
            digests[cell.label] += models.state_digest(trained.averaged.state_dict())
    yield digests


@pytest.fixture
def stages_spec(tmp_path, tiny_data):
    content = tiny_spec(tiny_data, entries=[{"method": "stages"}, {"method": "dynamicvit"}])
    content["budget"] = {"epochs": 2, "adapt_epochs": 2}
    content["recipe"] |= {"batch_size": 6, "ema": 0.3, "drop_path": 0.1, "flip": 0.5}
    content["train"] = {"checkpoint_steps": 1}
    path = tmp_path / "stages.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def disturbed(task, kills, disturb):
    """Digests of every training that came to an end, until that many processes were killed on the way and the last one was
    left in peace."""
    killed, ended = 0, []
    while killed < kills or not ended:
        folder = task[2] / str(len(ended))
        try:
            run = (
                disturb((*task[:2], folder, 0))
                if killed < kills
                else workers.results_of(training, (*task[:2], folder, 0))
            )
            (digests,) = run
        except workers.Died as death:
            if not death.killed:
                raise
            killed += 1
        else:
            ended.append(digests)
            left = [path for path in (folder / "checkpoints").glob("*/*") if path.parent.name != "artifacts"]
            assert not left  # the states of finished trainings are gone, half-written ones as well
    return ended


def by_events(dice):
    return lambda task: list(workers.results_of(training, (*task[:3], dice.randint(1, 12))))


def at_events(*events):
    left = list(events)
    return lambda task: list(workers.results_of(training, (*task[:3], left.pop(0))))


def by_clock(dice):
    """Any moment at all."""

    def disturb(task):
        results = workers.results_of(training, task)
        box = []
        thread = threading.Thread(target=lambda: box.extend(_outcome(results)))
        before = {process.pid for process in _children()}
        thread.start()
        time.sleep(dice.uniform(0.1, 1.5))
        for process in _children():
            if process.pid not in before:
                process.kill()
        thread.join()
        if isinstance(box[0], Exception):
            raise box[0]
        return box

    return disturb


def _outcome(results):
    try:
        return list(results)
    except workers.Died as death:
        return [death]


def _children():
    import multiprocessing

    return multiprocessing.active_children()


def compare(stages_spec, stages_file, tmp_path, kills, disturb):
    (undisturbed,) = workers.results_of(training, (stages_spec, stages_file, tmp_path / "undisturbed", 0))
    assert undisturbed.keys() == {"dense", "dense+", "stages", "dynamicvit"}
    ended = disturbed((stages_spec, stages_file, tmp_path), kills, disturb)
    assert ended == [undisturbed] * len(ended)


def test_killed_three_times_and_as_good_as_undisturbed(stages_spec, stages_file, tmp_path):
    # in the middle of dense+, in the last phase of `stages` (whose hook has been called by then), and in the cell after it
    compare(stages_spec, stages_file, tmp_path, 3, at_events(100, 100, 30))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("disturb", [by_events, by_clock])
def test_killed_twenty_times_and_as_good_as_undisturbed(stages_spec, stages_file, tmp_path, disturb, seed):
    compare(stages_spec, stages_file, tmp_path, 20, disturb(random.Random(seed)))
