"""Small things that several test modules need."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, settings

from methods.core import registry

ROOT = Path(__file__).resolve().parent.parent

# No test may fail since a machine is slow or busy: neither by its own time nor by the time that making up inputs takes.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# torch.compile writes calls of at::vec::transpose_block and pack_vnni2 into attention and matrix products, which only torch's builds for AVX2 and up have.
vectors = pytest.mark.skipif(
    platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="torch.compile's attention on an x86-64 CPU needs AVX2",
)

TOY = '''
"""A toy."""
import methods
from methods.core.pruning import StagedPruning
from methods.core.vit import specialise


class FirstTokens(StagedPruning):
    """Keeps the patches that come first."""

    def keep_scores(self, stage, patches, seen):
        return -patches.new_ones(patches.shape[:2]).cumsum(dim=1)


class Settings(methods.Settings):
    keep_rate: float = 0.5


@methods.register
class Toy(methods.Method):
    """Keeps the first tokens: a toy."""

    name = "toy"
    Settings = Settings

    def sparsify(self, vit):
        sparse = specialise(vit, FirstTokens)
        sparse.plan_pruning(self.settings.keep_rate, None)
        return sparse

    def report(self, module, images):
        return methods.Report(module.block_reports(images))
'''


@pytest.fixture(scope="session")
def toy_file(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("plugin"), "toy", TOY)


MASKED = (
    TOY.replace("toy", "masked").replace("Toy", "Masked").replace("A toy.", "Masks.")
    + '''

from methods.core.vit import embed


class MaskingViT(FirstTokens):
    """Multiplies dropped tokens by zero and computes them all the same, as many repositories do."""

    def forward_features(self, images, *args, **kwargs):
        x = embed(self, images)
        for index, block in enumerate(self.blocks):
            if index in self.pruning_loc:
                kept = self.num_prefix_tokens + self.kept_counts[self.pruning_loc.index(index)]
                x = torch.cat([x[:, :kept], x[:, kept:] * 0], dim=1)
            x = block(x)
        return self.norm(x)
'''
)
MASKED = MASKED.replace("import methods\n", "import methods\nimport torch\n").replace(
    "specialise(vit, FirstTokens)", "specialise(vit, MaskingViT)"
)

THRESHOLD = '''
"""How many tokens it keeps depends on the image."""
import methods
import torch
from methods.core.vit import specialise
from timm.models import VisionTransformer


class ThresholdViT(VisionTransformer):
    """Keeps the patches whose first feature is above a threshold, one image after the other; at least one."""

    def keep(self, x):
        alive = x[:, 0] > self.threshold
        alive[0] = True
        return alive

    def forward_features(self, images, *args, **kwargs):
        x = self._pos_embed(self.patch_embed(images))
        outputs = []
        for one in x:
            alive = self.keep(one)
            one = one[alive][None]
            for block in self.blocks:
                one = block(one)
            outputs.append(one[:, :1])
        return self.norm(torch.cat(outputs))


@methods.register
class Threshold(methods.Method):
    """Keeps what is above a threshold: a toy whose costs depend on the image."""

    name = "threshold"

    def sparsify(self, vit):
        sparse = specialise(vit, ThresholdViT)
        sparse.register_buffer("threshold", torch.tensor(-1e9))
        return sparse

    @torch.no_grad()
    def calibrate(self, sparse, images, keep_rate):
        x = sparse._pos_embed(sparse.patch_embed(images))
        sparse.threshold.copy_(x[..., 0].flatten().quantile(1 - keep_rate))

    @torch.no_grad()
    def report(self, module, images):
        x = module._pos_embed(module.patch_embed(images))
        tokens = torch.stack([module.keep(one).sum() for one in x])
        return methods.Report(tuple(methods.BlockReport(tokens, tokens, tokens) for _ in module.blocks))
'''


def written(folder: Path, name: str, text: str) -> Path:
    """A plug-in outside the repository."""
    path = folder / f"{name}.py"
    path.write_text(text)
    return path


@pytest.fixture(scope="session")
def masked_file(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("plugin"), "masked", MASKED)


@pytest.fixture(scope="session")
def threshold_file(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("plugin"), "threshold", THRESHOLD)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A card with 60 training and 20 test images of 16 pixels in three classes."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 60), ("test", 20)):
        labels = np.arange(count) % 3
        images = generator.integers(0, 60, (count, 16, 16)) + labels[:, None, None] * 80
        arrays |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels}
    np.savez(folder / "tiny.npz", **arrays)
    card = {"name": "tiny", "reader": "npz", "root": "tiny.npz", "classes": 3, "image_size": 16, "val_fraction": 0.2}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(card))
    return folder / "tiny.yaml"


def tiny_spec(card: Path, **changes) -> dict:
    """A spec that trains in a second or two."""
    return {
        "data": {"card": str(card), "workers": 0},
        "backbone": {
            "name": "vit_tiny_patch16_224",
            "kwargs": {"patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2},
        },
        "budget": {"epochs": 1, "adapt_epochs": 1},
        "recipe": {
            "batch_size": 12, "lr": 0.002, "warmup_epochs": 0, "crop": "none", "auto_augment": None, "color_jitter": 0,
            "random_erasing": 0, "mixup": 0, "cutmix": 0,
        },
        "dtype": "float32",
        "entries": [{"method": "dynamicvit", "settings": {"keep_rate": 0.6}}],
        "measure": {"batch_sizes": [2], "seconds": 0.01, "images": 2},
    } | changes  # fmt: skip


@pytest.fixture(scope="session")
def tiny_spec_file(tmp_path_factory, tiny_data) -> Path:
    path = tmp_path_factory.mktemp("spec") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_spec(tiny_data)))
    return path


def bench(*arguments: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """The command, run as a process."""
    return subprocess.run(
        [sys.executable, str(ROOT / "bench.py"), *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "2", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@contextlib.contextmanager
def without_plug_ins() -> Iterator[None]:
    """As in a new process: it knows none of the methods that other tests have loaded, and leaves none behind."""
    methods, files = dict(registry._registered), dict(registry._plug_ins)
    _drop(methods)
    registry._plug_ins.clear()
    try:
        yield
    finally:
        _drop({name: cls for name, cls in registry._registered.items() if name not in methods})
        registry._registered.update(methods)
        registry._plug_ins.clear()
        registry._plug_ins.update(files)


def _drop(methods: dict[str, type]) -> None:
    for name, cls in methods.items():
        if not cls.__module__.startswith("methods."):
            del registry._registered[name]


@pytest.fixture
def here(monkeypatch, capsys) -> Callable[..., subprocess.CompletedProcess]:
    """The command within this process, for what ends before it does much: importing torch would take most of the time."""

    def run(*arguments: object) -> subprocess.CompletedProcess:
        command = ["bench.py", *map(str, arguments)]
        monkeypatch.syspath_prepend(ROOT)
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended, without_plug_ins():
            importlib.import_module("bench").main()
        return subprocess.CompletedProcess(command, ended.value.code, *capsys.readouterr())

    return run


STAGES = '''
"""A method with phases of all kinds, each with state that an interruption must not lose."""
import copy
import methods
import torch
from methods.core.pooled import total, value_of
from torch import nn


class Statistics(nn.Module):
    """Sums the features of what it sees."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.register_buffer("sum", torch.zeros(model.embed_dim))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, images, targets):
        features = self.model.forward_features(images)
        self.sum += features.float().mean(dim=1).sum(dim=0)
        self.count += len(images)


class Objective(nn.Module):
    """Classification, and a term that is no mean over images: the squared norm of the batch's mean feature's distance."""

    def __init__(self, model, criterion, statistics=None):
        super().__init__()
        self.model, self.criterion, self.statistics = model, criterion, statistics

    def forward(self, images, targets, noise):
        features = self.model.forward_features(images)
        features = features + 0.01 * noise.gumbel("features", 1, features.shape[-1])
        terms = {"classification": self.criterion(self.model.forward_head(features).float(), targets)}
        if self.statistics is not None:
            mean = self.statistics.sum / self.statistics.count.clamp(min=1)
            sums = torch.cat([features.float().mean(dim=1).sum(dim=0), features.new_full((1,), len(images), dtype=torch.float32)])
            terms["drift"] = methods.Pooled(sums, lambda sums: 0.1 * (sums[:-1] / sums[-1] - mean).pow(2).sum())
        return terms


class Counter:
    """What a hook remembers."""

    def __init__(self):
        self.calls = 0

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


@methods.register
class Stages(methods.Method):
    """Phases of all kinds: warm up, collect, scale, settle."""

    name = "stages"

    def sparsify(self, vit):
        sparse = copy.deepcopy(vit)
        sparse.register_buffer("scaled", torch.zeros(()))
        return sparse

    def phases(self, sparse, criterion, teacher=None):
        statistics, counter = Statistics(sparse), Counter()

        def finish():
            total(statistics.sum), total(statistics.count)

        def scale():
            with torch.no_grad():
                sparse.head.weight.mul_(1 + 0.1 * float(statistics.sum.abs().mean() / statistics.count))
                sparse.scaled.fill_(1)

        def count(step, steps):
            counter.calls += 1
            with torch.no_grad():
                sparse.head.bias.add_(1e-3 * sparse.scaled * counter.calls * torch.rand(()))

        return [
            methods.TrainPhase(name="warm", objective=Objective(sparse, criterion), share=0.4, artifact="warm"),
            methods.CollectPhase(name="collect", module=statistics, share=0.2, finish=finish, divided=True),
            methods.TransformPhase(name="scale", apply=scale),
            methods.TrainPhase(
                name="settle", objective=Objective(sparse, criterion, statistics), share=0.4, after_step=count, state=counter
            ),
        ]
'''


@pytest.fixture(scope="session")
def stages_file(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("plugin"), "stages", STAGES)
