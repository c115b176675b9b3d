"""The dense baseline: timm's vision transformer as it is."""

from __future__ import annotations

import copy

from torch import nn

import methods


class Settings(methods.Settings):
    """continued: False trains from scratch with the dense budget. True is "dense+": the trained dense weights trained on
    for the adaptation budget with the common recipe, so that extra epochs are nobody's advantage."""

    continued: bool = False


@methods.register
class Dense(methods.Method):
    """The dense baseline: timm's vision transformer as it is."""

    name = "dense"
    work_varies = False
    Settings = Settings

    @property
    def start(self) -> str:
        return "dense" if self.settings.continued else "scratch"

    def sparsify(self, vit: nn.Module) -> nn.Module:
        return copy.deepcopy(vit)
