"""The ImageNet spec as it is, but for its size: 20 steps on a tree in ImageNet's layout, on the CPU. Both sizes are long tests; a
quarter of its depth stands for it."""

import json

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import ROOT, bench
from PIL import Image

CLASSES = [f"n{number:08d}" for number in range(1440764, 1440774)]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """224-pixel JPEGs, one of them damaged; the project's card with fewer classes; weights for DeiT-S."""
    folder, dice = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 1)):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                coarse = Image.fromarray(dice.integers(0, 256, (14, 14, 3), dtype=np.uint8))
                coarse.resize((224, 224)).save(folder / split / name / f"{name}_{number}.JPEG")
    damaged = folder / "train" / CLASSES[3] / f"{CLASSES[3]}_2.JPEG"
    damaged.write_bytes(damaged.read_bytes()[:700])
    card = yaml.safe_load((ROOT / "datasets" / "imagenet-1k.yaml").read_text())
    (folder / "card.yaml").write_text(yaml.safe_dump(card | {"classes": len(CLASSES), "val_fraction": 0.04}))
    for depth in (3, 12):
        torch.manual_seed(0)
        model = timm.create_model("deit_small_patch16_224", num_classes=len(CLASSES), depth=depth)
        torch.save(model.state_dict(), folder / f"deit{depth}.pt")
    return folder, damaged.name


@pytest.mark.parametrize("depth", [pytest.param(3, marks=pytest.mark.long), pytest.param(12, marks=pytest.mark.long)])
def test_twenty_steps_of_the_imagenet_spec(imagenet, tmp_path, depth):
    folder, damaged = imagenet
    changes = {
        "data.card": folder / "card.yaml", "data.workers": 2, "dense.weights": folder / f"deit{depth}.pt", "recipe.batch_size": 2,
        "budget.max_steps": 20, "dynamicvit.keep_rate": 0.7, "measure.batch_sizes": "[1]", "measure.seconds": 0.01, "measure.images": 1,
        "backbone.kwargs": f"{{depth: {depth}}}",
    }  # fmt: skip
    sets = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    spec = ROOT / "benchmarks" / "imagenet-deit-small.yaml"
    done = bench("--spec", spec, "--data-root", folder, "--methods", "dynamicvit", *sets, "--results", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{damaged}: " in done.stdout
    assert "another image is taken instead" in done.stdout
    records = [json.loads(path.read_text()) for path in (tmp_path / "imagenet-deit-small").glob("*.json")]
    trained = {record["label"]: record for record in records if record["kind"] == "train"}
    assert trained.keys() == {"dense", "dense+", "DynamicViT 0.7"}
    (phase,) = trained["DynamicViT 0.7"]["phases"]
    assert (phase["steps"], phase["images"], phase["skipped"]) == (20, 40, 0)
    assert trained["DynamicViT 0.7"]["ema_top1"] is not None
    assert damaged in trained["DynamicViT 0.7"]["unreadable"][0]
    # Forward and backward of DynamicViT, whose training masks, and the teacher's forward: four forwards of 4.6 G.
    assert phase["macs"] / 40 == pytest.approx(4 * 4.6e9 * depth / 12, rel=0.15)
