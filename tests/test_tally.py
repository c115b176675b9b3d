"""Counts over a whole split: collected while it is evaluated, in the forwards that predict."""

import datetime
import statistics
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

import methods
from harness import device, workers
from harness.cluster import ALONE, Cluster
from harness.cost import count
from harness.data.cards import Card
from harness.data.dataset import ImageData
from harness.data.sources import Arrays
from harness.evaluate import evaluate
from harness.formula import theoretical, theoretical_macs
from harness.macs import Count, standard_error
from harness.summary import summary
from harness.tally import Tally

PLAN = device.plan("cpu", "float32")
PATIENCE = datetime.timedelta(seconds=90)  # a process that is left alone ends with an error
SIZE, TEST, AT_ONCE = 24, 37, 8  # the last batch is smaller


def image_data(test=TEST):
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (test, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    ids = torch.arange(test)
    arrays = Arrays(images, torch.arange(test) % 5)
    card = Card(name="random", classes=5, image_size=SIZE)
    return ImageData(card, SIZE, 5, "random", arrays, arrays, train_ids=ids, val_ids=ids[:0])


def models(name, **settings):
    """A method whose untrained model keeps about 0.6, the backbone, and the form that trains."""
    torch.manual_seed(0)
    sizes = {"img_size": SIZE, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5}
    vit, method = timm.create_model("vit_tiny_patch16_224", **sizes).eval(), methods.create(name, **settings)
    sparse = method.sparsify(vit).eval()
    method.calibrate(sparse, next(image_data().eval_batches("test", 8, PLAN.device)).images, 0.6)
    return method, vit, sparse


def tallied(method, vit, sparse, data, cluster=ALONE):
    tally = Tally(method, vit, (SIZE, SIZE))
    found = evaluate(method.deploy(sparse), data, "test", PLAN, AT_ONCE, cluster, tally)
    return found, tally.whole(cluster)


VARYING = [
    ("sttabt", {}),
    ("sttabt", {"variant": "topk"}),
    ("sttabt", {"variant": "topk", "attention": "actual"}),
    ("svite", {"token_number": 0.2, "density": 0.5, "eval_noise": 1}),
    ("threshold", {}),
]


@pytest.fixture(scope="module", autouse=True)
def _threshold(threshold_file):
    methods.load_plugin(threshold_file)


@pytest.mark.parametrize(("name", "settings"), VARYING)
def test_theory_is_the_mean_of_each_test_images_own_count(name, settings):
    data, (method, vit, sparse) = image_data(), models(name, **settings)
    _, totals = tallied(method, vit, sparse, data)
    images = next(data.eval_batches("test", TEST, PLAN.device)).images
    with torch.no_grad():
        reports = [method.report(sparse, image[None]) for image in images]
    each = [theoretical_macs(vit, report, (SIZE, SIZE)) for report in reports]
    assert len(set(each)) > 1
    assert totals.theory.images == TEST
    assert totals.theory.total == pytest.approx(statistics.mean(each), rel=1e-12)
    assert totals.theory.error == pytest.approx(statistics.stdev(each) / TEST**0.5)
    assert sum(totals.theory.parts.values()) == pytest.approx(totals.theory.total)
    shown = summary(reports[0], None, totals)
    for kind in ("keys", "queries", "mlp"):
        own = [[float(getattr(block, kind)) for block in report.blocks] for report in reports]
        means = [statistics.mean(block) for block in zip(*own, strict=True)]
        assert shown["tokens"][kind] == pytest.approx(means, abs=1e-3)
    for name in reports[0].numbers:
        values = [float(report.numbers[name]) for report in reports]
        assert shown["numbers"][name] == pytest.approx(statistics.mean(values), abs=1e-4)
        assert shown["numbers_error"][name] == pytest.approx(statistics.stdev(values) / TEST**0.5, abs=1e-5)
    if reports[0].authors is not None:
        values = [float(report.authors.macs) for report in reports]
        assert shown["authors"]["macs"] == pytest.approx(statistics.mean(values))
        assert shown["authors"]["macs_error"] == pytest.approx(statistics.stdev(values) / TEST**0.5, rel=1e-3)


@pytest.mark.parametrize(("name", "settings"), VARYING[:4])
def test_counting_takes_no_forward_of_its_own(name, settings):
    method, vit, sparse = models(name, **settings)
    calls, deployed = [], method.deploy(sparse)
    for module in deployed.modules():
        if type(module).__name__ in ("PatchEmbed", "Block"):  # of both networks, where there are two
            module.register_forward_hook(lambda module, inputs, output: calls.append(module))
    for asked in (
        deployed.blocks[0].attn,
        *([deployed.approx.blocks[0].attn] if hasattr(deployed, "approx") and deployed.approx else []),
    ):
        asked.proj.register_forward_hook(lambda module, inputs, output: calls.append(module))
    plain = evaluate(deployed, image_data(), "test", PLAN, AT_ONCE)
    needed = len(calls)
    calls.clear()
    tally = Tally(method, vit, (SIZE, SIZE))
    seen = evaluate(deployed, image_data(), "test", PLAN, AT_ONCE, tally=tally)
    assert len(calls) == needed > 0
    assert tally.whole(ALONE).theory.images == TEST
    assert (seen.correct == plain.correct).all()
    assert seen.loss == plain.loss


@pytest.mark.parametrize("name", ["dense", "dynamicvit", "random", "magnitude", "vitcod"])
def test_where_images_take_the_same_none_is_looked_at_twice(name):
    method, vit, sparse = models(name)
    assert not method.work_varies
    images = torch.randn(3, 3, SIZE, SIZE)
    record = count(method, vit, sparse, method.deploy(sparse), images).record()
    assert record["macs_images"] == {"theoretical": 1, "executed": 1}
    assert record["macs_error"] == {"theoretical": 0, "executed": 0}
    assert record["count_revision"] == 2


def test_a_few_images_that_are_alike_do_not_stand_for_the_others():
    """The split's images differ; of those that are traced, none happens to."""
    method, vit, sparse = models("threshold")
    images = next(image_data().eval_batches("test", TEST, PLAN.device)).images
    _, totals = tallied(method, vit, sparse, image_data())
    same = images[:1].expand(3, -1, -1, -1)
    record = count(method, vit, sparse, method.deploy(sparse), same, theory=totals.theory).record()
    assert record["macs_theoretical"] == totals.theory.total
    assert record["macs_images"]["theoretical"] == TEST
    assert record["theory_of_run"]["macs"] == record["macs_executed"]
    assert record["macs_error"]["theoretical"] == round(totals.theory.error) > 0
    assert record["macs_executed"] == theoretical_macs(vit, method.report(sparse, images[:1]), (SIZE, SIZE))
    assert "theory_of_run" not in count(method, vit, sparse, method.deploy(sparse), images[:2]).record()


@given(st.lists(st.integers(1, 10**11), min_size=1, max_size=30), st.integers(1, 7))
def test_counts_of_parts_are_the_count_of_all(values, size):
    each = torch.tensor(values, dtype=torch.float64)
    block = {"mlp": each, "attention": 3.0}
    whole = Count.of({"head": 2.0}, [block])
    parts = [Count.of({"head": 2.0}, [{**block, "mlp": part}], len(part)) for part in each.split(size)]
    together = Count.together(parts)
    assert together.images == whole.images == len(values)
    assert together.total == whole.total == pytest.approx(statistics.mean(values) + 5)
    assert together.spread == whole.spread
    assert together.parts == pytest.approx(whole.parts)
    assert together.blocks == [pytest.approx(found) for found in whole.blocks]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0
    assert standard_error(each) == pytest.approx(error, rel=1e-6, abs=1e-3)


@given(st.integers(1, 10**15), st.integers(1, 50))
def test_equal_images_keep_their_whole_number(macs, images):
    count = Count.together([Count.of({"head": float(macs)}, [], images), Count.of({"head": float(macs)}, [], 3)])
    assert (count.total, count.spread, count.error) == (macs, 0, 0)


def share(task):
    """Top-1, theory and what is said of tokens and numbers, as every process of a cluster gets them; rank None: alone."""
    rank, meeting, test = task
    torch.set_num_threads(1)
    cluster = ALONE
    if rank is not None:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=PATIENCE
        )
        cluster = Cluster(rank, 2)
    data, (method, vit, sparse) = image_data(test), models("sttabt")
    found, totals = tallied(method, vit, sparse, data, cluster)
    if rank is not None:
        torch.distributed.destroy_process_group()
    means = {place: value.tolist() for place, value in totals.means.items()}
    yield found.top1, totals.theory.images, totals.theory.total, totals.theory.error, means, totals.errors


@pytest.mark.parametrize("test", [9, 1])
def test_processes_count_together_what_one_counts(test, tmp_path):
    """With nine images one process has two batches, the other one; with one, the other has none."""
    with ThreadPoolExecutor(3) as threads:
        tasks = [(None, None, test), *((rank, tmp_path / "meeting", test) for rank in range(2))]
        (alone,), (one,), (other,) = threads.map(lambda task: list(workers.results_of(share, task)), tasks, timeout=200)
    assert one == other
    assert one[:2] == alone[:2] == (alone[0], test)
    assert one[2:4] == pytest.approx(alone[2:4], rel=1e-12)
    assert one[4].keys() == alone[4].keys()
    assert all(one[4][place] == pytest.approx(alone[4][place], rel=1e-5) for place in alone[4])
    assert one[5] == pytest.approx(alone[5], rel=1e-6)


def test_the_formula_of_a_report_for_many_images():
    """A report with one value stands for all images of its batch."""
    method, vit, sparse = models("dense")
    report = method.report(sparse, torch.zeros(1, 3, SIZE, SIZE))
    one, many = (theoretical(vit, report, (SIZE, SIZE), images) for images in (None, 6))
    assert (one.images, many.images) == (1, 6)
    assert many.total == one.total
    assert many.parts == one.parts
