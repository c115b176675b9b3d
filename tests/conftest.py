"""Small things that several test modules need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent

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
    """A plug-in outside the repository."""
    path = tmp_path_factory.mktemp("plugin") / "toy.py"
    path.write_text(TOY)
    return path


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
