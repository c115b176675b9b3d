"""Evaluation and collecting passes go on in smaller batches when memory runs out, and end together where data is lost."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_tally import AT_ONCE, PATIENCE, PLAN, SIZE, image_data, models
from torch import nn

import methods
from harness import workers
from harness.cluster import ALONE, Cluster, is_agreed
from harness.data.dataset import ImageData, open_data
from harness.data.readable import DataLost
from harness.evaluate import evaluate
from harness.halving import Halving, NotEnoughMemory
from harness.rules import RECIPE, random_data
from harness.spec import ROOT, Data
from harness.tally import Tally
from harness.trainer import Trainer
from harness.training.engine import run_phases
from harness.training.setup import Training


def limited(model, most):
    """The sizes of the batches that the model is called with; memory runs out at its end for more than `most` images."""
    sizes = []

    def note(module, inputs):
        sizes.append(len(inputs[0]))

    def stop(module, inputs, output):
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.register_forward_pre_hook(note)
    model.norm.register_forward_hook(stop)
    return sizes


@pytest.mark.parametrize("name", ["dense", "sttabt", "threshold"])
def test_evaluation_halves_its_batch_and_finds_the_same(name, threshold_file):
    methods.load_plugin(threshold_file)
    method, vit, sparse = models(name)
    whole, halved = method.deploy(sparse), method.deploy(sparse)
    data, tallies = image_data(150), [Tally(method, vit, (SIZE, SIZE)) for _ in range(2)]
    expected = evaluate(whole, data, "test", PLAN, 64, tally=tallies[0])
    sizes = limited(halved, 30)
    found = evaluate(halved, data, "test", PLAN, 64, tally=tallies[1])
    assert sizes == [64, 32, 16, 16, 16, 16, 16, 16, 16, 16, 11, 11]
    assert (found.correct == expected.correct).all()
    assert (found.top1, found.top5) == (expected.top1, expected.top5)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    one, other = (tally.whole(ALONE) for tally in tallies)
    assert one.theory.each.tolist() == other.theory.each.tolist()
    assert len(one.theory.each) == 150
    assert other.errors == pytest.approx(one.errors, rel=1e-5)


def test_an_image_that_does_not_fit_alone_is_told():
    model = models("dense")[2]
    sizes = limited(model, 0)
    with pytest.raises(
        NotEnoughMemory, match="evaluating on the test split: not even one image at a time fits"
    ) as told:
        evaluate(model, image_data(), "test", PLAN, AT_ONCE)
    assert sizes == [8, 4, 2, 1]
    assert is_agreed(told.value)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def wrong(part):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        list(Halving(PLAN.device, "a test").over(image_data().eval_batches("test", 8, PLAN.device), wrong))


class Sums(nn.Module):
    """Sums images in a buffer, counts calls in the phase's state, and runs out of memory between the two steps of a sum."""

    def __init__(self, most):
        super().__init__()
        self.most, self.calls = most, Calls()
        self.register_buffer("sum", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, images, targets):
        self.count = self.count + len(images)  # another tensor under the same name
        self.calls.seen += len(images)
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.sum += images.double().sum(dim=(0, 2, 3))


class Calls:
    def __init__(self):
        self.seen = 0

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def collected(most, cluster=ALONE, divided=False):
    module, told = Sums(most), []
    phase = methods.CollectPhase(name="look", module=module, share=1.0, state=module.calls, divided=divided)
    training = Training(RECIPE, random_data(), PLAN, 0, 4, cluster=cluster, say=told.append)
    (log,), _ = run_phases(module, [phase], training)
    return module, log, told


@pytest.mark.parametrize(("most", "micro"), [(7, 4), (3, 2), (1, 1)])
def test_collecting_halves_its_batch_and_gathers_the_same(most, micro):
    (whole, plain, _), (halved, log, told) = collected(8), collected(most)
    assert (whole.count, halved.count) == (32, 32)
    assert whole.calls.seen == halved.calls.seen == 32
    assert halved.sum.tolist() == pytest.approx(whole.sum.tolist(), rel=1e-12)
    assert (log.steps, log.images, log.micro_batch) == (plain.steps, plain.images, micro)
    assert plain.micro_batch is None
    assert told[-1] == f"phase look: out of memory: {micro} images at a time from now on"


def test_collecting_from_an_image_that_does_not_fit_is_told():
    with pytest.raises(NotEnoughMemory, match="phase look: not even one image at a time fits into memory") as told:
        collected(0)
    assert is_agreed(told.value)


# Several processes.


def folder_data(folder: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.data.sources.MEMORY_LIMIT", 0)  # so small a set would be read at once
        return open_data(Data(card=str(folder / "card.yaml"), workers=0), ROOT, str(folder))


@pytest.fixture
def folder(tmp_path):
    """Five test images and as many training images of two classes."""
    for split in ("train", "val"):
        for index in range(5):
            path = tmp_path / split / "ab"[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (SIZE, SIZE), (40 * index, 0, 0)).save(path)
    (tmp_path / "card.yaml").write_text(f"name: tree\nimage_size: {SIZE}\n")
    return tmp_path


def evaluate_lost(folder, cluster):
    """The file of the split's last image goes after the data was opened: the first process's, which then has two batches behind it."""
    data = folder_data(folder)
    cluster.sums([0.0])
    if cluster.is_first:
        (folder / "val" / "b" / "3.png").rename(folder / "away.png")
    cluster.sums([0.0])
    evaluate(models("dense")[2], data, "test", PLAN, 1, cluster)


def report_lost(folder, cluster):
    """The images of which the log says what is kept: the first process alone reads them."""
    data = folder_data(folder)
    cluster.sums([0.0])
    if cluster.is_first:
        (folder / "train" / "a" / "0.png").rename(folder / "away.png")
    trainer = Trainer.__new__(Trainer)
    trainer.cluster, trainer.data, trainer.plan = cluster, data, PLAN
    trainer._reported(None, models("dense")[2])


def evaluate_starved(folder, cluster):
    model = models("dense")[2]
    limited(model, 100 if cluster.is_first else 0)
    evaluate(model, image_data(), "test", PLAN, AT_ONCE, cluster)


def evaluate_halved(folder, cluster):
    """One process has memory for all, the other for two images at once; then both go on together."""
    model = models("dense")[2]
    expected = evaluate(model, image_data(), "test", PLAN, AT_ONCE)
    limited(model, 100 if cluster.is_first else 2)
    found = evaluate(model, image_data(), "test", PLAN, AT_ONCE, cluster)
    assert (found.correct == expected.correct).all()
    raise RuntimeError("the same")


def collect_starved(folder, cluster):
    collected(100 if cluster.is_first else 0, cluster, divided=True)


def collect_lost(folder, cluster):
    """One process loses its second batch, the other has all of its own."""

    def batches(*arguments, **changes):
        yield from whole(*arguments, **changes) if cluster.is_first else [next(whole(*arguments, **changes))]
        if not cluster.is_first:
            raise DataLost("the train split: 7.png: no such file or directory")

    whole = ImageData.eval_batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageData, "eval_batches", batches)
        collected(100, cluster, divided=True)


ENDS = {
    evaluate_lost: ("DataLost", True, "the test split: {}/val/b/3.png: no such file or directory; the data must stay where it is"),
    report_lost: ("DataLost", True, "the train split: {}/train/a/0.png: no such file or directory; the data must stay where it is"),
    evaluate_starved: ("NotEnoughMemory", True, "evaluating on the test split: not even one image at a time fits into memory"),
    evaluate_halved: ("RuntimeError", False, "the same"),
    collect_starved: ("NotEnoughMemory", True, "phase look: not even one image at a time fits into memory"),
    collect_lost: ("DataLost", True, "the train split: 7.png: no such file or directory"),
}  # fmt: skip


def ends(task):
    """How a process of two ends, for each of ENDS: the error's class, whether all have it, and its line."""
    rank, folder = task
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2, timeout=PATIENCE
    )
    for function in ENDS:
        try:
            function(folder, Cluster(rank, 2))
        except Exception as error:
            yield function.__name__, type(error).__name__, is_agreed(error), str(error)
    torch.distributed.destroy_process_group()


def test_processes_end_together_with_one_line(folder):
    """Each of them goes on with the next case: none waits for the other."""
    with ThreadPoolExecutor(2) as threads:
        tasks = [(rank, folder) for rank in range(2)]
        both = list(threads.map(lambda task: list(workers.results_of(ends, task)), tasks, timeout=200))
    expected = [
        (function.__name__, kind, agreed, line.format(folder)) for function, (kind, agreed, line) in ENDS.items()
    ]
    assert both == [expected, expected]


def test_lost_data_is_no_plain_error(folder):
    """Of one process, and for those who ask for batches themselves."""
    data = folder_data(folder)
    (folder / "val" / "b" / "3.png").unlink()
    with pytest.raises(DataLost, match=r"the test split: .*3\.png: no such file"):
        list(data.eval_batches("test", 2, PLAN.device))
    assert len(list(data.eval_batches("train", 2, PLAN.device))) == 3
