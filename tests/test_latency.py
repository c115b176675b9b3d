"""Timing: what a row says, in which form models run, and what happens when memory runs out or a process dies."""

import dataclasses
import math
import statistics
import time

import pytest
import timm
import torch
from conftest import written
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import methods
from harness import contender, latency, measuring, models, modes, roofline, speedup, workers
from harness.latency import Conditions
from harness.spec import Backbone

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 3}
QUICK = 0.01


def vit(**changes):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **(SIZES | changes)).eval()


def images(count):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Slow(nn.Module):
    """Another 20 ms."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        time.sleep(0.02)
        return self.model(x)


def test_a_row_says_how_fast_and_how_sure():
    dense = vit()
    row = latency.compare(dense, Slow(dense), images(2), Conditions(2, "float32", seconds=0.05))
    assert row["batch"] == 2
    assert row["rounds"] >= latency.ROUNDS
    assert 0.005 < row["speed_up"] < 0.3
    low, high = row["speed_up_interval"]
    assert low <= row["speed_up"] <= high
    slow = row["deployed"]
    assert 20 <= slow["p50_ms"] < 60
    assert slow["samples"] == len(slow["raw_ms"])
    assert slow["p50_ms"] == pytest.approx(statistics.median(slow["raw_ms"]), abs=1e-3)
    assert slow["mean_ms"] == slow["p50_ms"]
    assert slow["images_per_second"] == pytest.approx(2e3 / slow["p50_ms"], rel=0.01)
    assert slow["kernels"] == row["dense"]["kernels"] != {}
    weights = sum(p.nbytes for p in dense.parameters())
    assert slow["weights_bytes"] == weights < slow["peak_bytes"]
    assert {"load_before", "load_after", "threads"} <= row["conditions"].keys()


def test_percentiles_are_given_where_the_samples_allow_them():
    dense = vit()
    few = latency.compare(dense, Slow(dense), images(1), Conditions(1, "float32", seconds=QUICK))["deployed"]
    assert few["samples"] < 100
    assert "p90_ms" not in few
    many = latency.compare(dense, dense, images(1), Conditions(1, "float32", seconds=0.5))["deployed"]
    assert many["samples"] >= 100
    assert many["p50_ms"] <= many["p90_ms"]
    assert ("p99_ms" in many) == (many["samples"] >= 1000)


def test_raw_samples_are_thinned_but_percentiles_are_not(monkeypatch):
    monkeypatch.setattr(contender, "KEPT", 10)
    dense = vit()
    row = latency.compare(dense, dense, images(1), Conditions(1, "float32", seconds=QUICK))["dense"]
    assert row["raw_every"] == math.ceil(row["samples"] / 10)
    assert len(row["raw_ms"]) <= 10


def test_dtypes():
    dense = vit()
    rows = {
        d: latency.compare(dense, dense, images(2), Conditions(2, d, seconds=QUICK))
        for d in ("float32", "bfloat16", "float16")
    }
    weights = {dtype: row["dense"]["weights_bytes"] for dtype, row in rows.items()}
    assert weights["float32"] == 2 * weights["bfloat16"] == 2 * weights["float16"]
    assert next(dense.parameters()).dtype == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="these do run on a GPU")
@pytest.mark.parametrize(
    ("conditions", "reason"),
    [
        (Conditions(1, "float32", "cudagraph", QUICK), "CUDA graphs need an NVIDIA GPU"),
        (Conditions(1, "tf32", "eager", QUICK), "tf32 needs an NVIDIA GPU"),
    ],
)
def test_what_a_cpu_cannot_do_is_said(conditions, reason):
    row = latency.compare(vit(), vit(), images(1), conditions)
    assert reason in row["unavailable"]
    assert "dense" not in row


def test_compiled_models_predict_the_same():
    dense = vit(depth=2)
    prepared = modes.prepare(dense, images(2), "float32", "compile")
    with torch.inference_mode():
        assert torch.allclose(prepared.forward(images(2)), dense(images(2)), atol=1e-5)
    assert set(prepared.kernels) == {"all"}


def test_a_graph_break_is_a_reason():
    class Breaking(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            torch._dynamo.graph_break()
            return self.model(x)

    row = latency.compare(vit(depth=1), Breaking(vit(depth=1)), images(1), Conditions(1, "float32", "compile", QUICK))
    assert "the graph breaks" in row["unavailable"]


def test_the_kernel_is_chosen_for_every_number_of_tokens(monkeypatch):
    """Plain attention is made slow on many tokens and fused attention on few, so the choice is known."""
    method = methods.create("dynamicvit", keep_rate=0.5)
    deployed = method.deploy(method.sparsify(vit()))
    kind = type(deployed.blocks[0].attn)
    original = kind.forward

    def forward(self, x, *args, **kwargs):
        if (x.shape[1] > 9) != self.fused_attn:
            time.sleep(0.005)
        return original(self, x, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", forward)
    prepared = modes.prepare(deployed, images(2), "float32", "eager")
    assert prepared.kernels == {"17": "fused", "9": "plain", "5": "plain", "3": "plain"}
    assert [block.attn.fused_attn for block in prepared.model.blocks] == [True, False, False, False]


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=60))
def test_the_interval_holds_the_median(values):
    low, high = speedup.median_interval(values)
    assert min(values) <= low <= statistics.median(values) <= high <= max(values)


@given(st.integers(20, 60), st.integers(0, 1000))
def test_the_interval_covers_what_it_should(rounds, seed):
    """19 of 20 intervals of standard normal rounds hold 0, on average."""
    generator = torch.Generator().manual_seed(seed)
    held = 0
    for _ in range(60):
        low, high = speedup.median_interval(torch.randn(rounds, generator=generator).tolist())
        held += low <= 0 <= high
    assert held >= 48


def test_warm_means_that_windows_agree():
    assert latency.is_stable([1.0] * 5, [1.005] * 5)
    assert not latency.is_stable([1.0] * 5, [0.98] * 5)
    assert latency.is_stable([1.0, 1.1, 0.9, 1.2, 0.8], [1.0, 1.12, 0.92, 1.15, 0.8])
    assert not latency.is_stable([2.0, 2.1, 1.9, 2.2, 1.8], [1.0, 1.12, 0.92, 1.15, 0.8])


LIMITED = '''
"""Runs out of memory, or of patience."""
import copy, methods, os, signal, sys, torch


class Settings(methods.Settings):
    most: int = 2
    how: str = "memory"


@methods.register
class Limited(methods.Method):
    """Takes at most so many images."""

    name = "limited"
    Settings = Settings

    def sparsify(self, vit):
        return copy.deepcopy(vit)

    def deploy(self, sparse):
        deployed, settings = super().deploy(sparse), self.settings

        def limit(module, args):
            if len(args[0]) > settings.most:
                if settings.how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if settings.how == "exit":
                    os._exit(3)
                if settings.how == "error":
                    raise ValueError("not so many")
                raise torch.OutOfMemoryError("pretended")

        deployed.register_forward_pre_hook(limit)
        return deployed
'''


def job(file, how, most=2, batches=(1, 8)):
    backbone = Backbone(
        name="vit_tiny_patch16_224", kwargs={k: v for k, v in SIZES.items() if k not in ("img_size", "num_classes")}
    )
    subject = measuring.Subject(backbone, 3, 16, 0, "limited", {"most": most, "how": how}, plugins=(str(file),))
    return measuring.Job(subject, tuple(Conditions(batch, "float32", seconds=QUICK) for batch in batches), "cpu")


@pytest.fixture(scope="module")
def limited_file(tmp_path_factory):
    return written(tmp_path_factory.mktemp("plugin"), "limited", LIMITED)


@pytest.mark.parametrize("how", ["memory", "kill"])
def test_where_memory_runs_out_the_batch_is_halved(limited_file, how):
    rows = dict(measuring.measure(job(limited_file, how)))
    assert {number: row["batch"] for number, row in rows.items()} == {0: 1, 1: 2}
    assert rows[1]["deployed"]["p50_ms"] > 0


def test_a_process_that_dies_keeps_what_it_had_measured(limited_file):
    rows = []
    with pytest.raises(workers.Died, match="exit code 3"):
        rows.extend(measuring.measure(job(limited_file, "exit")))
    with pytest.raises(workers.Died, match=r"SIGKILL \(out of memory\?\)"):
        list(measuring.measure(job(limited_file, "kill", most=0, batches=(1,))))


def test_an_error_elsewhere_is_raised_here(limited_file):
    with pytest.raises(ValueError, match="not so many"):
        list(measuring.measure(job(limited_file, "error")))


def test_costs_that_depend_on_the_image(threshold_file):
    """An untrained model is set to keep the asked share; counts are a mean with a spread; a CUDA graph is refused."""
    backbone = Backbone(
        name="vit_tiny_patch16_224", kwargs={"patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2}
    )
    conditions = (Conditions(2, "float32", "cudagraph", QUICK), Conditions(2, "float32", "eager", QUICK))
    macs = {}
    for rate in (0.9, 0.4):
        subject = measuring.Subject(backbone, 3, 16, 0, "threshold", {}, keep_rate=rate, plugins=(str(threshold_file),))
        rows = dict(measuring.measure(measuring.Job(subject, conditions, "cpu", count=6)))
        assert "depend on the image" in rows[0]["unavailable"]
        assert rows[1]["deployed"]["waits"] == 2  # one for each image: this toy is no good on a GPU
        costs = rows[-1]
        assert costs["macs_images"] == {"theoretical": 6, "executed": 6}
        assert costs["macs_spread"]["executed"] > 0
        assert costs["macs_spread"]["dense"] == 0
        assert costs["macs_executed"] == pytest.approx(costs["macs_theoretical"], rel=1e-6)
        macs[rate] = costs["macs_executed"] / costs["macs_dense"]
    assert 0.75 < macs[0.9] < 0.97
    assert 0.25 < macs[0.4] < 0.6


def test_small_batches_go_through_several_images():
    """Images may differ in what they take."""
    seen = []

    class Watching(torch.nn.Module):
        def forward(self, x):
            seen.append(float(x.flatten()[0]))
            return x.flatten(1)[:, :3]

    batches = [torch.full((2, 3, 8, 8), float(number)) for number in range(4)]
    row = latency.compare(Watching(), Watching(), batches[0], Conditions(2, "float32", seconds=0.001), batches[1:])
    assert row["batch"] == 2
    assert set(seen) == {0.0, 1.0, 2.0, 3.0}


def here(monkeypatch, todo):
    """What the measuring process would say, in this one."""
    monkeypatch.setattr(measuring.allocator, "keep_memory", lambda: None)
    return measuring._measure_here(todo)


@pytest.mark.parametrize("batch", [3, 16])
def test_theory_is_that_of_the_images_which_are_timed(threshold_file, tmp_path, monkeypatch, batch):
    """Costs are counted on as many images as are timed, so both are means over the same ones."""
    inputs, count = (1, 16) if batch == 16 else (8 // batch, 8 // batch * batch)
    torch.save(images(8), tmp_path / "images.pt")
    backbone = Backbone(
        name="vit_tiny_patch16_224", kwargs={"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    )
    subject = measuring.Subject(backbone, 3, 16, 0, "threshold", {}, keep_rate=0.5, plugins=(str(threshold_file),))
    conditions = (Conditions(batch, "float32", seconds=QUICK),)
    rows = dict(here(monkeypatch, measuring.Job(subject, conditions, "cpu", tmp_path / "images.pt", count=count)))
    costs, row = rows[-1], rows[0]
    assert (row["varies"], row["inputs"]) == (True, inputs)
    assert row["theoretical_speed_up"] == pytest.approx(costs["macs_dense"] / costs["macs_theoretical"], rel=1e-3)
    assert len(row["deployed"]["input_ms"]) == inputs


@pytest.mark.parametrize("synthetic", [True, False])
def test_measuring_builds_one_network(limited_file, tmp_path, monkeypatch, synthetic):
    built, build = [], models.build
    monkeypatch.setattr(models, "build", lambda *given: built.append(given) or build(*given))
    torch.save(images(2), tmp_path / "images.pt")
    todo = job(limited_file, "memory", batches=(2,))
    rows = dict(here(monkeypatch, todo if synthetic else dataclasses.replace(todo, images=tmp_path / "images.pt")))
    assert rows.keys() == {-1, 0}
    assert "theoretical_speed_up" not in rows[0]  # its images do not differ
    assert len(built) == 1


def test_other_torch_versions_are_other_measurements(monkeypatch):
    key = measuring.key("w", torch.device("cpu"), Conditions(1, "float32"))
    limits = roofline.key(torch.device("cpu"), "float32")
    assert key["torch"] == limits["torch"] == torch.__version__
    monkeypatch.setattr(torch, "__version__", "2.99.0+cpu")
    assert measuring.key("w", torch.device("cpu"), Conditions(1, "float32")) == key | {"torch": "2.99.0+cpu"}
    assert roofline.key(torch.device("cpu"), "float32") == limits | {"torch": "2.99.0+cpu"}
