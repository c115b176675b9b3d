"""What the rules look at: a method on a small backbone, trained for a few steps on random images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import timm
import torch
from torch import Tensor, nn

from harness import device
from harness.data.cards import Card
from harness.data.dataset import ImageData
from harness.data.sources import Arrays
from harness.spec import Recipe
from harness.training.engine import run_phases
from harness.training.optimizers import make_criterion
from harness.training.setup import PhaseLog, Training
from methods import Method

SIZE, CLASSES, IMAGES = 24, 7, 32
STEPS = 6
_SIZES = {"img_size": SIZE, "patch_size": 4, "embed_dim": 48, "depth": 12, "num_heads": 3, "num_classes": CLASSES}
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", {}),
    "average pooling": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 3}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
}
RECIPE = Recipe(
    batch_size=8,
    lr=1e-3,
    warmup_epochs=0,
    crop="none",
    auto_augment=None,
    color_jitter=0,
    random_erasing=0,
    mixup=0,
    cutmix=0,
)


class Broken(AssertionError):
    """A rule does not hold; the message says how."""


@dataclass
class Subject:
    """A method on a backbone, and what the rules look at. Expensive parts are made once."""

    method: Method
    backbone: str
    images: Tensor = field(
        default_factory=lambda: torch.randn(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    )

    @cached_property
    def vit(self) -> nn.Module:
        name, changes = BACKBONES[self.backbone]
        torch.manual_seed(0)
        return timm.create_model(name, **(_SIZES | changes)).eval()

    def sparse(self) -> nn.Module:
        vit = self.vit  # made with a seed of its own
        torch.manual_seed(1)
        return self.method.sparsify(vit)

    def phases(self, sparse: nn.Module) -> Any:
        teacher = copy.deepcopy(self.vit) if self.method.uses_teacher else None
        return self.method.phases(sparse, make_criterion(RECIPE), teacher)

    def run(self, **changes: Any) -> tuple[nn.Module, list[PhaseLog]]:
        """A new sparse model after a few steps on random images, and the logs of its phases. changes: see Training."""
        sparse = self.sparse()
        training = Training(RECIPE, random_data(), device.plan("cpu", "float32"), seed=0, steps=STEPS, **changes)
        logs, _ = run_phases(sparse, self.phases(sparse), training)
        return sparse.eval(), logs

    @cached_property
    def _once(self) -> tuple[nn.Module, list[PhaseLog]]:
        return self.run()

    @property
    def trained(self) -> nn.Module:
        """The model after a few steps: rules hold for trained models, not only for fresh ones."""
        return self._once[0]

    @property
    def logs(self) -> list[PhaseLog]:
        return self._once[1]

    @cached_property
    def deployed(self) -> nn.Module:
        return self.method.deploy(self.trained)


Rule = Callable[[Subject], None]


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Broken(otherwise)


def random_data() -> ImageData:
    """Random images: the rules are about the method, not about learning."""
    generator = torch.Generator().manual_seed(5)
    arrays = Arrays(
        torch.randint(0, 256, (IMAGES, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator),
        torch.arange(IMAGES) % CLASSES,
    )
    ids = torch.arange(IMAGES)
    card = Card(name="random", classes=CLASSES, image_size=SIZE)
    return ImageData(card, SIZE, CLASSES, "random", arrays, arrays, train_ids=ids, val_ids=ids[:0])
