"""No argument of a backbone loads weights or settings from elsewhere: ids know the argument, not what is in a file."""

import inspect
import pickle

import pytest
import timm
import yaml
from conftest import ROOT, tiny_spec
from timm.models import build_model_with_cfg

from harness.errors import UserError
from harness.spec import MANAGED, Backbone, _foreign
from harness.yamlfile import validate

REFUSED = {
    "a checkpoint": {"checkpoint_path": "x.pth"},
    "timm's weights": {"pretrained": True},
    "another configuration": {"pretrained_cfg": {"file": "x.pth"}},
    "a tag": {"pretrained_cfg": "augreg_in21k"},
    "its overlay": {"pretrained_cfg_overlay": {"url": "https://example.org/x.pth"}},
    "a cache": {"cache_dir": "/somewhere"},
    "how strictly": {"pretrained_strict": False},
    "arguments of a source": {"pretrained_model_args": {"depth": 2}},
    "a pruned model's file": {"pruned": True},
    "a repository": {"hf_hub_id": "timm/x"},
    "hyphens": {"cache-dir": "x"},
    "capitals": {"Checkpoint_Path": "x.pth"},
    "inside another": {"model_args": {"inner": {"checkpoint_path": "x.pth"}}},
    "inside a list": {"stages": [{"pretrained_cfg": {"file": "x.pth"}}]},
    "a file by itself": {"feature_cfg": {"file": "x.pth"}},
    "even of no effect": {"checkpoint_path": None},
}


@pytest.mark.parametrize("kwargs", REFUSED.values(), ids=REFUSED)
def test_what_loads_from_elsewhere_is_refused(kwargs):
    with pytest.raises(UserError, match=r"backbone.*kwargs: .* would load something.*use dense\.weights") as told:
        validate(Backbone, {"name": "deit_tiny_patch16_224", "kwargs": kwargs}, "backbone")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "name",
    [
        "hf-hub:timm/vit_tiny_patch16_224.augreg_in21k",
        "hf_hub:timm/x",
        "local-dir:/somewhere",
        "timm/vit_tiny_patch16_224",
        "C:\\models\\vit",
    ],
)
def test_names_of_places_are_refused(name):
    with pytest.raises(UserError, match="is a place to load from"):
        validate(Backbone, {"name": name}, "backbone")


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"patch_size": 4, "reg_tokens": 3, "global_pool": "avg"}, {"init_values": 1e-5, "norm_layer": "layernorm"}],
)
def test_other_arguments_are_fine(kwargs):
    assert Backbone(name="vit_tiny_patch16_224.augreg_in21k", kwargs=kwargs).kwargs == kwargs


class Malicious:
    def __reduce__(self):
        return (eval, ("open('ran', 'w').close()",))


@pytest.mark.parametrize("how", ["spec", "set", "survey", "latency", "cost"])
def test_no_command_reads_the_file(tmp_path, tiny_data, monkeypatch, here, how):
    """Under timm 1.0.22 it ran what is in the pickle."""
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Malicious()))
    backbone = {"name": "vit_tiny_patch16_224", "kwargs": {"checkpoint_path": str(tmp_path / "evil.pth")}}
    content = {
        "spec": tiny_spec(tiny_data, backbone=backbone),
        "set": tiny_spec(tiny_data),
        "survey": {"cases": [{"backbone": backbone}]},
    }
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(content.get(how, {})))
    file, results = f"checkpoint_path={tmp_path / 'evil.pth'}", ("--results", tmp_path / "results")
    command = {
        "spec": ("--spec", tmp_path / "x.yaml", *results),
        "set": ("--spec", tmp_path / "x.yaml", *results, "--set", f"backbone.kwargs.{file}"),
        "survey": ("latency", "--spec", tmp_path / "x.yaml", *results),
        "latency": ("latency", "--methods", "dense", "--set", f"backbone.{file}", *results),
        "cost": ("cost", "--methods", "dense", "--set", f"backbone.{file}"),
    }[how]
    done = here(*command)
    assert done.returncode == 2, done.stdout + done.stderr
    assert (
        "checkpoint_path would load something from a file or the network; use dense.weights"
        in done.stderr + done.stdout
    )
    assert not list(tmp_path.rglob("ran"))
    assert not (ROOT / "ran").exists()


HARMLESS = {  # of timm's factory: what changes the network and reads nothing
    "model_name",
    "scriptable",
    "exportable",
    "no_jit",
    "kwargs",
    "model_cls",
    "variant",
    "model_cfg",
    "feature_cfg",
    "kwargs_filter",
    "in_chans",
}


def test_all_arguments_of_timms_factory_are_known():
    """A new release's argument that reads files fails here, until somebody has looked at it."""
    arguments = [
        name for factory in (timm.create_model, build_model_with_cfg) for name in inspect.signature(factory).parameters
    ]
    unknown = [name for name in arguments if name not in HARMLESS | MANAGED.keys() and not list(_foreign({name: None}))]
    assert unknown == []
