"""What a method's code gives, to the bit: weights after a few steps, logits, counts and reports on small backbones."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

import methods
from harness import cost
from harness.freshness import code_digest
from harness.rules import BACKBONES, Subject
from harness.training.setup import PhaseLog
from methods import Unsupported

KEEP_RATE = 0.7  # that untrained models are set to keep
# Of a phase's log: what is not a time. Of counts: what will not grow when more is said about them.
LOGGED = ("name", "kind", "steps", "images", "macs", "skipped", "curve", "events")
COUNTED = (
    "macs_dense", "macs_theoretical", "macs_executed", "parts", "blocks", "params", "params_nonzero", "params_theoretical",
)  # fmt: skip


def fingerprint(name: str, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Plain values that are equal exactly where a method's results are; settings: by label. On one thread: sums must not depend on
    who is fast. ValueError for settings that the method does not take."""
    torch.set_num_threads(1)
    rows = [(label, methods.create(name, **chosen)) for label, chosen in settings.items()]
    packages = {name: importlib.metadata.version(name) for name in ("torch", "timm")}
    return {
        "revision": methods.find(name).revision, "digest": code_digest(name),
        "versions": packages | {"python": platform.python_version()},
        "rows": {
            label: {
                "settings": method.settings.model_dump(mode="json"),
                "backbones": {name: _results(Subject(method, name)) for name in BACKBONES},
            }
            for label, method in rows
        },
    }  # fmt: skip


@torch.no_grad()
def _results(subject: Subject) -> dict[str, Any]:
    method, images = subject.method, subject.images
    try:
        untrained = subject.sparse()
    except Unsupported as error:
        return {"refused": str(error)}
    with torch.enable_grad():
        trained = subject.trained
    calibrated = copy.deepcopy(untrained).eval()
    method.calibrate(calibrated, images, KEEP_RATE)
    return {
        "weights": exact(trained.state_dict()),
        "untrained weights": exact(untrained.state_dict()),
        "weights set to a keep rate": exact(calibrated.state_dict()),
        "training": [_logged(log) for log in subject.logs],
        "logits": exact(trained(images)),
        "deployed logits": exact(subject.deployed(images)),
        "deployed weights": exact(subject.deployed.state_dict()),
        "report": exact(method.report(trained, images)),
        "counts": _counts(cost.count(method, subject.vit, trained, subject.deployed, images).record()),
    }


def _counts(record: dict[str, Any]) -> dict[str, Any]:
    """Multiply-adds and parameters; not what is added to records later, such as how sure they are."""
    return {name: exact(record[name]) for name in COUNTED}


def _logged(log: PhaseLog) -> dict[str, Any]:
    return {name: exact(getattr(log, name)) for name in LOGGED}


def exact(value: Any) -> Any:
    """Plain values of tensors, dataclasses and containers: a digest for what is long, and every bit of a number."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        content = value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b""
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()[:16]}"
    if isinstance(value, np.ndarray):
        return exact(torch.from_numpy(np.ascontiguousarray(value)))
    if dataclasses.is_dataclass(value):
        return {field.name: exact(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): exact(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [exact(one) for one in value]
    return value.hex() if isinstance(value, float) else value if value is None else str(value)
