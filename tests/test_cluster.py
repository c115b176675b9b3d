"""Several processes train as one: by torchrun, and by Slurm's variables."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import yaml
from conftest import ROOT, bench, tiny_spec
from hypothesis import given
from hypothesis import strategies as st

import methods
from harness import device, workers
from harness.cluster import ALONE, Cluster
from harness.rules import RECIPE, random_data
from harness.training.engine import run_phases
from harness.training.setup import Training
from methods.core.pooled import total


@given(batch=st.integers(2, 64), size=st.integers(1, 8))
def test_shares_of_a_step_are_whole_and_keep_what_is_mixed_together(batch, size):
    keys = torch.arange(batch)
    parts = [Cluster(rank, size).part(keys) for rank in range(size)]
    assert torch.cat(parts).sort().values.tolist() == keys.tolist()
    for part in parts:
        if len(part) % 2 == 0:  # the middle of an odd batch is mixed with itself
            assert all(a + b == batch - 1 for a, b in zip(part, part.flip(0), strict=True))
    assert max(map(len, parts)) - min(map(len, parts)) <= 3


def test_an_empty_cluster_communicates_with_nobody():
    alone = Cluster()
    assert alone.is_first
    assert alone.sums([1.0, 2.0]) == [1.0, 2.0]
    assert alone.share(lambda: 3) == alone.in_turn(lambda: 3) == 3
    assert alone.gather("x") == ["x"]


def together(arguments, processes=2, **environment):
    """bench.py under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*command, str(ROOT / "bench.py"), *map(str, arguments)], capture_output=True, text=True, timeout=300, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory, tiny_data, stages_file):
    """The same benchmark by one process and by two: results folders and what the two said."""
    folder = tmp_path_factory.mktemp("cluster")
    entries = [{"method": "dynamicvit", "settings": {"keep_rate": 0.6}}, {"method": "stages"}]
    content = tiny_spec(tiny_data, plugins=[str(stages_file)], entries=entries, budget={"epochs": 2, "adapt_epochs": 2})
    content["recipe"] |= {"mixup": 0.8, "cutmix": 1.0, "flip": 0.5, "ema": 0.2}
    content["data"]["card"] = str(odd_card(folder, tiny_data))
    (folder / "both.yaml").write_text(yaml.safe_dump(content))
    arguments = ("--spec", folder / "both.yaml")
    one = bench(*arguments, "--results", folder / "one", OMP_NUM_THREADS="1")
    assert one.returncode == 0, one.stdout + one.stderr
    two = together([*arguments, "--results", folder / "two"])
    assert two.returncode == 0, two.stdout + two.stderr
    return folder, two.stdout


def odd_card(folder, tiny_data):
    """All but one of the test images: two processes cannot share them equally."""
    import numpy as np

    with np.load(tiny_data.parent / "tiny.npz") as arrays:
        changed = {name: array[:-1] if name.startswith("test") else array for name, array in arrays.items()}
    np.savez(folder / "odd.npz", **changed)
    card = yaml.safe_load(tiny_data.read_text()) | {"name": "odd", "root": "odd.npz"}
    (folder / "odd.yaml").write_text(yaml.safe_dump(card))
    return folder / "odd.yaml"


def trained(results):
    records = [json.loads(path.read_text()) for path in (results / "both").glob("*.json")]
    return {record["label"]: record for record in records if record["kind"] == "train"}


@pytest.mark.long
def test_two_processes_learn_what_one_learns(both):
    folder, _ = both
    one, two = trained(folder / "one"), trained(folder / "two")
    assert one.keys() == two.keys() == {"dense", "dense+", "dynamicvit keep_rate=0.6", "stages"}
    for label in one:
        phases = list(zip(one[label]["phases"], two[label]["phases"], strict=True))
        assert [(a["name"], a["steps"], a["images"]) for a, _ in phases] == [
            (b["name"], b["steps"], b["images"]) for _, b in phases
        ]
        assert [a["macs"] for a, _ in phases] == pytest.approx([b["macs"] for _, b in phases], rel=1e-6)
        for a, b in phases:
            for point, other in zip(a["curve"], b["curve"], strict=True):
                assert other == pytest.approx(point, abs=1e-4, rel=1e-4), label
        assert two[label]["loss"] == pytest.approx(one[label]["loss"], rel=1e-3)
        assert one[label]["id"] == two[label]["id"]
        assert (one[label]["where"]["processes"], two[label]["where"]["processes"]) == (1, 2)


@pytest.mark.long
def test_the_first_process_alone_talks_and_writes(both):
    folder, said = both
    assert said.count("[1/4] dense, seed 0: done") == 1
    for kind in ("logs", "both", "checkpoints"):
        assert sorted(path.name for path in (folder / "two" / kind).glob("*.*")) == sorted(
            path.name for path in (folder / "one" / kind).glob("*.*")
        )
    again = together(["--spec", folder / "both.yaml", "--results", folder / "two"])
    assert again.stdout.count(": present, top-1") == 4


def test_an_error_of_all_ends_the_cell_and_not_the_run(tmp_path, tiny_data):
    """A loss that is not a number is seen by both processes; the other cells go on."""
    content = tiny_spec(tiny_data, entries=[{"method": "random"}], adapt={"lr": 1e30})
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(content))
    done = together(["--spec", tmp_path / "bad.yaml", "--results", tmp_path / "r"])
    assert done.stdout.count("dense, seed 0: done") == 1
    assert done.stdout.count("dense+, seed 0: FAILED (divergence") == 1
    assert "random, seed 0: " in done.stdout
    assert len(list((tmp_path / "r" / "bad").glob("*.attempt1.json"))) == 2


def test_too_many_processes_for_a_batch_are_told(tmp_path, tiny_data):
    content = tiny_spec(tiny_data, entries=[])
    content["recipe"]["batch_size"] = 3
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
    done = together(["--spec", tmp_path / "small.yaml", "--results", tmp_path / "r"])
    assert "recipe.batch_size 3 is too small for 2 processes" in done.stdout


SLURM = """
import sys
from harness import cluster
found, device = cluster.join("cpu")
print(found.rank, found.size, device, cluster.os.environ["MASTER_ADDR"], *found.sums([found.rank + 1.0]))
cluster.leave()
"""


def test_slurms_variables_are_understood():
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    shared = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": "7",
        "MASTER_PORT": str(port),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SLURM], cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env=os.environ | shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    said = [
        output.splitlines()[-1].split() for output in outputs
    ]  # before it, torch 2.10's gloo says that it is connected
    assert said == [["0", "2", "cpu", "localhost", "3.0"], ["1", "2", "cpu", "localhost", "3.0"]]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("a1,a2", "a1"),
        ("node[01-04,9]", "node01"),
        ("n[3,5]-x", "n3-x"),
        ("gpu-[10-12],cpu1", "gpu-10"),
    ],
)
def test_the_first_of_slurms_nodes(nodes, first, monkeypatch):
    from harness import cluster

    environment = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "12"}
    cluster._from_slurm(environment)
    assert environment["MASTER_ADDR"] == first
    assert environment["RANK"] == "1"


def test_a_batch_script_without_a_step_is_one_process():
    from harness import cluster

    environment = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "12"}
    cluster._from_slurm(environment)
    assert "RANK" not in environment


class Sum(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("sum", torch.zeros(3))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, images, targets):
        self.sum += images.sum(dim=(0, 2, 3))
        self.count += len(images)


def collect(task):
    """What a collecting phase over nine images in batches of eight gathers; rank None: alone."""
    rank, meeting = task
    torch.set_num_threads(1)
    cluster = ALONE
    if rank is not None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
        cluster = Cluster(rank, 2)
    data, module = random_data(), Sum()
    data.train_ids = data.train_ids[:9]

    def finish():
        total(module.sum), total(module.count)

    phase = methods.CollectPhase(name="look", module=module, finish=finish, share=1.0, divided=True)
    training = Training(RECIPE, data, device.plan("cpu", "float32"), 0, 4, cluster=cluster)
    (log,), _ = run_phases(module, [phase], training)
    if rank is not None:
        torch.distributed.destroy_process_group()
    yield module.sum.tolist(), float(module.count), log.images, log.steps


def test_processes_with_unequal_shares_collect_what_one_collects(tmp_path):
    (alone,) = workers.results_of(collect, (None, None))
    with ThreadPoolExecutor(2) as threads:
        tasks = [(rank, tmp_path / "meeting") for rank in range(2)]
        ((one,), (other,)) = threads.map(lambda task: list(workers.results_of(collect, task)), tasks)
    assert one == other
    assert one[1:] == alone[1:] == (9.0, 9, 2)
    assert one[0] == pytest.approx(alone[0], rel=1e-5)
