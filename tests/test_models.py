"""Backbones and the dense weights that they start from."""

import pytest
import timm
import torch
from conftest import ROOT

from harness import models
from harness.errors import UserError
from harness.spec import Backbone

SMALL = Backbone(name="vit_tiny_patch16_224", kwargs={"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2})


def test_a_backbone_is_a_function_of_its_seed():
    digests = [models.state_digest(models.build(SMALL, 5, 16, seed).state_dict()) for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    "wrap", [lambda state: state, lambda state: {"model": state}, lambda state: {"state_dict": state}]
)
def test_dense_weights_from_a_file(tmp_path, wrap):
    source = models.build(SMALL, 5, 16, 1)
    torch.save(wrap(source.state_dict()), tmp_path / "dense.pt")
    target = models.build(SMALL, 5, 16, 0)
    identity = models.load_weights(target, "dense.pt", SMALL, tmp_path)
    assert models.state_digest(target.state_dict()) == models.state_digest(source.state_dict())
    assert identity.startswith("file:")
    assert str(tmp_path) not in identity


def test_weights_of_a_smaller_image_size_are_resampled(tmp_path):
    torch.save(models.build(SMALL, 5, 16, 1).state_dict(), tmp_path / "dense.pt")
    large = models.build(SMALL, 5, 32, 0)
    models.load_weights(large, str(tmp_path / "dense.pt"), SMALL, ROOT)
    assert large.pos_embed.shape[1] == 65
    assert large(torch.randn(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize(
    ("weights", "message"),
    [("nothing.pt", "no such file"), ("text.pt", "not a readable checkpoint"), ("other.pt", "does not fit"), ("timm", "has 1000 classes, the data has 5")],
)  # fmt: skip
def test_weights_that_cannot_be_used_are_told_in_one_line(tmp_path, weights, message):
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save(timm.create_model("vit_tiny_patch16_224", depth=1).state_dict(), tmp_path / "other.pt")
    with pytest.raises(UserError) as told:
        models.load_weights(models.build(SMALL, 5, 16, 0), weights, SMALL, tmp_path)
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_no_network_is_told_in_one_line(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("nobody there\nmore")

    model = models.build(Backbone(name="deit_tiny_patch16_224"), None, None, 0)
    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(UserError, match=r"cannot be loaded \(nobody there\); check the network, or give a file"):
        models.load_weights(model, "timm", Backbone(name="deit_tiny_patch16_224"), ROOT)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (Backbone(name="deit_smal_patch16_224"), "did you mean 'deit_small_patch16_224'"),
        (Backbone(name="vit_tiny_patch16_224", kwargs={"embed_dims": 3}), "embed_dims"),
        (Backbone(name="vit_tiny_patch16_224", kwargs={"embed_dim": 25, "num_heads": 2}), "divisible"),
    ],
)
def test_wrong_backbones_are_told_in_one_line(backbone, message):
    with pytest.raises(UserError) as told:
        models.build(backbone, 5, None, 0)
    assert message in str(told.value)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 400
