"""Sparse vision transformer methods behind one interface.

    import methods
    methods.available()                                  # names, without importing torch
    method = methods.create("dynamicvit", keep_rate=0.7) # validated settings
    sparse = method.sparsify(vit)                        # a timm VisionTransformer in, the form that trains out
    fast = method.deploy(sparse)                         # the form that ships: same logits, pruned work skipped

A method is one module (or folder) of this package, a plug-in file, or an installed package's entry point in the group
`sparse_vit_bench.methods`; see `methods.core.contract` for what it must offer and `docs/methods.md` for how to write one.
"""

from methods.core.contract import (
    CollectPhase,
    Group,
    Method,
    Settings,
    TrainPhase,
    TransformPhase,
    Unsupported,
)
from methods.core.pooled import Pooled
from methods.core.registry import BASELINE, REFERENCE, available, create, describe, find, load_plugin, register
from methods.core.report import AuthorsCount, BlockReport, Estimate, FixedAttention, Overhead, Report

__all__ = [
    "BASELINE",
    "REFERENCE",
    "AuthorsCount",
    "BlockReport",
    "CollectPhase",
    "Estimate",
    "FixedAttention",
    "Group",
    "Method",
    "Overhead",
    "Pooled",
    "Report",
    "Settings",
    "TrainPhase",
    "TransformPhase",
    "Unsupported",
    "available",
    "create",
    "describe",
    "find",
    "load_plugin",
    "register",
]
